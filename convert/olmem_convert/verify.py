"""Proof that a converted folder computes what the native model computes.

The checkpoint's forward pass is recomputed by `native_forward`, which knows neither Transformers nor the conversion's
tables, and compared with what `from_pretrained` loads, block by block, on a prompt longer than the window. Both run in
float32, on the weights as stored: a conversion to bfloat16 is compared with native weights rounded to bfloat16, so
that equality stays exact; what the rounding itself costs is measured beside it, against float64.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import olmem  # noqa: F401  registers the Auto classes
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from .errors import CheckpointError
from .formats import Checkpoint
from .formats.detect import open_checkpoint
from .native_forward import native_forward
from .shards import sha256
from .tensors import LoadedOnDemand, read_json, reading

REPORT_NAME = "verification.json"
TOLERANCE = 1e-5  # of the largest value, at least 1: far above a different order of float32 sums, far below a mistake
PROMPT_BEYOND_WINDOW = 32
SEED = 20


def verify(out: str | Path, source: str | Path, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Compares the converted folder `out` with the native checkpoint in `source`, writes `verification.json`.

    Returns the report. Raises CheckpointError, after writing a report that says so, when the logits differ.
    """
    out = Path(out)
    if not (out / "config.json").is_file():
        raise CheckpointError(f"`OUT` must be a converted folder ({out} has no config.json); convert SRC first.")
    return verify_checkpoint(out, open_checkpoint(Path(source)), say)


def verify_checkpoint(out: Path, checkpoint: Checkpoint, say: Callable[[str], None]) -> dict[str, Any]:
    """The same, for a checkpoint that is already open."""
    report_path = out / REPORT_NAME
    report_path.unlink(missing_ok=True)  # an old report must not vouch for what is being checked
    model = load(out, torch.float32)
    stored = stored_dtype(out)
    input_ids = prompt(checkpoint)
    stages = list(compare(model, checkpoint, stored, input_ids))
    logits = stages[-1]
    report: dict[str, Any] = {
        "passed": all(stage["equal"] for stage in stages),
        "source": checkpoint.description,
        "prompt": {"tokens": input_ids.shape[1], "seed": SEED, "sliding_window": checkpoint.window or None},
        "dtype": str(stored).removeprefix("torch."),
        "compared_in": "float32 with sdpa, native weights rounded to dtype",
        "max_difference": logits["max_difference"],
        "mean_difference": logits["mean_difference"],
        "tolerance": logits["tolerance"],
        "stages": stages,
        "sha256": {path.name: sha256(path) for path in sorted([*out.glob("*.safetensors"), out / "config.json"])},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "olmem": olmem.__version__},
    }
    if stored != torch.float32:
        report["rounding"] = rounding(load(out, stored), checkpoint, input_ids)
    report_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if not report["passed"]:
        raise CheckpointError(
            "the converted model must compute the native logits (it does not); do not publish it. Convert again, and if "
            f"it stays so, report the config with this table:\n{table(stages)}"
        )
    say(
        f"verified: logits differ by at most {logits['max_difference']:.3g} from the native forward pass, "
        f"{logits['mean_difference']:.3g} on average ({input_ids.shape[1]} tokens, float32, {len(stages)} stages)"
    )
    if stored != torch.float32:
        rounded = report["rounding"]
        say(
            f"rounding to {report['dtype']}: logits differ by at most {rounded['max_difference']:.3g} from float64, "
            f"{rounded['mean_difference']:.3g} on average"
        )
    return report


def load(out: Path, dtype: torch.dtype) -> Any:
    with reading(out, "convert again"):
        model, info = AutoModelForCausalLM.from_pretrained(
            out, dtype=dtype, attn_implementation="sdpa", local_files_only=True, output_loading_info=True
        )
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise CheckpointError(f"`{out}` must load without missing or unexpected weights (got {wrong}); convert again.")
    return model.eval()


def stored_dtype(out: Path) -> torch.dtype:
    """The dtype of the folder's weights, by its config."""
    dtype = getattr(torch, str(read_json(out / "config.json").get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"`dtype` of {out / 'config.json'} must name the weights' dtype; convert again.")
    return dtype


def prompt(checkpoint: Checkpoint) -> torch.Tensor:
    """Random token ids (1, T), T past the window, the same for every run."""
    length = max(checkpoint.window, PROMPT_BEYOND_WINDOW) + PROMPT_BEYOND_WINDOW
    highest = min(checkpoint.tokenizer_size, checkpoint.olmem_config["vocab_size"])
    return torch.randint(highest, (1, length), generator=torch.Generator().manual_seed(SEED))


@torch.no_grad()
def compare(
    model: Any, checkpoint: Checkpoint, stored: torch.dtype, input_ids: torch.Tensor
) -> Iterator[dict[str, Any]]:
    """One row for embeddings, each block, the last norm and the logits, in the order of the forward pass.

    Olmem's stages call for the native ones as they are reached, so neither model's activations pile up.
    """
    tensors = LoadedOnDemand(checkpoint.tensors, stored)
    native = native_forward(checkpoint.family, checkpoint.native_config, tensors, input_ids, dtype=torch.float32)
    rows: list[dict[str, Any]] = []
    modules = [model.model.embed_tokens, *model.model.layers, model.model.norm]
    with tqdm(total=len(modules) + 1, desc="verifying", unit="stage", disable=None) as bar:

        def compare_next(actual: torch.Tensor) -> None:
            name, expected = next(native)
            rows.append({"stage": name} | difference(actual, expected))
            bar.update()

        hooks = [module.register_forward_hook(lambda _, __, output: compare_next(output)) for module in modules]
        try:
            logits = model(input_ids, use_cache=False).logits
            compare_next(logits)
        finally:
            for hook in hooks:
                hook.remove()
    yield from rows


def difference(actual: torch.Tensor, expected: torch.Tensor) -> dict[str, Any]:
    if actual.shape != expected.shape:
        raise CheckpointError(
            f"the converted model must have the native shapes (got {tuple(actual.shape)} for {tuple(expected.shape)}); "
            "OUT is of another checkpoint."
        )
    gap = (actual.double() - expected.double()).abs()
    tolerance = TOLERANCE * max(1.0, float(expected.abs().max()))
    largest = float(gap.max())
    return {
        "max_difference": largest,
        "mean_difference": float(gap.mean()),
        "tolerance": tolerance,
        "equal": largest <= tolerance,  # false for NaN
    }


@torch.no_grad()
def rounding(model: Any, checkpoint: Checkpoint, input_ids: torch.Tensor) -> dict[str, float]:
    """How far the logits in the stored dtype are from native float64 logits of unrounded weights."""
    tensors = LoadedOnDemand(checkpoint.tensors)
    stages = native_forward(checkpoint.family, checkpoint.native_config, tensors, input_ids, dtype=torch.float64)
    reference = None
    for _, reference in stages:
        pass
    assert reference is not None
    gap = (model(input_ids, use_cache=False).logits.double() - reference).abs()
    return {"max_difference": float(gap.max()), "mean_difference": float(gap.mean())}


def table(stages: list[dict[str, Any]]) -> str:
    """Stage by stage, the first that diverges marked."""
    first = next((index for index, stage in enumerate(stages) if not stage["equal"]), None)
    lines = [f"{'stage':<14}{'max |Δ|':>12}{'mean |Δ|':>12}{'tolerance':>12}"]
    for index, stage in enumerate(stages):
        mark = "  ← first to diverge" if index == first else ""
        numbers = (stage["max_difference"], stage["mean_difference"], stage["tolerance"])
        lines.append(f"{stage['stage']:<14}" + "".join(f"{number:>12.3g}" for number in numbers) + mark)
    return "\n".join(lines)
