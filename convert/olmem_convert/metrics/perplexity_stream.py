"""Perplexity of texts that are each read once as one stream, by position: perplexity_stream.md is its card."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import evaluate
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .streams import read

MEMORY = ("on", "off", "reset")
PARTS = ("inside", "one_to_four", "further")  # by the tokens before a token: up to 1 window, up to 4 windows, more
DESCRIPTION = """
Reads each text once, from its first token to its last, with the state that the model carries from call to call, and
gives perplexity inside the model's window, at 1 to 4 windows, and further.
"""
INPUTS = """
Args:
    predictions: texts (`list` of `str`).
    model: a causal language model of Transformers.
    tokenizer: its tokenizer.
    window: the tokens of a window; that of the model's config by default.
    memory: "on" as the model is; "off" without memory tokens and retrieval, for an Olmem model; "reset" for a state
        that is dropped at each window, so that windows are read by themselves.
    max_tokens: the number of first tokens of each text that are read; all by default.
    chunk: the tokens of a call, which change no figure.
    advance: is called with the number of tokens that were read, in place of a progress bar.
Returns:
    nats_per_token, perplexity, bits_per_byte (of the UTF-8 that is predicted; None for a tokenizer without offsets),
    tokens (all that are read), window, memory;
    inside, one_to_four, further: `tokens` and `nats_per_token` of the tokens that have so many windows before them;
    positions: the same from each power of two to the next;
    perplexities: of each text.
"""


class PerplexityStream(evaluate.Metric):
    """Perplexity of streams, by position."""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]  whose arguments are the features
        self,
        predictions: Sequence[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        window: int | None = None,
        memory: str = "on",
        max_tokens: int | None = None,
        chunk: int = 512,
        advance: Callable[[int], object] | None = None,
    ) -> dict[str, Any]:
        check(memory, max_tokens, chunk, window)
        window = window_of(model.config) if window is None else window
        if memory == "reset" and window is None:
            raise ValueError(
                '`window` must be given with memory="reset" (got None, and the model has layers without one); give the '
                "tokens of a window."
            )
        texts = [tokens_of(text, tokenizer, max_tokens) for text in predictions]
        short = next((len(ids) for ids, _ in texts if len(ids) < 2), None)
        if short is not None:
            raise ValueError(f"`predictions` must have at least 2 tokens each (got {short}); leave out shorter ones.")
        if memory == "off":
            model = without_memory(model)
        losses, reset_at = [], window if memory == "reset" else None
        with tqdm(total=sum(len(ids) for ids, _ in texts), unit="token", disable=True if advance else None) as bar:
            for ids, _ in texts:
                pieces = []
                for piece in stream_losses(model, ids, chunk, reset_at):
                    pieces.append(piece)
                    (advance or bar.update)(len(piece))
                (advance or bar.update)(1)
                losses.append(torch.cat(pieces))
        sizes = [size for _, size in texts]
        known = [size for size in sizes if size is not None]
        return {
            **figures(losses, sum(known) if len(known) == len(sizes) else None, window),
            "window": window,
            "memory": memory,
            "perplexities": [exponential(float(each.mean())) for each in losses],
        }


def check(memory: str, max_tokens: int | None, chunk: int, window: int | None) -> None:
    """Raises ValueError for a value that fits no text."""
    if memory not in MEMORY:
        raise ValueError(f"`memory` must be one of {', '.join(MEMORY)} (got {memory!r}); choose one.")
    for name, value, least in (("max_tokens", max_tokens, 2), ("chunk", chunk, 1), ("window", window, 1)):
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least} (got {value}); leave it out.")


def window_of(config: Any) -> int | None:
    """Returns the tokens that a query of the layers with the shortest window sees, or None without a window."""
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention"] if getattr(config, "use_sliding_window", True) else []
    lookback = getattr(config, "attention_chunk_lookback", None) or 0
    spans = []
    if window and "sliding_attention" in kinds:
        spans.append(window)
    if chunk and "chunked_attention" in kinds:
        spans.append(chunk * (lookback + 1))
    return min(spans, default=None)


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether the tokenizer puts a BOS token before every text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("").input_ids[:1] == [bos]


def tokens_of(
    text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
) -> tuple[torch.Tensor, int | None]:
    """Returns a text's ids (T,), and how many bytes those of them have that are predicted, if offsets are known."""
    offsets = bool(tokenizer.is_fast)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=offsets, verbose=False)
    ids, ends = encoded.input_ids, [end for _, end in encoded.offset_mapping] if offsets else []
    if begins_with_bos(tokenizer):
        ids, ends = [tokenizer.bos_token_id, *ids], [0, *ends]
    ids, ends = ids[:max_tokens], ends[:max_tokens]
    return torch.tensor(ids, dtype=torch.long), len(text[ends[0] : ends[-1]].encode()) if ends else None


def without_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the same model, of the same tensors, without memory tokens and retrieval."""
    if not hasattr(model.config, "has_memory"):
        raise ValueError(
            f'`memory` must be "on" or "reset" for a model that is no Olmem (got "off" for a '
            f"{type(model).__name__}), which has no memory to switch off."
        )
    fields = model.config.to_dict() | {"num_memory_tokens": 0, "retrieval_layers": []}
    with torch.device("meta"):
        other = type(model)(type(model.config).from_dict(fields))
    tensors, names = model.state_dict(), other.state_dict().keys()
    other.load_state_dict({name: tensors[name] for name in names}, assign=True)
    for name, _ in list(other.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(parent), leaf, model.get_buffer(name))
    other.config._attn_implementation = model.config._attn_implementation
    return other.eval()


def stream_losses(
    model: PreTrainedModel, ids: torch.Tensor, chunk: int, reset_at: int | None = None
) -> Iterator[torch.Tensor]:
    """Yields nats, in float64, of tokens 1, 2 … of ids (T,), in pieces of at most `chunk`; the state is dropped before
    each `reset_at` tokens."""
    ids, state = ids.to(model.device), None
    for start in range(0, len(ids) - 1, reset_at or len(ids)):
        stop = min(start + (reset_at or len(ids)), len(ids) - 1)
        state = None
        for past, following in zip(ids[start:stop].split(chunk), ids[start + 1 : stop + 1].split(chunk), strict=True):
            logits, state = read(model, past[None], state)
            yield cross_entropy(logits.float(), following, reduction="none").double().cpu()


def figures(losses: Sequence[torch.Tensor], num_bytes: int | None, window: int | None) -> dict[str, Any]:
    """Of each text's losses (T − 1,), the first of which is token 1's."""
    mean = float(torch.cat(list(losses)).mean())
    bits = sum(float(each.sum()) for each in losses) / math.log(2)
    edges = dict(zip(PARTS, ((0, window), (window, 4 * window), (4 * window, None)), strict=True)) if window else {}
    powers = [2**power for power in range(max(map(len, losses)).bit_length())]
    doublings = [(first, part([each[first - 1 : 2 * first - 1] for each in losses])) for first in powers]
    return {
        "tokens": sum(len(each) + 1 for each in losses),
        "nats_per_token": mean,
        "perplexity": exponential(mean),
        "bits_per_byte": bits / num_bytes if num_bytes else None,
        **{name: part([each[slice(*edges[name])] for each in losses]) if edges else None for name in PARTS},
        "positions": [{"from": first, **found} for first, found in doublings],
    }


def part(losses: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Returns how many losses there are, and their mean if there are any."""
    joined = torch.cat(list(losses))
    return {"tokens": len(joined), "nats_per_token": float(joined.mean()) if len(joined) else None}


def exponential(nats: float) -> float:
    """Returns the perplexity of so many nats, which is infinite where it is no float64."""
    return math.exp(nats) if nats < 700 else math.inf if nats == nats else math.nan
