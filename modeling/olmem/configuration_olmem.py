# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""What an Olmem model is: one strict dataclass, every rule across fields a `validate_*` method."""

import copy
import difflib
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, GenerationConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

NORM_PLACEMENTS = ("post", "pre", "peri", "parallel")
NORM_TYPES = ("rms", "layer", "layer_plain")
QK_NORMS = ("full", "head", "none")
CLIP_STAGES = ("projection", "rotary")
POSITION_EMBEDDINGS = ("rope", "xpos", "linspace", "none")
ROTATING = ("rope", "xpos")  # those of them that rotate
BY_SLOT = ("xpos", "linspace")  # that go by what a query sees, and know no absolute position
SHARED_PROJECTIONS = ("none", "key_value", "query_key", "query_key_value", "value_difference")
LAYER_TYPES = ("sliding_attention", "chunked_attention", "full_attention")
# Kinds of RoPE as Transformers defines them, with the numbers that each cannot do without, and those it can.
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ("inverse_frequencies",)),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
}

# Fields of the family that this version cannot run, with the one value that asks for nothing.
NOT_YET = {"partial_rotary_factor": 1.0}
# Fields of memories: what is switched on beside a model that was trained without.
MEMORY_FIELDS = (
    "num_memory_tokens",
    "memory_segment_length",
    "memory_bptt_segments",
    "memory_gate_init",
    "retrieval_layers",
    "retrieval_top_k",
    "retrieval_capacity",
    "retrieval_gate_init",
    "retrieval_device",
)

# Where memory gates begin beside weights that were trained without memory, if nobody says otherwise: what is read of a
# memory that knows nothing yet is mixed in by less than 0.01 %.
MEMORY_GATE = -10.0

# What Transformers' own OLMo models are, in Olmem's terms; their other fields have the same names here.
OLMO_BLOCKS: dict[str, dict[str, Any]] = {
    "olmo": {
        "norm_placement": "pre",
        "norm_type": "layer_plain",
        "qk_norm": "none",
        "rms_norm_eps": 1e-5,
        "layer_types": "full_attention",
    },
    "olmo2": {"layer_types": "full_attention"},
    "olmo3": {},
}


def with_memory_gates(weights: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `changes` of fields that describe some weights, with gates where they add memory tokens to weights that
    have none and leave `memory_gate_init` out. Given as None it is a choice: no gates."""
    adds_memory = changes.get("num_memory_tokens") and not weights.get("num_memory_tokens")
    if adds_memory and weights.get("memory_gate_init") is None:
        return {"memory_gate_init": MEMORY_GATE, **changes}
    return dict(changes)


def is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")


@strict
class OlmemConfig(PreTrainedConfig):
    r"""Configuration of an Olmem model. The defaults are the 7B OLMo-3 block with its 3 : 1 window pattern.

    Args:
        vocab_size (`int`): rows of the embedding table, padded rows included.
        hidden_size (`int`): width of the residual stream.
        intermediate_size (`int`): width of the gated MLP, one half of a fused up-and-gate projection.
        num_hidden_layers (`int`): number of blocks.
        num_attention_heads (`int`): query heads H.
        num_key_value_heads (`int`, *optional*): key/value heads K; H is a multiple of K. Defaults to H.
        head_dim (`int`, *optional*): width D of a head, even. Defaults to `hidden_size / num_attention_heads`.
        hidden_act (`str`): any activation of Transformers, or `"elephant"`: 1 / (1 + |x|⁸) (arXiv 2310.01365).
        max_position_embeddings (`int`): length in tokens the model was trained for; a length, not a limit.
        norm_placement (`str`): where a sublayer f is normalised. `"post"`: x + norm(f(x)), OLMo 2 and 3;
            `"pre"`: x + f(norm(x)), OLMo 1; `"peri"`: x + norm(f(norm(x))); `"parallel"`: x + attention(n) + mlp(n)
            with n = norm(x).
        norm_type (`str`): `"rms"`, `"layer"` (weight and bias), or `"layer_plain"` (LayerNorm without either).
        rms_norm_eps (`float`): epsilon of every norm, whatever its type.
        qk_norm (`str`): norm of queries and keys before their position: over the full projection (`"full"`), over
            each head (`"head"`), or `"none"`.
        clip_qkv (`float`, *optional*): queries, keys and values are clamped to ± this value.
        clip_qkv_stage (`str`): when: `"projection"`, before QK-norm, as OLMo's code does; or `"rotary"`, after
            QK-norm and RoPE.
        position_embedding (`str` or `list[str]`): how queries and keys are told their positions, one value or one a
            layer: `"rope"` (arXiv 2104.09864); `"xpos"`, RoPE whose scores decay with the distance (arXiv 2212.10554,
            γ 0.4, base 512); `"linspace"`, 0.1 · position / (span − 1) · `linspace_scale` added to the keys, span
            being the layer's window or `max_position_embeddings`; `"none"`.
        rope_parameters (`dict`, *optional*): RoPE by layer type, `{"full_attention": {"rope_type": "yarn",
            "rope_theta": 500000.0, "factor": 8.0, …}, "sliding_attention": {…}}`, in Transformers' terms. A flat
            dictionary gives its `rope_theta` (and `inverse_frequencies`) to every layer and its scaling to full-
            attention layers, the only ones that may scale. Entries of layer types that no layer has are dropped. With
            `rope_type` `"default"`, `inverse_frequencies` (D/2 numbers) stand in for those of the theta, where a
            checkpoint stores its own.
        layer_types (`list[str]` or `str`, *optional*): `"sliding_attention"`, `"chunked_attention"` or
            `"full_attention"` for each layer, or one value for all. Defaults to three sliding layers, then a full one,
            repeated.
        sliding_window (`int`): keys W that query i of a sliding layer sees, its own included: i−W < j ≤ i.
        attention_chunk_size (`int`, *optional*): tokens c of a chunk; query i of a chunked layer sees the keys
            c·⌊i/c⌋ ≤ j ≤ i of its own chunk, one key at the chunk's first token.
        attention_chunk_lookback (`int`): earlier chunks L that it sees too: c·(⌊i/c⌋−L) ≤ j ≤ i.
        num_sink_tokens (`int`): first tokens S of the stream that queries of sliding and chunked layers go on seeing
            once their window has left them, beside the window. Positions are then places in what a query sees
            (StreamingLLM, arXiv 2309.17453), in a sliding layer S + W − 1 at most.
        shared_projections (`str`): which of queries, keys and values are one, each after its norm and before its
            position (arXiv 2606.04032). `"none"`; `"key_value"`: values are the keys; `"query_key"`: queries are the
            keys; `"query_key_value"`: both are; `"value_difference"`: values are queries minus keys. Where values are
            the keys, a cache holds one tensor, half of the bytes. Sharing queries needs as many key/value heads.
        num_memory_tokens (`int`): vectors M that carry on what the stream has said (Recurrent Memory Transformer,
            arXiv 2207.06881): each segment of a row is read with its M memory tokens in view, and writes those of the
            next. 0 has no memory.
        memory_segment_length (`int`, *optional*): tokens of a segment. Defaults to `sliding_window`, or where layers
            are chunked and none slides, to `attention_chunk_size`.
        memory_bptt_segments (`int`, *optional*): segments that gradients go back through the memory, at most: those of
            a forward call's last segment so many, those of the others no more. 0 learns to read, not to write. None
            is all of the call.
        memory_gate_init (`float`, *optional*): where gates start, as logits, one a head, that mix what is seen with
            memory and what is seen without it. None has no gates: memory tokens are seen like others. That is the
            default of a model made from scratch. Weights without memory that are loaded into a model with
            `num_memory_tokens` (by `from_pretrained`, `from_olmo` or `olmem convert --set`) get gates at −10, so that
            a memory that knows nothing yet is harmless, unless the call that loads them gives this field; None is then
            a choice too.
        retrieval_layers (`list[int]`): sliding or chunked layers that also look up what has left their window
            (Memorizing Transformers, arXiv 2203.08913): each query head, the `retrieval_top_k` tokens whose keys fit
            best, regardless of positions, mixed with what the window gives by a gate that each head learns.
        retrieval_top_k (`int`): tokens that a query head looks up.
        retrieval_capacity (`int`): tokens that are kept for that, the last ones that have left the window.
        retrieval_gate_init (`float`): the gates' initialisation, as a logit: −4 mixes in 2 %.
        retrieval_device (`str`, *optional*): where they are kept and looked up, `"cpu"` to spare a GPU's memory; the
            layer's own device by default.
        attention_bias (`bool`): biases in the four attention projections.
        attention_dropout, residual_dropout (`float`): dropout, in training, of attention weights, and of each
            sublayer's output before it joins the residual stream.
        logits_scaling (`float`): logits are divided by it.
        initializer_range (`float`): standard deviation of the weights' initialisation.
        tie_word_embeddings (`bool`): the output head is the embedding table.
        use_cache (`bool`): return a cache by default.
        pad_token_id, bos_token_id, eos_token_id (*optional*): ids below `vocab_size`.
    """

    model_type = "olmem"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  Transformers' own attribute
    ignore_keys_at_rope_validation = {"inverse_frequencies"}  # noqa: RUF012  Transformers would warn of it
    default_theta = 500000.0
    chooses_memory_gate = False  # whether who reads this from a folder has given `memory_gate_init`, be it None
    # Queries and keys are gathered because their norm spans the whole projection, as in Olmo2Config.
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise_gather_output",
        "layers.*.self_attn.k_proj": "colwise_gather_output",
        "layers.*.self_attn.v_proj": "colwise_gather_output",
        "layers.*.self_attn.o_proj": "rowwise_split_input",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 100352
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    norm_placement: str = "post"
    norm_type: str = "rms"
    rms_norm_eps: float = 1e-6
    qk_norm: str = "full"
    clip_qkv: float | int | None = None
    clip_qkv_stage: str = "projection"
    position_embedding: str | list[str] = "rope"
    shared_projections: str = "none"
    sliding_window: int | None = 4096
    attention_chunk_size: int | None = None
    attention_chunk_lookback: int = 0
    num_sink_tokens: int = 0
    num_memory_tokens: int = 0
    memory_segment_length: int | None = None
    memory_bptt_segments: int | None = None
    memory_gate_init: float | int | None = None
    retrieval_top_k: int = 32
    retrieval_capacity: int = 65536
    retrieval_gate_init: float | int = -4.0
    retrieval_device: str | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    logits_scaling: float | int = 1.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    if TYPE_CHECKING:  # what these are once `__post_init__` has completed them
        num_key_value_heads: int = 0
        head_dim: int = 0
        layer_types: list[str] = []
        rope_parameters: dict[str, Any] = {}
        retrieval_layers: list[int] = []
    else:
        num_key_value_heads: int | None = None
        head_dim: int | None = None
        layer_types: list[str] | str | None = None
        rope_parameters: dict | None = None
        retrieval_layers: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.refuse_unknown(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.layer_types is None:
            self.layer_types = [
                "full_attention" if index % 4 == 3 else "sliding_attention" for index in range(self.num_hidden_layers)
            ]
        elif isinstance(self.layer_types, str):
            self.layer_types = [self.layer_types] * self.num_hidden_layers
        if self.retrieval_layers is None:
            self.retrieval_layers = []
        elif isinstance(self.retrieval_layers, list) and all(isinstance(layer, int) for layer in self.retrieval_layers):
            self.retrieval_layers = sorted(self.retrieval_layers)  # anything else is refused in its turn
        if self.num_memory_tokens and self.memory_segment_length is None:
            slides = "chunked_attention" not in self.layer_types or "sliding_attention" in self.layer_types
            self.memory_segment_length = self.sliding_window if slides else self.attention_chunk_size
        schemes = self.position_embedding
        if isinstance(schemes, list) and len(schemes) == self.num_hidden_layers and len(set(schemes)) == 1:
            self.position_embedding = schemes[0]
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> Any:
        """As in Transformers, but overrides join the dictionary before it is read, so that they are expanded and
        validated like any other field; and another model's configuration is an error."""
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"`model_type` must be {cls.model_type!r} (got {config_dict['model_type']!r}); load an OLMo model of "
                "Transformers with `from_olmo`."
            )
        cls.refuse_misspelled(kwargs)
        cls.refuse_parts_of_rope(kwargs)
        names = {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in names or name in NOT_YET}
        changed = {**config_dict, **with_memory_gates(config_dict, overrides)}
        loaded: Any = super().from_dict(changed, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded  # beside what it did not use
        config.chooses_memory_gate = "memory_gate_init" in overrides
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, without what is known of this object only."""
        values = super().to_dict()
        values.pop("chooses_memory_gate", None)
        return values

    @classmethod
    def from_olmo(cls, path_or_repo, **overrides):
        """The configuration of a Transformers `olmo`, `olmo2` or `olmo3` folder or repository in Olmem's terms.

        Overrides are fields of this class, or what `from_pretrained` takes to find the file (`revision`, `token`, …).
        """
        cls.refuse_parts_of_rope(overrides)
        hub_kwargs = {name: overrides.pop(name) for name in HUB_ARGUMENTS if name in overrides}
        raw, _ = PreTrainedConfig.get_config_dict(path_or_repo, **hub_kwargs)
        model_type = raw.get("model_type")
        if model_type not in OLMO_BLOCKS:
            raise ValueError(
                f"`model_type` must be one of {', '.join(OLMO_BLOCKS)} for `from_olmo` (got {model_type!r} in "
                f"{path_or_repo}); load an Olmem model with `from_pretrained`, convert a native checkpoint with "
                "`olmem convert`."
            )
        config = cls(**(cls.fields_of_olmo(raw) | with_memory_gates({}, overrides)))
        slides = "layer_types" in overrides and "sliding_attention" in config.layer_types
        trained, window = config.max_position_embeddings, config.sliding_window
        if slides and "sliding_window" not in {*raw, *overrides} and trained < (window or 0):
            raise ValueError(
                f"`sliding_window` must be given with `layer_types` that slide (got the default {window}) where the "
                f"model was trained on fewer tokens, {trained}; give a window of at most {trained}, or {window} if you "
                "mean it."
            )
        config.chooses_memory_gate = "memory_gate_init" in overrides
        return config

    @classmethod
    def fields_of_olmo(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """What the config.json of a Transformers `olmo`, `olmo2` or `olmo3` model says, as fields of this class.

        What it says beside that, or in other words, is under `olmo_config`, for the way back.
        """
        source = cls.olmo_of(raw)
        if not getattr(source, "is_causal", True):
            raise ValueError("`is_causal` must be true (got False); Olmem's attention is causal.")
        carried = {field.name for field in fields(source)} - {"transformers_version", "architectures"}
        values = {name: getattr(source, name) for name in carried & {field.name for field in fields(cls)}}
        values |= {"head_dim": getattr(source, "head_dim", None)} | OLMO_BLOCKS[source.model_type]
        if raw.get("quantization_config"):
            values["quantization_config"] = raw["quantization_config"]
        known = carried | {"architectures", "auto_map", "model_type", "transformers_version"}
        known |= {"_name_or_path", "quantization_config"}
        rest = {name: value for name, value in source.to_dict().items() if name in raw and name not in known}
        rope = source.rope_parameters or {}
        entries = rope if set(rope) & set(LAYER_TYPES) else {"full_attention": rope}
        if any(kind not in values["layer_types"] or "type" in entry for kind, entry in entries.items()):
            rest["rope_parameters"] = rope
        return values | ({"olmo_config": rest} if rest else {})

    @classmethod
    def olmo_of(cls, raw: dict[str, Any]) -> PreTrainedConfig:
        """The same config.json as Transformers' own class reads it, with the RoPE that it means: Olmo3Config loses the
        theta and the scaling of the forms of older releases."""
        values = {name: value for name, value in copy.deepcopy(raw).items() if name not in ("auto_map", "model_type")}
        if raw["model_type"] == "olmo3":
            both, rope = ["full_attention", "sliding_attention"], values.get("rope_parameters") or {}
            types = values.get("layer_types") or both
            if not isinstance(types, list) or any(layer_type not in both for layer_type in types):
                raise ValueError(
                    f"`layer_types` must be made of full_attention and sliding_attention in olmo3 (got {types!r}); its "
                    "code has no others."
                )
            if not all(isinstance(rope.get(kind), dict) and "rope_theta" in rope[kind] for kind in both):
                given = {name: values.pop(name, None) for name in ("rope_parameters", "rope_theta", "rope_scaling")}
                given |= {name: raw[name] for name in ("max_position_embeddings",) if name in raw}
                values["rope_parameters"] = cls(num_hidden_layers=2, layer_types=both, **given).rope_parameters
        return AutoConfig.for_model(raw["model_type"], **values)

    def convert_rope_params_to_dict(self, **kwargs) -> dict[str, Any]:
        """One entry for each layer type in use; see `rope_parameters`."""
        theta, scaling = kwargs.pop("rope_theta", None), kwargs.pop("rope_scaling", None) or {}
        given = self.rope_parameters or {}
        if set(scaling) & set(LAYER_TYPES):  # the older name of the same
            given, scaling = scaling, {}
        flat = {key: value for key, value in given.items() if key not in LAYER_TYPES}
        stored = flat.get("inverse_frequencies")
        nested = {key: value for key, value in given.items() if key in LAYER_TYPES}
        for key, value in flat.items():
            if isinstance(value, dict):
                raise ValueError(
                    f"`rope_parameters` must be nested by {' or '.join(LAYER_TYPES)} (got {key!r}); rename it."
                )
        for key, value in nested.items():
            if not isinstance(value, dict | None):
                raise ValueError(f"`rope_parameters[{key!r}]` must be a dictionary (got {value!r}); give its numbers.")
        if flat and nested:
            raise ValueError(
                "`rope_parameters` must be one flat dictionary or nested by layer type, not both (got the keys "
                f"{sorted(given)}); keep the part the model was trained with."
            )
        # A layer type without a theta has that of the model, wherever it stands.
        thetas = [*((entry or {}).get("rope_theta") for entry in (flat, *nested.values())), theta, self.default_theta]
        theta = next(theta for theta in thetas if theta is not None)
        parameters = {}
        for layer_type in sorted(set(self.layer_types or ())):
            full = layer_type == "full_attention"
            entry = {"rope_type": "default", "rope_theta": theta}
            if stored is not None:
                entry["inverse_frequencies"] = stored
            for part in (nested.get(layer_type) or (flat if full else {}), scaling if full else {}):
                if "type" in part:  # the older name of `rope_type`
                    part = {"rope_type": part["type"]} | {key: part[key] for key in part if key != "type"}
                entry |= part
            if entry["rope_type"] in ("yarn", "llama3"):
                entry.setdefault("original_max_position_embeddings", self.max_position_embeddings)
            parameters[layer_type] = entry
        self.rope_parameters = parameters
        return kwargs

    @classmethod
    def refuse_unknown(cls, kwargs: dict[str, Any]) -> None:
        """An error for what this version cannot run and for what looks like a misspelled field; the rest is kept,
        as Transformers keeps it."""
        for name in [name for name in kwargs if name in NOT_YET]:
            value = kwargs.pop(name)
            if value != NOT_YET[name]:
                raise ValueError(
                    f"`{name}` is not supported yet (got {value!r}); leave it out, or use a newer version of olmem."
                )
        cls.refuse_misspelled(kwargs)

    @classmethod
    def refuse_misspelled(cls, kwargs: dict[str, Any]) -> None:
        own = {field.name for field in fields(cls)}
        of_generation = {*GenerationConfig._get_default_generation_params(), "sep_token_id", "decoder_start_token_id"}
        for name in kwargs:
            if name in own | of_generation or name.startswith("_"):
                continue
            if match := difflib.get_close_matches(name, own, n=1, cutoff=0.85):
                raise ValueError(
                    f"`{name}` is not a field of OlmemConfig (got {kwargs[name]!r}); did you mean `{match[0]}`?"
                )

    @staticmethod
    def refuse_parts_of_rope(overrides: dict[str, Any]) -> None:
        for name in ("rope_theta", "rope_scaling"):
            if name in overrides:
                raise ValueError(
                    f"`{name}` is a part of `rope_parameters` (got {overrides[name]!r}); override the whole of that."
                )

    @property
    def layer_position_embeddings(self) -> list[str]:
        """`position_embedding` of each layer."""
        given = self.position_embedding
        return [given] * self.num_hidden_layers if isinstance(given, str) else given

    @property
    def caches_one_tensor(self) -> bool:
        """Whether values are the keys, so that one tensor of both is kept."""
        return self.shared_projections in ("key_value", "query_key_value")

    @property
    def has_memory(self) -> bool:
        """Whether more than windows and sinks is carried on, by memory tokens or retrieval."""
        return self.num_memory_tokens > 0 or bool(self.retrieval_layers)

    @property
    def memory_rule(self) -> str:
        """What an error says of memory where there can be none."""
        if self.num_memory_tokens:
            return f"`num_memory_tokens` must be 0 (got {self.num_memory_tokens})"
        return f"`retrieval_layers` must be empty (got {self.retrieval_layers})"

    @property
    def logit_scale(self) -> float:
        """`logits_scaling` as a factor, the name by which serving engines look for it."""
        return 1.0 / self.logits_scaling

    def _require(self, holds: bool, name: str, rule: str, remedy: str) -> None:
        if not holds:
            raise ValueError(f"`{name}` {rule} (got {getattr(self, name)!r}); {remedy}.")

    def validate_choices(self) -> None:
        for name, choices in (
            ("norm_placement", NORM_PLACEMENTS),
            ("norm_type", NORM_TYPES),
            ("qk_norm", QK_NORMS),
            ("clip_qkv_stage", CLIP_STAGES),
            ("shared_projections", SHARED_PROJECTIONS),
        ):
            self._require(getattr(self, name) in choices, name, f"must be one of {', '.join(choices)}", "choose one")
        self._require(
            self.hidden_act in ACT2FN or self.hidden_act == "elephant",
            "hidden_act",
            "must be an activation of Transformers or 'elephant'",
            "see `transformers.activations.ACT2FN` for the names",
        )

    def validate_positions(self) -> None:
        unknown = sorted(set(self.layer_position_embeddings) - set(POSITION_EMBEDDINGS))
        if unknown:
            raise ValueError(
                f"`position_embedding` must be made of {', '.join(POSITION_EMBEDDINGS)} (got {unknown}); choose one, "
                "or one a layer."
            )
        self._require(
            len(self.layer_position_embeddings) == self.num_hidden_layers,
            "position_embedding",
            f"must be one value or `num_hidden_layers` = {self.num_hidden_layers} of them",
            "give one string for all, or one a layer",
        )

    def validate_shared_projections(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        self._require(
            self.shared_projections in ("none", "key_value") or heads == kv_heads,
            "shared_projections",
            f"must be 'none' or 'key_value' with `num_key_value_heads` = {kv_heads} of {heads} heads",
            "queries that keys share, or are subtracted from, need a key each: leave `num_key_value_heads` out",
        )

    def validate_rotary_clip(self) -> None:
        """Clipped after their rotation are vectors rotated at their own index, which not every choice has."""
        if self.clip_qkv is None or self.clip_qkv_stage != "rotary":
            return
        for name, holds, rule in (
            ("num_sink_tokens", not self.num_sink_tokens, "be 0"),
            ("num_memory_tokens", not self.num_memory_tokens, "be 0"),
            ("retrieval_layers", not self.retrieval_layers, "be empty"),
            ("shared_projections", not self.caches_one_tensor, "keep keys and values apart"),
            ("position_embedding", set(self.layer_position_embeddings) <= {"rope", "none"}, "be made of rope and none"),
        ):
            self._require(
                holds,
                name,
                f"must {rule} with `clip_qkv_stage` 'rotary', which clips what is rotated at its own index",
                "clip at the 'projection'",
            )

    def validate_memory(self) -> None:
        self._require(self.num_memory_tokens >= 0, "num_memory_tokens", "must not be negative", "0 has no memory")
        self._require(
            not self.num_memory_tokens or (self.memory_segment_length or 0) >= 1,
            "memory_segment_length",
            "must be at least 1 with memory tokens",
            "give the tokens of a segment; `sliding_window` is usual",
        )
        self._require(
            (self.memory_bptt_segments or 0) >= 0,
            "memory_bptt_segments",
            "must not be negative",
            "None goes back through all segments of a call, 0 through none",
        )

    def validate_retrieval(self) -> None:
        layers, count = self.retrieval_layers, self.num_hidden_layers
        self._require(
            all(0 <= layer < count for layer in layers) and len(set(layers)) == len(layers),
            "retrieval_layers",
            f"must name layers 0 to {count - 1}, each once",
            "correct them",
        )
        full = [layer for layer in layers if self.layer_types[layer] == "full_attention"]
        if full:
            raise ValueError(
                f"`retrieval_layers` must name sliding or chunked layers (got {full}, of full attention, whose window "
                "nothing leaves); choose others."
            )
        self._require(self.retrieval_top_k >= 1, "retrieval_top_k", "must be at least 1", "32 is usual")
        self._require(
            self.retrieval_capacity >= self.retrieval_top_k,
            "retrieval_capacity",
            f"must be at least `retrieval_top_k` = {self.retrieval_top_k}",
            "keep more, or look up less",
        )
        for name in ("memory_gate_init", "retrieval_gate_init"):
            self._require(math.isfinite(getattr(self, name) or 0), name, "must be finite", "-4 mixes in 2 %")
        try:
            torch.device("cpu" if self.retrieval_device is None else self.retrieval_device)
        except RuntimeError:
            self._require(False, "retrieval_device", "must be a device of torch", "'cpu', or leave it out")

    def validate_sizes(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            self._require(getattr(self, name) > 0, name, "must be positive", "give the model's size")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        self._require(
            heads % kv_heads == 0,
            "num_key_value_heads",
            f"must divide `num_attention_heads` = {heads}",
            "every key/value head serves the same number of query heads",
        )
        self._require(self.head_dim % 2 == 0, "head_dim", "must be even", "RoPE rotates pairs of dimensions")
        self._require(self.rms_norm_eps > 0, "rms_norm_eps", "must be positive", "OLMo 2 uses 1e-6")

    def validate_token_ids(self) -> None:
        """Transformers warns of ids outside the vocabulary; a padding row outside the table cannot be made at all."""
        super().validate_token_ids()
        self._require(
            self.pad_token_id is None or 0 <= self.pad_token_id < self.vocab_size,
            "pad_token_id",
            f"must be below `vocab_size` = {self.vocab_size}",
            "correct it, or leave it out",
        )

    def validate_ranges(self) -> None:
        self._require(
            self.clip_qkv is None or self.clip_qkv > 0, "clip_qkv", "must be positive or None", "None does not clip"
        )
        self._require(self.logits_scaling > 0, "logits_scaling", "must be positive", "1.0 leaves logits as they are")
        for name in ("attention_dropout", "residual_dropout"):
            self._require(0 <= getattr(self, name) < 1, name, "must be in [0, 1)", "0.0 drops nothing")

    def validate_layer_type(self) -> None:
        """In place of Transformers' own rule, which allows layer types that Olmem does not have."""
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"`layer_types` must be made of {', '.join(LAYER_TYPES)} (got {unknown}); rename these.")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` must name `num_hidden_layers` = {self.num_hidden_layers} layers (got "
                f"{len(self.layer_types)}); give one value a layer, or one string for all."
            )
        self._require(
            "sliding_attention" not in self.layer_types or (self.sliding_window or 0) >= 1,
            "sliding_window",
            "must be at least 1 when a layer slides (a query sees its own key and the W−1 before it)",
            "give the window, or make every layer 'full_attention'",
        )
        self._require(
            "chunked_attention" not in self.layer_types or (self.attention_chunk_size or 0) >= 1,
            "attention_chunk_size",
            "must be at least 1 when a layer is chunked (a query sees its own chunk up to itself)",
            "give the tokens of a chunk, or use other `layer_types`",
        )
        for name, none in (
            ("attention_chunk_lookback", "sees no earlier chunk"),
            ("num_sink_tokens", "keeps no sinks"),
        ):
            self._require(getattr(self, name) >= 0, name, "must not be negative", f"0 {none}")
        self._require(
            not self.num_sink_tokens or set(self.layer_types) != {"full_attention"},
            "num_sink_tokens",
            "must be 0 where every layer is 'full_attention', whose queries see all tokens anyway",
            "leave it out, or give some `layer_types` a window",
        )

    def validate_rope(self) -> None:
        """Beside Transformers' own rules: scaling belongs to full-attention layers."""
        for layer_type, entry in self.rope_parameters.items():
            rope_type, theta = entry["rope_type"], entry["rope_theta"]
            where = f"`rope_parameters[{layer_type!r}]"
            if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
                raise ValueError(
                    f"{where}['rope_type']` must be one of {', '.join(ROPE_TYPES)} (got {rope_type!r}); choose one."
                )
            if rope_type != "default" and layer_type != "full_attention":
                raise ValueError(
                    f"{where}['rope_type']` must be 'default' (got {rope_type!r}); a window's positions never leave "
                    "the trained range, so scaling belongs to full-attention layers only."
                )
            if not is_positive(theta):
                raise ValueError(f"{where}['rope_theta']` must be a positive number (got {theta!r}); OLMo 2 uses 5e5.")
            if entry.get("partial_rotary_factor", 1.0) != 1.0:
                raise ValueError(
                    f"{where}['partial_rotary_factor']` must be 1 (got {entry['partial_rotary_factor']!r}); Olmem "
                    "rotates whole heads."
                )
            if rope_type == "dynamic" and self.head_dim == 2:
                raise ValueError(
                    f"`head_dim` must be at least 4 with rope_type 'dynamic' in {where}` (got 2); use another "
                    "rope_type."
                )
            needed, allowed = ROPE_TYPES[rope_type]
            for name in needed:
                if not is_positive(entry.get(name)):
                    raise ValueError(
                        f"{where}[{name!r}]` must be a positive number with rope_type {rope_type!r} (got "
                        f"{entry.get(name)!r}); give what the model was trained with."
                    )
            if (stored := entry.get("inverse_frequencies")) is not None and not (
                isinstance(stored, list) and len(stored) == self.head_dim // 2 and all(map(is_positive, stored))
            ):
                raise ValueError(
                    f"{where}['inverse_frequencies']` must be `head_dim` / 2 = {self.head_dim // 2} positive "
                    f"numbers (got {stored!r}); leave them out to have those of `rope_theta`."
                )
            known = {"rope_type", "rope_theta", "partial_rotary_factor", *needed, *allowed}
            for name in entry.keys() - known:
                guess = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {guess[0]!r}?" if guess else "remove it."
                raise ValueError(f"{where}[{name!r}]` is no field of rope_type {rope_type!r}; {hint}")
        super().validate_rope()


OlmemConfig.register_for_auto_class()

__all__ = ["OlmemConfig"]
