"""From a checkpoint to a folder that Transformers loads, whole and verified or not at all."""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from shlex import quote
from typing import Any

import olmem
import torch
from transformers import GenerationConfig, PreTrainedConfig

from ..errors import CheckpointError
from ..formats import Checkpoint
from ..formats.memory import listed
from ..options import ConvertOptions, Say, silent
from ..reading.fields import TOKEN_IDS
from ..reading.olmem_folder import read_generation_config
from ..reading.tensors import files_of, require_same
from ..writing.progress import Progress, Tell
from ..writing.shards import WeightFiles
from ..writing.tokenizer import carry_tokenizer, find_tokenizer, of_config, write_tokenizer
from ..writing.transaction import Partial, job_of, require_apart, written_whole
from .fetching import fetched
from .out_folder import claim, named, strays_of
from .targets import Target, target_of


def convert(
    source: str | Path,
    out: str | Path,
    options: ConvertOptions | None = None,
    *,
    say: Say = silent,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Converts the checkpoint `source`, mostly a folder, to the folder `out`, and verifies its logits.

    Where there is no such folder, `source` is the id of a model on the Hub, which is downloaded to the Hub's cache.

    `say` is told, line by line, what was found and done. `tell` is told how far writing has come, about once a second,
    in place of a progress bar. Returns what was written.

    Raises:
        CheckpointError: when anything is amiss. Nothing is left behind then, unless `options.resume` is set.
    """
    options, given, out = options or ConvertOptions(), Path(out), named(out)
    kept = claim(Path(source), out, options, say)  # before anything is downloaded for it
    source = fetched(source, options, say)
    require_apart(source, out, {})
    target = target_of(source, options)
    announce(target, say)
    names = target.files.names
    files = files_of(target.checkpoint.tensors)
    job = job_of(files, olmem.__version__, target.config.to_json_string(), names, options.allow_nonfinite)
    whole = written_whole(
        out, job, names, overwrite=options.overwrite, resume=options.resume, strays_of=strays_of, say=say
    )
    with whole as partial:
        report = fill(partial, out, target, options, say, tell)
        require_same(target.checkpoint.tensors)
        target.describe(partial.folder, kept, (report["verification"] or {}).get("sha256"))
    say(f"wrote {given}")
    if report["tokenizer"] is None and options.to is None:
        say(f"without a tokenizer: `olmem tokenizer {quote(str(given))} PATH` adds one")
    say(target.next_step(source, given))
    return report


def fill(
    partial: Partial, out: Path, target: Target, options: ConvertOptions, say: Say, tell: Tell | None
) -> dict[str, Any]:
    """Writes all files of the folder that becomes `out`, and verifies them. Returns what to report."""
    folder, checkpoint, config = partial.folder, target.checkpoint, target.config
    written = write_weights(out, partial, target.files, options.allow_nonfinite, tell)
    target.save(folder)
    GenerationConfig(**{name: getattr(config, name) for name in TOKEN_IDS}).save_pretrained(folder)
    if checkpoint.of_transformers:
        carry_generation_config(checkpoint.path, folder)
    tokenizer = copy_tokenizer(checkpoint, config, options.tokenizer, folder, say)
    return {
        "format": target.format,
        "parameters": count(target.files),
        "dtype": str(target.files.dtype).removeprefix("torch."),
        **written,
        "notes": list(checkpoint.notes),
        "tokenizer": tokenizer,
        "memory": target.memory or None,
        "verification": target.verify(folder, say) if options.verify else None,
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
    """Says what was found, and what will be written."""
    checkpoint, config, files = target.checkpoint, target.checkpoint.olmem_config, target.files
    sliding = config["layer_types"].count("sliding_attention")
    window = f", {sliding} of them with a window of {config['sliding_window']}" if sliding else ""
    if "chunked_attention" in config["layer_types"]:
        window += f", in chunks of {config['attention_chunk_size']}"
    new = count(files, target.added)
    say(
        f"found {checkpoint.description}: {count(files) - new:,} parameters, {config['num_hidden_layers']} layers"
        f"{window}, {config['num_attention_heads']} heads, trained length {config['max_position_embeddings']}"
    )
    for note in checkpoint.notes:
        say(f"note: {note}")
    if target.memory:
        say(f"memory: {listed(target.memory)}, with {new:,} new parameters")
    say(f"writing {files.described()}")


def count(files: WeightFiles, names: Iterable[str] | None = None) -> int:
    """The numbers in the tensors of these names, or of all."""
    return sum(torch.Size(files.tensors[name].shape).numel() for name in (files.tensors if names is None else names))


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
        report = write_tokenizer(path, folder, **of_config(config))
    else:
        report = None
    if report is None:
        where = "in" if of_transformers else "in or beside"
        say(f"no tokenizer found {where} the checkpoint, so none is written; --tokenizer PATH names one")
        return None
    say(f"tokenizer: {report['size']} tokens, the same ids on {report['probes']} probes after reloading")
    if report["size"] != checkpoint.tokenizer_size and not of_transformers:
        say(f"note: the config says that the model was trained with {checkpoint.tokenizer_size} tokens")
    return report


def carry_generation_config(source: Path, folder: Path) -> None:
    """The one of a Transformers folder, as it is, if it has one."""
    if (data := read_generation_config(source)) is not None:
        (folder / "generation_config.json").write_bytes(data)
