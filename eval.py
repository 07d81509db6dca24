"""Metrics, each defined once, and one table for any number of runs.

    python eval.py runs/cadd-pydoc runs/mdlm-pydoc         score checkpoints and their samples
    python eval.py runs/cadd-text8 --split test            on another split
    python eval.py runs/cadd-owt --dataset ptb             zero-shot, on another set of the same
                                                           vocabulary (data.py, ZERO_SHOT)
    python eval.py runs/cadd-owt --steps 32,128,1024 --K 1,4 --samples 512 --judge --metrics mauve
                                                           draw and score a sweep, by GPT-2 large
    python eval.py runs/difformer --steps 8,20,50          translate in a sweep
    python eval.py samples.jsonl --dataset english27       a file of samples alone
    python eval.py translations.jsonl --metrics comet      translations with references
    python eval.py curves runs/cadd-pydoc runs/mdlm-pydoc  loss and bounds over training steps
    python eval.py images runs/mdlm-mnist-binary runs/vadd-mnist-binary --steps 1,5,10,20,100
                                                           samples of pixels, a picture and grades
    python eval.py collapse runs/catdm-mnist runs/csdm-mnist    have learned embeddings collapsed?

A run folder is scored on the full split (VADD: on as many sequences as the run's --eval_sequences,
its figures cost many network calls) with a fixed seed and the averaged (EMA) weights; the
figures are kept in eval-SPLIT.json beside the checkpoint and computed anew when it changes. Sample
metrics read samples.jsonl (draw more with --mode sample --samples 256 in the method's script, or
with --steps), and the row "data" gives the same metrics of real text, the value to aim at.

    bound figures   bits per character, or nats per token and perplexity, of the full --split
                    (README), weighted by tokens; ± one standard error over sequences x draws.
                    `(no bound)` marks figures below which -log p may lie, "given the padding" those
                    that do not pay for it. --dataset OTHER: zero-shot, as in MDLM's
                    tables. --K: with so many latent chains (CADD) or draws of z (VADD)
    nfe, candidates, top_p, temperature, order    how samples or translations were drawn: network
                    calls for each (CADD: times K), candidates of a source; always in float64
    entropy         nats: entropy of the token frequencies within a sample, mean over samples (MDLM)
    distinct-n      % of distinct n-grams of words among all of all samples (Li et al. 2016): it
                    falls with their number, so compare equal numbers
    generative perplexity   --judge MODEL: exp of the mean -log p of all samples' tokens by a causal
                    model, in its own tokens (beside it the mean of samples' perplexities); (SSD-LM,
                    MDLM). A run of results/ar_baseline.py judges offline: for our comparisons alone
    MAUVE           --metrics mauve: 0 to 1, samples against as many texts of --split, GPT-2 large's
                    features, scale 5, 500 buckets (Pillutla et al. 2021)
    spelled         % of whole words (a sample's first and last, cut at its edges, left out) that
                    occur in the training text (ours)
    parses          % of samples whose whole lines parse as Python, after removing the
                    indentation they share (pycode; ours)
    jeffreys_1e-6   toys: half the sum of both KL divergences in nats between the histograms of
                    100,000 samples and of the training points, 1e-6 added inside the logarithm:
                    what VADD's Table 1 calls JS. js is the Jensen-Shannon divergence in nats. Row
                    "data" has fresh data points, "mdlm at best" an MDM with exact conditionals
    recognised      images with classes: share of samples whose class a small network finds;
                    without classes of their own: in which it sees one with p >= .9
    frechet         FID with that network's 64 features, samples against the valid split: it
                    compares runs on one set only, and equal numbers of samples
    fid, inception_score, precision, recall    `images --fid`: by torch-fidelity
    exact           translations: percentage equal to their reference, character by character
    bleu            corpus BLEU-4 in percent of --split, lower-cased, tokenised as mteval-v13a does
                    (Papineni et al. 2002)
    div4            0 to 1: share of distinct 4-grams among all of a source's candidates, mean over
                    sources (DiffuSeq)
    sacrebleu       --metrics sacrebleu: BLEU in percent with signature and 95% bootstrap interval:
                    cased, lower-cased, "tokenised" (of texts as they stand) (Post 2018)
    rouge1, 2, L    --metrics rouge: mean F1 in percent, lower-cased, not stemmed (Lin 2004)
    bertscore       --metrics bertscore: mean F1 in percent, deberta-xlarge-mnli (Zhang et al. 2020)
    comet           --metrics comet: mean of wmt22-comet-da, about 0 to 1 (Rei et al. 2022)
    speed           translations: sentences per second, on rank 0; it varies from call to call

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

Pictures need matplotlib (pip install matplotlib), tables and JSON do not. `collapse` writes
collapse.json with the curves' numbers, collapse.png (variances, cross-entropy and DGS over t,
principal axes, magnitudes) and distances.png (between all embeddings); `curves` writes curves.png.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import sys
import textwrap
import warnings
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import RunError
from data import (TOY_BINS, TOY_POINTS, PairData, Sequences, load_dataset, read_lines,
                  tokenise_13a, words)

# ---------------------------------------------------------------- samples of text


def mean(values: Iterable[float]) -> float:
    """Raises RunError if there are none."""
    values = list(values)
    if not values:
        raise RunError("there are no samples to score")
    return sum(values) / len(values)


def entropy(samples: Iterable[Sequence[int]]) -> float:
    """Mean over samples (ids) of the entropy in nats of the ids' frequencies within a sample."""
    counts = (np.unique(np.asarray(ids), return_counts=True)[1] for ids in samples)
    return mean(histogram_entropy(n / n.sum()) for n in counts)


def distinct(texts: Iterable[str], n: int) -> float | None:
    """Share of distinct n-grams of words among all in texts (Li et al. 2016); of a source's
    candidates, n = 4, DiffuSeq's div-4. None if there is none."""
    words = (text.split() for text in texts)
    found = Counter(gram for w in words for gram in zip(*(w[i:] for i in range(n))))
    return len(found) / found.total() if found else None


def spelled(texts: Iterable[str], vocabulary: set[str]) -> float | None:
    """Share of whole words found in `vocabulary`, None if no sample has one.

    Edges are cut mid-word, so what touches either end of a sample is left out.
    """
    whole = [word for text in texts for word in text.replace("\n", " ").split(" ")[1:-1] if word]
    return sum(word in vocabulary for word in whole) / len(whole) if whole else None


def parses(texts: Iterable[str]) -> float:
    """Share of texts whose whole lines (first and last dropped) parse as Python, dedented."""
    def good(text: str) -> bool:
        body = textwrap.dedent("\n".join(text.split("\n")[1:-1]))
        try:
            ast.parse(body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
        return bool(body.strip())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like
        return mean(map(good, texts))


def needed(module: str, install: str) -> ModuleType:
    """An optional package. Raises RunError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise RunError(f"{module} is not installed: pip install {install}") from None


# Of --metrics and --fid: what is imported, and what pip installs.
PACKAGES = {"sacrebleu": ("sacrebleu.metrics", "sacrebleu"),
            "rouge": ("rouge_score.rouge_scorer", "rouge-score"),
            "bertscore": ("bert_score", "bert-score"), "comet": ("comet", "unbabel-comet"),
            "mauve": ("mauve", "mauve-text"),
            "fid": ("torch_fidelity", "'torch-fidelity>=0.4'")}  # has precision and recall


class Judge:
    """A causal model that scores texts: a Hugging Face model by its name or folder, or a run of
    results/ar_baseline.py, our own yardstick. Raises RunError."""

    def __init__(self, name: str, device: str = "auto"):
        self.name, out = name, Path(name)
        if (out / "checkpoint.pt").exists():
            script = script_of(out)
            if not hasattr(script, "log_likelihood"):
                raise RunError(f"--judge {name} was made by {script.__name__}.py: give a run of "
                               "results/ar_baseline.py, or a Hugging Face model")
            flags = ["--mode", "sample", "--device", device]
            cfg, self.ddp, self.model, data, step = common.open_run(script, name, flags)
            if data.pad_id is not None or data.bos_id is not None:
                raise RunError(f"--judge {name} learned pairs or special tokens: it cannot judge "
                               "plain text")
            self.name = f"own {out.name}, {step:,} steps"
            self.encode, self.nll = data.encode, lambda ids: self.model(ids)[1]
            self.vocab_size, self.length, self.given = data.vocab_size, cfg.length, 0
            return
        hub = needed("transformers", "transformers")
        try:
            tokenizer = hub.AutoTokenizer.from_pretrained(name)
            self.model = hub.AutoModelForCausalLM.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise RunError(f"--judge {name}: no run of results/ar_baseline.py and no Hugging Face "
                           f"model that can be loaded ({str(error).splitlines()[0]})") from error
        self.ddp = common.DDP.start(common.RunConfig(device=device))
        self.model = self.model.float().to(self.ddp.device).eval()
        config = self.model.config
        self.vocab_size = config.vocab_size
        self.length = getattr(config, "max_position_embeddings", 1024)
        self.given = 1  # nothing says how likely a first token is
        self.encode = lambda text: tokenizer(text, verbose=False)["input_ids"]
        self.nll = lambda ids: F.cross_entropy(
            self.model(ids).logits[:, :-1].mT.float(), ids[:, 1:], reduction="none")

    @torch.no_grad()
    def perplexities(self, texts: Sequence[str], batch: int = 8) -> tuple[float, np.ndarray]:
        """exp of the mean -log p of all texts' tokens, and of each text's (n,), in the judge's own
        tokens. What exceeds the judge's context is judged in parts; a text without a scored token
        is nan. Raises RunError for ids that the judge does not know."""
        parts = []
        for i, ids in enumerate(map(self.encode, texts)):
            if len(ids) and max(ids) >= self.vocab_size:
                raise RunError(f"--judge {self.name}: id {max(ids)} is beyond its vocabulary of "
                               f"{self.vocab_size}: its tokenizer belongs to another model")
            parts += [(i, torch.as_tensor(ids[k:k + self.length]).long())
                      for k in range(0, len(ids), self.length)]
        parts.sort(key=lambda part: len(part[1]))
        sums, counts = np.zeros((2, len(texts)))
        for begin in common.progress(range(0, len(parts), batch), "judge"):
            some = parts[begin:begin + batch]
            ids = nn.utils.rnn.pad_sequence([x for _, x in some], batch_first=True)
            with common.exact(self.ddp.device):  # what pads the end changes nothing before it
                found = self.nll(self.ddp.put(ids)).double().cpu()
            for (i, x), terms in zip(some, found):
                n = len(x) - self.given
                sums[i] += terms[:n].sum().item()
                counts[i] += n
        if not counts.sum():
            raise RunError(f"--judge {self.name}: the samples have no token that it can score")
        each = np.full(len(texts), math.nan)
        each[counts > 0] = np.exp(sums[counts > 0] / counts[counts > 0])
        return math.exp(sums.sum() / counts.sum()), each


MAUVE_BUCKETS = 500


def mauve(**sets: Sequence) -> float:
    """MAUVE (Pillutla et al. 2021) of p_text, real, and q_text, or of p_features and q_features
    (n, d), as in MDLM's line of papers: GPT-2 large's features of up to 1,024 tokens, scale 5, 500
    buckets. Raises RunError without the package, or for too few."""
    package = needed(*PACKAGES["mauve"])
    if (n := min(map(len, sets.values()))) < MAUVE_BUCKETS:
        raise RunError(f"MAUVE has {MAUVE_BUCKETS} buckets, and there are {n} samples or real "
                       "texts: draw more with --samples (the papers: 5000)")
    return float(package.compute_mauve(
        **sets, featurize_model_name="gpt2-large", max_text_length=1024, mauve_scaling_factor=5,
        num_buckets=MAUVE_BUCKETS, device_id=0 if torch.cuda.is_available() else -1, seed=0,
        verbose=False).mauve)


def real_texts(data: Sequences, split: str, n: int) -> list[dict]:
    """Up to n sequences of a split, spread evenly, as rows of samples."""
    return [dict(text=data.decode(ids), ids=ids)
            for batch in data.eval_batches(split, 64, limit=n) for ids in batch.ids]


HOW = ("samples", "nfe", "candidates", "top_p", "temperature", "order")


def how_drawn(rows: list[dict]) -> dict[str, str]:
    """Columns that say how texts or translations were drawn, as far as their rows tell."""
    row = rows[0] | {"samples": len(rows)}
    if "candidates" in row:
        row["candidates"] = len(row["candidates"])
    return {k: str(row[k]).removesuffix(".0") for k in HOW if k in row}


def sample_columns(rows: list[dict], data: Sequences, judge: Judge | None = None,
                   mauve_split: str | None = None) -> dict[str, str]:
    """The metrics that make sense for `data`, as columns; rows have "text" and perhaps "ids", and
    how they were drawn. MAUVE compares with as many sequences of `mauve_split`."""
    texts = [row["text"] for row in rows]
    ids = [row["ids"] if "ids" in row else data.encode(row["text"]) for row in rows]
    columns = how_drawn(rows) | {"entropy, nats": f"{entropy(ids):.4f}"}
    columns |= {f"distinct-{n}": f"{share:.1%}" for n in (1, 2, 3)
                if (share := distinct(texts, n)) is not None}
    if judge:
        corpus, each = judge.perplexities(texts)
        columns[f"generative perplexity by {judge.name}"] = (
            f"{corpus:.2f} (mean of samples' {np.nanmean(each):.2f})")
    if mauve_split:
        real = [row["text"] for row in real_texts(data, mauve_split, len(rows))]
        columns["MAUVE"] = f"{mauve(p_text=real, q_text=texts):.3f}"
    if data.unit == "char" and (share := spelled(texts, words(data))) is not None:
        columns["spelled"] = f"{share:.1%}"
    if data.name == "pycode":
        columns["parses"] = f"{parses(texts):.1%}"
    return columns


# ---------------------------------------------------------------- translations


@functools.lru_cache(1024)  # `choose` compares each candidate with all others
def ngrams(tokens: tuple) -> list[Counter]:
    """Counts of the 1-, 2-, 3- and 4-grams."""
    return [Counter(zip(*(tokens[i:] for i in range(n)))) for n in range(1, 5)]


def bleu(hypotheses: Sequence[Sequence], references: Sequence[Sequence[Sequence]],
         smooth: bool = False) -> float:
    """Corpus BLEU-4 in [0, 1] (Papineni et al. 2002) of token lists with one or more references.

    `smooth` adds one to both counts of n > 1 (Lin and Och 2004): for single sentences, which
    often share no 4-gram with their reference.
    """
    hits, totals = ([0, *[int(smooth)] * 3] for _ in range(2))  # n-grams that match, and all
    length = reference_length = 0
    for hypothesis, several in zip(hypotheses, references, strict=True):
        length += len(hypothesis)
        reference_length += min((abs(len(r) - len(hypothesis)), len(r)) for r in several)[1]
        counts = (ngrams(tuple(tokens)) for tokens in (hypothesis, *several))
        for n, (found, *known) in enumerate(zip(*counts)):
            most = functools.reduce(Counter.__or__, known)  # of each n-gram, in any one reference
            hits[n] += sum(min(count, most[gram]) for gram, count in found.items())
            totals[n] += found.total()
    if not min(hits):
        return 0.0
    brevity = min(0.0, 1 - reference_length / length)
    return math.exp(brevity + sum(math.log(h / t) for h, t in zip(hits, totals)) / 4)


def translate_split(translate: Callable[..., Iterable[dict]], model: nn.Module, cfg: Any,
                    data: PairData, ddp: common.DDP) -> list[dict]:
    """What a script's `translate` makes of cfg.split, with references; kept in the run folder."""
    pairs = data.pairs_of(cfg.split, cfg.eval_sequences or None)
    found = translate(model, [source for source, _ in pairs], data, cfg, ddp)
    rows = [row | {"reference": target} for row, (_, target) in zip(
        common.progress(found, "translate", len(pairs)), pairs)]
    common.write_jsonl(Path(cfg.out) / f"translations-{cfg.split}.jsonl", rows)
    return rows


def sources_of(cfg: Any, data: PairData) -> list[str]:
    """What --mode sample translates: --source, or the first cfg.samples sentences of the split."""
    if not cfg.source:
        return [source for source, _ in data.pairs_of(cfg.split, cfg.samples)]
    return read_lines(Path(cfg.source)) if os.path.isfile(cfg.source) else [cfg.source]


def choose(candidates: Sequence[Sequence[int]]) -> int:
    """Minimum Bayes risk: which candidate (token ids) has the best mean sentence BLEU with the
    others. Difformer's paper: or by an autoregressive model's likelihood, as its published
    scripts do."""
    candidates = [tuple(c) for c in candidates]
    several = Counter(candidates)  # each counts itself too, which adds the same to all
    value = {c: sum(n * bleu([c], [[o]], smooth=True) for o, n in several.items()) for c in several}
    return candidates.index(max(value, key=value.get))


def score_translations(rows: Sequence[dict]) -> dict[str, dict]:
    """Figures of {"text", "reference"} rows that training reports: exact matches and corpus BLEU,
    lower-cased and tokenised. `translation_figures` has more."""
    p = mean(row["text"] == row["reference"] for row in rows)
    texts, references = ([tokenise_13a(row[k].lower()) for row in rows]
                         for k in ("text", "reference"))
    return {
        "exact": dict(value=100 * p, unit="%", stderr=100 * math.sqrt(p * (1 - p) / len(rows))),
        "bleu": dict(value=100 * bleu(texts, [[r] for r in references]), unit="lower case, 13a")}


def sacrebleu(rows: list[dict]) -> dict[str, dict]:
    """sacreBLEU in percent, with its signature and the 95% interval of its bootstrap (1000 draws,
    seed 12345): by default (cased, 13a), in lower case, and of texts as they stand, which for
    tokenised ones is tokenised BLEU (Difformer's Table 3). Raises RunError without the package."""
    package, found = needed(*PACKAGES["sacrebleu"]), {}
    for name, options in (("", {}), ("_lc", dict(lowercase=True)),
                          ("_tokenised", dict(tokenize="none", force=True))):
        metric = package.BLEU(**options)
        score = metric.corpus_score([r["text"] for r in rows], [[r["reference"] for r in rows]],
                                    n_bootstrap=1000)
        signature = str(metric.get_signature())
        interval = json.loads(score.format(4, is_json=True, signature=signature))
        found["sacrebleu" + name] = dict(value=score.score, unit=signature.replace("|", " "),
                                         ci95=interval.get("confidence_var", 0.0))
    return found


def rouge(rows: list[dict]) -> dict[str, dict]:
    """Mean F1 of ROUGE-1, -2, -L (Lin 2004) in percent. Raises RunError without the package."""
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = needed(*PACKAGES["rouge"]).RougeScorer(names)
    scores = [scorer.score(row["reference"], row["text"]) for row in rows]
    return {name: dict(value=100 * mean(score[name].fmeasure for score in scores), unit="F1")
            for name in names}


def bertscore(rows: list[dict]) -> dict[str, dict]:
    """Mean F1 with DiffuSeq's model, in percent. Raises RunError without the package."""
    score = needed(*PACKAGES["bertscore"]).score
    model = "microsoft/deberta-xlarge-mnli"
    _, _, f1 = score([r["text"] for r in rows], [r["reference"] for r in rows], model_type=model)
    return {"bertscore": dict(value=100 * float(f1.mean()), unit=f"F1, {model}")}


def comet(rows: list[dict]) -> dict[str, dict]:
    """COMET's mean of the model named. Raises RunError without the package or the sources."""
    package = needed(*PACKAGES["comet"])
    name = "Unbabel/wmt22-comet-da"
    if any("source" not in row for row in rows):
        raise RunError('COMET needs each translation\'s "source"')
    triples = [dict(src=r["source"], mt=r["text"], ref=r["reference"]) for r in rows]
    found = package.load_from_checkpoint(package.download_model(name)).predict(
        triples, batch_size=64, gpus=int(torch.cuda.is_available()))
    return {"comet": dict(value=float(found.system_score), unit=name)}


EXTRA = {f.__name__: f for f in (sacrebleu, rouge, bertscore, comet)}  # what other packages compute


def translation_figures(rows: list[dict], extra: Sequence[str] = ()) -> dict[str, dict]:
    """All figures of {"text", "reference"[, "source", "candidates"]} rows."""
    figures = score_translations(rows)
    shares = [share for row in rows if len(row.get("candidates", ())) > 1
              and (share := distinct(row["candidates"], 4)) is not None]
    if shares:
        figures["div4"] = dict(value=mean(shares), unit="per source")
    for name in extra:
        figures |= EXTRA[name](rows)
    return figures


# ---------------------------------------------------------------- toys: 100 x 100 bins

TOY_STEPS = (1, 5, 10, 20)  # VADD's Table 1 and Figure 6


def histogram(ids: np.ndarray) -> np.ndarray:
    """Points (n, 2) of bins -> frequencies (100, 100), float64."""
    counts = np.bincount(ids @ np.array([TOY_BINS, 1]), minlength=TOY_BINS**2)
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
    return np.outer(p.sum(1), p.sum(0)) / steps + p * (1 - 1 / steps)


def toy_rows(data: Sequences, own: dict[int, np.ndarray], name: str, n: int
             ) -> tuple[dict[str, dict], list[np.ndarray]]:
    """Divergences from the training points' histogram, and three histograms to look at.

    `own` are histograms of n samples by the number of steps. Row "data" is the valid split: what
    a perfect model would get, for sampling noise alone keeps it from 0. Row "mdlm at best" is n
    draws of `perfect_mdm`. The histograms: data, mdlm at best, own, for the first number of steps.
    """
    p, rng = histogram(data.splits["train"]), np.random.default_rng(0)
    best = {T: rng.multinomial(n, perfect_mdm(p, T).ravel()).reshape(p.shape) / n for T in own}
    sources = {"data": dict.fromkeys(own, histogram(data.splits["valid"])), "mdlm at best": best,
               name: own}
    rows = {source: {T: {"jeffreys_1e-6": jeffreys(p, q), "js": jensen_shannon(p, q)}
                     for T, q in histograms.items()} for source, histograms in sources.items()}
    first = next(iter(own))
    return rows, [p, best[first], own[first]]


def toy_columns(row: dict[int, dict]) -> dict[str, str]:
    """A row of `toy_rows` as columns of a table."""
    return {f"jeffreys_1e-6 (js), T = {T}": f"{v['jeffreys_1e-6']:.3f} ({v['js']:.3f})"
            for T, v in row.items()}


def save_histograms(path: Path, rows: list[list[np.ndarray]]) -> None:
    """A picture of histograms side by side, one row per list; dark is frequent, y points up."""
    from torchvision.utils import save_image
    shades = [1 - torch.from_numpy(p / np.quantile(p[p > 0], 0.99)).clamp(0, 1).T.flip(0)
              for row in rows for p in row]
    image = torch.stack(shades)[:, None].float()                      # (n, 1, 100, 100)
    image = image.repeat_interleave(3, 2).repeat_interleave(3, 3)     # (n, 1, 300, 300)
    save_image(image, path, nrow=len(rows[0]), padding=8, pad_value=0.5)


def show_toys(data: Sequences, own: dict[int, np.ndarray], name: str, n: int, folder: Path
              ) -> dict[str, dict]:
    """Print and return the rows of `toy_rows`; write histograms.npz and samples.png to a folder."""
    rows, pictures = toy_rows(data, own, name, n)
    np.savez_compressed(folder / "histograms.npz",
                        **{str(T): p.astype(np.float32) for T, p in own.items()})
    save_histograms(folder / "samples.png", [pictures])
    first = next(iter(own))
    columns = [{"nats": source} | toy_columns(row) for source, row in rows.items()]
    print(f"{table(columns)}\n{folder / 'samples.png'}: data, MDLM at best, {name}; {first} step"
          f"{'s' if first > 1 else ''}")
    return rows


def save_grids(path: Path, groups: list[np.ndarray], columns: int) -> None:
    """A picture of groups of images (n, H, W) or (n, H, W, 3), `columns` in a row, below each
    other."""
    from torchvision.utils import make_grid, save_image
    grids = [make_grid(torch.from_numpy(g.reshape(*g.shape[:3], -1)).movedim(-1, 1) / 255,
                       nrow=columns, pad_value=0.5) for g in groups]
    image = torch.cat([F.pad(g, (0, 0, 0, 8), value=1.0) for g in grids], 1)
    zoom = max(1, round(800 / image.shape[2]))
    save_image(image.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2), path)


# ---------------------------------------------------------------- images of tokens


class TokenClassifier:
    """A small convolutional network on the grid of tokens or pixels, trained on the labelled images
    for some seconds: which class does it see in samples, and how are its 64 features distributed?
    """

    steps, batch = 300, 128

    def __init__(self, data: Sequences):
        (rows, columns), colours = data.shape[:2], math.prod(data.shape[2:])
        halves = len(data.shape) - 1  # pixels are halved twice
        self.real = (torch.from_numpy(data.splits["valid"].astype(np.int64)),
                     torch.from_numpy(data.labels["valid"]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(data.vocab_size, 32)
            self.head = nn.Linear(64, len(data.classes))
            self.net = nn.Sequential(
                nn.Unflatten(2, (rows, columns)),
                nn.Conv2d(32 * colours, 64, 3, halves, padding=1), nn.ReLU(),
                nn.Conv2d(64, 64, 3, 2, padding=1), nn.ReLU(), nn.Flatten(),
                nn.Linear(64 * -(-rows // 2**halves) * -(-columns // 2**halves), 64), nn.ReLU())
            parts = nn.ModuleList([self.embed, self.net, self.head])
            optimizer = torch.optim.Adam(parts.parameters(), 2e-3)
            for step in range(self.steps):
                x, y = data.train_batch(0, step, self.batch, range(self.batch))
                logits = self.head(self.features(torch.from_numpy(x)))
                F.cross_entropy(logits, torch.from_numpy(y)).backward()
                optimizer.step()
                optimizer.zero_grad()
        self.real_features = self.all_features(self.real[0])

    def features(self, x: Tensor) -> Tensor:
        """(n, L) -> (n, 64)."""
        side = self.net[0].unflattened_size
        return self.net(self.embed(x).view(len(x), math.prod(side), -1).transpose(1, 2))

    @torch.no_grad()
    def all_features(self, x: Tensor) -> Tensor:
        """The same in parts, without gradient, float64."""
        return torch.cat([self.features(part) for part in x.split(512)]).double()

    @torch.no_grad()
    def grade(self, x: Tensor, y: Tensor | None = None) -> dict[str, float]:
        """Samples (n, L) of classes y (n,): the share recognised, without y that of whose class the
        network gives nine tenths or more, and the Fréchet distance of their features to the valid
        split's (FID with this network; it grows as n falls)."""
        h = self.all_features(x)
        p, best = self.head(h.float()).softmax(-1).max(-1)
        right = (p >= 0.9 if y is None else best == y).double().mean().item()
        return dict(recognised=right, frechet=frechet(h, self.real_features))


def frechet(h: Tensor, real: Tensor) -> float:
    """Squared Fréchet distance of Gaussians with the means and covariances of features (n, d) and
    (m, d), float64: |mean - mean'|^2 + tr(C + C' - 2 (C C')^1/2) (Heusel et al. 2017)."""
    shift = (h.mean(0) - real.mean(0)).square().sum()
    a, b = h.T.cov(), real.T.cov()
    root = torch.linalg.eigvals(a @ b).real.clamp_min(0).sqrt().sum()  # tr (a b)^1/2
    return (shift + a.trace() + b.trace() - 2 * root).item()


def print_grades(data: Sequences, samples: dict[str, Tensor], y: Tensor | None = None
                 ) -> dict[str, dict]:
    """`TokenClassifier.grade` of sets of samples of classes y, or of none in particular, by name,
    and of the valid split."""
    classifier = TokenClassifier(data)
    valid, classes = classifier.real
    grades = {"valid": classifier.grade(valid, None if y is None else classes)}
    grades |= {name: classifier.grade(x, y) for name, x in samples.items()}
    for name, grade in grades.items():
        print(f"{name:11s} a small classifier recognises {grade['recognised']:6.1%}, "
              f"Fréchet distance {grade['frechet']:.2f}")
    return grades


# ---------------------------------------------------------------- images of pixels


def show_images(drawn: dict[str, Tensor], data: Sequences, cfg: Any, graded: bool) -> dict:
    """Sampled images (n, L) by name: a picture of some of each, below each other, and all as .npz
    in the run folder: samples, or prompted. With `graded` their grades, if there are classes."""
    kind = "prompted" if cfg.prompt else "samples"
    path = Path(cfg.out) / f"{kind}.png"
    save_grids(path, [data.draw(x[:64 // len(drawn)]) for x in drawn.values()], 16)
    np.savez_compressed(path.with_suffix(".npz"), **{
        name: data.draw(x) for name, x in drawn.items()})
    print(f"{path}: {', '.join(drawn)}")
    return {"samples": print_grades(data, drawn)} if graded and data.classes else {}


def fidelity(images: np.ndarray, real: np.ndarray, reference: str) -> dict[str, dict]:
    """FID, Inception Score, precision and recall of images (n, H, W, colours) uint8 against `real`,
    by torch-fidelity and its standard weights. The papers take 50,000 of each."""
    package = needed(*PACKAGES["fid"])
    sets = [torch.utils.data.Subset(x, range(len(x))) for x in (  # the package asks for a Dataset
        torch.from_numpy(np.array(x)).movedim(-1, 1).expand(-1, 3, -1, -1) for x in (images, real))]
    found = package.calculate_metrics(
        input1=sets[0], input2=sets[1], fid=True, isc=True, prc=True, verbose=False,
        cuda=torch.cuda.is_available())
    names = dict(fid=("frechet_inception_distance", "inception-v3-compat"),
                 inception_score=("inception_score_mean", "inception-v3-compat"),
                 precision=("precision", "vgg16"), recall=("recall", "vgg16"))
    return {name: dict(value=found[key], unit=f"torch-fidelity {package.__version__}, {net}, "
                       f"{len(images):,} samples, reference {reference} ({len(real):,})",
                       is_bound=True) for name, (key, net) in names.items()}


def images_main(argv: list[str]) -> None:
    """`eval.py images`: a table, images.json and images.png, a group of rows for each run and
    number of steps."""
    parser = common.Parser("eval.py images", parents=[OPENS_RUNS, DRAWS_RUNS], allow_abbrev=False,
                           description="Samples of image runs at several numbers of steps.")
    parser.add_argument("--steps", type=numbers, default=(1, 5, 10, 20, 100), metavar="1,5,...")
    parser.add_argument("--samples", type=int, default=500, help="for each number of steps")
    parser.add_argument("--fid", action="store_true", help="also FID, Inception Score, precision "
                        "and recall against train (pip install torch-fidelity)")
    for name in ("corrector", "temperature"):
        parser.add_argument(f"--{name}", help="of CADD's sampler (default: the run's)")
    parser.add_argument("--cool", action=argparse.BooleanOptionalAction, help="likewise")
    args = parser.parse_args(argv)
    args.fid and needed(*PACKAGES["fid"])  # now rather than after drawing
    shapes = [common.read_checkpoint(run / "checkpoint.pt", mmap=True)["tokenizer"].get("shape")
              for run in args.runs if script_of(run)]
    if len({tuple(shape or ()) for shape in shapes}) > 1:
        raise RunError("images of different sizes make no picture: call it once for each size")
    flags = ["--data_dir", args.data_dir, "--device", args.device, "--samples", str(args.samples)]
    for name in ("corrector", "temperature"):
        flags += [f"--{name}", value] if (value := getattr(args, name)) else []
    flags += [] if args.cool is None else ["--cool" if args.cool else "--no-cool"]
    pictures, figures, classifiers = [], {}, {}
    for name, run in names_of(args.runs).items():
        script = script_of(run)
        cfg, ddp, model, data, step = common.open_run(script, str(run), flags)
        if not isinstance(data, Sequences) or data.unit != "dimension":
            raise RunError(f"{run} is no run on pixels")
        if data.classes and cfg.dataset not in classifiers:
            classifiers[cfg.dataset] = TokenClassifier(data)
            figures[f"data: {data.name}/valid"] = classifiers[cfg.dataset].grade(
                classifiers[cfg.dataset].real[0])
        for T in args.steps:
            ids = script.draw_ids(model, cfg, data, T, ddp)
            row = figures[f"{name}, {T} steps"] = dict(
                method=script.name_of(cfg), trained=step, samples=len(ids))
            if data.classes:
                row |= classifiers[cfg.dataset].grade(ids)
            if args.fid:
                real = data.draw(data.tokens("train")[:50_000])
                row |= figure_columns(fidelity(data.draw(ids.numpy()), real, f"{data.name}/train"))
            pictures.append(data.draw(ids[:16]))
    print(table([{"run": name} | {k: f"{v:.3f}" if isinstance(v, float) else v
                                  for k, v in row.items()} for name, row in figures.items()]))
    folder = args.out or args.runs[0]
    folder.mkdir(parents=True, exist_ok=True)
    save_grids(folder / "images.png", pictures, 16)
    common.write_json(folder / "images.json", figures)
    drawn = [name for name in figures if not name.startswith("data: ")]
    print(f"{folder / 'images.png'}: from the top {'; '.join(drawn)}")


# ---------------------------------------------------------------- collapse of embeddings

PROBE_TIMES = (np.arange(25) + 0.5) / 25  # where `collapse` asks each script's probe


def anisotropy(embeddings: Tensor) -> float:
    """ANI (Difformer 3.1): mean cosine of two different embeddings of (V, D)."""
    unit = F.normalize(embeddings.double(), dim=-1)
    V = len(unit)
    return ((unit.sum(0).square().sum() - V) / (V * (V - 1))).item()


def spectrum(embeddings: Tensor) -> Tensor:
    """Variances of embeddings (V, D) along their principal axes, falling: (min(V - 1, D),) float64.

    The squared singular values of the centred matrix over V. What float32 cannot tell from equal
    embeddings is 0.
    """
    e = embeddings.double()
    values = torch.linalg.svdvals(e - e.mean(0))[: len(e) - 1].square() / len(e)
    return torch.where(values > 1e-12 * e.square().sum(-1).mean(), values, 0.0)


def effective_rank(variances: Tensor) -> float:
    """Participation ratio (sum v)^2 / sum v^2: n for n equal variances; 0 if there is none."""
    total = variances.sum().item()
    return total**2 / variances.square().sum().item() if total else 0.0


def latent_variances(embeddings: Tensor, tokens: Tensor) -> Tensor:
    """CATDM's Figure 1: the variance over examples of each dimension of EMB(x), falling: (L D,).

    embeddings (V, D), tokens (n, L): EMB(x) is the sequence's embeddings one after another, (L D,).
    """
    parts = [embeddings.double()[column].var(0, unbiased=False) for column in tokens.T]
    return torch.cat(parts).sort(descending=True).values


def distances(embeddings: Tensor, most: int = 400) -> Tensor:
    """CATDM's Figure 6: Euclidean distances between embeddings (V, D), at most `most` of them."""
    V = len(embeddings)
    rows = embeddings[torch.linspace(0, V - 1, min(most, V)).round().long()].double()
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


def time_to_half(times: Tensor, values: Tensor) -> float:
    """When a curve (n,) over times (n,) first reaches half of its last value, interpolated."""
    half = values[-1] / 2
    k = int((values >= half).int().argmax())
    if k == 0:
        return times[0].item()
    part = (half - values[k - 1]) / (values[k] - values[k - 1])
    return (times[k - 1] + part * (times[k] - times[k - 1])).item()


@torch.no_grad()
def dgs_monte_carlo(
    signal: Tensor, sigma: Tensor, embeddings: Tensor, draws: int = 1, tokens: int = 1000,
    seed: int = 0,
) -> Tensor:
    """Difformer's Algorithm 2 on given embeddings (V, d): DGS_t at each signal, sigma (n,) -> (n,).

    The degenerate model (Definition 1) takes the y with the least |z_t - e_y|^2 / d - log softmax(
    z_t E^T)_y. Only `tokens` of the V serve as z_0, all are candidates.
    Paper: Definition 1 has |.|^2; the loss in use is a mean over dimensions, hence 1/d. Nearest
    in L2 alone would give .45/.75/.74 for Table 2's .47/.77/.77.
    """
    V, d = embeddings.shape
    rng = torch.Generator().manual_seed(seed)
    hits = []
    for a, s in zip(signal.float(), sigma.float()):
        y = torch.randperm(V, generator=rng)[:tokens].repeat(draws)        # (n,)
        z = a * embeddings[y] + s * torch.randn(len(y), d, generator=rng)  # (n, d)
        # (n, V), up to terms without y
        loss = embeddings.square().sum(-1) / d - (1 + 2 / d) * z @ embeddings.T
        hits.append((loss.argmin(-1) == y).double().mean())
    return torch.stack(hits)


def collapse(times: np.ndarray, probe: dict) -> dict:
    """{"figures" for the table, "curves" for the pictures} of what a script's `probe` found.

    At times (n,): cross_entropy (n,) in nats, signal (n,) and sigma (n,) of z_t = signal z_0 +
    sigma eps; embeddings (V, D); tokens (m, L), or None where sequences vary in length.
    """
    embeddings, ce, signal, sigma = (
        torch.as_tensor(probe[key]).detach().double().cpu()
        for key in ("embeddings", "cross_entropy", "signal", "sigma"))
    times, (V, D) = torch.as_tensor(times), embeddings.shape
    axes, norms = spectrum(embeddings), embeddings.norm(dim=-1)
    dgs = dgs_monte_carlo(signal, sigma, embeddings.float(), draws=-(-4000 // V))
    figures = dict(
        V=V, D=D, norm=norms.mean().item(), ani=anisotropy(embeddings),
        spread=(axes.sum() / embeddings.square().sum(-1).mean()).item(),
        effective_rank=effective_rank(axes), dgs=dgs.mean().item(),
        ce_mean=ce.mean().item(), ce_half_time=time_to_half(times, ce))
    curves = dict(axes=axes, norms=norms.sort(descending=True).values, times=times, ce=ce, dgs=dgs,
                  distances=distances(embeddings))
    if probe.get("tokens") is not None:
        curves["variances"] = variances = latent_variances(
            embeddings, torch.as_tensor(probe["tokens"]).cpu().long())
        figures |= dict(variance_median=variances.median().item(),
                        variance_largest=variances[0].item())
    return dict(figures=figures, curves=curves)


def collapse_columns(f: dict) -> dict[str, str]:
    """Figures of `collapse` as columns of its table."""
    variances = ("variance_median", "variance_largest")
    return {"V x D": f"{f['V']} x {f['D']}", "norm": f"{f['norm']:.3f}", "ANI": f"{f['ani']:.3f}",
            "spread": f"{f['spread']:.3f}", "effective rank": f"{f['effective_rank']:.1f}",
            "variance of EMB(x): median, largest": ", ".join(
                f"{f[key]:.2e}" for key in variances if key in f),
            "DGS": f"{f['dgs']:.3f}", "CE, nats": f"{f['ce_mean']:.3f}",
            "t at half CE": f"{f['ce_half_time']:.3f}"}


# ---------------------------------------------------------------- pictures, by matplotlib


def matplotlib_found() -> bool:
    """Whether pictures can be drawn; if not, a line on stderr says what to install."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        print("no pictures: they need matplotlib (pip install matplotlib)", file=sys.stderr)
    return found


def new_figure(panels: int):
    """A matplotlib figure and its axes, at most three in a row."""
    from matplotlib.figure import Figure  # without pyplot: neither windows nor global state
    columns = min(3, panels)
    rows = -(-panels // columns)
    figure = Figure((4.6 * columns, 3.3 * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, k + 1) for k in range(panels)]


def draw_lines(path: Path, panels: list[tuple[dict, dict]], runs: Iterable[str]) -> None:
    """A picture of panels: ({run: (x, y)}, what matplotlib's Axes.set takes). A run has one colour
    in all of them."""
    figure, axes = new_figure(len(panels))
    colours, shown = {run: f"C{k}" for k, run in enumerate(runs)}, {}
    for ax, (lines, settings) in zip(axes, panels):
        for run, (x, y) in lines.items():
            (shown[run],) = ax.plot(x, y, color=colours[run], marker="." if len(x) == 1 else "")
        ax.set(**settings)
        ax.grid(alpha=0.4)
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=3)
    figure.savefig(path)


def draw_collapse(results: dict[str, dict], folder: Path) -> list[Path]:
    """collapse.png: CATDM's Figure 1 and more; distances.png: its Figure 6."""
    curves = {run: result["curves"] for run, result in results.items()}
    panels = []
    for key, title, x_label in (
            ("variances", "variance of dimensions of EMB(x) (Fig. 1)", "share of all L x D"),
            ("ce", "cross-entropy of x0 given z_t, nats (Fig. 1)", "t"),
            ("dgs", "DGS_t: accuracy of the degenerate model", "t"),
            ("axes", "variance of embeddings along principal axes", "share of all axes"),
            ("norms", "magnitudes |e_v|, sorted (Fig. 6)", "share of all V tokens")):
        log = key in ("variances", "axes")
        lines = {run: (c["times"] if x_label == "t" else np.linspace(0, 1, len(c[key])),
                       c[key].clamp_min(1e-8 if log else 0))
                 for run, c in curves.items() if key in c}
        if lines:  # Difformer's sentences vary in length: no variance of EMB(x)
            top = 1.05 * max(float(y.max()) for _, y in lines.values()) or 1.0
            scale = dict(yscale="log") if log else dict(ylim=(0, top))
            panels.append((lines, dict(title=title, xlabel=x_label, **scale)))
    paths = [folder / "collapse.png", folder / "distances.png"]
    draw_lines(paths[0], panels, curves)
    figure, axes = new_figure(len(curves))
    for ax, (run, c) in zip(axes, curves.items()):
        figure.colorbar(ax.imshow(c["distances"].numpy(), cmap="gray_r", vmin=0), ax=ax)
        ax.set(title=run, xticks=[], yticks=[])
    figure.savefig(paths[1])
    return paths


# ---------------------------------------------------------------- runs, tables, commands

CURVES = ("loss", "L_0", "L_DM", "L_CM", "ce", "mse", "cross_entropy", "accuracy", "bleu",
          "hint_accuracy", "valid_loss")  # what scripts log; and names that end in _bits or _nats


def read_curves(out: Path) -> dict[str, dict[int, float]]:
    """{name: {step: value}} from a run's log.jsonl. Raises RunError if there is none.

    A run that was resumed from a checkpoint may have logged some steps twice: the last counts.
    """
    try:
        lines = (out / "log.jsonl").read_text().splitlines()
    except OSError:
        raise RunError(f"{out} is not a run folder: it has no log.jsonl") from None
    curves: dict[str, dict[int, float]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # a line cut short, by a crash or because it is being written
            continue
        for key, value in record.items():
            wanted = key in CURVES or key.endswith(("_bits", "_nats"))
            if wanted and isinstance(value, int | float):
                curves.setdefault(key, {})[record["step"]] = value
    if not curves:
        raise RunError(f"{out}/log.jsonl has no losses yet")
    return {key: dict(sorted(curve.items())) for key, curve in curves.items()}


def read_samples(path: Path) -> list[dict]:
    """samples.jsonl ({"text", "ids"} a line) or plain text, one sample a line. Raises RunError."""
    rows = []
    try:
        for number, line in enumerate(path.read_text().split("\n"), 1):
            if line.strip():
                row = json.loads(line) if path.suffix == ".jsonl" else {"text": line}
                keys = ["text", "reference"] if rows and "reference" in rows[0] else ["text"]
                if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in keys):
                    raise RunError(f"{path}, line {number}, is no sample: it needs "
                                   f"{', '.join(keys)}")
                rows.append(row)
    except json.JSONDecodeError as error:
        raise RunError(f"{path}, line {number}, is broken ({error}): mend or remove it") from error
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read samples from {path}: {error}") from error
    if not rows:
        raise RunError(f"{path} is empty: it holds no samples")
    return rows


def names_of(runs: list[Path]) -> dict[str, Path]:
    """Run folders by their own names, those of equal name by their paths."""
    names: dict[str, Path] = {}
    for run in runs:
        names[str(run) if run.name in names else run.name] = run
    return names


def script_of(out: Path) -> ModuleType:
    """The script that made a run folder, by its checkpoint's "method". Raises RunError."""
    checkpoint = out / "checkpoint.pt"
    if not checkpoint.exists():
        raise RunError(f"{out} is not a run folder: it has no checkpoint.pt")
    method = common.read_checkpoint(checkpoint, mmap=True)["method"]
    home = Path(__file__).resolve().parent
    for folder in (home, home / "results"):  # ar_baseline.py stands there
        if (folder / f"{method}.py").exists():
            sys.path.append(str(folder))
            return importlib.import_module(method)
    raise RunError(f"{out} was made by {method}.py, and there is no such script here")


def score_run(out: Path, split: str, flags: list[str], extra: list[str],
              dataset: str | None = None, K: int = 0) -> dict:
    """A run folder's figures on the full split (of another set, if it is named; with K if it is
    given), from eval-SPLIT[-SET][-KK].json if that is up to date. Ranks share the work, the first
    one writes."""
    script = script_of(out)
    parts = [split, *([Path(dataset).name] if dataset else []), *([f"K{K}"] if K else [])]
    kept = out / f"eval-{'-'.join(parts)}.json"
    if "--eval_draws" in flags and not hasattr(script.Config, "eval_draws"):
        raise RunError(f"{out} was made by {script.__name__}.py, which draws nothing for its "
                       "figures: drop --eval_draws")
    stamp = {"mtime_ns": (out / "checkpoint.pt").stat().st_mtime_ns, "flags": [*flags, *extra],
             "dataset": dataset}
    if kept.exists():
        result = json.loads(kept.read_text())
        if result.pop("of") == stamp:
            return result
    result = common.score(script, str(out), ["--split", split, *flags], dataset)
    if rank() > 0:
        return result
    if "bleu" in result["figures"]:
        rows = read_samples(out / f"translations-{split}.jsonl")
        result["figures"] |= translation_figures(rows, extra)
    common.write_json(kept, {"of": stamp, **result})
    return result


def samples_need_K(script: ModuleType, out: Path) -> bool:
    """Whether K is of samples too (CADD), or of likelihoods alone (VADD). Raises RunError for a
    method without."""
    fields = {f.name: f.metadata.get("group") for f in dataclasses.fields(script.Config)}
    if not fields.keys() >= {"K", "sample_steps"}:  # Difformer's K are its steps
        raise RunError(f"{out} was made by {script.__name__}.py: --K is for cadd.py and vadd.py")
    return fields["K"] == "sampling"


def draw_sweep(out: Path, steps: Sequence[int], flags: list[str], K: int = 0) -> dict[int, Path]:
    """Draw a run's texts, or translate its split, in each number of steps: files in
    RUN/steps-T[-KK]. Ranks share the numbers. Raises RunError for what is not drawn in steps."""
    script = script_of(out)
    key = "sample_steps" if hasattr(script.Config, "sample_steps") else "K"
    if not hasattr(script.Config, key):
        raise RunError(f"{out} was made by {script.__name__}.py, which has no number of steps: "
                       "drop --steps")
    cfg, ddp, model, data, _ = common.open_run(script, str(out), ["--mode", "sample", *flags])
    pairs = isinstance(data, PairData)
    if not pairs and (data.unit == "bin" or data.shape):
        raise RunError(f"{out} draws no texts: drop --steps")
    # NCCL's barrier waits ten minutes, and a rank may be hours ahead of another
    others = ddp.world > 1 and dist.new_group(backend="gloo", timeout=timedelta(days=30))
    files, limit = {}, cfg.samples if "--samples" in flags else 0
    for number, T in enumerate(steps):
        folder = out / (f"steps-{T}-K{K}" if K else f"steps-{T}")
        files[T] = folder / (f"translations-{cfg.split}.jsonl" if pairs else "samples.jsonl")
        if number % ddp.world != ddp.rank:
            continue
        folder.mkdir(exist_ok=True)
        own = dataclasses.replace(cfg, **{key: T}, out=str(folder), eval_sequences=limit)
        if pairs:
            translate_split(script.translate, model, own, data, ddp)
        else:
            with contextlib.redirect_stdout(io.StringIO()):  # the texts
                script.draw(model, own, data, ddp)
    if others:
        dist.barrier(others)
    return files


def rank() -> int:
    """Of torchrun; 0 without."""
    return int(os.environ.get("RANK", 0))


def figure_columns(figures: dict[str, dict]) -> dict[str, str]:
    """Figures as columns of the table of runs."""
    row = {}
    for figure, f in figures.items():
        text = f"{f['value']:.4f}" + (f" ± {f['stderr']:.4f}" if "stderr" in f else "")
        text += f" ± {f['ci95']:.2f} (95%)" if "ci95" in f else ""
        text += f" (ppl {f['perplexity']:.2f})" if "perplexity" in f else ""
        text += "" if f.get("is_bound", True) else " (no bound)"
        text += "" if f.get("meaningful", True) else " (not yet meaningful)"
        row[f"{figure}, {f['unit']}"] = text
    return row


def table(rows: list[dict]) -> str:
    """Markdown table; columns that no row fills are left out."""
    names = dict.fromkeys(k for row in rows for k, v in row.items() if v not in (None, ""))
    lines = ["| " + " | ".join(names) + " |", "|" + "-|" * len(names)]
    lines += ["| " + " | ".join(str(row.get(k) or "") for k in names) + " |" for row in rows]
    return "\n".join(lines)


# Flags of the commands that open checkpoints, and of those that draw pictures
SPLIT = dict(default="valid", choices=("train", "valid", "test"))
OPENS_RUNS, DRAWS_RUNS = (argparse.ArgumentParser(add_help=False) for _ in range(2))
OPENS_RUNS.add_argument("--data_dir", default="data", help="where datasets are")
OPENS_RUNS.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
DRAWS_RUNS.add_argument("runs", nargs="+", type=Path, help="run folders")
DRAWS_RUNS.add_argument("--out", type=Path, help="where pictures go (default: the first run)")


def curves_main(argv: list[str]) -> None:
    """`eval.py curves`: the last values as a table, all in curves.png."""
    parser = common.Parser("eval.py curves", parents=[DRAWS_RUNS], allow_abbrev=False,
                           description="Loss and bounds over steps from log.jsonl.")
    args = parser.parse_args(argv)
    results = {name: read_curves(run) for name, run in names_of(args.runs).items()}
    print(table([{"run": run, "steps": f"{max(max(c) for c in curves.values()):,}"} | {
        key: f"{list(curve.values())[-1]:.4f}" for key, curve in curves.items()}
        for run, curves in results.items()]))
    if matplotlib_found():
        keys = dict.fromkeys(key for curves in results.values() for key in curves)
        panels = [({run: (list(curves[key]), list(curves[key].values()))
                    for run, curves in results.items() if key in curves},
                   dict(title=key, xlabel="step")) for key in keys]
        folder = args.out or args.runs[0]
        folder.mkdir(parents=True, exist_ok=True)
        draw_lines(folder / "curves.png", panels, results)
        print(folder / "curves.png")


def collapse_main(argv: list[str]) -> None:
    """`eval.py collapse`: a table, collapse.json and two pictures."""
    parser = common.Parser(
        "eval.py collapse", parents=[OPENS_RUNS, DRAWS_RUNS], allow_abbrev=False,
        description="Have the learned embeddings of CATDM, CADD or Difformer runs collapsed?")
    parser.add_argument("--split", **SPLIT)
    args = parser.parse_args(argv)
    flags = ["--split", args.split, "--data_dir", args.data_dir, "--device", args.device]
    results, rows = {}, []
    for name, run in names_of(args.runs).items():
        script = script_of(run)
        if not hasattr(script, "probe"):
            raise RunError(f"{run}: {script.__name__} learns no embeddings that are diffused")
        cfg, ddp, model, data, _ = common.open_run(script, str(run), flags)
        results[name] = collapse(PROBE_TIMES, script.probe(model, cfg, data, ddp, PROBE_TIMES))
        rows.append({"run": name, "method": script.name_of(cfg)}
                    | collapse_columns(results[name]["figures"]))
    print(table(rows))
    folder = args.out or args.runs[0]
    folder.mkdir(parents=True, exist_ok=True)
    common.write_json(folder / "collapse.json",
                      {run: {"figures": result["figures"]} | {
                          k: result["curves"][k].tolist() for k in ("times", "ce", "dgs", "axes")}
                       for run, result in results.items()})
    if matplotlib_found():
        for path in draw_collapse(results, folder):
            print(path)


# Flags of --steps
DRAWING = {"samples": int, "top_p": float, "temperature": float, "length_beam": int,
           "noise_beam": int}


def numbers(text: str) -> tuple[int, ...]:
    """"8,16" -> (8, 16)."""
    found = tuple(map(int, text.split(",")))
    if min(found) < 1:
        raise ValueError
    return found


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["collapse"]:
        return collapse_main(argv[1:])
    if argv[:1] == ["images"]:
        return images_main(argv[1:])
    if argv[:1] == ["curves"]:
        return curves_main(argv[1:])
    parser = common.Parser("eval.py", parents=[OPENS_RUNS], allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter,
                           description=__doc__)
    parser.add_argument("--split", **SPLIT)
    parser.add_argument("paths", nargs="+", help="run folders, or files of samples")
    parser.add_argument("--dataset", help="another set, of the same vocabulary, to score runs on; "
                        "for files of samples whose words to compare with")
    parser.add_argument("--metrics", nargs="+", default=[], choices=[*EXTRA, "mauve"],
                        help="also these")
    parser.add_argument("--steps", type=numbers, metavar="8,16,...", default=(), help="draw and "
                        "score texts or translations in each of these numbers of steps (Difformer: "
                        "its K of T); steps.png has the curves")
    parser.add_argument("--K", type=numbers, metavar="1,4,...", default=(0,), help="score with "
                        "each of these numbers of latent chains (CADD) or draws of z per "
                        "likelihood (VADD; default: the run's)")
    for name, kind in DRAWING.items():
        parser.add_argument(f"--{name}", type=kind, help="with --steps (default: the run's; of "
                            "translations, the split)" if name == "samples" else "with --steps")
    parser.add_argument("--judge", nargs="?", const="gpt2-large", metavar="MODEL", help="also "
                        "generative perplexity by this Hugging Face model or folder, or a run of "
                        "results/ar_baseline.py (without a name: gpt2-large)")
    parser.add_argument("--eval_draws", type=int, help="draws per sequence (default: the run's)")
    args = parser.parse_args(argv)

    def given(*names: str) -> list[str]:
        return [word for name in names if (value := getattr(args, name)) is not None
                for word in (f"--{name}", str(value))]

    drawing, extra = given(*DRAWING), [name for name in args.metrics if name in EXTRA]
    if drawing and not args.steps:
        raise RunError(f"{drawing[0]} says how --steps draws: give --steps too")
    scoring = dict(judge=args.judge and Judge(args.judge, args.device),
                   mauve_split=args.split if "mauve" in args.metrics else None)
    rows, sets, toys, curves = [], {}, {}, {}

    def columns_of(file: Path, dataset: str | None, length: int | None = None) -> dict[str, str]:
        drawn = read_samples(file)
        if "reference" in drawn[0]:
            return how_drawn(drawn) | figure_columns(translation_figures(drawn, extra))
        if not dataset:
            raise RunError(f"{file}: say --dataset, whose text the words are compared with")
        if (dataset, length) not in sets:
            sets[dataset, length] = load_dataset(dataset, args.data_dir, length)
        columns = sample_columns(drawn, sets[dataset, length], **scoring)
        few = ": too few, draw 64 or more" if len(drawn) < 64 else ""
        return columns | {"samples": columns["samples"] + few}

    for name in args.paths:  # what is missing is said before the first is drawn and scored
        if not Path(name).exists():
            raise RunError(f"{name} does not exist: give a run folder or a file of samples")
        Path(name).is_dir() and script_of(Path(name))
    for name in args.metrics:
        needed(*PACKAGES[name])
    for name, K in itertools.product(args.paths, args.K):
        path, row = Path(name), {"run": f"{name}, K = {K}" if K else name}
        rows.append(row)
        if not path.is_dir():
            row |= {} if rank() else columns_of(path, args.dataset)
            continue
        script, chains = script_of(path), ["--K", str(K)] if K else []
        steps = args.steps if not K or samples_need_K(script, path) or K == args.K[0] else ()
        if steps:  # a mistake there should not cost the scoring
            common.parse_config(script, ["--mode", "sample", "--out", name, *drawing])
        result = score_run(path, args.split, given("data_dir", "device", "eval_draws") + chains,
                           extra, args.dataset, K)
        dataset, length = result["dataset"], result["length"]
        row |= {"method": result["method"], "data": f"{dataset}/{result['split']}",
                "steps": f"{result['step']:,}"} | figure_columns(result["figures"])
        drawn = draw_sweep(path, steps, given("data_dir", "device", "split") + drawing + chains, K
                           ) if steps else {}
        if rank():
            continue
        if not args.steps and (path / "samples.jsonl").exists():
            row |= columns_of(path / "samples.jsonl", dataset, length)
        for T, file in drawn.items():
            columns = columns_of(file, dataset, length)
            rows.append({"run": f"{row['run']}, {T} steps"} | columns)
            for metric in columns.keys() - set(HOW):
                x, y = curves.setdefault(metric, {}).setdefault(row["run"], ([], []))
                x.append(float(columns["nfe"]))
                y.append(float(columns[metric].split()[0].rstrip("%")))
        if (path / "histograms.npz").exists():
            with np.load(path / "histograms.npz") as file:
                own = {int(T): file[T].astype(np.float64) for T in file.files}
            toys[dataset], _ = toy_rows(load_dataset(dataset), own, name, TOY_POINTS)
            row |= toy_columns(toys[dataset].pop(name))
    if rank():
        return
    for (dataset, _), data in sets.items():
        columns = sample_columns(real_texts(data, args.split, 256), data, scoring["judge"])
        rows.append({"run": f"data: {dataset}/{args.split}"} | columns)
    for dataset, toy in toys.items():
        rows += [{"run": f"{row}: {dataset}"} | toy_columns(values) for row, values in toy.items()]
    print(table(rows))
    if curves and matplotlib_found():
        file = Path(args.paths[0]) / "steps.png"
        panels = [(lines, dict(title=metric, xlabel="network calls", xscale="log"))
                  for metric, lines in sorted(curves.items())]
        draw_lines(file, panels, [row["run"] for row in rows])
        print(file)


if __name__ == "__main__":
    common.run_main(main)
