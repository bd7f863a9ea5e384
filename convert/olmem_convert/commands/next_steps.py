"""What a command says last: what may be done next with the folder that it has written."""

from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from ..publish.model_card import verify_again


def to_describe(out: Path) -> str:
    """Returns what to do with a folder that has nothing but a model."""
    folder = quote(str(out))
    return f"next: `olmem evaluate {folder} --text FILE` measures it; `olmem card {folder} --license ID` describes it"


def to_publish(out: Path, metadata: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """Returns what publishing a folder needs first, by what its card was told and by what its files say."""
    if "verification" not in values:
        return f"next: {verify_again(out)}; only a verified model is published"
    if "license" not in metadata:
        return f"next: `olmem card {quote(str(out))} --license ID` names the license, which publishing needs"
    return f"next: `olmem push {quote(str(out))} REPO_ID` shows what would be published"
