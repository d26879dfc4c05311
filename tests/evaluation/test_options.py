# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptEncoderConfig, get_peft_model
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from trl_cuma import CuMAConfig
from trl_cuma.data import simulate_survey
from trl_cuma.data.survey import format_completion, format_prompt
from trl_cuma.evaluation.option_tokens import encode_options
from trl_cuma.evaluation.options import option_log_probs, split_options, survey_log_probs
from trl_cuma.quickstart.language_model import build_tokenizer
from trl_cuma.testing import chat_tokenizer, tiny_model, word_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = ["Is it good? Answer:", "Is it? Answer:", "Would you say that it is good, or rather that it is bad? Answer:"]
OPTIONS = [[" yes", " no"], [" yes, very much", " not at all", " maybe"], [" A", " B", " C"]]
CONVERSATIONS = [[{"role": "user", "content": text}] for text in TEXTS]
SAID = [[option.strip() for option in some] for some in OPTIONS]
# Qwen3's way: an empty block of thoughts before the answer, which the generation prompt lacks.
THINKING = """\
{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{{- message['content'] + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer(TEXTS + [option for some in OPTIONS for option in some], vocab_size=330)


def build(tokenizer, architecture="llama", dtype=torch.float64, **fields):
    """A model with a CuMA adapter that reads vectors of 4 entries."""
    base = tiny_model(architecture, vocab_size=len(tokenizer), hidden_size=32, initializer_range=0.2)
    module = {"gpt2": "c_attn", "bloom": "query_key_value"}.get(architecture, "v_proj")
    defaults = {"demographic_dim": 4, "num_experts": 4, "r": 4, "router_hidden": 8, "init_weights": False}
    torch.manual_seed(0)
    config = CuMAConfig(target_modules=[module], task_type="CAUSAL_LM", **(defaults | fields))
    return get_peft_model(base, config).to(dtype).eval()


def by_hand(model, ids, length, vector=None):
    """The log-likelihood of the tokens from `length` on: alone, without padding."""
    inputs = {} if vector is None else {"demographic_embeds": vector[None]}
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids]), **inputs).logits[0].log_softmax(-1)
    return sum(log_probs[place - 1, ids[place]].item() for place in range(length, len(ids)))


def forwards(model):
    """Counts the rows of each forward that follows."""
    rows = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


# ------------------------------------------------------------------------------------------------ likelihoods
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2", "bloom"])
def test_equals_one_row_at_a_time_on_either_side(tokenizer, architecture, padding_side):
    """Options of one and of several tokens, another profile for each pair, batches of a few rows."""
    # BLOOM's attention is in float32 whatever the model is, in which float64's mask for padding is no number.
    dtype, tolerance = (torch.float32, 2e-5) if architecture == "bloom" else (torch.float64, 1e-10)
    model = build(tokenizer, architecture, dtype)
    vectors = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    prompt, profile = np.array([0, 1, 2, 1, 0, 2, 1]), np.array([0, 1, 2, 3, 3, 0, 1])
    log_probs, single = option_log_probs(
        model,
        tokenizer,
        TEXTS,
        OPTIONS,
        prompt=prompt,
        profile=profile,
        demographic_embeds=vectors,
        padding_side=padding_side,
        max_batch_tokens=150,
    )
    for row, (text, vector) in enumerate(zip(prompt, vectors[profile], strict=True)):
        context = tokenizer(TEXTS[text])["input_ids"]
        for k, option in enumerate(OPTIONS[text]):
            ids = tokenizer(TEXTS[text] + option)["input_ids"]
            assert ids[: len(context)] == context
            assert log_probs[row, k] == pytest.approx(by_hand(model, ids, len(context), vector), abs=tolerance)
        assert np.isneginf(log_probs[row, len(OPTIONS[text]) :]).all()
    sizes = [[len(tokenizer(option)["input_ids"]) for option in some] for some in OPTIONS]
    assert single.tolist() == [max(sizes[text]) == 1 for text in prompt] and {True, False} == set(single.tolist())


@pytest.mark.parametrize("kind", ["plain", "lora", "p-tuning"])
def test_models_that_read_no_profile(tokenizer, kind):
    model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=32).double()
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).double()
    elif kind == "p-tuning":  # whose logits begin with those of its virtual tokens
        config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)
        model = get_peft_model(model, config).double()
    model.eval()
    log_probs, _ = option_log_probs(model, tokenizer, TEXTS, OPTIONS)
    for row, (text, some) in enumerate(zip(TEXTS, OPTIONS, strict=True)):
        for k, option in enumerate(some):
            ids, length = tokenizer(text + option)["input_ids"], len(tokenizer(text)["input_ids"])
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0]
            each = logits[-len(ids) :].log_softmax(-1)
            expected = sum(each[place - 1, ids[place]].item() for place in range(length, len(ids)))
            assert log_probs[row, k] == pytest.approx(expected, abs=1e-9)
    if kind == "p-tuning":
        with pytest.raises(ValueError, match="`padding_side` is 'left'"):
            option_log_probs(model, tokenizer, TEXTS, OPTIONS, padding_side="left")


def test_a_model_that_gives_logits_of_all_positions_only(tokenizer):
    class Whole(LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
            return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache)

    model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=32)
    whole = Whole(model.config).eval()
    whole.load_state_dict(model.state_dict())
    expected, _ = option_log_probs(model, tokenizer, TEXTS, OPTIONS)
    for padding_side in ("right", "left"):
        found, _ = option_log_probs(whole, tokenizer, TEXTS, OPTIONS, padding_side=padding_side)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bfloat16_is_summed_in_float32(tokenizer):
    """The model's own rounding stays, of the logits to 3 digits; the sum over the vocabulary adds none."""
    model = build(tokenizer, dtype=torch.bfloat16)
    vectors = torch.zeros(1, 4)
    found, _ = option_log_probs(
        model, tokenizer, TEXTS[:1], [[" A"]], prompt=np.array([0]), profile=np.array([0]), demographic_embeds=vectors
    )
    ids = tokenizer(TEXTS[0])["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), demographic_embeds=vectors).logits[0, -1]
    assert found[0, 0] == pytest.approx(
        logits.double().log_softmax(-1)[tokenizer(" A")["input_ids"][0]].item(), abs=1e-5
    )


# ------------------------------------------------------------------------------------------------ economy
def test_each_unique_pair_is_computed_once(tokenizer):
    """
    Two prompts (one of them twice) and three rows of vectors, two of them equal: 2 × 2 pairs. Their options are one
    token each, so that each pair is one row of a forward.
    """
    model = build(tokenizer, dtype=torch.float32)
    rows = forwards(model)
    prompts, letters = [TEXTS[0], TEXTS[2], TEXTS[0]], [[" A", " B"], [" A", " B", " C"], [" A", " B"]]
    pairs = np.array([(p, v) for p in range(3) for v in range(3)] * 2)
    vectors = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [1.0, 0, 0, 0]])
    log_probs, _ = option_log_probs(
        model, tokenizer, prompts, letters, prompt=pairs[:, 0], profile=pairs[:, 1], demographic_embeds=vectors
    )
    assert rows == [4]
    np.testing.assert_array_equal(log_probs[:9], log_probs[9:])
    np.testing.assert_array_equal(log_probs[0], log_probs[2])  # equal vectors
    np.testing.assert_array_equal(log_probs[0], log_probs[6])  # equal prompts
    assert np.abs(log_probs[0, :2] - log_probs[1, :2]).min() > 1e-3  # other vectors


def test_options_that_differ_in_their_last_token_share_a_forward(tokenizer):
    """ " 1 a", " 1 b" and " 1 c" are " 1" and one token each: one input, " 1" behind the prompt. " x" is another."""
    model = build(tokenizer, dtype=torch.float32, routing="semantic", demographic_dim=None)
    rows = forwards(model)
    sizes = [len(tokenizer(text)["input_ids"]) for text in (" 1", " 1 a", " 1 b", " 1 c", " x")]
    assert [size - sizes[0] for size in sizes[1:4]] == [2, 2, 2]  # " " and a letter
    option_log_probs(model, tokenizer, TEXTS[:1], [[" 1 a", " 1 b", " 1 c"]])
    assert sum(rows) == 1


def test_batches_keep_to_their_tokens_the_longest_first(tokenizer):
    model = build(tokenizer, dtype=torch.float32, routing="semantic", demographic_dim=None)
    shapes = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prompts = [TEXTS[0] + " well" * n for n in range(12)]
    option_log_probs(model, tokenizer, prompts, [[" A", " B"]] * 12, max_batch_tokens=120)
    assert sum(rows for rows, _ in shapes) == 12
    assert all(rows * width <= 120 or rows == 1 for rows, width in shapes)
    assert [width for _, width in shapes] == sorted((width for _, width in shapes), reverse=True)


def test_the_modes_of_all_modules_come_back(tokenizer):
    model = build(tokenizer, dtype=torch.float32, routing="semantic", demographic_dim=None).train()
    frozen = model.get_base_model().model.layers[0].mlp.eval()
    option_log_probs(model, tokenizer, TEXTS, OPTIONS)
    assert model.training and not frozen.training and model.get_base_model().model.layers[1].mlp.training
    with pytest.raises(ValueError, match="context of 2048 tokens"):
        option_log_probs(model, tokenizer, ["well " * 3000], [[" A", " B"]])
    assert model.training


def test_no_pairs(tokenizer):
    model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=32)
    log_probs, single = option_log_probs(model, tokenizer, TEXTS, OPTIONS, prompt=np.zeros(0, dtype=int))
    assert len(log_probs) == len(single) == 0


# ------------------------------------------------------------------------------------------------ tokens
@pytest.mark.parametrize("template", [None, THINKING])
@pytest.mark.parametrize("kind", ["text", "text with a blank at its end", "conversation"])
def test_tokens_are_those_that_trl_trains_on(tokenizer, tmp_path, kind, template):
    """The context and an option are what SFTTrainer makes of prompt and completion, up to what ends an answer."""
    tokenizer = chat_tokenizer(TEXTS, vocab_size=330)
    tokenizer.chat_template = template or tokenizer.chat_template
    prompts, options = (CONVERSATIONS, SAID) if kind == "conversation" else (TEXTS, OPTIONS)
    if kind.startswith("text with"):
        prompts, options = [text + " " for text in TEXTS], SAID
    rows = [(p, o) for p, some in zip(prompts, options, strict=True) for o in some]
    answers = [[{"role": "assistant", "content": o}] if kind == "conversation" else o for _, o in rows]
    trainer = SFTTrainer(
        tiny_model("llama", vocab_size=len(tokenizer), hidden_size=32),
        args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None),
        train_dataset=Dataset.from_dict({"prompt": [p for p, _ in rows], "completion": answers}),
        processing_class=tokenizer,
    )
    encoded = [
        (entry.context.tolist(), list(tokens))
        for entry in encode_options(tokenizer, prompts, options)
        for tokens in entry.options
    ]
    for (context, tokens), row, (_, option) in zip(encoded, trainer.train_dataset, rows, strict=True):
        ids = row["input_ids"]
        trained = [place for place, label in enumerate(row["labels"]) if label != -100]
        assert ids[: len(context) + len(tokens)] == context + tokens
        assert tokenizer.decode(ids[len(context) + len(tokens) :]).startswith("<|im_end|>")
        if kind == "conversation" and template:  # the block of thoughts is trained on, and is no part of an option
            assert tokenizer.decode(ids[trained[0] : len(context)]) == "<think>\n\n</think>\n\n"
        else:
            assert trained[0] == len(context)
        assert tokenizer.decode(tokens).strip() == option.strip()


def test_what_is_found_of_one_text_holds_for_others_that_end_alike(tokenizer):
    """Texts of many lengths and ends, each with all its options, against a tokenization of each with each."""
    ends = ["? Answer:", "?\n\nA. Yes\nB. No\n\nAnswer with the letter of one option.", "yes", "  ", "\n\n"]
    prompts = [("Is it good, " * n) + "is it" + end for n in range(1, 9) for end in ends]
    options = [[" yes", "yes", " A", "A", "\n!", " no, never"]] * len(prompts)
    for prompt, entry in zip(prompts, encode_options(tokenizer, prompts, options), strict=True):
        for option, tokens in zip(options[0], entry.options, strict=True):
            assert [*entry.context, *tokens] == tokenizer(prompt + option)["input_ids"]


def test_where_one_option_begins_another_what_ends_an_answer_counts(tokenizer):
    """Else "1" would hold the probability of "10" too."""
    model = build(tokenizer, routing="semantic", demographic_dim=None)
    found, single = option_log_probs(model, tokenizer, TEXTS[:1], [[" 1", " 10"]])
    length = len(tokenizer(TEXTS[0])["input_ids"])
    for k, option in enumerate((" 1", " 10")):
        ids = tokenizer(TEXTS[0] + option + tokenizer.eos_token)["input_ids"]
        assert found[0, k] == pytest.approx(by_hand(model, ids, length), abs=1e-10)
    assert not single.any()
    found, _ = option_log_probs(model, tokenizer, CONVERSATIONS[:1], [["1", "10"]])
    head = tokenizer.apply_chat_template(CONVERSATIONS[0], add_generation_prompt=True)["input_ids"]
    for k, option in enumerate(("1", "10")):
        answer = {"role": "assistant", "content": option}
        ids = tokenizer.apply_chat_template([*CONVERSATIONS[0], answer])["input_ids"]
        assert found[0, k] == pytest.approx(by_hand(model, ids, len(head)), abs=1e-10)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "match"),
    [
        (["A x", "B y"], [[" A", " B"], [" A", "  A"]], ValueError, "' A' and '  A' of prompt 1 are the same tokens"),
        (["A x"], [[" A", " Q"]], ValueError, "' Q' of prompt 0 holds a token that the tokenizer doesn't know"),
        (["A x"], [[" A", " "]], ValueError, "' ' of prompt 0 is blank"),
        ([""], [["A", "B"]], ValueError, "Prompt 0 has no token before"),
        (["A x"], [[]], ValueError, "Prompt 0 has no options"),
        (["A x", [{"role": "user", "content": "A"}]], [["A"], ["A"]], TypeError, "Prompt 1 is a text|conversation"),
    ],
)
def test_what_has_no_likelihood_is_refused(prompts, options, error, match):
    tokenizer = word_tokenizer(["A B x y"])
    with pytest.raises(error, match=match):
        encode_options(tokenizer, prompts, options)


def test_a_template_that_changes_the_answer_is_refused(tokenizer):
    tokenizer = chat_tokenizer(TEXTS)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match="doesn't say an assistant's message once and as it is"):
        encode_options(tokenizer, CONVERSATIONS, SAID)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"padding_side": "middle"}, "'middle', expected 'right' or 'left'"),
        ({"max_batch_tokens": 0}, "`max_batch_tokens` is 0"),
        ({"profile": np.array([0, 0, 0])}, "`profile` was passed without `demographic_embeds`"),
        ({"demographic_embeds": torch.zeros(2, 4)}, "2 entries for 3 pairs"),
    ],
)
def test_arguments_that_do_not_fit(tokenizer, arguments, match):
    with pytest.raises(ValueError, match=match):
        option_log_probs(build(tokenizer), tokenizer, TEXTS, OPTIONS, **arguments)


# ------------------------------------------------------------------------------------------------ surveys
@pytest.fixture(scope="module")
def survey():
    return simulate_survey(0, num_questions=8, num_topics=8, answers_per_person=2, max_cells=50)


@pytest.mark.parametrize("prompt_profile", [False, True])
def test_a_surveys_cells_equal_one_prompt_at_a_time(survey, prompt_profile):
    """Prompts of different lengths, repeated cells, another profile for each: nothing depends on the batch."""
    tokenizer = build_tokenizer(survey)
    model = build(tokenizer)
    cells = survey.cells["held_out_people"]
    question, profile = np.tile(cells.question[:12], 2), np.tile(cells.profile[:12], 2)
    vectors = torch.randn(len(survey.profiles), 4, generator=torch.Generator().manual_seed(0)).double()
    log_probs = survey_log_probs(
        model,
        tokenizer,
        survey,
        question,
        profile,
        prompt_profile=prompt_profile,
        demographic_embeds=vectors,
        max_batch_tokens=150,
    )
    for row, (q, p) in enumerate(zip(question, profile, strict=True)):
        text = format_prompt(survey.questions[q], survey.profiles[p] if prompt_profile else None)
        size = survey.num_options[q]
        for k in range(size):
            ids = tokenizer(text + format_completion(k))["input_ids"]
            assert log_probs[row, k] == pytest.approx(by_hand(model, ids, len(ids) - 1, vectors[p]), abs=1e-10)
        assert np.isneginf(log_probs[row, size:]).all() and log_probs.shape[1] == survey.max_options


def test_what_the_options_leave_is_outside(survey):
    tokenizer = build_tokenizer(survey)
    cells = survey.cells["held_out_people"].sample(10)
    vectors = torch.zeros(len(survey.profiles), 4)
    log_probs = survey_log_probs(
        build(tokenizer, dtype=torch.float32),
        tokenizer,
        survey,
        cells.question,
        cells.profile,
        demographic_embeds=vectors,
    )
    probs, outside = split_options(log_probs)
    np.testing.assert_allclose(probs.sum(1), 1)
    np.testing.assert_allclose(probs / probs.max(1, keepdims=True), np.exp(log_probs - log_probs.max(1)[:, None]))
    np.testing.assert_allclose(outside, 1 - np.exp(log_probs).sum(1))
    assert (outside > 0.5).all()  # an untrained model knows nothing of letters


def test_options_that_are_all_but_impossible_have_shares():
    """exp(-1000) is 0 in floating point, exp(-1000) : exp(-1001) is e : 1."""
    probs, outside = split_options(np.array([[-1000.0, -1001.0, -np.inf]]))
    np.testing.assert_allclose(probs, [[np.e / (1 + np.e), 1 / (1 + np.e), 0]])
    assert outside == [1.0]


# ------------------------------------------------------------------------------------------------ processes
WORKER = """
import json, sys
import numpy as np, torch
from accelerate import PartialState
sys.path.insert(0, sys.argv[2])
from test_options import OPTIONS, TEXTS, build, forwards
from trl_cuma.evaluation.options import option_log_probs
from trl_cuma.testing import chat_tokenizer

state = PartialState(cpu=True)
tokenizer = chat_tokenizer(TEXTS + [option for some in OPTIONS for option in some], vocab_size=330)
model = build(tokenizer)
rows = forwards(model)
prompt, profile = np.repeat(np.arange(3), 3), np.tile(np.arange(3), 3)
vectors = torch.eye(4)[:3].double()
found = option_log_probs(model, tokenizer, TEXTS, OPTIONS, prompt=prompt, profile=profile, demographic_embeds=vectors,
                         max_batch_tokens=int(sys.argv[3]))
result = {"log_probs": np.where(np.isinf(found.log_probs), -1e9, found.log_probs).tolist(), "rows": rows}
json.dump(result | {"world": state.num_processes}, open(f"{sys.argv[1]}/{state.process_index}.json", "w"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("max_batch_tokens", [150, 10_000])
def test_processes_share_the_work_and_each_gets_the_whole(tmp_path, max_batch_tokens):
    """With 10,000 tokens there is one batch for two processes: the second one repeats it, and nothing is doubled."""
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "PYTEST_"))}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PET_STANDALONE": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [str(tmp_path / "worker.py"), str(tmp_path), str(Path(__file__).parent), str(max_batch_tokens)]
    found = {}
    for world in (1, 2):
        config = str(ROOT / "recipes" / "accelerate_configs" / "ddp.yaml")
        options = ["--config_file", config, "--num_processes", "2", "--mixed_precision", "no"]
        launcher = [] if world == 1 else ["-m", "accelerate.commands.launch", *options]
        subprocess.run([sys.executable, *launcher, *arguments], env=environment, check=True, timeout=300)
        found[world] = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    (alone,), both = found[1], found[2]
    assert [each["world"] for each in both] == [2, 2]
    for each in both:
        np.testing.assert_allclose(each["log_probs"], alone["log_probs"], atol=1e-10)
    assert len(both[0]["rows"]) == len(both[1]["rows"]) == -(-len(alone["rows"]) // 2)
    if max_batch_tokens == 150:
        assert sum(both[0]["rows"]) < sum(alone["rows"])
