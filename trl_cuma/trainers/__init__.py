# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""TRL's trainers for CuMA adapters. Each docstring says what the only change is."""

from .config import CuMADPOConfig, CuMAGRPOConfig, CuMAKTOConfig, CuMARewardConfig, CuMASFTConfig
from .dpo import CuMADPOTrainer
from .grpo import CuMAGRPOTrainer
from .kto import CuMAKTOTrainer
from .reward import CuMARewardTrainer
from .sft import CuMASFTTrainer

__all__ = [
    "CuMADPOConfig",
    "CuMADPOTrainer",
    "CuMAGRPOConfig",
    "CuMAGRPOTrainer",
    "CuMAKTOConfig",
    "CuMAKTOTrainer",
    "CuMARewardConfig",
    "CuMARewardTrainer",
    "CuMASFTConfig",
    "CuMASFTTrainer",
]
