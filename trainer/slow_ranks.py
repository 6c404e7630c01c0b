"""Names ranks that compute more slowly than the others, for whom the whole job waits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
import torch.distributed as dist

from parallel.mesh import ParallelMesh

WINDOW = 6  # steps between two comparisons
SLOW = 1.5  # times as long for a row as the median rank, in two comparisons in a row


class SlowRanks:
    """Compares how long the experts' products of a row take on every rank.

    Products alone are the same work everywhere and contain no waiting for others, unlike the time
    of a step, which is the slowest rank's on all of them. A rank's value is its median over a few
    steps; it is named if it is slow in two comparisons, so within 3 x WINDOW steps.

    Args:
        hosts: name of every rank's host.
    """

    def __init__(self, hosts: Sequence[str], mesh: ParallelMesh) -> None:
        self.hosts, self.mesh = hosts, mesh
        self.ratio = 1.0
        self._seconds: list[float] = []
        self._before: set[int] = set()
        self._named: set[int] = set()

    def step(self, row_s: float) -> list[str]:
        """What there is to say after a step, the same on all ranks; call it on all of them.

        Args:
            row_s: seconds per row on this rank, NaN if it had none.
        """
        self._seconds.append(row_s)
        if len(self._seconds) < WINDOW:
            return []
        known = [value for value in self._seconds if not math.isnan(value)]
        self._seconds = []
        mine = torch.tensor([statistics.median(known) if known else math.nan])
        all_R = mine.new_empty(self.mesh.world_size).to(self.mesh.device)
        dist.all_gather_single(all_R, mine.to(self.mesh.device), group=self.mesh.dp_group)
        return self._compare(all_R.tolist())

    def _compare(self, row_s_R: Sequence[float]) -> list[str]:
        known = {rank: value for rank, value in enumerate(row_s_R) if not math.isnan(value)}
        if not known:
            return []
        usual = statistics.median_low(known.values())
        self.ratio = max(known.values()) / usual
        slow = {rank for rank, value in known.items() if value > SLOW * usual}
        lines = [
            f"rank {rank} on {self.hosts[rank]} is slow, and all others wait for it: a row of its "
            f"experts' products takes {known[rank] * 1e6:.3g} us, {known[rank] / usual:.1f} times "
            f"the median rank's"
            for rank in sorted((slow & self._before) - self._named)
        ]
        recovered = sorted(rank for rank in self._named & known.keys() if rank not in slow)
        lines += [f"rank {rank} on {self.hosts[rank]} keeps up again" for rank in recovered]
        self._named = (self._named - set(recovered)) | (slow & self._before)
        self._before = slow
        return lines
