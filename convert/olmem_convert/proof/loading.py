"""The model of a converted folder, loaded by its own class, in as much memory as there is; and the folder's weights."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from olmem import OlmemForCausalLM
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..reading.olmem_folder import check_shapes, read_config, read_generation_config, refuse_adapter
from ..reading.plain import reading
from ..reading.tensors import LazyTensor
from ..reading.weight_files import find_weights, read_weights
from ..writing.shards import PIECE, count_nonfinite, is_finite, refuse_nonfinite

OFFLOADED = {"device_map": "auto"}


class WithoutMemory(OlmemForCausalLM):
    """Loads a folder that has a memory with it off, and its parameters stay where they are."""

    _keys_to_ignore_on_load_unexpected = [r"model\.memory\.", r"\.(memory_gate|retrieval_gate|retrieval_score)\."]  # noqa: RUF012


def load(
    out: Path,
    dtype: torch.dtype,
    model_class: type[PreTrainedModel] = OlmemForCausalLM,
    placing: Mapping[str, Any] | None = None,
    **fields: Any,
) -> PreTrainedModel:
    """The folder's model, with these fields in place of its config's. placing: where its weights are to be."""
    options = dict(placing or {})
    if issubclass(model_class, OlmemForCausalLM):
        refuse_adapter(out)
        options["config"] = read_config(out, **fields)
        passed_over = re.compile("|".join(model_class._keys_to_ignore_on_load_unexpected or ["$^"]))
        weights = {name: tensor for name, tensor in weights_of(out).items() if not passed_over.search(name)}
        check_shapes(out, options["config"], weights)
        read_generation_config(out)
    with reading(out, "convert again"):
        # By its own class, so that no code that the folder names is ever asked for.
        loaded: Any = model_class.from_pretrained(
            out, dtype=dtype, attn_implementation="sdpa", local_files_only=True, output_loading_info=True, **options
        )
    model, info = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise CheckpointError(f"`{out}` must load without missing or unexpected weights (got {wrong}); convert again.")
    return model.eval()


def load_bounded(
    out: Path, dtype: torch.dtype, model_class: type[PreTrainedModel] = OlmemForCausalLM, **fields: Any
) -> PreTrainedModel:
    """As `load`, on the CPU: what does not fit into half of the free memory stays in its files until it is called."""
    return load(out, dtype, model_class, OFFLOADED | {"max_memory": {"cpu": free_memory() // 2}}, **fields)


def free_memory() -> int:
    """Bytes, of the machine or of what a container may still take."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, max(limit - used, 0))
    return free


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Returns the model's logits for a prompt that it reads without a cache."""
    return model(input_ids, use_cache=False, return_dict=True).logits


def weights_of(out: Path) -> dict[str, LazyTensor]:
    """Returns the tensors that Transformers would load from a folder, still unread: of one file, or of an index."""
    found = find_weights(out)
    if found is None or "safetensors" not in found.name:
        raise CheckpointError(f"`{out}` must hold its weights in safetensors (it does not); convert again.")
    return read_weights(out)


def nonfinite_weights(out: Path, allowed: bool) -> dict[str, int]:
    """How many numbers of the folder's weights are NaN or infinite, by name; unless that is allowed, an error."""
    found: dict[str, int] = {}
    for name, tensor in weights_of(out).items():
        for piece in tensor.pieces(PIECE):
            if not is_finite(piece):
                if not allowed:
                    refuse_nonfinite(name, tensor)
                found[name] = found.get(name, 0) + count_nonfinite(piece)
    return found
