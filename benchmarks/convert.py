"""What a conversion costs beside `cp`, at any size: memory, time, computing; and what killing it does.

    python benchmarks/convert.py [--gib 8] [--folder DIR] [--before CHECKOUT] [--peer PYTHON] [--json]
    python benchmarks/convert.py --kills 50
    python benchmarks/convert.py --renames 50

Makes a checkpoint of OLMo-core (8 ranks) and a legacy one (`model.pt`), each of `--gib` in float32, and converts both
to bfloat16 without verification, which computes and is no copying. `cp -r` of the same files, on the same disk, is
timed before and after. All of them are timed twice: with nothing of the files in the disk cache, and with all of them
there. They end when what they wrote is on the disk; imports of Python count. Memory is the process's peak, and CPU the
seconds that it computed. `--before` names a checkout of another version, whose converter is timed likewise. `--peer`
names the Python of an environment that has ai2-olmo-core 3, whose converter then converts the OLMo-core checkpoint
likewise, without its validation.

The second form kills conversions with SIGKILL at random moments, goes on with --resume, and compares what comes out in
the end with what an uninterrupted one gives, byte by byte.

The third form kills conversions that replace a folder, with SIGKILL before, between or behind their last renames. A
command then fails, one of the hidden folders beside OUT is removed, if there is one, and another command fails. The old
folder or the new one must be whole, and the conversion, run again, must end with the new one and nothing beside it.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

KINDS = ("OLMo-core", "legacy")
GIB, RANKS = 2**30, 8
VOCABULARY, HIDDEN, INTERMEDIATE, HEADS = 100352, 2048, 8192, 16
OLMO2_32B = 32_234_279_936  # parameters
CONVERT = [sys.executable, "-m", "olmem_convert", "convert"]
PEER = """
import json, sys
from olmo_core.config import DType
from olmo_core.nn.hf.convert_checkpoint import convert_checkpoint_to_hf
source, out, tokenizer = sys.argv[1:]
model = json.load(open(f"{source}/config.json"))["model"]
size = model["vocab_size"]
convert_checkpoint_to_hf(
    source, out, model, {"vocab_size": size, "eos_token_id": size - 2, "pad_token_id": size - 1},
    dtype=DType.bfloat16, tokenizer_id=tokenizer, max_sequence_length=4096, validate=False,
)
"""  # its function, as its script calls it; a tokenizer is compulsory


def block_shapes(hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    square = dict.fromkeys(("attention.w_q", "attention.w_k", "attention.w_v", "attention.w_out"), (hidden, hidden))
    wide = {"feed_forward.w1": (intermediate, hidden), "feed_forward.w3": (intermediate, hidden)}
    norms = ("attention.q_norm", "attention.k_norm", "attention_norm", "feed_forward_norm")
    return square | wide | {"feed_forward.w2": (hidden, intermediate)} | dict.fromkeys(norms, (hidden,))


def legacy_shapes(hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    fused = {"att_proj": (3 * hidden, hidden), "attn_out": (hidden, hidden), "ff_proj": (2 * intermediate, hidden)}
    norms = dict.fromkeys(("q_norm", "k_norm", "attn_norm", "ff_norm"), (hidden,))
    return fused | {"ff_out": (hidden, intermediate)} | norms


def shapes_of(kind: str, sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    vocabulary, hidden = sizes["vocabulary"], sizes["hidden"]
    if kind == "OLMo-core":
        ends = {"embeddings": (vocabulary, hidden), "lm_head.w_out": (vocabulary, hidden), "lm_head.norm": (hidden,)}
        prefix, block = "blocks", block_shapes(hidden, sizes["intermediate"])
    else:
        ends = {"wte": (vocabulary, hidden), "ff_out": (vocabulary, hidden), "ln_f": (hidden,)}
        ends = {f"transformer.{name}": shape for name, shape in ends.items()}
        prefix, block = "transformer.blocks", legacy_shapes(hidden, sizes["intermediate"])
    blocks = {f"{prefix}.{layer}.{name}": shape for layer in range(sizes["layers"]) for name, shape in block.items()}
    return {f"{name}.weight": shape for name, shape in (ends | blocks).items()}


def sizes_of(gib: float) -> dict[str, int]:
    """Layers of OLMo-2 1B's width that make so many GiB in float32."""
    numbers = gib * GIB / 4 - 2 * VOCABULARY * HIDDEN
    layers = round(numbers / (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE))
    if layers < 1:
        raise SystemExit(f"--gib must be at least 2, of which embeddings are 1.5 (got {gib}).")
    width = {"vocabulary": VOCABULARY, "hidden": HIDDEN, "intermediate": INTERMEDIATE, "heads": HEADS}
    return width | {"layers": layers, "length": 4096, "window": 0}


def native_config(sizes: dict[str, int]) -> dict[str, Any]:
    norm = {"name": "rms", "eps": 1e-6, "bias": False}
    attention: dict[str, Any] = {
        "type": "attention",
        "name": "default",
        "n_heads": sizes["heads"],
        "bias": False,
        "qk_norm": norm,
        "rope": {"theta": 500000},
    }
    if sizes["window"]:
        attention["sliding_window"] = {"pattern": [sizes["window"]], "force_full_attention_on_first_layer": False}
    model = {
        "d_model": sizes["hidden"],
        "n_layers": sizes["layers"],
        "vocab_size": sizes["vocabulary"],
        "block": {
            "name": "reordered_norm",
            "sequence_mixer": attention,
            "feed_forward": {"hidden_size": sizes["intermediate"], "bias": False},
            "layer_norm": norm,
        },
        "lm_head": {"layer_norm": norm, "bias": False},
    }
    return {"model": model, "train_module": {"max_sequence_length": sizes["length"]}}


def legacy_config(sizes: dict[str, int]) -> dict[str, Any]:
    return {
        "model": {
            "d_model": sizes["hidden"],
            "n_heads": sizes["heads"],
            "n_layers": sizes["layers"],
            "mlp_hidden_size": 2 * sizes["intermediate"],
            "norm_after": True,
            "attention_layer_norm": True,
            "layer_norm_type": "rms",
            "include_bias": False,
            "rope": True,
            "weight_tying": False,
            "vocab_size": sizes["vocabulary"],
            "embedding_size": sizes["vocabulary"],
            "max_sequence_length": sizes["length"],
            "eos_token_id": 0,
            "pad_token_id": 1,
        }
    }


def make(kind: str, folder: Path, sizes: dict[str, int]) -> None:
    import torch
    import yaml

    noise = 0.02 * torch.randn(2**24 + 997, generator=torch.Generator().manual_seed(0))

    def fill(tensor: torch.Tensor, number: int) -> torch.Tensor:
        flat, start = tensor.view(-1), number * 7919 % 997
        for first in range(0, len(flat), 2**24):
            part = flat[first : first + 2**24]
            part.copy_(noise[start : start + len(part)])
        return tensor.add_(1) if tensor.ndim == 1 else tensor

    folder.mkdir(parents=True)
    shapes = shapes_of(kind, sizes)
    if kind == "OLMo-core":
        (folder / "config.json").write_text(json.dumps(native_config(sizes)))
        write_distributed(folder / "model_and_optim", shapes, fill)
    else:
        (folder / "config.yaml").write_text(yaml.safe_dump(legacy_config(sizes)))
        torch.save(
            {name: fill(torch.empty(shape), i) for i, (name, shape) in enumerate(shapes.items())}, folder / "model.pt"
        )


def write_distributed(folder: Path, shapes: dict[str, tuple[int, ...]], fill: Any) -> None:
    """As FSDP writes it: each rank's rows of every tensor in the rank's file."""
    import pickle

    import torch
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    folder.mkdir()
    entries, storage = {}, {}
    files = [(folder / f"__{rank}_0.distcp").open("wb") for rank in range(RANKS)]
    for number, (name, shape) in enumerate(shapes.items()):
        name, tensor, chunks, first = f"model.{name}", fill(torch.empty(shape), number), [], 0
        for rank, part in enumerate(tensor.chunk(RANKS)):
            offsets = torch.Size([first] + [0] * (len(shape) - 1))
            chunks.append(dcp.ChunkStorageMetadata(offsets, part.size()))
            start = files[rank].tell()
            torch.save(part.clone(), files[rank])
            info = _StorageInfo(f"__{rank}_0.distcp", start, files[rank].tell() - start)
            storage[dcp.MetadataIndex(name, offsets, rank)] = info
            first += len(part)
        entries[name] = dcp.TensorStorageMetadata(dcp.TensorProperties(tensor.dtype), tensor.size(), chunks)
    for file in files:
        file.close()
    metadata = dcp.Metadata(entries, {name: (name,) for name in entries}, storage)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def made_apart(kind: str, folder: Path, sizes: dict[str, int]) -> None:
    """In a process of its own: a child's peak memory is never below that of the process it came from."""
    process = multiprocessing.get_context("spawn").Process(target=make, args=(kind, folder, sizes))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the {kind} checkpoint could not be made (exit code {process.exitcode}).")


def forget(folder: Path) -> None:
    """Takes the files out of the disk cache, for every reader to begin alike."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def remember(folder: Path) -> None:
    """Reads the files, so that they are in the disk cache as far as there is room."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(2**24):
                    pass


def timed(command: list[str], source: Path, out: Path, cache: str, checkout: Path | None = None) -> dict[str, Any]:
    """Seconds until what the command wrote is on the disk, those that it computed, and its peak memory in bytes."""
    (remember if cache == "warm" else forget)(source)
    environment = dict(os.environ)
    if checkout is not None:
        environment["PYTHONPATH"] = f"{checkout}/modeling{os.pathsep}{checkout}/convert"
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    errors = process.stderr.read().decode() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    subprocess.run(["sync", "-f", str(out)], check=False, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    failure = f"exit code {os.waitstatus_to_exitcode(status)}: {errors.strip().splitlines()[-1:]}" if status else None
    shutil.rmtree(out, ignore_errors=True)
    scale = 1 if sys.platform == "darwin" else 1024
    computed = usage.ru_utime + usage.ru_stime
    return {
        "cache": cache,
        "seconds": seconds,
        "cpu_seconds": computed,
        "peak_bytes": usage.ru_maxrss * scale,
        "failure": failure,
    }


def make_tokenizer(folder: Path) -> Path:
    """Of as many tokens as the models have, which all mean nothing."""
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True)  # not beside the checkpoint, where olmem looks for it
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY - 2)}, unk_token="w0"))
    tokenizer.add_special_tokens(["<end>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    rows = []
    for kind in arguments.kind or KINDS:
        source, out = scratch / "source", scratch / "out"
        made_apart(kind, source, sizes_of(arguments.gib))
        copy = ["cp", "-r", str(source), str(out)]
        converting = [*CONVERT, str(source), str(out), "--dtype", "bfloat16", "--no-verify"]
        commands = [("cp", copy), ("olmem", converting)]
        if arguments.before:
            commands.append(("olmem before", converting))
        if arguments.peer and kind == "OLMo-core":
            tokenizer = make_tokenizer(scratch / "peer" / "tokenizer")
            commands.append(("ai2-olmo-core", [arguments.peer, "-c", PEER, str(source), str(out), str(tokenizer)]))
        commands.append(("cp", copy))
        for cache in ("cold", "warm"):
            for name, command in tqdm(commands, desc=f"{kind}, {cache}", disable=None):
                checkout = arguments.before if name == "olmem before" else None
                found = timed(command, source, out, cache, checkout)
                rows.append({"checkpoint": kind, "command": name, "bytes": size_of(source)} | found)
        shutil.rmtree(source)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print("checkpoint   GiB   cache  command            seconds   ÷ cp   GiB/s   CPU s   peak GiB")
    for row in rows:
        like = (row["checkpoint"], row["cache"], "cp")
        copies = [r["seconds"] for r in rows if (r["checkpoint"], r["cache"], r["command"]) == like]
        row["ratio"] = row["seconds"] / statistics.mean(copies)
        rate = row["bytes"] / GIB / row["seconds"]
        print(
            f"{row['checkpoint']:<11}{row['bytes'] / GIB:>5.2f}   {row['cache']:<7}{row['command']:<16}"
            f"{row['seconds']:>9.1f}{row['ratio']:>8.2f}{rate:>8.2f}{row['cpu_seconds']:>8.1f}"
            f"{row['peak_bytes'] / GIB:>11.3f}   {row['failure'] or ''}"
        )
    for row in rows:
        if (row["command"], row["cache"]) == ("olmem", "cold"):
            total = 4 * OLMO2_32B
            minutes = row["seconds"] / row["bytes"] * total / 60
            size = f"{total / GIB:.0f} GiB"
            print(f"OLMo-2 32B in {row['checkpoint']}'s format, {size} in float32, at this rate: {minutes:.0f} min")


# Kills


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def run(command: list[str], delay: float | None = None) -> dict[str, Any] | None:
    """Runs the command, and kills it so many seconds after it has found the checkpoint. Its report, with the seconds
    since then; None when it was killed."""
    process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    while (line := process.stdout.readline()) and not line.startswith("found"):
        pass
    start = time.perf_counter()
    if delay is not None:
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    if process.returncode == -signal.SIGKILL:
        return None
    if process.returncode:
        raise SystemExit(f"the conversion failed: {line}{rest}")
    return json.loads(rest.splitlines()[-1]) | {"since_found": time.perf_counter() - start}


def kill(kills: int, scratch: Path, seed: int) -> dict[str, Any]:
    """Two of three moments are drawn while weights are written, the others from all that follows."""
    width = {"vocabulary": 16384, "hidden": 1024, "intermediate": 4096, "heads": 16}
    sizes = width | {"layers": 6, "length": 256, "window": 64}
    made_apart("OLMo-core", scratch / "source", sizes)
    out, whole = scratch / "out", scratch / "whole" / "out"  # by whose name the card is titled
    options = ["--max-shard-size", "16MB", "--dtype", "bfloat16"]
    report = run([*CONVERT, str(scratch / "source"), str(whole), *options])
    assert report is not None
    writing, after = report["seconds"], report["since_found"] - report["seconds"]
    wanted, files = digests(whole), len(list(whole.glob("*.safetensors")))
    command = [*CONVERT, str(scratch / "source"), str(out), *options, "--resume"]
    generator, found, conversions = random.Random(seed), [], 0
    with tqdm(total=kills, desc="kills", disable=None) as bar:
        while len(found) < kills or not out.exists():
            written = found and found[-1] == files  # then it comes to its end every other time
            enough = len(found) == kills or (written and generator.random() < 0.5)
            early = generator.random() < 2 / 3 and not written
            delay = generator.uniform(0, writing) if early else generator.uniform(0, writing + after)
            if run(command, None if enough else delay) is None:
                journal = scratch / ".out.partial.jsonl"
                found.append(len(journal.read_text().splitlines()) - 1 if journal.exists() else -1)
                bar.update()
            if out.exists():
                if digests(out) != wanted:
                    raise SystemExit(f"a resumed conversion differs from an uninterrupted one, in {out}")
                conversions += 1
                if len(found) < kills:
                    shutil.rmtree(out)
    left = sorted(path.name for path in scratch.iterdir() if path.name.startswith("."))
    return {"finished_files": found, "files": files, "conversions": conversions, "left_behind": left}


def killed_at(rename: int, source: Path, out: Path) -> None:
    """Replaces `out` in a process that kills itself as it begins its rename of this number, from 0, or behind both."""
    from olmem_convert import ConvertOptions, convert
    from olmem_convert.writing import transaction

    if (child := os.fork()) == 0:
        begun, renamed = [], Path.rename

        def killing(path: Path, target: Any) -> Path:
            if len(begun) == rename:
                os.kill(os.getpid(), signal.SIGKILL)
            begun.append(path)
            return renamed(path, target)

        Path.rename = killing  # type: ignore[method-assign]
        transaction.discard = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        try:
            convert(source, out, ConvertOptions(overwrite=True, verify=False))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), status


def kill_at_renames(kills: int, scratch: Path, seed: int) -> dict[str, Any]:
    from olmem_convert import ConvertOptions, convert

    generator, golden = random.Random(seed), Path(__file__).parents[1] / "tests" / "golden"
    place = scratch / "place"
    old_source, source = (next((golden / name).glob("step*"), golden / name) for name in ("olmo1", "olmo"))
    for name, native in (("old", old_source), ("new", source)):
        convert(native, scratch / name / "out", ConvertOptions(verify=False))
    old, new = (digests(scratch / name / "out") for name in ("old", "new"))
    rows = []
    for number in tqdm(range(kills), desc="kills", disable=None):
        shutil.rmtree(place, ignore_errors=True)
        out = place / "out"
        shutil.copytree(scratch / "old" / "out", out)
        rename = number % 3
        killed_at(rename, source, out)
        fail(generator, out, source)
        hidden = [path for path in sorted(place.glob(".out.*")) if path.is_dir()]
        removed = generator.choice(hidden) if hidden else None
        if removed:
            shutil.rmtree(removed)
        fail(generator, out, source)
        held = [digests(path) for path in place.iterdir() if path.is_dir()]
        convert(source, out, ConvertOptions(overwrite=True, verify=False))
        left = sorted(path.name for path in place.iterdir())
        whole = (old in held or new in held) and digests(out) == new and left == ["out"]
        rows.append({"rename": rename, "removed": removed.name if removed else None, "whole": whole})
    return {"kills": rows, "whole": sum(row["whole"] for row in rows)}


def fail(generator: random.Random, out: Path, source: Path) -> None:
    """A command to OUT that is refused: of no checkpoint, of one that is of another kind, or of a folder beside OUT."""
    from olmem_convert import CheckpointError, ConvertOptions, convert

    nothing, partial = out.parent / "nothing", out.with_name(f".{out.name}.partial")
    commands = (
        (nothing, ConvertOptions()),
        (nothing, ConvertOptions(overwrite=True)),
        (nothing, ConvertOptions(resume=True)),
        (source, ConvertOptions(to="olmo2", overwrite=True)),
        (partial, ConvertOptions(to="olmo2", overwrite=True)),
    )
    try:
        convert(commands[choice := generator.randrange(len(commands))][0], out, commands[choice][1])
    except CheckpointError:
        return
    raise SystemExit("a command that had to fail did not")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8, help="of each checkpoint in float32 (%(default)s)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="of checkpoint; both by default")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one by default")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="of another version, to be timed too")
    parser.add_argument("--peer", metavar="PYTHON", help="of an environment with ai2-olmo-core 3")
    parser.add_argument("--kills", type=int, metavar="N", help="kill conversions so many times instead")
    parser.add_argument("--renames", type=int, metavar="N", help="kill conversions at their last renames instead")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        if arguments.renames:
            found: Any = kill_at_renames(arguments.renames, Path(name), arguments.seed)
        elif arguments.kills:
            found = kill(arguments.kills, Path(name), arguments.seed)
        else:
            found = measure(arguments, Path(name))
    if arguments.json:
        print(json.dumps(found, indent=2))
    elif arguments.renames:
        print(f"after {found['whole']} of {len(found['kills'])} kills the old folder or the new one was whole")
        sys.exit(found["whole"] != len(found["kills"]))
    elif arguments.kills:
        counts = found["finished_files"]
        print(f"{len(counts)} kills, by weight files that were finished, of {found['files']} (-1: nothing was begun):")
        print("  ".join(f"{number}: {counts.count(number)}" for number in sorted(set(counts))))
        print(f"{found['conversions']} conversions came to their end, each with the bytes of an uninterrupted one;")
        print(f"OUT was at any kill absent or whole; left beside it: {', '.join(found['left_behind']) or 'nothing'}")
    else:
        show(found)
        sys.exit(any(row["failure"] for row in found))


if __name__ == "__main__":
    main()
