# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Baselines by the same recipe: what CuMA is compared with, and how. `trl-cuma bench SUITE.yaml`."""

from .arms import METHODS, Arm, Reference
from .runner import Runner
from .suite import Suite
from .suite_file import read_suite

__all__ = ["METHODS", "Arm", "Reference", "Runner", "Suite", "read_suite"]
