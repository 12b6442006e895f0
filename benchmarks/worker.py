"""Makes one measurement: `python benchmarks/worker.py SPEC`, where SPEC is JSON.

It prints one line of JSON. `harness.py` starts a process for each measurement. You may also start
one by hand, to look at a single variant.
"""

import importlib
import json
import os
import pathlib
import resource
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

TASKS = ("train_step", "finetune", "generate", "predict", "ceiling")


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_bytes() -> int:
    """Returns the peak memory of this process in bytes."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            line = next(line for line in lines if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Makes the measurement that the first argument describes, and prints it."""
    spec = json.loads(sys.argv[1])
    assert spec["task"] in TASKS
    if spec["implementation"].startswith(("pytorch", "transformers", "torch")):
        import torch

        torch.set_num_threads(cores())
        torch.manual_seed(0)
    # Each task is a module of this folder, with a function `measure` that runs in a worker.
    record = importlib.import_module(f"benchmarks.{spec['task']}").measure(spec)
    record["peak_bytes"] = peak_bytes()
    # The line break separates the line from the text that a library may have printed.
    print("\n" + json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
