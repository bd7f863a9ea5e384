"""What every error of the command promises."""

import os
from pathlib import Path

from convert.checkpoints import snapshot
from olmem_convert.cli import app
from typer.testing import CliRunner


def refuse(src: Path, *words: str, out: Path | None = None, options: tuple[str, ...] = ()) -> str:
    """Runs `olmem convert` on something wrong, and returns its error, having checked all that an error promises."""
    out = out or src.parent / "out"
    before = {folder: snapshot(folder) for folder in (src.parent, out.parent) if folder.is_dir()}
    names = {folder: sorted(os.listdir(folder)) for folder in before}
    result = CliRunner().invoke(app, ["convert", str(src), str(out), *options])
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for word in words:
        assert word in result.stderr
    for folder, files in before.items():
        assert sorted(os.listdir(folder)) == names[folder]
        assert snapshot(folder) == files
    return result.stderr
