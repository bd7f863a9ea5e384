"""Training on two processes, and on models that accelerate spreads, gives what one process gives."""

import os
import subprocess
import sys

import pytest
import torch
from modeling.parallel import CHECKPOINTING, VARIANTS, Result, made, train, train_in_bfloat16
from torch.testing import assert_close

from modeling import parallel

every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Result]]:
    """What each of two processes found; they do all checks, one after another."""
    folder = tmp_path_factory.mktemp("parallel")
    for variant in VARIANTS:
        made(variant).save_pretrained(folder / variant)
    path = os.pathsep.join(each for each in sys.path if each)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, parallel.__file__, folder], env=environment, check=True, timeout=300)
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


@every_variant
@pytest.mark.parametrize("way", ["ddp", "fsdp1", "tp", *(f"fsdp2, checkpoints {each}" for each in CHECKPOINTING)])
def test_two_processes_train_as_one_does(found, alone, way, variant):
    for result in found:
        same(result[f"{way} {variant}"], alone[variant])


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
