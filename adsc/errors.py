"""Errors that several rooms raise."""


class CostError(ValueError):
    """A cost that can't be given exactly, or arguments that can't be right; the message holds the
    way out."""


class UnsupportedModel(TypeError):
    """The model is of no family in the table, or is arranged as dropping can't serve it."""


class VisionTokenError(ValueError):
    """Vision tokens and images (or video frames) of a call can't be reconciled."""
