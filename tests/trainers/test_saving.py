# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from trl_cuma import DemographicProfile, TextEncoder
from trl_cuma.testing import minilm_path

# A new process knows nothing but the saved files and the people's profiles.
FRESH_PROCESS = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl_cuma import load_demographic_encoder

folder = sys.argv[1]
inputs = torch.load(f"{folder}/inputs.pt")
for name, people in inputs["people"].items():
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, f"{folder}/{name}").eval()
    encoder = load_demographic_encoder(f"{folder}/{name}")
    embeds = encoder.encode(people)
    with torch.no_grad():
        logits = model(inputs["ids"], demographic_embeds=embeds).logits
    tokens = model.generate(inputs["ids"], demographic_embeds=embeds, max_new_tokens=4, do_sample=False)
    torch.save({"logits": logits, "tokens": tokens}, f"{folder}/{name}.pt")
"""


def test_a_fresh_process_gives_the_same_logits(make_sft, make_base, sft_data, text_encoder, tmp_path):
    make_base(initializer_range=0.2).save_pretrained(tmp_path / "base")
    people = {
        "field": [{"age": "old", "country": "JP"}, {"age": "young", "country": "BR"}],  # BR is unknown to it
        "text": ["age: old; country: JP", "age: young; country: BR"],
    }
    ids = torch.randint(10, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = {}
    for name, encoder in (("field", "field"), ("text", TextEncoder(str(minilm_path())))):
        trainer = make_sft(
            sft_data(form="text" if name == "text" else "dict"),
            model=AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32),
            encoder=encoder,
            adapter={"demographic_projection": 4},
            max_steps=4,
            learning_rate=0.05,
        )
        trainer.train()
        trainer.save_model(str(tmp_path / name))
        model = trainer.model.eval()
        with torch.no_grad():
            embeds = trainer.demographic_table([DemographicProfile.from_value(person) for person in people[name]])
            logits = model(ids, demographic_embeds=embeds).logits
            tokens = model.generate(ids, demographic_embeds=embeds, max_new_tokens=4, do_sample=False)
            base = model.get_base_model()
            with model.disable_adapter():
                assert (base(ids).logits - logits).abs().max() > 1e-2  # the adapter does something
            swapped = model(ids, demographic_embeds=embeds.flip(0)).logits
            assert (swapped - logits).abs().max() > 1e-4  # and the profile
        expected[name] = {"logits": logits, "tokens": tokens}
    torch.save({"ids": ids, "people": people}, tmp_path / "inputs.pt")

    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, wanted in expected.items():
        got = torch.load(tmp_path / f"{name}.pt")
        torch.testing.assert_close(got["logits"], wanted["logits"], rtol=0, atol=1e-5)
        assert torch.equal(got["tokens"], wanted["tokens"])


def test_every_checkpoint_holds_the_encoder(make_sft, tmp_path):
    import json

    trainer = make_sft(save_strategy="steps", save_steps=1)
    trainer.train()
    saved = json.loads((Path(trainer.args.output_dir) / "checkpoint-1" / "adapter_config.json").read_text())
    assert saved["demographic_encoder"] == trainer.demographic_table.encoder.state()
    assert saved["demographic_dim"] == 4
