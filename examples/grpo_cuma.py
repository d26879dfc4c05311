# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
GRPO of a CuMA adapter: the reward of an answer depends on the person it is for.

A recipe, on CPU, offline (the first line makes its model and data):

    trl-cuma quickstart --stage prepare
    accelerate launch examples/grpo_cuma.py --config recipes/quickstart/grpo.yaml

Arguments override the recipe's; an unknown one is an error:

    accelerate launch examples/grpo_cuma.py --config recipes/quickstart/grpo.yaml --learning_rate 1e-3

Your own data needs a column `prompt` and one more, `demographic`: text, a mapping from field to value, or a vector. A
reward function gets both; recipes name it by its import path, as this one's names `survey_reward` below.
"""

import functools
from typing import Any

from trl_cuma import CuMAGRPOConfig, CuMAGRPOTrainer
from trl_cuma.data.simulated import simulate_survey
from trl_cuma.quickstart.settings import SIMULATED
from trl_cuma.rewards import GroupLikelihoodReward
from trl_cuma.scripts import run


@functools.cache
def group_likelihood() -> GroupLikelihoodReward:
    """How people of a country and religion answered the quick start's survey, seed 0."""
    survey = simulate_survey(0, **SIMULATED.survey)
    return GroupLikelihoodReward.from_survey(survey, group_by=["country", "religion"], unparsable_reward=-10.0)


def survey_reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
    """The log-share of each answer among the answers of the person's group."""
    return group_likelihood()(prompts, completions, **columns)


if __name__ == "__main__":
    run(CuMAGRPOTrainer, CuMAGRPOConfig)
