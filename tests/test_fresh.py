"""A process that does not end is an error, and the next one runs."""

import fresh
import pytest


def test_a_process_that_does_not_end_is_an_error(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fresh, "SECONDS", 1)
        with pytest.raises(RuntimeError, match=r"must end within 1 s \(it did not\): waiting"):
            fresh.run_fresh("import sys, time; print('waiting', file=sys.stderr, flush=True); time.sleep(600)", env={})
    assert fresh.run_fresh("print(1)", env={}).stdout == "1\n"
