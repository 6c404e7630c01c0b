"""How DeepSpeed takes expert-parallel layers for its own, and what it is told of the run.

Written for one version of DeepSpeed, whose private names are used here and in
`trainer.deepspeed_state` alone.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from parallel.experts import Experts
from parallel.layer import ExpertParallel
from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks, moe_layers, router_of

VERSION = "0.19.8"
RENAMED = "`torch.distributed.[a-z_]+` is deprecated"


def import_deepspeed(device: torch.device) -> Any:
    """The package; on a CPU it is kept from compiling kernels when it starts.

    Raises:
        ValueError: if it is not installed, or in another version.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # it would search for one, and say so
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ValueError(
            f"engine=deepspeed needs the package deepspeed ({error}); "
            f"pip install evenkeel[deepspeed], or use engine=torch"
        ) from error
    if deepspeed.__version__.split("+")[0] != VERSION:
        raise ValueError(
            f"engine=deepspeed needs deepspeed {VERSION}, here is {deepspeed.__version__}; "
            f"pip install evenkeel[deepspeed], or use engine=torch"
        )
    warnings.filterwarnings("ignore", RENAMED, FutureWarning)  # DeepSpeed uses the old names
    if device.type == "cpu":
        ops: Any = importlib.import_module("deepspeed.ops")
        ops.__compatible_ops__ = {}  # else it would run a compiler for each of its kernels
    return deepspeed


def initialize(
    deepspeed: Any, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> Any:
    """DeepSpeed's engine over a model that `adopt` and an optimizer that `split_groups` prepared.

    It averages gradients over all ranks, expert gradients too. Its loss scale of 1 / ranks undoes
    that where it looks at them: gradients are then summed, whatever the tokens of a rank.
    """
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    engine.optimizer.override_loss_scale(1 / dist.get_world_size())
    return engine


def settings(
    *,
    stage: int,
    bf16: bool,
    max_grad_norm: float,
    offload_optimizer: bool,
    bucket_elements: int,
    persist_below: int,
) -> dict[str, Any]:
    """DeepSpeed's own configuration. What changes results is named, whatever its default."""
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": False,
        "reduce_bucket_size": bucket_elements,
        "allgather_bucket_size": bucket_elements,
        "stage3_prefetch_bucket_size": bucket_elements,
        "stage3_param_persistence_threshold": persist_below,
    }
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": 1,  # the engine divides by token counts itself
        "gradient_accumulation_steps": 1,  # and says which micro-batch is the last
        "gradient_clipping": max_grad_norm,
        "gradient_allreduce_op": "mean",  # ZeRO 3 has no sum
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def adopt(model: nn.Module, mesh: ParallelMesh, stage: int) -> None:
    """Make DeepSpeed see its own MoE layers in ours, which stay what they are.

    It knows layers by their class, their groups by tables in a module of its own, and parameters
    of experts by attributes; the keys of the model stay the same.
    """
    groups: Any = importlib.import_module("deepspeed.utils.groups")
    own: Any = importlib.import_module("deepspeed.module_inject.auto_ep_layer").AutoEPMoELayer
    leaf: Any = importlib.import_module("deepspeed.utils.z3_leaf_module")
    name = group_name(mesh)
    for table, value in (
        (groups._EXPERT_PARALLEL_GROUP, mesh.ep_group),
        (groups._EXPERT_PARALLEL_GROUP_RANKS, dist.get_process_group_ranks(mesh.ep_group)),
        (groups._EXPERT_DATA_PARALLEL_GROUP, mesh.edp_group),
        (groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, dist.get_process_group_ranks(mesh.edp_group)),
    ):
        table.clear()
        table[name] = value
    adopted = type(
        "AdoptedExpertParallel",
        (ExpertParallel, own),  # ours comes first: nothing of theirs is ever called
        {"set_deepspeed_parallelism": lambda self, *args, **kwargs: None},
    )
    for _, layer in moe_layers(model):
        layer.__class__ = adopted
        if stage == 2:
            layer.experts.__class__ = TogetherExperts
        if stage == 3:  # its parameters come and go with the layer, not with their own module
            leaf.set_z3_leaf_module(layer, True)
        for parameter in layer.experts.parameters(recurse=False):
            tags: Any = parameter
            tags.allreduce, tags.group_name = False, name
            tags.ds_zero_placement_family = "autoep_expert"
            tags.ds_zero_partition_group_name = name


def route_in_fp32(model: nn.Module) -> None:
    """Let routers compute in fp32, with the weights that DeepSpeed has rounded to bf16."""
    for _, block in moe_blocks(model):
        router = router_of(block)
        for module in () if router is None else router.modules():
            module.forward = _in_fp32(module, module.forward)


def _in_fp32(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a module with inputs and parameters of its own in fp32."""

    def widened(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, _wide, (args, kwargs))
        wide = {name: p.float() for name, p in module.named_parameters(recurse=False)}
        vars(module).update(wide)  # attributes come before parameters of the same name
        try:
            return function(*args, **kwargs)
        finally:
            for name in wide:
                del vars(module)[name]

    return widened


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def group_name(mesh: ParallelMesh) -> str:
    """DeepSpeed's name of the groups of the mesh; it reads the number in it."""
    return f"ep_size_{mesh.ep_size}"


def freeze_into_buffers(model: nn.Module) -> None:
    """Make buffers of parameters without gradient: ZeRO 3 would split them, bf16 round them.

    These are selection biases that a family declares as parameters.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())


def split_groups(optimizer: torch.optim.Optimizer, model: nn.Module, name: str) -> list[int]:
    """Part an optimizer's groups, in place, so that experts are alone in theirs; none is empty.

    Returns:
        of every group that there is now, the one that it was part of.
    """
    of_experts = {p for _, layer in moe_layers(model) for p in layer.experts.parameters()}
    groups, origin = [], []
    for index, group in enumerate(optimizer.param_groups):
        for is_expert in (False, True):
            parameters = [p for p in group["params"] if (p in of_experts) == is_expert]
            if not parameters:
                continue
            marks = {"moe": True, "name": name} if is_expert else {"name": f"dense {index}"}
            groups.append({**group, "params": parameters, **marks})
            origin.append(index)
    optimizer.param_groups[:] = groups
    return origin


class TogetherExperts(Experts):
    """Experts whose gradients all arrive at one place in the backward pass.

    ZeRO 2 sums gradients over ranks in the order in which they arrive. Without this, those of one
    layer would arrive in another order where experts were borrowed than where none were.
    """

    def stacks(self) -> dict[str, Tensor]:
        """The native stacks by name, as views."""
        stacks: Mapping[str, Tensor] = super().stacks()
        return dict(zip(stacks, _Together.apply(*stacks.values()), strict=True))


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *stacks: Tensor) -> tuple[Tensor, ...]:
        return tuple(stack.view_as(stack) for stack in stacks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads
