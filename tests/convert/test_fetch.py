"""A model on the Hub as SRC: what is downloaded, what is said of it, and what is refused, by a Hub on this machine."""

import errno
import io
import json
import os
import sys
from pathlib import Path

import huggingface_hub
import pytest
from convert.checkpoints import edit_json, snapshot
from convert.fuzzing.seeds import olmo2, olmo2_pickled
from convert.test_hub import leads_away, next_page
from convert.writers import write_olmo_core
from hub_server import HubServer
from huggingface_hub import HfApi
from olmem_convert import CheckpointError, ConvertOptions, VerifyOptions, convert, verify
from olmem_convert.cli import app
from olmem_convert.commands import fetching
from typer.testing import CliRunner

REPO = "lab/small"


@pytest.fixture
def server(server, monkeypatch, tmp_path) -> HubServer:
    """The Hub of all tests, with a cache of each test's own to download to."""
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {"HF_HUB_CACHE": str(tmp_path / "cache"), "HUGGINGFACE_CO_URL_TEMPLATE": template}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    return server


@pytest.fixture
def native(tmp_path) -> Path:
    olmo2(tmp_path / "native")
    return tmp_path / "native"


def publish(server: HubServer, folder: Path) -> str:
    """Uploads a folder, with code and a card beside it, and returns the commit."""
    (folder / "modeling_evil.py").write_text("raise SystemExit('it ran')\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    api = HfApi(endpoint=server.endpoint, token=server.token)
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    server.requests.clear()
    return server.branches(REPO)["main"]


def test_a_model_on_the_hub_is_converted_as_its_folder_is(server, native, tmp_path):
    commit, lines = publish(server, native), []
    report = convert(REPO, tmp_path / "out", say=lines.append)
    assert f"{REPO} is at commit {commit}" in lines and lines[0].startswith(f"downloading {REPO}")
    found = f"Transformers olmo2, model.safetensors, of {REPO} at commit {commit}"
    assert report["format"] == found and any(line.startswith(f"found {found}: ") for line in lines)
    assert json.loads((tmp_path / "out" / "verification.json").read_text())["source"] == found
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"converted from `{found}`" in card and f"\nbase_model: {REPO}\n" in card
    convert(native, tmp_path / "local")
    told = ("README.md", "verification.json")
    of_hub, of_folder = snapshot(tmp_path / "out"), snapshot(tmp_path / "local")
    assert {name: of_hub[name] for name in of_hub if name not in told} == {
        name: of_folder[name] for name in of_folder if name not in told
    }
    asked = {request.path for request in server.requests if "/resolve/" in request.path}
    assert any("model.safetensors" in path for path in asked)
    assert not any(name in path for path in asked for name in (".py", "README.md", ".gitattributes"))
    assert verify(tmp_path / "out", REPO, VerifyOptions())["source"] == found
    with pytest.raises(CheckpointError, match=r"`revision` must be left out without --against \(got 'v1'\)"):
        verify(tmp_path / "out", options=VerifyOptions(revision="v1"))


def test_a_folder_wins_over_a_model_on_the_hub(server, native, tmp_path, monkeypatch):
    publish(server, native)
    monkeypatch.chdir(tmp_path)
    Path(REPO).parent.mkdir()
    os.rename(native, REPO)
    assert convert(REPO, tmp_path / "out")["format"] == "Transformers olmo2, model.safetensors"
    assert server.requests == []
    with pytest.raises(CheckpointError, match="`revision` must be left out unless SRC is a model on the Hub"):
        convert(REPO, tmp_path / "other", ConvertOptions(revision="main"))


def test_nothing_is_downloaded_for_a_folder_that_may_not_be_written(server, native, tmp_path):
    publish(server, native)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="`OUT` must not exist yet"):
        convert(REPO, tmp_path / "out")
    assert server.requests == []
    convert(REPO, tmp_path / "other", ConvertOptions(verify=False))
    [snapshot] = (tmp_path / "cache").glob("models--*/snapshots/*")
    with pytest.raises(CheckpointError, match="`OUT` and SRC must lie apart"):
        convert(REPO, snapshot / "out")


def test_a_revision_is_a_branch_a_tag_or_a_commit(server, native, tmp_path):
    first = publish(server, native)
    api = HfApi(endpoint=server.endpoint, token=server.token)
    api.create_branch(REPO, branch="stage1-step10")
    config = json.loads((native / "config.json").read_text()) | {"rms_norm_eps": 0.125}
    second = server.commit(REPO, {"config.json": json.dumps(config).encode()}, branch="stage1-step10")
    for number, (revision, commit) in enumerate((("stage1-step10", second), (first, first), (None, first))):
        out = tmp_path / str(number)
        report = convert(REPO, out, ConvertOptions(revision=revision, verify=False))
        assert report["format"].endswith(f"at commit {commit}")
        eps = json.loads((out / "config.json").read_text())["rms_norm_eps"]
        assert (eps == 0.125) == (commit == second)


def test_without_a_network_what_was_downloaded_is_found(server, native, tmp_path, monkeypatch):
    commit = publish(server, native)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"`SRC`.*nor all of it in the Hub's cache.*unset HF_HUB_OFFLINE"):
        convert(REPO, tmp_path / "out")
    assert server.requests == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    convert(REPO, tmp_path / "online", ConvertOptions(verify=False))
    server.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert convert(REPO, tmp_path / "out", ConvertOptions(verify=False))["format"].endswith(commit)
    assert server.requests == []


def test_a_hub_that_cannot_be_reached_is_an_error(server, native, tmp_path, monkeypatch):
    """What was downloaded last was taken for what the Hub has now."""
    commit = publish(server, native)
    convert(REPO, tmp_path / "before", ConvertOptions(verify=False))
    server.close()
    with pytest.raises(CheckpointError, match=r"`SRC` must be downloaded.*or set HF_HUB_OFFLINE=1"):
        convert(REPO, tmp_path / "out")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert convert(REPO, tmp_path / "out", ConvertOptions(verify=False))["format"].endswith(commit)


def test_all_files_are_of_one_commit(server, tmp_path, monkeypatch):
    """`main` moves between the first download and that of pickles."""
    olmo2_pickled(tmp_path / "native")
    commit, download = publish(server, tmp_path / "native"), fetching.download

    def then_move(*arguments):
        folder = download(*arguments)
        server.commit(REPO, {"config.json": b"{}"})
        return folder

    monkeypatch.setattr(fetching, "download", then_move)
    assert convert(REPO, tmp_path / "out", ConvertOptions(verify=False))["format"].endswith(commit)


def test_a_tokenizer_without_a_tokenizer_json_is_refused(server, native, tmp_path):
    """The model was converted without one, and nothing was said."""
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (native / name).unlink(missing_ok=True)
    (native / "tokenizer.model").write_bytes(b"sentences")
    publish(server, native)
    with pytest.raises(CheckpointError, match=r"must have a tokenizer.json .* of tokenizer.model Transformers makes"):
        convert(REPO, tmp_path / "out")


def test_an_error_of_this_machine_says_its_own_reason(server, native, tmp_path, monkeypatch):
    publish(server, native)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    monkeypatch.setattr(fetching, "download", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*HF_HUB_CACHE") as caught:
        convert(REPO, tmp_path / "out")
    assert "again" not in str(caught.value)


@pytest.mark.parametrize("pickled", [False, True])
def test_pickles_are_downloaded_where_there_is_nothing_else(pickled, server, tmp_path):
    folder = tmp_path / "native"
    (olmo2_pickled if pickled else olmo2)(folder)
    if not pickled:
        (folder / "pytorch_model.bin").write_bytes(b"a copy of the same weights")
    publish(server, folder)
    convert(REPO, tmp_path / "out")
    assert any(".bin" in request.path for request in server.requests if "/resolve/" in request.path) == pickled


def test_a_native_checkpoint_on_the_hub(server, tmp_path):
    publish(server, write_olmo_core(tmp_path / "native"))
    assert convert(REPO, tmp_path / "out")["verification"]["passed"]


@pytest.mark.parametrize(
    ("name", "options", "pattern", "kind", "words"),
    [
        ("lab/nothing", {}, None, 0, ("lab/nothing does not exist here", "no such model", "hf auth login")),
        ("lab/a--b", {}, None, 0, ("`SRC` must be a checkpoint or the id", "got lab/a--b", "correct the id")),
        (REPO, {"revision": "v9"}, None, 0, ("`revision` must be a branch", "'v9'", "/tree/main")),
        (REPO, {}, "GET .*safetensors", 404, ("`SRC` must be downloaded", "run the same command again")),
        (REPO, {}, "GET /storage/", "half", ("`SRC` must be downloaded", "run the same command again")),
    ],
)
def test_what_cannot_be_downloaded(name, options, pattern, kind, words, server, native, tmp_path):
    publish(server, native)
    if pattern:
        server.fail(pattern, kind, times=50)
    with pytest.raises(CheckpointError) as caught:
        convert(name, tmp_path / "out", ConvertOptions(**options))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_token_is_sent_to_no_other_host(server, native, tmp_path):
    publish(server, native)
    with HubServer(token="hf_other") as other:
        leads_away(server, "GET .*/tree/", next_page(other.endpoint))
        with pytest.raises(CheckpointError, match="must name addresses of its own"):
            convert(REPO, tmp_path / "out")
        assert not other.requests


def test_a_snapshot_that_holds_no_model_says_what_it_holds(server, native, tmp_path):
    edit_json(native / "config.json", model_type="llama")
    publish(server, native)
    with pytest.raises(CheckpointError, match="Transformers folder of `model_type` 'llama'"):
        convert(REPO, tmp_path / "out")


def test_command(server, native, tmp_path):
    commit = publish(server, native)
    arguments = ["convert", REPO, str(tmp_path / "out"), "--revision", commit, "--no-verify"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    proposed = next(line for line in result.stdout.splitlines() if line.startswith("not verified")).split("`")[1]
    assert CliRunner().invoke(app, proposed.split()[1:]).exit_code == 0


def test_progress_is_shown_where_there_is_a_terminal(server, native, tmp_path, monkeypatch):
    publish(server, native)
    for name, terminal in (("piped", False), ("shown", True)):
        errors = io.StringIO()
        monkeypatch.setattr(errors, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(sys, "stderr", errors)
        convert(REPO, tmp_path / name, ConvertOptions(verify=False))
        shown = errors.getvalue()
        assert ("Fetching" in shown, "100%" in shown) == (terminal, terminal), shown
