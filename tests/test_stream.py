"""The short form of benchmarks/stream.py: twenty thousand tokens, in a process of its own, and few calls to time."""

import json
import os
from pathlib import Path

import pytest
from fresh import run_fresh

ROOT = Path(__file__).parents[1]
SHORT = "import stream; stream.STEPS, stream.TURNS = 16, 8; stream.main()"
CHUNK = 416  # of which a row of 10,000 tokens is a whole number, but for 16 steps


@pytest.mark.slow
def test_a_stream_takes_no_more_memory_and_loses_nothing():
    """What takes time depends on the machine: the benchmark measures it."""
    path = os.pathsep.join(str(ROOT / part) for part in ("modeling", "convert", "benchmarks"))
    arguments = ("--tokens", "20000", "--chunk", str(CHUNK), "--threads", "1", "--json")
    run = run_fresh(SHORT, *arguments, env=os.environ | {"PYTHONPATH": path})
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert [row["tokens"] for row in found["rows"]] == [10_000, 20_000]
    assert len({row["cache"] for row in found["rows"]}) == 1
    assert found["verdict"]["memory_ratio"] < 1.01
    losses = [row["loss"] for row in found["rows"]]
    assert max(losses) - min(losses) < 1e-3 * min(losses)
