"""OUT while it is being written: a hidden folder beside it, with a journal of the weight files that are finished.

It becomes OUT by a rename when all of it is on the disk. A conversion that fails or is stopped removes it; one that was
killed, or is to be resumed, leaves it, and by the journal a later one goes on: files of the right checksum stay, all
else is made again.

Where a crash cut the last renames, `recover` puts back what is there, and deletes nothing. What was replaced is deleted
only by a conversion that replaces OUT, once the files in OUT are seen to be those that the journal tells of.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ..errors import CheckpointError
from ..options import Say, silent
from ..reading.plain import SourceFile
from .progress import each
from .shards import sha256

CHANGED = {
    "olmem": "another version of olmem began it",
    "source": "the files of SRC have changed since",
    "options": "it was begun with other options",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Counts = dict[str, int]
StraysOf = Callable[[Path], list[str]]


class Partial:
    """The folder, and by name the files that a resumed conversion has found finished, with their counts of numbers that
    are none."""

    def __init__(self, folder: Path, journal: BinaryIO, finished: dict[str, Counts]):
        self.folder, self.journal, self.finished = folder, journal, finished

    def finish(self, name: str, digest: str, nonfinite: Counts) -> None:
        """Notes that the weight file `name` is on the disk, whole, with this sha256."""
        note(self.journal, {"file": name, "sha256": digest, "nonfinite": nonfinite})


def note(journal: BinaryIO, entry: Mapping[str, Any]) -> None:
    """Adds an entry to the journal, and waits until it is on the disk."""
    journal.write(json.dumps(entry).encode() + b"\n")
    journal.flush()
    os.fsync(journal.fileno())


def job_of(files: Iterable[SourceFile], version: str, *options: Any) -> dict[str, str]:
    """What must be the same for a conversion to be resumed: version, and hashes of the files of weights and options."""
    state = sorted((file.path.name, file.size, file.modified) for file in files)
    return {"olmem": version, "source": hashed(state), "options": hashed(options)}


def hashed(value: Any) -> str:
    """Returns the checksum of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def places(out: Path) -> tuple[Path, Path, Path, Path]:
    """Beside `out`: the folder that is being written, its journal, the folder that was there, and the lock."""
    partial, journal, replaced, lock = (
        out.with_name(f".{out.name}.{end}") for end in ("partial", "partial.jsonl", "replaced", "lock")
    )
    return partial, journal, replaced, lock


def require_apart(source: Path, out: Path, others: Mapping[str, str | Path | None]) -> None:
    """Raises CheckpointError if writing `out` could change or remove what the conversion reads.

    The folders beside `out` are written and removed too. others: what else is read, by the name of its option.
    """
    folder, _, replaced, _ = places(out)
    for place in (out, folder, replaced):
        if lies_in(source, place) or lies_in(place, source):
            what = f"`OUT` and SRC must lie apart (got {out} and {source}"
            what += ")" if place == out else f", and a conversion to OUT writes {place})"
            raise CheckpointError(f"{what}; name another folder.")
        if lies_in(Path.cwd(), place):
            raise CheckpointError(
                f"`OUT` must not be the folder you are in, nor hold it (got {out}, whose conversion writes {place}); "
                "name another one."
            )
    for option, path in others.items():
        for place in (folder, replaced):
            if path is not None and lies_in(Path(path), place):
                raise CheckpointError(
                    f"`{option}` must lie apart from what a conversion to {out} removes (got {path} in {place}); copy "
                    "it to another place first."
                )


def lies_in(inner: Path, outer: Path) -> bool:
    """Whether `inner` is `outer` or lies in it, whatever links lead there and however their names are spelled."""
    inner, outer = Path(os.path.realpath(inner)), Path(os.path.realpath(outer))
    if inner.is_relative_to(outer):
        return True
    with suppress(OSError):
        status = outer.stat()
        return any(parent.exists() and os.path.samestat(parent.stat(), status) for parent in (inner, *inner.parents))
    return False


def recover(out: Path, say: Say = silent) -> None:
    """After a crash between the last renames, puts the folder that was `out` back, or else the one that was to replace
    it, if it is whole. Nothing is deleted."""
    folder, notes, replaced, _ = places(out)
    if os.path.lexists(out) or not os.path.lexists(notes):
        return
    with owned(out):
        entries = read_entries(notes)
        if not was_replacing(entries) or os.path.lexists(out):
            return
        if replaced.is_dir():
            replaced.rename(out)
            say(f"note: a conversion that was to replace {out} was killed, so it is restored")
        elif is_whole(folder, entries):
            folder.rename(out)
            say(f"note: {out} was written by a conversion that was killed at its end, when the old folder was gone")
        flush(out.parent)


def was_replacing(entries: list[dict[str, Any]]) -> bool:
    """Whether the conversion had written all files, and had begun to put its folder in the place of another one."""
    return any("replaces" in entry for entry in entries)


def is_whole(folder: Path, entries: list[dict[str, Any]]) -> bool:
    """Whether the folder holds all weight files that the journal tells of, with their checksums."""
    noted = [entry for entry in entries if "file" in entry]
    sound = all(isinstance(entry["file"], str) and is_sound(folder / entry["file"], entry) for entry in noted)
    return bool(noted) and sound and (folder / "config.json").is_file()


def finish_replacing(out: Path, entries: list[dict[str, Any]], strays_of: StraysOf, say: Say) -> list[dict[str, Any]]:
    """Ends what a crash behind the last rename cut: the folder that was replaced goes, if what replaced it is there.

    Returns the journal's entries, none if they told of nothing else.
    """
    folder, _, replaced, _ = places(out)
    if not was_replacing(entries) or folder.exists():
        return entries
    if os.path.lexists(replaced) and is_whole(out, entries):
        discard(replaced, out, strays_of, say)
    return []


def discard(replaced: Path, out: Path, strays_of: StraysOf, say: Say) -> None:
    """Removes the folder that was `out`, unless somebody has put something of their own into it meanwhile."""
    strays = strays_of(replaced) if replaced.exists() else []
    if not strays:
        shutil.rmtree(replaced, ignore_errors=True)
    if os.path.lexists(replaced):
        why = f"is kept because it holds {', '.join(strays[:3])}" if strays else "could not be removed"
        say(f"note: the old {out} {why}: it is now {replaced}; move it away")


@contextmanager
def written_whole(
    out: Path,
    job: Mapping[str, str],
    names: Collection[str],
    *,
    overwrite: bool,
    resume: bool,
    strays_of: StraysOf = lambda folder: [],
    say: Say = silent,
) -> Iterator[Partial]:
    """What becomes `out` when the block ends well. When it does not, it is removed, or with `resume` kept.

    names: of its weight files. strays_of: what somebody else has put into a folder that is replaced, which is then kept
    beside it.
    """
    absent = [parent for parent in out.parents if not parent.exists()]
    folder, notes, replaced, _ = places(out)
    began, entries = False, []
    try:
        if absent:
            out.parent.mkdir(parents=True, exist_ok=True)
        with owned(out), open(notes, "a+b", opener=without_links) as journal:
            try:
                entries = read_notes(journal)
                if overwrite:
                    entries = finish_replacing(out, entries, strays_of, say)
                check_places(out, folder, replaced, entries, job, overwrite, resume)
                began = True
                finished = sound_files(folder, entries[1:], names) if resume else {}
                if resume and entries:
                    say(f"resumed: {len(finished)} weight files were finished")
                begin(folder, journal, job, finished)
                flush(out.parent)  # so that the journal outlives a power cut, as what it tells of does
                yield Partial(folder, journal, finished)
                sync(folder)
                replaces = swap(folder, out, replaced, journal, overwrite)
            except BaseException:
                if began and folder.exists() and resume:
                    say(f"unfinished: the same command goes on with {out}")
                elif began:
                    shutil.rmtree(folder, ignore_errors=True)
                to_settle = folder.exists() or os.path.lexists(replaced)
                if not (to_settle and (entries or began)):
                    notes.unlink(missing_ok=True)
                raise
            flush(out.parent)
            if replaces:
                discard(replaced, out, strays_of, say)
            notes.unlink()
    except BaseException as error:
        for parent in absent:
            with suppress(OSError):
                parent.rmdir()
        if began and isinstance(error, CheckpointError) and str(folder) in str(error):
            raise error.renamed(str(folder), str(out)) from error
        if isinstance(error, OSError) and is_of_out(error, out):
            remedy = "free space, or choose another disk" if error.errno in FULL else "choose another folder"
            raise CheckpointError(f"`OUT` must be writable ({out}: {error.strerror or error}); {remedy}.") from error
        raise


def is_of_out(error: OSError, out: Path) -> bool:
    """Returns whether an error is of the disk that OUT is on."""
    return error.errno in FULL or str(error.filename or "").startswith(str(out.parent))


@contextmanager
def owned(out: Path) -> Iterator[None]:
    """Holds the lock beside `out`, so that no two conversions write one folder."""
    require_no_link(out)
    path = places(out)[-1]
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise CheckpointError(
            f"`OUT` must be written by one conversion (another one is writing {out}); wait for it."
        ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever opened it meanwhile sees that it is no file any more
        lock.release()


def without_links(path: str, flags: int) -> int:
    """Opens a file, but follows no link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def require_no_link(out: Path) -> None:
    """What lies beside OUT may have come with an archive, to lead what is written or removed there elsewhere."""
    for path, kind in zip(places(out), (Path.is_dir, Path.is_file, Path.is_dir, Path.is_file), strict=True):
        if os.path.lexists(path) and (path.is_symlink() or not kind(path)):
            raise CheckpointError(f"`OUT` must not have {path} beside it, which is no conversion's; move it away.")


def read_entries(notes: Path) -> list[dict[str, Any]]:
    """The journal's entries, of a file that is left as it is."""
    with open(notes, "rb", opener=without_links) as journal:
        return entries_of(journal)[0]


def read_notes(journal: BinaryIO) -> list[dict[str, Any]]:
    """The journal's entries, without one that a crash cut short, which is removed."""
    entries, length = entries_of(journal)
    journal.truncate(length)
    return entries


def entries_of(journal: BinaryIO) -> tuple[list[dict[str, Any]], int]:
    """The entries up to the first that is none, and the bytes that they take."""
    journal.seek(0)
    entries, length = [], 0
    for line in journal.read().splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not line.endswith(b"\n") or not isinstance(entry, dict):
            break
        entries.append(entry)
        length += len(line)
    return entries, length


def check_places(
    out: Path,
    folder: Path,
    replaced: Path,
    entries: list[dict[str, Any]],
    job: Mapping[str, str],
    overwrite: bool,
    resume: bool,
) -> None:
    """Raises CheckpointError if something lies beside OUT that this conversion must not go on with or remove."""
    strange = [folder] if not entries and folder.exists() and any(folder.iterdir()) else []
    strange += [replaced] if overwrite and os.path.lexists(replaced) else []
    if strange:
        raise CheckpointError(f"`OUT` must not have {strange[0]} beside it, which is in the way; move it away.")
    if entries and resume and (changed := [name for name in job if entries[0].get(name) != job[name]]):
        raise CheckpointError(
            f"`--resume` must find the conversion that it goes on with (of {out}, {CHANGED[changed[0]]}); add "
            "--overwrite in its place to begin anew."
        )
    if entries and not resume and not overwrite:
        raise CheckpointError(
            f"`OUT` must not be half-written (a conversion to {out} was killed); add --resume to go on with it, or "
            "--overwrite to begin anew."
        )


def sound_files(folder: Path, entries: list[dict[str, Any]], names: Collection[str]) -> dict[str, Counts]:
    """The finished files, of these names, that still have their checksums."""
    noted = {entry["file"]: entry for entry in entries if entry.get("file") in list(names)}
    files = each(list(noted.items()), "checking what was written", "file")
    return {name: entry["nonfinite"] for name, entry in files if is_sound(folder / name, entry)}


def is_sound(path: Path, entry: Mapping[str, Any]) -> bool:
    """Returns whether a file has the checksum that the journal tells of."""
    counts = entry.get("nonfinite")
    known = isinstance(counts, dict) and all(type(count) is int for count in counts.values())
    return known and path.is_file() and not path.is_symlink() and sha256(path) == entry.get("sha256")


def begin(folder: Path, journal: BinaryIO, job: Mapping[str, str], finished: Mapping[str, Counts]) -> None:
    """Nothing in the folder but finished files; without any, another journal."""
    if not finished:
        shutil.rmtree(folder, ignore_errors=True)
        journal.truncate(0)
        note(journal, job)
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in finished:
            path.unlink()


def swap(folder: Path, out: Path, replaced: Path, journal: BinaryIO, overwrite: bool) -> bool:
    """Whether there was a folder, which is then `replaced`."""
    replaces = overwrite and out.exists()
    try:
        if replaces:
            note(journal, {"replaces": str(out)})
            out.rename(replaced)
        folder.rename(out)
        return replaces
    except BaseException:
        if os.path.lexists(replaced) and not os.path.lexists(out):
            replaced.rename(out)
        raise


def sync(folder: Path) -> None:
    """Flushes every file and the folder itself to the disk."""
    for path in [*folder.iterdir(), folder]:
        flush(path)


def flush(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
