"""The forward pass of a class of Transformers, stage by stage: the oracle for folders of its own OLMo models.

The class runs as it is, on weights that are read when their block is reached and let go of after it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .native_forward import Stages


def transformers_forward(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    input_ids: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    trained_length: int | None = None,
) -> Stages:
    """Yields the stages of `native_forward`, computed by `model_class` with sdpa.

    `tensors` is indexed by the class's own names. In float64 its norms and angles stay float32, as they are written.
    With a `trained_length`, its angles are exact where those of `native_forward` are.
    """
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = model_class(config).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no weights
    if trained_length is not None:
        make_exact(model.model.rotary_emb, max(trained_length, 1024))
    stages: dict[str, nn.Module] = {
        "embeddings": model.model.embed_tokens,
        **{f"block {index}": block for index, block in enumerate(model.model.layers)},
        "final norm": model.model.norm,
        "logits": model.lm_head,
    }
    names = {module: name for name, module in model.named_modules(remove_duplicate=False)}
    tied = model.all_tied_weights_keys
    outputs: list[Tensor] = []

    def read(module: nn.Module, _: Any) -> None:
        sources = {name: f"{names[module]}.{name}" for name in module.state_dict()}
        weights = {name: tensors[tied.get(source, source)].to(dtype) for name, source in sources.items()}
        module.load_state_dict(weights, assign=True)

    def keep(module: nn.Module, _: Any, output: Tensor) -> None:
        outputs.append(output)
        module.to("meta")

    for module in stages.values():
        module.register_forward_pre_hook(read)
        module.register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids, use_cache=False, return_dict=True)
    yield from zip(stages, outputs, strict=True)


def make_exact(rotary: Any, exact_from: int) -> None:
    """Lets a class's own rotary embedding return cosines and sines of float64 angles at positions from that one on."""
    rounded = rotary.forward

    def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, ...]:
        which, prefix = ((), "") if layer_type is None else ((layer_type,), f"{layer_type}_")
        found = rounded(x, position_ids, *which)
        frequencies = getattr(rotary, f"{prefix}inv_freq").double()
        angles = (position_ids[..., None].double() * frequencies).repeat(1, 1, 2)
        scaling, beyond = getattr(rotary, f"{prefix}attention_scaling"), (position_ids >= exact_from)[..., None]
        exact = (angles.cos() * scaling, angles.sin() * scaling)
        return tuple(torch.where(beyond, one.to(other), other) for one, other in zip(exact, found, strict=True))

    rotary.forward = forward
