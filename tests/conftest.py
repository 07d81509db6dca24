"""Tests import the scripts as they are run: from the repository's root."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

# The tensors here are tiny: threads that wait for each other would only slow the suite down.
torch.set_num_threads(1)


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(n, script, *flags):
    """A script on n ranks, as users start it; what the process printed."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}",
               "--master_port", str(29500 + os.getpid() % 1000), str(ROOT / script), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=ONE_THREAD)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def interrupt(script, out, *flags):
    """Start a script, send it Ctrl-C after three lines of steps; exit code, output, errors."""
    process = subprocess.Popen([sys.executable, str(ROOT / script), *flags, "--out", str(out)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=ONE_THREAD)
    deadline = time.time() + 120
    while time.time() < deadline and (not (out / "log.jsonl").exists()
                                      or sum("lr" in r for r in log_of(out)) < 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=120)
    return process.returncode, printed, errors
