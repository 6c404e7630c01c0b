"""Expert-router coupling: an expert answers most to its own router row, and the row to it.

T tokens on this rank, K choices, E experts, S experts at home on this rank, D hidden width,
F expert width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.decisions import once
from parallel.layer import ExpertParallel
from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks, router_of
from trainer.balance.base import ScheduledLoss
from trainer.balance.merging import gate_of


class Coupling(ScheduledLoss):
    """Couples experts and router rows (arXiv:2512.23447); does not balance.

    Router row R_i stands for the tokens of expert i, as a proxy P_i: the row times 1 + noise, so
    that it stays nearest to its own row. M_ij is the norm of the gate product of expert j for
    P_i, before activation and without bias; of the up product where experts have no gate. With a
    the strength, per layer:
    coefficient / E^2 * sum over i and j != i of max(M_ij - a M_ii, 0) + max(M_ji - a M_ii, 0).

    A loss of the weights, not of tokens: joined in the first micro-batch of a step. A rank adds
    the terms of its own experts' columns of M, divided by the ranks that have the same experts;
    what it needs of others is M_ii, one all-reduce of E numbers per layer. The noise is the same
    on all ranks and in a repeated forward.

    Args:
        strength: a, > 0 and <= 1; the less, the more is asked of the diagonal.
        seed: of the noise, with step and layer.
        schedule: constant, linear, cosine, inverse or inverse_sqrt. steps, final: of linear and
            cosine. until: last step with a loss; None for no end.

    Raises:
        ValueError: for a value out of bounds.
    """

    name = "coupling"

    def __init__(
        self,
        coefficient: float = 1.0,
        strength: float = 1.0,
        seed: int = 0,
        schedule: str = "constant",
        steps: int | None = None,
        final: float = 0.0,
        until: int | None = None,
    ) -> None:
        if not 0 < strength <= 1:
            raise ValueError(f"balance.coupling.strength ({strength}) must be > 0, <= 1")
        if seed < 0:
            raise ValueError(f"balance.coupling.seed ({seed}) must be >= 0")
        super().__init__(coefficient, schedule, steps, final, until)
        self.strength, self.seed = strength, seed
        self.joined: set[int] = set()  # layers whose loss is in this step
        self.proxies: dict[int, Tensor] = {}  # on their way from router to experts

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        blocks = moe_blocks(model)
        self.edp_size, self.group, self.num_layers = mesh.edp_size, mesh.ep_group, len(blocks)
        for layer, (name, block) in enumerate(blocks):
            router = router_of(block)
            if router is None:
                raise ValueError(f"balance: no router found in {name}; use balance=none")
            rows = rows_of(router, block.experts, name)
            router.register_forward_hook(partial(self._make_proxies, rows=rows, layer=layer))
            block.experts.register_forward_pre_hook(partial(self._join, layer=layer))

    def before_step(self, num_positions: int) -> None:
        super().before_step(num_positions)
        self.joined, self.proxies = set(), {}

    @torch.compiler.disable
    def _make_proxies(
        self, router: nn.Module, inputs: Any, output: Any, rows: str, layer: int
    ) -> None:
        """Here the router's weight is gathered, and in fp32 where the experts compute in bf16."""
        wanted = router.training and self.coefficient.at(self.step) > 0
        if wanted and once(partial(self._is_first, layer)):
            row_ED = router.get_parameter(rows)
            noise_ED = uniform(row_ED, self.seed, self.step, layer)
            self.proxies[layer] = row_ED * (1 + radius(row_ED) * noise_ED)

    def _is_first(self, layer: int) -> bool:
        is_first = layer not in self.joined
        self.joined.add(layer)
        return is_first

    @torch.compiler.disable
    def _join(
        self, experts: ExpertParallel, inputs: tuple[Tensor, Tensor, Tensor], layer: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Here the experts' weights are gathered."""
        x_TD, ids_TK, weights_TK = inputs
        if layer not in self.proxies:
            return inputs
        loss = self._of_columns(self.proxies.pop(layer), experts)
        scale = self.coefficient.at(self.step) / self.num_layers / self.edp_size
        return x_TD, ids_TK, self.join(weights_TK, scale * loss)

    def _of_columns(self, proxy_ED: Tensor, experts: ExpertParallel) -> Tensor:
        """The loss of a layer: those of its terms that are of this rank's columns of M."""
        number = len(proxy_ED)
        norm_ES = _GateNorms.apply(proxy_ED, gate_matrices(experts))
        mine_S = torch.tensor(experts.local_experts, device=norm_ES.device)
        own_S = norm_ES.gather(0, mine_S[None])[0]
        own_E = _SumOverRanks.apply(own_S.new_zeros(number).index_put((mine_S,), own_S), self.group)
        excess_ES = (norm_ES - self.strength * own_E[:, None]).relu()
        excess_ES = excess_ES + (norm_ES - self.strength * own_S).relu()
        is_own_ES = torch.arange(number, device=mine_S.device)[:, None] == mine_S
        return excess_ES.masked_fill(is_own_ES, 0.0).sum() / number**2


def rows_of(router: nn.Module, experts: ExpertParallel, block: str) -> str:
    """Name of the router's parameter [E, D] with a row per expert, as wide as experts' inputs.

    Raises:
        ValueError: naming the block, if there is none, or no second expert to tell it from.
    """
    shape = experts.num_experts, gate_matrices(experts).shape[2]
    names = [name for name, p in router.named_parameters() if tuple(p.shape) == shape]
    if len(names) != 1 or shape[0] < 2:
        raise ValueError(
            f"balance.coupling needs 2 or more experts and one router weight [experts, input width "
            f"of an expert] = {shape}; {block} has {names or 'none'}; leave coupling out"
        )
    return names[0]


def gate_matrices(experts: ExpertParallel) -> Tensor:
    """Gate matrices of this rank's experts [S, F, D], or up where there is no gate; a view."""
    family: Any = experts.path.family
    gate = gate_of(
        family, experts.experts.stacks()["gate_up_proj" if family.has_gate else "up_proj"]
    )
    return gate.transpose(1, 2) if family.is_transposed and not family.has_gate else gate


@torch.no_grad()
def radius(row_ED: Tensor) -> Tensor:
    """Half the distance to the nearest other row over the row's norm [E, 1]; 0 for a zero row."""
    exact = "donot_use_mm_for_euclid_dist"
    distance_EE = torch.cdist(row_ED, row_ED, compute_mode=exact).fill_diagonal_(torch.inf)
    norm_E = row_ED.norm(dim=1)
    radius_E = torch.where(norm_E > 0, distance_EE.amin(1) / (2 * norm_E), 0.0)
    return radius_E[:, None]


def uniform(like: Tensor, *key: int) -> Tensor:
    """Numbers in [-1, 1) that depend on the key alone, whatever the type and device."""
    numbers = np.random.default_rng(key).uniform(-1, 1, tuple(like.shape))
    return torch.from_numpy(numbers).to(like)


class _GateNorms(torch.autograd.Function):
    """Norms [E, S] of products of proxies [E, D] and matrices [S, F, D], one matrix at a time.

    Keeps no products: the backward pass repeats them. They are in the type of the matrices, norms
    and the proxies' gradients in that of the proxies.
    """

    @staticmethod
    def forward(ctx: Any, proxy_ED: Tensor, gate_SFD: Tensor) -> Tensor:
        input_ED = proxy_ED.to(gate_SFD.dtype)
        norms = [
            torch.linalg.vector_norm(input_ED @ gate_FD.T, dim=1, dtype=proxy_ED.dtype)
            for gate_FD in gate_SFD
        ]
        norm_ES = torch.stack(norms, 1)
        ctx.save_for_backward(proxy_ED, gate_SFD, norm_ES)
        return norm_ES

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        proxy_ED, gate_SFD, norm_ES = ctx.saved_tensors
        input_ED = proxy_ED.to(gate_SFD.dtype)
        scale_ES = torch.where(norm_ES > 0, grads[0] / norm_ES, 0.0)
        grad_proxy_ED, grad_gate_SFD = torch.zeros_like(proxy_ED), torch.empty_like(gate_SFD)
        for slot, gate_FD in enumerate(gate_SFD):
            grad_EF = input_ED @ gate_FD.T * scale_ES[:, slot, None].to(gate_FD.dtype)
            grad_proxy_ED += grad_EF @ gate_FD
            grad_gate_SFD[slot] = grad_EF.T @ input_ED
        return grad_proxy_ED, grad_gate_SFD


class _SumOverRanks(torch.autograd.Function):
    """The sum of the ranks' tensors; its gradient is the sum of theirs, as each uses it."""

    @staticmethod
    def forward(ctx: Any, x_E: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total_E = x_E.clone()
        dist.all_reduce(total_E, group=group)
        return total_E

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_E = grads[0].clone()
        dist.all_reduce(grad_E, group=ctx.group)
        return grad_E, None
