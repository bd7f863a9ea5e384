"""Compares a converted folder with the checkpoint that it was made from, and writes down what came of it."""

from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

from olmem.rules_olmem import OLMO_BLOCKS

from ..errors import CheckpointError
from ..formats.detect import open_checkpoint
from ..options import Say, VerifyOptions, silent
from ..proof.verification import verify_checkpoint
from ..publish.model_card import kept_metadata, write_card
from ..reading.olmem_folder import REPORT_NAME
from ..reading.plain import reading
from ..reading.tensors import require_same
from ..reading.texts import read_json


def verify(
    out: str | Path, source: str | Path, options: VerifyOptions | None = None, *, say: Say = silent
) -> dict[str, Any]:
    """Compares the converted folder `out` with the native checkpoint `source`, and writes `verification.json`.

    Returns the report.

    Raises:
        CheckpointError: when the logits differ, after a report was written that says so; or when anything is amiss.
    """
    options = options or VerifyOptions()
    out = Path(out)
    if not (out / "config.json").is_file():
        raise CheckpointError(f"`OUT` must be a converted folder ({out} has no config.json); convert SRC first.")
    checkpoint = open_checkpoint(Path(source), trained_length(out), options)
    model_type = config_as_written(out).get("model_type")
    if model_type in list(OLMO_BLOCKS):
        raise CheckpointError(
            f"`OUT` must be an Olmem folder (got `model_type` {model_type!r} in {out}); what --to writes is verified "
            "when it is written."
        )
    kept = kept_metadata(out)
    with reading(out / REPORT_NAME, "move it away"):
        (out / REPORT_NAME).unlink(missing_ok=True)  # an old report must not vouch for what is being checked
    write_card(out, kept)
    report = verify_checkpoint(out, checkpoint, say, options.allow_nonfinite)
    require_same(checkpoint.tensors)
    write_card(out, kept, report["sha256"])
    folder = quote(str(out))
    say(f"next: `olmem evaluate {folder} --text FILE`, or `olmem card {folder} --license ID`")
    return report


def trained_length(out: Path) -> int | None:
    """The length by the folder's config, in which --max-length may have replaced the checkpoint's."""
    length = config_as_written(out).get("max_position_embeddings")
    return length if isinstance(length, int) else None


def config_as_written(out: Path) -> dict[str, Any]:
    """The folder's config.json; empty when it is damaged, of which loading the folder tells."""
    with suppress(CheckpointError):
        return read_json(out / "config.json")
    return {}
