"""One call of a stream, for the metrics beside this file: a model reads tokens behind those that its state has read."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel


def cache_name(model: PreTrainedModel) -> str:
    """Returns the argument by which the model takes its state, which newer releases of Transformers call `cache`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def read(model: PreTrainedModel, ids: torch.Tensor, state: Any, keep: int = 0) -> tuple[torch.Tensor, Any]:
    """Reads ids (1, T) behind a state, or None, and returns the last `keep` tokens' logits (T, V), all if it is 0, and
    the state, which may be the same object."""
    options = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    output = model(ids, use_cache=True, **{cache_name(model): state}, **options)
    state = next((output[name] for name in ("cache", "past_key_values") if name in output), None)
    if state is None:
        raise ValueError(
            f"`model` must return a cache that goes on with a text (got a {type(model).__name__}, which does not); "
            "choose a causal language model that has one."
        )
    return output.logits[0, -keep:], state
