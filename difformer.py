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

  schedule      alpha-bar, and F times more noise     Eq. 3, 8         alpha_bar, Noise
  degeneration  how easy the noise is to see through  Definition 1, 2  degeneration_score
                on given embeddings                   Algorithm 2      eval.dgs_monte_carlo
  factor        the least F that is hard enough       Algorithm 1      search_factor
  loss          squared error + anchor + length       Eq. 1, 2         Difformer.forward
  sampler       K of the T steps, stopped early       section 3.3      sample
  decoding      several lengths x several noises      section 3.3      translate

Time runs from t = 0 (clean) to t = 1 (noise), in T = 2000 steps.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections import deque
from typing import Iterator, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import common
from common import RunError, arg, free
from data import PAD, PAIR_SETS, PairData, load_pairs
from eval import (anisotropy, choose, dgs_monte_carlo, score_translations, sources_of,
                  translate_split)

# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------

_NET, _OPT, _SAMPLE = (dict(group=name) for name in ("network", "optimisation", "sampling"))


@dataclasses.dataclass
class Config(common.RunConfig):
    dataset: str = arg("numbers", "pairs of sentences; files: those of --train",
                       choices=("numbers", *PAIR_SETS, "files"))
    train: tuple = arg((), "two files, line i of one translates line i of the other")
    valid: tuple = arg((), "the same for validation; none: held out of --train")
    test: tuple = arg((), "the same for testing")
    distilled: str = arg("", "file whose line i replaces training target i")
    lower: bool = arg(False, "lower-case both sides")
    max_number: int = arg(9999, "numbers: the largest", 20, 999_999)
    max_length: int = arg(256, "most tokens of a sentence", 4, 4096)
    vocab: int = arg(10_000, "tokens of the joint byte-pair encoding", 260, 10**6)
    # Noise
    T: int = arg(2000, "diffusion steps", 2, 10**6)
    schedule: str = arg("sqrt", "noise schedule", choices=("linear", "cosine", "sqrt"))
    dgs_max: float = arg(0.15, "degeneration score that F is found for", 0.001, 1)
    factor: float = arg(0.0, "rescaling factor F; 0: found for dgs_max, to the nearest .5; 1: no "
                        "rescaling", 0, 1e4)
    rescaling: str = arg("plain", "plain (Eq. 3) or vp (Eq. 8), in training only",
                         choices=("plain", "vp"))
    # Loss
    loss: str = arg("anchor", "beside the squared error: anchor, rounding or none (Table 1)",
                    choices=("anchor", "rounding", "none"))
    embeddings: str = arg("", "frozen embeddings z_0: a .npy file of shape (V, embed_dim) (C.3)")
    smoothing: float = arg(0.1, "label smoothing", 0, 0.99)
    length_weight: float = arg(0.1, "weight of the length loss", 0, 1e6)
    # Network: transformer-base (Table 21)
    embed_dim: int = arg(128, "width of embeddings, where the diffusion is", 2, 65536, **_NET)
    dim: int = arg(512, "width of the transformer", 8, 65536, **_NET)
    ffn: int = arg(2048, "width of its MLPs", 8, 10**6, **_NET)
    depth: int = arg(6, "layers of encoder and decoder each", 1, 1000, **_NET)
    heads: int = arg(8, "attention heads", 1, 1000, **_NET)
    dropout: float = arg(0.1, "dropout", 0, 0.99, **_NET)
    # As in the authors' code: .02, as BERT, but for the encoder. .02 everywhere stalls.
    init_std: float = arg(0.02, "initial linear weights; 0: fan-in^-1/2", 0, 10, **_NET)
    embed_std: float = arg(0.02, "initial embeddings and positions", 1e-6, 10, **_NET)
    fairseq_encoder: bool = arg(True, "the encoder's weights start as fairseq's", **_NET)
    # Optimisation (Table 21)
    steps: int = free(300_000, "training steps", 1, 10**9, **_OPT)
    batch_tokens: int = arg(65_536, "tokens per step over all devices, counting each pair's "
                            "longer side with its padding", 1, 10**9, **_OPT)
    micro_tokens: int = free(32_768, "most tokens one device takes at once", 1, 10**9, **_OPT)
    lr: float = arg(5e-4, "learning rate", 0, 10, **_OPT)
    lr_schedule: str = arg("inverse_sqrt", "after warm-up",
                           choices=("inverse_sqrt", "constant", "cosine"), **_OPT)
    warmup: int = arg(10_000, "warm-up steps", 0, 10**9, **_OPT)
    beta2: float = arg(0.98, "AdamW beta2 (beta1 is .9)", 0, 0.999999, **_OPT)
    weight_decay: float = arg(0.01, "AdamW weight decay", 0, 10, **_OPT)
    # Paper: none, but the average of the five best checkpoints. An EMA averages without choosing.
    ema: float = arg(0.999, "EMA decay", 0, 1, **_OPT)
    # Decoding
    K: int = free(20, "decoding steps of the T", 1, 10**6, **_SAMPLE)
    early_stop: int = free(5, "the last so many of the K steps are left out", 0, 10**6, **_SAMPLE)
    length_beam: int = free(3, "b1: lengths tried, around the predicted one", 1, 256, **_SAMPLE)
    noise_beam: int = free(3, "b2: noises tried for each length", 1, 10**4, **_SAMPLE)
    length: int = free(0, "tokens of the output; 0: by the length head", 0, 4096, **_SAMPLE)
    clamp: bool = free(False, "each z0-hat becomes its likeliest token's embedding", **_SAMPLE)
    sample_batch: int = free(64, "sentences decoded at once (times beams)", 1, 10**6, **_SAMPLE)
    source: str = free("", "translate this text, or each line of this file", **_SAMPLE)
    samples: int = free(4, "sentences of the split, without --source", 1, 10**7, **_SAMPLE)
    show_steps: bool = free(False, "show the sentence at each kept step", **_SAMPLE)
    mode: str = free("train", "what to do; sample translates, dgs searches F",
                     choices=("train", "sample", "eval", "bench", "dgs"), group="run")


_IWSLT = dict(ffn=1024, heads=4, dropout=0.3, batch_tokens=8192)  # transformer-iwslt-de-en
_WIDE = dict(dim=768, ffn=3072, heads=12)  # as DiffuSeq
PRESETS: dict[str, dict] = {  # Table 21, but for the first two
    # two CPU cores, under four minutes
    "numbers": dict(vocab=400, max_length=32, embed_dim=64, dim=128, ffn=256, depth=2, heads=4,
                    dropout=0.0, init_std=0.0, embed_std=0.1, fairseq_encoder=False,
                    batch_tokens=1024, steps=2000, lr=1e-3, warmup=200, lr_schedule="cosine",
                    ema=0.99, log_every=50, save_every=500),
    # some minutes of one H200; embeddings start at 128^-.5, so that z_0's deviation is 1, which the
    # search for F assumes
    "multi30k": dict(_IWSLT, lower=True, max_length=128, embed_std=0.0884, fairseq_encoder=False,
                     steps=15_000, warmup=1000, lr_schedule="cosine", sample_batch=500),
    "iwslt14": dict(_IWSLT, lower=True),
    "wmt14": dict(vocab=40_000),
    "wmt16": dict(vocab=40_000),
    "gigaword": dict(vocab=30_000),
    "qqp": dict(_WIDE, steps=50_000, batch_tokens=8192),
    "wiki_auto": dict(_WIDE, steps=30_000),
    "quasar_t": dict(_WIDE, steps=100_000, dgs_max=0.2, lr=3e-4, warmup=5000),
}
PRESETS["files"] = dict(PRESETS["numbers"], vocab=2000, max_length=64, batch_tokens=2048,
                        dropout=0.1, steps=4000)  # your own: two CPU cores, ten minutes

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
    """T steps of z_t = signal_t z_0 + sigma_t eps, with more noise, by the factor F, in training.

    In sampling signal (T,) is sqrt(alpha-bar), sigma (T,) sqrt(1 - alpha-bar), both float64; in
    training they are the rows of `trained` (2, T), by Eq. 3 (plain) or Eq. 8 (vp).
    """

    def __init__(self, schedule: str, factor: float, rescaling: str, T: int):
        """The paper leaves the steps open; these are the authors': beta_i is one minus the ratio
        of alpha-bar at (i+1)/T and i/T, at most .999, and alpha-bar_i the product of 1 - beta."""
        super().__init__()
        def in_steps(bar: np.ndarray) -> tuple[Tensor, Tensor]:            # (T + 1,) -> (T,) each
            beta = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
            bar = torch.from_numpy(np.cumprod(1 - beta))
            return bar.sqrt(), (1 - bar).sqrt()

        bar = alpha_bar(np.arange(T + 1) / T, schedule)
        signal, sigma = in_steps(bar)
        trained = signal, factor * sigma                                   # Eq. 3
        if rescaling == "vp":
            # Eq. 8; SNR / F^2, so it is CATDM's shift of the log-SNR by s = -2 ln F.
            trained = in_steps(bar / (factor**2 - (factor**2 - 1) * bar))
        self.register_buffer("signal", signal, persistent=False)
        self.register_buffer("sigma", sigma, persistent=False)
        self.register_buffer("trained", torch.stack(trained), persistent=False)

    def at(self, index: Tensor, train: bool = False) -> tuple[Tensor, Tensor]:
        """(signal, sigma) (...) at step indices (...) of 0..T-1; index -1 is clean data: (1, 0).
        F applies in training alone (C.7: in sampling it costs a point of BLEU)."""
        signal, sigma = self.trained if train else (self.signal, self.sigma)
        clean = index < 0
        return torch.where(clean, 1.0, signal[index]), torch.where(clean, 0.0, sigma[index])


# ---------------------------------------------------------------------------------------------
# Degeneration: how often the nearest embedding to z_t is the right one
# ---------------------------------------------------------------------------------------------


def grid(T: int, points: int = 49) -> Tensor:
    """Equally spaced step indices of 0..T-1 with both ends, for DGS' average over time: (points,).
    The published factors depend on so coarse a grid."""
    return torch.linspace(0, T - 1, points, dtype=torch.float64).round().long()


def dgs_at(signal: Tensor, sigma: Tensor, V: int, d: int, draws: int = 4096) -> Tensor:
    """DGS_t for V embeddings from N(0, I_d), the V - 1 wrong ones integrated out: (n,) -> (n,).

    Given z, a wrong e ~ N(0, I) scores c |z| u - (u^2 + X) / d, with c = 1 + 2/d, u standard normal
    along z and X chi-squared over the other d - 1 directions; the right one scores S. So DGS_t is
    E P(wrong < S)^(V-1). The expectation over z_0 and noise uses the same draws for every t and F,
    which makes it a smooth function of both.
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
    # A wrong one wins if c |z| u - u^2 / d > R: if u lies between the two roots.
    R = S + X[:, None, None] / d                                           # (4, n, m)
    root = (c * length) ** 2 - 4 * R / d
    low = (c * length - root.clamp_min(0).sqrt()) * d / 2
    p = (torch.special.ndtr(-low) * (root > 0)).mean(0)                    # the upper is far off
    return ((V - 1) * torch.log1p(-p.clamp_max(1 - 1e-12))).exp().mean(-1)


def degeneration_score(noise: Noise, V: int, d: int, dense: bool = False) -> float:
    """Definition 2, DGS: DGS_t averaged over time, under the training noise; `dense`: over the
    middle of every 8 steps, for the time average itself."""
    T = len(noise.sigma)
    index = torch.arange(T // 500, T, max(1, T // 250)) if dense else grid(T)
    return dgs_at(*noise.at(index, train=True), V, d).mean().item()


def search_factor(schedule: str, dgs_max: float, V: int, d: int, rescaling: str = "plain",
                  T: int = 2000, dense: bool = False) -> float:
    """Algorithm 1: the least F >= 1 whose DGS is at most dgs_max, by bisection.

    Paper: Algorithm 1 walks in steps of .5 and returns the first F below, which rounds up; Table
    19 has the *nearest* multiple of .5. Round the result for the table's figures.
    """
    def too_easy(factor: float) -> bool:
        return degeneration_score(Noise(schedule, factor, rescaling, T), V, d, dense) > dgs_max

    low = high = 1.0
    while too_easy(high):
        low, high = high, 2 * high
        if high > 1e4:
            raise RunError(f"no factor brings DGS to {dgs_max}: raise --dgs_max")
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (middle, high) if too_easy(middle) else (low, middle)
    return high


def dgs(cfg: Config) -> None:
    """--mode dgs: DGS of a schedule, F for dgs_max, and F if time were averaged without gaps."""
    V, d, plain = cfg.vocab, cfg.embed_dim, Noise(cfg.schedule, 1.0, "plain", cfg.T)
    embeddings = torch.randn(V, d, generator=torch.Generator().manual_seed(cfg.seed))
    sampled = dgs_monte_carlo(*plain.at(grid(cfg.T)), embeddings, tokens=200).mean().item()
    print(f"{cfg.schedule}, V = {V:,}, d = {d}, without rescaling: DGS {sampled:.3f} (Algorithm "
          f"2), {degeneration_score(plain, V, d):.3f} (competitors integrated out)")
    found, dense = (search_factor(cfg.schedule, cfg.dgs_max, V, d, cfg.rescaling, cfg.T, dense)
                    for dense in (False, True))
    print(f"DGS_MAX {cfg.dgs_max:g}, {cfg.rescaling}: F = {found:.2f}, to the nearest .5 "
          f"{round(2 * found) / 2:g}; over a dense grid of times {dense:.2f}")


# ---------------------------------------------------------------------------------------------
# Model and loss
# ---------------------------------------------------------------------------------------------


def fairseq_init(net: common.EncoderDecoder) -> None:
    """The encoder's weights as fairseq starts them, which is where the authors' code leaves them:
    positions N(0, 1 / d), attention Xavier-uniform, else PyTorch's own; d = dim."""
    nn.init.normal_(net.source_place.weight, std=net.d**-0.5)
    for layer in (net.source_in, *net.encoder.modules()):
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    for attention in (block.attention for block in net.encoder):
        for weight in (attention.q.weight, *attention.kv.weight.detach().chunk(2)):
            nn.init.xavier_uniform_(weight, 2**-0.5)
        nn.init.xavier_uniform_(attention.out.weight)
        nn.init.zeros_(attention.out.bias)


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
            init_std=cfg.init_std, position_std=cfg.embed_std, source_norm=False,
            length_bias=False)
        self.embed = nn.Embedding(vocab_size, cfg.embed_dim)
        nn.init.normal_(self.embed.weight, std=cfg.embed_std)
        if cfg.fairseq_encoder:
            fairseq_init(self.net)
        if cfg.embeddings and cfg.mode not in ("sample", "eval"):  # there the checkpoint has them
            rows, wanted = np.load(cfg.embeddings), (vocab_size, cfg.embed_dim)
            if rows.shape != wanted:
                raise RunError(f"--embeddings {cfg.embeddings} has shape {rows.shape}, this model "
                               f"needs {wanted}")
            weight = torch.tensor(rows) / cfg.embed_dim**0.5  # z_0 is given and never trained
            self.embed = nn.Embedding.from_pretrained(weight.float())
        self.factor = cfg.factor or round(2 * search_factor(
            cfg.schedule, cfg.dgs_max, vocab_size, cfg.embed_dim, cfg.rescaling, cfg.T)) / 2
        self.noise = Noise(cfg.schedule, self.factor, cfg.rescaling, cfg.T)

    def embedding_matrix(self) -> Tensor:
        """All embeddings (V, e) as they enter the diffusion."""
        return self.embed.weight * self.cfg.embed_dim**0.5

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
        not_pad = x != PAD
        memory, length_logits = self.net.encode(self.z0(x), not_pad)
        return memory, not_pad, length_logits

    def denoise(self, z_t: Tensor, index: Tensor, previous: Tensor, not_pad: Tensor,
                memory: Tensor, memory_not_pad: Tensor) -> Tensor:
        """z0hat (B, N, e) from z_t (B, N, e), step indices (B,) and the previous z0hat; not_pad
        (B, N) is False at padding, memory (B, M, d) are the encoder's states."""
        return self.net.decode(z_t, index / self.cfg.T, previous, not_pad, memory, memory_not_pad)

    def losses(self, z0_hat: Tensor, z0: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the tokens y (B, N): squared error, cross-entropy, how many were right."""
        not_pad = y != PAD
        # Eq. 1. Gradients reach the embeddings from both sides: that alone collapses them.
        square = ((z0_hat - z0).square().mean(-1) * not_pad).sum()
        logits = self.logits(z0 if self.cfg.loss == "rounding" else z0_hat).flatten(0, 1)
        ce = F.cross_entropy(logits, y.flatten(), reduction="sum", ignore_index=PAD,
                             label_smoothing=self.cfg.smoothing)
        right = ((logits.argmax(-1) == y.flatten()) & not_pad.flatten()).sum()
        return square, ce, right

    def forward(self, x: Tensor, y: Tensor, u: Tensor, eps: Tensor, self_condition: bool
                ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sums over the batch: the loss (divide by the tokens of y), the length loss (divide by the
        pairs) and statistics. The arguments are a Batch."""
        compiled = self.training and self.compiled
        encode, denoise, losses = compiled or (self.encode, self.denoise, self.losses)
        memory, memory_not_pad, length_logits = encode(x)
        index = (u * self.cfg.T).long()                                    # (B,) of 0..T-1
        z0, not_pad = self.z0(y), y != PAD
        signal, sigma = (c.float()[:, None, None] for c in self.noise.at(index, train=True))
        z_t = signal * z0 + sigma * eps
        previous = torch.zeros_like(z_t)
        if self_condition:  # on a first estimate, which gets no gradient
            with torch.no_grad():
                previous = denoise(z_t, index, previous, not_pad, memory, memory_not_pad)
        z0_hat = denoise(z_t, index, previous, not_pad, memory, memory_not_pad)

        square, ce, right = losses(z0_hat, z0, y)
        loss = square if self.cfg.loss == "none" else square + ce          # Eq. 2
        length_loss = common.length_loss(length_logits, not_pad.sum(1), memory_not_pad.sum(1))
        return loss, length_loss, dict(
            square=square, ce=ce, right=right, length_loss=length_loss, tokens=not_pad.sum(),
            pairs=not_pad.any(1).sum())


# ---------------------------------------------------------------------------------------------
# Sampler and decoding
# ---------------------------------------------------------------------------------------------


def kept_steps(T: int, K: int, early_stop: int) -> list[int]:
    """Indices of the K of T steps, from T - 1 down, without the last `early_stop` of them."""
    steps = [round(k * (T - 1) / (K - 1)) for k in range(K)] if K > 1 else [T - 1]
    return steps[::-1][: max(1, K - early_stop)]


@torch.no_grad()
def sample(model: Difformer, memory: Tensor, memory_not_pad: Tensor, not_pad: Tensor, K: int,
           early_stop: int, clamp: bool = False, generator: torch.Generator | None = None
           ) -> Iterator[Tensor]:
    """Yields tokens (B, N), PAD where `not_pad` (B, N) is False, after each network call.

    The next z is drawn from q(z_s | z_t, z0hat) of the schedule *without* F (C.7), noise at every
    step; the tokens are the argmax of z0hat's logits, never of z_t's. `clamp` puts their
    embeddings in z0hat's place, also as the next call's estimate (the authors' code).
    """
    noise = dict(device=not_pad.device, generator=generator)
    z = torch.randn(*not_pad.shape, model.cfg.embed_dim, **noise)
    z0_hat = torch.zeros_like(z)
    steps = torch.tensor([*kept_steps(model.cfg.T, K, early_stop), -1], device=not_pad.device)
    steps = steps.split(1)  # (1,) each, since indexing with a number would wait for the device
    for t, s in zip(steps, steps[1:]):
        z0_hat = model.denoise(z, t.expand(len(z)), z0_hat, not_pad, memory, memory_not_pad)
        with common.exact(z.device):
            tokens = model.logits(z0_hat).argmax(-1)
        yield torch.where(not_pad, tokens, PAD)
        if clamp:
            z0_hat = model.z0(tokens)
        mean, variance = common.gaussian_posterior(
            z.double(), z0_hat.double(), *model.noise.at(t), *model.noise.at(s))
        z = (mean + variance.sqrt() * torch.randn(z.shape, **noise)).float()


def candidate_lengths(length_logits: Tensor, source_lengths: Tensor, cfg: Config) -> Tensor:
    """Target lengths (b, length_beam x noise_beam), BOS and EOS included, for b sources.

    Paper: the text takes the b1 most probable lengths; the authors' code, and we, the most
    probable one and its neighbours.
    """
    lengths = common.length_beam(length_logits, source_lengths, cfg.length_beam)
    if cfg.length:  # Table 18
        lengths = torch.full_like(lengths, cfg.length + 2)
    return lengths.repeat_interleave(cfg.noise_beam, 1).clamp(2, cfg.max_length)


@torch.no_grad()
def translate(model: Difformer, sources: list[str], data: PairData, cfg: Config, ddp: common.DDP
              ) -> Iterator[dict]:
    """Yields one {"source", "text", "candidates"} per source, in order; an empty line stays empty.

    2D parallel decoding: length_beam x noise_beam candidates at once, the best by `choose`. With
    cfg.show_steps also "steps", its text after each network call.
    """
    generator = torch.Generator(ddp.device).manual_seed(common.fold_in(cfg.seed, 99))
    beams = cfg.length_beam * cfg.noise_beam
    for begin in range(0, len(sources), cfg.sample_batch):
        batch = sources[begin:begin + cfg.sample_batch]
        with ddp.autocast():
            memory, memory_not_pad, length_logits = model.encode(ddp.put(data.rows(batch)))
            lengths = candidate_lengths(length_logits, memory_not_pad.sum(1), cfg).flatten()
            N = min(-(-int(lengths.max()) // 8) * 8, cfg.max_length)
            not_pad = torch.arange(N, device=ddp.device) < lengths[:, None]  # (b * beams, N)
            calls = sample(model, memory.repeat_interleave(beams, 0),
                           memory_not_pad.repeat_interleave(beams, 0), not_pad, cfg.K,
                           cfg.early_stop, cfg.clamp, generator)
            history = deque(calls, maxlen=None if cfg.show_steps else 1)
        for i, (text, several) in enumerate(zip(batch, history[-1].view(-1, beams, N).tolist())):
            candidates = [[t for t in c if t != PAD] for c in several]
            best = choose(candidates)
            texts = [data.decode(c[1:]) if text.strip() else "" for c in candidates]
            row = dict(source=text, text=texts[best], candidates=texts,
                       nfe=len(kept_steps(cfg.T, cfg.K, cfg.early_stop)))
            if cfg.show_steps:
                row["steps"] = [data.decode(h[i * beams + best].tolist()[1:]) for h in history]
            yield row


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Everything random about some pairs of a step."""

    x: Tensor             # (B, M) source ids
    y: Tensor             # (B, N) target ids
    u: Tensor             # (B,) uniform noise: it chooses t
    eps: Tensor           # (B, N, e) normal noise
    self_condition: bool  # on a first estimate, or on zeros


def load(cfg: Config, tokenizer: dict | None = None) -> PairData:
    if tokenizer and cfg.source:
        return PairData.from_tokenizer(tokenizer)
    files = dict(train=cfg.train, valid=cfg.valid, test=cfg.test)
    return load_pairs(cfg.dataset, cfg.data_dir, cfg.max_length, cfg.vocab, cfg.max_number, files,
                      cfg.lower, cfg.distilled, synthetic=cfg.mode == "bench")


def load_batches(cfg: Config, data: PairData, step: int, ddp: common.DDP
                 ) -> tuple[list[Batch], int, int]:
    """This rank's micro-batches of a step; how many pairs and target tokens all ranks have.

    Every rank makes the whole batch, with all its noise, and takes each world-th row, so the
    number of ranks changes nothing; a batch of 64K tokens costs it 33 MB of noise.
    """
    y, x = data.train_batch(cfg.seed, step, cfg.batch_tokens)
    n, tokens = len(y), int((y != PAD).sum())
    rng = np.random.default_rng(common.fold_in(cfg.seed, step, 1))
    # Paper: self-conditioning with probability one half; the authors' code decides per batch.
    self_condition, u = bool(rng.random() < 0.5), rng.random(n, np.float32)
    generator = torch.Generator(ddp.device).manual_seed(common.fold_in(cfg.seed, step, 2))
    eps = torch.randn(*y.shape, cfg.embed_dim, generator=generator, device=ddp.device)
    parts = min(max(1, n // ddp.world),
                math.ceil(n * max(x.shape[1], y.shape[1]) / (cfg.micro_tokens * ddp.world)))
    rows = [slice(k * ddp.world + ddp.rank, None, parts * ddp.world) for k in range(parts)]
    return [Batch(ddp.put(x[r]), ddp.put(y[r]), ddp.put(u[r]), eps[r], self_condition)
            for r in rows], n, tokens


def build(cfg: Config, data: PairData) -> Difformer:
    """The network, untrained. Raises RunError if sentences could not be decoded so."""
    if cfg.length > cfg.max_length - 2 or cfg.K > cfg.T:
        raise RunError(f"--length is at most {cfg.max_length - 2} and --K at most {cfg.T} here")
    return Difformer(cfg, data.vocab_size)


def compile_parts(model: Difformer, cfg: Config, ddp: common.DDP) -> None:
    """Compile the parts of the loss, each once for all shapes: sentences come in many lengths.

    Decoding stays as it is: its few large calls gain less than the compiler takes. The first call
    decides which sizes vary on their own: those that are equal in it, or equal to a layer's width,
    would be compiled again when they differ. So it is not a real batch.
    """
    model.compiled = tuple(torch.compile(part, dynamic=True)
                           for part in (model.encode, model.denoise, model.losses))
    n = max(2, min(cfg.batch_tokens, cfg.micro_tokens) // 24)
    x, y = (torch.ones(n, min(k, cfg.max_length), dtype=torch.long, device=ddp.device)
            for k in (24, 16))
    with ddp.random_state_kept():
        with ddp.autocast():
            loss, *_ = model(x, y, x[:, 0] / 2, torch.zeros_like(model.z0(y)), True)
        loss.backward()
    model.zero_grad(set_to_none=True)


def flops_per_pair(model: Difformer, M: float, N: float) -> float:
    """Model FLOPs of a training step for one pair of M and N tokens; the first estimate of
    self-conditioning is a decoder's forward pass every other time, a sixth of its cost."""
    encoder, decoder = model.net.flops(M, N)
    return encoder + decoder * 7 / 6 + 6.0 * N * model.embed.weight.numel()


def train(cfg: Config, ddp: common.DDP, data: PairData) -> common.Run:
    common.check_pairs(cfg, data, ddp)
    model = build(cfg, data).to(ddp.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], cfg.lr,
                                  betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True)
    ema = common.EMA(model, cfg.ema)
    M, N = (side.lengths[data.kept].mean() for side in data.train)  # of a mean pair
    run = common.Run("difformer", cfg, ddp, data, model, optimizer, ema,
                     flops_per_pair(model, M, N) / N, note=f" | F {model.factor:g}")
    if cfg.compile and ddp.on_cuda and not run.complete:
        compile_parts(model, cfg, ddp)
    net = ddp.wrap(model, compile=False)

    def valid(held_out: PairData, step: int) -> Tensor:
        batches, pairs, tokens = load_batches(cfg, held_out, step, ddp)
        losses = [model(*batch)[:2] for batch in batches]
        return sum(loss / tokens + cfg.length_weight * length / pairs for loss, length in losses)

    for step in run.steps(lambda total: summarise(total, model), valid):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, cfg)
        batches, pairs, tokens = load_batches(cfg, data, step, ddp)
        for k, batch in enumerate(batches):
            with ddp.no_sync(net, last=k == len(batches) - 1):
                with ddp.autocast():
                    loss, length_loss, stats = net(*batch)
                loss = loss / tokens + cfg.length_weight * length_loss / pairs
                (loss * ddp.world).backward()  # DDP averages gradients, hence `world`
            run.add(**stats)
        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()
    return run


def summarise(total: dict, model: Difformer) -> tuple[dict, dict]:
    """What log.jsonl gets and what the bar shows, from the sums since the last line."""
    tokens = total["tokens"]
    record = dict(
        mse=total["square"] / tokens, cross_entropy=total["ce"] / tokens,
        accuracy=total["right"] / tokens, length_loss=total["length_loss"] / total["pairs"],
        # DGS takes z_0 to have standard deviation 1; it starts at .02 sqrt(embed_dim).
        embedding_std=round(model.embedding_matrix().std().item(), 4),
        anisotropy=round(anisotropy(model.embed.weight.detach()), 4))
    return record, dict(mse=f"{record['mse']:.3f}", ce=f"{record['cross_entropy']:.3f}",
                        right=f"{record['accuracy']:.1%}")


# ---------------------------------------------------------------------------------------------
# Evaluation and samples
# ---------------------------------------------------------------------------------------------


def name_of(cfg: Config) -> str:
    return "difformer"


def evaluate(model: Difformer, cfg: Config, data: PairData, ddp: common.DDP) -> dict[str, dict]:
    """Figures of the translations of cfg.split, and translations-SPLIT.jsonl in the run folder.
    Translating is quick: rank 0 does it, the others return {}."""
    if not ddp.is_main:
        return {}
    begin = time.time()
    rows = translate_split(translate, model, cfg, data, ddp)
    seconds = time.time() - begin
    return score_translations(rows) | dict(
        speed=dict(value=len(rows) / seconds, unit="sentences/s"),
        anisotropy=dict(value=anisotropy(model.embed.weight.detach()), unit="ANI"))


def draw(model: Difformer, cfg: Config, data: PairData, ddp: common.DDP, trained: bool = False
         ) -> dict:
    """Print translations of --source, or of the first cfg.samples sentences of the split; above
    each those of all kept steps, or right after training the distinct ones (Table 22)."""
    shown = dataclasses.replace(cfg, show_steps=cfg.show_steps or trained)
    for row in translate(model, sources_of(cfg, data), data, shown, ddp):
        print(f"\n{row['source']}")
        steps = row.get("steps", [])
        for i, text in enumerate(steps):
            if cfg.show_steps or i == 0 or text != steps[i - 1]:
                print(f"  call {i + 1:3d}  {text}")
        print(f"  ->        {row['text']}" if steps else f"  -> {row['text']}")
    return dict(factor=model.factor)


@torch.no_grad()
def probe(model: Difformer, cfg: Config, data: PairData, ddp: common.DDP, times: np.ndarray
          ) -> dict:
    """What `eval.py collapse` asks: how the embeddings of a run lie, and what is left to predict.

    embeddings (V, e) as they enter the diffusion; at times (n,) signal (n,) and sigma (n,) of z_t =
    signal z_0 + sigma eps in training, F included, and the mean cross_entropy (n,) in nats per
    token of the split's first 128 targets given z_t and the source: with the same noise at all
    times, without self-conditioning or label smoothing.
    """
    y, x = map(ddp.put, next(data.eval_batches(cfg.split, 128, 128)))
    generator = torch.Generator(ddp.device).manual_seed(common.fold_in(cfg.seed, 78))
    z0, not_pad = model.z0(y), y != PAD
    eps = torch.randn(z0.shape, generator=generator, device=ddp.device)
    steps = ddp.put((times * cfg.T).astype(int))
    signal, sigma = model.noise.at(steps, train=True)
    ce = []
    with ddp.autocast():
        memory, memory_not_pad, _ = model.encode(x)
        for step, a, s in zip(steps, signal.float(), sigma.float()):
            z0_hat = model.denoise(a * z0 + s * eps, step.expand(len(y)), torch.zeros_like(z0),
                                   not_pad, memory, memory_not_pad)
            with common.exact(z0.device):
                ce.append(F.cross_entropy(model.logits(z0_hat)[not_pad], y[not_pad]).item())
    return dict(cross_entropy=ce, signal=signal, sigma=sigma,
                embeddings=model.embedding_matrix().cpu())


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    files = ["--dataset", "files"] if "--train" in argv else []  # a --dataset of argv overrides it
    common.main(sys.modules[__name__], [*files, *argv])


if __name__ == "__main__":
    common.run_main(main)
