"""What docs/engines.md says of context parallelism, so that it is noticed when that changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from transformers import AutoModelForCausalLM

from tests.families import FAMILIES, tiny_config
from tests.ranks import run_ranks


def ring_on_cpu() -> str:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("cp",))
    x_BHTD = torch.randn(1, 2, 16, 8)
    with (
        pytest.raises(NotImplementedError) as caught,
        context_parallel(mesh, buffers=[x_BHTD], buffer_seq_dims=[2]),
    ):
        F.scaled_dot_product_attention(x_BHTD, x_BHTD, x_BHTD, is_causal=True)
    return str(caught.value)


def test_torch_has_no_ring_for_the_attention_of_cpus() -> None:
    (message,) = run_ranks(ring_on_cpu, 1)
    assert "_scaled_dot_product_flash_attention_for_cpu" in message


def test_families_that_transformers_rules_out() -> None:
    refused = set()
    for family in FAMILIES:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config(family))
        if not model.supports_context_parallel:
            refused.add(family)
    assert refused == {"gpt_oss", "minimax", "qwen3_next"}
