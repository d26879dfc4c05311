# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
SFT of a CuMA adapter: LoRA experts routed by the token and by who is asking.

A recipe, on CPU, offline (the first line makes its model and data):

    trl-cuma quickstart --stage prepare
    accelerate launch examples/sft_cuma.py --config recipes/quickstart/sft.yaml

Arguments override the recipe's; an unknown one is an error:

    accelerate launch examples/sft_cuma.py --config recipes/quickstart/sft.yaml --learning_rate 1e-3

Your own data needs TRL's columns and one more, `demographic`: text, a mapping from field to value, or a vector.
"""

from trl_cuma import CuMASFTConfig, CuMASFTTrainer
from trl_cuma.scripts import run

if __name__ == "__main__":
    run(CuMASFTTrainer, CuMASFTConfig)
