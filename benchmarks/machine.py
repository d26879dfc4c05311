# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks ran on. Imports nothing heavy: a child process inherits the peak memory of its parent."""

import os
import platform


def processor() -> str:
    """The processor's name and the number of its cores."""
    name = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name or platform.machine()}, {os.cpu_count()} cores"
