# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`trl-cuma plan`: what a training run needs of a GPU, computed from the real model and adapter without weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence

from .options import Request, make_parser, read_request
from .report import as_json, render
from .setups import Plan, Planner

__all__ = ["Plan", "Planner", "Request", "as_json", "main", "make_parser", "read_request", "render"]


def main(args: Sequence[str]) -> int:
    """What `trl-cuma plan ARGS` does; prints the plan and returns 0."""
    if "-h" in args or "--help" in args:
        make_parser().print_help()
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that transformers and TRL use themselves
        request, wants_json = read_request(args)
        plan = Planner(request).plan()
    print(json.dumps(as_json(plan), indent=2) if wants_json else render(plan).removesuffix("\n"))
    return 0
