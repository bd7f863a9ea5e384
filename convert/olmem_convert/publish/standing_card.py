"""The card as it stands in a folder: whose it is, what it says that no other file knows, and whether it was edited.

A card that Olmem wrote bears `MARK`, and behind it a checksum of all that Olmem writes anew. What the author may edit,
the fields of the front matter that no file knows and the words between two comments, is not in that checksum.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..errors import CheckpointError
from ..reading.olmem_folder import CARD_NAME
from ..reading.plain import reading
from ..reading.texts import parse_yaml, read_text
from .metadata import FIELDS, WORDS, checked, named_after

MARK = "Written by olmem, which keeps your own words and refuses other edits until this line is removed."
MARKED = re.compile(rf"^<!-- {re.escape(MARK)}( [0-9a-f]{{16}})? -->$", re.MULTILINE)
BEGIN, END = "<!-- your own words -->", "<!-- end -->"
BETWEEN = re.compile(rf"^{BEGIN}$(.*?)^{END}$", re.MULTILINE | re.DOTALL)
LARGEST_CARD, LARGEST_FRONT_MATTER = 2**20, 2**17  # bytes, and signs; the largest on the Hub have 2**19 and 2**16


def is_own(path: Path) -> bool:
    """Returns whether the file is a card that Olmem wrote, and may write anew."""
    with suppress(CheckpointError):
        return path.is_file() and MARK in read_text(path, LARGEST_CARD)
    return False


def kept_metadata(folder: Path) -> dict[str, Any]:
    """What the folder's card, if it is Olmem's, says that no other file knows, and the name of the model."""
    return checked(said(folder / CARD_NAME))


def said(path: Path) -> dict[str, Any]:
    """The same, as it stands there. Raises CheckpointError where writing the card anew would lose an edit."""
    own, name = is_own(path), {"model_name": named_after(path.parent)}
    if not own:
        return name
    data = read_front_matter(path)
    require_unedited(path)
    return name | {field: data[field] for field in FIELDS if field in data} | {WORDS: words_of(path)}


def require_unedited(path: Path) -> None:
    """Raises CheckpointError for a card of Olmem's that was edited where its author's words are not."""
    text = read_text(path, LARGEST_CARD)
    found = MARKED.search(text)
    if found and (found[1] or "").strip() == checksum(text, path):
        return
    raise CheckpointError(
        f"`{CARD_NAME}` must be edited between `{BEGIN}` and `{END}` alone, and in its front matter what `olmem card` "
        f"is told ({path} was edited elsewhere, which writing it anew would lose); move the edit there, or remove the "
        "comment at its top, and the card is yours, or move the file away."
    )


def words_of(path: Path) -> str:
    """What the author wrote between the two comments."""
    found = BETWEEN.search(read_text(path, LARGEST_CARD))
    return found[1].strip() if found else ""


def with_checksum(text: str) -> str:
    """The card with the checksum behind its mark."""
    return MARKED.sub(f"<!-- {MARK} {checksum(text, Path(CARD_NAME))} -->", text, count=1)


def checksum(text: str, path: Path) -> str:
    """Of all that a card says but what its author may edit."""
    data = {name: value for name, value in front_matter(text, path).items() if name not in FIELDS}
    data["model-index"] = [entry["results"] for entry in data.get("model-index", ())]  # without the model's name
    body = REGEX_YAML_BLOCK.sub("", text, count=1)
    body = BETWEEN.sub(f"{BEGIN}{END}", MARKED.sub("", body, count=1), count=1)
    lines = [json.dumps(data, sort_keys=True, default=str), *(line.rstrip() for line in body.strip().splitlines())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def read_front_matter(path: Path) -> dict[str, Any]:
    """Returns the metadata at the top of a card, within bounds."""
    return front_matter(read_text(path, LARGEST_CARD), path)


def front_matter(text: str, path: Path) -> dict[str, Any]:
    """The same, of its text. The name of a model with figures stands in its `model-index`, and is given apart."""
    with reading(path, "correct the lines between --- and --- at its top, or remove the file"):
        found = REGEX_YAML_BLOCK.search(text)
        if not found:
            raise ValueError("it has no metadata")
        if len(found[2]) > LARGEST_FRONT_MATTER:
            raise ValueError(f"its metadata has more than {LARGEST_FRONT_MATTER:,} signs")
        card = ModelCardData(**parse_yaml(found[2], path))
        named: Mapping[str, Any] = {} if card.model_name is None else {"model_name": card.model_name}
        return card.to_dict() | named
