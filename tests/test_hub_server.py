"""The Hub on this machine answers huggingface_hub's own client as the real one does, and fails when it is told to."""

import hashlib
import math
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from convert.checkpoints import options, source
from fresh import run_fresh
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from olmem_convert import ConvertOptions, convert

NAME = "tester/m"
WEIGHTS = bytes(range(256)) * 400
CARD = b"---\nlicense: apache-2.0\ntags: [olmo]\n---\n# A card\n"


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The pauses between the client's attempts, in seconds, which are not made."""
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=waited.append))
    return waited


@pytest.fixture
def hub(monkeypatch, tmp_path, waits):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # as it is where only real networks count
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    huggingface_hub.utils.disable_progress_bars()
    with HubServer() as server:
        yield server


@pytest.fixture
def api(hub) -> HfApi:
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo(NAME)
    return api


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "folder"
    (path / "deep" / "er").mkdir(parents=True)
    (path / "README.md").write_bytes(CARD)
    (path / "deep" / "er" / "a.json").write_bytes(b"{}")
    (path / "model.safetensors").write_bytes(WEIGHTS)
    return path


def add(files: dict[str, bytes]) -> list:
    return [CommitOperationAdd(path, data) for path, data in files.items()]


def commit(api: HfApi, *, operations: list | None = None, **kwargs):
    operations = add({"a.txt": b"1", "w.bin": WEIGHTS}) if operations is None else operations
    return api.create_commit(NAME, operations, commit_message="Change", **kwargs)


def differences(api: HfApi, folder: Path, revision: str = "main") -> list[str]:
    found = api.verify_repo_checksums(NAME, local_dir=folder, revision=revision)
    return [each["path"] for each in found.mismatches] + found.extra_paths + found.missing_paths


def status(error) -> int:
    return error.value.response.status_code


def test_a_folder_comes_back_as_it_was_pushed(hub, api, folder):
    pushed = api.upload_folder(repo_id=NAME, folder_path=folder)
    assert [one.title for one in hub.commits(NAME)] == ["Upload folder using huggingface_hub", "initial commit"]
    assert differences(api, folder) == [".gitattributes"]
    files = hub.files(NAME)
    assert files["model.safetensors"].sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert files["README.md"].oid == hashlib.sha1(b"blob %d\0" % len(CARD) + CARD).hexdigest()
    copy = Path(api.snapshot_download(NAME))
    assert copy.name == pushed.oid
    for path in ("README.md", "deep/er/a.json", "model.safetensors"):
        assert (copy / path).read_bytes() == (folder / path).read_bytes() == hub.read(NAME, path)
    assert api.upload_folder(repo_id=NAME, folder_path=folder).oid == pushed.oid
    assert len(hub.commits(NAME)) == 2


def test_history_is_never_changed(hub, api):
    first = commit(api).oid
    second = commit(api, operations=[*add({"a.txt": b"2", "d_e.txt": b"3"}), CommitOperationDelete("w.bin")]).oid
    assert [one.id for one in hub.commits(NAME)[:2]] == [second, first]
    assert hub.read(NAME, "a.txt", first) == b"1" and hub.read(NAME, "a.txt") == b"2"
    assert api.list_repo_files(NAME, revision=first) == [".gitattributes", "a.txt", "w.bin"]
    assert api.list_repo_files(NAME) == [".gitattributes", "a.txt", "d_e.txt"]
    assert api.model_info(NAME, revision=first).sha == first
    assert [one.commit_id for one in api.list_repo_commits(NAME)][:2] == [second, first]


def test_folders_are_listed_and_deleted(hub, api, folder):
    hub.page = 2
    api.upload_folder(repo_id=NAME, folder_path=folder)
    top, below = [".gitattributes", "README.md", "deep", "model.safetensors"], ["deep/er", "deep/er/a.json"]
    assert [entry.path for entry in api.list_repo_tree(NAME)] == top
    assert [entry.path for entry in api.list_repo_tree(NAME, recursive=True)] == sorted(top + below)
    assert [entry.path for entry in api.list_repo_tree(NAME, "deep/er")] == ["deep/er/a.json"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(NAME, "nothing"))
    found = api.get_paths_info(NAME, ["deep", "model.safetensors", "nothing"])
    assert [entry.path for entry in found] == ["deep", "model.safetensors"]
    assert found[1].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    api.delete_folder("deep", NAME)
    assert set(hub.files(NAME)) == {".gitattributes", "README.md", "model.safetensors"}
    with pytest.raises(EntryNotFoundError):
        api.delete_file("nothing", NAME)


def test_large_files_that_gitattributes_does_not_name_are_added_to_it(hub, api):
    commit(api, operations=add({"odd.name": b"\0" + WEIGHTS, "w.bin": WEIGHTS}))
    assert hub.files(NAME)["odd.name"].sha256
    lines = hub.read(NAME, ".gitattributes").decode().splitlines()
    assert lines[-1] == "odd.name filter=lfs diff=lfs merge=lfs -text" and len(lines) == 36


@pytest.mark.parametrize("part_size", [5 << 30, 1000])
def test_no_token_goes_to_the_storage_or_into_a_body(hub, api, part_size):
    hub.part_size = part_size
    commit(api)
    api.hf_hub_download(NAME, "w.bin")
    assert hub.read(NAME, "w.bin") == WEIGHTS
    stored = [request for request in hub.requests if request.storage]
    assert len(stored) == 1 + math.ceil(len(WEIGHTS) / part_size)
    assert not any("authorization" in request.headers for request in stored)
    assert not any(hub.token.encode() in request.body or hub.token in request.path for request in hub.requests)
    url = f"{hub.storage}{stored[-1].path}"
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {hub.token}"}))
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(url.partition("?")[0])


def test_an_upload_that_is_not_what_was_promised_is_refused(hub, api):
    commit(api, operations=add({"w.bin": WEIGHTS + b"1"}))
    [put] = [request for request in hub.requests if request.method == "PUT"]
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(hub.storage + put.path, WEIGHTS, method="PUT"))
    assert hub.read(NAME, "w.bin") == WEIGHTS + b"1"


def test_who_may_do_what(hub, api):
    hub.tokens["hf_reader"] = "read"
    private = "lab/secret"
    assert api.create_repo(private, private=True).repo_id == private
    assert hub.repos[private].private and api.model_info(private).private
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo(private)
    assert status(error) == 409 and api.create_repo(private, exist_ok=True).repo_id == private
    assert api.whoami()["name"] == "tester"
    nobody, reader, stranger = (HfApi(hub.endpoint, token) for token in (False, "hf_reader", "hf_unknown"))
    assert reader.model_info(private).private and not nobody.model_info(NAME).private
    for asking, name, expected in ((nobody, private, 401), (reader, "lab/none", 404)):
        with pytest.raises(RepositoryNotFoundError) as error:
            asking.model_info(name)
        assert status(error) == expected
    for asking, expected in ((nobody, 401), (reader, 403), (stranger, 401)):
        with pytest.raises(HfHubHTTPError) as error:
            commit(asking)
        assert status(error) == expected
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("others/m")
    assert status(error) == 403 and set(hub.repos) == {NAME, private}


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("license: [1]", '"license" must be a string'),
        ("tags: olmo", '"tags" must be an array'),
        ("a: [", "YAML Metadata Error"),
        ("just a text", "must be an object"),
        ("model-index: [{name: m, results: [{task: {type: t}}]}]", '"model-index" needs'),
    ],
)
def test_a_card_with_bad_metadata_is_refused_before_anything_is_uploaded(hub, api, folder, card, message):
    (folder / "README.md").write_text(f"---\n{card}\n---\n# A card\n")
    with pytest.raises(ValueError, match=f"Invalid metadata in README.md.\n- .*{message}"):
        api.upload_folder(repo_id=NAME, folder_path=folder)
    assert not any("preupload" in request.path for request in hub.requests)


def test_a_card_tells_of_the_model(hub, api):
    metrics = "metrics: [{type: perplexity, value: 3.5}]"
    index = f"model-index: [{{name: m, results: [{{task: {{type: t}}, dataset: {{type: d, name: D}}, {metrics}}}]}}]"
    card = f"---\nlicense: [mit, other]\nlibrary_name: transformers\nlanguage: en\n{index}\n---\n# A card\n"
    api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=NAME)
    info = api.model_info(NAME, files_metadata=True)
    assert info.library_name == "transformers" and info.card_data.eval_results[0].metric_value == 3.5
    assert {file.rfilename: file.size for file in info.siblings}["README.md"] == len(card)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# A card\n", path_in_repo="README.md", repo_id=NAME)


def test_tags_and_branches(hub, api):
    first = commit(api).oid
    api.create_branch(NAME, branch="next")
    later = commit(api, operations=add({"a.txt": b"2"}), revision="next").oid
    api.create_tag(NAME, tag="v1", revision="next", tag_message="One")
    assert hub.tags(NAME) == {"v1": later} and hub.branches(NAME) == {"main": first, "next": later}
    refs = api.list_repo_refs(NAME, include_pull_requests=True)
    assert [(ref.name, ref.ref, ref.target_commit) for ref in refs.tags] == [("v1", "refs/tags/v1", later)]
    for create in (lambda: api.create_tag(NAME, tag="v1"), lambda: api.create_branch(NAME, branch="next")):
        with pytest.raises(HfHubHTTPError) as error:
            create()
        assert status(error) == 409
    assert hub.tags(NAME) == {"v1": later}
    assert Path(api.hf_hub_download(NAME, "a.txt", revision="v1")).read_bytes() == b"2"
    with pytest.raises(RevisionNotFoundError):
        commit(api, revision="v1")
    api.delete_tag(NAME, tag="v1")
    api.delete_branch(NAME, branch="next")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(NAME, "a.txt", revision="v1", force_download=True)
    assert list(hub.branches(NAME)) == ["main"] and not hub.tags(NAME)


def test_a_file_that_is_not_there(hub, api):
    with pytest.raises(EntryNotFoundError) as error:
        api.hf_hub_download(NAME, "nothing.json")
    assert error.value.response.headers["X-Repo-Commit"] == hub.branches(NAME)["main"]
    assert not api.file_exists(NAME, "nothing.json") and api.file_exists(NAME, ".gitattributes")
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("tester/none", "a.txt")


def test_only_the_first_of_two_racing_commits_is_made(hub, api):
    base = api.model_info(NAME).sha
    fault = hub.fail("POST .*/commit/", lambda: hub.commit(NAME, {"b.txt": b"other's"}))
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        commit(api, parent_commit=base)
    assert status(error) == 412 and fault.hits == 1
    assert set(hub.files(NAME)) == {".gitattributes", "b.txt"}
    assert commit(api, parent_commit=hub.branches(NAME)["main"]).oid == hub.branches(NAME)["main"]
    assert set(hub.files(NAME)) == {".gitattributes", "a.txt", "b.txt", "w.bin"}


def test_a_pull_request(hub, api, folder):
    main = api.model_info(NAME).sha
    opened = api.upload_folder(repo_id=NAME, folder_path=folder, create_pr=True, parent_commit=main)
    assert (opened.pr_num, opened.pr_revision) == (1, "refs/pr/1") and hub.branches(NAME) == {"main": main}
    more = commit(api, revision="refs/pr/1").oid
    assert hub.pulls(NAME) == {"refs/pr/1": more} and differences(api, folder, "refs/pr/1") == [
        ".gitattributes",
        "a.txt",
        "w.bin",
    ]
    details = api.get_discussion_details(NAME, 1)
    assert details.status == "open" and [event.oid for event in details.events] == [opened.oid, more]
    hub.commit(NAME, {"b.txt": b"other's"})
    api.merge_pull_request(NAME, 1)
    assert set(hub.files(NAME)) == {"b.txt", *hub.files(NAME, "refs/pr/1")}
    assert api.get_discussion_details(NAME, 1).merge_commit_oid == hub.branches(NAME)["main"]
    draft = api.create_pull_request(NAME, "Conflict")
    commit(api, operations=add({"b.txt": b"mine"}), revision=draft.git_reference)
    hub.commit(NAME, {"b.txt": b"other's again"})
    api.change_discussion_status(NAME, draft.num, "open")
    with pytest.raises(HfHubHTTPError, match="conflicts"):
        api.merge_pull_request(NAME, draft.num)
    assert [one.status for one in api.get_repo_discussions(NAME)] == ["merged", "open"]


@pytest.mark.parametrize("kind", [429, 500, 503, "cut", "half", "lost"])
@pytest.mark.parametrize("pattern", ["PUT", "objects/batch"])
def test_the_client_tries_uploads_again(hub, api, waits, kind, pattern):
    fault = hub.fail(pattern, kind, times=2, seconds=5)
    commit(api)
    assert hub.read(NAME, "w.bin") == WEIGHTS and len(hub.commits(NAME)) == 2
    assert fault.hits == 2 and waits == ([6, 6] if kind == 429 else [1, 2])


@pytest.mark.parametrize(
    ("kind", "message"),
    [(429, "rate limit"), (500, "500"), (503, "503"), ("cut", "disconnected"), ("half", "reset|disconnected|Broken")],
)
def test_a_commit_that_fails_changes_nothing(hub, api, kind, message):
    before = hub.commits(NAME)
    fault = hub.fail("POST .*/commit/", kind, times=math.inf)
    with pytest.raises(Exception, match=message):
        commit(api)
    assert fault.hits == 1 and hub.commits(NAME) == before


def test_a_commit_whose_answer_is_lost_is_made_all_the_same(hub, api):
    hub.fail("POST .*/commit/", "lost")
    with pytest.raises(Exception, match="disconnected"):
        commit(api)
    assert len(hub.commits(NAME)) == 2
    assert commit(api).oid == hub.branches(NAME)["main"] and len(hub.commits(NAME)) == 2


@pytest.mark.parametrize(("pattern", "path"), [("PUT", "model.safetensors"), ("POST .*/commit/", "README.md")])
def test_what_was_stored_wrong_shows_in_the_checksums(hub, api, folder, pattern, path):
    hub.fail(pattern, "corrupt")
    api.upload_folder(repo_id=NAME, folder_path=folder)
    wrong, right = hub.read(NAME, path), (folder / path).read_bytes()
    assert len(wrong) == len(right) and sum(a != b for a, b in zip(wrong, right, strict=True)) == 1
    assert differences(api, folder) == [path, ".gitattributes"]
    api.upload_folder(repo_id=NAME, folder_path=folder)
    assert differences(api, folder) == [".gitattributes"]


def test_a_download_that_is_cut_goes_on_where_it_was(hub, api, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    commit(api)
    fault = hub.fail("GET /storage/", "half")
    assert Path(api.hf_hub_download(NAME, "w.bin")).read_bytes() == WEIGHTS
    assert fault.hits == 1
    assert [request.status for request in hub.requests if request.storage][-2:] == [200, 206]


def test_faults_can_wait_and_hang(hub, api):
    fault = hub.fail("/tree/", "hang", after=1, seconds=0.2)
    urls = f"{hub.endpoint}/api/models/{NAME}/tree/main", f"{hub.endpoint}/api/models/{NAME}/refs"
    with urllib.request.urlopen(urls[0]), urllib.request.urlopen(urls[1]):
        assert not fault.hits
    with pytest.raises(TimeoutError):
        urllib.request.urlopen(urls[0], timeout=0.05)
    assert fault.hits == 1


def test_the_command_keeps_all_in_its_folder(hub, tmp_path):
    """Run as a user would run it: what it prints is exported, and `hf` finds the Hub by that."""
    command = [sys.executable, str(Path(__file__).parent / "hub_server.py"), "--port", "0", "--folder", str(tmp_path)]
    script = "from huggingface_hub import HfApi; api = HfApi(); "
    save = (
        "api.create_repo('lab/m'); print(api.upload_file(path_or_fileobj=b'1', path_in_repo='a', repo_id='lab/m').oid)"
    )
    load = "api.create_tag('lab/m', tag='v1'); print(api.model_info('lab/m', revision='v1').sha)"
    printed = []
    for code in (save, load):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            lines = [process.stdout.readline() for _ in range(len(hub.env) + 1)]
            exported = dict(re.fullmatch("export (.*?)=(.*)\n", line).groups() for line in lines[:-1])
            output = subprocess.check_output(
                [sys.executable, "-c", script + code], env=os.environ | exported, text=True
            )
            process.send_signal(signal.SIGINT)
        assert process.returncode == 0
        printed.append(output.split()[-1])
    assert printed[0] == printed[1]
    assert HubServer(tmp_path).tags("lab/m") == {"v1": printed[0]}


@pytest.mark.slow
def test_transformers_loads_a_model_from_it(hub, api, tmp_path):
    """By tag, with the code that was pushed, in a process that has no other: the logits of the local folder."""
    out = tmp_path / "out"
    convert(source("olmo_core_swa"), out, ConvertOptions(**options("olmo_core_swa")))
    pushed = api.upload_folder(repo_id=NAME, folder_path=out)
    api.create_tag(NAME, tag="v1", revision=pushed.oid)
    hub.commit(NAME, {"config.json": b"{}"})
    code = f"""
import torch
from transformers import AutoConfig, AutoModelForCausalLM
given = {{"revision": "v1", "trust_remote_code": True}}
assert AutoConfig.from_pretrained("{NAME}", **given).model_type == "olmem"
models = AutoModelForCausalLM.from_pretrained("{NAME}", **given), AutoModelForCausalLM.from_pretrained("{out}", **given)
remote, local = (model(torch.arange(12)[None]).logits for model in models)
assert torch.equal(remote, local)
print(type(models[0]).__module__)
"""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | hub.env
    run = run_fresh(code, env=env, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == f"transformers_modules.tester.m.{pushed.oid}.modeling_olmem"
    assert {request.status for request in hub.requests} == {200, 302, 404}
