"""Training on two processes, and on models that accelerate spreads, gives what one process gives."""

import os
import sys

import pytest
import torch
from accelerate import cpu_offload, disk_offload, infer_auto_device_map
from fresh import run_fresh
from modeling.helpers import tiny, tokens
from modeling.parallel import CHECKPOINTING, VARIANTS, Result, made, train, train_in_bfloat16
from olmem import OlmemCache, OlmemForCausalLM
from torch.testing import assert_close
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling import parallel

every_variant = pytest.mark.parametrize("variant", VARIANTS)
WAYS = ["ddp", "fsdp1", "tp", *(f"fsdp2, checkpoints {each}" for each in CHECKPOINTING)]
QUICK = "ddp both"


@pytest.fixture(scope="module")
def found(request, tmp_path_factory) -> list[dict[str, Result]]:
    """What each of two processes found; they do all checks, one after another, or the quick one if no more is asked."""
    tests = [test for test in request.session.items if "found" in getattr(test, "fixturenames", ())]
    names = [] if any(test.get_closest_marker("slow") for test in tests) else [QUICK]
    folder = tmp_path_factory.mktemp("parallel")
    for variant in VARIANTS:
        made(variant).save_pretrained(folder / variant)
    path = os.pathsep.join(each for each in sys.path if each)
    code = "import sys; from modeling.parallel import run_both; run_both(*sys.argv[1:])"
    child = run_fresh(code, folder, *names, env=os.environ | {"PYTHONPATH": path})
    assert child.returncode == 0, child.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(parallel.WORLD)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Result]:
    """What one process finds for each variant."""
    results = {}
    for variant in VARIANTS:
        model = made(variant)
        results[variant] = {"losses": torch.stack(train(model)), "weights": dict(model.named_parameters())}
    return results


def same(result: Result, meant: Result) -> None:
    """Checks losses and weights after two steps in float32."""
    assert "error" not in result, result["error"]
    assert_close(result["losses"], meant["losses"], rtol=1e-6, atol=1e-6)
    for name, weight in meant["weights"].items():
        text = lambda message, name=name: f"{name}: {message}"  # noqa: E731
        assert_close(result["weights"][name], weight.detach(), rtol=1e-6, atol=1e-6, msg=text)


@pytest.mark.parametrize(
    ("way", "variant"),
    [
        pytest.param(way, variant, marks=[] if f"{way} {variant}" == QUICK else pytest.mark.slow)
        for way in WAYS
        for variant in VARIANTS
    ],
)
def test_two_processes_train_as_one_does(found, alone, way, variant):
    has_memory = "num_memory_tokens" in VARIANTS[variant]
    is_refused = way == "fsdp2, checkpoints True" and has_memory and "__call__" in vars(GradientCheckpointingLayer)
    for result in found:
        if is_refused:  # by older releases of Transformers, which run the hooks of FSDP2 inside a checkpoint
            assert "`use_reentrant` must be False" in result[f"{way} {variant}"]["error"]
        else:
            same(result[f"{way} {variant}"], alone[variant])


@pytest.mark.slow
@every_variant
def test_texts_of_a_part_of_a_segment_train_too(found, variant):
    """No memory is written then, or on one process alone, and its norm has a gradient of zero there."""
    meant = made(variant)
    losses = torch.stack(train(meant, length=parallel.SHORT))
    for result in found:
        same(result[f"ddp, short {variant}"], {"losses": losses, "weights": dict(meant.named_parameters())})
        assert "error" not in result[f"ddp, uneven {variant}"], result[f"ddp, uneven {variant}"]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp1", "fsdp2"])
def test_sharded_layers_refuse_other_numbers_of_segments_on_another_process(found, way):
    """The processes would wait for one another."""
    for result in found:
        assert "must hold as many segments of memory on each rank" in result[f"{way}, uneven"]["error"]


@pytest.mark.slow
@every_variant
def test_mixed_precision_adds_nothing_to_the_noise_of_bfloat16(found, alone, variant):
    """The first loss is that of one process in bfloat16 bit for bit; then only the order of sums differs. Every state
    that is rotated is of bfloat16, and every angle of float32."""
    losses, model = train_in_bfloat16(variant)
    noise = (losses[1] - alone[variant]["losses"][1]).abs()
    for result in found:
        result = result[f"mixed {variant}"]
        assert "error" not in result, result["error"]
        assert result["rotations"] == {(torch.bfloat16, torch.float32, torch.float32)}
        assert result["losses"][0] == losses[0]
        assert (result["losses"][1] - losses[1]).abs() <= noise
        for name, weight in model.named_parameters():
            noise_of_weight = (alone[variant]["weights"][name] - weight).norm()
            assert (result["weights"][name] - weight).norm() <= noise_of_weight, name


# Models that accelerate spreads over devices


@torch.no_grad()
def answers(model: OlmemForCausalLM) -> tuple[torch.Tensor, ...]:
    """What a model makes of a text as a whole, in pieces with a cache across them, and by writing on."""
    ids, cache = tokens(2, 19), OlmemCache(model.config)
    whole = model.eval()(ids, use_cache=False).logits
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([7, 1, 1, 6, 4], dim=1)]
    return whole, torch.cat(pieces, dim=1), model.generate(ids, max_new_tokens=4, do_sample=False)


@every_variant
def test_an_offloaded_model_answers_the_same(variant, tmp_path):
    meant = answers(made(variant))
    folder = tmp_path / "model"
    made(variant).save_pretrained(folder)
    spread = {
        "the cpu": cpu_offload(made(variant), execution_device=torch.device("cpu")),
        "the disk": disk_offload(made(variant), tmp_path / "weights", execution_device=torch.device("cpu")),
        "a map": OlmemForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=tmp_path / "map"),
    }
    for way, model in spread.items():
        for found, expected in zip(answers(model), meant, strict=True):
            assert torch.equal(found, expected), way


@pytest.mark.parametrize("place", ["disk", "cpu"])
@pytest.mark.parametrize("part", ["memory.embeddings", "memory.norm", "memory_gate.logits", "retrieval_gate.logits"])
def test_a_device_map_may_name_the_parts_of_memory(part, place, tmp_path):
    """Accelerate places modules, and these are parameters, or one of two parts of a module that is placed whole.

    It does not place a parameter of a module that has parts, as learned sinks are of an attention, so there are none.
    """
    without = VARIANTS["both"] | {"sink_logit_init": None}
    model = tiny(**without, vocab_size=62).train()
    expected = answers(model)
    model.save_pretrained(tmp_path)
    other = {"disk": "cpu", "cpu": "disk"}[place]
    names = [name for name, module in model.named_modules() if not list(module.children())]
    places = {name: other for name in names if not name.endswith(("memory.norm", "_gate"))}
    places |= {f"model.memory.{name}": other for name in ("embeddings", "norm")}
    gates = [f"{kind}_gate.logits" for kind in ("memory", "retrieval")]
    weights = [name for name, _ in model.named_parameters()]
    places |= {name: other for name in weights if name.endswith(tuple(gates))}
    places |= {name: place for name in places if name.endswith(part)}
    spread = OlmemForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offloaded")
    for found, meant in zip(answers(spread), expected, strict=True):
        assert torch.equal(found, meant)


def test_no_automatic_device_map_splits_memory():
    model = made("both")
    size = sum(weight.numel() * weight.itemsize for weight in model.parameters())
    for budget in range(size - 288, size, 32):  # where there is room for some of memory's parts only
        names = infer_auto_device_map(model, {"cpu": budget, "disk": 10**9}, model._no_split_modules)
        assert "model.memory" in names


@every_variant
@pytest.mark.parametrize("has_mask", [False, True])
def test_the_meta_device_gives_shapes(has_mask, variant):
    """With a cache and without; a mask has no zeros there."""
    model, ids = made(variant).to("meta"), tokens(2, 17).to("meta")
    mask = torch.ones_like(ids) if has_mask else None
    output = model(ids, attention_mask=mask, labels=ids, use_cache=False)
    output.loss.backward()
    assert output.logits.shape == (2, 17, 62) and output.logits.is_meta
    cache = OlmemCache(model.config)
    for piece in ids.split([9, 1, 7], dim=1):
        logits = model.eval()(
            piece, attention_mask=torch.ones_like(piece) if has_mask else None, past_key_values=cache
        ).logits
        assert logits.shape == (*piece.shape, 62) and logits.is_meta
    if variant == "plain" and not has_mask:
        positions = torch.arange(17, device="meta")[None]
        assert model(ids, position_ids=positions, use_cache=False).logits.is_meta
