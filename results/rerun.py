"""The GPU runs that results/README.md says are still to be made, on all GPUs of a machine.

    python results/rerun.py --list                    what there is, with minutes on one H100
    python results/rerun.py pixels pairs              these groups, one job per free GPU
    python results/rerun.py --only latent-16 host     these jobs

A job whose exit code was 0 is not made again, and each command resumes where it stopped: so the
same line goes on after an interruption. RUNS/rerun/NAME.txt has what a job printed, RUNS/rerun/
state.json what is done. A job that fails stops only those that need it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402


class Job(NamedTuple):
    """Commands, one after the other, and what has to be there before. {data}, {runs}, {results}
    are folders. Jobs of a share below 1 run beside others on a GPU."""

    group: str
    minutes: float
    commands: str
    needs: tuple[str, ...] = ()
    share: float = 1.0


SMALL = "--dataset english27 --data_dir {data} --dim 384 --depth 6 --heads 6 --steps 3000"
MDLM = "--hint none --embed_norm .1"
HINTS = {  # ablations at 6 x 384: flags beside the preset's --hint_in mean
    "mdlm": MDLM, "cadd": "--embed_norm .0122",
    "out": "--embed_norm .0122 --hint_out",
    "c_in": "--embed_norm .0122 --hint_in c_in", "raw": "--embed_norm .0122 --hint_in raw",
    "raw-t": "--embed_norm .0122 --hint_in raw --time_cond", "norm-1": "--embed_norm .05",
    "free": "--embed_norm 0", "detach": "--embed_norm 0 --detach_hints",
    "masked": "--embed_norm .0122 --hint_at masked", "vp": "--embed_norm .0122 --hint vp",
    "concat": "--embed_norm .0122 --fuse concat", "reweight": "--embed_norm .0122 --fuse reweight",
    "mse": "--embed_norm .0122 --mse soft"}
VOCABULARY = {  # at GPT-2's
    "mdlm": MDLM, "c_in": "--hint_in c_in --embed_norm .0122",
    "mean": "--hint_in mean --embed_norm .0122"}
GPT2 = ("cadd.py --dataset {data}/nltk-gpt2 --dim 384 --depth 6 --heads 6 --length 512 "
        "--batch_size 128 --micro_batch 64 --steps 4000 --lr 1e-3 --hint_noise 1 --no-hint_out "
        "--samples 64 --temperature 1 --sample_steps 128 --eval_draws 2 --eval_sequences 500")
DIGITS = {"vadd": 22, "mdlm": 8, "cadd": 8}  # minutes, the longest first
PIXELS = "--data_dir {data} --runs {runs} --results {results} --steps {steps}"
PHOTOS = f"results/pixels.py folder --dataset {{photos}} {PIXELS} --samples 500"
LATENT = (f"vadd.py {SMALL} --kl_ramp 1500 --bound_steps 1,8 --K 16 --eval_draws 2 "
          "--positions --latent_at prefix --pool attention")
DIFFORMER = ("results/difformer_multi30k.py --data_dir {data} --runs {runs}/difformer-m30k --out "
             "{results}")


def words(run: str) -> str:
    """Draws a run's samples at temperature 1."""
    return (f"results/temperatures.py {{runs}}/{run} --temperatures 1 --data_dir {{data}} "
            f"--out {{runs}}/{run}/words")


JOBS: dict[str, Job] = {
    # ablations of CADD; seed 0 of the others is in cadd.md
    f"small-{name}-{seed}": Job(
        "ablations", 2, f"cadd.py {SMALL} {flags} --seed {seed} --out {{runs}}/small-{name}-{seed};"
        + words(f"small-{name}-{seed}"), share=0.33)
    for seed in range(3) for name, flags in HINTS.items()
    if seed or name in ("concat", "reweight", "mse", "out")
} | {
    "gpt2-text": Job("vocabulary", 1, "results/gpt2_text.py --data_dir {data}", share=0.1),
} | {
    f"gpt2-{name}": Job("vocabulary", 17 if name == "mean" else 8,
                        f"{GPT2} {flags} --out {{runs}}/gpt2-{name}", ("gpt2-text",), 0.5)
    for name, flags in VOCABULARY.items()
} | {
    "latent-16": Job("latent", 4, f"{LATENT} --prior_below 16 --out {{runs}}/latent-16", share=0.5),
    "difformer-main": Job("pairs", 14, f"{DIFFORMER} train beams --only main", share=0.5),
    "difformer-speed": Job("pairs", 4, f"{DIFFORMER} speed --only main", ("difformer-main",)),
    "collapse": Job("collapse", 12, "results/catdm_collapse.py mnist english27 --data_dir {data} "
                    "--runs {runs}/collapse --out {results}", share=0.5),
} | {
    f"mnist-{name}-{seed}": Job(  # small networks: one alone keeps no GPU busy
        "pixels", minutes, f"results/pixels.py mnist --only {name} --seeds {seed} {PIXELS}",
        share=0.5 if "vadd" in name else 0.25)
    for seed in (0, 1) for name, minutes in DIGITS.items()
} | {
    "mnist": Job("pixels", 0.3, f"results/pixels.py mnist --seeds 0,1 {PIXELS}",
                 tuple(f"mnist-{name}-{seed}" for seed in (0, 1) for name in DIGITS), 0.1),
} | {
    f"photos-{name}": Job("pixels", 6, f"{PHOTOS} --only {name}", share=0.5)
    for name in ("mdlm", "cadd")
} | {
    "photos": Job("pixels", 0.3, PHOTOS, ("photos-mdlm", "photos-cadd"), 0.1),
    "host": Job("bench", 3, "; ".join(
        f"results/kernels.py {x} --data_dir {{data}} --host" for x in (
            "difformer.py --dataset multi30k", "vadd.py --dataset mnist-binary --latent_dim 0"))),
}


def start(name: str, gpu: int, args: argparse.Namespace, folders: dict) -> subprocess.Popen:
    """The job's commands in one shell on one GPU; the first that fails ends it."""
    words = JOBS[name].commands.format(**folders)
    shell = " && ".join(f"{sys.executable} {ROOT}/{part.strip()}" for part in words.split(";"))
    log = open(args.runs / "rerun" / f"{name}.txt", "a")
    print(f"GPU {gpu}: {name}", flush=True)
    return subprocess.Popen(["bash", "-c", shell], stdout=log, stderr=subprocess.STDOUT,
                            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)})


def main(args: argparse.Namespace, names: list[str]) -> None:
    folders = {k: str(getattr(args, k).resolve()) for k in ("runs", "results", "photos")} | dict(
        data=str(args.data_dir.resolve()), steps=args.steps)
    file = args.runs / "rerun/state.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    state = json.loads(file.read_text()) if file.exists() else {}
    done = {name for name, x in state.items() if x["code"] == 0}
    waiting = [name for name in names if name not in done]
    room, running, failed = [1.0] * max(1, args.gpus or torch.cuda.device_count()), {}, set()
    while waiting or running:
        for name, (process, gpu, begin) in list(running.items()):
            if (code := process.poll()) is not None:
                del running[name]
                room[gpu] += JOBS[name].share
                (failed if code else done).add(name)
                state[name] = dict(code=code, seconds=round(time.time() - begin), gpu=gpu)
                common.write_json(file, state)
                print(f"{name}: {'failed, see its log' if code else 'done'} after "
                      f"{state[name]['seconds']} s", flush=True)
        for name in list(waiting):
            job = JOBS[name]
            if lost := [n for n in job.needs if n not in (*done, *waiting, *running)]:
                print(f"{name}: not made, it needs {', '.join(lost)}", flush=True)
                failed.add(name)
                waiting.remove(name)
            elif done.issuperset(job.needs) and max(room) > job.share - 1e-6:
                gpu = min((g for g in range(len(room)) if room[g] > job.share - 1e-6),
                          key=lambda g: room[g])
                room[gpu] -= job.share
                running[name] = start(name, gpu, args, folders), gpu, time.time()
                waiting.remove(name)
        time.sleep(args.pause)
    if failed:
        raise common.RunError(f"failed or not made: {', '.join(sorted(failed))}; the same command "
                              "tries them again")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = list(dict.fromkeys(job.group for job in JOBS.values()))
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(groups)}; default: all")
    parser.add_argument("--only", nargs="+", default=[], metavar="JOB", help="these jobs")
    parser.add_argument("--list", action="store_true", help="say what there is, and end")
    parser.add_argument("--steps", type=int, default=10_000, help="of each run on pixels")
    parser.add_argument("--photos", type=Path, default=Path("data/photos"), help="folder of images")
    parser.add_argument("--gpus", type=int, default=0, help="use so many; 0: all")
    parser.add_argument("--pause", type=float, default=1.0, help=argparse.SUPPRESS)
    for folder in ("data_dir", "runs", "results"):
        parser.add_argument(f"--{folder}", type=Path, default=Path(folder.removesuffix("_dir")))
    args = parser.parse_args()
    if unknown := [x for x in args.groups if x not in groups] + [
            x for x in args.only if x not in JOBS]:
        parser.error(f"unknown: {', '.join(unknown)}; --list says what there is")
    names = args.only or [n for n, job in JOBS.items() if job.group in (args.groups or groups)]
    if args.list:
        for name in names:
            print(f"{JOBS[name].group:10s} {JOBS[name].minutes:4g} min  {name}")
    else:
        common.run_main(main, args, names)
