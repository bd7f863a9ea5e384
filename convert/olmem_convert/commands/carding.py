"""Writes the model card of an Olmem folder, from the folder's own files and what its author says."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..errors import CheckpointError
from ..options import CardOptions, Say, silent
from ..publish.metadata import merged
from ..publish.model_card import make_card, read_values
from ..publish.standing_card import is_own, said
from ..reading.olmem_folder import CARD_NAME
from ..writing.texts import replace_text
from .next_steps import to_publish


def card(out: str | Path, options: CardOptions | None = None, *, say: Say = silent) -> dict[str, Any]:
    """Writes the card of the Olmem folder `out`, in which what is given replaces what the card said of it before.

    Returns the card's metadata and whether it is verified and evaluated.

    Raises:
        CheckpointError: when a value is not one that the Hub takes, when a file of the folder is damaged or of another
            state of the folder, and when the card is somebody's own. Nothing is written then.
    """
    options = options or CardOptions()
    out = Path(out)
    path = out / CARD_NAME
    values = read_values(out)
    if path.exists() and not is_own(path):
        raise CheckpointError(
            f"`{CARD_NAME}` must be a card that olmem wrote, to be written anew ({path} is somebody's own); edit it by "
            "hand, or move it away."
        )
    metadata = merged(said(path), options.given)
    text = make_card(metadata, values)
    replace_text(path, text)
    say(f"wrote {path}")
    say(to_publish(out, metadata, values))
    return {
        "card": str(path),
        "metadata": ModelCard(text).data.to_dict(),
        "verified": "verification" in values,
        "evaluated": "evaluation" in values,
    }
