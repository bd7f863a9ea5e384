"""Speed and memory on a CPU beside Transformers' Olmo3, the same random weights in both: decoding and prefill.

    python benchmarks/decode.py [--sections decode,prefill] [--full] [--json]

By default the models have 4 sliding layers of width 1024 (16 heads, an MLP of 2752) and a vocabulary of 8192, so that
no more of the time than in a large model goes into logits; float32, `attn_implementation="sdpa"`.

decode: milliseconds a token, each a whole call of the model with its cache, once the window is full. All read the same
tokens, in turns of `--block`; the ratio to Olmo3 is the median over the turns, beside it the quarter and three-quarter
quantiles. `K = V` has no value projection and caches one tensor; its ratio is to Olmem of the same widths. `logits` is
the largest difference from Olmo3's logits at any step of the last turn.

prefill: tokens a second for a whole prompt, logits of its last token only, and the most memory beyond what the process
held before it: weights and a first short call. Segments of memory have 512 tokens. Each row is a process of its own.
Olmo3 attends with a mask of length × length: it is measured at the largest length with `--full` only, which takes
minutes and several GiB.
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from olmem import OlmemCache, OlmemForCausalLM
from olmem.compat_olmem import CACHE_NAME
from transformers import DynamicCache, Olmo3Config, Olmo3ForCausalLM

MIB = 2**20
PEERS = {
    "Olmo3": {},
    "Olmem": {},
    "Olmem, 4 sinks": {"num_sink_tokens": 4},
    "Olmem, K = V": {"shared_projections": "key_value"},
}
MEMORY = {"num_memory_tokens": 16, "memory_segment_length": 512}
VARIANTS = PEERS | {"Olmem, memory": MEMORY}  # of Olmem, all of which read prompts
BESIDE = {"Olmem, K = V": "Olmem"}  # what a peer is measured beside, if not Olmo3
CHUNK = 2048  # tokens of a call in chunked prefill


def save_weights(folder: Path, arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    config = Olmo3Config(
        vocab_size=arguments.vocab,
        hidden_size=arguments.width,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.heads,
        max_position_embeddings=65536,
        layer_types=["sliding_attention"] * arguments.layers,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )
    Olmo3ForCausalLM(config).save_pretrained(folder)


def load(peer: str, folder: Path, window: int) -> tuple[Any, Callable[[], Any]]:
    """A model and what makes its cache."""
    options: dict[str, Any] = {"sliding_window": window, "attn_implementation": "sdpa", "dtype": torch.float32}
    if peer == "Olmo3":
        model = Olmo3ForCausalLM.from_pretrained(folder, **options)
        return model.eval(), lambda: DynamicCache(config=model.config)
    model = OlmemForCausalLM.from_olmo(folder, **options, **VARIANTS[peer])
    return model.eval(), lambda: OlmemCache(model.config)


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


# Decoding


@torch.no_grad()
def decode(folder: Path, window: int, rounds: int, block: int) -> list[dict]:
    models, caches = {}, {}
    for peer in PEERS:
        models[peer], make_cache = load(peer, folder, window)
        caches[peer] = make_cache()
        # One copy of the weights: where they lie in memory is the same for all.
        names = models[peer].state_dict().keys()
        weights = {name: weight for name, weight in models["Olmo3"].state_dict().items() if name in names}
        models[peer].load_state_dict(weights, assign=True)
    generator = torch.Generator().manual_seed(1)
    vocabulary = models["Olmo3"].config.vocab_size
    prompt = torch.randint(vocabulary, (1, window + window // 4), generator=generator)
    for peer, model in models.items():
        for ids in prompt.split(512, dim=1):
            model(ids, **{CACHE_NAME: caches[peer]}, logits_to_keep=1)

    times: dict[str, list[list[float]]] = {peer: [] for peer in PEERS}
    logits: dict[str, list[torch.Tensor]] = {}
    for turn in range(rounds + 1):  # the first warms up
        tokens = torch.randint(vocabulary, (block, 1, 1), generator=generator)
        order = list(PEERS)
        for peer in order[turn % len(order) :] + order[: turn % len(order)]:
            model, cache = models[peer], caches[peer]
            seconds, logits[peer] = [], []
            for ids in tokens:
                start = time.perf_counter()
                output = model(ids, **{CACHE_NAME: cache})
                seconds.append(time.perf_counter() - start)
                logits[peer].append(output.logits[0, -1])
            if turn:
                times[peer].append(seconds)

    rows = []
    for peer in PEERS:
        of_rounds = zip(times[peer], times[BESIDE.get(peer, "Olmo3")], strict=True)
        ratios = [statistics.median(own) / statistics.median(other) for own, other in of_rounds]
        row = {
            "window": window,
            "peer": peer,
            "beside": BESIDE.get(peer, "Olmo3"),
            "milliseconds": 1e3 * statistics.median(chain.from_iterable(times[peer])),
            "ratio": quartiles(ratios),
        }
        if peer == "Olmem":  # with sinks, others are right
            row["logits"] = float((torch.stack(logits[peer]) - torch.stack(logits["Olmo3"])).abs().max())
        rows.append(row)
    return rows


def decode_line(row: dict) -> str:
    low, middle, high = row["ratio"]
    line = f"{row['window']:>6}  {row['peer']:<16}{row['milliseconds']:>9.2f}"
    if row["peer"] != "Olmo3":
        line += f"{middle:>9.3f}  ({low:.3f}–{high:.3f})"
    return line + (f"{row['logits']:>11.1e}" if "logits" in row else "")


# Prefill


def memory(field: str) -> int:
    """Bytes: `VmRSS`, now resident, or `VmHWM`, the most so far, which is all that systems without /proc tell."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(rf"{field}:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def prefill(peer: str, folder: Path, window: int, length: int, chunk: int | None, threads: int) -> dict:
    """One prompt in this process, at once or by chunks."""
    quiet(threads)
    model, make_cache = load(peer, folder, window)
    prompt = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(2))
    cache = make_cache()
    for ids in prompt[:, : 2 * window].split(window // 2, dim=1):
        model(ids, **{CACHE_NAME: cache}, logits_to_keep=1)
    del cache
    gc.collect()
    with contextlib.suppress(OSError):  # Linux: forget the most that was resident so far
        Path("/proc/self/clear_refs").write_text("5")
    cache, before = make_cache(), memory("VmRSS")
    start = time.perf_counter()
    for ids in prompt.split(chunk or length, dim=1):
        model(ids, **{CACHE_NAME: cache}, logits_to_keep=1)
    seconds = time.perf_counter() - start
    return {
        "peer": peer,
        "length": length,
        "chunk": chunk,
        "tokens_per_second": length / seconds,
        "peak_mib": (memory("VmHWM") - before) / MIB,
    }


def prefills(folder: Path, window: int, lengths: list[int], full: bool) -> Iterator[dict]:
    def apart(*arguments) -> dict:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(prefill, *arguments).result()

    for length in lengths:
        ways: list[tuple[str, int | None]] = [("Olmem", CHUNK), *((peer, None) for peer in VARIANTS if peer != "Olmo3")]
        if full or length < max(lengths):
            ways.insert(0, ("Olmo3", None))
        for peer, chunk in ways:
            yield apart(peer, folder, window, length, chunk, torch.get_num_threads())


def prefill_line(row: dict) -> str:
    calls = "one call" if row["chunk"] is None else f"calls of {row['chunk']}"
    return f"{row['length']:>6}  {row['peer']:<16}{calls:<15}{row['tokens_per_second']:>9.0f}{row['peak_mib']:>10.0f}"


def quiet(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What memory.py takes too."""
    parser.add_argument("--threads", type=int, help="fewer than there are cores, where others compute too")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--intermediate", type=int, default=2752)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--json", action="store_true")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").replace("%", "%%"), formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument("--sections", default="decode,prefill")
    parser.add_argument("--windows", type=numbers, default=[4096, 256], help="of decoding (4096,256)")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each model in decoding (%(default)s)")
    parser.add_argument("--block", type=int, default=20, help="tokens in a turn (%(default)s)")
    parser.add_argument("--prefill-window", type=int, default=512, help="%(default)s")
    parser.add_argument("--lengths", type=numbers, default=[8192, 16384, 32768], help="of prompts (8192,16384,32768)")
    parser.add_argument("--full", action="store_true", help="Olmo3 at the largest length too")
    add_model_arguments(parser)
    arguments = parser.parse_args()
    sections = arguments.sections.split(",")
    if unknown := set(sections) - {"decode", "prefill"}:
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    quiet(arguments.threads)

    def show(line: str) -> None:
        if not arguments.json:
            print(line, flush=True)

    results: dict[str, list[dict]] = {section: [] for section in sections}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_weights(folder, arguments)
        if "decode" in sections:
            show("window  decoding         ms/token    ratio  (quartiles)       logits")
            for window in arguments.windows:
                for row in decode(folder, window, arguments.rounds, arguments.block):
                    results["decode"].append(row)
                    show(decode_line(row))
        if "prefill" in sections:
            show(f"length  prefill, W = {arguments.prefill_window:<16} tokens/s  peak MiB")
            for row in prefills(folder, arguments.prefill_window, arguments.lengths, arguments.full):
                results["prefill"].append(row)
                show(prefill_line(row))
    if arguments.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
