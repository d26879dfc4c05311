# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Does an arm of the quick start on GlobalOpinionQA fit the cells that it was trained on? Scores the SFT adapters of a
finished run on the sampled answers of its training cells, and prints the share of the gap closed (EMD).

    trl-cuma quickstart --data PATH/goqa_ordinal.jsonl --output_dir runs/global-opinions
    python benchmarks/quickstart_training_cells.py --data PATH/goqa_ordinal.jsonl --output_dir runs/global-opinions
"""

import argparse
from pathlib import Path

from trl_cuma.quickstart import quiet
from trl_cuma.quickstart.pipeline import Quickstart
from trl_cuma.quickstart.training import ARMS, load_trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/global-opinions"))
    parser.add_argument("--seed", type=int, default=0, help="the finished run's")
    args = parser.parse_args()
    quiet()
    run = Quickstart(args.output_dir, seed=args.seed, data=args.data)
    cells = run.survey.observed_cells(run.survey.answers["train"])
    run.cells = {"train": cells}
    print(f"| arm | gap closed on {len(cells)} training cells |\n|---|---:|")
    for arm in ARMS:
        model, tokenizer = load_trained(run.model_dir, args.output_dir / "sft" / arm.name)
        scores = run.score(cells, run.predict(arm, model, tokenizer)["train"])
        print(f"| {arm.label} | {scores['gap_closed']:.2f} |")


if __name__ == "__main__":
    main()
