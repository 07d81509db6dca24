"""Collapse of learned embeddings and its cures: seven objectives on MNIST's tokens and english27.

    python results/catdm_collapse.py mnist english27        one H200, twelve minutes
    python results/catdm_collapse.py mnist --tiny --steps 20 --samples 20 --jobs 1    does it run?

CSDM, CSDM with embeddings of length 1, CATDM without L_CM, CATDM, and CATDM with cross-entropy in
place of L_CM, equal in all else: the paper's Table 1 and Figure 1; its Tables 4 and 10 (sampling
steps, consistency matching against cross-entropy) and 5 (DDIM). Beside them CSDM and CATDM whose
diffusion ends at log-SNR 1 instead of 15 ("-1"), which tells collapse from the variance of CSDM's
gradient, whose weights grow with the SNR. The networks are small and the runs short. Runs train
side by side, --jobs at once; the same command goes on where it was stopped.

For each set OUT/catdm-SET-collapse.json holds, by run: `figures` (the bound and its parts on the
valid split; `eval.py collapse`'s), the curves of CE and DGS over t, and `quality` of --samples
samples by sampler and number of steps. MNIST's are class-conditional: the share that a small
classifier recognises and the Fréchet distance of its features to the valid split; `guided` is at
guidance 1. english27's: the share of words spelled as in the training text, and the entropy of the
letters in nats. `data` has the same figures of the valid split.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RUNS = {"csdm": ["--objective", "csdm"], "csdm-l2": ["--objective", "csdm", "--l2_norm", "1"],
        "csdm-1": ["--objective", "csdm", "--logsnr_max", "1"],
        "catdm-without-cm": ["--cm", "none"], "catdm": [], "catdm-1": ["--logsnr_max", "1"],
        "catdm-ce": ["--cm", "ce"]}
STEPS = {"mnist": 3000, "english27": 2500}
SIZES = {"mnist": ["--recon_share", "0.25"], "english27": [
    "--dim", "384", "--depth", "6", "--heads", "6", "--batch_size", "128", "--micro_batch", "128",
    "--recon_share", "0.25", "--lr", "1e-3", "--warmup", "200"]}
TINY = ["--dim", "32", "--depth", "1", "--heads", "2", "--embed_dim", "16", "--batch_size", "16",
        "--micro_batch", "16", "--eval_sequences", "16", "--eval_draws", "1"]
ANCESTRAL, DDIM = (5, 10, 20, 50, 100, 200), (2, 3, 4, 5, 6, 7, 8)


def call(command: list[str], log: Path) -> None:
    """Runs a command, its output in `log`; what failed is shown."""
    with open(log, "w") as file:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file,
                              stderr=subprocess.STDOUT, env=dict(
                                  os.environ, OMP_NUM_THREADS="1",
                                  TORCHINDUCTOR_COMPILE_THREADS="2"))  # many compile at once
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed; the end of {log}:\n{log.read_text()[-3000:]}")


def grade(run: Path, args: argparse.Namespace) -> None:
    """Writes RUN/quality.json."""
    import catdm
    import common
    import eval as metrics
    from data import words
    flags = ["--data_dir", args.data_dir, "--device", args.device, "--samples", str(args.samples),
             "--sample_batch", "512"]
    cfg, ddp, model, data, _ = common.open_run(catdm, str(run), flags)
    if cfg.task == "images":
        classifier = metrics.TokenClassifier(data)
        measure, valid = classifier.grade, classifier.real
    else:
        vocabulary = words(data)

        def measure(x, _) -> dict[str, float]:
            return dict(spelled=metrics.spelled([data.decode(ids) for ids in x.tolist()],
                                                vocabulary), entropy=metrics.entropy(x.tolist()))
        import torch
        valid = torch.from_numpy(next(data.eval_batches("valid", 256, 256)).ids), None
    quality: dict[str, dict] = {"data": measure(*valid)}
    for sampler, counts in ("ancestral", ANCESTRAL), ("ddim", DDIM):
        for n in counts if not args.tiny else counts[:2]:
            chosen = dataclasses.replace(cfg, sampler=sampler, sample_steps=n)
            begin = time.time()
            quality[f"{sampler} {n}"] = measure(
                *catdm.draw_samples(model, chosen, data, ddp, 0.0))
            quality[f"{sampler} {n}"]["seconds"] = round(time.time() - begin, 2)
            if model.classes:
                quality[f"{sampler} {n}, guided"] = measure(
                    *catdm.draw_samples(model, chosen, data, ddp, 1.0))
    common.write_json(run / "quality.json", quality)


def gather(name: str, out: Path) -> None:
    """OUT/catdm-SET-collapse.json of all runs, and a table."""
    import common
    import eval as metrics
    collapse, found, rows = json.loads((out / name / "collapse.json").read_text()), {}, []
    for run in RUNS:
        result = json.loads((out / name / run / "result.json").read_text())
        quality = json.loads((out / name / run / "quality.json").read_text())
        about = {k: result[k] for k in ("step", "train_seconds", "commit", "torch", "hardware")}
        found[run] = about | collapse[run] | dict(quality=quality)
        found[run]["figures"] = result["figures"] | collapse[run]["figures"]
        f = collapse[run]["figures"]
        rows.append({"run": run} | {
            part: f"{result['figures'][part]['value']:.3f}"
            for part in ("nll_bound", "prior", "reconstruction", "diffusion")} | {
            key: f"{f[key]:.3f}" for key in ("norm", "ani", "spread", "effective_rank", "dgs",
                                             "ce_mean", "ce_half_time")})
    common.write_json(out / f"catdm-{name}-collapse.json", found)
    print(f"\n{name}\n{metrics.table(rows)}")
    settings = list(found["catdm"]["quality"])
    for measure in found["catdm"]["quality"]["data"]:
        print(f"\n{name}: {measure}\n" + metrics.table([{"sampler": s} | {
            run: f"{found[run]['quality'][s][measure]:.3f}" for run in RUNS} for s in settings]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=list(STEPS), help="mnist, english27 or both")
    parser.add_argument("--out", default=os.environ.get("OUT", "runs/catdm-collapse"))
    parser.add_argument("--runs", default="runs/catdm-collapse", help="where checkpoints go")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--steps", type=int, help=f"training steps (default {STEPS})")
    parser.add_argument("--samples", type=int, default=500, help="samples of each setting")
    parser.add_argument("--jobs", type=int, default=14, help="processes at once")
    parser.add_argument("--tiny", action="store_true", help="smallest networks, few settings")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[],
                        help="all that follows goes to the training runs")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--grade", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.grade:
        return grade(args.grade, args)
    if unknown := set(args.sets) - set(STEPS):
        parser.error(f"unknown: {', '.join(unknown)}; choose of {', '.join(STEPS)}")
    runs, out = Path(args.runs).resolve(), Path(args.out).resolve()
    for folder in (runs, out):
        folder.mkdir(parents=True, exist_ok=True)
    common = ["--data_dir", str(Path(args.data_dir).resolve()), "--device", args.device]

    def one(job: tuple[str, str]) -> None:
        name, run = job
        folder = runs / name / run
        folder.mkdir(parents=True, exist_ok=True)
        call(["catdm.py", "--dataset", name, "--out", str(folder), *common, *SIZES[name],
              *(TINY if args.tiny else []), "--steps", str(args.steps or STEPS[name]),
              "--save_every", "500", *RUNS[run], *args.flags], folder / "train.txt")
        print(f"{name} {run}: trained, {time.time() - begin:.0f} s", flush=True)
        kept = folder / "quality.json"
        if kept.exists() and kept.stat().st_mtime > (folder / "checkpoint.pt").stat().st_mtime:
            return
        call([__file__, "--grade", str(folder), *common, "--samples", str(args.samples),
              *(["--tiny"] if args.tiny else [])], folder / "grade.txt")
        print(f"{name} {run}: graded, {time.time() - begin:.0f} s", flush=True)

    begin = time.time()
    for name in args.sets:  # prepared once, not by every run at the same time
        call(["data.py", name, "--data_dir", common[1]], runs / f"{name}.txt")
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, [(name, run) for name in args.sets for run in RUNS]))
    for name in args.sets:
        call(["eval.py", "collapse", *(str(runs / name / run) for run in RUNS), *common,
              "--out", str(runs / name)], runs / name / "collapse.txt")
        gather(name, runs)
        for file in (runs / f"catdm-{name}-collapse.json", *(runs / name).glob("*.png")):
            target = out / (file.name if file.suffix == ".json" else f"catdm-{name}-{file.name}")
            target.write_bytes(file.read_bytes())
            print(target)


if __name__ == "__main__":
    main()
