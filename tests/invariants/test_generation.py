# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Each prompt is continued for its own person, whatever is cached, searched or returned beside it."""

import pytest
import torch
from peft import PeftModel

STEPS = {"max_new_tokens": 4, "min_new_tokens": 4}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # sums of up to 256 products in another order, see test_batches


def test_generation_equals_each_sample_alone(make_model, make_batch, case, alone, left_padded) -> None:
    """Greedy with left padding; the same tokens and, step by step, the same logits; the cache on and off."""
    architecture, fields = case
    model, batch = make_model(architecture, **fields), left_padded(make_batch(lengths=[6, 2, 4]))
    options = STEPS | {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    together = model.generate(**batch, **options)
    uncached = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(together.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(together.logits), torch.stack(uncached.logits), **CLOSE)
    for row in range(3):
        single = model.generate(**alone(batch, row), **options)
        assert torch.equal(single.sequences[0, -4:], together.sequences[row, -4:])
        for step, logits in enumerate(single.logits):
            torch.testing.assert_close(logits[0], together.logits[step][row], **CLOSE)
    other = model.generate(**(batch | {"demographic_embeds": batch["demographic_embeds"].flip(0)}), **options)
    change = (other.logits[-1][0] - together.logits[-1][0]).abs().max()
    assert change == 0 if fields.get("routing") == "semantic" else change > 1e-2


BEAMS = {"num_beams": 4, "num_return_sequences": 2}


def assert_each_prompt_alone_gives_the_same(model: PeftModel, batch: dict, alone, options: dict) -> None:
    together = model.generate(**batch, **STEPS, **options)
    copies = options.get("num_return_sequences", 1)
    assert together.shape[0] == 3 * copies
    for row in range(3):
        single = model.generate(**alone(batch, row), **STEPS, **options)
        assert torch.equal(single[:, -4:], together[row * copies : (row + 1) * copies, -4:])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        BEAMS,
        {"do_sample": True, "top_k": 1, "num_return_sequences": 3},  # top-1 sampling is greedy, three times over
        {"num_beams": 2, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["beams", "beams-returned", "sampled-returned", "beams-uncached", "static-cache"],
)
def test_beams_and_returned_sequences_belong_to_their_prompt(
    make_model, make_batch, variant, alone, left_padded, options: dict
) -> None:
    model, batch = make_model(**variant), left_padded(make_batch(lengths=[5, 2, 4]))
    assert_each_prompt_alone_gives_the_same(model, batch, alone, options)


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma", "phi", "gpt2", "opt", "bloom"], indirect=True)
@pytest.mark.parametrize("options", [BEAMS, {"cache_implementation": "static"}], ids=["beams", "static-cache"])
def test_every_architecture_keeps_beams_and_caches_apart(
    make_model, make_batch, case, alone, left_padded, options: dict
) -> None:
    architecture, fields = case
    model, batch = make_model(architecture, **fields), left_padded(make_batch(lengths=[5, 2, 4]))
    assert_each_prompt_alone_gives_the_same(model, batch, alone, options)


@pytest.mark.parametrize("targets", [["lm_head"], "all-linear"], ids=["one-layer", "all"])
def test_each_step_of_generation_equals_a_forward_over_the_text_so_far(make_model, make_batch, targets) -> None:
    """With one layer, its router's last gates are those of the step before: they must not be taken for this one's."""
    model, batch = make_model(target_modules=targets), make_batch()
    options = STEPS | {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    generated = model.generate(**batch, **options)
    logits = model(input_ids=generated.sequences, demographic_embeds=batch["demographic_embeds"]).logits
    for step, step_logits in enumerate(generated.logits):
        torch.testing.assert_close(step_logits, logits[:, 6 + step - 1], **CLOSE)


@pytest.mark.parametrize("case", ["qwen3-joint", "llama", "gemma", "phi", "gpt2", "bloom"], indirect=True)
def test_the_profile_changes_what_is_generated(make_model, make_batch, case, left_padded) -> None:
    """The control of the tests above: with another person's profile the beams are others."""
    architecture, fields = case
    model, batch = make_model(architecture, **fields), left_padded(make_batch(lengths=[5, 2, 4]))
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
