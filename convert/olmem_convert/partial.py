"""OUT while it is being written: a hidden folder beside it, with a journal of the weight files that are finished.

It becomes OUT by a rename when all of it is on the disk. A conversion that fails or is stopped removes it; one that was
killed, or is to be resumed, leaves it, and by the journal a later one goes on: files of the right checksum stay, all
else is made again.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from .errors import CheckpointError
from .shards import sha256

# What of a source says whether it is still the same: the rest, as logs, may change.
OF_WEIGHTS = {".bin", ".distcp", ".json", ".metadata", ".pt", ".safetensors", ".yaml"}
CHANGED = {
    "olmem": "another version of olmem began it",
    "source": "the files of SRC have changed since",
    "config": "it was begun with other options",
    "weights": "it was begun with other options",
}


class Partial:
    """The folder, and what of it a resumed conversion has found finished."""

    def __init__(self, folder: Path, journal: TextIO, finished: dict[str, str]):
        self.folder, self.journal, self.finished = folder, journal, finished

    def finish(self, name: str, digest: str) -> None:
        """Notes that the weight file `name` is on the disk, whole, with this sha256."""
        note(self.journal, {"file": name, "sha256": digest})


def note(journal: TextIO, entry: Mapping[str, Any]) -> None:
    journal.write(json.dumps(entry) + "\n")
    journal.flush()
    os.fsync(journal.fileno())


def job_of(source: Path, version: str, config: str, files: Mapping[str, list[str]]) -> dict[str, str]:
    """What must be the same for a conversion to be resumed: hashes of the source's state, the config and the plan."""
    paths = sorted(source.rglob("*")) if source.is_dir() else [source, source.parent / "config.json"]
    kept = [path for path in paths if (path.suffix or path.name) in OF_WEIGHTS and path.is_file()]
    state = [(str(path.relative_to(source.parent)), path.stat().st_size, path.stat().st_mtime_ns) for path in kept]
    return {"olmem": version, "source": hashed(state), "config": hashed(config), "weights": hashed(files)}


def hashed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@contextmanager
def written_whole(
    out: Path,
    job: Mapping[str, str],
    *,
    overwrite: bool,
    resume: bool,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Partial]:
    """What becomes `out` when the block ends well. When it does not, it is removed, or with `resume` kept."""
    absent = [parent for parent in out.parents if not parent.exists()]
    folder, notes, replaced = (out.with_name(f".{out.name}.{end}") for end in ("partial", "partial.jsonl", "replaced"))
    try:
        if absent:
            out.parent.mkdir(parents=True, exist_ok=True)
        with owned(notes, out) as journal:
            began = False
            try:
                recover(out, replaced)
                if os.path.lexists(out) and not overwrite:
                    raise CheckpointError(f"`OUT` must not exist yet (got {out}); name a new folder.")
                entries = list(read_notes(journal))
                check_resumable(out, folder, entries, job, overwrite, resume)
                began = True
                finished = sound_files(folder, entries[1:]) if resume else {}
                if resume and entries:
                    say(f"resumed: {len(finished)} weight files were finished")
                begin(folder, journal, job, finished)
                yield Partial(folder, journal, finished)
                sync(folder)
                swap(folder, out, replaced, overwrite)
                notes.unlink()
                flush(out.parent)
                shutil.rmtree(replaced, ignore_errors=True)
            except BaseException:
                if began and resume:
                    say(f"unfinished: the same command goes on with {out}")
                elif began:
                    shutil.rmtree(folder, ignore_errors=True)
                if not folder.exists():
                    notes.unlink(missing_ok=True)
                raise
    except BaseException as error:
        for parent in absent:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, CheckpointError) and str(folder) in str(error):
            raise CheckpointError(str(error).replace(str(folder), str(out))) from error
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            remedy = "free space, or choose another disk" if full else "choose another folder"
            raise CheckpointError(f"`OUT` must be writable ({out}: {error.strerror or error}); {remedy}.") from error
        raise


@contextmanager
def owned(notes: Path, out: Path) -> Iterator[TextIO]:
    """The journal, open and locked, so that no two conversions write one folder."""
    with notes.open("a+", encoding="utf-8") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner = os.path.lexists(notes) and os.path.samestat(os.fstat(journal.fileno()), notes.stat())
        except BlockingIOError:
            owner = False
        if not owner:
            raise CheckpointError(
                f"`OUT` must be written by one conversion (another one is writing {out}); wait for it."
            )
        yield journal


def read_notes(journal: TextIO) -> Iterator[dict[str, Any]]:
    """The journal's entries, up to one that a crash cut short."""
    journal.seek(0)
    for line in journal:
        try:
            yield dict(json.loads(line))
        except (TypeError, ValueError):
            return


def check_resumable(
    out: Path, folder: Path, entries: list[dict[str, Any]], job: Mapping[str, str], overwrite: bool, resume: bool
) -> None:
    if not entries:
        if folder.exists() and any(folder.iterdir()):
            raise CheckpointError(f"`OUT` must not have {folder} beside it, which no conversion wrote; move it away.")
    elif resume and (changed := [name for name in job if entries[0].get(name) != job[name]]):
        raise CheckpointError(
            f"`--resume` must find the conversion that it goes on with (of {out}, {CHANGED[changed[0]]}); add "
            "--overwrite in its place to begin anew."
        )
    elif not resume and not overwrite:
        raise CheckpointError(
            f"`OUT` must not be half-written (a conversion to {out} was killed); add --resume to go on with it, or "
            "--overwrite to begin anew."
        )


def sound_files(folder: Path, entries: list[dict[str, Any]]) -> dict[str, str]:
    """The finished files that still have their checksums."""
    noted = {str(entry.get("file")): str(entry.get("sha256")) for entry in entries}
    files = tqdm(noted.items(), desc="checking what was written", unit="file", disable=None)
    return {name: digest for name, digest in files if (folder / name).is_file() and sha256(folder / name) == digest}


def begin(folder: Path, journal: TextIO, job: Mapping[str, str], finished: Mapping[str, str]) -> None:
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


def recover(out: Path, replaced: Path) -> None:
    """After a crash between the two renames of `swap` the folder that was there is back; after them it is gone."""
    if os.path.lexists(replaced):
        if os.path.lexists(out):
            shutil.rmtree(replaced)
        else:
            replaced.rename(out)


def swap(folder: Path, out: Path, replaced: Path, overwrite: bool) -> None:
    try:
        if overwrite and out.exists():
            out.rename(replaced)
        folder.rename(out)
    except BaseException:
        if os.path.lexists(replaced) and not os.path.lexists(out):
            replaced.rename(out)
        raise


def sync(folder: Path) -> None:
    """Flushes every file and the folder itself to the disk."""
    for path in [*folder.iterdir(), folder]:
        flush(path)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
