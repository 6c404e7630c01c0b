"""One differentiable exchange of rows between the ranks of a group.

M rows in all, D their width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def exchange(
    x_MD: Tensor, send_R: list[int], receive_R: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Send the next `send_R[r]` rows to rank r and return what all ranks sent here, by rank.

    Differentiable: gradients travel back along the same splits. Every rank of the group must
    call it in the same order, also with no rows.

    Args:
        x_MD: [sum(send_R), ...] rows, ordered by destination rank.
        send_R, receive_R: rows for and from every rank of the group.
    """
    if dist.get_world_size(group) == 1:
        return x_MD
    return _Exchange.apply(x_MD, send_R, receive_R, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, send_R: list[int], receive_R: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.splits = send_R, receive_R, group
        return _swap(x_MD, send_R, receive_R, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        send_R, receive_R, group = ctx.splits
        return _swap(grads[0], receive_R, send_R, group), None, None, None


def _swap(
    x_MD: Tensor, send_R: list[int], receive_R: list[int], group: dist.ProcessGroup
) -> Tensor:
    x_MD = x_MD.contiguous()
    out_MD = x_MD.new_empty(sum(receive_R), *x_MD.shape[1:])
    if x_MD.device.type == "cpu":
        _swap_gloo(x_MD, out_MD, send_R, receive_R, group)
    else:
        dist.all_to_all_single(out_MD, x_MD, receive_R, send_R, group=group)
    return out_MD


def _swap_gloo(
    x_MD: Tensor,
    out_MD: Tensor,
    send_R: list[int],
    receive_R: list[int],
    group: dist.ProcessGroup,
) -> None:
    """Post every receive before the first send: gloo then uses both directions of a link.

    Its all_to_all_single lets bulk data hold up the peer's readiness notice, which makes a pair
    of ranks half duplex at random.
    """
    me, num_ranks = dist.get_rank(group), len(send_R)
    pending = []
    inbox, outbox = out_MD.split(receive_R), x_MD.split(send_R)
    peers = [(me + step) % num_ranks for step in range(1, num_ranks)]
    for peer in reversed(peers):
        if receive_R[peer]:
            pending.append(dist.irecv(inbox[peer], group=group, group_src=peer))
    for peer in peers:
        if send_R[peer]:
            pending.append(dist.isend(outbox[peer], group=group, group_dst=peer))
    inbox[me].copy_(outbox[me])
    for work in pending:
        assert work is not None
        work.wait()
