"""The suite itself."""

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, PendingDeprecationWarning])
def test_what_our_code_is_warned_of_is_an_error(category):
    """By the libraries that it calls, and nothing that they are warned of themselves."""
    for module in ("olmem.modeling_olmem", "olmem_convert.cli"):
        with pytest.raises(category, match="old"):
            warnings.warn_explicit("old", category, "file.py", 1, module)
    with pytest.warns(category, match="old"):
        warnings.warn_explicit("old", category, "file.py", 1, "transformers.trainer")


def test_slow_tests_are_run_by_ci_and_left_out_elsewhere(pytestconfig):
    """By one command, which nothing else narrows."""
    assert pytestconfig.getini("addopts")[-2:] == ["-m", "not slow"]
    recipes = dict(re.findall(r"^(\w+):.*\n\t(.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert recipes["slow"] == f"{recipes['test']} -m slow"
    assert {"make test", "make slow"} <= set((ROOT / ".ci" / "run").read_text().splitlines())
