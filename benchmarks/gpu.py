"""What a decode step takes on one GPU, beside what its memory allows and beside Transformers' Olmo3, all in one run.

    python benchmarks/gpu.py [--rows step,generate] [--json benchmarks/results/gpu.json [--resume]]
    python benchmarks/gpu.py --draw benchmarks/results/gpu.json
    python benchmarks/gpu.py --smoke

Every figure is printed as soon as it is known: what was measured, what it is held against, and their ratio. Ceilings
come first in every run: the rate of a copy, of a matrix times a vector, and of a matrix product. The model has the 7B
shape (32 layers of width 4096, 32 heads, an MLP of 11008, a vocabulary of 100278, a window of 4096 in every layer) and
random bfloat16 weights. "Bytes read" are all weights but the embeddings, and all keys and values that a step sees.

step       a plain one-token call in a greedy loop, the window full, at early and late positions of a stream
generate   plain `generate()`, its prompt included
repeated   the tenth `generate()`, a new cache each, and the device's memory after 2 calls and after many
memory     sinks and memory tokens: a step inside a segment, with boundaries, and in a batch of random phases
full       OLMo-3's own three sliding layers to one full, with a long context
retrieval  one layer that looks up a full store
shared     key and value in one tensor beside separate ones; what is read of rings is timed by a full and a short window
grouped    eight key heads, by batch size
greedy     small models in float32: leading tokens that are those of the CPU
prompt     long prompts in one call: plain, with sinks, memory, retrieval or chunks; a million tokens; padded rows
errors     small models in half precision: distance of a step's logits from float64's, beside the same of a step that
           runs module by module
first      the first call of a process after loading, with cold and with warm Triton caches
peers      Olmo3's `generate()` in the same shape, as it comes, and with a static cache, which compiles for a minute
training   a step of a 1B model over packed documents, beside Olmo3 with each attention that runs here, and its losses

Rows stand in the order in which they are measured: what is slow comes last. A run that was broken off goes on with
`--resume` on the same machine, and only there. Rows of small models measure no time, and run in several processes.

A step's time is by wall clock, the host waiting for the device at the ends of a loop only. Where a full window or store
is needed that nobody reads the text for, it is filled with random keys and values, and the counters are set to the
position. `--smoke` runs every row in little, on a CPU in a minute; its figures mean nothing.
"""

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import olmem
import torch
import transformers
from olmem import OlmemCache, OlmemConfig, OlmemForCausalLM
from olmem.visibility_olmem import Visibility
from transformers import AutoModelForCausalLM, Olmo3Config, PreTrainedConfig

COPY = "bytes read ÷ copy rate"
LAUNCHES = 0.4  # milliseconds that a step of mixed layers may take beside its bytes
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "top-k 50, top-p 0.95": {"do_sample": True, "top_k": 50, "top_p": 0.95},
}
PROCESSES = 8  # for small models
PEERS: dict[str, dict[str, Any]] = {"dynamic": {}, "static": {"cache_implementation": "static"}}


@dataclass(frozen=True)
class Settings:
    """Holds the sizes of a run."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    key_heads: int = 8  # of `grouped`
    intermediate: int = 11008
    vocabulary: int = 100278
    window: int = 4096
    positions: tuple[int, ...] = (5_000, 100_000, 1_000_000)
    warm: int = 8  # steps before a loop is timed
    steps: int = 64  # of a loop
    repeats: int = 3  # loops, of which the median counts
    prompt: int = 512
    new: int = 256
    short_prompt: int = 32
    short_new: int = 32
    calls: int = 100
    sinks: int = 4
    memory: int = 16
    segment: int = 512
    segments: int = 2  # in the average with boundaries
    batch: int = 32
    batches: tuple[int, ...] = (1, 8, 32, 128)
    context: int = 32768
    capacity: int = 2**20
    copied: int = 2**31  # bytes
    product: int = 8192
    small_layers: int = 4
    small_width: int = 512
    small_heads: int = 8
    small_window: int = 96
    small_rows: int = 4
    small_steps: int = 32
    greedy: int = 200
    long: int = 65536
    longest: int = 2**20
    piece: int = 4096  # of Olmo3's calls
    rows: int = 16
    row_lengths: tuple[int, int] = (2048, 8192)
    train_layers: int = 16
    train_width: int = 2048
    train_heads: int = 16
    train_intermediate: int = 8192
    train_vocabulary: int = 100352
    train_window: int = 1024
    train_length: int = 16384
    train_steps: int = 8
    losses: int = 50


SMOKE = Settings(
    layers=2,
    width=64,
    heads=4,
    key_heads=2,
    intermediate=96,
    vocabulary=97,
    window=32,
    positions=(40, 1_000),
    warm=2,
    steps=3,
    repeats=1,
    prompt=16,
    new=6,
    short_prompt=8,
    short_new=4,
    calls=4,
    sinks=2,
    memory=3,
    segment=12,
    batch=3,
    batches=(1, 2),
    context=100,
    capacity=256,
    copied=2**22,
    product=128,
    small_layers=2,
    small_width=64,
    small_heads=4,
    small_window=12,
    small_rows=2,
    small_steps=8,
    greedy=20,
    long=200,
    longest=300,
    piece=64,
    rows=3,
    row_lengths=(20, 60),
    train_layers=2,
    train_width=64,
    train_heads=4,
    train_intermediate=96,
    train_vocabulary=97,
    train_window=16,
    train_length=64,
    train_steps=1,
    losses=1,
)


def small_variants(window: int) -> dict[str, dict[str, Any]]:
    """Returns what differs from a plain small model with that window, by name."""
    half = window // 2
    memory = {"num_sink_tokens": 4, "num_memory_tokens": 5, "memory_segment_length": half - 1}
    retrieval = {
        "retrieval_layers": [1],
        "retrieval_top_k": 8,
        "retrieval_capacity": 4 * window,
        "retrieval_gate_init": 0.0,
    }
    chunks = {"attention_chunk_size": half, "attention_chunk_lookback": 1, "layer_types": "chunked_attention"}
    return {
        "plain": {},
        "three sliding, one full": {"layer_types": None},
        "sinks": {"num_sink_tokens": 4},
        "chunks with look-back": chunks,
        "memory": memory,
        "memory with gates": {**memory, "memory_gate_init": 0.0},
        "retrieval": retrieval,
        "query_key": {"shared_projections": "query_key"},
        "key_value": {"shared_projections": "key_value"},
        "query_key_value": {"shared_projections": "query_key_value"},
        "value_difference": {"shared_projections": "value_difference"},
        "key_value, sinks, memory": {**memory, "shared_projections": "key_value"},
        "xpos": {"position_embedding": "xpos"},
        "linspace": {"position_embedding": "linspace"},
        "no positions": {"position_embedding": "none"},
        "grouped": {"num_key_value_heads": 2},
        "norm by head": {"qk_norm": "head"},
        "no QK-norm": {"qk_norm": "none"},
        "layer norm": {"norm_type": "layer"},
        "layer norm, no weights": {"norm_type": "layer_plain"},
        "norm before": {"norm_placement": "pre"},
        "norms around": {"norm_placement": "peri"},
        "parallel": {"norm_placement": "parallel"},
    }


GREEDY = ("plain", "sinks", "chunks with look-back", "memory", "retrieval", "key_value", "grouped")


@dataclass
class Run:
    """Holds what one run has measured."""

    settings: Settings
    device: torch.device
    variants: list[str] | None = None  # of a row of small models, where this process measures some of them
    path: Path | None = None  # of a file that holds all that is known
    figures: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    row: str = ""

    def put(
        self, name: str, measured: float, unit: str, against: str = "", reference: float | None = None, **more: Any
    ) -> None:
        """Prints and keeps a figure, what it is held against, and how many times that it is."""
        ratio = measured / reference if reference else None
        found = {"row": self.row, "name": name, "measured": measured, "unit": unit}
        found |= {"against": against, "reference": reference, "ratio": ratio, **more}
        self.keep(found)

    def keep(self, found: dict[str, Any]) -> None:
        """Prints and keeps a figure."""
        self.figures.append(found)
        print(figure_line(found), flush=True)
        self.save()

    def save(self) -> None:
        """Writes what is known to the file, if there is one."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(describe(self), indent=1) + "\n")

    def find(self, row: str, name: str) -> float | None:
        """Returns a figure that was measured before, or None."""
        found = (each["measured"] for each in self.figures if (each["row"], each["name"]) == (row, name))
        return next(found, None)

    @property
    def copy_rate(self) -> float:
        """Returns the bytes a second that a copy reads and writes."""
        rate = self.find("ceilings", "copy")
        if rate is None:
            raise RuntimeError("there are no ceilings: their row has failed")
        return 1e12 * rate

    def copy_ms(self, size: float) -> float:
        """Returns the milliseconds in which so many bytes are copied."""
        return 1e3 * size / self.copy_rate

    def wait(self) -> None:
        """Lets the host wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, work: Callable[[], Any]) -> float:
        """Returns the seconds of some work, from an idle device to an idle device."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def ids(self, *shape: int) -> torch.Tensor:
        """Returns random token ids without 0, which the peer pads with."""
        return torch.randint(1, self.settings.vocabulary, shape, device=self.device)

    def model(self, **changes: Any) -> OlmemForCausalLM:
        """Makes a model of the 7B shape."""
        shape = large_shape(self.settings)
        return build(OlmemConfig(**{**shape, **changes}), torch.bfloat16, self.device)

    def free(self) -> None:
        """Gives back what nobody holds any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def allocated(self) -> int:
        """Returns the bytes of tensors on the device, 0 on a CPU, where nobody counts them."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


def figure_line(found: dict[str, Any]) -> str:
    """Returns a figure as a line of the printed table."""
    line = f"{found['row']:<10}{found['name']:<50}{found['measured']:>12.5g} {found['unit']:<10}"
    if found["reference"] is None:
        return line.rstrip()
    ratio = "" if found["ratio"] is None else f"× {found['ratio']:.3f} "
    return f"{line}{found['reference']:>12.5g}  {ratio:<9}{found['against']}"


def large_shape(settings: Settings) -> dict[str, Any]:
    """Returns the fields of the 7B shape, which Olmo3 has too."""
    return {
        "vocab_size": settings.vocabulary,
        "hidden_size": settings.width,
        "intermediate_size": settings.intermediate,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads,
        "max_position_embeddings": 65536,
        "sliding_window": settings.window,
        "layer_types": ["sliding_attention"] * settings.layers,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def build(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """Makes a model with random weights where it shall be."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def weight_bytes(model: OlmemForCausalLM) -> int:
    """Returns the bytes of all weights that a step reads whole."""
    return sum(weight.nbytes for name, weight in model.named_parameters() if "embed_tokens" not in name)


def window_bytes(model: OlmemForCausalLM, batch: int, position: int) -> int:
    """Returns the bytes of the keys and values that a step of a batch sees at a position, without retrieval."""
    config = model.config
    slots = 0
    for layer_type in config.layer_types:
        visibility = Visibility.of(config, layer_type)
        slots += min(position, visibility.span or position) + visibility.num_prefix
    tensors = 1 if config.caches_one_tensor else 2
    return batch * slots * tensors * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


# Caches


def read(run: Run, model: OlmemForCausalLM, batch: int, length: int) -> OlmemCache:
    """Returns a cache that has read random tokens."""
    cache = OlmemCache(model.config)
    model(run.ids(batch, length), past_key_values=cache, logits_to_keep=1)
    return cache


def move(cache: OlmemCache, columns: int, padding: torch.Tensor | None = None) -> None:
    """Sets the counters of a cache as if it had read so many columns, with that padding (B,) on the left."""
    seen = torch.full_like(cache.seen, columns)
    cache.counters.set(
        seen=seen if padding is None else seen - padding, columns=torch.full_like(cache.columns, columns)
    )


def fill(cache: OlmemCache, columns: int, padding: torch.Tensor | None = None) -> None:
    """Lets a cache that has read something stand as if it had read so many columns of random keys and values."""
    for layer in cache.layers:
        layer.reserve(columns)
        if layer.store_limit:
            layer.reserve_store(columns)
        for buffer in layer.buffers.values():
            buffer.normal_()
    move(cache, columns, padding)


def step_ms(
    run: Run, model: OlmemForCausalLM, cache: OlmemCache, steps: int | None = None, repeats: int | None = None
) -> float:
    """Returns the milliseconds of a step in a greedy loop, the median of some loops after a few steps to warm up."""
    settings = run.settings
    length, repeats = steps or settings.steps, repeats or settings.repeats
    ids = run.ids(len(cache.seen), 1)

    def loop(count: int) -> None:
        nonlocal ids
        for _ in range(count):
            ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)

    loop(settings.warm)
    return 1e3 * statistics.median(run.time(lambda: loop(length)) for _ in range(repeats)) / length


def plain_step_ms(run: Run) -> float:
    """Returns the milliseconds of a plain step with the window full, measured if no row has."""
    first = run.settings.positions[0]
    known = run.find("step", step_name(first))
    if known is not None:
        return known
    model = run.model()
    cache = read(run, model, 1, run.settings.short_prompt)
    fill(cache, first)
    return step_ms(run, model, cache)


def step_name(position: int) -> str:
    """Returns what a plain step at a position is called."""
    return f"step at token {position:,}"


# Rows


def measure_ceilings(run: Run) -> None:
    """Measures what the device can do at best."""
    settings, device = run.settings, run.device

    def rate(work: Callable[[], Any], calls: int) -> float:
        """Returns calls a second."""

        def loop() -> None:
            for _ in range(calls):
                work()

        loop()
        return calls / min(run.time(loop) for _ in range(3))

    source = torch.empty(settings.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    run.put("copy", 2 * source.nbytes * rate(lambda: target.copy_(source), 20) / 1e12, "TB/s")
    matrix = torch.randn(16 * settings.width, settings.width, dtype=torch.bfloat16, device=device)
    vector = torch.randn(settings.width, 1, dtype=torch.bfloat16, device=device)
    run.put(
        "matrix times vector",
        matrix.nbytes * rate(lambda: matrix @ vector, 50) / 1e12,
        "TB/s",
        "copy",
        run.find("ceilings", "copy"),
    )
    square = torch.randn(settings.product, settings.product, dtype=torch.bfloat16, device=device)
    run.put("matrix product", 2 * settings.product**3 * rate(lambda: square @ square, 20) / 1e12, "TFLOP/s")


def measure_step(run: Run) -> None:
    """Measures a plain step where a stream is young and where it is old."""
    settings, model = run.settings, run.model()
    cache = read(run, model, 1, settings.window)
    for position in settings.positions:
        move(cache, position)
        took = step_ms(run, model, cache)
        size = weight_bytes(model) + window_bytes(model, 1, position)
        run.put(step_name(position), took, "ms", COPY, run.copy_ms(size))
    first, last = (run.find("step", step_name(settings.positions[index])) for index in (0, -1))
    if first is not None and last is not None:
        run.put("… the last position", last, "ms", "the first", first)


def generate_seconds(run: Run, model: Any, ids: torch.Tensor, new: int, **options: Any) -> float:
    """Returns the seconds of a `generate()`, which must give as many tokens as it was asked for."""
    made: list[torch.Tensor] = []
    took = run.time(lambda: made.append(model.generate(ids, max_new_tokens=new, **options)))
    if made[0].shape[1] != ids.shape[1] + new:
        raise RuntimeError(f"`generate` must give {new} tokens (got {made[0].shape[1] - ids.shape[1]})")
    return took


def measure_generate(run: Run) -> None:
    """Measures plain `generate()`, and those of Olmo3 that were asked for."""
    settings, model = run.settings, run.model()
    ids = run.ids(1, settings.prompt)
    middle = settings.prompt + settings.new // 2
    ceiling = run.copy_ms(weight_bytes(model) + window_bytes(model, 1, middle))
    for mode, options in MODES.items():
        first = generate_seconds(run, model, ids, settings.new, **options)
        calls = [generate_seconds(run, model, ids, settings.new, **options) for _ in range(settings.repeats)]
        prompts = [generate_seconds(run, model, ids, 1, **options) for _ in range(settings.repeats)]
        took = statistics.median(calls)
        run.put(generate_name(mode), 1e3 * took / settings.new, "ms/token", COPY, ceiling, first_call_seconds=first)
        after = 1e3 * (took - statistics.median(prompts)) / (settings.new - 1)
        run.put(f"{generate_name(mode)}, after its prompt", after, "ms/token", COPY, ceiling)


def generate_name(mode: str) -> str:
    """Returns what plain `generate()` is called."""
    return f"generate, {mode}"


def measure_peers(run: Run) -> None:
    """Measures `generate()` of Olmo3 in the same shape, with both kinds of caches."""
    settings = run.settings
    ids = run.ids(1, settings.prompt)
    model = build(Olmo3Config(**{**large_shape(settings), "pad_token_id": 0}), torch.bfloat16, run.device)
    for peer, cache in PEERS.items():
        # A static cache is compiled for its length.
        warm_up = settings.new if cache else settings.short_new
        for mode, options in MODES.items():
            if not (cache or mode == "greedy"):  # slow enough for one figure to say it
                continue
            first = generate_seconds(run, model, ids, warm_up, **options, **cache)
            took = 1e3 * generate_seconds(run, model, ids, settings.new, **options, **cache) / settings.new
            own = run.find("generate", generate_name(mode))
            name = f"Olmo3, {peer}, {mode}"
            run.put(name, took, "ms/token", "Olmem", own, first_call_seconds=first, first_call_tokens=warm_up)
    torch._dynamo.reset()


def first_tokens(run: Run) -> dict[str, float]:
    """Returns the seconds of the first two calls of this process after its model was made."""
    with torch.no_grad():
        model, ids = run.model(), run.ids(1, run.settings.short_prompt)
        names = ("first", "second")
        return {name: generate_seconds(run, model, ids, 2, do_sample=False) for name in names}


def measure_first(run: Run) -> None:
    """Measures the first token of a process, with Triton's caches empty and with those of a process before."""
    run.free()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"TRITON_CACHE_DIR": f"{scratch}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor"}
        command = [sys.executable, __file__, "--first-token", *(["--smoke"] if run.settings == SMOKE else [])]
        for state in ("cold", "warm"):
            child = subprocess.run(command, env={**os.environ, **folders}, capture_output=True, text=True)
            if child.returncode:
                raise RuntimeError(f"a process for the first token has failed: {child.stderr[-2000:]}")
            found = json.loads(child.stdout.splitlines()[-1])
            name = f"first generate() of 2 tokens, {state} caches"
            run.put(name, found["first"], "s", "the second call", found["second"])


def measure_repeated(run: Run) -> None:
    """Measures whether the next `generate()` with a new cache costs anything but its prompt and its steps."""
    settings, model = run.settings, run.model()
    ids, new = run.ids(1, settings.prompt), settings.short_new
    calls = [generate_seconds(run, model, ids, new, do_sample=False) for _ in range(10)]
    prompts = [run.time(lambda: read(run, model, 1, settings.prompt)) for _ in range(5)]
    cache = read(run, model, 1, settings.prompt)
    steps = new * step_ms(run, model, cache, new)
    sum_ms = 1e3 * statistics.median(prompts) + steps
    run.put(f"tenth generate() of {new} tokens", 1e3 * calls[9], "ms", f"prompt + {new} steps", sum_ms, calls=calls)
    del cache
    held, short = {}, ids[:, : settings.short_prompt]
    for call in range(1, settings.calls + 1):
        model.generate(short, max_new_tokens=4, do_sample=False)
        if call in (2, settings.calls):
            run.wait()
            gc.collect()
            held[call] = run.allocated() / 2**30
    run.put(f"allocated after {settings.calls} calls", held[settings.calls], "GiB", "after 2 calls", held[2])


def measure_memory(run: Run) -> None:
    """Measures what sinks and memory tokens add to a step, inside segments and over their boundaries."""
    settings, segment = run.settings, run.settings.segment
    plain = plain_step_ms(run)
    run.free()
    fields = {
        "num_sink_tokens": settings.sinks,
        "num_memory_tokens": settings.memory,
        "memory_segment_length": segment,
    }
    model = run.model(**fields)
    full = segment * math.ceil(2 * settings.window / segment)  # where a segment begins
    cache = read(run, model, 1, settings.short_prompt)
    fill(cache, full + 1)
    steps = min(settings.steps, (segment - 1 - settings.warm) // settings.repeats)
    run.put("step inside a segment", step_ms(run, model, cache, steps), "ms", "plain step", plain)
    move(cache, full + segment - settings.warm // 2)  # so that a boundary is crossed before the time starts
    steps = settings.segments * segment
    name = f"step over {settings.segments} boundaries"
    run.put(name, step_ms(run, model, cache, steps, 1), "ms", "plain step", plain)
    del cache

    padding = torch.randint(segment, (settings.batch,), device=run.device)
    mask = (torch.arange(segment, device=run.device) >= padding[:, None]).long()
    ids = run.ids(settings.batch, segment)
    took = {}
    for name in ("memory", "plain"):
        if name == "plain":
            del model
            run.free()
            model = run.model()
        cache = OlmemCache(model.config)
        model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        fill(cache, full + segment, padding)
        took[name] = step_ms(run, model, cache, segment, 1) if name == "memory" else step_ms(run, model, cache)
        del cache
        run.free()
    name = f"batch {settings.batch}, random phases"
    run.put(name, took["memory"], "ms", "the same without sinks and memory", took["plain"])


def measure_full(run: Run) -> None:
    """Measures a step of three sliding layers to one full in a long context."""
    model, context = run.model(layer_types=None), run.settings.context
    cache = read(run, model, 1, run.settings.short_prompt)
    fill(cache, context)
    took = step_ms(run, model, cache)
    size = weight_bytes(model) + window_bytes(model, 1, context)
    run.put(f"3 : 1 layers, {context:,} tokens", took, "ms", f"{COPY} + {LAUNCHES} ms", run.copy_ms(size) + LAUNCHES)


def measure_retrieval(run: Run) -> None:
    """Measures what one layer that searches a full store adds to a step."""
    settings, plain = run.settings, plain_step_ms(run)
    run.free()
    model = run.model(retrieval_layers=[settings.layers // 2], retrieval_capacity=settings.capacity)
    cache = read(run, model, 1, settings.short_prompt)
    fill(cache, 2 * settings.capacity)
    took = step_ms(run, model, cache)
    run.put(f"step, one layer looks up {settings.capacity:,} tokens", took, "ms", "plain step", plain)
    keys = settings.capacity * model.config.num_key_value_heads * model.config.head_dim * model.dtype.itemsize
    run.put("… more than a plain step", took - plain, "ms", "its keys ÷ copy rate", run.copy_ms(keys))


def measure_shared(run: Run) -> None:
    """Measures one tensor for keys and values beside two, and the rate at which a batch's rings are read."""
    settings = run.settings
    speeds: dict[tuple[str, int], float] = {}
    for shared in ("none", "key_value"):
        model = run.model(shared_projections=shared)
        for batch in (1, settings.batch):
            cache = read(run, model, batch, settings.short_prompt)
            short_ms = step_ms(run, model, cache, repeats=1)
            read_columns = settings.short_prompt + settings.warm + settings.steps // 2
            fill(cache, 2 * settings.window)
            full_ms = step_ms(run, model, cache)
            full, short = (window_bytes(model, batch, length) for length in (2 * settings.window, read_columns))
            speeds[shared, batch] = 1e3 * batch / full_ms
            ceiling = 1e3 * batch / run.copy_ms(weight_bytes(model) + full)
            run.put(f"{shared}, batch {batch}", speeds[shared, batch], "tokens/s", "copy rate ÷ bytes read", ceiling)
            if batch > 1 and full_ms > short_ms:
                rate = (full - short) / (full_ms - short_ms) / 1e9
                name = f"{shared}, batch {batch}, rings"
                run.put(name, rate, "TB/s", "copy", run.copy_rate / 1e12, full_ms=full_ms, short_ms=short_ms)
            del cache
            run.free()
        del model
        run.free()
    for batch in (1, settings.batch):
        own, other = speeds["key_value", batch], speeds["none", batch]
        run.put(f"key_value, batch {batch}, beside separate", own, "tokens/s", "none", other)


def measure_grouped(run: Run) -> None:
    """Measures fewer key heads by batch size."""
    settings, position = run.settings, 2 * run.settings.window
    model = run.model(num_key_value_heads=settings.key_heads)
    for batch in settings.batches:
        cache = read(run, model, batch, settings.short_prompt)
        fill(cache, position)
        speed = 1e3 * batch / step_ms(run, model, cache)
        size = weight_bytes(model) + window_bytes(model, batch, position)
        name = f"{settings.key_heads} key heads, batch {batch}"
        run.put(name, speed, "tokens/s", "copy rate ÷ bytes read", 1e3 * batch / run.copy_ms(size))
        del cache
        run.free()


# Right answers, of small models


def small_config(settings: Settings, changes: dict[str, Any]) -> OlmemConfig:
    """Returns the configuration of a small model."""
    fields: dict[str, Any] = {
        "vocab_size": 1009,
        "hidden_size": settings.small_width,
        "intermediate_size": 8 * settings.small_width // 3,
        "num_hidden_layers": settings.small_layers,
        "num_attention_heads": settings.small_heads,
        "sliding_window": settings.small_window,
        "layer_types": "sliding_attention",
    }
    return OlmemConfig(**{**fields, **changes})


def small_weights(config: OlmemConfig) -> dict[str, torch.Tensor]:
    """Returns random weights that both half precisions hold exactly, of a size that keeps every part at work."""
    torch.manual_seed(0)
    model = build(config, torch.float32, torch.device("cpu"))
    for name, weight in model.named_parameters():
        if name.endswith("gate.logits"):
            continue
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, mean=float(not name.endswith("bias")), std=0.1)
        else:
            torch.nn.init.normal_(weight, std=1.0 if "embed" in name else weight.shape[1] ** -0.5)
        weight.data.copy_(weight.data.bfloat16().half())
    return model.state_dict()


def small_model(
    config: OlmemConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device
) -> OlmemForCausalLM:
    """Makes a model of these weights, its angles as precise as ever."""
    model = build(config, dtype, device)
    model.load_state_dict(weights)
    return model


def in_processes(run: Run, names: Sequence[str], measure: Callable[[Run, str], None]) -> None:
    """Measures variants of small models, on a GPU in several processes, which compile their kernels side by side."""
    if run.variants is not None or run.device.type == "cpu":
        for name in run.variants or names:
            try:
                measure(run, name)
            except Exception:
                run.errors[f"{run.row}: {name}"] = traceback.format_exc()
                print(f"{run.row}: {name}: {traceback.format_exc()}", file=sys.stderr, flush=True)
        return
    count = min(PROCESSES, os.cpu_count() or 1)
    command = [sys.executable, __file__, "--rows", run.row, "--variants"]
    started = [
        subprocess.Popen([*command, *names[index::count]], stdout=subprocess.PIPE, text=True)
        for index in range(min(count, len(names)))
    ]
    texts = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("a process for small models has failed")
    found = [json.loads(text.splitlines()[-1]) for text in texts]
    figures = [figure for each in found for figure in each["figures"]]
    for figure in sorted(figures, key=lambda figure: names.index(figure["variant"])):
        run.keep(figure)
    for each in found:
        run.errors |= each["errors"]


def measure_greedy(run: Run) -> None:
    """Counts the leading tokens of a greedy text in float32 that are the CPU's."""
    settings, cpu = run.settings, torch.device("cpu")
    variants = small_variants(settings.small_window)

    def one(run: Run, name: str) -> None:
        config = small_config(settings, variants[name])
        weights = small_weights(config)
        ids = torch.randint(config.vocab_size, (1, settings.small_window // 2))
        made = []
        for device in (cpu, run.device):
            model = small_model(config, weights, torch.float32, device)
            out = model.generate(ids.to(device), max_new_tokens=settings.greedy, do_sample=False)
            made.append(out[0, ids.shape[1] :].cpu())
        equal = (made[0] == made[1]).long().cumprod(0).sum()
        run.put(name, int(equal), "tokens", "those of the CPU", settings.greedy, variant=name)

    in_processes(run, GREEDY, one)


@contextmanager
def run_as_is(model: OlmemForCausalLM) -> Iterator[None]:
    """Lets steps run module by module, without a graph and without kernels."""
    model.model.steps.enabled = False
    try:
        yield
    finally:
        model.model.steps.enabled = True


def step_logits(run: Run, model: OlmemForCausalLM, ids: torch.Tensor, prompt: int, as_is: bool = False) -> torch.Tensor:
    """Returns the logits (B, T − prompt, V) of ids (B, T) behind a prompt, a step each, in float64 on the CPU."""
    cache = OlmemCache(model.config)
    model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
    logits = []
    for column in range(prompt, ids.shape[1]):
        with torch.no_grad(), run_as_is(model) if as_is else nullcontext():
            output = model(ids[:, column : column + 1], past_key_values=cache)
        logits.append(output.logits[:, -1].detach().clone())
    run.wait()
    return torch.stack(logits, dim=1).double().cpu()


def measure_errors(run: Run) -> None:
    """Measures how far half precision's logits are from float64's, of plain steps and of steps module by module."""
    settings = run.settings
    prompt = 2 * settings.small_window + settings.small_window // 3
    variants = small_variants(settings.small_window)

    def one(run: Run, name: str) -> None:
        config = small_config(settings, variants[name])
        weights = small_weights(config)
        ids = torch.randint(config.vocab_size, (settings.small_rows, prompt + settings.small_steps))
        exact = small_model(config, weights, torch.float64, torch.device("cpu"))
        truth = exact(ids, use_cache=False, logits_to_keep=settings.small_steps).logits
        for dtype in (torch.bfloat16, torch.float16):
            model, placed = small_model(config, weights, dtype, run.device), ids.to(run.device)
            plain, eager = (
                float((step_logits(run, model, placed, prompt, as_is) - truth).norm() / truth.norm())
                for as_is in (False, True)
            )
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            run.put(label, plain, "relative", "module by module", eager, variant=name)

    in_processes(run, list(variants), one)


# Long prompts, and training


def product_rate(run: Run, model: Any) -> float:
    """Returns the tokens a second that the products of a model's layers allow, by the ceiling of this run."""
    weights = sum(each.numel() for name, each in model.named_parameters() if "proj" in name)
    return 1e12 * (run.find("ceilings", "matrix product") or 0.0) / (2 * weights)


def peak_gib(run: Run, work: Callable[[], Any]) -> float:
    """Returns the most GiB of tensors on the device during some work, 0 on a CPU."""
    if run.device.type != "cuda":
        work()
        return 0.0
    torch.cuda.reset_peak_memory_stats(run.device)
    work()
    return torch.cuda.max_memory_allocated(run.device) / 2**30


def read_long(run: Run, name: str, model: Any, length: int, warm: bool = True) -> None:
    """Puts the tokens a second of a prompt in one call, and its peak of memory beside the weights."""
    ids = run.ids(1, length)

    def work() -> None:
        model(ids, past_key_values=OlmemCache(model.config), logits_to_keep=1)

    if warm:
        work()
    seconds: list[float] = []
    peak = peak_gib(run, lambda: seconds.append(run.time(work)))
    run.put(f"{name}, {length} tokens", length / seconds[0], "tokens/s", "products alone", product_rate(run, model))
    weights = sum(weight.nbytes for weight in model.parameters()) / 2**30
    run.put(f"{name}, {length} tokens: peak", peak, "GiB", "weights", weights)


def measure_padded(run: Run, model: OlmemForCausalLM) -> None:
    """Puts the real tokens a second of left-padded rows beside those of rows without padding."""
    settings = run.settings
    least, most = settings.row_lengths
    lengths = torch.randint(least, most + 1, (settings.rows,), generator=torch.Generator().manual_seed(0))
    width, mean = int(lengths.max()), int(lengths.float().mean())
    left_padded = (torch.arange(width)[None] >= width - lengths[:, None]).long().to(run.device)

    def rate(mask: torch.Tensor) -> float:
        ids = run.ids(*mask.shape)

        def work() -> None:
            model(ids, attention_mask=mask, past_key_values=OlmemCache(model.config), logits_to_keep=1)

        return int(mask.sum()) / statistics.median(run.time(work) for _ in range(settings.repeats))

    whole = rate(torch.ones(settings.rows, mean, dtype=torch.long, device=run.device))
    name = f"{settings.rows} rows of {least} to {most} tokens, left-padded"
    run.put(name, rate(left_padded), "tokens/s", "rows without padding", whole)


def measure_prompt(run: Run) -> None:
    settings = run.settings
    model = run.model()
    read_long(run, "plain", model, settings.long)
    read_long(run, "plain", model, settings.longest, warm=False)
    measure_padded(run, model)
    del model
    run.free()
    memory = {"num_memory_tokens": settings.memory, "memory_segment_length": settings.piece}
    retrieval = {"retrieval_layers": [settings.layers // 2], "retrieval_capacity": settings.long}
    half = settings.window // 2
    chunks = {"layer_types": "chunked_attention", "attention_chunk_size": half, "attention_chunk_lookback": 1}
    variants: dict[str, dict[str, Any]] = {
        f"{settings.sinks} sinks": {"num_sink_tokens": settings.sinks},
        f"{settings.memory} memory tokens": memory,
        "one retrieval layer": retrieval,
        "chunks with look-back": chunks,
    }
    for name, changes in variants.items():
        model = run.model(**changes)
        read_long(run, name, model, settings.long)
        del model
        run.free()
    peer = build(Olmo3Config(**large_shape(settings)), torch.bfloat16, run.device)
    ids = run.ids(1, settings.long)

    def in_calls() -> None:
        cache = None
        for part in ids.split(settings.piece, dim=1):
            cache = peer(part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    in_calls()
    own = run.find("prompt", f"plain, {settings.long} tokens")
    run.put("Olmo3 in calls", settings.long / run.time(in_calls), "tokens/s", "Olmem", own)


def train_config(settings: Settings) -> dict[str, Any]:
    """Returns the fields of the 1B shape, which Olmo3 has too."""
    return {
        **large_shape(settings),
        "vocab_size": settings.train_vocabulary,
        "hidden_size": settings.train_width,
        "intermediate_size": settings.train_intermediate,
        "num_hidden_layers": settings.train_layers,
        "num_attention_heads": settings.train_heads,
        "num_key_value_heads": settings.train_heads,
        "sliding_window": settings.train_window,
        "layer_types": ["sliding_attention"] * settings.train_layers,
        "rms_norm_eps": 1e-6,  # the two have other defaults
        "use_cache": False,
    }


def train_batches(run: Run) -> list[dict[str, torch.Tensor]]:
    """Returns rows of packed documents of random lengths and random tokens from a part of the vocabulary."""
    settings, generator = run.settings, torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        left, lengths = settings.train_length, []
        while left:
            drawn = int(
                torch.randint(settings.train_length // 64 + 1, settings.train_length // 6, (), generator=generator)
            )
            lengths.append(min(drawn, left))
            left -= lengths[-1]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        ids = torch.randint(1, settings.train_vocabulary // 8, (1, settings.train_length), generator=generator)
        given = {"input_ids": ids, "position_ids": positions, "labels": ids}
        batches.append({name: each.to(run.device) for name, each in given.items()})
    return batches


@torch.enable_grad()
def train(run: Run, model: Any, batches: list[dict[str, torch.Tensor]], steps: int) -> list[float]:
    """Trains a model for some steps, and returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=run.device.type == "cuda")
    losses = []
    for step in range(steps):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def measure_training(run: Run) -> None:
    settings, batches = run.settings, train_batches(run)
    shape = train_config(settings)
    torch.manual_seed(0)
    first = build(Olmo3Config(**shape), torch.bfloat16, run.device).state_dict()
    start = {name: weight.cpu() for name, weight in first.items()}
    del first
    run.free()
    own: dict[str, float] = {}
    losses: dict[str, list[float]] = {}
    peers = {f"Olmo3 {name}": name for name in ("flex_attention", "sdpa", "flash_attention_2")}
    for name in ("Olmem", *peers):
        try:
            config = OlmemConfig(**shape) if name == "Olmem" else Olmo3Config(**shape)
            model = build(config, torch.bfloat16, run.device).train()
            model.load_state_dict(start)
            if name in peers:
                model.set_attn_implementation(peers[name])
            losses[name] = train(run, model, batches, settings.losses)
            for checkpoints in (False, True):
                if checkpoints:
                    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                train(run, model, batches, 1)
                seconds: list[float] = []

                def timed(model: Any = model, seconds: list[float] = seconds) -> None:
                    seconds.append(run.time(lambda: train(run, model, batches, settings.train_steps)))

                peak = peak_gib(run, timed)
                label = "a step, layers computed twice" if checkpoints else "a step"
                found = 1e3 * seconds[0] / settings.train_steps
                reference = own.get(label) if name != "Olmem" else None
                run.put(f"{name}: {label}", found, "ms", "Olmem", reference)
                run.put(f"{name}: {label}, peak", peak, "GiB", "Olmem", own.get(f"{label}, peak"))
                own.setdefault(label, found)
                own.setdefault(f"{label}, peak", peak)
            apart = max(abs(a - b) for a, b in zip(losses["Olmem"], losses[name], strict=True))
            run.put(f"{name}: losses apart from Olmem's", apart, "nats", "the last loss", losses[name][-1])
            del model
        except (ImportError, NotImplementedError, RuntimeError) as error:
            print(f"{'':<10}{name} does not run here: {str(error).splitlines()[0][:120]}", flush=True)
        run.free()


ROWS: dict[str, Callable[[Run], None]] = {
    "ceilings": measure_ceilings,
    "step": measure_step,
    "generate": measure_generate,
    "repeated": measure_repeated,
    "memory": measure_memory,
    "full": measure_full,
    "retrieval": measure_retrieval,
    "shared": measure_shared,
    "grouped": measure_grouped,
    "greedy": measure_greedy,
    "prompt": measure_prompt,
    "errors": measure_errors,
    "first": measure_first,
    "peers": measure_peers,
    "training": measure_training,
}


def measure(run: Run, row: str) -> None:
    """Measures one row, keeps the text of an error, and frees what it held."""
    run.row = row
    start = time.perf_counter()
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            ROWS[row](run)
    except Exception:
        run.errors[row] = traceback.format_exc()
        print(f"{row}: {run.errors[row]}", file=sys.stderr, flush=True)
    run.free()
    run.seconds[row] = time.perf_counter() - start
    left = run.allocated() / 2**30
    print(f"{'':<10}{row} took {run.seconds[row]:.1f} s; {left:.2f} GiB are still allocated", flush=True)


def describe(run: Run) -> dict[str, Any]:
    """Returns what a run has found, ready for a file."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "olmem": olmem.__version__}
    with suppress(PackageNotFoundError):  # a CPU has none
        versions["triton"] = version("triton")
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    started = Path("/proc/sys/kernel/random/boot_id")
    return {
        "device": device,
        "versions": versions,
        "machine": started.read_text().strip() if started.exists() else "",
        "settings": json.loads(json.dumps(asdict(run.settings))),
        "figures": run.figures,
        "seconds": run.seconds,
        "errors": run.errors,
    }


def resume(run: Run, path: Path) -> None:
    """Takes over what a run that was broken off has found, if it was on this machine, with the same versions and sizes.

    Rows that had errors or no end are measured again.
    """
    found, own = json.loads(path.read_text()), describe(run)
    for name in ("device", "versions", "machine", "settings"):
        if found[name] != own[name]:
            raise SystemExit(f"{path} is of another run, whose {name} was {found[name]} (got {own[name]}); begin anew.")
    failed = {name.partition(":")[0] for name in found["errors"]}
    run.seconds = {row: seconds for row, seconds in found["seconds"].items() if row not in failed}
    run.figures = [each for each in found["figures"] if each["row"] in run.seconds]


# The plot

BAR, TICK, INK, FAINT = "#1f6feb", "#d1242f", "#24292f", "#57606a"
LEFT, WIDE, HIGH = 330, 420, 22
PANELS: tuple[tuple[str, set[str], set[str]], ...] = (  # title, rows, units
    (
        "milliseconds per step or token",
        {"step", "generate", "memory", "full", "retrieval", "peers"},
        {"ms", "ms/token"},
    ),
    ("tokens per second", {"shared", "grouped"}, {"tokens/s"}),
)


def draw(found: dict[str, Any]) -> str:
    """Returns an SVG of the times of steps, as bars with a mark at what each is held against."""
    lines, top = [], 30
    for title, rows, units in PANELS:
        figures = [each for each in found["figures"] if each["row"] in rows and each["unit"] in units]
        figures = [each for each in figures if each["reference"]]
        if not figures:
            continue
        lines.append(f'<text x="{LEFT}" y="{top + 14}" font-size="14" font-weight="bold" fill="{INK}">{title}</text>')
        top += 28
        longest = max(max(each["measured"], each["reference"]) for each in figures)
        for each in figures:
            middle = top + HIGH / 2 + 4
            bar, mark = (WIDE * max(each[name], 0) / longest for name in ("measured", "reference"))
            text = f"{each['measured']:.4g} = {each['ratio']:.2f} × {each['against']}"
            lines += [
                f'<text x="{LEFT - 8}" y="{middle}" text-anchor="end" fill="{INK}">{escape(each["name"])}</text>',
                f'<rect x="{LEFT}" y="{top + 3}" width="{bar:.1f}" height="{HIGH - 6}" rx="2" fill="{BAR}"/>',
                f'<rect x="{LEFT + mark - 1:.1f}" y="{top}" width="2" height="{HIGH}" fill="{TICK}"/>',
                f'<text x="{LEFT + WIDE + 10}" y="{middle}" fill="{FAINT}">{escape(text)}</text>',
            ]
            top += HIGH
        top += 16
    width = LEFT + WIDE + 320
    caption = f"{found['device']}, torch {found['versions']['torch']}; red marks: what each figure is compared with"
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{top}" rx="8" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" fill="{FAINT}">{escape(caption)}</text>',
    ]
    return "\n".join([*head, *lines, "</svg>", ""])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="that are measured, beside the ceilings (all)")
    parser.add_argument("--smoke", action="store_true", help="the same in little, on a CPU in a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write everything measured")
    parser.add_argument("--resume", action="store_true", help="goes on with the rows that FILE has not")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draws what was written, as an SVG beside it")
    parser.add_argument("--first-token", action="store_true", help=argparse.SUPPRESS)  # a process of `first`
    parser.add_argument("--variants", nargs="+", help=argparse.SUPPRESS)  # a process of small models
    given = parser.parse_args(arguments)
    if given.draw is not None:
        picture = given.draw.with_suffix(".svg")
        picture.write_text(draw(json.loads(given.draw.read_text())))
        print(picture)
        return
    rows = given.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if not given.smoke and not torch.cuda.is_available():
        parser.error("this needs a CUDA device; --smoke runs on a CPU")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    run = Run(SMOKE if given.smoke else Settings(), torch.device("cpu" if given.smoke else "cuda:0"), given.variants)
    if given.first_token:
        print(json.dumps(first_tokens(run)))
        return
    if given.variants:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // PROCESSES))
        measure(run, rows[0])
        print(json.dumps({"figures": run.figures, "errors": run.errors}))
        return
    if given.resume and given.json is not None and given.json.exists():
        resume(run, given.json)
    run.path = given.json
    for row in dict.fromkeys(["ceilings", *(row for row in ROWS if row in rows)]):
        if row in run.seconds:
            continue
        measure(run, row)
        run.save()
    print(f"{sum(run.seconds.values()):.0f} s in all, {len(run.errors)} errors", flush=True)
    if run.errors:
        sys.exit(1)


if __name__ == "__main__":
    main()
