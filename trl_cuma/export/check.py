# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Whether an exported folder is what it has to be: a LoRA that PEFT loads where trl_cuma isn't, and that engines take.

What engines ask for is from vLLM's documentation and its `PEFTHelper` (one rank and one scale for all layers, no DoRA,
no bias, no other modules, a rank of at most 512); llama.cpp's `convert_lora_to_gguf.py` and TGI read the same tensors.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` takes."""

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_PLAIN = {
    "use_dora": False,
    "use_rslora": False,
    "lora_bias": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
}


def vllm_rank(rank: int) -> int:
    """
    The `--max-lora-rank` that takes a LoRA of this rank.

    Raises:
        ValueError: there is none.
    """
    found = next((limit for limit in VLLM_RANKS if limit >= rank), None)
    if found is None:
        raise ValueError(
            f"`rank` is {rank}, and vLLM takes LoRAs of rank {VLLM_RANKS[-1]} at most. Choose a lower one."
        )
    return found


def check_files(folder: Path) -> None:
    """
    Check a folder's two files against what engines take.

    Raises:
        ValueError: naming the folder, the setting or tensor, and what it has to be.
    """
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: `peft_type` is {config.get('peft_type')!r}, expected 'LORA'.")
    for name, value in _PLAIN.items():
        if (config.get(name) or value) != value:
            raise ValueError(f"{folder}: `{name}` is {config[name]!r}, and engines take {value!r} only.")
    if config.get("modules_to_save"):
        raise ValueError(f"{folder}: `modules_to_save` is {config['modules_to_save']!r}, which engines don't take.")
    rank = config["r"]
    vllm_rank(rank)
    layers: dict[str, set[str]] = {}
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  it is no dict
            match, tensor = _TENSOR.fullmatch(key), file.get_tensor(key)
            if match is None:
                raise ValueError(f"{folder}: tensor {key!r} is no layer's lora_A or lora_B.")
            layer, side = match.groups()
            if tensor.dim() != 2 or tensor.shape["AB".index(side)] != rank:
                raise ValueError(f"{folder}: {key!r} has shape {tuple(tensor.shape)}, and the rank is {rank}.")
            if not tensor.isfinite().all():
                raise ValueError(f"{folder}: {key!r} has values that are not finite.")
            layers.setdefault(layer, set()).add(side)
    lone = [layer for layer, sides in layers.items() if len(sides) == 1]
    if lone or not layers:
        raise ValueError(f"{folder}: {lone[0] if lone else 'it'} has no pair of lora_A and lora_B.")


def check_loads(folders: Sequence[Path], base: str, *, trust_remote_code: bool = False) -> None:
    """
    Load folders by PEFT, on the base model without its weights, in a process that knows nothing of trl_cuma.

    Args:
        folders (`Sequence[Path]`): To load.
        base (`str`): Id or folder of the base model.
        trust_remote_code (`bool`): Run code that comes with it.

    Raises:
        ValueError: One doesn't load, or PEFT finds a tensor missing or too many.
    """
    script = Path(__file__).with_name("load_plain.py")
    arguments = [str(script), base, str(int(trust_remote_code)), *map(str, folders)]
    # -I: nothing of this process's folder or environment is imported by accident
    done = subprocess.run([sys.executable, "-I", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"An exported LoRA does not load by PEFT alone: {last}")
