# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Running a suite: every run is a folder that is written whole, so that a suite that was cut off goes on where it was.

    worlds/<seed>                          the base model, the encoders
    sft/<seed>/<arm>/<rate>-<alpha>-<steps>
    dpo/<seed>/<arm>/<rate>-from-<the SFT run's>
    results.json, tables.md
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .sources import PreparedData
from .suite import Suite
from .world import World, is_prepared, write_whole


@dataclass(frozen=True)
class SFTRun:
    """One SFT run: which arm, where, with which settings, for how long."""

    arm: str
    world: int
    learning_rate: float
    alpha: float
    steps: int

    @property
    def folder(self) -> str:
        return f"sft/{self.world}/{self.arm}/{self.learning_rate:g}-{self.alpha:g}-{self.steps}"


@dataclass(frozen=True)
class DPORun:
    """One DPO run, from an SFT run's checkpoint."""

    arm: str
    world: int
    learning_rate: float
    sft: SFTRun

    @property
    def folder(self) -> str:
        return f"dpo/{self.world}/{self.arm}/{self.learning_rate:g}-from-{Path(self.sft.folder).name}"


@dataclass(frozen=True)
class _Prepare:
    world: int

    @property
    def folder(self) -> str:
        return f"worlds/{self.world}"


class Runner:
    """
    Runs a suite into a folder.

    Args:
        suite (`Suite`): What to run.
        output_dir (`Path`): Where; a folder of another suite is refused. A new one is its owner's alone, as there is
            a row per answer in it.
        workers (`int`): Processes at once; each has one of the GPUs, where there are any.
        threads (`int`): Threads of each process.

    Raises:
        `ValueError`: `output_dir` holds another suite's runs.
    """

    def __init__(self, suite: Suite, output_dir: Path, workers: int = 1, threads: int = 1) -> None:
        self.suite, self.output_dir, self.workers, self.threads = suite, Path(output_dir), workers, threads
        self.output_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Worlds and arms may be added to a suite whose runs are there; another survey, base or budget may not.
        identity = {
            key: value
            for key, value in asdict(suite).items()
            if key in ("data", "base", "training", "reference", "text_encoder")
        }
        if suite.dpo is not None:
            identity["dpo"] = {name: getattr(suite.dpo, name) for name in ("steps", "batch_size", "beta")}
        identity = json.loads(json.dumps(identity))
        identity["arms"] = {arm.key: json.loads(json.dumps(asdict(arm))) for arm in suite.arms}
        path = self.output_dir / "suite.json"
        if path.exists():
            there = json.loads(path.read_text())
            arms = there.pop("arms")
            differing = [key for key in there.keys() & identity.keys() if there[key] != identity[key]]
            differing += [key for key in arms if key in identity["arms"] and arms[key] != identity["arms"][key]]
            if differing:
                raise ValueError(
                    f"{self.output_dir} holds the runs of another suite: {differing[0]!r} differs. Choose another "
                    "`--output_dir`, or remove that one."
                )
            identity = {**there, **identity, "arms": {**arms, **identity["arms"]}}
        path.write_text(json.dumps(identity, indent=1) + "\n")

    def run(self) -> dict[str, Any]:
        """All stages in turn: base models, tuning, the reported runs, DPO. Writes and returns `results.json`."""
        self._prepare(self.suite.tuning.worlds)
        results = self.measure(self.tune())
        if self.suite.dpo is not None:
            results["dpo"] = self._dpo(results["chosen"], self.longest)
        self.write("results.json", json.dumps(results, indent=1) + "\n")
        return results

    def measure(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """
        The reported SFT runs.

        Args:
            chosen (`dict`): What `tune` returned, here or where a suite's results were published.

        Returns:
            `dict`: `suite`, `chosen`, `baselines` (name → world → split → scores) and `sft` (arm → world → run).
        """
        suite = self.suite
        self._prepare(suite.worlds)
        final = [
            SFTRun(arm.key, world, *chosen[arm.key]["settings"], self.longest)
            for arm in suite.arms
            for world in suite.worlds
        ]
        self._all(final, "SFT, reported runs")
        results: dict[str, Any] = {
            "suite": suite.name,
            "chosen": chosen,
            "baselines": {},
            "sft": {arm.key: {} for arm in suite.arms},
        }
        for world in suite.worlds:
            record = json.loads((self.output_dir / _Prepare(world).folder / "world.json").read_text())
            for name, by_split in record["baselines"].items():
                results["baselines"].setdefault(name, {})[str(world)] = by_split
        for run in final:
            results["sft"][run.arm][str(run.world)] = self.read(run)
        return results

    def tune(self) -> dict[str, Any]:
        """Arm → the settings with the least mean log-loss of validation answers over the tuning worlds."""
        suite, tuning = self.suite, self.suite.tuning
        grid = {
            arm.key: [
                (rate, alpha)
                for rate in tuning.learning_rates
                for alpha in (tuning.alphas if arm.of.peft in ("lora", "cuma") else tuning.alphas[:1])
            ]
            for arm in suite.arms
        }
        runs = [
            SFTRun(key, world, *settings, suite.training.steps)
            for world in tuning.worlds
            for key, points in grid.items()
            for settings in points
        ]
        self._all(runs, "SFT, tuning")

        def loss(key: str, settings: tuple[float, float]) -> float:
            looks = [
                self.read(SFTRun(key, world, *settings, suite.training.steps))["validation"] for world in tuning.worlds
            ]
            return float(np.mean([min(nll for _, nll in world) for world in looks]))

        return {key: _chosen({settings: loss(key, settings) for settings in points}) for key, points in grid.items()}

    def _dpo(self, chosen: dict[str, Any], longest: int) -> dict[str, Any]:
        suite, dpo = self.suite, self.suite.dpo

        def run(key: str, world: int, rate: float, steps: int) -> DPORun:
            return DPORun(key, world, rate, SFTRun(key, world, *chosen[key]["settings"], steps))

        tuning = {
            key: {
                rate: [run(key, world, rate, suite.training.steps) for world in suite.tuning.worlds]
                for rate in dpo.learning_rates
            }
            for key in dpo.arms
        }
        self._all([one for rates in tuning.values() for runs in rates.values() for one in runs], "DPO, tuning")
        results: dict[str, Any] = {"chosen": {}, "arms": {}}
        for key, rates in tuning.items():
            losses = {
                (rate,): float(np.mean([self.read(one)["validation"] for one in runs])) for rate, runs in rates.items()
            }
            results["chosen"][key] = _chosen(losses)
        final = [
            run(key, world, results["chosen"][key]["settings"][0], longest)
            for key in dpo.arms
            for world in suite.worlds
        ]
        self._all(final, "DPO, reported runs")
        for one in final:
            results["arms"].setdefault(one.arm, {})[str(one.world)] = self.read(one)
        return results

    # ------------------------------------------------------------------ runs
    def _prepare(self, worlds: Iterable[int]) -> None:
        self._all([_Prepare(world) for world in worlds], "Worlds")

    @property
    def longest(self) -> int:
        """Steps of a reported run: the largest budget."""
        return self.suite.training.steps * max(self.suite.training.factors)

    def world(self, seed: int) -> World:
        """A world of the suite."""
        return _world(self.suite, self.output_dir, seed)

    def read(self, run: SFTRun | DPORun) -> dict[str, Any]:
        """A finished run's results."""
        return json.loads((self.output_dir / run.folder / "result.json").read_text())

    def write(self, name: str, text: str) -> None:
        """Write a file of the output folder, whole."""
        write_whole(self.output_dir / name, text)

    def _is_done(self, run: SFTRun | DPORun | _Prepare) -> bool:
        folder = self.output_dir / run.folder
        return is_prepared(self.suite, folder) if isinstance(run, _Prepare) else folder.exists()

    def _all(self, runs: Iterable[Any], description: str) -> None:
        """Do what is not done yet, several at once; the first that fails stops the suite, the others' work is kept."""
        runs = list(dict.fromkeys(runs))
        open_runs = [run for run in runs if not self._is_done(run)]
        bar = tqdm(total=len(runs), initial=len(runs) - len(open_runs), desc=description, unit="run")
        with bar:
            gpus, context = _gpus(), get_context("spawn")
            if self.workers == 1 and len(gpus) < 2:  # of several, a trainer would spread a run over all
                for run in open_runs:
                    _do(self.suite, self.output_dir, run, self.threads)
                    bar.update()
                return
            start = {"initializer": _take_gpu, "initargs": (gpus, context.Value("i", 0))}
            with ProcessPoolExecutor(self.workers, mp_context=context, **start) as pool:
                futures = {pool.submit(_do, self.suite, self.output_dir, run, self.threads): run for run in open_runs}
                try:
                    for future in as_completed(futures):
                        future.result()
                        bar.update()
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise


def _chosen(losses: dict[tuple[float, ...], float]) -> dict[str, Any]:
    best = min(losses, key=losses.__getitem__)
    return {
        "settings": list(best),
        "grid": [[*settings, loss] for settings, loss in losses.items()],
    }


def _gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else list(map(str, range(count))))[:count]


def _take_gpu(gpus: list[str], started: Any) -> None:
    """Leave a new process one of the GPUs, in turn; before anything looks for them there."""
    if not gpus:
        return
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]


def _world(suite: Suite, output_dir: Path, seed: int) -> World:
    folder = output_dir / _Prepare(seed).folder
    if isinstance(suite.data, PreparedData):
        from .prepared_world import PreparedWorld

        return PreparedWorld(suite, seed, folder)
    from .survey_world import SurveyWorld

    return SurveyWorld(suite, seed, folder)


_worlds: dict[tuple[Path, int], Any] = {}


def _do(suite: Suite, output_dir: Path, run: Any, threads: int) -> None:
    """Do one run, in a process of its own where there are several."""
    import torch

    from ..quickstart import quiet
    from .training import run_dpo, run_sft

    quiet()
    torch.set_num_threads(threads)
    key = (output_dir, run.world)
    if key not in _worlds:  # a process does many runs of one world
        _worlds.clear()
        _worlds[key] = _world(suite, output_dir, run.world)
    world = _worlds[key]
    folder = output_dir / run.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(run, _Prepare):
        world.prepare()
    elif isinstance(run, SFTRun):
        run_sft(world, suite.arm(run.arm), run.learning_rate, run.alpha, run.steps, folder)
    else:
        run_dpo(world, suite.arm(run.arm), run.learning_rate, output_dir / run.sft.folder, folder)
    if torch.cuda.is_available():  # a model and its trainer refer to each other: without this the next has no room
        gc.collect()
        torch.cuda.empty_cache()
