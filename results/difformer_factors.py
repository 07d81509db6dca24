"""Rescaling factors F by search (Difformer, Algorithm 1) beside the paper's.

    python results/difformer_factors.py [--tables 2 14 17 19] [--save factors.json]

Tables 14, 17 and 19 have F to the nearest .5; Table 2 has the degeneration score DGS of each
schedule at F = 1. "ours" is our F rounded to .5, "F" before that; both average DGS over a coarse
grid of 49 time steps, first and last included, as the published factors must have been: "dense"
is what the average over all time gives. All four tables take some ten minutes of one CPU core.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from difformer import (Noise, degeneration_score, dgs_monte_carlo, grid,  # noqa: E402
                       search_factor)

T = 2000
SIZES = (10_000, 20_000, 40_000)
TABLE_19 = {  # F at d = 128 by DGS_MAX: V = 10K, 20K, 40K
    "linear": {0.05: (21, 20, 19), 0.1: (9.5, 9, 9), 0.15: (6, 5.5, 5.5), 0.2: (4, 4, 4),
               0.3: (2.5, 2.5, 2.5)},
    "cosine": {0.05: (41, 38.5, 37), 0.1: (19, 18.5, 18), 0.15: (12.5, 12, 11.5),
               0.2: (9, 9, 8.5), 0.3: (6, 5.5, 5.5), 0.5: (3, 2.5, 2.5)},
    "sqrt": {0.05: (7, 6.5, 6), 0.1: (5, 4.5, 4.5), 0.15: (4, 4, 3.5), 0.2: (3.5, 3.5, 3),
             0.3: (2.5, 2.5, 2.5), 0.5: (2, 2, 1.5)},
}
CELLS = {  # table -> (schedule, V, d, DGS_MAX, rescaling, the paper's F)
    14: [("sqrt", 10_000, d, 0.15, "plain", f)
         for d, f in ((64, 2.5), (128, 4), (256, 6), (512, 8.5))],
    17: [("sqrt", 10_000, 128, m, "vp", f) for m, f in ((0.05, 9.5), (0.15, 4.5), (0.5, 2))],
    19: [(schedule, V, 128, m, "plain", f) for schedule, rows in TABLE_19.items()
         for m, row in rows.items() for V, f in zip(SIZES, row)]}


def table_2() -> list[dict]:
    """DGS without rescaling, V = 10,000, d = 128."""
    rows, rng = [], torch.Generator().manual_seed(0)
    embeddings = torch.randn(10_000, 128, generator=rng)
    print(f"Table 2  {'paper':>6} {'ours':>6} {'Algorithm 2 on random embeddings':>33}")
    for schedule, paper in (("linear", 0.47), ("cosine", 0.77), ("sqrt", 0.77)):
        noise = Noise(schedule, 1.0, "plain", T)
        sampled = dgs_monte_carlo(*noise.at(grid(T)), embeddings).mean().item()
        ours = degeneration_score(noise, 10_000, 128)
        rows.append(dict(schedule=schedule, paper=paper, ours=round(ours, 4),
                         algorithm_2=round(sampled, 4)))
        print(f"{schedule:8s} {paper:6.2f} {rows[-1]['ours']:6.3f} {sampled:33.3f}")
    return rows


def factors(number: int) -> list[dict]:
    """All cells of Table 14, 17 or 19."""
    rows = []
    print(f"\nTable {number:<2} {'V':>6} {'d':>4} {'DGS_MAX':>8} {'paper':>6} {'ours':>6} {'F':>7} "
          f"{'dense':>7}")
    for schedule, V, d, dgs_max, rescaling, paper in CELLS[number]:
        found, dense = (search_factor(schedule, dgs_max, V, d, rescaling, T, dense)
                        for dense in (False, True))
        ours = round(2 * found) / 2
        rows.append(dict(schedule=schedule, V=V, d=d, dgs_max=dgs_max, rescaling=rescaling,
                         paper=paper, ours=ours, factor=round(found, 3), dense=round(dense, 3)))
        print(f"{schedule:8s} {V:6d} {d:4d} {dgs_max:8g} {paper:6g} {ours:6g} {found:7.2f} "
              f"{dense:7.2f}", flush=True)
    off = Counter(abs(row["ours"] - row["paper"]) / 0.5 for row in rows)
    print(f"{off[0]} of {len(rows)} cells are the paper's, {off[1]} are one step of .5 off")
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, nargs="+", default=[2, 14, 17, 19],
                        choices=(2, *CELLS))
    parser.add_argument("--save", type=Path, help="file for all figures")
    args = parser.parse_args(argv)
    found = {f"table_{n}": table_2() if n == 2 else factors(n) for n in args.tables}
    if args.save:
        ddp = common.DDP(0, 1, torch.device("cpu"), False)
        common.write_json(args.save, found | common.environment(ddp))


if __name__ == "__main__":
    common.run_main(main)
