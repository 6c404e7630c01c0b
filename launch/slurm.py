"""An sbatch script: a torchrun per node; at its time limit it saves and queues itself again."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from configs.launch_schema import Job, SlurmValues
from launch.findings import (
    WRITTEN,
    Finding,
    file_finding,
    folder_finding,
    names_findings,
    note,
    ok,
    pattern_findings,
    problem,
    write_file,
)
from launch.plan import Plan, this_python

# sbatch splits and unquotes its #SBATCH lines by rules of its own
DIRECTIVE = r"[A-Za-z0-9_./:@%+=,~-]+"
DIRECTIVE_WORDS = "letters, digits and _ . / : @ % + = , ~ -, as it becomes an #SBATCH line"
TIME = r"(\d+-)?\d{1,3}:\d\d:\d\d"
MEMORY = r"\d+[KMGT]?"
NOTICE_S = 30  # from the signal to the ranks, and from their last word to the limit

MEET = """\
# Where the nodes meet. A port of the job's own: other jobs may share the node.
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
host=${{host%%$'\n'*}}
port={port}
"""

MEET_ELSEWHERE = """\
# Where the nodes meet: `python -m launch.store {port}` runs there.
host={host}
port={port}
"""

RUN = """\
# Before the time limit Slurm sends USR1 to this script alone: the ranks save and end, and the job
# is queued again. TERM (scancel, preemption) reaches the ranks too, but nothing is queued.
step=
signals=0
requeue=no
forward() {{
    signals=$((signals + 1))
    kill -TERM "$step" 2>/dev/null || true
}}
trap 'requeue=yes; forward' USR1
trap forward TERM

srun --kill-on-bad-exit=1 --cpus-per-task={cpus} --open-mode=append \\
    --output={logs} \\
    {command} &
step=$!

# A signal ends `wait` early: wait until there was none.
seen=-1
while [ "$seen" != "$signals" ]; do
    seen=$signals
    code=0
    wait "$step" || code=$?
done
if [ "$requeue" = yes ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclass(frozen=True)
class Slurm(SlurmValues):
    """A script for sbatch, submitted if wanted. Nodes are taken to share this machine's files."""

    is_here: ClassVar[bool] = False
    sees_files: ClassVar[bool] = True

    def findings(self, plan: Plan) -> list[Finding]:
        """The script's values, its files, sbatch, the environment."""
        names = ("name", "partition", "account", "rdzv_host")
        values = {f"launcher.{name}": getattr(self, name) for name in names}
        values["launcher.logs (absolute)"] = str(Path(self.logs).absolute())
        values |= {f"launcher.options[{n}]": option for n, option in enumerate(self.options)}
        found = pattern_findings(values, DIRECTIVE, DIRECTIVE_WORDS)
        found += pattern_findings(
            {"launcher.time": self.time}, TIME, "[DAYS-]HOURS:MINUTES:SECONDS, such as 1-12:00:00"
        )
        found += pattern_findings({"launcher.memory": self.memory}, MEMORY, "a number and K M G T")
        if self.cpus_per_rank < 1:
            text = f"launcher.cpus_per_rank ({self.cpus_per_rank}) must be >= 1"
            found.append(problem("values", text))
        found += names_findings(plan.names)
        found += [
            file_finding("launcher.file", self.file),
            folder_finding("launcher.logs", self.logs),
            self._time(plan),
        ]
        if plan.cuda:
            found.append(note("device", f"{plan.ranks_per_node} GPUs are asked for on every node"))
        if not self.submit:
            found.append(note("sbatch", f"not submitted: sbatch {self.file} does it"))
        elif shutil.which("sbatch") is None:
            text = "launcher.submit (true): there is no sbatch here; leave it out, and submit"
            found.append(problem("sbatch", f"{text} {self.file} where there is one"))
        return found

    def text(self, plan: Plan) -> str:
        """The script."""
        parts = ["#!/bin/bash", WRITTEN, *self._directives(plan), "set -eo pipefail", ""]
        parts += [f"cd {shlex.quote(str(Path.cwd()))}", *self.setup]
        parts += [f': "${{{name}:?is not set where sbatch was called}}"' for name in plan.names]
        parts += [f"export {name}={shlex.quote(value)}" for name, value in plan.environment.items()]
        parts.append("")
        if plan.config.job is Job.train:
            parts.append(self._meet(plan))
        logs = shlex.quote(str(Path(self.logs).absolute() / "%x-%j-%N.log"))
        parts.append(RUN.format(cpus=self._cpus(plan), logs=logs, command=self._command(plan)))
        return "\n".join(parts)

    def launch(self, plan: Plan) -> int:
        """Write the script and, if wanted, submit it; the exit code of sbatch."""
        Path(self.logs).mkdir(parents=True, exist_ok=True)
        write_file(self.file, self.text(plan))
        print(f"written to {self.file}")
        return subprocess.run(["sbatch", self.file], check=False).returncode if self.submit else 0

    def _directives(self, plan: Plan) -> list[str]:
        config = plan.config
        options = {
            "job-name": self.name,
            "nodes": config.nodes,
            "ntasks-per-node": 1,
            "gpus-per-node": plan.ranks_per_node if plan.cuda else None,
            "cpus-per-task": self._cpus(plan),
            "mem": self.memory,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "signal": f"B:USR1@{config.grace_s + NOTICE_S}",
            "open-mode": "append",
            "output": f"{Path(self.logs).absolute()}/%x-%j.log",
        }
        lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
        return [f"#SBATCH {line}" for line in [*lines, "--requeue", *self.options]]

    def _cpus(self, plan: Plan) -> int:
        return self.cpus_per_rank * plan.ranks_per_node

    def _meet(self, plan: Plan) -> str:
        port = plan.config.rdzv_port
        if self.rdzv_host is None:
            own = "$((20000 + SLURM_JOB_ID % 20000))"
            return MEET.format(port=own if port is None else port)
        return MEET_ELSEWHERE.format(host=shlex.quote(self.rdzv_host), port=port or 29400)

    def _command(self, plan: Plan) -> str:
        """The command of a node, quoted word by word; $host and $port are the script's own."""
        words = plan.command(
            self.python or this_python(),
            endpoint="HOST:PORT",
            is_host=None if self.rdzv_host is None else False,
            rendezvous_id="ID",
        )
        own = {
            "--rdzv-endpoint=HOST:PORT": '"--rdzv-endpoint=$host:$port"',
            "--rdzv-id=ID": '"--rdzv-id=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
        }
        end = len(words) - len(plan.words)  # whatever an override says, it is quoted
        ours = [own.get(word) or shlex.quote(word) for word in words[:end]]
        return " \\\n    ".join([*ours, *map(shlex.quote, words[end:])])

    def _time(self, plan: Plan) -> Finding:
        """Whether there is time to train before it is time to save."""
        text = f"{plan.config.grace_s + NOTICE_S} s before its limit ({self.time})"
        if not re.fullmatch(TIME, self.time):
            return note("time", "not read")
        days, _, clock = self.time.rpartition("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        limit = int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
        if limit <= plan.config.grace_s + NOTICE_S:
            return problem("time", f"the job would save {text}; raise launcher.time")
        return ok("time", f"the job saves and queues itself again {text}")
