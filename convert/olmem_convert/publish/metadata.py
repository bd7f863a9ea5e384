"""What a card says that no file of the folder can know: name, origin, license, base model, languages, data sets.

Here is checked of what form it is. Whether the Hub takes it, the Hub is asked before anything is sent.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..errors import CheckpointError

FIELDS = ("model_name", "license", "license_name", "license_link", "base_model", "origin", "language", "datasets")
WORDS = "words"  # of the author, which stand in the card itself, and not in its front matter
NOT_OF_THE_HUB = ("model_name", "origin")  # which in a card that is not Olmem's may mean anything
ORIGINS = ("scratch", "fine-tuned")
SEVERAL = ("language", "datasets")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,95}")  # which of them there are, the Hub says when it is asked
LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
LICENSE_NAME = re.compile(r"[a-z0-9][a-z0-9.+-]{0,95}")
LICENSE_LINK = re.compile(r"https?://[\x21-\x7e]{1,2000}|LICENSE(\.md|\.txt)?")


def merged(kept: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a card said, with what is given now in its place, and without what that contradicts."""
    given = {name: value for name, value in given.items() if value}
    dropped = {"license_name", "license_link"} if "license" in given else set()
    if given.get("origin") == "scratch":
        dropped.add("base_model")
    if "base_model" in given and kept.get("origin") == "scratch":
        dropped.add("origin")
    return checked({name: value for name, value in kept.items() if name not in dropped} | given)


def checked(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as they stand in a card, in order, each language and data set once. Raises CheckpointError for what
    the Hub would not take."""
    made = {name: metadata[name] for name in (*FIELDS, WORDS) if metadata.get(name) is not None}
    for name in SEVERAL:
        if name in made:
            values = [made[name]] if isinstance(made[name], str) else made[name]
            if not isinstance(values, list | tuple) or not values:
                raise CheckpointError(f"`{name}` must be a list (got {repr(values)}); correct it, or remove it.")
            made[name] = [value for index, value in enumerate(values) if value not in values[:index]]
    check_license(made)
    check_origin(made)
    if "model_name" in made:
        check_repo_id(
            "model_name", made["model_name"], "a name, or the id of a repository, as in olmem-1b or you/olmem-1b"
        )
    for value in made.get("language", ()):
        if not isinstance(value, str) or not LANGUAGE.fullmatch(value):
            raise CheckpointError(
                f"`language` must be of two or three small letters, as in ISO 639, or code, or multilingual (got "
                f"{repr(value)}); correct it (in YAML, write 'no' in quotes)."
            )
    bases = made.get("base_model", [])
    for name, values in (
        ("base_model", bases if isinstance(bases, list) else [bases]),
        ("datasets", made.get("datasets", [])),
    ):
        for value in values:
            check_repo_id(name, value)
    return made


def check_license(metadata: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a license, its name or its link of a form that the Hub does not take."""
    license, name, link = (metadata.get(field) for field in ("license", "license_name", "license_link"))
    if license is not None and (not isinstance(license, str) or not LICENSE.fullmatch(license)):
        raise CheckpointError(
            f"`license` must be an identifier of the Hub, such as apache-2.0 or mit (got {repr(license)}); look it up "
            "at hf.co/docs/hub/repositories-licenses, or use other with --license-name and --license-link."
        )
    if license == "other":
        if not isinstance(name, str) or not LICENSE_NAME.fullmatch(name):
            raise CheckpointError(
                f"`license_name` must name the license where `license` is other, in small letters, digits, points and "
                f"dashes (got {repr(name)}); add --license-name."
            )
        if not isinstance(link, str) or not LICENSE_LINK.fullmatch(link):
            raise CheckpointError(
                f"`license_link` must be the address of the license where `license` is other, or LICENSE, the file "
                f"beside the card (got {repr(link)}); add --license-link."
            )
    elif name is not None or link is not None:
        field, got = ("license_name", name) if name is not None else ("license_link", link)
        raise CheckpointError(
            f"`{field}` must go with `license` other (got {repr(got)} with {repr(license)}); use --license other, or "
            "leave it out."
        )


def check_origin(metadata: Mapping[str, Any]) -> None:
    """Raises CheckpointError for an origin that is none, or that the base model contradicts."""
    origin, base = metadata.get("origin"), metadata.get("base_model")
    if origin not in (None, *ORIGINS):
        raise CheckpointError(f"`origin` must be {' or '.join(ORIGINS)} (got {repr(origin)}); choose one.")
    if origin == "fine-tuned" and base is None:
        raise CheckpointError("`base_model` must be named where `origin` is fine-tuned (got none); add --base-model.")
    if origin == "scratch" and base is not None:
        raise CheckpointError(
            f"`base_model` must not be named where `origin` is scratch (got {repr(base)}); use --origin fine-tuned, or "
            "leave --base-model out."
        )


def check_repo_id(
    field: str, value: Any, what: str = "the id of a repository on the Hub, as in allenai/OLMo-2-0425-1B"
) -> None:
    """Raises CheckpointError for what the Hub does not take for the id of a repository."""
    try:
        if not isinstance(value, str):
            raise HFValidationError("no text")
        validate_repo_id(value)
    except HFValidationError:
        raise CheckpointError(f"`{field}` must be {what} (got {repr(value)}); correct it.") from None


def named_after(folder: Path) -> str:
    """The name of a model that nobody has named, of its folder."""
    name = re.sub(r"[^\w.-]+|-{2,}|[.]{2,}", "-", folder.resolve().name, flags=re.ASCII)[:96].strip(".-")
    return name.removesuffix(".git") or "model"
