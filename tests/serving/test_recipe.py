# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The recipe's commands, with stand-ins for the engines: what they would be started with."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "recipes" / "serving" / "README.md"
INDEX = {
    "rank": 6,
    "vllm_max_lora_rank": 8,
    "exports": [{"name": "kenya", "folder": "kenya"}, {"name": "again", "folder": "kenya"}],
}

pytestmark = pytest.mark.skipif(shutil.which("jq") is None, reason="the recipe's commands need jq")


@pytest.fixture
def run(tmp_path):
    """Run the block of commands under a heading; returns what each engine got, an argument per line."""
    out = tmp_path / "with a space" / "exports"
    out.mkdir(parents=True)
    (out / "exports.json").write_text(json.dumps(INDEX))
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for engine in ("vllm", "text-generation-launcher", "python", "llama-server"):
        (bin_folder / engine).write_text(
            f'#!/bin/sh\n{{ echo "$LORA_ADAPTERS"; printf "%s\\n" "$@"; }} >>"{tmp_path}/{engine}"\n'
        )
        (bin_folder / engine).chmod(0o755)

    def commands(heading, engine):
        section = README.read_text(encoding="utf-8").split(f"### {heading}\n")[1]
        (block, *_) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
        environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=out.parent, env=environment, check=True)
        first, *arguments = (tmp_path / engine).read_text().splitlines()
        return first, arguments

    return commands, out


def test_vllm_gets_each_name_and_the_rank_that_it_takes(run):
    commands, out = run
    _, arguments = commands("vLLM", "vllm")
    assert arguments[:5] == ["serve", "BASE", "--enable-lora", "--max-lora-rank", "8"]
    assert arguments[-3:] == ["--lora-modules", f"kenya={out}/kenya", f"again={out}/kenya"]


def test_tgi_gets_each_name(run):
    commands, out = run
    adapters, arguments = commands("Text Generation Inference", "text-generation-launcher")
    assert adapters == f"kenya={out}/kenya,again={out}/kenya" and arguments == ["--model-id", "BASE"]


def test_llama_cpp_converts_each_folder_once(run):
    commands, out = run
    _, arguments = commands("llama.cpp", "python")
    expected = ["convert_lora_to_gguf.py", f"{out}/kenya", "--base", "PATH_OF_BASE", "--outfile", f"{out}/kenya.gguf"]
    assert arguments == expected
