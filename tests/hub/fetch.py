# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Load what `publish.py` has published. `python fetch.py FOLDER`, with `HF_ENDPOINT` set."""

import json
import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_cuma

folder = Path(sys.argv[1])
people = [{"country": country, "age": age} for country in ("Arvenia", "Bosk") for age in ("old", "young")]
tokens = torch.arange(3, 27).view(4, 6)


def is_same(model: torch.nn.Module, repo: str, expected: str, **kwargs: str) -> bool:
    embeds = trl_cuma.load_demographic_encoder(repo, **kwargs).encode(people)
    with torch.no_grad():
        return torch.equal(model.eval()(input_ids=tokens, demographic_embeds=embeds).logits, torch.load(expected))


def base() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "base")


found = {
    "main": is_same(PeftModel.from_pretrained(base(), "org/cuma"), "org/cuma", folder / "main.pt"),
    "auto": is_same(AutoPeftModelForCausalLM.from_pretrained("org/cuma"), "org/cuma", folder / "main.pt"),
    "trained": is_same(PeftModel.from_pretrained(base(), "org/trained"), "org/trained", folder / "trained.pt"),
    "tokenizer": AutoTokenizer.from_pretrained("org/trained").chat_template is not None,
}
second = PeftModel.from_pretrained(base(), "org/cuma", revision="v2")
found["v2"] = is_same(second, "org/cuma", folder / "v2.pt", revision="v2")
found["v2 as main"] = is_same(second, "org/cuma", folder / "main.pt", revision="v2")
for what, revision in (("revision", "v3"), ("repository", None)):
    try:
        PeftModel.from_pretrained(base(), "org/cuma" if revision else "org/nowhere", revision=revision)
    except Exception as error:  # noqa: BLE001  whatever it is, what it says is checked
        found[f"no such {what}"] = f"{type(error).__name__}: {error}"
(folder / "fetch.py.json").write_text(json.dumps(found))
