"""OUT before a conversion writes it: what it must be called, where it must lie, and what may be in it."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from olmem.rules_olmem import OLMO_BLOCKS

from ..errors import CheckpointError
from ..options import ConvertOptions, Say
from ..publish.standing_card import is_own, kept_metadata
from ..reading.olmem_folder import CARD_NAME, REPORT_NAME, WRITTEN
from ..reading.texts import read_json
from ..writing.transaction import recover, require_apart


def claim(source: Path, out: Path, options: ConvertOptions, say: Say) -> dict[str, Any]:
    """Raises CheckpointError unless `out` may be written, having put back what a crash has left beside it.

    Returns what its card is to say that no other file knows: as the card of a folder that is to be replaced does.
    """
    require_apart(source, out, {"tokenizer": options.tokenizer, "native_config": options.native_config})
    recover(out, say)
    if os.path.lexists(out):
        check_out(out, options.overwrite)
    return kept_metadata(out)


def named(out: str | Path) -> Path:
    """Its absolute path, if a folder can be made there."""
    path = Path(os.path.abspath(out))
    try:
        text = str(path).encode().decode()
    except UnicodeEncodeError:
        text = ""  # libraries that write the files take UTF-8 only
    if not path.name or not text or "\0" in text:
        raise CheckpointError(f"`OUT` must be the name of a folder, in UTF-8 (got {str(out)!r}); name another one.")
    return path


def check_out(out: Path, overwrite: bool) -> None:
    """Raises CheckpointError if `out`, which is there, is not to be replaced, or must not be."""
    if not out.is_dir() or out.is_symlink():
        raise CheckpointError(f"`OUT` must not exist yet (got {out}, which is no folder); name a new folder.")
    strays = strays_of(out)
    if strays:
        raise CheckpointError(
            f"`OUT` must not exist yet, or hold only what `olmem convert` wrote ({out} holds {', '.join(strays[:3])}); "
            "name a new folder, or move these away."
        )
    if not overwrite:
        raise CheckpointError(f"`OUT` must not exist yet (got {out}); name a new folder, or add --overwrite.")


def strays_of(out: Path) -> list[str]:
    """What in an existing `out` a conversion did not write, which must not go with it."""
    names = sorted(path.name for path in out.iterdir())
    strays = [name for name in names if not (is_own(out / name) if name == CARD_NAME else is_written(out / name))]
    if names and not strays and not is_of_olmem(out):
        return ["a model of another kind"]
    return strays


def is_written(path: Path) -> bool:
    """Returns whether it is a file of a name that a conversion writes."""
    return path.is_file() and WRITTEN.fullmatch(path.name) is not None


def is_of_olmem(folder: Path) -> bool:
    """An Olmem folder, or one of Transformers' own classes that was verified against an Olmem folder."""
    with suppress(CheckpointError):
        model_type = read_json(folder / "config.json").get("model_type")
        return model_type == "olmem" or (model_type in list(OLMO_BLOCKS) and (folder / REPORT_NAME).is_file())
    return False
