"""What memory costs a generated token, and what it holds, beside the same model with its windows alone.

    python benchmarks/memory.py [--segments 6] [--json]

The model is that of decode.py on a CPU: 4 sliding layers of width 1024 by default, float32, here with a window of 512.
`memory` has 16 memory tokens and segments as long as the window; `retrieval` looks 32 tokens up in its second layer,
among 4096; `both` has both. All read the same tokens one by one, each a whole call of the model, in turns of
`--block`. A segment's time is that of all its tokens, the writing and reading of memory among them; the ratio to the
model without is the median over segments, beside it the quarter and three-quarter quantiles. `MiB` is what the cache
holds (`cache.nbytes`) after the first of these segments and after the last: before them windows and stores were filled.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from decode import MIB, add_model_arguments, quartiles, quiet, save_weights
from olmem import OlmemCache, OlmemForCausalLM

MEMORY: dict[str, Any] = {"num_memory_tokens": 16}
RETRIEVAL: dict[str, Any] = {"retrieval_layers": [1], "retrieval_capacity": 4096}
VARIANTS: dict[str, dict[str, Any]] = {
    "windows": {},
    "memory": MEMORY,
    "retrieval": RETRIEVAL,
    "both": MEMORY | RETRIEVAL,
}


@torch.no_grad()
def measure(folder: Path, arguments: argparse.Namespace) -> list[dict]:
    window, models = arguments.window, {}
    for name, fields in VARIANTS.items():
        config = {"sliding_window": window, "dtype": torch.float32, **fields}
        models[name] = OlmemForCausalLM.from_olmo(folder, **config).eval()
        # One copy of the weights: where they lie in memory is the same for all.
        shared = models["windows"].state_dict()
        models[name].load_state_dict(models[name].state_dict() | shared, assign=True)
    generator = torch.Generator().manual_seed(1)
    caches = {name: OlmemCache(model.config) for name, model in models.items()}
    fill = window * -(-(RETRIEVAL["retrieval_capacity"] + 2 * window) // window)
    for ids in torch.randint(arguments.vocab, (1, fill), generator=generator).split(window, dim=1):
        for name, model in models.items():
            model(ids, past_key_values=caches[name], logits_to_keep=1)

    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    held: dict[str, list[int]] = {name: [] for name in VARIANTS}
    for segment in range(arguments.segments + 1):  # the first warms up
        spent = dict.fromkeys(VARIANTS, 0.0)
        blocks = torch.randint(arguments.vocab, (window, 1, 1), generator=generator).split(arguments.block)
        for turn, tokens in enumerate(blocks):
            order = list(VARIANTS)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                start = time.perf_counter()
                for ids in tokens:
                    models[name](ids, past_key_values=caches[name])
                spent[name] += time.perf_counter() - start
        for name in VARIANTS if segment else ():
            times[name].append(spent[name] / window)
            held[name].append(caches[name].nbytes)
    return [
        {
            "variant": name,
            "milliseconds": 1e3 * statistics.median(times[name]),
            "ratio": quartiles([own / other for own, other in zip(times[name], times["windows"], strict=True)]),
            "bytes": [held[name][0], held[name][-1]],
        }
        for name in VARIANTS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=6, help="measured (%(default)s)")
    parser.add_argument("--window", type=int, default=512, help="%(default)s")
    parser.add_argument("--block", type=int, default=16, help="tokens in a turn (%(default)s)")
    add_model_arguments(parser)
    arguments = parser.parse_args()
    quiet(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        save_weights(Path(scratch), arguments)
        rows = measure(Path(scratch), arguments)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print("variant     ms/token    ratio  (quartiles)     MiB, first and last")
    for row in rows:
        low, middle, high = row["ratio"]
        first, last = (number / MIB for number in row["bytes"])
        print(
            f"{row['variant']:<10}{row['milliseconds']:>10.2f}{middle:>9.3f}  ({low:.3f}–{high:.3f})"
            f"{first:>12.3f}{last:>10.3f}"
        )


if __name__ == "__main__":
    main()
