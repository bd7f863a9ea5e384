"""The loss of an Olmem folder's model on plain texts, each read once as one stream.

A text is read through an `OlmemCache`, which carries window and memory on from call to call, so that no token is
predicted from less than the model remembers; the calls' length changes nothing. Its tokens are those of the folder's
own tokenizer, behind a BOS token where that gives one to every text. Token 0 is read and predicted by nothing: losses
are those of tokens 1, 2 … and token i is predicted from the i tokens before it.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import olmem
import torch
import transformers
from olmem import OlmemCache, OlmemConfig
from olmem.visibility_olmem import Visibility
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ..errors import CheckpointError
from ..proof.verification import load
from ..publish.model_card import (
    CARD_NAME,
    EVALUATION_NAME,
    config_values,
    digests,
    is_own,
    kept_metadata,
    replace_text,
    verification_values,
    write_card,
)
from ..reading.olmem_folder import identities, load_tokenizer, require_unchanged, stored_dtype
from ..reading.plain import reading
from ..reading.tokenizer_file import quiet_panics, refusing

CHUNK = 512  # tokens of a call


def evaluate(
    out: str | Path,
    texts: Sequence[str | Path],
    *,
    max_tokens: int | None = None,
    chunk: int = CHUNK,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures the model of the Olmem folder `out` on UTF-8 text files, and writes evaluation.json and the card.

    max_tokens: of each text, its first so many, at least 2. chunk: tokens read by a call. The model runs in the dtype
    of its weights, on a CUDA device if there is one.

    Returns what evaluation.json holds; by text `nats_per_token`, `perplexity` (its exponential), `bits_per_byte` (of
    the text's UTF-8), and `nats_per_token` of the tokens that have `within` the shortest window, or `beyond` it, all
    tokens before them, and of those at `positions` from a power of two to the next. Raises CheckpointError, having
    written nothing, when a text or the folder is not fit for it.
    """
    out, paths = Path(out), [Path(text) for text in texts]
    if not (out / "config.json").is_file():
        raise CheckpointError(f"`OUT` must be a converted folder ({out} has no config.json); convert SRC first.")
    check_options(paths, max_tokens, chunk)
    before, made_of = identities(out), digests(out, {})
    verification_values(out, made_of)
    config: OlmemConfig = config_values(out, {})["config"]
    kept = kept_metadata(out)
    tokenizer = load_tokenizer(out, config.vocab_size)
    read = [read_text(path, tokenizer, max_tokens, config.vocab_size) for path in paths]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = stored_dtype(out)
    model = load(out, dtype).to(device)
    spans = [Visibility.of(config, layer_type).span for layer_type in config.layer_types]
    window = min((span for span in spans if span), default=None)
    rows = []
    with tqdm(total=sum(len(ids) for _, ids, _ in read), desc="evaluating", unit="token", disable=None) as bar:
        for entry, ids, num_bytes in read:
            losses = stream_losses(model, ids.to(device), chunk, bar.update)
            rows.append(entry | figures(entry["name"], losses, num_bytes, window))
            bar.update()
    require_unchanged(before, "it is evaluated")
    report = {
        "texts": rows,
        "window": window,
        "max_tokens": max_tokens,
        "bos_token": begins_with_bos(tokenizer),
        "memory": config.has_memory,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "device": device,
        "sha256": made_of,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "olmem": olmem.__version__},
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


def check_options(paths: Sequence[Path], max_tokens: int | None, chunk: int) -> None:
    names = [path.name for path in paths]
    if not names or len(set(names)) < len(names):
        raise CheckpointError(
            f"`text` must be given, and each file have a name of its own (got {', '.join(names) or 'none'}); rename "
            "one, or add --text FILE."
        )
    if max_tokens is not None and max_tokens < 2:
        raise CheckpointError(f"`max_tokens` must be at least 2, of which one is predicted (got {max_tokens}); add.")
    if chunk < 1:
        raise CheckpointError(f"`chunk` must be at least 1 (got {chunk}); leave it out.")


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS token before every text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("").input_ids[:1] == [bos]


def read_text(
    path: Path, tokenizer: Any, max_tokens: int | None, vocab_size: int
) -> tuple[dict[str, Any], torch.Tensor, int]:
    """What evaluation.json says of a file as such, its token ids (T,), and the bytes of those that are predicted."""
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
    return entry, torch.tensor(ids), num_bytes


@torch.no_grad()
def stream_losses(model: Any, ids: torch.Tensor, chunk: int, advance: Callable[[int], object]) -> torch.Tensor:
    """Nats (T − 1,), in float64, of tokens 1, 2 … of ids (T,)."""
    cache = OlmemCache(model.config)
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
    return {"tokens": len(losses), "nats_per_token": float(losses.mean()) if len(losses) else None}
