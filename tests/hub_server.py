"""A Hugging Face Hub on this machine, to push to and to load from: models only, real history, faults on request.

It speaks the Hub's HTTP API as the client library `huggingface_hub` uses it (checked with 1.33 and 2.4), and keeps what
it is given: content-addressed blobs, immutable commits, branches, tags, pull requests. Large files go to and come from
another host (`localhost`; the Hub is `127.0.0.1`), as at the real Hub, by signed URLs that refuse a token.

    python tests/hub_server.py --port 8199 --folder hub     # prints what to export; all is kept in ./hub

In a test:

    with HubServer() as server:                  # or HubServer(folder), which finds again what it kept there
        api = HfApi(endpoint=server.endpoint, token=server.token)       # namespaces: server.user, server.orgs
        subprocess.run(..., env=os.environ | server.env)                # with a clean HF_HOME of this server's

In the process of the test itself, Xet must be off: `huggingface_hub.constants.HF_HUB_DISABLE_XET = True`.

    server.commits("tester/m", "main")           # [Commit(id, parent, title, message, date, files)], newest first
    server.files("tester/m", "v1")               # {path: File(oid, size, sha256)}; sha256 is None for a regular file
    server.read("tester/m", "config.json", "main")     # bytes
    server.branches("tester/m"), server.tags("tester/m"), server.pulls("tester/m")      # {name: commit id}
    server.commit("tester/m", {"a.txt": b"1", "b.txt": None}, "main")   # somebody else's commit; None deletes; its id
    server.repos["tester/m"].private             # and `del server.repos["tester/m"]`
    server.requests                              # [Request(method, path, headers, body, status, storage)], as they came
    server.tokens["hf_reader"] = "read"          # another known token; writing with it is 403
    server.page = 2                              # entries of a listing in one answer; 1000, as at the Hub
    server.part_size = 1 << 20                   # larger files are uploaded in parts; 5 GiB

    fault = server.fail(r"POST .*/commit/", 503)       # the next request whose "METHOD path" the pattern is found in
    fault.hits                                   # how often it struck

Kinds: a status (429 tells to wait `seconds`); "cut", the connection ends before anything is done; "half", it ends
within the body, of the upload or the download; "lost", all is done, but the connection ends before the answer; "hang",
nothing for `seconds`, then "cut"; "corrupt", one byte of what is stored differs, and listings show the checksum of what
is stored; or a function, called just before the request is handled (a race). `times` may be `math.inf`; `after=n` lets
n matching requests pass first.
"""

import argparse
import contextlib
import json
import re
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from hub_api import Answer, HubApi, Request
from hub_store import Commit, File, HubError


@dataclass
class Fault:
    pattern: str
    kind: int | str | Callable[[], object]
    times: float
    after: int
    seconds: float
    hits: int = 0


class Cut(ConnectionError):
    """The connection is to end here."""


class HubServer(HubApi):
    """See the top of the file. Listens from `start()` (or `with`) to `close()`; port 0 takes a free one."""

    def __init__(self, folder: Path | str | None = None, port: int = 0, token: str = "hf_loopback"):
        self._temporary = tempfile.TemporaryDirectory(prefix="hub-", ignore_cleanup_errors=True)
        home = Path(folder or self._temporary.name).resolve()
        super().__init__(home, token)
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.closed = threading.Event()
        self._port = Port(self, port)
        self.endpoint = f"http://127.0.0.1:{self._port.server_port}"
        self.storage = f"http://localhost:{self._port.server_port}"
        self.env = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": token, "HF_HOME": str(home / "home")}
        self.env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}

    def start(self) -> "HubServer":
        threading.Thread(target=self._port.serve_forever, args=(0.005,), daemon=True).start()
        return self

    def close(self) -> None:
        self.closed.set()
        self._port.shutdown()
        self._port.server_close()
        self._temporary.cleanup()

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.close()

    def commits(self, name: str, revision: str = "main") -> list[Commit]:
        return self.repos[name].history(revision)

    def files(self, name: str, revision: str = "main") -> dict[str, File]:
        return dict(self.repos[name].at(revision).files)

    def read(self, name: str, path: str, revision: str = "main") -> bytes:
        return self.store.blob(self.files(name, revision)[path]).read_bytes()

    def branches(self, name: str) -> dict[str, str]:
        return self.repos[name].named("refs/heads/")

    def tags(self, name: str) -> dict[str, str]:
        return self.repos[name].named("refs/tags/")

    def pulls(self, name: str) -> dict[str, str]:
        return {f"refs/pr/{num}": oid for num, oid in self.repos[name].named("refs/pr/").items()}

    def commit(self, name: str, files: dict[str, bytes | None], branch: str = "main", title: str = "Change") -> str:
        """Commits regular files as somebody else would, without a request; None deletes one."""
        with self.lock:
            repo = self.repos[name]
            ref = repo.branch(branch)
            kept = {path: file for path, file in repo.at(ref).files.items() if path not in files}
            new = {path: self.store.put(data) for path, data in files.items() if data is not None}
            commit = repo.add(ref, repo.refs[ref], title, "", kept | new)
            self.store.save()
        return commit.id

    def fail(
        self, pattern: str, kind: int | str | Callable[[], object], times: float = 1, after: int = 0, seconds: float = 0
    ) -> Fault:
        """See the top of the file."""
        assert callable(kind) or kind in ("cut", "half", "lost", "hang", "corrupt") or kind in range(400, 600)
        self.faults.append(Fault(pattern, kind, times, after, seconds))
        return self.faults[-1]

    def strike(self, request: Request) -> Fault | None:
        """The fault that is to happen to this request, which is noted."""
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.hits < fault.times and re.search(fault.pattern, f"{request.method} {request.path}"):
                    if not fault.after:
                        fault.hits += 1
                        return fault
                    fault.after -= 1
        return None


class Port(ThreadingHTTPServer):
    """Ends its connections when it closes."""

    daemon_threads = True

    def __init__(self, hub: HubServer, number: int):
        super().__init__(("127.0.0.1", number), Handler)
        self.hub = hub
        self.connections: set[socket.socket] = set()

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def server_close(self):
        super().server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Port

    def answer(self) -> None:
        hub = self.server.hub
        request = Request(self.command, self.path, {key.lower(): value for key, value in self.headers.items()})
        fault = hub.strike(request)
        kind, seconds = (fault.kind, fault.seconds) if fault else ("", 0)
        try:
            self.receive(request, half=kind == "half")
            if kind in ("cut", "hang"):
                hub.closed.wait(seconds if kind == "hang" else 0)
                raise Cut
            if callable(kind):
                kind()
            request.corrupt = kind == "corrupt"
            answer = self.refusal(kind, seconds) if isinstance(kind, int) else hub.handle(request)
            if kind == "lost":
                raise Cut
            self.reply(request, answer, half=kind == "half")
        except ConnectionError:
            self.close_connection = True
        finally:
            if request.upload:
                request.upload.unlink(missing_ok=True)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    @staticmethod
    def refusal(status: int, seconds: float) -> Answer:
        error = HubError(status, "This fault was asked for")
        limits = {"RateLimit": f'"api";r=0;t={seconds:.0f}', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
        return Answer(error.content, status, error.headers | (limits if status == 429 else {}))

    def receive(self, request: Request, half: bool) -> None:
        """Reads the body, which must be read before the answer if the connection is to live on."""
        if half and self.command in ("POST", "PUT"):
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            raise Cut
        if self.command == "PUT":
            with tempfile.NamedTemporaryFile(dir=self.server.hub.store.blobs, delete=False) as file:
                request.upload = Path(file.name)
                file.writelines(self.pieces())
        else:
            request.body = b"".join(self.pieces())

    def pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                yield self.exactly(size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length", 0))
        while left:
            yield self.exactly(size := min(left, 1 << 20))
            left -= size

    def exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise Cut
        return data

    def reply(self, request: Request, answer: Answer, half: bool) -> None:
        content, headers = answer.content, answer.headers | {"X-Request-Id": secrets.token_hex(8)}
        if not isinstance(content, bytes | Path):
            content, headers["Content-Type"] = json.dumps(content).encode(), "application/json; charset=utf-8"
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        start, stop = 0, size
        if isinstance(content, Path):
            headers["Accept-Ranges"] = "bytes"
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
                start, stop = int(asked[1]), min(size, int(asked[2] or size) + 1)
                answer.status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{size}"
                if start >= size:
                    start, stop, answer.status, headers["Content-Range"] = 0, 0, 416, f"bytes */{size}"
        request.status = answer.status
        self.send_response(answer.status)
        for key, value in (headers | {"Content-Length": str(stop - start)}).items():
            self.send_header(key, value)
        self.end_headers()
        if request.method == "HEAD":
            return
        if half:
            stop = (start + stop) // 2
        if isinstance(content, Path):
            with content.open("rb") as file:
                file.seek(start)
                while start < stop:
                    self.wfile.write(piece := file.read(min(stop - start, 1 << 20)))
                    start += len(piece)
        else:
            self.wfile.write(content[start:stop])
        if half:
            raise Cut

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hugging Face Hub on this machine, to try a release on.")
    parser.add_argument("--port", type=int, default=8199)
    parser.add_argument("--folder", type=Path, help="keep all here, and find it again; without it, nothing is kept")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where it was started in the background
    with HubServer(arguments.folder, arguments.port) as server:
        for name, value in server.env.items():
            print(f"export {name}={value}")
        print(f"# namespaces to push to: {server.user}, {', '.join(server.orgs)}; end with Ctrl-C", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.closed.wait()


if __name__ == "__main__":
    main()
