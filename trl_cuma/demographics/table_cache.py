# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A table's vectors on disk: one safetensors file per encoder state, hashed keys and vectors only."""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file


class TableCache:
    """
    The cached rows of one encoder: `keys` `(rows, 32)` uint8 and `vectors` `(rows, dim)` float32.

    A write replaces the file in one step. Processes that write at once cannot corrupt it; the last one wins, and what
    another had added in between is encoded again some time. Readable by its owner alone.

    Args:
        folder (`Path`): Made if it is not there.
        fingerprint (`str`): The encoder's; names the file, so that another encoder, revision or state has its own.
        dim (`int`): The length of a row.
    """

    def __init__(self, folder: Path, fingerprint: str, dim: int) -> None:
        self.fingerprint = fingerprint
        self.dim = dim
        self.path = folder / f"profiles-{hashlib.sha256(fingerprint.encode()).hexdigest()[:32]}.safetensors"

    def read(self, wanted: Collection[bytes]) -> dict[bytes, torch.Tensor]:
        """The cached rows among `wanted`; nothing, with a warning, if the file is damaged or of another encoder."""
        return {key: row for key, row in self._read_all().items() if key in wanted}

    def write(self, rows: Mapping[bytes, torch.Tensor]) -> None:
        """Add rows to the file, or warn where the folder cannot be written."""
        rows = self._read_all() | dict(rows)
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, 32),
            "vectors": torch.stack(list(rows.values())),
        }
        temporary = None
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.stem}-", suffix=".tmp")
            os.close(handle)
            save_file(tensors, temporary, metadata={"fingerprint": self.fingerprint})
            os.replace(temporary, self.path)
        except (OSError, SafetensorError) as error:
            warnings.warn(f"The demographic cache {self.path} could not be written: {error}", stacklevel=2)
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def _read_all(self) -> dict[bytes, torch.Tensor]:
        if not self.path.exists():
            return {}
        try:
            content = self.path.read_bytes()  # opened once: safe_open opens twice, and may meet two versions
            tensors = load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            if header.get("__metadata__", {}).get("fingerprint") != self.fingerprint:
                raise ValueError("it belongs to another encoder")
            keys, vectors = tensors["keys"], tensors["vectors"]
            expected = (torch.uint8, (len(keys), 32), torch.float32, (len(keys), self.dim))
            if (keys.dtype, tuple(keys.shape), vectors.dtype, tuple(vectors.shape)) != expected:
                raise ValueError("its tensors have other shapes or types")
            if not vectors.isfinite().all():
                raise ValueError("its vectors are not finite")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            warnings.warn(f"The demographic cache {self.path} is ignored and rebuilt: {error}", stacklevel=2)
            return {}
        return {bytes(key): row for key, row in zip(keys.numpy(), vectors, strict=True)}
