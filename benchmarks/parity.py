"""Converts every golden checkpoint and the demo, and prints how far the logits are from the native code's own.

    python benchmarks/parity.py [FOLDER …] [--json]

A FOLDER holds checkpoints, each with its `expected.safetensors`; the repository's own by default. The differences are
largest absolute ones, in float32, on the CPU. The first column is exact where this machine's kernels are those of the
machine that ran the native code.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import transformers
from olmem_convert import CheckpointError, ConvertOptions, convert
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
IMPLEMENTATIONS = ("sdpa", "eager")


@torch.no_grad()
def differences(folder: Path, out: Path) -> dict[str, float]:
    """Of sdpa and eager from the stored native logits, and of sdpa from the forward pass that verification runs."""
    expected = load_file(folder / "expected.safetensors")
    source = next(iter(sorted(folder.glob("step*"))), folder)
    said = folder / "options.json"
    options = json.loads(said.read_text()) if said.is_file() else {}
    verification = convert(source, out, ConvertOptions(**options))["verification"]
    result = {}
    for implementation in IMPLEMENTATIONS:
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation=implementation)
        logits = model(expected["input_ids"]).logits[:, -expected["logits"].shape[1] :]
        result[implementation] = float((logits - expected["logits"]).abs().max())
    return result | {"verify": verification["max_difference"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT / "tests/golden", ROOT / "model_cards/demo"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    rows = {}
    for parent in arguments.folders:
        for folder in sorted(path.parent for path in parent.glob("*/expected.safetensors")):
            name = f"{parent.name}/{folder.name}"
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    rows[name] = differences(folder, Path(scratch) / "out")
                except CheckpointError as error:
                    rows[name] = {"refused": str(error)}
            if not arguments.json:
                print(row(name, rows[name]), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))


def row(name: str, result: dict) -> str:
    if "refused" in result:
        return f"{name:<42} refused: {result['refused'][:120]}"
    return f"{name:<42}" + "".join(f" {key} {value:<9.3g}" for key, value in result.items())


if __name__ == "__main__":
    main()
