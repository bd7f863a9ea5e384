"""What records a model as a graph, or computes it in other ways: does each variant work, and with which difference?

    python benchmarks/tracing.py [--variants plain,sinks] [--json benchmarks/results/tracing.json]

Tiny models of random weights on a CPU in float32. A figure is the largest difference of logits, or of gradients where
it says so, from the plain model; what is refused says why, in the words of its error.

export any length   `torch.export` with a dynamic length, without and with a mask, run for 2 to 512 tokens
export a length     `torch.export` for 50 tokens, run with padding that the example did not have
export step         `OlmemStep` from a cache that has read 5 tokens, exported and run for three windows of steps
ONNX                `torch.onnx.export` with a mask, run by onnxruntime for 2 to 300 tokens, with memory tokens for 50
                    (onnx, onnxscript and onnxruntime must be installed)
compile forward     `torch.compile(fullgraph=True, backend="aot_eager")` without a cache, with a mask, and with a cache
compile training    gradients of the loss of one batch, by the same compiler
meta                a forward on the meta device: shapes alone
checkpointing       gradients with gradient checkpointing, not reentrant and reentrant
"""

import argparse
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from olmem import OlmemCache, OlmemConfig, OlmemForCausalLM, OlmemStep
from torch import nn

WINDOW, SINKS = 4, {"num_sink_tokens": 2}
CHUNKS = {"layer_types": "chunked_attention", "attention_chunk_size": 3, "attention_chunk_lookback": 1}
MEMORY = {"num_memory_tokens": 2, "memory_segment_length": 20}
RETRIEVAL = {"retrieval_layers": [0, 1], "retrieval_top_k": 2, "retrieval_capacity": 7}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"layer_types": "full_attention"},
    "3:1": {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "chunks with look-back": CHUNKS,
    "sinks": SINKS,
    "learned sinks": {"sink_logit_init": 0.0},
    "retrieval": RETRIEVAL,
    **{
        name: {"shared_projections": name} for name in ("key_value", "query_key", "query_key_value", "value_difference")
    },
    "xpos": {"position_embedding": "xpos"},
    "linspace": {"position_embedding": "linspace"},
    "none": {"position_embedding": "none"},
    "key_value + sinks + retrieval": SINKS | RETRIEVAL | {"shared_projections": "key_value"},
    "memory": MEMORY,
    "memory with gates": MEMORY | {"memory_gate_init": 0.0},
}


def make(changes: dict[str, Any]) -> OlmemForCausalLM:
    """A tiny model, its weights drawn so that every part counts."""
    fields: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if "shared_projections" in changes else 2,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "layer_types": "sliding_attention",
        "sliding_window": WINDOW,
    }
    model = OlmemForCausalLM(OlmemConfig(**(fields | changes)))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        centre = float(parameter.ndim == 1 and bool((parameter == 1).all())) * (3 if "memory.norm" in name else 1)
        nn.init.normal_(parameter, centre, 0.25, generator=generator)
    return model.eval()


def ids_of(*shape: int) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(shape[-1]))


def mask_of(ids: torch.Tensor) -> torch.Tensor:
    """A mask with padding on the left of one row, and inside of the other."""
    mask = torch.ones_like(ids)
    if ids.shape[1] > 5:
        mask[0, : ids.shape[1] // 3] = 0
        mask[1, ids.shape[1] // 2] = 0
    return mask


class Logits(nn.Module):
    """A model from ids and mask to logits, without a cache."""

    def __init__(self, model: OlmemForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


def difference(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    apart = (found - expected).abs()
    return float((apart if mask is None else apart[mask.bool()]).max())


def arguments_of(length: int, masked: bool) -> tuple[torch.Tensor, ...]:
    ids = ids_of(2, length)
    return (ids, mask_of(ids)) if masked else (ids,)


def export_any_length(model: OlmemForCausalLM) -> float:
    logits, worst = Logits(model), 0.0
    for masked in (False, True):
        given = arguments_of(7, masked)
        dynamic = tuple({1: torch.export.Dim("length", min=2, max=4096)} for _ in given)
        run = torch.export.export(logits, given, dynamic_shapes=dynamic).module()
        for length in (2, 3, 5, 40, 512):
            given = arguments_of(length, masked)
            worst = max(worst, difference(run(*given), logits(*given), given[1] if masked else None))
    return worst


def export_a_length(model: OlmemForCausalLM) -> float:
    logits, (ids, mask) = Logits(model), arguments_of(50, True)
    run = torch.export.export(logits, (ids, torch.ones_like(mask))).module()
    return difference(run(ids, mask), logits(ids, mask), mask)


def export_step(model: OlmemForCausalLM) -> float:
    ids, first = ids_of(2, 5 + 3 * WINDOW), 5
    expected = model(ids, use_cache=False).logits
    cache = OlmemCache(model.config, max_length=64)
    model(ids[:, :first], past_key_values=cache)
    run = torch.export.export(OlmemStep(model, cache), (ids[:, :1].contiguous(),)).module()
    steps = [run(ids[:, [index]]) for index in range(first, ids.shape[1])]
    return difference(torch.cat(steps, dim=1), expected[:, first:])


def onnx(model: OlmemForCausalLM) -> float:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    plain, worst, fixed = Logits(model), 0.0, bool(model.config.num_memory_tokens)
    given = arguments_of(50 if fixed else 7, True)
    dynamic = None if fixed else tuple({1: torch.export.Dim("length", min=2, max=4096)} for _ in given)
    with TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.onnx")
        torch.onnx.export(plain, given, file, dynamo=True, dynamic_shapes=dynamic, verbose=False)
        session = onnxruntime.InferenceSession(file)
    names = [each.name for each in session.get_inputs()]
    for length in [50] if fixed else (2, 3, 5, 40, 300):
        given = arguments_of(length, True)
        found = session.run(None, dict(zip(names, (each.numpy() for each in given), strict=True)))[0]
        worst = max(worst, difference(torch.from_numpy(found), plain(*given), given[1]))
    return worst


def compile_forward(model: OlmemForCausalLM) -> float:
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids, mask = arguments_of(50, True)
    worst = difference(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    given: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
    worst = max(worst, difference(compiled(ids, **given).logits, model(ids, **given).logits, mask))
    return max(worst, difference(compiled(ids).logits, model(ids).logits))


def gradients(model: OlmemForCausalLM, forward: Callable[..., Any]) -> list[torch.Tensor]:
    model.zero_grad()
    ids = ids_of(2, 50)
    forward(ids, labels=ids, use_cache=False).loss.backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def of_gradients(model: OlmemForCausalLM, change: Callable[[OlmemForCausalLM], Callable[..., Any]]) -> float:
    with torch.enable_grad():
        expected = gradients(model.train(), model)
        found = gradients(model, change(model))
    return max(difference(*pair) for pair in zip(found, expected, strict=True))


def compile_training(model: OlmemForCausalLM) -> float:
    return of_gradients(model, lambda model: torch.compile(model, backend="aot_eager", fullgraph=True))


def meta(model: OlmemForCausalLM) -> float:
    ids = ids_of(2, 50)
    expected, moved = model(ids, use_cache=False).logits, nn.Module.to(model, "meta")
    found = moved(ids.to("meta"), use_cache=False).logits
    assert found.shape == expected.shape and found.device.type == "meta", found
    return 0.0


def checkpointing(use_reentrant: bool) -> Callable[[OlmemForCausalLM], float]:
    def check(model: OlmemForCausalLM) -> float:
        def change(model: OlmemForCausalLM) -> Callable[..., Any]:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            return model

        return of_gradients(model, change)

    return check


CHECKS: dict[str, Callable[[OlmemForCausalLM], float]] = {
    "export any length": export_any_length,
    "export a length": export_a_length,
    "export step": export_step,
    "ONNX": onnx,
    "compile forward": compile_forward,
    "compile training": compile_training,
    "meta": meta,
    "checkpointing": checkpointing(use_reentrant=False),
    "checkpointing, reentrant": checkpointing(use_reentrant=True),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="some of them, by comma")
    parser.add_argument("--json", type=Path, help="where to write the table")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    table: dict[str, dict[str, Any]] = {}
    for variant in options.variants.split(","):
        table[variant] = {}
        for name, check in CHECKS.items():
            torch._dynamo.reset()
            with torch.no_grad():
                try:
                    found: Any = check(make(VARIANTS[variant]))
                except Exception as error:  # whatever is raised is the answer
                    found = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            table[variant][name] = found
            print(f"{variant:<30}{name:<26}{found if isinstance(found, str) else f'{found:.1e}'}", flush=True)
    if options.json:
        facts = {"torch": torch.__version__, "table": table}
        options.json.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
