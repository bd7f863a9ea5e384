# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""How much a batch of streams has read, on the device and as the host knows it."""

import torch

from .compat_olmem import allocate, known, unless_recorded
from .view_olmem import View


class Counters:
    """Counts the tokens that a batch of streams has read.

    The tensors on the device are the truth: slots, positions and masks of a step are computed from them, and they
    advance in place, so that a step can be captured, compiled and exported. The host keeps a mirror, which decides
    about room and segments without waiting. Recorded code never reads the mirror; after it, the mirror is unknown
    until somebody asks, which waits once.
    """

    def __init__(self):
        self.seen = allocate(0, dtype=torch.long, device="cpu")  # (B,) real tokens of each row
        self.columns = allocate(dtype=torch.long, device="cpu")  # () tokens and padding
        self.gaps = allocate(dtype=torch.bool, device="cpu")  # () whether a row had padding after its first token
        self.fresh = True  # nothing was read yet, as far as the host knows
        self.host_seen: list[int] | None = None
        self.host_columns: int | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the counters on the device by name."""
        return {"seen": self.seen, "columns": self.columns, "gaps": self.gaps}

    def begin(self, batch_size: int, device: torch.device) -> None:
        """Makes the counters of a batch that has read nothing."""
        self.fresh = True
        self.seen = allocate(batch_size, dtype=torch.long, device=device)
        self.columns = allocate(dtype=torch.long, device=device)
        self.gaps = allocate(dtype=torch.bool, device=device)
        self.host_seen, self.host_columns = [0] * batch_size, 0

    def reset(self) -> None:
        """Counts from nothing, for a batch of as many rows."""
        for counter in self.tensors.values():
            counter.zero_()
        self.fresh = True
        self.host_seen, self.host_columns = [0] * len(self.seen), 0

    def set(self, **values: torch.Tensor) -> None:
        """Takes over counters of the same batch, from a file."""
        for name, value in values.items():
            self.tensors[name].copy_(value)
        self.fresh = False
        self.host_seen = self.host_columns = None

    def read_columns(self) -> int:
        """Returns the columns read, padding included; the host waits for the device if it does not know."""
        if self.host_columns is None:
            self.host_columns = int(self.columns)
        return self.host_columns

    def read_seen(self) -> list[int]:
        """Returns the real tokens that each row has read; the host waits for the device if it does not know."""
        if self.host_seen is None:
            self.host_seen = self.seen.tolist()
        return self.host_seen

    def advance(self, view: View, columns: int) -> None:
        """Counts the tokens of a call that all layers have seen, and so many columns."""
        added = (view.numbers >= 0).sum(-1) if view.padded else view.numbers.shape[1]
        host_seen = unless_recorded(self.read_seen)
        host_columns = unless_recorded(self.read_columns)
        self.fresh = False
        self.seen.add_(added)
        self.columns.add_(columns)
        self.host_seen = self.host_columns = None
        if host_seen is not None and host_columns is not None:
            of_rows = added.tolist() if isinstance(added, torch.Tensor) else [added] * len(host_seen)
            self.host_seen = [seen + count for seen, count in zip(host_seen, of_rows, strict=True)]
            self.host_columns = host_columns + columns
        if view.padded:
            self.gaps.logical_or_(((view.numbers < 0) & (view.queries >= 0)).any())

    def select(self, indices: torch.Tensor) -> None:
        """Keeps these rows of the batch, in their order; rows that are all equal need no reading to be reordered."""
        chosen = self.seen.index_select(0, indices.to(self.seen.device))
        host_seen = unless_recorded(lambda: self.host_seen)
        if host_seen is not None:
            same = len(set(host_seen)) == 1
            host_seen = host_seen[:1] * len(chosen) if same else [host_seen[row] for row in indices.tolist()]
        if len(chosen) != len(self.seen):
            self.seen = allocate(len(chosen), dtype=torch.long, device=self.seen.device)
        self.seen.copy_(chosen)
        self.host_seen = host_seen

    def forget(self, rows: torch.Tensor) -> None:
        """Counts these rows of the batch from nothing."""
        self.seen[rows.to(self.seen.device)] = 0
        self.gaps.fill_(True)
        self.columns.copy_(self.seen.max())  # all that needs room
        self.host_seen = self.host_columns = None

    def crop(self, removed: int) -> None:
        """Takes so many columns back."""
        self.seen.sub_(removed).clamp_(min=0)
        self.columns.sub_(removed)
        self.host_seen = self.host_columns = None
        self.fresh = self.read_columns() == 0

    @property
    def has_gaps(self) -> bool:
        """Tells whether a row had padding after its first token."""
        return known(self.gaps, False)


__all__ = ["Counters"]
