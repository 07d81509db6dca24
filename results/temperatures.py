"""Quality over entropy: words spelled right against the letters' entropy, at several temperatures.

    python results/temperatures.py runs/mdlm27 runs/cadd27 "runs/cadd27 --z0_hat hard"

A model that draws at a lower temperature, or repeats itself, spells better. So two models compare
at equal entropy only. OUT.json keeps the points (those that are there are not drawn again),
OUT.png has one panel for each number of steps and one curve for each run. With --judge RUN, of
results/ar_baseline.py, each point has the judge's perplexity too, and the picture a second row.
"""
import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import eval as metrics  # noqa: E402
from data import load_dataset  # noqa: E402


def points(run: str, steps: list[int], temperatures: list[float], flags: list[str],
           known: dict[str, list], data_dir: str, judge: metrics.Judge | None) -> Iterator[float]:
    """Adds to `known` ["RUN, T steps"] the points [temperature, share of words, entropy], and
    after these the perplexity by a judge. Yields each temperature as soon as it is drawn."""
    folder, *own = shlex.split(run)
    out = Path(folder)
    dataset = json.loads((out / "result.json").read_text())["dataset"]
    words = metrics.words(load_dataset(dataset, data_dir))
    found = {T: known.setdefault(f"{run}, {T} steps", []) for T in steps}
    for temperature in temperatures:
        new = [T for T in steps if temperature not in [point[0] for point in found[T]]]
        flags_here = [*own, *flags, "--data_dir", data_dir, "--temperature", str(temperature)]
        for T, file in metrics.draw_sweep(out, new, flags_here).items() if new else ():
            rows = metrics.read_samples(file)
            texts = [row["text"] for row in rows]
            found[T].append([temperature, metrics.spelled(texts, words),
                             metrics.entropy([row["ids"] for row in rows]),
                             *([judge.perplexities(texts, 64)[0]] if judge else [])])
            found[T].sort()
        yield temperature


def main(args: argparse.Namespace, flags: list[str]) -> None:
    file = args.out.with_suffix(".json")
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(file.read_text()) if file.exists() else {}
    known = kept.setdefault("points", {})
    if not (known or args.runs):
        raise common.RunError("nothing is drawn yet: give run folders")
    for run in args.runs:  # all, before the first is drawn
        metrics.script_of(Path(shlex.split(run)[0]))
    judge = metrics.Judge(args.judge) if args.judge else None
    for run in args.runs:
        for _ in points(run, args.steps, args.temperatures, ["--samples", "256", *flags], known,
                        args.data_dir, judge):
            common.write_text(file, json.dumps(kept, indent=1))
    panels = []
    judged = all(len(point) > 3 for found in known.values() for point in found)
    rows = (1, "words spelled as in the training text"), (3, "perplexity by the judge")
    for k, label in rows[:1 + judged]:
        for T in sorted({int(name.split(", ")[-1].split()[0]) for name in known}):
            lines = {name.removesuffix(f", {T} steps"): ([x[2] for x in found],
                                                         [x[k] for x in found])
                     for name, found in known.items() if name.endswith(f", {T} steps")}
            panels.append((lines, dict(title=f"{T} steps", ylabel=label,
                                       xlabel="entropy of letters, nats")))
    print(file)
    if metrics.matplotlib_found():
        metrics.draw_lines(args.out.with_suffix(".png"), panels,
                           [*dict.fromkeys(run for lines, _ in panels for run in lines)])
        print(args.out.with_suffix(".png"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help='run folders, each with flags: "RUN --z0_hat hard"')
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 32, 256])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.9, 0.8])
    parser.add_argument("--out", type=Path, default=Path("results/temperatures"))
    parser.add_argument("--judge", default="", help="a run of results/ar_baseline.py")
    parser.add_argument("--data_dir", default="data", help="where datasets are")
    args, flags = parser.parse_known_args()  # others go to the script: --samples, --device
    common.run_main(main, args, flags)
