# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from trl_cuma import CuMAConfig, FieldEncoder, load_demographic_encoder
from trl_cuma.data import simulate_survey
from trl_cuma.data.prompts import PromptFormat
from trl_cuma.data.survey import Question, format_prompt
from trl_cuma.evaluation import survey as evaluator
from trl_cuma.evaluation.option_orders import option_orders, position_bias
from trl_cuma.evaluation.rows import DISTRIBUTION, NO_OPTION, REPEATED
from trl_cuma.evaluation.survey import NOT_KNOWN, TOO_LONG, predict_rows, predict_survey
from trl_cuma.quickstart.language_model import build_tokenizer
from trl_cuma.testing import chat_tokenizer, tiny_model

PEOPLE = [{"country": c, "age": a} for c in ("Ruritania", "Syldavia") for a in ("16-24", "65+")]
QUESTIONS = [
    Question("q1", "Is salt good?", ("Never", "2", "3", "Always")),
    Question("q2", "Do you like it?", ("Yes", "No")),
]
TEXTS = [PromptFormat().question(question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer(TEXTS)


def build(tokenizer, encoder="field", dtype=torch.float64, **fields):
    """A model whose adapter reads profiles by an encoder that it carries, or vectors of 4 entries."""
    base = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=32, initializer_range=0.2)
    fitted = FieldEncoder(min_count=1).fit(PEOPLE)
    defaults = {"demographic_dim": 4, "num_experts": 4, "r": 4, "router_hidden": 8, "init_weights": False}
    torch.manual_seed(0)
    state = {"demographic_encoder": fitted.state()} if encoder == "field" else {}
    config = CuMAConfig(target_modules=["v_proj"], task_type="CAUSAL_LM", **(defaults | state | fields))
    return get_peft_model(base, config).to(dtype).eval()


def asked(number, person=0, choice=0, **changes):
    """A row as `trl-cuma prepare` writes it."""
    row = {
        "prompt": [{"role": "user", "content": TEXTS[number]}],
        "completion": [{"role": "assistant", "content": "ABCD"[choice]}],
        "demographic": PEOPLE[person],
        "person_id": f"p{person}",
        "question_id": QUESTIONS[number].question_id,
        "num_options": len(QUESTIONS[number].options),
    }
    return row | changes


def shares(number, distribution, person=0, **changes):
    row = asked(number, person, distribution=distribution, options=list(QUESTIONS[number].options), **changes)
    return {name: value for name, value in row.items() if name not in ("completion", "person_id")}


def by_hand(model, tokenizer, text, options, vector=None):
    """Probabilities of the letters after a user's message: one row, no padding."""
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
    inputs = {} if vector is None else {"demographic_embeds": vector[None]}
    with torch.no_grad():
        probs = model(input_ids=torch.tensor([ids]), **inputs).logits[0, -1].softmax(-1)
    return probs[[tokenizer(letter)["input_ids"][0] for letter in "ABCD"[:options]]].numpy()


def predict(model, tokenizer, rows, **arguments):
    return predict_rows(model, tokenizer, Dataset.from_list(rows), show_progress=False, **arguments)


# ------------------------------------------------------------------------------------------------ prepared rows
def test_cells_of_many_profiles_equal_one_at_a_time(tokenizer):
    """Rows of one question and profile are one cell; its prediction doesn't depend on who else is in the batch."""
    model = build(tokenizer)
    rows = [asked(0, 0, 3), asked(1, 1, 1), asked(0, 0, 1), asked(0, 3, 0), asked(1, 0, 0), asked(0, 0, 3)]
    found = predict(model, tokenizer, rows)
    assert found.question_id.tolist() == ["q1", "q2", "q1", "q2"]  # in the order of their first rows
    assert [found.demographic[index] for index in found.profile] == [PEOPLE[person] for person in (0, 1, 3, 0)]
    assert found.num_options.tolist() == [4, 2, 4, 2] and found.answer_cell.tolist() == [0, 1, 0, 2, 3, 0]
    assert found.answer_choice.tolist() == [3, 1, 1, 0, 0, 3] and found.answer_person[3] == "p3"
    assert found.truth is None and found.position_bias is None and found.num_rows == 6 and not found.bad_rows
    vectors = FieldEncoder(min_count=1).fit(PEOPLE).encode(PEOPLE).double()
    for cell, (number, person) in enumerate([(0, 0), (1, 1), (0, 3), (1, 0)]):
        probs = by_hand(model, tokenizer, TEXTS[number], len(QUESTIONS[number].options), vectors[person])
        np.testing.assert_allclose(found.predicted[cell, : len(probs)], probs / probs.sum(), atol=1e-7)
        assert found.outside[cell] == pytest.approx(1 - probs.sum(), abs=1e-7)
        assert not found.predicted[cell, len(probs) :].any()
    assert np.abs(found.predicted[0] - found.predicted[2]).max() > 1e-3  # another person, another answer


def test_the_encoder_is_the_adapters_own(tokenizer, tmp_path):
    """Saved and loaded, or passed by hand for an adapter that carries none: the same predictions."""
    model = build(tokenizer)
    model.save_pretrained(tmp_path)
    without = build(tokenizer, encoder=None)
    encoder = load_demographic_encoder(tmp_path)
    rows = [asked(0, person) for person in range(4)]
    expected = predict(model, tokenizer, rows).predicted
    np.testing.assert_array_equal(predict(without, tokenizer, rows, encoder=encoder).predicted, expected)
    vectors = encoder.encode(PEOPLE).tolist()
    given = [asked(0, person, demographic=vectors[person]) for person in range(4)]
    found = predict(without, tokenizer, given)
    np.testing.assert_array_equal(found.predicted, expected)
    assert found.demographic == [{}] * 4
    with pytest.raises(ValueError, match="no encoder"):
        predict(without, tokenizer, rows)


def test_unknown_values_are_counted_and_not_named(tokenizer, caplog):
    """A country that no training person had is answered as if it were missing, and who evaluates must know."""
    rows = [asked(0, 0), asked(1, 0, demographic=PEOPLE[0] | {"country": "Borduria"}), asked(0, 1)]
    rows += [asked(0, 0, demographic={"country": "San Theodoros", "age": "65+"})]
    with caplog.at_level(logging.WARNING):
        found = predict(build(tokenizer), tokenizer, rows)
    assert found.unknown_values == {"country": 2}
    assert "of 4: country 2" in caplog.text and "Borduria" not in caplog.text
    assert not predict(build(tokenizer), tokenizer, rows[:1]).unknown_values


@pytest.mark.parametrize("kind", ["plain", "lora", "semantic"])
def test_a_model_that_reads_no_profile_needs_none(tokenizer, kind):
    if kind == "semantic":
        model = build(tokenizer, encoder=None, routing="semantic", demographic_dim=None)
    else:
        model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=32).double().eval()
        if kind == "lora":
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).double()
    rows = [asked(0, 0), asked(0, 1), asked(0, 2, demographic=None)]
    found = predict(model, tokenizer, rows)
    assert len(found.question_id) == 3  # three profiles, so three cells, of one prediction
    probs = by_hand(model.eval(), tokenizer, TEXTS[0], 4)
    np.testing.assert_allclose(found.predicted, np.tile(probs / probs.sum(), (3, 1)), atol=1e-7)
    dataset = Dataset.from_list(rows).remove_columns(["demographic", "person_id"])
    assert predict_rows(model, tokenizer, dataset, show_progress=False).demographic == [{}]


def test_published_shares_are_the_truth(tokenizer):
    rows = [shares(0, [0.1, 0.2, 0.3, 0.4], 0), shares(1, [0.25, 0.75], 1)]
    found = predict(build(tokenizer), tokenizer, rows)
    np.testing.assert_allclose(found.truth, [[0.1, 0.2, 0.3, 0.4], [0.25, 0.75, 0, 0]])
    assert len(found.answer_cell) == 0 and found.observed() is found.truth


def test_without_a_truth_the_answers_count_by_weight(tokenizer):
    """Cell 0: weights 1 and 3 for B and D. Cell 1: a single answer without any weight."""
    rows = [asked(0, 0, 1, weight=1.0), asked(0, 0, 3, weight=3.0), asked(1, 1, 0, weight=0.0)]
    observed = predict(build(tokenizer), tokenizer, rows).observed()
    np.testing.assert_allclose(observed[0], [0, 0.25, 0, 0.75])
    assert np.isnan(observed[1]).all()


def test_options_of_several_tokens(tokenizer):
    """Answered in the options' own words: log-likelihoods of whole texts; what is outside isn't known."""
    model = build(tokenizer)
    rows = [asked(0, 0, completion=[{"role": "assistant", "content": "Always"}], options=list(QUESTIONS[0].options))]
    found = predict(model, tokenizer, rows, answer_by="text")
    head = tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True)["input_ids"]
    vector = FieldEncoder(min_count=1).fit(PEOPLE).encode(PEOPLE[:1]).double()
    expected = []
    for option in QUESTIONS[0].options:
        ids = head + tokenizer(option)["input_ids"]
        with torch.no_grad():
            each = model(input_ids=torch.tensor([ids]), demographic_embeds=vector).logits[0].log_softmax(-1)
        expected.append(sum(each[place - 1, ids[place]].item() for place in range(len(head), len(ids))))
    np.testing.assert_allclose(found.predicted[0], np.exp(expected) / np.exp(expected).sum(), atol=1e-7)
    assert np.isnan(found.outside).all() and found.answer_choice.tolist() == [3]


def test_two_wordings_of_a_question_are_two_cells(tokenizer):
    other = [{"role": "user", "content": TEXTS[0] + " Please."}]
    found = predict(build(tokenizer), tokenizer, [asked(0), asked(0, prompt=other), asked(0)])
    assert found.question_id.tolist() == ["q1", "q1"] and found.answer_cell.tolist() == [0, 1, 0]


# ------------------------------------------------------------------------------------------------ bad rows
def test_bad_rows_are_counted_named_and_reported(tokenizer, caplog):
    """
    Of 8 rows, 3 are bad, each for a reason of its own: in the result, and in one warning, which holds no profile. An
    age that the encoder has not met is no reason: it knows the field.
    """
    model = build(tokenizer, dtype=torch.float32)
    long = [{"role": "user", "content": "salt " * 3000}]
    rows = [asked(0), asked(0, completion=[{"role": "assistant", "content": "E"}]), asked(0, prompt=long), asked(1)]
    rows += [asked(1, demographic=dict.fromkeys(PEOPLE[0])), asked(1), asked(1, demographic={"age": "7"}), asked(0)]
    with caplog.at_level(logging.WARNING, logger=evaluator.__name__):
        found = predict(model, tokenizer, rows, max_bad_share=0.5)
    assert found.bad_rows == {NO_OPTION: [1], NOT_KNOWN: [4], TOO_LONG: [2]}
    assert found.num_rows == 8 and len(found.answer_cell) == 5
    record, unknown = caplog.records
    assert "of 2: age 1." in unknown.message
    assert "3 of 8 rows can't be evaluated" in record.message and f"{NO_OPTION} (row 1)" in record.message
    assert "Ruritania" not in record.message
    with pytest.raises(ValueError, match=r"3 of 8 rows can't be evaluated, .*`max_bad_share=0.3`(.|\n)*row 4"):
        predict(model, tokenizer, rows, max_bad_share=0.3)


def test_an_adapter_that_can_do_without_profiles(tokenizer):
    """With `missing_demographics="zero"` nobody is left out: the unknown person has the zero vector."""
    model = build(tokenizer, missing_demographics="zero")
    found = predict(model, tokenizer, [asked(0, demographic=dict.fromkeys(PEOPLE[0])), asked(0, 1)])
    probs = by_hand(model, tokenizer, TEXTS[0], 4, torch.zeros(4).double())
    np.testing.assert_allclose(found.predicted[0], probs / probs.sum(), atol=1e-7)
    assert found.demographic[found.profile[0]] == {"age": None, "country": None}


def test_what_is_wrong_with_all_rows_is_an_error(tokenizer):
    model = build(tokenizer, dtype=torch.float32)
    with pytest.raises(ValueError, match="has no rows"):
        predict_rows(model, tokenizer, Dataset.from_list([asked(0)]).select([]), show_progress=False)
    with pytest.raises(ValueError, match="no column 'profile'"):
        predict(model, tokenizer, [asked(0)], demographic_column="profile")
    for bad, reason in ((asked(0, question_id=None), "question_id"), (asked(0, demographic=None), NOT_KNOWN)):
        with pytest.raises(ValueError, match=f"1 of 1 rows can't be evaluated(.|\n)*{reason}"):
            predict(model, tokenizer, [bad], max_bad_share=1.0)
    with pytest.raises(ValueError, match=DISTRIBUTION):
        predict(model, tokenizer, [shares(1, [0.9, 0.9])], max_bad_share=1.0)


def test_a_cell_has_one_distribution(tokenizer):
    rows = [shares(1, [0.5, 0.5]), shares(1, [0.4, 0.6]), shares(1, [0.3, 0.7], 1)]
    found = predict(build(tokenizer, dtype=torch.float32), tokenizer, rows, max_bad_share=0.5)
    assert found.bad_rows == {REPEATED: [1]}
    np.testing.assert_allclose(found.truth, [[0.5, 0.5], [0.3, 0.7]])


# ------------------------------------------------------------------------------------------------ orders
def test_orders():
    """The first two are the question's own and the reverse; 2n of them put every option everywhere equally often."""
    assert option_orders(4, 0) == option_orders(4, 1) == [(0, 1, 2, 3)]
    assert option_orders(4, 2) == [(0, 1, 2, 3), (3, 2, 1, 0)]
    assert option_orders(4, 4) == [(0, 1, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1), (1, 0, 3, 2)]
    assert option_orders(2, 8) == [(0, 1), (1, 0)]  # there are no more
    for size in range(3, 12):
        for count in range(2, 2 * size + 1, 2):
            orders = np.array(option_orders(size, count))
            assert len({*map(tuple, orders)}) == count and (np.sort(orders) == np.arange(size)).all()
            place = np.argsort(orders, axis=1)  # of each option, in each order
            np.testing.assert_allclose(place.mean(0), (size - 1) / 2)
        every = np.argsort(option_orders(size, 2 * size), axis=1)
        assert all((np.bincount(column, minlength=size) == 2).all() for column in every.T)
    with pytest.raises(ValueError, match="`permutations` is -1"):
        option_orders(4, -1)


def test_position_bias_by_hand():
    """
    Cell 0: three orders with the shares (1, 0), (0, 1) and (½, ½) of the first two options: total variations of 1, ½
    and ½, so 2/3 in the mean. Cell 1: one order. Cell 2: two equal ones.
    """
    by_order = np.array([[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0], [0, 0, 1], [0.2, 0.3, 0.5], [0.2, 0.3, 0.5]])
    np.testing.assert_allclose(position_bias(by_order, np.array([3, 1, 2])), [2 / 3, 0, 0])


@pytest.mark.parametrize("kind", ["plain", "paper"])
def test_orders_are_asked_and_mapped_back(tokenizer, kind):
    """By hand: the question is worded in each order, and the letters' probabilities go back to the options."""
    model = build(tokenizer)
    wording = PromptFormat("user", kind)
    rows = []
    for number, question in enumerate(QUESTIONS):
        prefix = wording.opening(PEOPLE[number], "survey").prefix
        content = prefix + wording.question(question)
        rows.append(asked(number, number, prompt=[{"role": "user", "content": content}]))
    found = predict(model, tokenizer, rows, permutations=3)
    vectors = FieldEncoder(min_count=1).fit(PEOPLE).encode(PEOPLE).double()
    for number, question in enumerate(QUESTIONS):
        size = len(question.options)
        orders = {2: [(0, 1), (1, 0)], 4: [(0, 1, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1)]}[size]
        each, outside = [], []
        for order in orders:
            turned = Question("", question.text, tuple(question.options[k] for k in order))
            text = wording.opening(PEOPLE[number], "survey").prefix + wording.question(turned)
            letters = by_hand(model, tokenizer, text, size, vectors[number])
            outside.append(1 - letters.sum())
            each.append([letters[order.index(option)] / letters.sum() for option in range(size)])
        np.testing.assert_allclose(found.predicted[number, :size], np.mean(each, axis=0), atol=1e-7)
        assert found.outside[number] == pytest.approx(np.mean(outside), abs=1e-7)
        pairs = [np.abs(np.subtract(each[i], each[j])).sum() / 2 for i in range(len(orders)) for j in range(i)]
        assert found.position_bias[number] == pytest.approx(np.mean(pairs), abs=1e-7) and np.mean(pairs) > 1e-4


def test_a_model_that_only_knows_places_says_nothing_with_all_orders(tokenizer):
    """
    Without attention's values and the MLP, the answer follows from the last token alone: the same letters whatever is
    asked. With all orders every option gets the mean share: 1/4 of four, with a bias that is not 0.
    """
    model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=32, initializer_range=0.2).double()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    rows = [asked(0), asked(1)]
    plain = predict(model, tokenizer, rows)
    assert np.abs(plain.predicted[0] - 0.25).max() > 0.01
    found = predict(model, tokenizer, rows, permutations=8)
    np.testing.assert_allclose(found.predicted, [[0.25] * 4, [0.5, 0.5, 0, 0]], atol=1e-7)
    assert (found.position_bias > 0.01).all()


def test_options_in_words_move_with_their_order(tokenizer):
    """The completions are texts, not places: by hand, each text's likelihood after each order's prompt."""
    model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=32, initializer_range=0.2).double()
    rows = [asked(1, completion=[{"role": "assistant", "content": "No"}], options=["Yes", "No"])]
    found = predict(model, tokenizer, rows, permutations=2, answer_by="text")
    each = []
    for options in (("Yes", "No"), ("No", "Yes")):
        asked_now = [{"role": "user", "content": PromptFormat().question(Question("", QUESTIONS[1].text, options))}]
        one = predict(model, tokenizer, [rows[0] | {"prompt": asked_now}], answer_by="text")
        each.append(one.predicted[0])
    np.testing.assert_allclose(found.predicted[0], np.mean(each, axis=0), atol=1e-7)


def test_a_prompt_that_cannot_be_asked_in_another_order(tokenizer):
    rows = [asked(0), asked(1, prompt=[{"role": "user", "content": "Yes or no?"}])]
    with pytest.raises(ValueError, match=r"Row 1: .* Set `permutations=0`"):
        predict(build(tokenizer, dtype=torch.float32), tokenizer, rows, permutations=2)


# ------------------------------------------------------------------------------------------------ surveys
@pytest.fixture(scope="module")
def simulated():
    return simulate_survey(0, num_questions=8, num_topics=8, answers_per_person=2, max_cells=40)


@pytest.mark.parametrize("prompt_profile", [False, True])
def test_cells_of_a_survey(simulated, prompt_profile):
    """Every cell by hand, asked in two orders; answers are those that fall into a cell."""
    tokenizer = build_tokenizer(simulated)
    encoder = FieldEncoder(min_count=1).fit(simulated.profiles)
    model = build(tokenizer, encoder=None, demographic_dim=encoder.dim)
    cells = simulated.cells["held_out_people"].sample(12)
    arguments = {"prompt_profile": prompt_profile, "encoder": encoder, "show_progress": False}
    found = predict_survey(
        model, tokenizer, simulated, "held_out_people", cells=cells, permutations=2, max_batch_tokens=300, **arguments
    )
    vectors = encoder.encode(simulated.profiles, missing="zero").double()
    letters = [tokenizer(letter)["input_ids"][0] for letter in "ABCDEFGHIJK"[: simulated.max_options]]
    for cell, (question, profile) in enumerate(zip(cells.question, cells.profile, strict=True)):
        asked_of, size = simulated.questions[question], simulated.num_options[question]
        each = []
        for options in (asked_of.options, asked_of.options[::-1]):
            stated = simulated.profiles[profile] if prompt_profile else None
            ids = tokenizer(format_prompt(Question("", asked_of.text, options), stated))["input_ids"]
            with torch.no_grad():
                output = model(input_ids=torch.tensor([ids]), demographic_embeds=vectors[profile][None])
            probs = output.logits[0, -1].softmax(-1)[letters[:size]].numpy()
            each.append(probs / probs.sum())
        np.testing.assert_allclose(found.predicted[cell, :size], (each[0] + each[1][::-1]) / 2, atol=1e-7)
        bias = np.abs(each[0] - each[1][::-1]).sum() / 2
        assert found.position_bias[cell] == pytest.approx(bias, abs=1e-7)
        assert found.question_id[cell] == asked_of.question_id and found.num_options[cell] == size
        known = {name: value for name, value in found.demographic[found.profile[cell]].items() if value is not None}
        assert known == simulated.profiles[profile]
    assert found.truth is cells.truth and found.predicted.shape == cells.truth.shape
    answers = simulated.answers["held_out_people"]
    pairs = set(zip(cells.question.tolist(), cells.profile.tolist(), strict=True))
    within = [pair in pairs for pair in zip(answers.question.tolist(), answers.profile.tolist(), strict=True)]
    assert len(found.answer_cell) == sum(within) > 0
    assert found.answer_choice.tolist() == answers.choice[within].tolist()
    np.testing.assert_array_equal(cells.question[found.answer_cell], answers.question[within])


def test_a_split_without_cells(simulated):
    tokenizer = build_tokenizer(simulated)
    with pytest.raises(ValueError, match="`split` is 'train', expected one of"):
        predict_survey(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, simulated, "train")


def test_what_is_saved_holds_no_profile(tokenizer, tmp_path):
    found = predict(build(tokenizer), tokenizer, [asked(0, 0, 1), asked(1, 3, 0)], permutations=2)
    found.save(tmp_path / "cells.npz")
    with np.load(tmp_path / "cells.npz") as saved:
        assert saved["profile"].tolist() == [0, 1] and saved["question_id"].tolist() == ["q1", "q2"]
        np.testing.assert_array_equal(saved["predicted"], found.predicted)
        assert "truth" not in saved and not any("Ruritania" in str(saved[name]) for name in saved)
