"""The prompts that a model is compared on: random ids, the same for every run."""

import torch
from olmem import OlmemConfig

from ..errors import CheckpointError
from ..formats import Checkpoint, is_dynamic

PROMPT_BEYOND_WINDOW, LONGEST_WINDOW = 32, 2**14  # the square of which is the mask, and memory
SEED = 20


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


def length_of(config: OlmemConfig) -> int:
    """The tokens of a prompt for a model that is compared with itself: past its windows, as far as they are bounded."""
    spans = {
        "sliding_attention": config.sliding_window,
        "chunked_attention": config.attention_chunk_size,
    }
    longest = max([spans.get(layer_type) or 0 for layer_type in config.layer_types])
    if config.num_memory_tokens:
        longest = max(longest, config.memory_segment_length or 0)
    return min(max(longest, PROMPT_BEYOND_WINDOW), LONGEST_WINDOW) + PROMPT_BEYOND_WINDOW


def drawn_from(checkpoint: Checkpoint) -> int:
    """The tokens that were trained, of whose ids prompts are made."""
    return min(checkpoint.tokenizer_size, checkpoint.olmem_config["vocab_size"])


def draw_prompt(tokens: int, vocabulary: int, seed: int) -> torch.Tensor:
    """The prompt (1, T) that `prompt` in verification.json describes."""
    return torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))
