"""Weights of fewer bits: the model answers nearly the same, with and without a cache, past its window."""

import pytest
import torch
from ecosystem.variants import make, save, tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


CONFIGS = {
    "int8": ("torchao", torchao),
    "int8 ": ("optimum-quanto", lambda: QuantoConfig(weights="int8")),
    "8 bits": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "4 bits (nf4)": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
}


@pytest.mark.parametrize(
    "make_config, bits",
    [
        pytest.param(make_config, 4 if "4" in name else 8, marks=pytest.mark.tool(name.strip(), package), id=package)
        for name, (package, make_config) in CONFIGS.items()
    ],
)
@torch.no_grad()
def test_fewer_bits_answer_nearly_the_same(variant, make_config, bits, tmp_path):
    save(variant, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=make_config(), device_map="cpu", dtype=torch.float32
    )
    answers_nearly_the_same(model, variant, 0.99 if bits == 8 else 0.8)


@pytest.mark.tool("8 bits, by its own `AutoHQQHFModel`", "hqq")
@torch.no_grad()
def test_half_quadratic_quantization(variant):
    """Transformers 5.24 has none: "QuantizationMethod.HQQ is not available yet"."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model, config = make(variant), BaseQuantizeConfig(nbits=8, group_size=64)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
    answers_nearly_the_same(model, variant, 0.99)


def answers_nearly_the_same(model, variant: str, likeness: float) -> None:
    ids = tokens(2, 24)
    logits, expected = model(ids, use_cache=False).logits, make(variant)(ids, use_cache=False).logits
    assert not torch.equal(logits, expected)
    assert torch.nn.functional.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > likeness
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    for _ in range(8):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found, ids)
