"""What a Hub keeps: repositories of models with their commits, refs and pull requests, and blobs by their checksums."""

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

LFS_SIZE = 10 * 2**20  # larger files are never regular
LFS_PATTERNS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx "
    "*.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz "
    "*.wasm *.xz *.zip *.zst *tfevents*"
)


class HubError(Exception):
    """An answer other than success; `code` goes into the header that huggingface_hub makes its exceptions from."""

    def __init__(self, status: int, message: str, code: str | None = None, **content: Any):
        super().__init__(message)
        self.status, self.content = status, {"error": message} | content
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass(frozen=True)
class File:
    oid: str  # git's, of the file or of its LFS pointer
    size: int
    sha256: str | None = None

    @property
    def checksum(self) -> str:
        """What the Hub compares contents by."""
        return self.sha256 or self.oid


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

    def history(self, revision: str) -> list[Commit]:
        found = [self.at(revision)]
        while found[-1].parent:
            found.append(self.commits[found[-1].parent])
        return found

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

    def discuss(self, title: str, base: str | None) -> Discussion:
        """Opens a discussion, or with `base` a pull request."""
        num = len(self.discussions) + 1
        self.discussions.append(Discussion(num, title, now(), "draft" if base else "open", base))
        if base:
            self.refs[f"refs/pr/{num}"] = base
        return self.discussions[-1]

    def discussion(self, num: str) -> Discussion:
        if not 1 <= int(num) <= len(self.discussions):
            raise HubError(404, "Discussion not found")
        return self.discussions[int(num) - 1]

    def merge(self, pull: Discussion) -> None:
        if pull.base is None or pull.status != "open":
            raise HubError(400, "Only an open pull request can be merged")
        base, theirs, ours = (self.at(rev).files for rev in (pull.base, f"refs/pr/{pull.num}", "main"))
        changed = {path for path in base.keys() | theirs.keys() if base.get(path) != theirs.get(path)}
        if any(ours.get(path) not in (base.get(path), theirs.get(path)) for path in changed):
            raise HubError(409, "This pull request has conflicts")
        files = {path: file for path, file in ours.items() if path not in changed}
        files |= {path: theirs[path] for path in changed & theirs.keys()}
        main = "refs/heads/main"
        pull.merged = self.add(main, self.refs[main], f"{pull.title} (#{pull.num})", "", files).id
        pull.status = "merged"


class Store:
    """All of it, in a folder. Repositories are changed in place; `save` makes the changes last."""

    def __init__(self, folder: Path):
        self.repos: dict[str, Repo] = {}
        self.blobs = folder / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self._index = folder / "hub.json"
        for name, fields in json.loads(self._index.read_text()).items() if self._index.exists() else ():
            repo = self.repos[name] = Repo(**fields)
            repo.discussions = [Discussion(**item) for item in fields["discussions"]]
            for oid, item in fields["commits"].items():
                files = {path: File(**file) for path, file in item["files"].items()}
                repo.commits[oid] = Commit(**item | {"files": files})

    def save(self) -> None:
        new = self._index.with_suffix(".new")
        new.write_text(json.dumps({name: asdict(repo) for name, repo in self.repos.items()}))
        new.replace(self._index)

    def create(self, name: str, private: bool) -> None:
        """A repository as the Hub makes it: its first commit has the .gitattributes that name large files."""
        repo = self.repos[name] = Repo(name, private, now())
        attributes = attributes_of(LFS_PATTERNS.split())
        repo.add("refs/heads/main", None, "initial commit", "", {".gitattributes": self.put(attributes.encode())})

    def blob(self, file: File) -> Path:
        return self.blobs / file.checksum

    def put(self, data: bytes) -> File:
        file = File(git_sha1(data), len(data))
        self.blob(file).write_bytes(data)
        return file

    def take(self, repo: Repo, oid: str, path: Path, corrupt: bool) -> None:
        """Moves an uploaded file in as the object that was promised as `oid`, when it is that."""
        if file_sha256(path) != oid:
            path.unlink()
            raise HubError(400, "The Content-SHA256 you specified did not match what we received")
        if corrupt:
            with path.open("r+b") as file:
                first = file.read(1)
                file.seek(0)
                file.write(bytes([first[0] ^ 1]))
        repo.uploads[oid] = stored = file_sha256(path)
        path.replace(self.blobs / stored)

    def large(self, files: dict[str, File], path: str) -> bool:
        """Whether .gitattributes says that the path is kept as an LFS file."""
        attributes = files.get(".gitattributes")
        lines = self.blob(attributes).read_text().splitlines() if attributes else []
        return any(fnmatch(path, line.split()[0]) for line in lines if "filter=lfs" in line)

    def changed(self, repo: Repo, files: dict[str, File], operations: list[dict], corrupt: bool) -> dict[str, File]:
        """The files after the operations of a commit, as its request has them."""
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
                files[path] = self.put(data)
            elif key == "lfsFile":
                if (stored := repo.uploads.get(value["oid"])) is None:
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
                size = (self.blobs / stored).stat().st_size
                files[path] = File(git_sha1(pointer(stored, size)), size, stored)
            elif key in ("deletedFile", "deletedFolder"):
                gone = [at for at in files if at == path or (key == "deletedFolder" and at.startswith(f"{path}/"))]
                if not gone:
                    raise HubError(404, f"{path} does not exist", "EntryNotFound")
                for at in gone:
                    del files[at]
            else:
                raise HubError(400, f"Unknown operation: {key}")
        if untold := [path for path, file in files.items() if file.sha256 and not self.large(files, path)]:
            attributes = files.get(".gitattributes")
            text = self.blob(attributes).read_text() if attributes else ""
            files[".gitattributes"] = self.put((text + attributes_of(untold)).encode())
        return files


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def attributes_of(patterns: Iterable[str]) -> str:
    return "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in patterns)


LICENSES = ("apache-2.0", "mit", "llama3.1", "openrail++", "other")  # a few of those that the Hub knows


def read_card(text: str) -> dict:
    """The metadata at the top of a model card. Raises HubError with what the Hub would refuse in it."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text.lstrip("\ufeff"), re.DOTALL)
    try:
        card = (yaml.safe_load(match[1]) if match else None) or {}
        errors = [] if isinstance(card, dict) else ["YAML metadata must be an object"]
    except yaml.YAMLError as error:
        card, errors = {}, [f"YAML Metadata Error: {' '.join(str(error).split())}"]
    kinds = dict.fromkeys(("library_name", "pipeline_tag", "license_name", "license_link"), "a string")
    kinds |= dict.fromkeys(("license", "language", "datasets", "base_model"), "a string or an array of strings")
    kinds |= {"tags": "an array of strings"}
    for name, kind in kinds.items() if not errors else ():
        value = card.get(name, [] if "array" in kind else "")
        array = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if not (("array" in kind and array) or ("a string" in kind and isinstance(value, str))):
            errors.append(f'"{name}" must be {kind}')
    licenses = card.get("license", []) if not errors else []
    for license in [licenses] if isinstance(licenses, str) else licenses:
        if license not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(LICENSES)}]')
    try:
        for model in card.get("model-index", []) if not errors else ():
            assert isinstance(model["name"], str)
            for result in model["results"]:
                assert all([result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]])
                assert all(metric["type"] and "value" in metric for metric in result["metrics"])
    except (AssertionError, KeyError, TypeError):
        errors.append('"model-index" needs a name, and a task, a dataset and metrics of each result')
    if errors:
        raise HubError(400, "Invalid metadata in README.md", errors=[{"message": each} for each in errors], warnings=[])
    return card
