"""What of an Olmem folder may be published: a closed list of files, sealed by a verification that passed.

Nothing here asks a network. A folder that passes holds weights, JSON and text, and of code only what this package is
made of, so that whoever loads it with `trust_remote_code` runs nothing else.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from olmem import OlmemConfig, OlmemForCausalLM
from tokenizers import Tokenizer

from ..errors import CheckpointError
from ..proof.loading import nonfinite_weights
from ..reading.fields import TOKEN_IDS
from ..reading.installed import installed_code
from ..reading.olmem_folder import (
    REPORT_NAME,
    UNSEALED,
    WRITTEN,
    check_shapes,
    check_tokenizer_files,
    read_config,
    read_generation_config,
    refuse_other_classes,
    require_unchanged,
    stored_dtype,
)
from ..reading.plain import identity
from ..reading.tensors import LazyTensor
from ..reading.texts import LARGEST_TOKENIZER, read_json, read_text, refuse_code
from ..reading.tokenizer_file import read_tokenizer
from ..reading.weight_files import read_safetensors, read_weights
from ..writing.progress import Progress
from ..writing.shards import INDEX_NAME
from .model_card import KINDS, check_card, check_metadata, verify_again

ALLOWED = re.compile("|".join([WRITTEN.pattern, *map(re.escape, sorted(UNSEALED))]))
PICKLES = (".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth", ".mar")
PICKLE_MAGIC = (*(bytes([0x80, protocol]) for protocol in range(1, 6)), b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b")
SINGLE_NAME = "model.safetensors"
BLOCK = 2**20  # bytes read at once


@dataclass(frozen=True)
class LocalFile:
    """A file as it was when it was checked: what is uploaded is compared with this."""

    path: Path
    size: int
    sha256: str
    git_sha1: str
    identity: tuple[int, ...]  # by which a change since is seen


def check_release(out: str | Path) -> dict[str, LocalFile]:
    """The files of an Olmem folder by name, once everything about them is as it must be to be published.

    Raises CheckpointError that names the file or field, its value, and the way out.
    """
    folder = Path(out)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"`OUT` must be a folder that holds a model ({folder} {what}); convert or save one first."
        )
    refuse_other_classes(folder)
    paths = sorted(folder.iterdir())
    for path in paths:
        check_kind(path)
    check_metadata(folder)
    report = check_report(folder)
    files = read_all(paths)
    check_seal(folder, report["sha256"], files)
    check_claims(folder, report, check_contents(folder))
    require_same(files)
    check_card(folder, {name: file.sha256 for name, file in files.items()})
    return files


def check_contents(folder: Path) -> OlmemConfig:
    """Returns the config, once config, code, weights and tokens are what a model on the Hub is made of."""
    config = check_config(folder)
    check_code(folder)
    check_weights(folder, config, read_weights(folder), stored_dtype(folder))
    check_tokens(folder, config)
    return config


def check_kind(path: Path) -> None:
    """A plain file of a name on the list, that is what its name says."""
    way_out = "move it away"
    if path.is_symlink():
        what, way_out = "a symbolic link", "put the file itself in its place"
    elif not path.is_file():
        what = "a folder" if path.is_dir() else "no plain file"
    elif path.suffix.lower() in PICKLES:
        what, way_out = "a pickle by its name", "publish safetensors only, and move it away"
    elif is_pickle(path):
        what, way_out = "a pickle or an archive by its first bytes", "do not open it, and move it away"
    elif path.name.startswith("."):
        what = "a hidden file; the Hub makes its own .gitattributes"
    elif not ALLOWED.fullmatch(path.name):
        what = "not on the list"
    elif path.suffix == ".safetensors":
        read_safetensors(path)  # whose size is the one that its header tells
        return
    elif path.suffix == ".png":  # whose bytes are those that evaluation.json tells
        if is_png(path):
            return
        what, way_out = "no picture", "evaluate again"
    elif not is_text(path):
        what, way_out = "not text", "convert again"
    else:
        return
    raise CheckpointError(f"`{path}` must be a file that a model on the Hub is made of (it is {what}); {way_out}.")


def is_pickle(path: Path) -> bool:
    """By the magic of pickles and of the zip and gzip archives that hold them."""
    with path.open("rb") as file:
        start = file.read(4)
    return start.startswith(PICKLE_MAGIC) and path.suffix != ".safetensors"  # whose first bytes are a length


def is_png(path: Path) -> bool:
    """Returns whether the file begins as every PNG does."""
    with path.open("rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


def is_text(path: Path) -> bool:
    """Returns whether the file is text in UTF-8 without zero bytes."""
    try:
        return "\0" not in read_text(path, LARGEST_TOKENIZER)
    except CheckpointError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            return False
        raise


def check_report(folder: Path) -> dict[str, Any]:
    """verification.json, of a verification that passed."""
    path = folder / REPORT_NAME
    if not path.is_file():
        raise CheckpointError(
            f"`{REPORT_NAME}` must be in {folder} (it is not): only what was verified is published; "
            f"{verify_again(folder)}."
        )
    report = read_json(path)
    if report.get("passed") is not True:
        raise CheckpointError(
            f"`passed` of {path} must be true (got {report.get('passed')!r}): the logits were not proved; convert "
            "again."
        )
    prompt = report.get("prompt")
    numbers = [prompt.get(name) for name in ("tokens", "vocabulary", "seed")] if isinstance(prompt, dict) else [None]
    known = report.get("kind") in KINDS and isinstance(report.get("sha256"), dict)
    if not known or not all(type(number) is int and number > 0 for number in numbers):
        raise CheckpointError(
            f"`kind`, `sha256` and `prompt` of {path} must be as `olmem verify` writes them now (it is of an older "
            f"version); {verify_again(folder)}."
        )
    return report


def check_config(folder: Path) -> OlmemConfig:
    """Returns the config, once it is of an Olmem model that loads by its own code and generates with a cache."""
    raw = read_json(folder / "config.json")
    for name, wanted in (("model_type", "olmem"), ("auto_map", OlmemForCausalLM.auto_map())):
        if raw.get(name) != wanted:
            raise CheckpointError(
                f"`{name}` of {folder / 'config.json'} must be {wanted!r} (got {raw.get(name)!r}); publish what "
                "`olmem convert` writes, or `save_pretrained` of the installed olmem."
            )
    read_generation_config(folder)
    refuse_code(raw, folder / "config.json", allowed=("auto_map",))
    path = folder / "generation_config.json"  # which `generate()` asks; Trainer turns the field of config.json off
    if read_json(path).get("use_cache") is False:
        raise CheckpointError(
            f"`use_cache` of {path} must not be false (got False), as every user's generation would be slow; set it to "
            f"true; {verify_again(folder)}."
        )
    return read_config(folder)


def check_claims(folder: Path, report: Mapping[str, Any], config: OlmemConfig) -> None:
    """Raises CheckpointError unless verification.json says what a verification of these files could have said.

    Nothing signs it, and who has no native checkpoint cannot repeat what was compared with it. What can be seen without
    one is seen here: that every stage of this model is in it and equal, on a prompt beyond its window, and how many
    numbers are none.
    """
    path, prompt = folder / REPORT_NAME, report["prompt"]
    stages = report.get("stages")
    rows = [row for row in stages if isinstance(row, dict)] if isinstance(stages, list) else []
    names = ["embeddings", *(f"block {layer}" for layer in range(config.num_hidden_layers)), "final norm", "logits"]
    beyond = max(config.sliding_window or 0 if "sliding_attention" in config.layer_types else 0, 1)
    compared = {
        "stages": [row.get("stage") for row in rows] == names and all(is_equal(row) for row in rows),
        "weight_differences": report.get("weight_differences") == [],
        "config_differences": report.get("config_differences") == {},
    }
    is_native = report["kind"] == "native"
    claims = {
        **(compared if is_native else {}),
        "prompt": prompt["vocabulary"] <= config.vocab_size and (not is_native or prompt["tokens"] > beyond),
        "dtype": report.get("dtype") == str(stored_dtype(folder)).removeprefix("torch."),
        "nonfinite": report.get("nonfinite") == nonfinite_weights(folder, allowed=True),
    }
    if wrong := [name for name, holds in claims.items() if not holds]:
        raise CheckpointError(
            f"`{wrong[0]}` of {path} must be what a verification of these files says (it is not); "
            f"{verify_again(folder)}."
        )


def is_equal(row: Mapping[str, Any]) -> bool:
    """Whether a stage's figures say that it is equal, and the row says so too."""
    most, allowed = row.get("max_difference"), row.get("tolerance")
    return isinstance(most, float) and isinstance(allowed, float) and row.get("equal") is True and most <= allowed < 1


def read_all(paths: list[Path]) -> dict[str, LocalFile]:
    """Both checksums that the Hub knows files by, in one pass over each."""
    files = {}
    with Progress(sum(path.stat().st_size for path in paths), "checksums") as bar:
        for path in paths:
            before = identity(path.stat())
            size = path.stat().st_size
            sha256, git_sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
            with path.open("rb") as file:
                while block := file.read(BLOCK):
                    sha256.update(block)
                    git_sha1.update(block)
                    bar.update(len(block))
            files[path.name] = LocalFile(path, size, sha256.hexdigest(), git_sha1.hexdigest(), before)
    require_same(files)
    return files


def require_same(files: Mapping[str, LocalFile]) -> None:
    """Raises CheckpointError if a file is another than when it was checked."""
    require_unchanged({file.path: file.identity for file in files.values()}, "it is published")


def check_seal(folder: Path, seal: Mapping[str, Any], files: Mapping[str, LocalFile]) -> None:
    """The files are those that the verification saw."""
    now = {name: file.sha256 for name, file in files.items() if name not in UNSEALED}
    differences = {
        "changed": [name for name in now if name in seal and now[name] != seal[name]],
        "missing": [name for name in seal if name not in now],
        "extra": [name for name in now if name not in seal],
    }
    if any(differences.values()):
        found = "; ".join(f"{kind}: {', '.join(map(str, names))}" for kind, names in differences.items() if names)
        raise CheckpointError(
            f"`sha256` of {folder / REPORT_NAME} must match the files ({found}), which are then not what was verified; "
            f"{verify_again(folder)}."
        )


def check_code(folder: Path) -> None:
    """The code is this package's, byte for byte, and all of it."""
    own = installed_code()
    found = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    others = sorted(name for name in found | own if found.get(name) != own.get(name))
    if others:
        raise CheckpointError(
            f"`{folder / others[0]}` must be the code of the installed olmem, byte for byte (it is not, or is missing; "
            f"{len(others)} such files); convert again with this version, or load it with the installed olmem, and "
            "save it by `save_pretrained`."
        )


def check_weights(folder: Path, config: OlmemConfig, weights: Mapping[str, LazyTensor], stored: torch.dtype) -> None:
    """The files hold each tensor of the model once, in its shape and the stored dtype, as the index says."""
    check_shapes(folder, config, weights, stored)
    index, files = folder / INDEX_NAME, {path.name for path in folder.glob("*.safetensors")}
    if not index.is_file() and files != {SINGLE_NAME}:
        others = ", ".join(sorted(files - {SINGLE_NAME}))
        raise CheckpointError(
            f"`{folder}` must hold its weights in {SINGLE_NAME}, or in files of an index (there is no index, and also "
            f"{others}); move what does not belong here away."
        )
    if index.is_file():
        count = {f"{len(files):05}.safetensors"}
        total = sum(tensor.nbytes for tensor in weights.values())
        stated = (read_json(index).get("metadata") or {}).get("total_size")
        if stated != total or {name.rsplit("-", 1)[-1] for name in files} != count:
            raise CheckpointError(
                f"`total_size` of {index} must be that of the {len(files)} files of weights, numbered from 1 to "
                f"{len(files)} (got {stated}, they hold {total}); convert again."
            )


def check_tokens(folder: Path, config: OlmemConfig) -> None:
    """Config, generation config and tokenizer name the same tokens.

    An end may have several ids: generation must then stop at each that the config or the tokenizer names.
    """
    path = folder / "tokenizer.json"
    check_tokenizer_files(folder)
    claims = {
        file: {name: ids(folder / file, name) for name in TOKEN_IDS}
        for file in ("config.json", "generation_config.json")
    }
    if path.is_file():
        _, tokenizer, _ = read_tokenizer(path, config.vocab_size)
        claims["tokenizer_config.json"] = tokenizer_ids(folder, tokenizer)
    for name in TOKEN_IDS:
        said = {file: named[name] for file, named in claims.items() if named[name]}
        ends = claims["generation_config.json"][name] if name == "eos_token_id" else None
        agree = len(set(map(frozenset, said.values()))) <= 1
        if ends is not None:
            agree = all(named <= ends for file, named in said.items() if file != "tokenizer_config.json" or ends)
        if not agree or any(not 0 <= number < config.vocab_size for named in said.values() for number in named):
            got = ", ".join(f"{sorted(named) or None} in {file}" for file, named in sorted(said.items()))
            missing = ", none in generation_config.json" if ends == set() else ""
            raise CheckpointError(
                f"`{name}` of {folder} must be the same in every file, and below `vocab_size` {config.vocab_size} (got "
                f"{got}{missing}); correct it, and {verify_again(folder)}."
            )


def ids(path: Path, name: str) -> set[int]:
    """Returns the ids that a file gives for a token."""
    value = read_json(path).get(name)
    numbers = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(number) is int for number in numbers):
        raise CheckpointError(
            f"`{name}` of {path} must be a token's id, or a list of them (got {value!r}); correct it."
        )
    return set(numbers)


def tokenizer_ids(folder: Path, tokenizer: Tokenizer) -> dict[str, set[int]]:
    """The ids of the tokens that tokenizer_config.json names."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    found: dict[str, set[int]] = {}
    for name in TOKEN_IDS:
        token = config.get(name.removesuffix("_id"))
        token = token.get("content") if isinstance(token, dict) else token
        number = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if token is not None and number is None:
            raise CheckpointError(
                f"`{name.removesuffix('_id')}` of {path} must be in tokenizer.json (got {token!r}); convert again with "
                "the model's own tokenizer."
            )
        found[name] = set() if number is None else {number}
    return found
