"""Tests import the scripts as they are run: from the repository's root.

RUNS lists a tiny run of each script and task; the fixtures `run` and `trained` train them. Started
as a program, by `two_ranks`, this file is one rank that trains several of them.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import common  # noqa: E402
import eval as metrics  # noqa: E402
from data import load_dataset  # noqa: E402

# The tensors here are tiny: threads that wait for each other would only slow the suite down.
torch.set_num_threads(1)
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
# To ask git for the commit takes as long as a tiny run.
os.environ.setdefault("CATDIFF_COMMIT", "tests")

SHARED = ("--device cpu --dim 16 --heads 2 --depth 1 --dropout 0 --lr 1e-2 --lr_schedule constant "
          "--warmup 2 --log_every 2 --save_every 3 --samples 2 --eval_sequences 4 ")
BATCH = "--batch_size 8 --micro_batch 8 --sample_steps 3 --eval_draws 1 "
TEXT = BATCH + "--dataset pydoc --length 16 "
VADD = "--kl_ramp 4 --K 2 --bound_steps 1,2 "
PIXELS = BATCH + "--dataset DATA/mine --length 48 --mults 1,2 --pixel_dim 4 "
CATDM = "--embed_dim 8 --bound_end 2 "
PAIRS = "--ffn 16 --max_number 99 --length_beam 1 --noise_beam 2 --eval_sequences 3 "
RUNS = {  # SCRIPT or SCRIPT-TASK: flags; DATA is a folder
    "cadd": TEXT,
    "cadd-mdlm": TEXT + "--hint none --alpha cosine ",
    "cadd-pixels": PIXELS + "--augment 0.5 --corrector 2 --cool ",
    "vadd": TEXT + VADD + "--latent_dim 3 ",
    "vadd-toy": BATCH + VADD + "--samples 50 ",
    "vadd-informed": BATCH + VADD + "--samples 50 --prior informed ",
    "catdm": BATCH + CATDM + "--dataset DATA/tokens.npy --labels DATA/labels.npy --samples 3 ",
    "catdm-text": TEXT + CATDM,
    "catdm-pairs": BATCH + CATDM + PAIRS + "--dataset numbers --batch_tokens 128 --self_condition ",
    "difformer": PAIRS + "--embed_dim 8 --batch_tokens 192 --factor 2 --max_length 32 --vocab 300 "
                 "--K 4 --early_stop 1 --samples 1 ",
}
SCRIPTS = [name for name in RUNS if "-" not in name]


def script_of(name):
    return importlib.import_module(name.split("-")[0])


def tiny(name, data_dir):
    """The flags of a run of RUNS."""
    words = (SHARED + RUNS[name]).replace("DATA", data_dir).split()
    return [*words, "--data_dir", data_dir]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with pydoc, prepared, a small set of images, 3 x 3 tokens in 3 classes, and a folder
    of PNGs, 4 x 4 in colour, in 2."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    np.save(folder / "tokens.npy", (labels[:, None] + rng.integers(0, 2, (400, 9))) % 5)
    np.save(folder / "labels.npy", labels)
    for i in range(40):
        path = folder / "mine" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(path)
    load_dataset("pydoc", folder, 16)
    return str(folder)


def train(name, data_dir, folder, steps, *flags, report=False):
    """Train a run of RUNS; without `report` it is neither evaluated nor sampled at its end."""
    script = script_of(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.TokenClassifier, "steps", 20)
        if not report:
            patch.setattr(script, "evaluate", lambda *_: {})
            patch.setattr(script, "draw", lambda *_, **__: {})
        common.main(script, [*tiny(name, data_dir), "--out", str(folder), "--steps", str(steps),
                             *flags])
    return folder


@pytest.fixture()
def run(tmp_path, data_dir):
    """run(name, steps, *flags, out="a") -> the run folder. See `train`."""
    def go(name, steps, *flags, out="a", report=False):
        return train(name, data_dir, tmp_path / out, steps, *flags, report=report)
    return go


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data_dir):
    """trained(name) -> folder of a run of 6 steps with dropout, made once: copy, never change."""
    kept = {}

    def go(name):
        if name not in kept:
            folder = tmp_path_factory.mktemp("trained") / name
            kept[name] = train(name, data_dir, folder, 6, "--dropout", "0.2")
        return kept[name]
    return go


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def curves(out):
    """{step: what the log says of it}, without what depends on the clock."""
    timing = ("tokens_per_s", "mfu", "seconds")
    return {r["step"]: {k: v for k, v in r.items() if k not in timing}
            for r in log_of(out) if "lr" in r}


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


class Descent(torch.optim.SGD):
    """In AdamW's place: its steps follow the gradient's size, which AdamW divides out, so that
    equal weights say that the gradients were equal."""

    def __init__(self, params, lr, **_):
        super().__init__(params, lr)


def plain_descent(patch, script):
    """Train `script` with Descent, and where it reads text with padding: every fifth symbol."""
    load = script.load

    def padded(*args, **kwargs):
        data = load(*args, **kwargs)
        if getattr(data, "unit", "") == "char":
            data.pad_id = int(data.encode(" ")[0])
        return data
    patch.setattr(torch.optim, "AdamW", Descent)
    patch.setattr(script, "load", padded)


DESCENT = ["--lr", "0.3", "--clip", "1e6"]


def two_ranks(*jobs):
    """Train jobs (name, flags), one after the other, on two ranks that torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               "--master_port", str(29500 + os.getpid() % 1000), __file__, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def one_rank(jobs):
    """A job may end with {"term": RANKS}, which get SIGTERM twice in step 4, as from torchrun, or
    with {"nan": RANKS}, whose statistics are not finite in step 3."""
    for name, flags, *trouble in jobs:
        with pytest.MonkeyPatch.context() as patch:
            if "--fsdp" not in flags:  # AdamW's moments are cut too
                plain_descent(patch, script_of(name))
            patch.setattr(common.Run, "steps", troubled(common.Run.steps, **dict(*trouble)))
            with contextlib.suppress(*([KeyboardInterrupt, common.RunError] if trouble else [])):
                common.main(script_of(name), flags)


def troubled(steps, term=(), nan=()):
    def watched(run, *callables):
        for step in steps(run, *callables):
            if step == 3 and int(os.environ["RANK"]) in term:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
            if step == 2 and int(os.environ["RANK"]) in nan:
                run.add(tokens=float("nan"))
            yield step
    return watched


if __name__ == "__main__":
    common.run_main(one_rank, json.loads(sys.argv[1]))
