# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The recipes' tables of memory and time have the plan's numbers. With CUMA_UPDATE_PLANS=1 they are written anew."""

import os
import re
from pathlib import Path

import pytest
import yaml

from trl_cuma.planning import Planner, read_request
from trl_cuma.planning.setups import GIB

RECIPES = Path(__file__).parents[2] / "recipes"
# The recipe, in some rows its twin on other data, four numbers of GiB, and hours, for or per a number of rows.
ROW = re.compile(
    r"^\| (`(\w+/\w+\.yaml)`(, PRISM's)?) \|(?: +\d+ \|){4} [\d.]+ .*?([\d,]+) (?:row|pair)s \|$", re.MULTILINE
)
OF_THE_DATA = {"dataset_name", "output_dir", "cuma_adapter_path"}


class TablePlanner(Planner):
    """Without checkpointing the tables have one GPU only: spares the other engines' steps, which are slow."""

    def step(self, engine: str, checkpointing: bool) -> tuple[int, int]:
        return super().step(engine, checkpointing or engine != "single")


def row(folder: Path, label: str, recipe: str, rows: str) -> str:
    """A row of the table as the plan has it."""
    request, _ = read_request(["--config", str(folder / recipe)])
    args, planner = request.training_args, TablePlanner(request)
    assert args.gradient_checkpointing  # as the table says of all columns but one
    one, zero3, fsdp2 = (planner.setup(engine, gpus) for engine, gpus in (("single", 1), ("zero3", 4), ("fsdp2", 4)))
    totals = [one.total(True), one.total(False), zero3.total(True), fsdp2.total(True)]
    flops = planner.step("single", True)[1] / args.per_device_train_batch_size
    flops *= int(rows.replace(",", "")) * args.num_train_epochs
    hours = flops / (request.peak_tflops * 1e12 * request.utilization) / 3600
    epochs = f"for {args.num_train_epochs:g} ×" if args.num_train_epochs > 1 else "per"
    cells = [label, *(f"{total / GIB:.0f}" for total in totals)]
    return f"| {' | '.join(cells)} | {hours:.1f} {epochs} {rows} {'pair' if request.method == 'dpo' else 'row'}s |"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3-8b", "llama-3.1-8b", "bloomz-7b1"])
def test_tables_have_the_numbers_of_the_plan(model: str) -> None:
    readme = RECIPES / model / "README.md"
    text = readme.read_text()
    printed = {found[0]: row(readme.parent, *found.groups()[:2], found[4]) for found in ROW.finditer(text)}
    if os.environ.get("CUMA_UPDATE_PLANS"):
        for old, new in printed.items():
            text = text.replace(old, new)
        readme.write_text(text)
    else:
        assert list(printed) == list(printed.values())


@pytest.mark.parametrize("model", ["qwen3-8b", "llama-3.1-8b", "bloomz-7b1"])
def test_tables_have_all_recipes(model: str) -> None:
    """Each in a row, or with the one of which it is the twin on PRISM, whose plan is the same."""
    folder = RECIPES / model
    listed = set()
    for found in ROW.finditer((folder / "README.md").read_text()):
        listed.add(found[2])
        if found[3]:
            twin = found[2].replace("community_alignment", "prism")
            one, other = (yaml.safe_load((folder / recipe).read_text()) for recipe in (found[2], twin))
            assert {key for key in one | other if one.get(key) != other.get(key)} == OF_THE_DATA & set(one), twin
            listed.add(twin)
    assert listed == {str(path.relative_to(folder)) for path in folder.rglob("*.yaml")}
