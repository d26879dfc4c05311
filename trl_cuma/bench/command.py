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
    parser.add_argument("--workers", type=int, default=1, help="runs at once, each a process, and a GPU")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--worlds", type=int, nargs="+", default=None, help="other worlds than the suite's")
    parser.add_argument("--arms", nargs="+", default=None, help="these of the suite's arms only, by key")
    parser.add_argument(
        "--check",
        type=Path,
        default=None,
        metavar="RESULTS",
        help="published results.json: run --worlds with its settings, and say whether they come out as published",
    )
    parser.add_argument("--data", default=None, help="the file or folder that the suite's `data.path` stands for")
    args = parser.parse_args(argv)
    for name in ("workers", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {getattr(args, name)}.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from .check import check, read_published, table
    from .runner import Runner
    from .suite_file import read_suite
    from .summary import tables

    suite = read_suite(args.suite, worlds=args.worlds, arms=args.arms, data_path=args.data)
    published = None if args.check is None else read_published(args.check, suite)
    runner = Runner(suite, args.output_dir or Path("runs/bench") / args.suite.stem, args.workers, args.threads)
    if published is None:
        text = tables(runner, runner.run())
        runner.write("tables.md", text)
    else:
        text = table(suite, check(suite, published, runner.measure(published["chosen"])))
        runner.write("check.md", text)
    print(text)
    print(f"Runs and tables: {runner.output_dir}.")
    return 0
