"""Metrics, and one table for any number of runs.

    python eval.py runs/cadd-pydoc runs/mdlm-pydoc         score checkpoints and their samples
    python eval.py runs/cadd-text8 --split test            on another split
    python eval.py samples.jsonl --dataset english27       a file of samples alone
    python eval.py collapse runs/catdm-mnist runs/csdm-mnist    have learned embeddings collapsed?
    python eval.py translations.jsonl --metrics comet      translations with references

A run folder is scored on the full split (VADD: on as many sequences as the run's --eval_sequences,
its figures cost many network calls) with a fixed seed and the averaged (EMA) weights; the
figures are kept in eval-SPLIT.json beside the checkpoint and computed anew when it changes. Sample
metrics read samples.jsonl (draw more with --mode sample --samples 256 in the method's script), and
the row "data" gives the same metrics of real text, the value to aim at.

    bound figures   bits per character, or nats per token and perplexity; ± one standard error
                    over sequences x draws. `(no bound)` marks figures below which -log p may lie.
    entropy         nats: entropy of the token frequencies within a sample, mean over samples
    spelled         share of whole words (a sample's first and last, cut at its edges, left out)
                    that occur in the training text
    parses          share of samples whose whole lines parse as Python, after removing the
                    indentation they share (pycode)
    jeffreys_1e-6   toys: half the sum of both KL divergences in nats between the histograms of
                    100,000 samples and of the training points, 1e-6 added inside the logarithm:
                    what VADD's Table 1 calls JS. js is the Jensen-Shannon divergence in nats. Row
                    "data" has fresh data points, "mdlm at best" an MDM with exact conditionals
    exact           translations: percentage equal to their reference, character by character
    bleu            corpus BLEU-4 in percent of lower-cased text, tokenised as mteval-v13a does
    sacrebleu       the same as sacrebleu reports it by default, if that package is installed
    rouge1, 2, L    mean F1 of ROUGE in percent, lower-cased, not stemmed
    div4            distinct 4-grams over all in the candidates of a source, mean over sources
    bertscore, comet  with --metrics: they load large models of other packages

`collapse` asks what became of the embeddings that CATDM, CADD and Difformer learn:

    ANI             mean cosine of two different embeddings (Difformer 3.1): 1 if all are alike
    spread          variance of the embeddings, summed over dimensions, over their mean squared
                    norm: 0 if all are alike
    effective rank  (sum v)^2 / sum v^2 of the variances v along principal axes: how many
                    dimensions are in use, at most min(V - 1, D)
    variance of EMB(x)  over examples, of each of the L x D dimensions (CATDM's Figure 1); where
                    all examples have the same token it is 0 whatever the embeddings
    DGS             how often a degenerate model, which knows the embeddings alone, finds the token
                    in its noisy embedding (Difformer, Definition 2), averaged over the noise levels
                    of the curves: near 1 there is nothing to be learned from context
    CE              the network's cross-entropy of x0 given z_t (CADD: at masked positions),
                    averaged over t; "t at half CE": when it first reaches half its value near t = 1

The pictures are collapse.png (variances, cross-entropy and DGS over t, principal axes, magnitudes)
and distances.png (between all embeddings), with the curves' numbers in collapse.json.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import itertools
import json
import math
import re
import sys
import textwrap
import warnings
from collections import Counter
from pathlib import Path
from typing import Iterable, Sequence

import numpy as np
import torch

import common
from common import RunError
from data import (TOY_POINTS, TextData, load_dataset, ngrams, pillow, score_translations,
                  words)

METHODS = ("cadd", "vadd", "difformer", "catdm")  # scripts with a function score(out, flags)


def entropy(samples: Iterable[Sequence[int]]) -> float:
    """Mean over samples (ids) of the entropy in nats of the ids' frequencies within a sample."""
    values = []
    for ids in samples:
        _, counts = np.unique(np.asarray(ids), return_counts=True)
        p = counts / counts.sum()
        values.append(float(-(p * np.log(p)).sum()))
    if not values:
        raise RunError("there are no samples to score")
    return sum(values) / len(values)


def spelled(texts: Iterable[str], vocabulary: set[str]) -> float | None:
    """Share of whole words found in `vocabulary`, None if no sample has one.

    Edges are cut mid-word, so what touches either end of a sample is left out.
    """
    good = total = 0
    for text in texts:
        whole = [w for w in text.replace("\n", " ").split(" ")][1:-1]
        whole = [w for w in whole if w]
        good += sum(w in vocabulary for w in whole)
        total += len(whole)
    return good / total if total else None


def parses(texts: Iterable[str]) -> float:
    """Share of texts whose whole lines (first and last dropped) parse as Python, dedented."""
    results = []
    for text in texts:
        lines = text.split("\n")[1:-1]
        body = textwrap.dedent("\n".join(lines))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes and the like
                ast.parse(body)
            results.append(bool(body.strip()))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            results.append(False)
    if not results:
        raise RunError("there are no samples to score")
    return sum(results) / len(results)


def score_samples(rows: list[dict], data: TextData) -> dict:
    """All sample metrics that make sense for `data`; rows have "text" and perhaps "ids"."""
    texts = [row["text"] for row in rows]
    ids = [row["ids"] if "ids" in row else data.encode(row["text"]) for row in rows]
    out = {"samples": len(rows), "entropy_nats": entropy(ids)}
    if data.unit == "char":
        out["spelled"] = spelled(texts, words(data))
    if data.name == "pycode":
        out["parses"] = parses(texts)
    return out


def score_data(data: TextData, split: str, count: int = 256) -> dict:
    """The same metrics on `count` windows of real text."""
    rows = [row for batch in data.eval_batches(split, 64, limit=count) for row in batch]
    return score_samples([dict(text=data.decode(row), ids=row) for row in rows], data)


# ---------------------------------------------------------------------------------------------
# Translations
# ---------------------------------------------------------------------------------------------


def sacrebleu(rows: list[dict]) -> dict[str, dict]:
    """sacreBLEU's default figure with its signature, if the package is installed."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        return {}
    metric = BLEU()
    score = metric.corpus_score([r["text"] for r in rows], [[r["reference"] for r in rows]]).score
    return {"sacrebleu": dict(value=score, unit=str(metric.get_signature()))}


def common_subsequence(a: Sequence, b: Sequence) -> int:
    """Length of the longest sequence of words that both have in this order."""
    best = [0] * (len(b) + 1)
    for x in a:
        above = 0  # best[j] of the row before
        for j, y in enumerate(b, 1):
            above, best[j] = best[j], above + 1 if x == y else max(best[j], best[j - 1])
    return best[-1]


def rouge(hypothesis: str, reference: str) -> tuple[float, float, float]:
    """F-measures of ROUGE-1, -2, -L (Lin 2004) in [0, 1]; words are runs of letters and digits in
    lower case, not stemmed."""
    a, b = (re.findall(r"\w+", text.lower()) for text in (hypothesis, reference))
    hits = [(x & y).total() for x, y in zip(ngrams(a)[:2], ngrams(b)[:2])]
    totals = [len(a) + len(b), len(a) + len(b) - 2]  # of both sides
    hits, totals = [*hits, common_subsequence(a, b)], [*totals, totals[0]]
    return tuple(2 * h / t if h else 0.0 for h, t in zip(hits, totals))


def diversity(candidates: Sequence[str], n: int = 4) -> float | None:
    """div-4: the share of distinct n-grams among all in one source's candidates (DiffuSeq)."""
    found = sum((ngrams(text.split())[n - 1] for text in candidates), Counter())
    return len(found) / found.total() if found else None


def bertscore(rows: list[dict]) -> dict[str, dict]:
    """Mean F1 with DiffuSeq's model, in percent."""
    try:
        from bert_score import score
    except ImportError:
        raise RunError("BERTScore needs a package: pip install bert-score") from None
    model = "microsoft/deberta-xlarge-mnli"
    _, _, f1 = score([r["text"] for r in rows], [r["reference"] for r in rows], model_type=model)
    return {"bertscore": dict(value=100 * float(f1.mean()), unit=f"F1, {model}")}


def comet(rows: list[dict]) -> dict[str, dict]:
    """COMET's mean of the model named."""
    try:
        from comet import download_model, load_from_checkpoint
    except ImportError:
        raise RunError("COMET needs a package: pip install unbabel-comet") from None
    name = "Unbabel/wmt22-comet-da"
    if any("source" not in row for row in rows):
        raise RunError('COMET needs each translation\'s "source"')
    triples = [dict(src=r["source"], mt=r["text"], ref=r["reference"]) for r in rows]
    found = load_from_checkpoint(download_model(name)).predict(
        triples, batch_size=64, gpus=int(torch.cuda.is_available()))
    return {"comet": dict(value=float(found.system_score), unit=name)}


EXTRA = {"bertscore": bertscore, "comet": comet}  # need large models


def translation_figures(rows: list[dict], extra: Sequence[str] = ()) -> dict[str, dict]:
    """All figures of {"text", "reference"[, "source", "candidates"]} rows."""
    figures = score_translations(rows) | sacrebleu(rows)
    means = np.mean([rouge(row["text"], row["reference"]) for row in rows], 0)
    for name, value in zip("12L", means):
        figures[f"rouge{name}"] = dict(value=100 * float(value), unit="F1")
    values = [diversity(row["candidates"]) for row in rows if len(row.get("candidates", ())) > 1]
    if values := [value for value in values if value is not None]:
        figures["div4"] = dict(value=sum(values) / len(values), unit="per source")
    for name in extra:
        figures |= EXTRA[name](rows)
    return figures


# ---------------------------------------------------------------------------------------------
# Collapse: are the learned embeddings still different from one another?
# ---------------------------------------------------------------------------------------------


def spectrum(table: torch.Tensor) -> torch.Tensor:
    """Variances of embeddings (V, D) along their principal axes, falling: (min(V - 1, D),) float64.

    The squared singular values of the centred table over V. What float32 cannot tell from equal
    embeddings is 0.
    """
    table = table.double()
    values = torch.linalg.svdvals(table - table.mean(0))[: len(table) - 1].square() / len(table)
    return torch.where(values > 1e-12 * table.square().sum(-1).mean(), values, 0.0)


def effective_rank(variances: torch.Tensor) -> float:
    """Participation ratio (sum v)^2 / sum v^2: n for n equal variances; 0 if there is none."""
    total = variances.sum().item()
    return total**2 / variances.square().sum().item() if total else 0.0


def latent_variances(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """CATDM's Figure 1: the variance over examples of each dimension of EMB(x), falling: (L D,).

    table (V, D), tokens (n, L): EMB(x) is the sequence's embeddings one after another, (L D,).
    """
    parts = [table.double()[column].var(0, unbiased=False) for column in tokens.T]
    return torch.cat(parts).sort(descending=True).values


def distances(table: torch.Tensor, most: int = 400) -> torch.Tensor:
    """CATDM's Figure 6: Euclidean distances between embeddings (V, D), at most `most` of them."""
    rows = torch.linspace(0, len(table) - 1, min(most, len(table))).round().long()
    return torch.cdist(table[rows].double(), table[rows].double(),
                       compute_mode="donot_use_mm_for_euclid_dist")


def time_to_half(times: torch.Tensor, values: torch.Tensor) -> float:
    """When a curve (n,) over times (n,) first reaches half of its last value, interpolated."""
    half = values[-1] / 2
    k = int((values >= half).int().argmax())
    if k == 0:
        return times[0].item()
    part = (half - values[k - 1]) / (values[k] - values[k - 1])
    return (times[k - 1] + part * (times[k] - times[k - 1])).item()


def collapse(probe: dict) -> dict:
    """All that is asked of a script's `probe`: figures for the table, curves for the pictures."""
    from difformer import anisotropy, dgs_monte_carlo
    table, times, ce, signal, sigma = (
        torch.as_tensor(probe[key]).detach().double().cpu()
        for key in ("embeddings", "times", "cross_entropy", "signal", "sigma"))
    axes, norms = spectrum(table), table.norm(dim=-1)
    dgs = dgs_monte_carlo(signal, sigma, table.float(), draws=-(-4000 // len(table)))
    figures = dict(
        V=len(table), D=table.shape[1], norm=norms.mean().item(), ani=anisotropy(table),
        spread=(axes.sum() / table.square().sum(-1).mean()).item(),
        effective_rank=effective_rank(axes), dgs=dgs.mean().item(),
        ce_mean=ce.mean().item(), ce_half_time=time_to_half(times, ce))
    curves = dict(axes=axes, norms=norms.sort(descending=True).values, times=times, ce=ce, dgs=dgs,
                  distances=distances(table))
    if probe.get("tokens") is not None:
        variances = latent_variances(table, torch.as_tensor(probe["tokens"]).cpu().long())
        figures |= dict(variance_median=variances.median().item(),
                        variance_largest=variances[0].item())
        curves["variances"] = variances
    return dict(name=probe["name"], method=probe["method"], figures=figures, curves=curves)


def collapse_row(run: str, result: dict) -> dict:
    """One line of the table of `collapse`."""
    f = result["figures"]
    row = {"run": run, "method": result["name"], "V x D": f"{f['V']} x {f['D']}",
           "norm": f"{f['norm']:.3f}", "ANI": f"{f['ani']:.3f}", "spread": f"{f['spread']:.3f}",
           "effective rank": f"{f['effective_rank']:.1f}"}
    if "variance_median" in f:
        row["variance of EMB(x): median, largest"] = (f"{f['variance_median']:.2e}, "
                                                      f"{f['variance_largest']:.2e}")
    return row | {"DGS": f"{f['dgs']:.3f}", "CE, nats": f"{f['ce_mean']:.3f}",
                  "t at half CE": f"{f['ce_half_time']:.3f}"}


COLOURS = ("#1f5fb4", "#d1495b", "#2e933c", "#e0961a", "#7b4fa6", "#12908e", "#8a5a44", "#5b6470")
PANEL = (460, 330)  # width and height of a plot in pixels; all is drawn twice as large, then halved


def canvas(title: str):
    """A white panel with its title: Pillow's image, what draws on it, a font of any size."""
    Image, ImageDraw, ImageFont = pillow("Image", "ImageDraw", "ImageFont")
    image = Image.new("RGB", (2 * PANEL[0], 2 * PANEL[1]), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=22)
    draw.text((PANEL[0], 14), title, "black", font, anchor="mt")
    return image, draw, font


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, 1, 2 or 5 times a power of ten apart: four to nine."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(m * power for m in (5, 2, 1) if 4 * m * power <= (high - low) * (1 + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def line_plot(curves: list[tuple[str, Sequence, Sequence]], title: str, x_label: str,
              log: bool = False):
    """Curves (colour, x, y) with axes and ticks as a Pillow image. `log`: of the y axis."""
    image, draw, font = canvas(title)
    xs, ys = ([np.asarray(curve[k], float) for curve in curves] for k in (1, 2))
    if log:
        ys = [np.log10(np.maximum(y, 1e-8)) for y in ys]
    (x0, x1), (y0, y1) = ((min(map(np.min, v)), max(map(np.max, v))) for v in (xs, ys))
    x1 = x1 if x1 > x0 else x0 + 1
    if log:
        y0, y1 = math.floor(y0), max(math.ceil(y1), math.floor(y0) + 1)  # whole powers of ten
    else:
        y0, y1 = min(y0, 0.0), 1.05 * y1 or 1.0
    left, right, top, bottom = 110, 2 * PANEL[0] - 30, 60, 2 * PANEL[1] - 90

    def place(x, y):
        return (left + (x - x0) / (x1 - x0) * (right - left),
                bottom - (y - y0) / (y1 - y0) * (bottom - top))
    for y in range(y0, y1 + 1, 1 + (y1 - y0) // 8) if log else ticks(y0, y1):
        draw.line([place(x0, y), place(x1, y)], "#dddddd", 2)
        draw.text((left - 12, place(x0, y)[1]), f"1e{y}" if log else f"{y:g}", "black", font,
                  anchor="rm")
    for x in ticks(x0, x1):
        draw.line([place(x, y0), (place(x, y0)[0], bottom + 8)], "black", 2)
        draw.text((place(x, y0)[0], bottom + 14), f"{x:g}", "black", font, anchor="mt")
    draw.text(((left + right) / 2, 2 * PANEL[1] - 14), x_label, "black", font, anchor="mb")
    draw.rectangle([left, top, right, bottom], outline="black", width=2)
    for (colour, *_), x, y in zip(curves, xs, ys):
        draw.line(list(zip(*place(x, y))), colour, 5, joint="curve")
    return image.reduce(2)


def legend(colours: dict[str, str]):
    """{name: colour} as a Pillow image."""
    image, draw, font = canvas("")
    for k, (name, colour) in enumerate(colours.items()):
        draw.line([(110, 80 + 40 * k), (170, 80 + 40 * k)], colour, 8)
        draw.text((190, 80 + 40 * k), name, "black", font, anchor="lm")
    return image.reduce(2)


def heat_map(matrix: torch.Tensor, title: str):
    """A square matrix >= 0 as a Pillow image, 0 white and the largest value black."""
    image, draw, font = canvas(title)
    (Image,) = pillow("Image")
    largest, side = matrix.max().item(), 2 * PANEL[1] - 130
    grey = (255 - 255 * (matrix / max(largest, 1e-12))).round().byte().numpy()
    left = PANEL[0] - side // 2
    image.paste(Image.fromarray(grey).resize((side, side), Image.NEAREST), (left, 60))
    draw.rectangle([left - 2, 58, left + side, 60 + side], outline="black", width=2)
    draw.text((PANEL[0], 80 + side), f"white 0, black {largest:.3g}", "black", font, anchor="mt")
    return image.reduce(2)


def save_panels(path: Path, panels: list, columns: int) -> None:
    """Images of one size side by side in rows of `columns`."""
    (Image,) = pillow("Image")
    W, H = panels[0].size
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (W * min(columns, len(panels)), H * rows), "white")
    for k, panel in enumerate(panels):
        sheet.paste(panel, (k % columns * W, k // columns * H))
    sheet.save(path)


def draw_collapse(results: dict[str, dict], folder: Path) -> list[Path]:
    """collapse.png: CATDM's Figure 1 and more; distances.png: its Figure 6."""
    colours = dict(zip(results, itertools.cycle(COLOURS)))

    def curves(key: str, over: str = "") -> list:
        return [(colours[run], c[over] if over else np.linspace(0, 1, len(c[key])), c[key])
                for run, c in ((run, result["curves"]) for run, result in results.items())
                if key in c]  # Difformer's sentences vary in length: no variance of EMB(x)

    panels = [line_plot(curves(key, over), title, label, log) for key, over, title, label, log in (
        ("variances", "", "variance of each dimension of EMB(x), sorted (Fig. 1)",
         "dimension, as a share of all L x D", True),
        ("ce", "times", "cross-entropy of x0 given z_t, nats per token (Fig. 1)", "t", False),
        ("dgs", "times", "DGS_t: accuracy of the degenerate model", "t", False),
        ("axes", "", "variance of the embeddings along principal axes", "axis, as a share of all",
         True),
        ("norms", "", "magnitudes |e_v|, sorted (Fig. 6)", "token, as a share of all V", False),
    ) if curves(key)]
    paths = [folder / "collapse.png", folder / "distances.png"]
    save_panels(paths[0], [*panels, legend(colours)], 3)
    save_panels(paths[1], [heat_map(result["curves"]["distances"], run)
                           for run, result in results.items()], 3)
    return paths


# ---------------------------------------------------------------------------------------------
# Runs and tables
# ---------------------------------------------------------------------------------------------


def read_samples(path: Path) -> list[dict]:
    """samples.jsonl ({"text", "ids"} a line) or plain text, one sample a line."""
    try:
        lines = [line for line in path.read_text().split("\n") if line.strip()]
        rows = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else [
            {"text": line} for line in lines]
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read samples from {path}: {error}") from error
    if not rows or any("text" not in row for row in rows):
        raise RunError(f'{path} holds no samples: each line needs {{"text": ...}}')
    return rows


def method_of(out: Path) -> str:
    """Which script made a run folder. Raises RunError if it is none."""
    checkpoint = out / "checkpoint.pt"
    if not checkpoint.exists():
        raise RunError(f"{out} is not a run folder: it has no checkpoint.pt")
    try:
        return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["method"]
    except Exception as error:
        raise RunError(f"{checkpoint} is truncated or not a checkpoint") from error


def score_run(out: Path, split: str, flags: list[str], extra: Sequence[str] = ()) -> dict:
    """A run folder's figures on the full split, from eval-SPLIT.json if that is up to date."""
    method, kept = method_of(out), out / f"eval-{split}.json"
    stamp = {"mtime_ns": (out / "checkpoint.pt").stat().st_mtime_ns, "flags": [*flags, *extra]}
    if kept.exists():
        result = json.loads(kept.read_text())
        if result.pop("of") == stamp:
            return result
    if method not in METHODS:
        raise RunError(f"{out}: no script scores the method {method!r}")
    result = importlib.import_module(method).score(str(out), ["--split", split, *flags])
    if "bleu" in result["figures"]:
        rows = read_samples(out / f"translations-{split}.jsonl")
        result["figures"] |= translation_figures(rows, extra)
    common.write_json(kept, {"of": stamp, **result})
    return result


def toy_columns(row: dict[int, dict]) -> dict[str, str]:
    """A row of `vadd.toy_rows` as columns of the table of runs."""
    return {f"{name}, T = {T}": f"{value:.3f}" for T, values in row.items()
            for name, value in values.items()}


def show(value: float | None, digits: int = 4, percent: bool = False) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}%" if percent else f"{value:.{digits}f}"


def table(rows: list[dict]) -> str:
    """Markdown table; columns that no row fills are left out."""
    names = [k for k in dict.fromkeys(k for row in rows for k in row) if any(
        row.get(k) not in (None, "") for row in rows)]
    lines = ["| " + " | ".join(names) + " |", "|" + "|".join("-" for _ in names) + "|"]
    lines += ["| " + " | ".join(str(row.get(k) or "") for k in names) + " |" for row in rows]
    return "\n".join(lines)


def figure_columns(figures: dict[str, dict]) -> dict[str, str]:
    """Figures as columns of the table of runs."""
    row = {}
    for figure, f in figures.items():
        text = f"{f['value']:.4f}" + (f" ± {f['stderr']:.4f}" if "stderr" in f else "")
        text += f" (ppl {f['perplexity']:.2f})" if "perplexity" in f else ""
        row[f"{figure}, {f['unit']}"] = text + ("" if f.get("is_bound", True) else " (no bound)")
    return row


def row_of(name: str, result: dict | None, samples: dict | None) -> dict:
    """One line of the table."""
    row: dict = {"run": name}
    if result:
        row |= {"method": result["method"], "data": f"{result['dataset']}/{result['split']}",
                "steps": f"{result['step']:,}"}
        row |= figure_columns(result["figures"])
    if samples:
        row |= {"samples": str(samples["samples"]), "entropy, nats": show(samples["entropy_nats"]),
                "spelled": show(samples.get("spelled"), percent=True),
                "parses": show(samples.get("parses"), percent=True)}
    return row


def collapse_main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="eval.py collapse", allow_abbrev=False,
        description="Have the learned embeddings of CATDM, CADD or Difformer runs collapsed?")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--split", default="valid", choices=("train", "valid", "test"))
    parser.add_argument("--data_dir", default="data", help="where datasets are")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="where the pictures go (default: the first run)")
    args = parser.parse_args(argv)
    flags = ["--split", args.split, "--data_dir", args.data_dir, "--device", args.device]
    results = {}
    for run in args.runs:
        method = method_of(run)
        script = importlib.import_module(method) if method in METHODS else None
        if not hasattr(script, "probe"):
            raise RunError(f"{run}: {method} learns no embeddings that are diffused")
        name = str(run) if run.name in results else run.name
        results[name] = collapse(script.probe(str(run), flags))
    folder = args.out or args.runs[0]
    folder.mkdir(parents=True, exist_ok=True)
    print(table([collapse_row(run, result) for run, result in results.items()]))
    common.write_json(folder / "collapse.json",
                      {run: {"figures": result["figures"]} | {
                          k: result["curves"][k].tolist() for k in ("times", "ce", "dgs", "axes")}
                       for run, result in results.items()})
    for path in draw_collapse(results, folder):
        print(path)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["collapse"]:
        return collapse_main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="eval.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="run folders, or files of samples")
    parser.add_argument("--split", default="valid", choices=("train", "valid", "test"))
    parser.add_argument("--data_dir", default="data", help="where datasets are")
    parser.add_argument("--dataset", help="whose words to compare with, for files of samples")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--metrics", nargs="+", default=[], choices=EXTRA, help="also these")
    parser.add_argument("--eval_draws", type=int, help="draws per sequence (default: the run's)")
    args = parser.parse_args(argv)
    flags = ["--data_dir", args.data_dir, "--device", args.device]
    if args.eval_draws:
        flags += ["--eval_draws", str(args.eval_draws)]

    rows, sets, toys, pictures = [], {}, {}, {}
    for name in args.paths:
        path = Path(name)
        if not path.exists():
            raise RunError(f"{name} does not exist: give a run folder or a file of samples")
        result, file, dataset, length = None, path, args.dataset, None
        if path.is_dir():
            result = score_run(path, args.split, flags, args.metrics)
            file, dataset = path / "samples.jsonl", result["dataset"]
            length = result["length"]
        elif '"reference":' in path.open().readline():
            rows.append({"run": name} | figure_columns(
                translation_figures(read_samples(path), args.metrics)))
            continue
        elif not dataset:
            raise RunError(f"{name}: say --dataset, whose text the words are compared with")
        samples = None
        if file.exists():
            key = (dataset, length)
            data = sets.setdefault(key, load_dataset(dataset, args.data_dir, length))
            samples = score_samples(read_samples(file), data)
        rows.append(row_of(name, result, samples))
        if (histograms := path / "histograms.npz").exists():
            import vadd
            with np.load(histograms) as file:
                own = {int(T): file[T].astype(np.float64) for T in file.files}
            toys[dataset], seen = vadd.toy_rows(load_dataset(dataset), own, name, TOY_POINTS)
            rows[-1] |= toy_columns(toys[dataset][name])
            pictures.setdefault(dataset, [path, *seen[:2]]).append(seen[2])
    for (dataset, _), data in sets.items():
        rows.append(row_of(f"data: {dataset}/{args.split}", None, score_data(data, args.split)))
    for dataset, toy in toys.items():
        rows += [{"run": f"{row}: {dataset}"} | toy_columns(toy[row]) for row in
                 ("data", "mdlm at best")]
    print(table(rows))
    for dataset, (folder, *histograms) in pictures.items():
        vadd.save_histograms(folder / "side-by-side.png", [histograms])
        print(f"{folder / 'side-by-side.png'}: {dataset}, MDLM at best, then the runs above")


if __name__ == "__main__":
    common.run_main(main)
