# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""A memory that is not finite is an error, for it would stay so for ever, and a text would only look empty."""

import torch


def refuse_nonfinite_memory(memory: torch.Tensor, rows: torch.Tensor | None, where: str, remedy: str) -> None:
    """Raises an error that names the first row whose memory (R, M, hidden_size) holds NaN or infinity.

    It waits for the device, so it is for places where the host waits anyway. `rows` (R,) are the rows of the batch that
    the memory is of; without it they are all.
    """
    finite = memory.detach().isfinite().flatten(1).all(-1)
    if bool(finite.all()):
        return
    index = int((~finite).nonzero()[0, 0])
    row = index if rows is None else int(rows[index])
    values = memory[index].detach()
    raise ValueError(
        f"`memory` of row {row} must be finite {where} (got {int((~values.isfinite()).sum())} of {values.numel()} "
        f"numbers that are not); {remedy}"
    )


__all__ = ["refuse_nonfinite_memory"]
