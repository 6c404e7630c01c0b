"""Train a model: `torchrun --nproc-per-node N -m trainer.train experiment=quickstart`.

`--help` lists every group and value. A single process without torchrun works too.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from configs.compose import register, save_resolved, to_config
from configs.errors import COMPOSE_ERRORS, explain
from configs.schema import check
from configs.secrets import refuse_secrets

OUR_PACKAGES = {"trainer", "parallel", "placement", "configs", "__main__"}
ASKS_FOR_TEXT = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i"}
FULL_ERROR = "HYDRA_FULL_ERROR"
RANK_ZERO_SPEAKS_S = 5.0
EXIT_CONFIG, EXIT_RUN = 2, 1


class ConfigError(ValueError):
    """The configuration cannot be run; the message names key, value and remedy."""


def main() -> list[Path]:
    """Run or sweep what the command line says; errors of the user end in one message.

    Returns the folders of the runs.

    Every rank composes the same configuration; rank 0 speaks. The exit code is 2 for a
    configuration that is refused and 1 for a run that fails. With HYDRA_FULL_ERROR=1 the
    traceback is shown as well.
    """
    if _rank() and any(argument.partition("=")[0] in ASKS_FOR_TEXT for argument in sys.argv[1:]):
        return []
    full_error = os.environ.get(FULL_ERROR) == "1"
    os.environ[FULL_ERROR] = "1"  # Hydra then raises its errors instead of printing them
    register()
    folders: list[Path] = []

    @_one_message(full_error)
    def job(composed: DictConfig) -> None:
        folders.append(_job(composed))

    with _one_message(full_error):
        _refuse_secrets_in_sweeps(sys.argv[1:])
        # inside the job too: Hydra prints a line of its own about an error that leaves a job
        hydra.main(version_base="1.3", config_path="pkg://configs", config_name="config")(job)()
    from trainer.ranks import finish_ranks

    finish_ranks()
    return folders


def _job(composed: DictConfig) -> Path:
    """Check the configuration, save it with the run, train; the run's folder."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        _check_sweep_folder(composed)
        config = to_config(composed)
        check(config, world_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if _rank() == 0:
        save_resolved(config)
    from trainer.run import run

    run(config)
    return Path(config.run.dir)


def _refuse_secrets_in_sweeps(arguments: list[str]) -> None:
    """Hydra writes the overrides of a sweep to multirun.yaml as they are given."""
    if {"-m", "--multirun"} & set(arguments):
        try:
            refuse_secrets(arguments)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _check_sweep_folder(composed: DictConfig) -> None:
    """Refuse a sweep whose jobs would share a folder, and so resume each other's checkpoints."""
    if HydraConfig.get().mode is not RunMode.MULTIRUN:
        return
    folder = OmegaConf.to_container(composed.run, resolve=False)["dir"]  # type: ignore[call-overload,index]
    if "${sweep_job:}" not in folder:
        raise ValueError(
            f"run.dir ({folder}) must differ from job to job of a sweep; leave it out or write "
            f"'run.dir={folder}${{sweep_job:}}'"
        )


@contextmanager
def _one_message(full_error: bool) -> Iterator[None]:
    """Leave with the message and exit code of an error that is meant for the user."""
    try:
        yield
    except InstantiationException as error:
        _leave(error.__cause__ or error, EXIT_RUN, full_error)
    except (*COMPOSE_ERRORS, ConfigError) as error:
        _leave(error, EXIT_CONFIG, full_error)
    except (ValueError, RuntimeError) as error:
        if not _is_for_the_user(error):
            raise
        _leave(error, EXIT_RUN, full_error)


def _leave(error: BaseException, code: int, full_error: bool) -> None:
    """Print the error and exit; other ranks first give rank 0 the time to speak for them."""
    if _rank():
        time.sleep(RANK_ZERO_SPEAKS_S)  # the launcher ends this rank once rank 0 has left
        print(f"rank {_rank()}:", end=" ", file=sys.stderr)
    if full_error:
        traceback.print_exception(error)
    else:
        print(f"error: {explain(error)}", file=sys.stderr, flush=True)
        if code == EXIT_RUN:
            print(f"({FULL_ERROR}=1 shows where it was raised)", file=sys.stderr, flush=True)
    sys.exit(code)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _is_for_the_user(error: ValueError | RuntimeError) -> bool:
    """Whether the error is one of ours, or a ValueError that our own code raised."""
    if _is_ours(type(error).__module__):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return isinstance(error, ValueError) and _is_ours(where)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in OUR_PACKAGES


if __name__ == "__main__":
    main()
