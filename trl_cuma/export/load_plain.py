# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Run as a script, by its path: `load_plain.py BASE TRUST FOLDER…` loads LoRAs by PEFT where trl_cuma is never imported.
"""

import sys

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM


def main(base: str, trust_remote_code: bool, folders: list[str]) -> None:
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    for folder in folders:
        with torch.device("meta"):  # the base's weights decide nothing here
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        model = PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)
        expected = {key: tuple(value.shape) for key, value in get_peft_model_state_dict(model).items()}
        with safe_open(f"{folder}/adapter_model.safetensors", framework="pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        if found != expected:
            differing = sorted(dict(found.items() ^ expected.items()))
            raise SystemExit(f"{folder}: {differing[0]} is missing, unknown or of another shape")
    if "trl_cuma" in sys.modules:
        raise SystemExit("trl_cuma was imported")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "1", sys.argv[3:])
