# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Router losses against loops over documents and tokens, and their injected gradient against plain autograd."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from trl_cuma.adapter.losses import RouterLosses, document_weights, load_balancing_loss, router_statistics
from trl_cuma.adapter.router import GATES, CuMARouter, compute_gates


def losses_of_one_router(
    logits: torch.Tensor, documents: list[list[tuple[int, int]]], gate: str, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Load balancing loss and z-loss by the definition: means over a document's tokens, then over documents.

    Differentiable, written without anything of the library; `documents` lists the (row, position) of real tokens.
    """
    experts = logits.shape[-1]
    load, importance, z_loss = torch.zeros(experts).to(logits), 0, 0
    for document in documents:
        for row, position in document:
            weight = 1 / (len(documents) * len(document))
            z = logits[row, position]
            normaliser = torch.log(torch.exp(z).sum())
            p = torch.exp(z - normaliser)
            importance = importance + weight * p
            z_loss = z_loss + weight * normaliser**2
            if gate == "soft":
                load = load + weight * p.detach()
            else:
                for i in sorted(range(experts), key=lambda i: -z[i].item())[:top_k]:
                    load[i] += weight / top_k
    return experts * sum(load[i] * importance[i] for i in range(experts)), z_loss


def published_loss_of_one_router(logits: torch.Tensor, mask: torch.Tensor, gate: str, top_k: int) -> torch.Tensor:
    """
    `E · sum_i freq_i prop_i` over all real tokens at once: freq_i, the positive gates of expert i over k · tokens, and
    prop_i, the mean gate. Differentiable through prop_i.
    """
    experts, tokens = logits.shape[-1], mask.sum().item()
    freq, prop = [0.0] * experts, [0.0] * experts
    for row, position in mask.nonzero().tolist():
        p = torch.exp(logits[row, position]) / torch.exp(logits[row, position]).sum()
        chosen = sorted(range(experts), key=lambda i: -p[i].item())[:top_k]
        values = {"softmax_topk": p, "topk_softmax": torch.exp(logits[row, position]), "double_softmax": torch.exp(p)}
        total = 1 if gate == "softmax_topk" else sum(values[gate][i] for i in chosen)
        for i in chosen:
            freq[i] += 1 / (top_k * tokens)
            prop[i] = prop[i] + values[gate][i] / total / tokens
    return experts * sum(f * each for f, each in zip(freq, prop, strict=True))


def rows_as_documents(mask: torch.Tensor) -> list[list[tuple[int, int]]]:
    return [[(i, j) for j in range(mask.shape[1]) if mask[i, j]] for i in range(mask.shape[0])]


# ---------------------------------------------------------------------- values
def test_an_even_load_gives_1_and_a_collapsed_one_the_number_of_experts() -> None:
    even = torch.full((4,), 1 / 4)
    assert load_balancing_loss(even, even).item() == 1.0
    one = torch.tensor([1.0, 0, 0, 0])
    assert load_balancing_loss(one, one).item() == 4.0
    # every expert in turn is certain: f = P = 1/4 each, loss 4 * 4 * (1/4)^2 = 1
    statistics = router_statistics(100 * torch.eye(4).view(1, 4, 4), "softmax_topk", 1)
    assert load_balancing_loss(statistics.load, statistics.importance).item() == pytest.approx(1.0)
    # uniform probabilities have entropy log E, and logsumexp(0, 0, 0, 0)^2 = log(4)^2
    uniform = router_statistics(torch.zeros(2, 3, 4), "soft", 2)
    assert uniform.entropy.item() == pytest.approx(math.log(4))
    assert uniform.z_loss.item() == pytest.approx(math.log(4) ** 2)


@pytest.mark.parametrize("gate", GATES)
def test_padding_does_not_count_and_each_row_weighs_the_same(gate: str) -> None:
    logits = torch.randn(3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0]])
    weights, documents = document_weights(mask)
    statistics = router_statistics(logits, gate, 2, weights)
    value, z_loss = losses_of_one_router(logits, rows_as_documents(mask), gate, 2)
    assert documents.item() == 3
    assert load_balancing_loss(statistics.load, statistics.importance).item() == pytest.approx(value.item(), rel=1e-6)
    assert statistics.z_loss.item() == pytest.approx(z_loss.item(), rel=1e-6)
    assert statistics.load.sum().item() == pytest.approx(1)

    garbage = logits + 1000 * (1 - mask).unsqueeze(-1)  # what padding holds changes nothing
    torch.testing.assert_close(router_statistics(garbage, gate, 2, weights).importance, statistics.importance)


def test_packed_documents_weigh_the_same_however_long() -> None:
    logits = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    starts = torch.tensor([[1, 0, 0, 0, 1, 0], [0, 0, 1, 0, 1, 0]]).bool()  # a row starts a document by itself
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])  # the last "document" is padding
    packed = [[(0, j) for j in range(4)], [(0, 4), (0, 5)], [(1, 0), (1, 1)], [(1, 2), (1, 3)]]
    weights, documents = document_weights(mask, starts)
    statistics = router_statistics(logits, "topk_softmax", 2, weights)
    value, _ = losses_of_one_router(logits, packed, "topk_softmax", 2)
    assert documents.item() == 4
    assert load_balancing_loss(statistics.load, statistics.importance).item() == pytest.approx(value.item(), rel=1e-6)


def test_logits_that_come_once_for_a_row_or_a_batch_count_for_all_their_tokens() -> None:
    weights, _ = document_weights(torch.tensor([[1, 1, 1], [1, 0, 0]]))
    per_row = torch.randn(2, 1, 4)
    full = router_statistics(per_row.expand(2, 3, 4), "topk_softmax", 2, weights)
    torch.testing.assert_close(router_statistics(per_row, "topk_softmax", 2, weights).load, full.load)
    once = per_row[:1]
    full = router_statistics(once.expand(2, 3, 4), "topk_softmax", 2, weights)
    torch.testing.assert_close(router_statistics(once, "topk_softmax", 2, weights).importance, full.importance)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="'local', 'ranks', 'published', got 'global'"):
        RouterLosses(balance="global")
    weights, _ = document_weights(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"attention mask is \(2, 3\).* input \(6, 2\)"):
        router_statistics(torch.zeros(6, 2, 4), "soft", 2, weights)


def test_the_published_loss_reads_gates_counts_tokens_and_sums_routers() -> None:
    """
    Top-2 of 4 experts with certain routers: gates are 0.731 and 0.269 from the double softmax. One document of three
    tokens chooses experts 0 and 1, one of one token 2 and 3; over tokens freq = 3/8, 3/8, 1/8, 1/8.
    """
    logits = torch.full((2, 3, 4), -40.0)
    logits[0, :, 0] = logits[1, :, 2] = 40.0
    logits[0, :, 1] = logits[1, :, 3] = -30.0
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    gates = compute_gates(logits, "double_softmax", 2)
    values = {}
    for balance in ("published", "local"):
        losses = RouterLosses(mask, balance=balance)
        for router in (nn.Identity(), nn.Identity()):
            losses.observe(router, logits, gates, "double_softmax", 2)
        values[balance] = losses.finish()["aux_loss"].item()
    g = 1 / (1 + math.exp(-1))  # 0.731
    of_one = 4 * (3 / 8 * 3 / 4 * g + 3 / 8 * 3 / 4 * (1 - g) + 1 / 8 * 1 / 4 * g + 1 / 8 * 1 / 4 * (1 - g))
    assert of_one == pytest.approx(4 * (9 / 32 + 1 / 32))
    assert values["published"] == pytest.approx(2 * of_one)  # the sum over two routers
    assert values["local"] == pytest.approx(1.0)  # documents weigh the same: f = 1/4 each, P = (1/2, 0, 1/2, 0)


# ---------------------------------------------------------------------- the gradient
def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(left: dict, right: dict, atol: float = 2e-8) -> None:
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        torch.testing.assert_close(
            gradient, right[name], rtol=1e-4, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def plain_autograd_gradients(
    model, batch, gate: str, aux: float, z: float, documents=None
) -> tuple[dict, float, float]:
    """Loss and gradients of task + router losses, with the router losses built from the routers' own logits."""
    seen: dict[nn.Module, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, _, logits: seen.__setitem__(module, logits))
        for module in model.modules()
        if isinstance(module, CuMARouter)
    ]
    loss = model(**batch, labels=batch["input_ids"]).loss
    for hook in hooks:
        hook.remove()
    rows, length = batch["input_ids"].shape
    documents = documents or rows_as_documents(batch["attention_mask"])
    values = [
        losses_of_one_router(logits.expand(rows, length, -1), documents, gate, top_k=2) for logits in seen.values()
    ]
    aux_loss, z_loss = (sum(v) / len(values) for v in zip(*values, strict=True))
    model.zero_grad()
    (loss + aux * aux_loss + z * z_loss).backward()
    return gradients(model), aux_loss.item(), z_loss.item()


@pytest.mark.parametrize(
    "fields",
    [
        *({"gate": gate} for gate in GATES),
        {"routing": "demographic", "demographic_projection": 3},
        {"routing": "semantic"},
        {"router_groups": [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]], "target_modules": "all-linear"},
        {"share_a": True, "demographic_projection": 3, "router_layers": 1, "lora_dropout": 0.0},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_the_injected_gradient_is_that_of_plain_autograd(make_model, make_batch, fields: dict) -> None:
    model = make_model(**fields).train()
    batch = make_batch(lengths=[6, 2, 4])
    gate = fields.get("gate", "topk_softmax")
    expected, aux_loss, z_loss = plain_autograd_gradients(model, batch, gate, aux=0.7, z=0.05)

    model.zero_grad()
    outputs = model(**batch, labels=batch["input_ids"], output_router_losses="local")
    (outputs.loss + 0.7 * outputs["aux_loss"] + 0.05 * outputs["z_loss"]).backward()
    assert outputs["aux_loss"].item() == pytest.approx(aux_loss, rel=1e-5)
    assert outputs["z_loss"].item() == pytest.approx(z_loss, rel=1e-5)
    assert_same_gradients(gradients(model), expected)

    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    without = gradients(model)
    assert any((expected[name] - without[name]).abs().max() > 1e-4 for name in expected if "cuma_router" in name)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("gate", ["double_softmax", "topk_softmax", "softmax_topk"])
def test_the_published_losss_injected_gradient_is_that_of_plain_autograd(
    make_model, make_batch, gate: str, use_reentrant: bool | None
) -> None:
    model, batch = make_model(gate=gate).train(), make_batch(lengths=[6, 2, 4])
    seen: dict[nn.Module, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, _, logits: seen.__setitem__(module, logits))
        for module in model.modules()
        if isinstance(module, CuMARouter)
    ]
    loss = model(**batch, labels=batch["input_ids"]).loss
    for hook in hooks:
        hook.remove()
    expected = sum(published_loss_of_one_router(z, batch["attention_mask"], gate, 2) for z in seen.values())
    (loss + 0.2 * expected).backward()
    gradients_expected = gradients(model)

    model.zero_grad()
    if use_reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    outputs = model(**batch, labels=batch["input_ids"], output_router_losses="published")
    (outputs.loss + 0.2 * outputs["aux_loss"]).backward()
    assert outputs["aux_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(model), gradients_expected)

    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    without = gradients(model)
    assert any(
        (each - without[name]).abs().max() > 1e-4 for name, each in gradients_expected.items() if "cuma_router" in name
    )


def test_nothing_is_injected_where_the_router_losses_are_not_added(make_model, make_batch) -> None:
    model, batch = make_model().train(), make_batch()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model(**batch, labels=batch["input_ids"], output_router_losses="local").loss.backward()
    assert_same_gradients(gradients(model), expected, atol=0)


def test_a_factor_on_the_whole_loss_scales_the_injected_gradient(make_model, make_batch) -> None:
    model, batch = make_model().train(), make_batch()
    results = []
    for factor in (1.0, 64.0):  # as accumulation and a gradient scaler do
        model.zero_grad()
        outputs = model(**batch, labels=batch["input_ids"], output_router_losses="local")
        (factor * (outputs.loss + outputs["aux_loss"])).backward()
        results.append({name: gradient / factor for name, gradient in gradients(model).items()})
    assert_same_gradients(*results)


def test_a_router_that_is_asked_twice_counts_as_one_router() -> None:
    """As for a module that a model reuses: the loss is the mean over routers, of the mean over a router's calls."""
    torch.manual_seed(0)
    routers, x = [nn.Linear(5, 4) for _ in range(2)], torch.randn(3, 2, 6, 5)
    calls = [(routers[0], x[0]), (routers[1], x[1]), (routers[0], x[2])]
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])

    losses = RouterLosses(mask)
    task = sum(losses.observe(r, r(y), compute_gates(r(y)), "topk_softmax", 2).square().mean() for r, y in calls)
    values = losses.finish()
    (task + 0.7 * values["aux_loss"] + 0.1 * values["z_loss"]).backward()
    injected = gradients(nn.ModuleList(routers))

    nn.ModuleList(routers).zero_grad()
    aux_loss = z_loss = 0
    for router in routers:
        own = [y for r, y in calls if r is router]
        statistics = [router_statistics(router(y), "topk_softmax", 2, document_weights(mask)[0]) for y in own]
        load, importance, z = (
            sum(getattr(each, name) for each in statistics) / len(own) for name in ("load", "importance", "z_loss")
        )
        aux_loss = aux_loss + load_balancing_loss(load, importance) / 2
        z_loss = z_loss + z / 2
    task = sum(compute_gates(router(y)).square().mean() for router, y in calls)
    (task + 0.7 * aux_loss + 0.1 * z_loss).backward()
    assert values["aux_loss"].item() == pytest.approx(aux_loss.item())
    assert_same_gradients(injected, gradients(nn.ModuleList(routers)))


@pytest.mark.parametrize(
    "fields",
    [
        {"demographic_projection": 3},
        {"routing": "demographic", "demographic_projection": 3},
        {"routing": "semantic"},
        {"gate": "soft", "router_groups": [["q_proj", "k_proj", "v_proj"]], "target_modules": "all-linear"},
    ],
    ids=["joint", "demographic", "semantic", "groups"],
)
def test_every_checkpointing_mode_gives_the_same_gradients(make_model, make_batch, fields: dict) -> None:
    """Two forwards with different profiles before one backward, and a reference forward in between."""
    batch = make_batch(lengths=[6, 2, 4])
    other = batch | {"demographic_embeds": -2 * batch["demographic_embeds"]}
    results = []
    for use_reentrant in (None, False, True):
        model = make_model(**fields).train()
        if use_reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        first = model(**batch, labels=batch["input_ids"], output_router_losses="local")
        with torch.no_grad():
            third = batch | {"demographic_embeds": 5 * batch["demographic_embeds"]}
            model(**third)
            with model.disable_adapter():
                model(**batch)
        second = model(**other, labels=batch["input_ids"], output_router_losses="local")
        loss = first.loss + 0.7 * first["aux_loss"] + 0.05 * first["z_loss"] + second.loss + 0.2 * second["aux_loss"]
        loss.backward()
        results.append((gradients(model), loss.item()))
    for gradient, loss in results[1:]:
        assert loss == pytest.approx(results[0][1], rel=1e-6)
        assert_same_gradients(gradient, results[0][0])


def test_packed_documents_reach_the_losses_of_a_model(make_model, make_batch) -> None:
    model, batch = make_model(demographic_projection=3).train(), make_batch(rows=2, length=6)
    batch["demographic_ids"] = torch.tensor([[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
    batch["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]])
    documents = [
        [(0, j) for j in range(4)],
        [(0, 4), (0, 5)],
        [(1, j) for j in range(3)],  # two documents of one person, told apart by their positions
        [(1, j) for j in range(3, 6)],
    ]
    mask = batch.pop("attention_mask")
    assert mask.all()
    expected, aux_loss, _ = plain_autograd_gradients(model, batch, "topk_softmax", 0.7, 0, documents)
    model.zero_grad()
    outputs = model(**batch, labels=batch["input_ids"], output_router_losses="local")
    (outputs.loss + 0.7 * outputs["aux_loss"]).backward()
    assert outputs["aux_loss"].item() == pytest.approx(aux_loss, rel=1e-5)
    assert_same_gradients(gradients(model), expected)


def test_the_average_profile_has_router_losses_too(make_model, make_batch) -> None:
    model = make_model(routing="demographic", missing_demographics="zero")
    batch = make_batch(lengths=[6, 2, 4])
    zeros = model(**(batch | {"demographic_embeds": torch.zeros(3, 6)}), output_router_losses="local")
    del batch["demographic_embeds"]
    missing = model(**batch, output_router_losses="local")
    assert missing["aux_loss"].item() == pytest.approx(zeros["aux_loss"].item())


def test_the_outputs_describe_the_routers(make_model, make_batch) -> None:
    model, batch = make_model(), make_batch()
    outputs = model(**batch, output_router_losses="local")
    assert outputs["router_load"].shape == (4, 4)  # 2 layers x (q_proj, v_proj), 4 experts
    torch.testing.assert_close(outputs["router_load"].sum(-1), torch.ones(4))
    assert 0 < outputs["router_entropy"].item() <= math.log(4) + 1e-6
    assert "aux_loss" not in model(**batch)
    with model.disable_adapter():
        assert "aux_loss" not in model(**batch, output_router_losses="local")
    with pytest.raises(TypeError, match="return_dict=True"):
        model(**batch, output_router_losses="local", return_dict=False)


@pytest.mark.slow
def test_a_compiled_model_gets_the_injected_gradient(make_model, make_batch) -> None:
    model, batch = make_model().train(), make_batch()
    results = []
    for run in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        outputs = run(**batch, labels=batch["input_ids"], output_router_losses="local")
        (outputs.loss + outputs["aux_loss"]).backward()
        results.append(gradients(model))
    assert_same_gradients(*results, atol=1e-6)


# ---------------------------------------------------------------------- across processes
WORKER = """
import sys
import torch
import torch.distributed as dist
from trl_cuma.adapter.losses import RouterLosses
from trl_cuma.adapter.router import compute_gates

rank, folder = int(sys.argv[1]), sys.argv[2]
if rank >= 0:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
data = torch.load(f"{folder}/data.pt")
routers = [torch.nn.Linear(5, 4) for _ in range(2)]
for router, state in zip(routers, data["routers"]):
    router.load_state_dict(state)
rows = slice(None) if rank < 0 else slice(2 * rank, 2 * rank + 2)
losses = RouterLosses(data["mask"][rows], balance="ranks")
task = 0
for router in routers:
    logits = router(data["x"][rows])
    task = task + losses.observe(router, logits, compute_gates(logits), "topk_softmax", 2).square().mean()
outputs = losses.finish()
(task + 0.7 * outputs["aux_loss"] + 0.1 * outputs["z_loss"]).backward()
gradients = torch.cat([p.grad.flatten() for router in routers for p in router.parameters()])
result = {"aux_loss": outputs["aux_loss"].detach(), "z_loss": outputs["z_loss"].detach(), "gradients": gradients}
if rank >= 0:
    for value in result.values():  # as DDP does with gradients, and a trainer with logged values
        dist.all_reduce(value)
        value /= 2
result["load"] = outputs["router_load"]
torch.save(result, f"{folder}/result{rank}.pt")
"""


@pytest.mark.slow
def test_ranks_share_the_load(tmp_path: Path) -> None:
    """Two processes with two rows each equal one process with all four rows."""
    torch.manual_seed(0)
    data = {
        "x": torch.randn(4, 6, 5),
        "mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [0] * 5 + [1], [1] * 6]),
        "routers": [nn.Linear(5, 4).state_dict() for _ in range(2)],
    }
    torch.save(data, tmp_path / "data.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, str(tmp_path / "worker.py")]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    namespace = {"__name__": "worker"}
    argv, sys.argv = sys.argv, ["worker", "-1", str(tmp_path)]
    try:
        exec(compile(WORKER, "worker", "exec"), namespace)  # the same code in this process, without a group
    finally:
        sys.argv = argv
    ranks = [torch.load(tmp_path / f"result{rank}.pt") for rank in (0, 1)]
    single = torch.load(tmp_path / "result-1.pt")
    for result in ranks:
        for name, value in single.items():
            torch.testing.assert_close(result[name], value)
