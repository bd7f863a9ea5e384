"""A Hugging Face Hub on this machine, to push to and to load from: models only, real history, faults on request.

It speaks the Hub's HTTP API as the client library `huggingface_hub` uses it (checked with 1.33 and 2.4), and keeps what
it is given: content-addressed blobs, immutable commits, branches, tags, pull requests. Large files go to and come from
another host (`localhost`; the Hub is `127.0.0.1`), as at the real Hub, by signed URLs that refuse a token.

    python tests/hub_server.py --port 8199 --folder hub     # prints what to export; all is kept in ./hub

In a test:

    with HubServer() as server:                  # or HubServer(folder), which finds again what it kept there
        api = HfApi(endpoint=server.endpoint, token=server.token)       # namespaces: server.user, server.orgs
        subprocess.run(..., env=os.environ | server.env | {"HF_HOME": ...})

In the process of the test itself, Xet must be off: `huggingface_hub.constants.HF_HUB_DISABLE_XET = True`.

    server.commits("tester/m", "main")           # [Commit(id, parent, title, message, date, files)], newest first
    server.files("tester/m", "v1")               # {path: File(oid, size, sha256)}; sha256 is None for a regular file
    server.read("tester/m", "config.json", "main")     # bytes
    server.branches("tester/m"), server.tags("tester/m"), server.pulls("tester/m")      # {name: commit id}
    server.commit("tester/m", {"a.txt": b"1", "b.txt": None}, "main")   # somebody else's commit; None deletes; its id
    server.repos["tester/m"].private             # and `del server.repos["tester/m"]`
    server.requests                              # [Request(method, path, headers, body, status)], as they came
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
import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import yaml

LFS_SIZE = 10 * 2**20  # larger files are never regular
LFS_PATTERNS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx "
    "*.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz "
    "*.wasm *.xz *.zip *.zst *tfevents*"
)
FILTER = "filter=lfs diff=lfs merge=lfs -text"
MODEL = r"/api/models/(?P<name>[^/]+/[^/]+)"
REV = r"/(?P<rev>refs/pr/\d+|[^/]+)"
UPLOAD = r"/storage/(?P<name>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"


@dataclass(frozen=True)
class File:
    oid: str  # git's, of the file or of its LFS pointer
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Commit:
    parent: str | None
    title: str
    message: str
    date: str
    files: dict[str, File]

    @cached_property
    def id(self) -> str:
        return hashlib.sha1(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass
class Discussion:
    num: int
    title: str
    created: str
    status: str
    base: str | None  # the commit that a pull request starts from; None for a mere discussion
    merged: str | None = None


@dataclass
class Repo:
    name: str
    private: bool
    created: str
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # full name -> commit id
    discussions: list[Discussion] = field(default_factory=list)
    uploads: dict[str, str] = field(default_factory=dict)  # sha256 that was promised -> sha256 that was stored

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag, a full ref or a commit id names."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.commits[self.refs[name]]
        if revision not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[revision]

    def named(self, prefix: str) -> dict[str, str]:
        return {name.removeprefix(prefix): oid for name, oid in self.refs.items() if name.startswith(prefix)}

    def branch(self, revision: str) -> str:
        """The full name of what can be committed to: a branch or a pull request."""
        for name in (f"refs/heads/{revision}", revision):
            if name in self.refs and not name.startswith("refs/tags/"):
                return name
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add(self, ref: str, parent: str | None, title: str, message: str, files: dict[str, File]) -> Commit:
        commit = Commit(parent, title, message, now(), files)
        self.commits[commit.id] = commit
        self.refs[ref] = commit.id
        return commit


@dataclass
class Request:
    method: str
    path: str  # as sent, with the query
    headers: dict[str, str]  # names in lower case
    body: bytes = b""  # without that of PUT, which is in a file
    upload: Path | None = None
    corrupt: bool = False
    status: int | None = None  # of the answer; None when there was none

    @property
    def query(self) -> dict[str, str]:
        return {key: values[-1] for key, values in parse_qs(urlsplit(self.path).query).items()}

    @property
    def storage(self) -> bool:
        """Whether it came to the storage of large files."""
        return self.path.startswith("/storage/")

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Fault:
    pattern: str
    kind: int | str | Callable[[], object]
    times: float
    after: int
    seconds: float
    hits: int = 0


@dataclass
class Answer:
    content: Any = None  # a Path is sent as a file, bytes as they are, anything else as JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **content: Any):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer({"error": message} | content, status, headers)


class Cut(ConnectionError):
    """The connection is to end here."""


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def read_card(text: str) -> dict:
    """The metadata at the top of a model card. Raises HubError as the Hub does for what it refuses."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text.lstrip("\ufeff"), re.DOTALL)
    try:
        card = yaml.safe_load(match[1]) if match else {}
        errors = [] if isinstance(card := card or {}, dict) else ["YAML metadata must be an object"]
    except yaml.YAMLError as error:
        card, errors = {}, [f"YAML Metadata Error: {' '.join(str(error).split())}"]
    if not errors:
        kinds = dict.fromkeys(("library_name", "pipeline_tag", "license_name", "license_link"), "a string")
        kinds |= dict.fromkeys(("license", "language", "datasets", "base_model"), "a string or an array of strings")
        kinds |= {"tags": "an array of strings"}
        for name in kinds.keys() & card.keys():
            value, kind = card[name], kinds[name]
            array = isinstance(value, list) and all(isinstance(item, str) for item in value)
            if not (array if kind.startswith("an") else isinstance(value, str) or (array and "array" in kind)):
                errors.append(f'"{name}" must be {kind}')
        try:
            for model in card.get("model-index", []):
                assert isinstance(model["name"], str)
                for result in model["results"]:
                    assert all([result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]])
                    assert all(metric["type"] and "value" in metric for metric in result["metrics"])
        except (AssertionError, KeyError, TypeError) as error:
            errors.append(f'"model-index" lacks a name, task, dataset or metric ({error})')
    if errors:
        raise HubError(400, "Invalid metadata in README.md", errors=[{"message": e} for e in errors], warnings=[])
    return card


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []


def route(method: str, path: str):
    def register(function):
        ROUTES.append((method, re.compile(path), function))
        return function

    return register


class HubServer:
    """See the top of the file. Listens from `start()` (or `with`) to `close()`; port 0 takes a free one."""

    def __init__(self, folder: Path | str | None = None, port: int = 0, token: str = "hf_loopback"):
        self.user, self.orgs = "tester", ["lab"]
        self.token = token
        self.tokens = {token: "write"}
        self.page, self.part_size = 1000, 5 * 2**30
        self.requests: list[Request] = []
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.closed = threading.Event()
        self._lock = threading.RLock()
        self._secret = secrets.token_hex()
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="hub-")
        self._folder = Path(folder or self._temporary.name)
        self._blobs = self._folder / "blobs"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._load()
        self._port = Port(self, port)
        self.endpoint = f"http://127.0.0.1:{self._port.server_port}"
        self.storage = f"http://localhost:{self._port.server_port}"
        self.env = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": token}
        self.env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def start(self) -> "HubServer":
        threading.Thread(target=self._port.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def close(self) -> None:
        self.closed.set()
        self._port.shutdown()
        self._port.server_close()
        if self._temporary:
            self._temporary.cleanup()

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.close()

    def commits(self, name: str, revision: str = "main") -> list[Commit]:
        repo = self.repos[name]
        found = [repo.at(revision)]
        while found[-1].parent:
            found.append(repo.commits[found[-1].parent])
        return found

    def files(self, name: str, revision: str = "main") -> dict[str, File]:
        return dict(self.repos[name].at(revision).files)

    def read(self, name: str, path: str, revision: str = "main") -> bytes:
        return self._blob(self.files(name, revision)[path]).read_bytes()

    def branches(self, name: str) -> dict[str, str]:
        return self.repos[name].named("refs/heads/")

    def tags(self, name: str) -> dict[str, str]:
        return self.repos[name].named("refs/tags/")

    def pulls(self, name: str) -> dict[str, str]:
        return {f"refs/pr/{num}": oid for num, oid in self.repos[name].named("refs/pr/").items()}

    def commit(self, name: str, files: dict[str, bytes | None], branch: str = "main", title: str = "Change") -> str:
        """Commits regular files as somebody else would, without a request; None deletes one."""
        with self._lock:
            repo = self.repos[name]
            ref = repo.branch(branch)
            kept = {path: file for path, file in repo.at(ref).files.items() if path not in files}
            new = {path: self._store(data) for path, data in files.items() if data is not None}
            return repo.add(ref, repo.refs[ref], title, "", kept | new).id

    def fail(
        self,
        pattern: str,
        kind: int | str | Callable[[], object],
        times: float = 1,
        after: int = 0,
        seconds: float = 0,
    ) -> Fault:
        assert callable(kind) or kind in ("cut", "half", "lost", "hang", "corrupt") or kind in range(400, 600)
        self.faults.append(Fault(pattern, kind, times, after, seconds))
        return self.faults[-1]

    def strike(self, request: Request) -> Fault | None:
        """The fault that is to happen to this request."""
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.hits < fault.times and re.search(fault.pattern, f"{request.method} {request.path}"):
                    if not fault.after:
                        fault.hits += 1
                        return fault
                    fault.after -= 1
        return None

    def handle(self, request: Request) -> Answer:
        method = "GET" if request.method == "HEAD" else request.method
        path = urlsplit(request.path).path
        for wanted, pattern, function in ROUTES:
            if wanted == method and (match := pattern.fullmatch(path)):
                names = {key: unquote(value or "") for key, value in match.groupdict().items()}
                with self._lock:
                    try:
                        self._authenticate(request)
                        answer = function(self, request, **names)
                    except HubError as error:
                        answer = error.answer
                    if method != "GET":
                        self._save()
                return answer
        return HubError(404, f"No such page: {request.method} {path}").answer

    def _load(self) -> None:
        path = self._folder / "hub.json"
        for name, fields in json.loads(path.read_text()).items() if path.exists() else ():
            repo = self.repos[name] = Repo(**fields)
            repo.discussions = [Discussion(**item) for item in fields["discussions"]]
            repo.commits = {
                oid: Commit(**item | {"files": {path: File(**file) for path, file in item["files"].items()}})
                for oid, item in fields["commits"].items()
            }

    def _save(self) -> None:
        if self._temporary is None:
            path = self._folder / "hub.json"
            path.with_suffix(".new").write_text(json.dumps({name: asdict(repo) for name, repo in self.repos.items()}))
            path.with_suffix(".new").replace(path)

    def _blob(self, file: File) -> Path:
        return self._blobs / (file.sha256 or file.oid)

    def _store(self, data: bytes) -> File:
        file = File(git_sha1(data), len(data))
        self._blob(file).write_bytes(data)
        return file

    def _signed(self, origin: str, path: str, **query: str) -> str:
        signature = hashlib.sha256(f"{self._secret} {path}".encode()).hexdigest()
        return f"{origin}{path}?{urlencode(query | {'signature': signature})}"

    def _authenticate(self, request: Request) -> None:
        """Checks what is sent: a known token to the Hub, a signature and nothing else to the storage."""
        authorization = request.headers.get("authorization")
        path = urlsplit(request.path).path
        if request.storage or path.startswith("/complete/"):
            if request.query.get("signature") != self._signed("", path).partition("signature=")[2]:
                raise HubError(403, "SignatureDoesNotMatch")
            if request.storage and authorization:
                raise HubError(400, "Only one auth mechanism allowed")
        elif authorization and authorization.removeprefix("Bearer ") not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")

    def _role(self, request: Request) -> str | None:
        return self.tokens.get(request.headers.get("authorization", "").removeprefix("Bearer "))

    def _may_write(self, request: Request, name: str) -> None:
        role = self._role(request)
        if role is None:
            raise HubError(401, "Invalid username or password.")
        if role != "write" or name.split("/")[0] not in (self.user, *self.orgs):
            raise HubError(403, f"You don't have the required permissions to write to {name}")

    def _repo(self, request: Request, name: str) -> Repo:
        """The repo, when the sender may do what is asked with it: GET reads, the rest writes."""
        role = self._role(request)
        repo = self.repos.get(name)
        if repo is None or (repo.private and role is None):
            if role is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if request.method not in ("GET", "HEAD"):
            self._may_write(request, name)
        return repo

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Answer:
        role = self._role(request)
        if role is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name, "fullname": name, "roleInOrg": "admin"} for name in self.orgs]
        auth = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": role}}
        return Answer({"type": "user", "name": self.user, "fullname": self.user, "orgs": orgs, "auth": auth})

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Answer:
        card = read_card(request.json()["content"])
        warnings = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
        return Answer({"errors": [], "warnings": warnings})

    @route("POST", "/api/repos/create")
    def _create_repo(self, request: Request) -> Answer:
        asked = request.json()
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        self._may_write(request, name)
        if asked.get("type") not in (None, "model"):
            raise HubError(400, "Only models are kept here")
        content = {"url": f"{self.endpoint}/{name}", "name": name}
        if name in self.repos:
            raise HubError(409, "You already created this model repo", **content)
        private = bool(asked.get("private") or asked.get("visibility") == "private")
        repo = self.repos[name] = Repo(name, private, now())
        attributes = "".join(f"{pattern} {FILTER}\n" for pattern in LFS_PATTERNS.split())
        repo.add("refs/heads/main", None, "initial commit", "", {".gitattributes": self._store(attributes.encode())})
        return Answer(content)

    @route("DELETE", "/api/repos/delete")
    def _delete_repo(self, request: Request) -> Answer:
        asked = request.json()
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        self._repo(request, name)
        del self.repos[name]
        return Answer({})

    @route("GET", MODEL + r"(?:/revision" + REV + ")?")
    def _info(self, request: Request, name: str, rev: str) -> Answer:
        repo = self._repo(request, name)
        commit = repo.at(rev or "main")
        readme = commit.files.get("README.md")
        card = read_card(self._blob(readme).read_text(errors="replace")) if readme else {}
        siblings: list[dict] = [{"rfilename": path} for path in sorted(commit.files)]
        for sibling in siblings if "blobs" in request.query else ():
            file = commit.files[sibling["rfilename"]]
            sibling |= {"blobId": file.oid, "size": file.size} | self._lfs(file, "sha256")
        content = {"id": name, "modelId": name, "author": name.split("/")[0], "sha": commit.id, "siblings": siblings}
        content |= {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        content |= {"createdAt": repo.created, "lastModified": commit.date, "cardData": card, "spaces": []}
        content |= {key: card[key] for key in ("tags", "pipeline_tag", "library_name") if key in card}
        return Answer(content)

    @route("GET", MODEL + "/auth-check(?P<write>/write)?")
    def _auth_check(self, request: Request, name: str, write: str) -> Answer:
        self._repo(request, name)
        if write:
            self._may_write(request, name)
        return Answer({})

    @staticmethod
    def _lfs(file: File, oid: str) -> dict:
        if not file.sha256:
            return {}
        size = len(pointer(file.sha256, file.size))
        return {"lfs": {oid: file.sha256, "size": file.size, "pointerSize": size}}

    def _paged(self, request: Request, entries: list) -> Answer:
        """The page of entries that the query's cursor asks for, and in the `Link` header where the next is."""
        start = int(request.query.get("cursor", 0))
        stop = start + min(self.page, int(request.query.get("limit", self.page)))
        query = urlencode(request.query | {"cursor": str(stop)})
        link = f'<{self.endpoint}{urlsplit(request.path).path}?{query}>; rel="next"'
        return Answer(entries[start:stop], headers={"Link": link} if stop < len(entries) else {})

    def _entries(self, repo: Repo, commit: Commit, expand: bool) -> dict[str, dict]:
        """What the Hub tells of each file and folder of the commit."""
        files: dict[str, dict] = {
            path: {"type": "file", "oid": file.oid, "size": file.size, "path": path} | self._lfs(file, "oid")
            for path, file in commit.files.items()
        }
        parents = {str(parent) for path in files for parent in list(Path(path).parents)[:-1]}
        for folder in parents:
            inside = sorted(f"{path} {file['oid']}" for path, file in files.items() if path.startswith(f"{folder}/"))
            oid = hashlib.sha1("\n".join(inside).encode()).hexdigest()
            files[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
        if expand:
            for entry in files.values():
                entry["lastCommit"] = {"id": commit.id, "title": commit.title, "date": commit.date}
        return dict(sorted(files.items()))

    @route("GET", MODEL + "/tree" + REV + "(?:/(?P<path>.+))?")
    def _tree(self, request: Request, name: str, rev: str, path: str) -> Answer:
        repo = self._repo(request, name)
        commit = repo.at(rev)
        entries = self._entries(repo, commit, request.query.get("expand") == "true")
        if path and entries.get(path, {}).get("type") != "directory":
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        below = f"{path}/" if path else ""
        deep = request.query.get("recursive") == "true"
        inside = [
            entry
            for at, entry in entries.items()
            if at.startswith(below) and (deep or "/" not in at.removeprefix(below))
        ]
        return self._paged(request, inside)

    @route("POST", MODEL + "/paths-info" + REV)
    def _paths_info(self, request: Request, name: str, rev: str) -> Answer:
        form = parse_qs(request.body.decode())
        repo = self._repo(request, name)
        entries = self._entries(repo, repo.at(rev), form.get("expand") == ["true"])
        return Answer([entries[path] for path in form.get("paths", []) if path in entries])

    @route("GET", MODEL + "/refs")
    def _refs(self, request: Request, name: str) -> Answer:
        repo = self._repo(request, name)

        def listed(prefix: str, label: str = "") -> list[dict]:
            found = repo.named(prefix).items()
            return [{"name": label + key, "ref": prefix + key, "targetCommit": oid} for key, oid in found]

        content = {"branches": listed("refs/heads/"), "tags": listed("refs/tags/"), "converts": []}
        return Answer(content | {"pullRequests": listed("refs/pr/", "refs/pr/")})

    @route("GET", MODEL + "/commits" + REV)
    def _commits(self, request: Request, name: str, rev: str) -> Answer:
        self._repo(request, name).at(rev)
        listed = [
            {
                "id": one.id,
                "title": one.title,
                "message": one.message,
                "date": one.date,
                "authors": [{"user": self.user}],
            }
            for one in self.commits(name, rev)
        ]
        return self._paged(request, listed)

    @route("POST", MODEL + "/(?P<kind>tag|branch)" + REV)
    def _create_ref(self, request: Request, name: str, kind: str, rev: str) -> Answer:
        repo = self._repo(request, name)
        asked = request.json()
        if kind == "tag":
            ref, target = f"refs/tags/{asked['tag']}", repo.at(rev)
        else:
            ref, target = f"refs/heads/{rev}", repo.at(asked.get("startingPoint", "main"))
        if ref in repo.refs:
            raise HubError(409, "Reference already exists")
        repo.refs[ref] = target.id
        return Answer({})

    @route("DELETE", MODEL + "/(?P<kind>tag|branch)" + REV)
    def _delete_ref(self, request: Request, name: str, kind: str, rev: str) -> Answer:
        ref = f"refs/{'tags' if kind == 'tag' else 'heads'}/{rev}"
        if ref == "refs/heads/main":
            raise HubError(403, "Cannot delete the main branch")
        if self._repo(request, name).refs.pop(ref, None) is None:
            raise HubError(404, f"{ref} does not exist", "RevisionNotFound")
        return Answer({})

    @route("POST", MODEL + "/preupload" + REV)
    def _preupload(self, request: Request, name: str, rev: str) -> Answer:
        repo = self._repo(request, name)
        present = repo.at(rev).files
        patterns = self._lfs_patterns(present)
        answers = []
        for asked in request.json()["files"]:
            path, size, sample = asked["path"], asked["size"], base64.b64decode(asked["sample"])
            large = size > LFS_SIZE or b"\0" in sample or any(fnmatch(path, pattern) for pattern in patterns)
            file = present.get(path)
            oid = (file.sha256 or file.oid) if file else None
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer({"files": answers, "commitOid": repo.at(rev).id})

    def _lfs_patterns(self, files: dict[str, File]) -> list[str]:
        attributes = files.get(".gitattributes")
        lines = self._blob(attributes).read_text().splitlines() if attributes else []
        return [line.split()[0] for line in lines if "filter=lfs" in line]

    @route("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def _lfs_batch(self, request: Request, name: str) -> Answer:
        repo = self._repo(request, name)
        objects = []
        for asked in request.json()["objects"]:
            oid, size = asked["oid"], asked["size"]
            entry: dict = {"oid": oid, "size": size}
            objects.append(entry)
            if repo.uploads.get(oid) == oid:
                continue
            path = f"/storage/{name}/{oid}"
            upload: dict = {"href": self._signed(self.storage, path)}
            if size > self.part_size:
                parts = range(1, -(-size // self.part_size) + 1)
                header = {str(part): self._signed(self.storage, path, part=str(part)) for part in parts}
                upload = {"href": self._signed(self.endpoint, f"/complete/{name}/{oid}")}
                upload["header"] = header | {"chunk_size": str(self.part_size)}
            verify = {"href": f"{self.endpoint}/{name}.git/info/lfs/objects/verify"}
            entry |= {"authenticated": True, "actions": {"upload": upload, "verify": verify}}
        return Answer({"transfer": "basic", "objects": objects})

    @route("PUT", UPLOAD)
    def _put(self, request: Request, name: str, oid: str) -> Answer:
        assert request.upload
        if part := request.query.get("part"):
            etag = file_sha256(request.upload)
            request.upload.replace(self._blobs / f"{oid}.{part}")
        else:
            etag = self._keep(request, name, oid, request.upload)
        return Answer(b"", headers={"ETag": f'"{etag}"'})

    @route("POST", r"/complete/(?P<name>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})")
    def _complete(self, request: Request, name: str, oid: str) -> Answer:
        whole = self._blobs / f"{oid}.{secrets.token_hex(4)}"
        with whole.open("wb") as target:
            for part in request.json()["parts"]:
                path = self._blobs / f"{oid}.{part['partNumber']}"
                if not path.exists() or file_sha256(path) != part["etag"].strip('"'):
                    raise HubError(400, f"Part {part['partNumber']} was not uploaded")
                target.write(path.read_bytes())
                path.unlink()
        self._keep(request, name, oid, whole)
        return Answer({})

    def _keep(self, request: Request, name: str, oid: str, path: Path) -> str:
        """Takes the file in as the object that was promised as `oid`, when it is that."""
        if file_sha256(path) != oid:
            path.unlink()
            raise HubError(400, "The Content-SHA256 you specified did not match what we received")
        if request.corrupt:
            flip(path)
        stored = file_sha256(path)
        path.replace(self._blobs / stored)
        self.repos[name].uploads[oid] = stored
        return stored

    @route("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/verify")
    def _verify(self, request: Request, name: str) -> Answer:
        repo, asked = self._repo(request, name), request.json()
        stored = repo.uploads.get(asked["oid"])
        if stored is None or (self._blobs / stored).stat().st_size != asked["size"]:
            raise HubError(404, f"Object {asked['oid']} was not uploaded")
        return Answer({})

    @route("POST", MODEL + "/commit" + REV)
    def _commit(self, request: Request, name: str, rev: str) -> Answer:
        repo = self._repo(request, name)
        ref = repo.branch(rev)
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        parent, title = header["value"].get("parentCommit"), header["value"]["summary"]
        create_pr = "create_pr" in request.query
        if parent and not create_pr and not repo.refs[ref].startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        head = next((oid for oid in repo.commits if parent and oid.startswith(parent)), repo.refs[ref])
        files = self._changed(repo, repo.commits[head].files, operations, request.corrupt)
        url = None
        if create_pr:
            pull = self._discuss(repo, title, base=head)
            pull.status, ref, url = "open", f"refs/pr/{pull.num}", f"{self.endpoint}/{name}/discussions/{pull.num}"
        commit = repo.add(ref, head, title, header["value"].get("description", ""), files)
        content = {"success": True, "commitOid": commit.id, "commitUrl": f"{self.endpoint}/{name}/commit/{commit.id}"}
        return Answer(content | {"hookOutput": "", "pullRequestUrl": url})

    def _changed(self, repo: Repo, files: dict[str, File], operations: list[dict], corrupt: bool) -> dict[str, File]:
        """The files after the operations of a commit."""
        files = dict(files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"].rstrip("/")
            if any(part in ("", ".", "..", ".git") for part in path.split("/")):
                raise HubError(400, f"Invalid path: {path}")
            if key == "file":
                data = base64.b64decode(value["content"])
                if path == "README.md":
                    read_card(data.decode())
                if corrupt and data:
                    data, corrupt = data[:-1] + bytes([data[-1] ^ 1]), False
                files[path] = self._store(data)
            elif key == "lfsFile":
                stored = repo.uploads.get(value["oid"])
                if stored is None:
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
                size = (self._blobs / stored).stat().st_size
                files[path] = File(git_sha1(pointer(stored, size)), size, stored)
            elif key in ("deletedFile", "deletedFolder"):
                gone = [at for at in files if at == path or (key == "deletedFolder" and at.startswith(f"{path}/"))]
                if not gone:
                    raise HubError(404, f"{path} does not exist", "EntryNotFound")
                for at in gone:
                    del files[at]
            else:
                raise HubError(400, f"Unknown operation: {key}")
        untold = self._untold(files)
        if untold:
            attributes = files.get(".gitattributes")
            text = self._blob(attributes).read_text() if attributes else ""
            files[".gitattributes"] = self._store((text + "".join(f"{path} {FILTER}\n" for path in untold)).encode())
        return files

    def _untold(self, files: dict[str, File]) -> list[str]:
        """Large files that .gitattributes does not say are large: the Hub adds them there."""
        patterns = self._lfs_patterns(files)
        large = [path for path, file in files.items() if file.sha256]
        return [path for path in large if not any(fnmatch(path, pattern) for pattern in patterns)]

    @staticmethod
    def _discuss(repo: Repo, title: str, base: str | None) -> Discussion:
        status = "draft" if base else "open"
        repo.discussions.append(Discussion(len(repo.discussions) + 1, title, now(), status, base))
        if base:
            repo.refs[f"refs/pr/{len(repo.discussions)}"] = base
        return repo.discussions[-1]

    def _told(self, repo: Repo, one: Discussion) -> dict:
        author, pull = {"name": self.user}, one.base is not None
        content = {"num": one.num, "title": one.title, "status": one.status, "isPullRequest": pull, "author": author}
        content |= {"createdAt": one.created, "repo": {"name": repo.name, "type": "model"}, "filesWithConflicts": []}
        changes = {"base": "refs/heads/main", "mergeCommitId": one.merged}
        events = []
        if pull:
            for commit in self.commits(repo.name, f"refs/pr/{one.num}"):
                if commit.id == one.base:
                    break
                data = {"subject": commit.title, "oid": commit.id}
                event = {"id": commit.id, "type": "commit", "createdAt": commit.date, "author": author, "data": data}
                events.insert(0, event)
        return content | {"changes": changes, "events": events}

    @route("POST", MODEL + "/discussions")
    def _create_discussion(self, request: Request, name: str) -> Answer:
        repo, asked = self._repo(request, name), request.json()
        base = repo.refs["refs/heads/main"] if asked.get("pullRequest") else None
        return Answer(self._told(repo, self._discuss(repo, asked["title"], base)))

    @route("GET", MODEL + "/discussions")
    def _discussions(self, request: Request, name: str) -> Answer:
        repo = self._repo(request, name)
        told = [self._told(repo, one) for one in repo.discussions]
        return Answer({"discussions": told, "count": len(told), "start": 0})

    @route("GET", MODEL + r"/discussions/(?P<num>\d+)")
    def _discussion(self, request: Request, name: str, num: str) -> Answer:
        repo = self._repo(request, name)
        if int(num) not in range(1, len(repo.discussions) + 1):
            raise HubError(404, "Discussion not found")
        return Answer(self._told(repo, repo.discussions[int(num) - 1]))

    @route("POST", MODEL + r"/discussions/(?P<num>\d+)/(?P<action>merge|status)")
    def _change_discussion(self, request: Request, name: str, num: str, action: str) -> Answer:
        repo = self._repo(request, name)
        one = repo.discussions[int(num) - 1]
        if action == "status":
            one.status = request.json()["status"]
            event = {"id": num, "type": "status-change", "createdAt": now(), "author": {"name": self.user}}
            return Answer({"newStatus": event | {"data": {"status": one.status}}})
        if one.base is None or one.status != "open":
            raise HubError(400, "Only an open pull request can be merged")
        base, theirs, ours = repo.at(one.base).files, repo.at(f"refs/pr/{num}").files, repo.at("main").files
        changed = {path for path in base.keys() | theirs.keys() if base.get(path) != theirs.get(path)}
        if any(ours.get(path) not in (base.get(path), theirs.get(path)) for path in changed):
            raise HubError(409, "This pull request has conflicts")
        files = {path: file for path, file in ours.items() if path not in changed}
        files |= {path: theirs[path] for path in changed if path in theirs}
        commit = repo.add("refs/heads/main", repo.refs["refs/heads/main"], f"{one.title} (#{num})", "", files)
        one.status, one.merged = "merged", commit.id
        return Answer({})

    @route("GET", r"/(?P<name>[^/]+/[^/]+)/(?:resolve|raw)" + REV + "/(?P<path>.+)")
    def _resolve(self, request: Request, name: str, rev: str, path: str) -> Answer:
        commit = self._repo(request, name).at(rev)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            error = HubError(404, f"Entry not found: {path}", "EntryNotFound")
            error.answer.headers |= headers
            raise error
        file = commit.files[path]
        if file.sha256 is None:
            return Answer(self._blob(file), headers=headers | {"ETag": f'"{file.oid}"'})
        location = self._signed(self.storage, f"/storage/{file.sha256}")
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size), "Location": location}
        return Answer(b"", 302, headers | linked)

    @route("GET", "/storage/(?P<oid>[0-9a-f]{64})")
    def _object(self, request: Request, oid: str) -> Answer:
        return Answer(self._blobs / oid, headers={"ETag": f'"{oid}"'})


class Port(ThreadingHTTPServer):
    """Closes its connections when it closes."""

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

    def server_close(self):
        super().server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Port

    def answer(self) -> None:
        hub = self.server.hub
        headers = {key.lower(): value for key, value in self.headers.items()}
        request = Request(self.command, self.path, headers)
        fault = hub.strike(request)
        kind = fault.kind if fault else None
        try:
            self.receive(request, half=kind == "half")
            if kind == "hang" and fault:
                hub.closed.wait(fault.seconds)
            if kind in ("cut", "hang"):
                raise Cut
            if callable(kind):
                kind()
            request.corrupt = kind == "corrupt"
            if fault and isinstance(kind, int):
                answer = HubError(kind, "This fault was asked for").answer
                limit = {"Retry-After": f"{fault.seconds:.0f}", "RateLimit": f'"api";r=0;t={fault.seconds:.0f}'}
                answer.headers |= (
                    limit | {"RateLimit-Policy": '"fixed window";"api";q=500;w=300'} if kind == 429 else {}
                )
            else:
                answer = hub.handle(request)
            if kind == "lost":
                raise Cut
            request.status = answer.status
            self.reply(answer, half=kind == "half")
        except ConnectionError:
            self.close_connection = True
        finally:
            if request.upload:
                request.upload.unlink(missing_ok=True)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def receive(self, request: Request, half: bool) -> None:
        """Reads the body, which a keep-alive connection must have had read before an answer."""
        pieces = self.pieces()
        if half and self.command in ("POST", "PUT"):
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            raise Cut
        if self.command == "PUT":
            handle, name = tempfile.mkstemp(dir=self.server.hub._blobs, suffix=".part")
            request.upload = Path(name)
            with open(handle, "wb") as file:
                file.writelines(pieces)
        else:
            request.body = b"".join(pieces)

    def pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.exactly(self.rfile.readline()).split(b";")[0], 16):
                yield self.exactly(self.rfile.read(size), size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length", 0))
        while left:
            size = min(left, 1 << 20)
            yield self.exactly(self.rfile.read(size), size)
            left -= size

    @staticmethod
    def exactly(data: bytes, size: int = 1) -> bytes:
        if len(data) < size:
            raise Cut
        return data

    def reply(self, answer: Answer, half: bool) -> None:
        content, headers = answer.content, dict(answer.headers)
        if not isinstance(content, bytes | Path):
            content, headers["Content-Type"] = json.dumps(content).encode(), "application/json; charset=utf-8"
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        start, stop = 0, size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if isinstance(content, Path) else None
        if asked:
            start, stop = int(asked[1]), min(size, int(asked[2] or size) + 1)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}" if start < size else f"bytes */{size}"
            answer.status = 206 if start < size else 416
            start = min(start, stop)
        self.send_response(answer.status)
        headers |= {"Content-Length": str(stop - start), "Accept-Ranges": "bytes"}
        for key, value in (headers | {"X-Request-Id": secrets.token_hex(8)}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = (start + stop) // 2 if half else stop
        with content.open("rb") if isinstance(content, Path) else contextlib.nullcontext() as file:
            if file:
                file.seek(start)
            while start < stop:
                piece = file.read(min(stop - start, 1 << 20)) if file else content[start:stop]
                self.wfile.write(piece)
                start += len(piece)
        if half:
            raise Cut

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hugging Face Hub on this machine, to try a release on.")
    parser.add_argument("--port", type=int, default=8199)
    parser.add_argument("--folder", type=Path, help="keep all here, and find it again; without it, nothing is kept")
    arguments = parser.parse_args()
    with HubServer(arguments.folder, arguments.port) as server:
        for name, value in server.env.items():
            print(f"export {name}={value}")
        print(f"# namespaces to push to: {server.user}, {', '.join(server.orgs)}; end with Ctrl-C", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.closed.wait()


if __name__ == "__main__":
    main()
