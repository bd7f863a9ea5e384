# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Refuses a memory with NaN or infinity, which would spread to all later segments and make generated text useless."""

import torch


def refuse_nonfinite_memory(memory: torch.Tensor, where: str, remedy: str) -> None:
    """Raises an error that names the first row whose memory holds NaN or infinity.

    The host waits for the device.

    Args:
        memory: the memory (B, M, hidden_size) of each row.
        where: when the memory must be finite, for the error.
        remedy: what the caller can do, for the error.
    """
    finite = memory.detach().isfinite().flatten(1).all(-1)
    if bool(finite.all()):
        return
    row = int((~finite).nonzero()[0, 0])
    values = memory[row].detach()
    raise ValueError(
        f"`memory` of row {row} must be finite {where} (got {int((~values.isfinite()).sum())} non-finite "
        f"values of {values.numel()}); {remedy}"
    )


__all__ = ["refuse_nonfinite_memory"]
