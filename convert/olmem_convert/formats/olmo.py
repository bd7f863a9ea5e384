"""Checkpoints of OLMo's own trainer (github.com/allenai/OLMo, package ai2-olmo): `config.yaml` and one of four
layouts of weights. Covers OLMo 1 and OLMo 2.

Config fields and their defaults: olmo/config.py `ModelConfig`; weights and forward pass: olmo/model.py; layouts:
olmo/checkpoint.py.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..options import Given
from ..proof import olmo_forward
from ..reading.archives import read_pickle
from ..reading.distributed import read_distributed
from ..reading.plain import require_own
from ..reading.tensors import LazyTensor
from ..reading.texts import read_yaml, require_numbers
from ..reading.weight_files import decode_pickled_key, read_flat_shards, read_safetensors
from . import NO_EFFECT, Checkpoint, Field, Key, carried, check_layers, expand, read_fields, required

TAKES_GIVEN: bool = False
LAYOUTS: dict[str, tuple[str, Callable[[Path], dict[str, LazyTensor]]]] = {
    "model.safetensors": (
        "unsharded safetensors",
        lambda folder: read_safetensors(folder / "model.safetensors", decode_pickled_key),
    ),
    "model.pt": ("unsharded", lambda folder: read_pickle(folder / "model.pt")),
    "model/metadata.json": ("`olmo_core` shards", lambda folder: read_flat_shards(require_own(folder / "model"))),
    "model_and_optim/.metadata": (
        "`torch_new` shards",
        lambda folder: read_distributed(require_own(folder / "model_and_optim")),
    ),
}
SHARDED_BY_PICKLES = {"torch_legacy": "rank*.pt", "local": "model/rank*.pt"}

CONFIG: dict[str, Field] = {
    "d_model": Field(768, to="hidden_size"),
    "n_heads": Field(12, to="num_attention_heads"),
    "n_kv_heads": Field(kind=int),
    "multi_query_attention": Field(kind=bool),
    "n_layers": Field(12, to="num_hidden_layers"),
    "mlp_ratio": Field(4),
    "mlp_hidden_size": Field(kind=int),
    "activation_type": Field("swiglu", only=("swiglu",)),
    "block_type": Field("sequential", only=("sequential",)),
    "block_group_size": Field(1),
    "norm_after": Field(False),
    "layer_norm_type": Field("default", only=("default", "low_precision", "rms")),
    "layer_norm_with_affine": Field(True),
    "layer_norm_eps": Field(1e-5, to="rms_norm_eps"),
    "attention_layer_norm": Field(False),
    "attention_layer_norm_with_affine": Field(True),
    "include_bias": Field(True, only=(False,)),
    "bias_for_layer_norm": Field(kind=bool),
    "embedding_layer_norm": Field(False, only=(False,)),
    "clip_qkv": Field(to="clip_qkv", kind=float),
    "rope": Field(False, only=(True,)),
    "rope_theta": Field(10000.0, to="rope_theta"),
    "alibi": Field(False, only=(False,)),
    "scale_logits": Field(False),
    "weight_tying": Field(True, to="tie_word_embeddings"),
    "vocab_size": Field(50257),
    "embedding_size": Field(50304),
    "max_sequence_length": Field(1024, to="max_position_embeddings"),
    "eos_token_id": Field(50256, to="eos_token_id"),
    "pad_token_id": Field(50256, to="pad_token_id"),
    "attention_dropout": Field(0.1, to="attention_dropout"),
    "residual_dropout": Field(0.1, to="residual_dropout"),
    "embedding_dropout": Field(0.1),
    "rope_full_precision": NO_EFFECT,
    "alibi_bias_max": NO_EFFECT,
    "flash_attention": NO_EFFECT,
    "precision": NO_EFFECT,
    "init_device": NO_EFFECT,
    "init_fn": NO_EFFECT,
    "init_std": NO_EFFECT,
    "init_cutoff_factor": NO_EFFECT,
    "scale_emb_init": NO_EFFECT,
    "emb_init_std": NO_EFFECT,
}


def recognise(folder: Path) -> str | None:
    """Says which layout of OLMo the folder has, if it has one."""
    if not (folder / "config.yaml").is_file():
        return None
    for name, (description, _) in LAYOUTS.items():
        if (folder / name).is_file():
            return f"OLMo, {description}"
    for kind, pattern in SHARDED_BY_PICKLES.items():
        if any(folder.glob(pattern)):
            return f"OLMo, `{kind}` shards"
    return None


def open_checkpoint(folder: Path, max_length: int | None, given: Given) -> Checkpoint:
    """Opens the checkpoint of the folder: its config, and the tensors of the layout that it has."""
    native = read_yaml(folder / "config.yaml").get("model")
    if not isinstance(native, dict):
        raise CheckpointError(
            f"`model` of {folder / 'config.yaml'} must be a mapping (got {native!r}); put the config of the run there."
        )
    require_numbers(native, "config.yaml", "model")
    layout = next((name for name in LAYOUTS if (folder / name).is_file()), None)
    if layout is None:
        kind = next(kind for kind, pattern in SHARDED_BY_PICKLES.items() if any(folder.glob(pattern)))
        raise CheckpointError(
            f"`{folder}` must not be `{kind}` shards, which only a pickle of OLMo's own classes can read; unshard it "
            f"in a clone of github.com/allenai/OLMo with `python scripts/unshard.py --model-only --type {kind} "
            f"{folder} {folder}-unsharded` and convert that."
        )
    read = read_fields(native, CONFIG, "config.yaml")
    tensors = canonical(LAYOUTS[layout][1](folder), read["block_group_size"])
    check_layers(read["n_layers"], tensors)
    config, keys = olmem_config(read), key_table(read)
    if max_length is not None:
        config["max_position_embeddings"] = max_length
    notes = []
    if read["embedding_dropout"]:
        notes.append(f"embedding_dropout {read['embedding_dropout']} was of training only and is not carried over")
    for name in ("eos_token_id", "pad_token_id"):
        if name not in native and config.get(name, 0) >= config["vocab_size"]:
            notes.append(f"config.yaml gives no {name}, and OLMo's default is outside this vocabulary: none is set")
            del config[name]
    return Checkpoint(
        description=f"OLMo, {LAYOUTS[layout][0]}",
        path=folder,
        native_config=native,
        olmem_config=config,
        tensors=tensors,
        keys=expand(keys, read["n_layers"]),
        tokenizer_size=read["vocab_size"],
        forward=partial(olmo_forward.forward, native),
        notes=tuple(notes),
    )


def canonical(tensors: dict[str, LazyTensor], group_size: int) -> dict[str, LazyTensor]:
    """Names as the forward pass uses them: without FSDP's wrapper, and blocks out of their groups."""

    def name(text: str) -> str:
        text = text.replace("_fsdp_wrapped_module.", "")
        return re.sub(
            r"^transformer\.block_groups\.(\d+)\.(\d+)\.",
            lambda match: f"transformer.blocks.{int(match[1]) * group_size + int(match[2])}.",
            text,
        )

    renamed = {name(text): tensor for text, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        raise CheckpointError(
            "two weights must not share a name (`block_group_size` does not fit them); correct that field."
        )
    return renamed


def num_key_value_heads(read: Mapping[str, Any]) -> int:
    """Returns how many heads of keys and values native code makes by the config."""
    heads, multi_query = read["n_kv_heads"], read["multi_query_attention"]
    implied = 1 if multi_query else read["n_heads"]
    if heads is not None and multi_query is not None and heads != implied:
        raise CheckpointError(
            f"`n_kv_heads` of config.yaml must be {implied} with `multi_query_attention: {multi_query}` (got {heads}); "
            "correct one of the two."
        )
    return implied if heads is None else heads


def intermediate_size(read: Mapping[str, Any]) -> int:
    """One half of the fused gate and up projection, whose width the native fields give."""
    return (read["mlp_hidden_size"] or read["mlp_ratio"] * read["d_model"]) // 2


def norm_weights(read: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """Whether block norms have weights, QK-norms have weights, and either has biases."""
    blocks = bool(read["layer_norm_with_affine"])
    queries_and_keys = bool(read["attention_layer_norm"] and read["attention_layer_norm_with_affine"])
    biases = read["include_bias"] if read["bias_for_layer_norm"] is None else read["bias_for_layer_norm"]
    return blocks, queries_and_keys, bool(biases) and (blocks or queries_and_keys)


def olmem_config(read: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of OlmemConfig for what the native config says."""
    blocks, queries_and_keys, biases = norm_weights(read)
    rms = read["layer_norm_type"] == "rms"
    if rms and biases:
        raise CheckpointError(
            "`bias_for_layer_norm` of config.yaml must be False with `layer_norm_type: rms` (got True); Olmem's "
            "RMSNorm has no bias."
        )
    return carried(read, CONFIG) | {
        "num_key_value_heads": num_key_value_heads(read),
        "intermediate_size": intermediate_size(read),
        "vocab_size": read["embedding_size"] or required(read["vocab_size"], "vocab_size", "config.yaml"),
        "norm_placement": "post" if read["norm_after"] else "pre",
        "norm_type": "rms" if rms else "layer" if blocks or queries_and_keys else "layer_plain",
        "qk_norm": "full" if read["attention_layer_norm"] else "none",
        "logits_scaling": read["d_model"] ** 0.5 if read["scale_logits"] else 1.0,
        "layer_types": ["full_attention"] * read["n_layers"],
    }


def key_table(read: Mapping[str, Any]) -> list[Key]:
    """Rows of `att_proj` are queries, keys, values; rows of `ff_proj` are up, then gate."""
    native, olmem = "transformer.blocks.{layer}.", "model.layers.{layer}."
    head_dim = read["d_model"] // max(read["n_heads"], 1)
    query_size, key_size, mlp_size = read["d_model"], num_key_value_heads(read) * head_dim, intermediate_size(read)
    place = "post" if read["norm_after"] else "pre"
    attention = [f"{olmem}self_attn.{name}_proj.weight" for name in "qkv"]
    table = [
        Key("transformer.wte.weight", ("model.embed_tokens.weight",)),
        Key(f"{native}att_proj.weight", tuple(attention), rows=(query_size, key_size, key_size)),
        Key(f"{native}attn_out.weight", (f"{olmem}self_attn.o_proj.weight",)),
        Key(
            f"{native}ff_proj.weight",
            (f"{olmem}mlp.up_proj.weight", f"{olmem}mlp.gate_proj.weight"),
            rows=(mlp_size, mlp_size),
        ),
        Key(f"{native}ff_out.weight", (f"{olmem}mlp.down_proj.weight",)),
    ]
    if not read["weight_tying"]:
        table.append(Key("transformer.ff_out.weight", ("lm_head.weight",)))

    blocks, queries_and_keys, biases = norm_weights(read)
    norms = [
        ("transformer.ln_f", "model.norm", blocks),
        (f"{native}attn_norm", f"{olmem}{place}_attention_layernorm", blocks),
        (f"{native}ff_norm", f"{olmem}{place}_feedforward_layernorm", blocks),
    ]
    if read["attention_layer_norm"]:
        norms += [
            (f"{native}q_norm", f"{olmem}self_attn.q_norm", queries_and_keys),
            (f"{native}k_norm", f"{olmem}self_attn.k_norm", queries_and_keys),
        ]
    norm_type = olmem_config(read)["norm_type"]
    if norm_type != "layer_plain":
        for source, target, weighted in norms:
            table.append(Key(f"{source}.weight" if weighted else None, (f"{target}.weight",)))
    if norm_type == "layer":
        for source, target, weighted in norms:
            table.append(Key(f"{source}.bias" if weighted and biases else None, (f"{target}.bias",), fill=0.0))
    return table
