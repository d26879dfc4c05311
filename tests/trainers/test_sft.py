# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset

from trl_cuma import CuMASFTConfig, CuMASFTTrainer, FieldEncoder
from trl_cuma.adapter.router import CuMARouter


def losses(trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize("form", ["dict", "text", "vector"])
def test_trains_with_trl_defaults(form, arguments, make_base, make_adapter, tokenizer, sft_data, text_encoder):
    encoder = {"dict": FieldEncoder(min_count=2), "text": text_encoder, "vector": None}[form]
    args = CuMASFTConfig(**arguments, max_steps=2, logging_steps=1)
    assert args.remove_unused_columns and args.gradient_checkpointing and args.bf16  # TRL's own
    trainer = CuMASFTTrainer(
        make_base(),
        args=args,
        train_dataset=sft_data(form=form),
        processing_class=tokenizer,
        peft_config=make_adapter(),
        demographic_encoder=encoder,
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert any("cuma_router" in name for name in changed) and any("weight_b" in name for name in changed)
    record = trainer.state.log_history[0]
    assert all(math.isfinite(value) for value in record.values())
    assert {"aux_loss", "router/utilization", "router/entropy", "router/dead_experts"} <= record.keys()
    assert "z_loss" not in record  # not weighted


QUESTION, ANSWER = {"role": "user", "content": "Question?"}, {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    "columns, arguments",
    [
        ({"prompt": [QUESTION], "completion": [ANSWER]}, {}),
        ({"prompt": "Question? ", "completion": "yes"}, {}),
        ({"messages": [QUESTION, ANSWER]}, {"assistant_only_loss": True}),
        ({"text": "Question? yes"}, {}),
    ],
    ids=["conversational", "prompt-completion", "messages", "text"],
)
def test_each_row_keeps_its_profile_in_every_style_of_data(columns, arguments, make_sft):
    rows = [{**columns, "who": [float(row), 1.0]} for row in range(4)]
    trainer = make_sft(
        Dataset.from_list(rows),
        encoder=None,
        demographic_column="who",
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        **arguments,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["demographic_embeds"].tolist() == [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]
    trainer.train()
    assert losses(trainer)[0] > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_shuffled_rows_keep_their_profiles(workers, make_sft, make_base, tokenizer):
    rows = [{"text": f"{row} " * 3, "demographic": [float(row)]} for row in range(8)]
    trainer = make_sft(
        Dataset.from_list(rows), encoder=None, per_device_train_batch_size=2, dataloader_num_workers=workers
    )
    seen = []
    for batch in trainer.get_train_dataloader():
        for ids, (profile,) in zip(batch["input_ids"], batch["demographic_embeds"].tolist(), strict=True):
            assert tokenizer.decode(ids).startswith(f"{profile:.0f} ")
            seen.append(profile)
    assert sorted(seen) == list(range(8)) and seen != sorted(seen)


def test_the_profile_reaches_the_router(make_sft):
    trainer = make_sft(adapter={"init_weights": False, "lora_alpha": 64}, train_sampling_strategy="sequential")
    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    swapped = {**batch, "demographic_embeds": batch["demographic_embeds"].roll(1, 0)}
    with torch.no_grad():
        loss, same, other = (trainer.compute_loss(trainer.model, dict(b)) for b in (batch, batch, swapped))
    assert torch.equal(loss, same)
    assert (loss - other).abs() > 1e-5


def test_training_learns_to_use_the_profile(make_sft, make_base):
    # The answer depends on nothing but the profile, which only the router sees.
    answers, people = ("no", "yes"), ([0.0, 1.0], [1.0, 0.0])
    rows = [{"prompt": "Q ", "completion": answers[i % 2], "demographic": people[i % 2]} for i in range(8)]
    trainer = make_sft(
        Dataset.from_list(rows),
        model=make_base(initializer_range=0.2),  # logits of a useful size
        adapter={"lora_alpha": 16},
        encoder=None,
        max_steps=60,
        learning_rate=0.02,
        logging_steps=60,
    )
    trainer.train()
    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    swapped = {**batch, "demographic_embeds": 1 - batch["demographic_embeds"]}
    with torch.no_grad():
        right, wrong = (trainer.compute_loss(trainer.model, dict(b)).item() for b in (batch, swapped))
    assert wrong > right + 0.5


def test_aux_loss_is_the_formula(make_sft, sft_data):
    trainer = make_sft(sft_data(4))
    logits: list[torch.Tensor] = []
    hooks = [m.register_forward_hook(lambda m, i, o: logits.append(o)) for m in trainer.model.modules()
             if isinstance(m, CuMARouter)]  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        trainer.model(**batch)
    for hook in hooks:
        hook.remove()
    # mean over routers of E * sum_i f_i P_i; each document weighs the same, padding nothing
    mask = batch["attention_mask"].float()
    assert mask.min() == 0
    weights = (mask / mask.sum(1, keepdim=True) / len(mask)).unsqueeze(-1)
    aux, entropy = [], []
    for z in logits:
        p = z.softmax(-1)
        f = torch.nn.functional.one_hot(z.topk(2, dim=-1).indices, 4).sum(-2) / 2
        aux.append(4 * ((f * weights).sum((0, 1)) * (p * weights).sum((0, 1))).sum().item())
        entropy.append(-(p * p.log() * weights).sum().item())
    trainer.train()
    record = trainer.state.log_history[0]
    assert len(aux) == 4  # two layers, two target modules
    assert record["aux_loss"] == pytest.approx(sum(aux) / 4, abs=1e-5)
    assert record["router/entropy"] == pytest.approx(sum(entropy) / 4, abs=1e-5)


def test_weights_of_the_router_losses(make_sft):
    plain = make_sft(cuma_aux_loss_coef=0.0)
    weighted = make_sft(cuma_aux_loss_coef=0.5, cuma_z_loss_coef=0.25)
    plain.train()
    weighted.train()
    record = weighted.state.log_history[0]
    assert record["aux_loss"] == pytest.approx(plain.state.log_history[0]["aux_loss"], abs=1e-6)  # logged either way
    expected = losses(plain)[0] + 0.5 * record["aux_loss"] + 0.25 * record["z_loss"]
    assert losses(weighted)[0] == pytest.approx(expected, abs=1e-5)


def test_the_published_balance_loss_is_the_sum_over_routers_of_gates(make_sft):
    """Certain routers choose experts 0 and 1, at gates 0.731 and 0.269: 4 · (1/2 · 0.731 + 1/2 · 0.269) = 2 each."""
    plain, weighted = (
        make_sft(adapter={"gate": "double_softmax"}, cuma_aux_loss_type="published", cuma_aux_loss_coef=coefficient)
        for coefficient in (0.0, 0.5)
    )
    for trainer in (plain, weighted):
        collapse(trainer, [99.0, 9.0, -9.0, -9.0])
        trainer.train()
    record = weighted.state.log_history[0]
    assert record["aux_loss"] == pytest.approx(2.0 * 4, abs=1e-4)  # four routers
    assert losses(weighted)[0] == pytest.approx(losses(plain)[0] + 0.5 * record["aux_loss"], abs=1e-4)


def test_a_lora_with_film_trains_without_routers(make_sft, sft_data, trainable):
    trainer = make_sft(
        adapter={"film_hidden": 4, "num_experts": 1, "top_k": 1, "routing": "demographic"},
        eval_dataset=sft_data(4),
        max_steps=3,
    )
    before = trainable(trainer)
    trainer.train()
    changed = [name for name, value in trainable(trainer).items() if not torch.equal(value, before[name])]
    assert sorted(changed) == sorted(before) and any("cuma_film" in name for name in changed)
    assert not [key for record in trainer.state.log_history for key in record if "aux" in key or "router" in key]
    assert trainer.evaluate()["eval_loss"] > 0


def collapse(trainer, bias: list[float]) -> None:
    """All tokens to the experts with the largest biases."""
    with torch.no_grad():
        for module in trainer.model.modules():
            if isinstance(module, CuMARouter):
                module.rest[-1].weight.zero_()
                module.rest[-1].bias.copy_(torch.tensor(bias))


def test_accumulation_does_not_double_the_router_loss(make_sft, sft_data, aux_gradient):
    def data():
        rows = sft_data(2).to_list()
        return Dataset.from_list(rows + rows)  # two equal micro-batches: the mean over them is either's

    fields = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2}
    single = aux_gradient(make_sft, train=data(), **fields)
    double = aux_gradient(make_sft, train=data(), gradient_accumulation_steps=2, **fields)
    assert single.abs().max() > 1e-4
    torch.testing.assert_close(double, single, rtol=1e-4, atol=1e-7)


def test_label_smoothing_keeps_the_router_loss(make_sft, aux_gradient):
    # TRL then runs a second forward, without gradients, for its metrics
    gradient = aux_gradient(make_sft)
    assert gradient.abs().max() > 1e-4
    smoothed = aux_gradient(make_sft, label_smoothing_factor=0.1)
    torch.testing.assert_close(smoothed, gradient, rtol=1e-4, atol=1e-7)


def test_evaluation_reads_the_task_loss(make_sft, sft_data):
    measured = []
    for coefficient in (0.0, 1000.0):
        trainer = make_sft(eval_dataset=sft_data(4), cuma_aux_loss_coef=coefficient, learning_rate=0.0)
        trainer.train()
        measured.append(trainer.evaluate())
        assert not [key for key in measured[-1] if "aux" in key or "router" in key]
    assert measured[0]["eval_loss"] == pytest.approx(measured[1]["eval_loss"], abs=1e-6)


def test_metrics_stay_on_the_device_until_log(make_sft):
    trainer = make_sft()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    for _ in range(2):
        trainer.compute_loss(trainer.model, dict(batch))
    assert trainer._router_metrics.keys() == {"aux_loss", "z_loss", "router_load", "router_entropy"}
    for total in trainer._router_metrics.values():  # a sum, however long it is until the next log
        assert isinstance(total, torch.Tensor) and not total.requires_grad  # no graph is kept
    assert trainer._router_metrics["router_load"].sum(-1) == pytest.approx(torch.full((4,), 2.0))
    logs: dict[str, float] = {}
    trainer.log(logs)
    assert not trainer._router_metrics
    assert 0 < logs["router/utilization"] <= 1 and 0 < logs["router/entropy"] <= math.log(4) + 1e-6


def test_a_collapsed_router_shows(make_sft):
    trainer = make_sft()
    collapse(trainer, [9.0, 9.0, -9.0, -9.0])
    trainer.train()
    record = trainer.state.log_history[0]
    assert record["router/dead_experts"] == 2 * 4  # two of each of four routers
    assert record["router/utilization"] == pytest.approx(0.5, abs=1e-4)  # exp(ln 2) / 4
    assert record["aux_loss"] == pytest.approx(2.0, abs=1e-4)  # 4 * (1/2 * 1/2 + 1/2 * 1/2)
    assert record["router/entropy"] == pytest.approx(math.log(2), abs=1e-4)


def embeds_seen(trainer, run) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    hook = trainer.model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["demographic_embeds"].clone()), with_kwargs=True
    )
    run()
    hook.remove()
    return seen


def test_dropout_zeroes_training_rows_only(make_sft, sft_data):
    trainer = make_sft(demographic_dropout=1.0, eval_dataset=sft_data(4))
    assert all(not embeds.any() for embeds in embeds_seen(trainer, trainer.train))
    assert all(embeds.any(1).all() for embeds in embeds_seen(trainer, trainer.evaluate))
    half = make_sft(sft_data(200), demographic_dropout=0.5, per_device_train_batch_size=200)
    (embeds,) = embeds_seen(half, half.train)
    assert 60 <= embeds.any(1).sum() <= 140  # 100 expected, standard deviation 7


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"demographic_dropout": 1.5}, r"`demographic_dropout` must be in \[0, 1\], got 1.5"),
        ({"cuma_aux_loss_coef": -1.0}, "`cuma_aux_loss_coef` must be 0 or more, got -1.0"),
        ({"cuma_z_loss_coef": float("nan")}, "`cuma_z_loss_coef` must be 0 or more, got nan"),
        ({"cuma_aux_loss_scope": "world"}, "`cuma_aux_loss_scope` must be 'local' or 'ranks', got 'world'"),
        ({"cuma_aux_loss_type": "soft"}, "`cuma_aux_loss_type` must be 'switch' or 'published', got 'soft'"),
        (
            {"cuma_aux_loss_type": "published", "cuma_aux_loss_scope": "ranks"},
            "`cuma_aux_loss_scope='ranks'` with `cuma_aux_loss_type='published'`",
        ),
    ],
)
def test_config_values(fields, message, arguments):
    with pytest.raises(ValueError, match=message):
        CuMASFTConfig(**arguments, **fields)


def test_best_model_is_chosen_by_the_task_loss_and_loaded(make_sft, sft_data, trainable):
    trainer = make_sft(
        eval_dataset=sft_data(4),
        cuma_aux_loss_coef=10.0,
        max_steps=6,
        learning_rate=0.3,  # so high that the last checkpoint isn't the best
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    evals = {record["step"]: record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record}
    best = min(evals, key=evals.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    trainer.model.eval()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evals[best], abs=1e-5)
    assert max(evals.values()) > evals[best] + 1e-3


def test_a_resumed_run_is_the_uninterrupted_one(make_sft, sft_data, trainable):
    def make():
        return make_sft(
            sft_data(16),
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=2,
            demographic_dropout=0.5,
            adapter={"lora_dropout": 0.1},
        )

    trainer = make()
    trainer.train()
    whole = trainable(trainer)
    resumed = make()
    resumed.train(resume_from_checkpoint=str(Path(resumed.args.output_dir) / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for name, weight in trainable(resumed).items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=1e-6, msg=name)


def test_streaming_data(make_sft, sft_data, text_encoder):
    stream = sft_data(form="text").to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    trainer = make_sft(stream, encoder=text_encoder, eval_dataset=sft_data(4, "text").to_iterable_dataset())
    trainer.train()
    assert losses(trainer)[0] > 0 and trainer.evaluate()["eval_loss"] > 0


def test_evaluating_another_data_set(make_sft, sft_data):
    trainer = make_sft(adapter={"init_weights": False, "lora_alpha": 64})
    new = sft_data(4).map(lambda row: {"demographic": {"age": row["demographic"]["age"], "country": "BR"}})
    assert trainer.evaluate(new)["eval_loss"] != pytest.approx(trainer.evaluate(sft_data(4))["eval_loss"], abs=1e-6)
    both = trainer.evaluate({"a": new, "b": sft_data(4)})
    assert both["eval_b_loss"] == pytest.approx(trainer.evaluate(sft_data(4))["eval_loss"], abs=1e-6)
    with pytest.raises(ValueError, match=r"no 'demographic' column; it has \['completion', 'prompt'\]"):
        trainer.evaluate(new.remove_columns("demographic"))


def test_named_evaluation_sets_and_predict(make_sft, sft_data):
    sets = {"a": sft_data(4), "b": sft_data(6)}
    trainer = make_sft(eval_dataset=sets, eval_strategy="steps", eval_steps=1)
    trainer.train()
    seen = {key for record in trainer.state.log_history for key in record}
    assert {"eval_a_loss", "eval_b_loss"} <= seen
    assert trainer.evaluate("a")["eval_loss"] > 0
    logits = trainer.predict(trainer.eval_dataset["a"]).predictions
    assert logits.shape[0] == 4


def test_semantic_routing_needs_no_profile(make_sft, sft_data):
    trainer = make_sft(sft_data().remove_columns("demographic"), adapter={"routing": "semantic"}, encoder=None)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "demographic_embeds" not in batch
    trainer.train()
    assert "aux_loss" in trainer.state.log_history[0]
