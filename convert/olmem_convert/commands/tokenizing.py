"""Adds the tokenizer that a converted folder lacks, which takes no new conversion."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..options import Say, silent
from ..publish.model_card import write_card
from ..publish.release import check_report, check_seal, read_all
from ..publish.standing_card import kept_metadata
from ..reading.olmem_folder import REPORT_NAME, digest, read_config
from ..writing.texts import replace_text
from ..writing.tokenizer import of_config, write_tokenizer
from .next_steps import to_describe


def add_tokenizer(out: str | Path, tokenizer: str | Path, *, say: Say = silent) -> dict[str, Any]:
    """Writes `tokenizer`, a tokenizer.json or a folder with one, into the Olmem folder `out`, which has none.

    A folder that was verified stays so: its files are compared with the checksums that its verification noted, and
    those of the tokenizer are added to them. Returns what was written.

    Raises:
        CheckpointError: when the tokenizer does not fit the model, or anything else is amiss. Nothing is written then.
    """
    out = Path(out)
    if not (out / "config.json").is_file():
        raise CheckpointError(f"`OUT` must be a converted folder ({out} has no config.json); convert SRC first.")
    config, kept = read_config(out), kept_metadata(out)
    if os.path.lexists(out / "tokenizer.json"):
        raise CheckpointError(
            f"`OUT` must have no tokenizer yet ({out} has a tokenizer.json); to have another one, convert again with "
            "--tokenizer PATH."
        )
    report = check_report(out) if (out / REPORT_NAME).is_file() else None
    if report is not None:
        check_seal(out, report["sha256"], read_all([path for path in sorted(out.iterdir()) if path.is_file()]))
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        written = write_tokenizer(Path(tokenizer), Path(scratch), **of_config(config))
        names = sorted(os.listdir(scratch), reverse=True)  # tokenizer.json last, by which the others are found
        for name in names:
            os.replace(Path(scratch) / name, out / name)
    if report is not None:
        report["sha256"] = dict(sorted((report["sha256"] | {name: digest(out / name) for name in names}).items()))
        replace_text(out / REPORT_NAME, json.dumps(report, indent=2) + "\n")
    write_card(out, kept)
    say(f"tokenizer: {written['size']} tokens, the same ids on {written['probes']} probes after reloading")
    say(f"wrote {', '.join(names)} in {out}")
    say(to_describe(out))
    return written
