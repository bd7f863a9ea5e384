"""The smallest genuine checkpoints of every reader, as files in memory: what mutations start from."""

import io
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from convert.fuzzing.states import SEEDS
from convert.writers import (
    BAKA_CONFIG,
    NORM,
    OLMO_CORE_MODEL,
    baka_state,
    olmo_core_state,
    olmo_state,
    write_baka,
    write_distributed,
    write_flat_shards,
    write_olmo,
    write_olmo_core,
)
from olmem_convert import CardOptions, ConvertOptions, card, convert, evaluate
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Olmo2Config, Olmo2ForCausalLM, Olmo3Config, Olmo3ForCausalLM, OlmoConfig, OlmoForCausalLM

Files = dict[str, bytes]

WORDS = ("Ġ", "a", "b", "c", "d", "1", "2", "Ċ", "'", "é", "ab", "Ġa")
SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 12,
    "eos_token_id": 13,
}
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 300.0}


def files_of(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_tokenizer(folder: Path, eos: str = "<|end|>") -> None:
    """A byte-level tokenizer of 14 tokens with all the files that Transformers may put beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken("<|pad|>", special=True), AddedToken(eos, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    pad = {"__type": "AddedToken", "content": "<|pad|>", "special": True, "normalized": False}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": eos}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|pad|>": 12, eos: 13}))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nĠ a\n")


def save(folder: Path, model_class: Any, config: Any, shards: str = "5GB", pickled: bool = False) -> Path:
    """A folder as Transformers' own `save_pretrained` writes it; `pickled`, as its releases up to 4.34 did."""
    torch.manual_seed(0)
    model = model_class(config)
    model.save_pretrained(folder, max_shard_size=shards)
    if pickled:
        for path in folder.glob("*.safetensors"):
            path.unlink()
        state = model.state_dict()
        halves = [dict(list(state.items())[part::2]) for part in (0, 1)] if shards != "5GB" else [state]
        names = [f"pytorch_model-{part + 1:05}-of-00002.bin" for part in (0, 1)]
        names = names if len(halves) == 2 else ["pytorch_model.bin"]
        for name, half in zip(names, halves, strict=True):
            torch.save(half, folder / name)
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        if len(halves) == 2:
            weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
            index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def olmo_flat(folder: Path) -> None:
    """Both forms of the index, the older with a span that has no list around it."""
    write_olmo(folder, "model/metadata.json")
    state = olmo_state()
    thirds = {name: [[(0, 3), (5, value.numel())], [(3, 5)]] for name, value in state.items()}
    write_flat_shards(folder / "model", state, thirds, form="flattened_offsets_per_file")


def olmo_core_windows(folder: Path) -> None:
    """Two layers in four chunks each, a window, YaRN, token ids, and a tokenizer."""
    scaling = {"factor": 8.0, "beta_fast": 32, "beta_slow": 1, "old_context_len": 8192}
    rope = {"theta": 500000, "scaling": scaling | {"_CLASS_": "olmo_core.nn.rope.YaRNRoPEScalingConfig"}}
    window = {"pattern": [4], "force_full_attention_on_first_layer": True}
    mixer = {"n_heads": 1, "n_kv_heads": 1, "bias": False, "qk_norm": {**NORM}, "sliding_window": window}
    block = OLMO_CORE_MODEL["block"] | {"sequence_mixer": mixer | {"rope": {"theta": 500000}}}
    overrides = {str(layer): block | {"sequence_mixer": mixer | {"rope": rope}} for layer in (0, 3)}
    state = olmo_core_state()
    for layer in (1, 2, 3):
        of_layer = {key: value for key, value in state.items() if key.startswith("blocks.0.")}
        state |= {key.replace("blocks.0.", f"blocks.{layer}."): value.clone() for key, value in of_layer.items()}
    write_olmo_core(folder, state, n_layers=4, block=block, block_overrides=overrides)
    boxes = {}
    for name, value in state.items():
        half = value.shape[0] // 2
        rest = tuple(value.shape[1:])
        offsets = ((0, *(0 for _ in rest)), (half, *(0 for _ in rest)))
        boxes[f"model.{name}"] = [(offsets[0], (half, *rest)), (offsets[1], (value.shape[0] - half, *rest))]
    stored: dict[str, Any] = {f"model.{name}": value for name, value in state.items()}
    write_distributed(folder / "model_and_optim", stored, boxes, num_files=2)
    experiment = json.loads((folder / "config.json").read_text())
    experiment["dataset"] = {"tokenizer": {"vocab_size": 12, "eos_token_id": 11, "pad_token_id": 10}}
    (folder / "config.json").write_text(json.dumps(experiment))


def olmo_core_beside(folder: Path) -> None:
    """Weights beside the config, without a prefix, and the optimizer's pickled values."""
    write_olmo_core(folder)
    (folder / "model_and_optim" / ".metadata").unlink()
    (folder / "model_and_optim" / "__0_0.distcp").unlink()
    (folder / "model_and_optim").rmdir()
    write_distributed(folder, olmo_core_state() | {"optim.groups": {"lr": 0.1}})
    (folder / ".metadata.json").write_text('{"version": "2.3.0"}')


def with_tokenizer(write: Callable[[Path], object]) -> Callable[[Path], None]:
    def write_both(folder: Path) -> None:
        write(folder)
        write_tokenizer(folder)

    return write_both


def olmem(make: Callable[[Path], object], **memory: Any) -> Callable[[Path], None]:
    """The Olmem folder that this checkpoint converts to, without its code."""

    def write(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as name:
            make(Path(name) / "source")
            convert(Path(name) / "source", Path(name) / "out", ConvertOptions(memory=memory, verify=False))
            for path, data in files_of(Path(name) / "out").items():
                if not path.endswith((".py", ".md")):
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).write_bytes(data)

    return write


def olmo1(folder: Path) -> None:
    save(folder, OlmoForCausalLM, OlmoConfig(**SIZES, clip_qkv=0.5, tie_word_embeddings=True))


def olmo2(folder: Path) -> None:
    save(folder, Olmo2ForCausalLM, Olmo2Config(**SIZES), shards="1KB")
    write_tokenizer(folder)


def olmo2_pickled(folder: Path) -> None:
    save(folder, Olmo2ForCausalLM, Olmo2Config(**SIZES), pickled=True)


def olmo3(folder: Path) -> None:
    rope = {"full_attention": YARN, "sliding_attention": PLAIN}
    types = ["sliding_attention", "full_attention"]
    sizes = SIZES | {"num_hidden_layers": 2}
    config = Olmo3Config(**sizes, sliding_window=5, layer_types=types, rope_parameters=rope)
    save(folder, Olmo3ForCausalLM, config)


def olmo3_pickled(folder: Path) -> None:
    save(folder, Olmo3ForCausalLM, Olmo3Config(**SIZES, sliding_window=5), shards="1KB", pickled=True)


def baka_bare(folder: Path) -> None:
    """One layer, names as under torch.compile, and no activation in the config."""
    state = {f"_orig_mod.{name}": value for name, value in baka_state(1).items()}
    write_baka(folder, state, n_layers=1, act_fn="elephant", model_type=...)


READERS: dict[str, tuple[Callable[[Path], object], ...]] = {
    "olmo_pickle": (lambda folder: write_olmo(folder, "model.pt"),),
    "olmo_safetensors": (lambda folder: write_olmo(folder, "model.safetensors"),),
    "olmo_flat_shards": (lambda folder: write_olmo(folder, "model/metadata.json"), olmo_flat),
    "olmo_torch_new": (lambda folder: write_olmo(folder, "model_and_optim/.metadata"),),
    "olmo_core": (write_olmo_core, olmo_core_windows, olmo_core_beside),
    "bakallm": (write_baka, baka_bare),
    "transformers": (olmo1, olmo2, olmo3),
    "transformers_pickle": (olmo2_pickled, olmo3_pickled),
    "tokenizer": (write_tokenizer,),
    "olmem": (olmem(olmo2), olmem(olmo3), olmem(olmo1)),
}


def converted(folder: Path) -> None:
    """A verified folder that may be published, with its tokenizer, its code, its card and an evaluation."""
    with tempfile.TemporaryDirectory() as name:
        olmo2(Path(name) / "source")
        convert(Path(name) / "source", folder)
        (Path(name) / "text.txt").write_text(TEXT)
        evaluate(folder, [Path(name) / "text.txt"])
        card(folder, CardOptions(license="mit"))


TEXT = "abc abd 12 1 2 ab"
# What is read as a converted folder, by the commands that take one.
FOLDERS: dict[str, tuple[Callable[[Path], object], ...]] = {"out": (converted,)}
# What is no checkpoint: states of a stream, and a folder that is pushed to a Hub which lies.
OTHERS: dict[str, tuple[Callable[[Path], object], ...]] = {"state": SEEDS, "hub": (converted,)}


@cache
def seeds(reader: str) -> tuple[Files, ...]:
    """Each seed of a reader, as file contents by name."""
    found = []
    for write in (READERS | FOLDERS | OTHERS)[reader]:
        with tempfile.TemporaryDirectory() as name:
            write(Path(name) / "source")
            found.append(files_of(Path(name) / "source"))
    return tuple(found)


def saved(value: Any, **options: Any) -> bytes:
    """What `torch.save` writes."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


__all__ = ["BAKA_CONFIG", "FOLDERS", "OTHERS", "READERS", "TEXT", "Files", "saved", "seeds"]
