# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
What must be equal: the same person and text give the same answer, whatever shares the batch, pads it, packs it, caches
it or copies it.
"""

import subprocess
import sys

import pytest
import torch
from peft import PeftModel

from trl_cuma.testing import tiny_model

LINEAR = {"target_modules": "all-linear"}
VARIANTS = {
    "joint": LINEAR | {"demographic_projection": 3},
    "demographic": LINEAR | {"routing": "demographic", "gate": "softmax_topk"},
    "semantic": LINEAR | {"routing": "semantic", "gate": "double_softmax"},
    "groups": LINEAR | {"router_groups": [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]], "share_a": True},
}
variants = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
architectures = pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "opt", "bloom"])


def alone(batch: dict, row: int) -> dict:
    """One sample of a padded batch, by itself and without padding."""
    real = batch["attention_mask"][row].bool()
    return {
        "input_ids": batch["input_ids"][row : row + 1, real],
        "attention_mask": batch["attention_mask"][row : row + 1, real],
        "demographic_embeds": batch["demographic_embeds"][row : row + 1],
    }


def left_padded(batch: dict) -> dict:
    flipped = {key: torch.zeros_like(batch[key]) for key in ("input_ids", "attention_mask")}
    for row, mask in enumerate(batch["attention_mask"].bool()):
        for key, value in flipped.items():
            value[row, value.shape[1] - int(mask.sum()) :] = batch[key][row, mask]
    return batch | flipped


# ---------------------------------------------------------------------- adapter and base
@variants
def test_a_disabled_adapter_is_the_base_bitwise(make_model, make_batch, fields: dict) -> None:
    model, batch = make_model(**fields), make_batch(lengths=[6, 3, 4])
    profiles = batch.pop("demographic_embeds")
    expected = tiny_model("qwen3", vocab_size=50)(**batch).logits
    with model.disable_adapter():
        assert torch.equal(model(**batch, demographic_embeds=profiles).logits, expected)
        assert torch.equal(model(**batch).logits, expected)
    assert not torch.equal(model(**batch, demographic_embeds=profiles).logits, expected)


@variants
def test_a_new_adapter_changes_nothing_at_first(make_model, make_batch, fields: dict) -> None:
    model, batch = make_model(**fields, init_weights=True), make_batch()
    profiles = batch.pop("demographic_embeds")
    expected = tiny_model("qwen3", vocab_size=50)(**batch).logits
    assert torch.equal(model(**batch, demographic_embeds=profiles).logits, expected)


@variants
def test_a_reference_copied_by_name_is_the_policy(make_model, make_batch, fields: dict) -> None:
    """TRL makes the frozen reference of a trained adapter by adding "ref" and copying `.default.` parameters to it."""
    model, batch = make_model(**fields), make_batch()
    model.add_adapter("ref", model.peft_config["default"])
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ".default." in name:
            parameters[name.replace(".default.", ".ref.")].data.copy_(parameter.data)
    policy = model(**batch).logits
    model.set_adapter("ref")
    assert torch.equal(model(**batch).logits, policy)


FRESH_PROCESS = """
import sys
import torch
from peft import PeftModel
import trl_cuma
from trl_cuma.testing import tiny_model

folder = sys.argv[1]
batch = torch.load(f"{folder}/batch.pt")
for name in sys.argv[2:]:
    model = PeftModel.from_pretrained(tiny_model("qwen3", vocab_size=50), f"{folder}/{name}").eval()
    torch.save(model(**batch).logits.detach(), f"{folder}/{name}.pt")
"""


def test_a_fresh_process_gives_the_same_logits(make_model, make_batch, tmp_path) -> None:
    batch, expected = make_batch(lengths=[6, 3, 4]), {}
    torch.save(batch, tmp_path / "batch.pt")
    for name, fields in VARIANTS.items():
        model = make_model(**fields)
        model.save_pretrained(tmp_path / name)
        expected[name] = model(**batch).logits
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(tmp_path), *VARIANTS], check=True, timeout=120)
    for name, logits in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), logits, rtol=0, atol=0)


# ---------------------------------------------------------------------- batches
@architectures
def test_a_sample_does_not_depend_on_its_batch(make_model, make_batch, architecture: str) -> None:
    model, batch = make_model(architecture, **LINEAR), make_batch(lengths=[6, 2, 4])
    right = model(**batch).logits
    for row, length in enumerate([6, 2, 4]):
        expected = model(**alone(batch, row)).logits[0]
        torch.testing.assert_close(right[row, :length], expected, rtol=1e-4, atol=1e-5)
    swapped = batch | {"demographic_embeds": batch["demographic_embeds"].flip(0)}
    assert (model(**swapped).logits[0] - right[0]).abs().max() > 1e-2  # the profile does matter


@variants
def test_the_side_of_the_padding_does_not_matter(make_model, make_batch, fields: dict) -> None:
    model, batch = make_model(**fields), make_batch(lengths=[6, 2, 4])
    left = left_padded(batch)
    positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    right_logits, left_logits = model(**batch).logits, model(**left, position_ids=positions).logits
    for row, length in enumerate([6, 2, 4]):
        torch.testing.assert_close(left_logits[row, 6 - length :], right_logits[row, :length], rtol=1e-4, atol=1e-5)
    losses = [
        model(**each, output_router_losses="local")["aux_loss"].item()
        for each in (batch, left | {"position_ids": positions})
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@variants
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_packed_rows_equal_unpacked_rows(make_model, make_batch, architecture: str, fields: dict) -> None:
    """Logits, gradients and router losses; four documents of three people, told apart by `position_ids`."""
    lengths = [5, 3, 2, 6]
    people = torch.tensor([0, 1, 2, 1])
    batch = make_batch(lengths=lengths)
    profiles = batch.pop("demographic_embeds")[:3]
    documents = [batch["input_ids"][i, :length] for i, length in enumerate(lengths)]
    packed = {
        "input_ids": torch.stack([torch.cat(documents[:2]), torch.cat(documents[2:])]),
        "position_ids": torch.stack(
            [torch.cat([torch.arange(n) for n in pair]) for pair in (lengths[:2], lengths[2:])]
        ),
        "demographic_ids": torch.stack(
            [
                people[:2].repeat_interleave(torch.tensor(lengths[:2])),
                people[2:].repeat_interleave(torch.tensor([2, 6])),
            ]
        ),
        "demographic_embeds": profiles,
    }
    model = make_model(architecture, **fields).train()

    def run(inputs: dict) -> tuple[torch.Tensor, float, dict]:
        model.zero_grad()
        # transformers reads the documents from `position_ids` where there is no mask and no cache
        outputs = model(**inputs, use_cache=False, output_router_losses="local")
        if "demographic_ids" in inputs:
            logits = outputs.logits.flatten(0, 1)
        else:
            logits = outputs.logits[batch["attention_mask"].bool()]
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
        ((logits * weights).sum() / 100 + outputs["aux_loss"]).backward()
        return logits.detach(), outputs["aux_loss"].item(), {n: p.grad for n, p in model.named_parameters()}

    logits, aux_loss, gradients = run(packed)
    expected_logits, expected_aux_loss, expected_gradients = run(batch | {"demographic_embeds": profiles[people]})
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    assert aux_loss == pytest.approx(expected_aux_loss, rel=1e-5)
    compared = 0
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5, msg=name)
            compared += 1
    assert compared == sum(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------------- generation
STEPS = {"max_new_tokens": 4, "min_new_tokens": 4}


@architectures
def test_generation_equals_each_sample_alone(make_model, make_batch, architecture: str) -> None:
    """Greedy with left padding; the same tokens and, step by step, the same logits; the cache on and off."""
    model, batch = make_model(architecture, **LINEAR), left_padded(make_batch(lengths=[6, 2, 4]))
    options = STEPS | {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    together = model.generate(**batch, **options)
    uncached = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(together.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(together.logits), torch.stack(uncached.logits), rtol=1e-4, atol=1e-5)
    for row in range(3):
        single = model.generate(**alone(batch, row), **options)
        assert torch.equal(single.sequences[0, -4:], together.sequences[row, -4:])
        for step, logits in enumerate(single.logits):
            torch.testing.assert_close(logits[0], together.logits[step][row], rtol=1e-4, atol=1e-5)
    other = model.generate(**(batch | {"demographic_embeds": batch["demographic_embeds"].flip(0)}), **options)
    assert (other.logits[-1][0] - together.logits[-1][0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 3},  # top-1 sampling is greedy, three times over
        {"num_beams": 2, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["beams", "beams-returned", "sampled-returned", "beams-uncached", "static-cache"],
)
@variants
def test_beams_and_returned_sequences_belong_to_their_prompt(
    make_model, make_batch, fields: dict, options: dict
) -> None:
    model, batch = make_model(**fields), left_padded(make_batch(lengths=[5, 2, 4]))
    together = model.generate(**batch, **STEPS, **options)
    copies = options.get("num_return_sequences", 1)
    assert together.shape[0] == 3 * copies
    for row in range(3):
        single = model.generate(**alone(batch, row), **STEPS, **options)
        assert torch.equal(single[:, -4:], together[row * copies : (row + 1) * copies, -4:])


@pytest.mark.parametrize("targets", [["lm_head"], "all-linear"], ids=["one-layer", "all"])
def test_each_step_of_generation_equals_a_forward_over_the_text_so_far(make_model, make_batch, targets) -> None:
    """With one layer, its router's last gates are those of the step before: they must not be taken for this one's."""
    model, batch = make_model(target_modules=targets), make_batch()
    options = STEPS | {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    generated = model.generate(**batch, **options)
    logits = model(input_ids=generated.sequences, demographic_embeds=batch["demographic_embeds"]).logits
    for step, step_logits in enumerate(generated.logits):
        torch.testing.assert_close(step_logits, logits[:, 6 + step - 1], rtol=1e-4, atol=1e-5)


def test_the_profile_changes_what_is_generated(make_model, make_batch) -> None:
    """The control of the tests above: with another person's profile the beams are others."""
    model, batch = make_model(**LINEAR), left_padded(make_batch(lengths=[5, 2, 4]))
    mine = model.generate(**batch, **STEPS, num_beams=3)
    swapped = batch | {"demographic_embeds": batch["demographic_embeds"].roll(1, 0)}
    assert not torch.equal(mine, model.generate(**swapped, **STEPS, num_beams=3))


def test_the_adapter_class_does_not_matter(make_model, make_batch) -> None:
    """`task_type=None` gives a plain `PeftModel`, whose forward goes another way through PEFT."""
    batch = make_batch()
    causal, plain = make_model(), make_model(task_type=None)
    assert type(plain) is PeftModel
    assert torch.equal(causal(**batch).logits, plain(**batch).logits)
    with pytest.raises(ValueError, match="demographic_embeds"):  # it hands `generate` to the base: loud, at least
        plain.generate(**batch, **STEPS)
