# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`torch.compile`: one graph, the same for everyone, and the eager model's numbers."""

from collections.abc import Iterator

import pytest
import torch
from peft import PeftModel
from torch._dynamo.testing import CompileCounterWithBackend

from trl_cuma.adapter import experts

# The compiled backward adds up in another order: a few eps (1.2e-7) of gradients of size 1e-2 to 1.
SAME = {"rtol": 1e-4, "atol": 1e-6}
ONE_LAYER = {"num_hidden_layers": 1}  # compiling takes seconds for each


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(call, model: PeftModel, batch: dict) -> dict[str, torch.Tensor]:
    """With router losses where the batch asks for them. Not from `labels`: GPT-2's loss function logs, untraceably."""
    model.zero_grad()
    outputs = call(**batch, use_cache=False)
    (outputs.logits.square().mean() + outputs.get("aux_loss", 0)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equals_eager(compiled, model: PeftModel, twin: PeftModel, batch: dict) -> None:
    """`twin` has the same weights and is not compiled."""
    expected = gradients(twin, twin, batch)
    got = gradients(compiled, model, batch)
    assert got.keys() == expected.keys() and got
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], **SAME, msg=lambda text, n=name: f"{n}: {text}")


def assert_compiles_to_one_graph(make_model, make_batch, architecture: str, fields: dict) -> None:
    model, twin = (make_model(architecture, **fields, base=ONE_LAYER).train() for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 1):  # other people and other texts of the same shape
            batch = make_batch(seed=seed)
            assert_equals_eager(compiled, model, twin, batch)
    assert counter.frame_count == 1
    if fields.get("routing") != "semantic":  # a profile baked into the graph would have shown
        swapped = batch | {"demographic_embeds": make_batch(seed=0)["demographic_embeds"]}
        assert (twin(**swapped).logits - twin(**batch).logits).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["qwen3-groups"], indirect=True)
def test_training_compiles_to_one_graph_for_everyone(make_model, make_batch, case) -> None:
    assert_compiles_to_one_graph(make_model, make_batch, *case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [f"qwen3-{name}" for name in ("joint", "demographic", "semantic", "soft", "film")]
    + ["llama", "mistral", "gemma", "phi", "gpt2", "opt", "bloom"],
    indirect=True,
)
def test_the_other_cases_compile_to_one_graph(make_model, make_batch, case) -> None:
    assert_compiles_to_one_graph(make_model, make_batch, *case)


def test_router_losses_are_part_of_the_graph(make_model, make_batch) -> None:
    model, twin = (make_model(base=ONE_LAYER).train() for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 1):
            batch = make_batch(seed=seed, lengths=[6, 3, 4]) | {"output_router_losses": "local"}
            assert_equals_eager(compiled, model, twin, batch)
            without = gradients(twin, twin, {k: v for k, v in batch.items() if k != "output_router_losses"})
            router = next(name for name in without if "router" in name and "rest" in name)
            assert (gradients(twin, twin, batch)[router] - without[router]).abs().max() > 1e-4  # it has a part
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"routing": "demographic"},
        {"routing": "demographic", "share_a": True},
    ],
    ids=["joint", "demographic", "demographic-shared-a"],
)
@pytest.mark.slow
def test_batches_of_other_sizes_compile_nothing_more(make_model, make_batch, monkeypatch, fields: dict) -> None:
    monkeypatch.setattr(experts, "TOKENS_PER_ROW", {True: 2, False: 2})  # one way for all of these sizes
    model, twin = (make_model(**fields, base=ONE_LAYER).train() for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    assert_equals_eager(compiled, model, twin, make_batch(rows=3, length=7))  # no size of the model, which is fixed
    graphs = counter.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, length in ((4, 9), (2, 17), (5, 8)):
            assert_equals_eager(compiled, model, twin, make_batch(rows=rows, length=length, seed=rows))
    assert counter.frame_count == graphs


@pytest.mark.parametrize(
    "fields",
    [{}, pytest.param({"routing": "demographic"}, marks=pytest.mark.slow)],
    ids=["joint", "demographic"],
)
def test_decoding_compiles_once_for_all_people(make_model, make_batch, fields: dict) -> None:
    """With a static cache one graph decodes every token for everyone: what a CUDA graph needs."""
    model, twin = (make_model(**fields, base=ONE_LAYER).eval() for _ in range(2))
    base, counter = model.get_base_model(), CompileCounterWithBackend("aot_eager")
    base.forward = torch.compile(base.forward, fullgraph=True, backend=counter)

    def answer(which: PeftModel, seed: int) -> torch.Tensor:
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
        out = which.generate(
            **make_batch(seed=seed), **options, disable_compile=True, output_logits=True, return_dict_in_generate=True
        )
        return torch.stack(out.logits)

    torch.testing.assert_close(answer(model, 0), answer(twin, 0), **SAME)
    graphs = counter.frame_count
    assert graphs <= 3  # the prompt, one token, and at most one more for the cache's first state
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2):
            torch.testing.assert_close(answer(model, seed), answer(twin, seed), **SAME)
    assert counter.frame_count == graphs


@pytest.mark.slow
@pytest.mark.parametrize("losses", [{}, {"output_router_losses": "local"}], ids=["plain", "router-losses"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("first", ["compiled", "eager"])
def test_checkpointing_in_a_compiled_model_keeps_the_profile(
    make_model, make_batch, losses: dict, use_reentrant: bool, first: str
) -> None:
    """Not one graph, for a checkpointed layer changes the state that its profile travels in; but the numbers."""
    fields = {"demographic_projection": 3, "router_groups": [["q_proj", "v_proj"]], "base": ONE_LAYER}
    model, twin = (make_model(**fields).train() for _ in range(2))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if first == "eager":
        gradients(model, model, make_batch())
    compiled = torch.compile(model, backend="eager")
    for seed in (0, 1):
        assert_equals_eager(compiled, model, twin, make_batch(seed=seed) | losses)


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["stored", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("routing", ["joint", "demographic"])
def test_layers_compiled_one_by_one_train_as_eager_ones(
    make_model, make_batch, monkeypatch, routing: str, use_reentrant: bool | None
) -> None:
    """There the router losses are gathered in compiled code and put together outside."""
    monkeypatch.setattr(experts, "TOKENS_PER_ROW", {True: 2, False: 2})
    model, twin = (make_model(routing=routing, base=ONE_LAYER).train() for _ in range(2))
    if use_reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for layer in model.get_base_model().model.layers:
        layer.self_attn.compile(backend="aot_eager")  # "eager" would make no functions of in-place writes
    for seed in (0, 1):
        assert_equals_eager(model, model, twin, make_batch(seed=seed) | {"output_router_losses": "local"})
