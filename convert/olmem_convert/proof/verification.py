"""Proof that a converted folder computes what the native model computes.

The checkpoint's forward pass is recomputed by `native_forward`, which knows neither Transformers nor the conversion's
tables, or, where the checkpoint is of a class of Transformers' own, by that class. It is compared with what
`from_pretrained` loads, block by block, on a prompt longer than the window. Both run in float32, on the weights as
stored: a conversion to bfloat16 is compared with native weights rounded to bfloat16, so that equality stays exact;
what the rounding itself costs is measured beside it, against float64.

A prompt meets few rows of an embedding. So every weight is compared too, bit for bit, and every field of the config.

Where the conversion has switched a memory on, which the native model does not have, all this is with it off. What its
parameters do to the logits of the same prompt is measured, and that they are sound.
"""

import math
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

import torch
from olmem import OlmemCache
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..formats import Checkpoint
from ..formats.memory import OFF, memory_of, new_parameters, switched, with_memory
from ..options import Say
from ..reading.olmem_folder import identities, read_config, require_unchanged, stored_dtype
from ..reading.tensors import LoadedOnDemand
from ..writing.progress import Progress
from ..writing.shards import WeightFiles
from .comparing import compare_files, compare_stages, weights_that_differ
from .loading import WithoutMemory, load_bounded, logits_of, nonfinite_weights
from .native_forward import Stages
from .prompts import SEED, draw_prompt, drawn_from, prompt
from .report import make_report, tell_exported, tell_verified, write_report

SEGMENTS, SEGMENTS_AT_A_TIME = 1000, 50  # of memory tokens that are read once, each of one token


def verify_checkpoint(out: Path, checkpoint: Checkpoint, say: Say, allow_nonfinite: bool = False) -> dict[str, Any]:
    """Compares the folder `out` with the native checkpoint that it was made from, and writes verification.json."""
    config, before = read_config(out), identities(out)
    nonfinite = nonfinite_weights(out, allow_nonfinite)
    model = load_bounded(out, torch.float32, WithoutMemory, **OFF)
    stored = stored_dtype(out)
    input_ids = prompt(checkpoint, (config.memory_segment_length or 0) if config.num_memory_tokens else 0)
    native = native_stages(checkpoint, input_ids, torch.float32, stored)
    stages = compare_stages(model, native, input_ids, bool(nonfinite))
    remembering = with_memory(checkpoint, memory_of(config))
    config_differences, weight_differences = compare_files(config, out, checkpoint, remembering, stored)
    require_unchanged(before, "it is verified")
    report = make_report(out, checkpoint, input_ids, stored, stages)
    report |= {"config_differences": config_differences, "weight_differences": weight_differences}
    report["nonfinite"] = nonfinite
    report["passed"] &= not config_differences and not weight_differences
    logits = logits_of(model, input_ids) if config.has_memory and report["passed"] else None
    del model
    if stored != torch.float32:
        report["rounding"] = rounding(load_bounded(out, stored, WithoutMemory, **OFF), checkpoint, input_ids)
    if logits is not None:
        report["memory"] = try_memory(out, checkpoint, remembering, input_ids, logits)
    write_report(out, report, "native")
    tell_verified(report, say)
    return report


def verify_exported(
    out: Path,
    model_class: type[PreTrainedModel],
    checkpoint: Checkpoint,
    files: WeightFiles,
    say: Say,
    allow_nonfinite: bool,
) -> dict[str, Any]:
    """Loads `out` with its class of Transformers, and compares it, stage by stage and bit by bit, with the Olmem model
    that it was made from."""
    input_ids, tensors, stored = prompt(checkpoint), files.tensors, files.dtype
    nonfinite = nonfinite_weights(out, allow_nonfinite)
    expected = checkpoint.forward(LoadedOnDemand(checkpoint.tensors, stored), input_ids)
    stages = compare_stages(load_bounded(out, torch.float32, model_class), expected, input_ids, bool(nonfinite))
    report = make_report(out, checkpoint, input_ids, stored, stages)
    report |= {"config_differences": {}, "weight_differences": weights_that_differ(out, tensors, stored)}
    report |= {"kind": "exported", "nonfinite": nonfinite}
    report["passed"] &= not report["weight_differences"]
    write_report(out, report, "Olmem")
    as_stored = {tensor.dtype for tensor in tensors.values()} == {stored}
    tell_exported(report, model_class.__name__, as_stored, say)
    return report


def native_stages(
    checkpoint: Checkpoint, input_ids: torch.Tensor, dtype: torch.dtype, stored: torch.dtype | None = None
) -> Stages:
    """The native forward pass in `dtype`, on weights rounded to `stored` if given."""
    tensors = LoadedOnDemand(checkpoint.tensors, stored, checkpoint.in_config)
    trained_length = checkpoint.olmem_config["max_position_embeddings"]
    return checkpoint.forward(tensors, input_ids, dtype=dtype, trained_length=trained_length)


def rounding(model: PreTrainedModel, checkpoint: Checkpoint, input_ids: torch.Tensor) -> dict[str, float]:
    """How far the logits in the stored dtype are from native float64 logits of unrounded weights, and how many of them
    are NaN or infinite where those are numbers. Empty where no logit is a number on both sides."""
    stages = native_stages(checkpoint, input_ids, torch.float64)
    (_, reference) = deque(stages, maxlen=1).pop()
    logits = logits_of(model, input_ids).double()
    gap = (logits - reference).abs()
    gap = gap[gap.isfinite()]
    if not gap.numel():
        return {}
    nonfinite = int((reference.isfinite() & ~logits.isfinite()).sum())
    return {"max_difference": float(gap.max()), "mean_difference": float(gap.mean()), "nonfinite": nonfinite}


def try_memory(
    out: Path, checkpoint: Checkpoint, remembering: Checkpoint, input_ids: torch.Tensor, logits: torch.Tensor
) -> dict[str, Any]:
    """What a memory that was switched on does to these logits, which are the prompt's with it off; an error where it
    does not stay finite."""
    stored = stored_dtype(out)
    found: dict[str, Any] = {
        "fields": switched(remembering, checkpoint),
        "compared": "with memory off",
        "new_parameters": new_parameters(remembering, checkpoint),
        "relative_difference_when_on": relative_difference(load_bounded(out, torch.float32), input_ids, logits),
    }
    if remembering.olmem_config["num_memory_tokens"]:
        dtype = str(stored).removeprefix("torch.")
        found |= {"segments": SEGMENTS, "segments_in": dtype}
        stream = draw_prompt(SEGMENTS + 1, drawn_from(checkpoint), SEED)
        cache = OlmemCache(read_config(out, memory_segment_length=1))
        read_segments(load_bounded(out, stored, memory_segment_length=1), cache, stream, dtype)
    return found


def relative_difference(model: PreTrainedModel, input_ids: torch.Tensor, logits: torch.Tensor) -> float:
    """How far the model's logits are from these, which are the prompt's: norm of the difference by norm."""
    moved = float((logits_of(model, input_ids) - logits).norm() / logits.norm())
    if not math.isfinite(moved):
        raise CheckpointError(
            f"the logits with memory on must be finite (their distance from those with it off is {moved}); convert "
            "again, or leave the memory off."
        )
    return moved


@torch.no_grad()
def read_segments(model: PreTrainedModel, cache: OlmemCache, input_ids: torch.Tensor, dtype: str) -> None:
    """Reads ids (1, T) as a stream, in segments of one token; an error where memory or logits do not stay finite.

    A prompt has few segments, where a memory that grows with each of them still fits into its dtype.
    """
    read = 0
    with Progress(input_ids.shape[1], "reading segments", unit="segment") as bar:
        for piece in input_ids.split(SEGMENTS_AT_A_TIME, dim=1):
            try:
                logits = model(piece, past_key_values=cache, return_dict=True).logits
            except ValueError as error:  # its memory is not finite
                refuse_segments(str(error), read, dtype)
            finite = logits.isfinite().all(-1)[0]
            if not bool(finite.all()):
                refuse_segments("logits that are not", read + int((~finite).nonzero()[0, 0]), dtype)
            read += piece.shape[1]
            bar.update(piece.shape[1])


def refuse_segments(found: str, segments: int, dtype: str) -> NoReturn:
    """Raises the CheckpointError that says after how many segments a memory was no longer finite."""
    way_out = "convert with --dtype bfloat16 or float32" if dtype == "float16" else "convert again, or leave it off"
    raise CheckpointError(
        f"`num_memory_tokens` must give a memory that stays finite in {dtype} with all logits, over {SEGMENTS:,} "
        f"segments (got, after {segments}: {found}); {way_out}."
    )
