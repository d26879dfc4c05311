# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Which experts serve whom, on routers whose weights are set by hand."""

import json
import math

import numpy as np
import pytest
import torch
from peft import get_peft_model
from scipy.spatial.distance import pdist, squareform

from trl_cuma import CuMAConfig, FieldEncoder
from trl_cuma.adapter.router import CuMARouter, compute_gates
from trl_cuma.evaluation.expert_information import expert_information
from trl_cuma.evaluation.profile_routing import ProfileRouting, route_profiles
from trl_cuma.evaluation.topology import evaluate_topology, fields_with_groups, map_topology
from trl_cuma.testing import chat_tokenizer, tiny_model

# Each country's experts at layer 0, the first with three times the second's gate. Layer 1 sends everybody to 0 and 5.
EXPERTS = {"FR": (0, 1), "KE": (1, 0), "US": (1, 2), "JP": (2, 3)}
PEOPLE = [{"country": country, "age": age} for country in EXPERTS for age in ("old", "young") for _ in range(2)]
PROMPTS = ["a b c", [{"role": "user", "content": "a longer question ?"}], "a"]


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer(PROMPTS[:1])


@pytest.fixture(scope="module")
def make_adapter(tokenizer):
    def make(people=PEOPLE, architecture="llama", **fields):
        encoder = FieldEncoder(min_count=1).fit(people)
        base = tiny_model(architecture, vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2)
        defaults = {
            "target_modules": ["v_proj"],
            "demographic_dim": encoder.dim,
            "demographic_encoder": encoder.state(),
            "num_experts": 6,
            "init_weights": False,
            "task_type": "CAUSAL_LM",
        }
        torch.manual_seed(0)
        return get_peft_model(base, CuMAConfig(**(defaults | fields))).eval()

    return make


@pytest.fixture(scope="module")
def model(make_adapter):
    """Logits: ln 3 for a country's first expert, 0 for its second, -5 for the others."""
    model = make_adapter(routing="demographic", router_layers=1)
    first, last = (module for module in model.modules() if isinstance(module, CuMARouter))
    columns = sorted(("country", country) for country in EXPERTS)  # after those of age: old, young
    hot = FieldEncoder(min_count=1).fit(PEOPLE).encode(PEOPLE[:1]).max().item()
    with torch.no_grad():
        for router in (first, last):
            router.demographic_weight.zero_()
            router.bias.fill_(-5)
        for column, (_, country) in enumerate(columns, 2):
            for expert, logit in zip(EXPERTS[country], (math.log(3), 0), strict=True):
                first.demographic_weight[expert, column] = (5 + logit) / hot
        last.bias[[0, 5]] = 0
    return model


def test_the_experts_of_each_country(model, tokenizer) -> None:
    found = evaluate_topology(model, tokenizer, PROMPTS, PEOPLE, ["country"], min_group_size=4)
    assert found.groups == ["FR", "JP", "KE", "US"] and found.people.tolist() == [4] * 4
    assert found.routers == ["0.v_proj", "1.v_proj"]
    for group, load, gate in zip(found.groups, found.load, found.gate, strict=True):
        expected_load, expected_gate = np.zeros((2, 6)), np.zeros((2, 6))
        expected_load[0, list(EXPERTS[group])] = expected_load[1, [0, 5]] = 0.5
        expected_gate[0, list(EXPERTS[group])] = 0.75, 0.25
        expected_gate[1, [0, 5]] = 0.5
        np.testing.assert_allclose(load, expected_load, atol=1e-6)
        np.testing.assert_allclose(gate, expected_gate, atol=1e-6)
    assert found.dead_experts == {"0.v_proj": [4, 5], "1.v_proj": [1, 2, 3, 4]}
    # Divergences at layer 0, bits: FR and KE 0; with one expert in common 1/2; with none 1. At layer 1 all are 0, so a
    # distance is the root of half of that.
    expected = 1 - np.sqrt(np.array([[0, 1, 0, 0.5], [1, 0, 1, 0.5], [0, 1, 0, 0.5], [0.5, 0.5, 0.5, 0]]) / 2)
    np.testing.assert_allclose(found.similarity, expected, atol=1e-6)
    # 0, 1/2, 1/2 and the root of 1/2: a right-angled triangle, which fits into a plane
    np.testing.assert_allclose(squareform(pdist(found.map)), 1 - expected, atol=1e-6)
    assert found.map_share == pytest.approx(1)
    order = [found.groups[row] for row in found.order]
    order = order if order[-1] == "JP" else order[::-1]
    assert set(order[:2]) == {"FR", "KE"} and order[2:] == ["US", "JP"]
    # Layer 0's mean load is (2, 3, 2, 1) / 8, each country's has an entropy of ln 2.
    information = found.mutual_information["country"]
    observed = -sum(share / 8 * math.log(share / 8) for share in (2, 3, 2, 1)) - math.log(2)
    np.testing.assert_allclose(information.value + information.expected, [observed, 0], atol=1e-6)
    assert information.mean_value + information.mean_expected == pytest.approx(observed / 2, abs=1e-6)
    assert 0.5 * observed < information.value[0] < observed and information.p[0] < 0.01 and information.p[1] == 1
    age = found.mutual_information["age"]  # as many old as young in each country: exactly none, less than by chance
    np.testing.assert_allclose(age.value + age.expected, 0, atol=1e-6)
    assert age.value[0] < 0 and age.p[0] == 1


def test_gates_tell_apart_whom_loads_do_not(model, tokenizer) -> None:
    """FR and KE have the same experts with (3/4, 1/4) and (1/4, 3/4): 1 - H(1/4) bits at one of two routers."""
    found = evaluate_topology(
        model, tokenizer, PROMPTS, PEOPLE, ["country"], min_group_size=4, measure="gate", permutations=9
    )
    divergence = 1 + 0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)
    assert found.similarity[0, 2] == pytest.approx(1 - math.sqrt(divergence / 2), abs=1e-6)


@pytest.mark.parametrize("gate", ["topk_softmax", "softmax_topk"])
def test_batches_equal_one_prompt_and_profile_at_a_time(make_adapter, tokenizer, gate) -> None:
    model = make_adapter(gate=gate).train()
    embeds = FieldEncoder(min_count=1).fit(PEOPLE).encode(PEOPLE)[::2]
    texts = [tokenizer(PROMPTS[0])["input_ids"], tokenizer("<|im_start|>user\na longer question ?<|im_end|>\n"
             "<|im_start|>assistant\n")["input_ids"], tokenizer(PROMPTS[2])["input_ids"]]  # fmt: skip
    assert len(set(map(len, texts))) == 3
    loads, gates = [], []
    for embed in embeds:
        of_prompts = []
        for tokens in texts:
            logits: list[torch.Tensor] = []
            hooks = [
                module.register_forward_hook(lambda m, i, o, logits=logits: logits.append(o[0].double()))
                for module in model.modules()
                if isinstance(module, CuMARouter)
            ]
            with torch.no_grad():
                model(input_ids=torch.tensor([tokens]), demographic_embeds=embed[None])
            for hook in hooks:
                hook.remove()
            values = compute_gates(torch.stack(logits), gate, 2)
            of_prompts.append(torch.stack([(values > 0) / 2, values]).mean(2))
        load, mean = torch.stack(of_prompts).mean(0)
        loads.append(load)
        gates.append(mean)
    for batch_size in (1, 5, 100):
        found = route_profiles(model, tokenizer, PROMPTS, embeds, batch_size=batch_size)
        np.testing.assert_allclose(found.load, torch.stack(loads), atol=1e-5)
        np.testing.assert_allclose(found.gate, torch.stack(gates), atol=1e-5)
    assert model.training and found.load.std(0).max() > 0.01


def test_routers_are_named_in_the_order_of_their_statistics(make_adapter, tokenizer) -> None:
    """Each router has a favourite of its own. OPT keeps its projections in another order than it calls them."""
    modules = ["q_proj", "k_proj", "v_proj"]
    model = make_adapter(architecture="opt", target_modules=modules, router_layers=1, routing="demographic")
    favourites = {}
    for number, (name, module) in enumerate(
        (name, module) for name, module in model.named_modules() if isinstance(module, CuMARouter)
    ):
        with torch.no_grad():
            module.bias[number] += 100
        parts = name.split(".")
        favourites[f"{parts[parts.index('layers') + 1]}.{parts[-3]}"] = number
    found = route_profiles(model, tokenizer, ["a"], torch.zeros(1, model.peft_config["default"].demographic_dim))
    assert dict(zip(found.routers, found.gate[0].argmax(-1).tolist(), strict=True)) == favourites


def random_routing(profiles: int) -> ProfileRouting:
    load = np.random.default_rng(0).dirichlet(np.ones(4), (profiles, 3))
    return ProfileRouting(["a", "b", "c"], load, load)


@pytest.mark.parametrize(
    ("sizes", "shown"),
    [
        ({"A": 5, "B": 4, "C": 3}, {"A": 5, "B": 4, "C": 3}),
        ({"A": 5, "B": 4, "Cee": 2, "Dee": 1}, {"A": 5, "B": 4, "Other": 3}),
        # one or two people alone could be had from the total: the next smallest group joins them
        ({"A": 5, "Bee": 4, "Cee": 1}, {"A": 5, "Other": 5}),
        ({"A": 6, "B": 5, "Cee": 3, "Dee": 1, "Eee": 1}, {"A": 6, "B": 5, "Other": 5}),
        ({"A": 5, "Bee": 4, None: 1}, {"A": 5, "Other": 5}),
        ({"A": 5, "B": 4, None: 2, "Other": 1}, {"A": 5, "B": 4, "Other": 3}),
        ({"A": 5, "B": 4, None: 3, "Other": 4}, {"A": 5, "B": 4, "Other": 7}),
    ],
)
def test_small_groups_are_merged_so_that_none_can_be_subtracted(sizes, shown) -> None:
    values = [value for value, size in sizes.items() for _ in range(size)]
    routing = random_routing(len(values))
    fields = {"field": values, "half": [str(person % 2) for person in range(len(values))]}
    found = map_topology(routing, np.arange(len(values)), fields, ["field"], min_group_size=3, permutations=9)
    assert dict(zip(found.groups, found.people.tolist(), strict=True)) == shown
    # everybody is in one group, whatever the fields: the totals that two reports give are the same
    np.testing.assert_allclose(np.average(found.load, 0, found.people), routing.load.mean(0))
    for name, load in zip(found.groups, found.load, strict=True):
        people = [row for row, value in enumerate(values) if (value if value in shown else "Other") == name]
        np.testing.assert_allclose(load, routing.load[people].mean(0))
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert not [value for value in ("Bee", "Cee", "Dee", "Eee") if value in text]


def test_mutual_information_by_hand() -> None:
    """Of the 6 ways to halve 4 people, 2 tell the experts apart (ln 2) and 4 tell nothing."""
    shares = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    found = expert_information(shares, np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), 1000, seed=0)
    # a share of 1/3 of 1000 has a standard error of 0.015
    assert found.expected[0] == pytest.approx(math.log(2) / 3, abs=0.035)
    assert found.value[0] == pytest.approx(math.log(2) * 2 / 3, abs=0.035)
    assert found.p[0] == pytest.approx(1 / 3, abs=0.05)


def test_without_association_the_corrected_information_is_about_zero() -> None:
    """
    Of 60 people, 4 groups and 4 experts, at random, it would be (4 - 1)(4 - 1) / (2 · 60) = 0.075 nats (Miller), with
    a standard deviation of sqrt(2 · 9) / 120 = 0.035; the mean of 20, 0.008.
    """
    values, expected = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found = expert_information(np.eye(4)[:, None], rng.integers(4, size=60), np.arange(60) % 4, 50, seed)
        values.append(found.mean_value)
        expected.append(found.mean_expected)
    assert np.mean(expected) == pytest.approx(0.075, abs=0.01)
    assert np.mean(values) == pytest.approx(0, abs=0.02)


def test_a_person_counts_once_and_the_model_does_not_read_labels(model, tokenizer) -> None:
    once = evaluate_topology(model, tokenizer, ["a"], PEOPLE, ["country"], min_group_size=4, permutations=9)
    rows = [*range(len(PEOPLE)), 0, 0, 5]
    labels = {"region": ["West" if PEOPLE[row]["country"] in ("FR", "US") else " East " for row in rows]}
    repeated, by_region, both = (
        evaluate_topology(
            model,
            tokenizer,
            ["a"],
            [PEOPLE[row] for row in rows],
            fields,
            person_ids=rows,
            labels=labels,
            min_group_size=4,
            permutations=9,
        )
        for fields in (["country"], ["region"], ["region", "age"])
    )
    np.testing.assert_array_equal(repeated.people, once.people)
    np.testing.assert_allclose(repeated.load, once.load)
    assert by_region.groups == ["East", "West"] and by_region.people.tolist() == [8, 8]
    np.testing.assert_allclose(by_region.load[1], once.load[[0, 3]].mean(0), atol=1e-6)
    assert both.groups == ["East × old", "East × young", "West × old", "West × young"]
    assert {*by_region.mutual_information} == {"age", "country", "region"}
    with pytest.raises(ValueError, match="Rows 0 and 1 are of one person and have different profiles"):
        evaluate_topology(model, tokenizer, ["a"], PEOPLE[3:5], ["country"], person_ids=[7, 7])
    with pytest.raises(ValueError, match=r"`labels\['region'\]` has 19 entries for 16 profiles"):
        evaluate_topology(model, tokenizer, ["a"], PEOPLE, ["country"], labels=labels)


def test_groups_that_the_encoder_does_not_know_are_shown_as_such(make_adapter, tokenizer) -> None:
    """KE and US are not in its vocabulary: their people have the same vectors, and so do their groups."""
    known = [person for person in PEOPLE if person["country"] in ("FR", "JP")]
    found = evaluate_topology(
        make_adapter(known), tokenizer, ["a"], PEOPLE, ["country"], min_group_size=4, permutations=9
    )
    assert dict(zip(found.groups, found.told_apart.tolist(), strict=True)) == {"FR": 1, "JP": 1, "KE": 0, "US": 0}
    assert found.similarity[2, 3] == pytest.approx(1)


def test_the_document(model, tokenizer, tmp_path) -> None:
    path = tmp_path / "map.csv"
    path.write_text("country,x,y\nfr,0,1\nJP,2,3\n")
    fields = {"min_group_size": 4, "permutations": 9, "reference": path}
    found = evaluate_topology(model, tokenizer, ["a"], PEOPLE, ["country"], **fields)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["fields"] == ["country"] and document["measure"] == "load"
    assert document["groups"][0] == {"group": "FR", "people": 4, "told_apart": 1}
    assert np.array(document["load"]).shape == np.array(document["gate"]).shape == (4, 2, 6)
    assert sorted(document["order"]) == [0, 1, 2, 3] and np.array(document["map"]).shape == (4, 2)
    for field in ("age", "country"):
        entries = document["mutual_information"][field]
        assert [entry["router"] for entry in entries] == document["routers"]
        mean = document["mutual_information_mean"][field]["value"]
        assert mean == pytest.approx(np.mean([entry["value"] for entry in entries]))
    assert document["dead_experts"]["0.v_proj"] == [4, 5]
    assert document["reference"]["matched"] == ["FR", "JP"] and document["reference"]["note"].startswith("n/a: 2 ")
    again = evaluate_topology(model, tokenizer, ["a"], PEOPLE, ["country"], **fields)
    assert json.loads(json.dumps(again.to_dict())) == document


def test_a_field_with_one_group_tells_nothing(model, tokenizer) -> None:
    rows = [{**person, "planet": "Earth", "id": str(row)} for row, person in enumerate(PEOPLE)]
    found = evaluate_topology(model, tokenizer, ["a"], rows, ["country"], min_group_size=4, permutations=9)
    document = found.to_dict()
    assert document["mutual_information"]["planet"] == document["mutual_information"]["id"] == []
    assert document["mutual_information_mean"]["planet"]["value"] is None
    assert "all are in one group" in document["mutual_information_mean"]["planet"]["note"]


def test_fields_that_make_no_two_groups_are_passed_over() -> None:
    """16 people of 4 countries and 2 ages; of planets only one, and the ids are too rare."""
    rows = [{**person, "planet": "Earth", "id": str(row)} for row, person in enumerate(PEOPLE)]
    assert fields_with_groups(rows, ["planet", "country", "id", "age"], 4) == ["country", "age"]
    assert fields_with_groups(rows, ["country", "age"], 5) == ["age"]
    assert fields_with_groups([None, "a text", [1.0]], ["country"], 1) == []


def test_where_each_profile_is_a_group_there_is_nothing_to_permute() -> None:
    """Whichever country has which profile, the experts tell as much of it: 0 above chance, whatever the routing."""
    values = {"country": list("ABCDEF"), "region": ["East", "West"] * 3}
    routing = random_routing(6)
    found = map_topology(routing, np.arange(6), values, ["country"], min_group_size=1, permutations=9).to_dict()
    assert found["mutual_information"]["country"] == []
    mean = found["mutual_information_mean"]
    assert mean["country"]["value"] is mean["country"]["p"] is None and "group of its own" in mean["country"]["note"]
    assert mean["region"]["p"] > 0 and "note" not in mean["region"]  # three countries each
    mixed = expert_information(routing.load, np.arange(6), np.arange(6), 9, seed=0)
    np.testing.assert_allclose(mixed.value, 0, atol=1e-9)  # what would have been reported


def test_what_cannot_be_mapped_is_an_error(make_adapter, model, tokenizer) -> None:
    def run(model=model, prompts=("a",), fields=("country",), **kwargs):
        return evaluate_topology(model, tokenizer, prompts, PEOPLE, fields, **({"min_group_size": 4} | kwargs))

    with pytest.raises(ValueError, match="'semantic'` the routers read no profile.*no topology to map"):
        run(make_adapter(routing="semantic"))
    with pytest.raises(ValueError, match="one expert serves everybody"):
        run(make_adapter(num_experts=1, top_k=1))
    with pytest.raises(TypeError, match="got a LlamaForCausalLM without an active one"):
        run(tiny_model("llama", vocab_size=9, hidden_size=16, num_attention_heads=2))
    with pytest.raises(ValueError, match="load is even whatever the routers do. Use `measure='gate'`"):
        run(make_adapter(top_k=6))
    assert run(make_adapter(top_k=6), measure="gate", permutations=9).measure == "gate"
    with pytest.raises(ValueError, match=r"must list some of .* fields \['age', 'country'\], got \['planet'\]"):
        run(fields=["planet"])
    with pytest.raises(ValueError, match=r"fields \['age', 'country'\], got country"):
        run(fields="country")
    with pytest.raises(ValueError, match="fewer than two groups of `min_group_size=17` or more of the 16 people"):
        run(min_group_size=17)
    with pytest.raises(ValueError, match="`min_group_size` must be 1 or more, got 0"):
        run(min_group_size=0)
    with pytest.raises(ValueError, match="`measure` must be 'load' or 'gate', got 'both'"):
        run(measure="both")
    for prompts in ([], ["a", ""]):
        with pytest.raises(ValueError, match="`prompts` is empty"):
            run(prompts=prompts)
