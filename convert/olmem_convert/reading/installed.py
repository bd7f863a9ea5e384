"""What the installed classes say of a folder that is theirs: its files of code, and the shapes of its weights."""

import tempfile
from functools import cache
from pathlib import Path

import torch
from olmem import OlmemForCausalLM
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.initialization import no_init_weights


@cache
def installed_code() -> dict[str, bytes]:
    """Returns the files of code that go with a model of Olmem, as `save_pretrained` writes them."""
    with tempfile.TemporaryDirectory() as scratch:
        custom_object_save(OlmemForCausalLM, scratch)
        return {path.name: path.read_bytes() for path in Path(scratch).glob("*.py")}


def write_code(folder: Path) -> None:
    """Writes the code that goes with a model of Olmem."""
    for name, content in installed_code().items():
        (folder / name).write_bytes(content)


def shapes_of(
    config: PreTrainedConfig, model_class: type[PreTrainedModel] = OlmemForCausalLM
) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor that is stored of a model, by name, in the model's order.

    Nothing is drawn and no room is taken. Of a size that cannot be, it raises one of SIZE_ERRORS.
    """
    with torch.device("meta"), no_init_weights():
        model = model_class(config)
    tied = model.all_tied_weights_keys
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


SIZE_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
