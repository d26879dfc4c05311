# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Optimizers with a small state, by the trainers' `optim`: what CuMA's parameters get from them, and that a run with one
learns, resumes and decays as with AdamW. bitsandbytes runs them on a CPU too; only paging needs a GPU.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from trl_cuma import CuMAConfig

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra trl_cuma[quantization]")

NUMBER, BLOCK, BOOKS = 4, 256, 2 * 256 * 4  # bytes of a float32; numbers with a scale in common; bytes of code books
MIN_8BIT, MIN_PAGED = 4096, 100_000  # numbers in a parameter, from which bitsandbytes' state is 8-bit, or paged
ADAMW = "adamw_torch"
SMALL_STATES = ("adafactor", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
# Beside hidden 64 it has parameters of 4096 numbers and smaller ones.
ADAPTER = {"num_experts": 8, "r": 8, "router_hidden": 64, "demographic_projection": 3}

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@pytest.fixture
def make(make_sft: Callable, make_base: Callable) -> Callable[..., Any]:
    """A run, each of whose steps takes the whole tiny data set."""

    def trainer(optim: str, steps: int = 4, *, factory: Callable = make_sft, hidden: int = 64, **fields: Any) -> Any:
        adapter = ADAPTER | fields.pop("adapter", {})
        model = make_base(hidden_size=hidden, num_hidden_layers=1)
        constant = {"learning_rate": 2e-3, "lr_scheduler_type": "constant"}
        return factory(model=model, adapter=adapter, optim=optim, max_steps=steps, **(constant | fields))

    return trainer


def parameters(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def trained(trainer: Any) -> dict[str, torch.Tensor]:
    trainer.train()
    return parameters(trainer)


def moved(trainer: Any) -> torch.Tensor:
    """How far training moves the parameters, in one vector."""
    before = parameters(trainer)
    return torch.cat([(after - before[name]).flatten() for name, after in trained(trainer).items()])


def states(trainer: Any) -> dict[str, dict[str, Any]]:
    """The optimizer's state of each trained parameter, by the parameter's name."""
    state = trainer.optimizer.state
    return {name: state[p] for name, p in trainer.model.named_parameters() if p.requires_grad}


def state_bytes(all_states: Any) -> int:
    """Each tensor once: the code books are the same for all parameters."""
    tensors = [value for state in all_states for value in state.values() if isinstance(value, torch.Tensor)]
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def expected_bytes(sizes: list[int]) -> int:
    """Two moments of one byte, and a scale of each for each block; of a small parameter two moments in float32."""
    return BOOKS + sum(2 * n + 2 * NUMBER * math.ceil(n / BLOCK) if n >= MIN_8BIT else 2 * NUMBER * n for n in sizes)


def losses(trainer: Any) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize(
    "optim",
    [
        pytest.param(name, marks=[] if name in ("adamw_torch_fused", "adamw_8bit") else pytest.mark.slow)
        for name in ("adamw_torch_fused", *SMALL_STATES)
    ],
)
def test_each_optimizer_learns(make, optim: str) -> None:
    trainer = make(optim, learning_rate=1e-2)
    before = parameters(trainer)
    after = trained(trainer)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    assert all(not torch.equal(before[name], value) for name, value in after.items())


@pytest.mark.slow
def test_dpo_learns_with_an_8_bit_state(make, make_dpo) -> None:
    trainer = make("adamw_8bit", factory=make_dpo, learning_rate=1e-2, cuma_aux_loss_coef=0.0)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)  # the policy is the reference
    assert losses(trainer)[-1] < math.log(2) - 0.01
    assert {state["state1"].dtype for state in states(trainer).values()} == {torch.uint8, torch.float32}


def test_what_is_8_bit_and_how_small_it_is(make) -> None:
    """The large matrices: those of the experts, and the router's on the hidden state. The values are 32 wide."""
    trainer, adamw = make("adamw_8bit", 1), make(ADAMW, 1)
    weights = trained(trainer)
    adamw.train()
    quantized = {name for name, state in states(trainer).items() if state["state1"].dtype == torch.uint8}
    assert quantized == {name for name, weight in weights.items() if weight.numel() >= MIN_8BIT}
    assert {name.split("self_attn.")[1].replace(".default", "") for name in quantized} == {
        "q_proj.cuma_experts.weight_a",
        "q_proj.cuma_experts.weight_b",
        "q_proj.cuma_router.hidden_weight",
        "v_proj.cuma_experts.weight_a",
        "v_proj.cuma_router.hidden_weight",
    }
    for name, state in states(trainer).items():
        dtype = torch.uint8 if name in quantized else torch.float32
        assert state["state1"].dtype == state["state2"].dtype == dtype
    sizes = [weight.numel() for weight in weights.values()]
    assert state_bytes(states(trainer).values()) == expected_bytes(sizes)
    assert state_bytes(states(adamw).values()) == 2 * NUMBER * sum(sizes) + NUMBER * len(sizes)  # and the step


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "router_groups": [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]},
    ],
    ids=["query-value", "all-linear"],
)
def test_at_8b_it_is_a_quarter_of_adamws(qwen3_8b, fields: dict) -> None:
    """
    (2 + 8 / 256) / 8 = 0.2539. A router's biases and last layer, 256 + 8 · 256 + 8 numbers, stay in float32: 0.1 % of
    a layer's 1.7 million, which adds as much.
    """
    with torch.device("meta"):
        model = get_peft_model(qwen3_8b, CuMAConfig(**fields, task_type="CAUSAL_LM"))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(weights)
    for index, weight in enumerate(weights):  # as the first step does, which needs a gradient
        optimizer.init_state(optimizer.param_groups[0], weight, 0, index)
    sizes = [weight.numel() for weight in weights]
    measured = state_bytes(optimizer.state.values())
    assert measured == expected_bytes(sizes)
    assert measured / (2 * NUMBER * sum(sizes)) == pytest.approx(0.2539, abs=0.0015)


def test_steps_with_an_8_bit_state_are_close_to_adamws(make) -> None:
    """
    The first step is AdamW's: its moments are rounded after it. From then on the code has 64 values in the decade
    below a block's largest number (for the second moment 128), which are 0.9 / 64 of that number apart: a rounding is
    off by 0.4 % of it, and of a typical moment, a quarter as large, by 1.6 %; it is as much in the next decades. In
    the long run one trajectory leaves the other; within four steps measured 1.3 to 1.7 %.
    """
    expected = moved(make(ADAMW, 1))
    assert (moved(make("adamw_8bit", 1)) - expected).norm() < 1e-5 * expected.norm()
    expected = moved(make(ADAMW, 4))
    difference = (moved(make("adamw_8bit", 4)) - expected).norm()
    assert 1e-3 * expected.norm() < difference < 0.05 * expected.norm()
    without_moment = moved(make(ADAMW, 4, adam_beta1=0.0))  # the control: a state that is lost
    assert (without_moment - expected).norm() > 0.3 * expected.norm()


def test_32_bit_states_step_as_adamw(make) -> None:
    """The same arithmetic in another order; where a gradient is next to zero its sign may turn."""
    expected = moved(make(ADAMW, 8))
    for optim in ("paged_adamw_32bit", "adamw_torch_fused"):
        assert (moved(make(optim, 8)) - expected).norm() < 1e-4 * expected.norm()


def test_without_a_gpu_a_paged_optimizer_says_so_and_does_the_same(make) -> None:
    trainer = make("paged_adamw_8bit", 2)
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        got = trained(trainer)
    expected = trained(make("adamw_8bit", 2))
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="pages live in unified memory: needs one CUDA device")
def test_on_a_gpu_large_states_are_paged(make) -> None:
    fields = {"use_cpu": False, "hidden": 256, "adapter": {"r": 64}}  # A has 8 · 64 · 256 numbers
    paged, plain = make("paged_adamw_8bit", **fields), make("adamw_8bit", **fields)
    difference, expected = moved(paged), moved(plain)
    sizes = {name: weight.numel() for name, weight in parameters(paged).items()}
    for name, state in states(paged).items():
        for moment in ("state1", "state2"):
            assert getattr(state[moment], "is_paged", False) == (sizes[name] >= MIN_PAGED)
            assert not getattr(states(plain)[name][moment], "is_paged", False)
    assert max(sizes.values()) >= MIN_PAGED > min(sizes.values())
    assert (difference - expected).norm() < 1e-2 * expected.norm()  # sums on a GPU have no fixed order


@pytest.mark.parametrize(
    "optim", ["adamw_8bit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("adafactor", "paged_adamw_32bit"))]
)
def test_a_resumed_run_is_the_uninterrupted_one(make, optim: str) -> None:
    """Bitwise, state included; without its state it would start with steps of full size."""
    whole = make(optim, save_strategy="steps", save_steps=2)
    expected = trained(whole)
    resumed = make(optim)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert all(torch.equal(value, expected[name]) for name, value in parameters(resumed).items())
    loaded = states(resumed)
    for name, state in states(whole).items():
        assert state.keys() == loaded[name].keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(loaded[name][key]), torch.as_tensor(value)), (name, key)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(make) -> None:
    """A recomputation repeats the forward's operations, so the gradients are bitwise the same."""
    expected = trained(make("adamw_8bit", 2))
    got = trained(make("adamw_8bit", 2, gradient_checkpointing=True))
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


@pytest.mark.parametrize("optim", [ADAMW, "adamw_8bit"])
def test_matrices_decay_and_biases_do_not(make, optim: str) -> None:
    """By `learning_rate · weight_decay` of themselves, in the first step; the gradient's part is the same."""
    rate, decay = 2e-3, 0.5
    fields = {"learning_rate": rate, "adapter": {"init_weights": False}}
    trainer = make(optim, 1, weight_decay=decay, **fields)
    before = parameters(trainer)
    got, without = trained(trainer), trained(make(optim, 1, **fields))
    names = trainer.get_decay_parameter_names(trainer.model)
    assert {name for name in got if name not in names} == {name for name in got if name.endswith("bias")}
    assert {name.rpartition(".")[2] for name in got if name in names} == {
        "weight_a", "weight_b", "hidden_weight", "demographic_weight", "weight"
    }  # fmt: skip
    for name, value in got.items():
        expected = rate * decay * before[name] if before[name].dim() > 1 else torch.zeros_like(before[name])
        torch.testing.assert_close(without[name] - value, expected, rtol=0, atol=2e-7)  # float32's, of weights below 1
    assert min(before[name].abs().max() for name in names if name in before) > 0.02
