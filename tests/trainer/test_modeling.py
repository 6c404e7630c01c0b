"""Building models: fresh weights that no number of ranks changes, and imported ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from parallel.mesh import ParallelMesh
from parallel.planners import home_plan
from tests.families import FAMILIES, tiny_config
from tests.ranks import run_ranks
from trainer.export import HFCheckpoint
from trainer.modeling import build_model, family_config, override
from trainer.state import model_state


def built_state(family: str, ep: int, seed: int, source: str | None) -> dict[str, Tensor]:
    mesh = ParallelMesh.build(ep=ep, device_type="cpu")
    model: Any = build_model(
        tiny_config(family),
        mesh,
        seed=seed,
        planner=home_plan,
        checkpoint=None if source is None else HFCheckpoint(source),
    )
    buffers = dict(model.named_buffers())
    return {**{k: v.clone() for k, v in model_state(model).items()}, **buffers}


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_weights_depend_on_the_seed_alone(family: str) -> None:
    (whole,) = run_ranks(built_state, 1, family, 1, 3, None)
    halves = run_ranks(built_state, 2, family, 2, 3, None)
    assert set(whole) == set(halves[0]) | set(halves[1])
    for half in halves:
        for key, value in half.items():
            assert torch.equal(value, whole[key]), key
    (other,) = run_ranks(built_state, 1, family, 1, 4, None)
    assert not torch.equal(other["model.embed_tokens.weight"], whole["model.embed_tokens.weight"])
    expert = next(k for k in whole if ".experts.1." in k and "down_proj" in k and "bias" not in k)
    assert not torch.equal(whole[expert], whole[expert.replace(".experts.1.", ".experts.2.")])


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_weights_follow_the_family(family: str) -> None:
    """Same spread as the library's own initialisation, same constants, same buffers."""
    (ours,) = run_ranks(built_state, 1, family, 1, 3, None)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(tiny_config(family))
    for name, value in [*theirs.named_parameters(), *theirs.named_buffers()]:
        prefix, _, last = name.rpartition(".")
        if prefix.endswith(".experts"):
            got = torch.stack([ours[f"{prefix}.{e}.{last}"] for e in range(len(value))])
        else:
            got = ours[name]
        assert got.shape == value.shape, name
        spread = float(value.detach().float().std()) if value.numel() > 1 else 0.0
        if spread == 0.0 or not value.requires_grad:
            torch.testing.assert_close(got, value.detach(), msg=name)
        elif value.numel() >= 256:
            assert float(got.std()) == pytest.approx(spread, rel=0.25), name


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "gpt_oss", "ernie4_5_moe"])
def test_import_reads_the_checkpoint(family: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs: Any = AutoModelForCausalLM.from_config(tiny_config(family))
    theirs.save_pretrained(tmp_path)
    for half in run_ranks(built_state, 2, family, 2, 0, str(tmp_path)):
        for key, value in half.items():
            head, _, rest = key.partition(".experts.")
            if rest:
                expert, _, last = rest.partition(".")
                want = theirs.get_parameter(f"{head}.experts.{last}")[int(expert)]
            else:
                want = dict([*theirs.named_parameters(), *theirs.named_buffers()])[key]
            assert torch.equal(value, want), key


def test_unknown_family_and_field() -> None:
    with pytest.raises(ValueError, match=r"model.family \(qwen3_mo\) .* did you mean .*qwen3_moe"):
        family_config("qwen3_mo", {})
    with pytest.raises(ValueError, match=r"model.overrides.num_expert: qwen3_moe .* num_experts"):
        family_config("qwen3_moe", {"num_expert": 4})
    config = family_config("qwen3_moe", {"num_experts": 4, "hidden_size": 32})
    changed = override(config, {"hidden_size": 64})
    assert (changed.num_experts, changed.hidden_size) == (4, 64)
