"""Texts of a checkpoint, JSON and YAML, no larger, deeper or of more parts than real ones are."""

import json
import math
import re
from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import CheckpointError
from .plain import SourceFile, reading

LARGEST_TEXT = 2**24  # bytes of a config or an index; the largest of OLMo's own have 2**20
LARGEST_TOKENIZER = 2**26  # bytes of a tokenizer.json; the largest in use have 2**25
MOST_VALUES = 2**18  # of a config or an index; a tokenizer_config.json of 10,000 added tokens has 2**17
LONGEST_KEY = 2**12  # signs of a name in an object
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


def read_bytes(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """Returns the bytes of a plain file of at most so many."""
    return SourceFile(path, largest).read(0, largest)


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """Returns the text of a plain file in UTF-8."""
    data = read_bytes(path, largest)
    with reading(path):
        return data.decode("utf-8")


def read_json(path: Path, largest: int = LARGEST_TEXT, most_values: int = MOST_VALUES) -> dict[str, Any]:
    """Returns the object that a file of JSON holds."""
    return load_json(path, largest, most_values)[1]


def load_json(path: Path, largest: int = LARGEST_TEXT, most_values: int = MOST_VALUES) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a file, and the object that they are, so that what is copied is what was checked."""
    data = read_bytes(path, largest)
    with reading(path):
        value = parse_json(data.decode("utf-8"), path, most_values)
    require_shallow(value, path)
    return data, value


def parse_json(text: str, path: Path, most_values: int = MOST_VALUES) -> dict[str, Any]:
    """The object that the text of a file is. Its values are counted before they are made, as an empty one takes thirty
    times the memory of its two signs."""
    if text.count(",") + text.count("[") + text.count("{") > most_values:
        raise CheckpointError(
            f"`{path}` must hold at most {most_values:,} values (it holds more); no such file of a model has as many, "
            "so it is damaged, or of another kind."
        )
    try:
        value = json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise too_deep(path) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"`{path}` must hold a JSON object (got {type(value).__name__}); correct it.")
    return value


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose names are all different, and none too long to be one."""
    made = dict(pairs)
    if len(made) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it names {shortened(twice)} twice")
    if any(len(name) > LONGEST_KEY for name in made):
        raise ValueError(f"it has a name of more than {LONGEST_KEY:,} signs")
    return made


def shortened(name: str) -> str:
    """Returns a name as it may be repeated in a message."""
    return repr(name if len(name) <= 80 else f"{name[:79]}…")


def read_yaml(path: Path) -> dict[str, Any]:
    """One document of plain values."""
    return parse_yaml(read_text(path, LARGEST_YAML), path)


def parse_yaml(text: str, path: Path) -> dict[str, Any]:
    """The mapping that the text is, which comes of this file. Aliases, by which a few lines stand for more than any
    memory holds, are refused, and so are directives, which take time by the square of their number."""
    with reading(path, "correct it, or copy the file again"):
        try:
            if re.search("^%", text, re.MULTILINE):
                raise ValueError("it has a directive, which no config has")
            require_plain_yaml(text, path)
            value = yaml.load(text, PlainLoader)
        except yaml.YAMLError as error:  # whose first line says what was being read, and the next ones what is wrong
            raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"`{path}` must hold a mapping (got {type(value).__name__}); correct it.")
    return value


SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class PlainLoader(SafeLoader):
    """Of mappings whose keys are different words."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Makes a mapping, once its keys are words, each there once."""
        keys = [key.value for key, _ in node.value]
        strange = next((key for key, _ in node.value if not is_word(key)), None)
        if strange is not None or len(set(keys)) < len(keys):
            what = "a key that is no word" if strange is not None else "a key twice"
            raise yaml.constructor.ConstructorError("while reading a mapping", node.start_mark, f"it has {what}")
        return super().construct_mapping(node, deep)


def is_word(node: Any) -> bool:
    """Returns whether a node of YAML is a plain string."""
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str"


def require_plain_yaml(text: str, path: Path) -> None:
    """Nothing that takes long to read, or stands for more than it is."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, PlainLoader)):
        if number > MOST_EVENTS:
            raise CheckpointError(
                f"`{path}` must have at most {MOST_EVENTS:,} parts (it has more); put the run's config there."
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise too_deep(path)
        if isinstance(event, yaml.ScalarEvent) and DIGITS.fullmatch(event.value):
            raise CheckpointError(
                f"`{path}` must hold no number of more than {LONGEST_NUMBER} signs (it does, of {len(event.value):,}); "
                "correct it."
            )
        if isinstance(event, yaml.AliasEvent):
            raise CheckpointError(f"`{path}` must hold no alias (got *{event.anchor}); write out what it stands for.")


def too_deep(path: Path) -> CheckpointError:
    """Returns the error of objects in objects in objects."""
    return CheckpointError(f"`{path}` must not be nested deeper than {DEEPEST} (it is), as none is; correct it.")


def require_shallow(value: Any, path: Path) -> None:
    """Raises CheckpointError for objects that are nested deeper than any config is."""
    level, depth = [value], 0
    while level := [part for node in level for part in parts_of(node)]:
        depth += 1
        if depth > DEEPEST:
            raise too_deep(path)


def parts_of(node: Any) -> list[Any]:
    """Returns the objects and lists that a value holds."""
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
