"""Sample text from a sharded model: all ranks run the same forward passes in step."""

from __future__ import annotations

from typing import Any

import torch

from parallel.mesh import ParallelMesh


@torch.no_grad()
def sample(
    model: Any,
    mesh: ParallelMesh,
    prompt: list[int],
    *,
    num_tokens: int,
    context: int,
    seed: int,
    temperature: float = 0.8,
) -> list[int]:
    """Continue a prompt by `num_tokens` tokens; every rank must call it and gets the same ones.

    Args:
        prompt: token ids, at least one. context: longest input to the model.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    model.eval()
    for _ in range(num_tokens):
        window = torch.tensor([ids[-context:]], device=mesh.device)
        logits = model(input_ids=window, use_cache=False).logits[0, -1].float().cpu()
        probabilities = torch.softmax(logits / temperature, -1)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return ids[len(prompt) :]
