"""Programs: of a forward, and of a step with its state, which goes on past the window."""

import pytest
import torch
from ecosystem.variants import WINDOW, make, tokens
from olmem import OlmemCache
from torch import nn
from torch.testing import assert_close
from transformers import GenerationConfig
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

LENGTH = 2 * WINDOW
NOT_OLMO3 = ["plain", "sinks", "memory", "key_value"]


class Logits(nn.Module):
    """A model from ids to logits, without a cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


def close(found, expected):
    assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.tool("`torch.export` of a model as it is", "torch")
@torch.no_grad()
def test_a_model_is_a_program(variant):
    model, ids = make(variant), tokens(1, LENGTH)
    close(torch.export.export(model, (ids,)).module()(ids).logits, model(ids).logits)


@pytest.mark.tool("`torch.export` for any length", "torch")
@torch.no_grad()
def test_a_program_for_any_length(variant, refuses):
    logits, ids = Logits(make(variant)), tokens(1, LENGTH)
    shapes = ({1: torch.export.Dim("length", min=2, max=4096)},)
    if variant == "memory":
        with refuses("to be exported for any length"):
            torch.export.export(logits, (ids,), dynamic_shapes=shapes)
        return
    run = torch.export.export(logits, (ids,), dynamic_shapes=shapes).module()
    for length in (4, LENGTH, 100):
        close(run(tokens(1, length)), logits(tokens(1, length)))


@pytest.mark.tool("ONNX, run by ONNX Runtime", "onnxruntime")
@torch.no_grad()
def test_onnx(variant, tmp_path):
    import onnxruntime

    logits, ids = Logits(make(variant)), tokens(1, LENGTH)
    torch.onnx.export(logits, (ids,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    close(session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0], logits(ids))


def executorch(program, buffers=()):
    """A program as ExecuTorch runs it."""
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
    from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass
    from executorch.runtime import Runtime

    edge = to_edge(program, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    passes = [InitializedMutableBufferPass([*buffers])] if buffers else []
    file = edge.to_executorch(ExecutorchBackendConfig(passes=passes))
    loaded = Runtime.get().load_program(file.buffer)
    method = loaded.load_method("forward")
    return lambda *inputs, _kept=(file, loaded): method.execute([*inputs])[0].clone()


@pytest.mark.tool("a forward", "executorch")
@torch.no_grad()
def test_executorch_reads(variant):
    logits, ids = Logits(make(variant)), tokens(1, LENGTH)
    close(executorch(torch.export.export(logits, (ids,)))(ids), logits(ids))


@pytest.mark.tool("steps by `model.as_step(cache)`, past the window", "executorch")
@pytest.mark.variants(NOT_OLMO3)
@torch.no_grad()
def test_executorch_steps(variant, record_property):
    """ExecuTorch drops what a program asserts: where a segment of memory begins, all logits are NaN from there on."""
    model, ids = make(variant), tokens(1, LENGTH)
    expected = model(ids, use_cache=False).logits
    cache = OlmemCache(model.config, max_length=LENGTH)
    model(ids[:, :2], past_key_values=cache)
    step = model.as_step(cache)
    run = executorch(torch.export.export(step, (ids[:, :1],)), [*step.cache.state])
    for index in range(2, LENGTH):
        logits = run(ids[:, [index]])
        if variant == "memory" and index >= model.config.memory_segment_length:
            assert logits.isnan().all()
            record_property("refusal", "logits are NaN from where a segment of memory begins")
        else:
            close(logits[:, 0], expected[:, index])


@pytest.mark.tool("steps with a StaticCache (`TorchExportableModuleWithStaticCache`)", "executorch")
@torch.no_grad()
def test_executorch_steps_with_a_static_cache(variant, refuses):
    model, ids, places = make(variant), tokens(1, LENGTH), torch.arange(LENGTH)
    sizes = {"batch_size": 1, "max_cache_len": LENGTH}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=sizes)
    module, given = TorchExportableModuleWithStaticCache(model), {"input_ids": ids[:, :1], "cache_position": places[:1]}
    if variant in ("sinks", "memory"):
        with refuses(r"with a StaticCache; export `model.as_step\(cache\)`"):
            torch.export.export(module, (), given, strict=True)
        return
    run = executorch(torch.export.export(module, (), given, strict=True))
    expected = model(ids, use_cache=False).logits
    for index in range(LENGTH):
        close(run(ids[:, [index]], places[[index]])[:, 0], expected[:, index])
