"""Every block of code in the README and the guides runs, and prints what it is said to print."""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from fresh import run_fresh
from olmem import OlmemConfig
from olmem_convert import ConvertOptions, convert
from olmem_convert.cli import app
from transformers import PreTrainedConfig
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = {ROOT / "docs" / name for name in ("compatibility.md", "results.md")}  # by a script
# Packages that blocks may use and the tests do not install. `make ecosystem` does, and runs what needs them.
NEEDS = {"peft": "from peft", "trl": "from trl", "lm_eval": "from lm_eval", "fastapi": '"olmem", "serve"'}
ELSEWHERE = ("pip", "make")  # commands that change the machine; CI runs those of them that there are


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Yields the language and the text of each fenced block of a page."""
    yield from re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The demo, converted."""
    out = tmp_path_factory.mktemp("docs") / "demo"
    convert(ROOT / "model_cards/demo/native/step1872", out, ConvertOptions())
    return out


@pytest.fixture
def place(demo, tmp_path, monkeypatch) -> Path:
    """A working directory with what the pages take for granted."""
    shutil.copytree(demo, tmp_path / "build/demo")
    shutil.copytree(ROOT / "model_cards/demo/native", tmp_path / "model_cards/demo/native")
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks/report.py", tmp_path / "benchmarks")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_console(text: str) -> None:
    """Runs the commands of a block; lines without a prompt must be among what they print."""
    printed = ""
    for line in text.splitlines():
        if not line.startswith("$ "):
            assert line in printed, f"{line!r} is not in what was printed:\n{printed}"
            continue
        command, *arguments = shlex.split(line[2:], comments=True)
        if command == "python" and Path(arguments[0]).exists():
            run_elsewhere(Path(arguments[0]).read_text(), [ROOT / "modeling"])
        elif command == "python":
            assert (ROOT / arguments[0]).exists() or arguments[:2] == ["-m", "pytest"]
        elif command == "olmem":
            given = [argument.replace("you/", "tester/") for argument in arguments]
            if given[0] == "convert" and Path(given[2]).exists():
                shutil.rmtree(given[2])
            result = CliRunner().invoke(app, given)
            assert result.exit_code == 0, result.output
            printed += result.output
        else:
            assert command in ELSEWHERE, f"nobody runs {command!r}"


def run_python(pages_names: dict[str, object], page: Path, text: str) -> None:
    """Runs a block among the names of the page, or in another process if it loads what a push has sent.

    A block that begins with the name of a file is saved too, for commands that run it.
    """
    for package, line in NEEDS.items():
        if line in text and importlib.util.find_spec(package) is None:
            return
    if name := re.match(r"# (\w+\.py)\n", text):
        Path(name[1]).write_text(text)
    if "you/" in text:
        run_elsewhere(text.replace("you/", "tester/"), [])
    else:
        exec(compile(text, str(page), "exec"), pages_names)


def run_elsewhere(code: str, packages: list[Path]) -> None:
    """Runs code in another process, for which these folders hold packages."""
    run = run_fresh(code, env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, packages))})
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_the_blocks_of_a_page_run_one_after_the_other(page, place, server, quick_reload, capsys):
    names: dict[str, object] = {"__name__": "__main__"}
    runs: dict[str, Callable[[str], None]] = {
        "console": run_console,
        "python": lambda text: run_python(names, page, text),
        "bibtex": lambda text: None,
    }
    for language, text in blocks(page):
        assert language in runs, f"nobody runs {language!r}"
        runs[language](text)
    if page.stem == "stream":
        check_losses(names["losses"])


def check_losses(losses: Any) -> None:
    """The page says of the windows and sinks that it tries what is so."""
    assert losses[256, 0] < losses[128, 0] < losses[256, 0] + 0.2 < losses[512, 0]
    assert abs(losses[256, 4] - losses[256, 0]) < 0.01


def test_lines_are_short():
    for page in set(PAGES) - WRITTEN:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            assert len(line) <= 120 or line.startswith("|"), f"{page.name}:{number}"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short_and_names_every_guide():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert all(f"docs/{page.name}" in text for page in (ROOT / "docs").glob("*.md"))


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "docs" / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    stated = (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text()
    assert (
        f'__version__ = "{cited["version"]}"\n' in stated
        and f"\n## {cited['version']}\n" in (ROOT / "CHANGELOG.md").read_text()
    )
    assert cited["license"] == project["project"]["license"] and cited["cff-version"] == "1.2.0"
    readme = (ROOT / "README.md").read_text()
    assert f"title = {{{cited['title']}}}" in readme and f"author = {{{{{cited['authors'][0]['name']}}}}}" in readme


def test_results_are_those_of_the_files():
    report = runpy.run_path(str(ROOT / "benchmarks/report.py"))
    assert report["PAGE"].read_text() == report["page"]()
    assert report["README"].read_text() == report["readme"]()
    assert report["MODELS"].read_text() == report["guide"]()


def test_the_page_of_the_config_is_its_documentation():
    report = runpy.run_path(str(ROOT / "benchmarks/report.py"))
    page = report["CONFIG"].read_text()
    assert page == report["config"]()
    named = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^- (.*?) \(", page, re.MULTILINE))))
    inherited = {field.name for field in fields(PreTrainedConfig)}
    assert named == {field.name for field in fields(OlmemConfig)} - inherited
