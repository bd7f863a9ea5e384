# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Refuses a state with NaN or infinity, which would spread to all later segments and make generated text useless."""

import torch

from .compat_olmem import assert_on_device, is_recorded


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
    if is_recorded(states):
        if not states.is_meta:
            assert_on_device(finite.all(), f"{name} must be finite {where} (got non-finite values); {remedy}")
        return
    if bool(finite.all()):
        return
    row = int((~finite).nonzero()[0, 0])
    values = states[row].detach()
    raise ValueError(
        f"{name} of row {row} must be finite {where} (got {int((~values.isfinite()).sum())} non-finite "
        f"values of {values.numel()}); {remedy}"
    )


__all__ = ["refuse_nonfinite"]
