# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Answers depend on their own row: not on their batch, on what was kept from before, or on the number of processes."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import GenerationConfig

from trl_cuma import CuMAConfig, FieldEncoder
from trl_cuma.evaluation.generation import GeneratedAnswers, answer_diversity, generate_answers
from trl_cuma.generation.batches import encode_prompt
from trl_cuma.generation.row_sampling import row_sampling
from trl_cuma.testing import chat_tokenizer, tiny_model

PEOPLE = [{"country": country, "age": age} for country in ("Brazil", "Japan") for age in ("18", "70")]
QUESTIONS = ["Tea or coffee?", "a", [{"role": "user", "content": "What makes a good life? In a few words."}]]
# Every question for every person. Batches of five mix people and lengths.
PROMPTS, WHO = zip(*((question, person) for question in QUESTIONS for person in PEOPLE), strict=True)
SETTINGS = {"max_new_tokens": 4, "batch_size": 5, "description": None}
# Logits far apart, so that a sample depends on them and not on the noise alone.
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "initializer_range": 0.3}
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "num_samples": 2, "seed": 3}


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer(["Tea or coffee? What makes a good life?"])


@pytest.fixture(scope="module")
def encoder():
    return FieldEncoder(min_count=1).fit(PEOPLE)


@pytest.fixture(scope="module")
def make_model(tokenizer, encoder):
    def make(**fields):
        base = tiny_model("qwen3", vocab_size=len(tokenizer), **SIZES)
        config = CuMAConfig(
            target_modules=["q_proj", "v_proj", "down_proj"],
            demographic_dim=encoder.dim,
            demographic_encoder=encoder.state(),
            num_experts=4,
            r=4,
            lora_alpha=512,
            init_weights=False,
            task_type="CAUSAL_LM",
            **fields,
        )
        torch.manual_seed(0)
        return get_peft_model(base, config).eval()

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def plain_model(tokenizer):
    return tiny_model("qwen3", vocab_size=len(tokenizer), **SIZES)


@pytest.fixture
def calls(model, monkeypatch):
    """The number of answers of each call of the model's `generate`; it can be told to be interrupted."""
    record = SimpleNamespace(sizes=[], stop_at=None)
    generate = model.generate

    def counting(**kwargs):
        if len(record.sizes) == record.stop_at:
            raise KeyboardInterrupt
        record.sizes.append(len(kwargs["input_ids"]))
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", counting)
    return record


# ---------------------------------------------------------------------- batches
def test_greedy_answers_are_those_of_each_prompt_alone(model, tokenizer, encoder):
    answers = generate_answers(model, tokenizer, PROMPTS, WHO, **SETTINGS)
    for row, (prompt, person) in enumerate(zip(PROMPTS, WHO, strict=True)):
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            demographic_embeds=encoder.encode([person]),
            do_sample=False,
            max_new_tokens=4,
        )
        assert answers.texts[row] == [tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)]
    of_a_question = {answers.first[row] for row in range(len(PEOPLE))}
    assert len(of_a_question) > 1  # or the profiles would not be tested


def test_samples_do_not_depend_on_the_batch(model, tokenizer):
    together = generate_answers(model, tokenizer, PROMPTS, WHO, **(SETTINGS | SAMPLED))
    settings = SETTINGS | SAMPLED | {"batch_size": 7}
    backwards = generate_answers(model, tokenizer, PROMPTS[::-1], WHO[::-1], **settings)
    assert backwards.texts == together.texts[::-1]
    alone = [
        generate_answers(model, tokenizer, [prompt], [person], **(SETTINGS | SAMPLED | {"batch_size": 1})).texts[0]
        for prompt, person in zip(PROMPTS[::2], WHO[::2], strict=True)
    ]
    assert alone == together.texts[::2]
    assert len({text for samples in together.texts for text in samples}) > len(PROMPTS)  # samples differ
    other = generate_answers(model, tokenizer, PROMPTS, WHO, **(SETTINGS | SAMPLED | {"seed": 4}))
    assert other.texts != together.texts


def test_a_sample_is_a_draw_from_the_models_distribution():
    """
    At temperature 1/2 the odds are squared: 0.6, 0.3, 0.1 become 36 : 9 : 1. Of these, top-p 0.9 keeps the first two
    (36/46 = 0.78 is not enough), so that the first is drawn with 36/45 = 0.8. The fourth is excluded throughout.
    """
    draws = 8000
    scores = torch.tensor([0.6, 0.3, 0.1, 0.0]).log().expand(draws, -1)
    ids = torch.zeros(draws, 1, dtype=torch.long)
    for top_p, expected in ((1.0, [36 / 46, 9 / 46, 1 / 46, 0]), (0.9, [0.8, 0.2, 0, 0])):
        processors = row_sampling(0.5, top_p, range(draws))
        for _ in range(2):  # a second step draws anew
            drawn = processors(ids, scores).argmax(-1)
            share = torch.bincount(drawn, minlength=4).numpy() / draws
            # 4.5 standard errors of a share are at most 4.5 · sqrt(0.25 / 8000) = 0.025
            np.testing.assert_allclose(share, expected, atol=0.025)
            assert (share[np.array(expected) == 0] == 0).all()


def test_a_plain_model_answers_a_prompt_once_greedily_and_each_person_anew_by_chance(plain_model, tokenizer):
    greedy = generate_answers(plain_model, tokenizer, PROMPTS, WHO, **SETTINGS)
    assert greedy.generated == len(QUESTIONS)
    assert len(set(greedy.first)) == len(QUESTIONS)
    assert generate_answers(plain_model, tokenizer, PROMPTS, **SETTINGS).texts == greedy.texts
    sampled = generate_answers(plain_model, tokenizer, PROMPTS, WHO, **(SETTINGS | SAMPLED))
    assert sampled.generated == 2 * len(PROMPTS)
    assert len({text for samples in sampled.texts[: len(PEOPLE)] for text in samples}) > len(PEOPLE)


def test_what_a_models_own_settings_sample_or_search_is_not_used(model, tokenizer):
    greedy = generate_answers(model, tokenizer, PROMPTS, WHO, **SETTINGS)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, num_beams=3, max_length=20)
    assert generate_answers(model, tokenizer, PROMPTS, WHO, **SETTINGS).texts == greedy.texts
    model.generation_config.update(suppress_tokens=list(range(3, 200)))  # what belongs to the model is
    assert generate_answers(model, tokenizer, PROMPTS, WHO, **SETTINGS).texts != greedy.texts


def test_an_answer_ends_with_its_token(tokenizer):
    """Beside a longer one, an answer that ended is padded."""
    hi, (end, pad) = tokenizer("hi")["input_ids"], (tokenizer.eos_token_id, tokenizer.pad_token_id)
    said = [[*hi, end], [*hi, *hi]]
    width = max(map(len, said))

    class Fixed(torch.nn.Linear):
        config = tiny_model("qwen3", vocab_size=len(tokenizer), num_hidden_layers=1).config
        generation_config = GenerationConfig(eos_token_id=[end], pad_token_id=pad)

        def generate(self, input_ids, **kwargs):
            rows = torch.tensor([row + [pad] * (width - len(row)) for row in said])
            return torch.cat([input_ids, rows], 1)

    answers = generate_answers(Fixed(1, 1), tokenizer, ["aa", "b"], max_new_tokens=width, description=None)
    assert answers.first == ["hi", "hihi"]
    assert answers.finished.tolist() == [[True], [False]]
    assert answers.num_tokens.tolist() == [[len(hi) + 1], [2 * len(hi)]]
    assert answers.document() == {
        "rows": 2,
        "answers": 2,
        "mean_tokens": (3 * len(hi) + 1) / 2,
        "cut_off": 1,
        "empty": 0,
    }


# ---------------------------------------------------------------------- resuming
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_run_that_was_interrupted_goes_on_where_it_was(model, tokenizer, calls, tmp_path, sampling):
    settings = SETTINGS | sampling
    whole = generate_answers(model, tokenizer, PROMPTS, WHO, **settings)
    number = len(PROMPTS) * settings.get("num_samples", 1)
    assert (whole.generated, whole.cached, sum(calls.sizes)) == (number, 0, number)

    calls.sizes.clear()
    calls.stop_at = 2
    path = tmp_path / "answers" / "store.sqlite"
    with pytest.raises(KeyboardInterrupt):
        generate_answers(model, tokenizer, PROMPTS, WHO, **settings, cache_path=path)
    assert calls.sizes == [5, 5]

    calls.sizes.clear()
    calls.stop_at = None
    resumed = generate_answers(model, tokenizer, PROMPTS, WHO, **(settings | {"batch_size": 4}), cache_path=path)
    assert (sum(calls.sizes), resumed.generated, resumed.cached) == (number - 10, number - 10, 10)
    assert resumed.texts == whole.texts
    np.testing.assert_array_equal(resumed.finished, whole.finished)
    np.testing.assert_array_equal(resumed.num_tokens, whole.num_tokens)

    calls.sizes.clear()
    again = generate_answers(model, tokenizer, PROMPTS[:7], WHO[:7], **settings, cache_path=path)
    assert calls.sizes == []
    assert again.texts == whole.texts[:7]


def test_the_store_is_its_owners_and_holds_no_profile(model, tokenizer, tmp_path):
    path = tmp_path / "deep" / "store.sqlite"
    generate_answers(model, tokenizer, PROMPTS, WHO, **SETTINGS, cache_path=path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    content = b"".join(file.read_bytes() for file in path.parent.iterdir()).lower()
    assert b"answers" in content  # the table's name: this is the file
    for text in ("brazil", "japan", "country", "coffee"):
        assert text.encode() not in content


def test_the_store_knows_what_decides_an_answer(model, make_model, plain_model, tokenizer, tmp_path):
    path = tmp_path / "store.sqlite"

    def generated(model, prompt="a", person=PEOPLE[0], **settings):
        settings = SETTINGS | settings
        return generate_answers(model, tokenizer, [prompt], [person], **settings, cache_path=path).generated

    assert generated(model) == 1
    assert generated(model) == 0
    assert generated(make_model()) == 0  # the same weights
    assert generated(model, prompt="b") == 1
    assert generated(model, person=PEOPLE[1]) == 1
    assert generated(model, max_new_tokens=3) == 1
    assert generated(model, temperature=0.5) == 1
    assert generated(model, temperature=0.5, seed=1) == 1
    assert generated(model, temperature=0.5, top_p=0.5) == 1
    assert generated(model, temperature=0.5) == 0
    assert generated(model, temperature=0.5, num_samples=3) == 2  # the first is there
    assert generated(plain_model) == 1
    with model.disable_adapter():
        assert generated(model, person=PEOPLE[1]) == 1
        assert generated(model, person=PEOPLE[2]) == 0  # no person is read
    assert generated(make_model(gate="soft")) == 1  # the same weights, another formula
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "weight_b" in name)[0, 0] += 1
    assert generated(model) == 1
    assert generated(model, fingerprint="mine") == 1
    assert generated(plain_model, fingerprint="mine") == 1  # reads no profile


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 2}, "greedy"),
        ({"top_p": 0.5}, "greedy"),
        ({"temperature": -1.0}, "`temperature` is -1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "`top_p` is 0.0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"max_new_tokens": 10**6}, "prompt in row 0 has 1 tokens"),
    ],
)
def test_settings_out_of_range_are_refused(model, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        generate_answers(model, tokenizer, ["a"], [PEOPLE[0]], **(SETTINGS | settings))


def test_a_row_without_a_profile_is_named_without_its_value(model, tokenizer):
    with pytest.raises(ValueError, match="1") as caught:
        generate_answers(model, tokenizer, ["a", "b"], [PEOPLE[0], None], **SETTINGS)
    assert "Brazil" not in str(caught.value)
    with pytest.raises(ValueError, match="`demographics` has 1 rows and `prompts` 2"):
        generate_answers(model, tokenizer, ["a", "b"], [PEOPLE[0]], **SETTINGS)


def test_the_models_mode_is_given_back(model, tokenizer):
    model.train()
    model.base_model.model.model.layers[0].eval()
    generate_answers(model, tokenizer, ["a"], [PEOPLE[0]], **SETTINGS)
    assert model.training and not model.base_model.model.model.layers[0].training


# ---------------------------------------------------------------------- diversity
def test_diversity_compares_profiles_with_samples():
    """
    Two people, two samples each. Each says one bigram twice; between them the bigrams differ: Distinct-2 of two texts
    is 1 between and 1/2 within, so that the ratio is 2. The second prompt repeats the first, and so does a row.
    """
    texts = [["x y", "x y"], ["u v", "u v"], ["x y", "x y"], ["p q", "p q"], ["r s", "r s"]]
    shape = (5, 2)
    answers = GeneratedAnswers(texts, np.full(shape, 2), np.ones(shape, dtype=bool), 10, 0)
    who = [PEOPLE[0], PEOPLE[1], PEOPLE[0], PEOPLE[0], PEOPLE[1]]
    result = answer_diversity(answers, ["q", "q", "q", "z", "z"], who)
    assert (result["value"], result["n"], result["unit"], result["words"]) == (2.0, 2, "prompt", 2)
    # Where the prompt states the profile, the label says which prompts are the same.
    stated = answer_diversity(answers, list("abcde"), who, prompt_groups=["q", "q", "q", "z", "z"])
    assert stated == result


# ---------------------------------------------------------------------- processes
SCRIPT = """
import json, sys
from accelerate import Accelerator
from trl_cuma.evaluation.generation import generate_answers
from trl_cuma.testing import chat_tokenizer, tiny_model

folder, rank = sys.argv[1], Accelerator(cpu=True).process_index
tokenizer = chat_tokenizer(["Tea or coffee? What makes a good life?"])
model = tiny_model("qwen3", vocab_size=len(tokenizer), **json.loads(sys.argv[2]))
with open(f"{folder}/task.json") as file:
    prompts, who, settings = json.load(file)
answers = generate_answers(model, tokenizer, prompts, who, cache_path=f"{folder}/store.sqlite", **settings)
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump([answers.texts, answers.generated, answers.cached], file)
"""


@pytest.mark.slow  # two fresh processes import everything
def test_processes_share_the_work_and_all_get_the_answers(plain_model, tokenizer, tmp_path):
    settings = SETTINGS | SAMPLED
    whole = generate_answers(plain_model, tokenizer, PROMPTS, WHO, **settings)
    generate_answers(plain_model, tokenizer, PROMPTS[:4], WHO[:4], **settings, cache_path=tmp_path / "store.sqlite")
    (tmp_path / "task.json").write_text(json.dumps([PROMPTS, WHO, settings]))
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(tmp_path / "script.py"), str(tmp_path), json.dumps(SIZES)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    for rank in (0, 1):
        texts, generated, cached = json.loads((tmp_path / f"{rank}.json").read_text())
        assert texts == whole.texts
        assert (generated, cached) == (2 * len(PROMPTS) - 8, 8)
