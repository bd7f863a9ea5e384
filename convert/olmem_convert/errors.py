"""The error of the converter."""


class CheckpointError(Exception):
    """A checkpoint, or a file that goes with it, that cannot be converted as it is."""


def reason(error: Exception) -> str:
    """What a config's class says is wrong, of which strict dataclasses make several lines."""
    last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    return last[0].strip().removeprefix("ValueError: ").removeprefix("TypeError: ")
