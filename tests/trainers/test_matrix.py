# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Trainer × feature: each cell trains, and in each forward each row (each token, where rows are packed) has the profile
of the person whom its own words name. `python tests/trainers/test_matrix.py` prints the table of the README.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

import trl_cuma
from trl_cuma import CuMAConfig, FieldEncoder, TextEncoder
from trl_cuma.testing import minilm_path, tiny_model, word_tokenizer

ROOT = Path(__file__).parents[2]
TRAINERS = ("SFT", "DPO", "KTO", "Reward", "GRPO")
PEOPLE = 8
TEMPLATE = """\
{%- for message in messages %}{{ message['role'] + ' ' }}\
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' <eos> ' }}{% endgeneration %}\
{%- else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}\
{%- if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"""

PREFERENCE, REFERENCED = ("DPO", "Reward"), ("DPO", "KTO")
PACKED = {"packing": True, "max_length": 24}
# feature → trainers that have it, and the arguments that ask for it
FEATURES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain text": (TRAINERS, {"form": "plain"}),
    "conversations": (TRAINERS, {"form": "chat"}),
    "language modelling, `text`": (("SFT",), {"form": "text"}),
    "language modelling, `messages`": (("SFT",), {"form": "messages"}),
    "`assistant_only_loss`": (("SFT",), {"form": "messages", "assistant_only_loss": True}),
    "`completion_only_loss=False`": (("SFT",), {"form": "plain", "completion_only_loss": False}),
    "implicit prompt": (PREFERENCE, {"form": "implicit"}),
    "packing, `bfd`": (("SFT",), PACKED),
    "packing, `bfd_split`": (("SFT",), PACKED | {"packing_strategy": "bfd_split"}),
    "packing, `wrapped`": (("SFT",), PACKED | {"packing_strategy": "wrapped"}),
    "`padding_free`": (("SFT",), {"padding_free": True, "max_length": None}),
    "streaming": (TRAINERS, {"streaming": True}),
    "streaming, packed": (("SFT",), PACKED | {"streaming": True}),
    "two data loader workers": (TRAINERS, {"dataloader_num_workers": 2}),
    "`train_sampling_strategy: sequential`": (TRAINERS, {"train_sampling_strategy": "sequential"}),
    "`train_sampling_strategy: group_by_length`": (("SFT",), {"train_sampling_strategy": "group_by_length"}),
    "`remove_unused_columns: false`": (TRAINERS, {"remove_unused_columns": False}),
    "dict of evaluation sets": (TRAINERS, {"evaluation": "dict"}),
    "`evaluate(new_dataset)`": (TRAINERS, {"evaluation": "new"}),
    "gradient accumulation": (TRAINERS, {"gradient_accumulation_steps": 2}),
    "gradient checkpointing": (TRAINERS, {"gradient_checkpointing": True}),
    "gradient checkpointing, reentrant": (
        TRAINERS,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "bf16 autocast": (TRAINERS, {"bf16": True}),
    "profiles as text": (TRAINERS, {"profiles": "text"}),
    "profiles as vectors": (TRAINERS, {"profiles": "vectors"}),
    "`routing: semantic`, no profile": (TRAINERS, {"profiles": "none"}),
    "continued adapter (`cuma_adapter_path`)": (TRAINERS, {"continued": True}),
    "resumed from a checkpoint": (TRAINERS, {"resumed": True}),
    "explicit reference model": (REFERENCED, {"explicit_reference": True}),
    "`precompute_ref_log_probs`": (REFERENCED, {"precompute_ref_log_probs": True}),
    "the same, of a continued adapter": (REFERENCED, {"precompute_ref_log_probs": True, "continued": True}),
    "KL to the reference (`beta`)": (("GRPO",), {"beta": 0.1}),
    "several iterations (`num_iterations`)": (("GRPO",), {"num_iterations": 2, "steps_per_generation": 2}),
    "routing statistics by group": (TRAINERS, {"evaluation": "dict", "cuma_group_by": ["who"]}),
}
REFUSED: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "image data": (TRAINERS, {"images": True}, "a vision tower's layers see patches"),
    "`use_vllm`": (("GRPO",), {"use_vllm": True}, "have no weights that they could be merged into"),
}
CELLS = [(feature, name) for feature, (trainers, _) in FEATURES.items() for name in trainers]


def table() -> str:
    """The README's: what trains in every cell, is refused, or isn't there in TRL."""
    lines = ["| | " + " | ".join(TRAINERS) + " |", "|---" * (len(TRAINERS) + 1) + "|"]
    for feature, (trainers, _) in FEATURES.items():
        lines.append(f"| {feature} | " + " | ".join("✓" if name in trainers else "" for name in TRAINERS) + " |")
    for feature, (trainers, _, _) in REFUSED.items():
        lines.append(f"| {feature} | " + " | ".join("refused" if n in trainers else "" for n in TRAINERS) + " |")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    people = " ".join(f"p{person}" for person in range(PEOPLE))
    tokenizer = word_tokenizer([f"{people} x yes no user assistant who:"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def rows(trainer: str, form: str = "plain", profiles: str = "mapping") -> Dataset:
    """Eight people, each with a question that names them; of different lengths."""
    found = []
    for person in range(PEOPLE):
        question, answer, other = "x " * (1 + person % 3) + f"p{person}", " yes", " no"
        if form in ("chat", "messages"):
            question = [{"role": "user", "content": question.strip()}]
            answer, other = ([{"role": "assistant", "content": text.strip()}] for text in (answer, other))
        row: dict[str, Any] = {"prompt": question}
        if trainer == "SFT":
            joined = {"text": "text", "messages": "messages"}.get(form)
            row = {joined: question + answer} if joined else row | {"completion": answer}
        elif trainer == "KTO":
            row |= {"completion": answer, "label": person % 2 == 0}
        elif trainer in PREFERENCE:
            row |= {"chosen": answer, "rejected": other}
            if form == "implicit":
                row = {"chosen": question + answer, "rejected": question + other}
        if profiles != "none":
            row["demographic"] = {
                "mapping": {"who": f"p{person}"},
                "text": f"who: p{person}",
                "vectors": [float(person), 1.0],
            }[profiles]
        found.append(row)
    return Dataset.from_list(found)


@pytest.fixture
def make(quick: dict, words: PreTrainedTokenizerBase) -> Callable[..., Any]:
    """A trainer for one cell, and its check of the profiles."""

    def base(name: str, seed: int = 0) -> Any:
        model = tiny_model("qwen3", vocab_size=len(words), hidden_size=32, num_attention_heads=2, seed=seed)
        if name != "Reward":
            return model
        model.config.num_labels = 1
        return AutoModelForSequenceClassification.from_config(model.config)

    def build(
        name: str,
        form: str = "plain",
        profiles: str = "mapping",
        streaming: bool = False,
        evaluation: str | None = None,
        explicit_reference: bool = False,
        images: bool = False,
        adapter_path: str | None = None,
        **fields: Any,
    ) -> Any:
        config_class, trainer_class = (getattr(trl_cuma, f"CuMA{name}{kind}") for kind in ("Config", "Trainer"))
        data = rows(name, form, profiles)
        if images:
            data = data.add_column("image", ["a.png"] * PEOPLE)
        only_grpo = {"max_completion_length": 3, "num_generations": 2} if name == "GRPO" else {}
        encoder = None
        if profiles in ("mapping", "text"):
            encoder = FieldEncoder(min_count=1) if profiles == "mapping" else TextEncoder(str(minilm_path()))
            encoder.fit(data["demographic"])
        kwargs: dict[str, Any] = {}
        if name == "GRPO":
            kwargs["reward_funcs"] = lambda completions, **columns: [float(i % 3) for i in range(len(completions))]
        if explicit_reference:
            kwargs["ref_model"] = base(name, seed=1)
        sizes = {"target_modules": ["q_proj", "v_proj"], "num_experts": 4, "r": 2, "router_hidden": 8}
        routing = "semantic" if profiles == "none" else "joint"
        return trainer_class(
            base(name),
            args=config_class(**(quick | only_grpo | {"cuma_adapter_path": adapter_path} | fields)),
            train_dataset=data.to_iterable_dataset(num_shards=2) if streaming else data,
            eval_dataset={"a": data, "b": data} if evaluation == "dict" else None,
            processing_class=words,
            peft_config=None if adapter_path else CuMAConfig(**sizes, routing=routing, init_weights=False),
            demographic_encoder=None if adapter_path else encoder,
            **kwargs,
        )

    return build


def watch(trainer: Any, words: PreTrainedTokenizerBase, profiles: str) -> list[int]:
    """Check the profiles of every forward from now on; counts the rows or tokens that were checked."""
    checked: list[int] = []
    person_of = {words.convert_tokens_to_ids(f"p{person}"): person for person in range(PEOPLE)}
    values = rows("GRPO", profiles=profiles)["demographic"]

    def check(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        embeds = kwargs.get("demographic_embeds")
        if embeds is None:  # a step of `generate`, which test_grpo looks at
            return
        tokens = kwargs["input_ids"]
        ids = kwargs.get("demographic_ids", torch.arange(len(tokens))[:, None].expand_as(tokens))
        seen: set[int] = set()
        for token, row in zip(tokens.flatten().tolist(), ids.flatten().tolist(), strict=True):
            if token in person_of and row not in seen:  # what GRPO generates may name another person, later
                seen.add(row)
                expected = trainer.demographic_table([values[person_of[token]]])[0]
                torch.testing.assert_close(embeds[row].float().cpu(), expected)
                checked.append(person_of[token])

    trainer.model.get_base_model().register_forward_pre_hook(check, with_kwargs=True, prepend=True)
    return checked


@pytest.mark.parametrize(("feature", "name"), CELLS, ids=[f"{name}-{feature}" for feature, name in CELLS])
def test_every_row_trains_with_its_own_profile(make, words, feature, name, tmp_path) -> None:
    fields = dict(FEATURES[feature][1])
    continued, resumed = fields.pop("continued", False), fields.pop("resumed", False)
    profiles = fields.get("profiles", "mapping")
    if "cuma_group_by" in fields:
        fields["cuma_min_group_size"] = 1
    if continued:
        before = make(name, learning_rate=0.05)
        before.train()
        before.save_model(tmp_path / "before")
        fields["adapter_path"] = str(tmp_path / "before")
    if resumed:
        fields |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        make(name, **fields).train()
        shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    trainer = make(name, **fields)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    checked = watch(trainer, words, profiles) if profiles != "none" else [0]
    trainer.train(resume_from_checkpoint=resumed or None)
    assert trainer.state.global_step == (2 if resumed else 1)
    after = dict(trainer.model.named_parameters())
    changed = [n for n, value in before.items() if not torch.equal(after[n], value)]
    assert any("cuma_experts" in n for n in changed) and any("cuma_router" in n for n in changed)
    if profiles != "none":
        assert set(checked) == set(range(PEOPLE)) or name == "GRPO"  # whose batch holds half of the prompts
        assert checked
    checked.clear()
    if "evaluation" in fields:
        new = rows(name)
        metrics = trainer.evaluate(new if fields["evaluation"] == "new" else None)
        assert checked and metrics
    if "cuma_group_by" in fields:
        assert {f"eval_{d}_router/who=p{p}/utilization" for d in "ab" for p in range(PEOPLE)} <= metrics.keys()


@pytest.mark.parametrize(
    ("feature", "name"), [(feature, name) for feature, (names, *_) in REFUSED.items() for name in names]
)
def test_what_cannot_carry_a_profile_is_refused(make, feature, name) -> None:
    _, fields, message = REFUSED[feature]
    with pytest.raises(NotImplementedError, match=message):
        make(name, **fields)


def test_the_readme_has_this_table() -> None:
    assert table() in (ROOT / "README.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    print(table())
