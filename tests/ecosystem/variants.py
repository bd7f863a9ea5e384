"""The models that every tool is tried with, and a tokenizer for them."""

from typing import Any

import torch
from modeling.helpers import shake
from olmem import OlmemConfig, OlmemForCausalLM
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import Olmo3Config, Olmo3ForCausalLM, PreTrainedTokenizerFast

WINDOW = 8
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 2,
}
MEMORY = {"num_memory_tokens": 2, "memory_segment_length": 8, "memory_gate_init": 0.0}
RETRIEVAL = {"retrieval_layers": [0], "retrieval_top_k": 2, "retrieval_capacity": 16}
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sinks": {"num_sink_tokens": 2, "sink_logit_init": 0.0},
    "memory": MEMORY | RETRIEVAL,
    "key_value": {"shared_projections": "key_value"},
}
OLMO3 = "Olmo3"
VARIANTS = [*CHANGES, OLMO3]
CHAT = (
    "{% for message in messages %}{{ message.role + ' ' }}{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content + ' ' + eos_token + ' ' }}{% endgeneration %}{% else %}{{ message.content + ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def make(variant: str, model_class: Any = OlmemForCausalLM, **changes) -> Any:
    """A model of a variant in evaluation mode; each has the same weights where the names are the same."""
    if variant == OLMO3:
        return shake(Olmo3ForCausalLM(Olmo3Config(**SMALL | changes)))
    return shake(model_class(OlmemConfig(**SMALL | CHANGES[variant] | changes)))


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Ids of words, none of them special."""
    return torch.randint(8, 128, shape, generator=torch.Generator().manual_seed(seed))


def text(length: int, seed: int = 0) -> str:
    return " ".join(f"w{index}" for index in tokens(length, seed=seed).tolist())


def make_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "user", "assistant", "system", "tool"]
    words = WordLevel(
        {word: index for index, word in enumerate(special)} | {f"w{i}": i for i in range(8, 128)}, "<unk>"
    )
    backend = Tokenizer(words)
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=1000,
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def save(variant: str, folder, model_class: Any = OlmemForCausalLM, **changes) -> str:
    """Saves a model and its tokenizer, and returns the folder."""
    make(variant, model_class, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)
