"""What all tests share."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.families import tiny_config


@pytest.fixture(scope="session", autouse=True)
def families_imported() -> None:
    """Import what models need once, not in every forked rank."""
    for family in ("qwen3_moe", "glm4_moe"):
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(tiny_config(family))
