"""Adapters and tuned prompts by PEFT."""

import peft
import pytest
import torch
from ecosystem.variants import make, save, tokens
from olmem import OlmemForCausalLM
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

TASK = {"task_type": "CAUSAL_LM"}
TARGETS = ["q_proj", "v_proj", "k_proj"]


def step(model, rate: float = 0.1) -> None:
    """Trains once, so that no adapter is without effect."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], rate)
    ids = tokens(2, 20)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()


def written(model, ids, **options) -> torch.Tensor:
    mask = torch.ones_like(ids)
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False, **options)


@torch.no_grad()
def by_hand(model, ids, count: int = 20) -> torch.Tensor:
    """Greedy decoding with a whole forward at every step, whose tokens the others must be."""
    for _ in range(count):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    return ids


@pytest.mark.parametrize(
    "make_config",
    [
        pytest.param(make_config, marks=pytest.mark.tool(f"{name}, default targets", "peft"), id=name)
        for name, make_config in {
            "LoRA": lambda: LoraConfig(**TASK),
            "DoRA": lambda: LoraConfig(use_dora=True, **TASK),
            "AdaLoRA": lambda: AdaLoraConfig(total_step=10, tinit=1, tfinal=1, **TASK),
            "IA3": lambda: IA3Config(**TASK),
            "LoHa": lambda: LoHaConfig(**TASK),
            "LoKr": lambda: LoKrConfig(**TASK),
            "OFT": lambda: OFTConfig(oft_block_size=0, r=4, **TASK),
            "VeRA": lambda: VeraConfig(r=8, **TASK),
            "layer norms": lambda: LNTuningConfig(**TASK),
        }.items()
    ],
)
def test_adapters_know_their_targets(variant, make_config, tmp_path):
    """They are trained, saved, loaded again, and merged."""
    model = get_peft_model(make(variant), make_config())
    step(model)
    model.save_pretrained(tmp_path)
    ids = tokens(1, 20)
    loaded = PeftModel.from_pretrained(make(variant), tmp_path).eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, logits)
        assert not torch.equal(make(variant)(input_ids=ids).logits, logits)
        assert_close(loaded.merge_and_unload()(input_ids=ids).logits, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.tool("LoRA beside memory's parameters, by `modules_to_save`", "peft")
@pytest.mark.variants(["memory"])
def test_memory_is_trained_beside_an_adapter(variant, tmp_path):
    """As modules: what they learned is in the adapter's file, and comes back with it."""
    parts = ["memory", "memory_gate", "retrieval_gate"]
    model = get_peft_model(make(variant), LoraConfig(modules_to_save=parts, **TASK))
    before = {name: weight.detach().clone() for name, weight in make(variant).named_parameters()}
    step(model)
    model.save_pretrained(tmp_path / "adapter")
    saved = dict(model.get_base_model().named_parameters())
    for name in before:
        if "memory" in name or "_gate.logits" in name:
            *path, last = name.split(".")
            part = next(index for index, each in enumerate(path) if each in parts)
            trained = ".".join([*path[: part + 1], "modules_to_save", "default", *path[part + 1 :], last])
            assert not torch.equal(saved[trained], before[name]), name
    save(variant, tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = tokens(1, 20)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, logits)
    assert torch.equal(written(loaded, ids), by_hand(model, ids))
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = OlmemForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert_close(again(input_ids=ids).logits, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.tool("adapters of the model itself (`add_adapter`)", "peft")
def test_transformers_own_adapters(variant, broken, tmp_path):
    model = make(variant)
    with broken("please use a version >= 0.22.0", ValueError):  # which is not released
        model.add_adapter(LoraConfig(target_modules=TARGETS, **TASK))
    if not getattr(model, "_hf_peft_config_loaded", False):
        return
    step(model)
    model.save_pretrained(tmp_path)
    loaded = make(variant)
    loaded.load_adapter(str(tmp_path))
    ids = tokens(1, 20)
    assert torch.equal(written(loaded, ids), by_hand(model, ids))


@pytest.mark.parametrize(
    "make_config",
    [
        pytest.param(make_config, marks=pytest.mark.tool(name, "peft"), id=name)
        for name, make_config in {
            "prompt tuning": lambda: PromptTuningConfig(num_virtual_tokens=4, **TASK),
            "P-tuning": lambda: PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, **TASK),
        }.items()
    ],
)
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_a_tuned_prompt_begins_the_text(variant, make_config, tmp_path):
    """Once: what is generated with a cache is what is written by whole forwards."""
    torch.manual_seed(0)
    model = get_peft_model(make(variant), make_config())
    step(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(variant), tmp_path).eval()
    ids = tokens(1, 12)
    assert torch.equal(written(loaded, ids), by_hand(model, ids))


@pytest.mark.tool("prefix tuning", "peft")
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_a_tuned_prefix(variant, refuses):
    torch.manual_seed(0)
    model = get_peft_model(make(variant), PrefixTuningConfig(num_virtual_tokens=4, **TASK))
    ids = tokens(1, 12)
    if variant in ("sinks", "memory"):
        with refuses("tune prompts where PEFT tunes a prefix"):
            written(model, ids)
        return
    step(model)
    assert torch.equal(written(model, ids), by_hand(model, ids))


@pytest.mark.tool("adaption prompts", "peft")
def test_adaption_prompts(variant, refuses):
    """PEFT knows the attention of Llama and Mistral alone."""
    config = peft.AdaptionPromptConfig(adapter_layers=1, adapter_len=4, **TASK)
    with refuses("Unsupported model type for adaption prompt: 'olm"):
        get_peft_model(make(variant), config)
