# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Tokens sorted by expert: the same numbers as the formula's, chosen where it wins, and nothing wide is kept."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from trl_cuma.adapter import dispatch
from trl_cuma.adapter.experts import CuMAExperts

SIZES = (24, 16, 8, 5)  # in, out, r, experts: rows of whole 16 bytes in each dtype
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOGITS = {
    "random": lambda logits: logits,
    "two experts without a token": lambda logits: logits - 50 * torch.tensor([1, 0, 0, 0, 1]),
    "all tokens on the same experts": lambda logits: logits + 50 * torch.tensor([0, 0, 1, 1, 1]),
    "ties": lambda logits: logits * 0,
    "one token alone": lambda logits: (
        logits + 50 * torch.tensor([1, 1, 1, 0, 0]) * (torch.arange(len(logits)) > 0)[:, *[None] * (logits.dim() - 1)]
    ),
}


def grouped_mm(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """What torch's computes, which has no float64: a product of each group, of rows of `a` or of summed columns."""
    ends = offs.tolist()
    groups = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    if b.dim() == 3:
        return torch.cat([a[group] @ each for group, each in zip(groups, b, strict=True)])
    return torch.stack([a[:, group] @ b[group] for group in groups])


@pytest.fixture
def always_sort(monkeypatch) -> None:
    """Any size is sorted, float64 too."""
    for dtype in DTYPES:
        monkeypatch.setitem(dispatch.LEFT_OUT_RANK, ("cpu", dtype), 0)
    monkeypatch.setattr(dispatch, "TOKENS_PER_EXPERT", 0)


@pytest.fixture
def float64_groups(monkeypatch, always_sort) -> None:
    monkeypatch.setattr(F, "grouped_mm", grouped_mm)


# --------------------------------------------------------------------------------------------------- the formula
@pytest.mark.usefixtures("float64_groups")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("share_a", [False, True])
@pytest.mark.parametrize("rows", [(7, 5), (35,), (1, 35), (35, 1), (1, 1), (2, 3, 2)])
@pytest.mark.parametrize(
    ("gate", "top_k"), [("topk_softmax", 2), ("softmax_topk", 1), ("softmax_topk", 3), ("double_softmax", 3)]
)
def test_it_is_the_formula_for_each_gate_and_shape(
    make_mixture, assert_is_formula, gate: str, top_k: int, rows: tuple, share_a: bool, in_place: bool
) -> None:
    mixture = make_mixture(share_a, rows, sizes=SIZES, gate=gate, top_k=top_k)
    assert mixture.path() == "MixSorted"
    assert_is_formula(mixture, mixture.results(lambda gates: mixture.fast(gates, in_place)))


@pytest.mark.usefixtures("float64_groups")
@pytest.mark.parametrize("share_a", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("case", LOGITS)
def test_it_is_the_formula_wherever_the_tokens_go(
    make_mixture, assert_is_formula, case: str, top_k: int, share_a: bool
) -> None:
    mixture = make_mixture(share_a, (7, 5), sizes=SIZES, gate="softmax_topk", top_k=top_k)
    mixture.logits.data = LOGITS[case](mixture.logits.data)
    got = mixture.results(mixture.fast)
    assert_is_formula(mixture, got)
    if case == "two experts without a token":
        assert not got["b"].unflatten(1, (5, -1))[:, [0, 4]].any()  # zeros, which torch's must write, too


@pytest.mark.usefixtures("always_sort")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("share_a", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LOGITS)
def test_low_precision_rounds(
    make_mixture, assert_is_formula, case: str, dtype: torch.dtype, share_a: bool, in_place: bool
) -> None:
    mixture = make_mixture(share_a, (7, 5), sizes=SIZES, dtype=dtype)
    mixture.logits.data = LOGITS[case](mixture.logits.data)
    got = mixture.results(lambda gates: mixture.fast(gates, in_place))
    assert mixture.path() == "MixSorted"
    assert [t.dtype for t in got.values()] == [dtype] * 5 + [torch.float32] * 2
    assert_is_formula(mixture, got, dtype)
    if case == "two experts without a token":
        assert not got["b"].unflatten(1, (5, -1))[:, [0, 4]].any()


@pytest.mark.usefixtures("always_sort")
@pytest.mark.parametrize("share_a", [False, True])
def test_autocast_computes_in_its_dtype(make_mixture, assert_is_formula, share_a: bool) -> None:
    mixture = make_mixture(share_a, (7, 5), sizes=SIZES, dtype=torch.float32)

    def forward(gates: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mixture.fast(gates)

    got = mixture.results(forward)
    assert all(t.dtype == torch.float32 for t in got.values())
    assert_is_formula(mixture, got, torch.bfloat16)


@pytest.mark.usefixtures("always_sort")
@pytest.mark.parametrize("share_a", [False, True])
def test_float32_experts_over_a_bfloat16_base_round_once(make_mixture, share_a: bool) -> None:
    """Half an eps of the result; the second term is what float32 loses in sums of some `24 + 8 · 2` terms."""
    mixture = make_mixture(share_a, (7, 5), sizes=SIZES, dtype=torch.float32)
    mixture.base = (mixture.base.detach() / 8).bfloat16().requires_grad_()
    mixture.x = mixture.x.detach().bfloat16().requires_grad_()
    exact = mixture.double()
    y = exact.formula(exact.gates())
    bound = torch.finfo(torch.bfloat16).eps / 2 * y.abs() + 40 * 2**-24 * mixture.magnitudes()["y"]
    for in_place in (False, True):
        got = mixture.fast(mixture.gates(), in_place)
        assert got.dtype == torch.bfloat16
        assert ((got.double() - y).abs() <= bound).all()


@pytest.mark.usefixtures("always_sort")
@pytest.mark.parametrize("share_a", [False, True])
def test_in_place_it_writes_into_the_base_and_says_where_that_is_wrong(make_mixture, share_a: bool) -> None:
    mixture = make_mixture(share_a, (7, 5), sizes=SIZES, dtype=torch.float32)
    expected = mixture.fast(mixture.gates())
    base = mixture.base.exp().log()
    kept = base.square()
    y = mixture.experts(mixture.x, mixture.gates(), base, 2, 2.5, True)
    assert y.data_ptr() == base.data_ptr()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y.sum() + kept.sum()).backward()
    # memory that is laid out in another order
    base, x = (t.detach().transpose(0, 1).contiguous().transpose(0, 1) for t in (mixture.base, mixture.x))
    torch.testing.assert_close(mixture.experts(x, mixture.gates(), base, 2, 2.5, True), expected)


@pytest.mark.usefixtures("float64_groups")
@pytest.mark.parametrize("share_a", [False, True])
@pytest.mark.parametrize("alone", range(5), ids=["base", "x", "a", "b", "gates"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(
    make_mixture, assert_only_one_gets_a_gradient, share_a: bool, alone: int
) -> None:
    assert_only_one_gets_a_gradient(make_mixture(share_a, (7, 5), sizes=SIZES), alone)


# ---------------------------------------------------------------------------------------------- where it is chosen
@pytest.mark.parametrize("share_a", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "rows", "fields", "expected"),
    [
        ((64, 48, 64, 8), (2, 64), {}, True),  # left out: rank (8 - 2) · 64 = 384; 2 · 128 choices are 32 an expert
        ((64, 48, 24, 8), (2, 64), {}, True),  # (8 - 2) · 24 = 144
        ((64, 48, 8, 8), (2, 64), {}, False),  # (8 - 2) · 8 = 48
        ((64, 48, 64, 8), (1, 127), {}, False),  # 254 choices of 8 experts
        ((64, 48, 64, 8), (127, 1), {}, False),  # a decoding step
        ((64, 48, 64, 8), (128, 1), {}, True),
        ((64, 48, 64, 8), (1, 64), {"top_k": 4}, True),
        ((64, 48, 64, 8), (2, 64), {"gate": "soft"}, False),  # all are computed anyway
        ((64, 48, 64, 8), (2, 64), {"top_k": 7}, False),  # (8 - 7) · 64 = 64
        ((66, 48, 64, 8), (2, 64), {}, False),  # 264 or 132 bytes
        ((64, 50, 64, 8), (2, 64), {}, False),
        ((64, 48, 18, 8), (2, 64), {}, False),  # 72 or 36 bytes
    ],
)
def test_it_is_chosen_where_it_wins(
    make_mixture, assert_is_formula, sizes, rows, fields, expected: bool, dtype: torch.dtype, share_a: bool
) -> None:
    mixture = make_mixture(share_a, rows, sizes=sizes, dtype=dtype, **fields)
    assert mixture.path() == ("MixSorted" if expected else "MixByToken")
    assert_is_formula(mixture, {"y": mixture.fast(mixture.gates()).detach()}, dtype)


def test_it_is_not_chosen_where_torch_has_no_grouped_product(make_mixture) -> None:
    for dtype in (torch.float64, torch.float16):
        mixture = make_mixture(False, (2, 64), sizes=(64, 48, 64, 8), dtype=dtype)
        assert mixture.path() == "MixByToken"


def test_rows_with_one_gate_vector_have_a_cheaper_way(make_mixture) -> None:
    for share_a, enough, cheaper in ((True, 32, "MixByRow"), (False, 96, "MixChosenByRow")):
        for rows, gate_rows in (((2, enough), (2, 1)), ((enough // 4, 4), (1, 1))):  # of one profile, all are one row
            mixture = make_mixture(share_a, rows, gate_rows, sizes=(64, 48, 8, 8), dtype=torch.float32)
            assert mixture.path() == cheaper
        for rows, gate_rows in (((2, enough - 1), (2, 1)), ((enough // 4 - 1, 4), (1, 1))):
            mixture = make_mixture(share_a, rows, gate_rows, sizes=(64, 48, 8, 8), dtype=torch.float32)
            assert mixture.path() == "MixByToken"


@pytest.mark.parametrize("share_a", [False, True])
def test_both_sides_of_the_threshold_agree(make_mixture, assert_is_formula, share_a: bool) -> None:
    """In output and gradients, of the same 128 tokens; they round differently, within the bound of each."""
    mixture = make_mixture(share_a, (1, 128), sizes=(64, 48, 16, 8), dtype=torch.float32)
    got = []
    for threshold in (96, 97):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(dispatch.LEFT_OUT_RANK, ("cpu", torch.float32), threshold)
            assert (mixture.path() == "MixSorted") is (threshold == 96)
            got.append(mixture.results(mixture.fast))
            assert_is_formula(mixture, got[-1], torch.float32)
    assert not torch.equal(got[0]["y"], got[1]["y"])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"share_a": True},
        {"gate": "softmax_topk", "top_k": 1},
        {"router_groups": [["q_proj", "v_proj"]], "demographic_projection": 3},
        {"routing": "semantic", "target_modules": "all-linear"},
    ],
    ids=["separate", "shared", "top-1", "groups", "all-linear"],
)
def test_a_model_is_the_same_sorted_or_not(make_model, make_batch, fields: dict) -> None:
    """
    Logits and all gradients, in float32: some ten layers one after the other, whose sums are 64 to 256 long and add up
    with `sqrt(n)` roundings: 10 · 16 · 2^-24 = 1e-5 of the largest. The softmax of attention and the norms may double
    that a few times.
    """
    model, batch = make_model(**fields), make_batch(lengths=[5, 9, 7])

    def run(sorts: bool) -> list[torch.Tensor]:
        calls = []
        forward = dispatch.MixSorted.forward
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(dispatch.LEFT_OUT_RANK, ("cpu", torch.float32), 0 if sorts else math.inf)
            patch.setattr(dispatch, "TOKENS_PER_EXPERT", 0)
            patch.setattr(dispatch.MixSorted, "forward", lambda *args: calls.append(1) or forward(*args))
            logits = model(**batch).logits
            real = logits[batch["attention_mask"].bool()]
            model.zero_grad()
            real.square().mean().backward()
        layers = [module for module in model.modules() if isinstance(module, CuMAExperts)]
        assert len(calls) == (len(layers) if sorts else 0)
        trained = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        assert all(grad.abs().max() > 0 for grad in trained.values())
        return [real.detach(), *trained.values()]

    for mine, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-5 * theirs.abs().max().item())


@pytest.mark.usefixtures("always_sort")
@pytest.mark.parametrize("share_a", [False, True])
def test_it_compiles_to_one_graph_with_its_backward(make_mixture, assert_is_formula, share_a: bool) -> None:
    mixture = make_mixture(share_a, (7, 5), sizes=SIZES, dtype=torch.bfloat16)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixture.experts, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for case in ("random", "ties", "all tokens on the same experts"):  # other values of the same shape
            mixture.logits.data = LOGITS[case](mixture.logits.data)
            got = mixture.results(lambda gates: mixture.fast(gates, call=compiled))
            assert_is_formula(mixture, got, torch.bfloat16)
            for name, eager in mixture.results(mixture.fast).items():
                torch.testing.assert_close(got[name], eager)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_float32_experts_that_would_be_sorted_compile(make_mixture, assert_is_formula) -> None:
    mixture = make_mixture(False, (2, 64), sizes=(64, 48, 64, 8), dtype=torch.float32)
    assert mixture.path() == "MixSorted"
    torch._dynamo.reset()
    compiled = torch.compile(mixture.experts, fullgraph=True, backend="aot_eager")
    assert_is_formula(mixture, mixture.results(lambda gates: mixture.fast(gates, call=compiled)), torch.float32)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------- what it keeps
@pytest.mark.usefixtures("always_sort")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share_a", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_it_keeps_what_is_top_k_wide(make_mixture, measure, share_a: bool, dtype: torch.dtype, top_k: int) -> None:
    """
    Per token and choice: its gate (float32), its expert, its place in the order and back (int64 each); where each
    expert's tokens end (int32); and `A x` of rank r in the experts' dtype, for each choice where it has an A of its
    own. With r = 8, k = 2 and a shared A in float32 that is 88 bytes a token, below 0.1 KiB. Of a bfloat16 input that
    float32 experts read no copy is kept either.
    """
    tokens, (_, _, r, experts) = 64, SIZES
    mixture = make_mixture(share_a, (4, 16), sizes=SIZES, dtype=dtype)
    gates = torch.rand(4, 16, experts)
    gates = gates.masked_fill(gates < gates.topk(top_k).values[..., -1:], 0).requires_grad_()
    expected = tokens * top_k * (4 + 3 * 8) + experts * 4
    for x_dtype, expert_dtype in ((dtype, dtype), (torch.bfloat16, torch.float32)):
        experts_copy = copy.deepcopy(mixture.experts).to(expert_dtype)
        x = mixture.x.detach().to(x_dtype).requires_grad_()
        base = mixture.base.detach().to(x_dtype).requires_grad_()
        known = (x, base, gates, *experts_copy.parameters())
        cost = measure(lambda x=x, base=base, call=experts_copy: call(x, gates, base, top_k), *known)
        assert all(t.grad.abs().max() > 0 for t in known)
        rank = r * expert_dtype.itemsize * (1 if share_a else top_k)
        assert cost.kept == expected + tokens * rank
        if share_a:
            assert cost.kept / tokens < 0.1 * 1024
