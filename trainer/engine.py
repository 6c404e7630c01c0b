"""Engines: one whole optimizer step. The torch engine: FSDP2 over dense axes, EP for experts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.decisions import Decision, checkpoint_contexts, collect_layers
from parallel.layer import ExpertParallel
from parallel.mesh import ParallelMesh
from parallel.model import check_same_on_all_ranks, moe_layers
from parallel.phases import time_phases, watch_products
from parallel.planners import StatefulPlanner
from parallel.relocate import Relocation, relocate
from parallel.step import optimizer_step
from parallel.tune import ChunkTuner
from placement.table import ExpertPlacement
from trainer.balance.base import Balancer
from trainer.metrics import Metric, reduce_metrics
from trainer.optim import grad_norm_
from trainer.routing import routing_metrics
from trainer.sharding import decoder_layers, shard
from trainer.training_state import TrainingState

IGNORED = -100


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did, reduced over all ranks and equal on each.

    Attributes:
        metrics: by name, see docs/metrics.md.
        counts_LE: int64 rows per layer and expert, global batch.
        finite: False if the step was not applied because loss or gradient was not finite.
        row_s: seconds per row of the experts' products of this rank alone; NaN without rows.
    """

    metrics: dict[str, float]
    counts_LE: Tensor
    finite: bool
    row_s: float = math.nan


class Engine(Protocol):
    """The cut that every engine fits: a whole optimizer step."""

    def train_step(
        self, micro_batches: list[dict[str, Tensor]], *, time_layers: bool = False
    ) -> StepStats: ...

    def eval_step(self, batch: dict[str, Tensor]) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def relocate(self, new: ExpertPlacement) -> Relocation: ...


class EngineBase(ABC):
    """What engines share: a step around `_backward`, `_gradient_norm` and `_apply`.

    Loss is the sum over tokens / the global token count and gradients are only ever summed, so
    dense and expert gradients scale alike on every mesh.

    Args:
        model: from `parallelize`, in fp32, the same dense weights on all ranks.
        balancers: attached in this order.
        bf16: whether it computes in bf16.
        recompute: activation checkpointing of every decoder layer; choices are kept.
    """

    optimizer: torch.optim.Optimizer | TrainingState  # what a checkpoint saves and loads
    schedule: torch.optim.lr_scheduler.LRScheduler

    def __init__(
        self,
        model: Any,
        mesh: ParallelMesh,
        *,
        balancers: list[Balancer],
        bf16: bool,
        recompute: bool,
    ) -> None:
        self.mesh, self.balancers = mesh, balancers
        model.to(mesh.device)
        self.model: Any = model
        for balancer in balancers:
            balancer.attach(self.model, mesh)
        if recompute:
            settings = {"use_reentrant": False, "context_fn": checkpoint_contexts}
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        self.last_decisions: list[Decision] = []
        dtype = torch.bfloat16 if bf16 else next(model.parameters()).dtype
        layers = self.moe_layers()
        self.row_activation_bytes = layers[0].experts.widths_kept() * dtype.itemsize

    @abstractmethod
    def relocate(self, new: ExpertPlacement) -> Relocation:
        """Move experts to the homes of another table."""

    @abstractmethod
    def _backward(self, micro_batches: list[dict[str, Tensor]], num_tokens: int) -> Tensor:
        """Make the gradients of the loss / num_tokens; the loss of this rank, in nats, float64."""

    @abstractmethod
    def _gradient_norm(self) -> float:
        """Norm of the whole gradient, which is then clipped; all ranks alike."""

    @abstractmethod
    def _apply(self, finite: bool) -> None:
        """Update the parameters if loss and norm are finite, then forget the gradients."""

    def train_step(
        self, micro_batches: list[dict[str, Tensor]], *, time_layers: bool = False
    ) -> StepStats:
        """One optimizer step over this rank's micro-batches; the same number on every rank.

        Args:
            micro_batches: dicts of CPU tensors `input_ids`, `labels` (already shifted, -100 for
                none), `position_ids`, each int64 [sequences, tokens].
            time_layers: also report the seconds of the phases of the MoE layers.
        """
        self.model.train()
        layers = self.moe_layers()
        self._tell_planners(layers)
        num_tokens, num_positions = self._global_counts(micro_batches)
        for balancer in self.balancers:
            balancer.before_step(num_positions)
        with (
            collect_layers() as collected,
            time_phases(time_layers) as seconds,
            watch_products() as products,
        ):
            loss = self._backward(micro_batches, num_tokens)
        self.last_decisions = collected.decisions
        norm = self._gradient_norm()
        counts_LE = self._counts(collected.decisions)
        home_LE = torch.stack([layer.path.home_E for layer in layers])
        balance: dict[str, float] = defaultdict(float)
        for balancer in self.balancers:
            for name, value in balancer.losses().items():
                balance[name] += value
        metrics = reduce_metrics(
            {
                "train/loss": Metric.sum(float(loss) / num_tokens),
                "train/balance_loss": Metric.sum(sum(balance.values())),
                **{f"balance/{name}": Metric.sum(value) for name, value in balance.items()},
                **routing_metrics(collected, home_LE, self.mesh, self.row_activation_bytes),
                **{f"phase/{name}_s": Metric.max(s) for name, s in seconds.items() if time_layers},
            },
            self.mesh.dp_group,
        )
        metrics["moe/chunks"] = sum(layer.path.num_chunks for layer in layers) / len(layers)
        metrics["train/grad_norm"] = norm
        metrics["train/tokens"] = float(num_tokens)
        metrics["train/lr"] = float(self.schedule.get_last_lr()[0])
        finite = math.isfinite(metrics["train/loss"]) and math.isfinite(norm)
        self._apply(finite)
        if finite:
            self.schedule.step()
            for balancer in self.balancers:
                metrics.update(balancer.after_step(counts_LE))
        return StepStats(metrics, counts_LE, finite, products.seconds_per_row())

    @torch.no_grad()
    def eval_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Sum of the loss and number of tokens of a batch over all ranks, float64 [2]."""
        self.model.eval()
        loss, tokens = self._loss(self.model, batch), (batch["labels"] != IGNORED).sum()
        result = torch.stack([loss.double(), tokens.to(loss.device).double()])
        dist.all_reduce(result, group=self.mesh.dp_group)
        return result.cpu()

    def state_dict(self) -> dict[str, Any]:
        """Schedule and balancer state; weights and moments are saved under logical keys."""
        return {
            "schedule": self.schedule.state_dict(),
            "balancers": [balancer.state_dict() for balancer in self.balancers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.schedule.load_state_dict(state["schedule"])
        for balancer, saved in zip(self.balancers, state["balancers"], strict=True):
            balancer.load_state_dict(saved)

    def moe_layers(self) -> list[ExpertParallel]:
        """The expert-parallel layers, in layer order."""
        return [layer for _, layer in moe_layers(self.model)]

    def _loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Sum over this rank's tokens of the cross-entropy, in nats."""
        device = self.mesh.device
        logits_BSV = model(
            input_ids=batch["input_ids"].to(device),
            position_ids=batch["position_ids"].to(device),
            use_cache=False,
        ).logits
        logits = logits_BSV.flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = batch["labels"].to(device).flatten()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    def _global_counts(self, micro_batches: list[dict[str, Tensor]]) -> tuple[int, int]:
        """Tokens to predict and positions of the global batch."""
        tokens = sum(int((batch["labels"] != IGNORED).sum()) for batch in micro_batches)
        positions = sum(batch["labels"].numel() for batch in micro_batches)
        counts = torch.tensor([tokens, positions], device=self.mesh.device)
        dist.all_reduce(counts, group=self.mesh.dp_group)
        return max(1, int(counts[0])), max(1, int(counts[1]))

    def _tell_planners(self, layers: list[ExpertParallel]) -> None:
        """Give planners with a memory the counts of the step before, layer by layer."""
        for layer in layers:
            planner = layer.path.planner
            if isinstance(planner, StatefulPlanner):
                mine = [d.counts_RE for d in self.last_decisions if d.layer == layer.layer_index]
                planner.next_step(mine)

    def _counts(self, decisions: list[Decision]) -> Tensor:
        """Rows per layer and expert over the global batch: one collective for all layers."""
        layers = moe_layers(self.model)
        num_experts = layers[0][1].num_experts
        counts_LE = torch.zeros(len(layers), num_experts, dtype=torch.int64)
        for decision in decisions:
            counts_LE[decision.layer] += decision.counts_RE.sum(0)
        counts_LE = counts_LE.to(self.mesh.device)
        dist.all_reduce(counts_LE, group=self.mesh.edp_group)
        return counts_LE.cpu()


class TorchEngine(EngineBase):
    """FSDP2 with fp32 masters: dense parameters over all ranks or a node's, experts over EDP.

    Args:
        model, balancers, recompute: see `EngineBase`.
        make_optimizer: from the sharded model to its optimizer; parameters that it leaves out
            stay as they are, and their gradients do not count in the norm.
        make_schedule: from the optimizer to its learning-rate schedule, stepped once a step.
        bf16: compute in bf16, routers and reductions in fp32.
        max_grad_norm: clip above this norm; 0 for never.
        reshard_after_forward: free gathered weights between forward and backward.
        shard_within_node: hybrid sharding: split parameters over the ranks of a node, and keep a
            copy on every node; see `trainer.sharding.Sharding`.
        cpu_offload: keep parameters, gradients and optimizer state in CPU memory and update there.
        shard_gradients: sum and split gradients after every micro-batch, instead of keeping whole
            ones in fp32 until the last: less memory, more traffic.
        tune_chunks: choose the layers' numbers of chunks in the first steps.

    Raises:
        ValueError: if `shard_within_node` does not fit the ranks.
    """

    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        model: Any,
        mesh: ParallelMesh,
        *,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        make_schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
        balancers: list[Balancer],
        bf16: bool = False,
        recompute: bool = False,
        compile: bool = False,
        max_grad_norm: float = 1.0,
        reshard_after_forward: bool = True,
        shard_within_node: bool = False,
        cpu_offload: bool = False,
        shard_gradients: bool = False,
        tune_chunks: bool = False,
    ) -> None:
        super().__init__(model, mesh, balancers=balancers, bf16=bf16, recompute=recompute)
        self.max_grad_norm, self.shard_gradients = max_grad_norm, shard_gradients
        if compile:
            for layer in decoder_layers(self.model):
                layer.compile()
        self.tuner = ChunkTuner(self.moe_layers(), mesh.dp_group) if tune_chunks else None
        self.sharding = shard(
            self.model,
            mesh,
            bf16=bf16,
            reshard_after_forward=reshard_after_forward,
            within_nodes=shard_within_node,
            cpu_offload=cpu_offload,
        )
        self.optimizer = make_optimizer(self.model)
        trained = {p for group in self.optimizer.param_groups for p in group["params"]}
        self._untrained = [p for p in self.model.parameters() if p not in trained]
        self.schedule = make_schedule(self.optimizer)

    def relocate(self, new: ExpertPlacement) -> Relocation:
        """Move experts to the homes of another table; see `parallel.relocate.relocate`."""
        copies = self.sharding.copies
        if copies is None:
            return relocate(self.model, self.optimizer, self.mesh, new)
        check_same_on_all_ranks(new, self.mesh)
        of_node = relocate(self.model, self.optimizer, self.sharding.experts, new)
        seconds = torch.tensor(of_node.seconds, dtype=torch.float64, device=self.mesh.device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=copies)
        num_bytes = of_node.bytes * dist.get_world_size(copies)
        return Relocation(of_node.experts, num_bytes, float(seconds))

    def _backward(self, micro_batches: list[dict[str, Tensor]], num_tokens: int) -> Tensor:
        total_loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        with optimizer_step() as step, self.tuner.try_step() if self.tuner else nullcontext():
            for index, batch in enumerate(micro_batches):
                is_last = index == len(micro_batches) - 1
                self.model.set_requires_gradient_sync(is_last or self.shard_gradients)
                self.model.set_requires_all_reduce(is_last)  # over the nodes of hybrid sharding
                loss = self._loss(self.model, batch)
                if is_last:
                    step.start_last_micro_batch()
                (loss / num_tokens).backward()
                total_loss += loss.detach()
            step.finish([layer.experts for layer in self.moe_layers()], self.mesh.edp_group)
        for parameter in self._untrained:
            parameter.grad = None
        return total_loss

    def _gradient_norm(self) -> float:
        return float(
            grad_norm_(
                self.model,
                self.max_grad_norm,
                self.mesh.dp_group,
                counts_dense=self.sharding.counts_dense,
                counts_experts=self.sharding.counts_experts,
            )
        )

    def _apply(self, finite: bool) -> None:
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
