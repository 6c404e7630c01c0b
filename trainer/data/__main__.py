"""Write a corpus as megatron-core indexed datasets: `python -m trainer.data FOLDER [key=value]`.

Takes the same `data` groups and keys as training; every source and split becomes
`FOLDER/<source>.<split>.bin` and `.idx`, the tokenizer `FOLDER/tokenizer`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import OmegaConf

from configs.compose import composed
from configs.errors import COMPOSE_ERRORS, explain
from configs.schema import DataConfig
from configs.slots import slot_problems, slots
from trainer.data.build import build_data, source_readings, used_sources
from trainer.data.indexed import write_indexed
from trainer.data.sources import SPLITS
from trainer.data.tokenizers import TrainedBPE

EXAMPLE = "python -m trainer.data out data=jsonl data.sources.jsonl.paths='[corpus/*.jsonl.zst]'"


def main(arguments: list[str] | None = None) -> int:
    """Write the files and say what they hold; 1 if something in the request has to change."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.data", description=__doc__, epilog=f"Example: {EXAMPLE}"
    )
    parser.add_argument("folder", type=Path, help="where to write; made if missing")
    parser.add_argument("overrides", nargs="*", help="keys of the data group, as for training")
    given = parser.parse_args(arguments)
    try:
        write(given.folder, data_config(given.overrides))
    except (ValueError, *COMPOSE_ERRORS) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def data_config(overrides: list[str]) -> DataConfig:
    """The data group of the configuration that these overrides give.

    Raises:
        ValueError: for missing values and for slots that do not fit their target.
    """
    data = composed(*overrides).data
    missing = sorted(OmegaConf.missing_keys(data))
    if missing:
        raise ValueError(f"missing values: {', '.join(missing)}; give them as {missing[0]}=...")
    config = OmegaConf.to_object(data)
    assert isinstance(config, DataConfig)
    found = slots(dataclasses.asdict(config), "data")
    problems = [line for slot in found for line in slot_problems(*slot)]
    if problems:
        raise ValueError("\n".join(problems))
    return config


def write(folder: Path, config: DataConfig) -> None:
    """Write every source and split, and the tokenizer.

    Raises:
        ValueError: if files are in the way, or for what is wrong with sources or tokenizer.
    """
    tokenizer = instantiate(config.tokenizer, _convert_="all")
    if isinstance(tokenizer, TrainedBPE):
        tokenizer = build_data(config, seq_len=1).tokenizer
    given = instantiate(config.sources, _convert_="all")
    sources, weights = used_sources(given, config.weights or None)
    readings = source_readings(
        sources, weights, config.validation_fraction, config.invalid_utf8.value, config.num_bytes
    )
    if (folder / "tokenizer").exists():
        raise ValueError(f"{folder / 'tokenizer'} exists; remove it, or write to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        for split in SPLITS:
            prefix = folder / f"{name}.{split}"
            tokens = write_indexed(prefix, source.documents(split, readings[name]), tokenizer)
            print(f"{prefix}.bin: {tokens} tokens" if tokens else f"{prefix}: no documents")
    tokenizer.save_pretrained(folder / "tokenizer")
    print(f"{folder / 'tokenizer'}: {tokenizer.vocab_size} ids")


if __name__ == "__main__":
    sys.exit(main())
