"""The error of the converter."""

LONGEST = 8000  # characters of a message, which may repeat what a damaged file says


class CheckpointError(Exception):
    """A checkpoint, or a file that goes with it, that cannot be converted as it is."""

    def __init__(self, message: str):
        super().__init__(message if len(message) <= LONGEST else f"{message[: LONGEST - 1000]} … {message[-1000:]}")


class DifferenceError(CheckpointError):
    """A model that does not compute what it was converted from, with a table, whose lines are all of our own words."""


def reason(error: Exception) -> str:
    """What a config's class says is wrong, of which strict dataclasses make several lines."""
    last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    return last[0].strip().removeprefix("ValueError: ").removeprefix("TypeError: ")
