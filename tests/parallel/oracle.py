"""A slow, obvious MoE layer on one process: the oracle of every exactness test."""

from __future__ import annotations

import torch
from torch import Tensor


def oracle_experts(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Gated-SiLU experts by a loop over tokens and choices; the id E adds nothing."""
    outputs = []
    for token in range(len(x_TD)):
        out = torch.zeros_like(x_TD[token])
        for choice in range(ids_TK.shape[1]):
            expert = int(ids_TK[token, choice])
            if expert == len(gate_up):
                continue
            gate, up = (gate_up[expert] @ x_TD[token]).chunk(2)
            y = down[expert] @ (torch.nn.functional.silu(gate) * up)
            out = out + weights_TK[token, choice] * y
        outputs.append(out)
    return torch.stack(outputs) if outputs else x_TD.clone()


def random_plan(counts_RE: Tensor, home_E: Tensor, seed: int) -> Tensor:
    """Segments of a random valid plan: rows of an expert and source split over random ranks."""
    generator = torch.Generator().manual_seed(seed)
    num_ranks, num_experts = counts_RE.shape
    segments = []
    for expert in range(num_experts):
        for source in range(num_ranks):
            left = int(counts_RE[source, expert])
            for computing in range(num_ranks):
                rows = int(torch.randint(0, left + 1, (), generator=generator))
                if computing == num_ranks - 1:
                    rows = left
                if rows:
                    segments.append([expert, source, computing, rows])
                left -= rows
    return torch.tensor(segments, dtype=torch.int64).reshape(-1, 4)
