"""What only a CUDA device shows: its kernels give what the CPU gives."""

import pytest
import torch
from olmem import OlmemConfig, OlmemForCausalLM

pytestmark = pytest.mark.gpu


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = OlmemConfig(
        vocab_size=257,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,  # torch 2.11 cannot compile flex attention for 2 at this size, nor for Olmo3
        sliding_window=19,
    )
    model = OlmemForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


@pytest.fixture
def batch():
    """Two rows of 67 tokens, longer than the window; the second has 11 of left padding."""
    input_ids = torch.randint(257, (2, 67), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :11] = 0
    return input_ids, attention_mask


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_logits_are_those_of_the_cpu(model, batch, implementation):
    input_ids, attention_mask = batch
    expected = model(input_ids, attention_mask=attention_mask).logits
    model = model.cuda()
    model.set_attn_implementation(implementation)
    logits = model(input_ids.cuda(), attention_mask=attention_mask.cuda()).logits.cpu()
    real = attention_mask.bool()
    assert (logits - expected)[real].abs().max() <= 2e-4 * expected.abs().max()


@torch.no_grad()
def test_greedy_tokens_are_those_of_the_cpu(model, batch):
    options = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(batch[0], **options)
    assert model.cuda().generate(batch[0].cuda(), **options).cpu().tolist() == expected.tolist()


def test_half_precision_trains(model, batch):
    model = model.cuda().train()
    model.gradient_checkpointing_enable()
    input_ids = batch[0].cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_a_compiled_forward_is_the_same(model, batch):
    model = model.cuda()
    input_ids = batch[0].cuda()
    expected = model(input_ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True)
    assert (compiled(input_ids, use_cache=False).logits - expected).abs().max() <= 1e-3 * expected.abs().max()
