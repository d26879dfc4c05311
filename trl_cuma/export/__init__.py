# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""From adapter to answers where no router runs: one plain LoRA per profile."""

from .bulk import export_profile, export_profiles
from .distill import Distillation

__all__ = ["Distillation", "export_profile", "export_profiles"]
