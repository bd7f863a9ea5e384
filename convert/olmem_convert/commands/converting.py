"""From a native checkpoint to a folder that `AutoModelForCausalLM` loads, whole and verified or not at all."""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

import olmem
import torch
from olmem import OlmemConfig, OlmemForCausalLM
from olmem.rules_olmem import OLMO_BLOCKS
from transformers import GenerationConfig, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from ..errors import CheckpointError
from ..formats import Checkpoint, Given
from ..formats.detect import open_checkpoint
from ..memory import listed, new_parameters, refuse_without_effect, switched, with_memory
from ..plan import TOKEN_IDS, check_copies, make_config, make_tensors, tokens_of
from ..proof.verification import verify_checkpoint
from ..publish.model_card import CARD_NAME, REPORT_NAME, is_own, kept_metadata, write_card
from ..reading.olmem_folder import check_generation_config
from ..reading.tensors import LazyTensor, require_same
from ..reading.texts import read_bytes, read_json
from ..writing.progress import Progress, Tell
from ..writing.shards import WeightFiles, check_size
from ..writing.tokenizer import COMPANIONS, carry_tokenizer, find_tokenizer, write_tokenizer
from ..writing.transaction import Partial, job_of, recover, require_apart, written_whole

LARGEST_GROWTH = 2  # a tied head that is stored with its embedding, and written apart, makes less
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    tokenizer: str | Path | None = None,
    max_length: int | None = None,
    native_config: str | Path | None = None,
    n_ctx: int | None = None,
    act_fn: str | None = None,
    memory: Mapping[str, Any] | None = None,
    verify: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    allow_nonfinite: bool = False,
    allow_growth: bool = False,
    say: Callable[[str], None] = lambda line: None,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Converts the checkpoint `source`, mostly a folder, to the Olmem folder `out` and verifies its logits.

    dtype: "float32", "bfloat16" or "float16"; the checkpoint's own by default. max_shard_size: of a weight file.
    tokenizer: a `tokenizer.json` or a folder with one; looked for in and beside `source` by default. max_length: the
    trained length in tokens, when it is not the config's. native_config, n_ctx, act_fn: a config file, or the window
    and the activation, of a BakaLLM state dict that has no config.json beside it. memory: fields of OlmemConfig that
    switch a memory on, `{"num_memory_tokens": 16, "retrieval_layers": [20]}`, with new parameters beside the converted
    ones; what is verified is the model with it off. overwrite: replace `out`, if it is an Olmem folder. resume: keep
    what is finished when this does not come to its end, and go on from what an earlier one has kept. allow_nonfinite:
    carry NaN and infinite weights over. allow_growth: write a model of more than twice what the checkpoint's files
    hold, as one whose tensors share their numbers is. say: is told, line by line, what was found and done. tell: is
    told how far writing has come, about once a second, in place of a progress bar.

    Returns what was written. Raises CheckpointError when anything is amiss, leaving nothing behind without `resume`.
    """
    source, out = Path(source), named(out)
    check_options(dtype, max_shard_size, tokenizer)
    require_apart(source, out, {"tokenizer": as_path(tokenizer), "native_config": as_path(native_config)})
    recover(out, say)
    check_out(out, overwrite)
    kept = kept_metadata(out)  # of a folder to be replaced
    given = Given(Path(native_config) if native_config else None, n_ctx, act_fn)
    checkpoint = open_checkpoint(source, max_length, given)
    stored = choose_dtype(checkpoint.tensors, dtype)
    config = make_config(checkpoint, stored)
    planned = with_memory(checkpoint, memory or {})
    refuse_without_effect(planned, memory or {})
    added = new_parameters(planned, checkpoint)
    if added:
        config = make_config(planned, stored)
    tensors = make_tensors(planned, config)
    native = {name: tensor for name, tensor in tensors.items() if name not in added}
    announce(checkpoint, config, native, say)
    check_growth(native, checkpoint.tensors, allow_growth)
    if added:
        say(f"memory: {listed(switched(planned, checkpoint))}, with {count(tensors, added):,} new parameters")
    files = WeightFiles(tensors, stored, max_shard_size)
    say(f"writing {files.total():,} bytes of weights in {plural(len(files.names), 'file')}, as {name_of(stored)}")
    job = job_of(source, olmem.__version__, config.to_json_string(), files.names, allow_nonfinite)

    options: dict[str, Any] = {"overwrite": overwrite, "resume": resume, "strays_of": strays_of, "say": say}
    with written_whole(out, job, files.names, **options) as partial:
        folder = partial.folder
        written = write_weights(out, partial, files, allow_nonfinite, tell)
        config.auto_map = OlmemForCausalLM.auto_map()
        with torch.device("meta"):
            custom_object_save(OlmemForCausalLM(config), folder)
        config.save_pretrained(folder)
        GenerationConfig(**{name: getattr(config, name) for name in TOKEN_IDS}).save_pretrained(folder)
        if checkpoint.family == "transformers":
            carry_generation_config(source, folder)
        tokenizer_report = copy_tokenizer(checkpoint, config, Path(tokenizer) if tokenizer else None, folder, say)
        report = {
            "format": checkpoint.description,
            "parameters": count(tensors),
            "dtype": name_of(stored),
            **written,
            "notes": list(checkpoint.notes),
            "tokenizer": tokenizer_report,
            "memory": switched(planned, checkpoint) or None,
            "verification": verify_checkpoint(folder, checkpoint, say, allow_nonfinite) if verify else None,
        }
        require_same(checkpoint.tensors)
        write_card(folder, kept, (report["verification"] or {}).get("sha256"))
        if not verify:
            say(f"not verified: `olmem verify {quote(str(out))} --against {quote(str(source))}{given.options}` does it")
    say(f"wrote {out}")
    return report


def write_weights(
    out: Path, partial: Partial, files: WeightFiles, allow_nonfinite: bool, tell: Tell | None
) -> dict[str, Any]:
    """Writes the weight files that are not finished. Returns what to report of them."""
    total, found = files.total(), files.total(partial.finished)
    check_room(out, partial.folder, total - found)
    start = time.monotonic()
    with Progress(total - found, "writing weights", tell) as bar:
        nonfinite = files.write(
            partial.folder,
            bar.update,
            finished=partial.finished,
            finish=partial.finish,
            allow_nonfinite=allow_nonfinite,
        )
    seconds = time.monotonic() - start
    return {"bytes": total, "bytes_found": found, "seconds": round(seconds, 3), "nonfinite": nonfinite}


def announce(
    checkpoint: Checkpoint, config: OlmemConfig, tensors: Mapping[str, LazyTensor], say: Callable[[str], None]
) -> int:
    """Says what was found, and checks the copies of tied weights. Returns the number of parameters."""
    parameters = count(tensors)
    for line in describe(checkpoint, config, parameters):
        say(line)
    check_copies(checkpoint)
    return parameters


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plural(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def check_growth(made: Mapping[str, LazyTensor], held: Mapping[str, LazyTensor], allowed: bool) -> None:
    """Raises CheckpointError if the model is more than twice what its files hold: tensors can share their numbers, and
    a file of a megabyte then makes a model of any size."""
    makes = sum(tensor.nbytes for tensor in made.values())
    holds = sum(file.size for file in {file for tensor in held.values() for file in tensor.sources})
    if makes > LARGEST_GROWTH * holds and not allowed:
        raise CheckpointError(
            f"the model must be at most {LARGEST_GROWTH} times what its files hold (its weights take {makes:,} bytes, "
            f"the files have {holds:,}), as in them tensors share their numbers, and what is written has each apart; "
            "add --allow-growth if that is meant."
        )


def count(tensors: Mapping[str, LazyTensor], names: Iterable[str] | None = None) -> int:
    """The numbers in the tensors of these names, or of all."""
    return sum(torch.Size(tensors[name].shape).numel() for name in (tensors if names is None else names))


def describe(checkpoint: Checkpoint, config: OlmemConfig, parameters: int) -> Iterator[str]:
    sliding = config.layer_types.count("sliding_attention")
    window = f", {sliding} of them with a window of {config.sliding_window}" if sliding else ""
    window += f", in chunks of {checkpoint.chunk}" if checkpoint.chunk else ""
    yield (
        f"found {checkpoint.description}: {parameters:,} parameters, {config.num_hidden_layers} layers{window}, "
        f"{config.num_attention_heads} heads, trained length {config.max_position_embeddings}"
    )
    yield from (f"note: {note}" for note in checkpoint.notes)


def check_options(dtype: str | None, max_shard_size: int | str, tokenizer: str | Path | None) -> None:
    check_size(max_shard_size)
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"`dtype` must be one of {', '.join(DTYPES)} (got {dtype!r}); choose one.")
    if tokenizer is not None and not Path(tokenizer).exists():
        raise CheckpointError(f"`tokenizer` must be a tokenizer.json or its folder ({tokenizer} does not exist).")


def check_room(out: Path, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"`OUT` must be on a disk with room for {needed:,} bytes ({out} has {free:,} free); free some, or choose "
            "another disk."
        )


def choose_dtype(tensors: Mapping[str, LazyTensor], name: str | None) -> torch.dtype:
    if name is not None:
        return DTYPES[name]
    found = {tensor.dtype for tensor in tensors.values()}
    if len(found) != 1 or not found <= set(DTYPES.values()):
        raise CheckpointError(
            f"`dtype` must be given for this checkpoint (its weights are {sorted(map(str, found))}); add --dtype."
        )
    return found.pop()


def copy_tokenizer(
    checkpoint: Checkpoint, config: PreTrainedConfig, path: Path | None, folder: Path, say: Callable[[str], None]
) -> dict[str, Any] | None:
    of_transformers = checkpoint.family in ("transformers", "olmem")
    if path is None and of_transformers:
        report = carry_tokenizer(checkpoint.path, folder, config.vocab_size, say)
    elif path := path or find_tokenizer(checkpoint.path):
        report = write_tokenizer(
            path,
            folder,
            vocab_size=config.vocab_size,
            **{name: next(iter(tokens_of(config, name)), None) for name in TOKEN_IDS},
            max_length=config.max_position_embeddings,
        )
    else:
        report = None
    if report is None:
        where = "in" if of_transformers else "in or beside"
        say(f"no tokenizer found {where} the checkpoint, so none is written: add one with --tokenizer PATH")
        return None
    say(f"tokenizer: {report['size']} tokens, the same ids on {report['probes']} probes after reloading")
    if report["size"] != checkpoint.tokenizer_size and not of_transformers:
        say(f"note: the config says that {checkpoint.tokenizer_size} tokens were trained")
    return report


def carry_generation_config(source: Path, folder: Path) -> None:
    """The one of a Transformers folder, as it is, if it has one."""
    path = source / "generation_config.json"
    if path.is_file():
        check_generation_config(source)
        (folder / path.name).write_bytes(read_bytes(path))


def named(out: str | Path) -> Path:
    """Its absolute path, if a folder can be made there."""
    path = Path(os.path.abspath(out))
    try:
        text = str(path).encode().decode()
    except UnicodeEncodeError:
        text = ""  # libraries that write the files take UTF-8 only
    if not path.name or not text or "\0" in text:
        raise CheckpointError(f"`OUT` must be the name of a folder, in UTF-8 (got {str(out)!r}); name another one.")
    return path


def as_path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def check_out(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        raise CheckpointError(f"`OUT` must not exist yet (got {out}, which is no folder); name a new folder.")
    strays = strays_of(out)
    if strays:
        raise CheckpointError(
            f"`OUT` must not exist yet, or hold only what `olmem convert` wrote ({out} holds {', '.join(strays[:3])}); "
            "name a new folder, or move these away."
        )
    if not overwrite:
        raise CheckpointError(f"`OUT` must not exist yet (got {out}); name a new folder, or add --overwrite.")


WRITTEN = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|((generation|tokenizer)_)?config\.json"
    r"|tokenizer\.json|(verification|evaluation)\.json|\w+_olmem\.py|" + "|".join(map(re.escape, COMPANIONS))
)


def strays_of(out: Path) -> list[str]:
    """What in an existing `out` a conversion did not write, which must not go with it."""
    names = sorted(path.name for path in out.iterdir())
    strays = [name for name in names if not (is_own(out / name) if name == CARD_NAME else is_written(out / name))]
    if names and not strays and not is_of_olmem(out):
        return ["a model of another kind"]
    return strays


def is_written(path: Path) -> bool:
    return path.is_file() and WRITTEN.fullmatch(path.name) is not None


def is_of_olmem(folder: Path) -> bool:
    """An Olmem folder, or one of Transformers' own classes that was verified against an Olmem folder."""
    with suppress(CheckpointError):
        model_type = read_json(folder / "config.json").get("model_type")
        return model_type == "olmem" or (model_type in list(OLMO_BLOCKS) and (folder / REPORT_NAME).is_file())
    return False
