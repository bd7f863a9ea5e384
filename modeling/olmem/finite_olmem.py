# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Refuses a state with NaN or infinity, which would spread to all later segments and make generated text useless."""

import torch

from .compat_olmem import refuse_unless


def refuse_nonfinite(name: str, states: torch.Tensor, where: str, remedy: str) -> None:
    """Raises an error that names the first row whose states hold NaN or infinity.

    The host waits for the device. A recorded graph checks it on the device when it runs, where no row can be named.

    Args:
        name: what the states are, for the error.
        states: the states (B, …) of each row, such as its memory (B, M, hidden_size).
        where: when they must be finite, for the error.
        remedy: what the caller can do, for the error.
    """
    finite = states.detach().isfinite().flatten(1).all(-1)

    def name_row() -> str:
        row = int((~finite).nonzero()[0, 0])
        values = states[row].detach()
        count = int((~values.isfinite()).sum())
        return (
            f"{name} of row {row} must be finite {where} (got {count} non-finite values of {values.numel()}); {remedy}"
        )

    refuse_unless(finite.all(), f"{name} must be finite {where} (got non-finite values); {remedy}", name_row)


__all__ = ["refuse_nonfinite"]
