"""A conversion that is killed leaves nothing, what can be resumed, or the whole; resumed, it is the same to a byte."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from convert.checkpoints import DEMO, copy_source, load_weights, snapshot, source
from convert.processes import command
from convert.writers import olmo_core_state, olmo_state, write_olmo, write_olmo_core
from olmem_convert import CardOptions, CheckpointError, ConvertOptions, card, convert
from olmem_convert.cli import app
from olmem_convert.reading.tensors import Span
from olmem_convert.writing.transaction import note
from typer.testing import CliRunner

SMALL = {"max_shard_size": "100KB", "verify": False}


class Killed(BaseException):
    """As nothing of the conversion catches it, and what cleans up after others is switched off."""


@pytest.fixture
def kill(monkeypatch):
    """Makes the conversion end after so many reads of values, as a kill would: nothing is cleaned up."""

    def after(reads: int) -> None:
        values, made = Span.values, []

        def counted(span, *arguments):
            made.append(1)
            if len(made) > reads:
                raise Killed
            return values(span, *arguments)

        monkeypatch.setattr(Span, "values", counted)
        monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
        monkeypatch.setattr(Path, "rmdir", lambda *_, **__: None)

    yield after
    monkeypatch.undo()


def killed(kill, monkeypatch, out: Path, reads: int, **options) -> None:
    kill(reads)
    with pytest.raises(Killed):
        convert(DEMO / "step1872", out, ConvertOptions(**SMALL, **options))
    monkeypatch.undo()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, str]:
    """The files of a conversion that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(DEMO / "step1872", out, ConvertOptions(**SMALL))
    return snapshot(out)


@pytest.mark.parametrize("reads", [0, 1, 5, 20])
def test_what_was_finished_is_not_read_again(reads, whole, kill, monkeypatch, tmp_path):
    out, lines = tmp_path / "place" / "out", []
    killed(kill, monkeypatch, out, reads)
    left = sorted(path.name for path in out.parent.iterdir())
    assert left == [".out.lock", ".out.partial", ".out.partial.jsonl"]
    finished = [json.loads(line) for line in (out.parent / left[2]).read_text().splitlines()[1:]]
    report = convert(DEMO / "step1872", out, ConvertOptions(resume=True, **SMALL), say=lines.append)
    assert snapshot(out) == whole
    assert os.listdir(out.parent) == ["out"]
    assert any(line == f"resumed: {len(finished)} weight files were finished" for line in lines)
    assert (report["bytes_found"] > 0) == (len(finished) > 0) and (reads < 20 or finished)


def test_without_resume_a_killed_conversion_is_said_to_be_there(kill, monkeypatch, tmp_path):
    out = tmp_path / "out"
    killed(kill, monkeypatch, out, 20)
    (tmp_path / ".out.lock").unlink()
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=r"half-written .*--resume .*--overwrite"):
        convert(DEMO / "step1872", out, ConvertOptions(**SMALL))
    assert snapshot(tmp_path) == before
    convert(DEMO / "step1872", out, ConvertOptions(overwrite=True, **SMALL))
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("spoil", ["flip", "cut", "remove", "journal"])
def test_finished_files_are_checked(spoil, whole, kill, monkeypatch, tmp_path):
    out = tmp_path / "out"
    killed(kill, monkeypatch, out, 20)
    journal = tmp_path / ".out.partial.jsonl"
    entries = journal.read_text().splitlines()
    path = tmp_path / ".out.partial" / json.loads(entries[1])["file"]
    data = bytearray(path.read_bytes())
    if spoil == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif spoil == "cut":
        path.write_bytes(data[:-1])
    elif spoil == "remove":
        path.unlink()
    else:
        journal.write_text("\n".join(entries)[:-5])
    lines = []
    convert(DEMO / "step1872", out, ConvertOptions(resume=True, **SMALL), say=lines.append)
    assert f"resumed: {len(entries) - 2} weight files were finished" in lines
    assert snapshot(out) == whole


def touched(folder: Path) -> dict:
    path = folder / "model_and_optim" / "__0_0.distcp"
    os.utime(path, ns=(1, 1))
    return {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: {"dtype": "bfloat16"}, "other options"),
        (lambda _: {"max_shard_size": "2MB"}, "other options"),
        (lambda _: {"memory": {"num_memory_tokens": 2}}, "other options"),
        (touched, "SRC have changed"),
    ],
)
def test_another_conversion_is_not_gone_on_with(change, words, kill, monkeypatch, tmp_path):
    folder, out = copy_source("demo", tmp_path / "source"), tmp_path / "out"
    kill(20)
    with pytest.raises(Killed):
        convert(folder, out, ConvertOptions(**SMALL))
    monkeypatch.undo()
    (tmp_path / ".out.lock").unlink()
    before = snapshot(tmp_path)
    options = SMALL | change(folder)
    with pytest.raises(CheckpointError, match=rf"--resume.*{words}.*--overwrite"):
        convert(folder, out, ConvertOptions(resume=True, **options))
    assert snapshot(tmp_path) == before
    convert(folder, out, ConvertOptions(overwrite=True, **options))
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_two_conversions_to_one_folder(monkeypatch, tmp_path):
    """The second is refused while the first one runs, and takes nothing from it."""
    folder, out = write_olmo_core(tmp_path / "source"), tmp_path / "out"
    refusals = []

    def meanwhile(line):
        if line.startswith("no tokenizer"):
            for options in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(CheckpointError, match="another one is writing") as refusal:
                    convert(folder, out, ConvertOptions(**options))
                refusals.append(refusal)

    convert(folder, out, say=meanwhile)
    assert len(refusals) == 3 and sorted(os.listdir(tmp_path)) == ["out", "source"]


@pytest.mark.parametrize("name", [".out.partial", ".out.replaced"])
def test_folders_of_those_names_that_no_conversion_wrote(name, tmp_path):
    convert(source("olmo"), tmp_path / "out", ConvertOptions(verify=False))
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} beside it, .*move it away"):
        convert(source("olmo"), tmp_path / "out", ConvertOptions(overwrite=True))
    assert snapshot(tmp_path) == before and sorted(os.listdir(tmp_path)) == sorted(["out", name])


@pytest.mark.parametrize("end", ["partial", "partial.jsonl", "replaced"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_links_beside_out_lead_nowhere(overwrite, end, tmp_path):
    """As an archive may hold them, for whoever converts beside what it has unpacked."""
    victim = tmp_path / "victim"
    if end == "partial.jsonl":
        victim.write_text("mine")
    else:
        victim.mkdir()
        (tmp_path / ".out.partial.jsonl").write_text('{"olmem": "1"}\n')
        (victim / "mine.txt").write_text("mine")
    (tmp_path / f".out.{end}").symlink_to(victim)
    before = snapshot(victim) if victim.is_dir() else victim.read_bytes()
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"must not have .*\.out\..* beside it, which is no conversion's"):
            convert(source("olmo"), tmp_path / "out", ConvertOptions(verify=False, overwrite=overwrite, resume=resume))
    assert before == (snapshot(victim) if victim.is_dir() else victim.read_bytes())
    assert (tmp_path / f".out.{end}").is_symlink() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "entry",
    [
        *(
            {"file": "model.safetensors"},
            {"file": ["x"]},
            {"file": 5, "sha256": 1},
            {"file": "a\0b"},
            {"file": "config.json"},
        ),
        *(
            {"file": "model.safetensors", "sha256": "HASH"},
            {"file": "model.safetensors", "sha256": "HASH", "nonfinite": 5},
        ),
        {"file": "model.safetensors", "sha256": "HASH", "nonfinite": {"w": "1"}},
        "[" * 100_000,
    ],
    ids=lambda entry: str(entry)[:60],
)
def test_journals_that_no_conversion_wrote(entry, kill, monkeypatch, tmp_path):
    out, journal = tmp_path / "out", tmp_path / ".out.partial.jsonl"
    kill(0)
    with pytest.raises(Killed):
        convert(source("olmo"), out, ConvertOptions(verify=False, resume=True))
    monkeypatch.undo()
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"abc")
    text = entry if isinstance(entry, str) else json.dumps(entry).replace("HASH", hashlib.sha256(b"abc").hexdigest())
    with journal.open("a") as file:
        file.write(f"{text}\n")
    convert(source("olmo"), out, ConvertOptions(resume=True))


def test_what_came_into_a_folder_that_is_replaced_is_kept(tmp_path):
    out, lines = tmp_path / "out", []
    convert(source("olmo1"), out, ConvertOptions(verify=False))

    def meanwhile(line):
        lines.append(line)
        if line.startswith("found"):
            (out / "results.csv").write_text("mine")

    convert(source("olmo"), out, ConvertOptions(overwrite=True, verify=False), say=meanwhile)
    assert (tmp_path / ".out.replaced" / "results.csv").read_text() == "mine"
    assert any("kept because it holds results.csv" in line for line in lines) and not (out / "results.csv").exists()
    with pytest.raises(CheckpointError, match="move it away"):
        convert(source("olmo"), out, ConvertOptions(overwrite=True, verify=False))


def test_a_torn_journal_is_mended(kill, monkeypatch, tmp_path):
    """And not written on behind its last line, which nothing would read again."""
    out, journal = tmp_path / "out", tmp_path / ".out.partial.jsonl"
    killed(kill, monkeypatch, out, 10)
    finished = len(journal.read_text().splitlines()) - 1
    with journal.open("a") as file:
        file.write('{"file": "model-')
    with monkeypatch.context() as patch:
        patch.setattr("olmem_convert.writing.transaction.sync", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(DEMO / "step1872", out, ConvertOptions(resume=True, **SMALL))
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len(entries) - 1 > finished
    lines = []
    convert(DEMO / "step1872", out, ConvertOptions(resume=True, **SMALL), say=lines.append)
    assert f"resumed: {len(entries) - 1} weight files were finished" in lines


def test_nonfinite_numbers_are_not_carried_over_by_resuming(monkeypatch, tmp_path):
    folder = write_olmo_core(tmp_path / "source", with_nonfinite(olmo_core_state()))
    options = {"max_shard_size": 300, "verify": False, "resume": True}
    with monkeypatch.context() as patch:
        patch.setattr("olmem_convert.writing.transaction.sync", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(folder, tmp_path / "out", ConvertOptions(allow_nonfinite=True, **options))
    with pytest.raises(CheckpointError, match="other options"):
        convert(folder, tmp_path / "out", ConvertOptions(**options))
    report = convert(folder, tmp_path / "out", ConvertOptions(allow_nonfinite=True, **options))
    assert report["bytes_found"] == report["bytes"] and report["nonfinite"] == {"lm_head.weight": 3}


def test_a_source_that_vanishes_is_not_the_fault_of_out(tmp_path):
    folder = copy_source("demo", tmp_path / "source")

    def vanish(line):
        for path in (folder / "model_and_optim").glob("*.distcp"):
            path.unlink(missing_ok=True)

    with pytest.raises(CheckpointError, match=r"distcp"):
        convert(folder, tmp_path / "out", ConvertOptions(verify=False), say=vanish)
    assert os.listdir(tmp_path) == ["source"]


def test_what_came_into_it_is_kept_after_a_kill_too(monkeypatch, tmp_path):
    out, lines = tmp_path / "out", []
    convert(source("olmo1"), out, ConvertOptions(verify=False))

    def killed_after_it(*arguments):
        (out / "results.csv").write_text("mine")
        swap_that_cannot_undo(*arguments)
        raise Killed

    monkeypatch.setattr("olmem_convert.writing.transaction.swap", killed_after_it)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(Killed):
        convert(source("olmo"), out, ConvertOptions(overwrite=True, verify=False))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"\.out\.replaced beside it, which is in the way"):
        convert(source("olmo"), out, ConvertOptions(overwrite=True, verify=False), say=lines.append)
    assert (tmp_path / ".out.replaced" / "results.csv").read_text() == "mine"
    assert any("kept because it holds results.csv" in line for line in lines)


def test_a_replaced_folder_that_cannot_be_removed_is_told_of(monkeypatch, tmp_path):
    out, lines = tmp_path / "out", []
    convert(source("olmo1"), out, ConvertOptions(verify=False))
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    convert(source("olmo1"), out, ConvertOptions(overwrite=True, verify=False), say=lines.append)
    assert (tmp_path / ".out.replaced").exists() and any("could not be removed" in line for line in lines)


def test_a_source_may_be_spelled_otherwise(kill, monkeypatch, tmp_path):
    """As `.` and by its whole path: `--resume` said that its files had changed."""
    lines = []
    killed(kill, monkeypatch, tmp_path / "out", 20, resume=True)
    monkeypatch.chdir(DEMO / "step1872")
    convert(".", tmp_path / "out", ConvertOptions(**SMALL, resume=True), say=lines.append)
    assert any(line.startswith("resumed: ") for line in lines)


def test_folders_beside_the_weights_need_not_be_readable(monkeypatch, tmp_path):
    copied, iterdir = copy_source("olmo", tmp_path / "copied"), Path.iterdir
    (copied / "lost+found").mkdir()

    def refused(path):
        if path.name == "lost+found":
            raise PermissionError
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refused)
    convert(copied, tmp_path / "out", ConvertOptions(verify=False))


@pytest.mark.parametrize("crash", ["before the folder", "between the renames", "after the renames"])
def test_overwriting_that_crashes_in_its_last_step(crash, monkeypatch, changeable, tmp_path):
    """The old folder or the new one is there, or comes back when a conversion to it begins."""
    out = changeable("olmo1")
    card(out, CardOptions(license="mit"))
    old = snapshot(out)
    rename, unlink = Path.rename, Path.unlink

    def fail(self, target):
        if self.name.endswith(".partial"):
            if crash == "after the renames":
                rename(self, target)
            raise Killed
        if crash == "before the folder":
            raise Killed
        return rename(self, target)

    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    monkeypatch.setattr(Path, "unlink", lambda self, **options: unlink(self, **options) if self.exists() else None)
    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr("olmem_convert.writing.transaction.swap", swap_that_cannot_undo)
    with pytest.raises(Killed):
        convert(source("olmo"), out, ConvertOptions(overwrite=True, verify=False))
    monkeypatch.undo()
    convert(source("olmo"), tmp_path / "whole", ConvertOptions(verify=False))
    card(tmp_path / "whole", CardOptions(license="mit", name="olmo1"))
    new = snapshot(tmp_path / "whole")
    assert not out.exists() or snapshot(out) in (old, new)
    convert(source("olmo"), out, ConvertOptions(overwrite=True, resume=True, verify=False))
    assert snapshot(out) == new
    assert sorted(os.listdir(tmp_path)) == sorted([out.name, "whole"])


def swap_that_cannot_undo(folder, out, replaced, journal, overwrite):
    """As the real one, to which no `except` happens when it is killed."""
    note(journal, {"replaces": str(out)})
    out.rename(replaced)
    folder.rename(out)
    return True


def killed_between_the_renames(out: Path, monkeypatch) -> tuple[dict[str, str], dict[str, str]]:
    """`out` is replaced by a conversion that SIGKILL stops between its renames; what the two folders hold."""
    convert(source("olmo1"), out, ConvertOptions(verify=False))
    old, rename = snapshot(out), Path.rename

    def killed(self, target):
        if self.name.endswith(".partial"):
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        patch.setattr(Path, "rename", killed)
        patch.setattr("olmem_convert.writing.transaction.swap", swap_that_cannot_undo)
        with pytest.raises(Killed):
            convert(source("olmo"), out, ConvertOptions(overwrite=True, verify=False))
    left = sorted(path.name for path in out.parent.iterdir() if path.name.startswith(".out"))
    assert left == [".out.lock", ".out.partial", ".out.partial.jsonl", ".out.replaced"] and not out.exists()
    new = snapshot(out.with_name(".out.partial"))
    return old, new


FAILING = {
    "no source": lambda tmp_path: convert(tmp_path / "nothing", tmp_path / "out"),
    "no source, to replace": lambda tmp_path: convert(
        tmp_path / "nothing", tmp_path / "out", ConvertOptions(overwrite=True)
    ),
    "a bad option": lambda tmp_path: convert(
        source("olmo"), tmp_path / "out", ConvertOptions(dtype="int8", overwrite=True)
    ),
    "a source of another kind": lambda tmp_path: convert(
        source("olmo"), tmp_path / "out", ConvertOptions(to="olmo2", overwrite=True)
    ),
    "values that none are": lambda tmp_path: convert(
        write_olmo_core(tmp_path / "bad", with_nonfinite(olmo_core_state())),
        tmp_path / "out",
        ConvertOptions(overwrite=True),
    ),
}


@pytest.mark.parametrize("removed", [None, ".out.partial", ".out.replaced"])
@pytest.mark.parametrize("failing", FAILING)
def test_the_old_folder_or_the_new_one_is_always_whole(failing, removed, monkeypatch, tmp_path):
    """A command that failed deleted the only copy, as it concluded from a folder that was not there."""
    old, new = killed_between_the_renames(tmp_path / "out", monkeypatch)
    if removed:
        shutil.rmtree(tmp_path / removed)
    with pytest.raises(CheckpointError):
        FAILING[failing](tmp_path)
    held = [snapshot(path) for path in tmp_path.iterdir() if path.is_dir()]
    wanted = {".out.partial": [old], ".out.replaced": [new], None: [old]}[removed]
    assert any(folder in held for folder in wanted)
    with suppress(CheckpointError):
        convert(source("olmo"), tmp_path / "out", ConvertOptions(resume=True, overwrite=True, verify=False))
    assert snapshot(tmp_path / "out") == new
    assert not any(path.name.startswith(".out") for path in tmp_path.iterdir())


def test_what_was_replaced_stays_until_it_is_replaced_anew(monkeypatch, tmp_path):
    """A crash behind the last rename leaves both; a command that fails is no reason to delete one."""
    out = tmp_path / "out"
    old, new = killed_between_the_renames(out, monkeypatch)
    (tmp_path / ".out.partial").rename(out)
    for name in ("no source", "no source, to replace", "a bad option"):
        with pytest.raises(CheckpointError):
            FAILING[name](tmp_path)
        assert snapshot(out) == new and snapshot(tmp_path / ".out.replaced") == old
    convert(source("olmo"), out, ConvertOptions(overwrite=True, verify=False))
    assert snapshot(out) == new and not any(path.name.startswith(".out") for path in tmp_path.iterdir())


def test_what_was_replaced_stays_if_another_folder_took_its_place(monkeypatch, tmp_path):
    out = tmp_path / "out"
    old, _ = killed_between_the_renames(out, monkeypatch)
    shutil.rmtree(tmp_path / ".out.partial")
    convert(source("olmo_core"), tmp_path / "other", ConvertOptions(verify=False))
    (tmp_path / "other").rename(out)
    with pytest.raises(CheckpointError, match=r"\.out\.replaced beside it, which is in the way"):
        convert(source("olmo"), out, ConvertOptions(overwrite=True, verify=False))
    assert snapshot(tmp_path / ".out.replaced") == old


@pytest.mark.parametrize("how", ["plainly", "by a link", "by a link to its parent", "from inside"])
@pytest.mark.parametrize("name", [".out.partial", ".out.replaced", "out"])
def test_a_source_that_the_conversion_would_remove(name, how, monkeypatch, tmp_path):
    """`olmem convert .out.partial out --to olmo3 --overwrite` deleted what it was to read."""
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    killed_between_the_renames(out, monkeypatch)
    if name == "out":
        (out.parent / ".out.replaced").rename(out)
    place, given = out.parent / name, out.parent / name
    if how == "by a link":
        given = tmp_path / "link"
        given.symlink_to(place)
    elif how == "by a link to its parent":
        (tmp_path / "link").symlink_to(out.parent)
        given = tmp_path / "link" / name
    elif how == "from inside":
        monkeypatch.chdir(place)
        given = Path(".")
    (out.parent / ".out.lock").unlink()
    before = snapshot(tmp_path)
    for run in (
        lambda: convert(given, out, ConvertOptions(to="olmo3", overwrite=True, verify=False)),
        lambda: convert(given, out, ConvertOptions(overwrite=True, resume=True, verify=False)),
    ):
        with pytest.raises(CheckpointError, match="`OUT` and SRC must lie apart"):
            run()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("option", ["tokenizer", "native_config"])
def test_other_files_that_the_conversion_would_remove(option, monkeypatch, tmp_path):
    killed_between_the_renames(tmp_path / "out", monkeypatch)
    path = tmp_path / ".out.partial" / "config.json"
    with pytest.raises(CheckpointError, match=f"`{option}` must lie apart"):
        convert(source("olmo"), tmp_path / "out", ConvertOptions(overwrite=True, verify=False, **{option: path}))
    assert path.exists()


def test_a_failure_with_resume_keeps_what_is_finished(monkeypatch, tmp_path):
    lines = []

    def fail(*_):
        raise CheckpointError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("olmem_convert.writing.transaction.sync", fail)
        with pytest.raises(CheckpointError, match="the disk is full"):
            convert(DEMO / "step1872", tmp_path / "out", ConvertOptions(resume=True, **SMALL), say=lines.append)
    assert lines[-1] == f"unfinished: the same command goes on with {tmp_path / 'out'}"
    report = convert(DEMO / "step1872", tmp_path / "out", ConvertOptions(resume=True, **SMALL))
    assert report["bytes_found"] == report["bytes"]


def test_errors_name_out_and_not_where_it_is_written(monkeypatch, tmp_path):
    def fail(folder, *_):
        raise CheckpointError(f"`{folder / 'config.json'}` must be so")

    monkeypatch.setattr("olmem_convert.writing.transaction.sync", fail)
    with pytest.raises(CheckpointError) as refusal:
        convert(source("olmo"), tmp_path / "out", ConvertOptions(verify=False))
    assert str(refusal.value) == f"`{tmp_path / 'out' / 'config.json'}` must be so"


def test_export_resumes_too(converted, kill, monkeypatch, tmp_path):
    folder = converted("demo")
    kill(20)
    with pytest.raises(Killed):
        convert(folder, tmp_path / "out", ConvertOptions(to="olmo3", **SMALL))
    monkeypatch.undo()
    report = convert(folder, tmp_path / "out", ConvertOptions(to="olmo3", resume=True, **SMALL))
    assert 0 < report["bytes_found"] < report["bytes"]
    convert(folder, tmp_path / "whole" / "out", ConvertOptions(to="olmo3", **SMALL))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole" / "out")


def test_killed_in_earnest(tmp_path):
    """At random moments of the whole command, verification included; `benchmarks/convert.py --kills 50` has more."""
    arguments = [DEMO / "step1872", tmp_path / "out", "--max-shard-size", "500KB"]
    started = time.monotonic()
    assert command("convert", arguments[0], tmp_path / "whole" / "out", *arguments[2:]).end()[0] == 0
    seconds = time.monotonic() - started
    moments, kills, resume = random.Random(1), 0, []
    while kills < 3:
        process = command("convert", *arguments, *resume)
        while not process.has_ended and not any(tmp_path.glob(".out.*")):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, seconds / 2))
        if process.has_ended:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.end()
        kills, resume = kills + 1, ["--resume"]
        assert not (tmp_path / "out").exists()
    command("convert", *arguments, *resume).end()
    assert kills and snapshot(tmp_path / "out") == snapshot(tmp_path / "whole" / "out")


# Numbers that are none


def with_nonfinite(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In two rows of the head, so that all other logits are numbers."""
    _, head = (name for name, value in state.items() if value.shape == (12, 8))
    state[head][3, 2:4] = float("nan")
    state[head][5, 0] = float("inf")
    return state


@pytest.mark.parametrize("make", ["olmo", "olmo_core"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nonfinite_weights_are_carried_over_only_when_that_is_asked_for(make, dtype, tmp_path):
    if make == "olmo":
        folder = write_olmo(tmp_path / "source", "model.pt", with_nonfinite(olmo_state()))
    else:
        folder = write_olmo_core(tmp_path / "source", with_nonfinite(olmo_core_state()))
    refused = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out"), "--dtype", dtype])
    assert refused.exit_code == 1 and "--allow-nonfinite" in refused.stderr
    assert os.listdir(tmp_path) == ["source"]
    options = ["--dtype", dtype, "--allow-nonfinite", "--json"]
    result = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    counts = {"lm_head.weight": 3}
    assert report["nonfinite"] == report["verification"]["nonfinite"] == counts
    assert report["verification"]["stages"][-1]["compared"] == 10 * report["verification"]["prompt"]["tokens"]
    assert "3 numbers of" in result.stderr
    weights = load_weights(tmp_path / "out")
    assert weights["lm_head.weight"].isnan().sum() == 2 and weights["lm_head.weight"].isinf().sum() == 1
    again = CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--against", str(folder)])
    assert again.exit_code == 1 and "must be finite" in again.stderr
    again = CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--against", str(folder), "--allow-nonfinite"])
    assert again.exit_code == 0, again.stderr


def test_logits_that_are_all_nan_prove_nothing(tmp_path):
    state = olmo_core_state()
    state["lm_head.norm.weight"][:] = float("nan")
    folder = write_olmo_core(tmp_path / "source", state)
    with pytest.raises(CheckpointError, match="none is a number"):
        convert(folder, tmp_path / "out", ConvertOptions(allow_nonfinite=True))


def test_rounding_that_makes_infinities_is_never_allowed(tmp_path):
    state = with_nonfinite(olmo_core_state())
    state["blocks.0.attention.w_v.weight"][0, 0] = 70000.0
    folder = write_olmo_core(tmp_path / "source", state)
    with pytest.raises(CheckpointError, match=r"v_proj.* must be finite as float16 .*--dtype bfloat16"):
        convert(folder, tmp_path / "out", ConvertOptions(dtype="float16", allow_nonfinite=True))


# Figures for a script


def test_progress_for_a_script(tmp_path):
    result = CliRunner().invoke(app, ["convert", str(source("olmo")), str(tmp_path / "out"), "--json"])
    figures = [json.loads(line)["progress"] for line in result.stderr.splitlines() if line.startswith('{"progress"')]
    report = json.loads(result.stdout)
    assert figures[-1]["bytes"] == figures[-1]["of"] == report["bytes"]
    assert all(set(entry) == {"bytes", "of", "seconds", "bytes_per_second", "seconds_left"} for entry in figures)
