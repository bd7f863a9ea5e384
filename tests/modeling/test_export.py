"""Models as programs: exported for any length, a step exported with its state, and compiled into few graphs.

One of each kind is quick; `make slow` runs the others."""

import copy
import shutil

import pytest
import torch
from modeling.helpers import CHUNKS, FULL, LEARNED, MEMORY, ONE_TENSOR, RETRIEVAL, SCHEMES, SINKS, SLIDING, tiny, tokens
from olmem import OlmemCache, OlmemStep, compat_olmem
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close
from transformers import GenerationConfig
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

# All that a layer can be: both kinds of windows and none, sinks, every scheme, shared tensors, and retrieval.
WIDE = {
    "default": {},
    "schemes, selecting": SCHEMES | RETRIEVAL | LEARNED,
    "one tensor, retrieval": ONE_TENSOR | RETRIEVAL,
    "value_difference": {"shared_projections": "value_difference", "num_key_value_heads": 4},
}
ONE = {"num_hidden_layers": 1, "layer_types": SLIDING}
LENGTH = torch.export.Dim("length", min=2, max=100_000)


class Logits(nn.Module):
    """A model from ids and mask to logits, without a cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(found, expected, rtol=0, atol=1e-5)


def padded(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and a mask with padding on the left of one row and inside of the other."""
    mask = torch.ones(2, length, dtype=torch.long)
    if length > 5:
        mask[0, : length // 3] = 0
        mask[1, length // 2] = 0
    return tokens(2, length), mask


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


# A forward without a cache


@pytest.mark.slow
@pytest.mark.parametrize("changes", WIDE.values(), ids=WIDE)
@torch.no_grad()
def test_inference_is_exported_for_any_length(changes):
    """Within the window and beyond, across the trained length, and with operations that every runtime has."""
    logits = Logits(tiny(**changes))
    program = torch.export.export(logits, padded(7), dynamic_shapes=({1: LENGTH}, {1: LENGTH}))
    run = program.module()
    for length in (2, 3, 40, 300):
        ids, mask = padded(length)
        close(run(ids, mask)[mask.bool()], logits(ids, mask)[mask.bool()])
    assert not any("cummax" in str(node.target) for node in program.graph.nodes)  # ONNX has none


@torch.no_grad()
def test_an_export_without_joined_heads_is_the_same(monkeypatch):
    """So torch before 2.13 exports any length."""
    monkeypatch.setattr(compat_olmem, "JOINS_HEADS", False)
    logits = Logits(tiny(**ONE))
    run = torch.export.export(logits, padded(7), dynamic_shapes=({1: LENGTH}, {1: LENGTH})).module()
    ids, mask = padded(40)
    close(run(ids, mask)[mask.bool()], logits(ids, mask)[mask.bool()])


@pytest.mark.slow
@torch.no_grad()
def test_a_strict_export_keeps_its_length_any():
    """It takes a length for fixed where a message shows it, or where a slice that ends there is passed or compared."""
    logits = Logits(tiny(**ONE | {"position_embedding": "xpos", "retrieval_layers": [0], "retrieval_top_k": 2}))
    run = torch.export.export(logits, padded(7), dynamic_shapes=({1: LENGTH}, {1: LENGTH}), strict=True).module()
    ids, mask = padded(40)
    close(run(ids, mask)[mask.bool()], logits(ids, mask)[mask.bool()])


@pytest.mark.slow
@torch.no_grad()
def test_inference_without_a_mask_is_exported_for_any_length():
    logits = Logits(tiny(**ONE | SINKS | {"retrieval_layers": [0], "retrieval_top_k": 2}))
    run = torch.export.export(logits, (tokens(2, 7),), dynamic_shapes=({1: LENGTH},)).module()
    for length in (2, 5, 300):
        close(run(tokens(2, length)), logits(tokens(2, length)))


@pytest.mark.slow
@torch.no_grad()
def test_inference_is_exported_for_any_batch():
    logits = Logits(tiny(**ONE | SINKS | {"retrieval_layers": [0], "retrieval_top_k": 2}))
    shapes = {0: torch.export.Dim("batch", max=64), 1: LENGTH}
    run = torch.export.export(logits, padded(7), dynamic_shapes=(shapes, shapes)).module()
    ids, mask = (each.repeat(3, 1) for each in padded(40))
    close(run(ids, mask)[mask.bool()], logits(ids, mask)[mask.bool()])


@pytest.mark.slow
@torch.no_grad()
def test_a_model_is_exported_as_it_is():
    """By default it returns a cache, which no program can."""
    model, ids = tiny(**ONE | SINKS), tokens(1, 7)
    for strict in (False, True):
        outputs = torch.export.export(model, (ids,), strict=strict).module()(ids)
        close(outputs.logits, model(ids).logits)


def written(model) -> nn.Module:
    """A model with a static cache that it writes to, as Transformers exports it for ExecuTorch."""
    sizes = {"batch_size": 1, "max_cache_len": 16}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=sizes)
    return TorchExportableModuleWithStaticCache(model)


@pytest.mark.slow
@torch.no_grad()
def test_a_plain_model_is_exported_with_a_static_cache():
    model, ids, places = tiny(), tokens(1, 12), torch.arange(12)
    given = {"input_ids": ids[:, :1], "cache_position": places[:1]}
    run = torch.export.export(written(model), (), given, strict=True).module()
    expected = model(ids, use_cache=False).logits
    for index in range(12):
        close(run(input_ids=ids[:, [index]], cache_position=places[[index]])[:, 0], expected[:, index])


@pytest.mark.parametrize("changes", [SINKS, ONE | MEMORY], ids=["sinks", "memory"])
def test_an_export_is_refused_in_words(changes):
    """The compiler told of an exception that it observed."""
    given = {"input_ids": tokens(1, 1), "cache_position": torch.tensor([0])}
    words = "must be 0 .* with a StaticCache; export `model.as_step\\(cache\\)`"
    for strict in (False, True):
        with pytest.raises(ValueError, match=words):
            torch.export.export(written(tiny(**changes)), (), given, strict=strict)


@pytest.mark.slow
@torch.no_grad()
def test_a_program_refuses_memory_that_is_not_finite():
    """A graph checks it when it runs."""
    model = tiny(**ONE | MEMORY)
    run = torch.export.export(Logits(model), (tokens(1, 8),)).module()
    run(tokens(1, 8))
    model.model.memory.norm.weight.fill_(torch.nan)
    run = torch.export.export(Logits(model), (tokens(1, 8),)).module()
    with pytest.raises(RuntimeError, match="`memory` must be finite at the end of a segment"):
        run(tokens(1, 8))


@pytest.mark.slow
@torch.no_grad()
def test_memory_is_exported_for_a_length_and_says_so_for_any():
    logits = Logits(tiny(**ONE | MEMORY | {"memory_gate_init": 0.0}))
    ids, mask = padded(8)
    run = torch.export.export(logits, (ids, mask)).module()
    mask[0, 1:] = 1  # rows begin their segments elsewhere than in the example
    close(run(ids, mask)[mask.bool()], logits(ids, mask)[mask.bool()])
    with pytest.raises(ValueError, match=r"`num_memory_tokens` must be 0 \(got 2\) to be exported for any length"):
        torch.export.export(logits, (ids,), dynamic_shapes=({1: LENGTH},))


@pytest.mark.slow
@torch.no_grad()
def test_xpos_refuses_a_graph_of_more_tokens_than_its_scales_reach():
    """In float16 they reach 5300 tokens; a program for any length asks when it runs."""
    logits = Logits(tiny(layer_types=FULL, position_embedding="xpos").half())
    with pytest.raises(ValueError, match="`input_ids` must hold at most 5300 tokens"):
        torch.export.export(logits, (tokens(1, 5301),))
    program = torch.export.export(logits, (tokens(1, 8),), dynamic_shapes=({1: LENGTH},))
    words = [str(node.args) for node in program.graph.nodes if "assert_async" in str(node.target)]
    assert any("`input_ids` must hold at most 5300 tokens" in each for each in words)


# A step with its state


def begun(model, ids: torch.Tensor) -> OlmemStep:
    cache = OlmemCache(model.config, max_length=64)
    model(ids, past_key_values=cache)
    return OlmemStep(model, cache)


@pytest.mark.slow
@pytest.mark.parametrize("changes", WIDE.values(), ids=WIDE)
@torch.no_grad()
def test_a_step_is_exported_with_its_state(changes):
    """It counts on where the cache was, which may hold less than a window, through three windows and more."""
    model, ids = tiny(**changes), tokens(2, 26)
    program = torch.export.export(begun(model, ids[:, :2]), (tokens(2, 1),))
    run, expected = program.module(), model(ids, use_cache=False).logits
    for index in range(2, 26):
        close(run(ids[:, [index]])[:, 0], expected[:, index])


@torch.no_grad()
def test_a_step_keeps_its_state_apart_and_says_what_it_needs():
    model, ids = tiny(**SINKS), tokens(2, 9)
    cache = OlmemCache(model.config)
    with pytest.raises(ValueError, match="`cache` must have read a token"):
        OlmemStep(model, cache)
    model(ids[:, :6], past_key_values=cache)
    step, expected = OlmemStep(model, cache), model(ids, use_cache=False).logits
    with pytest.raises(ValueError, match=r"`input_ids` must be \(B, 1\)"):
        step(ids)
    for index in range(6, 9):
        close(step(ids[:, [index]])[:, 0], expected[:, index])
    close(model(ids[:, 6:], past_key_values=cache).logits, expected[:, 6:])
    grows = tiny(layer_types=FULL)
    with pytest.raises(ValueError, match="`max_length` must be given"):
        cache = OlmemCache(grows.config)
        grows(ids, past_key_values=cache)
        OlmemStep(grows, cache)


@torch.no_grad()
def test_a_step_of_memory_is_exported_within_a_segment():
    model, ids = tiny(**ONE, num_sink_tokens=2, **MEMORY), tokens(2, 6)
    run = torch.export.export(begun(model, ids[:, :2]), (tokens(2, 1),)).module()
    expected = model(ids, use_cache=False).logits
    for index in range(2, 5):
        close(run(ids[:, [index]])[:, 0], expected[:, index])
    with pytest.raises(RuntimeError, match="A recorded step cannot begin a segment"):
        run(ids[:, [5]])


@pytest.mark.slow
@torch.no_grad()
def test_a_step_without_its_state_gives_no_numbers():
    """ExecuTorch begins buffers at zero unless told otherwise, and drops what a program asserts."""
    for changes, lost in ((SINKS, {"columns": 0}), (ONE | MEMORY, {"seen": 10})):
        model, ids = tiny(**changes), tokens(2, 6)
        program = torch.export.export(begun(model, ids[:, :2]), (tokens(2, 1),))
        for node in [each for each in program.graph.nodes if "assert_async" in str(each.target)]:
            program.graph.erase_node(node)
        run = program.module()
        assert run(ids[:, [2]]).isfinite().all()
        for name, number in lost.items():
            run.get_buffer(name).fill_(number)
        for index in (3, 4):
            assert run(ids[:, [index]]).isnan().all()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="AOTInductor needs a compiler of C++")
@torch.no_grad()
def test_a_step_runs_as_compiled_machine_code(tmp_path):
    model, ids = tiny(**ONE, num_sink_tokens=2), tokens(2, 20)
    program = torch.export.export(begun(model, ids[:, :2]), (tokens(2, 1),))
    file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "step.pt2"))
    run, expected = torch._inductor.aoti_load_package(file), model(ids, use_cache=False).logits
    for index in range(2, 20):
        close(run(ids[:, index, None].contiguous())[:, 0], expected[:, index])


# Compiled


@pytest.mark.slow
@torch.no_grad()
def test_models_of_one_process_generate_compiled():
    """With other windows or sinks than those before; one graph reads the prompt, and one is every step."""
    torch._dynamo.reset()
    others = SINKS | {"sliding_window": 5, "num_sink_tokens": 3}, CHUNKS, {"retrieval_layers": [0]} | LEARNED
    for changes in (SINKS, *others):
        model, compiled, before = tiny(**ONE | changes), tiny(**ONE | changes), graphs()
        backend = "aot_eager" if changes is SINKS else "eager"  # which alone decides what becomes a graph
        compiled.forward = torch.compile(compiled.forward, backend=backend)
        given = {"max_new_tokens": 3 * model.config.sliding_window, "do_sample": False}
        assert torch.equal(compiled.generate(tokens(2, 6), **given), model.generate(tokens(2, 6), **given))
        assert graphs() - before == 2


@pytest.mark.slow
@pytest.mark.parametrize("changes", [ONE | MEMORY, {}], ids=["memory", "growing"])
@torch.no_grad()
def test_a_step_that_the_host_counts_is_left_to_python(changes):
    """A graph for each count would be worse; and whoever wants whole graphs alone is told."""
    torch._dynamo.reset()
    model, compiled, before = tiny(**changes), tiny(**changes), graphs()
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    given = {"max_new_tokens": 14, "do_sample": False}
    assert torch.equal(compiled.generate(tokens(2, 6), **given), model.generate(tokens(2, 6), **given))
    assert graphs() - before <= 6
    cache = OlmemCache(model.config)
    model(tokens(2, 6), past_key_values=cache)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="for a step to be a whole graph, `num_memory_tokens`"):
        torch.compile(model, backend="eager", fullgraph=True)(tokens(2, 1), past_key_values=cache)
    assert model._can_compile_fullgraph == (not model.config.num_memory_tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [ONE | MEMORY | {"memory_gate_init": 0.0}, ONE_TENSOR | RETRIEVAL | LEARNED], ids=["memory", "wide"]
)
def test_a_forward_and_a_training_step_are_one_graph(changes):
    torch._dynamo.reset()
    model, (ids, mask) = tiny(**changes), padded(9)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        close(compiled(ids, attention_mask=mask, use_cache=False).logits[mask.bool()], expected[mask.bool()])
    gradients = []
    for forward in (model, compiled):
        model.zero_grad()
        forward(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    for found, wanted in zip(*gradients, strict=True):
        close(found, wanted)


@torch.no_grad()
def test_a_copied_cache_has_a_config_of_its_own_in_a_graph_too():
    torch._dynamo.reset()
    model, ids = tiny(**ONE), tokens(1, 8)
    cache = OlmemCache(model.config)
    model(ids[:, :7], past_key_values=cache)
    compiled, expected = torch.compile(model, backend="eager", fullgraph=True), model(ids, use_cache=False).logits
    close(compiled(ids[:, 7:], past_key_values=copy.deepcopy(cache)).logits, expected[:, 7:])
