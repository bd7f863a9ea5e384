"""Collects what each tool does with each variant, and writes the table of docs/compatibility.md from it alone.

A test names its tool by the mark `tool(name, package)` and takes a `variant`. It passes if the tool works, if it
refuses in a block of the fixture `refuses`, or if the tool itself does not run, in a block of `broken`. A failure with
Olmo3 is Transformers' own: it is told, and fails nothing.
"""

import importlib.metadata
import re
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from ecosystem.variants import VARIANTS, make_tokenizer

OPTION = "--compatibility"
HEAD = """# What works with which tool

`make ecosystem` writes this page from the results of `tests/ecosystem`. `plain` is an Olmem model without extras,
`sinks` has sinks and learned sinks, `memory` has memory tokens and retrieval, and `key_value` shares keys and values.
Olmo3 is Transformers' own model, which shows whether a limit is Olmem's or the tool's. All of this ran on a CPU, with
Transformers {transformers} and torch {torch}. The words of each error are below the table.

"""


def pytest_addoption(parser):
    parser.addoption(OPTION, help="the file of the table that is written")


def pytest_configure(config):
    config.addinivalue_line("markers", "variants(names): the only variants that a test is about")
    config.addinivalue_line("markers", "tool(name, package): the tool that a test is about, and the package it is in")


def pytest_generate_tests(metafunc):
    if "variant" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("variants")
        metafunc.parametrize("variant", mark.args[0] if mark else VARIANTS)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def refuses(record_property):
    """A block in which an error with these words must be raised, which the table then quotes."""

    @contextmanager
    def block(words: str, error: type[BaseException] = ValueError):
        with pytest.raises(error, match=words) as raised:
            yield
        said = re.sub(r"\s+", " ", str(raised.value)).strip()
        record_property("refusal", said if len(said) < 300 else f"{said[:300]} …")

    return block


@pytest.fixture
def broken(record_property):
    """A block in which a tool fails with these words for every model, Olmo3 too. It tells when the tool is mended."""

    @contextmanager
    def block(words: str, error: type[BaseException]):
        with pytest.raises(error, match=words) as raised:
            yield
        record_property("failure", f"{type(raised.value).__name__}: {raised.value}")

    return block


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    mark = item.get_closest_marker("tool")
    variant = item.callspec.params.get("variant") if hasattr(item, "callspec") else None
    if report.when == "call" and mark is not None and variant is not None:
        name, package = mark.args
        said = dict(report.user_properties)
        outcome = f"refuses: {said['refusal']}" if "refusal" in said else "works"
        if "failure" in said:
            outcome = f"fails: {said['failure']}"
        if report.failed:
            error = call.excinfo.value
            line = (str(error).strip().splitlines() or [""])[0]
            outcome = f"fails: {type(error).__name__}: {line[:160]}"
            if isinstance(error, AssertionError):
                outcome = "fails: the result is not that of the model alone"
            if variant == "Olmo3":
                report.outcome, report.wasxfail = "skipped", "Transformers' own model"
        report.user_properties.append(("tool", (name, package, variant, outcome)))
    return report


def pytest_runtest_logreport(report):
    for name, value in report.user_properties:
        if name == "tool" and report.when == "call":
            REPORTS.append(tuple(value))


REPORTS: list[tuple[str, str, str, str]] = []


def pytest_sessionfinish(session):
    path = session.config.getoption(OPTION)
    if path and not hasattr(session.config, "workerinput"):
        Path(path).write_text(table(REPORTS), encoding="utf-8")


def rank(outcome: str) -> int:
    return ["", "works", "refuses", "fails"].index(outcome.partition(":")[0])


def table(reports: list[tuple[str, str, str, str]]) -> str:
    """The page: a row for each tool, and its words below where a cell has more than one word."""
    found: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for name, package, variant, outcome in reports:
        outcomes = found[package, name]
        outcomes[variant] = max(outcomes.get(variant, ""), outcome, key=rank)  # of several tests the worst
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    lines = [HEAD.format(**versions)]
    lines += [f"| package | use | {' | '.join(VARIANTS)} |\n", f"|---|---|{'---|' * len(VARIANTS)}\n"]
    notes: dict[str, int] = {}
    for (package, name), outcomes in sorted(found.items()):
        cells = []
        for variant in VARIANTS:
            kind, _, said = outcomes.get(variant, "–").partition(": ")
            note = f" [{notes.setdefault(said, len(notes) + 1)}]" if said else ""
            cells.append(kind + note)
        lines.append(f"| {package} {importlib.metadata.version(package)} | {name} | {' | '.join(cells)} |\n")
    if notes:
        lines.append("\nThe words:\n\n")
        lines += [f"{number}. {said}\n" for said, number in notes.items()]
    return "".join(lines)
