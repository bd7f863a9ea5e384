"""Pushes a model to a Hub on this machine, killed at a drawn request and run again, and prints what the Hub then holds.

    python benchmarks/push.py [--pushes 20] [--seed 0] [--json FILE]

Each push is the command, in a process of its own, to a repository of its own; SIGKILL strikes when the drawn request
arrives, anywhere from the first to the last of an undisturbed push, which downloads the model at its end. A conversion
that was to replace OUT is then killed too, before or between its renames; a command to OUT fails, the hidden folder
beside it is removed, and another command fails. The same push then runs to its end. It is right when OUT is whole,
there is one commit, which holds each file bit for bit and no other, no uploaded object was sent twice, and the tag
names that commit. Anything else ends with exit code 1.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from hub_server import HubServer  # noqa: E402  # pyright: ignore[reportMissingImports]
from olmem_convert import CardOptions, CheckpointError, ConvertOptions, card, convert  # noqa: E402

from convert import killed_at  # noqa: E402  # pyright: ignore[reportAttributeAccessIssue]  of benchmarks/convert.py

SOURCE = ROOT / "tests" / "golden" / "olmo_core_swa" / "step10"
OTHER = ROOT / "tests" / "golden" / "olmo"
COLUMNS = ("killed at", "request", "removed", "whole", "commits", "lost", "extra", "sent twice", "tag", "right")


def start(server: HubServer, out: Path, repo_id: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "olmem_convert", "push", str(out), repo_id, "--tag", "v1", "--execute"]
    environment = os.environ | server.env | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{output.decode()}{errors.decode()}")


def disturb(out: Path, rename: int) -> str:
    """Kills a conversion that replaces OUT at this rename, has commands to OUT fail, and removes the hidden folder
    beside it, whose name is returned."""
    killed_at(rename, OTHER, out)
    fail(out)
    [hidden] = [path for path in out.parent.glob(f".{out.name}.*") if path.is_dir()]
    shutil.rmtree(hidden)
    fail(out)
    return hidden.name


def fail(out: Path) -> None:
    try:
        convert(out.parent / "nothing", out, ConvertOptions(overwrite=True))
    except CheckpointError:
        return
    raise SystemExit("a command that had to fail did not")


def interrupted(server: HubServer, out: Path, repo_id: str, k: int) -> dict[str, Any]:
    """What OUT and the Hub hold after a push that was killed at its request k, from 0, and run again."""
    expected = {path.name: path.read_bytes() for path in out.iterdir()}
    server.requests.clear()
    process = start(server, out, repo_id)
    fault = server.fail("", process.kill, after=k)
    process.communicate()
    server.faults.clear()
    at = server.requests[k] if fault.hits else None
    removed = disturb(out, rename=k % 2)
    whole = expected == ({path.name: path.read_bytes() for path in out.iterdir()} if out.is_dir() else None)
    finish(start(server, out, repo_id))
    held = {name: server.read(repo_id, name) for name in server.files(repo_id) if name != ".gitattributes"}
    sent = Counter(
        request.path.partition("?")[0]
        for request in server.requests
        if request.method == "PUT" and request.status == 200
    )
    row: dict[str, Any] = {
        "killed at": k if at else None,
        "request": f"{at.method} {at.path.partition('?')[0].replace(repo_id, 'R')[:60]}" if at else None,
        "removed": removed,
        "whole": whole,
        "commits": len(server.commits(repo_id)) - 1,
        "lost": sum(held.get(name) != data for name, data in expected.items()),
        "extra": len(held.keys() - expected.keys()),
        "sent twice": sum(times > 1 for times in sent.values()),
        "tag": server.tags(repo_id) == {"v1": server.branches(repo_id)["main"]},
    }
    wanted = {"whole": True, "commits": 1, "lost": 0, "extra": 0, "sent twice": 0, "tag": True}
    return row | {"right": at is not None and all(row[name] == value for name, value in wanted.items())}


def push_and_kill(drawn: list[int], source: Path) -> list[dict[str, Any]]:
    """One push after the other, each killed at one of these requests, of a copy of the folder to a Hub of its own."""
    with tempfile.TemporaryDirectory() as scratch, HubServer() as server:
        out = Path(shutil.copytree(source, Path(scratch) / "out"))
        return [interrupted(server, out, f"{server.user}/m{k}", k) for k in drawn]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pushes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="pushes at a time")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch, HubServer() as server:
        out = Path(scratch) / "out"
        convert(SOURCE, out, ConvertOptions(max_shard_size="50KB"))
        card(out, CardOptions(license="apache-2.0"))
        finish(start(server, out, f"{server.user}/whole"))
        requests = len(server.requests)
        drawn = random.Random(arguments.seed).sample(range(requests), min(arguments.pushes, requests))
        print(f"{requests} requests in an undisturbed push of {len(list(out.iterdir()))} files")
        print("  ".join(COLUMNS), flush=True)
        apart = [drawn[first :: arguments.processes] for first in range(arguments.processes)]
        with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
            for found in pool.map(push_and_kill, apart, [out] * len(apart)):
                for row in found:
                    print("  ".join(str(row[name]).rjust(len(name)) for name in COLUMNS), flush=True)
                rows += found
    right = sum(row["right"] for row in rows)
    print(f"{right} of {len(rows)} interrupted pushes left OUT whole, lost nothing, doubled nothing and are tagged")
    if arguments.json:
        arguments.json.write_text(json.dumps({"requests": requests, "pushes": rows}, indent=2) + "\n")
    sys.exit(right != len(rows))


if __name__ == "__main__":
    main()
