# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
The learning rates of the quick start: every arm, every rate of the grid, on one simulated world that is reported
nowhere else, scored on its *validation* cells. Prints a Markdown table; the best rates are copied to
`trl_cuma/quickstart/settings.py` by hand.

    python benchmarks/quickstart_learning_rates.py --world 1000
    python benchmarks/quickstart_learning_rates.py --world 1000 --data PATH/goqa_ordinal.jsonl
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from trl_cuma.quickstart import quiet
from trl_cuma.quickstart.pipeline import Quickstart
from trl_cuma.quickstart.settings import DPO_GRID, SFT_GRID
from trl_cuma.quickstart.training import ARMS, adapter_configs, load_model, train_dpo, train_sft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=1000)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--arms", nargs="*", default=[arm.name for arm in ARMS])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet()
    run = Quickstart(tempfile.mkdtemp(), seed=args.world, data=args.data)
    run.cells = {"validation": run.validation.sample(400, args.world)}
    run.prepare()
    tokenizer = AutoTokenizer.from_pretrained(run.model_dir)
    encoder = run.encoder()
    configs = adapter_configs(load_model(run.model_dir), run.settings, encoder.dim)
    print("| arm | stage | learning rate | EMD | KL | pair log-loss |\n|---|---|---:|---:|---:|---:|")
    for arm in (arm for arm in ARMS if arm.name in args.arms):
        data = run.sft_training_rows(arm.prompt_profile)
        best: tuple | None = None
        for rate in SFT_GRID:
            folder = run.output_dir / f"{arm.name}-{rate:g}"
            trainer = train_sft(
                arm, run.model_dir, data, configs[arm.matched], encoder, run.settings, rate, args.world, folder
            )
            model, data = trainer.model, trainer.train_dataset
            log_probs = run.predict(arm, model, tokenizer)["validation"]
            scores = run.score(run.cells["validation"], log_probs)
            print(f"| {arm.name} | SFT | {rate:g} | {scores['emd']:.4f} | {scores['kl']:.4f} | |", flush=True)
            if best is None or scores["kl"] < best[0]:
                best = (scores["kl"], folder, log_probs, model)
        pairs = run.dpo_training_rows(arm, best[3], tokenizer)
        for rate in DPO_GRID:
            model = train_dpo(
                arm, run.model_dir, best[1], pairs, run.settings, rate, args.world, run.output_dir / "dpo"
            ).model
            log_probs = run.predict(arm, model, tokenizer)["validation"]
            scores = run.score_dpo(run.cells["validation"], log_probs, best[2])
            line = f"{rate:g} | {scores['emd']:.4f} | {scores['kl']:.4f} | {scores['pair_log_loss']:.4f}"
            print(f"| {arm.name} | DPO | {line} |", flush=True)


if __name__ == "__main__":
    main()
