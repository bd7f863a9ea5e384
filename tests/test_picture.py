"""The README's picture is drawn from the arithmetic that the model runs on."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_picture_is_up_to_date():
    drawn = runpy.run_path(str(ROOT / "benchmarks/picture.py"))
    assert drawn["PICTURE"].read_text() == drawn["draw"]()
    assert "modeling/context.svg" in (ROOT / "README.md").read_text()
