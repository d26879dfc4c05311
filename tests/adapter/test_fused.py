# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The experts' own backward against autograd's of the formula, and what it costs in operations and memory."""

import copy
import itertools
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trl_cuma import CuMAConfig
from trl_cuma.adapter import experts as experts_module
from trl_cuma.adapter.conditioning import Conditioning
from trl_cuma.adapter.experts import CuMAExperts
from trl_cuma.adapter.router import GATES

SHAPES = {  # leading dimensions of the input and of the gates
    "tokens": ((2, 4), (2, 4)),
    "rows": ((2, 4), (2, 1)),
    "one-profile": ((2, 4), (1, 1)),
    "batch-1": ((1, 4), (1, 1)),
    "decoding": ((3, 1), (3, 1)),
    "flat": ((8,), (8,)),
    "no-rows": ((0, 4), (0, 1)),
    "no-rows-one-profile": ((0, 4), (1, 1)),
    "no-tokens": ((0, 4), (0, 4)),
    "empty-rows": ((2, 0), (2, 1)),
}
BY_ROW = {"rows", "one-profile", "batch-1", "no-rows"}
# The three functions: by token, by row with one A, by row with an A for each expert.
share_a_and_shape = pytest.mark.parametrize(
    ("share_a", "shape"), list(itertools.product([False, True], ["tokens", "rows"]))
)


@pytest.fixture(autouse=True)
def short_rows(monkeypatch) -> None:
    """Rows of two tokens have a product of their own."""
    monkeypatch.setattr(experts_module, "TOKENS_PER_ROW", {True: 2, False: 2})


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("share_a", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_formula_for_each_shape(
    make_mixture, assert_is_formula, shape: str, share_a: bool, in_place: bool
) -> None:
    mixture = make_mixture(share_a, *SHAPES[shape])
    assert_is_formula(mixture, mixture.results(lambda gates: mixture.fast(gates, in_place)))
    if shape != "empty-rows":  # of which there is nothing to say
        by_row = "MixByRow" if share_a else "MixChosenByRow"
        assert mixture.path() == (by_row if shape in BY_ROW else "MixByToken")


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("gate", GATES)
@share_a_and_shape
def test_it_is_the_formula_for_each_gate(
    make_mixture, assert_is_formula, share_a: bool, shape: str, gate: str, top_k: int
) -> None:
    mixture = make_mixture(share_a, *SHAPES[shape], gate=gate, top_k=top_k)
    assert_is_formula(mixture, mixture.results(mixture.fast))
    if shape == "rows" and not share_a:  # as many chosen as there are: a product of each row's own saves nothing
        all_chosen = gate == "soft" or top_k == 5
        assert mixture.path() == ("MixByToken" if all_chosen else "MixChosenByRow")


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@share_a_and_shape
def test_low_precision_rounds(
    make_mixture, assert_is_formula, share_a: bool, shape: str, dtype: torch.dtype, in_place: bool
) -> None:
    mixture = make_mixture(share_a, *SHAPES[shape], dtype=dtype)
    got = mixture.results(lambda gates: mixture.fast(gates, in_place))
    assert [t.dtype for t in got.values()] == [dtype] * 5 + [torch.float32] * 2
    assert_is_formula(mixture, got, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@share_a_and_shape
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters(
    make_mixture, assert_is_formula, share_a: bool, shape: str, dtype: torch.dtype
) -> None:
    mixture = make_mixture(share_a, *SHAPES[shape], dtype=torch.float32)

    def forward(gates: torch.Tensor) -> torch.Tensor:  # the backward outside of autocast, as trainers do
        with torch.autocast("cpu", dtype=dtype):
            return mixture.fast(gates)

    got = mixture.results(forward)
    assert all(t.dtype == torch.float32 for t in got.values())
    assert_is_formula(mixture, got, dtype)
    # a float32 product would be a thousand times nearer
    exact = mixture.double()
    assert (got["y"] - exact.formula(exact.gates())).abs().max() > torch.finfo(dtype).eps / 8


@pytest.mark.parametrize("in_place", [False, True])
@share_a_and_shape
def test_float32_experts_round_once_over_a_bfloat16_base(
    make_mixture, share_a: bool, shape: str, in_place: bool
) -> None:
    """
    To the nearest bfloat16 of the sum, half an eps of it away at most. A sum that is rounded to bfloat16 before it is
    added would be off by half an eps of itself as well: it is several times as large as the base here.
    """
    mixture = make_mixture(share_a, *SHAPES[shape], dtype=torch.float32)
    mixture.base.data = mixture.base.data / 8
    rounded = copy.copy(mixture)
    rounded.base = mixture.base.detach().bfloat16().requires_grad_()
    rounded.x = mixture.x.detach().bfloat16().requires_grad_()
    got = rounded.results(lambda gates: rounded.fast(gates, in_place))
    assert [t.dtype for t in got.values()] == [torch.bfloat16] * 3 + [torch.float32] * 4
    exact = rounded.double()
    y = exact.formula(exact.gates())
    # What float32 loses in sums of some 20 terms, as large as 20 · 2^-23 · 2^8 = 6e-4 of the half eps.
    slack = 20 * torch.finfo(torch.float32).eps * rounded.magnitudes()["y"]
    assert ((got["y"].double() - y).abs() <= torch.finfo(torch.bfloat16).eps / 2 * y.abs() + slack).all()


# ------------------------------------------------------------------------------------------------------- in place
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@share_a_and_shape
def test_in_place_it_writes_into_the_base(make_mixture, share_a: bool, shape: str, base_dtype: torch.dtype) -> None:
    mixture = make_mixture(share_a, *SHAPES[shape], dtype=torch.float32)
    for requires_grad in (False, True):
        results = []
        for in_place in (False, True):
            base = mixture.base.detach().to(base_dtype).requires_grad_(requires_grad).clone()
            before = base.detach().clone()
            y = mixture.experts(mixture.x, mixture.gates(), base, 2, 2.5, in_place)
            assert (y.data_ptr() == base.data_ptr()) is in_place
            assert torch.equal(base, y if in_place else before)
            results.append(y)
        assert torch.equal(*results)
        assert not torch.equal(y, before)


@share_a_and_shape
def test_an_operation_that_kept_the_base_says_so(make_mixture, share_a: bool, shape: str) -> None:
    """`exp` keeps its result for the backward, `square` its input: neither may compute with other numbers."""
    mixture = make_mixture(share_a, *SHAPES[shape])
    for keep_result in (False, True):
        for in_place in (False, True):
            base = mixture.base.exp() if keep_result else mixture.base.clone()
            other = 0 if keep_result else base.square().sum()
            loss = mixture.experts(mixture.x, mixture.gates(), base, 2, 2.5, in_place).sum() + other
            if in_place:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()
            else:
                loss.backward()


@pytest.mark.parametrize("in_place", [False, True])
@share_a_and_shape
def test_a_base_and_an_input_that_are_not_contiguous(
    make_mixture, assert_is_formula, share_a: bool, shape: str, in_place: bool
) -> None:
    mixture = make_mixture(share_a, *SHAPES[shape])
    expected = mixture.results(mixture.fast)

    def forward(gates: torch.Tensor) -> torch.Tensor:
        base, x = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (mixture.base, mixture.x))
        assert not base.is_contiguous() and not x.is_contiguous()
        return mixture.experts(x, gates, base, 2, 2.5, in_place)

    got = mixture.results(forward)
    assert_is_formula(mixture, got)
    for name, theirs in expected.items():
        torch.testing.assert_close(got[name], theirs, rtol=0, atol=1e-12)


def make_layer(**fields) -> nn.Module:
    """A layer of 96 → 80 features."""
    torch.manual_seed(0)
    dtype = fields.pop("dtype", torch.float32)
    model = nn.Sequential(nn.Linear(96, 80, bias=False)).to(dtype)
    config = CuMAConfig(target_modules=["0"], demographic_dim=3, init_weights=False, **fields)
    layer = get_peft_model(model, config).base_model.model[0]
    layer._conditioning.push(Conditioning({"default": torch.randn(4, 3)}))
    return layer


@pytest.mark.parametrize(
    "register",
    [
        lambda layer, hook: layer.base_layer.register_forward_hook(hook),
        lambda layer, hook: nn.modules.module.register_module_forward_hook(hook),
    ],
    ids=["hook", "global-hook"],
)
def test_who_watches_the_base_layer_sees_its_own_numbers(register) -> None:
    layer, x = make_layer(), torch.randn(4, 16, 96)
    alone, expected = layer.base_layer(x), layer(x)
    seen: list[torch.Tensor] = []
    handle = register(layer, lambda module, args, output: seen.append(output) if module is layer.base_layer else None)
    try:
        assert torch.equal(layer(x), expected)
        assert torch.equal(seen[0], alone)
        assert not torch.equal(alone, expected)
    finally:
        handle.remove()


@pytest.mark.parametrize("routing", ["joint", "demographic"])
def test_where_nobody_watches_there_is_no_second_tensor_of_its_size(routing: str) -> None:
    layer, x = make_layer(routing=routing), torch.randn(4, 16, 96)
    alone, forward, seen = layer.base_layer(x), layer.base_layer.forward, []
    layer.base_layer.forward = lambda x: seen.append(forward(x)) or seen[-1]
    assert layer(x).data_ptr() == seen[0].data_ptr()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), alone)


# ---------------------------------------------------------------------------------------- as a module among others
@share_a_and_shape
@pytest.mark.parametrize("alone", range(5), ids=["base", "x", "a", "b", "gates"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(
    make_mixture, assert_only_one_gets_a_gradient, share_a: bool, shape: str, alone: int
) -> None:
    assert_only_one_gets_a_gradient(make_mixture(share_a, *SHAPES[shape]), alone)


@share_a_and_shape
def test_without_gradients_it_computes_the_same(make_mixture, share_a: bool, shape: str) -> None:
    mixture = make_mixture(share_a, *SHAPES[shape])
    expected = mixture.fast(mixture.gates())
    with torch.no_grad():
        assert torch.equal(mixture.fast(mixture.gates()), expected)


@share_a_and_shape
def test_a_copy_and_a_pickle_after_a_forward_compute_the_same(make_mixture, share_a: bool, shape: str) -> None:
    mixture = make_mixture(share_a, *SHAPES[shape])
    y = mixture.fast(mixture.gates())
    for other in (copy.deepcopy(mixture.experts), pickle.loads(pickle.dumps(mixture.experts))):
        assert torch.equal(mixture.fast(mixture.gates(), call=other), y)


@share_a_and_shape
def test_it_compiles_to_one_graph_with_its_backward(
    make_mixture, assert_is_formula, share_a: bool, shape: str
) -> None:
    mixture = make_mixture(share_a, *SHAPES[shape])
    torch._dynamo.reset()
    compiled = torch.compile(mixture.experts, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for factor in (1, 2):  # other values of the same shape
            for tensor in (mixture.base, mixture.x, mixture.logits):
                tensor.data *= factor
            assert_is_formula(mixture, mixture.results(lambda gates: mixture.fast(gates, call=compiled)))
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------- what a layer costs
def layer_with_gates(gates_per_row: int, **fields) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A layer whose gates are given, its input of 4 rows of 64 tokens, and the gates."""
    layer = make_layer(**fields)
    x = torch.randn(4, 64, 96, dtype=layer.base_layer.weight.dtype, requires_grad=True)
    gates = torch.randn(4, gates_per_row, 8)
    gates = gates.masked_fill(gates < gates.topk(2).values[..., 1:], -torch.inf).softmax(-1).requires_grad_()
    layer.gates = lambda name, x: gates
    return layer, x, gates


def measured(measure, layer: nn.Module, x: torch.Tensor, gates: torch.Tensor):
    cost = measure(lambda: layer(x), x, *layer.parameters())
    for grad in (x.grad, gates.grad, *(p.grad for p in layer.cuma_experts.parameters())):
        assert grad.abs().max() > 0  # all of the backward is counted
    return cost


@pytest.mark.parametrize("gates_per_row", [64, 1], ids=["tokens", "rows"])
def test_a_layer_takes_twenty_operations_and_keeps_a_hundred_bytes_per_token(measure, gates_per_row: int) -> None:
    """
    By token, forward: 2 products with A and B, 1 for the gates, the base layer's product: 4. Backward: 4 products, 3
    for `u` with the gates, 3 for the gates' gradient, 2 for that of `A x`, 2 for the base layer's share of the
    input's gradient: 14 at most. By row the mixture of B takes a product, a factor and a copy, three times. Kept are
    `A x` and the gates, 8 numbers each, at most: 64 bytes.
    """
    cost = measured(measure, *layer_with_gates(gates_per_row, r=8, share_a=True))
    assert len(cost.operations) <= 20, cost.operations
    assert cost.kept / (4 * 64) == 4 * (8 + 8 * gates_per_row / 64) < 0.1 * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share_a", [False, True])
@pytest.mark.parametrize("gates_per_row", [64, 1], ids=["tokens", "rows"])
@pytest.mark.parametrize("r", [8, 12])
def test_nothing_as_wide_as_all_experts_and_no_copy_of_the_input_is_kept(
    measure, dtype: torch.dtype, share_a: bool, gates_per_row: int, r: int
) -> None:
    """In float32, which is the adapter's dtype over a bfloat16 base too: `A x` where A is shared, and the gates."""
    cost = measured(measure, *layer_with_gates(gates_per_row, r=r, share_a=share_a, dtype=dtype))
    assert cost.kept / (4 * 64) == 4 * (r * share_a + 8 * gates_per_row / 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share_a", [False, True])
def test_a_router_keeps_its_hidden_layer_and_no_copy_of_the_input(measure, dtype: torch.dtype, share_a: bool) -> None:
    """
    Per token, in float32 whatever the base's dtype: the router's hidden activations (24 wide), the k = 2 chosen gates
    and their indices (int64, for `topk` and `scatter` together), the gates (8), and `A x` (8) where A is shared. The
    input, whose float32 copy would be 384 bytes more, is kept as it is.
    """
    layer = make_layer(r=8, share_a=share_a, dtype=dtype, router_hidden=24)
    x = torch.randn(4, 64, 96, dtype=dtype, requires_grad=True)
    profiles = layer._conditioning.current.profiles["default"]
    cost = measure(lambda: layer(x), x, profiles, *layer.parameters())
    router = layer.cuma_router["default"]
    assert all(p.grad.abs().max() > 0 for p in (x, *router.parameters()))
    assert cost.kept / (4 * 64) == 4 * (24 + 2 + 8 + 8 * share_a) + 8 * 2


WAITS = {  # operations whose result's value or shape the host has to read; `masked_select` is what a boolean mask is
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "unique",
    "_unique2",
    "bincount",
}


@pytest.mark.parametrize("share_a", [False, True])
@pytest.mark.parametrize("gates_per_row", [64, 1], ids=["tokens", "rows"])
@pytest.mark.parametrize("r", [8, 24], ids=["dense", "sorted"])  # with `(8 - 2) · 24 = 144` the threshold on CPU
def test_nothing_waits_for_the_device(measure, share_a: bool, gates_per_row: int, r: int) -> None:
    names = set(measured(measure, *layer_with_gates(gates_per_row, r=r, share_a=share_a)).operations)
    assert not names & WAITS
    assert "mm" in names  # that is how they are called
    assert ("_grouped_mm" in names) is (r == 24 and gates_per_row == 64)


def test_a_rows_experts_are_one_low_rank_product() -> None:
    """
    Multiplications of all products per row of 64 tokens, 96 → 80 features, r = 8, 8 experts, k = 2. A LoRA of rank n
    takes `64 · n · (96 + 80)` forward and twice that backward. One A: that of rank r, and for the mixture of B, and
    its gradients, four times `8 · 8 · 80`. An A for each: that of rank k · r, `A x` once more, and the
    sums over rows, of k chosen experts each, `8 · k · r · (96 + 80)`. By token: rank `8 · r` for B.
    """

    def multiplications(share_a: bool, gates_per_row: int) -> float:
        experts = CuMAExperts(96, 80, 8, 8, share_a, init_weights=False)
        x = torch.randn(4, 64, 96, requires_grad=True)
        gates = torch.randn(4, gates_per_row, 8).softmax(-1).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            experts(x, gates, torch.zeros(4, 64, 80), 2).sum().backward()
        return counter.get_total_flops() / 2 / 4

    lora = 3 * 64 * 16 * (96 + 80)
    assert multiplications(True, 1) == lora / 2 + 4 * 8 * 8 * 80 < lora
    assert multiplications(False, 1) == lora + 64 * 16 * 96 + 8 * 2 * 8 * (96 + 80)
    assert multiplications(True, 64) == 3 * 64 * 8 * (96 + 8 * 80)
    assert multiplications(False, 64) == 3 * 64 * 64 * (96 + 80) + 64 * 64 * 96


def test_a_product_made_outside_of_autocast_serves_inside(make_mixture) -> None:
    """Some models enter autocast in their own forward, after `generate` has prepared the products."""
    mixture = make_mixture(False, (2, 4), (2, 1), dtype=torch.float32)
    experts, x, base = mixture.experts, mixture.x.detach(), mixture.base.detach()
    with torch.no_grad():
        product = experts.product(mixture.gates()[:1, 0], 2, 1.0)
        expected = experts.add_product(x, base, product, in_place=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = experts.add_product(x, base.bfloat16(), product, in_place=True)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=2**-5, atol=2**-5 * expected.abs().max().item())
