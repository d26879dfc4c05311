# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Routing statistics by group, at evaluation."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback

from trl_cuma import FieldEncoder
from trl_cuma.adapter.router import CuMARouter

STRONG = {"init_weights": False, "lora_alpha": 16}
GROUPS = {"cuma_group_by": ["country"], "cuma_min_group_size": 2}


def router_metrics(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "router/" in name}


def entropy(probabilities: list[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities if p)


@pytest.mark.parametrize("gate", ["topk_softmax", "soft"])
def test_the_statistics_are_their_formulas(make_sft, sft_data, gate) -> None:
    """By hand, from the routers' logits of each row alone: mean over its tokens, then over the group's rows."""
    data = sft_data(9)  # five of FR, four of JP
    trainer = make_sft(eval_dataset=data, adapter=STRONG | {"gate": gate}, per_device_eval_batch_size=4, **GROUPS)
    metrics = router_metrics(trainer.evaluate())
    # (rows, routers, experts) and (rows, routers)
    loads, entropies = [], []
    for batch in [trainer.data_collator([row]) for row in trainer.eval_dataset]:
        logits: list[torch.Tensor] = []
        hooks = [
            module.register_forward_hook(lambda m, i, o, logits=logits: logits.append(o[0].double()))
            for module in trainer.model.modules()
            if isinstance(module, CuMARouter)
        ]
        with torch.no_grad():
            trainer.model(**batch)
        for hook in hooks:
            hook.remove()
        p = torch.stack(logits).softmax(-1)
        chosen = p if gate == "soft" else torch.zeros_like(p).scatter(-1, p.topk(2, -1).indices, 0.5)
        loads.append(chosen.mean(1))
        entropies.append(-(p * p.log()).sum(-1).mean(1))
    load, entropy_of = torch.stack(loads), torch.stack(entropies)
    countries = [profile["country"] for profile in data["demographic"]]
    expected, by_group = {}, {}
    for name, rows in [("", range(9))] + [
        (f"country={c}/", [r for r in range(9) if countries[r] == c]) for c in ("FR", "JP")
    ]:
        mean = load[list(rows)].mean(0)
        by_group[name] = mean
        used = [math.exp(entropy(router)) / 4 for router in mean.tolist()]
        expected[f"eval_router/{name}utilization"] = sum(used) / 4
        expected[f"eval_router/{name}entropy"] = entropy_of[list(rows)].mean().item()
        expected[f"eval_router/{name}dead_experts"] = (mean < 0.01 / 4).sum().item()
    information = [
        entropy(by_group[""][r].tolist())
        - sum(share * entropy(by_group[f"country={c}/"][r].tolist()) for c, share in (("FR", 5 / 9), ("JP", 4 / 9)))
        for r in range(4)
    ]
    expected["eval_router/country/mutual_information"] = sum(information) / 4
    assert sum(information) / 4 > 1e-3
    assert metrics == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("trainer_name", ["make_sft", "make_dpo", "make_kto"])
def test_they_are_in_the_log_and_in_what_evaluate_returns(request, trainer_name, tmp_path) -> None:
    make, data = request.getfixturevalue(trainer_name), request.getfixturevalue(f"{trainer_name[5:]}_data")
    named = {"a": data(8), "b": data(4)}
    trainer = make(eval_dataset=named, adapter=STRONG, eval_strategy="steps", eval_steps=1, max_steps=2, **GROUPS)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_a_router/country=FR/utilization" in entry]
    assert len(logged) == 2
    returned = trainer.evaluate()
    assert router_metrics(returned) == pytest.approx(
        router_metrics(logged[-1])
        | router_metrics(next(e for e in reversed(trainer.state.log_history) if "eval_b_router/entropy" in e)),
        abs=1e-6,
    )
    passed = trainer.evaluate({"b": data(4)}, metric_key_prefix="test")
    assert passed["test_b_router/country/mutual_information"] == pytest.approx(
        returned["eval_b_router/country/mutual_information"], abs=1e-6
    )


def test_packed_documents_count_as_rows_do(make_sft, sft_data) -> None:
    alone, packed = (
        make_sft(eval_dataset=sft_data(12), adapter=STRONG, **GROUPS, **fields)
        for fields in ({}, {"packing": True, "max_length": 64})
    )
    assert router_metrics(packed.evaluate()) == pytest.approx(router_metrics(alone.evaluate()), abs=1e-5)
    assert router_metrics(packed.evaluate(sft_data(12))) == pytest.approx(router_metrics(alone.evaluate()), abs=1e-5)


def test_small_groups_are_never_reported(make_sft, sft_data) -> None:
    """Sizes are people's, where a column tells them apart: many rows of one person are no group."""
    rows = sft_data(12).to_list() + [
        row | {"demographic": {"age": "old", "country": "Rareland"}} for row in sft_data(3).to_list()
    ]
    for people, reported in ((range(15), True), ([*range(12), 99, 99, 99], False)):
        data = Dataset.from_list([row | {"person_id": person} for row, person in zip(rows, people, strict=True)])
        trainer = make_sft(
            data,
            eval_dataset=data,
            adapter=STRONG,
            encoder=FieldEncoder(min_count=1),
            cuma_group_by=["age", "country"],
            cuma_min_group_size=3,
        )
        names = set(trainer.evaluate())
        assert ("eval_router/country=Rareland/utilization" in names) is reported
        # The one person could be had by subtraction if both other countries were there: the smaller one is not.
        assert ("eval_router/country=FR/entropy" in names) is reported
        assert {"eval_router/country=JP/entropy", "eval_router/age=old/dead_experts", "eval_router/entropy"} <= names


def test_a_group_that_truncation_made_small_is_not_reported(make_sft) -> None:
    """Five of six people of JP have prompts that fill `max_length`: TRL drops their rows."""
    rows = [
        {"prompt": "a " * (60 if country == "JP" and n else 2), "completion": "b", "demographic": {"country": country}}
        for country in ("JP", "FR", "US")
        for n in range(6)
    ]
    trainer = make_sft(
        Dataset.from_list(rows[6:]),
        eval_dataset=Dataset.from_list(rows),
        encoder=FieldEncoder(min_count=1).fit([row["demographic"] for row in rows]),
        max_length=40,
        cuma_group_by=["country"],
        cuma_min_group_size=6,
    )
    assert len(trainer.eval_dataset) == 13
    names = " ".join(trainer.evaluate())
    assert "country=JP" not in names and "country=US" in names


def test_ktos_other_completions_do_not_count(make_kto, kto_data) -> None:
    """Its KL term reads each person with another row's completion; `apo_zero_unpaired` has none."""
    found = []
    for loss_type in ("kto", "apo_zero_unpaired"):
        torch.manual_seed(0)
        trainer = make_kto(eval_dataset=kto_data(8), adapter=STRONG, loss_type=loss_type, **GROUPS)
        found.append(router_metrics(trainer.evaluate()))
    assert found[0] == pytest.approx(found[1], abs=1e-6) and found[0]


def test_a_packed_set_that_the_trainer_has_is_evaluated_again(make_sft, sft_data) -> None:
    trainer = make_sft(eval_dataset=sft_data(12), packing=True, max_length=64, **GROUPS)
    expected = trainer.evaluate()
    assert router_metrics(trainer.evaluate(trainer.eval_dataset)) == pytest.approx(router_metrics(expected))


def test_groups_that_the_router_cannot_tell_apart_are_not_reported(make_sft, sft_data) -> None:
    """The encoder leaves rare countries out, so that their people have the same vector."""
    rows = sft_data(12).to_list() + [
        row | {"demographic": {"age": "old", "country": country}}
        for country in ("Rareland", "Nowhere")
        for row in sft_data(2).to_list()
    ]
    trainer = make_sft(
        Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        encoder=FieldEncoder(min_count=3),
        adapter=STRONG,
        **GROUPS,
    )
    names = " ".join(trainer.evaluate())
    assert "Rareland" not in names and "Nowhere" not in names and "country=FR" in names


def test_what_cannot_be_grouped_is_an_error(make_sft, sft_data) -> None:
    with pytest.raises(ValueError, match=r"`cuma_group_by` names \['planet'\], but .* fields \['age', 'country'\]"):
        make_sft(eval_dataset=sft_data(4), cuma_group_by=["planet"])
    with pytest.raises(ValueError, match=r"fields \[\]\. Name some of these; text and vectors have none"):
        make_sft(sft_data(8, "vector"), eval_dataset=sft_data(4, "vector"), encoder=None, **GROUPS)
    with pytest.raises(TypeError, match="a streaming one does not allow"):
        make_sft(eval_dataset=sft_data(4).to_iterable_dataset(), **GROUPS)
    with pytest.raises(ValueError, match="`cuma_group_by` with `routing='semantic'`"):
        make_sft(eval_dataset=sft_data(4), adapter={"routing": "semantic"}, encoder=None, **GROUPS)
    with pytest.raises(ValueError, match="`cuma_group_by` must be a list of fields, got 'country'"):
        make_sft(cuma_group_by="country")
    with pytest.raises(ValueError, match="`cuma_min_group_size` must be 1 or more, got 0"):
        make_sft(cuma_min_group_size=0)


def test_early_stopping_reads_the_task_loss(make_sft, sft_data) -> None:
    """Not the router loss, which weighs a thousand times as much and moves otherwise."""
    trainer = make_sft(
        eval_dataset=sft_data(4),
        max_steps=6,
        cuma_aux_loss_coef=1000.0,
        learning_rate=1.0,  # much too large: the task loss rises after the first step
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        **GROUPS,
    )
    trainer.train()
    evals = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = evals.index(min(evals))
    assert len(evals) == min(6, best + 3)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best + 1}")
    assert max(evals) < 100  # the weighted router loss alone is about 1000
