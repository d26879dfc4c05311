# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`trl-cuma …`: the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Errors of the user's input are one line, without a traceback."""
    parser = argparse.ArgumentParser(prog="trl-cuma", description="Cultural Mixture of Adapters for TRL.")
    commands = parser.add_subparsers(dest="command", required=True)
    quickstart = commands.add_parser(
        "quickstart",
        help="train and measure CuMA against LoRA on a small survey, on CPU, offline",
        description="Simulates a survey (or reads GlobalOpinionQA), pretrains a small model, trains LoRA and CuMA "
        "on it by SFT and DPO, and prints what each gained. Writes tables, figures and adapters.",
    )
    quickstart.add_argument(
        "--output_dir", type=Path, default=None, help="default: runs/quickstart, or runs/global-opinions with --data"
    )
    quickstart.add_argument("--seed", type=int, default=0, help="of the world, the model and the training")
    quickstart.add_argument("--data", type=Path, default=None, help="a GlobalOpinionQA file instead of a simulation")
    quickstart.add_argument("--encoder", default=None, help="id or path of a sentence encoder for the profiles")
    quickstart.add_argument(
        "--rejected",
        choices=("uniform", "reference"),
        default="uniform",
        help="where DPO's rejected options come from",
    )
    quickstart.add_argument(
        "--stage",
        choices=("all", "prepare"),
        default="all",
        help="prepare: only make the model and the data that the recipes name",
    )
    args = parser.parse_args(argv)
    try:
        return _quickstart(args)
    except (OSError, ValueError, ImportError) as error:
        print(f"trl-cuma: error: {error}", file=sys.stderr)
        return 2


def _quickstart(args: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warn of every process that is forked
    from .quickstart import run_quickstart

    output_dir = args.output_dir or Path("runs") / ("quickstart" if args.data is None else "global-opinions")
    run_quickstart(
        output_dir,
        seed=args.seed,
        data=args.data,
        encoder=args.encoder,
        rejected=args.rejected,
        prepare_only=args.stage == "prepare",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
