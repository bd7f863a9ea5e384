"""Whatever is wrong, the user gets one line that names it, exit code 1, and nothing on the disk but what was there."""

import json
import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from convert.checkpoints import DEMO, copy_source, edit_json, edit_model, snapshot, source
from convert.processes import command
from convert.refusal import refuse
from convert.writers import olmo_core_state, olmo_state, write_baka, write_olmo, write_olmo_core
from hypothesis import given, settings
from hypothesis import strategies as st
from olmem_convert import CheckpointError, ConvertOptions, convert
from olmem_convert.cli import app
from olmem_convert.formats.detect import open_checkpoint
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

LAYOUTS = ("model.pt", "model.safetensors", "model/metadata.json", "model_and_optim/.metadata")


@pytest.fixture
def src(tmp_path) -> Path:
    """A place for a bad checkpoint, in a folder of its own, as it is looked at before and after."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "source"


# What is no checkpoint


def test_nothing_there(src):
    refuse(src, "does not exist", str(src))


def test_file_for_a_folder(src):
    src.write_text("")
    refuse(src, "is a file")


def test_empty_folder(src):
    src.mkdir()
    refuse(src, "holds nothing")


def test_folder_of_steps(src):
    for step in ("step10", "step20"):
        copy_source("olmo_core", src / step)
    refuse(src, "step10, step20", str(src / "step20"))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("model.safetensors", "cut short, damaged"),
        ("pytorch_model.bin", "must be a zip archive"),
        ("model-00001-of-00002.safetensors", "no weights (model.safetensors, model.safetensors.index.json"),
    ],
)
def test_transformers_folder(weights, words, src):
    """The rest is in test_transformers.py."""
    src.mkdir()
    (src / "config.json").write_text('{"model_type": "olmo2"}')
    (src / weights).write_bytes(b"")
    refuse(src, words)


def test_folder_that_was_converted(converted, src):
    shutil.copytree(converted("olmo"), src)
    refuse(src, "converted already", "--to olmo, olmo2, olmo3")


def test_bare_state_dict_of_transformers(src):
    src.mkdir()
    (src / "pytorch_model.bin").write_bytes(b"")
    refuse(src, "holds pytorch_model.bin")


@pytest.mark.parametrize(("kind", "file"), [("torch_legacy", "rank0.pt"), ("local", "model/rank0.pt")])
def test_shards_that_only_code_can_read(kind, file, src):
    shutil.copytree(source("olmo"), src, ignore=shutil.ignore_patterns("model.pt"))
    (src / file).parent.mkdir(exist_ok=True)
    torch.save({"model": {}}, src / file)
    refuse(src, f"`{kind}` shards", f"scripts/unshard.py --model-only --type {kind} {src}")


@pytest.mark.parametrize(
    ("name", "lost"), [("olmo", "model.pt"), ("olmo_core", "model_and_optim"), ("olmo_sharded_core", "model")]
)
def test_config_without_weights(name, lost, src):
    copy_source(name, src)
    shutil.rmtree(src / lost) if (src / lost).is_dir() else (src / lost).unlink()
    refuse(src, "copy")


@pytest.mark.parametrize(("name", "config"), [("olmo", "config.yaml"), ("olmo_core", "config.json")])
def test_weights_without_config(name, config, src):
    copy_source(name, src)
    (src / config).unlink()
    refuse(src, config)


def test_two_checkpoints_in_one_folder(src):
    copy_source("olmo", src)
    shutil.copytree(source("olmo_core"), src, dirs_exist_ok=True)
    refuse(src, "one checkpoint", "OLMo-core")


# Damage


FILES = [
    ("olmo", "model.pt"),
    ("olmo", "config.yaml"),
    ("olmo_safetensors", "model.safetensors"),
    ("legacy_sharded_olmo_core_2rank", "model/rank_0.safetensors"),
    ("legacy_sharded_olmo_core_2rank", "model/rank_1.safetensors"),
    ("legacy_sharded_olmo_core_2rank", "model/metadata.json"),
    ("legacy_sharded_torch_new_2rank", "model_and_optim/__1_0.distcp"),
    ("core300_fsdp2_4rank_empty", "model_and_optim/__2_3.distcp"),
    ("core300_fsdp2_4rank_empty", "model_and_optim/.metadata"),
    ("core300_fsdp2_4rank_empty", "config.json"),
    ("core300_save_state_dict", ".metadata"),
    ("baka_pristine", "baka_tiny.bin"),
    ("baka_pristine", "config.json"),
]
# Where what is missing would be read: not the optimizer's part of a chunk file, nor a last newline.
READ = {"model_and_optim/__1_0.distcp": 0.4, "config.yaml": 0.9}
CASES = [(*file, share) for file in FILES for share in (0, 0.01, 0.3, 0.8, 0.999) if share < READ.get(file[1], 1)]


@pytest.mark.parametrize(("name", "file", "share"), CASES)
def test_truncated_file(name, file, share, src):
    copy_source(name, src)
    data = (src / file).read_bytes()
    (src / file).write_bytes(data[: min(int(len(data) * share), len(data.rstrip()) - 1)])
    refuse(src, "config.yaml" if file.endswith("yaml") else Path(file).name)


@pytest.mark.parametrize(("name", "file"), [case for case in FILES if "config" not in case[1]])
def test_lost_file(name, file, src):
    copy_source(name, src)
    (src / file).unlink()
    refuse(src)


@pytest.mark.parametrize(("name", "file"), FILES)
def test_file_of_other_bytes(name, file, src):
    copy_source(name, src)
    (src / file).write_bytes(bytes(range(256)) * 20)
    refuse(src, Path(file).name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(
            ("olmo", text)
            for text in (
                "",
                "[]",
                "model: [",
                "model: 5",
                "model: {}",
                "model: [1]",
                "a: b",
                "\t",
                "!!python/object:os.x {}",
            )
        ),
        *(
            ("olmo_core", text)
            for text in ("", "[]", "{", "null", '{"model": 5}', '{"model": {}}', '{"model": []}', "{}")
        ),
    ],
)
def test_spoilt_config(name, text, src):
    copy_source(name, src)
    config = "config.yaml" if name == "olmo" else "config.json"
    (src / config).write_text(text)
    refuse(src, "config")


def test_code_in_yaml_does_not_run(src, tmp_path):
    copy_source("olmo", src)
    (src / "config.yaml").write_text(f"model: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]")
    refuse(src, "config.yaml")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["legacy_sharded_olmo_core_2rank", "core300_fsdp2_4rank_empty", "core300_save_state_dict"]
)
def test_stray_shard(name, src):
    copy_source(name, src)
    first = sorted([*src.rglob("rank_0.safetensors"), *src.rglob("__0_0.distcp")])[0]
    stray = first.with_name(first.name.replace("_0.", "_77."))
    shutil.copy(first, stray)
    refuse(src, stray.name, "mixed")


@pytest.mark.parametrize(
    ("one", "other", "file"),
    [
        ("olmo_core_swa_fsdp2", "core300_fsdp2_4rank_empty", "model_and_optim/__1_0.distcp"),
        ("core300_pi", "core300_12layers", "model_and_optim/__0_1.distcp"),
        ("olmo_core_swa", "olmo_core_swa_yarn", "model_and_optim/.metadata"),
        ("legacy_sharded_olmo_core_2rank", "olmo_sharded_core", "model/rank_0.safetensors"),
        ("legacy_sharded_olmo_core_2rank", "olmo_sharded_core", "model/metadata.json"),
    ],
)
def test_shards_of_two_checkpoints(one, other, file, src):
    copy_source(one, src)
    shutil.copy(source(other) / file, src / file)
    refuse(src, "checkpoint")


@pytest.mark.parametrize(
    ("one", "other", "config"),
    [
        ("olmo", "olmo1", "config.yaml"),
        ("olmo1", "olmo", "config.yaml"),
        ("olmo", "olmo_gqa_tied", "config.yaml"),
        ("olmo_gqa_tied", "olmo", "config.yaml"),
        ("legacy_mqa", "legacy_clip_gqa", "config.yaml"),
        ("olmo_core", "olmo_core_tied", "config.json"),
        ("olmo_core", "core300_12layers", "config.json"),
        ("core300_12layers", "core300_peri_norm", "config.json"),
        ("olmo_core_swa_yarn", "olmo_core_swa", "config.json"),
        ("core300_pi", "core300_prenorm_headqk", "config.json"),
        ("baka_bfloat16", "baka_pristine", "config.json"),
    ],
)
def test_config_of_another_checkpoint(one, other, config, src):
    copy_source(one, src)
    shutil.copy(source(other) / config, src / config)
    refuse(src)


# Weights


@pytest.mark.parametrize("layout", [*LAYOUTS, "OLMo-core"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("verify", ["--verify", "--no-verify"])
def test_weights_that_are_no_numbers(layout, value, verify, src):
    state = olmo_core_state() if layout == "OLMo-core" else olmo_state()
    name = "blocks.0.feed_forward.w2.weight" if layout == "OLMo-core" else "transformer.blocks.0.ff_out.weight"
    state[name][3, 4] = value
    write_olmo_core(src, state) if layout == "OLMo-core" else write_olmo(src, layout, state)
    refuse(src, "down_proj.weight", "finite", options=(verify,))


def test_weights_beyond_float16(src):
    state = olmo_state()
    state["transformer.ff_out.weight"][0, 0] = 1e6
    write_olmo(src, "model.pt", state)
    refuse(src, "lm_head.weight", "--dtype bfloat16", options=("--dtype", "float16"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_weights_that_are_integers(layout, dtype, src):
    state = {name: value.to(dtype) for name, value in olmo_state().items()}
    write_olmo(src, layout, state)
    refuse(src)


def test_one_weight_of_another_dtype(src):
    state = olmo_state()
    state["transformer.ln_f.weight"] = state["transformer.ln_f.weight"].bfloat16()
    write_olmo(src, "model.pt", state)
    refuse(src, "--dtype")


def test_double_weights_need_a_dtype(src):
    write_olmo(src, "model.pt", {name: value.double() for name, value in olmo_state().items()})
    refuse(src, "--dtype")
    convert(src, src.parent / "out", ConvertOptions(dtype="float32"))


def test_head_that_is_tied_and_another(src):
    write_olmo_core(src, tie_word_embeddings=True)
    refuse(src, "lm_head.w_out.weight", "embeddings.weight")


# Tokenizer


def test_tokenizer_of_a_larger_vocabulary(src):
    write_olmo(src, "model.pt")
    refuse(src, "vocab_size", "--tokenizer", options=("--tokenizer", str(DEMO)))


def test_tokenizer_whose_end_is_no_special_token(src):
    shutil.copytree(DEMO / "step1872", src)
    experiment = json.loads((src / "config.json").read_text())
    experiment["dataset"]["tokenizer"]["eos_token_id"] = 100
    (src / "config.json").write_text(json.dumps(experiment))
    refuse(src, "eos_token_id", "--tokenizer", options=("--tokenizer", str(DEMO)))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": {}}', "\xff"])
def test_spoilt_tokenizer_beside_the_checkpoint(text, src):
    write_olmo(src, "model.pt")
    (src / "tokenizer.json").write_text(text, encoding="latin-1")
    refuse(src, "tokenizer.json")


def test_tokenizer_that_is_not_there(src):
    write_olmo(src, "model.pt")
    refuse(src, "nowhere", "tokenizer", options=("--tokenizer", "nowhere"))


# OUT


@pytest.mark.parametrize(
    "make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")], ids=["folder", "file", "link"]
)
def test_out_that_exists(make, src):
    write_olmo(src, "model.pt")
    make(src.parent / "out")
    refuse(src, "`OUT`", "must not exist")


@pytest.mark.parametrize("inside", ["", "out", "a/b/out", "../source/out"])
def test_out_inside_the_source(inside, src):
    write_olmo(src, "model.pt")
    refuse(src, "`OUT`", "SRC", out=src / inside)
    refuse(src, "`OUT`", "SRC", out=src / inside, options=("--overwrite",))


def test_source_inside_the_folder_that_would_be_overwritten(changeable):
    """The native checkpoint was removed with the folder that it lay in."""
    out = changeable("olmo1")
    native = copy_source("olmo", out / "native")
    before = snapshot(native)
    CliRunner().invoke(app, ["convert", str(native), str(out), "--overwrite"])
    assert native.is_dir() and snapshot(native) == before


@pytest.mark.parametrize("inside", ["", "deep/er/"])
def test_parent_of_out_is_a_file(inside, src):
    write_olmo(src, "model.pt")
    (src.parent / "file").touch()
    refuse(src, "OUT", out=src.parent / "file" / f"{inside}out")


def test_parent_of_out_takes_no_folder(src, monkeypatch):
    def read_only(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    write_olmo(src, "model.pt")
    monkeypatch.setattr(Path, "mkdir", read_only)
    refuse(src, "OUT", "Permission denied", out=src.parent / "not" / "out")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc, where nobody can make a folder")
def test_parent_of_out_takes_no_folder_in_earnest(src):
    write_olmo(src, "model.pt")
    result = CliRunner().invoke(app, ["convert", str(src), "/proc/olmem/out"])
    assert result.exit_code == 1 and result.stderr.startswith("error: `OUT` must be writable")


@pytest.mark.parametrize(
    "content", [{"notes.txt": "mine"}, {"config.json": '{"model_type": "olmo2"}'}, {"config.json": "{"}]
)
def test_overwriting_a_folder_that_is_not_ours(content, src):
    write_olmo(src, "model.pt")
    out = src.parent / "out"
    out.mkdir()
    for name, text in content.items():
        (out / name).write_text(text)
    refuse(src, "`OUT`", str(src.parent / "out"), options=("--overwrite",))


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")], ids=["file", "link"])
def test_overwriting_what_is_no_folder(make, src):
    write_olmo(src, "model.pt")
    make(src.parent / "out")
    refuse(src, "`OUT`", str(src.parent / "out"), options=("--overwrite",))


def test_overwriting_through_a_link(src, converted):
    write_olmo(src, "model.pt")
    (src.parent / "out").symlink_to(converted("olmo1"))
    refuse(src, "`OUT`", str(src.parent / "out"), options=("--overwrite",))


@pytest.mark.parametrize("mine", ["README.md", ".git/config", "notes/model.safetensors"])
def test_overwriting_what_a_user_put_beside_the_model(mine, src, converted):
    write_olmo(src, "model.pt")
    path = Path(shutil.copytree(converted("olmo1"), src.parent / "out"), mine)
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    refuse(src, Path(mine).parts[0], options=("--overwrite",))


def test_overwriting_the_folder_one_is_in(src, converted, monkeypatch):
    write_olmo(src, "model.pt")
    monkeypatch.chdir(shutil.copytree(converted("olmo1"), src.parent / "out"))
    refuse(src, "folder you are in", options=("--overwrite",))


def nan(folder):
    state = olmo_state()
    state["transformer.ln_f.weight"][0] = float("nan")
    write_olmo(folder, "model.pt", state)


def truncated(folder):
    write_olmo(folder, "model.pt")
    (folder / "model.pt").write_bytes((folder / "model.pt").read_bytes()[:2000])


def unsupported(folder):
    write_olmo(folder, "model.pt", alibi=True)


@pytest.mark.parametrize("spoil", [nan, truncated, unsupported])
def test_failed_overwrite_leaves_the_old_folder(spoil, src, converted):
    shutil.copytree(converted("olmo1"), src.parent / "out")
    spoil(src)
    refuse(src, options=("--overwrite",))


def test_failed_conversion_removes_the_parents_it_made(src):
    nan(src)
    refuse(src, out=src.parent / "a" / "b" / "out")


# The disk


def test_disk_without_room(src, monkeypatch):
    write_olmo(src, "model.pt")
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    refuse(src, "room for", "100 free")


@pytest.mark.parametrize("limit", [0, 2_000, 20_000, 300_000])
def test_disk_that_fills_up(limit, src):
    """A file that cannot grow past a limit stands for it: the same OSError out of the same writes."""
    copy_source("olmo", src)

    def fill_up() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    exit_code, _, errors = command("convert", src, src.parent / "out", prepare=fill_up).end()
    assert exit_code == 1 and "Traceback" not in errors, errors
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == errors.splitlines()
    assert "free space" in errors
    assert os.listdir(src.parent) == ["source"]


# Options


@pytest.mark.parametrize("dtype", ["float8", "int8", "double", "", "bf8"])
def test_dtype_that_is_none(dtype, src):
    write_olmo(src, "model.pt")
    refuse(src, "dtype", "bfloat16", options=("--dtype", dtype))


@pytest.mark.parametrize("size", ["5XB", "", "much", "GB", "-1GB", "0", "0MB"])
def test_shard_size_that_is_none(size, src):
    write_olmo(src, "model.pt")
    refuse(src, "max_shard_size", options=("--max-shard-size", size))


def test_missing_length(src):
    write_olmo_core(src)
    edit_json(src / "config.json", train_module={})
    refuse(src, "--max-length")
    convert(src, src.parent / "out", ConvertOptions(max_length=16))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("olmo", "n_heads", 3),
        ("olmo", "n_heads", 0),
        ("olmo", "n_kv_heads", 3),
        ("olmo", "d_model", 0),
        ("olmo", "n_layers", -1),
        ("olmo", "layer_norm_eps", -1.0),
        ("olmo", "clip_qkv", -1.0),
        ("olmo", "rope_theta", 0),
        ("olmo", "eos_token_id", 100_000),
        ("olmo_core", "block.sequence_mixer.n_heads", 3),
        ("olmo_core", "block.sequence_mixer.n_kv_heads", 3),
        ("olmo_core", "block.sequence_mixer.head_dim", 15),
        ("olmo_core", "block.sequence_mixer.clip_qkv", "x"),
        ("olmo_core", "block.layer_norm.eps", "x"),
        ("olmo_core", "d_model", "64"),
        ("olmo_core", "d_model", ...),
        ("olmo_core", "n_layers", "x"),
        ("olmo_core", "vocab_size", 2.5),
        ("olmo_core", "block_overrides", [1]),
    ],
)
def test_config_of_no_model(name, field, value, src):
    copy_source(name, src)
    edit_model(src, **{field: value})
    refuse(src)


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": {"tokenizer": "x"}},
        {"dataset": {"tokenizer": {"vocab_size": "x"}}},
        {"dataset": {"tokenizer": {"eos_token_id": "x"}}},
        {"train_module": {"max_sequence_length": "x"}},
        {"train_module": {"max_sequence_length": -5}},
        {"train_module": {"max_sequence_length": 2.5}},
    ],
)
def test_experiment_of_other_things(changes, src):
    write_olmo_core(src)
    edit_json(src / "config.json", **changes)
    refuse(src)


def test_contradiction_in_the_config_is_named(src):
    """Native OLMo refuses it too."""
    write_olmo(src, "model.pt", multi_query_attention=True, n_kv_heads=2)
    refuse(src, "n_kv_heads", options=("--no-verify",))


# Any damage at all


def write_any(folder: Path, layout: str) -> None:
    if layout == "BakaLLM":
        write_baka(folder)
    else:
        write_olmo_core(folder) if layout == "OLMo-core" else write_olmo(folder, layout)


CONTAINERS = [
    ("model.pt", "model.pt"),
    ("model.pt", "config.yaml"),
    ("model.safetensors", "model.safetensors"),
    ("model/metadata.json", "model/metadata.json"),
    ("model/metadata.json", "model/rank_1.safetensors"),
    ("model_and_optim/.metadata", "model_and_optim/.metadata"),
    ("model_and_optim/.metadata", "model_and_optim/__0_0.distcp"),
    ("OLMo-core", "config.json"),
    ("BakaLLM", "baka_x_1_2.bin"),
    ("BakaLLM", "config.json"),
]
DAMAGE = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "insert", "drop"]), st.floats(0, 1), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


def damaged(data: bytes, damage: list[tuple[str, float, int]]) -> bytes:
    for kind, where, value in damage:
        at = min(int(where * len(data)), max(len(data) - 1, 0))
        if kind == "cut":
            data = data[:at]
        else:
            data = data[:at] + (b"" if kind == "drop" else bytes([value])) + data[at + (kind != "insert") :]
    return data


@pytest.mark.parametrize(("layout", "file"), CONTAINERS)
@settings(max_examples=60)
@given(damage=DAMAGE)
def test_any_damage_converts_or_is_refused(layout, file, damage):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "source"
        write_any(folder, layout)
        (folder / file).write_bytes(damaged((folder / file).read_bytes(), damage))
        try:
            convert(folder, Path(name) / "out", ConvertOptions(verify=False))
        except CheckpointError as error:
            assert str(error)
            assert os.listdir(name) == ["source"]
        else:
            assert sorted(os.listdir(name)) == ["out", "source"]


@pytest.mark.parametrize(("layout", "file"), [case for case in CONTAINERS if "config" not in case[1]])
def test_every_flipped_bit_of_the_front_converts_or_is_refused(layout, file):
    """Headers, where a bit has most to say; a flip among the values themselves no format can show."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_any(folder, layout)
        data = (folder / file).read_bytes()
        for position in range(0, min(len(data), 640), 5):
            (folder / file).write_bytes(
                damaged(data, [("set", position / len(data), data[position] ^ 1 << position % 8)])
            )
            try:
                for tensor in open_checkpoint(folder).tensors.values():
                    tensor.load()
            except CheckpointError:
                continue


def test_flipped_bit_in_a_state_dict_is_seen(src):
    """A zip archive has checksums: where the format can show damage, it is shown."""
    write_olmo(src, "model.pt")
    data = bytearray((src / "model.pt").read_bytes())
    at = data.index(olmo_state()["transformer.wte.weight"].numpy().tobytes())
    data[at + 1] ^= 1
    (src / "model.pt").write_bytes(data)
    refuse(src, "model.pt")


def test_flipped_bit_in_a_chunk_is_seen(src):
    write_olmo_core(src)
    path = src / "model_and_optim" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    at = data.index(olmo_core_state()["embeddings.weight"].numpy().tobytes())
    data[at + 1] ^= 1
    path.write_bytes(data)
    refuse(src, "__0_0.distcp")


def test_rank_file_of_another_shape(src):
    write_olmo(src, "model/metadata.json")
    tensors = load_file(src / "model" / "rank_1.safetensors")
    tensors["transformer.ln_f.weight"] = torch.ones(3)
    save_file(tensors, src / "model" / "rank_1.safetensors")
    refuse(src, "rank_1.safetensors", "transformer.ln_f.weight")
