"""From a checkpoint to a folder that Transformers loads, whole and verified or not at all."""

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import olmem
import torch
from transformers import GenerationConfig, PreTrainedConfig

from ..errors import CheckpointError
from ..formats import Checkpoint
from ..formats.memory import listed
from ..formats.planning import check_copies
from ..options import ConvertOptions, Say, silent
from ..reading.fields import TOKEN_IDS, tokens_of
from ..reading.olmem_folder import read_generation_config
from ..reading.tensors import LazyTensor, require_same
from ..writing.progress import Progress, Tell
from ..writing.shards import WeightFiles
from ..writing.tokenizer import carry_tokenizer, find_tokenizer, write_tokenizer
from ..writing.transaction import Partial, job_of, written_whole
from .out_folder import claim, named, strays_of
from .targets import Target, target_of

LARGEST_GROWTH = 2  # a tied head that is stored with its embedding, and written apart, makes less


def convert(
    source: str | Path,
    out: str | Path,
    options: ConvertOptions | None = None,
    *,
    say: Say = silent,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Converts the checkpoint `source`, mostly a folder, to the folder `out`, and verifies its logits.

    `say` is told, line by line, what was found and done. `tell` is told how far writing has come, about once a second,
    in place of a progress bar. Returns what was written.

    Raises:
        CheckpointError: when anything is amiss. Nothing is left behind then, unless `options.resume` is set.
    """
    source, out = Path(source), named(out)
    options = options or ConvertOptions()
    options.check()
    kept = claim(source, out, options, say)
    target = target_of(source, options)
    announce(target, say)
    check_growth(target, options.allow_growth)
    files = WeightFiles(target.tensors, target.dtype, options.max_shard_size)
    say(f"writing {files.total():,} bytes of weights in {plural(len(files.names), 'file')}, as {name_of(target.dtype)}")
    job = job_of(source, olmem.__version__, target.config.to_json_string(), files.names, options.allow_nonfinite)
    whole = written_whole(
        out, job, files.names, overwrite=options.overwrite, resume=options.resume, strays_of=strays_of, say=say
    )
    with whole as partial:
        report = fill(partial, out, target, files, options, say, tell)
        require_same(target.checkpoint.tensors)
        target.describe(partial.folder, kept, (report["verification"] or {}).get("sha256"))
        if not options.verify:
            say(f"not verified: {target.how_to_verify(source, out)}")
    say(f"wrote {out}")
    return report


def fill(
    partial: Partial,
    out: Path,
    target: Target,
    files: WeightFiles,
    options: ConvertOptions,
    say: Say,
    tell: Tell | None,
) -> dict[str, Any]:
    """Writes all files of the folder that becomes `out`, and verifies them. Returns what to report."""
    folder, checkpoint, config = partial.folder, target.checkpoint, target.config
    written = write_weights(out, partial, files, options.allow_nonfinite, tell)
    target.save(folder)
    GenerationConfig(**{name: getattr(config, name) for name in TOKEN_IDS}).save_pretrained(folder)
    if checkpoint.of_transformers:
        carry_generation_config(checkpoint.path, folder)
    tokenizer = copy_tokenizer(checkpoint, config, options.tokenizer, folder, say)
    return {
        "format": target.format,
        "parameters": count(target.tensors),
        "dtype": name_of(target.dtype),
        **written,
        "notes": list(checkpoint.notes),
        "tokenizer": tokenizer,
        "memory": target.memory or None,
        "verification": target.verify(folder, files, say) if options.verify else None,
    }


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


def announce(target: Target, say: Say) -> None:
    """Says what was found, and checks the copies of tied weights."""
    native = {name: tensor for name, tensor in target.tensors.items() if name not in target.added}
    for line in describe(target.checkpoint, count(native)):
        say(line)
    check_copies(target.checkpoint)
    if target.memory:
        say(f"memory: {listed(target.memory)}, with {count(target.tensors, target.added):,} new parameters")


def name_of(dtype: torch.dtype) -> str:
    """Returns the name that a user gives a dtype."""
    return str(dtype).removeprefix("torch.")


def plural(number: int, word: str) -> str:
    """Returns the number with its word, which gets an s unless there is one."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def check_growth(target: Target, allowed: bool) -> None:
    """Raises CheckpointError if the model is more than twice what its files hold: tensors can share their numbers, and
    a file of a megabyte then makes a model of any size."""
    makes = sum(tensor.nbytes for name, tensor in target.tensors.items() if name not in target.added)
    held = target.checkpoint.tensors.values()
    holds = sum(file.size for file in {file for tensor in held for file in tensor.sources})
    if makes > LARGEST_GROWTH * holds and not allowed:
        raise CheckpointError(
            f"the model must be at most {LARGEST_GROWTH} times what its files hold (its weights take {makes:,} bytes, "
            f"the files have {holds:,}), as in them tensors share their numbers, and what is written has each apart; "
            "add --allow-growth if that is meant."
        )


def count(tensors: Mapping[str, LazyTensor], names: Iterable[str] | None = None) -> int:
    """The numbers in the tensors of these names, or of all."""
    return sum(torch.Size(tensors[name].shape).numel() for name in (tensors if names is None else names))


def describe(checkpoint: Checkpoint, parameters: int) -> Iterator[str]:
    """What was found, line by line."""
    config = checkpoint.olmem_config
    sliding = config["layer_types"].count("sliding_attention")
    window = f", {sliding} of them with a window of {config['sliding_window']}" if sliding else ""
    window += f", in chunks of {checkpoint.chunk}" if checkpoint.chunk else ""
    yield (
        f"found {checkpoint.description}: {parameters:,} parameters, {config['num_hidden_layers']} layers{window}, "
        f"{config['num_attention_heads']} heads, trained length {config['max_position_embeddings']}"
    )
    yield from (f"note: {note}" for note in checkpoint.notes)


def check_room(out: Path, folder: Path, needed: int) -> None:
    """Raises CheckpointError if the disk has less room than is needed."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"`OUT` must be on a disk with room for {needed:,} bytes ({out} has {free:,} free); free some, or choose "
            "another disk."
        )


def copy_tokenizer(
    checkpoint: Checkpoint, config: PreTrainedConfig, given: str | Path | None, folder: Path, say: Say
) -> dict[str, Any] | None:
    """Writes the tokenizer that is given, or the checkpoint's own. Returns what to report of it, if there is one."""
    of_transformers = checkpoint.of_transformers
    if given is None and of_transformers:
        report = carry_tokenizer(checkpoint.path, folder, config.vocab_size, say)
    elif path := Path(given) if given else find_tokenizer(checkpoint.path):
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
    if (data := read_generation_config(source)) is not None:
        (folder / "generation_config.json").write_bytes(data)
