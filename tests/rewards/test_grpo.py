# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The rewards inside the GRPO trainers."""

import math
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from trl_cuma import CuMAConfig, CuMAGRPOConfig, CuMAGRPOTrainer, FieldEncoder
from trl_cuma.data import Answers, Question
from trl_cuma.rewards import GroupLikelihoodReward, JudgeError
from trl_cuma.testing import tiny_model, word_tokenizer

from .conftest import Response, section

WORDS = [f"word{number}" for number in range(40)]


def make_trainer(reward, dataset: Dataset, path: Path, *, routed: bool = False) -> GRPOTrainer:
    tokenizer = word_tokenizer([*WORDS, *dataset["prompt"]])
    args = (CuMAGRPOConfig if routed else GRPOConfig)(
        output_dir=str(path),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        seed=0,
    )
    model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1)
    given = dict(reward_funcs=[reward], args=args, train_dataset=dataset, processing_class=tokenizer)
    if not routed:
        return GRPOTrainer(model, **given)
    adapter = CuMAConfig(target_modules=["q_proj"], num_experts=2, r=2, router_hidden=4)
    return CuMAGRPOTrainer(model, peft_config=adapter, demographic_encoder=FieldEncoder(min_count=1), **given)


@pytest.fixture
def judged_rows() -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": ["word1 word2", "word3 word4"],
            "reference": ["word5", "word6"],
            "demographic": [{"country": "Brazil"}, {"country": "Japan"}],
        }
    )


@pytest.mark.parametrize("routed", [False, True])
def test_a_row_that_could_not_be_judged_is_no_loss(server, make_judge, judged_rows, tmp_path, caplog, routed):
    def respond(question: str) -> Response | str:
        if section(question, "person") == "country: Japan":
            return Response(status=500)
        return f"[[{'AB'[section(question, 'answer_a') in ('word5', 'word6')]}]]"  # the completion wins

    server.respond = respond
    judge = make_judge()
    trainer = make_trainer(judge, judged_rows, tmp_path, routed=routed)
    trainer.train()
    if routed:  # TRL's own trainer prints the columns of a row without a reward
        assert "All reward functions returned None" in caplog.text
        assert "Japan" not in caplog.text
    logs = next(entry for entry in trainer.state.log_history if "reward" in entry)
    # One prompt of two was judged, its completions won: 1.0, and not the 0.5 of a failure taken for a loss.
    assert logs["rewards/profile_judge/mean"] == logs["reward"] == 1.0
    assert logs["profile_judge/win_rate"] == 1.0
    assert logs["profile_judge/dropped_rate"] == 0.5
    rewards = trainer._logs["rewards"]["profile_judge"]
    assert sorted(map(str, rewards)) == ["1.0", "1.0", "nan", "nan"]
    assert list(trainer._logs["advantages"]) == [0.0] * 4
    assert judge.stats.dropped == 2


def test_stopping_stops_the_training(server, make_judge, judged_rows, tmp_path):
    server.respond = lambda question: Response(status=500)
    with pytest.raises(JudgeError, match="http_500"):
        make_trainer(make_judge(on_failure="stop"), judged_rows, tmp_path).train()


def test_the_log_likelihood_of_survey_answers_trains(tmp_path):
    question = Question("q", "word1", ("word5", "word6"))
    zeros = np.zeros(40, dtype=int)
    answers = Answers(np.arange(40), zeros, zeros, np.arange(40) % 4 // 3)  # 30 and 10
    reward = GroupLikelihoodReward(
        [question], [{"country": "Japan"}], answers, group_by=["country"], unparsable_reward=-9.0
    )
    rows = Dataset.from_dict(
        {"prompt": ["word1 word2"] * 2, "question_id": ["q"] * 2, "demographic": [{"country": "Japan"}] * 2}
    )
    trainer = make_trainer(reward, rows, tmp_path)
    trainer.train()
    logs = next(entry for entry in trainer.state.log_history if "reward" in entry)
    expected = {"word5": math.log(30.5 / 41), "word6": math.log(10.5 / 41)}
    texts = [text.removesuffix("<eos>").strip() for text in trainer._logs["completion"]]
    assert list(trainer._logs["rewards"]["group_likelihood"]) == pytest.approx(
        [expected.get(text, -9.0) for text in texts]
    )
    assert logs["group_likelihood/unparsable_rate"] == np.mean([text not in expected for text in texts])
