"""Megatron-Core with our data path: its own layer as the oracle, and a whole GPT on EP meshes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.parallel.test_layer import RandomPlanner
from tests.ranks import run_ranks

HIDDEN, WIDTH, EXPERTS, TOP_K = 16, 12, 8, 2
SEQUENCE, BATCH, VOCABULARY = 6, 4, 32


def config(**changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    values = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOP_K,
        "moe_ffn_hidden_size": WIDTH,
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "none",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "params_dtype": torch.float32,
    }
    return TransformerConfig(**{**values, **changes})


def start(ep: int) -> None:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep)


def shared_experts() -> Any:
    """Built where the configuration gives them a width."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(module=SharedExpertMLP, submodules=linears)


def layer(planner: Any, home_E: Tensor | None = None, **changes: Any) -> Any:
    from megatron.core.transformer.spec_utils import build_module

    from parallel.megatron import level_moe

    torch.manual_seed(0)
    spec = level_moe(planner=planner, home_E=home_E, shared_experts=shared_experts())
    made = build_module(spec, config=config(**changes))
    made.set_layer_number(1)
    return made


def stacks(layer: Any) -> dict[str, Tensor]:
    """Weights of all experts by id, from all ranks of the EP group."""
    mine = {name: value.detach() for name, value in layer.experts.stacks().items()}
    held: list[Any] = [None] * layer.path.dispatcher.num_ranks
    dist.all_gather_object(held, (layer.local_expert_indices, mine), group=layer.ep_group)
    whole = {}
    for name, value in mine.items():
        whole[name] = value.new_empty(EXPERTS, *value.shape[1:])
        for experts, theirs in held:
            whole[name][torch.tensor(experts)] = theirs[name]
    return whole


def stock(layer: Any) -> Any:
    """Megatron's own layer with the same weights, in one process."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from parallel.megatron import LevelRouter

    assert parallel_state.get_expert_model_parallel_world_size() == 1
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = ModuleSpec(module=SequentialMLP, submodules=linears)
    made = MoELayer(layer.config, MoESubmodules(experts, shared_experts(), LevelRouter))
    made.set_layer_number(1)
    made.router.load_state_dict(layer.router.state_dict())
    if layer.use_shared_expert:
        made.shared_experts.load_state_dict(layer.shared_experts.state_dict())
    whole = stacks(layer)
    for expert, mlp in enumerate(made.experts.local_experts):
        mlp.linear_fc1.weight.data = whole["gate_up_proj"][expert].clone()
        mlp.linear_fc2.weight.data = whole["down_proj"][expert].clone()
    return made


def against_stock(changes: dict[str, Any]) -> None:
    start(1)
    ours = layer(RandomPlanner(1), **changes)
    oracle = stock(ours)
    x = torch.randn(SEQUENCE, BATCH, HIDDEN, requires_grad=True)
    factor = torch.randn_like(x)
    got, want = ours(x)[0], oracle(x)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    fc = [(m.linear_fc1.weight, m.linear_fc2.weight) for m in oracle.experts.local_experts]
    own = [x, ours.router.weight, ours.experts.gate_up_proj, ours.experts.down_proj]
    theirs = [x, oracle.router.weight, *(w for pair in fc for w in pair)]
    mine = torch.autograd.grad((got * factor).sum(), own)
    grads = torch.autograd.grad((want * factor).sum(), theirs)
    torch.testing.assert_close(mine[:2], grads[:2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mine[2], torch.stack(grads[2::2]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mine[3], torch.stack(grads[3::2]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 1.5},
        {"moe_router_pre_softmax": True, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {"moe_expert_capacity_factor": 0.5},
        {"moe_shared_expert_intermediate_size": 10},
        {"moe_z_loss_coeff": 0.1},
        {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1},
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    ],
)
def test_the_stock_layer_is_the_oracle(changes: dict[str, Any]) -> None:
    """Output and every gradient, for what its router can do."""
    run_ranks(against_stock, 1, changes)


def spread(ep: int) -> Any:
    """Output, gradients and biases on one of four ranks, or of one that has all tokens."""
    start(ep)
    world, rank = dist.get_world_size(), dist.get_rank()
    home_E = torch.arange(EXPERTS).flip(0) % ep
    bias = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    made = layer(RandomPlanner(7), home_E, **bias)
    from parallel.megatron import update_expert_bias

    generator = torch.Generator().manual_seed(5)
    x, factor = (torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator) for _ in range(2))
    mine = slice(rank, None, world)
    here = x[:, mine].clone().requires_grad_()
    out, none = made(here)
    assert none is None
    (out * factor[:, mine]).sum().backward()
    counts = made.router.local_tokens_per_expert.tolist()
    update_expert_bias(made, 0.1)
    assert not made.router.local_tokens_per_expert.any()
    for parameter in made.parameters():  # Megatron's rule, here with sums instead of means
        group = made.path.dispatcher.group
        if getattr(parameter, "allreduce", True):
            dist.all_reduce(parameter.grad)
        elif dist.get_world_size() > dist.get_world_size(group):
            from megatron.core import parallel_state

            edp = parallel_state.get_expert_data_parallel_group()
            dist.all_reduce(parameter.grad, group=edp)
    grads = {name: p.grad.clone() for name, p in made.experts.named_parameters(recurse=False)}
    with torch.no_grad():
        weights = stacks(made)
        for name, parameter in made.experts.named_parameters(recurse=False):
            parameter.copy_(grads[name])
        by_expert = stacks(made)
    bias_E = made.router.expert_bias.clone()
    if world == 1:
        mean = SEQUENCE * BATCH * TOP_K / EXPERTS
        assert sum(counts) == mean * EXPERTS
        assert bias_E.tolist() == pytest.approx([0.1 * ((c < mean) - (c > mean)) for c in counts])
    return out.detach(), here.grad, made.router.weight.grad, by_expert, bias_E, weights


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 4), (4, 2), (4, 1)])
def test_expert_parallelism_changes_nothing(world: int, ep: int) -> None:
    """First values, outputs, gradients, biases; homes that alternate and a planner that moves."""
    (alone,) = run_ranks(spread, 1, 1)
    for rank, (out, grad, router, by_expert, bias_E, weights) in enumerate(
        run_ranks(spread, world, ep)
    ):
        mine = slice(rank, None, world)
        torch.testing.assert_close(out, alone[0][:, mine], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(grad, alone[1][:, mine], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(router, alone[2], rtol=1e-5, atol=1e-6)
        for name, value in by_expert.items():
            assert torch.equal(weights[name], alone[5][name])
            torch.testing.assert_close(value, alone[3][name], rtol=1e-5, atol=1e-6)
        assert torch.equal(bias_E, alone[4]) and bias_E.any()


def losses(ep: int, steps: int = 5) -> list[float]:
    """Of a tiny GPT, Megatron's own but for its MoE layers and the core of its attention."""
    start(ep)
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.module import MegatronModule

    from parallel.megatron import level_moe

    class Attention(MegatronModule):
        """Its own core needs a GPU."""

        def __init__(self, config: Any, *_: Any, **__: Any) -> None:
            super().__init__(config)

        def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
            heads = [t.permute(1, 2, 0, 3) for t in (q, k, v)]
            out = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
            return out.permute(2, 0, 1, 3).flatten(2)

    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    spec.submodules.mlp = level_moe(planner=RandomPlanner(3))
    spec.submodules.self_attention.submodules.core_attention = Attention
    torch.manual_seed(0)
    model = GPTModel(
        config(), spec, VOCABULARY, SEQUENCE, position_embedding_type="learned_absolute"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    world, rank = dist.get_world_size(), dist.get_rank()
    tokens = torch.randint(
        VOCABULARY, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(1)
    )
    mine = tokens[rank::world]
    places = torch.arange(SEQUENCE).expand(len(mine), -1)
    edp = parallel_state.get_expert_data_parallel_group()
    seen = []
    for _ in range(steps):
        loss = model(mine[:, :-1], places, None, labels=mine[:, 1:]).mean()
        loss.backward()
        for parameter in model.parameters():
            group = None if getattr(parameter, "allreduce", True) else edp
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= world
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / world
        dist.all_reduce(total)
        seen.append(float(total))
    return seen


def test_a_gpt_trains_alike_on_every_mesh() -> None:
    (alone,) = run_ranks(losses, 1, 1)
    assert alone[-1] < alone[0] - 0.3
    for world, ep in ((2, 2), (4, 4), (4, 2)):
        for seen in run_ranks(losses, world, ep):
            assert seen == pytest.approx(alone, rel=2e-5)


def save(state: Any, folder: str) -> None:
    """Megatron's format without a GPU, for which its own writer asks."""
    import torch.distributed.checkpoint as dcp
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy

    class Save(SaveShardedStrategy):
        can_handle_sharded_objects = True

        def save(self, state: Any, folder: Any) -> None:
            state, _, _ = strategies._replace_state_dict_keys_with_sharded_keys(state, True)
            planner = strategies.MCoreSavePlanner(
                dedup_replicated_tensors=False, flatten_state_dict=False
            )
            writer = dcp.FileSystemWriter(folder)
            plain = strategies.mcore_to_pyt_state_dict(state, False)
            dcp.save(plain, storage_writer=writer, planner=planner)

    dist_checkpointing.save(state, folder, sharded_strategy=Save("torch_dist", 1))


def saved(folder: str) -> Any:
    start(2)
    made = layer(RandomPlanner(1), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1]))
    save(made.sharded_state_dict("mlp."), folder)
    return stacks(made), made.router.weight.detach()


def loaded(folder: str, ep: int) -> Any:
    start(ep)
    from megatron.core import dist_checkpointing

    home_E = torch.arange(EXPERTS).flip(0) % ep
    made = layer(RandomPlanner(1), home_E)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    state = dist_checkpointing.load(made.sharded_state_dict("mlp."), folder)
    for name, stack in made.experts.stacks().items():
        for slot, expert in enumerate(made.local_expert_indices):
            stack.data[slot] = state[f"mlp.experts.{name}.{expert}"]
    return stacks(made), state["mlp.router.weight"]


def test_checkpoints_load_on_other_meshes_and_homes(tmp_path: Path) -> None:
    want, router = run_ranks(saved, 4, str(tmp_path))[0]
    assert all(value.abs().sum(tuple(range(1, value.dim()))).all() for value in want.values())
    for world, ep in ((4, 4), (1, 1)):
        for got, weight in run_ranks(loaded, world, str(tmp_path), ep):
            assert torch.equal(weight, router)
            assert all(torch.equal(got[name], want[name]) for name in want)


def refused() -> list[str]:
    start(1)
    messages = []
    for changes in ({"add_bias_linear": True}, {"recompute_granularity": "selective"}):
        with pytest.raises(ValueError) as error:
            layer(RandomPlanner(1), **changes)
        messages.append(str(error.value))
    with pytest.raises(ValueError) as error:
        layer(RandomPlanner(1), torch.zeros(EXPERTS, dtype=torch.int64) + 1)
    return [*messages, str(error.value)]


def test_refusals() -> None:
    (messages,) = run_ranks(refused, 1)
    assert "add_bias_linear (True) is not possible" in messages[0]
    assert "recompute_granularity (selective)" in messages[1]
    assert "every one of the 1 ranks must have 8" in messages[2]
