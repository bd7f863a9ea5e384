"""Two GPUs beside one: a long prompt and a step with tensor parallel, and training that shards a model with memory.

    python benchmarks/parallel.py [--json benchmarks/results/parallel.json]
    python benchmarks/parallel.py --smoke

The model has the 7B shape with a quarter of its layers, random bfloat16 weights, and a window of 4096 in each layer.
Transformers loads it with `tp_plan="auto"`, once in one process and once in two. Each reads a prompt of 65,536 tokens
in one call, and then writes tokens one by one; a process alone does so by its captured step, and module by module.
Logits are compared in a small model in float32, and in the large one by their distance from those of one GPU.

A smaller model with 16 memory tokens trains for some steps with `fully_shard` around each layer, in two processes that
read a half of each batch, beside one process that reads all of it: their losses are compared, in float32.

`--smoke` does the same in little with two processes on a CPU; its times mean nothing.
"""

import argparse
import json
import os
import socket
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from olmem import OlmemCache, OlmemConfig, OlmemForCausalLM
from torch.distributed.fsdp import fully_shard

WORLD = 2


@dataclass(frozen=True)
class Settings:
    """Holds the sizes of a run."""

    layers: int = 8
    width: int = 4096
    heads: int = 32
    intermediate: int = 11008
    vocabulary: int = 100278
    window: int = 4096
    prompt: int = 65536
    warm: int = 8  # steps before they are timed
    steps: int = 32
    repeats: int = 2  # prompts, of which the last counts
    train_width: int = 512
    train_length: int = 2048
    train_segment: int = 512
    train_steps: int = 6


SMOKE = Settings(
    layers=2,
    width=64,
    heads=4,
    intermediate=96,
    vocabulary=98,
    window=32,
    prompt=96,
    warm=1,
    steps=2,
    train_width=32,
    train_length=64,
    train_segment=16,
    train_steps=2,
)


def is_on_gpu() -> bool:
    """Tells whether the run is one of GPUs."""
    return torch.cuda.is_available()


def device_of(rank: int) -> torch.device:
    """Returns the device of a process."""
    return torch.device("cuda", rank) if is_on_gpu() else torch.device("cpu")


def now() -> float:
    """Waits for the device, and returns the time."""
    if is_on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


def save_models(settings: Settings, folder: Path) -> None:
    """Writes the large model, and the small one in float32."""
    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": settings.vocabulary, "num_hidden_layers": settings.layers}
    large: dict[str, Any] = common | {
        "hidden_size": settings.width,
        "num_attention_heads": settings.heads,
        "intermediate_size": settings.intermediate,
        "layer_types": "sliding_attention",
        "sliding_window": settings.window,
    }
    small: dict[str, Any] = common | {"num_attention_heads": 8, "hidden_size": 128, "intermediate_size": 256}
    small |= {"sliding_window": 40, "num_sink_tokens": 2}
    with torch.device("cuda" if is_on_gpu() else "cpu"):
        model: Any = OlmemForCausalLM(OlmemConfig(**large))
        model.to(torch.bfloat16).save_pretrained(folder / "large")
        OlmemForCausalLM(OlmemConfig(**small)).save_pretrained(folder / "small")


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Loads a model, over all processes if there are several."""
    if dist.get_world_size() > 1:
        return OlmemForCausalLM.from_pretrained(folder, dtype=dtype, tp_plan="auto").eval()
    return OlmemForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)


@torch.no_grad()
def infer(settings: Settings, folder: Path, device: torch.device) -> dict[str, Any]:
    """Returns logits, and the seconds of a prompt and of a step."""
    small = load(folder / "small", torch.float32, device)
    ids = torch.randint(90, (2, 150), generator=torch.Generator().manual_seed(1)).to(device)
    found: dict[str, Any] = {"small": small(ids, use_cache=False).logits.cpu()}
    del small
    model = load(folder / "large", torch.bfloat16, device)
    ids = torch.randint(90, (1, settings.prompt), generator=torch.Generator().manual_seed(2)).to(device)

    def read() -> tuple[OlmemCache, torch.Tensor]:
        cache, start = OlmemCache(model.config), now()
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        found["prompt"] = now() - start
        return cache, logits

    def write(cache: OlmemCache, token: torch.Tensor, steps: int) -> float:
        start = now()
        for _ in range(steps):
            token = model(token, past_key_values=cache).logits.argmax(-1)
        return (now() - start) / steps

    for _ in range(settings.repeats - 1):
        read()
    cache, logits = read()
    found["large"] = logits.float().cpu()
    for enabled in (True, False):
        model.model.steps.enabled = enabled
        write(cache, logits.argmax(-1), settings.warm)
        found["step" if enabled else "step, module by module"] = write(cache, logits.argmax(-1), settings.steps)
        found.setdefault("step path", cache.step_path)
    return found


def train(settings: Settings, device: torch.device) -> dict[str, Any]:
    """Returns the losses of all rows in each step, and the seconds of the last one."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "vocab_size": settings.vocabulary,
        "hidden_size": settings.train_width,
        "intermediate_size": 2 * settings.train_width,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "layer_types": "sliding_attention",
        "sliding_window": settings.train_segment,
        "num_memory_tokens": 16,
        "memory_segment_length": settings.train_segment,
    }
    model: Any = OlmemForCausalLM(OlmemConfig(**config)).train()
    model.to(device)
    world, rank = dist.get_world_size(), dist.get_rank()
    if world > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    losses, seconds = [], 0.0
    for step in range(settings.train_steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(90, (2 * WORLD, settings.train_length), generator=generator)
        ids = ids.chunk(world)[rank].to(device)
        start = now()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = now() - start
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(float(whole) / world)
    return {"losses": losses, "seconds": seconds}


def run(rank: int, world: int, settings: Settings, folder: Path, port: int) -> None:
    """Does all of it in one process, the first of which leaves what it has found."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = device_of(rank)
    if is_on_gpu():
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if is_on_gpu() else "gloo", timeout=timedelta(seconds=120))
    found = {"infer": infer(settings, folder, device), "train": train(settings, device)}
    if rank == 0:
        torch.save(found, folder / f"found{world}.pt")
    dist.destroy_process_group()


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def compare(settings: Settings, one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Returns what is reported of one process and two."""
    first, second = one["infer"], two["infer"]
    large = (second["large"] - first["large"]).norm() / first["large"].norm()
    return {
        "largest difference of logits, float32": float((second["small"] - first["small"]).abs().max()),
        "relative distance of logits, bfloat16": float(large),
        "prompt tokens/s, one": settings.prompt / first["prompt"],
        "prompt tokens/s, two": settings.prompt / second["prompt"],
        "prompt, two beside one": first["prompt"] / second["prompt"],
        "step ms, one": 1000 * first["step"],
        "step ms, one, module by module": 1000 * first["step, module by module"],
        "step ms, two": 1000 * second["step"],
        "step path, one": first["step path"],
        "step path, two": second["step path"],
        "training losses, one": one["train"]["losses"],
        "training losses, two": two["train"]["losses"],
        "training step s, one": one["train"]["seconds"],
        "training step s, two": two["train"]["seconds"],
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs one process, then two, and prints what they have found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the same in little, on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write everything measured")
    given = parser.parse_args(arguments)
    settings = SMOKE if given.smoke else Settings()
    if is_on_gpu() and torch.cuda.device_count() < WORLD:
        parser.error(f"it needs {WORLD} GPUs (got {torch.cuda.device_count()}); try --smoke on a machine without any")
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), []
        save_models(settings, folder)
        for world in (1, WORLD):
            context = torch.multiprocessing.start_processes(
                run, (world, settings, folder, free_port()), nprocs=world, start_method="spawn"
            )
            assert context is None  # it has waited for all of them
            found.append(torch.load(folder / f"found{world}.pt", weights_only=True))
    table = compare(settings, *found)
    for name, value in table.items():
        print(f"{name:<42}{value}", flush=True)
    if given.json is not None:
        device = torch.cuda.get_device_name() if is_on_gpu() else "cpu"
        report = {"device": device, "torch": torch.__version__, "settings": asdict(settings), "table": table}
        given.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
