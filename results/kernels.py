"""Where a training step's time goes: kernels by time, and what the host does.

    python results/kernels.py cadd.py --dataset cifar10            one GPU
    python results/kernels.py difformer.py --dataset multi30k --host
    python results/kernels.py cadd.py --dim 24 --length 16         a CPU: what its host does

Flags go to the script. Its --mode bench runs twice, the second time with torch's profiler on its
timed steps, which slows the host. So compare the sum of kernels a step with ms_per_step of the
first line: the rest is the GPU's waiting. --host lists what the host does, also calls that wait.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch.profiler import ProfilerActivity

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402


def rows(events: list, time: str, count: int) -> list[str]:
    """Averages of the profiler by the sum of `time`, an attribute in microseconds."""
    events = sorted(events, key=lambda event: -getattr(event, time))[:count]
    return [f"{getattr(e, time) / 1e3:10.1f} ms {e.count:7d} x {e.key[:90]}" for e in events]


def profiled(script: ModuleType, flags: list[str], activities: list) -> torch.profiler.profile:
    """What the timed steps of a script's --mode bench did, without the steps that warm up."""
    profile, sync = torch.profiler.profile(activities=activities), common.DDP.sync
    begin_and_end = iter((profile.start, profile.stop))

    def switch(ddp: common.DDP) -> None:  # called where timing begins and ends
        sync(ddp)
        next(begin_and_end)()

    common.DDP.sync = switch
    try:
        common.main(script, flags)
    finally:
        common.DDP.sync = sync
    return profile


def main(script: str, flags: list[str], steps: int, count: int, host: bool) -> None:
    module, on_gpu = importlib.import_module(Path(script).stem), torch.cuda.is_available()
    flags = [*flags, "--mode", "bench", "--bench_steps", str(steps)]
    common.main(module, flags)
    activities = [ProfilerActivity.CUDA] * on_gpu + [ProfilerActivity.CPU] * (host or not on_gpu)
    profile = profiled(module, flags, activities)
    averages = profile.key_averages()
    if on_gpu:
        total = sum(e.self_device_time_total for e in averages) / 1e3 / steps
        print(f"kernels and copies: {total:.1f} ms a step",
              *rows(averages, "self_device_time_total", count), sep="\n")
    if ProfilerActivity.CPU in activities:
        print("the host:", *rows(averages, "self_cpu_time_total", count), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="such as cadd.py")
    parser.add_argument("--steps", type=int, default=5, help="after five to warm up")
    parser.add_argument("--rows", type=int, default=20, help="of each table")
    parser.add_argument("--host", action="store_true", help="also what the host does")
    args, flags = parser.parse_known_args()
    common.run_main(main, args.script, flags, args.steps, args.rows, args.host)
