"""One run from a checked configuration: build everything, train, export, report."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from transformers import PretrainedConfig

from configs.schema import ActivationCheckpointing, Config, Precision, check
from parallel.memory import keep_freed_memory
from parallel.mesh import ParallelMesh
from parallel.model import find_experts
from parallel.plan import Planner
from parallel.planners import Materialize, Quota, Sticky
from parallel.probe import describe_topology
from placement.topology import Topology
from trainer.checkpoint import Checkpointer
from trainer.checkpoint_files import CheckpointReader
from trainer.data import Data, build_data, check_vocabulary
from trainer.data.baseline import baseline_bits_per_byte
from trainer.engine import EngineBase
from trainer.export import HFCheckpoint, TensorSource, export_model
from trainer.living import (
    expert_shape,
    first_placement,
    fitted_placer,
    living_placement,
    measured_topology,
    where_it_was,
)
from trainer.loggers import LoggerList
from trainer.metrics import model_flops_per_token, parameter_counts
from trainer.modeling import (
    WeightSource,
    build_model,
    family_config,
    local_checkpoint,
    meta_model,
    override,
)
from trainer.optim import build_adamw, build_schedule, parameter_groups
from trainer.ranks import RankZeroFirst, RollCall, start_ranks
from trainer.report import RunSummary, report
from trainer.routers.base import Native, Router
from trainer.routers.chosen import chosen_router
from trainer.sample import sample
from trainer.slow_ranks import SlowRanks
from trainer.trainer import Trainer
from trainer.upcycle.plan import made

PROMPT_TOKENS = 32
GRADIENT_BYTES = 4  # of a borrowed parameter on its way home
# What errors of gloo say, which have no type of their own.
BROKEN_GROUP = ("gloo", "pair closure", "connection closed by peer", "socket closed")


def run(config: Config) -> None:
    """Train as configured; called on every rank.

    Raises:
        ValueError: for what the user can mend, before anything is trained.
    """
    start_ranks(config.mesh.timeout_s)
    roll_call = RollCall()
    try:
        _run(config, roll_call.hosts)
    except RuntimeError as error:
        _explain_broken_group(error, roll_call)
        raise
    roll_call.close()


def _run(config: Config, hosts: Sequence[str]) -> None:
    started = time.monotonic()
    checkpoint = _source(config)
    model_config = _model_config(config, checkpoint)
    shape = meta_model(model_config)
    experts = find_experts(shape)
    num_experts: Any = experts[0][1].num_experts
    top_k = getattr(model_config.get_text_config(), "num_experts_per_tok", None)
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    world = dist.get_world_size()
    check(config, world, num_experts=num_experts, top_k=top_k, max_positions=positions)
    planner = instantiate(config.planner)  # refuses impossible bounds before any work is done
    placer = fitted_placer(config, instantiate(config.placement))
    ep = config.mesh.ep or math.gcd(world, num_experts)
    mesh = ParallelMesh.build(ep=ep, ranks_per_node=config.mesh.ranks_per_node)
    if mesh.device.type == "cpu":
        keep_freed_memory()
    router = chosen_router(config, shape, mesh)
    rank_zero = RankZeroFirst()
    data = build_data(config.data, config.train.seq_len, rank=mesh.rank, barrier=rank_zero.wait)
    _describe(data, mesh, rank_zero)
    check_vocabulary(data.tokenizer, model_config.get_text_config().vocab_size)
    folder = Path(config.run.dir)
    checkpointer = Checkpointer(
        folder / "checkpoints",
        mesh=mesh,
        keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous,
    )
    resume = checkpointer.resolve(config.checkpoint.resume)
    topology = measured_topology(config, mesh, planner, placer)
    sizes = len(experts), num_experts, ep
    placement = first_placement(placer, sizes, topology, expert_shape(config, shape), rank_zero)
    if resume is not None and config.relocate.every:
        placement = where_it_was(resume, placement, rank_zero)
    model = build_model(
        model_config,
        mesh,
        seed=config.seed,
        placement=placement,
        planner=_fitted(planner, config, mesh, topology, shape, top_k),
        checkpoint=checkpoint,
        dispatcher=instantiate(config.dispatcher),
        num_chunks=max(1, config.train.dispatch_chunks),
        refetch=config.train.refetch_borrowed,
        shared_meanwhile=not config.train.compile,  # its early call cannot be traced
    )
    engine = _engine(config, model, mesh, router)
    loggers = LoggerList(list(instantiate(config.logger).values()), rank=mesh.rank)
    trainer = Trainer(
        config,
        mesh=mesh,
        data=data,
        engine=engine,
        checkpointer=checkpointer,
        loggers=loggers,
        placement=placement,
        flops_per_token=model_flops_per_token(shape, config.train.seq_len),
        slow_ranks=SlowRanks(hosts, mesh),
        living=living_placement(config, mesh, topology, data.train, shape, rank_zero),
    )
    if resume is not None:
        trainer.resume(resume)
    if _nothing_to_do(config, trainer.progress.step, rank_zero):
        if mesh.rank == 0:
            print(
                f"{folder} is complete at step {trainer.progress.step}; raise train.steps to go on"
            )
        return
    loggers.start(config.resolved, folder)
    try:
        trainer.train()
    except BaseException:
        loggers.finish({})  # gives the terminal back
        raise
    _finish(config, trainer, data, shape, started, rank_zero)


def _source(config: Config) -> WeightSource | None:
    """The checkpoint to continue, or the MoE that is made of it while it is read."""
    model = config.model
    if model.source is None:
        return None
    checkpoint = HFCheckpoint(local_checkpoint(model.source))
    if model.upcycle.recipe is None:
        return checkpoint
    return made(model.upcycle, [checkpoint], config.seed)


def _nothing_to_do(config: Config, step: int, rank_zero: RankZeroFirst) -> bool:
    """Whether a resumed run has made all of its steps and its export.

    Raises:
        ValueError: if there are steps to make but the place of the export is taken.
    """
    target = Path(config.checkpoint.export_dir)
    taken = config.checkpoint.export and target.is_dir() and any(target.iterdir())
    taken = rank_zero.value(taken)  # the others may not see rank 0's folder
    if step >= config.train.steps:
        return taken or not config.checkpoint.export
    if taken:
        raise ValueError(
            f"checkpoint.export_dir ({target}) is not empty, and this run would not overwrite "
            f"it at its end; remove it, name another one, or set checkpoint.export=false"
        )
    return False


def _model_config(config: Config, checkpoint: WeightSource | None) -> PretrainedConfig:
    overrides = dict(config.model.overrides)
    if checkpoint is not None:
        return override(checkpoint.config, overrides)
    if config.model.family is None:
        raise ValueError("model.family is missing: name a family, or a checkpoint in model.source")
    return family_config(config.model.family, overrides)


def _describe(data: Data, mesh: ParallelMesh, rank_zero: RankZeroFirst) -> None:
    """Print what the sources gave, after all ranks are found to have the same.

    Raises:
        ValueError: on ranks that read another corpus than rank 0.
    """
    if rank_zero.value(data.digest) != data.digest:
        raise ValueError(
            f"rank {mesh.rank} read another corpus than rank 0; give all ranks the same files, or "
            f"a shared data.cache_dir"
        )
    if mesh.rank != 0:
        return
    for info in data.infos:
        line = f"{info.source} ({info.split}): {info.documents:,} documents, {info.tokens:,} tokens"
        print(line + (f", {info.invalid:,} invalid UTF-8 sequences" if info.invalid else ""))
    if not data.bytes_are_exact:
        print("the tokenizer changes text, so bits per byte are approximate")


def _fitted(
    planner: Any,
    config: Config,
    mesh: ParallelMesh,
    topology: Topology | None,
    shape: Any,
    top_k: int | None,
) -> Planner:
    """The planner, fitted to the speeds of the machine and the model's widths if it asks."""
    if not hasattr(planner, "for_topology") or topology is None:
        return planner
    train, bf16 = config.train, config.train.precision is Precision.bf16
    value_bytes = 2 if bf16 else 4
    bytes_per_parameter: float = value_bytes * (1 + train.refetch_borrowed) + GRADIENT_BYTES
    if isinstance(planner, Sticky):  # an expert travels once for all micro-batches of a step
        micro_batches = train.batch_size // (train.micro_batch_size * mesh.world_size)
        bytes_per_parameter /= micro_batches
    if mesh.rank == 0:
        print(describe_topology(topology, bytes_per_parameter))
        if isinstance(planner, Quota) and top_k is not None:
            mean = train.micro_batch_size * train.seq_len * top_k
            most = planner.max_rows_per_rank(mean * mesh.ep_size, mesh.ep_size)
            print(f"no rank computes more than {most:,} rows of a layer at once (mean {mean:,})")
    if isinstance(planner, Materialize):
        _, experts = find_experts(shape)[0]
        planner = planner.for_widths(
            shape.config.get_text_config().hidden_size,
            sum(stack[0].numel() for stack in experts.parameters(recurse=False)),
            bytes_per_value=value_bytes,
            bytes_per_parameter=bytes_per_parameter,
        )
    return planner.for_topology(topology, bytes_per_parameter)


def _engine(config: Config, model: Any, mesh: ParallelMesh, router: Router) -> EngineBase:
    optim, train = config.optim, config.train
    balancers = instantiate(config.balance).values()

    def make_optimizer(model: Any) -> torch.optim.Optimizer:
        groups = parameter_groups(
            model, optim.weight_decay, optim.decay_routers, optim.only_routers
        )
        return build_adamw(groups, optim.lr, tuple(optim.betas), optim.eps)

    def make_schedule(optimizer: Any) -> Any:
        return build_schedule(
            optimizer,
            optim.schedule.value,
            steps=train.steps,
            warmup_steps=optim.warmup_steps,
            decay_steps=optim.decay_steps,
            min_lr_ratio=optim.min_lr_ratio,
        )

    return instantiate(config.engine)(
        model,
        mesh,
        make_optimizer=make_optimizer,
        make_schedule=make_schedule,
        balancers=[*([] if isinstance(router, Native) else [router]), *balancers],
        bf16=train.precision is Precision.bf16,
        recompute=train.activation_checkpointing is ActivationCheckpointing.full,
        compile=train.compile,
        max_grad_norm=train.max_grad_norm,
        tune_chunks=train.dispatch_chunks == 0,
    )


def _finish(
    config: Config,
    trainer: Trainer,
    data: Data,
    shape: Any,
    started: float,
    rank_zero: RankZeroFirst,
) -> None:
    """Validate, sample, export and report."""
    trainer.evaluate()
    text = _sample(config, trainer, data) if config.train.generate else ""
    newest = trainer.checkpointer.latest()
    export_dir = None
    if config.checkpoint.export and trainer.progress.step >= config.train.steps:
        export_dir = _export(config, trainer, data, newest)
    if trainer.mesh.rank == 0:
        progress, last, validation = trainer.progress, trainer.last, trainer.validation
        total, active = parameter_counts(shape)
        summary = RunSummary(
            steps=progress.step,
            seconds=time.monotonic() - started,
            ranks=trainer.mesh.world_size,
            ep=trainer.mesh.ep_size,
            parameters=total,
            active_parameters=active,
            tokens_per_s=trainer.tokens_per_s,
            loss=last.get("train/loss", math.nan),
            validation_loss=validation.get("validation/loss"),
            bits_per_byte=validation.get("validation/bits_per_byte"),
            baseline_bits_per_byte=_baseline(config, data),
            load_ratio=(progress.first_load_ratio or 1.0, last.get("moe/load_ratio", 1.0)),
            load_ratio_home=(
                progress.first_load_ratio_home or 1.0,
                last.get("moe/load_ratio_home", 1.0),
            ),
            max_violation=(
                progress.first_max_violation or 0.0,
                last.get("moe/max_violation_global", 0.0),
            ),
            rows=progress.rows,
            rows_crossing=progress.rows_crossing,
            skipped_steps=progress.skipped,
            checkpoint=str(newest) if newest else None,
            export=str(export_dir) if export_dir else None,
            sample=text,
            validation=dict(validation),
        )
        trainer.loggers.finish(asdict(summary))
        report(summary, Path(config.run.dir))
    rank_zero.wait()


def _baseline(config: Config, data: Data) -> float | None:
    """The order-3 byte model on the sequences that the model is validated on."""
    if data.validation is None:
        return None
    ids = data.validation.spread(config.train.eval_batches * config.train.batch_size)
    return baseline_bits_per_byte(data, ids)


def _sample(config: Config, trainer: Trainer, data: Data) -> str:
    source = data.validation or data.train
    prompt = source.batch([0])["input_ids"][0, :PROMPT_TOKENS].tolist()
    ids = sample(
        trainer.engine.model,
        trainer.mesh,
        prompt,
        num_tokens=config.train.generate,
        context=config.train.seq_len,
        seed=config.seed,
    )
    return data.tokenizer.decode(prompt + ids)


def _export(config: Config, trainer: Trainer, data: Data, checkpoint: Path | None) -> Path | None:
    """Write the newest checkpoint as a Hugging Face directory, on rank 0, tensor by tensor."""
    if trainer.mesh.rank != 0 or checkpoint is None:
        return None
    tensors: TensorSource = CheckpointReader(checkpoint)
    for balancer in trainer.engine.balancers:
        if isinstance(balancer, Router):
            tensors = balancer.exported(tensors)
    return export_model(
        trainer.engine.model.config,
        tensors,
        Path(config.checkpoint.export_dir),
        tokenizer=data.tokenizer,
    )


def _explain_broken_group(error: RuntimeError, roll_call: RollCall) -> None:
    """Say on this rank which ranks are gone, if that is why a collective failed."""
    said = str(error).lower()
    if not isinstance(error, dist.DistError) and not any(text in said for text in BROKEN_GROUP):
        return
    # Torchrun ends these ranks as soon as it knows: not before they have said why.
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    missing = roll_call.missing()
    signal.signal(signal.SIGTERM, handler)
    if missing:
        print(
            f"rank {dist.get_rank()}: rank {', '.join(missing)} is gone, hangs or cannot be "
            f"reached. The next start of this run goes on from the newest complete checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        traceback.print_exc()
        os._exit(1)  # the broken group would hold up an orderly exit
