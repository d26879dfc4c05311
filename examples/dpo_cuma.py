# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
DPO of a CuMA adapter, new or after SFT.

A recipe, on CPU, offline (the first line makes its model and data):

    trl-cuma quickstart --stage prepare
    accelerate launch examples/dpo_cuma.py --config recipes/quickstart/dpo.yaml

Arguments override the recipe's; an unknown one is an error:

    accelerate launch examples/dpo_cuma.py --config recipes/quickstart/dpo.yaml --learning_rate 1e-3

Your own data needs TRL's columns and one more, `demographic`: text, a mapping from field to value, or a vector.

After SFT, name the trained adapter; its frozen copy is then the reference:

    accelerate launch examples/dpo_cuma.py --config recipes/quickstart/dpo.yaml --cuma_adapter_path runs/quickstart/sft
"""

from trl_cuma import CuMADPOConfig, CuMADPOTrainer
from trl_cuma.scripts import run

if __name__ == "__main__":
    run(CuMADPOTrainer, CuMADPOConfig)
