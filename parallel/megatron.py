"""Level expert parallelism inside Megatron-Core: a `MoELayer` with our data path, and its router.

    spec = get_gpt_layer_local_spec(num_experts=64, moe_grouped_gemm=False)
    spec.submodules.mlp = level_moe(planner=Quota())

T tokens on this rank, K choices, E experts, S experts of this rank, D hidden width, F expert width.
Needs megatron-core 0.16; works with any backend, CPU and gloo included.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from parallel.dispatch import Dispatcher
from parallel.experts import Experts
from parallel.layer import DataPath
from parallel.plan import Planner
from parallel.planners import home_plan

ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def level_moe(
    *,
    planner: Planner = home_plan,
    home_E: Tensor | None = None,
    shared_experts: ModuleSpec | type | None = None,
    weights_group: dist.ProcessGroup | None = None,
) -> ModuleSpec:
    """What takes the place of `mlp` in the specification of a Megatron layer.

    Args:
        planner: decides who computes which rows. home_E: home rank of every expert, int64 [E]
            (default: contiguous). shared_experts: as in Megatron's own specification.
        weights_group: the ranks of the EP group again, in a group of its own, which NCCL needs for
            planners that move experts.
    """
    params = {"planner": planner, "home_E": home_E, "weights_group": weights_group}
    submodules = MoESubmodules(shared_experts=shared_experts, router=LevelRouter)
    return ModuleSpec(module=LevelMoELayer, submodules=submodules, params=params)


class LevelRouter(TopKRouter):
    """Megatron's router on any device, without TransformerEngine, its expert bias included."""

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None
    ) -> None:
        plain = copy.copy(config)
        plain.moe_router_enable_expert_bias = False  # whose buffers would be made on a GPU
        super().__init__(plain, pg_collection)
        self.config = config
        if config.moe_router_enable_expert_bias:
            self.enable_expert_bias = True
            del self.local_tokens_per_expert, self.expert_bias
            zero_E = torch.zeros(config.num_moe_experts, device=self.weight.device)
            self.register_buffer("local_tokens_per_expert", zero_E.clone(), persistent=False)
            self.register_buffer("expert_bias", zero_E)

    def gating(self, input: Tensor) -> Tensor:
        dtype = ROUTER_DTYPES.get(self.config.moe_router_dtype, input.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype), bias)


class LevelMoELayer(MoELayer):
    """Megatron's MoE layer whose rows are planned, dispatched and computed by our data path.

    Router, losses, shared experts, checkpoints and the rule for gradients (dense ones are meant
    over the data-parallel ranks, experts' summed over theirs and divided alike) are Megatron's.

    Raises:
        ValueError: for settings that need Megatron's own dispatcher or TransformerEngine.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        planner: Planner = home_plan,
        home_E: Tensor | None = None,
        weights_group: dist.ProcessGroup | None = None,
    ) -> None:
        assert submodules is not None
        groups = pg_collection or get_default_pg_collection()
        check_config(config, groups)
        # MoELayer itself would make a dispatcher and experts, on a GPU
        BaseMoELayer.__init__(self, config, layer_number, groups)
        self.submodules, self.tp_group = submodules, groups.tp
        self.shared_experts_recompute = False
        self.router = submodules.router(config=config, pg_collection=groups)
        if self.use_shared_expert:
            self.shared_experts = build_module(
                submodules.shared_experts,
                config=config,
                pg_collection=groups,
                gate=config.moe_shared_expert_gate,
            )
        num_ranks, num_experts = dist.get_world_size(groups.ep), config.num_moe_experts
        if home_E is None:
            home_E = torch.arange(num_experts) // (num_experts // num_ranks)
        check_homes(home_E, num_experts, num_ranks)
        rank = dist.get_rank(groups.ep)
        self.local_expert_indices = (home_E == rank).nonzero().flatten().tolist()
        family = GatedExperts(config, self.local_expert_indices)
        self.experts = Experts(family, list(range(self.num_local_experts)))
        for parameter in self.experts.parameters():
            setattr(parameter, "allreduce", num_ranks == 1)  # noqa: B010  # how Megatron tells experts
        ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        nodes = [rank // ranks_per_node for rank in dist.get_process_group_ranks(groups.ep)]
        self.expert_data_rank = dist.get_rank(groups.expt_dp)
        self.path = DataPath(
            self.experts,
            family,
            layer_index=0,
            home_E=home_E,
            planner=planner,
            dispatcher=Dispatcher(groups.ep, num_experts, nodes, weights_group),
        )

    def set_layer_number(self, layer_number: int) -> None:
        super().set_layer_number(layer_number)
        self.path.layer_index = layer_number - 1

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Output of the layer, [sequence, batch, D], and no bias."""
        assert intermediate_tensors is None, "CUDA graphs of parts of a layer are refused"
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        shared = self.shared_experts_compute(hidden_states)
        weights_TE, chosen_TE = self.router(hidden_states, padding_mask)
        ids_TK = chosen_ids(chosen_TE, self.config.moe_router_topk)
        weights_TK = F.pad(weights_TE, (0, 1)).gather(1, ids_TK)
        x_TD = hidden_states.flatten(0, 1)
        out = self.path(x_TD, ids_TK, weights_TK.to(x_TD.dtype), self.experts.stacks())
        out = out.view_as(hidden_states)
        return out if shared is None else out + shared, None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Every expert by its id, so that a checkpoint loads on any EP size and any homes."""
        experts = self._modules.pop("experts")
        try:
            state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        finally:
            self._modules["experts"] = experts
        axis = len(sharded_offsets)
        for name, stack in self.experts.stacks().items():
            for slot, expert in enumerate(self.local_expert_indices):
                key = f"{prefix}experts.{name}"
                state[f"{key}.{expert}"] = ShardedTensor.from_rank_offsets(
                    key,
                    stack.data[slot],
                    *sharded_offsets,
                    (axis, expert, self.config.num_moe_experts),
                    replica_id=self.expert_data_rank,
                    prepend_axis_num=axis + 1,
                )
        return state


class GatedExperts(nn.Module):
    """Mathematics of Megatron's experts for `parallel.experts`, and their first values.

    Values depend on the state of the random numbers, which is to be the same on all ranks, and on
    the expert alone: not on the ranks that there are.
    """

    has_bias = False
    is_transposed = False

    def __init__(self, config: TransformerConfig, experts: list[int]) -> None:
        super().__init__()
        self.has_gate = bool(config.gated_linear_unit)
        is_silu = config.activation_func is F.silu
        self.act_fn: Callable[[Tensor], Tensor] = nn.SiLU() if is_silu else config.activation_func
        width, hidden = config.moe_ffn_hidden_size, config.hidden_size
        up = "gate_up_proj" if self.has_gate else "up_proj"
        seed = int(torch.randint(2**40, ()))
        shapes = {up: (width * (1 + self.has_gate), hidden), "down_proj": (hidden, width)}
        init = {up: config.init_method, "down_proj": config.output_layer_init_method}
        for name, shape in shapes.items():
            stack = torch.empty(len(experts), *shape, dtype=config.params_dtype)
            for slot, expert in enumerate(experts):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed + 2 * expert + (name == up))
                    if config.perform_initialization:
                        init[name](stack[slot])
            self.register_parameter(name, nn.Parameter(stack))

    def _default_apply_gate(self, h_MG: Tensor) -> Tensor:
        gate_MF, up_MF = h_MG.chunk(2, dim=-1)
        return self.act_fn(gate_MF) * up_MF

    _apply_gate = _default_apply_gate


def chosen_ids(chosen_TE: Tensor, top_k: int) -> Tensor:
    """Ids [T, K] of the experts that a map [T, E] names, at most K of a token; else E."""
    is_chosen_TK, ids_TK = chosen_TE.to(torch.int8).topk(top_k)
    return ids_TK.masked_fill(is_chosen_TK == 0, chosen_TE.shape[1])


@torch.no_grad()
def update_expert_bias(model: nn.Module, rate: float) -> None:
    """Loss-free balancing (arXiv:2408.15664) after an optimizer step: one collective for all.

    On a GPU Megatron's `finalize_model_grads` does this itself.
    """
    routers = [m for m in model.modules() if isinstance(m, LevelRouter) and m.enable_expert_bias]
    counts_LE = torch.stack([router.local_tokens_per_expert for router in routers])
    dist.all_reduce(counts_LE, group=routers[0].tp_dp_cp_group)
    for router, counts_E in zip(routers, counts_LE, strict=True):
        router.expert_bias += rate * torch.sign(counts_E.mean() - counts_E)
        router.local_tokens_per_expert.zero_()


def check_config(config: TransformerConfig, groups: ProcessGroupCollection) -> None:
    """Refuse what this layer does not do.

    Raises:
        ValueError: naming field, value and remedy.
    """
    refused = {
        "moe_latent_size": (config.moe_latent_size, "null"),
        "moe_shared_expert_overlap": (config.moe_shared_expert_overlap, "False"),
        "moe_pad_expert_input_to_capacity": (config.moe_pad_expert_input_to_capacity, "False"),
        "moe_apply_probs_on_input": (config.moe_apply_probs_on_input, "False"),
        "add_bias_linear": (config.add_bias_linear, "False"),
        "recompute_granularity": (config.recompute_granularity, "None"),
        "fp8": (config.fp8, "None"),
        "fp4": (config.fp4, "None"),
    }
    for field, (value, wanted) in refused.items():
        if value:
            raise ValueError(
                f"{field} ({value}) is not possible with LevelMoELayer; set it to {wanted}, or use "
                f"Megatron's MoELayer"
            )
    if dist.get_world_size(groups.expt_tp) > 1:
        raise ValueError(
            f"expert_tensor_parallel_size ({dist.get_world_size(groups.expt_tp)}) must be 1 with "
            f"LevelMoELayer: experts are whole on their ranks; raise expert_model_parallel_size"
        )
    if dist.get_world_size(groups.tp) > 1 and not config.sequence_parallel:
        raise ValueError(
            "sequence_parallel (False) must be True with tensor parallelism and LevelMoELayer: "
            "ranks would compute the same tokens"
        )


def check_homes(home_E: Tensor, num_experts: int, num_ranks: int) -> None:
    """Refuse homes that do not give every rank equally many experts.

    Raises:
        ValueError: naming what is off.
    """
    share = num_experts // num_ranks
    counts = torch.bincount(home_E, minlength=num_ranks).tolist()
    if counts != [share] * num_ranks:
        raise ValueError(
            f"home_E gives ranks {counts} of {num_experts} experts; every one of the {num_ranks} "
            f"ranks must have {share}"
        )
