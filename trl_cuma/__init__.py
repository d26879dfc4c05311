# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
trl_cuma: Cultural Mixture of Adapters for TRL.

Importing this package registers the PEFT method `CUMA`: `get_peft_model(model, CuMAConfig(...))` and
`PeftModel.from_pretrained` then work. The trainers and the export are imported on first use, since TRL and others take
seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .adapter import CuMAConfig, CuMAModel, compute_gates, grow_experts, reset_router
from .demographics import (
    DemographicProfile,
    DemographicTable,
    FieldEncoder,
    TextEncoder,
    encoder_from_state,
    load_demographic_encoder,
)

if TYPE_CHECKING:
    from .export import export_profile, export_profiles
    from .trainers import (
        CuMADPOConfig,
        CuMADPOTrainer,
        CuMAGRPOConfig,
        CuMAGRPOTrainer,
        CuMAKTOConfig,
        CuMAKTOTrainer,
        CuMARewardConfig,
        CuMARewardTrainer,
        CuMASFTConfig,
        CuMASFTTrainer,
    )

__version__ = "0.1.0"

__all__ = [
    "CuMAConfig",
    "CuMADPOConfig",
    "CuMADPOTrainer",
    "CuMAGRPOConfig",
    "CuMAGRPOTrainer",
    "CuMAKTOConfig",
    "CuMAKTOTrainer",
    "CuMAModel",
    "CuMARewardConfig",
    "CuMARewardTrainer",
    "CuMASFTConfig",
    "CuMASFTTrainer",
    "DemographicProfile",
    "DemographicTable",
    "FieldEncoder",
    "TextEncoder",
    "compute_gates",
    "encoder_from_state",
    "export_profile",
    "export_profiles",
    "grow_experts",
    "load_demographic_encoder",
    "reset_router",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # the others are there already
        return getattr(import_module(".export" if name.startswith("export") else ".trainers", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
