import gc
import os

gc.set_threshold(50_000, 20, 20)  # imports and compilers make millions of objects, which are walked over and stay

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, whose kernels run on a CPU that way

import ssl  # noqa: E402
import time  # noqa: E402
from functools import cache  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import huggingface_hub  # noqa: E402
import pytest  # noqa: E402
from fresh import run_fresh  # noqa: E402
from hub_server import HubServer  # noqa: E402
from olmem_convert.proof import verification  # noqa: E402
from olmem_convert.publish import reloading  # noqa: E402


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """What is imported by now is not walked over again, which copies its memory in each process that a test forks."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


def pytest_ignore_collect(collection_path, config):
    """Leaves tests of other tools out unless they are named: `make ecosystem` has an environment for them."""
    is_named = any("ecosystem" in str(argument) for argument in config.args)
    return True if collection_path.name == "ecosystem" and not is_named else None


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny products gain nothing from threads, and lose much where several processes share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def few_segments():
    """A conversion reads a thousand segments of memory. Tests that are of something else read few of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "SEGMENTS", 8)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_syncs():
    """No test cuts the power, and what a killed process wrote is there without waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


make_context = cache(ssl.create_default_context)  # which reads all authorities, for each client anew


@pytest.fixture
def server(monkeypatch):
    """A Hub on this machine, which is the one that this process and those that it starts know. Nobody waits."""
    with HubServer() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        monkeypatch.setattr(ssl, "create_default_context", lambda *_, **__: make_context())
        yield server


@pytest.fixture
def quick_reload(monkeypatch):
    """The processes in which `verify` and `push` load a model are forked from one that has imported torch."""

    def run(command: list[str], input: str, env: dict[str, str], **options: bool):
        assert command[1] == "-P"
        return run_fresh(Path(command[2]).read_text(), env=env, given=input)

    monkeypatch.setattr(reloading, "subprocess", SimpleNamespace(run=run))
