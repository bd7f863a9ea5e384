"""Two processes that train models together.

They are forked from one process that has imported everything, which costs little time. For each check they leave the
losses and weights in the folder, or what was raised.
"""

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from modeling.helpers import BOTH, MEMORY, RETRIEVAL, tiny, tokens
from olmem import OlmemForCausalLM, ops_olmem
from olmem.modeling_olmem import OlmemDecoderLayer
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

WORLD, STEPS, RATE = 2, 2, 0.03
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "memory": MEMORY | {"memory_gate_init": 0.0},
    "retrieval": RETRIEVAL | {"retrieval_layers": [0]},
    "both": BOTH | {"retrieval_layers": [0], "memory_gate_init": 0.0, "num_sink_tokens": 1, "sink_logit_init": 0.5},
}
# How the layers are computed twice: not at all, or with either kind of checkpointing.
CHECKPOINTING = (None, False, True)
Result = dict[str, Any]


LENGTH, SHORT = 13, 4  # tokens of a row: some segments of memory, or a part of one


def batch(step: int, length: int = LENGTH) -> torch.Tensor:
    """Ids of a step, of which each process takes its share of rows."""
    return tokens(2 * WORLD, length, seed=step)


def train(model: nn.Module, rank: int = 0, world: int = 1, length: int = LENGTH) -> list[torch.Tensor]:
    """Returns the losses of this process's share of a few steps of gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(STEPS):
        ids = batch(step, length).chunk(world)[rank]
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
    return losses


def made(variant: str, use_reentrant: bool | None = None) -> OlmemForCausalLM:
    """A model in training mode."""
    model = tiny(**VARIANTS[variant], vocab_size=62).train()  # which two processes can share
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


def sharded(model: OlmemForCausalLM, **options) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def wrapped(model: OlmemForCausalLM) -> nn.Module:
    policy = ModuleWrapPolicy({OlmemDecoderLayer})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


@contextmanager
def rotations() -> Iterator[set[tuple[torch.dtype, ...]]]:
    """Collects the dtypes of states, cosines and sines wherever states are rotated."""
    found, rotate = set(), ops_olmem.rotate

    def recorded(*given: torch.Tensor) -> torch.Tensor:
        found.add(tuple(each.dtype for each in given))
        return rotate(*given)

    ops_olmem.rotate = recorded
    yield found
    ops_olmem.rotate = rotate


def train_in_bfloat16(variant: str) -> tuple[list[torch.Tensor], nn.Module]:
    """What mixed precision means, in one process: weights in float32, all else in bfloat16, gradients too."""
    model = made(variant)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=RATE), []
    for step in range(STEPS):
        half, shares = made(variant), []
        for weight, whole in zip(half.parameters(), model.parameters(), strict=True):
            weight.data = whole.detach().bfloat16()
        for ids in batch(step).chunk(WORLD):
            loss = half(ids, labels=ids, use_cache=False).loss
            (loss / WORLD).backward()
            shares.append(loss.detach().float())
        for weight, whole in zip(half.parameters(), model.parameters(), strict=True):
            whole.grad = None if weight.grad is None else weight.grad.float()
        optimizer.step()
        losses.append(torch.stack(shares).mean())
    return losses, model


def result(model: nn.Module, losses: list[torch.Tensor]) -> Result:
    """The losses of all processes together, and the whole weights."""
    joined = torch.stack(losses)
    dist.all_reduce(joined, dist.ReduceOp.SUM)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {"losses": joined / WORLD, "weights": {name: weight.clone() for name, weight in weights.items()}}


def data_parallel(
    variant: str, wrap: Callable[..., nn.Module], use_reentrant: bool | None = None, length: int = LENGTH
) -> Result:
    model = wrap(made(variant, use_reentrant))
    return result(model, train(model, dist.get_rank(), WORLD, length))


def uneven(variant: str, wrap: Callable[..., nn.Module]) -> Result:
    """Each process reads rows of another length."""
    model = wrap(made(variant))
    return result(model, train(model, dist.get_rank(), WORLD, LENGTH if dist.get_rank() else SHORT))


def mixed_precision(variant: str) -> Result:
    model = sharded(made(variant), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with rotations() as found:
        losses = train(model, dist.get_rank(), WORLD)
    return result(model, losses) | {"rotations": found}


def tensor_parallel(variant: str, folder: Path) -> Result:
    """All processes read the same rows."""
    model = OlmemForCausalLM.from_pretrained(folder / variant, tp_plan="auto").train()
    return result(model, train(model))


def checks(folder: Path) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Names all that is to be done, in the order in which both processes do it."""
    for variant in VARIANTS:
        yield f"ddp {variant}", partial(data_parallel, variant, DistributedDataParallel)
        yield f"ddp, short {variant}", partial(data_parallel, variant, DistributedDataParallel, length=SHORT)
        yield f"ddp, uneven {variant}", partial(uneven, variant, DistributedDataParallel)
        yield f"fsdp1 {variant}", partial(data_parallel, variant, wrapped)
        yield f"tp {variant}", partial(tensor_parallel, variant, folder)
        for use_reentrant in CHECKPOINTING:
            name = f"fsdp2, checkpoints {use_reentrant} {variant}"
            yield name, partial(data_parallel, variant, sharded, use_reentrant)
        yield f"mixed {variant}", partial(mixed_precision, variant)
    for name, wrap in {"fsdp1": wrapped, "fsdp2": sharded}.items():
        yield f"{name}, uneven", partial(uneven, "memory", wrap)


def run(rank: int, folder: Path, names: tuple[str, ...]) -> None:
    """Does all checks, or those of these names, in one of the processes."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "GLOO_SOCKET_IFNAME": "lo"}
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=30), WORLD, rank)
    found: dict[str, Result] = {}
    for name, check in checks(folder):
        if names and name not in names:
            continue
        try:
            found[name] = check()
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def run_both(folder: str, *names: str) -> None:
    """Does all checks, or those of these names, in two processes."""
    torch.multiprocessing.start_processes(run, (Path(folder), names), WORLD, start_method="fork")
