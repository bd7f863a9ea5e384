"""Folders that may be published, changed in ways that a verification and a card would not notice."""

from pathlib import Path

from convert.checkpoints import edit_json
from olmem_convert import CardOptions, card
from olmem_convert.reading.olmem_folder import UNSEALED
from olmem_convert.writing.shards import sha256


def reseal(out: Path, with_card: bool = True, license: str | None = None) -> None:
    """As if the folder had been verified as it is now, and its card written after that."""
    seal = {path.name: sha256(path) for path in out.iterdir() if path.is_file() and path.name not in UNSEALED}
    edit_json(out / "verification.json", sha256=seal)
    if with_card:
        card(out, CardOptions(license=license))


def write_own_card(out: Path) -> None:
    """A card that is not Olmem's, with the same metadata."""
    path = out / "README.md"
    path.write_text(path.read_text().split("<!--")[0] + "# Mine\n")
