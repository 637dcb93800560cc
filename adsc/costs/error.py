"""The one error of cost accounting, in its own file because several modules raise it."""


class CostError(ValueError):
    """A cost that can't be given exactly, or arguments that can't be right; the message holds the
    way out."""
