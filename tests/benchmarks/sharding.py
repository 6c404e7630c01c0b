"""Bytes that collectives gather and sum across nodes in one optimizer step, by sharding and EP.

Four ranks on two nodes of two. Operators are counted where torch calls them, so the figures are
the same on every machine. Messages between pairs of ranks (tokens) are not among them.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.sharding
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.mesh import ParallelMesh
from parallel.model import parallelize
from tests.parallel.test_families import full_model
from tests.ranks import run_ranks
from tests.trainer.test_engine import constant, sequences
from trainer.engine import TorchEngine

WORLD, PER_NODE = 4, 2
# what an operator of torch.distributed does, and where among its arguments the whole tensor is
WHOLE = {
    "_allgather_base_": ("gathered", 0),
    "_reduce_scatter_base_": ("scattered", 1),
    "allreduce_": ("summed", 0),
}


class CollectiveBytes(TorchDispatchMode):
    """Counts, on this rank, the bytes of the whole tensors that collectives inside work on.

    Args:
        ranks_per_node: nodes are ranks in a row.

    Attributes:
        found: bytes by what happens and where: "gathered across nodes", "summed within nodes".
            Groups of one rank do not count.
    """

    def __init__(self, ranks_per_node: int) -> None:
        super().__init__()
        self.ranks_per_node = ranks_per_node
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op._schema.name.removeprefix("c10d::")
        if name in WHOLE:
            what, place = WHOLE[name]
            boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
            ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(boxed))
            if len(ranks) > 1:
                nodes = {rank // self.ranks_per_node for rank in ranks}
                where = "across nodes" if len(nodes) > 1 else "within nodes"
                tensors = args[place] if isinstance(args[place], list) else [args[place]]
                self.found[f"{what} {where}"] += sum(tensor.nbytes for tensor in tensors)
        return op(*args, **(kwargs or {}))


def traffic(
    ep: int, within_node: bool, micro_batches: int = 1, shard_gradients: bool = False
) -> tuple[dict[str, int], int]:
    """Bytes that a step's collectives work on, and bytes of the parameters of this rank."""
    mesh = ParallelMesh.build(ep=ep, ranks_per_node=PER_NODE, device_type="cpu")
    model: Any = full_model("qwen3_moe").float()
    parallelize(model, mesh)
    engine = TorchEngine(
        model,
        mesh,
        make_optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
        make_schedule=constant,
        balancers=[],
        shard_within_node=within_node,
        shard_gradients=shard_gradients,
    )
    batch = sequences(0, model.config.vocab_size)
    mine = slice(mesh.rank, None, WORLD)
    micro_batch = {key: value[mine] for key, value in batch.items()}
    with CollectiveBytes(PER_NODE) as counted:
        engine.train_step([micro_batch] * micro_batches)
    return dict(counted.found), local_bytes(model)


def local_bytes(model: nn.Module) -> int:
    """Bytes of a rank's own shards."""
    shards: list[Any] = list(model.parameters())
    return sum(shard.to_local().nbytes for shard in shards)


def main() -> None:
    """Print a row for every EP size and way of sharding."""
    columns = [f"{what} across nodes" for what in ("gathered", "scattered", "summed")]
    print(
        f"{'EP':>2} {'sharded over':14} {'own bytes':>10} " + " ".join(f"{c:>23}" for c in columns)
    )
    for ep in (1, 2, 4):
        for within_node in (False, True):
            found, own = run_ranks(traffic, WORLD, ep, within_node)[0]
            over = "a node" if within_node else "all ranks"
            numbers = " ".join(f"{found.get(column, 0):>23,}" for column in columns)
            print(f"{ep:>2} {over:14} {own:>10,} {numbers}")


if __name__ == "__main__":
    main()
