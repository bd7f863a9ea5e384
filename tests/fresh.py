"""Processes that know nothing of Olmem or Transformers, but need not wait for torch: forked from one that imported it.

That takes most of the seconds in which a new process of Python is ready to load a model.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

SECONDS = 300  # that a process may take; it ends itself, as whoever waits for it may have ended before
# Reads a line of JSON for each process that is asked for, and answers with its exit code.
PARENT = """
import gc, json, os, signal, sys, traceback
gc.disable()  # imports make millions of objects, which are walked over and stay
import torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor, torch.export
gc.freeze()
gc.enable()

def become(code, arguments, environment, path, folder, files, seconds):
    signal.alarm(seconds)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, (file, flags) in enumerate(zip(files, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))):
        os.dup2(os.open(file, flags), number)
    sys.stdin, sys.argv = open(0), ["-c", *arguments]
    sys.path[:0] = path
    try:
        exec(compile(code, "<fresh>", "exec"), {"__name__": "__main__"})
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1

for line in sys.stdin:
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    code = become(**json.loads(line))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
os._exit(0)
"""


@cache
def parent() -> subprocess.Popen:
    """The process that all others are forked from, which ends with this one, as its standard input does."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.Popen([sys.executable, "-I", "-c", PARENT], text=True, env=environment, **pipes)


def run_fresh(
    code: str, *arguments: object, env: Mapping[str, str], cwd: Path | None = None, given: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs code in a process with exactly this environment, and what is given on standard input.

    Raises:
        RuntimeError: when it does not end in time, or the process that it is forked from has ended.
    """
    with TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("given", "output", "errors")]
        for path, text in zip(files, (given, "", ""), strict=True):
            path.write_text(text)
        asked = {
            "code": code,
            "arguments": [str(argument) for argument in arguments],
            "environment": dict(env),
            "path": [place for place in env.get("PYTHONPATH", "").split(os.pathsep) if place],
            "folder": str(cwd or Path.cwd()),
            "files": [str(path) for path in files],
            "seconds": SECONDS,
        }
        process = parent()
        print(json.dumps(asked), file=process.stdin, flush=True)
        code_of_exit, errors = process.stdout.readline(), files[2].read_text()
        if not code_of_exit:
            parent.cache_clear()
            raise RuntimeError(f"the parent of fresh processes must stay (it ended with {process.wait()}): {errors}")
        if int(code_of_exit) == -signal.SIGALRM:
            raise RuntimeError(f"a fresh process must end within {SECONDS} s (it did not): {errors}")
        return subprocess.CompletedProcess(code, int(code_of_exit), files[1].read_text(), errors)
