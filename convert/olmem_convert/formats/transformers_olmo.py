"""Folders that `save_pretrained` of Transformers' own OlmoForCausalLM, Olmo2ForCausalLM and Olmo3ForCausalLM wrote, in
any release: weight names are Olmem's, and `OlmemConfig.fields_of_olmo` is the config table.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from olmem import OlmemConfig
from olmem.rules_olmem import OLMO_BLOCKS
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..errors import CheckpointError, reason
from ..options import Given
from ..proof.native_forward import Stages
from ..proof.transformers_forward import transformers_forward
from ..reading.fields import check_common, typed
from ..reading.tensors import LazyTensor
from ..reading.texts import read_json, refuse_code, require_numbers
from ..reading.weight_files import WEIGHTS, find_weights, read_weights
from . import Checkpoint, Key, check_layers, expand, is_dynamic

TAKES_GIVEN: bool = False
# Of RoPE, in files of older releases, which computed it from the config all the same.
OLD_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def recognise(folder: Path) -> str | None:
    """Says which class of OLMo wrote the folder, if one did."""
    weights = find_weights(folder)
    if weights is None or not (folder / "config.json").is_file():
        return None
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in list(OLMO_BLOCKS):
        return None
    return f"Transformers {model_type}, {weights.name.removesuffix('.index.json')}"


def open_checkpoint(folder: Path, max_length: int | None, given: Given) -> Checkpoint:
    """Opens the folder: its config, read as Transformers' class reads it, and its weights."""
    raw = read_raw_config(folder)
    tensors = {name: tensor for name, tensor in read_weights(folder).items() if not OLD_BUFFER.fullmatch(name)}
    num_layers = typed(raw.get("num_hidden_layers", 1), int, "num_hidden_layers", "config.json")
    check_layers(num_layers, tensors, "num_hidden_layers")
    try:
        config = OlmemConfig.fields_of_olmo(raw)
    except (StrictDataclassError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"`{folder / 'config.json'}` must describe a model: {reason(error)}") from error
    notes = [*notes_on_rope(config, max_length), *notes_on_files(folder, raw, config)]
    if max_length is not None:  # beside which the scaling of RoPE keeps its own
        config["rope_parameters"] = OlmemConfig(**config).rope_parameters
        config["max_position_embeddings"] = max_length
    return Checkpoint(
        description=str(recognise(folder)),
        path=folder,
        native_config=raw,
        olmem_config={name: value for name, value in config.items() if name not in ("architectures", "dtype")},
        tensors=tensors,
        keys=expand(key_table(raw["model_type"], config, tensors), config["num_hidden_layers"]),
        tokenizer_size=config["vocab_size"],
        forward=partial(forward, raw),
        of_transformers=True,
        notes=tuple(notes),
    )


def read_raw_config(folder: Path) -> dict[str, Any]:
    """The config.json, once it is a causal language model's and names no code but what is not run."""
    raw = read_json(folder / "config.json")
    require_numbers(raw, "config.json")
    refuse_code(raw, folder / "config.json", allowed=("auto_map", "custom_pipelines"))
    architectures = raw.get("architectures")
    if not isinstance(architectures, list | None):
        raise CheckpointError(
            f"`architectures` of config.json must be a list of names (got {architectures!r}); correct or remove it."
        )
    if architectures and not all(str(name).endswith("ForCausalLM") for name in architectures):
        raise CheckpointError(
            f"`architectures` of config.json must be a causal language model's (got {architectures}); the bodies of "
            "others load with `OlmemModel.from_pretrained` and the config of `OlmemConfig.from_olmo`."
        )
    if raw.get("quantization_config"):
        raise CheckpointError(
            "`quantization_config` of config.json must be absent (the weights are quantized, which no conversion can "
            "keep exactly); convert the model that was quantized."
        )
    check_common(raw)
    return raw


def notes_on_rope(config: Mapping[str, Any], max_length: int | None) -> Iterator[str]:
    """What is to be known of RoPE whose scaling depends on the length of the text."""
    if not is_dynamic(config["rope_parameters"] or {}):
        return
    trained = config["max_position_embeddings"]
    if max_length is not None:
        raise CheckpointError(
            f"`max_length` must be left out with rope_type 'dynamic' (got {max_length}), whose scaling begins at "
            f"the trained length of the config, {trained}."
        )
    yield (
        f"rope_type 'dynamic' is verified up to {trained} tokens; beyond, logits are those that Transformers has "
        "token by token, as a whole call there depends on its length"
    )


def notes_on_files(folder: Path, raw: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """What of the folder is not read, not run, or left out."""
    others = [name for name in WEIGHTS[2:] if (folder / name).is_file()]
    if others and find_weights(folder) not in [folder / name for name in others]:
        yield f"{', '.join(others)} is there too, and not read: the weights are those of the safetensors"
    if raw.get("auto_map"):
        yield f"config.json names code (`auto_map`), which is not run: what converts is {raw['model_type']}"
    of_generation = sorted(set(raw) & set(GenerationConfig._get_default_generation_params()) - set(config))
    if of_generation and not (folder / "generation_config.json").is_file():
        yield (
            f"config.json has {', '.join(of_generation)} of generation, left out: their place is generation_config.json"
        )


def forward(raw: Mapping[str, Any], tensors: Mapping[str, Tensor], input_ids: Tensor, **options: Any) -> Stages:
    """The forward pass of Transformers' own class, never of one that the folder names."""
    config = OlmemConfig.olmo_of(dict(raw))
    model_class = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    return transformers_forward(model_class, config, tensors, input_ids, **options)


def key_table(model_type: str, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> list[Key]:
    """Every name is its own target. A tied head that is stored all the same must repeat the embedding."""
    block = "model.layers.{layer}."
    projections = [f"{block}self_attn.{name}_proj" for name in "qkvo"]
    norms = [f"{block}{place}_layernorm" for place in ("post_attention", "post_feedforward")]
    norms += [f"{block}self_attn.q_norm", f"{block}self_attn.k_norm", "model.norm"]
    names = ["model.embed_tokens.weight", *(f"{name}.weight" for name in projections)]
    names += [f"{block}mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    if config["attention_bias"]:
        names += [f"{name}.bias" for name in projections]
    if model_type != "olmo":
        names += [f"{name}.weight" for name in norms]
    table = [Key(name, (name,)) for name in names]
    if not config["tie_word_embeddings"]:
        table.append(Key("lm_head.weight", ("lm_head.weight",)))
    elif "lm_head.weight" in tensors:
        table.append(Key("lm_head.weight", (), same_as="model.embed_tokens.weight"))
    return table
