# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""The configuration of an Olmem model: one strict dataclass that documents its fields."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .adapters_olmem import name_targets
from .rules_olmem import NOT_YET, OLMO_BLOCKS, OlmemRules, with_memory_gates

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")


@strict
class OlmemConfig(OlmemRules, PreTrainedConfig):
    r"""Configures an Olmem model. The defaults are those of OLMo 3 7B, with three sliding layers to each full one.

    Args:
        vocab_size (`int`): The number of rows of the embedding table, padded rows included.
        hidden_size (`int`): The width of the residual stream.
        intermediate_size (`int`): The width of the gated MLP, which is half of a fused up and gate projection.
        num_hidden_layers (`int`): The number of decoder layers.
        num_attention_heads (`int`): The number of query heads H.
        num_key_value_heads (`int`, *optional*): The number of key/value heads K, of which H is a multiple. Defaults to
            H.
        head_dim (`int`, *optional*): The width D of a head, which is even. Defaults to
            `hidden_size / num_attention_heads`.
        hidden_act (`str`): Any activation of Transformers, or `"elephant"` for 1 / (1 + |x|⁸) (arXiv 2310.01365).
        max_position_embeddings (`int`): The number of tokens in the texts that the model was trained on. It does not
            limit the length of a text.
        norm_placement (`str`): Where a sublayer f is normalised. `"post"` is x + norm(f(x)), as in OLMo 2 and 3.
            `"pre"` is x + f(norm(x)), as in OLMo 1. `"peri"` is x + norm(f(norm(x))). `"parallel"` is
            x + attention(n) + mlp(n) with n = norm(x).
        norm_type (`str`): `"rms"`, `"layer"` for a LayerNorm with weight and bias, or `"layer_plain"` for one without
            either.
        rms_norm_eps (`float`): The epsilon of every norm, whatever its type.
        qk_norm (`str`): How queries and keys are normalised before they get their positions: over the full projection
            (`"full"`), over each head (`"head"`), or not at all (`"none"`).
        clip_qkv (`float`, *optional*): Queries, keys and values are clamped to ± this value, or not at all by default.
        clip_qkv_stage (`str`): When they are clamped. `"projection"` is before the QK-norm, as in OLMo's code.
            `"rotary"` is after the QK-norm and RoPE.
        position_embedding (`str` or `list[str]`): How queries and keys get their positions, as one value for all layers
            or one for each. `"rope"` rotates them (arXiv 2104.09864). `"xpos"` is RoPE whose scores decay with the
            distance (arXiv 2212.10554, γ 0.4, base 512). `"linspace"` adds 0.1 · position / (span − 1) ·
            `linspace_scale` to the keys, where span is the layer's window, or `max_position_embeddings` in a full
            layer. `"none"` gives no positions.
        rope_parameters (`dict`, *optional*): The RoPE parameters of each layer type in Transformers' terms,
            `{"full_attention": {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 8.0, …},
            "sliding_attention": {…}}`. A flat dictionary gives its `rope_theta` (and `inverse_frequencies`) to every
            layer type, and its scaling to full-attention layers, which are the only ones that may scale. Entries of
            layer types that no layer has are dropped. With `rope_type` `"default"`, `inverse_frequencies` (D/2 numbers)
            replace those of the theta, for checkpoints that store their own.
        layer_types (`list[str]` or `str`, *optional*): `"sliding_attention"`, `"chunked_attention"` or
            `"full_attention"` for each layer, or one value for all layers. Defaults to three sliding layers and one
            full layer, repeated.
        sliding_window (`int`): The number of keys W that query i of a sliding layer sees, its own included:
            i − W < j ≤ i.
        attention_chunk_size (`int`, *optional*): The number of tokens c in a chunk. Query i of a chunked layer sees the
            keys c·⌊i/c⌋ ≤ j ≤ i of its own chunk, so a chunk's first token sees one key.
        attention_chunk_lookback (`int`): The number of earlier chunks L that query i sees too: c·(⌊i/c⌋−L) ≤ j ≤ i.
        num_sink_tokens (`int`): The number of first tokens S that queries of sliding and chunked layers still see after
            their window has left them. Positions are then the slots of what a query sees (StreamingLLM,
            arXiv 2309.17453), which are at most S + W − 1 in a sliding layer.
        sink_logit_init (`float`, *optional*): The first value of the learned sinks (`self_attn.sinks`), one logit for
            each query head that joins the denominator of its softmax, so that a head may attend to nothing (as in
            gpt-oss). They steady a window, and remember nothing. Give 0 to a model made from scratch, and −10 or less
            beside weights that have no sinks, where that changes next to nothing at first. None means no learned sinks.
        shared_projections (`str`): Which of queries, keys and values share a projection. They are shared after the
            norm and before positions (arXiv 2606.04032). `"none"` shares nothing. `"key_value"` takes the keys as
            values. `"query_key"` takes the keys as queries. `"query_key_value"` takes the keys as both.
            `"value_difference"` takes queries minus keys as values. Where the keys are the values, a cache holds one
            tensor, which is half of the bytes. Shared queries need as many key/value heads as query heads.
        num_memory_tokens (`int`): The number of vectors M that carry information from segment to segment (Recurrent
            Memory Transformer, arXiv 2207.06881). The tokens of each segment see its M memory tokens, and the memory
            tokens of the next segment are written at its end. 0 means no memory tokens.
        memory_segment_length (`int`, *optional*): The number of tokens in a segment. Defaults to `sliding_window`, or
            to `attention_chunk_size` where some layers are chunked and none slides.
            With gradient checkpointing each layer keeps the keys and values of all segments beside its hidden states.
            This is three times what a model without memory keeps where there are as many key/value heads as query
            heads, and less with fewer. Each segment is a call of every layer, so processes that shard layers must read
            equally many segments in a step.
        memory_bptt_segments (`int`, *optional*): The greatest number of segments through which gradients go back
            through the memory, counted from the last segment of a forward call. With 0, a model learns to read memory,
            but not to write it. None means all segments of the call.
        memory_gate_init (`float`, *optional*): The first logit of the memory gates. Each head has a gate that mixes
            attention with memory and attention without it. None, the default of a model made from scratch, means no
            gates, so memory tokens are attended to like others. Weights without memory that are loaded into a model
            with `num_memory_tokens` (by `from_pretrained`, `from_olmo` or `olmem convert --set`) get gates at −10, so
            that an untrained memory does no harm, unless the call that loads them gives this field, even as None.
        retrieval_layers (`list[int]`): The sliding or chunked layers that also retrieve tokens which have left their
            window (Memorizing Transformers, arXiv 2203.08913). Each query head attends to the `retrieval_top_k` tokens
            whose keys score highest, regardless of their positions. A gate that each head learns mixes the result with
            the attention over the window.
        retrieval_top_k (`int`): The number of tokens that a query head retrieves.
        retrieval_capacity (`int`): The number of tokens that can be retrieved, of all that have left the window.
        retrieval_admission (`str`): Which of these tokens can be retrieved. `"recent"` keeps the last ones. `"learned"`
            keeps those of the highest scores, and of equal scores the newer one. The scores are a projection of the
            layer's input, one for each key head (`self_attn.retrieval_score`), and join the scores of the queries, so
            that they learn from what is looked up. They are zero at first, which keeps the last tokens.
        retrieval_gate_init (`float`): The first logit of the retrieval gates. −4 mixes in 2 %.
        retrieval_device (`str`, *optional*): The device that stores and searches the tokens to retrieve. `"cpu"` spares
            a GPU's memory. Defaults to the layer's own device.
        attention_bias (`bool`): Whether the four attention projections have biases.
        attention_dropout, residual_dropout (`float`): The dropout, in training, of attention weights, and of each
            sublayer's output before it joins the residual stream.
        logits_scaling (`float`): The number that logits are divided by.
        initializer_range (`float`): The standard deviation of initial weights.
        tie_word_embeddings (`bool`): Whether the output head is the embedding table.
        use_cache (`bool`): Whether a forward call returns a cache by default.
        pad_token_id, bos_token_id, eos_token_id (*optional*): Token ids below `vocab_size`.
    """

    model_type = "olmem"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  Transformers' own attribute
    ignore_keys_at_rope_validation = {"inverse_frequencies"}  # noqa: RUF012  Transformers would warn of it
    default_theta = 500000.0
    chooses_memory_gate = False  # whether the call that read this from a folder gave `memory_gate_init`, be it as None
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
    sink_logit_init: float | int | None = None
    num_memory_tokens: int = 0
    memory_segment_length: int | None = None
    memory_bptt_segments: int | None = None
    memory_gate_init: float | int | None = None
    retrieval_top_k: int = 32
    retrieval_capacity: int = 65536
    retrieval_admission: str = "recent"
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
    if TYPE_CHECKING:  # the types of these fields after `__post_init__`
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
            self.retrieval_layers = sorted(self.retrieval_layers)  # `strict` refuses any other value later
        if self.num_memory_tokens and self.memory_segment_length is None:
            slides = "chunked_attention" not in self.layer_types or "sliding_attention" in self.layer_types
            self.memory_segment_length = self.sliding_window if slides else self.attention_chunk_size
        schemes = self.position_embedding
        if isinstance(schemes, list) and len(schemes) == self.num_hidden_layers and len(set(schemes)) == 1:
            self.position_embedding = schemes[0]
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> Any:
        """Makes a configuration from a dictionary and overrides, as Transformers does.

        Overrides join the dictionary before it is read, so that they are completed and validated like all fields. The
        configuration of another `model_type` is an error.
        """
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
        config = loaded[0] if isinstance(loaded, tuple) else loaded  # the tuple also has unused keywords
        config.refuse_without_effect(overrides)
        slid = "sliding_attention" in (config_dict.get("layer_types") or ["sliding_attention"])
        config.refuse_unchosen_window(overrides, is_chosen=slid and "sliding_window" in config_dict)
        config.chooses_memory_gate = "memory_gate_init" in overrides
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, without `chooses_memory_gate`, which is not saved.

        PEFT calls this before it looks for the default targets of an adapter, so they are named here.
        """
        name_targets(self.model_type, self.norm_placement)
        values = super().to_dict()
        values.pop("chooses_memory_gate", None)
        return values

    @classmethod
    def from_olmo(cls, path_or_repo, **overrides):
        """Makes a configuration from a Transformers `olmo`, `olmo2` or `olmo3` folder or repository.

        Overrides are fields of this class, or arguments of `from_pretrained` that find the file (`revision`, `token`,
        …).
        """
        cls.refuse_parts_of_rope(overrides)
        hub_kwargs = {name: overrides.pop(name) for name in HUB_ARGUMENTS if name in overrides}
        raw, _ = PreTrainedConfig.get_config_dict(path_or_repo, **hub_kwargs)
        model_type = raw.get("model_type")
        if model_type not in OLMO_BLOCKS:
            raise ValueError(
                f"`model_type` must be one of {', '.join(OLMO_BLOCKS)} for `from_olmo` (got {model_type!r} in "
                f"{path_or_repo}); load an Olmem model with `from_pretrained`, or convert a native checkpoint "
                "with `olmem convert`."
            )
        config = cls(**(cls.fields_of_olmo(raw) | with_memory_gates({}, overrides)))
        config.refuse_without_effect(overrides)
        config.refuse_unchosen_window(overrides, is_chosen="sliding_window" in raw)
        config.chooses_memory_gate = "memory_gate_init" in overrides
        return config

    @property
    def layer_position_embeddings(self) -> list[str]:
        """Returns the position embedding of each layer."""
        given = self.position_embedding
        return [given] * self.num_hidden_layers if isinstance(given, str) else given

    @property
    def caches_one_tensor(self) -> bool:
        """Returns whether the keys are the values, so that a cache keeps one tensor for both."""
        return self.shared_projections in ("key_value", "query_key_value")

    @property
    def has_memory(self) -> bool:
        """Returns whether memory tokens or retrieval carry on more than windows and sinks."""
        return self.num_memory_tokens > 0 or bool(self.retrieval_layers)

    @property
    def selects(self) -> bool:
        """Returns whether the stores of layers that retrieve keep the tokens of the highest scores."""
        return self.retrieval_admission == "learned"

    @property
    def memory_rule(self) -> str:
        """Returns the beginning of an error where a model must not have memory."""
        if self.num_memory_tokens:
            return f"`num_memory_tokens` must be 0 (got {self.num_memory_tokens})"
        return f"`retrieval_layers` must be empty (got {self.retrieval_layers})"

    @property
    def logit_scale(self) -> float:
        """Returns the factor of logits, under the name that serving engines read."""
        return 1.0 / self.logits_scaling


OlmemConfig.register_for_auto_class()

__all__ = ["OlmemConfig"]
