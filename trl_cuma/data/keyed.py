# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What is drawn for an id: the same on every machine, in every process and in whatever order ids come."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any


def keyed_digest(*key: Any) -> bytes:
    """16 bytes that look random and follow from the key alone: the seed, what is drawn, and for which id."""
    return blake2b("\0".join(map(str, key)).encode("utf-8", "surrogatepass"), digest_size=16).digest()
