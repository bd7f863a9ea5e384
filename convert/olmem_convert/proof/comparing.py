"""What is compared: activations stage by stage, weights bit for bit, and every field of the config."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from olmem import OlmemConfig
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..formats import Checkpoint
from ..formats.memory import new_parameters
from ..formats.planning import make_config, make_tensors
from ..reading.fields import TOKEN_IDS
from ..reading.tensors import LazyTensor, same_bits
from ..writing.progress import Progress, each
from .loading import weights_of
from .native_forward import Stages

# Of the largest value, at least 1. Another order of float32 sums stays below 1.5e-6 in all checkpoints at hand; the
# least of the mistakes, another generation's epsilon, moves some stage by 7e-6 and more.
TOLERANCE = 4e-6
ROWS = 256  # of activations that are compared at a time
NOT_OF_THE_LOGITS = {
    *TOKEN_IDS,
    *("architectures", "attention_dropout", "dtype", "id2label", "initializer_range", "label2id", "residual_dropout"),
    *("transformers_version", "use_cache"),
}


@torch.no_grad()
def compare_stages(
    model: PreTrainedModel, native: Stages, input_ids: torch.Tensor, nonfinite: bool = False
) -> list[dict[str, Any]]:
    """One row for embeddings, each block, the last norm and the logits, in the order of the forward pass. With
    `nonfinite` weights, what is NaN or infinite on both sides alike is no difference.

    The model's stages call for the native ones as they are reached, so that its activations do not pile up.
    """
    rows: list[dict[str, Any]] = []
    modules = [model.model.embed_tokens, *model.model.layers, model.model.norm]
    with Progress(len(modules) + 1, "verifying", unit="stage") as bar:

        def compare_next(actual: torch.Tensor) -> None:
            name, expected = next(native)
            rows.append({"stage": name} | difference(actual, expected, nonfinite))
            bar.update()

        hooks = [module.register_forward_hook(lambda _, __, output: compare_next(output)) for module in modules]
        try:
            logits = model(input_ids, use_cache=False, return_dict=True).logits
            compare_next(logits)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"the config must describe a native model (computing it gave: {error}).") from error
        finally:
            for hook in hooks:
                hook.remove()
    return rows


def compare_files(
    config: OlmemConfig, out: Path, checkpoint: Checkpoint, remembering: Checkpoint, stored: torch.dtype
) -> tuple[dict[str, list[Any]], list[str]]:
    """Config fields that differ from the conversion's, with both values, and names of weights that differ in a bit.

    `remembering` is the checkpoint with the memory that the folder says it has, whose parameters may have any values.
    """
    wanted = make_config(remembering, stored)
    names = [field.name for field in fields(config) if field.name not in NOT_OF_THE_LOGITS]
    config_differences = {
        name: [getattr(config, name), getattr(wanted, name)]
        for name in names
        if getattr(config, name) != getattr(wanted, name)
    }
    added = new_parameters(remembering, checkpoint)
    return config_differences, weights_that_differ(out, make_tensors(remembering, wanted), stored, added)


def weights_that_differ(
    out: Path, made: Mapping[str, LazyTensor], stored: torch.dtype, of_any_values: Collection[str] = ()
) -> list[str]:
    """Names of tensors that the folder holds and `made`, rounded to `stored`, has otherwise, or only one of them."""
    written = weights_of(out)

    def same(name: str) -> bool:
        if name not in written or name not in made or written[name].dtype != stored:
            return False
        if name in of_any_values:
            return written[name].shape == made[name].shape
        return written[name].shape == made[name].shape and same_bits(written[name], made[name], stored)

    names = each(sorted(set(written) | set(made)), "comparing weights", "tensor")
    return [name for name in names if not same(name)]


def difference(actual: torch.Tensor, expected: torch.Tensor, nonfinite: bool = False) -> dict[str, Any]:
    if actual.shape != expected.shape:
        raise CheckpointError(
            f"the converted model must have the native shapes (got {tuple(actual.shape)} for {tuple(expected.shape)}); "
            "OUT is of another checkpoint."
        )
    largest, total, count, scale = [torch.tensor(0.0).double()], 0.0, 0, 1.0
    for one, other in zip(actual.flatten(0, -2).split(ROWS), expected.flatten(0, -2).split(ROWS), strict=True):
        if nonfinite:
            alike = (one.isnan() & other.isnan()) | (one.isinf() & (one == other))
            one, other = one[~alike], other[~alike]
        if one.numel():
            gap = (one.double() - other.double()).abs()
            largest.append(gap.max())
            total, count = total + float(gap.sum()), count + gap.numel()
            sound = other[other.isfinite()].abs()
            scale = max(scale, float(sound.max())) if sound.numel() else scale
    maximum = float(torch.stack(largest).max())
    return {
        "max_difference": maximum,
        "mean_difference": total / max(count, 1),
        "tolerance": TOLERANCE * scale,
        "equal": maximum <= TOLERANCE * scale,  # false for NaN and infinity
        "compared": count,
    }


def explain(report: dict[str, Any]) -> list[str]:
    """What differs, for a person, line by line."""
    lines = [
        f"config.json: `{name}` is {found!r}, the checkpoint's is {wanted!r}"
        for name, (found, wanted) in report["config_differences"].items()
    ]
    if not report["stages"][-1]["compared"]:
        lines.append("logits: none is a number on both sides, so nothing is proved")
    weights = report["weight_differences"]
    if weights:
        lines.append(f"weights: {len(weights)} differ: {', '.join(weights[:4])}{', …' if len(weights) > 4 else ''}")
    return [*lines, *table(report["stages"])]


def table(stages: list[dict[str, Any]]) -> list[str]:
    """Stage by stage, the first that diverges marked."""
    first = next((index for index, stage in enumerate(stages) if not stage["equal"]), None)
    lines = [f"{'stage':<14}{'max |Δ|':>12}{'mean |Δ|':>12}{'tolerance':>12}"]
    for index, stage in enumerate(stages):
        mark = "  ← first to diverge" if index == first else ""
        numbers = (stage["max_difference"], stage["mean_difference"], stage["tolerance"])
        lines.append(f"{stage['stage']:<14}" + "".join(f"{number:>12.3g}" for number in numbers) + mark)
    return lines
