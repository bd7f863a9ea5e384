"""What is published, and what state the Hub is in whatever happens on the way, against a Hub on this machine."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from convert.checkpoints import load_weights, save_weights, source
from convert.releases import reseal, write_own_card
from fresh import run_fresh
from hub_api import Answer
from hub_server import HubServer
from olmem_convert import CardOptions, CheckpointError, ConvertOptions, PushOptions, card, convert, push
from olmem_convert.cli import app
from olmem_convert.publish import release, reload, remote
from olmem_convert.publish import sending as hub
from olmem_convert.publish.remote import Remote
from typer.testing import CliRunner

REPO = "tester/model"
TOKEN = "hf_loopback"
ROOT = Path(__file__).parents[2]
COMMIT, UPLOAD, TREE = r"POST .*/commit/", r"PUT ", r"GET .*/tree/"


@pytest.fixture
def out(released, tmp_path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "out"))


@pytest.fixture
def unloaded_but_sent(monkeypatch):
    """The same, but for the files of the Hub, which are downloaded and compared."""

    def reload(self, task, scratch):
        return {"logits": "x", "finite": True, "module": "olmem." if task["installed"] else "transformers_modules."}

    monkeypatch.setattr(hub.Push, "reload", reload)


@pytest.fixture
def unloaded(monkeypatch):
    """Models are not loaded, which takes two processes: the Hub's are the local ones where their files are."""
    monkeypatch.setattr(hub.Push, "logits", lambda *arguments, **named: "the same")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repo_id": "model"}, ("`REPO_ID`", "'model'")),
        ({"repo_id": "a/b/c"}, ("`REPO_ID`", "'a/b/c'")),
        ({"repo_id": "a/--b"}, ("`REPO_ID`", "'a/--b'")),
        ({"revision": "refs/pr/1"}, ("`revision`",)),
        ({"tag": "v 1"}, ("`tag`", "'v 1'")),
        ({"tag": "v1", "create_pr": True}, ("`tag`", "--create-pr")),
        ({"revision": "next", "create_pr": True}, ("`revision`", "--create-pr")),
        ({"tag": "next", "revision": "next"}, ("`next`", "branch and a tag")),
        ({"create_pr": True}, ("`REPO_ID`", "must exist for a pull request")),
    ],
    ids=str,
)
def test_options_that_cannot_be(options, words, out, server):
    options = {"execute": True} | options
    repo_id = options.pop("repo_id", REPO)
    with pytest.raises(CheckpointError) as caught:
        push(out, repo_id, PushOptions(**options))
    assert all(word in str(caught.value) for word in words), caught.value
    assert not server.repos


def test_a_refused_folder_asks_nothing_of_the_hub(out, server):
    (out / "weights.pkl").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickle"):
        push(out, REPO, PushOptions(execute=True))
    assert server.requests == []


@pytest.mark.parametrize(
    ("repo_id", "role", "words"),
    [("somebody/model", "write", ("`REPO_ID`", "somebody", "tester, ")), (REPO, "read", ("the token", "may read"))],
)
def test_the_plan_tells_of_a_repository_that_cannot_be_created(repo_id, role, words, out, server):
    server.tokens[TOKEN] = role
    with pytest.raises(CheckpointError) as caught:
        push(out, repo_id)
    assert all(word in str(caught.value) for word in words), caught.value
    server.tokens[TOKEN] = "write"
    assert push(out, f"{server.orgs[0]}/model")["plan"]["creates_repo"]


def test_waiting_for_the_hub_is_told(out, server, unloaded, caplog):
    server.fail("GET .*/refs", 503, times=2)
    push(out, REPO)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("olmem_convert")] == [
        "the Hub answered 503: trying again in 1 s",
        "the Hub answered 503: trying again in 2 s",
    ]


def run(*arguments) -> object:
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def test_plan(out, server, unloaded):
    result = run(out, REPO, "--tag", "v1")
    assert result.exit_code == 0, result.output
    assert "creates tester/model, public" in result.stdout and "--execute" in result.stdout
    assert re.search(r"new +model\.safetensors +\d", result.stdout) and "tag v1: after verification" in result.stdout
    assert not server.repos and {request.method for request in server.requests} <= {"GET", "HEAD", "POST"}
    report = json.loads(run(out, REPO, "--json").stdout)
    assert report["commit"] is None and report["plan"]["creates_repo"]
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    assert report["plan"]["new"] == sizes and report["plan"]["upload"] == sum(sizes.values())

    push(out, REPO, PushOptions(execute=True))
    server.commit(REPO, {"old.txt": b"1", "sub/old.txt": b"2"})
    write_own_card(out)
    size = (out / "README.md").stat().st_size
    plan = push(out, REPO)["plan"]
    assert plan["new"] == {} and plan["changed"] == {"README.md": size}
    assert plan["deleted"] == {"old.txt": 1, "sub/old.txt": 1} and "model.safetensors" in plan["unchanged"]
    assert plan["upload"] == size and plan["head"] == server.branches(REPO)["main"]
    push(out, REPO, PushOptions(execute=True))
    assert is_published(server, out)


def is_published(server: HubServer, out: Path, revision: str = "main") -> bool:
    """The revision holds the folder's files, bit for bit, and what the Hub made itself."""
    files = server.files(REPO, revision)
    held = {name: server.read(REPO, name, revision) for name in files if name != ".gitattributes"}
    return ".gitattributes" in files and held == {path.name: path.read_bytes() for path in out.iterdir()}


def test_push_then_nothing_to_do_then_a_tag(out, server, unloaded):
    result = run(out, REPO, "--private", "--execute", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert is_published(server, out) and server.repos[REPO].private
    (commit, initial) = server.commits(REPO, "main")
    assert report["commit"] == commit.id and commit.parent == initial.id and report["verified"]
    again = run(out, REPO, "--execute")
    assert again.exit_code == 0 and "nothing to do" in again.stdout and "model.safetensors" not in again.stdout
    assert f"0 new, 0 changed, 0 deleted, {len(os.listdir(out))} unchanged; 0 B to upload" in again.stdout
    assert push(out, REPO, PushOptions(tag="v1", execute=True))["tagged"] == "v1"
    assert "nothing to do" in run(out, REPO, "--tag", "v1", "--execute").stdout
    assert server.tags(REPO) == {"v1": commit.id} and len(server.commits(REPO, "main")) == 2


def test_a_card_is_titled_as_its_repository_unless_it_was_named(out, server, unloaded):
    card(out, CardOptions(name="out"))
    before = (out / "README.md").read_text()
    push(out, REPO)
    assert (out / "README.md").read_text() == before  # a plan changes nothing
    push(out, REPO, PushOptions(execute=True))
    assert "# model\n" in (out / "README.md").read_text()
    lines = []
    push(out, f"{REPO}-2", PushOptions(execute=True), say=lines.append)  # which named the first repository to be loaded
    assert lines[0].startswith(f"the card is titled {REPO}, and will be titled {REPO}-2 on the Hub")
    readme = server.read(f"{REPO}-2", "README.md").decode()
    assert "# model-2\n" in readme and f'repo = "{REPO}-2"' in readme
    card(out, CardOptions(name="another"))
    push(out, REPO, PushOptions(execute=True))
    assert "# another\n" in (out / "README.md").read_text()


def test_a_tag_stays_where_it_is(out, server, unloaded):
    push(out, REPO, PushOptions(tag="v1", execute=True))
    write_own_card(out)
    before = server.branches(REPO)
    with pytest.raises(CheckpointError, match="`tag` must be new"):
        push(out, REPO, PushOptions(tag="v1", execute=True))
    assert server.branches(REPO) == before
    assert push(out, REPO, PushOptions(tag="v2", execute=True))["tagged"] == "v2"


def test_what_was_never_verified_is_verified_by_the_next_run(out, server, monkeypatch):
    """A push that is killed behind its commit leaves one that nobody has loaded, and no tag."""
    tried = []
    monkeypatch.setattr(hub.Push, "logits", lambda self, installed, commit: tried.append(commit) or "the same")
    commit = push(out, REPO, PushOptions(execute=True))["commit"]
    tried.clear()
    assert not push(out, REPO)["verified"] and tried == []
    lines = []
    report = push(out, REPO, PushOptions(execute=True), say=lines.append)
    assert any(line.startswith("nothing to do: ") for line in lines)
    assert report["verified"] and report["commit"] == commit and tried == [None, commit]
    write_own_card(out)
    made = push(out, REPO, PushOptions(create_pr=True, execute=True))
    tried.clear()
    again = push(out, REPO, PushOptions(create_pr=True, execute=True))
    assert again["verified"] and tried == [None, made["commit"]] and again["pull_request"] == made["pull_request"]
    assert len(server.commits(REPO, "main")) == 2 and len(server.pulls(REPO)) == 1
    monkeypatch.setattr(hub.Push, "logits", lambda self, installed, commit: str(commit))
    with pytest.raises(CheckpointError, match=r"not verified and not tagged: the logits .* are not those"):
        push(out, REPO, PushOptions(create_pr=True, execute=True))


def test_the_wait_is_the_one_that_the_hub_asks_for(out, server, unloaded, monkeypatch):
    """By the header that it has for it; within bounds."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for seconds in (55, 4000):
        server.fail("GET .*/refs", 429, seconds=seconds)
        push(out, REPO)
    assert waits == [56, 300]


@pytest.mark.parametrize("header", [{"Retry-After": "9" * 30}, {"RateLimit": '"api";r=0;t=99999999'}], ids=str)
def test_no_answer_is_waited_for_as_long_as_it_asks(header, out, server, unloaded, monkeypatch):
    """huggingface_hub, which tries again on its own, was told to wait for years, and did."""
    waits, reply = [], server.handle
    answers = [Answer(b"", 429, header)]
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(
        server, "handle", lambda request: answers.pop() if "/tree/" in request.path and answers else reply(request)
    )
    push(out, REPO, PushOptions(execute=True))
    assert not answers and waits and max(waits) <= 301


@pytest.mark.parametrize("token", ["hf_a\u200b", "hf_a\x1b[2J"])
def test_a_token_that_none_is(token, out, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(CheckpointError, match="the token must be of ASCII signs") as caught:
        push(out, REPO)
    assert token not in str(caught.value)


@pytest.mark.parametrize("error", [KeyError("branches"), TypeError("a list"), AttributeError("'list' has no get")])
def test_answers_of_another_kind_are_told(error, out, server, monkeypatch):
    def odd(self):
        raise error

    monkeypatch.setattr(Remote, "refs", odd)
    with pytest.raises(CheckpointError, match=r"must answer as the Hub does .*; nothing was sent"):
        push(out, REPO)


def test_no_password_of_an_address_is_told(out, server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://me:secret@127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"connection to http://127\.0\.0\.1:9 must hold") as caught:
        push(out, REPO)
    assert "secret" not in str(caught.value)


def test_a_reader_that_goes_away_is_no_fault_of_the_hub(out, server, unloaded):
    def gone(line):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        push(out, REPO, say=gone)


def test_branch(out, server, unloaded):
    push(out, REPO, PushOptions(execute=True))
    write_own_card(out)
    main = server.branches(REPO)["main"]
    assert push(out, REPO, PushOptions(revision="next/one"))["plan"][
        "creates_branch"
    ] and "next/one" not in server.branches(REPO)
    commit = push(out, REPO, PushOptions(revision="next/one", tag="v2", execute=True))["commit"]
    assert server.branches(REPO) == {"main": main, "next/one": commit} and server.tags(REPO) == {"v2": commit}
    assert server.commits(REPO, "next/one")[0].parent == main and is_published(server, out, "next/one")


def test_pull_request_is_made_once(out, server, unloaded):
    push(out, REPO, PushOptions(execute=True))
    main = server.branches(REPO)["main"]
    write_own_card(out)
    server.fail(COMMIT, "lost")
    report = push(out, REPO, PushOptions(create_pr=True, execute=True))
    assert server.branches(REPO) == {"main": main}
    assert server.pulls(REPO) == {"refs/pr/1": report["commit"]} and report["pull_request"].endswith("/discussions/1")
    assert is_published(server, out, "refs/pr/1")
    again = push(out, REPO, PushOptions(create_pr=True, execute=True))
    assert again["pull_request"] == report["pull_request"] and len(server.pulls(REPO)) == 1


def test_a_public_repository_does_not_turn_private(out, server, unloaded):
    push(out, REPO, PushOptions(execute=True))
    with pytest.raises(CheckpointError, match="`private`"):
        push(out, REPO, PushOptions(private=True))


def test_the_hub_s_own_rules_for_cards(out, server, monkeypatch):
    """They are asked before a repository is created; this Hub's refuse what check_card lets pass."""
    for name in ("check_card", "check_metadata"):
        monkeypatch.setattr(release, name, lambda *_: None)
    (out / "README.md").write_text("---\nlicense: apache-2.0\ntags: 1\n---\n")
    with pytest.raises(CheckpointError, match=r"front matter of .*README.md.* must be valid on the Hub .*tags"):
        push(out, REPO, PushOptions(execute=True))
    assert not server.repos


def test_licenses_are_those_of_the_hub(out, server, unloaded):
    """Which it is asked, before a repository is created."""
    card(out, CardOptions(license="apache2"))
    with pytest.raises(CheckpointError, match=r"must be valid on the Hub .*license.* must be one of"):
        push(out, REPO, PushOptions(execute=True))
    assert not server.repos


@pytest.mark.parametrize("kind", [429, 500, 503, "cut", "half", "lost"])
@pytest.mark.parametrize("place", [COMMIT, UPLOAD, TREE, r"POST .*/create$", r"POST .*/batch", r"POST .*/tag/", "refs"])
def test_what_passes_is_overcome(kind, place, out, server, unloaded):
    fault = server.fail(place, kind, times=2)
    assert push(out, REPO, PushOptions(tag="v1", execute=True))["tagged"] == "v1"
    assert fault.hits == 2 or (kind == "lost" and place in (COMMIT, r"POST .*/tag/"))
    assert is_published(server, out, "v1") and len(server.commits(REPO, "main")) == 2


@pytest.mark.parametrize("kind", [401, 403, 404, 500, "cut", "half"])
@pytest.mark.parametrize("place", [COMMIT, UPLOAD, TREE, r"POST .*/batch"])
def test_what_stays_leaves_the_remote_as_it_was(kind, place, out, server, unloaded):
    push(out, REPO, PushOptions(execute=True))
    save_weights(out, {name: value + 1 for name, value in load_weights(out).items()})
    reseal(out)
    before = (server.branches(REPO), server.tags(REPO), server.files(REPO))
    server.fail(place, kind, times=math.inf)
    result = run(out, REPO, "--tag", "v2", "--execute")
    assert result.exit_code == 1 and TOKEN not in result.output
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert ("nothing was sent" if place == TREE else "the remote is unchanged") in error
    assert kind not in (401, 403) or place in (UPLOAD, TREE) or "hf auth login" in error
    assert before == (server.branches(REPO), server.tags(REPO), server.files(REPO))


def test_a_connection_that_ends_for_good(out, server, unloaded):
    """Nobody can then say what the remote holds, and the next run finds out."""
    push(out, REPO, PushOptions(execute=True))
    write_own_card(out)
    server.fail(COMMIT, "lost")
    server.fail(r"GET .*/refs", "cut", times=math.inf, after=1)
    with pytest.raises(CheckpointError, match="the Hub does not say whether anything changed"):
        push(out, REPO, PushOptions(execute=True))
    server.faults.clear()
    push(out, REPO, PushOptions(tag="v2", execute=True))
    assert len(server.commits(REPO, "main")) == 3 and is_published(server, out, "v2")


def test_a_race_is_told_and_not_overwritten(out, server, unloaded):
    push(out, REPO, PushOptions(execute=True))
    write_own_card(out)
    made = []
    server.fail(COMMIT, lambda: made.append(server.commit(REPO, {"theirs.txt": b"1"}, title="Theirs")))
    with pytest.raises(CheckpointError) as caught:
        push(out, REPO, PushOptions(tag="v2", execute=True))
    for word in (made[0], "'Theirs'", "theirs.txt", "nothing of this push was committed"):
        assert word in str(caught.value)
    assert server.branches(REPO)["main"] == made[0] and not server.tags(REPO)


def test_a_repository_that_somebody_else_creates_meanwhile(out, server, unloaded):
    def create():
        huggingface_hub.HfApi(token=TOKEN).create_repo(REPO)
        server.commit(REPO, {"theirs.txt": b"1"})

    server.fail(r"POST .*/create$", create)
    with pytest.raises(CheckpointError, match="somebody else has created it"):
        push(out, REPO, PushOptions(execute=True))
    assert set(server.files(REPO)) == {".gitattributes", "theirs.txt"}


def test_somebody_s_commit_on_top_of_one_whose_answer_was_lost(out, server, unloaded):
    push(out, REPO, PushOptions(execute=True))
    write_own_card(out)
    server.fail(COMMIT, "lost")
    server.fail(r"GET .*/refs", lambda: server.commit(REPO, {"theirs.txt": b"1"}), after=1)
    commit = push(out, REPO, PushOptions(tag="v2", execute=True))["commit"]
    theirs, ours, _, _ = server.commits(REPO, "main")
    assert ours.id == commit == server.tags(REPO)["v2"] and theirs.parent == ours.id
    assert is_published(server, out, "v2")


@pytest.mark.parametrize("place", [UPLOAD, COMMIT])
def test_wrong_checksums_are_found_and_not_tagged(place, out, server, unloaded):
    server.fail(place, "corrupt")
    with pytest.raises(CheckpointError) as caught:
        push(out, REPO, PushOptions(tag="v1", execute=True))
    commit = server.branches(REPO)["main"]
    for word in (commit, "`main`", "not tagged", "different: ", "run it again"):
        assert word in str(caught.value)
    assert not server.tags(REPO)
    push(out, REPO, PushOptions(tag="v1", execute=True))
    assert is_published(server, out, "v1")


def test_other_logits_are_not_tagged(out, server, monkeypatch):
    monkeypatch.setattr(hub.Push, "logits", lambda self, installed, commit: f"{installed}")
    with pytest.raises(CheckpointError) as caught:
        push(out, REPO, PushOptions(tag="v1", execute=True))
    assert "not tagged" in str(caught.value) and "logits" in str(caught.value) and not server.tags(REPO)
    assert server.branches(REPO)["main"] in str(caught.value)


def test_a_model_that_does_not_load_is_not_sent(out, server, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(CheckpointError, match=r"the model must load and run .*nothing was sent"):
        push(out, REPO, PushOptions(execute=True))
    assert not server.repos


PYTHON = """#!/bin/sh
echo "$@" >> arguments
env >> environment
case $(cat) in
*'"installed": true'*) echo '{"logits": "x", "finite": true, "module": "olmem.modeling_olmem"}'; exit ;;
esac
echo '{"logits": "x", "finite": true, "module": "transformers_modules.modeling_olmem"}'
"""


@pytest.fixture
def played(monkeypatch, tmp_path) -> Path:
    """The processes that load a model are played by a script, which notes what it is told in this folder."""
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["half", "cut", 500, "hang"])
@pytest.mark.parametrize("fails", [2, 9])
def test_a_download_that_ends_too_early_is_tried_again(fails, kind, out, server, played):
    server.fail("GET /storage/", kind, times=fails)
    result = run(out, REPO, "--tag", "v1", "--execute")
    assert result.exit_code == (fails > 5), result.output
    assert server.tags(REPO) == ({} if fails > 5 else {"v1": server.branches(REPO)["main"]})
    assert fails < 5 or "not verified and not tagged" in result.stderr
    asked = [request for request in server.requests if request.storage and request.method == "GET"]
    resumed = [request for request in asked if "range" in request.headers]
    assert len(asked) == min(fails, 4) + 1 and len(resumed) == (len(asked) - 1 if kind == "half" else 0)


def test_the_process_that_loads_the_model_has_no_token(out, server, played, monkeypatch):
    """It had the one that can write, in the environment of code that came from the Hub."""
    monkeypatch.setenv("ANOTHER_NAME", f"Bearer {TOKEN}")
    monkeypatch.setenv("HF_TOKEN_PATH", str(played / "token"))
    (played / "token").write_text(TOKEN)
    push(out, REPO, PushOptions(tag="v1", execute=True))
    told = (played / "arguments").read_text() + (played / "environment").read_text()
    assert TOKEN not in told and "HF_TOKEN_PATH" not in told and told.count("HF_HUB_OFFLINE=1") == 2


CODE = "import os; open(os.environ['RAN'], 'w').write(os.environ.get('HF_TOKEN', 'no token')) #"


def lying(server: HubServer, lies: dict[str, bytes]) -> None:
    """The Hub sends other bytes of these files than those whose checksums it lists."""
    handle = server.handle

    def changed(request):
        answer = handle(request)
        name = request.route.rpartition("/")[2]
        return Answer(lies[name], headers={"ETag": '"0"'}) if "/resolve/" in request.route and name in lies else answer

    server.handle = changed


def longer(data: bytes, text: str) -> bytes:
    """Other bytes of the same length, that begin with the text."""
    return text.encode().ljust(len(data), b"#")[: len(data)]


@pytest.mark.parametrize("name", ["modeling_olmem.py", "model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["same length", "longer", "shorter"])
def test_files_that_the_hub_sends_otherwise_than_it_lists_them_are_not_run(
    how, name, out, server, monkeypatch, tmp_path
):
    """They were run, with the write token at hand, and called verified, bit for bit."""
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    if not (out / name).exists():
        return
    data = (out / name).read_bytes()
    code = f"{CODE}\n" if name.endswith(".py") else ""
    sent = {"same length": longer(data, code or "x"), "longer": data + b"#", "shorter": data[:-1]}[how]
    if name == "model.safetensors" and how == "same length":  # one row of the embedding, which no prompt need hold
        sent = bytearray(data)
        sent[-1] ^= 1
    monkeypatch.setattr(hub.Push, "reload", lambda self, task, scratch: played_reload(task, scratch, tmp_path))
    lying(server, {name: bytes(sent)})
    with pytest.raises(CheckpointError, match=f"not verified and not tagged: the Hub sends .*{re.escape(name)}"):
        push(out, REPO, PushOptions(tag="v1", execute=True))
    assert not server.tags(REPO) and not (tmp_path / "ran").exists()


def played_reload(task, scratch, place):
    if not task["installed"]:
        (place / "ran").write_text("")
    return {"logits": "x", "finite": True, "module": "olmem." if task["installed"] else "transformers_modules."}


def test_a_file_that_changes_while_it_is_published_is_not_sent(out, server, monkeypatch):
    """What was checked is what is sent: another file may be one that was refused."""

    def meanwhile(self, installed, commit):
        data = bytearray((out / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (out / "model.safetensors").write_bytes(data)
        return "the same"

    monkeypatch.setattr(hub.Push, "logits", meanwhile)
    with pytest.raises(CheckpointError, match=r"model\.safetensors` must stay as it is"):
        push(out, REPO, PushOptions(execute=True))
    assert not any(request.method == "PUT" for request in server.requests)


# Addresses that a server names


@pytest.fixture
def foreign():
    """Another host, which answers as a Hub, and is asked with no token."""
    with HubServer(token=TOKEN) as other:
        other.endpoint = other.endpoint.replace("127.0.0.1", "localhost")  # where it does hear what it is asked
        yield other


def leads_away(server: HubServer, pattern: str, change) -> None:
    """Changes what is answered to the requests of this pattern."""
    handle = server.handle

    def changed(request):
        answer = handle(request)
        return change(answer) if re.search(pattern, f"{request.method} {request.path}") else answer

    server.handle = changed


def next_page(elsewhere: str):
    def change(answer):
        answer.headers["Link"] = f'<{elsewhere}/api/models/x/y/tree/main>; rel="next"'
        return answer

    return change


def verify_action(elsewhere: str):
    def change(answer):
        for entry in answer.content["objects"]:
            for action in entry.get("actions", {}).values():
                if "lfs/objects/verify" in action["href"]:
                    action["href"] = f"{elsewhere}/verify"
        return answer

    return change


def redirect(elsewhere: str):
    return lambda answer: Answer(b"", 307, {"Location": f"{elsewhere}/elsewhere"})


@pytest.mark.parametrize(
    ("pattern", "change"),
    [
        ("GET .*/tree/", next_page),
        ("GET .*/commits/", next_page),
        ("GET .*/discussions", next_page),
        ("POST .*/batch", verify_action),
        ("POST .*/commit/", redirect),
        ("GET .*/refs", redirect),
        ("GET .*/resolve/", redirect),
        ("POST .*/preupload", redirect),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_token_goes_to_the_hub_alone(pattern, change, out, server, foreign, monkeypatch, unloaded_but_sent):
    """It went to the host of the next page of a listing, and of what confirms an upload."""
    if "commits" in pattern or "discussions" in pattern:
        push(out, REPO, PushOptions(execute=True))
        write_own_card(out)
        server.fail(COMMIT, "lost" if "commits" in pattern else 500, times=1)
    leads_away(server, pattern, change(foreign.endpoint))
    with contextlib.suppress(CheckpointError):
        push(out, REPO, PushOptions(create_pr="discussions" in pattern, execute=True))
    assert [request for request in foreign.requests if request.token] == []
    tokens = [request for request in foreign.requests if TOKEN in json.dumps(request.headers) + request.path]
    assert tokens == []


def test_an_address_elsewhere_is_told(out, server, foreign, unloaded):
    leads_away(server, "POST .*/batch", verify_action(foreign.endpoint))
    result = run(out, REPO, "--execute")
    assert result.exit_code == 1 and "it named one of localhost, which was not asked" in result.stderr
    assert "`main`" in result.stderr or "was created" in result.stderr or "unchanged" in result.stderr


@pytest.mark.parametrize("pattern", ["GET .*/refs", "GET .*/tree/", "POST .*/validate-yaml"])
def test_answers_without_end_are_refused(pattern, out, server, monkeypatch, unloaded):
    push(out, REPO, PushOptions(execute=True))
    monkeypatch.setattr(remote, "LARGEST_ANSWER", 2**16)
    leads_away(server, pattern, lambda answer: Answer(b" " * 2**17))
    with pytest.raises(CheckpointError, match="must answer in at most 65,536 bytes"):
        push(out, REPO)


def test_listings_without_end_are_refused(out, server, monkeypatch, unloaded):
    push(out, REPO, PushOptions(execute=True))
    monkeypatch.setattr(remote, "MOST_REQUESTS", 20)
    leads_away(server, "GET .*/tree/", next_page(server.endpoint.replace("/x/y/", f"/{REPO}/")))
    leads_away(
        server, "GET .*/x/y/", lambda answer: Answer([], headers={"Link": f'<{server.endpoint}/api/x/y/>; rel="next"'})
    )
    with pytest.raises(CheckpointError, match="must answer in at most 20 requests"):
        push(out, REPO)


@pytest.mark.parametrize("role", [None, "read"])
def test_tokens_that_may_not(role, out, server, monkeypatch, unloaded):
    if role:
        server.tokens["hf_other"] = role
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    result = run(out, REPO, "--execute")
    assert result.exit_code == 1 and "hf auth login" in result.stderr and "hf_other" not in result.output
    assert "unchanged" in result.stderr or "nothing was sent" in result.stderr
    assert not server.repos


def test_without_token_or_network_on_purpose(out, server, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match="hf auth login"):
        push(out, REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="`HF_HUB_OFFLINE` must be unset"):
        push(out, REPO)
    assert server.requests == []


def test_errors_do_not_quote_the_token():
    told = Remote(REPO, "hf_secret").explain(RuntimeError("it was hf_secret"))
    assert "it was hf_…" in told and "hf_secret" not in told


def test_offloaded_layers_give_the_same_logits(out, monkeypatch, capsys, tmp_path):
    """What the process that loads a model does where it is larger than memory."""
    found = set()
    for offload in (None, str(tmp_path)):
        task = {"model": str(out), "installed": True, "revision": None, "dtype": "float32", "offload": offload}
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([task | {"input_ids": [list(range(40))]}])))
        reload.main()
        report = json.loads(capsys.readouterr().out)
        assert report["module"].startswith("olmem.")
        found.add(report["logits"])
    assert len(found) == 1


# Loads a model as a user would; argv: where to save its logits.
LOADS = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{REPO}", revision="v1", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
torch.save(model(torch.arange(40)[None] % 7).logits, sys.argv[1])
"""


@pytest.mark.slow
def test_a_converted_model_is_published(server, tmp_path):
    """With a memory and in bfloat16, its models loaded in processes of their own."""
    out = tmp_path / "out"
    memory = {"num_memory_tokens": 2, "memory_segment_length": 16, "retrieval_layers": [1]}
    convert(source("olmo_core_swa"), out, ConvertOptions(dtype="bfloat16", memory=memory))
    card(out, CardOptions(license="apache-2.0"))
    result = run(out, REPO, "--private", "--tag", "v1", "--execute")
    assert result.exit_code == 0, result.output
    assert "verified: the same logits, bit for bit" in result.stdout and TOKEN not in result.output
    assert "logits, weights and config are those of OLMo-core" in result.stdout


@pytest.mark.slow
def test_from_training_to_a_user_who_loads_it(server, trained, quick_reload, tmp_path):
    """Whole: by commands alone, without a checkpoint that it could be compared with, with nothing left out; then
    without the network."""
    out = Path(shutil.copytree(trained, tmp_path / "out"))
    for command, options, words in (
        ("push", [REPO], "run `olmem card"),
        ("card", ["--license", "mit", "--origin", "scratch"], "run `olmem verify"),
        ("push", [REPO], "run `olmem verify"),
        ("verify", [], "it was not compared with another checkpoint"),
        ("push", [REPO], "not verified: what it was trained on"),
    ):
        result = CliRunner().invoke(app, [command, str(out), *options])
        assert words in result.output, result.output
    assert not server.repos and "own code computes what the installed olmem does" in result.stdout
    result = run(out, REPO, "--tag", "v1", "--execute")
    assert "verified: the same logits, bit for bit" in result.stdout and TOKEN not in result.output, result.output
    text = server.read(REPO, "README.md", "v1").decode()
    assert "# model\n" in text and f'repo = "{REPO}"' in text and is_published(server, out, "v1")
    home = os.environ | server.env | {"HF_HOME": str(tmp_path / "home")}
    asked = []
    for name, offline in (("loaded", "0"), ("offline", "1")):
        child = run_fresh(LOADS, tmp_path / name, env=home | {"HF_HUB_OFFLINE": offline})
        assert child.returncode == 0, child.stderr
        asked.append(len(server.requests))
    assert asked[0] == asked[1]
    from olmem import OlmemForCausalLM

    expected = OlmemForCausalLM.from_pretrained(out)(torch.arange(40)[None] % 7).logits
    for name in ("loaded", "offline"):
        assert torch.equal(torch.load(tmp_path / name), expected)
    written = [path for folder in (out, tmp_path) for path in folder.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert all(TOKEN not in request.path for request in server.requests)


@pytest.mark.parametrize("place", [UPLOAD, COMMIT, r"POST .*/tag/"])
def test_a_push_that_is_killed_is_gone_on_with(place, out, server, unloaded):
    """`benchmarks/push.py` does this to the command, at any request."""
    process = multiprocessing.get_context("fork").Process(
        target=push, args=(out, REPO, PushOptions(tag="v1", execute=True))
    )
    server.fail(place, process.kill)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    uploads = {request.path for request in server.requests if request.method == "PUT"}
    push(out, REPO, PushOptions(tag="v1", execute=True))
    assert is_published(server, out, "v1") and len(server.commits(REPO, "main")) == 2
    assert len([request for request in server.requests if request.method == "PUT"]) == len(uploads)
