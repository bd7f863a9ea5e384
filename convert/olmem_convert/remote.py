"""What a push asks a repository of the Hub and tells it, persistently where a server or a connection fails."""

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub import logging as hub_logging
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import GitCommitInfo, RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, parse_ratelimit_headers

from .errors import CheckpointError
from .release import LocalFile

LOG = logging.getLogger(__name__)
OF_THE_HUB = ".gitattributes"
PASSING = (408, 429, 500, 502, 503, 504)  # statuses that another try may not meet
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try
LONGEST_WAIT = 300.0  # seconds, of those that the Hub asks for
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


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    return next((cause.response.status_code for cause in causes(error) if isinstance(cause, HfHubHTTPError)), None)


def is_passing(error: BaseException) -> bool:
    status = status_of(error)
    if status is not None:
        return status in PASSING
    return any(isinstance(cause, (HTTPError, json.JSONDecodeError)) for cause in causes(error))


def wait_for(error: BaseException, seconds: float) -> None:
    """As long as the Hub asks for, within bounds, else the seconds given."""
    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError):
            headers = cause.response.headers
            limit, asked = parse_ratelimit_headers(headers), headers.get("Retry-After", "")
            spent = limit.reset_in_seconds + 1 if limit and cause.response.status_code == 429 else 0
            seconds = min(max(seconds, spent, float(asked) if asked.isdigit() else 0), LONGEST_WAIT)
    status = status_of(error)
    what = "the connection failed" if status is None else f"the Hub answered {status}"
    LOG.warning("%s: trying again in %.0f s", what, seconds)
    time.sleep(seconds)


def persistently(call: Callable[..., Any], *args: Any, also: tuple[int, ...] = (), **kwargs: Any) -> Any:
    """The call's value; tried again where a server or a connection failed, or gave a status of `also`."""
    waits = [*WAITS]
    while True:
        try:
            return call(*args, **kwargs)
        except NETWORK_ERRORS as error:
            if not waits or not (is_passing(error) or status_of(error) in also):
                raise
            wait_for(error, waits.pop(0))


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
        refs = self.refs()
        return refs.branches.get(branch) if refs else None

    def is_private(self) -> bool:
        return bool(persistently(self.api.model_info, self.repo_id).private)

    def tree(self, revision: str, also: tuple[int, ...] = ()) -> dict[str, RepoFile]:
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

    @contextmanager
    def telling(self, state: Callable[[], str]) -> Iterator[None]:
        """Turns what the network or the Hub raises into one line with the way out, without the token."""
        try:
            yield
        except BrokenPipeError:  # of whoever reads what is said
            raise
        except NETWORK_ERRORS as error:
            raise CheckpointError(f"{self.explain(error)}; {state()}.") from None
        except (AttributeError, LookupError, TypeError) as error:  # huggingface_hub's, of JSON of another kind
            said = self.without_token(f"{type(error).__name__}: {error}")
            raise CheckpointError(
                f"{self.api.endpoint} must answer as the Hub does (reading it gave {said}); {state()}."
            ) from error

    def explain(self, error: BaseException) -> str:
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
