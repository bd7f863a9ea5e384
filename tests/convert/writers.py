"""Native checkpoints made by hand: the smallest ones, and files cut up in ways that no training run at hand was."""

import base64
import io
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes

OLMO_MODEL = {
    "d_model": 8,
    "n_heads": 2,
    "n_layers": 1,
    "mlp_hidden_size": 16,
    "norm_after": True,
    "attention_layer_norm": True,
    "layer_norm_type": "rms",
    "include_bias": False,
    "rope": True,
    "weight_tying": False,
    "vocab_size": 12,
    "embedding_size": 12,
    "eos_token_id": 11,
    "pad_token_id": 10,
}
NORM = {"name": "rms", "eps": 1e-6, "bias": False}
OLMO_CORE_MODEL = {
    "d_model": 8,
    "n_layers": 1,
    "vocab_size": 12,
    "block": {
        "name": "reordered_norm",
        "sequence_mixer": {"n_heads": 2, "bias": False, "qk_norm": {**NORM}, "rope": {"theta": 10000}},
        "feed_forward": {"hidden_size": 8, "bias": False},
        "layer_norm": {**NORM},
    },
    "lm_head": {"layer_norm": {**NORM}, "bias": False},
}
BAKA_CONFIG = {
    "dim_model": 8,
    "dim_ff": 12,
    "dim_attn": 8,
    "n_layers": 2,
    "n_heads": 2,
    "n_vocab": 14,
    "n_ctx": 5,
    "act_fn": "silu",
    "model_type": "baka_pristine",
}
PARTS = ("weight", "bias")


def random(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + 0.3 * value if value.ndim == 1 else 0.3 * value for name, value in tensors.items()}


def olmo_state() -> dict[str, torch.Tensor]:
    block = "transformer.blocks.0."
    norms = {f"{block}{name}.weight": (8,) for name in ("q_norm", "k_norm", "attn_norm", "ff_norm")}
    return random(
        {
            "transformer.wte.weight": (12, 8),
            "transformer.ln_f.weight": (8,),
            "transformer.ff_out.weight": (12, 8),
            f"{block}att_proj.weight": (24, 8),
            f"{block}attn_out.weight": (8, 8),
            f"{block}ff_proj.weight": (16, 8),
            f"{block}ff_out.weight": (8, 8),
            **norms,
        }
    )


def olmo_core_state() -> dict[str, torch.Tensor]:
    block = "blocks.0."
    squares = (
        *(f"attention.{name}" for name in ("w_q", "w_k", "w_v", "w_out")),
        *(f"feed_forward.w{i}" for i in (1, 2, 3)),
    )
    norms = ("attention.q_norm", "attention.k_norm", "attention_norm", "feed_forward_norm")
    return random(
        {
            "embeddings.weight": (12, 8),
            "lm_head.w_out.weight": (12, 8),
            "lm_head.norm.weight": (8,),
            **{f"{block}{name}.weight": (8, 8) for name in squares},
            **{f"{block}{name}.weight": (8,) for name in norms},
        }
    )


def write_olmo(folder: Path, layout: str, state: Mapping[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """The smallest OLMo-2 checkpoint, in one of the four layouts that convert: its name is its weight file's."""
    state = olmo_state() if state is None else dict(state)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": OLMO_MODEL | changes}))
    if layout == "model.pt":
        torch.save(state, folder / "model.pt")
    elif layout == "model.safetensors":
        save_file({encoded(name): value for name, value in state.items()}, folder / "model.safetensors")
    elif layout == "model/metadata.json":
        halves = {
            name: [[(0, value.numel() // 2)], [(value.numel() // 2, value.numel())]] for name, value in state.items()
        }
        write_flat_shards(folder / "model", state, halves)
    else:
        write_distributed(folder / "model_and_optim", {f"model.{name}": value for name, value in state.items()})
    return folder


def write_olmo_core(folder: Path, state: Mapping[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """The smallest OLMo-core checkpoint."""
    state = olmo_core_state() if state is None else state
    write_distributed(folder / "model_and_optim", {f"model.{name}": value for name, value in state.items()})
    config = {"model": OLMO_CORE_MODEL | changes, "train_module": {"max_sequence_length": 32}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def baka_state(layers: int = 2) -> dict[str, torch.Tensor]:
    """Of 001 and 002 alike: two heads of four dimensions."""
    frequencies = torch.tensor([1.0, 0.01])
    blocks = [f"model.layers.{layer}." for layer in range(layers)]
    squares = {f"{block}attn.{name}.weight": (8, 8) for block in blocks for name in "qkvo"}
    wide = {f"{block}mlp.fc_{name}.weight": (12, 8) for block in blocks for name in ("gate", "up")}
    narrow = {f"{block}mlp.fc_down.weight": (8, 12) for block in blocks}
    norms = {
        f"{name}.{part}": (8,) for name in ("norm_out", *(f"{block}norm_in" for block in blocks)) for part in PARTS
    }
    ends = {"vocab_in.weight": (14, 8), "vocab_out.weight": (14, 8)}
    return random(squares | wide | narrow | norms | ends) | {
        f"{block}attn.rot.freqs": frequencies.clone() for block in blocks
    }


def write_baka(
    folder: Path, state: Mapping[str, torch.Tensor] | None = None, name: str = "baka_x_1_2.bin", **changes: Any
) -> Path:
    """The smallest BakaLLM checkpoint, with a config beside it; `...` leaves a field out."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(baka_state() if state is None else state), folder / name)
    config = {field: value for field, value in (BAKA_CONFIG | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def encoded(name: str, is_pickled: bool = False) -> str:
    """A key of OLMo's safetensors files."""
    return base64.urlsafe_b64encode(pickle.dumps(((name,), is_pickled))).decode()


def write_flat_shards(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    slices: Mapping[str, Sequence[Sequence[tuple[int, int]]]],
    form: str = "shard_spec_per_file",
) -> None:
    """Shards of ai2-olmo-core 0.1: `slices` gives, for each tensor and rank, the flat spans that the rank holds."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, value in state.items():
        spans = {f"rank_{rank}.safetensors": [list(span) for span in held] for rank, held in enumerate(slices[name])}
        if form == "shard_spec_per_file":
            by_file = {
                file: {"flattened_offsets": held, "local_shape": None, "global_offset": None}
                for file, held in spans.items()
            }
        else:  # one span may stand without the list around it
            by_file = {file: held[0] if len(held) == 1 else held for file, held in spans.items()}
        entries[name] = {"shape": list(value.shape), "is_sharded": len(spans) > 1, "dtype": "F32", form: by_file}
    (folder / "metadata.json").write_text(json.dumps({"tensors": entries}))
    for rank in range(max(map(len, slices.values()))):
        held = {
            name: torch.cat(
                [value.flatten()[start:stop] for start, stop in slices[name][rank]] or [value.flatten()[:0]]
            )
            for name, value in state.items()
        }
        save_file(held, folder / f"rank_{rank}.safetensors")


def write_distributed(
    folder: Path,
    state: Mapping[str, Any],
    boxes: Mapping[str, Sequence[Box]] | None = None,
    num_files: int = 1,
    edit=lambda metadata: None,
) -> None:
    """A torch.distributed.checkpoint folder: each tensor cut into `boxes`, dealt to `num_files` files in turn.

    A value that is no tensor is stored as pickled bytes, as `optim.param_groups` are. `edit` changes the metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    files = [io.BytesIO() for _ in range(num_files)]
    dealt = 0

    def store(index: MetadataIndex, value: Any) -> None:
        nonlocal dealt
        file = files[dealt % num_files]
        start = file.tell()
        torch.save(value, file)
        file.seek(0, io.SEEK_END)
        storage[index] = _StorageInfo(f"__{dealt % num_files}_0.distcp", start, file.tell() - start)
        dealt += 1

    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            entries[name] = BytesStorageMetadata()
            store(MetadataIndex(name), value)
            continue
        cut = boxes[name] if boxes else [((0,) * value.ndim, tuple(value.shape))]
        chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in cut]
        entries[name] = TensorStorageMetadata(TensorProperties(value.dtype), value.size(), chunks)
        for number, (offsets, sizes) in enumerate(cut):
            if 0 in sizes:
                continue
            part = value[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
            store(MetadataIndex(name, torch.Size(offsets), number), part.clone())
    for number, file in enumerate(files):
        if file.getvalue():
            (folder / f"__{number}_0.distcp").write_bytes(file.getvalue())
    metadata = Metadata(entries, {name: (name,) for name in entries}, storage)
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
