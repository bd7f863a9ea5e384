"""A Hub that lies: a real one on this machine, whose answers are changed on their way, by any source of random numbers.

What it may not have: the token, on any other host; files that are called verified, and are not those of OUT.
"""

import json
import os
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import cache, cached_property
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import huggingface_hub
from convert.fuzzing.seeds import seeds
from convert.fuzzing.texts import RAW_JSON, encoded, mutate_tree, unmarked
from hub_api import Answer, Request
from hub_server import HubServer
from hub_store import Repo
from olmem_convert import CheckpointError, PushOptions, push
from olmem_convert.commands import pushing
from olmem_convert.publish.release import LocalFile, check_release
from olmem_convert.publish.remote import LONGEST_WAIT
from olmem_convert.publish.sending import Push

TOKEN = "hf_loopback"
REPO = "tester/model"
STATUSES = (200, 201, 204, 206, 301, 302, 307, 308, 400, 401, 403, 404, 409, 412, 416, 429, 500, 503)
LEAKED = "the token went to another host"
# Of each kind of file one, as every file is sent and asked for in the same way.
SENT = (
    *("README.md", "config.json", "generation_config.json", "verification.json"),
    *("model.safetensors", "modeling_olmem.py", "tokenizer.json"),
)
ADDRESSES = ("/x", "/api/models/x/y/tree/main", "/x.git/info/lfs/objects/verify", "/upload")


class LyingHub(HubServer):
    """Answers as the Hub does until it has an `rng`, and then lies in one of some answers, drawn by it."""

    def __init__(self, folder: Path):
        super().__init__(folder, token=TOKEN)
        self.rng: Random | None = None
        self.odds = 0.0
        self.out, self.longest_wait = folder / "out", 0.0
        self.elsewhere = HubServer(folder / "elsewhere", token="hf_other")

    def start(self) -> "LyingHub":
        self.elsewhere.start()
        super().start()
        return self

    def handle(self, request: Request) -> Answer:
        answer = super().handle(request)
        rng = self.rng
        return lie(rng, answer, self) if rng is not None and rng.random() < self.odds else answer

    @cached_property
    def files(self) -> dict[str, LocalFile]:
        """What a push sends of a folder that is checked here once, as it stays the same."""
        self.out.mkdir()
        for name, data in seeds("hub")[0].items():
            (self.out / name).write_bytes(data)
        checked = check_release(self.out)
        return {name: checked[name] for name in SENT}

    @cached_property
    def pushed(self) -> Repo:
        """A repository as a push leaves it."""
        push(self.out, REPO, PushOptions(execute=True))
        return self.repos.pop(REPO)

    def wait(self, seconds: float) -> None:
        """In place of waiting; only how long it would have been is noted."""
        self.longest_wait = max(self.longest_wait, seconds)

    def leaks(self) -> list[str]:
        """The requests that brought the token to another host, the one of large files included."""
        brought = []
        for request in (*self.elsewhere.requests, *(request for request in self.requests if request.storage)):
            if TOKEN in json.dumps(request.headers) + request.path or TOKEN.encode() in (request.body or b""):
                brought.append(f"{request.method} {request.path}")
        return brought


def address(rng: Random, hub: LyingHub) -> str:
    places = (hub.elsewhere.endpoint, hub.elsewhere.storage, hub.endpoint, hub.storage, "http://127.0.0.1:1", "")
    return rng.choice(places) + rng.choice(ADDRESSES)


def lie(rng: Random, answer: Answer, hub: LyingHub) -> Answer:
    """Another answer: of another status, to another place, of other content, or with another page behind it."""
    kind = rng.choice(("content", "content", "address", "status", "redirect", "link", "header", "bytes"))
    content, headers = answer.content, dict(answer.headers)
    if kind == "status":
        return Answer(content, rng.choice(STATUSES), headers)
    if kind == "redirect":
        return Answer(b"", rng.choice((301, 302, 303, 307, 308)), headers | {"Location": address(rng, hub)})
    if kind == "link":
        return Answer(content, answer.status, headers | {"Link": f'<{address(rng, hub)}>; rel="next"'})
    if kind == "header":
        name = rng.choice(
            ("X-Repo-Commit", "ETag", "X-Linked-Etag", "X-Linked-Size", "Content-Encoding", "Retry-After", "RateLimit")
        )
        value = rng.choice(("", "0", "gzip", "x" * 40, "-1", "9" * 30, '"api";r=0;t=99999'))
        return Answer(content, rng.choice((answer.status, 429, 503)), headers | {name: value})
    if isinstance(content, Path | bytes):
        data = bytearray(content.read_bytes() if isinstance(content, Path) else content)
        if data and kind != "address":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.3 else data
        return Answer(bytes(data), answer.status, headers)
    if kind == "address":
        return Answer(led_away(rng, content, hub), answer.status, headers)
    tree = mutate_tree(rng, json.loads(json.dumps(content)), RAW_JSON)
    return Answer(encoded(rng, unmarked(json.dumps(tree), RAW_JSON, '"')), answer.status, headers)


def led_away(rng: Random, value: Any, hub: LyingHub) -> Any:
    """The same, with another place in some of its addresses."""
    if isinstance(value, dict):
        return {name: led_away(rng, part, hub) for name, part in value.items()}
    if isinstance(value, list):
        return [led_away(rng, part, hub) for part in value]
    if isinstance(value, str) and value.startswith("http") and rng.random() < 0.7:
        return address(rng, hub)
    return value


class NotVerifiedError(Exception):
    """What was to be loaded is not what OUT holds."""


def compare(self: Push, task: dict[str, Any], scratch: str) -> dict[str, Any]:
    """In place of loading the model: that what was downloaded to be loaded is OUT, bit for bit."""
    if not task["installed"]:
        [snapshot] = Path(scratch).glob("hub/models--*/snapshots/*")
        for name, file in self.files.items():
            if (snapshot / name).read_bytes() != file.path.read_bytes():
                raise NotVerifiedError(name)
    module = "olmem." if task["installed"] else "transformers_modules."
    return {"logits": "the same", "finite": True, "module": module}


make_context = cache(ssl.create_default_context)  # which reads all authorities, for each client anew


@contextmanager
def pushing_to(hub: LyingHub) -> Iterator[None]:
    """Pushes go to this Hub, wait for nothing, load no model, and send its files."""
    files = hub.files
    constants = {"ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}
    environment = hub.env | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.multiple(huggingface_hub.constants, **constants),
        mock.patch.object(time, "sleep", hub.wait),
        mock.patch.object(ssl, "create_default_context", lambda *_, **__: make_context()),
        mock.patch.object(Push, "reload", compare),
        mock.patch.object(pushing, "check_release", lambda folder: files),
    ):
        yield


def attempt_push(hub: LyingHub, rng: Random) -> str:
    """What a push to the Hub came to while it lied; raises AssertionError for what must not be."""
    options = PushOptions(tag=rng.choice((None, "v1")), execute=True)
    if rng.random() < 0.5:  # there is something to change
        hub.repos[REPO] = deepcopy(hub.pushed)
        hub.commit(REPO, {"README.md": b"another", "extra.txt": b"x"})
        options = PushOptions(tag=options.tag, execute=True, create_pr=options.tag is None and rng.random() < 0.5)
    hub.requests.clear()
    hub.elsewhere.requests.clear()
    hub.longest_wait = 0.0
    hub.odds, hub.rng = rng.choice((0.05, 0.2, 0.5)), rng
    try:
        report = push(hub.out, REPO, options)
        outcome = "accepted"
        assert report["verified"]
    except CheckpointError as error:
        outcome = f"refused: {str(error).splitlines()[0]}"
        assert TOKEN not in str(error), "the token is in an error"
    finally:
        hub.rng = None
        with suppress(KeyError):
            del hub.repos[REPO]
    assert not hub.leaks(), f"{LEAKED}: {hub.leaks()[0]}"
    assert hub.longest_wait <= LONGEST_WAIT + 1, f"{hub.longest_wait:.0f} s were waited for an answer"
    return outcome
