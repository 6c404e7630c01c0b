"""What balancers and routers cost and buy: every choice on the same data, in the same order.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.balancing --plot docs/balancing.png

Trains a small byte-level MoE (model=tiny_sigmoid) on the standard library with every choice and
three seeds, on two CPU ranks, and prints the table of `trainer.compare`. Data, steps and seeds are
alike; so are active operations but for the choices whose rows per token differ, which the table
shows. Stopped and started again it goes on with what is missing. `--quick`: one seed, 40 steps.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

STEPS, QUICK_STEPS = 160, 40
COMMON = (
    "experiment=quickstart",
    "model=tiny_sigmoid",
    "train.eval_batches=8",
    "train.log_every=2",
    "train.generate=0",
    "checkpoint.every=0",
    "checkpoint.export=false",
)
CHOICES = (
    ("balance=none",),
    (
        "balance=loss_free",
        "balance.loss_free.rate=0.02",
        "balance.loss_free.schedule=linear",
        "balance.loss_free.final=0.0002",
        "balance.loss_free.steps=${train.steps}",
    ),
    ("router=zero_experts,null_experts", "balance=none", "router.coefficient=0.1"),
    ("balance=aux_loss", "balance.aux_loss.coefficient=0.01,0.1"),
    ("balance=loss_free", "balance.loss_free.rate=0.001,0.01"),
    ("router=group_balanced", "balance=none", "planner=home"),
    ("balance=aux_loss", "balance.aux_loss.coefficient=0.0001,0.001"),
    ("router=switch", "balance=aux_loss", "balance.aux_loss.coefficient=0.1"),
    ("balance=global_loss", "balance.global_loss.coefficient=0.1"),
    ("router=shared", "balance=loss_free", "balance.loss_free.rate=0.01"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.balancing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one seed and 40 steps")
    parser.add_argument("--steps", type=int, help=f"of every run; default {STEPS}")
    parser.add_argument("--folder", type=Path, help="of the runs; default runs/balancing-STEPS")
    parser.add_argument("--json", type=Path, help="write the figures, a line per choice")
    parser.add_argument("--plot", type=Path, help="validation loss against MaxVio, as a picture")
    options = parser.parse_args()
    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    folder = options.folder or Path(f"runs/balancing-{steps}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for choice in CHOICES:
        where = f"run.dir={folder}${{sweep_job:}}"
        length = f"train.steps={steps}", f"train.eval_every={steps // 2}"
        seeds = "seed=0" if options.quick else "seed=0,1,2"
        overrides = [*COMMON, *length, where, seeds, *choice]
        subprocess.run([*torchrun, "-m", "trainer.train", "-m", *overrides], check=True)
    compare = [sys.executable, "-m", "trainer.compare", str(folder)]
    for name in ("json", "plot"):
        if getattr(options, name):
            compare += [f"--{name}", str(getattr(options, name))]
    subprocess.run(compare, check=True)


if __name__ == "__main__":
    main()
