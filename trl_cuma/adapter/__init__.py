# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The PEFT method CUMA: config, layers, router, losses. Knows torch, transformers, peft; nothing of trl or data."""

from .changing import grow_experts, reset_router
from .config import CuMAConfig
from .model import CuMAModel
from .router import compute_gates

__all__ = ["CuMAConfig", "CuMAModel", "compute_gates", "grow_experts", "reset_router"]
