"""A Hub that lies: a real one on this machine, whose answers are changed on their way, by any source of random numbers.

What it may not have: the token, on any other host; files that are called verified, and are not those of OUT.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import huggingface_hub
from convert.fuzzing.texts import RAW_JSON, encoded, mutate_tree, unmarked
from hub_api import Answer, Request
from hub_server import HubServer
from olmem_convert import CheckpointError, PushOptions, push
from olmem_convert.commands import pushing
from olmem_convert.publish.release import check_release
from olmem_convert.publish.sending import Push

TOKEN = "hf_loopback"
REPO = "tester/model"
STATUSES = (200, 201, 204, 206, 301, 302, 307, 308, 400, 401, 403, 404, 409, 412, 416, 429, 500, 503)
ADDRESSES = ("/x", "/api/models/x/y/tree/main", "/x.git/info/lfs/objects/verify", "/upload")


class LyingHub(HubServer):
    """Answers as the Hub does until it has an `rng`, and then lies in one of some answers, drawn by it."""

    def __init__(self, folder: Path):
        super().__init__(folder, token=TOKEN)
        self.rng: Random | None = None
        self.odds = 0.0
        self.elsewhere = HubServer(folder / "elsewhere", token="hf_other")

    def start(self) -> "LyingHub":
        self.elsewhere.start()
        super().start()
        return self

    def handle(self, request: Request) -> Answer:
        answer = super().handle(request)
        rng = self.rng
        return lie(rng, answer, self) if rng is not None and rng.random() < self.odds else answer

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
            ("X-Repo-Commit", "ETag", "X-Linked-Etag", "X-Linked-Size", "Content-Encoding", "Retry-After")
        )
        return Answer(content, answer.status, headers | {name: rng.choice(("", "0", "gzip", "x" * 40, "-1", "9" * 30))})
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
        for path in self.folder.iterdir():
            if (snapshot / path.name).read_bytes() != path.read_bytes():
                raise NotVerifiedError(path.name)
    module = "olmem." if task["installed"] else "transformers_modules."
    return {"logits": "the same", "finite": True, "module": module}


@contextmanager
def pushing_to(hub: HubServer, out: Path) -> Iterator[None]:
    """Pushes go to this Hub, wait for nothing, load no model, and check the folder `out` once, as it stays the same."""
    files = check_release(out)
    constants = {"ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}
    environment = hub.env | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.multiple(huggingface_hub.constants, **constants),
        mock.patch.object(time, "sleep", lambda seconds: None),
        mock.patch.object(Push, "reload", compare),
        mock.patch.object(pushing, "check_release", lambda folder: files),
    ):
        yield


def attempt_push(hub: LyingHub, out: Path, rng: Random) -> str:
    """What a push to the Hub came to while it lied; raises AssertionError for what must not be."""
    hub.requests.clear()
    hub.elsewhere.requests.clear()
    options = PushOptions(tag=rng.choice((None, "v1")), execute=True)
    if rng.random() < 0.5:  # there is something to change
        hub.rng = None
        push(out, REPO, PushOptions(execute=True))
        hub.commit(REPO, {"README.md": b"another", "extra.txt": b"x"})
        options = PushOptions(tag=options.tag, execute=True, create_pr=options.tag is None and rng.random() < 0.5)
        hub.requests.clear()
    hub.odds, hub.rng = rng.choice((0.05, 0.2, 0.5)), rng
    try:
        report = push(out, REPO, options)
        outcome = "accepted"
        assert report["verified"]
    except CheckpointError as error:
        outcome = f"refused: {str(error).splitlines()[0]}"
        assert TOKEN not in str(error), "the token is in an error"
    finally:
        hub.rng = None
        with suppress(KeyError):
            del hub.repos[REPO]
    assert not hub.leaks(), f"the token went to another host: {hub.leaks()[0]}"
    return outcome
