"""Generation in every way that Transformers has, and its servers over HTTP."""

import copy
import json
import os
import pickle
import socket
import subprocess
import sys
import time
import urllib.request
from threading import Thread

import pytest
import torch
from ecosystem.variants import OLMO3, WINDOW, make, make_tokenizer, save, text, tokens
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    StoppingCriteria,
    TextIteratorStreamer,
)

NEW = 3 * WINDOW
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def written(model, ids: torch.Tensor, **options) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY | options)


@pytest.mark.tool("streamers", "transformers")
def test_streamers(variant, tokenizer):
    model, ids = make(variant), tokens(1, 12)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = Thread(target=written, args=(model, ids), kwargs={"streamer": streamer})
    thread.start()
    found = "".join(streamer).split()
    thread.join()
    assert found == tokenizer.decode(written(model, ids)[0, 12:]).split()


class Enough(StoppingCriteria):
    """Stops after a number of columns."""

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 20)


@pytest.mark.tool("stopping criteria and logits processors", "transformers")
def test_criteria_and_processors(variant):
    model, ids = make(variant), tokens(1, 12)
    plain = written(model, ids)
    assert torch.equal(written(model, ids, stopping_criteria=[Enough()]), plain[:, :20])
    banned = written(model, ids, logits_processor=[lambda _, scores: scores.index_fill(1, plain[0, 12:13], -torch.inf)])
    assert plain[0, 12] not in banned[0, 12:]
    assert written(model, ids, repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=5).shape[1] > 16


@pytest.mark.tool("`prefill_chunk_size`", "transformers")
def test_prompts_in_pieces(variant):
    model, ids = make(variant), tokens(2, 30)
    assert torch.equal(written(model, ids, prefill_chunk_size=7), written(model, ids))


@pytest.mark.tool("beams", "transformers")
def test_beams(variant):
    model, ids = make(variant), tokens(2, 12)
    assert torch.equal(written(model, ids, num_beams=3), written(model, ids, num_beams=3, use_cache=False))


@pytest.mark.tool('`cache_implementation="static"`', "transformers")
def test_static_caches(variant, refuses):
    model, ids = make(variant), tokens(2, 12)
    if variant in ("sinks", "memory"):
        with refuses(r"leave it out, and generate\(\) makes an OlmemCache"):
            written(model, ids, cache_implementation="static")
        return
    assert torch.equal(written(model, ids, cache_implementation="static"), written(model, ids))


@pytest.mark.tool("`prompt_lookup_num_tokens`", "transformers")
def test_looked_up_tokens(variant, refuses):
    model, ids = make(variant), tokens(1, 6).repeat(1, 3)
    if variant in ("sinks", "memory"):
        with refuses("assist"):
            written(model, ids, prompt_lookup_num_tokens=2)
        return
    assert torch.equal(written(model, ids, prompt_lookup_num_tokens=2), written(model, ids))


@pytest.mark.tool("`generate_batch` (continuous batching)", "transformers")
def test_continuous_batching(variant, refuses):
    """Past the window."""
    model = make(variant)
    prompts = [tokens(length, seed=length).tolist() for length in (2 * WINDOW, WINDOW, 3)]
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=0)
    options = {"continuous_batching_config": ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=16)}
    if variant in ("sinks", "memory"):
        with refuses("in continuous batching, which pages keys and values alone"):
            model.generate_batch(prompts, generation_config=config, **options)
        return
    found = model.generate_batch(prompts, generation_config=config, **options)
    outputs = sorted(found.values(), key=lambda output: len(output.prompt_ids), reverse=True)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert output.generated_tokens == alone[0, len(prompt) :].tolist()


@pytest.mark.tool("`deepcopy`, `pickle`", "torch")
def test_copies(variant):
    model, ids = make(variant), tokens(1, 12)
    expected = written(model, ids)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(written(copied, ids), expected)


def answer(model, ids, queue):
    queue.put(written(model, ids).tolist())


@pytest.mark.tool("a model in a spawned process", "torch")
def test_a_spawned_process(variant):
    context = torch.multiprocessing.get_context("spawn")
    model, ids, queue = make(variant), tokens(1, 12), context.Queue()
    process = context.Process(target=answer, args=(model, ids, queue))
    process.start()
    assert queue.get(timeout=60) == written(model, ids).tolist()
    process.join()


# The server


class Server:
    """A server of a folder in a process of its own."""

    def __init__(self, folder: str, *options: str, command: tuple[str, ...] = ("olmem_convert", "serve")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        given = [sys.executable, "-m", *command, folder, "--host", "127.0.0.1", "--port", str(self.port), *options]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            given, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def __enter__(self):
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models", timeout=1):
                    return self
            except OSError:
                assert self.process.poll() is None, self.process.stdout.read()
                time.sleep(0.1)
        raise TimeoutError("the server did not start")

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def ask(self, messages: list[dict], **options) -> str:
        """What the server answers to a chat, joined where it is streamed."""
        body = {"model": self.folder, "messages": messages, "max_tokens": 10, "temperature": 0.0} | options
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            said = response.read().decode()
        if not options.get("stream"):
            return json.loads(said)["choices"][0]["message"]["content"]
        chunks = [line[6:] for line in said.splitlines() if line.startswith("data: ") and "[DONE]" not in line]
        parts = [choice["delta"].get("content") for chunk in chunks for choice in json.loads(chunk)["choices"]]
        assert len(parts) > 3
        return "".join(part or "" for part in parts)


def alone(model, messages: list[dict]) -> str:
    """What the model answers without a server."""
    tokenizer = make_tokenizer()
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"]
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def chat(server: Server, model, turns: int) -> None:
    """Talks, streamed in every other turn; the second leaves the window, and the whole is longer than the trained
    length."""
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": text(14, seed=turn)})
        said = server.ask(messages, stream=turn % 2 == 1)
        assert said.split() == alone(model, messages).split() != []
        messages.append({"role": "assistant", "content": said})


def serving(variant: str, folder: str, *options: str) -> Server:
    """The server of Olmem, or Transformers' own for its own model."""
    command = ("transformers.cli.transformers", "serve") if variant == OLMO3 else ("olmem_convert", "serve")
    return Server(folder, *options, command=command)


@pytest.mark.tool("`olmem serve`: chats, streamed too, past the window", "transformers")
def test_the_server(variant, tmp_path):
    folder = save(variant, tmp_path)
    with serving(variant, folder) as server:
        chat(server, AutoModelForCausalLM.from_pretrained(folder), 4)


@pytest.mark.tool("`olmem serve --continuous-batching`", "transformers")
def test_the_server_with_continuous_batching(variant, tmp_path, record_property):
    folder = save(variant, tmp_path)
    options = ["--continuous-batching", "--cb-num-blocks", "16", "--cb-max-batch-tokens", "32"]
    if variant in ("sinks", "memory"):
        server = serving(variant, folder, *options)
        said = server.process.communicate(timeout=60)[0]
        assert server.process.returncode == 1 and "with `--continuous-batching`; leave it out" in said
        record_property("refusal", said.strip().splitlines()[-1])
        return
    with serving(variant, folder, *options) as server:
        messages = [{"role": "user", "content": text(20)}]
        model = AutoModelForCausalLM.from_pretrained(folder)
        for stream in (False, True):
            assert server.ask(messages, stream=stream).split() == alone(model, messages).split() != []
