"""Files of a checkpoint, which somebody else made: plain ones, its own, and no larger or deeper than real ones are.

A link in a checkpoint may lead to a file of the folder that it lies in, or, in a Hub cache, to that cache's `blobs`;
anywhere else it could make a conversion carry along what its user never meant to publish.
"""

import json
import math
import os
import re
import stat
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .errors import CheckpointError

LARGEST_TEXT = 2**24  # bytes of a config or an index; the largest of OLMo's own have 2**20
LARGEST_TOKENIZER = 2**27  # bytes of a tokenizer.json; the largest in use have 2**25
# Fields by which Transformers is told to fetch code and run it: always, or where they name a repository, of kernels.
NAMES_CODE = {"auto_map", "custom_generate", "custom_pipelines", "trust_remote_code"}
NAMES_KERNELS = {
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
}
LARGEST_YAML, MOST_EVENTS = 2**21, 100_000  # bytes, and parts of a document
LONGEST_NUMBER = 100  # signs of a number in YAML, which counts to the base of 60 in the square of their number
DEEPEST = 64  # of objects in objects; configs have 8
DIGITS = re.compile(rf"[-+.:_\d]{{{LONGEST_NUMBER + 1},}}|[-+]?[\d_]{{20,}}")  # a seed of 64 bits has 19
LONGEST_NAME = 255  # of a file, in bytes


@contextmanager
def reading(path: Path, remedy: str = "copy it again from its source") -> Iterator[None]:
    """Turns whatever a library raises over a damaged file into one error that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"`{path.name}` must exist ({path} does not); {remedy}.") from error
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
        raise CheckpointError(f"`{path}` must be a file (it is a {kind}); copy it again from its source.")
    if largest is not None and status.st_size > largest:
        raise CheckpointError(
            f"`{path}` must have at most {largest:,} bytes (it has {status.st_size:,}), as no such file has more; copy "
            "it again from its source."
        )
    return path


def identity(status: os.stat_result) -> tuple[int, ...]:
    """What of a file says that it is the same one, and has not changed: nobody can set the last of them."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def read_bytes(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    require_plain(path, largest)
    with reading(path), path.open("rb") as file:
        return file.read(largest + 1)


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    data = read_bytes(path, largest)
    with reading(path):
        return data.decode("utf-8")


def read_json(path: Path, largest: int = LARGEST_TEXT) -> dict[str, Any]:
    text = read_text(path, largest)
    with reading(path):
        try:
            value = json.loads(text)
        except RecursionError:
            raise too_deep(path) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"`{path}` must hold a JSON object (got {type(value).__name__}); copy it again.")
    require_shallow(value, path)
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """One document of plain values. Aliases, by which a few lines stand for more than any memory holds, are refused."""
    text = read_text(path, LARGEST_YAML)
    with reading(path):
        try:
            require_plain_yaml(text, path)
            value = yaml.load(text, PlainLoader)
        except yaml.YAMLError as error:  # whose first line says what was being read, and the next ones what is wrong
            raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"`{path}` must hold a mapping (got {type(value).__name__}); copy it again.")
    return value


SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class PlainLoader(SafeLoader):
    """Of mappings whose keys are different words."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        strange = next((key for key, _ in node.value if not is_word(key)), None)
        if strange is not None or len(set(keys)) < len(keys):
            what = "a key that is no word" if strange is not None else "a key twice"
            raise yaml.constructor.ConstructorError("while reading a mapping", node.start_mark, f"it has {what}")
        return super().construct_mapping(node, deep)


def is_word(node: Any) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str"


def require_plain_yaml(text: str, path: Path) -> None:
    """Nothing that takes long to read, or stands for more than it is."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, PlainLoader)):
        if number > MOST_EVENTS:
            raise CheckpointError(f"`{path}` must have at most {MOST_EVENTS:,} parts (it has more); copy it again.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise too_deep(path)
        if isinstance(event, yaml.ScalarEvent) and DIGITS.fullmatch(event.value):
            raise CheckpointError(
                f"`{path}` must hold no number of more than {LONGEST_NUMBER} signs (it does, of {len(event.value):,}); "
                "copy it again."
            )
        if isinstance(event, yaml.AliasEvent):
            raise CheckpointError(f"`{path}` must hold no alias (got *{event.anchor}); write out what it stands for.")


def too_deep(path: Path) -> CheckpointError:
    return CheckpointError(f"`{path}` must not be nested deeper than {DEEPEST} (it is), as none is; copy it again.")


def require_shallow(value: Any, path: Path) -> None:
    level, depth = [value], 0
    while level := [part for node in level for part in parts_of(node)]:
        depth += 1
        if depth > DEEPEST:
            raise too_deep(path)


def parts_of(node: Any) -> list[Any]:
    parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [part for part in parts if isinstance(part, dict | list)]


def require_numbers(value: Any, where: str, name: str = "") -> None:
    """That no number below is NaN or infinite, which JSON has no word for and no field of a config means."""
    if isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"`{name}` of {where} must be a finite number (got {value}); correct it.")
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        if isinstance(part, float | Mapping | list):
            require_numbers(part, where, f"{name}.{key}" if name else str(key))


def refuse_code(values: Mapping[str, Any], path: Path, allowed: Container[str] = ()) -> None:
    """That no field of a config has Transformers fetch code and run it."""
    kernels = {name for name in NAMES_KERNELS if "/" in str(values.get(name))}
    named = sorted(name for name in NAMES_CODE | kernels if values.get(name) and name not in allowed)
    if named:
        raise CheckpointError(
            f"`{named[0]}` of {path} must be absent (got {str(values[named[0]])[:100]!r}), as it has Transformers "
            "fetch code and run it; remove it."
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
