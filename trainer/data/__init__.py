"""Text to training batches: sources, tokenizers, packing, and a deterministic global order."""

from trainer.data.batches import GlobalBatches, Mixture, check_batch_size
from trainer.data.build import Data, build_data, load_data
from trainer.data.packing import PackedDataset
from trainer.data.sources import Document, Reading, Source
from trainer.data.tokenizers import Tokenizer, check_vocabulary

__all__ = [
    "Data",
    "Document",
    "GlobalBatches",
    "Mixture",
    "PackedDataset",
    "Reading",
    "Source",
    "Tokenizer",
    "build_data",
    "check_batch_size",
    "check_vocabulary",
    "load_data",
]
