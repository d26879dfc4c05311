# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Every loss of TRL's DPO: at the first step a new adapter's is the plain LoRA run's, and the router term."""

import inspect
import re

import pytest
import torch
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

LOSSES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {},
}
VARIANTS = {name: {"loss_type": [name], **fields} for name, fields in LOSSES.items()} | {
    "several": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "length-weighted": {"ld_alpha": 0.5},
    "weighted": {"use_weighting": True},
    "forward-kl": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
}


def test_these_are_all_losses_that_trl_has() -> None:
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == LOSSES.keys()


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_first_loss_is_trls_and_the_router_term(make_dpo, make_base, dpo_data, quick, tokenizer, fields) -> None:
    """Against another model as the reference, so that no log-ratio is zero, and it trains."""
    trainer = make_dpo(cuma_aux_loss_coef=0.5, ref_model=make_base(seed=2), max_steps=2, **fields)
    trainer.train()
    plain = DPOTrainer(
        make_base(),
        ref_model=make_base(seed=2),
        args=DPOConfig(**{k: v for k, v in quick.items() if k != "demographic_cache_dir"}, **fields),
        train_dataset=dpo_data().remove_columns("demographic"),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    plain.train()
    record, expected = trainer.state.log_history[0], plain.state.log_history[0]["loss"]
    assert record["loss"] == pytest.approx(expected + 0.5 * record["aux_loss"], rel=1e-5, abs=1e-5)
    assert trainer.state.log_history[1]["loss"] != pytest.approx(record["loss"], abs=1e-6)


@pytest.mark.parametrize("fields", [{"ld_alpha": 0.5}, {}], ids=["length-weighted", "plain"])
def test_precomputed_log_probs_see_the_profiles_of_a_trained_adapter(make_dpo, dpo_data, sft_adapter, fields) -> None:
    data = dpo_data()
    live, cached = (
        make_dpo(data, cuma_adapter_path=sft_adapter, precompute_ref_log_probs=precompute, **fields)
        for precompute in (False, True)
    )
    batch = next(iter(live.get_train_dataloader()))
    chosen, _ = live.compute_ref_log_probs(live.model, batch)
    other = batch | {"demographic_embeds": batch["demographic_embeds"].roll(1, 0)}
    assert (chosen - live.compute_ref_log_probs(live.model, other)[0]).abs().max() > 1e-3
    torch.testing.assert_close(
        torch.tensor(cached.train_dataset["ref_chosen_logps"]).sort().values,
        chosen.sort().values,
        rtol=1e-5,
        atol=1e-5,
    )
