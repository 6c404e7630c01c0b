"""Which rank trains on which sequences of a global batch: one that has the experts they choose.

S sequences, V token ids, R ranks of an EP group.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from parallel.mesh import ParallelMesh
from placement.batches import assign, predicted_rows
from placement.topology import Topology
from trainer.data.batches import check_batch_size
from trainer.data.packing import PackedDataset

PER_ROW = 1024  # whole numbers, so that all ranks find the same assignment on any machine
AT_ONCE = 64  # sequences in memory


class SequenceAssigner:
    """Orders the sequences of global batches so that each rank's share is the one for its experts.

    A pure function of the batch and a table of expected rows, the same on all ranks; they need not
    talk. A global batch is a set, so what a step computes does not change.

    Args:
        dataset: the sequences. topology: of an EP group; how much slower its links between nodes
            are is what they weigh more.
    """

    def __init__(self, dataset: PackedDataset, mesh: ParallelMesh, topology: Topology) -> None:
        self.dataset = dataset
        self.ep_size, self.edp_size = mesh.ep_size, mesh.edp_size
        # of the first EP group: others may lie on nodes differently, and all ranks must agree
        self.node_of_R = [rank // mesh.ranks_per_node for rank in range(mesh.ep_size)]
        self.inter = max(1.0, topology.intra_gbps / topology.inter_gbps)
        self._rows_VR: npt.NDArray[np.int64] | None = None

    def update(self, rows_VR: npt.NDArray[np.float64]) -> None:
        """Expect these rows of a token of each id on each rank (`Preferences.rows_per_rank`).

        To be called with the same table on all ranks whenever statistics or placement change.

        Raises:
            ValueError: for a table without token ids, or of another number of ranks.
        """
        if rows_VR.ndim != 2 or not len(rows_VR) or rows_VR.shape[1] != self.ep_size:
            raise ValueError(
                f"rows_VR must be [token ids, {self.ep_size}], a column for every rank of an EP "
                f"group, and not empty, got {rows_VR.shape}"
            )
        self._rows_VR = np.rint(rows_VR * PER_ROW).astype(np.int64)

    def order(self, ids: list[int]) -> list[int]:
        """The same sequences, so ordered that `split_batch` gives every rank its own.

        As they were before the first `update`. Rank r of every EP group has the same experts, so
        the groups share the sequences for r, in order.

        Raises:
            ValueError: if the ranks cannot split the batch evenly.
        """
        if self._rows_VR is None:
            return ids
        check_batch_size(len(ids), self.ep_size * self.edp_size, 1)
        parts = [
            predicted_rows(self._tokens(ids[first : first + AT_ONCE]), self._rows_VR)
            for first in range(0, len(ids), AT_ONCE)
        ]
        rank_S = assign(np.concatenate(parts), self.node_of_R, inter=self.inter)
        by_rank_S = np.asarray(ids)[np.argsort(rank_S, kind="stable")]
        shares = by_rank_S.reshape(self.ep_size, self.edp_size, -1)
        return shares.swapaxes(0, 1).ravel().tolist()

    def _tokens(self, ids: list[int]) -> npt.NDArray[np.int64]:
        return self.dataset.batch(ids)["input_ids"].numpy()
