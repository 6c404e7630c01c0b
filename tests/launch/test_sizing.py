"""Memory of a plan against engines that really run, and against what autograd really saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launch.sizing.activations import FakeModel, Routed, _route_in_fp32
from launch.sizing.live import storage_key
from launch.sizing.memory import Engine, Parts, memory
from launch.sizing.shapes import Mesh, shape_of
from parallel.decisions import collect_layers
from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks, parallelize, router_of
from parallel.planners import home_plan
from tests.families import tiny_config
from tests.parallel.test_families import full_model
from tests.ranks import run_ranks
from tests.trainer.test_engine import constant, sequences
from trainer.deepspeed_adopt import import_deepspeed
from trainer.engine import TorchEngine
from trainer.engine_deepspeed import DeepSpeedEngine

FAMILIES = ["qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v3"]
MESHES = [(2, 1), (2, 2), (4, 2)]  # ranks, EP: EP x EDP = 1 x 2, 2 x 1, 2 x 2
LENGTH = 10


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def num_bytes(tensors: Any) -> int:
    """Bytes of plain tensors and of this rank's part of sharded ones."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


def parallel_model(family: str, ep: int) -> tuple[Any, ParallelMesh]:
    mesh = ParallelMesh.build(ep=ep, device_type="cpu")
    model: Any = full_model(family).float()
    parallelize(model, mesh, planner=home_plan)
    return model, mesh


def batch(vocabulary: int) -> dict[str, Tensor]:
    return {name: tensor[:2] for name, tensor in sequences(0, vocabulary).items()}


def torch_bytes(family: str, ep: int, bf16: bool, shard_gradients: bool = False) -> dict[str, int]:
    """Parameters, gradients, moments, and the gradients that wait for a second micro-batch."""
    model, mesh = parallel_model(family, ep)
    engine = TorchEngine(
        model,
        mesh,
        make_optimizer=adamw,
        make_schedule=constant,
        balancers=[],
        bf16=bf16,
        shard_gradients=shard_gradients,
    )
    inputs = batch(model.config.vocab_size)
    waiting: list[int] = []
    loss = engine._loss

    def watched(*args: Any) -> Tensor:
        waiting.append(num_bytes([*whole_gradients(model), *split_gradients(model)]))
        return loss(*args)

    pytest.MonkeyPatch().setattr(engine, "_loss", watched)
    engine._backward([inputs, inputs], 1)
    assert whole_gradients(model) == []
    gradients = num_bytes(split_gradients(model))
    engine.optimizer.step()
    states = engine.optimizer.state.values()
    return {
        "parameters": num_bytes(model.parameters()),
        "gradients": gradients,
        "optimizer": num_bytes(t for s in states for name, t in s.items() if name != "step"),
        "waiting": waiting[1],
    }


def whole_gradients(model: Any) -> list[Tensor]:
    """That FSDP2 has not split yet."""
    groups = [
        m._get_fsdp_state()._fsdp_param_group for m in model.modules() if hasattr(m, "unshard")
    ]
    whole: list[Tensor] = []
    for parameter in (p for group in groups if group is not None for p in group.fsdp_params):
        unsharded = getattr(parameter, "_unsharded_param", None)  # none before the first pass
        kept = (parameter.unsharded_accumulated_grad, getattr(unsharded, "grad", None))
        whole += [gradient for gradient in kept if gradient is not None]
    return whole


def split_gradients(model: Any) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def deepspeed_bytes(family: str, ep: int, bf16: bool, stage: int) -> dict[str, int]:
    """Working weights and fp32 masters; moments; under ZeRO 3 the gradients' own memory."""
    model, mesh = parallel_model(family, ep)
    engine = DeepSpeedEngine(
        model,
        mesh,
        make_optimizer=adamw,
        make_schedule=constant,
        balancers=[],
        bf16=bf16,
        zero_stage=stage,
        bucket_elements=10_000,
        persist_below=0,
    )
    inputs = batch(model.config.vocab_size)
    engine.train_step([inputs, inputs])
    zero = engine.zero.optimizer
    states = zero.optimizer.state.values()
    weights = [p.ds_tensor if stage == 3 else p for p in model.parameters()]
    masters = (
        zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    )
    found = {
        "parameters": num_bytes(weights) + num_bytes(masters),
        "optimizer": num_bytes(t for s in states for name, t in s.items() if name != "step"),
    }
    if stage == 3:
        found["gradients"] = num_bytes([zero.grad_partitions_flat_buffer])
    return found


def planned(family: str, mesh: Mesh, engine: Engine, bf16: bool, micro_batches: int) -> Any:
    sizing = FakeModel(tiny_config(family), torch.bfloat16 if bf16 else torch.float32)
    one, head = sizing.layer(0, 1, LENGTH, Routed(2.0, 2.0)), sizing.head(1, LENGTH)
    parts = Parts((one,), head, 0, 0)
    return memory(
        shape_of(sizing, LENGTH),
        mesh,
        engine,
        parts,
        value=2 if bf16 else 4,
        micro_batches=micro_batches,
        recompute=False,
        borrowed=0,
        refetch=False,
        bucket=0,
    )


def torch_bytes_of_families(ep: int) -> dict[str, dict[str, int]]:
    found = {family: torch_bytes(family, ep, True) for family in FAMILIES}
    split = torch_bytes("qwen3_moe", ep, True, shard_gradients=True)
    return {**found, "fp32": torch_bytes("qwen3_moe", ep, False), "split": split}


@pytest.mark.parametrize(("ranks", "ep"), MESHES)
def test_states_of_the_torch_engine(ranks: int, ep: int) -> None:
    """Bytes of rank 0 equal the plan's: also whole gradients between micro-batches."""
    for name, found in run_ranks(torch_bytes_of_families, ranks, ep)[0].items():
        family = name if name in FAMILIES else "qwen3_moe"
        engine = Engine.torch_split if name == "split" else Engine.torch
        mesh = Mesh(ranks, ep, ranks)
        one, two = (planned(family, mesh, engine, name != "fp32", number) for number in (1, 2))
        assert found == {
            "parameters": one.parameters,
            "gradients": one.gradients,
            "optimizer": one.optimizer,
            "waiting": two.gradients,
        }, name


@pytest.mark.parametrize(
    ("stage", "ranks", "ep", "bf16"),
    [(1, 2, 2, False), (2, 2, 1, True), (3, 4, 2, True)],
)
def test_states_of_the_deepspeed_engine(stage: int, ranks: int, ep: int, bf16: bool) -> None:
    import_deepspeed(torch.device("cpu"))  # once, for all ranks that are forked from here
    found = run_ranks(deepspeed_bytes, ranks, "qwen3_moe", ep, bf16, stage)[0]
    plan = planned("qwen3_moe", Mesh(ranks, ep, ranks), Engine(f"zero{stage}"), bf16, 2)
    for name, size in found.items():
        assert getattr(plan, name) == size, name


def saved_bytes(family: str, attention: str, bf16: bool) -> dict[str, Any]:
    """What autograd saves of a forward pass and its loss on a rank of two, and its rows."""
    mesh = ParallelMesh.build(ep=2, device_type="cpu")
    model: Any = full_model(family).float()
    model.config._attn_implementation = attention
    parallelize(model, mesh, planner=home_plan, shared_meanwhile=False)
    if bf16:
        model.to(torch.bfloat16)
        for _, block in moe_blocks(model):
            _route_in_fp32(router_of(block))
    ids = batch(model.config.vocab_size)["input_ids"]
    places = (torch.arange(LENGTH) % (LENGTH // 2)).expand(ids.shape)  # two documents
    saved: dict[int, Tensor] = {}
    apart = {storage_key(t) for t in [*model.parameters(), *model.buffers()]}

    def pack(tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in apart:
            saved[storage_key(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), collect_layers() as layers:
        logits = model(input_ids=ids, position_ids=places, use_cache=False).logits.flatten(0, 1)
        F.cross_entropy(logits.float(), ids.flatten(), reduction="sum")
    return {
        "bytes": sum(t.untyped_storage().nbytes() for t in saved.values()),
        "rows": [int(d.plan.load_R()[mesh.rank]) for d in layers.decisions],
    }


def planned_bytes(family: str, attention: str, bf16: bool, rows: list[int]) -> float:
    config = tiny_config(family)
    config._attn_implementation = attention
    fake = FakeModel(config, torch.bfloat16 if bf16 else torch.float32)
    tokens = 2 * LENGTH
    total, of_layers = 0, iter(rows)
    for layer in range(2):
        routed = next(of_layers) if fake._block(fake.layers[layer]) is not None else 0
        total += fake.layer(layer, 2, LENGTH, Routed(routed / tokens, 2 * 0.8)).kept
    return total + fake.head(2, LENGTH).kept + fake.shared(2, LENGTH)


def saved_of_all() -> dict[tuple[str, str, bool], dict[str, Any]]:
    cases = [(family, "eager") for family in FAMILIES] + [("qwen3_moe", "sdpa")]
    return {(*case, bf16): saved_bytes(*case, bf16) for case in cases for bf16 in (False, True)}


def test_activations_are_what_autograd_saves() -> None:
    """Within 6 %: on tensors this small the indices of rows weigh as much as the rows."""
    for (family, attention, bf16), found in run_ranks(saved_of_all, 2)[0].items():
        ratio = planned_bytes(family, attention, bf16, found["rows"]) / found["bytes"]
        assert 0.94 < ratio < 1.06, (family, attention, bf16, ratio)
