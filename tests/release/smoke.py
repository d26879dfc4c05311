# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
`python smoke.py [EXTRA …]`, in an environment with the installed package and these extras alone (`.ci/smoke` makes
them): the package works without the checkout, each of the extras does what it is for, and without it an error says how
to install it. Nothing is downloaded.
"""

import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from uses import USES

import trl_cuma
from trl_cuma import CuMAConfig, CuMASFTConfig, CuMASFTTrainer, FieldEncoder
from trl_cuma.testing import chat_tokenizer, tiny_model

PEOPLE = [{"age": age, "country": country} for age in ("old", "young") for country in ("FR", "JP")]
FOLDER = Path(__file__).parent


def train(folder: Path) -> None:
    """A step of SFT from a base model in a folder to an adapter in `folder/adapter`, with logits to compare with."""
    tokenizer = chat_tokenizer(["Question? yes no"])
    tiny_model("qwen3", vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    columns = {"prompt": ["Question?"] * 8, "completion": [" yes", " no"] * 4, "demographic": PEOPLE * 2}
    args: dict[str, Any] = {"max_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    trainer = CuMASFTTrainer(
        str(folder / "base"),
        args=CuMASFTConfig(output_dir=str(folder / "run"), learning_rate=0.1, gradient_checkpointing=False, **args),
        train_dataset=Dataset.from_dict(columns),
        peft_config=CuMAConfig(target_modules=["q_proj", "v_proj"], r=2, num_experts=4, router_hidden=8),
        demographic_encoder=FieldEncoder(min_count=2),
    )
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    torch.save(answer(trainer.model, folder), folder / "expected.pt")


def answer(model: PeftModel, folder: Path) -> torch.Tensor:
    """The logits of one prompt for each person, `(people, seq, vocabulary)`; each person gets other ones."""
    encoder = trl_cuma.load_demographic_encoder(folder / "adapter")
    tokens = torch.tensor([[40, 41, 42]] * len(PEOPLE))
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens, demographic_embeds=encoder.encode(PEOPLE)).logits
    assert logits.isfinite().all() and len({row.tobytes() for row in logits.numpy()}) == len(PEOPLE)
    return logits


def load(folder: Path) -> None:
    """In a fresh process: the saved adapter has the same logits, and generates."""
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    torch.testing.assert_close(answer(model, folder), torch.load(folder / "expected.pt"), rtol=1e-5, atol=1e-6)
    encoder = trl_cuma.load_demographic_encoder(folder / "adapter")
    tokens = torch.tensor([[40, 41, 42]] * len(PEOPLE))
    answers = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        demographic_embeds=encoder.encode(PEOPLE),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
    )
    assert answers.shape == (len(PEOPLE), 7)


def check_layout() -> None:
    """What an installed package has: its place, version, typing marker, data files, console script."""
    package = Path(trl_cuma.__file__).parent
    assert "site-packages" in package.parts, f"trl_cuma is not the installed one: {package}"
    found = distribution("trl-cuma")  # the name with a hyphen, as in `pip install trl-cuma`
    assert found.version == trl_cuma.__version__
    top = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "trl_cuma")}
    assert all(name.endswith(".dist-info") for name in top), f"more than the package is installed: {top}"
    for file in ("py.typed", "evaluation/report/style.css", "planning/configs/Qwen--Qwen3-8B.json"):
        assert (package / file).exists(), f"{file} is not in the wheel"
    script = Path(sys.executable).with_name("trl-cuma")
    subprocess.run([script, "--help"], check=True, stdout=subprocess.DEVNULL)
    plan = [script, "plan", "--model_name_or_path", "Qwen/Qwen3-8B", "--num_gpus", "1"]  # reads a configs/*.json
    assert "GiB" in subprocess.run(plan, check=True, capture_output=True, text=True).stdout


def main(extras: list[str]) -> None:
    if unknown := sorted(set(extras) - set(USES)):
        raise SystemExit(f"no such extra: {unknown}; there are {sorted(USES)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        check_layout()
        subprocess.run([sys.executable, FOLDER / "modules.py"], check=True)
        train(folder)
        subprocess.run([sys.executable, FOLDER / "smoke.py", "--load", folder], check=True)
        print("core: trains, saves, loads in a fresh process, generates")
        for extra, use in USES.items():
            try:
                use(folder)
            except ImportError as error:
                if extra in extras:
                    raise
                assert re.search("pip3? install", str(error)), (
                    f"{extra}: the error doesn't say what to install: {error}"
                )
                print(f"{extra}, not installed: {str(error).splitlines()[0]}")
            else:
                assert extra in extras, f"{extra} works without being installed: it is no extra, or not checked"
                print(f"{extra}: works")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load(Path(sys.argv[2]))
    else:
        main(sys.argv[1:])
