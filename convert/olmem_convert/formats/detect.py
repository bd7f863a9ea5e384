"""Which format a checkpoint is, and opening it."""

import re
import sys
from dataclasses import replace
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from olmem.rules_olmem import OLMO_BLOCKS

from ..errors import CheckpointError, reason
from ..options import Given
from ..reading.archives import read_pickle
from ..reading.texts import read_json
from ..reading.weight_files import WEIGHTS, find_weights
from . import Checkpoint, Format, baka, olmo, olmo_core, transformers_olmo

# A snapshot in the Hub's cache: the owner and the name of the repository, and the commit.
SNAPSHOT = re.compile(r".*/models--([\w.-]+)--([\w.-]+)/snapshots/([0-9a-f]{40})", re.ASCII | re.DOTALL)
FORMATS: tuple[Format, ...] = (olmo, olmo_core, baka, transformers_olmo)
CONFIG_ERRORS = (
    StrictDataclassError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def open_checkpoint(source: Path, max_length: int | None = None, given: Given | None = None) -> Checkpoint:
    """Opens the native checkpoint in the folder `source`, or the state dict that it is; no weight is read yet.

    `max_length` replaces the trained length of the config, in tokens. `given` is what the checkpoint does not say.
    """
    if sys.byteorder != "little":
        raise CheckpointError("numbers must be little-endian, as those of checkpoints are; convert on such a machine.")
    try:
        return open_recognised(source, max_length, given or Given())
    except OSError as error:
        raise CheckpointError(
            f"`SRC` must be readable ({error}); check its name, its permissions and the disk."
        ) from error


def open_recognised(source: Path, max_length: int | None, given: Given) -> Checkpoint:
    """Opens the checkpoint with the one format that recognises it."""
    if not source.exists():
        raise CheckpointError(f"`SRC` must be a checkpoint ({source} does not exist); name the folder that holds it.")
    found = recognised(source)
    if len(found) > 1:
        names = " and ".join(description for _, description in found)
        raise CheckpointError(
            f"`{source}` must hold one checkpoint (it holds {names}); move the files of one of them away."
        )
    if found:
        module, description = found[0]
        if not module.TAKES_GIVEN and (given.native_config, given.n_ctx, given.act_fn) != (None, None, None):
            raise CheckpointError(
                f"`{given.arguments.strip()}` must be left out for {description}, whose files say it; only BakaLLM's "
                "state dicts lack it."
            )
        try:
            checkpoint = module.open_checkpoint(source, max_length, given)
            if checkpoint.tokenizer_size < 1:
                raise ValueError(f"`vocab_size` is {checkpoint.tokenizer_size}")
        except CONFIG_ERRORS as error:
            raise CheckpointError(
                f"the config of `{source}` must describe a model ({description}; got {type(error).__name__}: "
                f"{reason(error)[:500]}); compare it with the config of the run."
            ) from error
        if place := of_hub(source):
            checkpoint = replace(
                checkpoint, description=f"{checkpoint.description}, of {place[0]} at commit {place[1]}"
            )
        return checkpoint
    if not source.is_dir():
        raise CheckpointError(f"`SRC` must be a checkpoint's folder or a BakaLLM `.bin` ({what_file(source)}).")
    raise CheckpointError(
        f"`{source}` must hold an OLMo, OLMo-core, BakaLLM or Transformers checkpoint; {what_else(source)}."
    )


def recognised(source: Path) -> list[tuple[Format, str]]:
    """Returns the formats that recognise a checkpoint, each with what it is in words."""
    return [(module, description) for module in FORMATS if (description := module.recognise(source))]


def of_hub(folder: Path) -> tuple[str, str] | None:
    """The repository and the commit of a folder that is a snapshot in the Hub's cache."""
    found = SNAPSHOT.fullmatch(folder.absolute().as_posix())
    return (f"{found[1]}/{found[2]}", found[3]) if found else None


def what_file(path: Path) -> str:
    """What a file that is no checkpoint seems to be; of one that should be read but cannot, the reason is raised."""
    if path.suffix != ".bin" or not path.is_file():
        return f"{path} is a file of another kind: name the folder that holds it"
    names = ", ".join(list(read_pickle(path))[:3])
    return f"{path.name} holds other weights, {names or 'none at all'}: name the checkpoint that BakaLLM's code saved"


def what_else(source: Path) -> str:
    """What the folder seems to be, and the way out."""
    bins = [path for path in sorted(source.glob("*.bin")) if path.is_file()]
    state_dicts = [path for path in bins if not path.name.startswith("pytorch_model")]
    steps = sorted(path.name for path in source.iterdir() if path.is_dir() and path.name.startswith("step"))
    if steps:
        return f"it holds {', '.join(steps[:4])}: name one of them, as in {source / steps[-1]}"
    if (source / ".metadata").is_file() and (source.parent / "config.json").is_file():
        return f"it is the part of one that holds the weights: name its parent, {source.parent}"
    if (source / "config.json").is_file():
        model_type = read_json(source / "config.json").get("model_type")
        if model_type == "olmem":
            return (
                "it is converted already: load it with `AutoModelForCausalLM.from_pretrained`, or convert it back to a "
                f"class of Transformers' own with --to {', '.join(OLMO_BLOCKS)}"
            )
        if model_type in list(OLMO_BLOCKS):
            return f"it has the `config.json` of {model_type} but no weights ({', '.join(WEIGHTS)}): copy them too"
        if find_weights(source):
            return (
                f"it is a Transformers folder of `model_type` {model_type!r}, of which {', '.join(OLMO_BLOCKS)} convert"
            )
        if not state_dicts:
            return "it has `config.json` but no `.metadata`, neither beside it nor in `model_and_optim`: copy that too"
    if (source / "config.yaml").is_file():
        return (
            "it has `config.yaml` but no weights (`model.pt`, `model.safetensors`, `model/metadata.json` or "
            "`model_and_optim/.metadata`): copy them too"
        )
    if state_dicts:
        return what_file(state_dicts[0])
    names = sorted(path.name for path in source.iterdir())
    listed = ", ".join(names[:6]) + (", …" if len(names) > 6 else "") if names else "nothing"
    return f"it holds {listed}, neither `config.yaml` (OLMo) nor `config.json` and `.metadata` (OLMo-core)"
