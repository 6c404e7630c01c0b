"""Model directories with real faults: what reading them says."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.trainer.test_export import logical_state, random_model
from trainer.export import HFCheckpoint, export_model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "good"
    model = random_model("qwen3_moe")
    export_model(model.config, logical_state(model), path, max_shard_bytes=60_000)
    return path


@pytest.fixture
def broken(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "broken"))


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


EXPERT_3 = "model.layers.0.mlp.experts.3.up_proj.weight"


def edit_tensors(path: Path, key: str, value: Tensor | None, new_key: str | None = None) -> Path:
    """Replace, rename or drop a tensor in its shard and in the index."""
    index_file = path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shard = path / index["weight_map"].pop(key)
    with safe_open(shard, "pt") as file:
        tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
    del tensors[key]
    if value is not None:
        tensors[new_key or key] = value
        index["weight_map"][new_key or key] = shard.name
    save_file(tensors, shard, metadata={"format": "pt"})
    index_file.write_text(json.dumps(index))
    return shard


def test_truncated_shard_is_refused_by_name(broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(ValueError, match=rf"{shard.name}: torn or unreadable"):
        HFCheckpoint(broken)
    os.truncate(shard, 5)
    with pytest.raises(ValueError, match=rf"{shard.name}: torn or unreadable"):
        HFCheckpoint(broken)


def test_missing_shard_is_named_with_a_key(broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name}: missing, .* expects \S+ in it"):
        HFCheckpoint(broken)


def test_missing_expert_is_named(broken: Path) -> None:
    edit_tensors(broken, EXPERT_3, None)
    with pytest.raises(ValueError, match=f"1 tensors of qwen3_moe are missing, first {EXPERT_3}"):
        HFCheckpoint(broken)


def test_missing_head_is_an_error_unless_tied(broken: Path) -> None:
    edit_tensors(broken, "lm_head.weight", None)
    with pytest.raises(ValueError, match=r"missing, first lm_head\.weight"):
        HFCheckpoint(broken)
    edit_config(broken, tie_word_embeddings=True)
    assert "lm_head.weight" not in HFCheckpoint(broken).logical_keys()


def test_unexpected_and_misnamed_tensors_are_refused(broken: Path) -> None:
    extra = "model.layers.0.mlp.experts.8.up_proj.weight"
    shard = edit_tensors(broken, EXPERT_3, torch.ones(24, 32), extra)
    with pytest.raises(ValueError, match=rf"missing, first {EXPERT_3}"):
        HFCheckpoint(broken)
    edit_tensors(broken, extra, torch.ones(24, 32), "model.layers.0.mlp.extra.weight")
    with pytest.raises(ValueError, match=rf"{shard.name}: 1 tensors are unexpected.*extra.weight"):
        HFCheckpoint(broken)


def test_wrong_shapes_name_file_and_key(broken: Path) -> None:
    shard = edit_tensors(broken, EXPERT_3, torch.ones(25, 32))
    checkpoint = HFCheckpoint(broken)
    logical = "model.layers.0.mlp.experts.3.gate_up_proj"
    with pytest.raises(
        ValueError, match=rf"shape mismatch: {logical} needs .*{EXPERT_3}.*{shard.name}"
    ):
        checkpoint.read(logical)
    edit_tensors(broken, EXPERT_3, torch.ones(24, 33))
    with pytest.raises(
        ValueError, match=rf"shape mismatch: {logical} needs .*{EXPERT_3}.*{shard.name}"
    ):
        HFCheckpoint(broken).read(logical)
    edit_config(broken, num_local_experts=4)
    with pytest.raises(ValueError, match=r"8 experts for .*config.json has 4"):
        HFCheckpoint(broken)


def test_stacked_experts_of_another_number_are_refused(tmp_path: Path) -> None:
    random_model("gpt_oss").save_pretrained(tmp_path)
    edit_config(tmp_path, num_local_experts=4)
    with pytest.raises(ValueError, match=r"model.safetensors: shape mismatch: .*has 4"):
        HFCheckpoint(tmp_path)


def test_unknown_key_is_refused(good: Path) -> None:
    with pytest.raises(ValueError, match=r"qwen3_moe has no tensor model.layers.9.x"):
        HFCheckpoint(good).read("model.layers.9.x")


def test_configurations_that_cannot_be_read(broken: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no config.json.*hf download"):
        HFCheckpoint(tmp_path / "nowhere")
    edit_config(broken, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match=r"quantization_config is set.*dequantise"):
        HFCheckpoint(broken)
    edit_config(broken, model_type="qwen9_moe")
    with pytest.raises(ValueError, match=r"config.json: not a configuration.*qwen9_moe"):
        HFCheckpoint(broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not a configuration"):
        HFCheckpoint(broken)


def test_unclear_or_absent_weights_are_refused(broken: Path) -> None:
    index = broken / "model.safetensors.index.json"
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"both model.safetensors and .*out of date"):
        HFCheckpoint(broken)
    (broken / "model.safetensors").unlink()
    index.write_text('{"weight_map": ')
    with pytest.raises(ValueError, match=r"index.json: not an index"):
        HFCheckpoint(broken)
    index.unlink()
    with pytest.raises(ValueError, match=r"only safetensors weights can be read"):
        HFCheckpoint(broken)
