"""What balancers and routers cost and buy: every choice on the same data, in the same order.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.balancing --plot docs/balancing.png

Trains a small byte-level MoE (model=tiny_sigmoid) with every choice and three seeds, on two CPU
ranks, and prints the table of `trainer.compare`. The text is the standard library (code, prose and
tables) in pieces of a few lines, of which every tenth is validated on: text like that of training,
as in the published comparisons, where whole files would be other text. Data, steps and seeds are
alike; so are active operations but for the choices whose rows per token differ, which the table
shows. Stopped and started again it goes on with what is missing. `--quick`: one seed, 40 steps;
`--steps 600 --only balance=none balance=loss_free balance=aux_loss`: a few choices, for longer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from trainer.data.sources import Reading
from trainer.data.stdlib import Stdlib

STEPS, QUICK_STEPS = 160, 40
CORPUS = "stdlib-pieces.jsonl"
BYTES, PIECE_CHARACTERS = 4_000_000, 1_000
COMMON = (
    "experiment=quickstart",
    "model=tiny_sigmoid",
    "data=jsonl",
    "data.sources.jsonl.domain_field=domain",
    "data.validation_fraction=0.1",
    "train.eval_batches=96",  # all of it
    "optim.min_lr_ratio=0.01",
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
        "balance.loss_free.final=0.001",
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


def pieces() -> Iterator[dict[str, str]]:
    """Whole lines of the standard library's documents, a piece of text at a time."""
    reading = Reading(validation_fraction=0, num_bytes=BYTES)
    for document in Stdlib().documents("train", reading):
        kept = ""
        for line in (document.text or "").splitlines(keepends=True):
            kept += line
            if len(kept) >= PIECE_CHARACTERS:
                yield {"text": kept, "domain": document.domain}
                kept = ""
        if kept:
            yield {"text": kept, "domain": document.domain}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.balancing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one seed and 40 steps")
    parser.add_argument("--steps", type=int, help=f"of every run; default {STEPS}")
    parser.add_argument(
        "--only", nargs="+", help="the choices whose first override is one of these"
    )
    parser.add_argument("--folder", type=Path, help="of the runs; default runs/balancing-STEPS")
    parser.add_argument("--json", type=Path, help="write the figures, a line per choice")
    parser.add_argument("--plot", type=Path, help="validation loss against MaxVio, as a picture")
    options = parser.parse_args()
    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    folder = options.folder or Path(f"runs/balancing-{steps}")
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / CORPUS
    corpus.write_text("".join(json.dumps(piece) + "\n" for piece in pieces()))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for choice in CHOICES:
        if options.only and choice[0] not in options.only:
            continue
        where = f"run.dir={folder}${{sweep_job:}}"
        length = f"train.steps={steps}", f"train.eval_every={steps // 2}"
        seeds = "seed=0" if options.quick else "seed=0,1,2"
        data = f"data.sources.jsonl.paths=[{corpus}]"
        overrides = [*COMMON, data, *length, where, seeds, *choice]
        subprocess.run([*torchrun, "-m", "trainer.train", "-m", *overrides], check=True)
    compare = [sys.executable, "-m", "trainer.compare", str(folder)]
    for name in ("json", "plot"):
        if getattr(options, name):
            compare += [f"--{name}", str(getattr(options, name))]
    subprocess.run(compare, check=True)


if __name__ == "__main__":
    main()
