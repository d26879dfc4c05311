# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""TRL's trainers for CuMA adapters. Each docstring says what the only change is."""

from .config import CuMADPOConfig, CuMASFTConfig
from .dpo import CuMADPOTrainer
from .sft import CuMASFTTrainer

__all__ = ["CuMADPOConfig", "CuMADPOTrainer", "CuMASFTConfig", "CuMASFTTrainer"]
