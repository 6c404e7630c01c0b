"""Checkpoints are read without running what is in them.

torch.distributed.checkpoint keeps the table of tensors in a pickle, which could name any function.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

TABLE = ".metadata"
# All that a table of tensors is made of. Not BytesStorageMetadata: its values are pickles, too.
KNOWN = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


class SafeReader(FileSystemReader):
    """Reads tensors and nothing else.

    Raises:
        ValueError: for a table that names anything else.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / TABLE
        with path.open("rb") as file:
            try:
                metadata: Metadata = _TablesAlone(file).load()
            except pickle.UnpicklingError as error:
                raise ValueError(
                    f"checkpoint {path.parent}: {TABLE} is refused, {error}; it was not written by "
                    f"this trainer, or was changed since"
                ) from error
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TablesAlone(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")
