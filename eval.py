"""Metrics, and one table for any number of runs.

    python eval.py runs/cadd-pydoc runs/mdlm-pydoc         score checkpoints and their samples
    python eval.py runs/cadd-text8 --split test            on another split
    python eval.py samples.jsonl --dataset english27       a file of samples alone
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
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import textwrap
import warnings
from collections import Counter
from pathlib import Path
from typing import Iterable, Sequence

import numpy as np
import torch

import common
from common import RunError
from data import (TOY_BINS, TOY_POINTS, TextData, load_dataset, ngrams, score_translations,
                  words)

METHODS = ("cadd", "vadd", "difformer")  # scripts with a function score(out, flags)


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
# Toys: points on a grid of 100 x 100 bins
# ---------------------------------------------------------------------------------------------

TOY_STEPS = (1, 5, 10, 20)  # VADD's Table 1 and Figure 6


def histogram(ids: np.ndarray) -> np.ndarray:
    """Points (n, 2) of bins -> frequencies (100, 100), float64."""
    cell = ids[:, 0].astype(np.int64) * TOY_BINS + ids[:, 1]
    counts = np.bincount(cell, minlength=TOY_BINS**2)
    return counts.reshape(TOY_BINS, TOY_BINS) / len(ids)


def histogram_entropy(p: np.ndarray) -> float:
    """In nats."""
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def jeffreys(p: np.ndarray, q: np.ndarray, floor: float = 1e-6) -> float:
    """[KL(p || q) + KL(q || p)] / 2 in nats, with `floor` added inside each logarithm.

    What VADD's Table 1 calls "JS divergence": it has values above ln 2, which no Jensen-Shannon
    divergence can have, and this formula gives the table's MDLM rows.
    """
    return float(0.5 * ((p - q) * (np.log(p + floor) - np.log(q + floor))).sum())


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon divergence in nats, at most ln 2."""
    return histogram_entropy((p + q) / 2) - (histogram_entropy(p) + histogram_entropy(q)) / 2


def perfect_mdm(p: np.ndarray, steps: int) -> np.ndarray:
    """What an MDM with the exact conditionals of p samples in `steps` steps: (100, 100).

    With probability 1/steps both positions are revealed in one step, each from its own marginal;
    else the second one is drawn given the first, and the pair is right.
    """
    product = np.outer(p.sum(1), p.sum(0))
    return product / steps + p * (1 - 1 / steps)


def toy_rows(
    data: TextData, own: dict[int, np.ndarray], name: str, n: int
) -> tuple[dict[str, dict], list[np.ndarray]]:
    """Divergences from the training points' histogram, and three histograms to look at.

    `own` are histograms of n samples by the number of steps. Row "data" is the valid split: what
    a perfect model would get, for sampling noise alone keeps it from 0. Row "mdlm at best" is n
    draws of `perfect_mdm`. The histograms: data, mdlm at best, own, for the first number of steps.
    """
    p, rng = histogram(data.splits["train"]), np.random.default_rng(0)
    fresh = histogram(data.splits["valid"])
    best = {T: rng.multinomial(n, perfect_mdm(p, T).ravel()).reshape(p.shape) / n for T in own}
    rows = {row: {T: {"jeffreys_1e-6": jeffreys(p, q[T]), "js": jensen_shannon(p, q[T])}
                  for T in own}
            for row, q in {"data": dict.fromkeys(own, fresh), "mdlm at best": best,
                           name: own}.items()}
    first = next(iter(own))
    return rows, [p, best[first], own[first]]


def toy_columns(row: dict[int, dict]) -> dict[str, str]:
    """A row of `toy_rows` as columns of the table of runs."""
    return {f"{name}, T = {T}": f"{value:.3f}" for T, values in row.items()
            for name, value in values.items()}


def toy_table(rows: dict[str, dict]) -> str:
    """`toy_rows` as lines of text."""
    steps = list(next(iter(rows.values())))
    lines = ["jeffreys_1e-6 (JS) in nats, by sampling steps:",
             f"{'':15s}" + "".join(f"{T:>16}" for T in steps)]
    lines += [f"{name:15s}" + "".join(f"{v['jeffreys_1e-6']:8.3f} ({v['js']:.3f})"
                                      for v in row.values()) for name, row in rows.items()]
    return "\n".join(lines)


def save_histograms(path: Path, rows: list[list[np.ndarray]]) -> None:
    """A picture of histograms side by side, one row per list; dark is frequent, y points up."""
    from torchvision.utils import save_image
    shades = [1 - torch.from_numpy(p / np.quantile(p[p > 0], 0.99)).clamp(0, 1).T.flip(0)
              for row in rows for p in row]
    image = torch.stack(shades)[:, None].float()                      # (n, 1, 100, 100)
    image = image.repeat_interleave(3, 2).repeat_interleave(3, 3)
    save_image(image, path, nrow=len(rows[0]), padding=8, pad_value=0.5)


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


def score_run(out: Path, split: str, flags: list[str], extra: Sequence[str] = ()) -> dict:
    """A run folder's figures on the full split, from eval-SPLIT.json if that is up to date."""
    checkpoint, kept = out / "checkpoint.pt", out / f"eval-{split}.json"
    if not checkpoint.exists():
        raise RunError(f"{out} is not a run folder: it has no checkpoint.pt")
    stamp = {"mtime_ns": checkpoint.stat().st_mtime_ns, "flags": [*flags, *extra]}
    if kept.exists():
        result = json.loads(kept.read_text())
        if result.pop("of") == stamp:
            return result
    try:
        method = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["method"]
    except Exception as error:
        raise RunError(f"{checkpoint} is truncated or not a checkpoint") from error
    if method not in METHODS:
        raise RunError(f"{checkpoint}: no script scores the method {method!r}")
    result = importlib.import_module(method).score(str(out), ["--split", split, *flags])
    if method == "difformer":
        rows = read_samples(out / f"translations-{split}.jsonl")
        result["figures"] |= translation_figures(rows, extra)
    common.write_json(kept, {"of": stamp, **result})
    return result


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


def main(argv: list[str] | None = None) -> None:
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
            with np.load(histograms) as file:
                own = {int(T): file[T].astype(np.float64) for T in file.files}
            toys[dataset], seen = toy_rows(load_dataset(dataset), own, name, TOY_POINTS)
            rows[-1] |= toy_columns(toys[dataset][name])
            pictures.setdefault(dataset, [path, *seen[:2]]).append(seen[2])
    for (dataset, _), data in sets.items():
        rows.append(row_of(f"data: {dataset}/{args.split}", None, score_data(data, args.split)))
    for dataset, toy in toys.items():
        rows += [{"run": f"{row}: {dataset}"} | toy_columns(toy[row]) for row in
                 ("data", "mdlm at best")]
    print(table(rows))
    for dataset, (folder, *histograms) in pictures.items():
        save_histograms(folder / "side-by-side.png", [histograms])
        print(f"{folder / 'side-by-side.png'}: {dataset}, MDLM at best, then the runs above")


if __name__ == "__main__":
    common.run_main(main)
