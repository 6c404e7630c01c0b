"""The training loop: data in, steps, evaluation, checkpoints, a report at the end."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from configs.schema import Config, OnNonfinite
from parallel.decisions import collect_routing
from parallel.mesh import ParallelMesh
from parallel.model import moe_layers
from placement.table import ExpertPlacement
from trainer.checkpoint import Checkpointer
from trainer.data import Data
from trainer.engine import EngineBase, StepStats
from trainer.loggers import LoggerList
from trainer.metrics import dead_experts, max_violation, memory_bytes
from trainer.modeling import seeded
from trainer.page.history import NAME as HISTORY
from trainer.page.history import History, observe
from trainer.placement import LivingPlacement
from trainer.ranks import agree
from trainer.record import save_routing
from trainer.routing import ValidationRouting
from trainer.slow_ranks import SlowRanks

BITS_PER_NAT = 1.4426950408889634


class NonFiniteError(RuntimeError):
    """Loss or gradient norm was not finite; the message names the step and the saved batch."""


@dataclass
class Progress:
    """Where training stands; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    rows: int = 0
    rows_crossing: int = 0
    skipped: int = 0
    moved_experts: int = 0
    first_load_ratio: float | None = None
    first_load_ratio_home: float | None = None
    first_max_violation: float | None = None


class Trainer:
    """Runs optimizer steps until the configured number, a signal or the time limit."""

    def __init__(
        self,
        config: Config,
        *,
        mesh: ParallelMesh,
        data: Data,
        engine: EngineBase,
        checkpointer: Checkpointer,
        loggers: LoggerList,
        placement: ExpertPlacement,
        flops_per_token: float,
        slow_ranks: SlowRanks,
        living: LivingPlacement | None = None,
    ) -> None:
        self.config, self.mesh, self.data, self.engine = config, mesh, data, engine
        self.checkpointer, self.loggers = checkpointer, loggers
        self.placement, self.flops_per_token = placement, flops_per_token
        self.living, self.slow_ranks = living, slow_ranks
        self.batches = data.batches(config.train.batch_size, config.seed)
        self.progress = Progress()
        self.history: History | None = None
        self.last: dict[str, float] = {}
        self.validation: dict[str, float] = {}
        self.validation_routing = ValidationRouting()
        self.signalled = False
        self.saved_step: int | None = None
        self.step_tokens, self.step_seconds = 0.0, 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over the steps of this start of the run, saves and validation apart."""
        return self.step_tokens / self.step_seconds if self.step_seconds else 0.0

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint, on any number of ranks and under any placement."""
        extra = self.checkpointer.load(path, self.engine.model, self.engine.optimizer)
        self.engine.load_state_dict(extra["engine"])
        self.batches.load_state_dict(extra["data"])
        self.progress = Progress(**extra["progress"])
        self.saved_step = self.progress.step
        if self.living is not None:
            self.living.restore(self.progress.step)

    def relocate(self, new: ExpertPlacement) -> int:
        """Move experts to the homes of another table, between steps; how many have moved.

        Checkpoints from now on carry the new table.

        Raises:
            ValueError: if ranks hold different tables or the table does not fit the model.
        """
        moved = self.engine.relocate(new)
        self.placement = new
        self.progress.moved_experts += moved.experts
        return moved.experts

    def review(self, living: LivingPlacement) -> None:
        """Look for a better placement in the statistics, and move the experts if it pays."""
        placement, why = living.review(self.placement)
        if why:
            print(why, flush=True)
        if not torch.equal(placement.home_LE, self.placement.home_LE):
            self.relocate(placement)

    def train(self) -> None:
        """Train to the end of the run, or until it is told to stop; then save."""
        train = self.config.train
        started, first_step = time.monotonic(), self.progress.step
        if self.living is not None:
            self.living.begin(self.placement)
        if self.mesh.rank == 0:
            self.history = History(Path(self.config.run.dir) / HISTORY, first_step)
        with self._signals():
            while self.progress.step < train.steps and not self._must_stop(started):
                start = time.monotonic()
                stats = self._step()
                seconds = time.monotonic() - start
                self.step_tokens += stats.metrics["train/tokens"]
                self.step_seconds += seconds
                step = self.progress.step
                logged = step % train.log_every == 0 or step == train.steps
                if logged and self.history is not None:  # before experts move
                    self._record(self.history, stats)
                self.checkpointer.poll()  # a failed background save ends the run now
                if self.living is not None and self.living.review_due(step) and step < train.steps:
                    self.review(self.living)
                if train.eval_every and step % train.eval_every == 0 and step < train.steps:
                    self.evaluate()
                done = (step - first_step) / (train.steps - first_step)
                left = (time.monotonic() - started) * (1 - done) / done
                if logged:
                    self.loggers.log(step, self._metrics(stats, seconds, left))
                every = self.config.checkpoint.every
                if every and step % every == 0 and step < train.steps:
                    self.save()
        if self.saved_step != self.progress.step:
            self.save()
        self.checkpointer.wait()

    def save(self) -> None:
        """Save everything that the next step depends on."""
        extra = {
            "config": self.config.resolved,
            "model_config": self.engine.model.config.to_dict(),
            "engine": self.engine.state_dict(),
            "data": self.batches.state_dict(),
            "progress": vars(self.progress),
            "placement": {
                "num_ranks": self.placement.num_ranks,
                "home": self.placement.home_LE.tolist(),
            },
        }
        extra = json.loads(json.dumps(extra, default=str))  # the model's dtypes become text
        if self.living is not None and self.living.every:
            self.living.save(self.progress.step, self.config.checkpoint.keep)
        self.checkpointer.save(self.progress.step, self.engine.model, self.engine.optimizer, extra)
        self.saved_step = self.progress.step

    def evaluate(self) -> dict[str, float]:
        """Validation loss (nats per token) and bits per byte, over all ranks.

        Of `eval_batches` batches of sequences at equal distances through the validation split.
        """
        dataset, train, world = self.data.validation, self.config.train, self.mesh.world_size
        if dataset is None:
            return {}
        ids = dataset.spread(train.eval_batches * train.batch_size)
        per_round = train.micro_batch_size * world
        total = torch.zeros(2, dtype=torch.float64)
        with collect_routing() as routing:
            for start in range(0, len(ids), per_round):
                mine = ids[start : start + per_round][self.mesh.rank :: world]
                total += self.engine.eval_step(dataset.batch(mine, pad_to=train.micro_batch_size))
        nats, tokens = total.tolist()
        experts = moe_layers(self.engine.model)[0][1].num_experts
        self.validation = {
            "validation/loss": nats / max(1.0, tokens),
            "validation/bits_per_byte": nats * BITS_PER_NAT / max(1, dataset.label_bytes(ids)),
            **self.validation_routing.measure(routing, experts, self.mesh),
        }
        return self.validation

    def _step(self) -> StepStats:
        train, progress = self.config.train, self.progress
        ids, living = self.batches.next(), self.living
        if living is not None and living.assigner is not None:
            ids = living.assigner.order(ids)
        micro_batches = self.data.train.micro_batches(
            ids, self.mesh.rank, self.mesh.world_size, train.micro_batch_size
        )
        with seeded(self.config.seed, f"step {progress.step} rank {self.mesh.rank}"):
            every = train.time_layers_every
            timed = bool(every) and (progress.step + 1) % every == 0
            every = train.record_routing_every
            recorded = bool(every) and (progress.step + 1) % every == 0
            counted = living is not None and living.due(progress.step + 1)
            with collect_routing(recorded or counted) as routing:
                stats = self.engine.train_step(micro_batches, time_layers=timed)
        progress.step += 1
        for line in self.slow_ranks.step(stats.row_s):
            if self.mesh.rank == 0:
                print(line, flush=True)
        if recorded:
            path = Path(self.config.run.dir) / f"routing/step-{progress.step:08}.npz"
            experts = stats.counts_LE.shape[1]
            save_routing(path, routing, micro_batches, self.data.train, self.mesh, experts)
        if living is not None and counted:
            living.recorder.record(routing, micro_batches, self.data.train)
        if not stats.finite:
            self._nonfinite(stats, ids)
            return stats
        progress.tokens += int(stats.metrics["train/tokens"])
        progress.rows += int(stats.metrics["moe/rows"])
        progress.rows_crossing += int(stats.metrics["moe/rows_crossing"])
        if progress.first_load_ratio is None:
            progress.first_load_ratio = stats.metrics["moe/load_ratio"]
            progress.first_load_ratio_home = stats.metrics["moe/load_ratio_home"]
            progress.first_max_violation = global_violation(stats)
        return stats

    def _nonfinite(self, stats: StepStats, ids: list[int]) -> None:
        """Keep the batch's ids; then stop, or count the skipped step, as configured."""
        path = Path(self.config.run.dir) / f"nonfinite-step-{self.progress.step}.json"
        loss, norm = stats.metrics["train/loss"], stats.metrics["train/grad_norm"]
        if self.mesh.rank == 0:
            content = {"step": self.progress.step, "loss": str(loss), "grad_norm": str(norm)}
            path.write_text(json.dumps({**content, "sequence_ids": ids}) + "\n")
        self.progress.skipped += 1
        if self.config.train.on_nonfinite is OnNonfinite.stop:
            raise NonFiniteError(
                f"step {self.progress.step}: loss {loss}, gradient norm {norm}; the step was not "
                f"applied. Its sequence ids are in {path}. Set train.on_nonfinite=skip to go on"
            )

    def _metrics(self, stats: StepStats, seconds: float, left: float) -> dict[str, float]:
        metrics = dict(stats.metrics)
        tokens_per_s = metrics["train/tokens"] / seconds
        metrics["speed/tokens_per_s"] = tokens_per_s
        metrics["speed/tokens_per_s_per_rank"] = tokens_per_s / self.mesh.world_size
        metrics["speed/step_s"] = seconds
        metrics["speed/left_s"] = left
        if self.config.cluster.flops:
            flops = self.flops_per_token * tokens_per_s / self.mesh.world_size
            metrics["speed/model_flops_utilisation"] = flops / self.config.cluster.flops
        metrics["speed/slowest_rank_ratio"] = self.slow_ranks.ratio
        metrics["memory/bytes"] = memory_bytes(self.mesh.device)
        metrics["moe/max_violation_global"] = global_violation(stats)
        metrics["moe/dead_experts"] = float(dead_experts(stats.counts_LE))
        for layer, counts_E in enumerate(stats.counts_LE):
            metrics[f"layer/{layer}/max_violation"] = max_violation(counts_E)
        metrics["moe/moved_experts"] = float(self.progress.moved_experts)
        metrics["train/skipped_steps"] = float(self.progress.skipped)
        metrics.update(self.validation)
        self.last = metrics
        return metrics

    def _record(self, history: History, stats: StepStats) -> None:
        engine = self.engine
        history.record(
            observe(
                self.progress.step,
                stats.counts_LE,
                engine.model,
                engine.last_decisions,
                self.mesh.ep_size,
            )
        )

    def _must_stop(self, started: float) -> bool:
        limit = self.config.train.stop_after_s
        late = limit is not None and time.monotonic() - started > limit
        stop = float(self.signalled or late)
        return agree(stop, self.mesh.dp_group, self.mesh.device) > 0

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after the current step, with a checkpoint."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.signalled:  # asked twice: now
                raise KeyboardInterrupt
            self.signalled = True

        before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def global_violation(stats: StepStats) -> float:
    """MaxVio of the global batch, mean over layers."""
    values = [max_violation(counts_E) for counts_E in stats.counts_LE]
    return sum(values) / len(values)
