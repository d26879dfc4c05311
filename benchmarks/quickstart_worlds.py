# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
The quick start over several simulated worlds (or draws of real answers), one after the other; prints the README's
tables, mean ± standard deviation over the worlds.

    python benchmarks/quickstart_worlds.py --worlds 0 1 2
    python benchmarks/quickstart_worlds.py --worlds 0 1 2 --data PATH/goqa_ordinal.jsonl
"""

import argparse
import json
from pathlib import Path

from trl_cuma.quickstart import run_quickstart, tables_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--encoder", default=None)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/worlds"))
    args = parser.parse_args()
    results = []
    for world in args.worlds:
        folder = args.output_dir / str(world)
        if not (folder / "results.json").exists():  # a run that was cut off goes on with the next world
            run_quickstart(folder, seed=world, data=args.data, encoder=args.encoder)
        results.append(json.loads((folder / "results.json").read_text()))
    print(f"\n# Mean ± standard deviation over worlds {args.worlds}\n")
    print(tables_of(results, real=args.data is not None))
    print(
        "Probe:", ", ".join(f"{k} {min(r['probe'][k] for r in results):.1%}" for k in results[0]["probe"]), "(least)"
    )


if __name__ == "__main__":
    main()
