"""The config fields of OLMo-core 1.8 to 3.x, from olmo_core/nn/transformer/config.py, nn/attention and nn/rope.py.

Nested fields are named by their path: `block.sequence_mixer.rope.theta`.
"""

from . import NO_EFFECT, Field

NORM_TYPES = {"rms": "rms", "fused_rms": "rms", "cute_rms": "rms", "qwen_rms": "rms", "default": "layer"}
NORM_PLACEMENTS = {"reordered_norm": "post", "default": "pre", "peri_norm": "peri"}
ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def norm_fields(path: str) -> dict[str, Field]:
    """Returns the rows of the config table for the norm of this name."""
    return {
        f"{path}.name": Field("default", only=tuple(NORM_TYPES)),
        f"{path}.eps": Field(1e-5),
        f"{path}.elementwise_affine": Field(True),
        f"{path}.bias": Field(True),
        f"{path}.full_precision": NO_EFFECT,
        f"{path}.dtype": NO_EFFECT,
    }


MODEL: dict[str, Field] = {
    "name": Field("default", only=("default",)),
    "d_model": Field(to="hidden_size", kind=int),
    "n_layers": Field(to="num_hidden_layers", kind=int),
    "vocab_size": Field(to="vocab_size", kind=int),
    "tie_word_embeddings": Field(False, to="tie_word_embeddings"),
    "embed_scale": Field(only=(None, 1.0)),
    "embedding_norm": Field(only=(None,)),
    "block_pattern": Field(only=(None,)),
    "lm_head.name": Field("default", only=("default",)),
    "lm_head.bias": Field(True, only=(False,)),
    **norm_fields("lm_head.layer_norm"),
    **dict.fromkeys(
        (
            "lm_head.dtype",
            "lm_head.loss_implementation",
            "dtype",
            "init_method",
            "init_seed",
            "init_std",
            "embedding_init_std",
            "freeze_params",
            "compile",
            "fused_ops",
            "dp_config",
            "tp_config",
            "cp_config",
            "ep_config",
            "ac_config",
            "float8_config",
        ),
        NO_EFFECT,
    ),
}


BLOCK: dict[str, Field] = {
    "name": Field("default", only=tuple(NORM_PLACEMENTS)),
    "dropout": Field(to="residual_dropout", kind=float),
    "attention_residual_alpha": Field(only=(None, 1.0)),
    "feed_forward_residual_alpha": Field(only=(None, 1.0)),
    "feed_forward_moe": Field(only=(None,)),
    **norm_fields("layer_norm"),
    "feed_forward.name": Field("default", only=("default",)),
    "feed_forward.hidden_size": Field(to="intermediate_size", kind=int),
    "feed_forward.activation": Field("silu", only=tuple(ACTIVATIONS)),
    "feed_forward.bias": Field(True, only=(False,)),
    "feed_forward.dtype": NO_EFFECT,
    "sequence_mixer.type": Field("attention", only=("attention",)),
    "sequence_mixer.name": Field("default", only=("default",)),
    "sequence_mixer.n_heads": Field(16, to="num_attention_heads"),
    "sequence_mixer.n_kv_heads": Field(to="num_key_value_heads", kind=int),
    "sequence_mixer.head_dim": Field(to="head_dim", kind=int),
    "sequence_mixer.bias": Field(True, to="attention_bias"),
    "sequence_mixer.gate": Field(only=(None,)),
    "sequence_mixer.clip_qkv": Field(to="clip_qkv", kind=float),
    "sequence_mixer.dropout": Field(to="attention_dropout", kind=float),
    **norm_fields("sequence_mixer.qk_norm"),
    "sequence_mixer.use_head_qk_norm": Field(False),
    "sequence_mixer.qk_norm_per_head_gains": Field(only=(None, False)),
    "sequence_mixer.scalable_softmax": Field(False, only=(None, False)),
    "sequence_mixer.attention_sinks": Field(False, only=(None, False)),
    "sequence_mixer.rope.name": Field("default", only=("default",)),
    "sequence_mixer.rope.theta": Field(500000.0),
    "sequence_mixer.rope.full_precision": NO_EFFECT,
    "sequence_mixer.rope.no_global_rope": Field(False),
    "sequence_mixer.rope.partial_rotary_factor": Field(1.0, only=(None, 1.0)),
    "sequence_mixer.rope.scaling": Field(),
    "sequence_mixer.sliding_window.pattern": Field(),
    "sequence_mixer.sliding_window.force_full_attention_on_first_layer": Field(True),
    "sequence_mixer.sliding_window.force_full_attention_on_last_layer": Field(True),
    **{
        f"sequence_mixer.{name}": NO_EFFECT
        for name in (
            "backend",
            "dtype",
            "use_flash",
            "use_recompute_qkv_prep",
            "mxfp8_projections",
            "mxfp8_qkv_projection",
            "mxfp8_out_projection",
            "mxfp8_save_qkv_for_backward",
        )
    },
}


# Forms of `rope.scaling`, by the fields that only they have.
SCALING: dict[str, dict[str, Field]] = {
    "beta_fast": {
        "factor": Field(8.0),
        "beta_fast": Field(32.0),
        "beta_slow": Field(1.0),
        "old_context_len": Field(8192),
        "attention_rescale_factor": NO_EFFECT,  # of YaRN: native code computes its own
    },
    "new_theta": {"new_theta": Field(8_000_000.0), "attention_rescale_factor": Field(1.0, only=(1.0,))},
    "high_freq_proportion": {
        "factor": Field(32.0),
        "low_freq_proportion": Field(0.0),
        "high_freq_proportion": Field(0.25),
        "old_context_len": Field(8192),
        "attention_rescale_factor": Field(1.0, only=(1.0,)),
    },
    "high_freq_factor": {
        "factor": Field(32.0),
        "low_freq_factor": Field(1.0),
        "high_freq_factor": Field(4.0),
        "old_context_len": Field(8192),
    },
    "factor": {"factor": Field(2.0), "attention_rescale_factor": Field(1.0, only=(1.0,))},
}
