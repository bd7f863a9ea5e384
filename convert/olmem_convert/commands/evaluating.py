"""The loss of an Olmem folder's model on plain texts, each read once as one stream.

A text is read through an `OlmemCache`, which carries window and memory on from call to call, so that no token is
predicted from less than the model remembers; the calls' length changes nothing. Its tokens are those of the folder's
own tokenizer, behind a BOS token where that gives one to every text. Token 0 is read and predicted by nothing: losses
are those of tokens 1, 2 … and token i is predicted from the i tokens before it.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import olmem
import torch
import transformers
from olmem import OlmemCache, OlmemConfig
from olmem.visibility_olmem import Visibility
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CheckpointError
from ..options import EvaluateOptions, Say, silent
from ..proof.loading import load
from ..publish.model_card import config_values, digests, is_own, kept_metadata, verification_values, write_card
from ..reading.olmem_folder import (
    CARD_NAME,
    EVALUATION_NAME,
    MOST_TEXTS,
    identities,
    load_tokenizer,
    require_unchanged,
    stored_dtype,
)
from ..reading.plain import reading
from ..reading.tokenizer_file import quiet_panics, refusing
from ..writing.progress import Progress, Tell
from ..writing.texts import replace_text


def evaluate(
    out: str | Path,
    texts: Sequence[str | Path],
    options: EvaluateOptions | None = None,
    *,
    say: Say = silent,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Measures the model of the Olmem folder `out` on UTF-8 text files, and writes evaluation.json and the card.

    The model runs in the dtype of its weights, on a CUDA device if there is one. `tell` is told how far reading has
    come, about once a second, in place of a progress bar.

    Returns what evaluation.json holds; by text `nats_per_token`, `perplexity` (its exponential), `bits_per_byte` (of
    the text's UTF-8), and `nats_per_token` of the tokens that have `within` the shortest window, or `beyond` it, all
    tokens before them, and of those at `positions` from a power of two to the next.

    Raises:
        CheckpointError: when a text or the folder is not fit for it. Nothing is written then.
    """
    options = options or EvaluateOptions()
    out, paths = Path(out), [Path(text) for text in texts]
    if not (out / "config.json").is_file():
        raise CheckpointError(f"`OUT` must be a converted folder ({out} has no config.json); convert SRC first.")
    check_texts(paths)
    options.check()
    before, made_of = identities(out), digests(out, {})
    verification_values(out, made_of)
    config: OlmemConfig = config_values(out, {})["config"]
    kept = kept_metadata(out)
    tokenizer = load_tokenizer(out, config.vocab_size)
    read = [read_text(path, tokenizer, options.max_tokens, config.vocab_size) for path in paths]
    model = load(out, stored_dtype(out))
    if torch.cuda.is_available():
        model.to(device=torch.device("cuda"))  # pyright: ignore[reportCallIssue]  which loses `self`
    spans = [Visibility.of(config, layer_type).span for layer_type in config.layer_types]
    window = min((span for span in spans if span), default=None)
    rows = measure(model, config, read, window, options, tell)
    require_unchanged(before, "it is evaluated")
    report = {
        "texts": rows,
        "window": window,
        "max_tokens": options.max_tokens,
        "bos_token": begins_with_bos(tokenizer),
        "memory": config.has_memory,
        **run_of(model),
        "sha256": made_of,
    }
    replace_text(out / EVALUATION_NAME, json.dumps(report, indent=2) + "\n")
    for row in rows:
        say(
            f"{row['name']}: {row['nats_per_token']:.5g} nats per token, perplexity {row['perplexity']:.5g}, "
            f"{row['bits_per_byte']:.5g} bits per byte ({row['tokens']} tokens)"
        )
    if is_own(out / CARD_NAME):
        write_card(out, kept, made_of)
    elif (out / CARD_NAME).exists():
        say(f"note: {out / CARD_NAME} is your own, so its figures are as they were")
    say(f"wrote {out / EVALUATION_NAME}")
    return report


def check_texts(paths: Sequence[Path]) -> None:
    """Raises CheckpointError unless there are texts, each under a name of its own."""
    names = [path.name for path in paths]
    if not names or len(set(names)) < len(names):
        raise CheckpointError(
            f"`text` must be given, and each file have a name of its own (got {', '.join(names) or 'none'}); rename "
            "one, or add --text FILE."
        )
    if len(names) > MOST_TEXTS:
        raise CheckpointError(
            f"`text` must be given at most {MOST_TEXTS:,} times (got {len(names):,}); put several texts into one file."
        )


@dataclass(frozen=True)
class Text:
    """A text to be read: what evaluation.json says of its file, its token ids (T,), and the bytes of those tokens that
    are predicted."""

    entry: dict[str, Any]
    ids: torch.Tensor
    num_bytes: int


def measure(
    model: PreTrainedModel,
    config: OlmemConfig,
    texts: Sequence[Text],
    window: int | None,
    options: EvaluateOptions,
    tell: Tell | None,
) -> list[dict[str, Any]]:
    """The row of each text in evaluation.json."""
    rows, started = [], time.monotonic()
    with Progress(sum(len(text.ids) for text in texts), "evaluating", tell, unit="token") as bar:

        def advance(tokens: int) -> None:
            bar.update(tokens)
            if options.seconds is not None and time.monotonic() - started > options.seconds:
                raise CheckpointError(
                    f"`seconds` must suffice to read the texts (got {options.seconds:g}, in which {bar.n:,} of "
                    f"{bar.total:,} tokens were read); give more, or fewer tokens with --max-tokens."
                )

        for text in texts:
            losses = stream_losses(model, OlmemCache(config), text.ids.to(model.device), options.chunk, advance)
            rows.append(text.entry | figures(text.entry["name"], losses, text.num_bytes, window))
            bar.update()
    return rows


def run_of(model: PreTrainedModel) -> dict[str, Any]:
    """What computed the figures."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "device": model.device.type,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "olmem": olmem.__version__},
    }


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a BOS token before every text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("").input_ids[:1] == [bos]


def read_text(path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None, vocab_size: int) -> Text:
    """The text of a file, as the model is given it."""
    with reading(path, "choose a text file in UTF-8"):
        content = path.read_bytes()
        text = content.decode("utf-8")
    remedy = "choose another text, or convert again with --tokenizer PATH"
    with refusing(f"`{path}` must be a text that the tokenizer can read", remedy), quiet_panics():
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, ends = encoded.input_ids, [end for _, end in encoded.offset_mapping]
    if begins_with_bos(tokenizer):
        ids, ends = [tokenizer.bos_token_id, *ids], [0, *ends]
    ids, ends = ids[:max_tokens], ends[:max_tokens]
    num_bytes = len(text[ends[0] : ends[-1]].encode()) if ids else 0
    if len(ids) < 2 or not num_bytes:
        raise CheckpointError(f"`text` must have at least 2 tokens (got {len(ids)} in {path}); choose a longer one.")
    if max(ids) >= vocab_size:
        raise CheckpointError(
            f"`vocab_size` must cover the tokens of {path} (got {vocab_size}, and a token {max(ids)}); convert again "
            "with --tokenizer PATH."
        )
    entry = {
        "name": path.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "tokens": len(ids),
    }
    return Text(entry, torch.tensor(ids), num_bytes)


@torch.no_grad()
def stream_losses(
    model: PreTrainedModel, cache: OlmemCache, ids: torch.Tensor, chunk: int, advance: Callable[[int], object]
) -> torch.Tensor:
    """Nats (T − 1,), in float64, of tokens 1, 2 … of ids (T,)."""
    losses = []
    for past, following in zip(ids[:-1].split(chunk), ids[1:].split(chunk), strict=True):
        logits = model(past[None], past_key_values=cache).logits[0]
        losses.append(cross_entropy(logits.float(), following, reduction="none").double().cpu())
        advance(len(past))
    return torch.cat(losses)


def figures(name: str, losses: torch.Tensor, num_bytes: int, window: int | None) -> dict[str, Any]:
    """Of a text's losses (T − 1,), the first of which is token 1's."""
    mean = float(losses.mean())
    if not mean < math.log(1e300):  # false for NaN
        raise CheckpointError(
            f"the loss on {name} must be finite (got {mean}); the weights are damaged, or the run that wrote them "
            "diverged: convert another step."
        )
    powers = [2**power for power in range(len(losses).bit_length())]
    return {
        "nats_per_token": mean,
        "perplexity": math.exp(mean),
        "bits_per_byte": float(losses.sum()) / math.log(2) / num_bytes,
        "within": None if window is None else part(losses[:window]),
        "beyond": None if window is None else part(losses[window:]),
        "positions": [{"from": first, **part(losses[first - 1 : 2 * first - 1])} for first in powers],
    }


def part(losses: torch.Tensor) -> dict[str, Any]:
    """Returns how many losses there are, and their mean if there are any."""
    return {"tokens": len(losses), "nats_per_token": float(losses.mean()) if len(losses) else None}
