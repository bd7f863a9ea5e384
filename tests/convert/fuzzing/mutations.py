"""Ways in which a downloaded checkpoint may be wrong or hostile, drawn from any source of random numbers.

`mutate(rng, files)` changes a checkpoint in memory and says how; `write(folder, files)` puts it on the disk. `rng` may
be a `random.Random`, one of hypothesis, or one that a fuzzer steers.
"""

import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from convert.fuzzing.archives import mutate_archive, mutate_state
from convert.fuzzing.headers import mutate_encoded_name, mutate_safetensors
from convert.fuzzing.metadata import mutate_distributed
from convert.fuzzing.pickles import mutate_pickle
from convert.fuzzing.rules import mutate_tokenizer
from convert.fuzzing.seeds import READERS, Files, seeds
from convert.fuzzing.states import mutate_state_file
from convert.fuzzing.texts import mutate_json, mutate_text, mutate_yaml


@dataclass(frozen=True)
class Odd:
    """What stands in place of a file: a link, a folder, a pipe, a device, or nothing but length."""

    kind: str
    target: str = ""


Tree = dict[str, bytes | Odd]
ELSEWHERE = "../elsewhere"  # a folder beside the checkpoint, which holds the same files
SECRET = b'{"model_max_length": 77, "secret": "a token that must not be carried along"}'
TARGETS = (
    *(f"{ELSEWHERE}/{{name}}", f"{ELSEWHERE}/secret.json", ELSEWHERE, "/etc/passwd", "/dev/zero", "/dev/stdin"),
    *("{name}", "nowhere", "/proc/self/mem", "/proc/self/environ", ".", "..", "/"),
)


def in_place(change: Callable[[Random, bytes], bytes]) -> Callable[[Random, Tree, str], None]:
    def apply(rng: Random, files: Tree, name: str) -> None:
        files[name] = change(rng, held(files, name))

    return apply


def held(files: Tree, name: str) -> bytes:
    data = files[name]
    return data if isinstance(data, bytes) else b""


def flip(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 16)) if data else 0):
        changed[rng.randrange(len(data))] = rng.choice((0, 255, 128, rng.randrange(256)))
    return bytes(changed)


def cut(rng: Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return rng.choice((data[:start], data[start:], data[:start] + data[start + 1 :], b""))


def insert(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    piece = rng.choice((b"\0", b"\xff", b"x" * 5000, bytes(8), rng.randbytes(16), data[:100], data))
    return data[:at] + piece + data[at:]


def splice(rng: Random, files: Tree, name: str) -> None:
    """The start of one file and the end of another, of this checkpoint or of one of another reader."""
    others: Files = rng.choice(seeds(rng.choice(sorted(READERS))))
    other = rng.choice((held(files, rng.choice(sorted(files))), others[rng.choice(sorted(others))]))
    data = held(files, name)
    at, start = rng.randrange(len(data) + 1), rng.randrange(len(other) + 1)
    files[name] = rng.choice((data[:at] + other[start:], other))


def swap(rng: Random, files: Tree, name: str) -> None:
    other = rng.choice(sorted(files))
    files[name], files[other] = files[other], files[name]


def drop(rng: Random, files: Tree, name: str) -> None:
    del files[name]


def rename(rng: Random, files: Tree, name: str) -> None:
    others = (
        f"{name}x",
        f"x{name.replace('/', '')}",
        name.upper(),
        f"deep/{name}",
        "model.safetensors",
        "pytorch_model.bin",
    )
    files[rng.choice((*others, "model.pt", "rank0.pt", "x.bin", "step1", "model-00009-of-00009.safetensors"))] = files[
        name
    ]
    if rng.random() < 0.5:
        del files[name]


def odd(rng: Random, files: Tree, name: str) -> None:
    """In place of a file, or of the folder it is in."""
    kind = rng.choice(("link", "link", "link", "folder", "pipe", "device", "long", "socket"))
    place = name.rpartition("/")[0] if "/" in name and rng.random() < 0.3 else name
    target = rng.choice(TARGETS).format(name=place)
    if target.startswith(ELSEWHERE):
        target = "../" * place.count("/") + target
    if kind == "long":
        target = str(rng.choice((2**24 + 1, 2**30, 2**40)))
    for other in [other for other in files if other.startswith(f"{place}/")]:
        del files[other]
    files[place] = Odd(kind, target)


def join(rng: Random, files: Tree, name: str) -> None:
    """Files of another reader beside this one's."""
    others: Files = rng.choice(seeds(rng.choice(sorted(READERS))))
    for other, data in others.items():
        if rng.random() < 0.7:
            files.setdefault(other, data)


def distributed(rng: Random, files: Tree, name: str) -> None:
    plain = {path: data for path, data in files.items() if isinstance(data, bytes)}
    mutate_distributed(rng, plain, name)
    files |= plain


ANY = [in_place(flip), in_place(cut), in_place(insert), splice, swap, drop, rename, odd, odd, join]
# By a file's name: what knows its structure.
KNOWING: tuple[tuple[str, tuple[Callable[[Random, Tree, str], None], ...]], ...] = (
    (r".*\.(pt|bin)", (in_place(mutate_archive), in_place(mutate_archive), in_place(mutate_state))),
    (r"(.*/)?(\.metadata|__\d+_\d+\.distcp)", (distributed,)),
    (r"model\.safetensors", (in_place(mutate_safetensors), in_place(mutate_encoded_name))),
    (r".*\.safetensors", (in_place(mutate_safetensors),)),
    (r"(.*/)?tokenizer\.json", (in_place(mutate_tokenizer), in_place(mutate_json))),
    (r".*\.json", (in_place(mutate_json),)),
    (r".*\.yaml", (in_place(mutate_yaml),)),
    (r".*\.(jinja|txt)", (in_place(mutate_text),)),
    (r".*\.pkl", (in_place(mutate_pickle),)),
)


def mutate(rng: Random, files: Tree) -> list[str]:
    """Changes `files` in one to three ways; returns what was done, file by file."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        names = sorted(name for name, data in files.items() if isinstance(data, bytes))
        if not names:
            break
        name = rng.choice(names)
        knowing = next((ways for pattern, ways in KNOWING if re.fullmatch(pattern, name)), ())
        way = rng.choice(knowing if knowing and rng.random() < 0.75 else ANY)
        try:
            way(rng, files, name)
        except Exception:  # of a file that an earlier change has spoilt, so that nothing knows it any more
            files[name] = flip(rng, held(files, name))
        done.append(name)
    return done


def make(rng: Random, reader: str) -> Tree:
    """A mutated checkpoint of this reader."""
    files: Tree = dict(rng.choice(seeds(reader)))
    if reader == "tokenizer" and rng.random() < 0.3:
        files["chat_template.jinja"] = b"{% for message in messages %}{{ message.content }}{% endfor %}"
    if reader == "state" and rng.random() < 0.6:
        [name] = files
        with tempfile.TemporaryDirectory() as scratch, suppress(LookupError, ValueError, RecursionError):
            files[name] = mutate_state_file(rng, held(files, name), Path(scratch))
    elif reader != "hub":  # where the server lies, and not the folder
        mutate(rng, files)
    return files


def write(folder: Path, files: Tree) -> None:
    """Puts the checkpoint on the disk, as far as its names can be."""
    folder.mkdir(parents=True)
    for name, data in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(data, bytes):
                path.write_bytes(data)
            else:
                write_odd(path, data)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            continue  # a file is where the folder would be


def write_odd(path: Path, odd: Odd) -> None:
    if odd.kind == "link":
        path.symlink_to(odd.target)
    elif odd.kind == "folder":
        path.mkdir()
    elif odd.kind == "device":
        path.symlink_to("/dev/zero")
    elif odd.kind == "long":
        with path.open("wb") as file:
            file.truncate(int(odd.target))
    else:
        os.mkfifo(path)
