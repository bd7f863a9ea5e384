"""A million tokens through the demo model: process memory, time a token, and the loss on a text repeated without end.

    python benchmarks/stream.py [--tokens 1000000] [--chunk 512] [--json]

The demo checkpoint, converted and loaded with every layer sliding (its window is 256) and 4 sinks, reads the sources of
standard-library modules, 8000 tokens of them over and over, by one OlmemCache. Each row is a point of the stream:

resident  memory of the process, once the allocator has given back what it holds free, which varies by chance
cache     the bytes of the cache's buffers
us/token  in the calls of `--chunk` tokens since the row before
us/step   in calls of one token, here: the median
÷ young   the time of both beside a copy of the stream as it was before the first row, call by call in turns: whatever
          else the machine does at that moment is the same for both
loss      nats a token over the last 8000 tokens, which are the whole text once: so rows compare
"""

import argparse
import contextlib
import copy
import ctypes
import gc
import inspect
import json
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
import transformers
from olmem import OlmemCache, OlmemForCausalLM
from olmem_convert import convert
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "model_cards/demo/native/step1872"
MODULES = ("bisect", "heapq", "textwrap", "shlex", "contextlib")
PASS = 8000  # tokens of the text: fewer than the first row's, which so has read all of it
MARKS = (10_000, 20_000, 50_000, 100_000, 200_000, 500_000)
STEPS, TURNS = 200, 50  # calls beside the young stream: of one token, of a chunk


def resident() -> int:
    """Bytes; where there is no /proc, the most so far."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmRSS:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Reader:
    """A stream of one cache over text ids (N,), repeated."""

    def __init__(self, model: OlmemForCausalLM, ids: torch.Tensor):
        self.model, self.ids = model, ids
        self.cache = OlmemCache(model.config)
        self.tokens = 0
        self.losses = torch.full(ids.shape, torch.nan)  # of each token of the text when it was last read

    def read(self, length: int) -> float:
        """The model's seconds for one call."""
        place = torch.arange(self.tokens, self.tokens + length + 1) % len(self.ids)
        text = self.ids[place]
        start = time.perf_counter()
        logits = self.model(text[None, :-1], past_key_values=self.cache).logits
        seconds = time.perf_counter() - start
        self.losses[place[1:]] = cross_entropy(logits[0], text[1:], reduction="none")
        self.tokens += length
        return seconds

    def young(self) -> "Reader":
        """A copy that goes on by itself."""
        other = copy.copy(self)
        other.cache, other.losses = copy.deepcopy(self.cache), self.losses.clone()
        return other


def beside(old: Reader, young: Reader, length: int, calls: int) -> tuple[list[float], float]:
    """Seconds of the old stream's calls, and how many times the young one's they are."""
    times = []
    for call in range(calls):
        pair = (old, young) if call % 2 else (young, old)
        seconds = {reader: reader.read(length) for reader in pair}
        times.append((seconds[old], seconds[young]))
    return [own for own, _ in times], statistics.median(own / other for own, other in times)


@torch.no_grad()
def stream(
    model: OlmemForCausalLM,
    ids: torch.Tensor,
    total: int,
    chunk: int,
    marks: tuple[int, ...] = MARKS,
    report: Callable[[dict], None] = lambda row: None,
    progress: tqdm | None = None,
) -> list[dict]:
    """Reads `total` tokens of text ids (N,), repeated, and describes each mark below it, and the end."""
    reader, first, rows = Reader(model, ids), None, []
    for mark in [*(mark for mark in sorted(marks) if mark < total), total]:
        stretch = mark - reader.tokens
        # All calls are of one token or of a chunk: other lengths leave the allocator in another state at each row.
        steps = min(STEPS, stretch // 4)
        steps += (stretch - steps) % chunk
        turns = min(TURNS, (stretch - steps) // 2 // chunk) if chunk > 1 else 0
        calls, seconds = (stretch - steps) // chunk - turns, 0.0
        for _ in range(calls):
            seconds += reader.read(chunk)
            if progress is not None:
                progress.update(chunk)
        microseconds = 1e6 * seconds / max(calls * chunk, 1)
        first = first or reader.young()
        young = first.young()
        _, call_ratio = beside(reader, young, chunk, turns) if turns else ([], None)
        step_times, step_ratio = beside(reader, young, 1, steps)
        del young
        if progress is not None:
            progress.update(steps + turns * chunk)
        row = {
            "tokens": reader.tokens,
            "resident": resident(),
            "cache": reader.cache.nbytes,
            "microseconds": microseconds,
            "step_microseconds": 1e6 * statistics.median(step_times),
            "call_ratio": step_ratio if call_ratio is None else call_ratio,
            "step_ratio": step_ratio,
            "loss": float(reader.losses.double().nanmean()),
        }
        rows.append(row)
        report(row)
    return rows


def verdict(rows: list[dict]) -> dict[str, float]:
    first, last = rows[0], rows[-1]
    return {
        "memory_ratio": last["resident"] / first["resident"],
        "call_ratio": last["call_ratio"],
        "step_ratio": last["step_ratio"],
        "loss_difference": last["loss"] - first["loss"],
    }


def load(folder: Path) -> tuple[OlmemForCausalLM, torch.Tensor]:
    """The demo with every layer bounded, and the text's ids."""
    convert(DEMO, folder)
    model = OlmemForCausalLM.from_pretrained(folder, layer_types="sliding_attention", num_sink_tokens=4)
    text = "".join(inspect.getsource(import_module(name)) for name in MODULES)
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    if len(ids) < PASS:
        raise SystemExit(f"the text has {len(ids)} tokens only: name more in MODULES")
    return model.eval(), ids[:PASS].clone()


def line(row: dict) -> str:
    return (
        f"{row['tokens']:>9}{row['resident'] / 2**20:>10.1f}{row['cache'] / 2**20:>8.2f}"
        f"{row['microseconds']:>10.1f}{row['call_ratio']:>9.3f}"
        f"{row['step_microseconds']:>10.0f}{row['step_ratio']:>9.3f}{row['loss']:>10.5f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="%(default)s")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a call (%(default)s); 1 is token by token")
    parser.add_argument("--threads", type=int, help="fewer than there are cores, where others compute too")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.tokens < 2 or arguments.chunk < 1:
        parser.error("--tokens must be at least 2, --chunk at least 1")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    with tempfile.TemporaryDirectory() as scratch:
        model, ids = load(Path(scratch) / "demo")
    if not arguments.json:
        print(" " * 9 + "       MiB     MiB")
        print("   tokens  resident   cache  us/token  ÷ young   us/step  ÷ young      loss", flush=True)

    # On a person's screen only.
    with tqdm(total=arguments.tokens, unit="tok", leave=False, disable=arguments.json or None) as progress:

        def report(row: dict) -> None:
            if not arguments.json:
                progress.write(line(row))
                sys.stdout.flush()

        rows = stream(model, ids, arguments.tokens, arguments.chunk, report=report, progress=progress)

    result = verdict(rows)
    if arguments.json:
        print(json.dumps({"rows": rows, "verdict": result}, indent=2))
        return
    print(
        f"from token {rows[0]['tokens']} to {rows[-1]['tokens']}: memory × {result['memory_ratio']:.4f}, "
        f"time × {result['call_ratio']:.3f} in calls of {arguments.chunk}, "
        f"× {result['step_ratio']:.3f} token by token, loss {result['loss_difference']:+.1e}"
    )


if __name__ == "__main__":
    main()
