# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Is the quick start's difference a matter of its budget, or of its two target modules? SFT of chosen arms on one
simulated world with other settings, scored on the held-out splits. Prints the share of the gap closed (EMD).

    python benchmarks/quickstart_variants.py --world 0 --sft_steps 1600
    python benchmarks/quickstart_variants.py --world 0 --target_modules all --learning_rates 1e-3 2e-3 4e-3
"""

import argparse
import tempfile
from dataclasses import replace

import torch
from transformers import AutoTokenizer

from trl_cuma.quickstart import quiet
from trl_cuma.quickstart.pipeline import Quickstart
from trl_cuma.quickstart.settings import SIMULATED
from trl_cuma.quickstart.training import ARMS, adapter_configs, load_model, train_sft

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=0)
    parser.add_argument("--arms", nargs="*", default=["lora-prompt", "cuma"])
    parser.add_argument("--sft_steps", type=int, default=SIMULATED.sft_steps)
    parser.add_argument("--target_modules", choices=("published", "all"), default="published")
    parser.add_argument("--learning_rates", type=float, nargs="*", default=[None], help="default: the quick start's")
    args = parser.parse_args()
    torch.set_num_threads(2)
    quiet()
    settings = replace(SIMULATED, sft_steps=args.sft_steps)
    if args.target_modules == "all":
        settings = replace(settings, target_modules=ALL_LINEAR)
    run = Quickstart(tempfile.mkdtemp(), seed=args.world, settings=settings)
    encoder = run.encoder()
    run.prepare()
    tokenizer = AutoTokenizer.from_pretrained(run.model_dir)
    configs = adapter_configs(load_model(run.model_dir), settings, encoder.dim)
    title = f"{args.sft_steps} steps, {args.target_modules} targets"
    print(f"| {title} | learning rate | parameters | {' | '.join(run.cells)} |")
    print("|---|---:|---:|" + "---:|" * len(run.cells))
    runs = [(arm, rate) for arm in ARMS if arm.name in args.arms for rate in args.learning_rates]
    for arm, rate in runs:
        rate = rate or settings.sft_learning_rates[arm.name]
        model = train_sft(
            arm,
            run.model_dir,
            run.sft_training_rows(arm.prompt_profile),
            configs[arm.matched],
            encoder,
            settings,
            rate,
            args.world,
            run.output_dir / f"{arm.name}-{rate:g}",
        ).model
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log_probs = run.predict(arm, model, tokenizer)
        scores = [run.score(cells, log_probs[split])["gap_closed"] for split, cells in run.cells.items()]
        print(
            f"| {arm.label} | {rate:g} | {parameters:,} | {' | '.join(f'{score:.2f}' for score in scores)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
