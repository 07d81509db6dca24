"""Difformer: diffusion on word embeddings that translates, and how much noise that takes.

    python difformer.py                                     CPU, 3 minutes, nothing to download
    python difformer.py --mode sample --source "neunundneunzig" --show_steps
    python difformer.py --mode dgs --schedule sqrt          the noise it takes
    python difformer.py --dataset multi30k                  one GPU
    torchrun --nproc_per_node 8 difformer.py --dataset wmt14    eight GPUs, the paper's main run
    python difformer.py --train a.de a.en --valid b.de b.en     your own pairs of sentences

A sentence's embeddings get Gaussian noise; a decoder that sees the source sentence learns to take
it out. Equation numbers are the paper's ("Empowering Diffusion Models on the Embedding Space for
Text Generation", Difformer).

  schedule     alpha-bar, and F times more noise     Eq. 3, 8       Noise
  degeneration how easy the noise is to see through  Algorithm 1, 2 dgs, search_factor
  loss         squared error + anchor + length       Eq. 1, 2       Difformer.forward
  sampler      K of the T steps, stopped early       section 3.3    denoise
  decoding     several lengths x several noises      section 3.3    translate

Time runs from t = 0 (clean) to t = 1 (noise), in T = 2000 steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
from common import RunError, arg
from data import PAD, PAIR_SETS, PairData, choose, load_pairs, read_lines, score_translations

# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config(common.RunConfig):
    mode: str = arg("train", "what to do; sample translates, dgs searches F",
                    choices=("train", "sample", "eval", "bench", "dgs"))
    dataset: str = arg("numbers", "pairs of sentences; files: those of --train",
                       choices=("numbers", *PAIR_SETS, "files"), fixed=True)
    train: tuple = arg((), "two files, line i of one translates line i of the other", fixed=True)
    valid: tuple = arg((), "the same for validation; none: held out of --train", fixed=True)
    test: tuple = arg((), "the same for testing; none: the valid pairs", fixed=True)
    distilled: str = arg("", "file whose line i replaces training target i", fixed=True)
    lower: bool = arg(False, "lower-case both sides", fixed=True)
    max_number: int = arg(9999, "numbers: the largest", 20, 999_999, fixed=True)
    max_length: int = arg(256, "most tokens of a sentence", 4, 4096, fixed=True)
    vocab: int = arg(10_000, "tokens of the joint byte-pair encoding", 260, 10**6, fixed=True)
    # Noise
    T: int = arg(2000, "diffusion steps", 2, 10**6, fixed=True)
    schedule: str = arg("sqrt", "noise schedule", choices=("linear", "cosine", "sqrt"), fixed=True)
    dgs_max: float = arg(0.15, "degeneration score that the noise may leave", 0.001, 1, fixed=True)
    factor: float = arg(0.0, "rescaling factor F; 0: search it for dgs_max, 1: no rescaling",
                        0, 1e4, fixed=True)
    rescaling: str = arg("plain", "plain (Eq. 3, in training only) or vp (Eq. 8)",
                         choices=("plain", "vp"), fixed=True)
    # Loss
    loss: str = arg("anchor", "beside the squared error: anchor, rounding or none (Table 1)",
                    choices=("anchor", "rounding", "none"), fixed=True)
    embeddings: str = arg("", "frozen embeddings z_0: a .npy file of shape (V, embed_dim) (C.3)",
                          fixed=True)
    smoothing: float = arg(0.1, "label smoothing", 0, 0.99, fixed=True)
    length_weight: float = arg(0.1, "weight of the length loss", 0, 1e6, fixed=True)
    # Network: transformer-base (Table 21)
    embed_dim: int = arg(128, "width of embeddings, where the diffusion is", 2, 65536, fixed=True)
    dim: int = arg(512, "width of the transformer", 8, 65536, fixed=True)
    ffn: int = arg(2048, "width of its MLPs", 8, 10**6, fixed=True)
    depth: int = arg(6, "layers of encoder and decoder each", 1, 1000, fixed=True)
    heads: int = arg(8, "attention heads", 1, 1000, fixed=True)
    dropout: float = arg(0.1, "dropout", 0, 0.99, fixed=True)
    # The paper's code starts everything at .02, as BERT; narrow networks do not train from there.
    init_std: float = arg(0.02, "initial linear weights; 0: fan-in^-1/2", 0, 10, fixed=True)
    embed_std: float = arg(0.02, "initial embeddings and positions", 1e-6, 10, fixed=True)
    # Optimisation (Table 21)
    steps: int = arg(300_000, "training steps", 1, 10**9)
    batch_tokens: int = arg(65_536, "tokens per step over all devices, counting each pair's "
                            "longer side with its padding", 1, 10**9, fixed=True)
    micro_tokens: int = arg(32_768, "most tokens one device takes at once", 1, 10**9)
    lr: float = arg(5e-4, "learning rate", 0, 10, fixed=True)
    lr_schedule: str = arg("inverse_sqrt", "after warm-up",
                           choices=("inverse_sqrt", "constant", "cosine"), fixed=True)
    warmup: int = arg(10_000, "warm-up steps", 0, 10**9, fixed=True)
    beta2: float = arg(0.98, "AdamW beta2 (beta1 is .9)", 0, 0.999999, fixed=True)
    weight_decay: float = arg(0.01, "AdamW weight decay", 0, 10, fixed=True)
    clip: float = arg(1.0, "gradient norm", 1e-6, 1e6, fixed=True)
    # Paper: none, but the average of the five best checkpoints. An EMA averages without choosing.
    ema: float = arg(0.999, "EMA decay", 0, 1, fixed=True)
    # Decoding
    K: int = arg(20, "decoding steps of the T", 1, 10**6)
    early_stop: int = arg(5, "the last so many of the K steps are left out", 0, 10**6)
    length_beam: int = arg(3, "b1: lengths tried, around the predicted one", 1, 256)
    noise_beam: int = arg(3, "b2: noises tried for each length", 1, 10**4)
    length: int = arg(0, "tokens of the output; 0: as many as the length head predicts", 0, 4096)
    clamp: bool = arg(False, "round z0-hat to the nearest embedding at each step")
    sample_batch: int = arg(64, "sentences decoded at once (times the beams)", 1, 10**6)
    source: str = arg("", "translate this text, or each line of this file")
    samples: int = arg(4, "without --source: how many sentences of the split to translate",
                       1, 10**7)
    show_steps: bool = arg(False, "show the first candidate's intermediate translations")
    # Evaluation
    split: str = arg("valid", "split to evaluate", choices=("train", "valid", "test"))
    eval_sequences: int = arg(0, "sentences to evaluate; 0: the whole split", 0, 10**9)
    save: str = arg("", "file for the figures of --mode eval (default: eval.json in the run)")
    bench_steps: int = arg(20, "timed steps of --mode bench", 1, 10**6)


_IWSLT = dict(ffn=1024, heads=4, dropout=0.3, batch_tokens=8192)  # transformer-iwslt-de-en
_WIDE = dict(dim=768, ffn=3072, heads=12)  # as DiffuSeq
PRESETS: dict[str, dict] = {  # Table 21, but for the first two
    # two CPU cores, under four minutes
    "numbers": dict(vocab=400, max_length=32, embed_dim=64, dim=128, ffn=256, depth=2, heads=4,
                    dropout=0.0, init_std=0.0, embed_std=0.1, batch_tokens=1024, steps=2000,
                    lr=1e-3, warmup=200, lr_schedule="cosine", ema=0.99, log_every=50,
                    save_every=500),
    # some minutes of one H200; embeddings start at 128^-.5, so that z_0's deviation is 1, which the
    # search for F assumes
    "multi30k": dict(_IWSLT, lower=True, max_length=128, embed_std=0.0884, steps=15_000,
                     warmup=1000, lr_schedule="cosine", sample_batch=500),
    "iwslt14": dict(_IWSLT, lower=True),
    "wmt14": dict(vocab=40_000),
    "wmt16": dict(vocab=40_000),
    "gigaword": dict(vocab=30_000),
    "qqp": dict(_WIDE, steps=50_000, batch_tokens=8192),
    "wiki_auto": dict(_WIDE, steps=30_000),
    "quasar_t": dict(_WIDE, steps=100_000, dgs_max=0.2, lr=3e-4, warmup=5000),
    "files": dict(_IWSLT),
}

# ---------------------------------------------------------------------------------------------
# Noise schedule and its rescaling
# ---------------------------------------------------------------------------------------------


def alpha_bar(t: np.ndarray, schedule: str) -> np.ndarray:
    """The share of signal at t in [0, 1], before it is cut into steps; same shape as t."""
    if schedule == "linear":  # Ho et al. 2020, in continuous time
        return np.exp(-9.95 * t**2 - 0.1 * t)
    if schedule == "cosine":  # Nichol and Dhariwal 2021
        return np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return 1 - np.sqrt(t + 1e-4)  # Diffusion-LM; a little below 0 at t = 1: see the cap below


class Noise(nn.Module):
    """T steps of z_t = signal_t z_0 + sigma_t eps; in training sigma_t is `factor` times larger.

    signal (T,) is sqrt(alpha-bar), sigma (T,) sqrt(1 - alpha-bar), both float64. `factor` is F of
    Eq. 3; it is 1 in the variance-preserving variant, whose F is in alpha-bar.
    """

    def __init__(self, schedule: str, factor: float, rescaling: str, T: int):
        """The paper leaves the steps open; these are the authors': beta_i is one minus the ratio
        of alpha-bar at (i+1)/T and i/T, at most .999, and alpha-bar_i the product of 1 - beta."""
        super().__init__()
        bar = alpha_bar(np.arange(T + 1) / T, schedule)                    # (T + 1,)
        if rescaling == "vp":
            # Eq. 8; SNR / F^2, so it is CATDM's shift of the log-SNR by s = -2 ln F.
            bar = bar / (factor**2 - (factor**2 - 1) * bar)
        beta = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
        bar = torch.from_numpy(np.cumprod(1 - beta))
        self.register_buffer("signal", bar.sqrt(), persistent=False)
        self.register_buffer("sigma", (1 - bar).sqrt(), persistent=False)
        self.factor = factor if rescaling == "plain" else 1.0

    def at(self, index: Tensor, train: bool = False) -> tuple[Tensor, Tensor]:
        """(signal, sigma) (...) at step indices (...) of 0..T-1; index -1 is clean data: (1, 0).

        Eq. 3's F applies in training alone (C.7: in sampling it costs a point of BLEU).
        """
        clean, scale = index < 0, self.factor if train else 1.0
        return (torch.where(clean, 1.0, self.signal[index]),
                torch.where(clean, 0.0, scale * self.sigma[index]))

# ---------------------------------------------------------------------------------------------
# Degeneration: how often the nearest embedding to z_t is the right one
# ---------------------------------------------------------------------------------------------

GRID = 49  # time steps that DGS averages over; the published factors depend on so coarse a grid


def grid(T: int, points: int = GRID) -> Tensor:
    """Equally spaced step indices of 0..T-1 with both ends, 0 included: (points,)."""
    return torch.linspace(0, T - 1, points, dtype=torch.float64).round().long()


@torch.no_grad()
def dgs_monte_carlo(
    signal: Tensor, sigma: Tensor, table: Tensor, draws: int = 1, tokens: int = 1000, seed: int = 0
) -> Tensor:
    """Algorithm 2 on given embeddings (V, d): DGS_t at each signal, sigma (n,) -> (n,).

    The degenerate model (Definition 1) takes the y with the least |z_t - e_y|^2 / d - log softmax(
    z_t E^T)_y. Only `tokens` of the V serve as z_0, all are candidates.
    Paper: Definition 1 has |.|^2; the loss in use is a mean over dimensions, hence 1/d. Nearest
    in L2 alone would give .45/.75/.74 for Table 2's .47/.77/.77.
    """
    V, d = table.shape
    rng = torch.Generator().manual_seed(seed)
    hits = []
    for a, s in zip(signal.float(), sigma.float()):
        y = torch.randperm(V, generator=rng)[:tokens].repeat(draws)        # (n,)
        z = a * table[y] + s * torch.randn(len(y), d, generator=rng)       # (n, d)
        loss = table.square().sum(-1) / d - (1 + 2 / d) * z @ table.T      # (n, V), up to f(z)
        hits.append((loss.argmin(-1) == y).double().mean())
    return torch.stack(hits)


def dgs_at(signal: Tensor, sigma: Tensor, V: int, d: int, draws: int = 4096) -> Tensor:
    """DGS_t for V embeddings from N(0, I_d), the V - 1 wrong ones integrated out: (n,) -> (n,).

    Given z, a wrong e ~ N(0, I) scores c |z| u - (u^2 + X) / d, with c = 1 + 2/d, u standard normal
    along z and X chi-squared over the other d - 1 directions; the right one scores S. So DGS_t is
    E P(wrong < S)^(V-1). The expectation over z_0 and noise is taken with the same draws
    for every t and F, which makes it a smooth function of both.
    """
    rng = np.random.default_rng(0)
    norm2 = torch.from_numpy(rng.chisquare(d, draws))                      # |z_0|^2, (m,)
    along = torch.from_numpy(rng.standard_normal(draws))                   # noise along z_0
    across = torch.from_numpy(rng.chisquare(d - 1, draws))                 # noise^2 across it
    # The chi-squared X at 4 quantiles, Wilson and Hilferty's approximation.
    q = torch.special.ndtri((torch.arange(4, dtype=torch.float64) + 0.5) / 4)
    X = (d - 1) * (1 - 2 / (9 * (d - 1)) + q * (2 / (9 * (d - 1))) ** 0.5) ** 3
    a, s = signal.double()[:, None], sigma.double()[:, None]               # (n, 1)
    length = ((a * norm2.sqrt() + s * along) ** 2 + s**2 * across).sqrt()  # |z|, (n, m)
    c = 1 + 2 / d
    S = c * (a * norm2 + s * along * norm2.sqrt()) - norm2 / d
    # A wrong one wins if c |z| u - u^2 / d > S + X / d =: R: if u lies between the two roots.
    p = torch.zeros_like(S)
    for x in X:
        root = (c * length) ** 2 - 4 * (S + x / d) / d
        low = (c * length - root.clamp_min(0).sqrt()) * d / 2
        p += torch.special.ndtr(-low) * (root > 0) / len(X)                # the upper is far off
    return ((V - 1) * torch.log1p(-p.clamp_max(1 - 1e-12))).exp().mean(-1)


def dgs(noise: Noise, V: int, d: int, dense: bool = False) -> float:
    """Definition 2: DGS_t averaged over time, under the training noise; `dense`: over the middle
    of every 8 steps, for the time average itself."""
    T = len(noise.sigma)
    index = torch.arange(T // 500, T, max(1, T // 250)) if dense else grid(T)
    return dgs_at(*noise.at(index, train=True), V, d).mean().item()


def search_factor(
    schedule: str, dgs_max: float, V: int, d: int, rescaling: str = "plain", T: int = 2000,
    dense: bool = False,
) -> float:
    """Algorithm 1: the least F >= 1 whose DGS is at most dgs_max, by bisection.

    Paper: Algorithm 1 walks in steps of .5 and returns the first F below, which rounds up; Table
    19 has the *nearest* multiple of .5. Round the result for the table's figures.
    """
    def score(factor: float) -> float:
        return dgs(Noise(schedule, factor, rescaling, T), V, d, dense)

    low = high = 1.0
    while score(high) > dgs_max:
        low, high = high, 2 * high
        if high > 1e4:
            raise RunError(f"no factor brings DGS to {dgs_max}: raise --dgs_max")
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (middle, high) if score(middle) > dgs_max else (low, middle)
    return high


def anisotropy(table: Tensor) -> float:
    """ANI (3.1): mean cosine of two different embeddings of (V, d); 1 is a collapsed space."""
    unit = F.normalize(table.double(), dim=-1)
    V = len(unit)
    return ((unit.sum(0).square().sum() - V) / (V * (V - 1))).item()

# ---------------------------------------------------------------------------------------------
# Model and loss
# ---------------------------------------------------------------------------------------------


class Difformer(nn.Module):
    """z0hat(z_t, x, t): an encoder reads x, a decoder denoises z_t; the loss is its forward.

    V tokens, e = embed_dim, d = dim. One matrix E (V, e) embeds source and target and gives the
    output's logits; z_0 = sqrt(e) E[y], as E starts at standard deviation .02.
    """

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        self.cfg, self.V, self.compiled = cfg, vocab_size, ()
        self.net = common.EncoderDecoder(
            cfg.embed_dim, cfg.dim, cfg.ffn, cfg.depth, cfg.heads, cfg.dropout, cfg.max_length,
            init_std=cfg.init_std, place_std=cfg.embed_std)
        self.embed = nn.Embedding(vocab_size, cfg.embed_dim)
        nn.init.normal_(self.embed.weight, std=cfg.embed_std)
        if cfg.embeddings:
            self.freeze(np.load(cfg.embeddings))
        self.factor = cfg.factor or round(2 * search_factor(
            cfg.schedule, cfg.dgs_max, vocab_size, cfg.embed_dim, cfg.rescaling, cfg.T)) / 2
        self.noise = Noise(cfg.schedule, self.factor, cfg.rescaling, cfg.T)

    def freeze(self, rows: np.ndarray) -> None:
        """Use `rows` (V, e) as z_0 and never train them."""
        if rows.shape != self.embed.weight.shape:
            raise RunError(f"--embeddings {self.cfg.embeddings} has shape {rows.shape}, this model "
                           f"needs {tuple(self.embed.weight.shape)}")
        with torch.no_grad():
            self.embed.weight.copy_(torch.from_numpy(rows) / self.cfg.embed_dim**0.5)
        self.embed.weight.requires_grad_(False)

    def compile_training(self) -> None:
        """Compile the parts of the loss, each once for all shapes: sentences come in many lengths.
        Decoding stays as it is: its few large calls gain less than the compiler takes."""
        self.compiled = tuple(torch.compile(part, dynamic=True)
                              for part in (self.encode, self.denoise, self.losses))

    def z0(self, y: Tensor) -> Tensor:
        """Embeddings (..., e) of token ids (...)."""
        return self.embed(y) * self.cfg.embed_dim**0.5

    def logits(self, z: Tensor) -> Tensor:
        """p(y | z), the rounding step: (..., e) -> (..., V), in float32: bfloat16 cannot tell the
        largest two logits apart, and a product over e = 128 dimensions costs little."""
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(z.float(), self.embed.weight)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Source ids (B, M) -> states (B, M, d), which are no padding (B, M), length logits."""
        real = x != PAD
        memory, length_logits = self.net.encode(self.z0(x), real)
        return memory, real, length_logits

    def denoise(self, z_t: Tensor, index: Tensor, previous: Tensor, real: Tensor, memory: Tensor,
                memory_real: Tensor) -> Tensor:
        """z0hat (B, N, e) from z_t (B, N, e), step indices (B,) and the previous z0hat.

        real (B, N) is False at padding; memory (B, M, d) are the encoder's states.
        """
        return self.net.decode(z_t, index / self.cfg.T, previous, real, memory, memory_real)

    def losses(self, z0_hat: Tensor, z0: Tensor, y: Tensor, length_logits: Tensor,
               source_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums over the batch: squared error and cross-entropy per token of y (B, N), how many
        tokens were right, length loss per sentence."""
        real = y != PAD
        # Eq. 1. Gradients reach the embeddings from both sides: that alone collapses them.
        square = ((z0_hat - z0).square().mean(-1) * real).sum()
        logits = self.logits(z0 if self.cfg.loss == "rounding" else z0_hat).flatten(0, 1)
        ce = F.cross_entropy(logits, y.flatten(), reduction="sum", ignore_index=PAD,
                             label_smoothing=self.cfg.smoothing)
        right = ((logits.argmax(-1) == y.flatten()) & real.flatten()).sum()
        length_loss = common.length_loss(length_logits, real.sum(1), source_lengths)
        return square, ce, right.float(), length_loss

    def forward(self, x: Tensor, y: Tensor, u: Tensor, eps: Tensor, twice: bool
                ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the batch: loss per token, length loss per sentence, statistics.

        x (B, M), y (B, N) ids, u (B,) uniform (it chooses t), eps (B, N, e) normal. `twice`:
        self-condition on a first estimate, which gets no gradient; else on zeros. Statistics (4,):
        squared error, cross-entropy, right tokens, length loss.
        """
        encode, denoise, losses = self.compiled or (self.encode, self.denoise, self.losses)
        memory, memory_real, length_logits = encode(x)
        index = (u * self.cfg.T).long()                                    # (B,) of 0..T-1
        z0, real = self.z0(y), y != PAD
        signal, sigma = (c.float()[:, None, None] for c in self.noise.at(index, train=True))
        z_t = signal * z0 + sigma * eps
        previous = torch.zeros_like(z_t)
        if twice:
            with torch.no_grad():
                previous = denoise(z_t, index, previous, real, memory, memory_real)
        z0_hat = denoise(z_t, index, previous, real, memory, memory_real)
        square, ce, right, length_loss = losses(z0_hat, z0, y, length_logits, memory_real.sum(1))
        loss = square if self.cfg.loss == "none" else square + ce          # Eq. 2
        return loss, length_loss, torch.stack([square, ce, right, length_loss]).detach()

# ---------------------------------------------------------------------------------------------
# Sampler and decoding
# ---------------------------------------------------------------------------------------------


def kept_steps(T: int, K: int, early_stop: int) -> list[int]:
    """Indices of the K of T steps, from T - 1 down, without the last `early_stop` of them."""
    steps = [round(k * (T - 1) / (K - 1)) for k in range(K)] if K > 1 else [T - 1]
    return steps[::-1][: max(1, K - early_stop)]


@torch.no_grad()
def denoise(
    model: Difformer, memory: Tensor, memory_real: Tensor, real: Tensor, K: int, early_stop: int,
    clamp: bool = False, generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yields tokens (B, N), PAD where `real` (B, N) is False, after each network call.

    The next z is drawn from q(z_s | z_t, z0hat) of the schedule *without* F (C.7), noise at every
    step; the tokens are the argmax of z0hat's logits, never of z_t's.
    """
    steps = kept_steps(model.cfg.T, K, early_stop)
    shape, device = (*real.shape, model.cfg.embed_dim), real.device
    kept = torch.tensor(kept_steps(model.cfg.T, K, 0) + [-1], device=device)
    signal, sigma = model.noise.at(kept)
    z = torch.randn(shape, generator=generator, device=device)
    z0_hat = torch.zeros_like(z)
    for i in range(len(steps)):
        z0_hat = model.denoise(z, kept[i].expand(len(z)), z0_hat, real, memory, memory_real)
        tokens = model.logits(z0_hat).argmax(-1)
        yield torch.where(real, tokens, PAD)
        target = model.z0(tokens) if clamp else z0_hat
        mean, var = common.gaussian_posterior(z.double(), target.double(), signal[i], sigma[i],
                                              signal[i + 1], sigma[i + 1])
        z = (mean + var.sqrt() * torch.randn(shape, generator=generator, device=device)).float()


@torch.no_grad()
def translate(
    model: Difformer, sources: list[str], data: PairData, cfg: Config, place: common.Setup
) -> Iterator[dict]:
    """Yields one {"source", "text", "candidates"} per source, in order; an empty line stays empty.

    2D parallel decoding: length_beam x noise_beam candidates at once, the best by `choose`.
    Paper: the text takes the b1 most probable lengths; the authors' code, and we, the most
    probable one and its neighbours.
    """
    if cfg.length > cfg.max_length - 2 or cfg.K > cfg.T:
        raise RunError(f"--length is at most {cfg.max_length - 2} and --K at most {cfg.T} here")
    model.eval()
    generator = torch.Generator(place.device).manual_seed(common.mix(cfg.seed, 99))
    beams = cfg.length_beam * cfg.noise_beam
    for begin in range(0, len(sources), cfg.sample_batch):
        batch = sources[begin:begin + cfg.sample_batch]
        x = torch.from_numpy(data.rows(batch)).to(place.device)
        with place.autocast():
            memory, memory_real, length_logits = model.encode(x)
            if cfg.length:  # Table 18
                lengths = torch.full((len(batch) * beams,), cfg.length + 2, device=place.device)
            else:
                lengths = common.length_beam(length_logits, memory_real.sum(1), cfg.length_beam)
                lengths = lengths.repeat_interleave(cfg.noise_beam, 1).flatten()
            lengths = lengths.clamp(2, cfg.max_length)                     # (b * beams,)
            N = min(-(-int(lengths.max()) // 8) * 8, cfg.max_length)
            real = torch.arange(N, device=place.device) < lengths[:, None]
            memory, memory_real = (m.repeat_interleave(beams, 0) for m in (memory, memory_real))
            history = []
            for tokens in denoise(model, memory, memory_real, real, cfg.K, cfg.early_stop,
                                  cfg.clamp, generator):
                history = [*history, tokens] if cfg.show_steps else [tokens]
        final = tokens.view(len(batch), beams, -1).tolist()
        for i, text in enumerate(batch):
            candidates = [[t for t in c if t != PAD] for c in final[i]]
            n = choose(candidates)
            texts = [data.decode(c[1:]) if text.strip() else "" for c in candidates]
            row = dict(source=text, text=texts[n], candidates=texts)
            if cfg.show_steps:
                row["steps"] = [data.decode(h[i * beams + n].tolist()[1:]) for h in history]
            yield row


def evaluate(model: Difformer, cfg: Config, data: PairData, place) -> tuple[dict, list[dict]]:
    """Figures of the translations of cfg.split, and the translations, also in a file."""
    pairs, begin = data.pairs_of(cfg.split, cfg.eval_sequences or None), time.time()
    quiet = 0.2 if sys.stderr.isatty() else 10
    found = translate(model, [a for a, _ in pairs], data, cfg, place)
    rows = [row | {"reference": b} for row, (_, b) in zip(
        tqdm(found, "translate", len(pairs), leave=False, mininterval=quiet), pairs)]
    seconds = time.time() - begin
    model.train()
    with open(Path(cfg.out) / f"translations-{cfg.split}.jsonl", "w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    figures = score_translations(rows)
    figures["speed"] = dict(value=len(rows) / seconds, unit="sentences/s")
    figures["anisotropy"] = dict(value=anisotropy(model.embed.weight.detach()), unit="ANI")
    return figures, rows

# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def load(cfg: Config, state: dict | None = None) -> PairData:
    """The data set; with a checkpoint's state it must have the same tokens."""
    data = load_pairs(cfg.dataset, cfg.data_dir, cfg.max_length, cfg.vocab, cfg.max_number,
                      dict(train=cfg.train, valid=cfg.valid, test=cfg.test), cfg.lower,
                      cfg.distilled)
    if state and state["tokenizer"]["vocab"] != data.codec.vocab:
        raise RunError(f"the training text of {cfg.dataset} is not the one that {cfg.out} learned "
                       "its tokens from: restore it, or choose another --out")
    return data


def load_step(cfg: Config, data: PairData, step: int, place: common.Setup) -> tuple[list, int, int]:
    """This rank's micro-batches (x, y, u, eps, twice) of a step; how many pairs and target tokens
    all ranks have.

    Every rank makes the whole batch, with all its noise, and takes each world-th row, so the
    number of ranks changes nothing; a batch of 64K tokens costs it 33 MB of noise.
    """
    def load(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)  # the copy from pinned memory waits for nothing
        return tensor.pin_memory().to(place.device, non_blocking=True) if place.on_cuda else tensor

    x, y = data.train_batch(cfg.seed, step, cfg.batch_tokens)
    n, tokens = len(x), int((y != PAD).sum())
    rng = np.random.default_rng(common.mix(cfg.seed, step, 1))
    # Paper: self-conditioning with probability one half; the authors' code decides per batch.
    twice, u = bool(rng.random() < 0.5), rng.random(n, np.float32)
    generator = torch.Generator(place.device).manual_seed(common.mix(cfg.seed, step, 2))
    eps = torch.randn(*y.shape, cfg.embed_dim, generator=generator, device=place.device)
    parts = min(max(1, n // place.world),
                math.ceil(n * max(x.shape[1], y.shape[1]) / (cfg.micro_tokens * place.world)))
    rows = [slice(k * place.world + place.rank, None, parts * place.world) for k in range(parts)]
    return [(load(x[r]), load(y[r]), load(u[r]), eps[r], twice) for r in rows], n, tokens


def train_step(net, model: Difformer, optimizer, ema, cfg: Config, step: int, batches: list,
               pairs: int, tokens: int, place: common.Setup) -> Tensor:
    """One optimizer step on this rank's micro-batches; returns (4,) statistics, no host sync."""
    for group in optimizer.param_groups:
        group["lr"] = common.learning_rate(step, cfg.lr, cfg.warmup, cfg.lr_schedule, cfg.steps)
    stats = torch.zeros(4, device=place.device)
    for k, batch in enumerate(batches):
        last = k == len(batches) - 1
        with contextlib.nullcontext() if last or place.world == 1 else net.no_sync():
            with place.autocast():
                loss, length_loss, part = net(*batch)
            # `pairs` and `tokens` are the global batch's; DDP averages gradients, hence `world`.
            loss = loss / tokens + cfg.length_weight * length_loss / pairs
            (loss * place.world).backward()
        stats += part
    nn.utils.clip_grad_norm_(model.parameters(), cfg.clip, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ema.update()
    return stats


def build(cfg: Config, vocab_size: int, place: common.Setup):
    """Model, what to call in training (compiled, DDP), optimizer and EMA."""
    model = Difformer(cfg, vocab_size).to(place.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, cfg.lr, betas=(0.9, cfg.beta2), eps=1e-8,
                                  weight_decay=cfg.weight_decay, fused=True)
    net = model
    if cfg.compile and place.on_cuda:
        model.compile_training()
        # The first call decides which sizes vary on their own: those that are equal in it would
        # be taken for one and compiled again when they differ, so it is not a real batch.
        M, N = (min(k, cfg.max_length) for k in (24, 16))
        n = max(2, min(cfg.batch_tokens, cfg.micro_tokens) // 24)
        x, y = (torch.ones(n, k, dtype=torch.long, device=place.device) for k in (M, N))
        with place.autocast():
            loss, *_ = model(x, y, x[:, 0] / 2, torch.zeros(n, N, cfg.embed_dim).to(x.device), True)
        loss.backward()
        optimizer.zero_grad(set_to_none=True)
    if place.world > 1:
        devices = [place.device.index] if place.on_cuda else None
        net = DistributedDataParallel(net, device_ids=devices)
    return model, net, optimizer, common.EMA(model, cfg.ema)


def flops_per_pair(model: Difformer, M: int, N: int) -> float:
    """Model FLOPs of a training step for one pair of M and N tokens; the first estimate of
    self-conditioning is a decoder's forward pass every other time, a sixth of its cost."""
    encoder, decoder = model.net.flops(M, N)
    return encoder + decoder * 7 / 6 + 6.0 * N * model.embed.weight.numel()


def train(cfg: Config, place: common.Setup) -> None:
    out, checkpoint = Path(cfg.out), Path(cfg.out) / "checkpoint.pt"
    state = None
    if resumed := checkpoint.exists() and not cfg.overwrite:
        state = common.read_checkpoint(checkpoint, "difformer", place.device)
        common.check_same_run(state["config"], dataclasses.asdict(cfg), Config)
    data = load(cfg, state)
    if min(cfg.batch_tokens // max(data.longest), data.pairs) < place.world:
        raise RunError(f"--batch_tokens {cfg.batch_tokens} or {data.pairs} pairs are too few for "
                       f"{place.world} processes with sentences of {max(data.longest)} tokens")
    model, net, optimizer, ema = build(cfg, data.vocab_size, place)
    step, seconds = 0, 0.0
    if resumed:
        common.load_weights(model, state["model"], checkpoint)
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        step, seconds = state["step"], state["seconds"]
        common.restore_rng(state["rng"], place, step)
    else:
        torch.manual_seed(common.mix(cfg.seed, place.rank))  # dropout differs between ranks
    over = step >= cfg.steps or (cfg.minutes and seconds >= 60 * cfg.minutes)
    if over and (out / "result.json").exists():
        place.is_main and print(
            f"{out} is complete: {step} steps in {seconds / 60:.1f} minutes. To continue, give "
            f"more --steps{' or --minutes' if cfg.minutes else ''}; to start anew, --overwrite or "
            f"another --out; to translate: python difformer.py --mode sample --out {out}")
        return

    out.mkdir(parents=True, exist_ok=True)
    info = common.environment(place)
    parameters = sum(p.numel() for p in model.parameters())
    if place.is_main:
        print(f"{data.name}: {data.pairs:,} pairs, {data.vocab_size:,} tokens | F "
              f"{model.factor:g} | {parameters / 1e6:.1f}M parameters | {info['hardware']}")
        print(f"{'resuming at step ' + str(step) if resumed else 'training'} -> {out}"
              + (", once compiled: one to three minutes" if cfg.compile and place.on_cuda else ""))
    start = dict(method="difformer", argv=sys.argv[1:], config=dataclasses.asdict(cfg),
                 parameters=parameters, factor=model.factor, **info)
    progress = common.Progress(out, place, start, step, cfg.steps, keep=resumed)
    stop = common.StopRequest()

    def save() -> None:
        rng = common.rng_states(place)
        if place.is_main:
            common.write_checkpoint(checkpoint, dict(
                method="difformer", config=dataclasses.asdict(cfg), model=model.state_dict(),
                ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step,
                seconds=seconds, rng=rng, tokenizer=data.tokenizer()))

    stats, counts = torch.zeros(4, device=place.device), np.zeros(2)  # counts: pairs, tokens
    logged, clock, first, finished = step, time.time(), True, False
    while step < cfg.steps and not finished:
        batches, *sizes = load_step(cfg, data, step, place)
        stats += train_step(net, model, optimizer, ema, cfg, step, batches, *sizes, place)
        counts, step = counts + sizes, step + 1
        if first:  # compilation is not training time
            if place.on_cuda:
                torch.cuda.synchronize()
            clock, first, mark = time.time(), False, (counts[1], time.time())
        now = time.time()
        progress.advance(step)

        at_log = step % cfg.log_every == 0 or step == cfg.steps
        out_of_time = bool(cfg.minutes) and seconds + now - clock >= 60 * cfg.minutes
        # Several ranks must agree before they leave the loop: they ask each other when they log.
        finished = stop.asked or out_of_time
        if place.world > 1:
            finished = place.any(finished) if at_log else False
        if at_log or finished:
            square, ce, right, length_loss = place.sum(stats.clone()).tolist()
            pairs, tokens = counts
            if not math.isfinite(square + ce):
                progress.close()
                raise RunError(
                    f"the loss is {square + ce} between steps {logged} and {step}. "
                    + (f"{checkpoint} still holds an earlier, good state: " if checkpoint.exists()
                       else "Nothing was saved yet: ") + "try a lower --lr or --clip")
            now = time.time()
            rate = (tokens - mark[0]) / max(1e-9, now - mark[1])
            table = model.embed.weight.detach()
            record = dict(
                step=step, mse=square / tokens, cross_entropy=ce / tokens,
                accuracy=right / tokens, length_loss=length_loss / pairs,
                lr=optimizer.param_groups[0]["lr"], target_tokens_per_s=round(rate),
                # DGS takes z_0 to have standard deviation 1; it starts at .02 sqrt(embed_dim)
                embedding_std=round(model.z0(torch.arange(model.V, device=table.device))
                                    .std().item(), 4),
                anisotropy=round(anisotropy(table), 4), seconds=round(seconds + now - clock, 2))
            progress.log(record, dict(
                mse=f"{record['mse']:.3f}", ce=f"{record['cross_entropy']:.3f}",
                right=f"{record['accuracy']:.1%}", **{"tok/s": f"{rate:,.0f}"}))
            stats.zero_()
            counts, logged, mark = np.zeros(2), step, (0, time.time())
        if step % cfg.save_every == 0 or step == cfg.steps or finished:
            seconds, clock = seconds + time.time() - clock, time.time()
            if bool(torch.isfinite(stats).all()):
                save()
    progress.close()
    stop.restore()
    if stop.asked:
        place.is_main and print(f"stopped at step {step}, saved: the same command resumes")
        raise KeyboardInterrupt
    if place.is_main:  # translating is quick: one rank does it
        report(model, ema, cfg, data, place, step, seconds, info)


def report(model, ema, cfg: Config, data: PairData, place, step: int, seconds: float, info) -> None:
    """Translate with the averaged weights; print and write result.json."""
    with ema.swapped_in():
        figures, _ = evaluate(model, cfg, data, place)
        shown = dataclasses.replace(cfg, show_steps=True)
        sources = [a for a, _ in data.pairs_of(cfg.split, cfg.samples)]
        for row in translate(model, sources, data, shown, place):
            show(row)
    result = dict(method="difformer", dataset=cfg.dataset, split=cfg.split, step=step,
                  train_seconds=round(seconds, 1), figures=figures, factor=model.factor,
                  config=dataclasses.asdict(cfg), **info)
    print_figures(figures, cfg.split)
    common.write_json(Path(cfg.out) / "result.json", result)
    print(f"{Path(cfg.out) / 'result.json'}: {step} steps, {seconds / 60:.1f} minutes of training")


def print_figures(figures: dict[str, dict], split: str) -> None:
    for name, f in figures.items():
        error = f" ± {f['stderr']:.2f}" if "stderr" in f else ""
        print(f"{name:11s} {f['value']:.2f}{error} ({f['unit']}, {split})")

# ---------------------------------------------------------------------------------------------
# Modes: sample, eval, bench, dgs
# ---------------------------------------------------------------------------------------------


def show(row: dict) -> None:
    """A translation, with the distinct intermediate ones above it (Table 22)."""
    print(f"\n{row['source']}")
    steps = row.get("steps", [])
    for i, text in enumerate(steps):
        if i == 0 or text != steps[i - 1]:
            print(f"  call {i + 1:3d}  {text}")
    print(f"  ->        {row['text']}" if steps else f"  -> {row['text']}")


def load_run(cfg: Config, place: common.Setup) -> tuple[Difformer, PairData, int]:
    """A trained model with its averaged weights, its data (the tokenizer alone if that will
    do), its step."""
    checkpoint = Path(cfg.out) / "checkpoint.pt"
    state = common.read_checkpoint(checkpoint, "difformer", place.device)
    if cfg.mode == "sample" and cfg.source:
        data = PairData.from_tokenizer(state["tokenizer"])
    else:
        data = load(cfg, state)
    model = Difformer(cfg, data.vocab_size).to(place.device)
    common.load_weights(model, state["ema"]["params"], checkpoint)
    return model, data, state["step"]


def score(out: str, flags: list[str]) -> dict:
    """Figures of a run folder on the full split: what eval.py asks for."""
    flags = ["--mode", "eval", "--out", out, "--eval_sequences", "0", *flags]
    cfg, _ = common.parse_config(Config, "difformer", __doc__, PRESETS, flags)
    place = common.setup(cfg)
    model, data, step = load_run(cfg, place)
    return dict(method="difformer", dataset=cfg.dataset, split=cfg.split, step=step,
                length=cfg.max_length, figures=evaluate(model, cfg, data, place)[0])


PROBE_SENTENCES = 128


@torch.no_grad()
def probe(out: str, flags: list[str]) -> dict:
    """What `eval.py collapse` asks: how the embeddings of a run lie, and what is left to predict.

    embeddings (V, e) of the averaged weights as they enter the diffusion; at times (n,) the mean
    cross_entropy (n,) in nats per token of the split's first targets given z_t and the source,
    without self-conditioning or label smoothing, with the same noise at all times; signal (n,) and
    sigma (n,) of z_t = signal z_0 + sigma eps in training, F included.
    """
    flags = ["--mode", "eval", "--out", out, *flags]
    cfg, _ = common.parse_config(Config, "difformer", __doc__, PRESETS, flags)
    place = common.setup(cfg)
    model, data, _ = load_run(cfg, place)
    model.eval()
    sides = zip(*data.pairs_of(cfg.split, PROBE_SENTENCES))
    x, y = (torch.from_numpy(data.rows(side)).to(place.device) for side in sides)
    generator = torch.Generator(place.device).manual_seed(common.mix(cfg.seed, 78))
    z0, real = model.z0(y), y != PAD
    eps = torch.randn(z0.shape, generator=generator, device=place.device)
    steps = torch.from_numpy(common.PROBE_TIMES * cfg.T).long().to(place.device)
    signal, sigma = model.noise.at(steps, train=True)
    ce = []
    with place.autocast():
        memory, memory_real, _ = model.encode(x)
        for step, a, s in zip(steps, signal.float(), sigma.float()):
            z0_hat = model.denoise(a * z0 + s * eps, step.expand(len(y)), torch.zeros_like(z0),
                                   real, memory, memory_real)
            ce.append(F.cross_entropy(model.logits(z0_hat)[real], y[real]).item())
    return dict(name="difformer", method="difformer", times=common.PROBE_TIMES, cross_entropy=ce,
                signal=signal, sigma=sigma,
                embeddings=model.z0(torch.arange(model.V, device=place.device)).cpu())


def print_dgs(cfg: Config) -> None:
    """DGS of a schedule, F for dgs_max, and F if time were averaged without gaps."""
    V, d, plain = cfg.vocab, cfg.embed_dim, Noise(cfg.schedule, 1.0, "plain", cfg.T)
    table = torch.randn(V, d, generator=torch.Generator().manual_seed(cfg.seed))
    sampled = dgs_monte_carlo(*plain.at(grid(cfg.T)), table, tokens=200).mean().item()
    print(f"{cfg.schedule}, V = {V:,}, d = {d}, without rescaling: DGS {sampled:.3f} "
          f"(Algorithm 2), {dgs(plain, V, d):.3f} (competitors integrated out)")
    found, dense = (search_factor(cfg.schedule, cfg.dgs_max, V, d, cfg.rescaling, cfg.T, dense)
                    for dense in (False, True))
    print(f"DGS_MAX {cfg.dgs_max:g}, {cfg.rescaling}: F = {found:.2f}, to the nearest .5 "
          f"{round(2 * found) / 2:g}; over a dense grid of times {dense:.2f}")


def bench(cfg: Config, place: common.Setup) -> None:
    """Time training steps of a preset on synthetic pairs, one micro-batch per device and step."""
    L = 32
    n = min(cfg.micro_tokens, cfg.batch_tokens) // L
    cfg.factor = cfg.factor or 4.0
    model, net, optimizer, ema = build(cfg, cfg.vocab, place)
    ids = torch.randint(3, cfg.vocab, (2, n, L), device=place.device)
    for step in range(cfg.bench_steps + 6):
        if step == 6:
            place.on_cuda and torch.cuda.synchronize()
            begin = time.time()
        u = torch.rand(n, device=place.device)
        eps = torch.randn(n, L, cfg.embed_dim, device=place.device)
        batch, world = (ids[0], ids[1], u, eps, step % 2 == 0), place.world
        train_step(net, model, optimizer, ema, cfg, step, [batch], n * world, n * L * world, place)
    place.on_cuda and torch.cuda.synchronize()
    seconds = (time.time() - begin) / cfg.bench_steps
    use = common.utilisation(n * world / seconds * flops_per_pair(model, L, L), place)
    record = dict(
        dataset=cfg.dataset, batch=n * world, length=L,
        parameters=sum(p.numel() for p in model.parameters()),
        target_tokens_per_s=round(n * world * L / seconds),
        ms_per_step=round(1000 * seconds, 2), mfu=use and round(use, 4),
        peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2) if place.on_cuda else None,
        **common.environment(place))
    place.is_main and print(json.dumps(record))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "--train" in argv and "--dataset" not in argv:
        argv = ["--dataset", "files", *argv]
    cfg, _ = common.parse_config(Config, "difformer", __doc__, PRESETS, argv)
    place = common.setup(cfg)
    if cfg.mode == "train":
        train(cfg, place)
    elif cfg.mode == "bench":
        bench(cfg, place)
    elif cfg.mode == "dgs":
        print_dgs(cfg)
    else:
        model, data, step = load_run(cfg, place)
        if cfg.mode == "eval":
            figures, _ = evaluate(model, cfg, data, place)
            print_figures(figures, cfg.split)
            file = Path(cfg.save or Path(cfg.out) / "eval.json")
            common.write_json(file, dict(
                method="difformer", dataset=cfg.dataset, split=cfg.split, step=step, argv=argv,
                figures=figures, config=dataclasses.asdict(cfg), **common.environment(place)))
            print(f"-> {file}")
            return
        sources = [a for a, _ in data.pairs_of(cfg.split, cfg.samples)]
        if cfg.source:
            file = Path(cfg.source)
            sources = read_lines(file) if len(cfg.source) < 256 and file.is_file() else [cfg.source]
        for row in translate(model, sources, data, cfg, place):
            show(row)


if __name__ == "__main__":
    common.run_main(main)
