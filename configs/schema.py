"""The values that Evenkeel owns: typed, documented, checked before anything is built.

The text under a field is its documentation: `python -m trainer.train --help` and
docs/configuration.md print it. `check` (configs/rules.py) holds every bound and every rule
between fields.
Slots with several implementations (engine, planner, placement, balance, logger, sources and
tokenizer of the data) are `_target_` nodes instead; configs/slots.py checks them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING, OmegaConf

from configs.rules import check
from configs.secrets import masked
from configs.upcycle_schema import RecipeConfig

__all__ = ["Config", "check"]


class Precision(Enum):
    """Number format of the forward and backward pass; master weights stay fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class ActivationCheckpointing(Enum):
    """What the backward pass computes again instead of keeping it in memory."""

    none = "none"
    full = "full"


class OnNonfinite(Enum):
    """What a NaN or infinite loss or gradient does to the run."""

    stop = "stop"
    skip = "skip"


class Schedule(Enum):
    """Shape of the learning rate after the warm-up."""

    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"


class PlacementObjective(Enum):
    """What a placement of experts is judged by, in seconds of the MoE layers."""

    home = "home"
    batched = "batched"
    affinity = "affinity"
    moetuner = "moetuner"
    load = "load"


class InvalidUtf8(Enum):
    """What happens to bytes of the corpus that are not UTF-8."""

    replace = "replace"
    refuse = "refuse"


@dataclass
class RunConfig:
    """Name and place of a run."""

    name: str = "evenkeel"
    """Name of the run: letters, digits and `. _ -`."""
    dir: str = "runs/${run.name}"
    """Folder of the run: resolved config, metrics, checkpoints, export. A relative path starts
    where the command was started. In a sweep it must differ from job to job."""


@dataclass
class MeshConfig:
    """How the ranks are arranged."""

    ep: int | None = None
    """Ranks of an expert-parallel group, a divisor of the number of ranks and of the number of
    experts. null: the largest such divisor."""
    ranks_per_node: int | None = None
    """Ranks that share a node, a divisor of the number of ranks. null: as torchrun says."""
    timeout_s: float = 60.0
    """Seconds after which a rank that does not answer ends the run; longer than any is late."""


@dataclass
class TrainConfig:
    """The training loop."""

    steps: int = MISSING
    """Optimizer steps of the whole run."""
    batch_size: int = MISSING
    """Sequences per optimizer step, over all ranks: a multiple of ranks x micro_batch_size."""
    micro_batch_size: int = MISSING
    """Sequences per rank and forward pass; less needs less memory and changes no number."""
    seq_len: int = MISSING
    """Tokens per sequence."""
    precision: Precision = Precision.fp32
    """Number format of the forward and backward pass; master weights stay fp32."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    """full: compute activations again in the backward pass, for less memory and more time."""
    refetch_borrowed: bool = False
    """Drop the weights of borrowed experts after the forward pass and fetch them again for the
    backward pass: less memory, one more journey."""
    dispatch_chunks: int = 1
    """Parts of a layer's rows whose journeys and products overlap. 0: chosen for every layer from
    times measured in the first steps."""
    compile: bool = False
    """Compile the decoder layers with torch.compile, where it works."""
    max_grad_norm: float = 1.0
    """Norm to which larger gradients are scaled down. 0: off."""
    eval_every: int = 0
    """Steps between validations. 0: only at the end."""
    eval_batches: int = 8
    """Batches of batch_size sequences per validation. 0: the whole validation split."""
    log_every: int = 1
    """Steps between two lines of metrics."""
    time_layers_every: int = 0
    """Steps between two timings of the phases of the MoE layers, which slow that step. 0: off."""
    record_routing_every: int = 0
    """Steps between two recordings of the routing to run.dir/routing, every token's experts in
    every layer. 0: off."""
    assign_sequences: bool = False
    """Give every rank those sequences of a batch whose experts it has, as far as the statistics
    tell: less traffic, the same losses to rounding."""
    allow_lookahead: bool = False
    """Allow routers that let a token's experts depend on later tokens of its sequence, which the
    model will not have when it generates."""
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    """A NaN or infinite loss or gradient: stop and save the ids of the batch, or skip the step
    and count it."""
    generate: int = 0
    """Tokens of sample text generated at the end. 0: none."""
    stop_after_s: float | None = None
    """Seconds of training after which the run saves and ends early. null: no limit."""


@dataclass
class StatsConfig:
    """Routing statistics, recorded while training: what placements are solved from."""

    every: int = 0
    """Steps between two recordings. 0: off. They are saved as run.dir/stats/step-<step>.npz with
    every checkpoint."""
    decay: float = 1.0
    """Factor on all counts before each recording, so that the past fades. 1: nothing fades."""
    by_token: bool = False
    """Also count which experts every token id chooses: what train.assign_sequences predicts by."""
    path: str | None = None
    """Statistics of an earlier run of the model, to begin with. null: none."""


@dataclass
class RelocateConfig:
    """Experts that move to better homes while training; the results do not change."""

    every: int = 0
    """Steps between two searches for a better placement, from the statistics. 0: never."""
    objective: PlacementObjective = PlacementObjective.home
    """home: traffic and load of training. batched: the same with train.assign_sequences. affinity:
    traffic between consecutive layers (ExFlow). moetuner: that and load. load: load alone."""
    load_weight: float | None = None
    """Weight of the seconds for which ranks wait for the busiest one. null: 1 with planner=home, 0
    with planners that even out the load."""
    pays_within: int | None = 100
    """Steps in which a move must earn the time that it takes. null: move whatever is better."""
    max_moves: int | None = None
    """Most experts that move at once, over all layers. null: no limit."""
    time_limit_s: float = 10.0
    """Seconds of a search at most; the other ranks wait for it."""


@dataclass
class CheckpointConfig:
    """Checkpoints and the exported model."""

    every: int = 0
    """Steps between checkpoints. 0: only at the end."""
    keep: int = 2
    """Newest complete checkpoints that are kept."""
    resume: str = "auto"
    """auto: from the newest complete checkpoint of run.dir, if there is one. none: from the
    start. Otherwise the path of a checkpoint."""
    asynchronous: bool = True
    """Write checkpoints while training goes on."""
    export: bool = True
    """Write the trained model as a Hugging Face directory at the end."""
    export_dir: str = "${run.dir}/export"
    """Folder of the exported model; must be empty or absent."""


@dataclass
class ModelConfig:
    """The model: a checkpoint to continue, or fresh weights of a family."""

    source: str | None = None
    """Path or hub id of a Hugging Face MoE to continue. null: fresh weights of `family`."""
    family: str | None = None
    """`model_type` of transformers, for fresh weights (qwen3_moe, mixtral, deepseek_v3, ...)."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the family's own configuration and their values; add one with
    `+model.overrides.<field>=<value>`."""
    upcycle: RecipeConfig = field(default_factory=RecipeConfig)
    """Make an MoE of the source, which is dense, while it is read (model=upcycle)."""


@dataclass
class PackConfig:
    """How documents fill sequences of a fixed length."""

    cross_documents: bool = False
    """Let the last token of a document predict the first of the next one."""
    reset_positions: bool = True
    """Count positions from 0 at the start of every document."""


@dataclass
class DataConfig:
    """The text: sources, tokenizer, split and packing."""

    sources: dict[str, Any] = field(default_factory=dict)
    """Sources of text by name, each a `_target_` node; all of them are mixed."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of each source in the mixture, by name; only their ratios count. Empty: by size."""
    tokenizer: Any = MISSING
    """The tokenizer, a `_target_` node; its vocabulary must fit the model."""
    validation_fraction: float = 0.05
    """Share of the documents that is kept out of training, split by file or document."""
    cache_dir: str | None = None
    """Folder for tokenized text that later runs use again. null: nothing is kept."""
    invalid_utf8: InvalidUtf8 = InvalidUtf8.replace
    """Bytes that are not UTF-8: replace and count them, or refuse the file."""
    num_bytes: int | None = None
    """Bytes of text to read at most from every source. null: all."""
    pack: PackConfig = field(default_factory=PackConfig)


@dataclass
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = MISSING
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of the running mean of gradients and of their squares."""
    eps: float = 1e-8
    """Added to the root of the squares."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases never decay."""
    decay_routers: bool = False
    """Let router weights decay as well."""
    only_routers: bool = False
    """Train routers alone and keep all else as it is: a warm-up of new routers over experts that
    differ. The run after it continues the exported model."""
    schedule: Schedule = Schedule.cosine
    """After the warm-up: constant, cosine down to min_lr_ratio, or wsd (constant, then linear
    down to min_lr_ratio over the last decay_steps)."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    decay_steps: int = 0
    """Steps of the final decay; with schedule wsd only."""
    min_lr_ratio: float = 0.1
    """Last learning rate as a share of the peak."""


@dataclass
class ClusterConfig:
    """The machines: their speeds, for metrics and planning, and their number, for simulation. They
    never change results."""

    num_nodes: int | None = None
    """Nodes, for placement.sweep. Training takes its nodes from the launcher and mesh, whatever
    this says."""
    ranks_per_node: int | None = None
    """Ranks on a node, for placement.sweep. Training uses mesh.ranks_per_node."""
    intra_gbps: float | None = None
    """Bandwidth of one rank to another on the same node, Gbit/s in one direction. null: measured
    at the start, if the planner or placer wants to know; placement.sweep needs it."""
    inter_gbps: float | None = None
    """Bandwidth of one rank to another node, Gbit/s in one direction. null: as above."""
    node_gbps: float | None = None
    """Bandwidth of all ranks of a node together to other nodes, Gbit/s in one direction, for
    placement.sweep. null: every rank has inter_gbps for itself."""
    flops: float | None = None
    """Peak floating-point operations per second of one rank at train.precision. null: measured
    for planner and placer, and no utilisation is reported; placement.sweep needs it."""
    latency_us: float | None = None
    """Time of an empty message between two nodes, microseconds. null: as intra_gbps."""
    memory_gib: float | None = None
    """Memory of one rank's GPU, GiB, for `python -m launch plan`, which needs it. null: unknown."""


@dataclass
class Config:
    """One run, complete."""

    seed: int = 0
    """Seed of every random number: weights, order of the data, sampling."""
    run: RunConfig = field(default_factory=RunConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stats: StatsConfig = field(default_factory=StatsConfig)
    relocate: RelocateConfig = field(default_factory=RelocateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    engine: Any = MISSING
    """Runs a whole optimizer step."""
    planner: Any = MISSING
    """Decides which rank computes which rows, for every layer of every micro-batch."""
    dispatcher: Any = MISSING
    """Brings tokens to the ranks that compute them, and the outputs back."""
    placement: Any = MISSING
    """Decides on which rank every expert lives."""
    router: Any = MISSING
    """Chooses the experts of every token by the logits of the family's router."""
    balance: dict[str, Any] = field(default_factory=dict)
    """Nudge the routers towards equal load; they act in the order given."""
    logger: dict[str, Any] = field(default_factory=dict)
    """Where metrics go."""

    @property
    def resolved(self) -> dict[str, Any]:
        """Every value as plain numbers, strings, lists and dicts, for saving; secrets are ***."""
        plain = OmegaConf.to_container(OmegaConf.structured(self), enum_to_str=True)
        assert isinstance(plain, dict)
        return {str(name): value for name, value in masked(plain).items()}
