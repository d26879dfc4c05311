# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Bad profiles give an error that says what to do, and no profile outlives its call."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForSeq2SeqLM, T5Config

from trl_cuma import CuMAConfig
from trl_cuma.adapter.conditioning import Conditioning


# ---------------------------------------------------------------------- bad input
def test_a_missing_profile_is_an_error_that_says_what_to_pass(make_model, make_batch) -> None:
    model, batch = make_model(), make_batch()
    del batch["demographic_embeds"]
    for call in (model, lambda **kwargs: model.generate(**kwargs, max_new_tokens=1)):
        with pytest.raises(ValueError, match="`demographic_embeds` is missing.*missing_demographics='zero'"):
            call(**batch)


def test_a_layer_may_have_an_adapter_of_its_own(make_model, make_config, make_batch) -> None:
    """PEFT lets single layers be switched; the tuner's own note of the active adapters does not know."""
    model, batch = make_model(), make_batch()
    model.add_adapter("other", make_config(demographic_projection=3))
    model.add_adapter("longer", make_config(demographic_dim=9))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    expected = model(**batch).logits
    layer.set_adapter("other")
    assert (model(**batch).logits - expected).abs().max() > 1e-4
    layer.set_adapter("longer")
    with pytest.raises(ValueError, match="demographic_embeds"):
        model(**batch)


def test_an_encoder_decoder_generates_in_the_zero_mode(make_config) -> None:
    """Its `generate` calls the encoder by itself, past the hooks of the whole model."""
    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    adapter = make_config(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"], missing_demographics="zero")
    model = get_peft_model(AutoModelForSeq2SeqLM.from_config(config), adapter).eval()
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    without = model.generate(input_ids=tokens, **options)
    zeros = model.generate(input_ids=tokens, demographic_embeds=torch.zeros(2, 6), **options)
    torch.testing.assert_close(torch.stack(without.logits), torch.stack(zeros.logits))
    other = model.generate(input_ids=tokens, demographic_embeds=torch.ones(2, 6), **options)
    assert (other.logits[0] - zeros.logits[0]).abs().max() > 1e-4


def test_the_zero_mode_means_the_zero_vector(make_model, make_batch) -> None:
    for fields in ({}, {"demographic_projection": 3}, {"routing": "demographic"}):
        model, batch = make_model(missing_demographics="zero", **fields), make_batch()
        zeros = batch | {"demographic_embeds": torch.zeros(3, 6)}
        del batch["demographic_embeds"]
        torch.testing.assert_close(model(**batch).logits, model(**zeros).logits, rtol=0, atol=1e-6)
        greedy = {"max_new_tokens": 3, "do_sample": False}
        assert torch.equal(model.generate(**batch, **greedy), model.generate(**zeros, **greedy))


def test_semantic_routing_needs_no_profile_and_ignores_one(make_model, make_batch) -> None:
    model, batch = make_model(routing="semantic"), make_batch()
    with_profile = model(**batch).logits
    del batch["demographic_embeds"]
    torch.testing.assert_close(model(**batch).logits, with_profile, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_a_wrong_number_of_rows_names_both(make_model, make_batch, rows: int) -> None:
    """Also where it divides the batch: silently repeating a row would answer for someone else."""
    model, batch = make_model(), make_batch(rows=3) | {"demographic_embeds": torch.randn(rows, 6)}
    with pytest.raises(ValueError, match=f"has {rows} rows but the batch has 3"):
        model(**batch)
    with pytest.raises(ValueError, match=f"has {rows} rows but there are 3 prompts"):
        model.generate(**batch, max_new_tokens=1)


@pytest.mark.parametrize("shape", [(3, 5), (3, 1, 6), (6,)])
def test_a_wrong_dimension_names_both(make_model, make_batch, shape: tuple) -> None:
    model, batch = make_model(), make_batch() | {"demographic_embeds": torch.randn(shape)}
    wanted = rf"\(rows, 6\) .* got \({', '.join(map(str, shape))},?\)"
    with pytest.raises(ValueError, match=wanted):
        model(**batch)
    if shape[0] == 3:
        with pytest.raises(ValueError, match=wanted):
            model.generate(**batch, max_new_tokens=1)


def test_ids_must_have_one_entry_per_token(make_model, make_batch) -> None:
    model, batch = make_model(), make_batch(rows=3, length=6)
    with pytest.raises(ValueError, match=r"shape \(3, 5\) but .* \(3, 6\)"):
        model(**batch, demographic_ids=torch.zeros(3, 5, dtype=torch.long))
    with pytest.raises(IndexError):
        model(**batch, demographic_ids=torch.full((3, 6), 3))
    del batch["demographic_embeds"]
    with pytest.raises(ValueError, match="`demographic_ids` was passed without `demographic_embeds`"):
        model(**batch, demographic_ids=torch.zeros(3, 6, dtype=torch.long))


# ---------------------------------------------------------------------- nothing outlives its call
class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_an_interrupted_call_leaves_no_profile_behind(make_model, make_batch, error: type, call: str) -> None:
    model, batch = make_model(), make_batch()
    expected = model(**batch).logits

    def explode(*_) -> None:
        raise error

    hook = model.base_model.model.model.layers[1].register_forward_hook(explode)
    with pytest.raises(error):
        model(**batch) if call == "forward" else model.generate(**batch, max_new_tokens=2)
    hook.remove()
    without = {key: value for key, value in batch.items() if key != "demographic_embeds"}
    with pytest.raises(ValueError, match="`demographic_embeds` is missing"):
        model(**without)
    with pytest.raises(ValueError, match="`demographic_embeds` is missing"):
        model.generate(**without, max_new_tokens=1)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)


def test_a_rejected_profile_leaves_nothing_behind(make_model, make_batch) -> None:
    model, batch = make_model(), make_batch()
    with pytest.raises(ValueError, match="got"):
        model(**(batch | {"demographic_embeds": torch.randn(3, 7)}))
    del batch["demographic_embeds"]
    with pytest.raises(ValueError, match="is missing"):
        model(**batch)


@pytest.mark.parametrize("groups", [None, [["q_proj", "v_proj"]]])
def test_a_copy_and_a_pickle_are_models_of_their_own(make_model, make_batch, groups) -> None:
    model, batch = make_model(demographic_projection=3, router_groups=groups).train(), make_batch()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**batch, labels=batch["input_ids"]).loss.backward()
    model.disable_input_require_grads()  # its hook is a local function of transformers, which does not pickle
    expected = model.eval()(**batch).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(**batch).logits, expected, rtol=0, atol=0)
        twin.train()(**batch, labels=batch["input_ids"]).loss.backward()  # recomputes with its own profiles
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1)
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)
        base = twin.unload()
        with pytest.raises(ValueError, match="demographic_embeds"):
            base.generate(**batch, max_new_tokens=1)


def test_checkpointing_works_for_an_adapter_on_an_unloaded_base(make_model, make_config, make_batch) -> None:
    model, batch = make_model().train(), make_batch()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    again = get_peft_model(model.unload(), make_config()).train()
    again(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in again.parameters() if p.requires_grad)


def test_turning_checkpointing_off_and_on_keeps_the_profile(make_model, make_batch) -> None:
    model, batch = make_model().train(), make_batch()
    model.enable_input_require_grads()
    for _ in range(2):  # as TRL does around generation
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model(**batch, labels=batch["input_ids"]).loss.backward()
        model.gradient_checkpointing_disable()
        model(**batch, labels=batch["input_ids"]).loss.backward()


# ---------------------------------------------------------------------- surroundings that lose or mix up profiles
def test_fsdp_activation_checkpointing_is_refused_in_training(make_model, make_batch) -> None:
    model, batch = make_model(), make_batch()
    layers = model.base_model.model.model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    model(**batch)  # without a backward there is nothing to lose
    model.train()
    with torch.no_grad():
        model(**batch)
    with pytest.raises(RuntimeError, match="`activation_checkpointing: false`.*`gradient_checkpointing: true`"):
        model(**batch)


def test_data_parallel_threads_are_refused(make_model, make_batch) -> None:
    """Its replicas run in threads over one object that holds the profiles."""
    replica = make_model().base_model.model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="torch.nn.DataParallel.*accelerate launch"):
        replica(**make_batch())


@pytest.mark.parametrize("fields", [{"demographic_projection": 3}, {"routing": "demographic", "gate": "soft"}])
@pytest.mark.slow
def test_forward_compiles_as_one_graph(make_model, make_batch, fields: dict) -> None:
    model = make_model(**fields)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for rows, length in ((2, 5), (2, 5), (3, 6), (4, 7)):
        batch = make_batch(rows=rows, length=length, seed=rows)
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=0, atol=1e-6)
    assert len(graphs) <= 2  # one for the first shape, one for any shape


def test_router_groups_ask_their_router_once(make_model, make_batch) -> None:
    """A group's layers read the same tensor: its router is called once in each of the two decoder layers."""
    model = make_model(target_modules=["q_proj", "k_proj", "v_proj"], router_groups=[["q_proj", "k_proj", "v_proj"]])
    calls = []
    for layer in model.base_model.model.model.layers:
        layer.self_attn.q_proj.cuma_router["default"].register_forward_hook(lambda *_: calls.append(1))
        assert not layer.self_attn.k_proj.cuma_router
    model(**make_batch())
    assert len(calls) == 2
    assert isinstance(model.peft_config["default"], CuMAConfig)


def test_of_no_rows_nothing_is_gathered() -> None:
    for expand in (False, True):
        part = Conditioning({}, expand=expand).gather(torch.zeros(0, 3), torch.zeros(0, 4, 2))
        assert part.shape == (0, 1, 3)
