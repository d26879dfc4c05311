# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
A reward model with a CuMA adapter: what an answer is worth to the person who asked.

A recipe, on CPU, offline (the first line makes its model and data):

    trl-cuma quickstart --stage prepare
    accelerate launch examples/reward_cuma.py --config recipes/quickstart/reward.yaml

Arguments override the recipe's; an unknown one is an error:

    accelerate launch examples/reward_cuma.py --config recipes/quickstart/reward.yaml --learning_rate 1e-3

Your own data needs TRL's columns (`chosen`, `rejected`, and where it is not in them `prompt`) and one more,
`demographic`: text, a mapping from field to value, or a vector.
"""

from trl_cuma import CuMARewardConfig, CuMARewardTrainer
from trl_cuma.scripts import run

if __name__ == "__main__":
    run(CuMARewardTrainer, CuMARewardConfig)
