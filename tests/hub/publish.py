# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Publish adapters in every way that there is. `python publish.py FOLDER`, with `HF_ENDPOINT` set."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, get_peft_model

from trl_cuma import CuMAConfig, CuMASFTConfig, CuMASFTTrainer, FieldEncoder
from trl_cuma.adapter.card import write_card
from trl_cuma.adapter.hub import upload_adapter
from trl_cuma.testing import chat_tokenizer, tiny_model

folder = Path(sys.argv[1])
people = [{"country": country, "age": age} for country in ("Arvenia", "Bosk") for age in ("old", "young")] * 20
people.append({"country": "Zzyzx", "age": "old"})  # the only one
encoder = FieldEncoder(min_count=30).fit(people)
tokenizer = chat_tokenizer(["Question? yes no"])
sizes = {
    "target_modules": ["q_proj", "v_proj"],
    "num_experts": 4,
    "r": 2,
    "router_hidden": 8,
    "task_type": "CAUSAL_LM",
}
tiny_model("qwen3", vocab_size=len(tokenizer)).save_pretrained(folder / "base")
tokenizer.save_pretrained(folder / "base")
tokens = torch.arange(3, 27).view(4, 6)


def make_base() -> torch.nn.Module:
    base = tiny_model("qwen3", vocab_size=len(tokenizer))
    base.name_or_path = base.config._name_or_path = str(folder / "base")
    return base


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, demographic_embeds=encoder.encode(people[:4])).logits


def change(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "weight_b" in name:
                parameter.mul_(2)


found = {}
torch.manual_seed(0)
reads = {"demographic_dim": encoder.dim, "demographic_encoder": encoder.state()}
model = get_peft_model(make_base(), CuMAConfig(**sizes, **reads, init_weights=False)).eval()

# The model, over a card that somebody has edited on the Hub; then other weights on a branch.
model.push_to_hub("org/cuma")
card = ModelCard.load("org/cuma")
card.text += "\nWritten on the Hub.\n"
HfApi().upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id="org/cuma")
model.push_to_hub("org/cuma")
torch.save(logits(model), folder / "main.pt")
change(model)
model.push_to_hub("org/cuma", revision="v2")
torch.save(logits(model), folder / "v2.pt")

# A configuration alone, where there is an adapter and where there is none.
model.peft_config["default"].push_to_hub("org/cuma", revision="v2")
model.peft_config["default"].push_to_hub("org/config")

# Another method's adapter is published as PEFT does it.
get_peft_model(make_base(), LoraConfig(target_modules=["q_proj"])).push_to_hub("org/lora")

# A folder with an evaluation in its card, and with more in it than an adapter.
saved = folder / "saved"
model.save_pretrained(saved)
(saved / "trainer_state.json").write_text("{}")
write_card(str(saved), model.peft_config["default"], measured="It answers well.")
HfApi().create_repo("org/saved", exist_ok=True)
upload_adapter(saved, "org/saved", commit_message="Upload adapter")
model.push_to_hub("org/saved")  # the same weights: what was measured is still so
change(model)
model.push_to_hub("org/remeasure")
HfApi().create_repo("org/stale", exist_ok=True)
upload_adapter(saved, "org/stale", commit_message="Upload adapter")
model.push_to_hub("org/stale")

# What the Hub refuses.
for repo in ("org/refused", "org/full"):
    HfApi().create_repo(repo)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    try:
        upload_adapter(saved, repo, commit_message="Upload adapter")
    except HfHubHTTPError as error:
        found[repo] = str(error)
    found[f"{repo} intact"] = before == {path.name: path.read_bytes() for path in saved.iterdir()}

# TRL's trainers, with what they keep in the output folder, and a token among the arguments.
output = folder / "run"
(output / "completions").mkdir(parents=True)
(output / "completions" / "completions_1.parquet").write_text("what people asked")
rows = {"prompt": ["Question? "] * len(people), "completion": ["yes"] * len(people), "demographic": people}
arguments = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "use_cpu": True, "bf16": False}
arguments |= {"hub_model_id": "org/trained", "push_to_hub": True, "hub_strategy": "checkpoint", "report_to": "none"}
arguments |= {"hub_token": "hf_given_as_an_argument", "hub_always_push": True, "disable_tqdm": True}
trainer = CuMASFTTrainer(
    make_base(),
    args=CuMASFTConfig(output_dir=str(output), **arguments),
    train_dataset=Dataset.from_dict(rows),
    processing_class=tokenizer,
    peft_config=CuMAConfig(**sizes),
    demographic_encoder=FieldEncoder(),
)
trainer.train()
trainer.push_to_hub(dataset_name="org/survey")
torch.save(logits(trainer.model.eval()), folder / "trained.pt")
trainer.hub_model_id = "org/refused"
try:
    trainer.push_to_hub()
except HfHubHTTPError as error:
    found["trainer"] = str(error)
(folder / "publish.py.json").write_text(json.dumps(found))
