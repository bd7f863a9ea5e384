"""Models that accelerate spreads over devices, and two processes that train one."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, disk_offload
from ecosystem.variants import VARIANTS, make, save, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

WAYS = {
    "ddp": ("DistributedDataParallel, 2 processes", "torch"),
    "fsdp1": ("FullyShardedDataParallel, 2 processes", "torch"),
    "fsdp2": ("`fully_shard` of each layer, 2 processes", "torch"),
    "tp": ('`tp_plan="auto"`, 2 processes', "transformers"),
}


def batch() -> torch.Tensor:
    return tokens(4, 20)


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, labels=ids, use_cache=False).loss


def spread(way: str, variant: str, folder: str):
    mesh = init_device_mesh("cpu", (2,))
    if way == "tp":
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", device_mesh=mesh)
    model = make(variant)
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "fsdp1":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model, ids: torch.Tensor, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Losses of two steps and of the model after them."""
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        return [*losses, loss_of(model, ids)]


def work(rank: int, folder: str) -> None:
    """What one of two processes finds: the mean loss of both, or an error."""
    import olmem  # noqa: F401  for the Auto classes

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=timedelta(seconds=60))
    results = {}
    for way in WAYS:
        for variant in VARIANTS:
            try:
                model = spread(way, variant, f"{folder}/{variant}")
                ids = batch() if way == "tp" else batch()[2 * rank :][:2]
                losses = torch.stack(train(model, ids, torch.optim.SGD(model.parameters(), 0.1)))
                dist.all_reduce(losses)
                results[way, variant] = losses / 2
            except Exception as error:  # which the test of this way and variant reports
                results[way, variant] = f"{type(error).__name__}: {error}"
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("processes")
    for variant in VARIANTS:
        save(variant, folder / variant)
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return torch.load(folder / "rank0.pt")


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.tool(*names), id=way) for way, names in WAYS.items()]
)
def test_two_processes_train_as_one(variant, way, found):
    model = make(variant)
    losses = torch.stack(train(model, batch(), torch.optim.SGD(model.parameters(), 0.1)))
    result = found[way, variant]
    assert not isinstance(result, str), result
    assert_close(result, losses, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def same(model, variant: str) -> None:
    ids = tokens(2, 20)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), make(variant).generate(ids, **options))


@pytest.mark.tool("`cpu_offload` and `disk_offload`", "accelerate")
def test_offloaded_weights(variant, tmp_path):
    device = torch.device("cpu")
    same(cpu_offload(make(variant), execution_device=device), variant)
    same(disk_offload(make(variant), tmp_path / "weights", execution_device=device), variant)


@pytest.mark.tool("`device_map`, a part of the model on the disk", "accelerate")
def test_a_device_map(variant, tmp_path):
    folder = save(variant, tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"lm_head": "disk", "model.rotary_emb": "cpu"}
    if variant == "memory":
        places["model.memory"] = "disk"
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offloaded")
    same(model, variant)
