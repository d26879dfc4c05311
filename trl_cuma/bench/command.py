# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`trl-cuma bench SUITE.yaml`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Run a suite, or what is left of it, and print its tables. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="trl-cuma bench",
        description="Train and measure every arm of a suite: the same data, grid and steps for each. What is done is "
        "kept: a suite that was cut off goes on where it was.",
        epilog="Example: trl-cuma bench benchmarks/suites/simulated.yaml --workers 2",
    )
    parser.add_argument("suite", type=Path, help="the suite's YAML file")
    parser.add_argument("--output_dir", type=Path, default=None, help="default: runs/bench/NAME, by the file's name")
    parser.add_argument("--workers", type=int, default=1, help="runs at once, each in a process of its own")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--worlds", type=int, nargs="+", default=None, help="other worlds than the suite's")
    parser.add_argument("--data", default=None, help="the file that the suite's `data.path` stands for")
    args = parser.parse_args(argv)
    for name in ("workers", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {getattr(args, name)}.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from .runner import Runner
    from .suite import read_suite
    from .summary import tables

    suite = read_suite(args.suite, worlds=args.worlds, data_path=args.data)
    runner = Runner(suite, args.output_dir or Path("runs/bench") / args.suite.stem, args.workers, args.threads)
    results = runner.run()
    text = tables(runner, results)
    runner.write("tables.md", text)
    print(text)
    print(f"Tables and results: {runner.output_dir}.")
    return 0
