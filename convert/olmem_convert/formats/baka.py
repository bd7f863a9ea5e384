"""Checkpoints of BakaLLM (github.com/Maykeye/BakaLLM), branches 001_pristine and 002_baka_elephant: a bare state dict,
`baka_PROJECT_NUMEL_HASH.bin`, as its `baka3.py` saves it.

The state dict gives all sizes and the frequencies of RoPE. It does not hold the window `n_ctx` and the activation
`act_fn`, which native code takes from `BakaConfig`: they come from a `config.json` beside it, in those names, or from
the caller.
"""

import re
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from olmem.positions_olmem import inverse_frequencies

from ..errors import CheckpointError
from ..options import Given
from ..proof import baka_forward
from ..reading.archives import pickle_mentions, read_pickle
from ..reading.tensors import LazyTensor
from ..reading.texts import read_json
from . import Checkpoint, Field, Key, PairsToHalves, carried, check_layers, expand, read_fields

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "elephant": "elephant",
    "BakaElephant": "elephant",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}
BRANCHES = ("001_pristine", "002_baka_elephant")
CONFIG: dict[str, Field] = {
    "dim_model": Field(to="hidden_size", kind=int),
    "dim_ff": Field(to="intermediate_size", kind=int),
    "dim_attn": Field(kind=int),
    "n_layers": Field(to="num_hidden_layers", kind=int),
    "n_heads": Field(to="num_attention_heads", kind=int),
    "n_vocab": Field(to="vocab_size", kind=int),
    "n_ctx": Field(to="attention_chunk_size", kind=int),
    "act_fn": Field(only=(None, *ACTIVATIONS)),
    "model_type": Field(only=(None, "baka", "baka_pristine", "baka_elephant", *BRANCHES)),
}
# Parts of the names that only later branches have, the latest first.
LATER_BRANCHES = {
    "qkv_prep": "008_mamba88d",
    "mamba": "007_mamba",
    "rmt": "005_rmt or 006_fanout",
    "pause": "004_pause",
}
TAKES_GIVEN: bool = True
LAYER_NORM_EPS = 1e-5  # torch's default, which native code leaves alone
DEFAULT_THETA = 10000.0  # of rotary-embedding-torch
LARGEST_GAP = 2.0**-7  # of a frequency from its theta's: that of bfloat16, which a later float32 file may hold


def recognise(source: Path) -> str | None:
    """Says that it is a state dict of BakaLLM, if it is one."""
    return "BakaLLM" if state_dicts(source) else None


def state_dicts(source: Path) -> list[Path]:
    """The file itself, or those of the folder, if by their tensors' names they are of any branch of BakaLLM."""
    files = sorted(source.glob("*.bin")) if source.is_dir() else [source]
    return [path for path in files if path.is_file() and pickle_mentions(path, "rot.freqs", "vocab_in.weight")]


def open_checkpoint(source: Path, max_length: int | None, given: Given) -> Checkpoint:
    """Opens the state dict, with what its config or the caller says of it."""
    path, *others = state_dicts(source)
    if others:
        names = ", ".join(file.name for file in (path, *others))
        raise CheckpointError(f"`{source}` must hold one state dict (it holds {names}); name the file to convert.")
    tensors = canonical(read_pickle(path))
    refuse_later_branches(tensors)
    sizes = read_sizes(tensors)
    check_layers(sizes["n_layers"], tensors)
    native = native_config(path, sizes, given)
    frequencies = read_frequencies(tensors, sizes["n_layers"])
    config, notes = olmem_config(native, frequencies), []
    if native["model_type"] in (None, "baka"):
        notes.append(
            f"right for {' and '.join(BRANCHES)} only: weights of 003_baka_xl have the same names, but its windows see "
            "the one before"
        )
    if max_length is None:
        notes.append("the trained length is not recorded, so it is set to the window's; --max-length sets another")
    else:
        config["max_position_embeddings"] = max_length
    return Checkpoint(
        description="BakaLLM",
        path=path.parent,
        native_config=native,
        olmem_config=config,
        tensors=tensors,
        keys=expand(key_table(frequencies), sizes["n_layers"]),
        tokenizer_size=sizes["n_vocab"],
        forward=partial(baka_forward.forward, native),
        notes=tuple(notes),
    )


def canonical(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Names without the wrapper of torch.compile."""
    renamed = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        raise CheckpointError("two weights must not share a name (they do without `_orig_mod.`); save them again.")
    return renamed


def refuse_later_branches(tensors: Mapping[str, LazyTensor]) -> None:
    """Raises CheckpointError for a state dict whose names only a later branch has."""
    signs = [(name, branch) for part, branch in LATER_BRANCHES.items() for name in tensors if part in name.split(".")]
    if "norm_out.weight" in tensors and "norm_out.bias" not in tensors:
        signs.append(("norm_out.weight` without `norm_out.bias", "004_pause"))
    if signs:
        sign, branch = signs[0]
        raise CheckpointError(
            f"the state dict must be of BakaLLM's {' or '.join(BRANCHES)} (it has `{sign}`, as {branch} has); Olmem "
            "has no such block, so convert one of these two."
        )


def read_sizes(tensors: Mapping[str, LazyTensor]) -> dict[str, int]:
    """What `BakaConfig` says, by the shapes of the weights; the key table checks the rest of them."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].shape) != dimensions or 0 in tensors[name].shape:
            got = tensors[name].shape if name in tensors else "no such tensor"
            raise CheckpointError(
                f"`{name}` must be a tensor of {dimensions} dimensions (got {got}); export the whole state dict."
            )
        return tensors[name].shape

    n_vocab, dim_model = shape("vocab_in.weight", 2)
    layer = "model.layers.0."
    dim_attn, dim_ff = shape(f"{layer}attn.q.weight", 2)[0], shape(f"{layer}mlp.fc_gate.weight", 2)[0]
    head_dim = 2 * shape(f"{layer}attn.rot.freqs", 1)[0]
    if dim_attn % head_dim != 0:
        raise CheckpointError(
            f"`{layer}attn.q.weight` must have heads of the {head_dim} dimensions that `{layer}attn.rot.freqs` turns "
            f"(got {dim_attn} rows); files of two checkpoints are mixed."
        )
    if dim_attn != dim_model:
        raise CheckpointError(
            f"`dim_attn` must equal `dim_model` = {dim_model} (got {dim_attn} rows of `{layer}attn.q.weight`); values "
            "are then wider or narrower than queries, and Olmem's heads have one width."
        )
    return {
        "dim_model": dim_model,
        "dim_ff": dim_ff,
        "dim_attn": dim_attn,
        "n_layers": len({match[1] for name in tensors if (match := re.match(r"model\.layers\.(\d+)\.", name))}),
        "n_heads": dim_attn // head_dim,
        "n_vocab": n_vocab,
    }


def native_config(path: Path, sizes: dict[str, int], given: Given) -> dict[str, Any]:
    """`BakaConfig` whole: sizes by the weights, window and activation by a config file or the caller, all agreeing."""
    file = Path(given.native_config or path.parent / "config.json")
    written = read_json(file) if given.native_config or file.is_file() else {}
    read = read_fields(written, CONFIG, file.name)
    derived = {"dim_ff": 4 * sizes["dim_model"], "dim_attn": sizes["dim_model"]}  # what native code makes of a 0
    for name, size in sizes.items():
        found = derived[name] if name in derived and read[name] == 0 else read[name]
        if found not in (None, size):
            raise CheckpointError(
                f"`{name}` of {file.name} must be {size}, as the weights have it (got {read[name]}); config and "
                "weights are of two checkpoints."
            )
    said = read_fields({"n_ctx": given.n_ctx, "act_fn": given.act_fn}, CONFIG, "the options")
    said = {name: value for name, value in said.items() if value is not None}
    for name, value in said.items():
        if read[name] not in (None, value):
            raise CheckpointError(
                f"`{name}` must be one value (got {value!r} of the options and {read[name]!r} of {file.name}); leave "
                "the wrong one out."
            )
    native = read | sizes | said
    missing = [name for name in ("n_ctx", "act_fn") if native[name] is None]
    if missing:
        options = " ".join(f"--{name.replace('_', '-')} {name.upper()}" for name in missing)
        where = f"nor does {file.name}" if file.is_file() else "and there is no config.json beside it"
        raise CheckpointError(
            f"{' and '.join(f'`{name}`' for name in missing)} must be given (the state dict does not say, {where}); "
            f"add {options} as trained, or --native-config FILE."
        )
    if native["n_ctx"] < 1:
        raise CheckpointError(f"`n_ctx` must be at least 1 (got {native['n_ctx']}); give the window as trained.")
    return native


def read_frequencies(tensors: Mapping[str, LazyTensor], num_layers: int) -> tuple[float, ...]:
    """The inverse frequencies of RoPE, D/2 numbers, which every layer stores anew."""
    frequencies: tuple[float, ...] = ()
    for name in (f"model.layers.{layer}.attn.rot.freqs" for layer in range(num_layers)):
        if name not in tensors:
            continue  # which `to_olmem` will say
        if not tensors[name].dtype.is_floating_point:
            raise CheckpointError(f"`{name}` must be floating-point (got {tensors[name].dtype}); save it as float32.")
        stored = tuple(tensors[name].load().double().reshape(-1).tolist())
        frequencies = frequencies or stored
        if stored != frequencies:
            raise CheckpointError(
                f"`{name}` must be that of the layers before it (got {preview(stored)} after {preview(frequencies)}); "
                "Olmem's RoPE is one for all layers."
            )
        if stored[0] != 1 or not all(0 < after < before for before, after in pairwise(stored)):
            raise CheckpointError(
                f"`{name}` must fall from 1 and stay positive, as frequencies of RoPE do (got {preview(stored)}); "
                "these are none of BakaLLM's: convert the checkpoint that its code saved."
            )
    return frequencies


def preview(numbers: tuple[float, ...]) -> str:
    """Returns a few names, as a message can repeat them."""
    return ", ".join(f"{number:.4g}" for number in numbers[:4]) + (", …" if len(numbers) > 4 else "")


def rope_parameters(frequencies: tuple[float, ...]) -> dict[str, Any]:
    """The theta that the frequencies follow, and they themselves where float32 does not compute them to the bit."""
    stored = torch.tensor(frequencies, dtype=torch.float64)
    fitted = fit_theta(stored)
    rounded = (float(f"{fitted:.{digits}g}") for digits in range(1, 7))
    theta = next((theta for theta in rounded if gives(theta, stored)), fitted)
    gap = float((inverse_frequencies(theta, 2 * len(stored)).double() / stored - 1).abs().max())
    if not gap <= LARGEST_GAP:
        raise CheckpointError(
            f"`rot.freqs` must be theta ** (-2j / D) for one theta (got {preview(frequencies)}, up to {gap:.2g} of a "
            f"value off those of {theta:.6g}); only such RoPE is BakaLLM's."
        )
    parameters = {"rope_type": "default", "rope_theta": theta}
    if torch.equal(inverse_frequencies(theta, 2 * len(stored)).double(), stored):
        return parameters
    return parameters | {"inverse_frequencies": list(frequencies)}


def fit_theta(stored: torch.Tensor) -> float:
    """By least squares of logarithms; a single frequency says nothing."""
    if len(stored) == 1:
        return DEFAULT_THETA
    exponents = torch.arange(len(stored), dtype=torch.float64) / len(stored)
    return float((-(exponents * stored.log()).sum() / exponents.square().sum()).exp())


def gives(theta: float, stored: torch.Tensor) -> bool:
    """Whether `stored` is what some precision keeps of the frequencies of this theta."""
    exact = inverse_frequencies(theta, 2 * len(stored))
    return any(torch.equal(exact.to(kind).double(), stored) for kind in (torch.float32, torch.bfloat16, torch.float16))


def olmem_config(native: Mapping[str, Any], frequencies: tuple[float, ...]) -> dict[str, Any]:
    """Returns the fields of OlmemConfig for what the state dict and the config say."""
    return carried(native, CONFIG) | {
        "hidden_act": ACTIVATIONS[native["act_fn"]],
        "max_position_embeddings": native["n_ctx"],
        "norm_placement": "parallel",
        "norm_type": "layer",
        "rms_norm_eps": LAYER_NORM_EPS,
        "qk_norm": "none",
        "layer_types": ["chunked_attention"] * native["n_layers"],
        "attention_chunk_lookback": 0,
        "rope_parameters": {"chunked_attention": rope_parameters(frequencies)},
        "tie_word_embeddings": False,
        "pad_token_id": 0,  # which native code gives to whatever tokenizer it loads
    }


def key_table(frequencies: tuple[float, ...]) -> list[Key]:
    """Returns the table of the state dict's names."""
    native, olmem = "model.layers.{layer}.", "model.layers.{layer}."
    order = PairsToHalves(head_dim=2 * len(frequencies))
    return [
        Key("vocab_in.weight", ("model.embed_tokens.weight",)),
        Key("vocab_out.weight", ("lm_head.weight",)),
        *(Key(f"norm_out.{part}", (f"model.norm.{part}",)) for part in ("weight", "bias")),
        *(Key(f"{native}norm_in.{part}", (f"{olmem}input_layernorm.{part}",)) for part in ("weight", "bias")),
        *(Key(f"{native}attn.{x}.weight", (f"{olmem}self_attn.{x}_proj.weight",), order=order) for x in "qk"),
        *(Key(f"{native}attn.{x}.weight", (f"{olmem}self_attn.{x}_proj.weight",)) for x in "vo"),
        Key(f"{native}attn.rot.freqs", (), numbers=frequencies),
        *(Key(f"{native}mlp.fc_{x}.weight", (f"{olmem}mlp.{x}_proj.weight",)) for x in ("gate", "up", "down")),
    ]
