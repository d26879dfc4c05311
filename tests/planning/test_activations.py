# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The computed peak against the one that torch's profiler sees the CPU's allocator reach in real trainers' steps."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import trl.trainer.utils
from peft import PeftModel
from torch.autograd.graph import saved_tensors_hooks

from trl_cuma.planning.activations import Step, measure
from trl_cuma.planning.architecture import Base, build_model, load_config, with_layers
from trl_cuma.planning.kernels import Attention, Operations

DIM = 6
FP32, BF16 = Base(torch.float32), Base(torch.bfloat16)


@pytest.fixture
def narrow_tiles(monkeypatch) -> None:
    """TRL's head makes tiles 32768 logits wide, which a vocabulary of 63 would drown in."""
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)


def peak_of_the_allocator(step: Callable[[], None]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


CASES = [
    ("qwen3", "sft", FP32, None),
    ("qwen3", "dpo", BF16, "non-reentrant"),
    ("bloom", "sft", BF16, "non-reentrant"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("qwen3", "sft", BF16, "non-reentrant"),
            ("qwen3", "dpo", BF16, None),
            ("llama", "dpo", FP32, "reentrant"),
            ("llama", "sft", BF16, None),
            ("bloom", "sft", FP32, None),
            ("bloom", "dpo", BF16, None),
        )
    ),
]


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("architecture, method, base, checkpointing", CASES)
def test_the_peak_is_that_of_a_real_step(
    make_base, adapter, make_trainer, architecture: str, method: str, base: Base, checkpointing: str | None
) -> None:
    """
    Within 3.5 %: of the CPU's kernels the plan doesn't know what they allocate within themselves, and it counts the
    batch, which the trainer has before.
    """
    bf16 = base is BF16
    model = make_base(architecture, base.dtype)
    kwargs = {"use_reentrant": checkpointing == "reentrant"} if checkpointing else None
    _, step, (rows, length) = make_trainer(
        model,
        adapter(),
        method,
        bf16=bf16,
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs=kwargs,
    )
    step()  # makes the gradients
    measured = peak_of_the_allocator(step)
    planned, _ = measure(
        build_model(model.config, base, adapter()),
        Step(method, rows, length, DIM, autocast=bf16, checkpointing=checkpointing),
        on_gpu=False,
    )
    assert planned == pytest.approx(measured, rel=0.035)


@pytest.mark.usefixtures("narrow_tiles")
def test_the_peak_with_a_copy_of_the_adapter_as_reference(make_base, adapter, make_trainer, tmp_path) -> None:
    model = make_base()
    config = model.config
    trainer, *_ = make_trainer(model, adapter(), batch=2)
    trainer.save_model(str(tmp_path / "sft"))
    _, step, (rows, length) = make_trainer(make_base(), None, "dpo", batch=2, cuma_adapter_path=str(tmp_path / "sft"))
    step()
    measured = peak_of_the_allocator(step)
    planned = build_model(config, FP32, adapter())
    with torch.device("meta"):
        planned.add_adapter("ref", planned.peft_config["default"])
    assert measure(planned, Step("dpo", rows, length, DIM, autocast=False), on_gpu=False)[0] == pytest.approx(
        measured, rel=0.035
    )


@pytest.mark.usefixtures("narrow_tiles")
def test_the_peak_over_a_4_bit_base(make_base, adapter, make_trainer, tmp_path) -> None:
    """On the CPU, whose product unpacks the weights as the GPU's does, out of sight: 6 % of so small a model."""
    pytest.importorskip("bitsandbytes", reason="needs the extra trl_cuma[quantization]")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_base().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=config
    )
    _, step, (rows, length) = make_trainer(model, adapter(), bf16=True)
    step()
    measured = peak_of_the_allocator(step)
    base = Base(torch.bfloat16, "nf4", storage=torch.bfloat16)
    planned, _ = measure(
        build_model(make_base().config, base, adapter()), Step("sft", rows, length, DIM, autocast=True), on_gpu=False
    )
    assert planned == pytest.approx(measured, rel=0.06)


# ---------------------------------------------------------------------- depth
@pytest.mark.parametrize(
    "architecture, method, checkpointing",
    [
        ("qwen3", "dpo", "non-reentrant"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("qwen3", "sft", None),
                ("bloom", "sft", "reentrant"),
                ("qwen3", "sft", "non-reentrant"),
                ("qwen3", "dpo", None),
                ("bloom", "sft", None),
                ("bloom", "dpo", None),
                ("bloom", "dpo", "non-reentrant"),
            )
        ),
    ],
)
@pytest.mark.usefixtures("narrow_tiles")
def test_two_depths_tell_of_all(make_base, adapter, architecture: str, method: str, checkpointing: str | None) -> None:
    """The third layer adds to the second's peak and operations what each further one does: to the byte."""
    config = make_base(architecture, num_hidden_layers=6).config
    step = Step(method, 8, 64, DIM, autocast=True, checkpointing=checkpointing)
    two, three, six = (measure(build_model(with_layers(config, n), BF16, adapter()), step) for n in (2, 3, 6))
    assert six == tuple(b + 3 * (b - a) for a, b in zip(two, three, strict=True))


# ---------------------------------------------------------------------- a GPU's kernels
def test_attention_keeps_what_the_flash_kernel_keeps() -> None:
    """The CPU has one too: inputs, result and a float32 for each row of scores."""
    query, key, value = (torch.randn(2, 4, 32, 16, requires_grad=True) for _ in range(3))

    def kept(attention: Callable) -> list:
        found = []
        with saved_tensors_hooks(lambda t: found.append((t.dtype, t.numel())), lambda t: None):
            attention()
        return sorted(found, key=str)

    real = kept(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True))
    assert kept(lambda: Attention.apply(query, key, value, None, Operations())) == real
    assert (torch.float32, 2 * 4 * 32) in real


def peak_at(model: PeftModel, rows: int, length: int) -> int:
    return measure(model, Step("sft", rows, length, DIM, autocast=True))[0]


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.slow
def test_what_grows_with_the_square_of_the_length(make_base, adapter) -> None:
    """
    A row alone has no scores and no mask. With others it has a mask: a byte for each pair of tokens, and in each layer
    the 2 bytes that the kernel turns it into. BLOOM has scores for each head: at least 4 bytes for softmax, 2 beside.
    """
    length, layers, heads = 2048, 2, 4

    def square(architecture: str, rows: int) -> float:
        """The coefficient of `length²`, from its second difference."""
        short, middle, long = (
            peak_at(
                build_model(make_base(architecture, num_hidden_layers=layers).config, BF16, adapter()),
                rows,
                n * length,
            )
            for n in (1, 2, 3)
        )
        return (long - 2 * middle + short) / 2 / length**2

    assert square("qwen3", 1) == pytest.approx(0, abs=0.01)
    assert square("qwen3", 2) == pytest.approx(2 * (1 + 2 * layers), rel=0.15)
    assert square("bloom", 1) > heads * layers * (4 + 2)


def test_operations_of_qwen3_8b(adapter) -> None:
    """
    For each number of a frozen layer 2 operations a token in the forward and 2 for the input's gradient; 6 for each of
    the adapter's, which is computed twice (its `A x` is, for the backward); causal attention as in its docstring, of
    which the backward has 2.5 times the forward. Of the embedding nothing, and TRL's head is computed once more.
    """
    config, length = load_config("Qwen/Qwen3-8B"), 512
    head, layer = 151_936 * 4096, (8_190_735_360 - 2 * 151_936 * 4096) // 36
    fields = {"demographic_dim": 1024, "num_experts": 8, "r": 8, "router_hidden": 256}
    step = Step("sft", 1, length, 1024, autocast=True)
    model = build_model(with_layers(config, 2), BF16, adapter(target_modules=["q_proj", "v_proj"], **fields))
    _, two = measure(model, step)
    model = build_model(with_layers(config, 3), BF16, adapter(target_modules=["q_proj", "v_proj"], **fields))
    _, three = measure(model, step)
    attention = 3.5 * 2 * 4096 * length  # for each token
    experts, router = 125_209_152 / 36 - 2 * 4096 * 256, 2 * 4096 * 256
    assert (three - two) / length == pytest.approx(4 * layer + 7 * experts + 6 * router + attention, rel=0.03)
    assert two - 2 * (three - two) == pytest.approx(6 * head * length, rel=0.05)
