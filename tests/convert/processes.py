"""Processes that are forked from this one: what they import, which takes seconds, is there already."""

import multiprocessing
import os
import sys
from collections.abc import Callable

from olmem_convert.cli import app


class Forked:
    """A process that runs a function, and what it says."""

    def __init__(self, run: Callable[[], object]):
        (output, to_output), (errors, to_errors) = os.pipe(), os.pipe()

        def speak_and_run() -> None:
            sys.stdout, sys.stderr = os.fdopen(to_output, "w"), os.fdopen(to_errors, "w")
            for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
                os.dup2(stream.fileno(), number)
            run()

        self.process = multiprocessing.get_context("fork").Process(target=speak_and_run)
        self.process.start()
        self.pid = self.process.pid
        os.close(to_output)
        os.close(to_errors)
        self.stdout, self.stderr = os.fdopen(output), os.fdopen(errors)

    @property
    def has_ended(self) -> bool:
        return self.process.exitcode is not None

    def end(self) -> tuple[int, str, str]:
        """Waits, and returns its exit code, and what it has said since on standard output and error: little, which
        fits into a pipe."""
        self.process.join(100)
        code = self.process.exitcode
        assert code is not None, "it does not end"
        with self.stdout, self.stderr:
            return code, self.stdout.read(), self.stderr.read()


def command(*arguments: object, prepare: Callable[[], object] = lambda: None) -> Forked:
    """Runs `olmem` with these arguments in a process that is prepared for it."""

    def run() -> None:
        prepare()
        app(list(map(str, arguments)), prog_name="olmem")

    return Forked(run)
