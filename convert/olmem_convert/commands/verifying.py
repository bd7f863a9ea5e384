"""Verifies a folder, against the checkpoint that it was made from or by itself, and writes down what came of it."""

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from olmem.rules_olmem import OLMO_BLOCKS

from ..errors import CheckpointError
from ..formats.detect import open_checkpoint
from ..options import ConvertOptions, Say, VerifyOptions, silent
from ..proof.verification import verify_checkpoint
from ..publish.model_card import write_card
from ..publish.reloading import verify_reload
from ..publish.standing_card import kept_metadata
from ..reading.olmem_folder import REPORT_NAME, read_raw_config, stored_dtype
from ..reading.plain import reading
from ..reading.tensors import require_same
from ..reading.texts import read_json
from .fetching import fetched
from .next_steps import to_describe
from .targets import ToTransformers

VERSIONS = ("transformers_version",)  # of a config, which may be another one's


def verify(
    out: str | Path, source: str | Path | None = None, options: VerifyOptions | None = None, *, say: Say = silent
) -> dict[str, Any]:
    """Verifies the folder `out`, and writes `verification.json` and the card of an Olmem folder.

    With `source`, a path or the id of a model on the Hub, it is compared with the native checkpoint that it was made
    from, or, if it is of a class of Transformers' own, with the Olmem folder. Without, as a model that was trained has
    none, its own code must load it and compute what the installed olmem does.

    Returns the report.

    Raises:
        CheckpointError: when the logits differ, after a report was written that says so; or when anything is amiss.
    """
    options = options or VerifyOptions()
    out = Path(out)
    if not (out / "config.json").is_file():
        raise CheckpointError(
            f"`OUT` must be a folder that holds a model ({out} has no config.json); convert or save one first."
        )
    if source is None and options.revision is not None:
        raise CheckpointError(
            f"`revision` must be left out without --against (got {options.revision!r}); leave it out, or name the "
            "model on the Hub by --against."
        )
    source = None if source is None else fetched(source, options, say)
    model_type = as_written(out / "config.json").get("model_type")
    if model_type in list(OLMO_BLOCKS):
        return verify_other_class(out, source, str(model_type), options, say)
    if source is None:
        return verify_alone(out, options, say)
    checkpoint = open_checkpoint(source, trained_length(out), options)
    kept = kept_metadata(out)
    forget_report(out)
    write_card(out, kept)
    report = verify_checkpoint(out, checkpoint, say, options.allow_nonfinite)
    require_same(checkpoint.tensors)
    write_card(out, kept, report["sha256"])
    say(to_describe(out))
    return report


def verify_alone(out: Path, options: VerifyOptions, say: Say) -> dict[str, Any]:
    """Verifies what needs no other checkpoint, unless the folder was compared with one before."""
    read_raw_config(out)
    kept = kept_metadata(out)
    if as_written(out / REPORT_NAME).get("kind") == "native":
        raise CheckpointError(
            f"`--against` must be given, as {out / REPORT_NAME} tells of a comparison with a native checkpoint, which "
            "says more; give it, or remove that file if the weights were trained since."
        )
    forget_report(out)
    write_card(out, kept)
    report = verify_reload(out, say, options.allow_nonfinite)
    write_card(out, kept, report["sha256"])
    say(to_describe(out))
    return report


def verify_other_class(
    out: Path, source: Path | None, model_type: str, options: VerifyOptions, say: Say
) -> dict[str, Any]:
    """Compares a folder of Transformers' own class with the Olmem folder that it was made from."""
    if source is None or as_written(source / "config.json").get("model_type") != "olmem":
        raise CheckpointError(
            f"`--against` must name the Olmem folder that {out} was made from (got {source}), as Transformers' own "
            "class loads it; give it."
        )
    dtype = str(stored_dtype(out)).removeprefix("torch.")
    making = ConvertOptions(to=model_type, dtype=dtype, allow_nonfinite=options.allow_nonfinite)
    target = ToTransformers.of(source, making, model_type)
    with tempfile.TemporaryDirectory(prefix="olmem-") as scratch:
        target.save(Path(scratch))
        wanted = read_json(Path(scratch) / "config.json")
    got = read_json(out / "config.json")
    others = sorted(name for name in wanted | got if name not in VERSIONS and got.get(name) != wanted.get(name))
    if others:
        name = others[0]
        raise CheckpointError(
            f"`{name}` of {out / 'config.json'} must be {json.dumps(wanted.get(name))}, as {source} is converted (got "
            f"{json.dumps(got.get(name))}); convert again."
        )
    forget_report(out)
    report = target.verify(out, say)
    require_same(target.checkpoint.tensors)
    say(target.next_step(source, out))
    return report


def forget_report(out: Path) -> None:
    """Removes an old report, which must not vouch for what is being checked."""
    with reading(out / REPORT_NAME, "move it away"):
        (out / REPORT_NAME).unlink(missing_ok=True)


def trained_length(out: Path) -> int | None:
    """The length by the folder's config, in which --max-length may have replaced the checkpoint's."""
    length = as_written(out / "config.json").get("max_position_embeddings")
    return length if isinstance(length, int) else None


def as_written(path: Path) -> dict[str, Any]:
    """A JSON file of the folder; empty when it is not there, or damaged, of which loading the folder tells."""
    with suppress(CheckpointError):
        return read_json(path)
    return {}
