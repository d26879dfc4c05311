# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
KTO of a CuMA adapter: single answers that a person found right or wrong, instead of pairs.

A recipe, on CPU, offline (the first line makes its model and data):

    trl-cuma quickstart --stage prepare
    accelerate launch examples/kto_cuma.py --config recipes/quickstart/kto.yaml

Arguments override the recipe's; an unknown one is an error:

    accelerate launch examples/kto_cuma.py --config recipes/quickstart/kto.yaml --learning_rate 1e-3

Your own data needs TRL's columns (`prompt`, `completion`, `label`; pairs, as in this recipe, are taken apart) and one
more, `demographic`: text, a mapping from field to value, or a vector.
"""

from trl_cuma import CuMAKTOConfig, CuMAKTOTrainer
from trl_cuma.scripts import run

if __name__ == "__main__":
    run(CuMAKTOTrainer, CuMAKTOConfig)
