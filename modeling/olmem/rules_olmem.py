# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Rules that the fields of a configuration must keep, and how to read the configurations of Transformers' OLMo models.

Each rule is a method `validate_*`. Its error names the field, says the rule and the value, and offers a way out.
"""

import copy
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import AutoConfig, GenerationConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

NORM_PLACEMENTS = ("post", "pre", "peri", "parallel")
NORM_TYPES = ("rms", "layer", "layer_plain")
QK_NORMS = ("full", "head", "none")
CLIP_STAGES = ("projection", "rotary")
POSITION_EMBEDDINGS = ("rope", "xpos", "linspace", "none")
ROTATING = ("rope", "xpos")  # the position embeddings that rotate queries and keys
BY_SLOT = ("xpos", "linspace")  # the position embeddings that depend on the slots of what a query sees
SHARED_PROJECTIONS = ("none", "key_value", "query_key", "query_key_value", "value_difference")
ADMISSIONS = ("recent", "learned")
LAYER_TYPES = ("sliding_attention", "chunked_attention", "full_attention")
# The types of RoPE that Transformers defines. Each has the names of its required entries, then of its optional ones.
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

# Fields that this version does not support, each with the only value that may be given, which changes nothing.
NOT_YET = {"partial_rotary_factor": 1.0}
# Fields that have no effect without chunked layers, without memory tokens, or without layers that retrieve.
CHUNK_FIELDS = ("attention_chunk_size", "attention_chunk_lookback")
TOKEN_FIELDS = ("memory_segment_length", "memory_bptt_segments", "memory_gate_init")
RETRIEVAL_FIELDS = (
    "retrieval_top_k",
    "retrieval_capacity",
    "retrieval_admission",
    "retrieval_gate_init",
    "retrieval_device",
)
# Fields that add a memory to a model that was trained without one.
MEMORY_FIELDS = ("num_memory_tokens", *TOKEN_FIELDS, "retrieval_layers", *RETRIEVAL_FIELDS)

# The first logit of memory gates when weights without memory are loaded into a model with memory. An untrained memory
# then makes up less than 0.01 % of the attention output.
MEMORY_GATE = -10.0

# The greatest first value of learned sinks where weights have none, for the same reason.
SINK_LOGIT = -10.0

# The fields in which each OLMo model of Transformers differs from Olmem's defaults, by its `model_type`. All other
# fields have the same names in both.
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
    """Returns changes to the fields of trained weights, with `memory_gate_init` set if they add a memory.

    The field is set only if the weights have no memory tokens and the changes leave it out. Changes that give it as
    None choose a memory without gates.

    Args:
        weights: the fields that the weights were trained with.
        changes: the fields that the caller changes.
    """
    adds_memory = changes.get("num_memory_tokens") and not weights.get("num_memory_tokens")
    if adds_memory and weights.get("memory_gate_init") is None:
        return {"memory_gate_init": MEMORY_GATE, **changes}
    return dict(changes)


def is_positive(value: Any) -> bool:
    """Returns whether a value is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


class OlmemRules(PreTrainedConfig if TYPE_CHECKING else object):
    """Checks the fields of `OlmemConfig`, which derives from this class and from Transformers' `PreTrainedConfig`."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        default_theta: ClassVar[float]

    @classmethod
    def fields_of_olmo(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields of this class for the config.json of a Transformers `olmo`, `olmo2` or `olmo3` model.

        Entries that have no field here, or that are written in another form here, are kept in `olmo_config`. An export
        back to Transformers writes them again.
        """
        source = cls.olmo_of(raw)
        if not getattr(source, "is_causal", True):
            raise ValueError(
                "`is_causal` must be true (got False); Olmem's attention is always causal, so load another model."
            )
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
        """Returns Transformers' own configuration for such a config.json, with the RoPE parameters that it states.

        Olmo3Config ignores the theta and the scaling of config.json files in the form of older releases. They are
        brought into today's form first.
        """
        values = {name: value for name, value in copy.deepcopy(raw).items() if name not in ("auto_map", "model_type")}
        if raw["model_type"] == "olmo3":
            both, rope = ["full_attention", "sliding_attention"], values.get("rope_parameters") or {}
            types = values.get("layer_types") or both
            if not isinstance(types, list) or any(layer_type not in both for layer_type in types):
                raise ValueError(
                    f"`layer_types` must be made of full_attention and sliding_attention for olmo3 (got {types!r}); "
                    "correct the config.json, because Olmo3 supports no other types."
                )
            if not all(isinstance(rope.get(kind), dict) and "rope_theta" in rope[kind] for kind in both):
                given = {name: values.pop(name, None) for name in ("rope_parameters", "rope_theta", "rope_scaling")}
                given |= {name: raw[name] for name in ("max_position_embeddings",) if name in raw}
                config_class: Any = cls
                values["rope_parameters"] = config_class(num_hidden_layers=2, layer_types=both, **given).rope_parameters
        return AutoConfig.for_model(raw["model_type"], **values)

    def convert_rope_params_to_dict(self, **kwargs) -> dict[str, Any]:
        """Completes `rope_parameters` to one entry for each layer type in use, as that field's documentation says."""
        theta, scaling = kwargs.pop("rope_theta", None), kwargs.pop("rope_scaling", None) or {}
        given = self.rope_parameters or {}
        if set(scaling) & set(LAYER_TYPES):  # `rope_scaling` is the older name of `rope_parameters`
            given, scaling = scaling, {}
        flat = {key: value for key, value in given.items() if key not in LAYER_TYPES}
        stored = flat.get("inverse_frequencies")
        nested = {key: value for key, value in given.items() if key in LAYER_TYPES}
        for key, value in flat.items():
            if isinstance(value, dict):
                raise ValueError(
                    f"`rope_parameters` must be nested by {' or '.join(LAYER_TYPES)} (got {key!r}); rename that key."
                )
        for key, value in nested.items():
            if not isinstance(value, dict | None):
                raise ValueError(f"`rope_parameters[{key!r}]` must be a dictionary (got {value!r}); give its entries.")
        if flat and nested:
            raise ValueError(
                "`rope_parameters` must be one flat dictionary or nested by layer type, not both (got the keys "
                f"{sorted(given)}); keep the entries that the model was trained with."
            )
        # The first theta that is given anywhere serves all layer types that have none of their own.
        thetas = [*((entry or {}).get("rope_theta") for entry in (flat, *nested.values())), theta, self.default_theta]
        theta = next(theta for theta in thetas if theta is not None)
        parameters = {}
        for layer_type in sorted(set(self.layer_types or ())):
            full = layer_type == "full_attention"
            entry = {"rope_type": "default", "rope_theta": theta}
            if stored is not None:
                entry["inverse_frequencies"] = stored
            for part in (nested.get(layer_type) or (flat if full else {}), scaling if full else {}):
                if "type" in part:  # `type` is the older name of `rope_type`
                    part = {"rope_type": part["type"]} | {key: part[key] for key in part if key != "type"}
                entry |= part
            if entry["rope_type"] in ("yarn", "llama3"):
                entry.setdefault("original_max_position_embeddings", self.max_position_embeddings)
            parameters[layer_type] = entry
        self.rope_parameters = parameters
        return kwargs

    @classmethod
    def refuse_unknown(cls, kwargs: dict[str, Any]) -> None:
        """Raises an error for fields that this version does not support, and for misspelled fields.

        Other unknown keywords are kept, as Transformers keeps them.
        """
        for name in [name for name in kwargs if name in NOT_YET]:
            value = kwargs.pop(name)
            if value != NOT_YET[name]:
                raise ValueError(
                    f"`{name}` is not supported yet (got {value!r}); leave it out, or use a newer version of olmem."
                )
        cls.refuse_misspelled(kwargs)

    @classmethod
    def refuse_misspelled(cls, kwargs: dict[str, Any]) -> None:
        """Raises an error for a keyword that resembles a field, and suggests that field."""
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
        """Raises an error for overrides of `rope_theta` or `rope_scaling` alone."""
        for name in ("rope_theta", "rope_scaling"):
            if name in overrides:
                raise ValueError(
                    f"`{name}` is a part of `rope_parameters` (got {overrides[name]!r}); override all of "
                    "`rope_parameters`."
                )

    def _require(self, holds: bool, name: str, rule: str, remedy: str) -> None:
        """Raises an error that names a field, its rule, its value and a remedy, unless the rule holds."""
        if not holds:
            raise ValueError(f"`{name}` {rule} (got {getattr(self, name)!r}); {remedy}.")

    def refuse_without_effect(self, given: Iterable[str]) -> None:
        """Raises an error for a given field that has no effect in this configuration, unless it has its default value.

        This is only for fields that a caller overrides. A saved configuration may hold such fields, for instance those
        of a memory that was switched off, and still loads.
        """
        defaults = {field.name: field.default for field in fields(self)}
        for used, switch, off, names in (
            ("sliding_attention" in self.layer_types, "layer_types", "has no 'sliding_attention'", ("sliding_window",)),
            ("chunked_attention" in self.layer_types, "layer_types", "has no 'chunked_attention'", CHUNK_FIELDS),
            (self.clip_qkv is not None, "clip_qkv", "is None", ("clip_qkv_stage",)),
            (self.num_memory_tokens > 0, "num_memory_tokens", "is 0", TOKEN_FIELDS),
            (bool(self.retrieval_layers), "retrieval_layers", "is empty", RETRIEVAL_FIELDS),
        ):
            for name in sorted(set(given) & set(names)):
                self._require(
                    used or getattr(self, name) == defaults[name],
                    name,
                    f"must be left out where `{switch}` {off}, because it has no effect there",
                    f"leave it out, or give `{switch}` too",
                )

    def refuse_unchosen_window(self, given: Iterable[str], is_chosen: bool) -> None:
        """Raises an error where a caller lets layers slide, and the default window is longer than what was trained.

        Args:
            given: the fields that the caller overrides.
            is_chosen: whether the configuration that is overridden says how long the window is.
        """
        slides = "layer_types" in given and "sliding_attention" in self.layer_types
        trained, window = self.max_position_embeddings, self.sliding_window
        if slides and not is_chosen and "sliding_window" not in given and trained < (window or 0):
            raise ValueError(
                f"`sliding_window` must be given with `layer_types` that slide (got the default {window}) where the "
                f"model was trained on fewer tokens, {trained}; give a window of at most {trained}, or {window} if you "
                "mean it."
            )

    def validate_choices(self) -> None:
        """Requires that each field with a fixed set of values has one of them."""
        for name, choices in (
            ("norm_placement", NORM_PLACEMENTS),
            ("norm_type", NORM_TYPES),
            ("qk_norm", QK_NORMS),
            ("clip_qkv_stage", CLIP_STAGES),
            ("shared_projections", SHARED_PROJECTIONS),
            ("retrieval_admission", ADMISSIONS),
        ):
            self._require(getattr(self, name) in choices, name, f"must be one of {', '.join(choices)}", "choose one")
        self._require(
            self.hidden_act in ACT2FN or self.hidden_act == "elephant",
            "hidden_act",
            "must be an activation of Transformers or 'elephant'",
            "see `transformers.activations.ACT2FN` for the names",
        )

    def validate_positions(self) -> None:
        """Requires one known position embedding for each layer."""
        unknown = sorted(set(self.layer_position_embeddings) - set(POSITION_EMBEDDINGS))
        if unknown:
            raise ValueError(
                f"`position_embedding` must be made of {', '.join(POSITION_EMBEDDINGS)} (got {unknown}); choose one "
                "for all layers, or one for each layer."
            )
        self._require(
            len(self.layer_position_embeddings) == self.num_hidden_layers,
            "position_embedding",
            f"must be one value or `num_hidden_layers` = {self.num_hidden_layers} of them",
            "give one string for all layers, or one for each layer",
        )

    def validate_shared_projections(self) -> None:
        """Requires a key/value head for each query head where queries share the keys' projection or subtract keys."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        self._require(
            self.shared_projections in ("none", "key_value") or heads == kv_heads,
            "shared_projections",
            f"must be 'none' or 'key_value' with `num_key_value_heads` = {kv_heads} of {heads} heads",
            "each query head needs a key head of its own there, so leave `num_key_value_heads` out",
        )

    def validate_rotary_clip(self) -> None:
        """Requires rotated vectors that can be clipped at `clip_qkv_stage` "rotary".

        That stage clips vectors that were rotated by the token's own index. Sinks, memory, shared tensors and some
        position embeddings have no such vectors.
        """
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
                "set `clip_qkv_stage` to 'projection'",
            )

    def validate_memory(self) -> None:
        """Requires valid numbers of memory tokens, of tokens in a segment, and of segments that gradients pass."""
        self._require(
            self.num_memory_tokens >= 0,
            "num_memory_tokens",
            "must not be negative",
            "give 0 for a model without memory",
        )
        self._require(
            not self.num_memory_tokens or (self.memory_segment_length or 0) >= 1,
            "memory_segment_length",
            "must be at least 1 with memory tokens",
            "give the number of tokens in a segment, usually that of `sliding_window`",
        )
        self._require(
            (self.memory_bptt_segments or 0) >= 0,
            "memory_bptt_segments",
            "must not be negative",
            "give None for gradients through all segments of a call, or 0 for none",
        )

    def validate_retrieval(self) -> None:
        """Requires layers that can retrieve, valid sizes of what they retrieve, and a known device."""
        layers, count = self.retrieval_layers, self.num_hidden_layers
        self._require(
            all(0 <= layer < count for layer in layers) and len(set(layers)) == len(layers),
            "retrieval_layers",
            f"must name layers 0 to {count - 1}, each once",
            "correct the list",
        )
        full = [layer for layer in layers if self.layer_types[layer] == "full_attention"]
        if full:
            raise ValueError(
                f"`retrieval_layers` must name sliding or chunked layers (got {full}, of full attention, whose window "
                "no token leaves); choose other layers."
            )
        self._require(self.retrieval_top_k >= 1, "retrieval_top_k", "must be at least 1", "give 32 or so")
        self._require(
            self.retrieval_capacity >= self.retrieval_top_k,
            "retrieval_capacity",
            f"must be at least `retrieval_top_k` = {self.retrieval_top_k}",
            "raise it, or lower `retrieval_top_k`",
        )
        try:
            torch.device("cpu" if self.retrieval_device is None else self.retrieval_device)
        except RuntimeError:
            self._require(False, "retrieval_device", "must be a device of torch", "give 'cpu', or leave it out")

    def validate_sizes(self) -> None:
        """Requires positive sizes, and numbers of heads and dimensions that fit one another."""
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
            "choose a divisor, so that each key/value head serves the same number of query heads",
        )
        self._require(
            self.head_dim % 2 == 0, "head_dim", "must be even", "RoPE rotates pairs, so choose an even number"
        )
        self._require(self.rms_norm_eps > 0, "rms_norm_eps", "must be positive", "give 1e-6, as OLMo 2 has it")

    def validate_token_ids(self) -> None:
        """Requires a padding id within the vocabulary, beside the checks of Transformers.

        Transformers only warns of ids outside the vocabulary. The embedding table needs a row for the padding id.
        """
        super().validate_token_ids()
        self._require(
            self.pad_token_id is None or 0 <= self.pad_token_id < self.vocab_size,
            "pad_token_id",
            f"must be below `vocab_size` = {self.vocab_size}",
            "correct the id, or leave it out",
        )

    def validate_ranges(self) -> None:
        """Requires finite logits of gates and sinks, a positive clip and logits scaling, and dropouts below 1."""
        for name in ("memory_gate_init", "retrieval_gate_init", "sink_logit_init"):
            self._require(math.isfinite(getattr(self, name) or 0), name, "must be finite", "give a logit such as -4")
        self._require(
            self.clip_qkv is None or self.clip_qkv > 0,
            "clip_qkv",
            "must be positive or None",
            "give None to clip nothing",
        )
        self._require(
            self.logits_scaling > 0, "logits_scaling", "must be positive", "give 1.0 to leave logits as they are"
        )
        for name in ("attention_dropout", "residual_dropout"):
            self._require(0 <= getattr(self, name) < 1, name, "must be in [0, 1)", "give 0.0 to drop nothing")

    def validate_layer_type(self) -> None:
        """Requires a supported type for each layer, and the sizes that these types need.

        This replaces Transformers' own rule, which allows layer types that Olmem does not support.
        """
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(
                f"`layer_types` must be made of {', '.join(LAYER_TYPES)} (got {unknown}); correct these names."
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` must name `num_hidden_layers` = {self.num_hidden_layers} layers (got "
                f"{len(self.layer_types)}); give one value for each layer, or one string for all layers."
            )
        self._require(
            "sliding_attention" not in self.layer_types or (self.sliding_window or 0) >= 1,
            "sliding_window",
            "must be at least 1 when a layer slides (a query sees its own key and the W−1 before it)",
            "give the size of the window, or make every layer 'full_attention'",
        )
        self._require(
            "chunked_attention" not in self.layer_types or (self.attention_chunk_size or 0) >= 1,
            "attention_chunk_size",
            "must be at least 1 when a layer is chunked (a query sees its own chunk up to itself)",
            "give the number of tokens in a chunk, or use other `layer_types`",
        )
        for name, things in (("attention_chunk_lookback", "earlier chunks"), ("num_sink_tokens", "sinks")):
            self._require(getattr(self, name) >= 0, name, "must not be negative", f"give 0 for no {things}")
        self._require(
            not self.num_sink_tokens or set(self.layer_types) != {"full_attention"},
            "num_sink_tokens",
            "must be 0 where every layer is 'full_attention', whose queries see all tokens anyway",
            "leave it out, or give some `layer_types` a window",
        )

    def validate_rope(self) -> None:
        """Requires complete RoPE parameters for each layer type, beside the checks of Transformers.

        Only full-attention layers may scale their positions, because those of a window stay in the trained range.
        """
        for layer_type, entry in self.rope_parameters.items():
            rope_type, theta = entry["rope_type"], entry["rope_theta"]
            where = f"`rope_parameters[{layer_type!r}]"
            if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
                raise ValueError(
                    f"{where}['rope_type']` must be one of {', '.join(ROPE_TYPES)} (got {rope_type!r}); choose one "
                    "of them."
                )
            if rope_type != "default" and layer_type != "full_attention":
                raise ValueError(
                    f"{where}['rope_type']` must be 'default' (got {rope_type!r}); leave the scaling out, because "
                    "positions within a window stay in the trained range."
                )
            if not is_positive(theta):
                raise ValueError(
                    f"{where}['rope_theta']` must be a positive number (got {theta!r}); give the "
                    "theta that the model was trained with, such as 5e5."
                )
            if entry.get("partial_rotary_factor", 1.0) != 1.0:
                raise ValueError(
                    f"{where}['partial_rotary_factor']` must be 1 (got {entry['partial_rotary_factor']!r}); leave it "
                    "out, because Olmem rotates whole heads."
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
                        f"{entry.get(name)!r}); give the number that the model was trained with."
                    )
            if (stored := entry.get("inverse_frequencies")) is not None and not (
                isinstance(stored, list) and len(stored) == self.head_dim // 2 and all(map(is_positive, stored))
            ):
                raise ValueError(
                    f"{where}['inverse_frequencies']` must be `head_dim` / 2 = {self.head_dim // 2} positive "
                    f"numbers (got {stored!r}); leave them out to compute them from `rope_theta`."
                )
            known = {"rope_type", "rope_theta", "partial_rotary_factor", *needed, *allowed}
            for name in entry.keys() - known:
                guess = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {guess[0]!r}?" if guess else "remove it."
                raise ValueError(f"{where}[{name!r}]` is no entry of rope_type {rope_type!r}; {hint}")
        super().validate_rope()


__all__ = ["OlmemRules"]
