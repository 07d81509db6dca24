"""How training scales over the GPUs of one machine, and where the rest goes.

    python results/scaling.py --gpus 1 2 4                           cadd.py and vadd.py on owt
    torchrun --nproc_per_node 4 results/scaling.py profile           cadd.py, by DDP's options
    python results/scaling.py --device cpu --gpus 1 2 --tiny         does it run?

Weak: 64 sequences a GPU. Strong: the preset's 512 in all. Each row is one `--mode bench`, and all
rows are made on one machine. `profile` adds what the GPU did, as shares of the time: computing, in
NCCL, which sends gradients, and in NCCL with nothing else going on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from kernels import profiled
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import cadd  # noqa: E402
import common  # noqa: E402

TINY = "--dim 16 --heads 2 --depth 1 --length 16 --bench_steps 2 --micro_batch 2".split()


def bench(script: str, gpus: int, flags: list[str]) -> dict:
    """The line that --mode bench prints. Raises RunError with the last lines of what it says."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    command = [script, "--dataset", "owt", "--mode", "bench", *flags]
    done = subprocess.run([sys.executable, *(launch if gpus > 1 else []), str(ROOT / command[0]),
                           *command[1:]], capture_output=True, text=True)
    lines = [x for x in done.stdout.splitlines() if x.startswith("{")]
    if done.returncode or not lines:
        raise common.RunError(f"{' '.join(command)} failed: {done.stderr[-1500:]}")
    how = f"torchrun --nproc_per_node {gpus}" if gpus > 1 else "python"
    return dict(command=" ".join([how, *command]), gpus=gpus, **json.loads(lines[-1]))


def table(args: argparse.Namespace) -> None:
    """Rows of weak and strong scaling, added to those there are. `efficiency` is the speed per GPU
    over that of one GPU with the same batch a GPU (weak) or the same batch in all (strong)."""
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    a_gpu, whole = (2, 8) if args.tiny else (64, 512)
    for script, gpus, (kind, batch) in itertools.product(args.scripts, args.gpus, (
            ("weak", a_gpu), ("strong", whole))):
        row = dict(scaling=kind, **bench(script, gpus, [
            "--batch_size", str(batch * gpus if kind == "weak" else batch), "--device",
            args.device, *(TINY if args.tiny else [])]))
        rows = [x for x in rows if (x["scaling"], x["command"]) != (kind, row["command"])] + [row]
        print(f"{row['command']}: {row['tokens_per_s']:,} tokens/s", flush=True)
        alone = {(x["scaling"], x["method"]): x["tokens_per_s"] for x in rows if x["gpus"] == 1}
        for x in rows:
            if one := alone.get((x["scaling"], x["method"])):
                x["efficiency"] = round(x["tokens_per_s"] / one / x["gpus"], 4)
        common.write_json(args.out, rows)


def wrapping(options: dict, hook: bool, outside: bool):
    """A stand-in for DDP.wrap with these options of DistributedDataParallel; `hook` sends
    gradients in bf16; `outside` compiles what DDP has wrapped, block by block of gradients."""
    def wrap(ddp: common.DDP, model: torch.nn.Module, compiled: bool) -> torch.nn.Module:
        devices = [ddp.device.index] if ddp.on_cuda else None
        compiled = compiled and ddp.on_cuda
        net = torch.compile(model, dynamic=False) if compiled and not outside else model
        net = DistributedDataParallel(net, device_ids=devices, gradient_as_bucket_view=True,
                                      **options)
        if hook:
            net.register_comm_hook(None, bf16_compress_hook)
        return torch.compile(net, dynamic=False) if compiled and outside else net
    return wrap


def busy(intervals: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Times at which the union of intervals begins and ends."""
    begin, end = np.array(sorted(intervals) or [(0, 0)]).T
    end = np.maximum.accumulate(end)
    first = np.r_[True, begin[1:] > end[:-1]]
    return begin[first], end[np.r_[np.flatnonzero(first)[1:] - 1, len(end) - 1]]


def length(intervals: list[tuple[float, float]]) -> float:
    begin, end = busy(intervals)
    return float((end - begin).sum())


def profile(args: argparse.Namespace) -> None:
    """One line for each variant of DDP, on rank 0; --mode bench first times, then is profiled."""
    rank, rows = int(os.environ.get("RANK", 0)), []
    usual = common.DDP.wrap
    variants = {
        "buckets of 25 MB": wrapping({}, False, False),
        "buckets of 100 MB": wrapping(dict(bucket_cap_mb=100), False, False),
        "one bucket": wrapping(dict(bucket_cap_mb=4000), False, False),
        "one bucket, sent in bf16": wrapping(dict(bucket_cap_mb=4000), True, False),
        "buckets of 25 MB, compiled in parts": wrapping({}, False, True)}
    flags = ["--dataset", "owt", "--mode", "bench", "--device", args.device, *(
        TINY if args.tiny else [])]
    flags += ["--batch_size", str((2 if args.tiny else 64) * int(os.environ["WORLD_SIZE"]))]
    what = [torch.profiler.ProfilerActivity.CUDA if torch.cuda.is_available() else
            torch.profiler.ProfilerActivity.CPU]
    for name, common.DDP.wrap in variants.items():
        torch._dynamo.reset()
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                common.main(cadd, flags)
                prof = profiled(cadd, [*flags, "--bench_steps", "5"], what)
        except Exception as error:  # a variant that does not work is a finding too
            print(f"{name}: {' '.join(str(error).split())[:300]}", flush=True)
            continue
        if rank:
            continue
        events = [(e.time_range.start, e.time_range.end, e.name) for e in prof.events()
                  if e.device_type == torch.autograd.DeviceType.CUDA and "nccl:" not in e.name]
        nccl = [e[:2] for e in events if "nccl" in e[2].lower()]
        other = [e[:2] for e in events if "nccl" not in e[2].lower()]
        span = max((e[1] for e in events), default=1) - min((e[0] for e in events), default=0)
        ms = json.loads(said.getvalue().splitlines()[0])
        share = {k: round(v / span, 4) for k, v in dict(
            computing=length(other), nccl=length(nccl),
            nccl_alone=length(other + nccl) - length(other)).items()}
        rows.append(dict(variant=name, **ms, share_of_time=share))
        print(f"{name}: {ms['tokens_per_s']:,} tokens/s, {ms['ms_per_step']} ms, {share}",
              flush=True)
        common.write_json(args.out.with_name(f"{args.out.stem}-profile.json"), rows)
    common.DDP.wrap = usual


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("table", "profile"), default="table")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8], help="how many")
    parser.add_argument("--scripts", nargs="+", default=["cadd.py", "vadd.py"])
    parser.add_argument("--out", type=Path, default=Path("results/scaling.json"))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--tiny", action="store_true", help="a smoke test")
    args = parser.parse_args()
    common.run_main(table if args.what == "table" else profile, args)
