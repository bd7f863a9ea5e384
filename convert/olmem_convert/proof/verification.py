"""Proof that a converted folder computes what the native model computes.

The checkpoint's forward pass is recomputed by `native_forward`, which knows neither Transformers nor the conversion's
tables, or, where the checkpoint is of a class of Transformers' own, by that class. It is compared with what
`from_pretrained` loads, block by block, on a prompt longer than the window. Both run in float32, on the weights as
stored: a conversion to bfloat16 is compared with native weights rounded to bfloat16, so that equality stays exact;
what the rounding itself costs is measured beside it, against float64.

A prompt meets few rows of an embedding. So every weight is compared too, bit for bit, and every field of the config.

Where the conversion has switched a memory on, which the native model does not have, all this is with it off. What its
parameters do to the logits of the same prompt is measured, and that they are sound.
"""

import json
import math
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import olmem
import psutil
import torch
import transformers
from olmem import OlmemCache, OlmemConfig, OlmemForCausalLM
from olmem.rules_olmem import OLMO_BLOCKS
from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..errors import CheckpointError, DifferenceError
from ..formats import Checkpoint, Given, is_dynamic
from ..formats.detect import open_checkpoint
from ..memory import OFF, listed, memory_of, new_parameters, switched, with_memory
from ..plan import TOKEN_IDS, make_config, make_tensors
from ..publish.model_card import CARD_NAME, EVALUATION_NAME, REPORT_NAME, kept_metadata, replace_text, write_card
from ..reading.olmem_folder import (
    check_generation_config,
    check_shapes,
    digest,
    identities,
    read_config,
    require_unchanged,
    stored_dtype,
)
from ..reading.plain import reading
from ..reading.tensors import LazyTensor, LoadedOnDemand, require_same, same_bits
from ..reading.texts import read_json
from ..reading.weight_files import read_safetensors
from ..writing.shards import PIECE, count_nonfinite, is_finite, refuse_nonfinite
from .native_forward import native_forward
from .transformers_forward import transformers_forward

# What a verification does not vouch for, and may come after it.
UNSEALED = {REPORT_NAME, CARD_NAME, EVALUATION_NAME} | {
    f"{name}{suffix}" for name in ("LICENSE", "NOTICE") for suffix in ("", ".md", ".txt")
}
# Of the largest value, at least 1. Another order of float32 sums stays below 1.5e-6 in all checkpoints at hand; the
# least of the mistakes, another generation's epsilon, moves some stage by 7e-6 and more.
TOLERANCE = 4e-6
PROMPT_BEYOND_WINDOW, LONGEST_WINDOW = 32, 2**14  # the square of which is the mask, and memory
SEGMENTS, SEGMENTS_AT_A_TIME = 1000, 50  # of memory tokens that are read once, each of one token
ROWS = 256  # of activations that are compared at a time
NOT_OF_THE_LOGITS = {
    *TOKEN_IDS,
    *("architectures", "attention_dropout", "dtype", "id2label", "initializer_range", "label2id", "residual_dropout"),
    *("transformers_version", "use_cache"),
}
SEED = 20
OFFLOADED = {"device_map": "auto"}


class WithoutMemory(OlmemForCausalLM):
    """Loads a folder that has a memory with it off, and its parameters stay where they are."""

    _keys_to_ignore_on_load_unexpected = [r"model\.memory\.", r"\.(memory|retrieval)_gate\."]  # noqa: RUF012


def verify(
    out: str | Path,
    source: str | Path,
    say: Callable[[str], None] = lambda line: None,
    *,
    native_config: str | Path | None = None,
    n_ctx: int | None = None,
    act_fn: str | None = None,
    allow_nonfinite: bool = False,
) -> dict[str, Any]:
    """Compares the converted folder `out` with the native checkpoint `source`, writes `verification.json`.

    native_config, n_ctx, act_fn, allow_nonfinite: as `convert` was given them. Returns the report. Raises
    CheckpointError, after writing a report that says so, when the logits differ.
    """
    out = Path(out)
    if not (out / "config.json").is_file():
        raise CheckpointError(f"`OUT` must be a converted folder ({out} has no config.json); convert SRC first.")
    given = Given(Path(native_config) if native_config else None, n_ctx, act_fn)
    checkpoint = open_checkpoint(Path(source), trained_length(out), given)
    model_type = config_as_written(out).get("model_type")
    if model_type in list(OLMO_BLOCKS):
        raise CheckpointError(
            f"`OUT` must be an Olmem folder (got `model_type` {model_type!r} in {out}); what --to writes is verified "
            "when it is written."
        )
    kept = kept_metadata(out)
    with reading(out / REPORT_NAME, "move it away"):
        (out / REPORT_NAME).unlink(missing_ok=True)  # an old report must not vouch for what is being checked
    write_card(out, kept)
    report = verify_checkpoint(out, checkpoint, say, allow_nonfinite)
    require_same(checkpoint.tensors)
    write_card(out, kept, report["sha256"])
    return report


def trained_length(out: Path) -> int | None:
    """The length by the folder's config, in which --max-length may have replaced the checkpoint's."""
    length = config_as_written(out).get("max_position_embeddings")
    return length if isinstance(length, int) else None


def config_as_written(out: Path) -> dict[str, Any]:
    """The folder's config.json; empty when it is damaged, of which loading the folder tells."""
    with suppress(CheckpointError):
        return read_json(out / "config.json")
    return {}


def verify_checkpoint(
    out: Path, checkpoint: Checkpoint, say: Callable[[str], None], allow_nonfinite: bool = False
) -> dict[str, Any]:
    """The same, for a checkpoint that is already open."""
    config, before = read_config(out), identities(out)
    nonfinite = nonfinite_weights(out, allow_nonfinite)
    model = load_bounded(out, torch.float32, WithoutMemory, **OFF)
    stored = stored_dtype(out)
    input_ids = prompt(checkpoint, (config.memory_segment_length or 0) if config.num_memory_tokens else 0)
    native = native_stages(checkpoint, input_ids, torch.float32, stored)
    stages = compare_stages(model, native, input_ids, bool(nonfinite))
    remembering = with_memory(checkpoint, memory_of(config))
    config_differences, weight_differences = compare_files(config, out, checkpoint, remembering, stored)
    report = make_report(out, checkpoint, input_ids, stored, stages)
    report |= {"config_differences": config_differences, "weight_differences": weight_differences}
    require_unchanged(before, "it is verified")
    report["nonfinite"] = nonfinite
    report["passed"] &= not config_differences and not weight_differences
    logits = logits_of(model, input_ids) if config.has_memory and report["passed"] else None
    del model
    if stored != torch.float32:
        report["rounding"] = rounding(load_bounded(out, stored, WithoutMemory, **OFF), checkpoint, input_ids)
    if logits is not None:
        report["memory"] = {
            "fields": switched(remembering, checkpoint),
            "compared": "with memory off",
            "new_parameters": new_parameters(remembering, checkpoint),
            "relative_difference_when_on": relative_difference(load_bounded(out, torch.float32), input_ids, logits),
        }
        if config.num_memory_tokens:
            remembers = load_bounded(out, stored, memory_segment_length=1)
            report["memory"] |= {"segments": SEGMENTS, "segments_in": report["dtype"]}
            read_segments(remembers, draw_prompt(SEGMENTS + 1, drawn_from(checkpoint), SEED), report["dtype"])
    write_report(out, report, "native")
    weights = "" if stored == torch.float32 else f" of the same weights rounded to {report['dtype']}"
    say(
        f"verified: logits differ by at most {report['max_difference']:.3g} from the native forward pass{weights}, "
        f"{report['mean_difference']:.3g} on average ({input_ids.shape[1]} tokens, computed in float32)"
    )
    tell_nonfinite(report, say)
    if rounded := report.get("rounding"):
        say(
            f"cost of {report['dtype']}: run in it, logits are at most {rounded['max_difference']:.3g} off those of "
            f"unrounded weights in float64, {rounded['mean_difference']:.3g} on average"
        )
    if memory := report.get("memory"):
        if "segments" in memory:
            say(f"read {SEGMENTS:,} segments with memory on, in {report['dtype']}: it stays finite, as do all logits")
        say(
            f"memory: {listed(memory['fields'])} were switched on; logits above were compared with them off; on, they "
            f"move the logits of this prompt by {100 * memory['relative_difference_when_on']:.3g} %"
        )
    return report


def tell_nonfinite(report: dict[str, Any], say: Callable[[str], None]) -> None:
    if counts := report["nonfinite"]:
        say(
            f"note: {sum(counts.values()):,} numbers of {', '.join(counts)} are NaN or infinite, carried over bit for "
            f"bit; {report['stages'][-1]['compared']:,} logits are numbers, which were compared"
        )


def make_report(
    out: Path, checkpoint: Checkpoint, input_ids: torch.Tensor, stored: torch.dtype, stages: list[dict[str, Any]]
) -> dict[str, Any]:
    logits = stages[-1]
    return {
        "passed": all(stage["equal"] for stage in stages) and logits["compared"] > 0,
        "source": checkpoint.description,
        "prompt": {
            "tokens": input_ids.shape[1],
            "vocabulary": drawn_from(checkpoint),
            "seed": SEED,
            "sliding_window": checkpoint.window or None,
            "attention_chunk_size": checkpoint.chunk or None,
        },
        "dtype": str(stored).removeprefix("torch."),
        "compared_in": "float32 with sdpa, native weights rounded to dtype",
        "max_difference": logits["max_difference"],
        "mean_difference": logits["mean_difference"],
        "tolerance": logits["tolerance"],
        "stages": stages,
        "sha256": {
            path.name: digest(path) for path in sorted(out.iterdir()) if path.is_file() and path.name not in UNSEALED
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "olmem": olmem.__version__},
    }


def write_report(out: Path, report: dict[str, Any], whose: str) -> None:
    """Writes verification.json; an error when it says that something differs."""
    written = json.loads(json.dumps(report), parse_constant=lambda _: None)  # NaN is no JSON
    replace_text(out / REPORT_NAME, json.dumps(written, indent=2) + "\n")
    if not report["passed"]:
        raise DifferenceError(
            f"the converted model must compute the {whose} logits with the {whose} weights (it does not); do not "
            "publish it, convert again.",
            explain(report),
        )


def load(
    out: Path,
    dtype: torch.dtype,
    model_class: Any = OlmemForCausalLM,
    placing: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Any:
    """The folder's model, with these fields in place of its config's. placing: where its weights are to be."""
    options = dict(placing or {})
    if issubclass(model_class, OlmemForCausalLM):
        options["config"] = read_config(out, **fields)
        passed_over = re.compile("|".join(model_class._keys_to_ignore_on_load_unexpected or ["$^"]))
        weights = {name: tensor for name, tensor in weights_of(out).items() if not passed_over.search(name)}
        check_shapes(out, options["config"], weights)
        check_generation_config(out)
    with reading(out, "convert again"):
        # By its own class, so that no code that the folder names is ever asked for.
        loaded: Any = model_class.from_pretrained(
            out, dtype=dtype, attn_implementation="sdpa", local_files_only=True, output_loading_info=True, **options
        )
    model, info = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise CheckpointError(f"`{out}` must load without missing or unexpected weights (got {wrong}); convert again.")
    return model.eval()


def load_bounded(out: Path, dtype: torch.dtype, model_class: Any = OlmemForCausalLM, **fields: Any) -> Any:
    """As `load`, on the CPU: what does not fit into half of the free memory stays in its files until it is called."""
    return load(out, dtype, model_class, OFFLOADED | {"max_memory": {"cpu": free_memory() // 2}}, **fields)


def free_memory() -> int:
    """Bytes, of the machine or of what a container may still take."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, max(limit - used, 0))
    return free


def prompt(checkpoint: Checkpoint, segment: int = 0) -> torch.Tensor:
    """Random token ids (1, T), T past the window or in the middle of a later chunk, and past the first segment of a
    memory; the same for every run."""
    for name, tokens in (
        ("sliding_window", checkpoint.window),
        ("attention_chunk_size", checkpoint.chunk),
        ("memory_segment_length", segment),
    ):
        if tokens > LONGEST_WINDOW:
            raise CheckpointError(
                f"`{name}` must be at most {LONGEST_WINDOW} to be verified, by a prompt that is longer (got {tokens}); "
                "correct it, or convert with --no-verify."
            )
    longest = max(checkpoint.window, checkpoint.chunk, segment, PROMPT_BEYOND_WINDOW)
    length = longest + PROMPT_BEYOND_WINDOW
    if chunk := checkpoint.chunk:
        length = length // chunk * chunk + max(chunk // 2, 1)
        length += chunk * (length <= longest)
    if is_dynamic(checkpoint.olmem_config.get("rope_parameters") or {}):  # beyond, a call is another than its tokens
        length = min(length, checkpoint.olmem_config["max_position_embeddings"])
    return draw_prompt(length, drawn_from(checkpoint), SEED)


def drawn_from(checkpoint: Checkpoint) -> int:
    """The tokens that were trained, of whose ids prompts are made."""
    return min(checkpoint.tokenizer_size, checkpoint.olmem_config["vocab_size"])


def draw_prompt(tokens: int, vocabulary: int, seed: int) -> torch.Tensor:
    """The prompt (1, T) that `prompt` in verification.json describes."""
    return torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))


def native_stages(
    checkpoint: Checkpoint, input_ids: torch.Tensor, dtype: torch.dtype, stored: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The native forward pass in `dtype`, on weights rounded to `stored` if given."""
    tensors = LoadedOnDemand(checkpoint.tensors, stored, checkpoint.in_config)
    options: dict[str, Any] = {"dtype": dtype, "trained_length": checkpoint.olmem_config["max_position_embeddings"]}
    if checkpoint.family == "transformers":
        config = OlmemConfig.olmo_of(dict(checkpoint.native_config))
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # never one that the folder names
        return transformers_forward(model_class, config, tensors, input_ids, **options)
    return native_forward(checkpoint.family, checkpoint.native_config, tensors, input_ids, **options)


@torch.no_grad()
def compare_stages(
    model: Any, native: Iterator[tuple[str, torch.Tensor]], input_ids: torch.Tensor, nonfinite: bool = False
) -> list[dict[str, Any]]:
    """One row for embeddings, each block, the last norm and the logits, in the order of the forward pass. With
    `nonfinite` weights, what is NaN or infinite on both sides alike is no difference.

    The model's stages call for the native ones as they are reached, so that its activations do not pile up.
    """
    rows: list[dict[str, Any]] = []
    modules = [model.model.embed_tokens, *model.model.layers, model.model.norm]
    with tqdm(total=len(modules) + 1, desc="verifying", unit="stage", disable=None) as bar:

        def compare_next(actual: torch.Tensor) -> None:
            name, expected = next(native)
            rows.append({"stage": name} | difference(actual, expected, nonfinite))
            bar.update()

        hooks = [module.register_forward_hook(lambda _, __, output: compare_next(output)) for module in modules]
        try:
            logits = model(input_ids, use_cache=False, return_dict=True).logits
            compare_next(logits)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"the config must describe a native model (computing it gave: {error}).") from error
        finally:
            for hook in hooks:
                hook.remove()
    return rows


def compare_files(
    config: OlmemConfig, out: Path, checkpoint: Checkpoint, remembering: Checkpoint, stored: torch.dtype
) -> tuple[dict[str, list[Any]], list[str]]:
    """Config fields that differ from the conversion's, with both values, and names of weights that differ in a bit.

    `remembering` is the checkpoint with the memory that the folder says it has, whose parameters may have any values.
    """
    wanted = make_config(remembering, stored)
    names = [field.name for field in fields(config) if field.name not in NOT_OF_THE_LOGITS]
    config_differences = {
        name: [getattr(config, name), getattr(wanted, name)]
        for name in names
        if getattr(config, name) != getattr(wanted, name)
    }
    added = new_parameters(remembering, checkpoint)
    return config_differences, weights_that_differ(out, make_tensors(remembering, wanted), stored, added)


def weights_that_differ(
    out: Path, made: Mapping[str, LazyTensor], stored: torch.dtype, of_any_values: Collection[str] = ()
) -> list[str]:
    """Names of tensors that the folder holds and `made`, rounded to `stored`, has otherwise, or only one of them."""
    written = weights_of(out)

    def same(name: str) -> bool:
        if name not in written or name not in made or written[name].dtype != stored:
            return False
        if name in of_any_values:
            return written[name].shape == made[name].shape
        return written[name].shape == made[name].shape and same_bits(written[name], made[name], stored)

    names = tqdm(sorted(set(written) | set(made)), desc="comparing weights", unit="tensor", disable=None)
    return [name for name in names if not same(name)]


def weights_of(out: Path) -> dict[str, LazyTensor]:
    return {
        name: tensor for path in sorted(out.glob("*.safetensors")) for name, tensor in read_safetensors(path).items()
    }


def nonfinite_weights(out: Path, allowed: bool) -> dict[str, int]:
    """How many numbers of the folder's weights are NaN or infinite, by name; unless that is allowed, an error."""
    found: dict[str, int] = {}
    for name, tensor in weights_of(out).items():
        for piece in tensor.pieces(PIECE):
            if not is_finite(piece):
                if not allowed:
                    refuse_nonfinite(name, tensor)
                found[name] = found.get(name, 0) + count_nonfinite(piece)
    return found


def relative_difference(model: Any, input_ids: torch.Tensor, logits: torch.Tensor) -> float:
    """How far the model's logits are from these, which are the prompt's: norm of the difference by norm."""
    moved = float((logits_of(model, input_ids) - logits).norm() / logits.norm())
    if not math.isfinite(moved):
        raise CheckpointError(
            f"the logits with memory on must be finite (their distance from those with it off is {moved}); convert "
            "again, or leave the memory off."
        )
    return moved


@torch.no_grad()
def logits_of(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids, use_cache=False, return_dict=True).logits


@torch.no_grad()
def read_segments(model: Any, input_ids: torch.Tensor, dtype: str) -> None:
    """Reads ids (1, T) as a stream, in segments of one token; an error where memory or logits do not stay finite.

    A prompt has few segments, where a memory that grows with each of them still fits into its dtype.
    """
    cache, read = OlmemCache(model.config), 0
    with tqdm(total=input_ids.shape[1], desc="reading segments", unit="segment", disable=None, delay=2) as bar:
        for piece in input_ids.split(SEGMENTS_AT_A_TIME, dim=1):
            try:
                logits = model(piece, past_key_values=cache, return_dict=True).logits
            except ValueError as error:  # its memory is not finite
                refuse_segments(str(error), read, dtype)
            finite = logits.isfinite().all(-1)[0]
            if not bool(finite.all()):
                refuse_segments("logits that are not", read + int((~finite).nonzero()[0, 0]), dtype)
            read += piece.shape[1]
            bar.update(piece.shape[1])


def refuse_segments(found: str, segments: int, dtype: str) -> NoReturn:
    way_out = "convert with --dtype bfloat16 or float32" if dtype == "float16" else "convert again, or leave it off"
    raise CheckpointError(
        f"`num_memory_tokens` must give a memory that stays finite in {dtype} with all logits, over {SEGMENTS:,} "
        f"segments (got, after {segments}: {found}); {way_out}."
    )


def difference(actual: torch.Tensor, expected: torch.Tensor, nonfinite: bool = False) -> dict[str, Any]:
    if actual.shape != expected.shape:
        raise CheckpointError(
            f"the converted model must have the native shapes (got {tuple(actual.shape)} for {tuple(expected.shape)}); "
            "OUT is of another checkpoint."
        )
    largest, total, count, scale = [torch.tensor(0.0).double()], 0.0, 0, 1.0
    for one, other in zip(actual.flatten(0, -2).split(ROWS), expected.flatten(0, -2).split(ROWS), strict=True):
        if nonfinite:
            alike = (one.isnan() & other.isnan()) | (one.isinf() & (one == other))
            one, other = one[~alike], other[~alike]
        if one.numel():
            gap = (one.double() - other.double()).abs()
            largest.append(gap.max())
            total, count = total + float(gap.sum()), count + gap.numel()
            sound = other[other.isfinite()].abs()
            scale = max(scale, float(sound.max())) if sound.numel() else scale
    maximum = float(torch.stack(largest).max())
    return {
        "max_difference": maximum,
        "mean_difference": total / max(count, 1),
        "tolerance": TOLERANCE * scale,
        "equal": maximum <= TOLERANCE * scale,  # false for NaN and infinity
        "compared": count,
    }


def rounding(model: Any, checkpoint: Checkpoint, input_ids: torch.Tensor) -> dict[str, float]:
    """How far the logits in the stored dtype are from native float64 logits of unrounded weights."""
    stages = native_stages(checkpoint, input_ids, torch.float64)
    (_, reference) = deque(stages, maxlen=1).pop()
    gap = (logits_of(model, input_ids).double() - reference).abs()
    gap = gap[gap.isfinite()]
    return {"max_difference": float(gap.max()), "mean_difference": float(gap.mean())} if gap.numel() else {}


def explain(report: dict[str, Any]) -> list[str]:
    """What differs, for a person, line by line."""
    lines = [
        f"config.json: `{name}` is {found!r}, the checkpoint's is {wanted!r}"
        for name, (found, wanted) in report["config_differences"].items()
    ]
    if not report["stages"][-1]["compared"]:
        lines.append("logits: none is a number on both sides, so nothing is proved")
    weights = report["weight_differences"]
    if weights:
        lines.append(f"weights: {len(weights)} differ: {', '.join(weights[:4])}{', …' if len(weights) > 4 else ''}")
    return [*lines, *table(report["stages"])]


def table(stages: list[dict[str, Any]]) -> list[str]:
    """Stage by stage, the first that diverges marked."""
    first = next((index for index, stage in enumerate(stages) if not stage["equal"]), None)
    lines = [f"{'stage':<14}{'max |Δ|':>12}{'mean |Δ|':>12}{'tolerance':>12}"]
    for index, stage in enumerate(stages):
        mark = "  ← first to diverge" if index == first else ""
        numbers = (stage["max_difference"], stage["mean_difference"], stage["tolerance"])
        lines.append(f"{stage['stage']:<14}" + "".join(f"{number:>12.3g}" for number in numbers) + mark)
    return lines
