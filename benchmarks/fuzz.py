"""Mutated and hostile checkpoints over every reader: what they cost, and whether anything but CheckpointError escapes.

    python benchmarks/fuzz.py [--cases 100000] [--reader NAME] [--seed S] [--processes N] [--seconds S] [--json]
    python benchmarks/fuzz.py --reader NAME --seed S --case N       that one again, left on the disk, with a traceback
    python benchmarks/fuzz.py --reader NAME --engine atheris        steered by coverage (pip install atheris)

A case is a tiny genuine checkpoint, or a folder that one was converted to (tests/convert/fuzzing), changed in up to
three ways: bytes, zip records, pickle opcodes, JSON, YAML, headers, metadata, rules of tokenizers, links, pipes and
devices in place of files. Every tensor of a checkpoint is read as `olmem convert` reads it, and one case in twenty is
converted and verified; a converted folder is given to `card`, `verify`, `evaluate`, or `push` up to its first request;
a state file to `OlmemCache.load` and, if it loads, to a model; and a folder is pushed to a Hub on this machine that
lies in its listings, contents, addresses and redirects.
An escape is any of these: an exception other than CheckpointError, a crash, more than 10 seconds of the processor or 30
of the clock, more memory than --memory, a file outside OUT, an attempt to start a process (but the one that tries
tokenizers), to open a socket, to write elsewhere or to unpickle a global.
A case that could not be made or told of, as the fuzzer itself failed, is none; it is counted beside them.

refused   cases that ended in a CheckpointError, or of a state file in a ValueError; the others read or converted
slowest   seconds of processor time of one case
memory    MiB that one case added, at most
unmade    cases in which the fuzzer itself failed

With --seconds, cases that are not tried by then are left out, and the figures say how many were.
"""

# pyright: reportMissingImports=false
import argparse
import faulthandler
import gc
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[1]
# In place of this folder, whose convert.py would hide tests/convert.
sys.path[:1] = [str(ROOT / part) for part in ("tests", "convert", "modeling")]
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # which forked processes cannot use
sys.dont_write_bytecode = True

import torch  # noqa: E402  after what it reads from the environment
import transformers  # noqa: E402
from convert.fuzzing.archives import BOMBS, bomb  # noqa: E402
from convert.fuzzing.hub import LEAKED  # noqa: E402
from convert.fuzzing.mutations import make  # noqa: E402
from convert.fuzzing.seeds import FOLDERS, OTHERS, seeds  # noqa: E402
from convert.fuzzing.seeds import READERS as CHECKPOINTS  # noqa: E402
from convert.fuzzing.target import Place, standing_in  # noqa: E402
from olmem_convert.reading.tokenizer_file import trial  # noqa: E402
from tqdm import tqdm  # noqa: E402

READERS = CHECKPOINTS | FOLDERS | OTHERS
SECONDS, PATIENCE = 10, 30  # of the processor, which is shared with others, and of the clock
LOOK = 0.5  # seconds between two looks for processes that hang
WHOLE = 20  # one case of so many is converted and verified
ROOM = 2**31  # bytes that a worker may map beyond those at its start
STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
)
CALLS = ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request", "pickle.find_class")
GIT = [["git", "rev-parse", "--is-inside-work-tree"], ["git", "rev-parse", "HEAD"]]
LOOKS = {"socket.connect": 1, "socket.getaddrinfo": 0}  # and where the address is among their arguments
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def is_loopback(address: Any) -> bool:
    return (address[0] if isinstance(address, tuple) else address) in ("127.0.0.1", "localhost", "::1")


class Guard:
    """An audit hook that stops, and remembers, what no checkpoint may make happen."""

    def __init__(self, folder: Path):
        self.folder, self.armed, self.seen = f"{folder}{os.sep}", False, ""
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in LOOKS and is_loopback(arguments[LOOKS[event]]):
            return  # to the Hub that lies, which sees where a token goes
        if not self.armed or event not in (*STARTS, *CALLS, *CHANGES, "open"):
            return
        if event == "subprocess.Popen" and list(arguments[1]) in (trial(), *GIT):
            return  # a tokenizer is tried in a process of its own, and `evaluate` says at which commit it ran
        if event == "open":
            path, _, flags = arguments
            stops = bool((flags or 0) & WRITING) and self.is_outside(path)
        else:
            stops = event not in CHANGES or self.is_outside(arguments[0])
        if stops:
            self.seen = f"{event} {arguments[:2]!r}"[:200]
            raise PermissionError(self.seen)

    def is_outside(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False  # a descriptor that is open already
        text = os.path.abspath(os.fsdecode(path))
        return text != os.devnull and not f"{text}{os.sep}".startswith(self.folder)

    @contextmanager
    def on(self) -> Iterator[None]:
        self.armed, self.seen = True, ""
        try:
            yield
        finally:
            self.armed = False


def resident(peak: bool = True) -> int:
    """Bytes in memory now, or at most since `forget_peak`."""
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@dataclass
class Result:
    case: int
    reader: str
    outcome: str
    seconds: float = 0.0
    memory: int = 0

    @property
    def escaped(self) -> bool:
        return self.outcome.startswith("escape")

    @property
    def unmade(self) -> bool:
        """Whether the fuzzer itself failed, so that nothing of Olmem was tried."""
        return self.outcome.startswith("unmade")


def attempt(place: Place, guard: Guard, reader: str, seed: str, case: int, memory: int) -> Result:
    rng = Random(f"{seed}/{reader}/{case}")
    place.lay(reader, make(rng, reader))
    forget_peak()
    before, started = resident(peak=False), time.process_time()
    try:
        with guard.on():
            outcome = place.attempt(reader, rng, whole=rng.randrange(WHOLE) == 0)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"escape: {type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
    seconds, used = time.process_time() - started, resident() - before
    if guard.seen:
        outcome = f"escape: {guard.seen}"
    elif used > memory:
        outcome = f"escape: {used >> 20} MiB of memory, then {outcome[:200]}"
    place.clear()
    return Result(case, reader, outcome, seconds, used)


def work(
    connection: Connection,
    others: list[Connection],
    readers: list[str],
    seed: str,
    cases: range,
    memory: int,
    folder: Path,
) -> None:
    """Tries its cases, one after another, and tells of each; what it prints goes nowhere."""
    for other in others:
        other.close()  # so that no end of a pipe outlives the one who reads it
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    torch.set_num_threads(1)
    place = Place(folder)
    guard = Guard(folder)
    limit_memory()
    trace = folder.with_suffix(".trace").open("w+")
    with standing_in(folder):
        for case in cases:
            trace.seek(0)
            trace.truncate()
            faulthandler.dump_traceback_later(SECONDS, repeat=True, file=trace)
            reader = readers[case % len(readers)]
            try:
                connection.send(attempt(place, guard, reader, seed, case, memory))
            except Exception:
                connection.send(Result(case, reader, f"unmade: {traceback.format_exc()[-600:]}"))
                place.clear()
    connection.close()


def limit_memory() -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM, mapped + ROOM))


@dataclass
class Worker:
    """A process and the cases that it has yet to try."""

    cases: range
    process: Any = None
    connection: Any = None
    since: float = 0.0
    used: float = 0.0

    def begin(self) -> None:
        self.since, self.used = time.monotonic(), self.processor()

    def hangs(self) -> bool:
        return time.monotonic() - self.since > PATIENCE or self.processor() - self.used > SECONDS

    def processor(self) -> float:
        """Seconds that the process has computed."""
        try:
            spent = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        except OSError:  # it has ended
            return self.used
        return sum(map(int, spent)) / os.sysconf("SC_CLK_TCK")


def run(
    readers: list[str], seed: str, cases: int, processes: int, memory: int, bar: tqdm, seconds: float | None
) -> Iterator[Result]:
    """Every case, or those of so many seconds; a process that hangs or dies is replaced by one that goes on behind that
    case."""
    context = multiprocessing.get_context("fork")
    prepare()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:

        def start(worker: Worker, number: int) -> None:
            folder = Path(scratch) / str(number)
            shutil.rmtree(folder, ignore_errors=True)
            worker.connection, child = context.Pipe(duplex=False)
            worker.process = context.Process(
                target=work, args=(child, open_ends(), readers, seed, worker.cases, memory, folder), daemon=True
            )
            worker.process.start()
            child.close()
            worker.begin()

        def open_ends() -> list[Connection]:
            return [worker.connection for worker in workers if worker.connection is not None]

        def received(worker: Worker) -> Result:
            try:
                return worker.connection.recv()
            except EOFError:
                worker.process.join()
                return lost(worker, readers, f"a crash, exit code {worker.process.exitcode}")

        def hanging(worker: Worker, number: int) -> Result:
            worker.process.kill()
            worker.process.join()
            trace = (Path(scratch) / f"{number}.trace").read_text().splitlines()[-20:]
            return lost(worker, readers, f"more than {SECONDS} seconds, {' '.join(trace)}")

        workers = [Worker(range(number, cases, processes)) for number in range(processes)]
        for number, worker in enumerate(workers):
            start(worker, number)
        began = looked = time.monotonic()
        while busy := {worker.connection: number for number, worker in enumerate(workers) if worker.cases}:
            found = [(busy[end], received(workers[busy[end]])) for end in wait(list(busy), timeout=LOOK)]
            if time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                told = {number for number, _ in found}
                slow = [number for number in busy.values() if number not in told and workers[number].hangs()]
                found += [(number, hanging(workers[number], number)) for number in slow]
            for number, result in found:
                worker = workers[number]
                worker.cases = worker.cases[1:]
                worker.begin()
                if not worker.process.is_alive() and worker.cases and result.seconds == SECONDS:
                    start(worker, number)
                bar.update()
                yield result
            if seconds is not None and time.monotonic() - began > seconds:
                break
        for worker in workers:
            if worker.cases:
                worker.process.kill()
            worker.process.join()


def prepare() -> None:
    """What is made once: every seed, as a case may take a piece of any, and what takes long to compress."""
    for reader in READERS:
        seeds(reader)
    for nbytes in BOMBS:
        bomb(nbytes)
    gc.collect()
    gc.freeze()  # what is there now, which no collection of a worker need look at


def lost(worker: Worker, readers: list[str], what: str) -> Result:
    case = worker.cases[0]
    return Result(case, readers[case % len(readers)], f"escape: {what}", seconds=SECONDS)


@dataclass
class Row:
    """What is told of one reader."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    escapes: int = 0
    unmade: int = 0
    slowest: float = 0.0
    slowest_case: int = 0
    memory: int = 0
    memory_case: int = 0
    found: list[str] = field(default_factory=list)
    differing: list[int] = field(default_factory=list)  # cases whose conversion the proof refused

    def add(self, result: Result) -> None:
        self.cases += 1
        self.accepted += result.outcome == "accepted"
        self.refused += result.outcome.startswith("refused")
        self.slowest, self.slowest_case = max((self.slowest, self.slowest_case), (result.seconds, result.case))
        self.memory, self.memory_case = max((self.memory, self.memory_case), (result.memory, result.case))
        self.escapes += result.escaped
        self.unmade += result.unmade
        if result.escaped or result.unmade:
            self.found.append(f"--case {result.case}: {result.outcome}")
        if "must compute the" in result.outcome:
            self.differing.append(result.case)


def summary(rows: dict[str, Row]) -> dict[str, Any]:
    """What is told of all readers together."""
    slowest = max(rows, key=lambda name: rows[name].slowest)
    largest = max(rows, key=lambda name: rows[name].memory)
    found = [line for row in rows.values() for line in row.found]
    return {
        "cases": sum(row.cases for row in rows.values()),
        "escapes": sum(row.escapes for row in rows.values()),
        "unmade": sum(row.unmade for row in rows.values()),
        "tokens_sent_elsewhere": sum(LEAKED in line for line in found),
        "slowest_seconds": rows[slowest].slowest,
        "slowest_case": f"--reader {slowest} --case {rows[slowest].slowest_case}",
        "greatest_memory_mib": rows[largest].memory >> 20,
        "greatest_memory_case": f"--reader {largest} --case {rows[largest].memory_case}",
    }


def table(rows: dict[str, Row]) -> str:
    lines = [
        f"{'reader':<20}{'cases':>9}{'accepted':>10}{'refused':>9}{'slowest':>9}{'memory':>8}{'escapes':>9}{'unmade':>8}"
    ]
    for name, row in rows.items():
        lines.append(
            f"{name:<20}{row.cases:>9,}{row.accepted:>10,}{row.refused:>9,}{row.slowest:>8.2f}s"
            f"{row.memory / 2**20:>8.0f}{row.escapes:>9,}{row.unmade:>8,}"
        )
    return "\n".join(lines)


def again(reader: str, seed: str, case: int) -> None:
    """One case in this process, with whatever it raises; its checkpoint stays."""
    folder = Path(tempfile.mkdtemp(prefix="olmem-fuzz-"))
    rng = Random(f"{seed}/{reader}/{case}")
    place, guard = Place(folder), Guard(folder)
    place.lay(reader, make(rng, reader))
    print(f"the checkpoint is {place.source}", flush=True)
    started = time.perf_counter()
    torch.set_num_threads(1)
    limit_memory()
    faulthandler.enable()
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    with standing_in(folder), guard.on():
        try:
            outcome = place.attempt(reader, rng, whole=rng.randrange(WHOLE) == 0)
            print(outcome)
        finally:
            print(f"{time.perf_counter() - started:.2f} s")


def with_atheris(reader: str, cases: int) -> None:
    """The same mutations and the same target, steered by what of the converter a case reaches."""
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError as error:
        raise SystemExit("--engine atheris needs the package atheris: pip install atheris") from error
    from convert.fuzzing.bytes import ByteRandom

    for name in [name for name in sys.modules if name.split(".")[0] == "olmem_convert"]:
        for function in vars(sys.modules[name]).values():
            if getattr(function, "__module__", None) == name and hasattr(function, "__code__"):
                atheris.instrument_func(function)
    prepare()
    folder = Path(tempfile.mkdtemp(prefix="olmem-fuzz-"))
    place, guard = Place(folder / "place"), Guard(folder)

    def one(data: bytes) -> None:
        rng = ByteRandom(data)
        place.lay(reader, make(rng, reader))
        faulthandler.dump_traceback_later(PATIENCE, exit=True)  # libFuzzer's own alarm ends Python without a word
        with guard.on():
            place.attempt(reader, rng, whole=False)
        faulthandler.cancel_dump_traceback_later()
        if guard.seen:
            raise PermissionError(guard.seen)
        place.clear()

    with standing_in(place.folder):
        corpus = folder / "corpus"
        corpus.mkdir()
        for number in range(100):
            (corpus / str(number)).write_bytes(Random(number).randbytes(400))
        limits = [f"-runs={cases}", "-timeout=300", "-rss_limit_mb=4096", "-max_len=4096"]
        atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={folder}/", str(corpus)], one)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="over all readers, or of the one given")
    parser.add_argument("--reader", choices=READERS)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--case", type=int, help="only this one, in the process itself")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory", type=int, default=512, help="MiB that a case may add")
    parser.add_argument("--seconds", type=float, help="end then, with what was tried")
    parser.add_argument("--engine", choices=("mutate", "atheris"), default="mutate")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    readers = [arguments.reader] if arguments.reader else list(READERS)
    if arguments.case is not None or arguments.engine == "atheris":
        if not arguments.reader:
            parser.error("--case and --engine atheris need --reader")
        if arguments.case is not None:
            again(arguments.reader, arguments.seed, arguments.case)
        else:
            with_atheris(arguments.reader, arguments.cases)
        return

    tqdm.monitor_interval = 0  # no thread, whose locks a forked process would find taken
    rows = {name: Row() for name in readers}
    started = time.perf_counter()
    found = run(
        readers,
        arguments.seed,
        arguments.cases,
        arguments.processes,
        arguments.memory << 20,
        bar := tqdm(total=arguments.cases, unit="case", mininterval=1 if sys.stderr.isatty() else 60),
        arguments.seconds,
    )
    with bar:
        for result in found:
            rows[result.reader].add(result)
            if result.escaped or result.unmade:
                bar.write(f"{result.reader} --case {result.case}: {result.outcome}", file=sys.stderr)
    gc.unfreeze()  # lest native libraries tell of what is never freed
    told = summary(rows)
    told |= {"seed": arguments.seed, "processes": arguments.processes, "seconds": time.perf_counter() - started}
    if arguments.json:
        print(json.dumps(told | {"readers": {name: asdict(row) for name, row in rows.items()}}, indent=2))
    else:
        print(table(rows))
        print("\n".join(f"{name}: {value}" for name, value in told.items()))
    sys.exit(any(row.escapes or row.unmade for row in rows.values()))


if __name__ == "__main__":
    main()
