# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""One report for all tests that read it: drawing its figures takes seconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from trl_cuma.evaluation.report import write_report


@pytest.fixture(scope="session")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_report", Path(__file__).with_name("example.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", params=["small", pytest.param("large", marks=pytest.mark.slow)])
def report(example: ModuleType, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    evaluation = example.evaluation(*example.SIZES[request.param])
    return write_report(evaluation, tmp_path_factory.mktemp("report") / "new" / "folder")
