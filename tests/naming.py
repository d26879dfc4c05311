# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Folders whose tests run only where they are named on the command line."""

from pathlib import Path

import pytest


def is_named(config: pytest.Config, folder: Path) -> bool:
    """Whether the command line names `folder`, or something in it."""
    start = config.invocation_params.dir
    paths = [(start / argument.partition("::")[0]).resolve() for argument in config.args]
    return any(path == folder or folder in path.parents for path in paths)
