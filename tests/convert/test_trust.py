"""What is checked is what is used: no input costs more than its size, and nothing is another one when it is read."""

import base64
import io
import json
import os
import pickle
import resource
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from convert.checkpoints import DEMO, copy_source, edit_json, load_weights, options, save_weights
from convert.fuzzing.seeds import READERS
from convert.writers import olmo_state, write_olmo, write_olmo_core
from olmem import OlmemConfig
from olmem_convert import CardOptions, CheckpointError, ConvertOptions, card, convert, evaluate, verify
from olmem_convert.cli import app
from olmem_convert.commands import measuring  # noqa: F401  once, and not in each process whose cost is measured
from olmem_convert.errors import DifferenceError
from olmem_convert.proof import verification
from olmem_convert.publish.release import check_release
from olmem_convert.reading import plain, tokenizer_trial
from olmem_convert.reading.archives import read_pickle
from olmem_convert.reading.distributed import METADATA_NAMES
from olmem_convert.reading.olmem_folder import UNSEALED
from olmem_convert.reading.pickles import STATE_DICT_NAMES, unpickle
from olmem_convert.reading.plain import SourceFile
from olmem_convert.reading.texts import read_json, read_yaml
from olmem_convert.reading.weight_files import read_flat_shards, read_safetensors
from olmem_convert.writing.shards import sha256
from olmem_convert.writing.tokenizer import write_tokenizer
from safetensors.torch import save_file
from typer.testing import CliRunner


def cost(run: Callable[[], object]) -> tuple[float, int]:
    """Seconds of the processor and bytes that it takes, in a process of its own, to be refused."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            run()
            said = "accepted"
        except CheckpointError:
            said = "refused"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"[:500]
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(writer, json.dumps([said, time.process_time() - started, (after - before) * 1024]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    said, seconds, nbytes = json.loads(os.read(reader, 2**16))
    os.close(reader)
    os.close(writer)
    assert said == "refused", said
    return seconds, nbytes


# Objects


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


SIZES = b"\x80\x02(" + b"K\x01" * 64 + b"t\x85q\x000ctorch\nSize\nq\x010("


def unpickled(data: bytes) -> None:
    try:
        unpickle(data, STATE_DICT_NAMES | METADATA_NAMES)
    except pickle.UnpicklingError as error:
        raise CheckpointError(str(error)) from None


COSTLY: dict[str, Callable[[Path], object]] = {
    "4 MB of sizes of 64 numbers": lambda path: unpickled(SIZES + b"h\x01h\x00R" * 800_000 + b"t."),
    "the same in lists": lambda path: unpickled(SIZES + b"]" + b"h\x01h\x00Ra" * 650_000 + b"t."),
    "32 MB of empty dictionaries": lambda path: unpickled(b"\x80\x02(" + b"}" * 2**25 + b"t."),
    "32 MB of empty dictionaries in a list": lambda path: unpickled(b"\x80\x02]" + (b"(" + b"}" * 1000 + b"e") * 2**15),
    "32 MB of marks": lambda path: unpickled(b"\x80\x02" + b"(" * 2**25 + b"."),
    "32 MB of None": lambda path: unpickled(b"\x80\x02" + b"N" * 2**25 + b"."),
    "48 MB of empty objects in metadata.json": lambda path: read_flat_shards(
        write(path / "metadata.json", '{"tensors": {"w": [' + "{}," * 2**24 + "{}]}}").parent
    ),
    "16 MB of empty objects in config.json": lambda path: read_json(
        write(path / "config.json", '{"a": [' + "{}," * 5_000_000 + "{}]}")
    ),
    "a name of 15 MB in config.json": lambda path: read_json(
        write(path / "config.json", json.dumps({"x" * 15_000_000: 1}))
    ),
    "100,000 directives in config.yaml": lambda path: read_yaml(
        write(path / "config.yaml", "".join(f"%TAG !{i}! x\n" for i in range(100_000)) + "---\na: 1\n")
    ),
    "a header of 50 MB": lambda path: read_safetensors(
        write(path / "model.safetensors", struct.pack("<Q", 5 * 10**7) + b"{" + b" " * 5 * 10**7)
    ),
    "a header of 300,000 tensors": lambda path: read_safetensors(
        write(path / "model.safetensors", headed({f"{i}": [0, 0] for i in range(300_000)}))
    ),
}


def headed(offsets: dict[str, list[int]]) -> bytes:
    entries = {name: {"dtype": "F32", "shape": [0], "data_offsets": held} for name, held in offsets.items()}
    text = json.dumps(entries, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text


SLOW = {"32 MB of empty dictionaries in a list": pytest.mark.slow}


@pytest.mark.parametrize("what", [pytest.param(what, marks=SLOW.get(what, ())) for what in COSTLY])
def test_what_costs_far_more_than_its_size_is_refused(what, tmp_path):
    """These took up to 2.9 GB and 72 s."""
    seconds, nbytes = cost(lambda: COSTLY[what](tmp_path))
    print(what, round(seconds, 2), nbytes >> 20)
    assert seconds < 10 and nbytes < 2**30, (seconds, nbytes)


def test_indexes_of_thousands_of_ranks_are_read():
    """Their pickles take fifteen times their size, by the count."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import MetadataIndex

    held = {MetadataIndex("w", torch.Size((i, 0)), i): _StorageInfo(f"__{i}_0.distcp", i, 9) for i in range(20_000)}
    assert len(unpickle(pickle.dumps(held), METADATA_NAMES)) == 20_000


@pytest.mark.parametrize("name", ["a", "x" * 5000])
def test_keys_twice_or_too_long_in_json(name, tmp_path):
    """The last one counted here, and the first one elsewhere."""
    text = f'{{"{name}": 1, "{name}": 2}}' if len(name) == 1 else json.dumps({name: 1})
    with pytest.raises(CheckpointError, match="twice" if len(name) == 1 else "a name of more than 4,096 signs"):
        read_json(write(tmp_path / "config.json", text))


# Records


def zipped(records: list[tuple[str, int, int, int]], data: bytes) -> bytes:
    """An archive whose directory says of each record its name, its first byte, its length and its checksum."""
    directory = b""
    for name, offset, length, crc in records:
        fields = (20, 20, 0, 0, 0, 0, crc, length, length, len(name), 0, 0, 0, 0, 0, offset)
        directory += b"PK\1\2" + struct.pack("<6H3I5H2I", *fields) + name.encode()
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(records), len(records), len(directory), len(data), 0)
    return data + directory + end


def record(name: str, content: bytes) -> bytes:
    crc = zlib.crc32(content)
    fields = (20, 0, 0, 0, 0, crc, len(content), len(content), len(name), 0)
    return b"PK\3\4" + struct.pack("<5H3I2H", *fields) + name.encode() + content


def nested(number: int, size: int) -> tuple[list[tuple[str, int, int, int]], bytes]:
    """Records of which each contains all later ones, with valid checksums."""
    content = bytes(size)
    found: list[tuple[str, int, int, int]] = []
    for index in reversed(range(number)):
        name = f"archive/data/{index}"
        made = record(name, content)
        found = [(other, offset + 30 + len(name), length, crc) for other, offset, length, crc in found]
        found.insert(0, (name, 0, len(content), zlib.crc32(content)))
        content = made
    return found, content


def test_records_that_contain_one_another_are_refused(tmp_path):
    """336 KB were read as 60 MB."""
    places, data = nested(20, 4096)
    state = pickle.dumps({}, 2)
    first = record("archive/data.pkl", state)
    places = [(name, offset + len(first), length, crc) for name, offset, length, crc in places]
    places.insert(0, ("archive/data.pkl", 0, len(state), zlib.crc32(state)))
    path = write(tmp_path / "model.pt", zipped(places, first + data))
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == 21
    with pytest.raises(CheckpointError, match="bytes of its own"):
        read_pickle(path)


def test_records_whose_extra_fields_reach_into_the_next_are_refused(tmp_path):
    torch.save({"a": torch.arange(64.0), "b": torch.arange(64.0)}, tmp_path / "model.pt")
    data = bytearray((tmp_path / "model.pt").read_bytes())
    at = data.index(b"data/0") - len("model/") - 30
    data[at + 28 : at + 30] = struct.pack("<H", struct.unpack("<H", data[at + 28 : at + 30])[0] + 128)
    with pytest.raises(CheckpointError, match="reaches into the next one"):
        read_pickle(write(tmp_path / "model.pt", bytes(data)))["a"].load()


def test_records_outside_the_part_of_a_file_that_is_theirs(tmp_path):
    """A chunk's archive lies between others in its file, whose bytes are not its own."""
    source_folder = write_olmo_core(tmp_path / "source")
    path = source_folder / "model_and_optim" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2")
    length = struct.unpack("<I", data[at + 24 : at + 28])[0]
    data[at + 20 : at + 28] = struct.pack("<II", length + 10**4, length + 10**4)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        convert(source_folder, tmp_path / "out", ConvertOptions(verify=False))


def sharing(tmp_path: Path) -> Path:
    """A state dict whose layers all share the numbers of the first one."""
    state, layers = olmo_state(), 30
    shared = {
        name.replace("blocks.0.", f"blocks.{layer}."): value for name, value in state.items() for layer in range(layers)
    }
    return write_olmo(tmp_path / "source", "model.pt", shared, n_layers=layers)


def test_tensors_that_share_their_numbers_must_be_asked_for(tmp_path):
    """526 MB were written from 3 MB without a word."""
    folder, lines = sharing(tmp_path), []
    with pytest.raises(CheckpointError, match=r"at most 2 times what its files hold .*--allow-growth"):
        convert(folder, tmp_path / "out", ConvertOptions(verify=False), say=lines.append)
    assert sorted(os.listdir(tmp_path)) == ["source"]
    convert(folder, tmp_path / "out", ConvertOptions(verify=False, allow_growth=True), say=lines.append)
    written = sum(value.numel() * 4 for value in load_weights(tmp_path / "out").values())
    assert f"writing {written:,} bytes of weights in 1 file, as float32" in lines


# Files that are swapped


@pytest.mark.parametrize(
    "name", ["olmo", "olmo_safetensors", "olmo_core", "legacy_sharded_olmo_core_2rank", "baka_pristine"]
)
@pytest.mark.parametrize("how", ["a link", "a copy", "a change", "a removal"])
def test_a_weight_file_that_is_swapped_after_it_was_checked(how, name, tmp_path):
    """What was converted was the other file, which nobody had checked; `--no-verify` said nothing."""
    folder = copy_source(name, tmp_path / "source")
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    other = write(tmp_path / "other", bytes(path.stat().st_size))

    def swap(line: str) -> None:
        if not line.startswith("writing"):
            return
        if how == "a change":
            with path.open("r+b") as file:
                file.seek(-1, io.SEEK_END)
                file.write(b"\1")
            return
        path.unlink()
        if how == "a link":
            path.symlink_to(other)
        elif how == "a copy":
            shutil.copy(other, path)

    with pytest.raises(CheckpointError, match=r"must stay as it is while it is read|its own checksums"):
        convert(folder, tmp_path / "out", ConvertOptions(verify=False, **options(name)), say=swap)
    assert not (tmp_path / "out").exists()


def test_a_name_that_becomes_a_link_is_not_followed(monkeypatch, tmp_path):
    path, other = write(tmp_path / "a", b"own"), write(tmp_path / "b", b"other")
    checked = plain.require_plain

    def swapped(*arguments):
        checked(*arguments)
        path.unlink()
        path.symlink_to(other)
        return path

    monkeypatch.setattr(plain, "require_plain", swapped)
    monkeypatch.setattr(os.path, "realpath", lambda path, strict=False: str(path))
    with pytest.raises(CheckpointError, match="must be readable"):
        SourceFile(path)


def test_more_files_than_may_be_open(monkeypatch, tmp_path):
    monkeypatch.setattr(plain, "MOST_OPEN", 3)
    files = [SourceFile(write(tmp_path / str(i), bytes([i]) * 9)) for i in range(8)]
    before = len(os.listdir("/proc/self/fd"))
    assert [file.read(4, 2) for file in files] == [bytes([i, i]) for i in range(8)]
    assert len(os.listdir("/proc/self/fd")) <= before
    (tmp_path / "0").unlink()
    write(tmp_path / "0", b"replaced!")
    with pytest.raises(CheckpointError, match="must stay as it is"):
        files[0].read(0, 1)


def test_values_are_read_from_the_file_that_was_opened(tmp_path):
    save_file({"w": torch.arange(8.0)}, tmp_path / "w.safetensors")
    tensor = read_safetensors(tmp_path / "w.safetensors")["w"]
    (tmp_path / "w.safetensors").rename(tmp_path / "kept")
    save_file({"w": torch.zeros(8)}, tmp_path / "w.safetensors")
    assert torch.equal(tensor.load(), torch.arange(8.0))
    [file] = tensor.sources
    with pytest.raises(CheckpointError, match="was changed or replaced"):
        file.require_same()


# One door for each kind of file


@pytest.fixture(scope="module")
def demo(converted, tmp_path_factory) -> Path:
    """A folder with a tokenizer, and a text to evaluate."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(converted("demo"), folder / "out")
    card(folder / "out", CardOptions(license="apache-2.0"))
    (folder / "text.txt").write_text("Once upon a time there was a model of some text.")
    return folder


@pytest.fixture
def out(demo, tmp_path) -> Path:
    return Path(shutil.copytree(demo / "out", tmp_path / "out"))


def commands(out: Path, demo: Path) -> dict[str, Callable[[], object]]:
    return {
        "card": lambda: card(out),
        "verify": lambda: verify(out, DEMO / "step1872"),
        "evaluate": lambda: evaluate(out, [demo / "text.txt"]),
        "push": lambda: check_release(out),
        "export": lambda: convert(out, out.parent / "back", ConvertOptions(to="olmo3")),
    }


CONFIGS: dict[str, dict[str, object]] = {
    "20,000,000 layers": {"num_hidden_layers": 20_000_000, "layer_types": None},
    "1,000 layers": {"num_hidden_layers": 1000, "layer_types": None},
    "10,000,000 labels": {"num_labels": 10_000_000},
    "a vocabulary of 2**50": {"vocab_size": 2**50},
    "a width of 2**40": {"hidden_size": 2**40, "head_dim": 2**36},
    "a kernel as attention": {"attn_implementation": "somebody/kernel"},
    "code to generate": {"custom_generate": "somebody/code"},
    "code in what it keeps": {"olmo_config": {"attn_implementation": "somebody/kernel"}},
    "memory tokens without end": {"num_memory_tokens": 2**45, "memory_segment_length": 16},
    "a number that is none": {"rms_norm_eps": float("nan")},
}


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("command", ["card", "verify", "evaluate", "push", "export"])
@pytest.mark.parametrize("config", CONFIGS)
def test_configs_of_no_model_are_refused_by_every_command(config, command, sealed, out, demo):
    """`convert` refused them; `card`, `verify` and `evaluate` ran without end in gigabytes."""
    edit_json(out / "config.json", **CONFIGS[config])
    if sealed:
        reseal_files(out)
    if command == "card" and config in ("1,000 layers", "a vocabulary of 2**50", "a width of 2**40"):
        return  # it reads no weights, which say that these are too many
    if command == "card" and config == "memory tokens without end":
        return
    seconds, nbytes = cost(commands(out, demo)[command])
    assert seconds < 10 and nbytes < 2**30


def reseal_files(out: Path) -> None:
    """As somebody may write a seal by hand."""
    edit_json(out / "verification.json", sha256=seal_of(out))


def seal_of(out: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in out.iterdir() if path.is_file() and path.name not in UNSEALED}


def spoilt(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(out: Path) -> None:
        tree = json.loads((out / "tokenizer.json").read_text())
        change(tree)
        (out / "tokenizer.json").write_text(json.dumps(tree))

    return spoil


def precompiled(text: str) -> Callable[[Path], None]:
    return spoilt(lambda tree: tree.update(normalizer={"type": "Precompiled", "precompiled_charsmap": text}))


def splitting(regex: str) -> Callable[[Path], None]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return spoilt(lambda tree: tree.update(pre_tokenizer=split))


TOKENIZERS: dict[str, Callable[[Path], object]] = {
    "a charsmap that is longer than it is": precompiled("////f///////"),
    "a charsmap that is cut short": precompiled("BAAAAAAA"),
    "a charsmap of nonsense": precompiled(base64.b64encode(struct.pack("<I", 64) + bytes(range(64)) + b"abc").decode()),
    "a regex that has no end": splitting(r"(a+)+$Z"),
    "a regex that takes minutes": splitting(r"(?:.|.|.){1,14}(?<!.)"),
    "3,000,000 merges": spoilt(lambda tree: tree["model"].update(merges=["a b"] * 3_000_000)),
    "a key twice": lambda out: (out / "tokenizer.json").write_text(
        (out / "tokenizer.json").read_text().replace("{", '{"version": "1.0",', 1)
    ),
    "a file elsewhere": lambda out: edit_json(out / "tokenizer_config.json", tokenizer_file="/etc/passwd"),
    "a file elsewhere, beside it": lambda out: (out / "special_tokens_map.json").write_text(
        '{"vocab_file": "/etc/passwd"}'
    ),
    "code": lambda out: edit_json(out / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}),
}


@pytest.fixture
def impatient(monkeypatch, tmp_path):
    """A tokenizer is tried for one second of the processor."""
    text, seconds = Path(tokenizer_trial.__file__).read_text(), f"SECONDS, MEMORY = {tokenizer_trial.SECONDS},"
    assert seconds in text
    (tmp_path / "trial.py").write_text(text.replace(seconds, "SECONDS, MEMORY = 1,"))
    monkeypatch.setattr(tokenizer_trial, "__file__", str(tmp_path / "trial.py"))


@pytest.mark.parametrize("command", ["evaluate", "push"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_tokenizers_that_convert_refuses_are_refused_by_every_command(tokenizer, command, out, demo, capfd, impatient):
    """They ended the process by SIGABRT, or in a panic of 247 lines."""
    TOKENIZERS[tokenizer](out)
    reseal_files(out)
    seconds, nbytes = cost(commands(out, demo)[command])
    assert seconds < 10 and nbytes < 2**30
    assert "panicked" not in capfd.readouterr().err


def spread(out: Path, place: str) -> None:
    """The folder's weights by an index, which says that they are in this file."""
    weights = load_weights(out)
    (out / "model.safetensors").rename(out / "model-00001-of-00001.safetensors")
    total = sum(value.numel() * value.element_size() for value in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(weights, place)}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("command", ["verify", "evaluate", "push"])
@pytest.mark.parametrize("place", ["../other.safetensors", "sub/other.safetensors", "link.safetensors"])
def test_an_index_names_files_of_its_own_folder_alone(place, command, out, demo):
    """`evaluate` measured the weights of another folder, which no seal had seen."""
    weights = load_weights(out)
    spread(out, place)
    (out / "sub").mkdir()
    for path in (out.parent / "other.safetensors", out / "sub" / "other.safetensors"):
        save_file({name: 2 * value for name, value in weights.items()}, path, {"format": "pt"})
    if place == "link.safetensors":
        (out / place).symlink_to("../other.safetensors")
    reseal_files(out)
    with pytest.raises(CheckpointError, match=r"files of its own folder|link out of its folder|be a file that a model"):
        commands(out, demo)[command]()


@pytest.mark.parametrize("command", ["verify", "evaluate", "push"])
def test_weights_that_transformers_would_not_load_are_not_checked_in_their_place(command, out, demo):
    """All safetensors were checked, and a pickle beside an index of it was loaded."""
    torch.save(load_weights(out), out / "pytorch_model.bin")
    (out / "model.safetensors").unlink()
    reseal_files(out)
    with pytest.raises(CheckpointError, match=r"its weights in safetensors|be a file that a model on the Hub"):
        commands(out, demo)[command]()


@pytest.mark.parametrize("command", ["verify", "evaluate", "push"])
def test_a_folder_that_names_another_model_to_be_loaded(command, out, demo):
    """With PEFT installed, Transformers loads the model that an adapter's config names."""
    (out / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/model"}))
    reseal_files(out)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        commands(out, demo)[command]()


@pytest.mark.parametrize("command", ["evaluate", "push"])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2TokenizerFast", None])
def test_tokenizers_of_another_class_are_refused(name, command, out, demo):
    """They give a text other ids than tokenizer.json does, or read other files; `push` sent them."""
    edit_json(out / "tokenizer_config.json", tokenizer_class=name)
    reseal_files(out)
    with pytest.raises(CheckpointError, match=r"`tokenizer_class` of .* must be PreTrainedTokenizerFast"):
        commands(out, demo)[command]()


@pytest.mark.parametrize("tokenizer", ["a regex that has no end", "a regex that takes minutes"])
def test_a_regex_of_a_checkpoint_s_tokenizer_is_bounded(tokenizer, out, impatient, tmp_path):
    """By seconds of the processor, of which there are eight for users and one here."""
    TOKENIZERS[tokenizer](out)
    seconds, _ = cost(
        lambda: write_tokenizer(
            out,
            tmp_path / "to",
            vocab_size=2048,
            eos_token_id=None,
            pad_token_id=None,
            bos_token_id=None,
            max_length=None,
        )
    )
    assert seconds < 3 and tokenizer_trial.SECONDS == 8


@pytest.mark.parametrize("command", ["card", "evaluate", "push"])
def test_the_seal_is_checked_before_anything_is_read(command, out, demo, monkeypatch):
    """A config that is not what was verified is not even parsed."""
    edit_json(out / "config.json", hidden_act="relu")
    read = []
    monkeypatch.setattr(OlmemConfig, "from_dict", classmethod(lambda *_, **__: read.append(1)))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        commands(out, demo)[command]()
    assert read == []


def test_what_is_verified_must_not_change_meanwhile(out, monkeypatch):
    """The seal was of what lay there at the end."""
    compare = verification.compare_files

    def meanwhile(*arguments):
        (out / "tokenizer_config.json").write_text("{}")
        return compare(*arguments)

    monkeypatch.setattr(verification, "compare_files", meanwhile)
    with pytest.raises(CheckpointError, match="must stay as it is while it is verified"):
        verify(out, DEMO / "step1872")
    assert not (out / "verification.json").exists()


@pytest.mark.parametrize("command", ["card", "push", "verify"])
def test_cards_of_megabytes_are_refused(command, out, demo):
    """A front matter of 1.2 MB took 12.5 s."""
    text = (out / "README.md").read_text()
    lines = "".join(f"- tag{i}\n" for i in range(40_000))
    (out / "README.md").write_text(text.replace("tags:\n", f"tags:\n{lines}", 1))
    seconds, _ = cost(commands(out, demo)[command])
    assert seconds < 10


@pytest.mark.parametrize("command", ["card", "push"])
def test_figures_of_more_texts_than_anybody_measures_are_refused(command, out, demo):
    evaluate(out, [demo / "text.txt"])
    report = json.loads((out / "evaluation.json").read_text())
    texts = [report["texts"][0] | {"name": f"t{number}", "positions": []} for number in range(10_000)]
    edit_json(out / "evaluation.json", texts=texts)
    seconds, _ = cost(commands(out, demo)[command])
    assert seconds < 5


def test_a_folder_in_the_place_of_what_is_written_is_told(out, demo):
    """It was an error of the system."""
    (out / "evaluation.json").mkdir()
    before = sorted(os.listdir(out))
    with pytest.raises(CheckpointError, match=r"`evaluation\.json` must be a file that can be written"):
        evaluate(out, [demo / "text.txt"])
    assert sorted(os.listdir(out)) == before


# What is carried along


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_what_is_checked_is_what_is_carried_along(name, tmp_path, monkeypatch):
    """Files were read twice: to be checked, and to be copied."""
    write_seed(tmp_path / "source")
    path, reads = tmp_path / "source" / name, []
    if not path.exists():
        path.write_text("{}")
    read_into = SourceFile.read_into

    def swapped(self, *arguments):
        count = read_into(self, *arguments)
        if self.path.name == name and tmp_path / "source" in self.path.parents:
            reads.append(1)
            path.write_text('{"trust_remote_code": true, "auto_map": {"AutoTokenizer": ["x.Y", null]}}')
        return count

    monkeypatch.setattr(SourceFile, "read_into", swapped)
    with suppress(CheckpointError):
        convert(tmp_path / "source", tmp_path / "out", ConvertOptions(verify=False))
    assert reads
    assert not (tmp_path / "out" / name).exists() or "trust_remote" not in (tmp_path / "out" / name).read_text()


CARRIED = {
    "generation_config.json": [
        {"custom_generate": "somebody/code"},
        {"trust_remote_code": True},
        {"auto_map": {"AutoModel": "x.Y"}},
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel:attention"},
    ],
    "tokenizer_config.json": [{"custom_generate": "x/y"}, {"trust_remote_code": True}],
    "special_tokens_map.json": [{"tokenizer_file": "/etc/passwd"}, {"auto_map": {"AutoTokenizer": "x.Y"}}],
    "config.json": [
        {"attn_implementation": "somebody/kernel"},
        {"custom_generate": "x/y"},
        {"trust_remote_code": True},
    ],
}


@pytest.mark.parametrize(("name", "fields"), [(name, fields) for name in CARRIED for fields in CARRIED[name]], ids=str)
def test_what_has_code_run_is_not_carried_along(name, fields, tmp_path):
    """Files beside a Transformers folder's weights went into OUT word for word."""
    write_seed(tmp_path / "source")
    path = tmp_path / "source" / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))
    with pytest.raises(CheckpointError, match=f"`{next(iter(fields))}` of .*{name} must be absent"):
        convert(tmp_path / "source", tmp_path / "out", ConvertOptions(verify=False))
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_names_of_files_stay_behind(tmp_path):
    """Genuine tokenizers name where their makers kept them."""
    write_seed(tmp_path / "source")
    given = {"tokenizer_file": "/home/me/tokenizer.json", "special_tokens_map_file": "/home/me/x.json"}
    edit_json(tmp_path / "source" / "tokenizer_config.json", **given)
    lines: list[str] = []
    convert(tmp_path / "source", tmp_path / "out", ConvertOptions(verify=False), say=lines.append)
    assert "/home/me" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert any("names files (special_tokens_map_file, tokenizer_file), which are not copied" in line for line in lines)


def write_seed(folder: Path) -> None:
    READERS["transformers"][1](folder)


# Words


NAME = "\nverified: all is well\r\x1b[2J\u2028"


def test_names_in_an_error_begin_no_line(out):
    """A tensor of such a name printed a line of its own at the margin."""
    save_file(load_weights(out) | {f"a{NAME}": torch.zeros(1)}, out / "model.safetensors", {"format": "pt"})
    result = CliRunner().invoke(app, ["verify", str(out), "--against", str(DEMO / "step1872")])
    assert result.exit_code == 1
    assert not any(line.startswith("verified") for line in result.output.splitlines())
    assert "\\nverified: all is well" in result.stderr and "\x1b" not in result.output


def test_names_in_the_table_of_differences_begin_no_line():
    error = DifferenceError("it differs", [f"weights: {NAME}", "stage"])
    assert str(error).splitlines() == ["it differs", "weights: \\nverified: all is well\\r\\x1b[2J\\u2028", "stage"]


def test_a_path_is_one_line_of_what_is_said(tmp_path):
    folder = write_olmo(tmp_path / "my\nverified: run", "model.pt")
    result = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out"), "--no-verify"])
    assert result.exit_code == 0, result.output
    assert not any(line.startswith("verified") for line in result.output.splitlines())
    assert "my\\nverified: run" in result.stdout


@pytest.mark.parametrize(
    ("value", "source_dtype", "dtype", "remedy"),
    [
        (3.4e38, torch.float32, "bfloat16", "choose --dtype float32"),
        (7e4, torch.float32, "float16", "choose --dtype bfloat16"),
        (3.4e38, torch.float32, "float16", "choose --dtype float32"),
        (1e300, torch.float64, "float32", "no dtype that can be chosen holds it"),
        (1e300, torch.float64, "bfloat16", "no dtype that can be chosen holds it"),
    ],
)
def test_the_dtype_that_is_advised_holds_the_values(value, source_dtype, dtype, remedy, tmp_path):
    """`--dtype bfloat16` that overflowed was told to choose --dtype bfloat16."""
    state = {name: tensor.to(source_dtype) for name, tensor in olmo_state().items()}
    state["transformer.ff_out.weight"][0, 0] = value
    folder = write_olmo(tmp_path / "source", "model.pt", state)
    with pytest.raises(CheckpointError, match=f"must be finite as {dtype} .*{remedy}"):
        convert(folder, tmp_path / "out", ConvertOptions(dtype=dtype, verify=False))


@pytest.mark.parametrize(
    "change",
    [
        {"stages": []},
        {"stages": [{"stage": "logits", "equal": True, "max_difference": 0.0, "tolerance": 1e-6}]},
        {"weight_differences": ["model.norm.weight"]},
        {"config_differences": {"rms_norm_eps": [1, 2]}},
        {"dtype": "bfloat16"},
        {"nonfinite": {"model.norm.weight": 1}},
        {"prompt": {"tokens": 3, "vocabulary": 2048, "seed": 20, "sliding_window": 256, "attention_chunk_size": None}},
        {
            "prompt": {
                "tokens": 300,
                "vocabulary": 2**40,
                "seed": 20,
                "sliding_window": 256,
                "attention_chunk_size": None,
            }
        },
    ],
    ids=str,
)
def test_a_seal_written_by_hand_must_at_least_be_possible(change, out):
    edit_json(out / "verification.json", **change)
    card(out)
    with pytest.raises(CheckpointError, match=f"`{next(iter(change))}` of .*verification.json must be what"):
        check_release(out)


def test_numbers_that_none_are_behind_a_seal_written_by_hand(out):
    weights = load_weights(out)
    weights["model.norm.weight"][0] = float("nan")
    save_weights(out, weights)
    reseal_files(out)
    card(out)
    with pytest.raises(CheckpointError, match=r"`nonfinite` of .*verification\.json"):
        check_release(out)


def test_the_card_says_what_a_seal_is_worth(out):
    assert "It is not signed" in (out / "README.md").read_text()
