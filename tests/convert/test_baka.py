"""BakaLLM's bare state dicts: what they become, where the numbers that they lack come from, and what is refused."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from convert.checkpoints import GOLDEN, copy_source, edit_json, expected, golden, options, read_config, source
from convert.refusal import refuse
from convert.writers import BAKA_CONFIG, baka_state, write_baka, write_olmo
from hypothesis import given
from hypothesis import strategies as st
from olmem import OlmemConfig, OlmemForCausalLM
from olmem.positions_olmem import OlmemRotaryEmbedding
from olmem_convert import CheckpointError, ConvertOptions, VerifyOptions, convert, verify
from olmem_convert.cli import app
from olmem_convert.formats import Key, PairsToHalves, baka
from olmem_convert.formats.detect import open_checkpoint
from olmem_convert.formats.planning import to_native, to_olmem
from olmem_convert.options import Given
from olmem_convert.reading import archives
from olmem_convert.reading.archives import read_pickle
from olmem_convert.reading.tensors import LazyTensor
from transformers import AutoModelForCausalLM, Olmo2Config, modeling_rope_utils
from transformers.models.olmo2.modeling_olmo2 import Olmo2RotaryEmbedding
from typer.testing import CliRunner

BARE = GOLDEN / "baka_elephant"
(BARE_FILE,) = BARE.glob("*.bin")
NAMES = ("baka_pristine", "baka_elephant", "baka_bfloat16")


@pytest.fixture
def src(tmp_path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "source"


# What it becomes


def test_config_says_what_the_native_code_computes(converted):
    config = read_config(converted("baka_pristine"))
    wanted = {
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "hidden_act": "silu",
        "norm_placement": "parallel",
        "norm_type": "layer",
        "rms_norm_eps": 1e-5,
        "qk_norm": "none",
        "layer_types": ["chunked_attention"] * 3,
        "attention_chunk_size": 16,
        "attention_chunk_lookback": 0,
        "rope_parameters": {"chunked_attention": {"rope_type": "default", "rope_theta": 10000.0}},
        "tie_word_embeddings": False,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    assert wanted.items() <= config.items()
    assert read_config(converted("baka_elephant"))["hidden_act"] == "elephant"


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_stream_in_pieces_gives_the_native_logits(name, converted):
    """One cache, pieces that end before, at and behind the ends of windows."""
    input_ids, native = expected(GOLDEN / name)
    model = AutoModelForCausalLM.from_pretrained(converted(name), dtype=torch.float32)
    cache, logits = None, []
    for piece in input_ids.split([1, 11, 1, 7, 4, input_ids.shape[1] - 24], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert (torch.cat(logits, 1) - native).abs().max() <= 1e-5 * max(1.0, native.std())


# The order of rows


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4))
def test_order_of_rows_has_an_inverse(heads, half, columns):
    rows = torch.arange(heads * 2 * half * columns).view(heads * 2 * half, columns)
    order = PairsToHalves(2 * half)
    assert torch.equal(order.to_native(order.to_olmem(rows)), rows)
    assert torch.equal(order.to_olmem(order.to_native(rows)), rows)
    assert torch.equal(order.to_olmem(rows)[:, 0].sort().values, rows[:, 0])
    for head in range(heads):
        for j in range(half):
            moved = order.to_olmem(rows)
            assert torch.equal(moved[head * 2 * half + j], rows[head * 2 * half + 2 * j])
            assert torch.equal(moved[head * 2 * half + half + j], rows[head * 2 * half + 2 * j + 1])


def test_rows_are_read_when_asked():
    reads = []

    def load():
        reads.append(1)
        return torch.arange(8.0)[:, None]

    tensor = LazyTensor.whole((8, 1), torch.float32, load)
    keys = [Key("q", ("q_proj",), order=PairsToHalves(4))]
    made = to_olmem(keys, {"q": tensor}, {"q_proj": (8, 1)})
    assert not reads and made["q_proj"].nbytes == 32
    assert made["q_proj"].load().flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(to_native(keys, {"q_proj": made["q_proj"].load()})["q"], load())


# Frequencies


def of_theta(theta: float, half: int = 8) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, 2 * half, 2).float() / (2 * half))


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000.0, 2000.0, 12345.0])
@pytest.mark.parametrize("half", [2, 8, 32, 64])
def test_theta_that_gives_the_frequencies_is_all_that_is_written(theta, half):
    stored = tuple(of_theta(theta, half).double().tolist())
    assert baka.rope_parameters(stored) == {"rope_type": "default", "rope_theta": theta}


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("theta", [10000.0, 2000.0])
def test_rounded_frequencies_are_written_beside_their_theta(kind, theta):
    stored = of_theta(theta, 32).to(kind).double().tolist()
    wanted = {"rope_type": "default", "rope_theta": theta, "inverse_frequencies": stored}
    assert baka.rope_parameters(tuple(stored)) == wanted


def test_a_single_frequency_is_that_of_any_theta():
    assert baka.rope_parameters((1.0,)) == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("name", NAMES)
def test_model_turns_by_the_stored_frequencies(name, converted):
    """To the bit, through JSON."""
    stored = golden(name).tensors["model.layers.0.attn.rot.freqs"].load()
    rotary = OlmemForCausalLM.from_pretrained(converted(name)).model.rotary_emb
    assert torch.equal(rotary.chunked_attention_inv_freq, stored.float())
    written = read_config(converted(name))["rope_parameters"]["chunked_attention"]
    assert ("inverse_frequencies" in written) == (name == "baka_bfloat16")


def test_loading_stored_frequencies_warns_of_nothing(converted, monkeypatch):
    said = []
    monkeypatch.setattr(modeling_rope_utils.logger, "warning", said.append)
    config = OlmemConfig.from_pretrained(converted("baka_bfloat16"))
    assert config.rope_parameters["chunked_attention"]["inverse_frequencies"] and said == []


def test_frequencies_computed_here_are_those_of_the_model():
    """And those of Transformers' own."""
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 1, "vocab_size": 8}
    rope = {"rope_type": "default", "rope_theta": 12345.0}
    config = OlmemConfig(**sizes, rope_parameters=rope, layer_types="full_attention")
    theirs = Olmo2RotaryEmbedding(Olmo2Config(**sizes, rope_parameters=rope)).inv_freq
    assert torch.equal(OlmemRotaryEmbedding(config).full_attention_inv_freq, theirs)
    assert torch.equal(baka.inverse_frequencies(12345.0, 64), theirs)


def test_frequencies_stay_as_they_are_when_weights_are_rounded(tmp_path):
    report = convert(source("baka_pristine"), tmp_path / "out", ConvertOptions(dtype="bfloat16"))
    assert report["verification"]["passed"]
    assert "inverse_frequencies" not in read_config(tmp_path / "out")["rope_parameters"]["chunked_attention"]


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0, NAN], "fall from 1"),
        ([NAN, 0.01], "fall from 1"),
        ([0.5, 0.01], "fall from 1"),
        ([1.0, 2.0], "fall from 1"),
        ([1.0, 1.0], "fall from 1"),
        ([1.0, 0.0], "fall from 1"),
        ([1.0, -0.01], "fall from 1"),
        ([1.0, 0.1, 0.05], "q.weight"),
        ([1.0, 0.9, 0.1, 0.05], "theta"),
        ([], "dimensions"),
        ([[1.0, 0.01]], "dimensions"),
    ],
    ids=str,
)
def test_frequencies_that_are_none(values, words, src):
    state = baka_state()
    for layer in (0, 1):
        state[f"model.layers.{layer}.attn.rot.freqs"] = torch.tensor(values)
    write_baka(src, state, n_heads=...)
    refuse(src, "rot.freqs", words)


@pytest.mark.parametrize("values", [[1.0, 0.02], [1.0, NAN], [1.0]])
def test_frequencies_that_differ_between_layers(values, src):
    write_baka(src, baka_state() | {"model.layers.1.attn.rot.freqs": torch.tensor(values)})
    refuse(src, "`model.layers.1.attn.rot.freqs` must be that of the layers before it")


def test_frequencies_that_are_integers(src):
    write_baka(src, baka_state() | {"model.layers.0.attn.rot.freqs": torch.tensor([1, 0])})
    refuse(src, "`model.layers.0.attn.rot.freqs` must be floating-point")


# Which file, and what it does not say


def test_window_and_activation_as_options(tmp_path):
    given_by_hand = ("--n-ctx", "12", "--act-fn", "elephant")
    for number, path in enumerate((BARE, BARE_FILE)):
        out = tmp_path / str(number)
        result = CliRunner().invoke(app, ["convert", str(path), str(out), *given_by_hand])
        assert result.exit_code == 0, result.output
        assert "2 layers, in chunks of 12, 3 heads, trained length 12" in result.stdout
        assert "003_baka_xl" in result.stdout and "--max-length" in result.stdout
        result = CliRunner().invoke(app, ["verify", str(out), "--against", str(path), *given_by_hand])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "0/config.json").read_bytes() == (tmp_path / "1/config.json").read_bytes()
    assert (tmp_path / "0/model.safetensors").read_bytes() == (tmp_path / "1/model.safetensors").read_bytes()


def test_window_and_activation_of_a_config_file_elsewhere(converted, tmp_path):
    config = tmp_path / "elephant.json"
    config.write_text(json.dumps(options("baka_elephant") | {"model_type": "baka_elephant"}))
    out, file = tmp_path / "out", ("--native-config", str(config))
    result = CliRunner().invoke(app, ["convert", str(BARE_FILE), str(out), *file, "--max-length", "48"])
    assert result.exit_code == 0 and "note: " not in result.stdout
    assert read_config(out) == read_config(converted("baka_elephant")) | {"max_position_embeddings": 48}
    assert CliRunner().invoke(app, ["verify", str(out), "--against", str(BARE), *file]).exit_code == 0


def test_config_beside_and_one_option(tmp_path):
    folder = write_baka(tmp_path / "source", act_fn=...)
    assert convert(folder, tmp_path / "out", ConvertOptions(act_fn="relu"))["verification"]["passed"]
    config = read_config(tmp_path / "out")
    assert (config["attention_chunk_size"], config["hidden_act"]) == (5, "relu")


def test_option_that_repeats_the_config(tmp_path):
    folder = write_baka(tmp_path / "source")
    assert open_checkpoint(folder, given=Given(n_ctx=5, act_fn="silu")).olmem_config["attention_chunk_size"] == 5


def test_native_config_takes_the_place_of_the_one_beside(tmp_path):
    folder = write_baka(tmp_path / "source")
    (tmp_path / "other.json").write_text('{"n_ctx": 3, "act_fn": "elephant"}')
    config = open_checkpoint(folder, given=Given(native_config=tmp_path / "other.json")).olmem_config
    assert (config["attention_chunk_size"], config["hidden_act"]) == (3, "elephant")


@pytest.mark.parametrize(
    ("given_by_hand", "words"),
    [
        ((), ("`n_ctx` and `act_fn` must be given", "no config.json", "--n-ctx N_CTX --act-fn ACT_FN")),
        (("--n-ctx", "12"), ("`act_fn` must be given", "add --act-fn ACT_FN as trained")),
        (("--act-fn", "elephant"), ("`n_ctx` must be given", "add --n-ctx N_CTX as trained", "--native-config FILE")),
        (("--n-ctx", "12", "--act-fn", "mish"), ("`act_fn` of the options must be", "'elephant'", "mish")),
        (("--native-config", "nowhere.json"), ("`nowhere.json` must exist",)),
    ],
)
def test_numbers_that_nobody_gives(given_by_hand, words, src):
    src.mkdir()
    shutil.copy(BARE_FILE, src)
    refuse(src, *words, options=given_by_hand)
    refuse(src / BARE_FILE.name, *words, out=src.parent / "out", options=given_by_hand)


def test_verify_needs_them_too(changeable):
    result = CliRunner().invoke(app, ["verify", str(changeable("baka_elephant")), "--against", str(BARE)])
    assert result.exit_code == 1 and "`n_ctx` and `act_fn` must be given" in result.stderr


@pytest.mark.parametrize("wrong", [{"n_ctx": 11}, {"n_ctx": 13}, {"act_fn": "silu"}])
def test_verify_with_other_numbers_fails(wrong, changeable):
    with pytest.raises(CheckpointError, match="native logits"):
        verify(changeable("baka_elephant"), BARE, VerifyOptions(**options("baka_elephant") | wrong))


def test_no_verify_repeats_the_options(tmp_path):
    lines = []
    convert(BARE, tmp_path / "out", ConvertOptions(verify=False, **options("baka_elephant")), say=lines.append)
    assert any(f"--against {BARE} --n-ctx 12 --act-fn elephant`" in line for line in lines)


@pytest.mark.parametrize("config", [{}, {"n_ctx": 5}, {"act_fn": "silu"}])
def test_config_that_says_too_little(config, src):
    write_baka(src)
    (src / "config.json").write_text(json.dumps(config))
    refuse(src, "must be given", "nor does config.json")


@pytest.mark.parametrize("given_by_hand", [("--n-ctx", "6"), ("--act-fn", "elephant")])
def test_option_that_contradicts_the_config(given_by_hand, src):
    write_baka(src)
    refuse(src, "must be one value", given_by_hand[1], "config.json", options=given_by_hand)


@pytest.mark.parametrize("given_by_hand", [("--n-ctx", "6"), ("--act-fn", "silu"), ("--native-config", "x.json")])
def test_options_of_bakallm_for_another_format(given_by_hand, src):
    write_olmo(src, "model.pt")
    refuse(src, f"`{' '.join(given_by_hand)}` must be left out for OLMo", options=given_by_hand)


@pytest.mark.parametrize("n_ctx", [0, -1])
def test_window_of_no_tokens(n_ctx, src):
    write_baka(src, n_ctx=n_ctx)
    refuse(src, "`n_ctx` must be at least 1", str(n_ctx))


def test_files_beside_the_state_dict_are_none(tmp_path):
    folder = write_baka(tmp_path / "source")
    (state_dict,) = folder.glob("*.bin")
    for suffix in (".opt", ".a1b2c3"):
        shutil.copy(state_dict, folder / f"{state_dict.name}{suffix}")
    torch.save({"lr": torch.ones(1)}, folder / "training_args.bin")
    (folder / "log.bin").write_bytes(b"not a pickle")
    assert convert(folder, tmp_path / "out")["verification"]["passed"]
    assert convert(folder / f"{state_dict.name}.a1b2c3", tmp_path / "again")["verification"]["passed"]


def test_several_state_dicts(src):
    write_baka(src, name="baka_x_1_2.e.a1b2c3.bin")
    write_baka(src)
    refuse(src, "baka_x_1_2.bin, baka_x_1_2.e.a1b2c3.bin", "name the file")
    convert(src / "baka_x_1_2.bin", src.parent / "out")


def test_names_under_torch_compile(tmp_path):
    state = {name.replace(".mlp.", ".mlp._orig_mod."): value for name, value in baka_state().items()}
    assert convert(write_baka(tmp_path / "source", state), tmp_path / "out")["verification"]["passed"]
    plain = open_checkpoint(write_baka(tmp_path / "plain"))
    assert set(open_checkpoint(tmp_path / "source").tensors) == set(plain.tensors)


def test_name_with_and_without_the_wrapper(src):
    state = baka_state()
    write_baka(src, state | {"_orig_mod.vocab_in.weight": state["vocab_in.weight"]})
    refuse(src, "_orig_mod.")


# The config against the weights


@pytest.mark.parametrize("field", ["dim_model", "dim_ff", "dim_attn", "n_layers", "n_heads", "n_vocab"])
def test_config_that_the_weights_contradict(field, src):
    write_baka(src, **{field: BAKA_CONFIG[field] + 1})
    refuse(src, f"`{field}` of config.json must be {BAKA_CONFIG[field]}", f"got {BAKA_CONFIG[field] + 1}")


@pytest.mark.parametrize("field", ["dim_model", "dim_ff", "dim_attn", "n_layers", "n_heads", "n_vocab"])
@pytest.mark.parametrize("value", [None, ...])
def test_size_that_the_config_leaves_out(field, value, tmp_path):
    whole = open_checkpoint(write_baka(tmp_path / "whole"))
    assert open_checkpoint(write_baka(tmp_path / "part", **{field: value})).olmem_config == whole.olmem_config


def test_zero_is_what_native_code_makes_of_it(tmp_path):
    state = baka_state()
    for layer in (0, 1):
        mlp = f"model.layers.{layer}.mlp.fc_"
        state |= {f"{mlp}gate.weight": torch.ones(32, 8), f"{mlp}up.weight": torch.ones(32, 8)}
        state[f"{mlp}down.weight"] = torch.ones(8, 32)
    folder = write_baka(tmp_path / "whole", state, dim_ff=0, dim_attn=0)
    assert open_checkpoint(folder).olmem_config["intermediate_size"] == 32
    with pytest.raises(CheckpointError, match=r"`dim_ff` of config\.json must be 12"):
        open_checkpoint(write_baka(tmp_path / "part", dim_ff=0))


@pytest.mark.parametrize("model_type", [..., None, "baka", "baka_pristine", "baka_elephant", *baka.BRANCHES])
def test_model_type_of_these_branches(model_type, tmp_path):
    checkpoint = open_checkpoint(write_baka(tmp_path, model_type=model_type))
    assert any("003_baka_xl" in note for note in checkpoint.notes) == (model_type in (..., None, "baka"))


@pytest.mark.parametrize("model_type", ["baka_xl", "baka_pause", "baka_rmt", "003_baka_xl", "olmo2", 3, ["baka"]])
def test_model_type_of_others(model_type, src):
    write_baka(src, model_type=model_type)
    refuse(src, "`model_type` of config.json must be", str(model_type))


@pytest.mark.parametrize("act_fn", ["elephant18_fast", "mish", "", 3, ["silu"]])
def test_activation_of_others(act_fn, src):
    write_baka(src, act_fn=act_fn)
    refuse(src, "`act_fn` of config.json must be", "'elephant'")


@pytest.mark.parametrize(("act_fn", "wanted"), baka.ACTIVATIONS.items())
def test_activation_is_carried(act_fn, wanted, tmp_path):
    report = convert(write_baka(tmp_path / "source", act_fn=act_fn), tmp_path / "out")
    assert report["verification"]["passed"] and read_config(tmp_path / "out")["hidden_act"] == wanted


@pytest.mark.parametrize("field", ["n_pauses", "n_rmt_tokens", "dim_modell"])
def test_field_of_another_block(field, src):
    write_baka(src, **{field: 8})
    refuse(src, f"`{field}` of config.json must be a field this version knows")


def test_misspelled_option_of_the_config_gets_a_hint(src):
    write_baka(src, n_ctx=..., n_ctxx=5)
    refuse(src, "did you mean 'n_ctx'")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["x", 2.5, -1, [], {}, True, 1e300])
def test_any_number_of_the_config_that_is_none(name, value, tmp_path):
    folder = copy_source(name, tmp_path / "source")
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps(options(name)))
    for field in baka.CONFIG:
        before = (folder / "config.json").read_text()
        edit_json(folder / "config.json", **{field: value})
        with pytest.raises(CheckpointError, match=f"`{field}`"):
            open_checkpoint(folder)
        (folder / "config.json").write_text(before)


# State dicts of other models


@pytest.mark.parametrize(
    ("extra", "branch"),
    [
        ("model.pause.pause_emb", "004_pause"),
        ("model.rmt.rmt_tokens", "005_rmt"),
        ("model.layers.0.mamba.A_log", "007_mamba"),
        ("model.layers.0.norm_mamba.weight", "unexpectedly"),
        ("model.layers.0.attn.qkv_prep._orig_mod.q.weight", "008_mamba88d"),
    ],
)
def test_part_of_a_later_branch(extra, branch, src):
    write_baka(src, baka_state() | {extra: torch.ones(8)})
    refuse(src, extra.replace("_orig_mod.", ""), branch)


def test_whole_layout_of_the_last_branch(src):
    state = {
        name.replace("attn.", "attn.qkv_prep._orig_mod.") if "attn.o." not in name else name: value
        for name, value in baka_state().items()
    }
    write_baka(src, state)
    refuse(src, "008_mamba88d")


def test_norms_without_biases(src):
    write_baka(src, {name: value for name, value in baka_state().items() if not name.endswith("bias")})
    refuse(src, "norm_out.bias", "004_pause")


def test_layers_of_different_widths(src):
    """As 006_fanout has them, were there no memory to tell it by."""
    write_baka(src, baka_state() | {"model.layers.1.attn.q.weight": torch.ones(16, 8)})
    refuse(src, "`model.layers.1.attn.q.weight` must")


def test_queries_wider_than_the_model(src):
    """Native heads then have values of another width."""
    state = baka_state()
    for name in ("model.layers.0.attn.q.weight", "model.layers.0.attn.k.weight"):
        state[name] = torch.ones(16, 8)
    write_baka(src, state, dim_attn=16, n_heads=4)
    refuse(src, "`dim_attn` must equal `dim_model` = 8 (got 16")


@pytest.mark.parametrize("lost", baka_state(1))
def test_lost_tensor_is_named(lost, src):
    write_baka(src, {name: value for name, value in baka_state().items() if name != lost})
    refuse(src, lost if lost != "norm_out.bias" else "004_pause")


def test_layer_number_beyond_all_others(src):
    state = baka_state()
    write_baka(src, state | {"model.layers.99999999.norm_in.weight": torch.ones(8)}, n_layers=...)
    refuse(src, "lacks")


def test_state_dict_of_another_model(src):
    write_baka(src, {"a.weight": torch.ones(2), "b.weight": torch.ones(2)})
    (src / "config.json").unlink()
    refuse(src, "baka_x_1_2.bin holds other weights, a.weight, b.weight")
    refuse(src / "baka_x_1_2.bin", "holds other weights, a.weight", out=src.parent / "out")


def test_file_of_another_kind(src):
    write_olmo(src, "model.pt")
    refuse(src / "model.pt", "`SRC` must be", "is a file of another kind", out=src.parent / "out")
    refuse(src / "config.yaml", "is a file of another kind", out=src.parent / "out")


def test_what_is_no_file(src):
    """Nobody waits for a pipe to say something."""
    os.mkfifo(src)
    refuse(src, "`SRC` must be", out=src.parent / "out")
    src.unlink()
    src.mkdir()
    os.mkfifo(src / "baka.bin")
    refuse(src, "it holds baka.bin")


# Hostile files


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(as_file, zipped, src, tmp_path):
    src.mkdir()
    state = baka_state() | {"model.layers.0.extra": Payload(tmp_path / "ran")}
    torch.save(state, src / "baka.bin", _use_new_zipfile_serialization=zipped)
    refuse(src / "baka.bin" if as_file else src, "baka.bin", out=src.parent / "out")
    assert not (tmp_path / "ran").exists()


def test_pickle_without_a_zip_is_an_error_that_says_so(src):
    src.mkdir()
    torch.save(baka_state(), src / "baka.bin", _use_new_zipfile_serialization=False)
    refuse(src, "baka.bin", "zip archive")


@pytest.mark.parametrize("record", ["x/data.pkl", "data.txt"])
def test_archive_that_only_claims_to_be_one(record, src):
    src.mkdir()
    with zipfile.ZipFile(src / "baka.bin", "w") as archive:
        archive.writestr(record, pickle.dumps({"vocab_in.weight": 1}))
    refuse(src, "baka.bin")


def test_flipped_bit_is_seen(src):
    write_baka(src)
    (path,) = src.glob("*.bin")
    data = bytearray(path.read_bytes())
    data[data.index(baka_state()["vocab_in.weight"].numpy().tobytes()) + 1] ^= 1
    path.write_bytes(data)
    refuse(src, path.name)


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_weights_that_are_no_numbers(value, src):
    state = baka_state()
    state["model.layers.1.attn.q.weight"][3, 4] = value
    write_baka(src, state)
    refuse(src, "q_proj.weight", "finite")


def test_nothing_is_unpickled_to_recognise_a_file(monkeypatch):
    monkeypatch.setattr(archives, "unpickle", None)
    assert baka.recognise(BARE_FILE) == baka.recognise(BARE) == "BakaLLM"
    with pytest.raises(CheckpointError):
        read_pickle(BARE_FILE)
