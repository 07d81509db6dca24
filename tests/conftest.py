"""Tests import the scripts as they are run: from the repository's root."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# The tensors here are tiny: threads that wait for each other would only slow the suite down.
torch.set_num_threads(1)
