"""Conversions that several tests look at, made once, and never changed: a test that changes one copies it."""

import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from convert.checkpoints import options, read_config, source
from hypothesis import settings
from olmem import OlmemConfig, OlmemForCausalLM
from olmem_convert import CardOptions, ConvertOptions, card, convert
from olmem_convert.reading.fields import TOKEN_IDS
from transformers import AutoTokenizer

SMALL = {
    **{"vocab_size": 2048, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64},
    **{"num_hidden_layers": 2, "num_attention_heads": 2},
}

settings.register_profile("same", derandomize=True, deadline=None)  # so that what fails is what was changed
settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def signals():
    """The command sets a handler for its process, which here is that of the tests."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Callable[..., Path]:
    """The folder that a golden checkpoint, by name, or the demo converts to, verified."""

    @cache
    def make(name: str, dtype: str | None = None) -> Path:
        out = tmp_path_factory.mktemp("converted") / name
        convert(source(name), out, ConvertOptions(dtype=dtype, **options(name)))
        return out

    return make


@pytest.fixture
def changeable(converted, tmp_path) -> Callable[..., Path]:
    """A copy of such a folder that a test may spoil."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(converted(name), tmp_path / "changeable"))

    return make


@pytest.fixture(scope="session")
def released(tmp_path_factory, converted) -> Path:
    """A small folder that may be published, of one file of weights."""
    out = tmp_path_factory.mktemp("released") / "out"
    shutil.copytree(converted("olmo_core_swa"), out)
    card(out, CardOptions(license="apache-2.0"))
    return out


@pytest.fixture(scope="session")
def trained(tmp_path_factory, converted) -> Path:
    """A folder as training leaves it: a model with a memory and shared tensors, and a tokenizer, not verified."""
    out = tmp_path_factory.mktemp("trained") / "my-model"
    tokens = {name: read_config(converted("demo"))[name] for name in TOKEN_IDS}
    torch.manual_seed(0)
    config = OlmemConfig(
        **SMALL | tokens,
        layer_types=["sliding_attention", "sliding_attention"],
        sliding_window=16,
        num_memory_tokens=2,
        memory_segment_length=8,
        shared_projections="key_value",
    )
    OlmemForCausalLM(config).save_pretrained(out)
    AutoTokenizer.from_pretrained(converted("demo")).save_pretrained(out)
    return out
