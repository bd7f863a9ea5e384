"""The Hub's HTTP API: what each endpoint answers, from what a store keeps."""

import base64
import contextlib
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from hub_store import LFS_SIZE, Commit, Discussion, File, HubError, Repo, Store, file_sha256, pointer, read_card

MODEL = r"/api/models/(?P<name>[^/]+/[^/]+)"
REV = r"/(?P<rev>refs/pr/\d+|[^/]+)"
OBJECT = r"/(?P<name>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"


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
    def route(self) -> str:
        return urlsplit(self.path).path

    @property
    def query(self) -> dict[str, str]:
        return {key: values[-1] for key, values in parse_qs(urlsplit(self.path).query).items()}

    @property
    def storage(self) -> bool:
        """Whether it came to the storage of large files."""
        return self.route.startswith("/storage/")

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    content: Any  # a Path is sent as a file, bytes as they are, anything else as JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


ROUTES: list[tuple[str, re.Pattern[str], bool, Callable[..., Any]]] = []


def route(method: str, path: str, write: bool = False):
    """The function answers requests of the method and path: `name` in it as the repository, other groups as text."""

    def register(function):
        ROUTES.append((method, re.compile(path), write, function))
        return function

    return register


class HubApi:
    """Answers requests to `endpoint`, and for the content of large files to `storage`."""

    endpoint: str
    storage: str

    def __init__(self, folder: Path, token: str):
        self.user, self.orgs = "tester", ["lab"]
        self.token, self.tokens = token, {token: "write"}
        self.page, self.part_size = 1000, 5 * 2**30
        self.store = Store(folder)
        self.repos = self.store.repos
        self.lock = threading.RLock()
        self._secret = secrets.token_hex()

    def handle(self, request: Request) -> Answer:
        method = "GET" if request.method == "HEAD" else request.method
        try:
            for wanted, pattern, write, function in ROUTES:
                if wanted == method and (match := pattern.fullmatch(request.route)):
                    groups = {key: unquote(value or "") for key, value in match.groupdict().items()}
                    with self.lock:
                        signed = self._authenticate(request)
                        if "name" in groups:
                            name = groups.pop("name")
                            groups["repo"] = self.repos[name] if signed else self._repo(request, name, write)
                        answer = function(self, request, **groups)
                        if method != "GET":
                            self.store.save()
                    return answer if isinstance(answer, Answer) else Answer(answer)
            raise HubError(404, f"No such page: {method} {request.route}")
        except HubError as error:
            return Answer(error.content, error.status, error.headers)

    def _signature(self, path: str) -> str:
        return hashlib.sha256(f"{self._secret} {path}".encode()).hexdigest()

    def _signed(self, origin: str, path: str, **query: str) -> str:
        return f"{origin}{path}?{urlencode(query | {'signature': self._signature(path)})}"

    def _authenticate(self, request: Request) -> bool:
        """Whether a signed URL allows the request; else it is a known token that must, or nobody's."""
        if request.storage or request.route.startswith("/complete/"):
            if request.query.get("signature") != self._signature(request.route):
                raise HubError(403, "SignatureDoesNotMatch")
            if request.storage and request.token:
                raise HubError(400, "Only one auth mechanism allowed")
            return True
        if request.token and request.token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return False

    def _may_write(self, request: Request, name: str) -> None:
        if not request.token:
            raise HubError(401, "Invalid username or password.")
        if self.tokens[request.token] != "write" or name.split("/")[0] not in (self.user, *self.orgs):
            raise HubError(403, f"You don't have the required permissions to write to {name}")

    def _repo(self, request: Request, name: str, write: bool) -> Repo:
        """The repository, when the sender may read or write it."""
        if name not in self.repos or (self.repos[name].private and not request.token):
            if request.token:
                raise HubError(404, "Repository not found", "RepoNotFound")
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if write:
            self._may_write(request, name)
        return self.repos[name]

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request):
        if not request.token:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name, "fullname": name, "roleInOrg": "admin"} for name in self.orgs]
        access = {"displayName": "loopback", "role": self.tokens[request.token]}
        user = {"type": "user", "name": self.user, "fullname": self.user, "orgs": orgs}
        return user | {"auth": {"type": "access_token", "accessToken": access}}

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request):
        card = read_card(request.json()["content"])
        return {"errors": [], "warnings": [] if card else [{"message": "empty or missing yaml metadata in repo card"}]}

    @route("POST", "/api/repos/create")
    def _create_repo(self, request: Request):
        asked = request.json()
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        self._may_write(request, name)
        if asked.get("type") not in (None, "model"):
            raise HubError(400, "Only models are kept here")
        content = {"url": f"{self.endpoint}/{name}", "name": name}
        if name in self.repos:
            raise HubError(409, "You already created this model repo", **content)
        self.store.create(name, private=bool(asked.get("private") or asked.get("visibility") == "private"))
        return content

    @route("GET", MODEL + r"(?:/revision" + REV + ")?")
    def _info(self, request: Request, repo: Repo, rev: str):
        commit = repo.at(rev or "main")
        siblings: list[dict] = [{"rfilename": path} for path in sorted(commit.files)]
        for sibling in siblings if "blobs" in request.query else ():
            file = commit.files[sibling["rfilename"]]
            sibling |= {"blobId": file.oid, "size": file.size} | lfs(file, "sha256")
        card = {}
        if "README.md" in commit.files:
            with contextlib.suppress(HubError):
                card = read_card(self.store.blob(commit.files["README.md"]).read_text(errors="replace"))
        content = {"id": repo.name, "modelId": repo.name, "author": repo.name.split("/")[0], "sha": commit.id}
        content |= {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        content |= {"createdAt": repo.created, "lastModified": commit.date, "siblings": siblings, "cardData": card}
        return content | {key: card[key] for key in ("tags", "pipeline_tag", "library_name") if key in card}

    @route("GET", MODEL + "/auth-check(?P<write>/write)?")
    def _auth_check(self, request: Request, repo: Repo, write: str):
        if write:
            self._may_write(request, repo.name)
        return {}

    def _paged(self, request: Request, entries: list) -> Answer:
        """The page of entries that the query's cursor asks for, and in the `Link` header where the next is."""
        start = int(request.query.get("cursor", 0))
        stop = start + min(self.page, int(request.query.get("limit", self.page)))
        following = urlencode(request.query | {"cursor": str(stop)})
        link = f'<{self.endpoint}{request.route}?{following}>; rel="next"'
        return Answer(entries[start:stop], headers={"Link": link} if stop < len(entries) else {})

    @route("GET", MODEL + "/tree" + REV + "(?:/(?P<path>.+))?")
    def _tree(self, request: Request, repo: Repo, rev: str, path: str):
        entries = entries_of(repo.at(rev))
        if path and entries.get(path, {}).get("type") != "directory":
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        below, deep = f"{path}/" if path else "", request.query.get("recursive") == "true"
        inside = [at for at in entries if at.startswith(below) and (deep or "/" not in at.removeprefix(below))]
        return self._paged(request, [entries[at] for at in inside])

    @route("POST", MODEL + "/paths-info" + REV)
    def _paths_info(self, request: Request, repo: Repo, rev: str):
        entries, asked = entries_of(repo.at(rev)), parse_qs(request.body.decode()).get("paths", [])
        return [entries[path] for path in asked if path in entries]

    @route("GET", MODEL + "/refs")
    def _refs(self, request: Request, repo: Repo):
        def listed(prefix: str, label: str = "") -> list[dict]:
            found = repo.named(prefix).items()
            return [{"name": label + key, "ref": prefix + key, "targetCommit": oid} for key, oid in found]

        content = {"branches": listed("refs/heads/"), "tags": listed("refs/tags/"), "converts": []}
        return content | {"pullRequests": listed("refs/pr/", "refs/pr/")}

    @route("GET", MODEL + "/commits" + REV)
    def _commits(self, request: Request, repo: Repo, rev: str):
        authors = [{"user": self.user}]
        listed = [
            {"id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date, "authors": authors}
            for commit in repo.history(rev)
        ]
        return self._paged(request, listed)

    @route("POST", MODEL + "/(?P<kind>tag|branch)" + REV, write=True)
    def _create_ref(self, request: Request, repo: Repo, kind: str, rev: str):
        asked = request.json()
        if kind == "tag":
            ref, target = f"refs/tags/{asked['tag']}", repo.at(rev)
        else:
            ref, target = f"refs/heads/{rev}", repo.at(asked.get("startingPoint", "main"))
        if ref in repo.refs:
            raise HubError(409, "Reference already exists")
        repo.refs[ref] = target.id
        return {}

    @route("DELETE", MODEL + "/(?P<kind>tag|branch)" + REV, write=True)
    def _delete_ref(self, request: Request, repo: Repo, kind: str, rev: str):
        ref = f"refs/{'tags' if kind == 'tag' else 'heads'}/{rev}"
        if ref == "refs/heads/main":
            raise HubError(403, "The main branch cannot be deleted")
        if repo.refs.pop(ref, None) is None:
            raise HubError(404, f"{ref} does not exist", "RevisionNotFound")
        return {}

    @route("POST", MODEL + "/preupload" + REV, write=True)
    def _preupload(self, request: Request, repo: Repo, rev: str):
        files, answers = repo.at(rev).files, []
        for asked in request.json()["files"]:
            path, binary = asked["path"], b"\0" in base64.b64decode(asked["sample"])
            large = binary or asked["size"] > LFS_SIZE or self.store.large(files, path)
            oid = files[path].checksum if path in files else None
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers, "commitOid": repo.at(rev).id}

    @route("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", write=True)
    def _lfs_batch(self, request: Request, repo: Repo):
        objects = []
        for asked in request.json()["objects"]:
            oid, size = asked["oid"], asked["size"]
            objects.append({"oid": oid, "size": size})
            if repo.uploads.get(oid) == oid:
                continue
            path = f"/storage/{repo.name}/{oid}"
            upload: dict = {"href": self._signed(self.storage, path)}
            if size > self.part_size:
                parts = range(1, -(-size // self.part_size) + 1)
                header = {str(part): self._signed(self.storage, path, part=str(part)) for part in parts}
                upload = {"href": self._signed(self.endpoint, f"/complete/{repo.name}/{oid}")}
                upload["header"] = header | {"chunk_size": str(self.part_size)}
            verify = {"href": f"{self.endpoint}/{repo.name}.git/info/lfs/objects/verify"}
            objects[-1]["actions"] = {"upload": upload, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/storage" + OBJECT)
    def _put(self, request: Request, repo: Repo, oid: str):
        assert request.upload
        etag = file_sha256(request.upload)
        if part := request.query.get("part"):
            request.upload.replace(self.store.blobs / f"{oid}.{part}")
        else:
            self.store.take(repo, oid, request.upload, request.corrupt)
        return Answer(b"", headers={"ETag": f'"{etag}"'})

    @route("POST", "/complete" + OBJECT)
    def _complete(self, request: Request, repo: Repo, oid: str):
        whole = self.store.blobs / f"{oid}.whole"
        with whole.open("wb") as target:
            for part in request.json()["parts"]:
                path = self.store.blobs / f"{oid}.{part['partNumber']}"
                if not path.exists() or file_sha256(path) != part["etag"].strip('"'):
                    raise HubError(400, f"Part {part['partNumber']} was not uploaded")
                target.write(path.read_bytes())
                path.unlink()
        self.store.take(repo, oid, whole, request.corrupt)
        return {}

    @route("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/verify", write=True)
    def _verify(self, request: Request, repo: Repo):
        asked = request.json()
        stored = repo.uploads.get(asked["oid"])
        if stored is None or (self.store.blobs / stored).stat().st_size != asked["size"]:
            raise HubError(404, f"Object {asked['oid']} was not uploaded")
        return {}

    @route("POST", MODEL + "/commit" + REV, write=True)
    def _commit(self, request: Request, repo: Repo, rev: str):
        ref = repo.branch(rev)
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        told, create_pr = header["value"], "create_pr" in request.query
        head, parent = repo.refs[ref], told.get("parentCommit")
        if create_pr and parent:
            head = repo.at(parent).id
        elif not head.startswith(parent or ""):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = self.store.changed(repo, repo.commits[head].files, operations, request.corrupt)
        url = None
        if create_pr:
            pull = repo.discuss(told["summary"], base=head)
            pull.status, ref, url = "open", f"refs/pr/{pull.num}", f"{self.endpoint}/{repo.name}/discussions/{pull.num}"
        commit = repo.add(ref, head, told["summary"], told.get("description", ""), files)
        content = {"success": True, "commitOid": commit.id, "hookOutput": "", "pullRequestUrl": url}
        return content | {"commitUrl": f"{self.endpoint}/{repo.name}/commit/{commit.id}"}

    def _told(self, repo: Repo, one: Discussion) -> dict:
        author, events = {"name": self.user}, []
        content = {"num": one.num, "title": one.title, "status": one.status, "createdAt": one.created}
        content |= {"repo": {"name": repo.name, "type": "model"}, "author": author, "isPullRequest": bool(one.base)}
        for commit in repo.history(f"refs/pr/{one.num}") if one.base else ():
            if commit.id == one.base:
                break
            event = {"id": commit.id, "type": "commit", "createdAt": commit.date, "author": author}
            events.insert(0, event | {"data": {"subject": commit.title, "oid": commit.id}})
        changes = {"base": "refs/heads/main", "mergeCommitId": one.merged}
        return content | {"changes": changes, "events": events, "filesWithConflicts": []}

    @route("POST", MODEL + "/discussions", write=True)
    def _create_discussion(self, request: Request, repo: Repo):
        asked = request.json()
        return self._told(repo, repo.discuss(asked["title"], repo.at("main").id if asked.get("pullRequest") else None))

    @route("GET", MODEL + "/discussions")
    def _discussions(self, request: Request, repo: Repo):
        return {"discussions": [self._told(repo, one) for one in repo.discussions], "count": 0, "start": 0}

    @route("GET", MODEL + r"/discussions/(?P<num>\d+)")
    def _discussion(self, request: Request, repo: Repo, num: str):
        return self._told(repo, repo.discussion(num))

    @route("POST", MODEL + r"/discussions/(?P<num>\d+)/merge", write=True)
    def _merge(self, request: Request, repo: Repo, num: str):
        repo.merge(repo.discussion(num))
        return {}

    @route("POST", MODEL + r"/discussions/(?P<num>\d+)/status", write=True)
    def _status(self, request: Request, repo: Repo, num: str):
        one = repo.discussion(num)
        one.status = request.json()["status"]
        event = {"id": num, "type": "status-change", "createdAt": one.created, "author": {"name": self.user}}
        return {"newStatus": event | {"data": {"status": one.status}}}

    @route("GET", r"/(?P<name>[^/]+/[^/]+)/resolve" + REV + "/(?P<path>.+)")
    def _resolve(self, request: Request, repo: Repo, rev: str, path: str):
        commit = repo.at(rev)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            error = HubError(404, "Entry not found", "EntryNotFound")
            error.headers |= headers
            raise error
        file = commit.files[path]
        if file.sha256 is None:
            return Answer(self.store.blob(file), headers=headers | {"ETag": f'"{file.oid}"'})
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        return Answer(b"", 302, headers | {"Location": self._signed(self.storage, f"/storage/{file.sha256}")})

    @route("GET", "/storage/(?P<oid>[0-9a-f]{64})")
    def _object(self, request: Request, oid: str):
        return Answer(self.store.blobs / oid, headers={"ETag": f'"{oid}"'})


def lfs(file: File, oid: str) -> dict:
    """What the Hub tells of a large file, which has the checksum as `oid` or as `sha256`."""
    if not file.sha256:
        return {}
    return {"lfs": {oid: file.sha256, "size": file.size, "pointerSize": len(pointer(file.sha256, file.size))}}


def entries_of(commit: Commit) -> dict[str, dict]:
    """What the Hub tells of each file and folder of the commit."""
    entries: dict[str, dict] = {
        path: {"type": "file", "oid": file.oid, "size": file.size, "path": path} | lfs(file, "oid")
        for path, file in commit.files.items()
    }
    for folder in {str(parent) for path in commit.files for parent in list(Path(path).parents)[:-1]}:
        inside = sorted(f"{path} {file.oid}" for path, file in commit.files.items() if path.startswith(f"{folder}/"))
        oid = hashlib.sha1("\n".join(inside).encode()).hexdigest()
        entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
    return dict(sorted(entries.items()))
