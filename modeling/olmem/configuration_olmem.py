# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""What an Olmem model is: one strict dataclass of fields and their documentation."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .rules_olmem import NOT_YET, OLMO_BLOCKS, OlmemRules, with_memory_gates

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")


@strict
class OlmemConfig(OlmemRules, PreTrainedConfig):
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
        config.refuse_without_effect(overrides)
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
        config.refuse_without_effect(overrides)
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


OlmemConfig.register_for_auto_class()

__all__ = ["OlmemConfig"]
