# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Answers of a trained adapter to the same prompts for many people.

    python examples/generate_by_profile.py --adapter runs/cuma --profiles people.csv \
        --prompt "What makes a good life?" --prompts more.jsonl --output answers.jsonl

`--profiles`: a CSV with a column for each field, or JSON lines with one object (field → value) each.
`--prompts`: JSON lines with `prompt` each, a text or a list of chat messages. `--prompt` may be given again. With a
tokenizer that has a chat template, a text is a user's message; without one, it is continued as it is.

Prompts and profiles are answered in batches that mix both; an answer doesn't depend on what stands beside it. The
output has a line for each pair: numbers of prompt and profile (from 1, in the files' order), the prompt, the answer,
its length in tokens, and whether the model ended it. It repeats no profile, and is written whole or not at all.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import trl_cuma  # noqa: F401  registers the method
from trl_cuma.evaluation.generation import generate_answers
from trl_cuma.generation.batches import has_chat_template
from trl_cuma.generation.loading import add_loading_arguments, add_model_arguments, check_model_paths, load_model
from trl_cuma.generation.profiles import check_profile
from trl_cuma.generation.tables import read_table
from trl_cuma.generation.vectors import demographic_table


def main(argv: list[str] | None = None) -> None:
    """Answer every prompt for every profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--profiles", type=Path, required=True, help="CSV or JSON lines")
    add("--prompt", action="append", default=[], help="a prompt; may be given again")
    add("--prompts", type=Path, default=None, help="JSON lines with `prompt`")
    add("--output", type=Path, required=True, help="JSON lines; a file that is not there yet")
    add("--max_new_tokens", type=int, default=256)
    add("--temperature", type=float, default=0.0, help="0 is greedy, the default")
    add("--top_p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--batch_size", type=int, default=16, help="answers at a time; default: 16")
    add_loading_arguments(parser)
    args = parser.parse_args(argv)
    check_model_paths(args.model, args.adapter)
    if args.output.exists() or not args.output.resolve().parent.is_dir():
        raise FileExistsError(f"`--output` {args.output} is there already, or its folder is not. Name a new file.")
    profiles = read_table(args.profiles, "--profiles")
    prompts = args.prompt + (
        [row.get("prompt") for row in read_table(args.prompts, "--prompts")] if args.prompts else []
    )
    if not prompts or not all(prompt and isinstance(prompt, str | list) for prompt in prompts):
        raise ValueError("A prompt is missing or no text. Give `--prompt`, or `--prompts` with `prompt` on each line.")
    loading = {name: getattr(args, name) for name in ("dtype", "load_in_4bit", "trust_remote_code")}
    model, tokenizer, _ = load_model(args.model, args.adapter, **loading)
    if has_chat_template(tokenizer):
        prompts = [[{"role": "user", "content": text}] if isinstance(text, str) else text for text in prompts]
    table = demographic_table(model)
    for number, profile in enumerate(profiles, start=1):
        for warning in check_profile(table, profile, f"Profile {number} of `--profiles`"):
            print(f"Warning: {warning}", file=sys.stderr)
    pairs = [(i, j) for i in range(len(prompts)) for j in range(len(profiles))]
    sampling = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "seed", "batch_size")}
    answers = generate_answers(
        model, tokenizer, [prompts[i] for i, _ in pairs], [profiles[j] for _, j in pairs], table=table, **sampling
    )
    rows = [
        {
            "prompt_number": i + 1,
            "profile_number": j + 1,
            "prompt": prompts[i],
            "answer": answers.texts[row][0],
            "tokens": int(answers.num_tokens[row, 0]),
            "finished": bool(answers.finished[row, 0]),
        }
        for row, (i, j) in enumerate(pairs)
    ]
    write_lines(args.output, rows)
    print(f"{len(prompts)} prompts for {len(profiles)} profiles: {len(rows)} answers in {args.output}.")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Beside the output first, so that it is there whole or not at all; its owner's alone."""
    handle, temporary = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"generate_by_profile.py: error: {error}")
