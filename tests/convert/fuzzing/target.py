"""What is tried on a mutated checkpoint: everything that reads it, and now and then the whole conversion."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from random import Random

import torch
from convert.fuzzing.hub import LyingHub, attempt_push, pushing_to
from convert.fuzzing.mutations import SECRET, Tree, write
from convert.fuzzing.pickles import CANARY
from convert.fuzzing.seeds import READERS, TEXT, seeds
from convert.fuzzing.states import use_state
from olmem_convert import CardOptions, CheckpointError, ConvertOptions, card, convert, evaluate, verify
from olmem_convert.formats.detect import open_checkpoint
from olmem_convert.formats.planning import check_copies, choose_dtype, make_config, make_tensors
from olmem_convert.options import Given
from olmem_convert.publish.release import check_release
from olmem_convert.writing.tokenizer import carry_tokenizer, find_tokenizer, write_tokenizer

GIVEN = {"bakallm": Given(n_ctx=5)}


class Escape(Exception):
    """Something that no checkpoint may do."""


def read(reader: str, source: Path, out: Path, rng: Random) -> None:
    """All that reads a checkpoint, without writing; or, of a tokenizer and of the way back, the copy too."""
    if reader == "tokenizer":
        out.mkdir()
        if rng.random() < 0.5:
            carry_tokenizer(source, out, 16, lambda line: None)
        elif path := find_tokenizer(source):
            ids = {"eos_token_id": 13, "pad_token_id": 12, "bos_token_id": None}
            write_tokenizer(path, out, vocab_size=16, max_length=rng.choice((None, 32)), **ids)
        return
    if reader == "olmem":
        convert(source, out, ConvertOptions(to=rng.choice(("olmo", "olmo2", "olmo3", "olmo2")), verify=False))
        return
    given = GIVEN.get(reader) if rng.random() < 0.2 else None
    checkpoint = open_checkpoint(source, rng.choice((None, None, 16)), given)
    config = make_config(checkpoint, torch.float32)
    tensors = make_tensors(checkpoint, config)
    check_copies(checkpoint)
    choose_dtype(checkpoint.tensors, None)
    for tensor in tensors.values():
        tensor.load()


def use(out: Path, elsewhere: Path, rng: Random) -> None:
    """What commands do with a converted folder: `push` up to its first request."""
    command = rng.choice(("card", "verify", "evaluate", "push"))
    if command == "card":
        card(out, CardOptions(license=rng.choice((None, "mit"))))
    elif command == "verify":
        verify(out, elsewhere / "native")
    elif command == "evaluate":
        evaluate(out, [elsewhere / "text.txt"])
    else:
        check_release(out)


def convert_whole(reader: str, source: Path, out: Path, rng: Random) -> None:
    if reader == "olmem":
        convert(source, out, ConvertOptions(to=rng.choice(("olmo", "olmo2", "olmo3", "olmo2"))))
    else:
        convert(source, out, ConvertOptions(dtype=rng.choice((None, "bfloat16"))))


class Place:
    """A folder to try checkpoints in, each from the same state: nothing but `elsewhere`, to which links may lead."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.source, self.out, self.cwd = folder / "source", folder / "out", folder / "cwd"
        self.kept = ("cwd", "elsewhere", "tmp", "hub")
        for name in self.kept[:3]:
            (folder / name).mkdir(parents=True)
        (folder / "elsewhere" / "secret.json").write_bytes(SECRET)
        self.elsewhere = folder / "elsewhere"
        (self.elsewhere / "text.txt").write_text(TEXT)

    def lay(self, reader: str, files: Tree) -> None:
        """Puts a checkpoint in place, and genuine files of its reader where links lead."""
        for name, data in seeds(reader)[0].items():
            path = self.elsewhere / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(SECRET if name.endswith("_config.json") else data)
        if reader == "hub":
            self.hub.requests.clear()  # once it has begun to listen, and has a folder of its own
        else:
            write(self.source, files)

    def attempt(self, reader: str, rng: Random, whole: bool) -> str:
        """It is "accepted" or "refused: why". Any other exception is raised, and `Escape` for what should not be."""
        if reader == "out":
            return self.attempt_out(rng)
        if reader == "hub":
            with pushing_to(self.hub):
                return attempt_push(self.hub, rng)
        if reader == "state":
            return self.attempt_state(rng)
        before = names(self.source)
        try:
            (convert_whole if whole and reader != "tokenizer" else read)(reader, self.source, self.out, rng)
        except CheckpointError as error:
            self.check(before, refused=reader != "tokenizer")
            return f"refused: {str(error).splitlines()[0]}"
        self.check(before, refused=False)
        return "accepted"

    def attempt_state(self, rng: Random) -> str:
        """The same of a state file, for which `load` raises ValueError and nothing else."""
        before = names(self.source)
        try:
            use_state(self.source, rng)
            outcome = "accepted"
        except (ValueError, FileNotFoundError, IsADirectoryError) as error:
            outcome = f"refused: {str(error).splitlines()[0]}"
        self.check(before, refused=True)
        return outcome

    @cached_property
    def hub(self) -> LyingHub:
        return LyingHub(self.folder / "hub").start()

    def attempt_out(self, rng: Random) -> str:
        """The same of a converted folder, in which a command writes what it makes."""
        if not (self.elsewhere / "native").exists():
            READERS["transformers"][1](self.elsewhere / "native")
        self.source.rename(self.out)
        try:
            use(self.out, self.elsewhere, rng)
        except CheckpointError as error:
            return f"refused: {str(error).splitlines()[0]}"
        finally:
            found = [name for name in os.listdir(self.folder) if name not in (*self.kept, "out")]
            found += [str(path) for name in ("cwd", "tmp") for path in (self.folder / name).iterdir()]
            if found:
                raise Escape(f"{found} came to be")
        return "accepted"

    def check(self, before: list[str], refused: bool) -> None:
        """That only OUT came to be, whole, with nothing from elsewhere in it; and nothing where a refusal said so."""
        allowed = {*self.kept, "source", *(() if refused else ("out",))}
        found = [name for name in os.listdir(self.folder) if name not in allowed]
        found += [str(path) for name in ("cwd", "tmp") for path in (self.folder / name).iterdir()]
        found += sorted(set(names(self.source)) ^ set(before))
        if found:
            raise Escape(f"{found} came to be or went" + (", the canary" if CANARY in str(found) else ""))
        if not refused and self.out.is_dir():
            for path in self.out.iterdir():
                if path.suffix not in (".safetensors", ".py") and b"must not be carried along" in path.read_bytes():
                    raise Escape(f"{path.name} holds what a link led to")
                if path.name == "config.json":
                    json.loads(path.read_bytes(), parse_constant=refuse_constant)

    def clear(self) -> None:
        for name in os.listdir(self.folder):
            if name not in self.kept:
                remove(self.folder / name)
        for name in ("cwd", "tmp"):
            for path in (self.folder / name).iterdir():
                remove(path)


def refuse_constant(text: str) -> None:
    raise Escape(f"config.json holds {text}")


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def names(folder: Path) -> list[str]:
    return [os.path.join(parent, name) for parent, _, files in os.walk(folder) for name in files]


@contextmanager
def standing_in(folder: Path) -> Iterator[None]:
    """The working directory and the one for temporary files, which hostile code would write to."""
    import tempfile

    before, temporary = os.getcwd(), tempfile.tempdir
    os.chdir(folder / "cwd")
    tempfile.tempdir = str(folder / "tmp")
    try:
        yield
    finally:
        os.chdir(before)
        tempfile.tempdir = temporary
