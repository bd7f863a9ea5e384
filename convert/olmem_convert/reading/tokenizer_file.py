"""Tokenizers that somebody else made: read by one door, tried in a process of their own, and within bounds.

Everything that makes a tokenizer of a file, of a checkpoint or of a converted folder, has it from here.
"""

import base64
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import CheckpointError
from . import tokenizer_trial
from .texts import LARGEST_TOKENIZER, load_json, parse_json, read_bytes, refuse_code, require_numbers, require_shallow

LONGEST_TEXT = 1e31  # of `model_max_length`, which Transformers sets to 1e30 where there is no limit
# Of a tokenizer.json: characters of its rules, beside vocabulary and added tokens; times that they lengthen a text; and
# added tokens. Those in use have 2**19, 2**4 and 6,415.
LARGEST_RULES, LARGEST_GROWTH, MOST_ADDED = 2**21, 2**8, 10_000
WAY_OUT = "--tokenizer chooses another tokenizer"
TOKENIZER_CLASS = "PreTrainedTokenizerFast"  # which takes tokenizer.json as it stands
CLASSES = ("TokenizersBackend", TOKENIZER_CLASS)  # two names of it

# Ids that templates add to a text, characters that are put before it, signs of a token and of all added ones, regexes.
MOST_TEMPLATE_IDS, LONGEST_PREPEND, LONGEST_TOKEN, LARGEST_ADDED, MOST_REGEXES = 2**10, 2**6, 2**12, 2**20, 16
MOST_VALUES = 2**22  # of a tokenizer.json; a vocabulary of 2**18 with its merges in pairs has half as many
MOST_MERGES = 2**20
MOST_ENTRIES = 2**21  # of the files beside it, as vocab.json
PATIENCE = 30  # seconds that a trial may take by the clock; it stops itself by the processor's


def read_tokenizer(path: Path, vocab_size: int) -> tuple[bytes, Tokenizer, int]:
    """A tokenizer.json: its bytes, the tokenizer, and its size (highest id + 1), at most `vocab_size`."""
    with refusing(f"{path} must be a readable tokenizer.json", WAY_OUT):
        content = read_bytes(path, LARGEST_TOKENIZER)
        tree = parse_json(content.decode("utf-8"), path, MOST_VALUES)
        require_shallow(tree, path)
        _check_rules(tree, path)
        del tree
        _try(content, path)
        tokenizer = Tokenizer.from_buffer(content)
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not 0 < size <= vocab_size:
        raise CheckpointError(f"`vocab_size` must cover the {size} tokens of {path} (got {vocab_size}); {WAY_OUT}")
    return content, tokenizer, size


def read_tokenizer_config(path: Path) -> tuple[bytes, dict[str, Any]]:
    """A tokenizer_config.json, within bounds, and its bytes; both empty where there is none."""
    data, config = load_json(path) if os.path.lexists(path) else (b"", {})
    _check_config(config, path)
    return data, config


def read_companion(path: Path) -> bytes:
    """A file beside tokenizer.json, once it names neither code nor other files, and is within bounds."""
    if path.suffix != ".json":
        return read_bytes(path)
    data, values = load_json(path, most_values=MOST_ENTRIES)
    require_numbers(values, str(path))
    refuse_code(values, path)
    refuse_files(values, path)
    return data


def names_files(config: dict[str, Any]) -> list[str]:
    """The fields of a tokenizer's config that say where files are, on the disk of whoever wrote it or of the reader."""
    return sorted(
        name for name, value in config.items() if value and (name.endswith(("_file", "_path")) or name == "local_files")
    )


def refuse_files(config: dict[str, Any], path: Path) -> None:
    """Raises CheckpointError for fields by which Transformers would read other files than those beside this one."""
    if named := names_files(config):
        raise CheckpointError(
            f"`{named[0]}` of {path} must be absent (got {str(config[named[0]])[:100]!r}), as it has Transformers read "
            "a file that is not of this folder; remove it."
        )


def trial() -> list[str]:
    """The command of the process that tries a tokenizer."""
    return [sys.executable, "-I", str(Path(tokenizer_trial.__file__))]


def _try(content: bytes, path: Path) -> None:
    """Raises CheckpointError for a tokenizer that does not load, encode and decode in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RUST_"))}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
    try:
        done = subprocess.run(trial(), input=content, env=environment, capture_output=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        said, code = f"no answer in {PATIENCE} seconds", 1
    else:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        said, code = (lines or ["nothing"])[-1][:200], done.returncode
    if code < 0:
        said = f"the end of its process, by signal {-code}, or more than {tokenizer_trial.SECONDS} seconds"
    if code:
        raise CheckpointError(
            f"{path} must be a readable tokenizer.json (got {said}, as it loads and encodes a few texts); {WAY_OUT}"
        )


@contextmanager
def refusing(rule: str, way_out: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into a `CheckpointError`; interrupts pass.

    The tokenizers library raises bare `Exception`, and where Rust panics `PanicException`, which is not an `Exception`.
    """
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{rule} (got {type(error).__name__}: {str(error)[:200]}); {way_out}") from error


@contextmanager
def quiet_panics() -> Iterator[None]:
    """Without the pages that a native library writes where it panics: what it panics over is said in one line."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _check_config(config: dict[str, Any], path: Path) -> None:
    """Raises CheckpointError for a chat template or a length of a form that no tokenizer has."""
    require_numbers(config, str(path))
    template, length = config.get("chat_template"), config.get("model_max_length")
    entries = template if isinstance(template, list) else []
    named = all(
        isinstance(entry, dict) and all(isinstance(entry.get(part), str) for part in ("name", "template"))
        for entry in entries
    )
    if not isinstance(template, str | list | None) or not named:
        raise CheckpointError(
            f"`chat_template` of {path} must be a text or a list of named ones (got {template!r}); correct it."
        )
    number = isinstance(length, int | float) and not isinstance(length, bool)
    if length is not None and not (number and 0 < length <= LONGEST_TEXT):
        raise CheckpointError(f"`model_max_length` of {path} must be a positive number (got {length!r}); correct it.")


def _check_rules(tree: dict[str, Any], path: Path) -> None:
    """Before the tokenizer is made, and a text of it: sizes at which either has no end."""
    rules = {name: part for name, part in tree.items() if name not in ("model", "added_tokens")}
    size, growth = len(json.dumps(rules)), _growth(rules)
    for text in _charsmaps(rules):
        head = base64.b64decode(text[:8], validate=True)[:4]
        if int.from_bytes(head, "little") > len(text):
            raise CheckpointError(f"`precompiled_charsmap` of {path} must be as long as it says; {WAY_OUT}")
    added = tree.get("added_tokens")
    number = len(added) if isinstance(added, list) else 0
    lengths = [len(str(token.get("content"))) for token in added or () if isinstance(token, dict)] if number else [0]
    model = tree.get("model") or {}
    vocabulary = model.get("vocab") or ()
    entries = vocabulary if isinstance(vocabulary, dict) else (part[0] for part in vocabulary if part)
    for what, got, most in (
        ("rules of at most {} characters", size, LARGEST_RULES),
        ("rules that lengthen a text at most {} times", growth, LARGEST_GROWTH),
        ("at most {} added tokens", number, MOST_ADDED),
        ("at most {} merges", len(model.get("merges") or ()), MOST_MERGES),
        ("added tokens of at most {} characters", sum(lengths), LARGEST_ADDED),
        ("tokens of at most {} characters", max([*lengths, *(len(str(entry)) for entry in entries)]), LONGEST_TOKEN),
        ("templates that add at most {} ids", _count(rules, _template_ids), MOST_TEMPLATE_IDS),
        ("at most {} characters to put before a text", _count(rules, _prepended), LONGEST_PREPEND),
        ("at most {} regular expressions", _count(rules, lambda node: "Regex" in node), MOST_REGEXES),
    ):
        if got > most:
            raise CheckpointError(f"{path} must have {what.format(f'{most:,}')} (got {got:,}); {WAY_OUT}")


def _charsmaps(node: Any) -> Iterator[str]:
    """The tables of all normalizers, which begin with the size that is then allocated."""
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _charsmaps(part)
    if isinstance(node, dict) and isinstance(text := node.get("precompiled_charsmap"), str):
        yield text


def _count(node: Any, of: Callable[[dict[str, Any]], int]) -> int:
    """The sum over all objects below."""
    own = int(of(node)) if isinstance(node, dict) else 0
    parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return own + sum(_count(part, of) for part in parts)


def _template_ids(node: dict[str, Any]) -> int:
    """Returns how many ids a template adds to a text."""
    if node.get("type") != "TemplateProcessing" or not isinstance(tokens := node.get("special_tokens"), dict):
        return 0
    ids = {name: len(token["ids"]) for name, token in tokens.items() if isinstance(token, dict) and "ids" in token}
    pieces = [piece for name in ("single", "pair") for piece in node.get(name) or ()]
    return sum(ids.get((piece.get("SpecialToken") or {}).get("id"), 0) for piece in pieces if isinstance(piece, dict))


def _prepended(node: dict[str, Any]) -> int:
    """Returns how many characters a normalizer puts before a text."""
    return len(str(node.get("prepend", ""))) if node.get("type") == "Prepend" else 0


def _growth(node: Any) -> int:
    """How many times longer a text may become by all the replacements below, and by being repeated."""
    if isinstance(node, list):
        repeated = sum(isinstance(part, dict) and "Sequence" in part for part in node)  # in a template
        return min(max(repeated, 1) * math.prod(map(_growth, node)), LARGEST_GROWTH + 1)
    if not isinstance(node, dict):
        return 1
    own = 1 + len(str(node.get("content"))) if node.get("type") == "Replace" else 1
    return min(own * _growth(list(node.values())), LARGEST_GROWTH + 1)
