"""Kernels of many tokens compute what plain operations compute: interpreted on a CPU here, compiled on a GPU."""

import pytest
import torch
from modeling.helpers import STREAMS, tiny, tokens
from modeling.streams import close, read
from olmem import reading_olmem
from olmem.ops_olmem import PLAIN, OlmemRMSNorm
from olmem.varlen_olmem import merge
from torch import nn
from torch.testing import assert_close
from transformers.activations import ACT2FN

pytest.importorskip("triton")
from olmem.fused_olmem import FusedOperations, merge_two

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = FusedOperations()
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 0.04}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Returns random numbers for which gradients are wanted."""
    states = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return states.requires_grad_()


def check(fused: torch.Tensor, plain: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Checks an output and the gradients of what it was made from."""
    gradient = random(*fused.shape, dtype=fused.dtype, seed=9).detach()
    near = {"rtol": 0, "atol": DTYPES[fused.dtype]}
    assert_close(fused, plain, **near)
    for own, other in zip(*(torch.autograd.grad(each, inputs, gradient) for each in (fused, plain)), strict=True):
        assert_close(own, other, rtol=0, atol=DTYPES[fused.dtype] * max(1, float(other.abs().max())))


@dtypes
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("size", [16, 12])
def test_rotations(dtype, rows, size):
    """Heads of a size that is no power of two are left to plain operations."""
    states = random(2, 5, 3, size, dtype=dtype)
    angles = random(rows, 5, size // 2).detach()
    cos, sin = (torch.cat((each, each), dim=-1) for each in (angles.cos(), angles.sin()))
    given = states.transpose(1, 2), cos, sin
    check(FUSED.rotate(*given), PLAIN.rotate(*given), [states])


@dtypes
@pytest.mark.parametrize("has_gradients", [False, True])
def test_norms(dtype, has_gradients):
    norm = OlmemRMSNorm(24, 1e-6).to(DEVICE, dtype)
    norm.weight.data.copy_(random(24, seed=2))
    states, residual = random(2, 7, 24, dtype=dtype), random(2, 7, 24, dtype=dtype, seed=1)
    added = residual, norm, states, nn.Dropout(0.5).eval()
    if has_gradients:
        check(FUSED.norm(norm, states), PLAIN.norm(norm, states), [states, norm.weight])
        check(FUSED.add_norm(*added), PLAIN.add_norm(*added), [residual, states, norm.weight])
        return
    with torch.no_grad():
        assert_close(FUSED.norm(norm, states), norm(states), rtol=0, atol=DTYPES[dtype])
        assert_close(FUSED.add_norm(*added), PLAIN.add_norm(*added), rtol=0, atol=DTYPES[dtype])
        plain = nn.LayerNorm(24).to(DEVICE, dtype)
        assert torch.equal(FUSED.norm(plain, states), plain(states))
        norm.register_forward_hook(lambda module, given, output: output + 1)
        assert_close(FUSED.norm(norm, states), norm(states), rtol=0, atol=DTYPES[dtype])


@dtypes
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gates(dtype, activation):
    gate, up = (nn.Linear(24, 40).to(DEVICE, dtype) for _ in range(2))
    states = random(2, 7, 24, dtype=dtype)
    given = ACT2FN[activation], gate, up, states
    check(FUSED.gated(*given), PLAIN.gated(*given), [states, gate.weight, up.weight])


@pytest.mark.parametrize("listed", [False, True])
def test_what_a_cache_joins_and_stores(listed):
    """Rows that are all there or some of them, or those of tokens that are listed as one row."""
    buffer = random(3, 3, 12, 8).detach()
    rows, slots = torch.tensor([[0], [2]]), torch.tensor([[3, 4, 5], [9, 0, 1]])
    written = torch.tensor([[3, -1, 5, 6, 7], [9, 0, 1, 2, 4]])
    rows_written = rows
    if listed:
        rows, slots, written = torch.tensor([[0, 2, 2]]), torch.tensor([[3, 9, 4]]), torch.tensor([[3, 4, -1, 6, 7]])
        rows_written = torch.tensor([[0, 0, 1, 1, 2]])
    rows, slots, written, rows_written = (each.to(DEVICE) for each in (rows, slots, written, rows_written))
    new = random(len(slots), 5, 3, 8, seed=1).detach().transpose(1, 2)
    assert torch.equal(FUSED.join_past(buffer, rows, slots, new), PLAIN.join_past(buffer, rows, slots, new))
    own, other = buffer.clone(), buffer.clone()
    FUSED.store(own, rows_written, written, new)
    PLAIN.store(other, rows_written, written, new)
    assert torch.equal(own, other)


def test_merges():
    """Also of parts without a key, and of outputs whose heads do not lie together, as those of queries in pairs."""
    parts = [(random(7, 3, 8, seed=each).detach(), random(3, 7, seed=each + 5).detach()) for each in range(2)]
    parts[0][1][:, 2:4] = parts[1][1][:, 3] = -torch.inf
    output, total, _ = merge(parts)
    by_head = [(each.transpose(0, 1).contiguous().transpose(0, 1), sums) for each, sums in parts]
    for some in (parts, by_head, [by_head[0], parts[1]]):
        own, own_total = merge_two(*some)
        assert_close(own, output)
        assert_close(own_total, total)
        assert not own[3].any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels run in test_varlen")
@pytest.mark.parametrize("changes", [STREAMS["mixed"], STREAMS["one tensor"]], ids=["mixed", "one tensor"])
def test_a_model_with_kernels_reads_what_it_reads_without(changes, monkeypatch):
    model = tiny(**changes)
    ids, masks = tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    masks[1, :4] = 0
    pieces, masks = ids.split([9, 4, 1], dim=1), masks.split([9, 4, 1], dim=1)
    expected = read(model, pieces, masks)
    monkeypatch.setattr(reading_olmem, "can_flash", lambda *_: True)
    monkeypatch.setattr(reading_olmem, "can_fuse_operations", lambda *_: True)
    real = torch.cat(masks, dim=1).bool()
    close(read(model, pieces, masks)[real], expected[real])
    output = model(ids, use_cache=False)
    monkeypatch.undo()
    close(output.logits, model(ids, use_cache=False).logits)
