# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""How each engine is launched on a CPU: with the shipped accelerate configurations, on few processes, in float32."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "accelerate_configs"
# Launch → engine, number of processes. The last two go on from the others' checkpoints.
LAUNCHES = {"single": ("single", 1)}
LAUNCHES |= {name: (name, 2) for name in ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")}
LAUNCHES |= {"alone": ("single", 1), "four": ("fsdp2", 4)}
# Seconds. A rank that waits for another one for good waits no longer than that.
TIME_LIMIT = 400
# DeepSpeed leaves small parameters whole, unless told; the rest is as accelerate makes it of zero3.yaml.
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_param_persistence_threshold": 0,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def launch(name: str, folder: Path, what: Sequence[str], script: Path = WORKER) -> int:
    """
    Run `script NAME FOLDER WHAT…` in the processes of a launch, and return the launcher's exit status. What they wrote
    into `folder` is the result, and `log.txt` what they said.
    """
    engine, processes = LAUNCHES[name]
    folder.mkdir(parents=True)
    command = [sys.executable]
    if processes > 1:
        options = ["--num_processes", str(processes)]
        config = RECIPES / f"{engine}.yaml"
        if engine == "zero3":
            (folder / "deepspeed.json").write_text(json.dumps(ZERO3))
            config = folder / "zero3.yaml"
            fields = {"deepspeed_config_file": str(folder / "deepspeed.json"), "zero3_init_flag": True}
            config.write_text(json.dumps({"distributed_type": "DEEPSPEED", "deepspeed_config": fields}))  # also YAML
            options += ["--num_machines", "1"]
        else:
            options += ["--mixed_precision", "no"]
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config), *options]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "PYTEST_"))}
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        # torchrun's `--standalone`: its store takes a free port itself. accelerate's `--main_process_port 0` looks for
        # one that is free now, which another launch may have taken when it is used.
        "PET_STANDALONE": "1",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(
            [*command, str(script), name, str(folder), *what],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            process.wait(TIME_LIMIT)
        except subprocess.TimeoutExpired:
            log.write(f"\nstopped after {TIME_LIMIT} s\n")
        finally:
            if process.poll() is None:
                process.terminate()  # the launcher ends its processes, which are in sessions of their own
                process.wait()
    if process.returncode:
        print((folder / "log.txt").read_text()[-5000:])  # shown by pytest where the test fails
    return process.returncode
