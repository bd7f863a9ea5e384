"""Replays training steps as CUDA graphs: small models wait for the host's launches, which a graph makes at once."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import nn

Tensors = tuple[torch.Tensor, ...]
WARM_UP = 2  # passes before a capture


@dataclass
class Graph:
    """Holds a captured pass, the tensors that it reads, and those that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensors
    outputs: Tensors
    gradients: list[torch.Tensor | None]


class Passes:
    """Runs a forward and a backward pass, which is captured once for each key.

    Args:
        model: whose parameters get the gradients.
        run: returns a loss, and other tensors, of input tensors. What it does may depend on the key alone.
    """

    def __init__(self, model: nn.Module, run: Callable[[Tensors], Tensors]):
        self.weights, self.run = [weight for weight in model.parameters() if weight.requires_grad], run
        self.graphs: dict[Hashable, Graph] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def step(self, key: Hashable, inputs: Tensors) -> Tensors:
        """Sets the gradients of the weights, and returns the loss and the other tensors."""
        key = key, *(each.shape for each in inputs)
        if key not in self.graphs:
            self.graphs[key] = self.capture(inputs)
        found = self.graphs[key]
        for to, each in zip(found.inputs, inputs, strict=True):
            to.copy_(each, non_blocking=True)
        found.graph.replay()
        for weight, gradient in zip(self.weights, found.gradients, strict=True):
            weight.grad = gradient
        return tuple(each.clone() for each in found.outputs)

    def capture(self, inputs: Tensors) -> Graph:
        """Captures a pass, after some that are not, which leave the random numbers as they are.

        The attention of cuDNN allocates memory of its own, which a capture must not, so it stays out.
        """
        inputs, stream = tuple(each.clone() for each in inputs), torch.cuda.Stream()
        graph, by_cudnn = torch.cuda.CUDAGraph(), torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.random.fork_rng(), torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.differentiate(inputs)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=self.pool):
                outputs, gradients = self.differentiate(inputs)
        finally:
            torch.backends.cuda.enable_cudnn_sdp(by_cudnn)
        return Graph(graph, inputs, outputs, gradients)

    def differentiate(self, inputs: Tensors) -> tuple[Tensors, list[torch.Tensor | None]]:
        outputs = self.run(inputs)
        gradients = torch.autograd.grad(outputs[0], self.weights, allow_unused=True)
        return tuple(each.detach() for each in outputs), list(gradients)
