"""The model card of a converted folder, from what its own JSON files say."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from olmem import OlmemConfig
from olmem.configuration_olmem import MEMORY_FIELDS

CARD_NAME = "README.md"
TEMPLATE = Path(__file__).with_name("card.md")
DEFAULTS = {field.name: field.default for field in fields(OlmemConfig)}
MARK = "Written by olmem, which replaces this text until this line is removed."


def write_card(folder: Path, config: Mapping[str, Any], report: Mapping[str, Any] | None) -> None:
    """Writes the card by `config.json` and, if it passed, `verification.json`; never over a card of somebody's own."""
    path = folder / CARD_NAME
    if not path.exists() or is_own(path):
        path.write_text(make_card(config, report), encoding="utf-8")


def is_own(path: Path) -> bool:
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")


def make_card(config: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["olmem"])
    values: dict[str, Any] = {"mark": MARK, "verified": report is not None, "dtype": one_line(config.get("dtype"))}
    if config.get("num_memory_tokens") or config.get("retrieval_layers"):
        given = {name: config[name] for name in MEMORY_FIELDS if config.get(name) not in (None, [], DEFAULTS[name])}
        values["memory"] = {name: json.dumps(value) for name, value in given.items()}
    if report is not None:
        prompt = report["prompt"]
        past = [f"{name} {prompt[name]}" for name in ("sliding_window", "attention_chunk_size") if prompt[name]]
        values |= {
            "source": one_line(report["source"]),
            "tokens": prompt["tokens"],
            "past": f", past {' and '.join(past)}" if past else "",
            "rounding": shown(report.get("rounding", {})),
            **shown({name: report[name] for name in ("max_difference", "mean_difference", "tolerance")}),
        }
        if memory := report.get("memory"):
            values["memory"] = {name: json.dumps(value) for name, value in memory["fields"].items()}
            values["new_parameters"] = ", ".join(f"`{name}`" for name in memory["new_parameters"])
            values["moved"] = f"{100 * memory['relative_difference_when_on']:.3g}"
    return str(ModelCard.from_template(data, template_path=str(TEMPLATE), **values)).rstrip() + "\n"


def shown(figures: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.3g}" for name, value in figures.items()}


def one_line(text: Any) -> str:
    """What a checkpoint says, as it may stand in a code span."""
    return " ".join(str(text).replace("`", "'").split())
