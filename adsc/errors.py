"""Errors that several rooms raise."""


class CostError(ValueError):
    """A cost that can't be computed exactly, or an invalid argument, with what to do."""


class UnsupportedModel(TypeError):
    """A model of an unknown family, or with a part that dropping doesn't support."""


class VisionTokenError(ValueError):
    """The vision tokens of a call don't match its images (or video frames)."""
