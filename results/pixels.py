"""Pixel images: MDLM, VADD and CADD at equal steps on binary MNIST, MDLM and CADD on a folder.

    python results/pixels.py mnist --steps 20000 --seeds 0,1         one GPU
    python results/pixels.py folder --dataset my/cifar10 --steps 20000
    python results/pixels.py mnist --tiny                            two CPU cores, two minutes

Every run resumes: the same command goes on where it stopped, and what is complete is not repeated.
Each method is trained, its likelihoods are taken on the test split (VADD's on 1,000 images of it),
and its samples are graded (`eval.py images`) at 1, 5, 10, 20 and 100 steps, on the folder with and
without the corrector and the cooling temperature. RESULTS/pixels-*.json has all of it, with steps
per second; RESULTS/pixels-*.png has samples of each method, a row for each number of steps (VADD's
Figure 3).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

# name -> script and flags. CADD's hints are weak and as the network likes them (README): ours.
HINTS = "--hint_in mean --hint_out --embed_norm 0.1 --hint_noise 2"
NET = "--dim 64 --depth 3 --mults 1,2,2 --heads 4 --pixel_dim 32"
MNIST = {"mdlm": "vadd.py --latent_dim 0 --eval_sequences 0",  # 0: all, which VADD does not pay for
         "vadd": "vadd.py --kl_ramp {half}",  # the paper's network; the KL's weight grows to 1
         "cadd": f"cadd.py --lr 2e-4 --warmup 0 {HINTS}"}
FOLDER = {"mdlm": f"cadd.py --hint none {NET}", "cadd": f"cadd.py {NET} {HINTS}"}
SAMPLERS = {"plain": "", "corrector": "--corrector 12", "cool": "--cool --temperature 2.5",
            "cool 1": "--cool --temperature 1", "both": "--corrector 12 --cool --temperature 2.5"}
TINY = ("--dim 8 --depth 1 --heads 1 --mults 1 --pixel_dim 4 --batch_size 8 --micro_batch 8 "
        "--samples 2 --sample_steps 2 --eval_sequences 4 --log_every 5")


def python(script: str, *words: object) -> None:
    """Run a script of the project; a failure ends everything, the same command resumes."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    print("$", *command[1:], flush=True)
    if code := subprocess.run(command, cwd=Path.cwd()).returncode:
        sys.exit(code)


def rate(out: Path) -> float:
    """Steps per second, the median over the log."""
    lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    logged = [(x["step"], x["seconds"]) for x in lines if "lr" in x]
    speeds = sorted((b - a) / max(1e-9, t - s) for (a, s), (b, t) in zip(logged, logged[1:]))
    return round(speeds[len(speeds) // 2], 3) if speeds else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("mnist", "folder"))
    parser.add_argument("--dataset", default="", help="folder: of images of one size")
    parser.add_argument("--steps", type=int, default=20_000, help="of every run")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--only", default="", help="this method, and no table: one a GPU")
    parser.add_argument("--samples", type=int, default=1000, help="graded, for each count of steps")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--tiny", action="store_true", help="small networks, few steps: a test")
    args = parser.parse_args()
    if args.what == "folder" and not args.dataset:
        parser.error("folder needs --dataset")
    methods, dataset = (MNIST, args.dataset or "mnist-binary") if args.what == "mnist" else (
        FOLDER, args.dataset)
    if args.only not in ("", *methods):
        parser.error(f"--only {args.only} is not one of {', '.join(methods)}")
    steps, samples = (10, 80) if args.tiny else (args.steps, args.samples)
    times = "1,2" if args.tiny else "1,5,10,20,100"
    where = ["--data_dir", args.data_dir]
    found, pictures = {}, []
    for seed in map(int, args.seeds.split(",")):
        for name, line in methods.items():
            if args.only not in ("", name):
                continue
            script, *flags = line.format(half=steps // 2).split()
            out = args.runs / f"pixels-{args.what}-{name}-{steps}-seed-{seed}"
            python(script, "--dataset", dataset, "--steps", steps, "--seed", seed, "--out", out,
                   *flags, *where, *(TINY.split() if args.tiny else []))
            grades = {}
            for sampler, flags in SAMPLERS.items() if args.what == "folder" else [("plain", "")]:
                at = out / sampler.replace(" ", "-")
                if not (at / "images.json").exists():  # or delete it to draw anew
                    python("eval.py", "images", out, "--steps", times, "--samples", samples,
                           "--out", at, *flags.split(), *where)
                grades[sampler] = json.loads((at / "images.json").read_text())
            result = json.loads((out / "result.json").read_text())
            found[f"{name}, seed {seed}"] = dict(
                {k: result[k] for k in ("commit", "hardware", "step", "train_seconds", "figures")},
                grades=grades, steps_per_s=rate(out), config=result["config"])
            pictures.append(out / "plain/images.png")
    if args.only:
        return
    args.results.mkdir(parents=True, exist_ok=True)
    rows = [np.asarray(Image.open(x)) for x in pictures[:len(methods)]]  # of the first seed
    Image.fromarray(np.concatenate(rows)).save(args.results / f"pixels-{args.what}.png")
    common.write_json(args.results / f"pixels-{args.what}.json", found)
    print(f"{args.results}/pixels-{args.what}.json and .png, from the top {', '.join(methods)}")


if __name__ == "__main__":
    common.run_main(main)
