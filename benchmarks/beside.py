"""This state of the model beside another checkout's, such as that of the commit before, in turns in one process.

    git worktree add /tmp/before HEAD~1
    python benchmarks/beside.py /tmp/before [--turns 15] [--json FILE]

Both have one copy of random weights: those of decode.py, 4 sliding layers of width 1024, in float32. `step` is a token
with a full window, `prefill` a prompt of several windows in one call with a new cache. A turn measures either state
once; the ratio is the median over turns of this state's time to the other's, beside it the quartiles. Below 1.03, or
with 1 within the quartiles, nothing was lost.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from decode import quartiles, quiet
from tqdm import tqdm

WINDOWS = (256, 4096)
VARIANTS: dict[str, dict[str, Any]] = {
    "windows": {},
    "4 sinks": {"num_sink_tokens": 4},
    "K = V": {"shared_projections": "key_value"},
    "K = V, 4 sinks": {"shared_projections": "key_value", "num_sink_tokens": 4},
    "memory": {"num_memory_tokens": 16, "memory_segment_length": 512},
    "retrieval": {"retrieval_layers": [1], "retrieval_capacity": 4096},
    "xpos": {"position_embedding": "xpos"},
    "full": {"layer_types": "full_attention"},
}


def load_package(name: str, checkout: Path) -> ModuleType:
    """Imports the package of a checkout under a name of its own."""
    folder = checkout / "modeling" / "olmem"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def make_models(packages: list[ModuleType], window: int, width: int, **changes: Any) -> list[Any]:
    """Returns a model of each package with the same weights, in evaluation mode."""
    fields = {
        "vocab_size": 8192,
        "hidden_size": width,
        "intermediate_size": width * 43 // 16,
        "num_hidden_layers": 4,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 65536,
        "layer_types": "sliding_attention",
        "sliding_window": window,
    } | changes
    models = []
    for package in packages:
        torch.manual_seed(0)
        models.append(package.OlmemForCausalLM(package.OlmemConfig(**fields)).eval())
    # One copy of the weights: where they lie in memory may cost a step 6 %.
    weights = models[0].state_dict()
    for model in models[1:]:
        model.load_state_dict({name: weights.get(name, own) for name, own in model.state_dict().items()}, assign=True)
    return models


def in_turns(tasks: list[Any], turns: int) -> list[float]:
    """Returns the ratio of the first task's time to the second's in each turn, the first of which only warms up."""
    ratios = []
    for turn in range(turns + 1):
        seconds = [0.0, 0.0]
        for index in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            tasks[index]()
            seconds[index] = time.perf_counter() - start
        if turn:
            ratios.append(seconds[0] / seconds[1])
    return ratios


@torch.no_grad()
def measure(packages: list[ModuleType], window: int, name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the rows of one variant and window."""
    models = make_models(packages, window, arguments.width, **VARIANTS[name])
    prompt = torch.randint(8192, (1, window + window // 4), generator=torch.Generator().manual_seed(1))
    caches = [package.OlmemCache(model.config) for package, model in zip(packages, models, strict=True)]
    for model, cache in zip(models, caches, strict=True):
        for ids in prompt.split(512, dim=1):
            model(ids, past_key_values=cache, logits_to_keep=1)

    def step(index: int) -> None:
        for ids in prompt[0, : arguments.block]:
            models[index](ids.view(1, 1), past_key_values=caches[index])

    def prefill(index: int) -> None:
        cache = packages[index].OlmemCache(models[index].config)
        models[index](prompt[:, :1280].repeat(1, 2), past_key_values=cache, logits_to_keep=1)

    rows = []
    for kind, task in (("step", step), ("prefill", prefill)):
        turns = arguments.turns if kind == "step" else max(3, arguments.turns // 2)
        ratios = in_turns([lambda task=task: task(0), lambda task=task: task(1)], turns)
        rows.append({"kind": kind, "window": window, "variant": name, "turns": turns, "ratio": quartiles(ratios)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--turns", type=int, default=15, help="of each state (%(default)s)")
    parser.add_argument("--block", type=int, default=20, help="tokens in a turn of steps (%(default)s)")
    parser.add_argument("--width", type=int, default=1024, help="%(default)s")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write everything measured")
    arguments = parser.parse_args()
    quiet(arguments.threads)
    packages = [load_package("olmem_this", Path(__file__).parents[1]), load_package("olmem_other", arguments.other)]
    print("kind     window  variant           ratio  (quartiles)", flush=True)
    rows = []
    jobs = [(window, name) for window in WINDOWS for name in VARIANTS]
    for window, name in tqdm(jobs, leave=False, disable=None):
        for row in measure(packages, window, name, arguments):
            rows.append(row)
            low, middle, high = row["ratio"]
            lost = "" if middle < 1.03 or low <= 1 <= high else "  slower"
            line = (
                f"{row['kind']:<8}{row['window']:>7}  {row['variant']:<15}{middle:>8.3f}  ({low:.3f}–{high:.3f}){lost}"
            )
            tqdm.write(line)
    if arguments.json is not None:
        worst = max(statistics.median(row["ratio"]) for row in rows)
        arguments.json.write_text(
            json.dumps({"torch": torch.__version__, "worst": worst, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
