# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""How often routers run, and what `generate` computes once instead of once per token."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSeq2SeqLM, T5Config
from transformers.modeling_outputs import BaseModelOutput

from trl_cuma.adapter.experts import CuMAExperts
from trl_cuma.adapter.layer import CuMALinear
from trl_cuma.adapter.router import CuMARouter

GROUPS = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
BLOCKS = 2  # of the tiny model
LINEARS = 7  # of each: q, k, v, o, gate, up, down
NEW = 4
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
LOGITS = {"output_logits": True, "return_dict_in_generate": True}


@pytest.fixture
def count(monkeypatch):
    """Counts the calls of a class's `forward`."""

    def start(cls: type) -> list:
        calls: list = []
        forward = cls.forward
        monkeypatch.setattr(cls, "forward", lambda self, *a, **kw: calls.append(self) or forward(self, *a, **kw))
        return calls

    return start


@pytest.fixture
def profile_rows(monkeypatch):
    """Of each product of a router's `demographic_weight`, how many rows it has."""

    def start(model: PeftModel) -> list[int]:
        weights = {m.demographic_weight.data_ptr() for m in model.modules() if isinstance(m, CuMARouter)}
        rows: list[int] = []
        linear = F.linear

        def record(x: torch.Tensor, weight: torch.Tensor, *args) -> torch.Tensor:
            if weight.data_ptr() in weights:
                rows.append(x.shape[:-1].numel())
            return linear(x, weight, *args)

        monkeypatch.setattr(F, "linear", record)
        return rows

    return start


def generate(model: PeftModel, batch: dict, **options):
    return model.generate(**batch, **GREEDY, **LOGITS, **options)


def same(mine, theirs) -> None:
    """Tokens, and logits up to the rounding of float32 through two blocks; they are about 1."""
    assert torch.equal(mine.sequences, theirs.sequences)
    assert len(mine.logits) == NEW
    torch.testing.assert_close(torch.stack(mine.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- router calls
@pytest.mark.parametrize("routing", ["joint", "semantic", "demographic"])
@pytest.mark.parametrize(("groups", "per_block"), [(None, LINEARS), (GROUPS, 4)])  # q/k/v, o, gate/up, down
def test_layers_that_share_a_router_call_it_once(
    make_model, make_batch, count, groups, per_block: int, routing: str
) -> None:
    model = make_model(target_modules="all-linear", router_groups=groups, routing=routing)
    calls, experts = count(CuMARouter), count(CuMAExperts)
    model(**make_batch()).logits.sum().backward()
    assert len(calls) == len(set(calls)) == BLOCKS * per_block
    assert len(experts) == len(set(experts)) == BLOCKS * LINEARS


def test_checkpointing_runs_each_router_once_more(make_model, make_batch, count) -> None:
    model = make_model(target_modules="all-linear", router_groups=GROUPS).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = count(CuMARouter)
    model(**make_batch()).logits.sum().backward()
    assert len(calls) == 2 * BLOCKS * 4


@pytest.mark.parametrize("routing", ["joint", "demographic"])
def test_the_profiles_half_of_a_router_is_computed_once_per_sample(
    make_model, make_batch, profile_rows, routing: str
) -> None:
    model, batch = make_model(routing=routing), make_batch(rows=3, length=6)
    rows = profile_rows(model)
    model(**batch)
    assert rows == [3] * BLOCKS * 2  # a router for q and one for v
    rows.clear()
    ids = torch.arange(18).view(3, 6) % 2  # packed: two people
    model(**batch | {"demographic_embeds": batch["demographic_embeds"][:2], "demographic_ids": ids})
    assert rows == [2] * BLOCKS * 2


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "uncached"])
@pytest.mark.parametrize("routing", ["joint", "demographic"])
def test_a_generation_computes_the_profiles_half_once(
    make_model, make_batch, profile_rows, routing: str, options: dict
) -> None:
    model = make_model(target_modules="all-linear", router_groups=GROUPS, routing=routing)
    rows = profile_rows(model)
    for steps in (1, 5):
        rows.clear()
        model.generate(**make_batch(), max_new_tokens=steps, min_new_tokens=steps, **options)
        assert rows == [3] * BLOCKS * 4


# ------------------------------------------------------------------------------------- what is prepared is the same
@pytest.mark.parametrize(
    "fields",
    [
        {"routing": "demographic"},
        {"routing": "demographic", "share_a": True},
        {"routing": "demographic", "gate": "soft"},
        {"routing": "demographic", "gate": "softmax_topk", "top_k": 1, "demographic_projection": 3},
        {"routing": "joint"},
        {"routing": "joint", "router_layers": 1, "share_a": True},
    ],
    ids=["separate", "shared", "soft", "top-1", "joint", "linear"],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2, "use_cache": False}],
    ids=["greedy", "beams-returned-uncached"],
)
@pytest.mark.parametrize("rows", [1, 2, 5])  # of four experts: with five profiles computing all experts is cheaper
def test_what_is_prepared_changes_nothing(
    make_model, make_batch, monkeypatch, fields: dict, options: dict, rows: int
) -> None:
    model = make_model(target_modules="all-linear", router_groups=GROUPS, **fields)
    batch = make_batch(lengths=[6, 4, 5, 6, 3][:rows])
    batch = {name: t.flip(1) if name != "demographic_embeds" else t for name, t in batch.items()}  # padded on the left
    prepared = generate(model, batch, **options)
    monkeypatch.setattr(CuMALinear, "prepare", lambda self, conditioning: None)
    same(prepared, generate(model, batch, **options))
    other = generate(model, batch | {"demographic_embeds": -batch["demographic_embeds"]}, **options)
    assert (other.logits[0] - prepared.logits[0]).abs().max() > 1e-3  # the profile matters


@pytest.mark.parametrize("samples", [1, 3])
def test_sampled_sequences_are_the_same(make_model, make_batch, monkeypatch, samples: int) -> None:
    model, batch = make_model(routing="demographic"), make_batch(rows=2)
    got = []
    for _ in range(2):
        torch.manual_seed(0)
        got.append(model.generate(**batch, **GREEDY | {"do_sample": True}, **LOGITS, num_return_sequences=samples))
        monkeypatch.setattr(CuMALinear, "prepare", lambda self, conditioning: None)
    same(*got)


def test_everyone_is_the_average_person_where_no_profile_is_given(make_model, make_batch, monkeypatch) -> None:
    model = make_model(routing="demographic", missing_demographics="zero")
    batch = make_batch()
    zeros = generate(model, batch | {"demographic_embeds": torch.zeros(3, 6)})
    del batch["demographic_embeds"]
    prepared = generate(model, batch)
    same(prepared, zeros)
    monkeypatch.setattr(CuMALinear, "prepare", lambda self, conditioning: None)
    same(prepared, generate(model, batch))


@pytest.mark.parametrize("precision", ["bfloat16 base", "autocast"])
@pytest.mark.parametrize("share_a", [False, True])
def test_in_bfloat16_what_is_prepared_rounds_no_more(
    make_model, make_batch, monkeypatch, share_a: bool, precision: str
) -> None:
    """The logits of one step, of about 1, through two blocks: some 20 roundings of half an eps, 0.004, at random."""
    base = {"dtype": torch.bfloat16} if precision == "bfloat16 base" else {}
    model = make_model(routing="demographic", share_a=share_a, base=base, lora_alpha=4)
    logits = []
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            logits.append(generate(model, make_batch()).logits[0].float())
        monkeypatch.setattr(CuMALinear, "prepare", lambda self, conditioning: None)
    torch.testing.assert_close(*logits, rtol=0, atol=20**0.5 * 0.004 * logits[1].abs().max().item())


# ---------------------------------------------------------------------------------------- the experts' collapse
@pytest.mark.parametrize(
    ("fields", "rows", "collapses"),
    [
        ({}, 1, True),
        ({}, 2, True),  # 2 profiles · 2 chosen experts: as much to read as the four experts
        ({}, 3, False),
        ({"share_a": True}, 4, True),
        ({"share_a": True}, 5, False),
        ({"gate": "soft"}, 1, True),
        ({"gate": "soft"}, 2, False),
        ({"routing": "joint"}, 1, False),  # its gates depend on each token
    ],
)
def test_collapsed_experts_are_not_called_again(
    make_model, make_batch, count, fields: dict, rows: int, collapses: bool
) -> None:
    model = make_model(**{"routing": "demographic"} | fields)
    calls, routers = count(CuMAExperts), count(CuMARouter)
    for options in ({}, {"num_beams": 2}):
        calls.clear(), routers.clear()
        generate(model, make_batch(rows), **options)
        layers = BLOCKS * 2
        assert len(calls) == (0 if collapses else NEW * layers)
        assert len(routers) == (0 if collapses else NEW * layers)


def test_nothing_that_was_prepared_outlives_its_generation(make_model, make_batch, monkeypatch) -> None:
    """Weights change between two generations, as in online training; a forward in between has gradients."""
    model, batch = make_model(routing="demographic"), make_batch(rows=2)
    before = generate(model, batch)
    model(**batch).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
            parameter.data -= 0.5 * parameter.grad / parameter.grad.abs().max()
    after = generate(model, batch)
    assert (after.logits[0] - before.logits[0]).abs().max() > 1e-3
    monkeypatch.setattr(CuMALinear, "prepare", lambda self, conditioning: None)
    same(after, generate(model, batch))


def test_a_model_in_training_mode_generates_with_dropout(make_model, make_batch, monkeypatch) -> None:
    model, batch = make_model(routing="demographic", lora_dropout=0.5), make_batch(rows=2)
    quiet = generate(model, batch)
    model.train()
    got = []
    for _ in range(2):
        torch.manual_seed(0)  # the same dropout on the experts' input
        got.append(generate(model, batch))
        monkeypatch.setattr(CuMALinear, "prepare", lambda self, conditioning: None)
    same(*got)
    assert (got[0].logits[0] - quiet.logits[0]).abs().max() > 1e-3


def test_two_active_adapters_are_each_prepared(make_model, make_config, make_batch, monkeypatch) -> None:
    model, batch = make_model(routing="demographic"), make_batch(rows=2)
    model.add_adapter("other", make_config(routing="joint", share_a=True))
    alone = generate(model, batch)
    model.base_model.set_adapter(["default", "other"])
    both = generate(model, batch)
    assert (both.logits[0] - alone.logits[0]).abs().max() > 1e-3
    monkeypatch.setattr(CuMALinear, "prepare", lambda self, conditioning: None)
    same(both, generate(model, batch))


def test_a_disabled_adapter_generates_as_the_base(make_model, make_batch) -> None:
    model, batch = make_model(routing="demographic"), make_batch(rows=2)
    with model.disable_adapter():
        off = generate(model, batch)
    embeds = batch.pop("demographic_embeds")
    base = model.unload()
    theirs = base.generate(**batch, **GREEDY, **LOGITS)
    assert embeds.abs().max() > 0 and torch.equal(off.sequences, theirs.sequences)
    assert torch.equal(torch.stack(off.logits), torch.stack(theirs.logits))


@pytest.mark.parametrize("routing", ["joint", "demographic"])
@pytest.mark.parametrize("rows", [3, 5])
def test_a_wrong_number_of_profiles_is_an_error_also_where_no_prompt_is_given(
    make_config, routing: str, rows: int
) -> None:
    """An encoder's output stands for the prompts: only the layers see how many there are."""
    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    adapter = make_config(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"], routing=routing)
    model = get_peft_model(AutoModelForSeq2SeqLM.from_config(config), adapter).eval()
    encoded = BaseModelOutput(last_hidden_state=torch.randn(rows, 4, 32))
    with pytest.raises(ValueError, match=f"has 2 rows but the batch has {rows}"):
        model.generate(encoder_outputs=encoded, demographic_embeds=torch.randn(2, 6), max_new_tokens=2)
