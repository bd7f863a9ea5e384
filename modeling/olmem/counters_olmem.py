# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""Counts the tokens that a batch of streams has read, on the device and on the host."""

from collections.abc import Mapping

import torch

from .compat_olmem import allocate, known, known_on_host, sent
from .view_olmem import View


class Counters:
    """Counts the tokens that a batch of streams has read.

    The tensors on the device are the truth. The slots, positions and masks of a step are computed from them, and they
    are advanced in place, so that a step can be captured, compiled and exported. The host keeps copies of the numbers,
    to decide about room and segments without waiting. A recorded graph never reads these copies. After it has run they
    are unknown, and the next reader waits once for the device.
    """

    def __init__(self):
        self.seen = allocate(0, dtype=torch.long, device="cpu")  # (B,) the real tokens that each row has read
        self.columns = allocate(dtype=torch.long, device="cpu")  # () the columns that were read, padding included
        self.gaps = allocate(dtype=torch.bool, device="cpu")  # () whether any row had padding after its first token
        self.fresh = True  # whether nothing was read yet, as far as the host knows
        self.host_seen: list[int] | None = None
        self.host_columns: int | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the counters on the device by name."""
        return {"seen": self.seen, "columns": self.columns, "gaps": self.gaps}

    def hold(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes over other counters of the same batch by name, without a copy or knowing what they say."""
        self.seen, self.columns, self.gaps = (tensors[name] for name in self.tensors)
        self.host_seen = self.host_columns = None

    def begin(self, batch_size: int, device: torch.device) -> None:
        """Makes the counters of a batch that has read nothing."""
        self.fresh = True
        self.seen = allocate(batch_size, dtype=torch.long, device=device)
        self.columns = allocate(dtype=torch.long, device=device)
        self.gaps = allocate(dtype=torch.bool, device=device)
        self.host_seen, self.host_columns = [0] * batch_size, 0

    def reset(self) -> None:
        """Sets all counters to zero and keeps the number of rows."""
        for counter in self.tensors.values():
            counter.zero_()
        self.fresh = True
        self.host_seen, self.host_columns = [0] * len(self.seen), 0

    def set(self, **values: torch.Tensor) -> None:
        """Sets counters to the values of a file, for the same number of rows."""
        for name, value in values.items():
            self.tensors[name].copy_(value)
        self.fresh = False
        self.host_seen = self.host_columns = None

    def read_columns(self) -> int:
        """Returns the columns that were read, padding included. The host waits for the device if it must."""
        if self.host_columns is None:
            self.host_columns = int(self.columns)
        return self.host_columns

    def read_seen(self) -> list[int]:
        """Returns the real tokens that each row has read. The host waits for the device if it must."""
        if self.host_seen is None:
            self.host_seen = self.seen.tolist()
        return self.host_seen

    def advance(self, view: View, columns: int) -> None:
        """Adds the tokens of a call, which all layers have read, and this number of columns."""
        added: torch.Tensor | int = (view.numbers >= 0).sum(-1) if view.padded else view.numbers.shape[1]
        of_rows = None
        if view.spans is not None:
            of_rows = [0] * len(self.seen)
            for row, _, count in view.spans:
                of_rows[row] += count
            added = sent(torch.tensor(of_rows), self.seen.device)
        host_seen = known_on_host(self.read_seen)
        host_columns = known_on_host(self.read_columns)
        self.fresh = False
        self.seen.add_(added)
        self.columns.add_(columns)
        self.host_seen = self.host_columns = None
        if host_seen is not None and host_columns is not None:
            if of_rows is None:
                of_rows = added.tolist() if isinstance(added, torch.Tensor) else [added] * len(host_seen)
            self.host_seen = [seen + count for seen, count in zip(host_seen, of_rows, strict=True)]
            self.host_columns = host_columns + columns
        if view.padded:
            self.gaps.logical_or_(((view.numbers < 0) & (view.queries >= 0)).any())

    def note_gaps(self, gaps: torch.Tensor) -> None:
        """Remembers whether a call had padding after a row's first token, which is () on the device."""
        self.gaps.logical_or_(gaps)

    def count_step(self) -> None:
        """Counts one real token of each row, which the host knows without waiting."""
        host_seen, host_columns = self.read_seen(), self.read_columns()
        self.seen.add_(1)
        self.columns.add_(1)
        self.host_seen, self.host_columns = [seen + 1 for seen in host_seen], host_columns + 1

    def select(self, indices: torch.Tensor) -> None:
        """Keeps these rows of the batch in this order.

        The host need not read the indices if all rows have read the same number of tokens.
        """
        chosen = self.seen.index_select(0, indices.to(self.seen.device))
        host_seen = known_on_host(lambda: self.host_seen)
        if host_seen is not None:
            same = len(set(host_seen)) == 1
            host_seen = host_seen[:1] * len(chosen) if same else [host_seen[row] for row in indices.tolist()]
        if len(chosen) != len(self.seen):
            self.seen = allocate(len(chosen), dtype=torch.long, device=self.seen.device)
        self.seen.copy_(chosen)
        self.host_seen = host_seen

    def forget(self, rows: torch.Tensor) -> None:
        """Sets the tokens of these rows of the batch to zero."""
        self.seen[rows.to(self.seen.device)] = 0
        self.gaps.fill_(True)
        self.columns.copy_(self.seen.max())  # no row needs more room than its tokens
        self.host_seen = self.host_columns = None

    def crop(self, removed: int) -> None:
        """Takes back the last `removed` columns."""
        self.seen.sub_(removed).clamp_(min=0)
        self.columns.sub_(removed)
        self.host_seen = self.host_columns = None
        self.fresh = self.read_columns() == 0

    @property
    def has_gaps(self) -> bool:
        """Returns whether any row had padding after its first token, or began anew."""
        return known(self.gaps, False)


__all__ = ["Counters"]
