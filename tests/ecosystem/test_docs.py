"""The scripts of docs/tools.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ecosystem.variants import save

PAGE = (Path(__file__).parents[2] / "docs" / "tools.md").read_text(encoding="utf-8")
SCRIPTS = dict(re.findall(r"^## ([^\n]+)\n+```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run(name, tmp_path):
    """With a model that has memory, as files: whoever copies one has a line less to write."""
    save("memory", tmp_path / "build" / "demo")
    (tmp_path / "script.py").write_text(SCRIPTS[name])
    command = tmp_path / "olmem"  # as it is installed
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m olmem_convert "$@"\n')
    command.chmod(0o755)
    paths = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_scripts_are_short():
    assert len(SCRIPTS) == 5
    assert all(len([*filter(None, script.splitlines())]) <= 10 for script in SCRIPTS.values())
