"""Inside transformers' own expert parallelism: the same numbers as its all-to-all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DistributedConfig

from parallel.ep_implementation import register_ep_implementation
from tests.families import tiny_config
from tests.parallel.test_layer import RandomPlanner
from tests.ranks import run_ranks


def save_model(folder: Path, family: str) -> None:
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(tiny_config(family)).double().save_pretrained(folder)


def train_once(folder: str, implementation: str, sizes: dict[str, Any], batch: int) -> Any:
    """Logits of this rank and its gradients, whole."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float64,
        experts_implementation="eager",  # the library's grouped products have no float64
        distributed_config=DistributedConfig(**sizes, ep_implementation=implementation),
    )
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(0, model.config.vocab_size, (1 + batch, 5), generator=generator)
    logits = model(input_ids=ids, use_cache=False).logits
    (logits * torch.cos(logits.detach())).sum().backward()
    gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def both(folder: str, sizes: dict[str, int], options: dict[str, Any]) -> Any:
    """The library's all-to-all and ours on this rank."""
    register_ep_implementation("evenkeel", **options)
    batch = torch.distributed.get_rank() // sizes["tp_size"]
    return [train_once(folder, name, sizes, batch) for name in ("all_to_all", "evenkeel")]


SIZES = {
    "EP 2": {"fsdp_size": 2, "tp_size": 1, "ep_size": 2},
    "EP 4": {"fsdp_size": 4, "tp_size": 1, "ep_size": 4},
    "EP 2 x EDP 2": {"fsdp_size": 4, "tp_size": 1, "ep_size": 2},
    "EP 2 over TP 2": {"fsdp_size": 1, "tp_size": 2, "ep_size": 2},
}


@pytest.mark.parametrize(
    "options", [{}, {"planner": RandomPlanner(3), "num_chunks": 2, "refetch": True}]
)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_all_to_all(sizes: dict[str, int], options: dict[str, Any], tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3_moe")
    world = sizes["fsdp_size"] * sizes["tp_size"]
    for (logits, gradients), (ours, our_gradients) in run_ranks(
        both, world, str(tmp_path), sizes, options
    ):
        torch.testing.assert_close(ours, logits, rtol=1e-10, atol=1e-10)
        assert our_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            close = torch.testing.assert_close
            close(our_gradients[name], gradient, rtol=1e-9, atol=1e-10, msg=name)
