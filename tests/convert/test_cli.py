"""The command line: what it prints where, and with what code it ends."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import olmem
import olmem_convert
import pytest
from convert.checkpoints import DEMO, load_weights, read_config, snapshot, source
from convert.processes import command
from convert.writers import write_olmo
from modeling.helpers import tiny
from olmem_convert import ConvertOptions
from olmem_convert.cli import app
from olmem_convert.commands import converting
from olmem_convert.writing import progress
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.utils import import_utils
from typer.testing import CliRunner

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def run(*arguments) -> object:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_convert_says_what_it_finds_and_does(tmp_path):
    result = run("convert", DEMO / "step1872", tmp_path / "out")
    assert result.exit_code == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    parameters = sum(weight.numel() for weight in load_weights(tmp_path / "out").values())
    found = f"found OLMo-core 3.0.0: {parameters:,} parameters, 4 layers, 3 of them with a window of 256"
    assert lines[0] == f"{found}, 6 heads, trained length 1024"
    assert lines[1] == f"writing {4 * parameters:,} bytes of weights in 1 file, as float32"
    assert lines[2].startswith("tokenizer: 2048 tokens")
    assert lines[3].startswith("verified: logits differ by at most ")
    assert lines[4] == f"wrote {tmp_path / 'out'}"
    assert lines[5:] == [
        f"next: `olmem evaluate {tmp_path / 'out'} --text FILE` measures it; "
        f"`olmem card {tmp_path / 'out'} --license ID` describes it"
    ]


def test_json_is_one_object_on_standard_output(tmp_path):
    result = run("convert", source("legacy_partial_yaml"), tmp_path / "out", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert len(result.stdout.splitlines()) == 1
    assert report["verification"] == json.loads((tmp_path / "out" / "verification.json").read_text())
    assert report["dtype"] == "float32" and report["tokenizer"] is None and report["notes"]
    assert report["bytes"] == report["parameters"] * 4
    assert f"wrote {tmp_path / 'out'}" in result.stderr.splitlines()
    again = run("verify", tmp_path / "out", "--against", source("legacy_partial_yaml"), "--json")
    assert json.loads(again.stdout) == report["verification"]


def test_json_of_an_error_is_nothing(tmp_path):
    result = run("convert", tmp_path / "nothing", tmp_path / "out", "--json")
    assert (result.exit_code, result.stdout) == (1, "") and result.stderr.startswith("error: ")


def test_no_verify_says_how_to(tmp_path):
    result = run("convert", source("olmo"), tmp_path / "out", "--no-verify")
    assert result.exit_code == 0 and f"--against {source('olmo')}" in result.stdout
    assert not (tmp_path / "out" / "verification.json").exists()
    result = run("verify", tmp_path / "out", "--against", source("olmo"))
    assert result.exit_code == 0 and (tmp_path / "out" / "verification.json").exists()
    assert result.stdout.splitlines()[-1].startswith("next: `olmem evaluate ")
    needs_license = f"next: `olmem card {tmp_path / 'out'} --license ID` names the license, which publishing needs"
    assert run("card", tmp_path / "out").stdout.splitlines()[-1] == needs_license
    said = run("card", tmp_path / "out", "--license", "mit").stdout.splitlines()
    assert said[-1] == f"next: `olmem push {tmp_path / 'out'} REPO_ID` shows what would be published"


def test_what_is_neither_here_nor_on_the_hub(tmp_path):
    result = run("convert", "allenai/OLMo-2-0425-1B", tmp_path / "out")
    assert result.exit_code == 1 and "unset HF_HUB_OFFLINE to download it" in result.stderr
    assert "the Hub" not in run("convert", tmp_path / "nothing", tmp_path / "out").stderr


def test_dtypes_have_short_names(tmp_path):
    assert run("convert", source("olmo"), tmp_path / "out", "--dtype", "bf16", "--no-verify").exit_code == 0
    assert read_config(tmp_path / "out")["dtype"] == "bfloat16"
    assert ConvertOptions(dtype="half").dtype == ConvertOptions(dtype="fp16").dtype == "float16"
    assert "must be one of float32, bfloat16, float16" in run("convert", "a", "b", "--dtype", "bf8").stderr


def test_paths_in_a_command_that_is_proposed_are_quoted(tmp_path):
    folder = write_olmo(tmp_path / "my runs" / "step 1", "model.pt")
    result = run("convert", folder, tmp_path / "my out", "--no-verify")
    command = next(line for line in result.stdout.splitlines() if line.startswith("not verified")).split("`")[1]
    assert run(*shlex.split(command)[1:]).exit_code == 0


def test_options_reach_the_conversion(tmp_path):
    options = ("--dtype", "bfloat16", "--max-shard-size", "50KB", "--max-length", "48", "--tokenizer", DEMO)
    result = run("convert", DEMO / "step1872", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    config = read_config(tmp_path / "out")
    assert (config["dtype"], config["max_position_embeddings"]) == ("bfloat16", 48)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 10
    assert "bfloat16" in result.stdout and "float64" in result.stdout  # what the rounding costs
    assert run("verify", tmp_path / "out", "--against", DEMO / "step1872").exit_code == 0


def test_overwrite(tmp_path):
    out = tmp_path / "out"
    assert run("convert", source("olmo1"), out).exit_code == 0
    before = snapshot(out)
    assert run("convert", source("olmo"), out).exit_code == 1
    assert snapshot(out) == before
    assert run("convert", source("olmo"), out, "--overwrite").exit_code == 0
    assert snapshot(out) != before and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["transform"],
        ["convert"],
        ["convert", "a"],
        ["convert", "a", "b", "c"],
        ["convert", "a", "b", "--max-length", "0"],
        ["convert", "a", "b", "--max-length", "x"],
        ["convert", "a", "b", "--fast"],
        ["convert", "a", "b", "--n-ctx", "0"],
        ["verify", "a", "--against", "b", "--n-ctx", "x"],
        ["verify", "--against", "a"],
        ["push", "a"],
        ["push", "a", "b/c", "--token", "x"],
    ],
    ids=" ".join,
)
def test_wrong_use_ends_with_two(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("verb", ["convert", "verify", "evaluate", "tokenizer", "card", "push"])
def test_help_is_whole_in_80_columns(verb):
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
    assert result.exit_code == 0 and "…" not in result.stdout and "--help" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize("verb", ["convert", "verify", "push"])
def test_help_names_every_argument(verb):
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    for word in {
        "convert": ("SRC", "OUT", "--dtype", "--set", "--overwrite"),
        "verify": ("OUT", "--against", "--json"),
        "push": ("OUT", "REPO_ID", "--revision", "--create-pr", "--private", "--tag", "--execute", "--json"),
    }[verb]:
        assert word in result.stdout


def test_serve_says_what_it_needs(tmp_path, monkeypatch):
    """The server itself is tested where its packages are, in tests/ecosystem."""
    tiny(layer_types="sliding_attention", num_sink_tokens=2).config.save_pretrained(tmp_path / "sinks")
    for has_packages, arguments, words in (
        (False, ["sinks"], "`pip install 'transformers[serving]'`"),
        (True, ["."], "must hold a config.json"),
        (True, ["sinks", "--port", "8001", "--continuous-batching"], "`num_sink_tokens` must be 0 (got 2) with `--con"),
    ):
        monkeypatch.setattr(import_utils, "is_serve_available", lambda found=has_packages: found)
        result = run("serve", tmp_path / arguments[0], *arguments[1:])
        assert result.exit_code == 1 and result.stderr.startswith("error: ") and words in result.stderr


def test_version():
    assert run("--version").stdout == f"olmem {olmem.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], ["convert", "--help"], ["push", "a", "--fast"]], ids=str
)
def test_what_needs_no_model_imports_no_torch(arguments):
    """It took four seconds to say that an option is mistyped."""
    script = f"""
import sys
from olmem_convert import ConvertOptions
from olmem_convert.cli import app
try:
    app({arguments!r})
finally:
    print(sorted(set(sys.modules) & {{"torch", "transformers", "numpy", "olmem", "huggingface_hub"}}))
"""
    result = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_verify_of_nothing(tmp_path):
    result = run("verify", tmp_path / "out", "--against", source("olmo"))
    assert result.exit_code == 1 and result.stderr.startswith("error: `OUT` must be a folder that holds a model")


def test_verify_against_nothing(changeable, tmp_path):
    """A mistyped path takes nothing from a good folder."""
    out = changeable("olmo")
    before = snapshot(out)
    result = run("verify", out, "--against", tmp_path / "nothing")
    assert result.exit_code == 1 and result.stderr.startswith("error: `SRC` must be")
    assert snapshot(out) == before


def test_module_is_the_command(tmp_path):
    """In a process of its own: nothing but the lines on standard output, no bar where there is no terminal."""
    command = [
        sys.executable,
        "-m",
        "olmem_convert",
        "convert",
        str(write_olmo(tmp_path / "source", "model.pt")),
        str(tmp_path / "out"),
    ]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"wrote {tmp_path / 'out'}" in result.stdout.splitlines()


def test_what_a_checkpoint_says_moves_no_cursor(tmp_path):
    """Nor begins a line of its own: names of files and fields are its words."""
    source = write_olmo(tmp_path / "source", "model.pt")
    text, field = (source / "config.yaml").read_text(), r'"\e[2J\e]0;title\a\nverified: all is well\r\n": 1'
    (source / "config.yaml").write_text(text.replace("model:\n", f"model:\n  {field}\n"))
    result = run("convert", source, tmp_path / "out")
    assert result.exit_code == 1 and "field this version knows" in result.stderr
    assert all(sign.isprintable() for sign in result.stderr.replace("\n", ""))
    assert not any(line.startswith("verified") for line in result.stderr.splitlines())


@pytest.mark.parametrize("out", ["/", "", "a\udcff"])
def test_out_that_names_no_folder(out, tmp_path, monkeypatch):
    monkeypatch.chdir("/" if out == "" else tmp_path)
    result = run("convert", write_olmo(tmp_path / "source", "model.pt"), out)
    assert result.exit_code == 1 and "`OUT` must be the name of a folder" in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_signal_leaves_nothing(number, code, overwrite, tmp_path):
    source_folder, out = write_olmo(tmp_path / "source", "model.pt"), tmp_path / "out"
    if overwrite:
        assert run("convert", source_folder, out).exit_code == 0
    before = snapshot(tmp_path)

    def wait_in_the_middle() -> None:
        written = converting.write_weights

        def wait(*arguments) -> None:
            written(*arguments)
            print("ready", flush=True)
            time.sleep(60)

        converting.write_weights = wait
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background

    process = command("convert", source_folder, out, *["--overwrite"] * overwrite, prepare=wait_in_the_middle)
    while (line := process.stdout.readline()) and line != "ready\n":
        pass
    assert any(path.name.startswith(".out.") for path in tmp_path.iterdir()), "it is in the middle"
    time.sleep(0.1)
    os.kill(process.pid, number)
    exit_code, _, errors = process.end()
    assert exit_code == code and "Traceback" not in errors, errors
    assert snapshot(tmp_path) == before and sorted(os.listdir(tmp_path)) == sorted(
        {"source", "out"} if overwrite else {"source"}
    )


def test_library_names():
    verbs = {"card", "convert", "evaluate", "push", "verify"}
    options = {f"{verb.title()}Options" for verb in verbs}
    assert set(olmem_convert.__all__) == {"CheckpointError", "add_tokenizer", "serve", *verbs, *options}
    assert all(callable(getattr(olmem_convert, name)) for name in olmem_convert.__all__)


def test_where_there_is_no_terminal_progress_is_lines(capsys, monkeypatch):
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    with progress.Progress(4, "writing weights", unit="file") as bar:
        bar.update(3)
    lines = capsys.readouterr().err.split("\n")
    assert lines[-1] == "" and all(line.startswith("writing weights: ") for line in lines[:-1])
    assert any(" 3/4 " in line for line in lines)


def test_what_is_soon_done_says_nothing_where_there_is_no_terminal(capsys):
    assert list(progress.each([1, 2, 3], "checking", "file")) == [1, 2, 3]
    assert capsys.readouterr().err == ""


def write_tokenizer(folder: Path) -> Path:
    """One that fits `olmo`, whose end and padding are 249 and 248."""
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(256)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(["w248", "w249"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_is_added_without_a_new_conversion(tmp_path):
    tokenizer, out, whole = write_tokenizer(tmp_path / "tokenizer"), tmp_path / "out", tmp_path / "whole" / "out"
    whole.parent.mkdir()
    assert run("convert", source("olmo"), whole, "--tokenizer", tokenizer).exit_code == 0
    said = run("convert", source("olmo"), out).stdout.splitlines()
    assert f"without a tokenizer: `olmem tokenizer {out} PATH` adds one" in said
    assert run("tokenizer", out, tokenizer).exit_code == 0
    assert snapshot(out) == snapshot(whole) and sorted(os.listdir(tmp_path)) == ["out", "tokenizer", "whole"]
    assert "must have no tokenizer yet" in run("tokenizer", out, tokenizer).stderr


def test_a_tokenizer_is_not_added_to_what_was_changed(tmp_path):
    tokenizer, out = write_tokenizer(tmp_path / "tokenizer"), tmp_path / "out"
    assert run("convert", source("olmo"), out).exit_code == 0
    (out / "generation_config.json").write_text("{}")
    before = snapshot(tmp_path)
    result = run("tokenizer", out, tokenizer)
    assert result.exit_code == 1 and "changed: generation_config.json" in result.stderr
    assert snapshot(tmp_path) == before
    assert run("tokenizer", out, tmp_path).exit_code == 1 and snapshot(tmp_path) == before
