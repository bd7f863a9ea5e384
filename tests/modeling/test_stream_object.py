"""A stream object: however it was read, saved, batched and left, it goes on as one text of all of it does."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import run_fresh
from modeling.helpers import MEMORIES, SINKS, STREAMS, tiny, tokens
from olmem import OlmemCache, OlmemStream, stream_olmem, texts_olmem
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

TOKENIZER = Path(__file__).parents[2] / "model_cards" / "demo" / "native" / "tokenizer.json"
CHATML = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    names = {"bos_token": "<|bos|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    loaded = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), **names)
    loaded.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    loaded.chat_template = CHATML
    return loaded


def speaker(**changes) -> Any:
    """A model of the tokenizer's vocabulary."""
    return tiny(vocab_size=2064, **changes)


class Says(LogitsProcessor):
    """Lets a model write these ids, a list for each row, one after another."""

    def __init__(self, *rows: list[int]):
        self.rows, self.step = rows, 0

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -torch.inf)
        for row, ids in zip(scores, self.rows, strict=True):
            row[ids[min(self.step, len(ids) - 1)]] = 0.0
        self.step += 1
        return scores


def saying(*rows: list[int]) -> dict[str, Any]:
    return GREEDY | {"logits_processor": LogitsProcessorList([Says(*rows)])}


def continued(model: Any, ids: torch.Tensor, count: int, **kwargs) -> list[int]:
    """What one `generate` of a whole row of ids writes."""
    given = GREEDY | {"attention_mask": torch.ones_like(ids[None]), "max_new_tokens": count} | kwargs
    return model.generate(ids[None], **given)[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", [*STREAMS, "memory", "retrieval", "both with sinks", "both mixed"])
def test_a_stream_writes_what_its_whole_text_is_continued_with(name, tmp_path):
    """Read in pieces, in calls of few tokens, and saved and loaded on the way."""
    model, ids = tiny(**(STREAMS | MEMORIES)[name]), tokens(40)
    expected = continued(model, ids, 20)
    stream = model.stream()
    for piece in (ids[:1], ids[1:20].tolist(), ids[20:21], ids[21:]):
        stream.read(piece)
    found = list(stream.write(8, **GREEDY))
    stream.save(tmp_path / "stream")
    stream = model.stream(path=tmp_path / "stream")
    found += list(stream.write(12, **GREEDY))
    assert found == expected and len(set(found)) > 2
    stream.read([5, 6])
    assert list(stream.write(3, **GREEDY)) == continued(model, torch.tensor([*ids, *found, 5, 6]), 3)


def test_samples_and_limits_are_those_of_generate():
    model, ids = tiny(**SINKS), tokens(12)
    options = {"do_sample": True, "top_k": 20, "temperature": 0.8, "min_new_tokens": 6, "eos_token_id": [3, 7]}
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected = continued(model, ids, 30, **options)
        torch.manual_seed(seed)
        stream = model.stream()
        stream.read(ids)
        assert list(stream.write(30, **options, pad_token_id=0)) == expected
        assert stream.rows[0].ended == (expected[-1] in (3, 7))


def test_a_stream_without_end_is_left_by_its_reader(monkeypatch):
    """What it has written by then is part of it, and its bytes are those after one piece."""
    monkeypatch.setattr(stream_olmem, "PIECES", {"cpu": 16})
    model, ids, found = tiny(**SINKS | {"num_memory_tokens": 2, "memory_segment_length": 5}), tokens(600), []
    stream, sizes = model.stream(), set()
    for piece in ids.split(200):
        stream.read(piece)
        sizes.add(stream.nbytes)
    for token in stream.write(**GREEDY):
        found.append(token)
        if len(found) == 50:
            break
    assert len(sizes | {stream.nbytes}) == 1
    assert [*found, *stream.write(2, **GREEDY)] == continued(model, ids, 52)


def test_rows_of_a_batch_are_what_they_are_alone():
    """Of several lengths, one of which ends first, reads nothing for a while, and begins another text."""
    model, rows = tiny(**MEMORIES["both with sinks"]), [tokens(23), tokens(9, seed=1), tokens(1, seed=2)]
    alone = [continued(model, row, 12) for row in rows]
    end = next(token for token in alone[1][2:] if token not in {*alone[0], *alone[2]})
    stop = alone[1].index(end) + 1
    stream = model.stream()
    stream.read([row.tolist() for row in rows])
    found = list(zip(*stream.write(12, **GREEDY, eos_token_id=end), strict=True))
    assert [list(row) for row in found] == [alone[0], alone[1][:stop] + [None] * (12 - stop), alone[2]]
    assert [row.ended for row in stream.rows] == [False, True, False]
    stream.read([None, [4, 5], None])
    texts = [[*rows[0], *alone[0]], [*rows[1], *alone[1][:stop], 4, 5], [*rows[2], *alone[2]]]
    found = list(zip(*stream.write(5, **GREEDY), strict=True))
    assert [list(row) for row in found] == [continued(model, torch.tensor(text), 5) for text in texts]
    stream.reset(2)
    with pytest.raises(ValueError, match=r"got nothing in rows \[2\]"):
        next(stream.write(1))
    stream.read([None, [1], rows[1]])
    texts = [[*texts[0], *found[0]], [*texts[1], *found[1], 1], rows[1]]
    found = list(zip(*stream.write(5, **GREEDY), strict=True))
    assert [list(row) for row in found] == [continued(model, torch.tensor(list(text)), 5) for text in texts]
    stream.reset()
    stream.read(rows[0])
    assert list(stream.write(12, **GREEDY)) == alone[0]


# Goes on from a stream's file in a process where only the folder's own code is; argv: the folder.
ELSEWHERE = """
import json, sys
sys.modules["olmem"] = sys.modules["olmem_convert"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
stream = model.stream(tokenizer, f"{folder}/stream")
found = ["".join(stream.write(max_new_tokens=15, do_sample=False))]
stream.read([{"role": "user", "content": "And?"}])
found.append("".join(stream.write(max_new_tokens=15, do_sample=False)))
stream.save(f"{folder}/stream")
print(json.dumps(found))
"""


def test_another_process_goes_on_with_the_code_of_the_folder(tokenizer, tmp_path):
    """In the middle of a turn, and of a character, and it comes back."""
    model = speaker(**MEMORIES["both with sinks"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    streams = [model.stream(tokenizer), model.stream(tokenizer)]
    half = tokenizer("a 中", add_special_tokens=False).input_ids[:-1]
    for stream in streams:
        stream.read([{"role": "user", "content": "Well?"}])
        list(stream.write(len(half), **saying(half)))
    streams[0].save(tmp_path / "stream")
    expected = ["".join(streams[1].write(15, **GREEDY))]
    streams[1].read([{"role": "user", "content": "And?"}])
    expected.append("".join(streams[1].write(15, **GREEDY)))
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment = kept | {"HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    child = run_fresh(ELSEWHERE, tmp_path, env=environment)
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) == expected
    back = model.stream(tokenizer, tmp_path / "stream")
    assert back.rows == streams[1].rows
    assert list(back.write(5, **GREEDY)) == list(streams[1].write(5, **GREEDY))


# Text


def test_pieces_are_whole_characters(tokenizer, tmp_path):
    """Also where `max_new_tokens` ends within one: the next call gives it, in another stream from a file too."""
    model, text = speaker(**SINKS), "naïve — 中文 🙂🙂 ﬁn\n  é"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) > len(text)
    stream, pieces = model.stream(tokenizer), []
    stream.read("x = ")
    for index, token in enumerate(ids):
        pieces += stream.write(1, **saying([token]))
        if index % 4 == 1:
            stream.save(tmp_path / "stream")
            stream = model.stream(tokenizer, tmp_path / "stream")
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and len(pieces) > 10
    once = model.stream(tokenizer)
    once.read("x = ")
    assert list(once.write(len(ids), **saying(ids))) == pieces


def test_bytes_that_fall_back_are_whole_characters():
    """Where all bytes of a run must make characters, none may be decoded without those before it."""
    names = {f"<0x{byte:02X}>": byte for byte in range(256)}
    plain = Tokenizer(BPE(vocab=names, merges=[], byte_fallback=True))
    plain.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])  # pyright: ignore
    stream, text = speaker(**SINKS).stream(PreTrainedTokenizerFast(tokenizer_object=plain)), "中文🙂é中 x"
    stream.read("x")
    ids = list(text.encode())
    assert list(stream.write(len(ids), **saying(ids))) == list(text)


def test_bytes_that_are_no_character_come_out_in_the_end(tokenizer):
    lone = tokenizer("é", add_special_tokens=False).input_ids[0]
    stream = speaker(**SINKS).stream(tokenizer)
    stream.read("x")
    pieces = list(stream.write(40, **saying([lone] * 40)))
    assert len(pieces) == 2 and set("".join(pieces)) == {"\ufffd"}
    end = [lone, tokenizer.eos_token_id]
    assert list(stream.write(9, **saying(end), eos_token_id=end[1]))[-1].endswith("\ufffd")


def test_text_stops_at_strings_and_at_its_end(tokenizer):
    ids = tokenizer("one two three", add_special_tokens=False).input_ids
    model, end = speaker(**SINKS), tokenizer.eos_token_id
    stream = model.stream(tokenizer)
    stream.read("zero ")
    assert "".join(stream.write(**saying(ids), stop_strings=["tw", "five"])) in ("one tw", "one two")
    stream.read("!")
    model.generation_config.stop_strings = "two"
    assert "".join(stream.write(**saying(ids))) == "one two"
    assert "".join(stream.write(9, **saying([*ids, end]), eos_token_id=end, stop_strings="six")) == "one two three"
    for go_on in (lambda: stream.read("more"), lambda: next(stream.write(1))):
        with pytest.raises(ValueError, match=r"must not .* after"):
            go_on()
    stream.read(ids)
    assert list(stream.write(1, **saying(ids))) == ["one"]


def test_a_long_text_is_tokenized_in_parts(monkeypatch, capsys):
    """As one text is, by both ways to split one into words; what takes long shows how far it is."""
    text, trained = Path(__file__).read_text(), Tokenizer.from_file(str(TOKENIZER))
    splits = [trained.pre_tokenizer, ByteLevel(add_prefix_space=False)]
    monkeypatch.setattr(texts_olmem.logging, "tqdm", tqdm)  # which other tests may have turned off
    for split in splits:
        trained.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
        trained.model = BPE()  # with tokens of several newlines and spaces
        trained.train_from_iterator([text], BpeTrainer(vocab_size=500, show_progress=False))
        read: list[torch.Tensor] = []
        for part, delay in ((10**9, 100.0), (50, 0.0)):
            monkeypatch.setattr(texts_olmem, "PART", part)
            for module in (stream_olmem, texts_olmem):
                monkeypatch.setattr(module, "DELAY", delay)
            stream = speaker(**SINKS).stream(PreTrainedTokenizerFast(tokenizer_object=trained))
            read.append(stream.texts.tokenize(text, begins=True))
            stream.read(text[:2000])
            shown = capsys.readouterr().err
            assert ("Reading: 100%" in shown and "Tokenizing: 100%" in shown) == (delay == 0.0)
        assert torch.equal(*read) and len(texts_olmem.cut(text)) > 50


# Chats


class Recorded(OlmemStream):
    """Keeps what the model was given to read."""

    def forward(self, ids, mask):
        vars(self).setdefault("given", []).extend(ids[0].tolist())
        return super().forward(ids, mask)

    def text(self) -> str:
        return self.texts.tokenizer.decode([*vars(self)["given"], self.rows[0].tail[-1]])  # pyright: ignore


USER = {"role": "user", "content": "Two?"}
CHATS = {
    "system, ended by the model": ([{"role": "system", "content": "Be."}, USER], "Hi <|im_end|>", 99),
    "default system, broken off": ([USER], "Hello there", 1),
    "with an example": ([USER, {"role": "assistant", "content": "2"}, {"role": "user", "content": "4?"}], " 4 ", 99),
}


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_is_read_turn_by_turn(name, tokenizer):
    """The text that the stream has is the template's rendering of the whole chat, read once."""
    messages, answer, most = CHATS[name]
    ids, end = tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.convert_tokens_to_ids("<|im_end|>")
    stream = Recorded(speaker(**SINKS), tokenizer)
    chat: list[Any] = []
    said = ""
    for turn in range(3):
        new = messages if turn == 0 else [{"role": "user", "content": f"Turn {turn}"}]
        stream.read(new)
        said = "".join(stream.write(min(most, len(ids)), **saying(ids), eos_token_id=end))
        chat += [*new, {"role": "assistant", "content": said}]
    stream.read([USER])
    rendered = tokenizer.apply_chat_template([*chat, USER], tokenize=False)
    assert said.strip() and rendered.count("<|bos|>") == 1 and len(chat) >= 6
    spaces = str.maketrans("", "", " ")  # the template trims what was written with spaces around it
    assert stream.text().translate(spaces) == rendered.translate(spaces)


def test_a_chat_may_follow_a_text(tokenizer):
    """It does not begin the text then, and what is read within the assistant's turn is part of it."""
    stream = Recorded(speaker(**SINKS), tokenizer)
    stream.read("A book.\n")
    stream.read([USER])
    list(stream.write(2, **saying(tokenizer("So", add_special_tokens=False).input_ids)))
    stream.read(" be it")
    stream.read([USER])
    chat = tokenizer.apply_chat_template([USER, {"role": "assistant", "content": "So be it"}, USER], tokenize=False)
    assert stream.text() == "A book.\n" + chat.removeprefix("<|bos|>")
    assert [message["content"] for message in stream.rows[0].messages] == ["Two?", "So be it", "Two?"]


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer):
    model, tokenizer = speaker(**SINKS), PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)
    with pytest.raises(ValueError, match=r"`tokenizer.chat_template` must be set to read messages \(got None\)"):
        model.stream(tokenizer).read([USER])
    for template in (
        "{{ messages | length }}: {% for message in messages %}{{ message.content }}\n{% endfor %}",
        "{% for message in messages %}{% if loop.last %}NEW {% endif %}{{ message.content }}\n{% endfor %}",
        "{% for message in messages %}{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}<th>{% endif %}",
    ):
        tokenizer.chat_template = template
        stream = model.stream(tokenizer)
        stream.read([USER])
        with pytest.raises(ValueError, match=r"must render the turns that were read as it did .* `read` it as text"):
            list(stream.write(2, **saying([40, 41])))
            stream.read([USER])


# What is refused


def test_what_a_stream_cannot_do_is_an_error_with_the_way_out(tokenizer, tmp_path):
    model = speaker(**SINKS)
    stream, ids = model.stream(tokenizer), model.stream()

    def refused(call, message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            call()

    refused(lambda: next(stream.write(1)), "each row must have read something .* `read` a text first")
    refused(lambda: stream.save(tmp_path / "x"), "rows have read two tokens or more")
    refused(lambda: stream.read(""), r"`new` must have at least one token \(got none\)")
    refused(lambda: stream.read([]), r"`new` must be a text, ids or messages, .* \(got an empty list\)")
    refused(lambda: stream.read(USER), "put a single message into a list")
    refused(lambda: stream.read([USER, "text"]), "must have only messages")
    refused(lambda: stream.read([1.5]), "must be a text, or a list of ids or messages")
    refused(lambda: stream.read([3, 2064]), r"ids from 0 to 2063 \(got 3 to 2064\)")
    refused(lambda: tiny(**SINKS).stream(tokenizer).read("a text"), "use the tokenizer of the model")
    refused(lambda: ids.read("text"), r"`tokenizer` must be given .* \(got None\)")
    refused(lambda: model.stream("stream.safetensors"), "`tokenizer` must be a tokenizer .* give a file as `path`")
    stream.reset()
    stream.read(["a text", "another"])
    refused(lambda: stream.read("one"), r"one text for each row of the stream, 2 \(got 1\); give None")
    refused(lambda: stream.read(["more", ""]), r"`new\[1\]` must have at least one token")
    refused(lambda: stream.read([None, None]), "something to read in some row")
    refused(lambda: stream.reset([0, 2]), r"`rows` must be among the 2 of the stream")
    refused(lambda: next(stream.write(1, num_beams=2)), r"must be greedy or sample .* \(got beam_search")
    refused(lambda: next(stream.write(1, num_return_sequences=2, do_sample=True)), "4 texts of 2 rows")
    refused(lambda: next(stream.write(1, prompt_lookup_num_tokens=2)), r"\(got assisted_generation")
    refused(lambda: next(stream.write(1, streamer=1)), "`streamer` must not be given to `write`")
    assert len(list(stream.write(2, **saying([40, 41], [42, 43])))) == 2
    model.set_attn_implementation("flex_attention")
    refused(model.stream, r"`attn_implementation` must be 'sdpa' or 'eager' .* \(got 'flex_attention'\)")


def test_a_loop_that_goes_on_is_not_crossed(tmp_path):
    """It may be saved within the loop. What a call was broken off in, or used beside it, is noticed."""
    model, stream = tiny(**SINKS), tiny(**SINKS).stream()
    stream.read(tokens(9))
    loop = stream.write(9, **GREEDY)
    first = next(loop)
    stream.save(tmp_path / "stream")
    assert next(loop) == next(model.stream(path=tmp_path / "stream").write(1, **GREEDY))
    stream.read([first])
    with pytest.raises(ValueError, match="`write` must be left before the stream reads"):
        next(loop)
    with torch.no_grad():
        model(tokens(1, 2), past_key_values=stream.cache)
    for call in (lambda: stream.read([1]), lambda: next(stream.write(1)), lambda: stream.save(tmp_path / "stream")):
        with pytest.raises(ValueError, match="a call was broken off, or the cache was used without the stream"):
            call()


@pytest.mark.parametrize("after", [0, 1])
def test_what_was_broken_off_is_not_gone_on_from(after, monkeypatch):
    """As it chooses a token, or between two pieces of what it reads; a new beginning is possible."""
    calls: list[int] = []

    def fail(*_):
        calls.append(1)
        if len(calls) > after:
            raise RuntimeError("broken off")
        return _[-1]

    def goes_on(stream: OlmemStream) -> None:
        for call in (lambda: stream.read([1]), lambda: next(stream.write(1))):
            with pytest.raises(ValueError, match="a call was broken off"):
                call()
        stream.reset()
        stream.read(tokens(9))
        assert len(list(stream.write(2, **GREEDY))) == 2

    stream = tiny(**SINKS).stream()
    stream.read(tokens(9))
    with pytest.raises(RuntimeError, match="broken off"):
        list(stream.write(3, **GREEDY, logits_processor=LogitsProcessorList([fail])))
    goes_on(stream)
    calls.clear()
    monkeypatch.setattr(stream_olmem, "PIECES", {"cpu": 4})
    monkeypatch.setattr(stream, "forward", lambda *given: fail(OlmemStream.forward(stream, *given)))
    with pytest.raises(RuntimeError, match="broken off"):
        stream.read(tokens(9))
    monkeypatch.undo()
    goes_on(stream)


def test_a_file_is_of_a_stream_and_of_its_model(tmp_path):
    model = tiny(**SINKS)
    stream = model.stream()
    stream.read(tokens(2, 9))
    stream.save(tmp_path / "stream")
    cache = OlmemCache.load(tmp_path / "stream", model.config)
    rows: Any = cache.notes
    for damage in (
        {"rows": rows["rows"][:1]},
        {"rows": [rows["rows"][0] | {"tail": [61]}, rows["rows"][1]]},
        {"rows": [rows["rows"][0] | {"count": 7}, rows["rows"][1]]},
        {"rows": [{}, {}]},
        {"is_batch": 1},
        {"rows": 5},
    ):
        cache.notes = rows | damage
        cache.save(tmp_path / "damaged")
        with pytest.raises(ValueError, match=r"must be a whole file of `OlmemStream.save`"):
            model.stream(path=tmp_path / "damaged")
    cache.notes = None
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="of a cache without its stream"):
        model.stream(path=tmp_path / "cache")
    with pytest.raises(ValueError, match="`past_key_values` is of another model, whose `num_sink_tokens` was 2"):
        tiny(**SINKS | {"num_sink_tokens": 1}).stream(path=tmp_path / "stream")
