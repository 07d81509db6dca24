"""Difformer on Multi30k, German to English: ablations, decoding steps and beams on one GPU.

    python results/difformer_multi30k.py                      all stages, one H200, half an hour
    python results/difformer_multi30k.py starts ablations     trainings only, side by side
    python results/difformer_multi30k.py beams speed          what needs trained runs
    python results/difformer_multi30k.py --tiny --device cpu --steps 20    does it run?

The stages, in this order:
starts     RUNS/START for each of the STARTS: initial embeddings, learning rate, tokens. The one
           with the best BLEU on the valid split is the main run; the test split decides nothing
ablations  Table 7: the main run's flags with --factor 1 and with the rounding loss; and without a
           second loss (Table 1's first row, whose ANI stands beside)
beams      Table 15: b1 lengths x b2 noises
speed      Table 8: K decoding steps, without early stopping, and sentences per second: a batch,
           and one sentence at a time as in the paper; nothing else should be on the GPU

A finished training is not repeated. OUT/difformer-multi30k.json has all figures of the test split
that are there; BLEU is lower-cased, tokenised as sacreBLEU's 13a.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STARTS = {
    "authors": [],  # embeddings of standard deviation .02: z_0's is .23
    "unit": ["--embed_std", "0.0884"],  # 128^-1/2: z_0's is 1, which the search for F assumes
    "unit-fast": ["--embed_std", "0.0884", "--lr", "1e-3"],
    "unit-6000": ["--embed_std", "0.0884", "--vocab", "6000"],
}
ABLATIONS = {
    "anchor, F = 1": ["--factor", "1"],
    "rounding": ["--loss", "rounding"],
    "rounding, F = 1": ["--loss", "rounding", "--factor", "1"],
    "no second loss": ["--loss", "none"],
}
BEAMS = (1, 1), (1, 9), (3, 3), (5, 2), (9, 1), (5, 4), (7, 3), (9, 2), (10, 5)  # Table 15's
STEPS = 1, 10, 20, 2000
SAME = ["--lower"]  # the figure is of lower-cased text
TINY = ["--dim", "32", "--ffn", "64", "--depth", "1", "--heads", "2", "--embed_dim", "16",
        "--batch_tokens", "512", "--eval_sequences", "8"]


def folder_of(name: str, args: argparse.Namespace) -> Path:
    return Path(args.runs).resolve() / name.replace(",", "").replace(" = ", "").replace(" ", "-")


def call(name: str, log: str, flags: list[str], args: argparse.Namespace) -> None:
    """difformer.py on the run `name`, its output in a file LOG of the run's folder."""
    folder = folder_of(name, args)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "difformer.py", "--dataset", "multi30k", "--out", str(folder),
               "--data_dir", str(Path(args.data_dir).resolve()), "--device", args.device, *flags]
    with open(folder / f"{log}.txt", "w") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                              env=dict(os.environ, OMP_NUM_THREADS="2"))
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed; its output's end:\n"
                 f"{(folder / f'{log}.txt').read_text()[-3000:]}")


def test(name: str, setting: str, flags: list[str], args: argparse.Namespace) -> dict:
    """Figures of the test split, kept in the run's folder as test-SETTING.json."""
    file = folder_of(name, args) / f"test-{setting}.json"
    call(name, f"test-{setting}", ["--mode", "eval", "--split", "test", "--save", str(file),
                                   *(["--eval_sequences", "8"] if args.tiny else []), *flags], args)
    return json.loads(file.read_text())["figures"]


def train(runs: dict[str, list[str]], args: argparse.Namespace) -> None:
    """Trains the runs side by side, then tests each."""
    def one(name: str) -> None:
        result = folder_of(name, args) / "result.json"
        if not result.exists():
            call(name, "train", ["--steps", str(args.steps), "--save_every", "5000",
                                 *SAME, *(TINY if args.tiny else []), *args.flags, *runs[name]], args)
        valid = json.loads(result.read_text())["figures"]
        figures = test(name, "default", [], args)
        print(f"{name:16s} valid {valid['bleu']['value']:.2f}, test {figures['bleu']['value']:.2f},"
              f" ANI {figures['anisotropy']['value']:.3f}; {time.time() - BEGIN:.0f} s", flush=True)

    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(one, runs))


def main_run(args: argparse.Namespace) -> str:
    """The name of the start that is best on the valid split."""
    found = {name: folder_of(name, args) / "result.json" for name in STARTS}
    scores = {name: json.loads(path.read_text())["figures"]["bleu"]["value"]
              for name, path in found.items() if path.exists()}
    if not scores:
        sys.exit(f"no start is trained in {args.runs}: begin with the stage starts")
    return max(scores, key=scores.get)


def beams(args: argparse.Namespace) -> None:
    for b1, b2 in BEAMS:
        found = test(main_run(args), f"beams-{b1}-{b2}",
                     ["--length_beam", str(b1), "--noise_beam", str(b2),
                      "--sample_batch", str(4500 // (b1 * b2))], args)
        print(f"beams {b1} x {b2}: {found['bleu']['value']:.2f}; {time.time() - BEGIN:.0f} s",
              flush=True)


def speed(args: argparse.Namespace) -> None:
    for K in STEPS:
        flags = ["--K", str(K), "--early_stop", "0"]
        alone = ["--sample_batch", "1", "--eval_sequences", "50" if K < 2000 else "3"]
        found = test(main_run(args), f"K-{K}", flags, args)
        single = test(main_run(args), f"K-{K}-alone", flags + alone, args)
        print(f"K = {K}: {found['bleu']['value']:.2f}, {found['speed']['value']:.1f} and "
              f"{single['speed']['value']:.2f} sentences/s; {time.time() - BEGIN:.0f} s", flush=True)


def gather(args: argparse.Namespace) -> dict:
    """All figures that are there: run -> what it is, and its test figures by setting."""
    found = {}
    for name in [*STARTS, *ABLATIONS]:
        folder = folder_of(name, args)
        if (folder / "result.json").exists():
            result = json.loads((folder / "result.json").read_text())
            keys = "step", "train_seconds", "factor", "config", "commit", "torch", "hardware"
            found[name] = {k: result[k] for k in keys if k in result}
            found[name]["valid"] = result["figures"]
            found[name]["test"] = {
                file.stem.removeprefix("test-"): json.loads(file.read_text())["figures"]
                for file in sorted(folder.glob("test-*.json"))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=["starts", "ablations", "beams", "speed"],
                        metavar="STAGE", help="starts, ablations, beams, speed (default: all)")
    parser.add_argument("--runs", default="runs/difformer-multi30k", help="where runs go")
    parser.add_argument("--out", default="results", help="where the figures go")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--steps", type=int, default=15_000, help="training steps")
    parser.add_argument("--tiny", action="store_true", help="smallest networks, few sentences")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[],
                        help="all that follows goes to the trainings")
    args = parser.parse_args()
    if unknown := set(args.stages) - {"starts", "ablations", "beams", "speed"}:
        parser.error(f"no stage is called {', '.join(sorted(unknown))}")
    for stage in args.stages:
        if stage == "starts":
            train(STARTS, args)
        elif stage == "ablations":
            best = STARTS[main_run(args)]
            train({name: [*best, *flags] for name, flags in ABLATIONS.items()}, args)
        else:
            dict(beams=beams, speed=speed)[stage](args)
    import common
    Path(args.out).mkdir(parents=True, exist_ok=True)
    common.write_json(Path(args.out) / "difformer-multi30k.json", gather(args))


BEGIN = time.time()
if __name__ == "__main__":
    main()
