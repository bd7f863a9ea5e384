"""The oracle of the verification computes the native packages' own logits, and refuses what it does not know."""

import copy
import math
from collections import Counter

import pytest
import torch
from convert.checkpoints import DEMO, EXACT, FOLDERS, GOLDEN, expected, golden
from olmem_convert import CheckpointError
from olmem_convert.proof import olmo_core_forward
from olmem_convert.proof.baka_forward import rotate_pairs
from olmem_convert.proof.native_forward import rotate
from olmem_convert.reading.tensors import LoadedOnDemand


class Counted(LoadedOnDemand):
    """Counts how often each tensor is read."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.reads = Counter()

    def __getitem__(self, name):
        self.reads[name] += 1
        return super().__getitem__(name)


def stages(checkpoint, input_ids, dtype=torch.float32, tensors=None, **changes):
    config = copy.deepcopy(checkpoint.native_config) | changes
    tensors = LoadedOnDemand(checkpoint.tensors) if tensors is None else tensors
    return checkpoint.forward.func(config, tensors, input_ids, dtype=dtype)


@pytest.mark.parametrize("name", FOLDERS)
def test_float32_is_the_native_code(name):
    input_ids, native = expected(GOLDEN / name)
    *_, (last, logits) = stages(golden(name), input_ids)
    assert last == "logits"
    assert (logits - native).abs().max() <= 1e-5 * max(1.0, native.std())
    assert torch.equal(logits, native) or name not in EXACT


@pytest.mark.parametrize("name", FOLDERS)
def test_float64_is_near_the_native_float32(name):
    input_ids, native = expected(GOLDEN / name)
    *_, (_, logits) = stages(golden(name), input_ids, torch.float64)
    assert logits.dtype == torch.float64
    assert 0 < (logits - native).abs().max() <= 2e-6 * max(native.abs().max(), 4)


def test_demo_within_its_tolerance():
    input_ids, native = expected(DEMO)
    *_, (_, logits) = stages(golden("demo"), input_ids)
    assert (logits[:, -native.shape[1] :] - native).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "name", ["olmo", "olmo_gqa_tied", "olmo_core_swa", "olmo_core_tied", "core300_peri_norm", "baka_pristine"]
)
def test_each_tensor_is_read_once_and_none_is_left_out(name):
    checkpoint = golden(name)
    tensors = Counted(checkpoint.tensors)
    names = [stage for stage, _ in stages(checkpoint, torch.zeros(1, 3, dtype=torch.long), tensors=tensors)]
    layers = len(checkpoint.olmem_config["layer_types"])
    assert names == ["embeddings", *(f"block {layer}" for layer in range(layers)), "final norm", "logits"]
    embedding = "transformer.wte.weight" if name.startswith("olmo_gqa") else "embeddings.weight"
    tied = checkpoint.olmem_config["tie_word_embeddings"]
    unused = {"lm_head.w_out.weight"} if tied and name.startswith("olmo_core") else set()
    assert tensors.reads == {name: 1 + (tied and name == embedding) for name in set(checkpoint.tensors) - unused}


@pytest.mark.parametrize("name", ["olmo", "olmo_core_swa", "baka_pristine"])
def test_later_tokens_change_nothing_before_them(name):
    ids = torch.arange(24)[None]
    *_, (_, whole) = stages(golden(name), ids, torch.float64)
    *_, (_, part) = stages(golden(name), ids[:, :15], torch.float64)
    torch.testing.assert_close(whole[:, :15], part, rtol=0, atol=1e-12)


def test_tokens_before_the_window_of_every_layer_change_nothing():
    checkpoint = golden("olmo_core_swa")
    config = copy.deepcopy(checkpoint.native_config)
    mixer = config["block"]["sequence_mixer"]
    mixer["sliding_window"] |= {"pattern": [4], "force_full_attention_on_last_layer": False}
    layers, ids = config["n_layers"], torch.arange(40)[None]
    far = layers * 3 + 1  # four layers reach three tokens back each
    changed = ids.clone()
    changed[:, : 40 - far] = 7
    tensors = LoadedOnDemand(checkpoint.tensors)
    one, other = (
        list(olmo_core_forward.forward(config, tensors, value, dtype=torch.float64))[-1][1][:, -1]
        for value in (ids, changed)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    changed[:, 40 - far] = 7
    (_, other) = list(olmo_core_forward.forward(config, tensors, changed, dtype=torch.float64))[-1]
    assert (one - other[:, -1]).abs().max() > 1e-6


def test_tokens_before_a_window_of_bakallm_change_nothing():
    checkpoint, ids = golden("baka_pristine"), torch.arange(40)[None]
    changed = ids.clone()
    changed[:, :32] = 7
    one, other = (list(stages(checkpoint, value, torch.float64))[-1][1] for value in (ids, changed))
    torch.testing.assert_close(one[:, 32:], other[:, 32:], rtol=0, atol=1e-12)
    changed[:, 32] = 7
    (_, other) = list(stages(checkpoint, changed, torch.float64))[-1]
    assert (one[:, 39] - other[:, 39]).abs().max() > 1e-6


@pytest.mark.parametrize("turn", [rotate, rotate_pairs])
def test_angles_are_the_native_ones_at_first_and_exact_from_the_given_position_on(turn):
    frequencies, exact_from, length = torch.tensor([1.0, 0.8], dtype=torch.float32), 1024, 16400
    unit = torch.tensor([1.0, 1.0, 0.0, 0.0] if turn is rotate else [1.0, 0.0, 1.0, 0.0]).expand(1, length, 1, 4)
    turned = turn(unit, frequencies, exact_from)[0, :, 0]
    cos, sin = turned.chunk(2, dim=-1) if turn is rotate else (turned[:, 0::2], turned[:, 1::2])
    rounded = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    assert torch.equal(cos[:exact_from], rounded.cos()[:exact_from])
    assert torch.equal(sin[:exact_from], rounded.sin()[:exact_from])
    for position in (exact_from, 8191, 16383):
        for index, frequency in enumerate(frequencies.tolist()):
            assert abs(float(cos[position, index]) - math.cos(position * frequency)) < 1e-7
            assert abs(float(sin[position, index]) - math.sin(position * frequency)) < 1e-7
    assert (cos - rounded.cos()).abs().max() > 1e-4  # what native code rounds


OLMO_REFUSED = {
    "block_type": "llama",
    "activation_type": "gelu",
    "alibi": True,
    "rope": False,
    "embedding_layer_norm": True,
    "layer_norm_type": "amd_compatible",
    "a_new_switch": True,
}


@pytest.mark.parametrize(("field", "value"), OLMO_REFUSED.items(), ids=str)
def test_olmo_field_it_does_not_compute_is_refused(field, value):
    with pytest.raises(CheckpointError, match=field):
        stages(golden("olmo"), torch.zeros(1, 2, dtype=torch.long), **{field: value})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("embed_scale", 8.0),
        ("block_pattern", ["a", "b"]),
        ("block.name", "normalized"),
        ("block.feed_forward_moe", {}),
        ("block.attention_residual_alpha", 0.5),
        ("block.sequence_mixer.gate", {"name": "headwise"}),
        ("block.sequence_mixer.scalable_softmax", True),
        ("block.sequence_mixer.attention_sinks", True),
        ("block.sequence_mixer.name", "fused"),
        ("block.sequence_mixer.rope.name", "complex"),
        ("block.sequence_mixer.rope.partial_rotary_factor", 0.5),
        ("block.sequence_mixer.rope.scaling", {"factor": 2.0}),
        ("block.sequence_mixer.sliding_window", {"pattern": [0], "force_full_attention_on_first_layer": False}),
        ("block.layer_norm.name", "l2_norm"),
        ("block.feed_forward.activation", "relu"),
        ("block_overrides", {"9": {}}),
        ("a_new_switch", True),
    ],
    ids=str,
)
def test_olmo_core_field_it_does_not_compute_is_refused(path, value):
    checkpoint = golden("olmo_core")
    config = copy.deepcopy(checkpoint.native_config)
    *parents, leaf = path.split(".")
    fields = config
    for parent in parents:
        fields = fields[parent]
    fields[leaf] = value
    with pytest.raises(CheckpointError, match=leaf):
        olmo_core_forward.forward(config, LoadedOnDemand(checkpoint.tensors), torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize(
    ("field", "value"), [("act_fn", "mish"), ("model_type", "baka_xl"), ("n_ctx", None), ("n_pauses", 8)], ids=str
)
def test_bakallm_field_it_does_not_compute_is_refused(field, value):
    with pytest.raises(CheckpointError, match=field):
        stages(golden("baka_pristine"), torch.zeros(1, 2, dtype=torch.long), **{field: value})


@pytest.mark.parametrize(("act_fn", "same"), [("swish", "silu"), ("BakaElephant", "elephant")])
def test_activation_under_another_name(act_fn, same):
    ids = torch.arange(8)[None]
    one, other = (list(stages(golden("baka_pristine"), ids, act_fn=name))[-1][1] for name in (act_fn, same))
    assert torch.equal(one, other)


def test_missing_and_misshapen_tensors_are_named():
    checkpoint = golden("olmo")
    ids = torch.zeros(1, 2, dtype=torch.long)
    tensors = dict(LoadedOnDemand(checkpoint.tensors))
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn_out\.weight"):
        list(stages(checkpoint, ids, tensors={k: v for k, v in tensors.items() if "1.attn_out" not in k}))
    with pytest.raises(CheckpointError, match=r"transformer\.ln_f\.weight.*\(64,\).*\(63,\)"):
        list(stages(checkpoint, ids, tensors=tensors | {"transformer.ln_f.weight": torch.ones(63)}))
