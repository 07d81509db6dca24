"""Difformer on Multi30k, German to English: ablations, decoding steps and beams on one GPU.

    python results/difformer_multi30k.py                  all stages, one H200, half an hour
    python results/difformer_multi30k.py train            trainings only, side by side
    python results/difformer_multi30k.py beams speed      what needs the trained run
    python results/difformer_multi30k.py --tiny --device cpu --steps 20    does it run?

The stages, in this order:
train      Table 7: the preset, and the same without rescaling, with the rounding loss, and with
           both; and without a second loss (Table 1's first row, whose ANI stands beside)
beams      Table 15: b1 lengths x b2 noises, on valid, then on test; first the one that is best on
           valid, whose translations are kept as chosen-test.jsonl
speed      Table 8: K decoding steps, without early stopping, and sentences per second: a batch,
           and one sentence at a time as in the paper; nothing else should be on the GPU

--only NAME... makes these runs alone. "distilled", the preset on another model's translations,
needs --distilled FILE. A finished training is not repeated, nor is a score. All figures that are
there go to OUT/difformer-multi30k.json; BLEU is lower-cased, tokenised as sacreBLEU's 13a.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from catdm_collapse import call  # noqa: E402

RUNS = {
    "main": [],  # anchor loss, F = 4
    "anchor, F = 1": ["--factor", "1"],
    "rounding": ["--loss", "rounding"],
    "rounding, F = 1": ["--loss", "rounding", "--factor", "1"],
    "no second loss": ["--loss", "none"],
    "distilled": [],  # --distilled FILE
}
BEAMS = (1, 1), (1, 9), (3, 3), (5, 2), (9, 1), (5, 4), (7, 3), (9, 2), (10, 5)  # Table 15's
STEPS = 1, 10, 20, 2000
TINY = ["--dim", "32", "--ffn", "64", "--depth", "1", "--heads", "2", "--embed_dim", "16",
        "--batch_tokens", "512", "--eval_sequences", "8"]


def folder_of(name: str, args: argparse.Namespace) -> Path:
    return Path(args.runs).resolve() / name.replace(",", "").replace(" = ", "").replace(" ", "-")


def difformer(name: str, log: str, flags: list[str], args: argparse.Namespace) -> None:
    """difformer.py on the run `name`, its output in a file LOG of the run's folder."""
    folder = folder_of(name, args)
    folder.mkdir(parents=True, exist_ok=True)
    call(["difformer.py", "--dataset", "multi30k", "--out", str(folder), "--data_dir",
          str(Path(args.data_dir).resolve()), "--device", args.device, *flags],
         folder / f"{log}.txt")


def test(name: str, setting: str, flags: list[str], args: argparse.Namespace,
         split: str = "test") -> dict:
    """Figures of a split, kept in the run's folder as SPLIT-SETTING.json."""
    file = folder_of(name, args) / f"{split}-{setting}.json"
    if not file.exists():
        difformer(name, file.stem,
                  ["--mode", "eval", "--split", split, "--save", str(file), *flags], args)
    return json.loads(file.read_text())["figures"]


def train(args: argparse.Namespace) -> None:
    """Trains the runs side by side, then tests each."""
    def one(name: str) -> None:
        result = folder_of(name, args) / "result.json"
        if not result.exists():
            flags = ["--steps", str(args.steps), "--save_every", "5000"]
            flags += (TINY if args.tiny else []) + args.flags + RUNS[name]
            flags += ["--distilled", args.distilled] * (name == "distilled")
            difformer(name, "train", flags, args)
        valid = json.loads(result.read_text())["figures"]
        figures = test(name, "default", [], args)
        print(f"{name:16s} valid {valid['bleu']['value']:.2f}, test {figures['bleu']['value']:.2f},"
              f" ANI {figures['anisotropy']['value']:.3f}; {time.time() - BEGIN:.0f} s", flush=True)

    with ThreadPoolExecutor(len(args.only)) as pool:
        list(pool.map(one, args.only))


def beams(args: argparse.Namespace) -> None:
    def score(name: str, beam: tuple[int, int], split: str) -> float:
        b1, b2 = beam
        flags = ["--length_beam", str(b1), "--noise_beam", str(b2),
                 "--sample_batch", str(4500 // (b1 * b2))]  # candidates at once
        found = test(name, f"beams-{b1}-{b2}", flags, args, split)["bleu"]["value"]
        print(f"{name}, {split}, beams {b1} x {b2}: {found:.2f}; {time.time() - BEGIN:.0f} s",
              flush=True)
        return found

    for name in (x for x in ("main", "distilled") if x in args.only):
        with ThreadPoolExecutor(4) as pool:
            valid = list(pool.map(lambda beam: score(name, beam, "valid"), BEAMS))
            chosen, *others = sorted(BEAMS, key=dict(zip(BEAMS, valid)).get, reverse=True)
            score(name, chosen, "test")
            made = folder_of(name, args) / "translations-test.jsonl"
            if made.exists():
                made.replace(made.with_name("chosen-test.jsonl"))
            list(pool.map(lambda beam: score(name, beam, "test"), others))


def speed(args: argparse.Namespace) -> None:
    for K in STEPS[:2] if args.tiny else STEPS:
        flags = ["--K", str(K), "--early_stop", "0"]
        alone = ["--sample_batch", "1", "--eval_sequences", "50" if K < 2000 else "3"]
        found = test("main", f"K-{K}", flags, args)
        single = test("main", f"K-{K}-alone", flags + alone, args)
        print(f"K = {K}: {found['bleu']['value']:.2f}, {found['speed']['value']:.1f} and "
              f"{single['speed']['value']:.2f} sentences/s; {time.time() - BEGIN:.0f} s",
              flush=True)


STAGES = {"train": train, "beams": beams, "speed": speed}


def gather(args: argparse.Namespace) -> dict:
    """All figures that are there: run -> what it is, and its test figures by setting."""
    found = {}
    for name in RUNS:
        folder = folder_of(name, args)
        if (folder / "result.json").exists():
            result = json.loads((folder / "result.json").read_text())
            keys = "step", "train_seconds", "factor", "config", "commit", "torch", "hardware"
            found[name] = {k: result[k] for k in keys if k in result}
            found[name]["valid"] = result["figures"]
            for split, key in (("test", "test"), ("valid", "valid_beams")):
                found[name][key] = {
                    file.stem.removeprefix(f"{split}-"): json.loads(file.read_text())["figures"]
                    for file in sorted(folder.glob(f"{split}-*.json"))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=list(STAGES), metavar="STAGE",
                        help=f"{', '.join(STAGES)} (default: all)")
    parser.add_argument("--runs", default="runs/difformer-multi30k", help="where runs go")
    parser.add_argument("--out", default="results", help="where the figures go")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--steps", type=int, default=15_000, help="training steps")
    parser.add_argument("--only", nargs="+", choices=RUNS, help="these runs (default: all, without "
                        "distilled unless --distilled is given)")
    parser.add_argument("--distilled", default="", help="translations of the training pairs")
    parser.add_argument("--tiny", action="store_true", help="smallest networks, few sentences")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[],
                        help="all that follows goes to the trainings")
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"no stage is called {', '.join(sorted(unknown))}")
    args.only = args.only or [name for name in RUNS if name != "distilled" or args.distilled]
    if "distilled" in args.only and not args.distilled:
        parser.error("--only distilled needs --distilled FILE")
    for stage in STAGES:
        if stage in args.stages:
            STAGES[stage](args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    common.write_json(Path(args.out) / "difformer-multi30k.json", gather(args))


BEGIN = time.time()
if __name__ == "__main__":
    main()
