# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`trl-cuma …`: the command line."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arguments import METHODS, TrainingParser, launch_options, read_recipe

# Subcommand → its module and function, imported when it is called, and what `--help` says of it.
COMMANDS = {
    "plan": (".planning", "main", "how much GPU memory a run needs under each engine, and what fits"),
    "prepare": (".data.command", "main", "convert WorldValuesBench, Community Alignment, PRISM or GlobalOpinionQA"),
    "chat": (".generation.chat", "main", "talk to a model as one or several people"),
    "evaluate": (".evaluation.command", "main_evaluate", "measure a model on people and questions that were held out"),
    "compare": (".evaluation.command", "main_compare", "put evaluations side by side, with paired intervals"),
    "export": (".export.command", "main", "turn an adapter into one plain LoRA per profile, for any engine"),
    "card": (".evaluation.card", "main", "write an adapter's model card, with what was measured"),
    "bench": (".bench.command", "main", "train and measure baselines and CuMA by the same recipe"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Errors of the user's input are one line, without a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="trl-cuma", description="Cultural Mixture of Adapters for TRL.")
    commands = parser.add_subparsers(dest="command", required=True)
    for method, name in METHODS.items():  # for the list in `--help`; `_train` parses them itself
        commands.add_parser(method, help=f"train by {name}, as `trl {method}` does, with CuMA's arguments too")
    for name, (_, _, what) in COMMANDS.items():
        commands.add_parser(name, help=what)
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
    command = argv[0] if argv and argv[0] in (*METHODS, *COMMANDS) else None
    try:
        if command in COMMANDS:
            module, function, _ = COMMANDS[command]
            return getattr(importlib.import_module(module, __package__), function)(argv[1:])
        return _train(command, argv[1:]) if command else _quickstart(parser.parse_args(argv))
    except (OSError, ValueError, ImportError) as error:
        print(f"trl-cuma{f' {command}' if command else ''}: error: {error}", file=sys.stderr)
        return 2


def _train(method: str, args: Sequence[str]) -> int:
    """
    Start `trl_cuma.scripts` by `accelerate launch`, as `trl METHOD` starts TRL's scripts. Keys are checked here,
    before any process starts; values in the script, since making `TrainingArguments` takes hold of a device.
    """
    import trl_cuma

    parser = TrainingParser(
        getattr(trl_cuma, f"CuMA{METHODS[method]}Config"),
        prog=f"trl-cuma {method}",
        epilog="Also accelerate's own, such as --num_processes (see `accelerate launch --help`), and "
        "--accelerate_config: a file, or single_gpu, multi_gpu, fsdp1, fsdp2, zero1, zero2 or zero3.",
    )
    options = {name: action for name, action in launch_options().items() if name not in parser.known}
    launch, script_args = _split(args, options)
    recipe, rest = read_recipe(script_args)
    parser.read(recipe, rest, elsewhere=options)
    of_recipe = {key: value for key, value in recipe.items() if key in options}
    return _launch({**of_recipe, **launch}, [method, *script_args], options)


def _split(args: Sequence[str], options: dict[str, argparse.Action]) -> tuple[dict[str, Any], list[str]]:
    """Part a command line into what `accelerate launch` reads, by name, and the script's arguments."""
    launch, script_args = {}, []
    rest = iter(args)
    for arg in rest:
        name, has_value, value = arg.removeprefix("--").partition("=")
        action = options.get(name.replace("-", "_")) if arg.startswith("--") else None
        if action is None:
            script_args.append(arg)
        elif action.nargs == 0:
            launch[name.replace("-", "_")] = True
        else:
            launch[name.replace("-", "_")] = value if has_value else next(rest, "")
    return launch, script_args


def _launch(launch: dict[str, Any], script: Sequence[str], options: dict[str, argparse.Action]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    args = []
    for name, value in launch.items():
        if options[name].nargs != 0:
            args += [f"--{name}", str(value)]
        elif value:  # a switch, which a recipe may also set to false
            args.append(f"--{name}")
    args = resolve_accelerate_config_argument(args)
    args = launch_command_parser().parse_args([*args, "--module", "trl_cuma.scripts", *script])
    try:
        launch_command(args)
    except (subprocess.CalledProcessError, ChildFailedError) as error:
        # The script has said what went wrong; where it stood in the launcher helps nobody.
        one_process = isinstance(error, subprocess.CalledProcessError)
        code = error.returncode if one_process else error.get_first_failure()[1].exitcode
        print(f"trl-cuma {script[0]}: the training process failed (exit code {code}).", file=sys.stderr)
        return code if code > 0 else 1
    return 0


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
