"""Tests import the scripts as they are run: from the repository's root."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

# The tensors here are tiny: threads that wait for each other would only slow the suite down.
torch.set_num_threads(1)
