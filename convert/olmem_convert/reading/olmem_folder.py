"""A converted folder, which may be anybody's: every command reads it by this door, within a checkpoint's bounds."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from olmem import OlmemConfig
from olmem.rules_olmem import OLMO_BLOCKS
from transformers import AutoTokenizer, GenerationConfig

from ..errors import CheckpointError, reason, shortened
from .fields import MOST_LAYERS, check_common, require_meaning, typed
from .installed import SIZE_ERRORS, shapes_of
from .plain import SourceFile, identity, reading
from .tensors import BLOCK, LazyTensor
from .texts import LARGEST_TOKENIZER, load_json, read_json, refuse_code, require_numbers
from .tokenizer_file import (
    CLASSES,
    TOKENIZER_CLASS,
    quiet_panics,
    read_companion,
    read_tokenizer,
    read_tokenizer_config,
    refuse_files,
    refusing,
)
from .weight_files import read_safetensors

CARD_NAME, REPORT_NAME, EVALUATION_NAME = "README.md", "verification.json", "evaluation.json"
MOST_TEXTS = 1000  # of an evaluation, which a card tells of one by one
PLOTS = ("perplexity", "recall", "state")  # of an evaluation
PLOT_NAMES = {f"evaluation_{plot}.{form}" for plot in PLOTS for form in ("png", "svg")}
# What a verification does not vouch for, and may come after it.
UNSEALED = (
    {REPORT_NAME, CARD_NAME, EVALUATION_NAME}
    | PLOT_NAMES
    | {f"{name}{suffix}" for name in ("LICENSE", "NOTICE") for suffix in ("", ".md", ".txt")}
)
# Of a Transformers tokenizer, beside tokenizer.json and tokenizer_config.json.
COMPANIONS = (
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
WRITTEN = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|((generation|tokenizer)_)?config\.json"
    r"|tokenizer\.json|(verification|evaluation)\.json|\w+_olmem\.py|"
    + "|".join(map(re.escape, (*COMPANIONS, *sorted(PLOT_NAMES))))
)


def refuse_other_classes(folder: Path) -> None:
    """Raises CheckpointError for a folder of Transformers' own class, which needs neither code nor card of Olmem's."""
    path = folder / "config.json"
    model_type = read_json(path).get("model_type") if path.is_file() else None
    if model_type in list(OLMO_BLOCKS):
        raise CheckpointError(
            f"`OUT` must be an Olmem folder (got `model_type` {model_type!r} in {folder}): Transformers loads this one "
            f"by its own class, so write its README.md by hand, and publish it with `hf upload REPO_ID {folder}`."
        )


def read_raw_config(folder: Path) -> dict[str, Any]:
    """The config.json of an Olmem folder, once it names no code and no number of parts that no model has."""
    path = folder / "config.json"
    refuse_other_classes(folder)
    raw = read_json(path)
    if raw.get("model_type") != "olmem":
        raise CheckpointError(
            f"`OUT` must be an Olmem folder (got `model_type` {raw.get('model_type')!r} in {folder}); name one that "
            "`olmem convert` or `save_pretrained` wrote."
        )
    kept = raw.get("olmo_config", {})
    for values in (raw, *([kept] if isinstance(kept, dict) else ())):
        check_common(values)
        refuse_code(values, path, allowed=("auto_map", "custom_pipelines"))
    layers = typed(raw.get("num_hidden_layers", 1), int, "num_hidden_layers", str(path))
    if layers is None or not 0 < layers <= MOST_LAYERS:
        raise CheckpointError(
            f"`num_hidden_layers` of {path} must be from 1 to {MOST_LAYERS} (got {layers}); no model has more."
        )
    return raw


def read_config(folder: Path, **changes: Any) -> OlmemConfig:
    """The config of an Olmem folder, with these fields in place of its own."""
    raw, path = read_raw_config(folder), folder / "config.json"
    with reading(path, "correct it, or convert again"):
        try:
            config = OlmemConfig.from_dict(raw | changes)
        except StrictDataclassError as error:
            raise CheckpointError(f"`{path}` must describe a model: {reason(error)}") from error
    require_meaning(config)
    return config


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the folder's weights, by its config."""
    dtype = getattr(torch, str(read_json(folder / "config.json").get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"`dtype` of {folder / 'config.json'} must name the weights' dtype; convert again.")
    return dtype


def read_generation_config(folder: Path) -> bytes | None:
    """The bytes of generation_config.json, if there is one, once it names no code and holds what such a file does."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    data, values = load_json(path)
    require_numbers(values, str(path))
    refuse_code(values, path)
    with reading(path, "correct it"):
        GenerationConfig.from_dict(values)
    return data


def refuse_adapter(folder: Path) -> None:
    """Raises CheckpointError for a file by which Transformers, with PEFT installed, loads the model that it names."""
    path = folder / "adapter_config.json"
    if os.path.lexists(path):
        raise CheckpointError(
            f"`{path}` must not be there (it is), as Transformers would load the model that it names in place of this "
            "one; move it away."
        )


def check_shapes(
    folder: Path, config: OlmemConfig, weights: Mapping[str, LazyTensor], stored: torch.dtype | None = None
) -> None:
    """Raises CheckpointError unless the files hold each tensor of the model once, in its shape and the stored dtype.

    What they lack would be made anew when the model is loaded, of whatever sizes the config says.
    """
    if config.num_hidden_layers > len(weights):
        raise CheckpointError(
            f"`num_hidden_layers` of {folder / 'config.json'} must fit the {len(weights)} tensors beside it (got "
            f"{config.num_hidden_layers}); convert again."
        )
    try:
        wanted = shapes_of(config)
    except SIZE_ERRORS as error:
        said = str(error).splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(
            f"`{folder / 'config.json'}` must give a model of a possible size (got: {said[0]}); convert again."
        ) from error
    for name in sorted(wanted.keys() | weights.keys()):
        got = weights.get(name)
        fits = got is not None and got.shape == wanted.get(name) and stored in (None, got.dtype)
        if not fits:
            held = "nothing" if got is None else f"{got.dtype} {got.shape}"
            must = "absent"
            if name in wanted:
                must = f"of shape {wanted[name]}" if stored is None else f"{stored} {wanted[name]}"
            raise CheckpointError(
                f"`{name}` in the safetensors of {folder} must be {must} by config.json (got {held}); convert again."
            )


def check_tokenizer_files(folder: Path) -> None:
    """Raises CheckpointError for a file beside tokenizer.json that names code or other files, or is out of bounds."""
    path = folder / "tokenizer_config.json"
    _, config = read_tokenizer_config(path)
    refuse_code(config, path)
    refuse_files(config, path)
    has_one = config or (folder / "tokenizer.json").is_file()
    if has_one and config.get("tokenizer_class") not in CLASSES:
        raise CheckpointError(
            f"`tokenizer_class` of {path} must be {TOKENIZER_CLASS} (got {shortened(config.get('tokenizer_class'))}), "
            "as others do not take tokenizer.json as it stands; convert again with --tokenizer PATH."
        )
    for companion in (folder / name for name in COMPANIONS):
        if companion.is_file():
            read_companion(companion)


def load_tokenizer(folder: Path, vocab_size: int) -> Any:
    """The tokenizer as Transformers has it."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"`OUT` must have a tokenizer ({folder} has no tokenizer.json); `olmem tokenizer {folder} PATH` adds one."
        )
    check_tokenizer_files(folder)
    read_tokenizer(path, vocab_size)
    with refusing(f"the tokenizer of {folder} must load", "convert again with --tokenizer PATH"), quiet_panics():
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def digest(path: Path) -> str:
    """The sha256 of a file of the folder, which is plain, and no larger than such files are or its header says."""
    is_weights = path.suffix == ".safetensors"
    source = SourceFile(path, None if is_weights else LARGEST_TOKENIZER)
    if is_weights:
        read_safetensors(path)
    made, done, buffer = hashlib.sha256(), 0, memoryview(bytearray(BLOCK))
    while count := source.read_into(buffer, done):
        made.update(buffer[:count])
        done += count
    return made.hexdigest()


def identities(folder: Path) -> dict[Path, tuple[int, ...]]:
    """What says of each file of the folder that it is the same one, and has not changed."""
    return {path: identity(path.stat()) for path in sorted(folder.iterdir()) if path.is_file()}


def require_unchanged(files: Mapping[Path, tuple[int, ...]], why: str) -> None:
    """Raises CheckpointError if one of the files is another than when it was looked at."""
    for path, before in files.items():
        try:
            now = identity(path.stat())
        except OSError:
            now = ()
        if now != before:
            raise CheckpointError(
                f"`{path}` must stay as it is while {why} (it has changed since it was checked); run the same command "
                "again."
            )
