"""The converted tokenizer gives the ids of the native one, and everything that would change them is refused."""

import ast
import json
import os
import pickle
import re
import socket
from pathlib import Path

import olmem  # noqa: F401  (registers `model_type: olmem`, as users do)
import pytest
from convert.checkpoints import edit_json
from convert.fuzzing import seeds as of_fuzzer
from hypothesis import given, settings
from hypothesis import strategies as st
from olmem_convert.errors import CheckpointError
from olmem_convert.reading.tokenizer_trial import PROBES
from olmem_convert.writing import tokenizer as module
from olmem_convert.writing.tokenizer import find_tokenizer, write_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LINES = ["It's 1000 or 10000, they'll say.\n\n  def f(x):\n        return x ** 12345\n"] * 9
LINES += ["In 2026 we've 100200300!!\n"] * 9
EOS, PAD, PII = "<|endoftext|>", "<|pad|>", "|||IP_ADDRESS|||"


def train(*added: AddedToken) -> Tokenizer:
    """A byte-level BPE that splits like cl100k and dolma2, with the added tokens after its learned ones."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(CL100K), behavior="removed", invert=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def special(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)


NATIVE = train(special(EOS), AddedToken(PII, normalized=False), special(PAD))
SIZE = NATIVE.get_vocab_size()
EOS_ID, PII_ID, PAD_ID = SIZE - 3, SIZE - 2, SIZE - 1
IDS = {"vocab_size": SIZE, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "bos_token_id": None, "max_length": None}
NO_IDS = {**IDS, "eos_token_id": None, "pad_token_id": None}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No test may reach the network or wait for an answer; checked at its end, for transformers swallows errors."""
    calls = []

    def refuse(*arguments, **_kwargs):
        calls.append(arguments)
        raise ConnectionError

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("builtins.input", refuse)
    yield
    assert not calls


@pytest.fixture
def source(tmp_path) -> Path:
    return save(NATIVE, tmp_path / "native")


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "a" / "converted"


def save(tokenizer: Tokenizer, folder: Path, **changes) -> Path:
    """Write a tokenizer.json, with `changes` to its top-level entries, into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(tokenizer.to_str()), **changes}), encoding="utf-8")
    return path


def refusal(source: Path, out: Path, **ids) -> str:
    with pytest.raises(CheckpointError) as caught:
        write_tokenizer(source, out, **{**IDS, **ids})
    return str(caught.value)


@pytest.mark.parametrize("place", ["step10", "step10/tokenizer", ".", "tokenizer"])
def test_a_tokenizer_is_found_in_and_beside_the_checkpoint(place, tmp_path, monkeypatch):
    checkpoint = tmp_path / "step10"
    checkpoint.mkdir()
    path = save(NATIVE, tmp_path / place)
    assert find_tokenizer(checkpoint) == path
    monkeypatch.chdir(checkpoint)
    assert find_tokenizer(Path(".")) == path


def test_the_nearest_tokenizer_is_found_first(tmp_path):
    checkpoint = tmp_path / "step10"
    places = [checkpoint, checkpoint / "tokenizer", tmp_path, tmp_path / "tokenizer"]
    paths = [save(NATIVE, place) for place in places]
    for path in paths:
        assert find_tokenizer(checkpoint) == path
        path.unlink()
    (checkpoint / "tokenizer.json").mkdir()
    assert find_tokenizer(checkpoint) is None


@pytest.mark.parametrize("as_folder", [True, False])
def test_what_is_written(source, out, as_folder):
    report = write_tokenizer(source.parent if as_folder else source, out, **{**IDS, "max_length": 8})
    assert sorted(os.listdir(out)) == ["tokenizer.json", "tokenizer_config.json"]
    assert (out / "tokenizer.json").read_bytes() == source.read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": 8,
    }
    probes = report.pop("probes")
    assert report == {"size": SIZE, "special_tokens": {EOS_ID: EOS, PAD_ID: PAD}}
    assert probes == len(PROBES) + 3 * 3


def test_ids_that_are_none_are_not_invented(source, out):
    write_tokenizer(source, out, **NO_IDS)
    assert set(json.loads((out / "tokenizer_config.json").read_text())) == {
        "tokenizer_class",
        "clean_up_tokenization_spaces",
    }
    loaded = AutoTokenizer.from_pretrained(out)
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.bos_token_id) == (None, None, None)


def test_one_token_may_be_eos_pad_and_bos(source, out):
    write_tokenizer(source, out, **{**IDS, "pad_token_id": EOS_ID, "bos_token_id": EOS_ID})
    loaded = AutoTokenizer.from_pretrained(out)
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.bos_token_id) == (EOS_ID, EOS_ID, EOS_ID)


def test_it_may_be_written_where_it_is(source):
    content = source.read_bytes()
    write_tokenizer(source, source.parent, **IDS)
    assert source.read_bytes() == content


CONFIGS = {
    "no config.json": None,
    "registered": {"model_type": "olmem"},
    "registered, with code": {
        "model_type": "olmem",
        "auto_map": {"AutoConfig": "configuration_olmem.OlmemConfig", "AutoModel": "modeling_olmem.OlmemModel"},
    },
    "not registered": {"model_type": "olmem_of_tomorrow"},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_users_load_it_without_a_question_and_get_the_native_ids(config, source, out):
    out.mkdir(parents=True)
    if config:
        (out / "config.json").write_text(json.dumps(config))
    write_tokenizer(source, out, **IDS)
    loaded = AutoTokenizer.from_pretrained(out)
    text = f"In 100200 they'll\r\n\n\n  say{EOS}{EOS} \t1000{PAD} \u4f60\u597d{PII}"
    assert loaded(text)["input_ids"] == NATIVE.encode(text).ids
    assert loaded.chat_template is None


def test_no_code_of_the_folders_runs(source, out):
    """`out` may hold remote code of a class that is not registered: loading it must neither ask nor run it."""
    for folder in (source.parent, out):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
        auto_map = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": auto_map}))
    write_tokenizer(source.parent, out, **IDS)
    assert not (source.parent / "ran").exists() and not (out / "ran").exists()
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("round_trip")
    write_tokenizer(save(NATIVE, folder / "native"), folder / "out", **IDS)
    return AutoTokenizer.from_pretrained(folder / "out")


PIECES = st.sampled_from(
    ["100", "2026", "\n", "\r\n", "  ", "\t", "'ll", EOS, PAD, PII, "\u200d", "e\u0301", "\U0001f469"]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=8) | PIECES, max_size=12).map("".join))
def test_random_text_keeps_its_ids_and_comes_back(loaded, text):
    ids = loaded.encode(text)
    assert ids == NATIVE.encode(text).ids
    assert loaded.decode(ids) == text


def test_a_post_processor_that_adds_bos_is_kept(tmp_path, out):
    tokenizer = train(special("<s>"), special(EOS))
    bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id(EOS)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    ids = {**IDS, "vocab_size": 4096, "eos_token_id": eos, "pad_token_id": None, "bos_token_id": bos}
    write_tokenizer(save(tokenizer, tmp_path / "native"), out, **ids)
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.encode("In 1000") == [bos, *loaded.encode("In 1000", add_special_tokens=False)]
    assert loaded.encode("In 1000") == tokenizer.encode("In 1000").ids
    assert loaded.bos_token_id == bos


def test_padding_and_truncation_of_the_source_do_not_disturb(tmp_path, out):
    tokenizer = Tokenizer.from_str(NATIVE.to_str())
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(pad_id=PAD_ID, pad_token=PAD, length=5)
    path = save(tokenizer, tmp_path / "native")
    write_tokenizer(path, out, **IDS)
    assert AutoTokenizer.from_pretrained(out).encode("In 1000 or 10000") == NATIVE.encode("In 1000 or 10000").ids
    assert "`pad_token_id` must stay the same" in refusal(path, out, pad_token_id=None)


@pytest.mark.parametrize("name", ["GPT2TokenizerFast", "GPT2Tokenizer", "GPTNeoXTokenizerFast"])
def test_a_model_specific_class_would_change_the_ids(name, source, out, monkeypatch):
    """Why the class is fixed: Transformers 5 replaces the split into groups of three digits by plain ByteLevel.

    It has bitten the makers of OLMo: 9.8 % more tokens (open-instruct#1896).
    """
    (source.parent / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "eos_token": EOS}))
    broken = AutoTokenizer.from_pretrained(source.parent)  # 5123 -> 5 123, where the native one has 512 3
    assert broken.encode("In 5123") != NATIVE.encode("In 5123").ids

    write_tokenizer(source.parent, out, **IDS)  # the class beside the source is not trusted
    assert AutoTokenizer.from_pretrained(out).encode("In 5123") == NATIVE.encode("In 5123").ids

    monkeypatch.setattr(module, "TOKENIZER_CLASS", name)
    message = refusal(source, out)
    found = re.search(r"the ids of ('.*?') must stay the same .* \(got (\[.*?\]), the source has (\[.*?\])\)", message)
    assert found, message
    text, got, wanted = map(ast.literal_eval, found.groups())
    assert wanted == NATIVE.encode(text).ids and got == broken.encode(text) and got != wanted


class Altered:
    """Stands for `AutoTokenizer`: what it loads has one method or attribute replaced."""

    def __init__(self, name, make):
        self.name, self.make = name, make

    def from_pretrained(self, *args, **kwargs):
        loaded = AutoTokenizer.from_pretrained(*args, **kwargs)
        setattr(loaded, self.name, self.make(getattr(loaded, self.name)))
        return loaded


def dropping(target, **when):
    """A method that loses what it returns when called with these keyword arguments on more than one token."""
    return lambda method: (
        lambda text, **given: target if text and when.items() <= given.items() else method(text, **given)
    )


@pytest.mark.parametrize(
    ("name", "make", "rule"),
    [
        ("encode", dropping([], add_special_tokens=True), "the ids of"),
        ("encode", dropping([], add_special_tokens=False), "the ids of"),
        ("decode", dropping("", skip_special_tokens=True), "the text of"),
        ("decode", dropping("", skip_special_tokens=False), "the text of"),
    ],
)
def test_every_way_to_encode_and_decode_is_compared(name, make, rule, source, out, monkeypatch):
    monkeypatch.setattr(module, "AutoTokenizer", Altered(name, make))
    assert refusal(source, out).startswith(rule)


PROBED = [
    *("", "12345678901", "5123", "1,234", "2026-11-22", "\u0661", "\uff11", "they'd", "THEY'D", "o'clock"),
    *("\n" * 5, "\t" * 4, " " * 33, " \n  \n\n ", "\n\t\t", "\r\n\r\n", "\u00a0", "\u3000", " and ", "  two  ", ' ("'),
    *(
        "def f",
        "class=",
        "https:",
        "\u0130",
        "e\u0301",
        "\u4f60",
        "\uac00",
        "\u0645",
        "\u0391",
        "\u200b",
        "\x00",
        "===",
    ),
    *("\U0001f469\u200d", "\U00010348", EOS, EOS * 2, f"x{EOS}y", PAD, PAD * 2, PII, PII * 2, f"x{PII}y"),
]


@pytest.mark.parametrize("piece", PROBED)
def test_a_difference_on_any_kind_of_text_is_seen(piece, source, out, monkeypatch):
    spaced = re.compile(re.escape(piece).replace("x", r"[\w ]+").replace("y", r"[\w ]+") if piece else r"\Z(?<!.)")
    whole = piece in (EOS, PAD, PII, EOS * 2, PAD * 2, PII * 2)

    def make(encode):
        def altered(text, **given):
            hit = text == piece if whole or not piece else spaced.search(text)
            return [-1] if hit else encode(text, **given)

        return altered

    monkeypatch.setattr(module, "AutoTokenizer", Altered("encode", make))
    assert "got [-1]" in refusal(source, out)


def test_an_interrupt_stays_an_interrupt(source, out, monkeypatch):
    class Interrupted:
        @staticmethod
        def from_pretrained(*_args, **_kwargs):
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "AutoTokenizer", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_tokenizer(source, out, **IDS)


NOT_TOKENIZERS = {
    "empty": b"",
    "truncated": NATIVE.to_str().encode()[:-9],
    "object": b"{}",
    "list": b"[]",
    "null": b"null",
    "config": b'{"model_type": "olmem", "vocab_size": 8}',
    "vocabulary": json.dumps(NATIVE.get_vocab()).encode(),
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "utf-16": NATIVE.to_str().encode("utf-16"),
    "pickle": pickle.dumps({"model": 1}),
    "binary": bytes(range(256)) * 9,
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("content", NOT_TOKENIZERS.values(), ids=NOT_TOKENIZERS)
def test_a_file_that_is_no_tokenizer(content, tmp_path, out):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    for source in (path, tmp_path):
        message = refusal(source, out)
        assert message.startswith((f"{path} must be a readable tokenizer.json (got ", f"`{path}` must "))
    assert not out.exists()


def test_a_path_that_is_no_file(tmp_path, out):
    (tmp_path / "folder" / "tokenizer.json").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("missing", "folder", "folder/tokenizer.json", "pipe", "link", "."):
        message = refusal(tmp_path / name, out)
        assert message.startswith("the tokenizer must be a tokenizer.json or a folder with one (got ")
        assert str(tmp_path / name) in message and message.endswith("; --tokenizer chooses another tokenizer")


def test_what_a_tokenizer_is_made_of_is_answered_with_the_line_that_makes_it(tmp_path, out, monkeypatch):
    of_fuzzer.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    edit_json(tmp_path / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    message = refusal(tmp_path, out)
    assert "of vocab.json, merges.txt Transformers makes one" in message and "`olmem tokenizer`" in message
    monkeypatch.chdir(tmp_path)
    exec(message.split("`")[1], {"AutoTokenizer": AutoTokenizer})
    assert (tmp_path / "NEW" / "tokenizer.json").is_file()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_damaged_file_is_converted_or_refused(tmp_path_factory, data):
    """Nothing but `CheckpointError` comes out of a file with damaged bytes."""
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(NATIVE.to_str().encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 9))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"0", b"a"])
        )
    (folder / "tokenizer.json").write_bytes(content)
    try:
        write_tokenizer(folder, folder / "out", **IDS)
    except CheckpointError:
        return
    loaded = AutoTokenizer.from_pretrained(folder / "out")
    assert loaded.encode("In 1000") == Tokenizer.from_file(str(folder / "tokenizer.json")).encode("In 1000").ids


PANICS = {
    "while reading": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "while splitting": {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "(a|aa)+b"},
            "behavior": "Isolated",
            "invert": False,
        }
    },
    "while adding tokens": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
}


@pytest.mark.parametrize("changes", PANICS.values(), ids=PANICS)
def test_a_rust_panic_is_a_checkpoint_error(changes, tmp_path, out):
    """`pyo3_runtime.PanicException` is a BaseException, so `except Exception` lets it through."""
    path = save(NATIVE, tmp_path / "native", **changes)
    message = refusal(path, out)
    assert message.startswith(f"{path} must ") and "(got PanicException: " in message


def test_what_transformers_cannot_load_is_refused(tmp_path, out):
    content = json.loads(train().to_str())
    del content["added_tokens"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert refusal(path, out, **NO_IDS).startswith(f"{path} must load and run in transformers (got KeyError: ")


def test_every_token_has_a_row(source, tmp_path, out):
    assert write_tokenizer(source, out, **{**IDS, "vocab_size": SIZE + 64})["size"] == SIZE
    assert refusal(source, tmp_path / "new", vocab_size=SIZE - 1) == (
        f"`vocab_size` must cover the {SIZE} tokens of {source} (got {SIZE - 1}); --tokenizer chooses another tokenizer"
    )
    assert not (tmp_path / "new").exists()


def test_the_highest_id_counts_and_not_the_number_of_tokens(tmp_path, out):
    path = save(Tokenizer(models.WordLevel({"a": 0, "[UNK]": 7}, unk_token="[UNK]")), tmp_path / "gap")
    assert "must cover the 8 tokens" in refusal(path, out, **{**NO_IDS, "vocab_size": 7})
    assert write_tokenizer(path, out, **{**NO_IDS, "vocab_size": 8})["size"] == 8


def test_a_tokenizer_without_tokens_is_refused(tmp_path, out):
    path = save(Tokenizer(models.BPE()), tmp_path / "none")
    assert "must cover the 0 tokens" in refusal(path, out, **NO_IDS)


FIELDS = ["eos_token_id", "pad_token_id", "bos_token_id"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("token_id", [SIZE, -1, 2**40])
def test_an_id_the_tokenizer_does_not_have(field, token_id, source, out):
    assert refusal(source, out, **{field: token_id}) == (
        f"`{field}` must be one of the {SIZE} ids of {source} (got {token_id}); --tokenizer chooses another tokenizer"
    )
    assert not out.exists()


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("token_id", [PII_ID, 0])
def test_the_wrong_one_of_a_pair_of_tokenizers(field, token_id, source, out):
    """GPT-NeoX-OLMo: one of two tokenizers of one size has `|||IP_ADDRESS|||` where the other has `<|endoftext|>`."""
    assert refusal(source, out, **{field: token_id}) == (
        f"`{field}` must be a special token (got {token_id}, {NATIVE.id_to_token(token_id)!r} in {source}): "
        "the checkpoint and the tokenizer do not belong together; --tokenizer chooses another tokenizer"
    )
    assert not out.exists()


@pytest.mark.parametrize("as_folder", [True, False])
def test_the_chat_template_is_carried_over_and_nothing_else(source, out, as_folder):
    template = "{{ bos_token }}\n\u00e9\ud800{{ messages[0].content }}"
    theirs = {"chat_template": template, "tokenizer_class": "GPT2Tokenizer", "eos_token": PII, "model_max_length": 3}
    (source.parent / "tokenizer_config.json").write_text(json.dumps(theirs))
    write_tokenizer(source.parent if as_folder else source, out, **IDS)
    assert AutoTokenizer.from_pretrained(out).chat_template == template
    ours = json.loads((out / "tokenizer_config.json").read_text())
    assert set(ours) == {"tokenizer_class", "clean_up_tokenization_spaces", "eos_token", "pad_token", "chat_template"}

    (source.parent / "chat_template.jinja").write_text("\u00e9 goes first", encoding="utf-8")
    write_tokenizer(source.parent, out, **IDS)
    assert AutoTokenizer.from_pretrained(out).chat_template == "\u00e9 goes first"


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("tokenizer_config.json", b"{", "tokenizer_config.json` must be readable"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json` must hold a JSON object"),
        (
            "tokenizer_config.json",
            b'{"chat_template": [{"name": "a", "template": "b"}]}',
            "must be one string (got a list",
        ),
        ("tokenizer_config.json", b'{"chat_template": 5}', "`chat_template` must be one string (got a int"),
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja` must be readable"),
        ("chat_template.jinja", None, "`chat_template.jinja` must exist"),
    ],
)
def test_an_unreadable_chat_template_is_not_dropped_in_silence(name, content, rule, source, out):
    if content is None:
        (source.parent / name).symlink_to("nowhere")
    else:
        (source.parent / name).write_bytes(content)
    assert rule in refusal(source.parent, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("special_tokens_map.json", {"eos_token": PAD}, "`eos_token_id` must stay the same"),
        ("special_tokens_map.json", {"bos_token": PAD}, "`bos_token_id` must stay the same"),
        ("special_tokens_map.json", {"pad_token": EOS}, "`pad_token_id` must stay the same"),
        ("special_tokens_map.json", {"unk_token": "<other>"}, "the number of tokens must stay the same"),
        ("chat_template.jinja", "stale", "`chat_template` must stay the same"),
    ],
)
def test_leftovers_in_the_output_folder_are_seen(name, content, rule, source, out):
    out.mkdir(parents=True)
    (out / name).write_text(json.dumps(content))
    message = refusal(source, out)
    assert message.startswith(rule) and "convert into an empty folder" in message
