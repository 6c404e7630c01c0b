"""Which rank trains on which sequences of a global batch: those whose experts it has.

S sequences, V token ids, R ranks of an EP group.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from parallel.mesh import ParallelMesh
from placement.batches import assign, predicted_rows
from placement.topology import Topology
from trainer.data.packing import PackedDataset

PER_ROW = 1024  # whole numbers, so that all ranks find the same assignment on any machine


class SequenceAssigner:
    """Orders the sequences of global batches so that each rank's share lies in its own place.

    A pure function of the batch and a table of expected rows, the same on all ranks.

    Args:
        dataset: the sequences. topology: of an EP group; its links weigh what crosses them.
    """

    def __init__(self, dataset: PackedDataset, mesh: ParallelMesh, topology: Topology) -> None:
        self.dataset, self.topology = dataset, topology
        self.ep_size, self.edp_size = mesh.ep_size, mesh.edp_size
        self._rows_VR: npt.NDArray[np.int64] | None = None

    def update(self, rows_VR: npt.NDArray[np.float64]) -> None:
        """Expect these rows of every token id on every rank from the next batch on."""
        self._rows_VR = np.rint(rows_VR * PER_ROW).astype(np.int64)

    def order(self, ids: list[int]) -> list[int]:
        """The same sequences, those for rank 0 first; as they were before the first `update`.

        Rank r of every EP group has the same experts, so the groups share its sequences in order.
        """
        if self._rows_VR is None:
            return ids
        token_ST = self.dataset.batch(ids)["input_ids"].numpy()
        inter = max(1.0, self.topology.intra_gbps / self.topology.inter_gbps)
        rank_S = assign(
            predicted_rows(token_ST, self._rows_VR), self.topology.node_of_R, inter=inter
        )
        ids_R = [np.asarray(ids)[rank_S == rank] for rank in range(self.ep_size)]
        share = len(ids) // (self.ep_size * self.edp_size)
        ordered = [
            ids_R[rank][group * share : (group + 1) * share]
            for group in range(self.edp_size)
            for rank in range(self.ep_size)
        ]
        return np.concatenate(ordered).tolist()
