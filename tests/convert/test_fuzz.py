"""No checkpoint, however hostile, does more than be refused; what benchmarks/fuzz.py found stays found."""

import base64
import json
import os
import pickle
import runpy
import shutil
import struct
import sys
import tempfile
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from convert.checkpoints import ROOT, edit_json, edit_model
from convert.fuzzing.bytes import ByteRandom
from convert.fuzzing.mutations import SECRET, Odd, make, write
from convert.fuzzing.pickles import CALLS, CANARY, called
from convert.fuzzing.seeds import OTHERS, READERS, Files, saved, seeds
from convert.fuzzing.states import change, model_of
from convert.fuzzing.target import Escape, Place, standing_in
from convert.processes import Forked
from hypothesis import given, settings
from hypothesis import strategies as st
from olmem import OlmemCache, cache_file_olmem
from olmem.cache_file_olmem import checksum
from olmem_convert import CheckpointError, ConvertOptions, convert
from olmem_convert.errors import LONGEST
from olmem_convert.formats import check_layers
from olmem_convert.formats.detect import open_checkpoint
from olmem_convert.reading import archives as archives_module
from olmem_convert.reading import pickles as pickles_module
from olmem_convert.reading.archives import pickle_mentions, read_pickle
from olmem_convert.reading.fields import MOST_LAYERS
from olmem_convert.reading.tensors import LazyTensor
from olmem_convert.reading.texts import DEEPEST, LARGEST_TEXT, LARGEST_TOKENIZER, LARGEST_YAML, read_yaml
from olmem_convert.reading.weight_files import read_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=12)
@given(rng=st.randoms(use_true_random=True))
def test_a_mutated_checkpoint_is_read_or_refused(reader, rng):
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name) / "place")
        with standing_in(place.folder):
            place.lay(reader, make(rng, reader))
            outcome = place.attempt(reader, rng, whole=rng.random() < 0.1)
    assert outcome == "accepted" or outcome.startswith("refused: ")


@pytest.mark.parametrize("reader", READERS)
def test_what_the_mutations_start_from_is_accepted(reader, tmp_path):
    for number, seed in enumerate(seeds(reader)):
        place = Place(tmp_path / str(number))
        for attempt in range(20 if reader == "olmem" else 1):  # which goes back to the class that it came from
            place.lay(reader, dict(seed))
            outcome = place.attempt(reader, Random(attempt), whole=True)
            place.clear()
            if outcome == "accepted":
                break
        assert outcome == "accepted"


@pytest.mark.parametrize("call", [call for call in CALLS if call[0] in ("os", "builtins", "subprocess")][:5])
def test_a_canary_that_runs_is_seen(call, tmp_path):
    """Read by pickle itself, here alone."""
    place = Place(tmp_path / "place")
    place.lay("olmo_pickle", {})
    module, name, arguments = call
    with standing_in(place.folder):
        value = pickle.loads(b"\x80\x02" + called(module, name, *arguments) + b".")
        if hasattr(value, "wait"):
            value.wait()
        assert os.listdir() == [CANARY]
        with pytest.raises(Escape, match=CANARY):
            place.check([], refused=True)


def test_bytes_steer_the_mutations():
    assert make(ByteRandom(b""), "olmo_core") == make(ByteRandom(b""), "olmo_core")
    made = {str(make(ByteRandom(Random(number).randbytes(200)), "olmo_core")) for number in range(9)}
    assert len(made) > 5


@pytest.mark.slow
def test_the_benchmark_tells_what_it_found():
    def run() -> None:
        sys.argv = ["fuzz.py", "--cases", "20", "--processes", "1", "--json"]
        runpy.run_path(str(ROOT / "benchmarks" / "fuzz.py"), run_name="__main__")

    exit_code, output, errors = Forked(run).end()
    assert exit_code == 0, errors[-3000:]
    rows = json.loads(output)["readers"].values()
    assert sum(row["cases"] for row in rows) == sum(row["accepted"] + row["refused"] for row in rows) == 20


@pytest.mark.parametrize("broken", ["{", "[" * 100_000])
def test_a_state_that_is_changed_twice_is_made(broken):
    """The second change met counters that the first had removed, or facts that it had broken."""
    for number in range(60):
        change(Random(number), {"keys": torch.ones(2, 3)}, {"architecture": broken})


@pytest.mark.parametrize("reader", OTHERS)
def test_states_and_a_lying_hub(reader, tmp_path):
    """A few of the benchmark's cases, the first of which lets pass what is genuine."""
    place = Place(tmp_path / "place")
    with standing_in(place.folder):
        for number in range(6):
            rng = Random(number)
            place.lay(reader, make(rng, reader) if number else dict(seeds(reader)[0]))
            outcome = place.attempt(reader, rng, whole=False)
            assert outcome == "accepted" or outcome.startswith("refused: ")
            place.clear()


# What was found


def lay(folder: Path, reader: str, seed: int = 0, **changes: Any) -> Path:
    write(folder, dict(seeds(reader)[seed]) | changes)
    return folder


def refusal(source: Path, out: Path | None = None, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(source, out or source.parent / "out", ConvertOptions(verify=False, **options))
    assert sorted(os.listdir(source.parent)) in (["source"], ["elsewhere", "source"])
    return str(caught.value)


EVERY_FILE = [
    (reader, name) for reader in READERS if reader not in ("tokenizer", "olmem") for name in sorted(seeds(reader)[0])
]


@pytest.mark.parametrize(("reader", "name"), EVERY_FILE)
@pytest.mark.parametrize("odd", [Odd("pipe"), Odd("folder"), Odd("link", "/dev/zero"), Odd("link", "/etc/passwd")])
def test_what_is_no_file_of_the_checkpoint_is_not_read(reader, name, odd, tmp_path):
    """A pipe was waited for, a device read until memory ran out, and a link followed wherever it led."""
    source = lay(tmp_path / "source", reader, **{name: odd})
    if name == "generation_config.json" and odd.target != "/etc/passwd":
        convert(source, tmp_path / "out", ConvertOptions(verify=False))
    else:
        refusal(source)


COPIED = ["generation_config.json", "special_tokens_map.json", "tokenizer_config.json", "vocab.json", "merges.txt"]


@pytest.mark.parametrize("name", [*COPIED, "config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_link_out_of_the_folder_carries_nothing_along(name, tmp_path):
    """It did: the token of a user, in a file that the tokenizer's were copied with, went to OUT, and to the Hub."""
    source = lay(tmp_path / "source", "transformers", 1)
    (tmp_path / "elsewhere").mkdir()
    kept = tmp_path / "elsewhere" / name
    kept.write_bytes(SECRET if name in COPIED else (source / name).read_bytes())
    (source / name).unlink()
    (source / name).symlink_to(f"../elsewhere/{name}")
    message = refusal(source)
    assert name in message and "cp -rL" in message


def test_a_link_out_of_the_olmem_folder_carries_nothing_back(tmp_path):
    source = lay(tmp_path / "source", "olmem")
    (tmp_path / "secret.json").write_bytes(SECRET)
    (source / "generation_config.json").unlink()
    (source / "generation_config.json").symlink_to("../secret.json")
    with pytest.raises(CheckpointError, match="must not be a link out of its folder"):
        convert(source, tmp_path / "out", ConvertOptions(to="olmo2", verify=False))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reader", [reader for reader in READERS if reader not in ("tokenizer", "olmem")])
def test_a_hub_cache_is_made_of_links_that_are_followed(reader, shared, tmp_path):
    """To the repository's `blobs`, and from there, in huggingface_hub 2, to those that the whole cache shares."""
    for number, seed in enumerate(seeds(reader)):
        repository = tmp_path / str(number) / "models--org--name"
        snapshot = cached(repository, seed, shared)
        checkpoint = open_checkpoint(snapshot)
        for tensor in checkpoint.tensors.values():
            tensor.load()
        convert(snapshot, tmp_path / str(number) / "out", ConvertOptions(verify=False))


def cached(repository: Path, files: Files, shared: bool) -> Path:
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    for number, (name, data) in enumerate(files.items()):
        digest = f"{number:064x}"
        blob, path = repository / "blobs" / digest, snapshot / name
        for folder in (blob.parent, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        if shared:
            kept = repository.parent / "blobs" / digest[:2] / digest
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(data)
            blob.symlink_to(os.path.relpath(kept, blob.parent))
        else:
            blob.write_bytes(data)
        path.symlink_to(os.path.relpath(blob, path.parent))
    return snapshot


def test_blobs_that_are_a_link_themselves_are_none(tmp_path):
    snapshot = cached(tmp_path / "models--org--name", seeds("transformers")[0], shared=False)
    blobs = tmp_path / "models--org--name" / "blobs"
    shutil.move(blobs, tmp_path / "home")
    blobs.symlink_to("../home")
    with pytest.raises(CheckpointError, match="must not be a link out of its folder"):
        convert(snapshot, tmp_path / "out")


def test_links_inside_the_folder_are_followed(tmp_path):
    source = lay(tmp_path / "source", "transformers", 1)
    (source / "config.json").rename(source / "config-1.json")
    (source / "config.json").symlink_to("config-1.json")
    convert(source, tmp_path / "out", ConvertOptions(verify=False))


@pytest.mark.parametrize(("reader", "folder"), [("olmo_core", "model_and_optim"), ("olmo_flat_shards", "model")])
def test_a_folder_of_weights_that_is_a_link_out_is_refused(reader, folder, tmp_path):
    source = lay(tmp_path / "source", reader)
    shutil.move(source / folder, tmp_path / "elsewhere")
    (source / folder).symlink_to("../elsewhere")
    assert folder in refusal(source)


@pytest.mark.parametrize("depth", [DEEPEST + 1, 900, 100_000])
def test_nested_json(depth, tmp_path):
    """900 deep it could be read, and what walked it afterwards ended in RecursionError."""
    text = '{"model_type": "olmo2", "x": ' + "[" * depth + "]" * depth + "}"
    source = lay(tmp_path / "source", "transformers", 1, **{"config.json": text.encode()})
    assert "config.json" in refusal(source)


@pytest.mark.parametrize("text", ["model: " + "[" * 100_000, "model: " + "[" * 900 + "]" * 900])
def test_nested_yaml(text, tmp_path):
    """Some releases of libyaml refuse the deepest themselves."""
    said = refusal(lay(tmp_path / "source", "olmo_pickle", **{"config.yaml": text.encode()}))
    assert "config.yaml" in said and ("nested deeper" in said or "maximum nesting depth" in said)


@pytest.mark.parametrize(
    "text",
    [
        "model: {d_model: 8, n_heads: 2, d_model: 16}",  # the last one would hold
        "model: {" + "<<: {}, " * 40_000 + "}",  # the square of that many
        "model: {" + ", ".join(f"{n}: 0" for n in range(100)) + "}",  # can be made of one hash
        "model: {[a, b]: 0}",
        "model: [" + "[]," * 60_000 + "]",
    ],
    ids=["twice", "merges", "numbers", "lists", "parts"],
)
def test_mappings_and_lists_of_yaml_that_no_config_has(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"a key twice|a key that is no word|at most 100,000 parts"):
        read_yaml(tmp_path / "config.yaml")


@pytest.mark.parametrize("number", ["1" + ":59" * 300_000, "1" + ":59" * 300_000 + ".5", "1" * 10**6, "1" * 101])
def test_long_numbers_of_yaml(number, tmp_path):
    """To the base of 60, which takes the square of the time."""
    (tmp_path / "config.yaml").write_text(f"model: {{d_model: {number}}}")
    with pytest.raises(CheckpointError, match=r"no number of more than 100 signs"):
        read_yaml(tmp_path / "config.yaml")


def test_aliases_of_yaml(tmp_path):
    """Nine lines stand for 10⁹ values, which whatever prints one of them counts."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(CheckpointError, match=r"must hold no alias \(got \*a0\)"):
        read_yaml(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "name", ["x" * 5000, "\ud800", "a\0b", "../model.safetensors", "/etc/passwd", "", ".", 5, None]
)
def test_shard_of_an_impossible_name(name, tmp_path):
    """One of 5,000 characters was an OSError."""
    source = lay(tmp_path / "source", "transformers", 1)
    edit_json(source / "model.safetensors.index.json", weight_map={"model.norm.weight": name})
    refusal(source)


@pytest.mark.parametrize("architectures", ["Olmo2ForCausalLM", 5, {"x": 1}, True])
def test_architectures_that_are_no_list(architectures, tmp_path):
    """A text was taken for a list of letters."""
    source = lay(tmp_path / "source", "transformers", 1)
    edit_json(source / "config.json", architectures=architectures)
    assert "`architectures` of config.json must be a list of names" in refusal(source)


def test_weights_that_are_not_read_are_told_of(tmp_path):
    source = lay(tmp_path / "source", "transformers", 1, **{"pytorch_model.bin": b"x"})
    notes = convert(source, tmp_path / "out", ConvertOptions(verify=False))["notes"]
    assert any("pytorch_model.bin is there too, and not read" in note for note in notes)


@pytest.mark.parametrize(
    ("reader", "seed", "name", "nbytes"),
    [
        ("olmo_pickle", 0, "config.yaml", LARGEST_YAML),
        ("olmo_core", 0, "config.json", LARGEST_TEXT),
        ("transformers", 1, "model.safetensors.index.json", LARGEST_TEXT),
        ("transformers", 1, "merges.txt", LARGEST_TEXT),
        ("transformers", 1, "tokenizer_config.json", LARGEST_TEXT),
        ("transformers", 1, "tokenizer.json", LARGEST_TOKENIZER),
        ("olmo_core", 0, "model_and_optim/.metadata", pickles_module.LARGEST_PICKLE),
    ],
)
def test_a_file_of_a_size_that_none_has(reader, seed, name, nbytes, tmp_path):
    source = lay(tmp_path / "source", reader, seed, **{name: Odd("long", str(nbytes + 1))})
    message = refusal(source)
    assert name in message and f"at most {nbytes:,} bytes" in message


def test_more_layers_than_any_model_has():
    """A name for each of 100,000 layers took 40 seconds, in which a model of so many was made."""
    tensors = dict.fromkeys(map(str, range(2 * MOST_LAYERS)), LazyTensor((), torch.float32, lambda *_: torch.zeros(())))
    check_layers(MOST_LAYERS, tensors)
    with pytest.raises(CheckpointError, match=r"`n_layers` must be at most 1024 \(got 1025\)"):
        check_layers(MOST_LAYERS + 1, tensors)


@pytest.mark.parametrize("value", [None, 0, -1, 10**6, "x", [1], True])
@pytest.mark.parametrize("reader", ["transformers", "olmem"])
def test_layers_that_are_no_number(reader, value, tmp_path):
    """None of an Olmem folder was compared with numbers."""
    source = lay(tmp_path / "source", reader, 0)
    edit_json(source / "config.json", num_hidden_layers=value)
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        convert(source, tmp_path / "out", ConvertOptions(to="olmo2")) if reader == "olmem" else convert(
            source, tmp_path / "out"
        )


def test_more_tensors_than_any_model_has(tmp_path, monkeypatch):
    monkeypatch.setattr(archives_module, "MOST_TENSORS", 3)
    (tmp_path / "model.pt").write_bytes(seeds("olmo_pickle")[0]["model.pt"])
    with pytest.raises(CheckpointError, match=r"at most 3 tensors \(got 11\)"):
        read_pickle(tmp_path / "model.pt")


def test_more_dimensions_than_any_tensor_has(tmp_path):
    """Of 100,000, whose strides are compared with the product of all sizes behind."""
    (tmp_path / "model.pt").write_bytes(saved({"x": torch.zeros((1,) * 64)}))
    assert len(read_pickle(tmp_path / "model.pt")["x"].shape) == 64
    records = {}
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        for record in archive.infolist():
            records[record.filename] = archive.read(record)
    name = next(name for name in records if name.endswith("data.pkl"))
    assert records[name].count(b"K\x01" * 64) == 2
    records[name] = records[name].replace(b"K\x01" * 64, b"K\x01" * 65)
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="more than 64 dimensions"):
        read_pickle(tmp_path / "model.pt")


def test_a_packed_pickle_is_not_unpacked_to_be_recognised(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"vocab_in.weight" + bytes(2**20))
    assert not pickle_mentions(tmp_path / "x.bin", "vocab_in.weight")


def doubling(count: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"normalizer": {"type": "Sequence", "normalizers": [step] * count}}


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
END = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (doubling(60), "lengthen a text"),  # of one letter past any memory
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 9).decode()}},
            "as long as it says",  # 4 GiB were allocated for nine bytes, or the process ended
        ),
        ({"post_processor": {"type": "TemplateProcessing", "single": [END] * 100_000}}, "rules of at most"),
        ({"post_processor": {"type": "TemplateProcessing", "single": [TEXT] * 2000}}, "lengthen a text"),
        ({"added_tokens": [{"id": n, "content": f"t{n}"} | PLAIN for n in range(20_000)]}, "added tokens"),
        ({"added_tokens": [{"id": n, "content": f"{n}" * 100} | PLAIN for n in range(9000)]}, "added tokens of at"),
        ({"added_tokens": [{"id": 0, "content": "x" * 5000} | PLAIN]}, "4,096"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [END] * 100,
                    "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [0] * 100, "tokens": ["<|end|>"] * 100}},
                }
            },
            "add at most 1,024 ids",
        ),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 100}}, "before a text"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"Regex": "a"}}] * 17}},
            "regular",
        ),
        ({"model": {"type": "BPE", "vocab": {"x" * 5000: 0}, "merges": []}}, "4,096"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "PanicException"),
        ({"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(a+)+$Z"}}}, "retry-limit"),
    ],
    ids=[
        *("growth", "charsmap", "template", "repeated", "added", "long added", "long added one", "template ids"),
        *("prepend", "regexes", "long word", "panic", "regex"),
    ],
)
def test_tokenizer_that_has_no_end(changes, words, tmp_path):
    source = lay(tmp_path / "source", "transformers", 1)
    edit_json(source / "tokenizer.json", **changes)
    assert words in refusal(source)


def test_half_of_a_sign_in_a_tokenizer_s_config(tmp_path):
    source = lay(tmp_path / "source", "transformers", 1)
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]}, note="\ud800")
    assert "must be text in UTF-8" in refusal(source)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("file", "changes", "field"),
    [
        ("config.json", {"rms_norm_eps": INF}, "rms_norm_eps"),
        ("config.json", {"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ("config.json", {"rms_norm_eps": 1e300}, "rms_norm_eps"),
        ("config.json", {"initializer_range": NAN}, "initializer_range"),
        ("config.json", {"made_by": {"numbers": [1, NAN]}}, "made_by.numbers.1"),
        ("config.json", {"max_position_embeddings": 2**60}, "max_position_embeddings"),
        ("config.json", {"rope_parameters": {"rope_theta": 0, "rope_type": "default"}}, "rope_theta"),
        ("config.json", {"rope_parameters": {"rope_theta": INF, "rope_type": "default"}}, "rope_theta"),
        ("config.json", {"rope_parameters": None, "rope_theta": 0}, "rope_theta"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template"),
        ("tokenizer_config.json", {"chat_template": [{"name": 1, "template": "x"}]}, "chat_template"),
        ("tokenizer_config.json", {"model_max_length": NAN}, "model_max_length"),
        ("tokenizer_config.json", {"model_max_length": -1}, "model_max_length"),
        ("tokenizer_config.json", {"anything": INF}, "anything"),
        ("special_tokens_map.json", {"anything": INF}, "anything"),
        ("generation_config.json", {"temperature": NAN}, "temperature"),
    ],
)
def test_number_that_means_nothing(file, changes, field, tmp_path):
    """All of these converted."""
    source = lay(tmp_path / "source", "transformers", 1)
    edit_json(source / file, **changes)
    message = refusal(source)
    assert field in message and "must be" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rms_norm_eps", INF),
        ("initializer_range", -0.5),
        ("max_position_embeddings", 2**60),
        ("made_by", [NAN]),
        ("olmo_config", {"x": NAN}),
    ],
)
def test_number_that_means_nothing_on_the_way_back(field, value, tmp_path):
    source = lay(tmp_path / "source", "olmem")
    edit_json(source / "config.json", **{field: value})
    with pytest.raises(CheckpointError, match=f"`{field}.* must"):
        convert(source, tmp_path / "out", ConvertOptions(to="olmo2"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("attention_factor", value) for value in (-1.0, 0, True)),
        *(("beta_fast", value) for value in (0, [])),
        ("beta_slow", -1),
        *(("mscale", value) for value in (-1, "x", [])),
        *(("truncate", value) for value in (0, "x", [])),
    ],
)
def test_yarn_that_means_nothing(name, value, tmp_path):
    source = lay(tmp_path / "source", "transformers", 2)
    rope = json.loads((source / "config.json").read_text())["rope_parameters"]
    rope["full_attention"][name] = value
    edit_json(source / "config.json", rope_parameters=rope)
    assert f"['{name}']` must be" in refusal(source)


@pytest.mark.parametrize("reader", ["olmo_pickle", "olmo_core"])
def test_number_that_means_nothing_in_a_native_config(reader, tmp_path):
    source = lay(tmp_path / "source", reader)
    edit_model(source, init_std=NAN)
    assert "`model.init_std` of config" in refusal(source)


def test_infinity_beside_the_model_is_nobodys_business(tmp_path):
    source = lay(tmp_path / "source", "olmo_core")
    edit_json(source / "config.json", trainer={"max_grad_norm": INF})
    convert(source, tmp_path / "out", ConvertOptions(verify=False))


def test_rope_that_is_wrong_beside_another_length(tmp_path):
    """The class's own error came out, as the config was made before the place that expects it."""
    source = lay(tmp_path / "source", "transformers", 1)
    edit_json(source / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 9.0, "cls": 1})
    assert "'cls'" in refusal(source, max_length=16)


def test_an_error_repeats_little_of_what_it_found(tmp_path):
    source = lay(tmp_path / "source", "olmo_core")
    edit_model(source, d_model=["x" * 10**6])
    assert len(refusal(source)) <= LONGEST + 3


def test_index_of_one_file_that_is_a_pipe(tmp_path):
    source = lay(tmp_path / "source", "transformers", 0)
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    os.mkfifo(source / "pipe")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "pipe"}}))
    with pytest.raises(CheckpointError, match="pipe"):
        read_weights(source)


def test_header_of_a_length_that_none_has(tmp_path):
    source = lay(tmp_path / "source", "transformers", 0)
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + data[8:])
    assert "model.safetensors" in refusal(source)


def test_a_state_file_that_is_none_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "device", tmp_path):
        with pytest.raises(ValueError, match="which is of another kind"):
            OlmemCache.load(path, model_of("full").config)


def test_a_state_file_that_cannot_be_mapped(tmp_path):
    """An OSError was raised."""
    (tmp_path / "state").symlink_to("/proc/self/mem")
    with pytest.raises(ValueError, match="`path` must be a whole file"):
        OlmemCache.load(tmp_path / "state", model_of("full").config)


def test_room_that_a_state_file_claims_is_not_made_before_it_is_needed(tmp_path):
    """A file of 2 KB took a gigabyte."""
    [seed] = (seed for seed in seeds("state") if "full.safetensors" in seed)
    path = tmp_path / "full.safetensors"
    path.write_bytes(seed["full.safetensors"])
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        facts = file.metadata() | {"max_length": str(2**23)}
    save_file(tensors, path, facts | {"checksum": checksum(tensors, facts)})
    cache = OlmemCache.load(path, model_of("full").config)
    assert cache.max_length == 2**23
    assert cache.nbytes < 2**20


def test_a_state_file_that_is_changed_while_it_is_read(tmp_path, monkeypatch):
    """What was used was read behind the checksum, from the file as it then was."""
    [seed] = (seed for seed in seeds("state") if "full.safetensors" in seed)
    path = tmp_path / "full.safetensors"
    path.write_bytes(seed["full.safetensors"])
    model = model_of("full")

    def then_changed(*arguments):
        found = checksum(*arguments)
        with path.open("r+b") as file:
            file.seek(-400, os.SEEK_END)
            file.write(bytes(400))
        return found

    expected = model(torch.ones(2, 1, dtype=torch.long), past_key_values=OlmemCache.load(path, model.config)).logits
    monkeypatch.setattr(cache_file_olmem, "checksum", then_changed)
    cache = OlmemCache.load(path, model.config)
    assert path.read_bytes() != seed["full.safetensors"]
    assert torch.equal(model(torch.ones(2, 1, dtype=torch.long), past_key_values=cache).logits, expected)
