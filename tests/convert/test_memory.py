"""Memory that is switched on in converting: its fields, its parameters, and a proof that holds all the same."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from convert.checkpoints import (
    DEMO,
    copy_source,
    edit_json,
    golden,
    load_weights,
    options,
    read_config,
    save_weights,
    snapshot,
    source,
)
from convert.refusal import refuse
from convert.test_bad_input import src  # noqa: F401  a fixture
from convert.test_transformers import IDS, logits, save
from convert.test_verify import refused, report_of
from convert.writers import write_olmo, write_olmo_core
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from olmem import OlmemConfig, OlmemForCausalLM
from olmem.rules_olmem import MEMORY_FIELDS
from olmem_convert import CheckpointError, ConvertOptions, convert, verify
from olmem_convert.cli import app
from olmem_convert.formats.memory import OFF, listed, switched, with_memory
from olmem_convert.options import read_settings
from olmem_convert.proof import verification
from olmem_convert.proof.prompts import prompt
from olmem_convert.publish.model_card import MARK
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

TOKENS = {"num_memory_tokens": 3, "memory_segment_length": 24, "memory_gate_init": -9.5}
RETRIEVAL = {"retrieval_layers": [1], "retrieval_top_k": 4, "retrieval_capacity": 40, "retrieval_gate_init": -3.3}
BOTH = TOKENS | RETRIEVAL
SLIDING = "olmo_core_swa_yarn"
# Every format of a checkpoint; without windows, memory tokens alone.
MEMORIES = {"olmo": TOKENS, "olmo1": TOKENS, "olmo_gqa_tied": TOKENS, SLIDING: BOTH}
MEMORIES |= {"baka_pristine": BOTH | {"retrieval_admission": "learned"}}
GATE, EMBEDDINGS = "model.layers.1.self_attn.retrieval_gate.logits", "model.memory.embeddings"
SCORES = "model.layers.1.self_attn.retrieval_score.weight"
SEGMENTS = verification.SEGMENTS  # of a conversion, where conftest.py does not lessen them


def memory_gates(out: Path) -> set[str]:
    return {
        f"model.layers.{layer}.self_attn.memory_gate.logits" for layer in range(read_config(out)["num_hidden_layers"])
    }


def memory_norm(out: Path) -> set[str]:
    names = {"rms": ["weight"], "layer": ["weight", "bias"], "layer_plain": []}
    return {f"model.memory.norm.{name}" for name in names[read_config(out).get("norm_type", "rms")]}


def parameters_of(memory: dict[str, Any], out: Path) -> set[str]:
    of_tokens = {EMBEDDINGS} | memory_norm(out) | memory_gates(out) if "num_memory_tokens" in memory else set()
    scores = {SCORES} if memory.get("retrieval_admission") == "learned" else set()
    return of_tokens | scores | ({GATE} if "retrieval_layers" in memory else set())


def settings_of(memory: dict[str, Any]) -> list[str]:
    return [word for name, value in memory.items() for word in ("--set", f"{name}={json.dumps(value)}")]


@pytest.fixture(scope="module")
def remembering(tmp_path_factory) -> Path:
    """The sliding checkpoint with both memories on, verified; never changed."""
    out = tmp_path_factory.mktemp("remembering") / "out"
    convert(source(SLIDING), out, ConvertOptions(memory=BOTH))
    return out


@pytest.fixture
def spoilt(remembering, tmp_path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(remembering, tmp_path / "spoilt"))


def set_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Changes weights of the folder, `gate` and `embeddings` for short; None removes one."""
    names = {"gate": GATE, "embeddings": EMBEDDINGS}
    tensors = load_weights(folder) | {names.get(name, name): value for name, value in changes.items()}
    save_weights(folder, {name: value for name, value in tensors.items() if value is not None})


# What OUT holds


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_parameters_are_written_beside_the_same_weights(name, dtype, converted, tmp_path):
    memory, out, kind = MEMORIES[name], tmp_path / "out", getattr(torch, dtype)
    report = convert(source(name), out, ConvertOptions(dtype=dtype, memory=memory, **options(name)))
    weights, plain = load_weights(out), load_weights(converted(name, dtype))
    assert weights.keys() - plain.keys() == parameters_of(memory, out) and plain.keys() <= weights.keys()
    assert all(torch.equal(weights[key], plain[key]) for key in plain)
    assert {weight.dtype for weight in weights.values()} == {kind}
    config = read_config(out)
    drawn = weights[EMBEDDINGS].double()
    assert drawn.shape == (3, config["hidden_size"]) and 0.5 < drawn.std() / config["initializer_range"] < 2
    for norm in memory_norm(out):
        assert torch.equal(weights[norm], torch.full_like(weights[norm], float(norm.endswith("weight"))))
    for gate in memory_gates(out):
        assert torch.equal(weights[gate], torch.full((config["num_attention_heads"],), -9.5).to(kind))
    if GATE in weights:
        assert torch.equal(weights[GATE], torch.full((config["num_attention_heads"],), -3.3).to(kind))
    if SCORES in weights:
        assert torch.equal(weights[SCORES], torch.zeros(config["num_key_value_heads"], config["hidden_size"]).to(kind))
    assert report["parameters"] == sum(weight.numel() for weight in weights.values())
    assert report["bytes"] == report["parameters"] * kind.itemsize
    assert report["memory"] == report["verification"]["memory"]["fields"] == memory


@pytest.mark.parametrize("name", MEMORIES)
def test_config_differs_in_what_was_set_alone(name, converted, tmp_path):
    convert(source(name), tmp_path / "out", ConvertOptions(memory=MEMORIES[name], verify=False, **options(name)))
    config, plain = read_config(tmp_path / "out"), read_config(converted(name))
    assert config == plain | MEMORIES[name]


@pytest.mark.parametrize("name", MEMORIES)
def test_proof_is_that_of_the_model_without_memory(name, converted, tmp_path):
    out = tmp_path / "out"
    convert(source(name), out, ConvertOptions(memory=MEMORIES[name], **options(name)))
    report = json.loads((out / "verification.json").read_text())
    assert report["passed"] is True and report["max_difference"] <= report["tolerance"]
    assert report["config_differences"] == {} and report["weight_differences"] == []
    assert len(report["stages"]) == len(json.loads((converted(name) / "verification.json").read_text())["stages"])
    entry = report["memory"]
    assert entry["fields"] == MEMORIES[name] and entry["compared"] == "with memory off"
    assert set(entry["new_parameters"]) == parameters_of(MEMORIES[name], out)
    assert report["prompt"]["tokens"] > MEMORIES[name]["memory_segment_length"]
    off = AutoModelForCausalLM.from_pretrained(out, **OFF)
    plain = AutoModelForCausalLM.from_pretrained(converted(name))
    ids = prompt(golden(name))
    with torch.no_grad():
        assert torch.equal(off(ids).logits, plain(ids).logits)


def test_checkpoints_of_transformers_gain_a_memory_too(tmp_path):
    original = save(tmp_path / "original", "olmo3", layer_types=["sliding_attention", "full_attention"])
    convert(original, tmp_path / "plain")
    report = convert(
        original, tmp_path / "out", ConvertOptions(memory={"num_memory_tokens": 2, "retrieval_layers": [0]})
    )
    assert report["memory"] == {
        "num_memory_tokens": 2,
        "memory_segment_length": 5,
        "memory_gate_init": -10.0,
        "retrieval_layers": [0],
    }
    assert report["verification"]["max_difference"] == 0.0
    verify(tmp_path / "out", original)
    off = OlmemForCausalLM.from_pretrained(tmp_path / "out", **OFF)
    with torch.no_grad():
        assert torch.equal(off(IDS).logits, logits(original, load="from_olmo"))
    assert load_weights(tmp_path / "out").keys() - load_weights(tmp_path / "plain").keys() == {
        EMBEDDINGS,
        "model.memory.norm.weight",
        "model.layers.0.self_attn.memory_gate.logits",
        "model.layers.0.self_attn.retrieval_gate.logits",
        "model.layers.1.self_attn.memory_gate.logits",
    }


@pytest.mark.parametrize("name", MEMORIES)
def test_a_model_with_a_new_memory_learns_from_the_first_step(name, tmp_path):
    """Memory tokens of zeros had gradients that grew a thousandfold with each norm."""
    convert(source(name), tmp_path / "out", ConvertOptions(memory=MEMORIES[name], verify=False, **options(name)))
    model = OlmemForCausalLM.from_pretrained(tmp_path / "out").train()
    ids = prompt(golden(name))
    model(ids, labels=ids, use_cache=False).loss.backward()
    gradients = {key: weight.grad for key, weight in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    others = max(float(gradient.norm()) for key, gradient in gradients.items() if key != EMBEDDINGS)
    assert 0 < gradients[EMBEDDINGS].norm() < others


def test_new_parameters_are_in_the_index(tmp_path):
    convert(source(SLIDING), tmp_path / "out", ConvertOptions(memory=BOTH, max_shard_size="50KB"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {GATE, EMBEDDINGS} <= index["weight_map"].keys() == load_weights(tmp_path / "out").keys()


@pytest.mark.parametrize("memory", [{}, None, {"num_memory_tokens": 0}, {"retrieval_layers": []}, dict(OFF)], ids=str)
def test_nothing_switched_on_changes_nothing(memory, converted, tmp_path):
    out = tmp_path / converted(SLIDING).name  # which titles the card
    report = convert(source(SLIDING), out, ConvertOptions(memory=memory))
    assert snapshot(out) == snapshot(converted(SLIDING))
    assert report["memory"] is None and "memory" not in report["verification"]


def test_gate_may_be_a_whole_number(tmp_path):
    convert(
        source(SLIDING), tmp_path / "out", ConvertOptions(memory={"retrieval_layers": [1], "retrieval_gate_init": -3})
    )
    assert torch.equal(load_weights(tmp_path / "out")[GATE], torch.full((4,), -3.0))
    assert type(read_config(tmp_path / "out")["retrieval_gate_init"]) is float


@pytest.mark.parametrize("choice", [{}, {"memory_gate_init": None}, {"memory_gate_init": -2}], ids=str)
def test_gates_of_memory_are_those_of_every_other_door(choice, converted, tmp_path):
    """As `from_pretrained` makes them beside the weights of the same folder: −10, or what is said, None for none."""
    tokens = {"num_memory_tokens": 2} | choice
    convert(source(SLIDING), tmp_path / "out", ConvertOptions(memory=tokens))
    written, found = OlmemForCausalLM.from_pretrained(tmp_path / "out"), {}
    loaded = OlmemForCausalLM.from_pretrained(converted(SLIDING), **tokens)
    for name, model in (("written", written), ("loaded", loaded)):
        gates = {key: weight.tolist() for key, weight in model.state_dict().items() if "memory_gate" in key}
        found[name] = (model.config.memory_gate_init, gates)
    assert found["written"] == found["loaded"]
    assert written.config.memory_gate_init == choice.get("memory_gate_init", -10.0)


def test_memory_of_a_folder_that_loads_by_name(remembering):
    model = AutoModelForCausalLM.from_pretrained(remembering)
    assert model.config.has_memory and {name: getattr(model.config, name) for name in BOTH} == BOTH
    state = model.state_dict()
    assert state[EMBEDDINGS].any() and torch.equal(state[GATE], torch.full_like(state[GATE], -3.3))


# What is measured


def with_effect(monkeypatch, factor: float, value: float = 0.0) -> None:
    """Models with memory on give other logits: theirs times the factor, plus the value."""
    forward = OlmemForCausalLM.forward

    def changed(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.config.has_memory:
            output.logits = output.logits * factor + value
        return output

    monkeypatch.setattr(OlmemForCausalLM, "forward", changed)


def effect(out: Path, input_ids: torch.Tensor) -> float:
    """The definition, by loading the folder as a user does, memory on and off."""
    on, off = (AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **fields) for fields in ({}, OFF))
    with torch.no_grad():
        reference = off.eval()(input_ids).logits.double()
        return float((on.eval()(input_ids).logits.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("factor", [1.0, 1.25, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_effect_is_measured_with_memory_on_and_nothing_else_is(factor, dtype, monkeypatch, tmp_path):
    """Whatever a memory does in this version of the model, and when it moves all logits."""
    with_effect(monkeypatch, factor)
    lines: list[str] = []
    report = convert(source(SLIDING), tmp_path / "out", ConvertOptions(dtype=dtype, memory=BOTH), say=lines.append)[
        "verification"
    ]
    moved = report["memory"]["relative_difference_when_on"]
    assert moved == pytest.approx(effect(tmp_path / "out", prompt(golden(SLIDING), 24)), rel=1e-4, abs=1e-7)
    assert factor == 1.0 or moved > 0.1
    assert report["passed"] is True and report["max_difference"] <= report["tolerance"]
    if dtype == "bfloat16":
        assert report["rounding"]["max_difference"] < 0.3  # memory off here too
    written = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert written["memory"]["relative_difference_when_on"] == moved
    assert (
        f"memory: the logits above were compared without {listed(BOTH)}, which change the logits of this prompt by "
        in (lines[-4])
    )
    assert lines[-4].endswith(f" {100 * moved:.3g} %")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_memory_that_gives_no_numbers_is_refused(value, monkeypatch, tmp_path):
    with_effect(monkeypatch, 1.0, value)
    with pytest.raises(CheckpointError, match="logits with memory on must be finite"):
        convert(source(SLIDING), tmp_path / "out", ConvertOptions(memory=BOTH))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "dtype", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("float32", "bfloat16")), "float16"]
)
def test_a_thousand_segments_are_read_in_the_dtype_that_is_written(dtype, monkeypatch, tmp_path):
    read, forward = [], OlmemForCausalLM.forward

    def watched(self, input_ids, **kwargs):
        if self.config.has_memory:
            read.append((self.dtype, self.config.memory_segment_length, input_ids.shape[1]))
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(verification, "SEGMENTS", SEGMENTS)
    monkeypatch.setattr(OlmemForCausalLM, "forward", watched)
    lines: list[str] = []
    source = write_olmo(tmp_path / "source", "model.pt")
    memory = convert(source, tmp_path / "out", ConvertOptions(dtype=dtype, memory=TOKENS), say=lines.append)[
        "verification"
    ]["memory"]
    kind = getattr(torch, dtype)
    assert sum(tokens for of, length, tokens in read if (of, length) == (kind, 1)) == SEGMENTS + 1
    assert (memory["segments"], memory["segments_in"]) == (SEGMENTS, dtype) and SEGMENTS == 1000
    assert lines[-5] == f"read {SEGMENTS:,} segments with memory on, in {dtype}: memory and logits stayed finite"


def test_retrieval_alone_has_no_segments(tmp_path):
    report = convert(source(SLIDING), tmp_path / "out", ConvertOptions(memory=RETRIEVAL))
    assert "segments" not in report["verification"]["memory"]


@pytest.mark.slow
def test_demo_in_float16_stays_finite(monkeypatch, tmp_path):
    """Without a norm on what is written, its memory overflowed after 24 segments."""
    monkeypatch.setattr(verification, "SEGMENTS", 50)
    arguments = ["--dtype", "float16", "--set", "num_memory_tokens=16", "--set", "memory_segment_length=32"]
    result = CliRunner().invoke(app, ["convert", str(DEMO / "step1872"), str(tmp_path / "out"), *arguments])
    assert result.exit_code == 0, result.output
    model = OlmemForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    ids = torch.randint(model.config.vocab_size, (1, 32 * 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(ids, use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_memory_that_overflows_is_refused_with_the_way_out(dtype, tmp_path):
    """In float32, in which all else is compared, and in bfloat16 it does not."""
    original, out = write_olmo(tmp_path / "source", "model.pt"), tmp_path / "out"
    convert(original, out, ConvertOptions(dtype=dtype, memory=TOKENS, verify=False))
    weight = load_weights(out)["model.memory.norm.weight"]
    set_weights(out, **{"model.memory.norm.weight": torch.full_like(weight, 6e4)})
    if dtype == "bfloat16":
        assert verify(out, original)["passed"]
        return
    with pytest.raises(CheckpointError) as caught:
        verify(out, original)
    for words in ("`num_memory_tokens` must", "in float16", "over 8 segments", "`memory` of row 0", "--dtype bfloat16"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value) and report_of(out) is None


def test_logits_that_overflow_are_refused_with_their_segment(monkeypatch, tmp_path):
    forward = OlmemForCausalLM.forward

    def spoilt(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.config.has_memory and self.dtype == torch.float16:
            output.logits[0, 5, 1] = math.inf
        return output

    monkeypatch.setattr(OlmemForCausalLM, "forward", spoilt)
    with pytest.raises(CheckpointError, match=r"got, after 5: logits that are not\); convert with --dtype bfloat16"):
        convert(
            write_olmo(tmp_path / "source", "model.pt"),
            tmp_path / "out",
            ConvertOptions(dtype="float16", memory=TOKENS),
        )
    assert not (tmp_path / "out").exists()


@given(window=st.integers(1, 90), chunk=st.integers(0, 90), segment=st.integers(0, 200))
def test_prompt_leaves_the_window_and_the_segment(window, chunk, segment):
    checkpoint = golden("olmo")
    types = ["sliding_attention", "chunked_attention" if chunk else "full_attention"]
    checkpoint.olmem_config.update(layer_types=types, sliding_window=window, attention_chunk_size=chunk)
    length = prompt(checkpoint, segment).shape[1]
    assert length > max(window, chunk, segment)
    assert not chunk or length % chunk == max(chunk // 2, 1) % chunk


def test_segment_that_no_prompt_can_pass_is_refused(src):  # noqa: F811
    write_olmo_core(src)
    memory = settings_of({"num_memory_tokens": 1, "memory_segment_length": 2**14 + 1})
    refuse(src, "`memory_segment_length` must be at most 16384", "--no-verify", options=tuple(memory))
    result = CliRunner().invoke(app, ["convert", str(src), str(src.parent / "out"), "--no-verify", *memory])
    assert result.exit_code == 0, result.output


# Verified again


def test_verify_is_told_nothing(remembering, spoilt, caplog):
    (spoilt / "verification.json").unlink()
    transformers.logging.set_verbosity_warning()  # as for a user of the library, whom nothing must frighten
    logger = logging.getLogger("transformers")
    logger.propagate = True
    try:
        verify(spoilt, source(SLIDING))
    finally:
        logger.propagate = False
        transformers.logging.set_verbosity_error()
    assert "memory.embeddings" not in caplog.text and "retrieval_gate" not in caplog.text
    assert snapshot(spoilt) == snapshot(remembering)
    lines: list[str] = []
    assert verify(spoilt, source(SLIDING), say=lines.append) == json.loads((spoilt / "verification.json").read_text())
    without = "memory: the logits above were compared without num_memory_tokens=3, memory_segment_length=24, "
    assert lines[-2].startswith(without)


def test_parameters_that_were_trained_pass(spoilt):
    set_weights(spoilt, gate=torch.randn(load_weights(spoilt)[GATE].shape), embeddings=torch.randn(3, 64))
    report = verify(spoilt, source(SLIDING))
    assert report["passed"] and set(report["memory"]["new_parameters"]) == parameters_of(BOTH, spoilt)


@pytest.mark.parametrize("name", ["gate", "embeddings"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_new_parameters_must_be_finite(name, value, spoilt):
    tensor = load_weights(spoilt)[{"gate": GATE, "embeddings": EMBEDDINGS}[name]].clone()
    tensor.view(-1)[-1] = value
    set_weights(spoilt, **{name: tensor})
    refused(spoilt, SLIDING, "must be finite")
    assert report_of(spoilt) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gate": None}, f"1 differ: {GATE}"),
        ({"embeddings": None}, f"1 differ: {EMBEDDINGS}"),
        ({"gate": torch.zeros(1)}, f"1 differ: {GATE}"),
        ({"embeddings": torch.zeros(4, 64)}, f"1 differ: {EMBEDDINGS}"),
        ({"embeddings": torch.zeros(3, 64, dtype=torch.bfloat16)}, f"1 differ: {EMBEDDINGS}"),
        ({"model.layers.0.self_attn.retrieval_gate.logits": torch.zeros(4)}, "1 differ: model.layers.0.self_attn"),
        ({"model.norm.weight": torch.zeros(64)}, "first to diverge"),
    ],
    ids=str,
)
def test_other_weights_are_refused(changes, words, spoilt):
    set_weights(spoilt, **changes)
    refused(spoilt, SLIDING, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_memory_tokens": 4}, f"1 differ: {EMBEDDINGS}"),
        ({"num_memory_tokens": 0}, "6 differ: model.layers.0.self_attn.memory_gate.logits, "),
        ({"retrieval_layers": []}, f"1 differ: {GATE}"),
        ({"retrieval_layers": [0]}, f"2 differ: model.layers.0.self_attn.retrieval_gate.logits, {GATE}"),
        ({"retrieval_layers": [3]}, "must describe a model: `retrieval_layers` must name sliding or chunked"),
        ({"retrieval_layers": [99]}, "must describe a model: `retrieval_layers` must name layers 0 to 3"),
        (dict(OFF), "7 differ: model.layers.0.self_attn.memory_gate.logits, "),
        ({"retrieval_capacity": 3}, "must describe a model: `retrieval_capacity` must be at least"),
        ({"rms_norm_eps": 1e-5}, "`rms_norm_eps` is 1e-05"),
        ({"layer_types": ["sliding_attention"] * 4}, "`layer_types` is "),
    ],
    ids=str,
)
def test_other_configs_are_refused(changes, words, spoilt):
    edit_json(spoilt / "config.json", **changes)
    refused(spoilt, SLIDING, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"retrieval_top_k": 3}, "`retrieval_top_k` is 3"),
        (TOKENS, "6 differ: model.layers.0.self_attn.memory_gate.logits, "),
        ({"retrieval_layers": [1]}, f"1 differ: {GATE}"),
    ],
    ids=str,
)
def test_fields_of_memory_in_a_folder_without_are_refused(changes, words, changeable):
    out = changeable(SLIDING)
    edit_json(out / "config.json", **changes)
    refused(out, SLIDING, words)


def test_report_of_a_failure_is_that_of_any(spoilt):
    tensors = load_weights(spoilt)
    set_weights(spoilt, **{"model.embed_tokens.weight": tensors["model.embed_tokens.weight"] * 1.01})
    with pytest.raises(CheckpointError, match="first to diverge"):
        verify(spoilt, source(SLIDING))
    assert report_of(spoilt)["weight_differences"] == ["model.embed_tokens.weight"]


# The command


def test_command_says_what_is_switched_on(tmp_path):
    arguments = ["--set", "num_memory_tokens=16", "--set", "retrieval_layers=[1]", "--set", "retrieval_device=cpu"]
    command = ["convert", str(DEMO / "step1872"), str(tmp_path / "out"), *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    fields = "num_memory_tokens=16, memory_segment_length=256, memory_gate_init=-10.0, retrieval_layers=[1], "
    fields += 'retrieval_device="cpu"'
    assert "2,559,168 parameters" in lines[0], "those of the checkpoint"
    assert lines[1] == f"memory: {fields}, with {16 * 192 + 192 + 6 + 24:,} new parameters"
    assert lines[4].startswith("verified: logits differ by at most ")
    assert lines[5].startswith("read 8 segments with memory on, in float32: ")
    assert lines[6].startswith(f"memory: the logits above were compared without {fields}, which change")
    config = read_config(tmp_path / "out")
    assert (config["num_memory_tokens"], config["retrieval_layers"], config["retrieval_device"]) == (16, [1], "cpu")
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--against", str(DEMO / "step1872")])
    assert result.exit_code == 0 and result.stdout.splitlines()[:-1] == lines[4:7]


def test_without_verification_it_says_so_too(tmp_path):
    result = CliRunner().invoke(
        app, ["convert", str(source(SLIDING)), str(tmp_path / "out"), "--no-verify", *settings_of(BOTH)]
    )
    assert result.exit_code == 0 and f"memory: {listed(BOTH)}, with " in result.stdout


HOSTILE = {
    # a field that is none of memory, or none at all
    "hidden_size=8": ("`hidden_size` must be a field of memory", "(got 8)", "could then not be verified"),
    "sliding_window=8": ("`sliding_window` must be a field of memory", "choose among num_memory_tokens, "),
    "num_memory_token=8": ("`num_memory_token` must be", "did you mean num_memory_tokens"),
    "retrieval_layer=[1]": ("did you mean retrieval_layers",),
    "Num_Memory_Tokens=8": ("`Num_Memory_Tokens` must be",),
    "x=y": ("`x` must be", "choose among"),
    # no setting, or no JSON
    "num_memory_tokens": ("`--set` must be given FIELD=VALUE (got 'num_memory_tokens')",),
    "=3": ("`--set` must be given FIELD=VALUE",),
    "retrieval_layers=[20": ("`retrieval_layers` must be given as JSON", "(got '[20')", "retrieval_layers=[20]"),
    "retrieval_layers=": ("`retrieval_layers` must be given as JSON",),
    "retrieval_layers=1,2": ("`retrieval_layers` must be given as JSON",),
    "retrieval_layers=[1,]": ("`retrieval_layers` must be given as JSON",),
    "num_memory_tokens= 3 4": ("`num_memory_tokens` must be given as JSON",),
    "num_memory_tokens=" + "9" * 5000: ("`num_memory_tokens` must be given as JSON",),
    "retrieval_layers=" + "[" * 100_000: ("`retrieval_layers` must be",),
    # another type
    "num_memory_tokens=x": ("`num_memory_tokens` must be of type int (got 'x')",),
    "num_memory_tokens=true": ("`num_memory_tokens` must be of type int (got True)",),
    "num_memory_tokens=2.0": ("`num_memory_tokens` must be of type int (got 2.0)",),
    "num_memory_tokens=null": ("`num_memory_tokens` must be of type int (got None)",),
    "num_memory_tokens=[1]": ("`num_memory_tokens` must be of type int",),
    "retrieval_layers=1": ("`retrieval_layers` must be of type list[int]", "(got 1)"),
    "retrieval_layers=[1, true]": ("`retrieval_layers` must be of type list[int]",),
    "retrieval_layers=[1, null]": ("`retrieval_layers` must be of type list[int]",),
    "retrieval_layers=[1.0]": ("`retrieval_layers` must be of type list[int]",),
    'retrieval_layers={"1": 2}': ("`retrieval_layers` must be of type list[int]",),
    "retrieval_layers=ab": ("`retrieval_layers` must be of type list[int]",),
    "retrieval_gate_init=low": ("`retrieval_gate_init` must be of type float | int",),
    "retrieval_device=0": ("`retrieval_device` must be of type str",),
    "sink_logit_init=0.0": ("`sink_logit_init` must be a field of memory to be set (got 0.0), as any other would",),
    # another rule
    "num_memory_tokens=-1": ("`num_memory_tokens` must not be negative (got -1)",),
    "retrieval_layers=[99]": ("`retrieval_layers` must name layers 0 to 3, each once (got [99])",),
    "retrieval_layers=[-1]": ("`retrieval_layers` must name layers 0 to 3",),
    "retrieval_layers=[1,1]": ("`retrieval_layers` must name layers 0 to 3, each once",),
    "retrieval_layers=[3]": ("`retrieval_layers` must name sliding or chunked layers (got [3], of full attention",),
    "retrieval_device=nowhere": ("`retrieval_device` must be a device of torch (got 'nowhere')",),
    "retrieval_gate_init=NaN": ("`retrieval_gate_init` must be finite (got nan)",),
    "retrieval_gate_init=Infinity": ("`retrieval_gate_init` must be",),
    "retrieval_gate_init=1e300": ("`retrieval_gate_init` must be below 2**53",),
    "num_memory_tokens=9007199254740992": ("`num_memory_tokens` must be below 2**53",),
    "num_memory_tokens=9007199254740991": ("`OUT` must be on a disk with room",),
    "memory_segment_length=5": ("`memory_segment_length` must go with a memory that is on (got 5 without one)",),
    "retrieval_top_k=5": ("`retrieval_top_k` must go with a memory that is on",),
}


@pytest.mark.parametrize("setting", HOSTILE, ids=lambda setting: setting[:40])
def test_hostile_settings(setting, tmp_path):
    error = refuse(copy_source(SLIDING, tmp_path / "place" / "source"), *HOSTILE[setting], options=("--set", setting))
    assert len(error.splitlines()) == 1 and len(error) < 600


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (RETRIEVAL | {"retrieval_top_k": 41}, "`retrieval_capacity` must be at least `retrieval_top_k` = 41 (got 40)"),
        (TOKENS | {"memory_segment_length": 0}, "`memory_segment_length` must be at least 1 with memory tokens"),
        (TOKENS | {"memory_bptt_segments": -1}, "`memory_bptt_segments` must not be negative"),
        (RETRIEVAL | {"retrieval_gate_init": 70000}, f"`{GATE}` must be finite as float16"),
    ],
    ids=str,
)
def test_rules_of_several_fields(memory, words, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        convert(source(SLIDING), tmp_path / "out", ConvertOptions(dtype="float16", memory=memory))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (
            RETRIEVAL | {"memory_bptt_segments": 2},
            "`memory_bptt_segments` must be left out where `num_memory_tokens` is 0",
        ),
        (RETRIEVAL | {"memory_gate_init": -2}, "`memory_gate_init` must be left out where `num_memory_tokens` is 0"),
        (TOKENS | {"retrieval_top_k": 5}, "`retrieval_top_k` must be left out where `retrieval_layers` is empty"),
        (TOKENS | {"retrieval_device": "cpu"}, "`retrieval_device` must be left out where `retrieval_layers` is empty"),
    ],
    ids=str,
)
def test_fields_of_a_memory_that_stays_off(memory, words, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        convert(source(SLIDING), tmp_path / "out", ConvertOptions(memory=memory))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_folder_whose_retrieval_was_switched_off_is_verified(tmp_path):
    """Its config.json still has the numbers of the retrieval that it had."""
    out = tmp_path / "out"
    convert(source(SLIDING), out, ConvertOptions(memory=TOKENS, verify=False))
    edit_json(out / "config.json", **{name: value for name, value in RETRIEVAL.items() if name != "retrieval_layers"})
    assert verify(out, source(SLIDING))["passed"]


def test_same_field_twice(src):  # noqa: F811
    write_olmo_core(src)
    twice = ("--set", "num_memory_tokens=1", "--set", "num_memory_tokens=2")
    refuse(src, "`num_memory_tokens` must be set once (got 1 and 2)", options=twice)


def test_set_has_no_meaning_on_the_way_back(converted, tmp_path):
    command = [
        "convert",
        str(converted("olmo")),
        str(tmp_path / "out"),
        "--to",
        "olmo2",
        "--set",
        "num_memory_tokens=1",
    ]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 1 and "`memory` must be left out with `to`" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("memory", "name"), [(TOKENS, "num_memory_tokens"), (RETRIEVAL, "retrieval_layers")])
def test_memory_cannot_go_back_to_transformers(memory, name, tmp_path):
    original = save(tmp_path / "place" / "original", "olmo3", layer_types=["full_attention", "sliding_attention"])
    convert(original, tmp_path / "place" / "olmem", ConvertOptions(memory=memory))
    words = (f"`{name}` must be ", f"(got {memory[name]})", "no OLMo class can")
    refuse(tmp_path / "place" / "olmem", *words, options=("--to", "olmo3"))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.integers(-2, 5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
memories = st.dictionaries(st.sampled_from(MEMORY_FIELDS), values | st.integers(0, 3).map(lambda n: [n]), max_size=3)


@given(memories)
def test_any_json_is_a_memory_or_one_line_that_names_a_field(memory):
    checkpoint = golden(SLIDING)
    try:
        made = with_memory(checkpoint, memory)
    except CheckpointError as error:
        assert "\n" not in str(error) and any(f"`{name}`" in str(error) for name in MEMORY_FIELDS), error
        return
    config = OlmemConfig(**made.olmem_config)
    if not config.has_memory:
        assert made is checkpoint
    assert all(getattr(config, name) == (memory[name] or []) for name in memory if name == "retrieval_layers")
    assert all(value == memory[name] for name, value in switched(made, checkpoint).items() if memory.get(name))


@given(st.dictionaries(st.sampled_from(MEMORY_FIELDS), values))
def test_settings_are_json(settings):
    read = read_settings([f"{name}={json.dumps(value)}" for name, value in settings.items()])
    assert json.dumps(read) == json.dumps(settings)


@given(st.lists(st.text(max_size=30), max_size=3))
def test_any_text_is_settings_or_an_error(texts):
    try:
        assert set(read_settings(texts)) <= {text.partition("=")[0] for text in texts}
    except CheckpointError as error:
        assert len(str(error)) < 400


@pytest.mark.parametrize("word", ["cpu", "cuda", "cuda:0", "mps"])
def test_bare_words_are_strings(word):
    assert read_settings([f"retrieval_device={word}"]) == {"retrieval_device": word}


# The card


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("name", [*MEMORIES, "demo"])
def test_every_conversion_has_a_card_with_its_figures(name, converted):
    text, report = card(converted(name)), report_of(converted(name))
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "text-generation", ["olmem"])
    for words in (f"`{report['source']}`", "weights in float32", f"{report['prompt']['tokens']} random tokens"):
        assert words in text
    for figure in ("max_difference", "mean_difference", "tolerance"):
        assert f"| {report[figure]:.3g} |" in text
    assert MARK in text and "## Memory" not in text and "Not verified" not in text


def test_card_of_rounded_weights_tells_what_rounding_costs(converted):
    folder = converted("olmo", "bfloat16")
    text, rounding = card(folder), report_of(folder)["rounding"]
    assert "weights in bfloat16" in text
    assert f"{rounding['max_difference']:.3g} |" in text and f"{rounding['mean_difference']:.3g} |" in text


def test_card_says_what_memory_is_on(remembering):
    text, entry = card(remembering), report_of(remembering)["memory"]
    for name, value in BOTH.items():
        assert f"- `{name}`: `{json.dumps(value)}`\n" in text
    assert f"`{GATE}`" in text and f"`{EMBEDDINGS}`" in text
    text = " ".join(text.split())
    assert f"read {entry['segments']:,} segments of one token each in float32" in text
    assert f"logits of the same prompt change by {100 * entry['relative_difference_when_on']:.3g} %" in text


def test_card_without_verification_says_so(tmp_path):
    convert(source(SLIDING), tmp_path / "out", ConvertOptions(memory=RETRIEVAL, verify=False))
    text = card(tmp_path / "out")
    assert "Not verified" in text and "largest difference" not in text
    assert {line for line in text.splitlines() if line.startswith("- `")} == {
        f"- `{name}`: `{json.dumps(value)}`" for name, value in RETRIEVAL.items()
    }
    verify(tmp_path / "out", source(SLIDING))
    assert "Not verified" not in card(tmp_path / "out") and "largest difference" in card(tmp_path / "out")


def test_card_of_a_folder_that_fails_vouches_for_nothing(spoilt):
    set_weights(spoilt, **{"model.norm.weight": torch.zeros(64)})
    with pytest.raises(CheckpointError):
        verify(spoilt, source(SLIDING))
    assert "Not verified" in card(spoilt) and "largest difference" not in card(spoilt)


def test_card_of_ones_own_stays(spoilt):
    (spoilt / "README.md").write_text("my own words\n")
    verify(spoilt, source(SLIDING))
    assert card(spoilt) == "my own words\n"
    with pytest.raises(CheckpointError, match=r"holds README\.md"):
        convert(source(SLIDING), spoilt, ConvertOptions(overwrite=True))
    (spoilt / "README.md").unlink()
    convert(source(SLIDING), spoilt, ConvertOptions(overwrite=True))
    assert MARK in card(spoilt)


def test_what_a_checkpoint_says_of_itself_cannot_break_the_card(tmp_path):
    """Its version goes into the description, if it is one."""
    folder = write_olmo_core(tmp_path / "source")
    (folder / ".metadata.json").write_text(json.dumps({"version": "3.0`\n---\n<script>{{ dtype }}</script>\n# x"}))
    convert(folder, tmp_path / "out")
    text = card(tmp_path / "out")
    assert "converted from `OLMo-core`, with" in text and "script" not in text
    assert ModelCard(text).data.to_dict().keys() == {"library_name", "model_name", "pipeline_tag", "tags"}
