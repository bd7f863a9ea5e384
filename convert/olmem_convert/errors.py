"""The errors of the converter, and the one form in which it repeats what others say."""

from collections.abc import Iterable

LONGEST = 8000  # characters of a message, which may repeat what a damaged file says


class CheckpointError(Exception):
    """A checkpoint, or a file that goes with it, that cannot be converted as it is.

    The message is one line, whatever the names and values in it hold; `lines` may follow it, each one line too.
    """

    def __init__(self, message: str, lines: Iterable[str] = ()):
        message = message if len(message) <= LONGEST else f"{message[: LONGEST - 1000]} … {message[-1000:]}"
        self.lines = [one_line(line) for line in lines]
        super().__init__("\n".join([one_line(message), *self.lines]))

    @property
    def message(self) -> str:
        """The first line."""
        return str(self).split("\n", 1)[0]

    def renamed(self, old: str, new: str) -> "CheckpointError":
        """The same error, of another place."""
        return type(self)(self.message.replace(one_line(old), one_line(new)), self.lines)


class DifferenceError(CheckpointError):
    """A model that does not compute what it was converted from; its lines are a table of what differs."""


def one_line(text: str) -> str:
    """What a checkpoint, a path or a server says, with signs that move the cursor or end the line written out."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def reason(error: Exception) -> str:
    """What a config's class says is wrong, of which strict dataclasses make several lines."""
    last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    return last[0].strip().removeprefix("ValueError: ").removeprefix("TypeError: ")


def shortened(value: object) -> str:
    """A value as it may be repeated in a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
