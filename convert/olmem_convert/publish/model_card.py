"""The model card of an Olmem folder, made of what its own JSON files say, and the check of a card before publishing.

A card that Olmem wrote is at any time what `make_card` makes of the folder and of what the card itself says that no
file knows, the license for one, which is taken from there when the card is written anew.
"""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Template
from olmem import OlmemConfig
from olmem.rules_olmem import MEMORY_FIELDS, OLMO_BLOCKS
from olmem.visibility_olmem import Visibility

from ..errors import CheckpointError
from ..formats.olmem import CONFIG_ERRORS, losses
from ..options import MODES
from ..reading.olmem_folder import (
    CARD_NAME,
    EVALUATION_NAME,
    PLOT_NAMES,
    REPORT_NAME,
    digest,
    read_config,
    refuse_other_classes,
)
from ..reading.plain import reading
from ..reading.texts import read_json
from ..reading.weight_files import read_weights
from ..writing.shards import INDEX_NAME
from ..writing.texts import replace_text
from .metadata import FIELDS, NOT_OF_THE_HUB, WORDS, checked, named_after
from .standing_card import BEGIN, END, MARK, is_own, read_front_matter, require_unedited, with_checksum, words_of

NOT_VERIFIED = "Not verified."
DEFAULTS = {field.name: field.default for field in fields(OlmemConfig)}
OURS = {"library_name": "transformers", "pipeline_tag": "text-generation"}
TEXT = "text"  # the type of a data set of plain text files, as the `datasets` library calls it
GENERATED = "generated"  # the type of a data set of texts that are made by a task of recall
# Of what a text was measured: the name in evaluation.json, in a card's metadata, and for people.
METRICS = {
    "nats_per_token": ("loss", "nats per token"),
    "perplexity": ("perplexity", "perplexity"),
    "bits_per_byte": ("bits_per_byte", "bits per byte"),
}
RECALL = "exact_match"  # of a task: the name in evaluation.json and in a card's metadata
PARTS = ("inside", "one_to_four", "further")  # of a text, by windows
LONGEST = 200
MOST_ROWS = 3000  # of a list of an evaluation
OF_MEMORY = re.compile(r"\bmodel\.memory\.|\.(memory_gate|retrieval_gate|retrieval_score)\.")
KINDS = ("native", "reload")  # of a verification of an Olmem folder: against a checkpoint, or of the folder alone
# Choices of the architecture, of which a card names those that are none of the defaults.
CHOICES = (
    *("norm_placement", "norm_type", "qk_norm", "clip_qkv", "position_embedding", "hidden_act", "logits_scaling"),
    *("sink_logit_init", "attention_bias", "tie_word_embeddings"),
)
SHARED = {  # what a key and a value are, and what of them is cached for each token
    "key_value": "a value is its key, and one tensor is cached for both",
    "query_key": "a query is its key",
    "query_key_value": "query, key and value are one, and one tensor is cached",
    "value_difference": "a value is its query minus its key",
}


def write_card(folder: Path, kept: Mapping[str, Any], known: Mapping[str, str] | None = None) -> None:
    """Writes the card with the metadata `kept`, never over one that is somebody's own. What of the folder's files
    cannot be read, or is of another state of the folder, the card does not say. known: sha256 by file, if computed."""
    path = folder / CARD_NAME
    if path.exists() and not is_own(path):
        return
    values = {}
    made_of = digests(folder, known)
    for read in READERS:
        with suppress(CheckpointError):
            values |= read(folder, made_of)
    replace_text(path, make_card(kept, values))


def check_card(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Raises CheckpointError, which says the way out, for a card that must not be published.

    A card of Olmem's must be what the folder's files give now, and say that the model is verified. Any card must have
    valid metadata, a license, and in its `model-index` no figures of plain texts and of tasks of recall but those in
    evaluation.json. known:
    the sha256 of files by name, where the caller has computed them.
    """
    path, (data, metadata) = folder / CARD_NAME, check_metadata(folder)
    values = read_values(folder, known)
    if is_own(path) and "verification" not in values:
        raise CheckpointError(
            f"`{CARD_NAME}` must say how the model was verified (there is no passing {REPORT_NAME}); "
            f"{verify_again(folder)}."
        )
    if is_own(path):
        require_unedited(path)
        kept = {"model_name": named_after(folder), **metadata, WORDS: words_of(path)}
        if path.read_text(encoding="utf-8") != make_card(kept, values):
            raise CheckpointError(
                f"`{CARD_NAME}` must say what the folder's files say now ({path} does not); run `olmem card {folder}`."
            )
    measured = {(result.dataset_name, result.metric_type): result.metric_value for result in results_of(values)}
    for result in ModelCardData(**data).eval_results or []:
        what, value = (result.dataset_name, result.metric_type), result.metric_value
        metrics = {TEXT: [metric for metric, _ in METRICS.values()], GENERATED: [RECALL]}
        is_ours = result.metric_type in metrics.get(result.dataset_type, ())
        if (is_ours or what in measured) and measured.get(what) != value:
            name, metric = map(one_line, what)
            raise CheckpointError(
                f"`model-index` of {path} must have the figures of {EVALUATION_NAME} (got {metric} {value!r} on "
                f"{name!r}); correct it, or remove the entry."
            )


def verify_again(folder: Path) -> str:
    """What to do about a folder that is not verified as it is."""
    return f"run `olmem verify {quote(str(folder))}`, with `--against SRC` if it was converted"


def check_metadata(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The card's front matter, and what of it no file knows, once it is valid and has a license."""
    path = folder / CARD_NAME
    if not path.is_file():
        raise CheckpointError(f"`{CARD_NAME}` must exist ({path} does not); run `olmem card {folder} --license …`.")
    data = read_front_matter(path)
    names = [name for name in FIELDS if name in data and (is_own(path) or name not in NOT_OF_THE_HUB)]
    metadata = checked({name: data[name] for name in names})
    for name, wanted in OURS.items():
        if data.get(name) != wanted:
            raise CheckpointError(f"`{name}` of {path} must be {wanted} (got {data.get(name)!r}); correct it.")
    if "license" not in metadata:
        raise CheckpointError(f"`license` of {path} must be named; run `olmem card {folder} --license …`, or add it.")
    link = metadata.get("license_link", "")
    if link.startswith("LICENSE") and not (folder / link).is_file():
        raise CheckpointError(f"`license_link` of {path} must be a file beside it (got {link}); add the file.")
    return data, metadata


# What the folder's files say


def read_values(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Of the template's variables, what the folder's files say. Raises CheckpointError for a file that is damaged, or
    of another state of the folder."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"`OUT` must be an Olmem folder ({folder} has no config.json); name one that `olmem convert` or "
            "`save_pretrained` wrote."
        )
    refuse_other_classes(folder)
    made_of, values = digests(folder, known), {}
    for read in READERS:
        values |= read(folder, made_of)
    return values


def digests(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """The sha256 of each file that a verification or an evaluation is of, if there is one; not computed if known."""
    if known is None and not any((folder / name).is_file() for name in (REPORT_NAME, EVALUATION_NAME)):
        return {}
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", INDEX_NAME]
    names += sorted(path.name for path in folder.glob("*.safetensors"))
    found = known or {}
    return {name: found.get(name) or digest(folder / name) for name in names if (folder / name).is_file()}


def check_digests(name: str, report: Mapping[str, Any], made_of: Mapping[str, str], remedy: str) -> None:
    """Raises CheckpointError for a report of files that are no longer the ones of the folder."""
    if changed := [file for file, digest in made_of.items() if report["sha256"].get(file) != digest]:
        raise CheckpointError(
            f"`{name}` must be of the folder's own files ({', '.join(changed)} changed since); {remedy}."
        )


def config_values(folder: Path, made_of: Mapping[str, str]) -> dict[str, Any]:
    """Returns what the card says of the config: layers, dtype, memory; and of the files that go with it."""
    config = read_config(folder)
    if config.architectures not in (None, ["OlmemForCausalLM"]):
        raise CheckpointError(
            f"`architectures` of {folder / 'config.json'} must be ['OlmemForCausalLM'] (got "
            f"{one_line(config.architectures)}), as the card is that of a causal language model; write one by hand."
        )
    if not isinstance(config.dtype, torch.dtype):
        raise CheckpointError(f"`dtype` of {folder / 'config.json'} must name the weights' dtype; convert again.")
    given = {name: getattr(config, name) for name in MEMORY_FIELDS} if config.has_memory else {}
    return {
        "config": config,
        "dtype": str(config.dtype).removeprefix("torch."),
        "layers": describe_layers(config),
        "bounded": all(Visibility.of(config, layer_type).span for layer_type in config.layer_types),
        "choices": {
            name: one_line(json.dumps(getattr(config, name)))
            for name in CHOICES
            if getattr(config, name) != DEFAULTS[name]
        },
        "shared": SHARED.get(config.shared_projections),
        "tokenizer": (folder / "tokenizer.json").is_file(),
        "code": (folder / "modeling_olmem.py").is_file(),
        "classes": [name for name in OLMO_BLOCKS if fits(config, name)],
        "memory": {
            name: one_line(json.dumps(value))
            for name, value in given.items()
            if value not in (None, [], DEFAULTS[name])
        },
    }


def fits(config: OlmemConfig, name: str) -> bool:
    """Returns whether Transformers' class of this name can say all that the config says."""
    with suppress(*CONFIG_ERRORS):
        return not losses(config, name)
    return False


def weight_values(folder: Path, made_of: Mapping[str, str]) -> dict[str, Any]:
    """Returns the numbers of parameters, of the model and of its memory, by the headers of the weights' files."""
    sizes = {name: math.prod(tensor.shape) for name, tensor in read_weights(folder).items()}
    of_memory = sum(size for name, size in sizes.items() if OF_MEMORY.search(name))
    return {"parameters": f"{sum(sizes.values()):,}", "memory_parameters": f"{of_memory:,}"}


def describe_layers(config: OlmemConfig) -> str:
    """Says how many layers there are of each kind."""
    lookback = config.attention_chunk_lookback
    kinds = {
        "full_attention": "full attention",
        "sliding_attention": f"a sliding window of {config.sliding_window} tokens",
        "chunked_attention": f"attention within chunks of {config.attention_chunk_size} tokens"
        + (f" and to the {lookback} before" if lookback else ""),
    }
    counts = {kind: config.layer_types.count(kind) for kind in kinds}
    return ", ".join(f"{count} with {kinds[kind]}" for kind, count in counts.items() if count)


def verification_values(folder: Path, made_of: Mapping[str, str]) -> dict[str, Any]:
    """Nothing where there is no verification, or it failed."""
    path = folder / REPORT_NAME
    if not path.is_file():
        return {}
    report = read_json(path)
    if report.get("passed") is not True:
        return {}
    against = " --against SRC" if report.get("kind") == "native" else ""
    remedy = f"verify again: `olmem verify {folder}{against}`"
    with reading(path, remedy):
        check_digests(REPORT_NAME, report, made_of, remedy)
        prompt = report["prompt"]
        counts = report.get("nonfinite")
        if report["kind"] == "reload":
            return {
                "verification": {
                    "kind": "reload",
                    "tokens": whole(prompt["tokens"]),
                    "version": one_line(report["versions"]["olmem"]),
                    "nonfinite": whole(sum(counts.values())) if counts else 0,
                }
            }
        if report["kind"] != "native":
            raise ValueError(f"`kind` is none of {', '.join(KINDS)}")
        windows = {name: prompt[name] for name in ("sliding_window", "attention_chunk_size") if prompt[name]}
        past = " and ".join(f"the `{name}` of {whole(value)}" for name, value in windows.items())
        verification: dict[str, Any] = {
            "kind": "native",
            "source": one_line(report["source"]),
            "tokens": whole(prompt["tokens"]),
            "past": f", longer than {past}" if past else "",
            **{name: shown(report[name]) for name in ("max_difference", "mean_difference", "tolerance")},
        }
        if rounding := report.get("rounding"):
            verification["rounding"] = {name: shown(rounding[name]) for name in ("max_difference", "mean_difference")}
            verification["overflowing"] = whole(rounding.get("nonfinite", 0))
        if counts:
            verification["nonfinite"] = whole(sum(counts.values()))
            verification["compared"] = whole(report["stages"][-1]["compared"])
        if memory := report.get("memory"):
            verification["switched"] = {
                one_line(name): one_line(json.dumps(value)) for name, value in memory["fields"].items()
            }
            verification["new_parameters"] = [one_line(name) for name in memory["new_parameters"]]
            verification["moved"] = shown(100 * memory["relative_difference_when_on"])
            if "segments" in memory:
                verification["segments"] = f"{whole(memory['segments']):,}"
                verification["segments_in"] = one_line(memory["segments_in"])
    return {"verification": verification}


def evaluation_values(folder: Path, made_of: Mapping[str, str]) -> dict[str, Any]:
    """Nothing where there is no evaluation."""
    path, remedy = folder / EVALUATION_NAME, f"evaluate again: `olmem evaluate {folder} …`, or remove it"
    plots = sorted(name for name in PLOT_NAMES if (folder / name).is_file())
    if not path.is_file():
        if plots:
            raise CheckpointError(f"`{EVALUATION_NAME}` must lie beside its plots (got {plots[0]} alone); {remedy}.")
        return {}
    report = read_json(path)
    with reading(path, remedy):
        check_digests(EVALUATION_NAME, report, made_of, remedy)
        for name in ("texts", "recall", "state"):
            if len(report[name]) > MOST_ROWS:
                raise ValueError(f"it has more than {MOST_ROWS:,} {name}")
        if wrong := [name for name in plots if report["plots"].get(name) != digest(folder / name)]:
            raise ValueError(f"{wrong[0]} is no plot of its figures")
        evaluation = {
            "window": None if report["window"] is None else whole(report["window"]),
            "dtype": one_line(report["dtype"]),
            "attention": one_line(report["attention"]),
            "bos": bool(report["bos_token"]),
            "texts": [
                {
                    "name": one_line(text["name"]),
                    "sha256": one_line(text["sha256"]),
                    "memory": MODES[MODES.index(text["memory"])],
                    "tokens": whole(text["tokens"]),
                    **{name: figure(text[name]) for name in METRICS},
                    **{part: shown((text[part] or {}).get("nats_per_token"), 5) for part in PARTS},
                }
                for text in report["texts"]
            ],
            "recall": [
                {
                    "task": one_line(row["task"]),
                    "questions": whole(row["questions"]),
                    **{name: figure(row[name]) for name in (RECALL, "likeliest", "nats_per_token")},
                }
                for row in report["recall"]
            ],
            "state": [
                {
                    "tokens": whole(row["tokens"]),
                    "bytes": whole(row["bytes"]),
                    **{
                        name: "" if row[name] is None else microseconds(row[name])
                        for name in ("seconds_per_token", "seconds_per_step")
                    },
                }
                for row in report["state"]
            ],
            "plots": [name for name in plots if name.endswith(".png")],
        }
    return {"evaluation": evaluation}


READERS = (verification_values, evaluation_values, config_values, weight_values)  # the seal first


# The card


def make_card(metadata: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """The card's text, of what it was told, the model's name at least, and the variables that `read_values` reads."""
    said: dict[str, Any] = {name: value for name, value in metadata.items() if name != WORDS} | OURS
    if said.get("origin") == "fine-tuned":
        said["base_model_relation"] = "finetune"  # as the Hub calls it
    data = ModelCardData(**said, tags=["olmem"], eval_results=results_of(values) or None)
    told = data.to_dict() | variables(metadata, values)
    text = compile_template().render(card_data=data.to_yaml(), **told)
    return with_checksum(str(ModelCard(text)).rstrip() + "\n")


def variables(metadata: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the template's variables, those without a value as None."""
    none = dict.fromkeys(("config", "parameters", "verification", "evaluation", "memory"))
    name, bases = str(metadata["model_name"]), metadata.get("base_model") or []
    told = {
        "title": name.rpartition("/")[2],
        "repository": name if "/" in name else None,
        "origin": metadata.get("origin"),
        "bases": [bases] if isinstance(bases, str) else bases,
        "words": metadata.get(WORDS, ""),
    }
    marks = {"mark": MARK, "begin": BEGIN, "end": END, "not_verified": NOT_VERIFIED}
    return none | told | marks | {"metrics": METRICS, "parts": PARTS, "cell": cell} | dict(values)


@cache
def compile_template() -> Template:
    """Returns the template that every card is made of, which takes longer to compile than to fill."""
    return Template(read_template())


def read_template() -> str:
    """`model_cards/card.md`, of the repository or, as installed, beside this file."""
    here = Path(__file__)
    installed = here.with_name("card.md")
    return (installed if installed.is_file() else here.parents[3] / "model_cards" / "card.md").read_text("utf-8")


def results_of(values: Mapping[str, Any]) -> list[EvalResult]:
    """What a card's `model-index` says of the texts that were evaluated, with the memory on, and of tasks of recall."""
    evaluation = values.get("evaluation") or {"texts": (), "recall": ()}
    of_texts = [
        EvalResult(
            task_type=OURS["pipeline_tag"],
            dataset_type=TEXT,
            dataset_name=text["name"],
            dataset_revision=text["sha256"],
            metric_type=metric,
            metric_name=title,
            metric_value=text[name],
        )
        for text in evaluation["texts"]
        if text["memory"] == "on"
        for name, (metric, title) in METRICS.items()
    ]
    return of_texts + [
        EvalResult(
            task_type=OURS["pipeline_tag"],
            dataset_type=GENERATED,
            dataset_name=row["task"],
            dataset_config=row["task"],  # as the Hub tells data sets apart by it, and not by the name
            metric_type=RECALL,
            metric_name="exact match",
            metric_value=row[RECALL],
        )
        for row in evaluation["recall"]
    ]


def shown(value: Any, digits: int = 3) -> str:
    """Returns a number in so many digits, as a card shows it."""
    return "" if value is None else f"{figure(value, digits):.{digits}g}"


def microseconds(seconds: Any) -> str:
    """Returns a time in three digits, as a card shows it, or to the microsecond."""
    time = 1e6 * figure(seconds)
    return f"{time:.0f}" if time >= 100 else f"{time:.3g}"


def figure(value: Any, digits: int = 5) -> float:
    """A finite number of a JSON file, rounded to so many digits."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no figure")
    return float(f"{value:.{digits}g}")


def whole(value: Any) -> int:
    """Returns a whole number of a report, or raises ValueError."""
    if type(value) is not int:
        raise ValueError(f"{value!r} is no whole number")
    return value


def one_line(text: Any) -> str:
    """What a checkpoint says, as it may stand in a code span."""
    line = " ".join(str(text).replace("`", "'").split())
    line = "".join(sign if sign.isprintable() else "\ufffd" for sign in line)
    return (line[: LONGEST - 1] + "…" if len(line) > LONGEST else line) or "?"


def cell(text: str) -> str:
    """The same in a table."""
    return text.replace("|", r"\|")
