"""Plain files of a checkpoint, which somebody else made: they are opened once, and what was checked is what is read.

A link in a checkpoint may lead to a file of the folder that it lies in, or, in a Hub cache, to that cache's `blobs`;
anywhere else it could make a conversion carry along what its user never meant to publish.
"""

import io
import os
import pickle
import re
import stat
import threading
import weakref
from collections import OrderedDict
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

LONGEST_NAME = 255  # of a file, in bytes
FLAGS = os.O_RDONLY | sum(getattr(os, f"O_{name}", 0) for name in ("NOFOLLOW", "NONBLOCK", "CLOEXEC", "BINARY"))
MOST_OPEN = 128  # files at a time; a system lets a process have 256 or more


@contextmanager
def reading(
    path: Path, remedy: str = "it is damaged or was edited: correct it, or copy it again from its source"
) -> Iterator[None]:
    """Turns whatever a library raises over a damaged file into one error that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"`{path.name}` must exist ({path} does not); {remedy}.") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"`{path}` must hold tensors and nothing that acts (got: {str(error)[:500]}); it is damaged, or somebody "
            "made it so: copy it again from a source that you trust."
        ) from error
    except PermissionError as error:
        where = error.filename or path
        raise CheckpointError(f"`{where}` must be readable by you (it is not); change its permissions.") from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"`{path}` must be readable (got: {reason[:500]}); {remedy}.") from error


def require_own(path: Path) -> Path:
    """The file or folder `path`, unless it is a link that leads out of where it lies."""
    if not path.is_symlink():
        return path
    with reading(path):
        target = path.resolve()  # a loop of links is an error
    if target.is_relative_to(path.parent.resolve()) or is_blob(path, target):
        return path
    raise CheckpointError(
        f"`{path}` must not be a link out of its folder (it leads to {target}), as what it leads to would be published "
        "with the model; if the link is your own, put the file itself there (`cp -rL` copies a folder so)."
    )


def is_blob(path: Path, target: Path) -> bool:
    """Whether a link of a Hub cache, `models--…/snapshots/HASH/…`, leads where such links do: to the `blobs` of its
    repository, or to those that the repositories of the cache share."""
    for snapshots in path.absolute().parents:
        repository = snapshots.parent.resolve()
        if snapshots.name == "snapshots" and repository.name.startswith("models--"):
            inside = target.relative_to(repository.parent).parts if target.is_relative_to(repository.parent) else ()
            of_repository = inside[:2] == (repository.name, "blobs") and len(inside) == 3
            shared = inside[:1] == ("blobs",) and len(inside) == 3 and re.fullmatch(r"[0-9a-f]{64}", inside[2])
            return bool(of_repository or shared)
    return False


def require_plain(path: Path, largest: int | None = None) -> Path:
    """The path, once it is known to be a file of the checkpoint's own, neither a pipe nor a device, of at most
    `largest` bytes."""
    with reading(path):
        status = require_own(path).stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "folder" if stat.S_ISDIR(status.st_mode) else "pipe or device"
        raise CheckpointError(f"`{path}` must be a file (it is a {kind}); put the file itself there.")
    if largest is not None and status.st_size > largest:
        raise CheckpointError(
            f"`{path}` must have at most {largest:,} bytes (it has {status.st_size:,}), as no such file has more; it "
            "is of another kind: put the right one there."
        )
    return path


def identity(status: os.stat_result) -> tuple[int, ...]:
    """What of a file says that it is the same one, and has not changed: nobody can set the last of them."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class SourceFile:
    """A plain file, opened without following links. Its descriptor is kept; where it had to be closed, as too many
    files were open, the file is opened again and must be the same one, unchanged."""

    recent: "OrderedDict[int, weakref.ref[SourceFile]]" = OrderedDict()  # noqa: RUF012  of those open, the oldest first
    lock = threading.Lock()

    def __init__(self, path: Path, largest: int | None = None):
        self.path = require_plain(path, largest)
        with reading(path):
            self.real = os.path.realpath(path, strict=True)
            self.file: io.FileIO | None = self.opened()
            status = os.fstat(self.file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it has become something other than a file")
        self.identity, self.size, self.modified = identity(status), status.st_size, status.st_mtime_ns
        self.reading = threading.Lock()
        self.note()

    def opened(self) -> io.FileIO:
        """Opens the file without following links."""
        return io.FileIO(os.open(self.real, FLAGS), closefd=True)

    def note(self) -> None:
        """Counts it as used now, and closes the one that was not for the longest time."""
        with SourceFile.lock:
            SourceFile.recent[id(self)] = weakref.ref(self)
            SourceFile.recent.move_to_end(id(self))
            while len(SourceFile.recent) > MOST_OPEN:
                _, oldest = SourceFile.recent.popitem(last=False)
                if file := oldest():
                    file.file = None  # whoever reads it now still holds it

    def handle(self) -> io.FileIO:
        """Returns the open file, which is opened again if it had to be closed and is still the same."""
        file = self.file
        if file is None:
            file = self.opened()
            if identity(os.fstat(file.fileno())) != self.identity:
                raise self.changed()
            self.file = file
        self.note()
        return file

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Reads bytes from `offset` on into the buffer; returns how many there were."""
        with self.reading, reading(self.path):
            file = self.handle()
            file.seek(offset)
            return file.readinto(buffer)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at `offset`, fewer where the file ends."""
        data = bytearray(max(min(length, self.size - offset), 0))
        view, done = memoryview(data), 0
        while done < len(data) and (count := self.read_into(view[done:], offset + done)):
            done += count
        return bytes(view[:done])

    def require_same(self) -> None:
        """Raises CheckpointError if the file has changed since it was opened, or its name leads to another one."""
        try:
            named = os.stat(self.real, follow_symlinks=False)
        except OSError:
            raise self.changed() from None
        if identity(named) != self.identity or os.path.realpath(self.path) != self.real:
            raise self.changed()

    def changed(self) -> CheckpointError:
        """Returns the error that says that the file is no longer the one that was checked."""
        return CheckpointError(
            f"`{self.path}` must stay as it is while it is read (it was changed or replaced); wait for what writes it, "
            "and convert again."
        )


def member(folder: Path, name: Any) -> Path:
    """The file `name` inside `folder`, or an error when the name would lead elsewhere."""
    text = name if isinstance(name, str) else ""
    plain = text == os.path.basename(text) and "\0" not in text and len(text.encode("utf-8", "replace")) <= LONGEST_NAME
    if not plain or text in ("", ".", ".."):
        raise CheckpointError(
            f"`{folder}` must name files of its own folder only (got {str(name)[:LONGEST_NAME]!r}); do not trust it."
        )
    return folder / text


def refuse_strays(folder: Path, pattern: str, known: Container[str], index_name: str) -> None:
    """Files of the pattern must be among the known ones."""
    strays = sorted(path.name for path in folder.glob(pattern) if path.name not in known)
    if strays:
        raise CheckpointError(
            f"`{folder / strays[0]}` must be listed in `{index_name}` (it is not); files of two checkpoints are "
            "mixed: move what does not belong here away."
        )
