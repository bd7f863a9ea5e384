"""The genuine native checkpoints that tests read, and small tools on folders."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from olmem_convert.formats import Checkpoint
from olmem_convert.formats.detect import open_checkpoint
from olmem_convert.options import Given
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
DEMO = ROOT / "model_cards" / "demo" / "native"
FOLDERS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
# Of these sizes, float32 kernels gave the bits of the native run on every CPU and torch tried; of the others' sizes,
# only where it was made (`benchmarks/parity.py` prints them all).
EXACT = [name for name in FOLDERS if name.startswith("olmo") and name not in ("olmo1", "olmo_clip_scale")]


def source(name: str) -> Path:
    """The native checkpoint in a golden folder: the folder itself, or the step in it; or that of the demo."""
    if name == "demo":
        return DEMO / "step1872"
    steps = sorted((GOLDEN / name).glob("step*"))
    return steps[0] if steps else GOLDEN / name


def options(name: str) -> dict[str, Any]:
    """What `convert` and `verify` are told of a golden checkpoint that does not say it."""
    path = GOLDEN / name / "options.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def golden(name: str) -> Checkpoint:
    return open_checkpoint(source(name), given=Given(**options(name)))


def expected(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, T) and the native code's float32 logits."""
    tensors = load_file(folder / "expected.safetensors")
    return tensors["input_ids"], tensors["logits"]


def copy_source(name: str, target: Path) -> Path:
    """A copy of a golden checkpoint, to be damaged."""
    shutil.copytree(
        source(name), target, ignore=shutil.ignore_patterns("expected.safetensors", "options.json", "train")
    )
    return target


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_model(folder: Path, **changes: Any) -> None:
    """Changes fields of the native config's `model`; a dotted name goes into objects, `...` removes the field."""
    path = next(path for path in (folder / "config.yaml", folder / "config.json") if path.is_file())
    read = yaml.safe_load if path.suffix == ".yaml" else json.loads  # YAML takes 1e-06 for a string
    config = read(path.read_text())
    for name, value in changes.items():
        *parents, leaf = name.split(".")
        fields = config["model"]
        for parent in parents:
            fields = fields.setdefault(parent, {})
        if value is ...:
            fields.pop(leaf, None)
        else:
            fields[leaf] = value
    path.write_text(yaml.safe_dump(config) if path.suffix == ".yaml" else json.dumps(config))


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def save_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def snapshot(folder: Path) -> dict[str, str]:
    """The name and hash of every file below the folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
