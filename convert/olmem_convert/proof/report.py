"""What a verification found: as verification.json has it, and in words."""

import json
from pathlib import Path
from typing import Any

import olmem
import torch
import transformers

from ..errors import DifferenceError
from ..formats import Checkpoint
from ..formats.memory import listed
from ..options import Say
from ..reading.olmem_folder import REPORT_NAME, UNSEALED, digest
from ..writing.texts import replace_text
from .comparing import explain
from .prompts import SEED, drawn_from


def tell_nonfinite(report: dict[str, Any], say: Say) -> None:
    """Says how many numbers of the weights are none, if some are."""
    if counts := report["nonfinite"]:
        say(
            f"note: {sum(counts.values()):,} numbers of {', '.join(counts)} are NaN or infinite, and were carried "
            f"over bit for bit; the {report['stages'][-1]['compared']:,} logits that are numbers were compared"
        )


def make_report(
    out: Path, checkpoint: Checkpoint, input_ids: torch.Tensor, stored: torch.dtype, stages: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns what verification.json says of every verification."""
    logits = stages[-1]
    return {
        "passed": all(stage["equal"] for stage in stages) and logits["compared"] > 0,
        "kind": "native",
        "source": checkpoint.description,
        "prompt": {
            "tokens": input_ids.shape[1],
            "vocabulary": drawn_from(checkpoint),
            "seed": SEED,
            "sliding_window": checkpoint.window or None,
            "attention_chunk_size": checkpoint.chunk or None,
        },
        "dtype": str(stored).removeprefix("torch."),
        "compared_in": "float32 with sdpa, native weights rounded to dtype",
        "max_difference": logits["max_difference"],
        "mean_difference": logits["mean_difference"],
        "tolerance": logits["tolerance"],
        "stages": stages,
        "sha256": seal_of(out),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "olmem": olmem.__version__},
    }


def seal_of(out: Path) -> dict[str, str]:
    """The sha256 of each file that a verification vouches for."""
    return {path.name: digest(path) for path in sorted(out.iterdir()) if path.is_file() and path.name not in UNSEALED}


def write_report(out: Path, report: dict[str, Any], whose: str) -> None:
    """Writes verification.json; an error when it says that something differs."""
    written = json.loads(json.dumps(report), parse_constant=lambda _: None)  # NaN is no JSON
    replace_text(out / REPORT_NAME, json.dumps(written, indent=2) + "\n")
    if not report["passed"]:
        raise DifferenceError(
            f"the converted model must compute the {whose} logits with the {whose} weights (it does not); do not "
            "publish it, convert again.",
            explain(report),
        )


def tell_verified(report: dict[str, Any], say: Say) -> None:
    """Says what the comparison with a native checkpoint came to."""
    weights = "" if report["dtype"] == "float32" else f" of the same weights rounded to {report['dtype']}"
    say(
        f"verified: logits differ by at most {report['max_difference']:.3g} from the native forward pass{weights}, "
        f"{report['mean_difference']:.3g} on average ({report['prompt']['tokens']} tokens, computed in float32)"
    )
    tell_nonfinite(report, say)
    if rounded := report.get("rounding"):
        say(
            f"rounding: in {report['dtype']}, logits differ by at most {rounded['max_difference']:.3g} from those of "
            f"the unrounded weights in float64, {rounded['mean_difference']:.3g} on average"
        )
        if rounded["nonfinite"]:
            say(
                f"note: in {report['dtype']}, {rounded['nonfinite']:,} logits of the prompt are NaN or infinite that "
                "are finite in float64; run the model in float32, or convert to a wider dtype"
            )
    if memory := report.get("memory"):
        if "segments" in memory:
            segments = f"{memory['segments']:,} segments with memory on, in {report['dtype']}"
            say(f"read {segments}: memory and logits stayed finite")
        say(
            f"memory: the logits above were compared without {listed(memory['fields'])}, which change the logits of "
            f"this prompt by {100 * memory['relative_difference_when_on']:.3g} %"
        )


def tell_exported(report: dict[str, Any], name: str, as_stored: bool, say: Say) -> None:
    """Says what the comparison of a folder of Transformers' own class `name` with its Olmem folder came to."""
    weights = "every weight is the same" if as_stored else f"every weight is that of SRC rounded to {report['dtype']}"
    tell_nonfinite(report, say)
    say(
        f"verified: {weights}, and the logits of {name} differ by at most {report['max_difference']:.3g} from Olmem's, "
        f"{report['mean_difference']:.3g} on average ({report['prompt']['tokens']} tokens, computed in float32)"
    )
