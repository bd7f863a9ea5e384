"""What a push asks a repository of the Hub and tells it, persistently where a server or a connection fails."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub import logging as hub_logging
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import GitCommitInfo, RepoFile
from huggingface_hub.utils import (
    _http,
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    parse_ratelimit_headers,
)
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from ..errors import CheckpointError
from .release import LocalFile

LOG = logging.getLogger(__name__)
OF_THE_HUB = ".gitattributes"
PASSING = (408, 429, 500, 502, 503, 504)  # statuses that another try may not meet
MOST_TRIES, GROWING = 5, wait_exponential()  # which waits for a second, and then twice as long each time
LONGEST_WAIT = 300.0  # seconds, of those that the Hub asks for
LARGEST_ANSWER, MOST_REQUESTS = 2**24, 20_000  # bytes, and requests of one push; a listing of 1,000 files has 2**18
NETWORK_ERRORS = (HTTPError, OSError, ValueError, RuntimeError)  # huggingface_hub wraps those of uploads


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Without the warnings of huggingface_hub, which quote signed addresses."""
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)


class UnlikeTheHubError(CheckpointError):
    """A server did what the Hub does not do, and what must not be gone along with."""


HTTPX: Any = import_module(HTTPError.__module__.partition(".")[0])  # httpx, or httpx2 since huggingface_hub 2


class Bounded(HTTPX.SyncByteStream):
    """The body of an answer, of which no more is read than any answer of the Hub's has."""

    def __init__(self, stream: Any, url: str):
        self.stream, self.url = stream, url

    def __iter__(self) -> Iterator[bytes]:
        read = 0
        for block in self.stream:
            read += len(block)
            if read > LARGEST_ANSWER:
                raise UnlikeTheHubError(
                    f"{self.url} must answer in at most {LARGEST_ANSWER:,} bytes (it sends more), as the Hub does; "
                    "check HF_ENDPOINT and your proxy"
                )
            yield block

    def close(self) -> None:
        self.stream.close()


@contextmanager
def keeping_token(token: str, endpoint: str, bounded: bool = True) -> Iterator[None]:
    """Lets no request with the token go anywhere but to the Hub's own address. Unless `bounded`, answers are files.

    The Hub's answers name addresses: of the next page of a listing, of what confirms an upload, of redirects.
    huggingface_hub asks some of them with the token, whatever host they are of. Every request of its client passes
    here, so it does not matter where an address comes from. Answers without end are refused here too, and what they ask
    to be waited for is bounded, as huggingface_hub waits for years if it is told to.
    """
    home, before, asked = origin(endpoint), _http._GLOBAL_CLIENT_FACTORY, count()

    def check_request(request: Any) -> None:
        url = str(request.url)
        carries = token in url or any(token in value for value in request.headers.values())
        if carries and origin(url) != home:
            raise UnlikeTheHubError(
                f"{endpoint} must name addresses of its own for what it is asked with the token (it named one of "
                f"{urlsplit(url).hostname}, which was not asked); do not trust what stands between you and the Hub: "
                "check HF_ENDPOINT and your proxy"
            )
        if next(asked) >= MOST_REQUESTS:
            raise UnlikeTheHubError(
                f"{endpoint} must answer in at most {MOST_REQUESTS:,} requests (it names further ones), as the Hub "
                "does; check HF_ENDPOINT and your proxy"
            )
        request.headers["Accept-Encoding"] = "identity"  # a compressed answer may be of any size

    def check_response(response: Any) -> None:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise UnlikeTheHubError(
                f"{response.url.host} must not compress what it was asked to send as it is (it does); check your proxy"
            )
        bound_waits(response.headers)
        if bounded and response.request.extensions.get("olmem") != "download":
            response.stream = Bounded(response.stream, f"{response.url.scheme}://{response.url.host}")

    def make() -> Any:
        client = before()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks.get("request", ()), check_request],
            "response": [*hooks.get("response", ()), check_response],
        }
        return client

    set_client_factory(make)
    try:
        yield
    finally:
        set_client_factory(before)


def bound_waits(headers: MutableMapping[str, str]) -> None:
    """Shortens what the headers of an answer ask to be waited for, if it is longer than anybody should wait."""
    limit, asked = parse_ratelimit_headers(headers), headers.get("Retry-After", "").strip()
    if limit and limit.reset_in_seconds > LONGEST_WAIT:
        headers["RateLimit"] = f'"api";r=0;t={LONGEST_WAIT:.0f}'
    if asked.isdigit() and (len(asked) > 9 or int(asked) > LONGEST_WAIT):
        headers["Retry-After"] = f"{LONGEST_WAIT:.0f}"


def origin(url: str) -> tuple[str, str | None, int | None]:
    """The scheme, the host and the port of an address."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the error, and all that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    """Returns the status that a server answered, if one did."""
    return next((cause.response.status_code for cause in causes(error) if isinstance(cause, HfHubHTTPError)), None)


def is_passing(error: BaseException) -> bool:
    """Returns whether another try may succeed, as a server or a connection has failed."""
    status = status_of(error)
    if status is not None:
        return status in PASSING
    return any(isinstance(cause, (HTTPError, json.JSONDecodeError)) for cause in causes(error))


def wait_for(state: RetryCallState) -> float:
    """Seconds before the next try: as many as the Hub asks for, within bounds, else twice as many as before it."""
    seconds = GROWING(state)
    for cause in causes(error_of(state)):
        if isinstance(cause, HfHubHTTPError):
            headers = cause.response.headers
            limit, asked = parse_ratelimit_headers(headers), headers.get("Retry-After", "")
            spent = limit.reset_in_seconds + 1 if limit and cause.response.status_code == 429 else 0
            seconds = min(max(seconds, spent, float(asked) if asked.isdigit() else 0), LONGEST_WAIT)
    return seconds


def tell_of_wait(state: RetryCallState) -> None:
    """Says why, and how long, it is waited for the next try."""
    status = status_of(error_of(state))
    what = "the connection failed" if status is None else f"the Hub answered {status}"
    LOG.warning("%s: trying again in %.0f s", what, state.upcoming_sleep)


def error_of(state: RetryCallState) -> BaseException:
    """Returns the error of the last try."""
    error = state.outcome.exception() if state.outcome else None
    assert error is not None  # as it is asked only after a failure
    return error


def persistently(
    call: Callable[..., Any],
    *args: Any,
    also: tuple[int, ...] = (),
    made: Callable[[], Any] = lambda: None,
    **kwargs: Any,
) -> Any:
    """The call's value; tried again where a server or a connection failed, or gave a status of `also`.

    made: is asked after each failure for the value all the same, as the call may have been carried out and only its
    answer lost.
    """

    def attempt() -> Any:
        try:
            return call(*args, **kwargs)
        except NETWORK_ERRORS:
            if (value := made()) is None:
                raise
            return value

    def may_pass(error: BaseException) -> bool:
        return isinstance(error, NETWORK_ERRORS) and (is_passing(error) or status_of(error) in also)

    retry, stop = retry_if_exception(may_pass), stop_after_attempt(MOST_TRIES)
    return Retrying(retry=retry, stop=stop, wait=wait_for, before_sleep=tell_of_wait, reraise=True)(attempt)


def differences(files: Mapping[str, LocalFile], tree: Mapping[str, RepoFile]) -> dict[str, dict[str, int]]:
    """By kind, the files that a commit on this tree would touch or not, with sizes in bytes."""

    def is_same(name: str) -> bool:
        there = tree[name]
        expected = files[name].sha256 if there.lfs else files[name].git_sha1
        return there.size == files[name].size and (there.lfs.sha256 if there.lfs else there.blob_id) == expected

    return {
        "new": {name: file.size for name, file in files.items() if name not in tree},
        "changed": {name: file.size for name, file in files.items() if name in tree and not is_same(name)},
        "unchanged": {name: file.size for name, file in files.items() if name in tree and is_same(name)},
        "deleted": {name: file.size for name, file in tree.items() if name not in files and name != OF_THE_HUB},
    }


@dataclass(frozen=True)
class Refs:
    """The commits that branches and tags name."""

    branches: dict[str, str]
    tags: dict[str, str]


class Remote:
    """A repository of the Hub, as far as a push asks and tells it."""

    def __init__(self, repo_id: str, token: str):
        self.repo_id, self.token = repo_id, token
        self.api = HfApi(token=token)

    def refs(self) -> Refs | None:
        """None when the repository does not exist, or is hidden from the token."""
        try:
            refs = persistently(self.api.list_repo_refs, self.repo_id)
        except RepositoryNotFoundError as error:
            if error.response.status_code != 404:  # 401 of the token, 403 of a gated one
                raise
            return None
        return Refs(*({ref.name: ref.target_commit for ref in named} for named in (refs.branches, refs.tags)))

    def check_namespace(self) -> None:
        """Whether a repository of this name can be created, as far as the Hub tells before one is."""
        who, namespace = persistently(self.api.whoami), self.repo_id.partition("/")[0]
        names = [who["name"], *(organization["name"] for organization in who.get("orgs", []))]
        if namespace.lower() not in [name.lower() for name in names]:
            raise CheckpointError(
                f"`REPO_ID` must be in a namespace of the token's owner (got {namespace}; there are "
                f"{', '.join(names)}); nothing was sent: correct it, or run `hf auth login` as somebody else."
            )
        if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise CheckpointError(
                f"the token must be allowed to write to {self.repo_id} (it may read); nothing was sent: run `hf auth "
                "login` with one that is."
            )

    def head(self, branch: str) -> str | None:
        """Returns the commit that the branch names, if there is such a branch."""
        refs = self.refs()
        return refs.branches.get(branch) if refs else None

    def is_private(self) -> bool:
        """Returns whether only some can see the repository."""
        return bool(persistently(self.api.model_info, self.repo_id).private)

    def tree(self, revision: str, also: tuple[int, ...] = ()) -> dict[str, RepoFile]:
        """Returns the files of a commit by their names."""

        def listed() -> list[Any]:
            return list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision))

        return {entry.path: entry for entry in persistently(listed, also=also) if isinstance(entry, RepoFile)}

    def commits_since(self, branch: str, commit: str | None) -> list[GitCommitInfo]:
        """Those on top of this commit, newest first; none when the branch does not hold it."""
        commits = persistently(self.api.list_repo_commits, self.repo_id, revision=branch)
        names = [entry.commit_id for entry in commits]
        return commits[: names.index(commit)] if commit in names else []

    def pull_requests(self, title: str) -> Iterator[tuple[str, str]]:
        """Commit and address of each open one of this title."""
        found = persistently(lambda: list(self.api.get_repo_discussions(self.repo_id)))
        refs = persistently(self.api.list_repo_refs, self.repo_id, include_pull_requests=True).pull_requests or []
        commits = {ref.ref: ref.target_commit for ref in refs}
        for entry in found:
            commit = commits.get(f"refs/pr/{entry.num}")
            if commit and entry.is_pull_request and entry.title == title and entry.status in ("open", "draft"):
                yield commit, entry.url

    def check_card(self, path: Path) -> None:
        """By the Hub's own rules."""

        def ask() -> Any:
            response = get_session().post(
                f"{self.api.endpoint}/api/validate-yaml",
                json={"content": path.read_text(encoding="utf-8"), "repoType": "model"},
                headers=build_hf_headers(token=self.token),
            )
            if response.status_code == 400 and "errors" in response.json():
                return response.json()["errors"]
            hf_raise_for_status(response)
            return []

        if errors := persistently(ask):
            said = "; ".join(" ".join(str(error.get("message")).split()) for error in errors)
            raise CheckpointError(
                f"the front matter of `{path}` must be valid on the Hub (it says: {said}); correct it."
            )

    def download(self, name: str, commit: str, path: Path, expected: LocalFile) -> None:
        """Writes the file of the commit to `path`, or raises CheckpointError if it is not the expected one.

        What is expected bounds what is read. A download that was cut goes on where it was.
        """
        digest, done = hashlib.sha256(), 0
        url = f"{self.api.endpoint}/{self.repo_id}/resolve/{commit}/{quote(name)}"

        def fetch() -> None:
            nonlocal digest, done
            if done == expected.size:  # the connection ended behind the last byte
                return
            headers = build_hf_headers(token=self.token)
            if done:
                headers["Range"] = f"bytes={done}-"
            timeout, extensions = constants.HF_HUB_DOWNLOAD_TIMEOUT, {"olmem": "download"}
            session = get_session()
            with session.stream("GET", url, headers=headers, timeout=timeout, extensions=extensions) as response:
                hf_raise_for_status(response)
                if response.status_code != 206:
                    digest, done = hashlib.sha256(), 0
                with path.open("r+b" if done else "wb") as file:
                    file.seek(done)
                    for block in response.iter_raw():
                        if done + len(block) > expected.size:
                            raise CheckpointError(
                                f"the Hub sends more of {name} than the {expected.size:,} bytes of OUT"
                            )
                        file.write(block)
                        digest.update(block)
                        done += len(block)

        if expected.size:
            persistently(fetch, also=(404,))
        else:
            path.touch()
        if digest.hexdigest() != expected.sha256:
            raise CheckpointError(f"the Hub sends another {name} than the one of OUT, whose checksum it states")

    @contextmanager
    def telling(self, state: Callable[[], str]) -> Iterator[None]:
        """Turns what the network or the Hub raises into one line with the way out, without the token."""
        try:
            yield
        except BrokenPipeError:  # of whoever reads what is said
            raise
        except NETWORK_ERRORS as error:
            raise CheckpointError(f"{self.explain(error)}; {state()}.") from None
        except UnlikeTheHubError as error:
            raise CheckpointError(f"{error}; {state()}.") from None
        except CheckpointError:
            raise
        except Exception as error:  # of the many that huggingface_hub raises over answers of another kind
            said = self.without_token(f"{type(error).__name__}: {error}")
            raise CheckpointError(
                f"{self.api.endpoint} must answer as the Hub does (reading it gave {said}); {state()}."
            ) from error

    def explain(self, error: BaseException) -> str:
        """Says in one line what went wrong on the way to the Hub, and the way out."""
        unlike = next((cause for cause in causes(error) if isinstance(cause, UnlikeTheHubError)), None)
        if unlike is not None:  # which huggingface_hub wraps where it uploads
            return str(unlike)
        answer = next((cause for cause in causes(error) if isinstance(cause, HfHubHTTPError)), None)
        lost = next((cause for cause in causes(error) if isinstance(cause, HTTPError)), error)
        if answer is None:
            kind = f"{type(lost).__name__}: " if isinstance(lost, HTTPError) else ""
            why = f"the connection to {self.api.endpoint} must hold" if kind else "the Hub must accept it"
            return self.without_token(f"{why} (got {kind}{' '.join(str(lost).split())})")
        status = answer.response.status_code
        said = " ".join(str(answer.server_message or answer.response.reason_phrase).split())
        way_out = {
            401: "the token must be valid: run `hf auth login`, or correct HF_TOKEN",
            403: f"the token must be allowed to write to {self.repo_id}: run `hf auth login` with one that is",
            404: f"{self.repo_id} must exist and be visible to the token: check the name, or run `hf auth login`",
            429: "the Hub must have requests left for this token: wait some minutes",
        }.get(status, "the Hub must accept it")
        return self.without_token(f"{way_out} (got {status}: {said})")

    def without_token(self, text: str) -> str:
        """Nor with the name and password of an address."""
        return re.sub(r"//[^/\s@]+@", "//", text.replace(self.token, "hf_…"))
