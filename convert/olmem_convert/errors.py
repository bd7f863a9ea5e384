"""The error of the converter."""


class CheckpointError(Exception):
    """A checkpoint, or a file that goes with it, that cannot be converted as it is."""
