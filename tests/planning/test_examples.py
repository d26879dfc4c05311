# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The worked examples: each plan is what its command prints. With CUMA_UPDATE_PLANS=1 they are written anew."""

import os
import re
import shlex
from pathlib import Path

import pytest

from trl_cuma.cli import main
from trl_cuma.planning import Planner, read_request

ROOT = Path(__file__).parents[2]
README = ROOT / "recipes" / "plans" / "README.md"
BLOCK = re.compile(r"```bash\n(trl-cuma plan .*?)\n```\n\n```text\n(.*?)```", re.DOTALL)


def examples() -> list[tuple[str, str]]:
    """Commands and what they printed."""
    return BLOCK.findall(README.read_text())


def arguments(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", " "))[2:]


def test_there_is_one_of_each() -> None:
    commands = " ".join(command for command, _ in examples())
    names = (
        "recipes/qwen3-8b/",
        "meta-llama/Llama-3.1-8B",
        "Llama-3.1-70B",
        "bigscience/bloomz-7b1",
        "bigscience/bloom ",
    )
    assert all(name in commands for name in names)


# The first of each model: the line that counts its parameters begins with its name.
FIRST = {printed.split(" layers)")[0]: (command, printed) for command, printed in reversed(examples())}


@pytest.mark.parametrize("model", sorted(FIRST))
def test_commands_parse_and_the_counts_are_right(monkeypatch, model: str) -> None:
    command, printed = FIRST[model]
    monkeypatch.chdir(ROOT)
    request, _ = read_request(arguments(command))
    planner = Planner(request)
    assert f"{planner.parameters:,} parameters" in printed
    assert f"{sum(p.numel for p in planner.model.trained):,} trainable parameters" in printed


@pytest.mark.slow
def test_printed_plans_are_what_the_commands_print(monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)  # where the commands' paths begin
    text = README.read_text()
    for command, printed in examples():
        assert main(["plan", *arguments(command)]) == 0
        now = capsys.readouterr().out
        if os.environ.get("CUMA_UPDATE_PLANS"):
            text = text.replace(f"{command}\n```\n\n```text\n{printed}```", f"{command}\n```\n\n```text\n{now}```")
        else:
            assert now == printed, command
    if os.environ.get("CUMA_UPDATE_PLANS"):
        README.write_text(text)
