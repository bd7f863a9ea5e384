"""State files: the smallest genuine ones, changes that know their form, and what is tried on them."""

import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from olmem import OlmemCache, OlmemConfig, OlmemForCausalLM
from olmem.cache_file_olmem import checksum, parse
from safetensors import safe_open
from safetensors.torch import save

SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "sliding_window": 4,
    "pad_token_id": None,
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {"layer_types": ["full_attention"] * 2},
    "window": {"layer_types": ["sliding_attention", "full_attention"], "num_sink_tokens": 1},
    "memory": {
        "layer_types": ["sliding_attention"] * 2,
        "num_memory_tokens": 2,
        "memory_segment_length": 3,
        "retrieval_layers": [1],
        "retrieval_top_k": 2,
        "retrieval_capacity": 8,
    },
    "shared": {"layer_types": ["sliding_attention"] * 2, "shared_projections": "key_value"},
}
NUMBERS = (0, 1, -1, 2, 3, 2**23, 2**31, 2**45, 2**62, 2**70, 1.5, None, True, "5", [], {}, float("nan"))


@cache
def model_of(kind: str) -> OlmemForCausalLM:
    torch.manual_seed(0)
    return OlmemForCausalLM(OlmemConfig(**SIZES | KINDS[kind])).eval()


def writer(kind: str) -> Any:
    """What writes the state of a model of this kind that has read a few tokens."""

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        model = model_of(kind)
        if kind == "shared":
            stream = model.stream()
            stream.read(torch.arange(22).view(2, 11) % 16)
            stream.save(folder / f"{kind}.safetensors")
            return
        cache = OlmemCache(model.config, max_length=None if kind == "memory" else 16)
        with torch.no_grad():
            model(torch.arange(22).view(2, 11) % 16, past_key_values=cache)
        cache.save(folder / f"{kind}.safetensors")

    return write


def mutate_state_file(rng: Random, data: bytes, scratch: Path) -> bytes:
    """Facts, counters or tensors that are others, mostly with the checksum that goes with them."""
    path = scratch / "state"
    path.write_bytes(data)
    with safe_open(path, framework="pt") as file:
        tensors, facts = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    path.unlink()
    for _ in range(rng.choice((1, 1, 2))):
        change(rng, tensors, facts)
    if rng.random() < 0.8:
        facts["checksum"] = checksum(tensors, facts)
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, facts)


def change(rng: Random, tensors: dict[str, torch.Tensor], facts: dict[str, str]) -> None:
    way, name = rng.randrange(9), rng.choice(sorted(tensors))
    if way == 0:
        facts[rng.choice(("max_length", "began_anew", "architecture", "notes"))] = json.dumps(rng.choice(NUMBERS))
    elif way == 1:
        facts[rng.choice(sorted(facts))] = rng.choice(("", "[" * 100_000, "{", "null", '{"model_type": "x"}', "x" * 9))
    elif way == 2:
        architecture = parse(facts["architecture"])
        if isinstance(architecture, dict) and architecture:
            architecture[rng.choice(sorted(architecture))] = rng.choice(NUMBERS)
            facts["architecture"] = json.dumps(architecture)
    elif way == 3:
        del tensors[name]
    elif way == 8:
        notes = parse(facts.get("notes"))
        if isinstance(notes, dict) and isinstance(notes.get("rows"), list) and notes["rows"]:
            row = rng.choice(notes["rows"])
            changed = rng.choice((notes, row if isinstance(row, dict) and row else notes))
            changed[rng.choice(sorted(changed))] = rng.choice((*NUMBERS, [0], [16], [None], [{"role": "x"}]))
            facts["notes"] = json.dumps(notes)
    elif way == 4:
        kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool)
        tensors[name] = tensors[name].to(rng.choice(kinds))
    elif way == 5:
        rows = rng.choice((0, 1, 3))
        tensors[name] = tensors[name][:rows] if tensors[name].ndim else tensors[name].repeat(rows)
    elif way == 6:
        counter = rng.choice([each for each in ("seen", "columns") if each in tensors] or [name])
        values = [
            rng.choice((0, 1, 2, 10, 11, 12, 2**31, 2**60, 2**63 - 1, -1)) for _ in range(tensors[counter].numel())
        ]
        tensors[counter] = torch.tensor(values).view(tensors[counter].shape)
    else:
        flat = tensors[name].clone().flatten()
        if len(flat):
            number = rng.choice((float("nan"), float("inf"), 1e30, -5.0, 0.0))
            flat[rng.randrange(len(flat))] = number if flat.is_floating_point() else rng.choice((0, 1))
        tensors[name] = flat.view(tensors[name].shape)


def use_state(folder: Path, rng: Random) -> None:
    """Loads the state for a model, mostly of its own kind, and reads three more tokens with it."""
    names = sorted(path for path in folder.iterdir())
    path = rng.choice(names) if names else folder / "nothing"
    kind = path.stem if path.stem in KINDS and rng.random() < 0.9 else rng.choice(sorted(KINDS))
    model = model_of(kind)
    cache = OlmemCache.load(path, model.config)
    rows = int(cache.counters.tensors["seen"].shape[0])
    with torch.no_grad():
        for _ in range(3):
            try:
                model(torch.ones(rows, 1, dtype=torch.long), past_key_values=cache)
            except ValueError as error:
                # it is used up, too large to go on with, or of a model in another dtype
                if str(error).startswith(("`max_length`", "`memory`", "`past_key_values` holds torch.")):
                    return
                raise RuntimeError(f"a state that loads does not run: {error}") from error
    if cache.notes is not None:
        stream = model.stream(path=path)
        if not all(row.ended or not row.tail for row in stream.rows):
            for row in stream.rows:
                row.tail = row.tail or [0]
            list(stream.write(2, do_sample=False, pad_token_id=0))


SEEDS = tuple(writer(kind) for kind in KINDS)
