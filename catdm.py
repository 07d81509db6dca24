"""CATDM, also published as VQ-LCMD: diffusion on learned embeddings that do not collapse.

    python catdm.py                                     CPU, 3 minutes: glyphs by class, a PNG
    python catdm.py --mode sample --label A --guidance 2     more of one class
    python catdm.py --objective csdm --out runs/csdm-glyphs  the baseline, whose embeddings collapse
    python catdm.py --dataset pydoc                     text; numbers: translation
    python catdm.py --dataset english27                 one GPU
    torchrun --nproc_per_node 8 catdm.py --dataset imagenet --tokens t.npy --labels l.npy

Tokens become vectors that are learned together with the diffusion on them. The bound on the
likelihood alone pulls them together: equal vectors are easy to denoise. Consistency matching ties
the predictions from all noise levels to those from less noise and, at t = 0, to the tokens.
Equation numbers are VQ-LCMD's ("Improving Vector-Quantized Image Modeling with Latent
Consistency-Matching Diffusion"), appendix B is CATDM's ("Consistency matching ...").

  schedule    log-SNR of a shifted cosine          section 4.3  logsnr, signal_and_noise
  network     f(z_t; t) -> logits of x             section 3.2  Denoiser
  loss        L_0 + .005 L_DM + L_CM               section 4.2  CATDM.forward
  sampler     ancestral or DDIM, then x ~ P(x|z_0) Algorithm 2  sample
  likelihood  prior, reconstruction and diffusion  Eq. 2        bound_terms

Time runs from t = 0 (clean) to t = 1 (noise).
"""

from __future__ import annotations

import contextlib
import copy
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
from data import (IMAGES, PAD, ImageTokens, PairData, TextData, choose, load_dataset, load_images,
                  load_pairs, ngram_entropies, read_lines, score_translations)

# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config(common.RunConfig):
    dataset: str = arg("glyphs", "glyphs, glyphs36, mnist, ffhq, lsun, imagenet or a tokens.npy "
                       "(images as tokens); numbers, multi30k (translation); pydoc, pycode, "
                       "shakespeare, text8, english27 or a folder of your own (text)", fixed=True)
    tokens: str = arg("", "ffhq, lsun, imagenet: a tokens.npy of (N, L) ids (default: "
                      "DATA_DIR/DATASET/tokens.npy)", fixed=True)
    labels: str = arg("", "a labels.npy of (N,) classes for a tokens.npy", fixed=True)
    length: int = arg(256, "tokens per sequence of text, most tokens of a sentence", 1, 65536,
                      fixed=True)
    vocab: int = arg(10_000, "translation: tokens of the joint byte-pair encoding", 260, 10**6,
                     fixed=True)
    lower: bool = arg(False, "translation: lower-case all text", fixed=True)
    max_number: int = arg(9999, "numbers: the largest", 20, 999_999, fixed=True)
    batch_tokens: int = arg(8192, "translation: tokens of the sentences that make up a step", 8,
                            10**8, fixed=True)
    micro_tokens: int = arg(32_768, "translation: most tokens one device takes at once", 1, 10**9)
    # Method
    objective: str = arg("catdm", "catdm, or csdm: the bound of Eq. 2, without L_CM and dropping",
                         choices=("catdm", "csdm"), fixed=True)
    cm: str = arg("cm", "consistency matching: cm (Eq. 3), ce (cross-entropy instead), none",
                  choices=("cm", "ce", "none"), fixed=True)
    beta_cm: float = arg(1.0, "weight of L_CM", 0, 1e6, fixed=True)
    beta_dm: float = arg(0.005, "weight of L_DM", 0, 1e6, fixed=True)
    length_weight: float = arg(0.1, "translation: weight of the length loss", 0, 1e6, fixed=True)
    teacher: float = arg(0.99, "EMA decay eta of the teacher, network and embeddings", 0, 1,
                         fixed=True)
    shift: float = arg(-1.0, "s of section 4.3, added to log-SNR; Difformer's rescaling by F is "
                       "-2 ln F", -30, 30, fixed=True)
    logsnr_max: float = arg(15.0, "log-SNR, before the shift, where the diffusion ends and tokens "
                            "are read off z; 15: at t = 0", -5, 15, fixed=True)
    dropping: str = arg("fixed", "share of tokens dropped: fixed, rand_drop (uniform for each "
                        "sample), linear (t) (Table 6)", choices=("fixed", "rand_drop", "linear"),
                        fixed=True)
    drop: float = arg(0.2, "the fixed share; 0 drops nothing, whatever --dropping", 0, 1,
                      fixed=True)
    dropped: str = arg("zero", "what stands for a dropped token: zero, or a learned vector",
                       choices=("zero", "learned"), fixed=True)
    null_labels: float = arg(0.1, "share of labels hidden in training, for guidance", 0, 1,
                             fixed=True)
    recon_share: float = arg(1.0, "share of the batch on which L_0 is estimated", 1e-6, 1,
                             fixed=True)
    # Embeddings
    embed_dim: int = arg(256, "D (Table 8)", 1, 65536, fixed=True)
    embed_init: str = arg("std", "N(0, D^-1/2): the standard deviation (norm 1), or the variance "
                          "(norm D^1/4)", choices=("std", "variance"), fixed=True)
    l2_norm: float = arg(0.0, "length of all embeddings; 0: learned freely", 0, 1e4, fixed=True)
    embeddings: str = arg("", "frozen embeddings: a .npy file of (V, D)", fixed=True)
    # Network: appendix A, unconditional images
    dim: int = arg(512, "width", 8, 65536, fixed=True)
    depth: int = arg(15, "layers", 1, 1000, fixed=True)
    heads: int = arg(8, "attention heads", 1, 1000, fixed=True)
    ffn: int = arg(1024, "translation: width of the MLPs (else 4 x dim)", 8, 10**6, fixed=True)
    dropout: float = arg(0.1, "dropout", 0, 0.99, fixed=True)
    init_std: float = arg(0.02, "initial linear weights, except of text; 0: fan-in^-1/2", 0, 10,
                          fixed=True)
    # Optimisation: unreported for images; this is VQ-Diffusion's
    steps: int = arg(273_000, "training steps", 1, 10**9)
    batch_size: int = arg(128, "samples per step, over all devices", 1, 10**7, fixed=True)
    micro_batch: int = arg(128, "most samples one device takes at once", 1, 10**7)
    lr: float = arg(4.5e-4, "learning rate", 0, 10, fixed=True)
    lr_schedule: str = arg("constant", "after warm-up",
                           choices=("constant", "cosine", "inverse_sqrt"), fixed=True)
    warmup: int = arg(1000, "warm-up steps", 0, 10**9, fixed=True)
    beta2: float = arg(0.96, "AdamW beta2 (beta1 is .9)", 0, 0.999999, fixed=True)
    weight_decay: float = arg(0.045, "AdamW weight decay, not of embeddings", 0, 10, fixed=True)
    clip: float = arg(1.0, "gradient norm", 1e-6, 1e6, fixed=True)
    ema: float = arg(0.9999, "EMA decay of the weights that sample", 0, 1, fixed=True)
    # Sampling
    samples: int = arg(64, "samples to draw, or sentences to translate", 1, 10**7)
    sample_steps: int = arg(200, "sampling steps N; one more call draws the tokens", 1, 10**6)
    sampler: str = arg("ancestral", "ancestral (Algorithm 2) or ddim",
                       choices=("ancestral", "ddim"))
    argmax: bool = arg(False, "take the most probable tokens at the end, do not draw them")
    guidance: float = arg(1.0, "omega of Eq. 4, for samples of a class", 0, 1000)
    label: str = arg("", "only samples of this class")
    length_beam: int = arg(3, "translation: lengths tried, around the predicted one", 1, 256)
    noise_beam: int = arg(3, "translation: noises tried for each length", 1, 10**4)
    source: str = arg("", "translate this text, or each line of this file")
    sample_batch: int = arg(64, "samples drawn at once", 1, 10**6)
    # Evaluation
    split: str = arg("valid", "split to evaluate", choices=("train", "valid", "test"))
    bound_end: float = arg(100.0, "log-SNR, before the shift, where the bound's diffusion ends and "
                           "x is decoded, at most --logsnr_max; above 15: the best of BOUND_ENDS "
                           "on training data", -15, 100)
    eval_draws: int = arg(4, "draws of (t, z_t, z_0) per sequence", 1, 10**6)
    eval_sequences: int = arg(0, "sequences to evaluate; 0: the whole split", 0, 10**9)
    bench_steps: int = arg(20, "timed steps of --mode bench", 1, 10**6)

    @property
    def t_0(self) -> float:
        """The time at which the diffusion ends."""
        return time_of(self.logsnr_max)

    @property
    def task(self) -> str:
        """images, pairs or text: what the data set holds."""
        if self.dataset in ARRAYS or self.dataset in IMAGES or self.dataset.endswith(".npy"):
            return "images"
        return "pairs" if self.dataset in PAIRS else "text"


ARRAYS, PAIRS = ("ffhq", "lsun", "imagenet"), ("numbers", "multi30k", "iwslt14", "wmt14")
_SMALL_TEXT = dict(embed_dim=128, dim=384, depth=6, heads=6, batch_size=64, micro_batch=64,
                   steps=20_000, lr=1e-3, warmup=500, beta2=0.99, weight_decay=0.0, samples=4)
_PAIRS = dict(embed_dim=128, ffn=1024, depth=6, heads=4, dropout=0.3,
              steps=300_000, lr=5e-4, lr_schedule="inverse_sqrt", warmup=10_000, beta2=0.98,
              weight_decay=0.01, ema=0.999, sample_steps=20, samples=4, sample_batch=64)
PRESETS: dict[str, dict] = {
    # one CPU core, three minutes; a short run needs a young teacher
    "glyphs": dict(embed_dim=32, embed_init="variance", dim=96, depth=3, heads=4, dropout=0.0,
                   init_std=0.0, teacher=0.9, shift=-1.5, drop=0.1, recon_share=0.25,
                   batch_size=32, micro_batch=32, steps=2300, lr=3e-3, warmup=50,
                   lr_schedule="cosine", beta2=0.99, weight_decay=0.0, ema=0.99, samples=128,
                   sample_steps=20, sample_batch=128, log_every=20, save_every=500,
                   eval_sequences=500),
    "mnist": dict(dim=256, depth=6, init_std=0.0, batch_size=256, micro_batch=256, steps=20_000,
                  lr=1e-3, lr_schedule="cosine", beta2=0.99, weight_decay=0.0, ema=0.999,
                  sample_steps=50, samples=160, sample_batch=512),
    "ffhq": {},  # Tables 1, 2 and 4 to 8: 500 epochs of 70K images
    "lsun": dict(steps=98_000),  # Churches: 100 epochs of 126K; Bedrooms: 500 of 3M
    "imagenet": dict(dim=768, depth=24, heads=16, steps=5_000_000, sample_steps=50),  # Table 3
    # text: CADD's networks, batches and steps, so that figures compare
    "pydoc": dict(length=64, embed_dim=64, dim=96, depth=3, heads=3, dropout=0.0, teacher=0.9,
                  batch_size=32, micro_batch=32, steps=1000, lr=3e-3, warmup=100,
                  lr_schedule="cosine", beta2=0.99, weight_decay=0.0, ema=0.99, samples=4,
                  sample_steps=64, log_every=20, save_every=200, recon_share=0.25),
    "pycode": _SMALL_TEXT,
    "shakespeare": _SMALL_TEXT | dict(dropout=0.2, steps=5000, warmup=100, lr_schedule="cosine",
                                      ema=0.999, save_every=500),
    "text8": dict(dim=768, depth=12, heads=12, batch_size=512, micro_batch=256, steps=343_000,
                  lr=3e-4, warmup=2500, beta2=0.999, weight_decay=0.0, samples=4),  # B.2
    "english27": dict(dim=768, depth=12, heads=12, dropout=0.0, batch_size=256, micro_batch=256,
                      steps=6250, lr=6e-4, lr_schedule="cosine", warmup=300, beta2=0.99,
                      weight_decay=0.0, ema=0.999, samples=4, log_every=100, sample_batch=256),
    "path": _SMALL_TEXT,
    # translation (B.3): Difformer's networks, optimiser and batches
    "numbers": dict(vocab=400, length=32, embed_dim=64, dim=128, ffn=256, depth=2, heads=4,
                    dropout=0.0, init_std=0.0, teacher=0.9, batch_tokens=1024, steps=1000, lr=1e-3,
                    warmup=200, lr_schedule="cosine", beta2=0.98, weight_decay=0.01, ema=0.99,
                    sample_steps=20, samples=4, save_every=500, eval_sequences=200),
    "multi30k": _PAIRS | dict(length=128, lower=True, steps=15_000, warmup=1000,
                              lr_schedule="cosine"),
    "iwslt14": _PAIRS | dict(lower=True),
    "wmt14": _PAIRS | dict(vocab=40_000, ffn=2048, heads=8, dropout=0.1, batch_tokens=65_536,
                          sample_batch=16),
}
PRESETS["glyphs36"] = PRESETS["glyphs"]

# ---------------------------------------------------------------------------------------------
# Noise schedule
# ---------------------------------------------------------------------------------------------

LOGSNR = 15.0  # the unshifted log-SNR is clamped to +- this


def logsnr(t: Tensor, shift: float) -> Tensor:
    """log(a_t^2 / sigma_t^2) of section 4.3 in float64: -2 ln tan(pi t / 2), clamped, plus shift.

    Shifting divides the SNR by e^-s at every t. Difformer's variance-preserving rescaling (its
    Eq. 8) divides it by F^2: the same with s = -2 ln F, so its DGS is a rule for choosing s.
    """
    return (-2 * torch.log(torch.tan(math.pi / 2 * t.double()))).clamp(-LOGSNR, LOGSNR) + shift


def time_of(unshifted: float) -> float:
    """The t at which -2 ln tan(pi t / 2) is `unshifted`; 0 at LOGSNR, where the clamp sets in."""
    return 2 / math.pi * math.atan(math.exp(-unshifted / 2)) if unshifted < LOGSNR else 0.0


def signal_and_noise(t: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """(a_t, sigma_t), variance preserving, float64, of t's shape."""
    log = logsnr(t, shift)
    return log.sigmoid().sqrt(), (-log).sigmoid().sqrt()


def diffusion_weight(t: Tensor, shift: float) -> Tensor:
    """-SNR'(t) / 2 of Eq. 2, float64: SNR d/dt ln tan(pi t / 2) = pi SNR / sin(pi t), or 0 where
    the clamp holds the SNR still."""
    log, t = logsnr(t, shift), t.double()
    moving = (log - shift).abs() < LOGSNR
    return torch.where(moving, math.pi * log.exp() / torch.sin(math.pi * t), 0.0)


# ---------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------


class ImageBlock(nn.Module):
    """VQ-Diffusion's block: attention behind a layer norm scaled and shifted by the time, an MLP
    behind one scaled and shifted by the class (without classes: a plain one)."""

    def __init__(self, d: int, heads: int, classes: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.attention = common.Attention(d, heads)
        self.by_time = nn.Linear(d, 2 * d)
        if classes:  # the last row is the null label
            self.label, self.by_label = nn.Embedding(classes + 1, d), nn.Linear(d, 2 * d)
        else:
            self.norm = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, h: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        """h (B, L, d), time (B, d), labels y (B,) or None."""
        def modulate(scale_shift: Tensor) -> Tensor:  # (1 + a) LayerNorm(h) + b, appendix A
            a, b = scale_shift[:, None].chunk(2, -1)                      # (B, 1, d)
            return (1 + a) * F.layer_norm(h.float(), h.shape[-1:]) + b

        x = modulate(self.by_time(time))
        h = h + F.dropout(self.attention(x, x), self.dropout, self.training)
        x = self.norm(h) if y is None else modulate(self.by_label(F.silu(self.label(y))))
        return h + F.dropout(self.mlp(x), self.dropout, self.training)


class ImageTransformer(nn.Module):
    """(B, L, d) -> features (B, L, d): 15 x 512 with D = 256, V = 1,024 makes the paper's 56M
    parameters, 24 x 768 with 1,000 classes its 246M."""

    def __init__(self, d: int, depth: int, heads: int, classes: int, dropout: float, length: int):
        super().__init__()
        self.blocks = nn.ModuleList(ImageBlock(d, heads, classes, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(d)
        self.register_buffer("places", common.sinusoids(torch.arange(length), d), persistent=False)

    def forward(self, h: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        h = h + self.places.to(h.dtype)
        time = F.silu(common.sinusoids(1000 * t, h.shape[-1]))
        for block in self.blocks:
            h = block(h, time, y)
        return self.norm(h)


class Denoiser(nn.Module):
    """Embeddings phi and the network f_theta(z_t; t) -> logits of x (section 3.2)."""

    def __init__(self, cfg: Config, V: int, length: int, classes: int = 0):
        super().__init__()
        d, D = cfg.dim, cfg.embed_dim
        if d % cfg.heads or (d // cfg.heads) % 2:
            raise RunError(f"--dim {d} must be an even multiple of --heads {cfg.heads}")
        self.cfg, self.V, self.length, self.classes = cfg, V, length, classes
        self.embed = nn.Embedding(V, D)
        if cfg.task == "pairs":  # it has its own way in and out
            self.net = common.EncoderDecoder(D, d, cfg.ffn, cfg.depth, cfg.heads, cfg.dropout,
                                             length, self_condition=False, init_std=cfg.init_std)
            self.head = nn.Linear(D, V)
        else:
            self.enter, self.head = nn.Linear(D, d), nn.Linear(d, V)
        if cfg.task == "text":
            self.net = common.DiT(0, d, cfg.depth, cfg.heads, dropout=cfg.dropout, length=length)
        if cfg.task == "images":
            self.net = ImageTransformer(d, cfg.depth, cfg.heads, classes, cfg.dropout, length)
            common.normal_init(self, cfg.init_std)
            for block in self.net.blocks:  # time and class start without effect
                for layer in [block.by_time] + ([block.by_label] if classes else []):
                    nn.init.zeros_(layer.weight)
        # Paper: "Gaussian initialization N(0, D^-1/2)", a variance by its own notation, which
        # makes rows of norm D^1/4 = 4; common practice (and fairseq's) is a standard deviation.
        nn.init.normal_(self.embed.weight, std=D ** (-0.5 if cfg.embed_init == "std" else -0.25))
        if cfg.dropped == "learned" and cfg.objective == "catdm" and cfg.drop > 0:
            self.dropped = nn.Parameter(torch.zeros(D))
        if cfg.embeddings:
            self.freeze(np.load(cfg.embeddings))

    def freeze(self, rows: np.ndarray) -> None:
        """Use `rows` (V, D) as embeddings and never train them (CSDM-dagger of Table 2)."""
        if rows.shape != self.embed.weight.shape:
            raise RunError(f"--embeddings {self.cfg.embeddings} has shape {rows.shape}, this model "
                           f"needs {tuple(self.embed.weight.shape)}")
        with torch.no_grad():
            self.embed.weight.copy_(torch.from_numpy(rows))
        self.embed.weight.requires_grad_(False)

    def table(self) -> Tensor:
        """The embeddings (V, D) as they enter the diffusion."""
        table = self.embed.weight
        return F.normalize(table, dim=-1) * self.cfg.l2_norm if self.cfg.l2_norm else table

    def given(self, y: Tensor | None, real: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What the network sees beside z_t, a tuple of tensors of B rows, and length logits.

        Nothing for text; labels y (B,); or encoder states (B, M, d) of the source y (B, M), which
        of them, and which tokens of the target are no padding: real (B, L).
        """
        if self.cfg.task != "pairs":
            return (() if y is None else (y,)), None
        states, length_logits = self.net.encode(F.embedding(y, self.table()), y != PAD)
        return (states, y != PAD, real), length_logits

    def forward(self, z: Tensor, t: Tensor, given: tuple[Tensor, ...] = ()) -> Tensor:
        """Logits (B, L, V) float32 from z (B, L, D), t (B,) and what `given` returned."""
        if self.cfg.task == "pairs":
            states, of_source, real = given
            return self.head(self.net.decode(z, t, None, real, states, of_source)).float()
        return self.head(self.net(self.enter(z), t, *given)).float()


# ---------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------


class CATDM(nn.Module):
    """Student and teacher; the training loss is the forward."""

    def __init__(self, cfg: Config, V: int, length: int, classes: int = 0, pad: int | None = None):
        super().__init__()
        self.cfg, self.pad = cfg, pad
        self.student = Denoiser(cfg, V, length, classes)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def train(self, mode: bool = True) -> "CATDM":
        super().train(mode)
        self.teacher.eval()  # no dropout in the targets
        return self

    @torch.no_grad()
    def update_teacher(self, step: int) -> None:
        """theta-bar <- eta theta-bar + (1 - eta) theta, phi-bar likewise (Eq. 3).

        Paper: eta = .99. Ours is less in the first 900 steps, as in common.EMA: what is learnt at
        t = 0 reaches t = 1 through several generations of teachers.
        """
        eta = min(self.cfg.teacher, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()),
                             1 - eta)

    def forward(self, x: Tensor, y: Tensor | None, t: Tensor, u: Tensor, eps: Tensor, eps0: Tensor
                ) -> tuple[Tensor, Tensor]:
        """Algorithm 1, lines 3 to 6: sums (3,) of L_0 and of the rest over tokens, and of the
        length loss over sentences, in nats.

        x (B, L) ids, y labels (B,), sources (B, M) or None, t (B,) uniform in [0, 1], which
        becomes a time in [t_0, 1], u (B, L + 3) uniform noise (dropping, its ratio, s, labels),
        eps (B, L, D) and eps0 (n, L, D) normal noise: L_0, at t_0, is taken on the first n
        samples. All terms are sums over D. Also statistics (5, 10): by tenth of t L_DM, L_CM,
        cross-entropy, tokens; the last row holds L_0, its tokens, the rest.
        """
        cfg, student, teacher = self.cfg, self.student, self.teacher
        (B, L), n, catdm = x.shape, len(eps0), self.cfg.objective == "catdm"
        drop, (ratio, back, hide) = u[:, :L], u[:, L:].unbind(1)
        t_0 = cfg.t_0
        t = t_0 + (1 - t_0) * t
        real = x != self.pad if self.pad is not None else torch.ones_like(x, dtype=torch.bool)
        if y is not None and cfg.task == "images":
            y = torch.where(hide < cfg.null_labels, student.classes, y)

        def coefficients(t: Tensor) -> tuple[Tensor, ...]:
            return tuple(c.float()[:, None, None] for c in signal_and_noise(t, cfg.shift))
        table = student.table().float()
        z = F.embedding(x, table)                                         # Psi(x), (B, L, D)

        # z_t = a_t (Psi(x) . m_RD) + sigma_t eps: the mask is on the embeddings.
        z_in = z
        if catdm and cfg.drop > 0:
            share = {"fixed": torch.full_like(t, cfg.drop), "rand_drop": ratio, "linear": t}
            keep = drop >= share[cfg.dropping][:, None]
            gone = student.dropped if cfg.dropped == "learned" else 0.0
            z_in = torch.where(keep[..., None], z, gone)
        a_t, sigma_t = coefficients(t)
        z_t = a_t * z_in + sigma_t * eps
        # L_0 has a pass of its own, without dropping: Theorem 1 needs x to be decoded from z_0.
        zero = torch.full_like(t[:n], t_0)
        a_0, sigma_0 = coefficients(zero)
        z_0 = a_0 * z[:n] + sigma_0 * eps0
        given, length_logits = student.given(y, real)
        both = tuple(torch.cat([g, g[:n]]) for g in given)
        logits = student(torch.cat([z_t, z_0]), torch.cat([t, zero]), both)
        log_p, log_p0 = logits.log_softmax(-1).split([B, n])
        recon = -log_p0.gather(-1, x[:n, :, None])[..., 0] * real[:n]     # (n, L)

        # |Psi(x) - Psihat|^2, with Psihat = sum_k P(k) e_k, as |sum_k (P(k) - [k = x]) e_k|^2,
        # which is exact where P is nearly certain; without the mean of all e_k, which adds nothing
        # but, where the vectors have collapsed, hides their differences from bfloat16.
        gap = minus_truth(log_p, x) @ (table - table.mean(0))
        square = gap.square().sum(-1)                                     # (B, L)
        ce = -log_p.gather(-1, x[..., None])[..., 0]
        kl = torch.zeros_like(ce)
        if catdm and cfg.cm == "ce":
            kl = ce  # CATDM-CE of Table 10
        elif catdm and cfg.cm == "cm":
            with torch.no_grad():  # Eq. 3: the teacher one DDIM step nearer to x, at s < t
                s = t_0 + back * (t - t_0)
                a_s, sigma_s = coefficients(s)
                z_bar = F.embedding(x, teacher.table())
                z_s = common.ddim(z_t, z_bar, a_t, sigma_t, a_s, sigma_s)
                log_q = teacher(z_s, s, teacher.given(y, real)[0]).log_softmax(-1)
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        if catdm:
            rest = cfg.beta_dm * square + cfg.beta_cm * kl
        else:  # Eq. 2
            weight = (1 - t_0) * diffusion_weight(t, cfg.shift)[:, None]
            rest = weight.float() * square + prior_kl(z, cfg.shift)
        rest, length = (rest * real).sum(), torch.zeros_like(rest[0, 0])
        if length_logits is not None:  # B.3: the target's length from the encoder's output
            length = common.length_loss(length_logits, real.sum(1), given[1].sum(1))

        rows = torch.stack([square, kl, ce, torch.ones_like(ce)]).detach() * real
        tenth = (10 * t).long().clamp_max(9)
        stats = torch.zeros(4, 10, device=t.device).index_add(1, tenth, rows.sum(-1))
        sums = torch.stack([recon.sum(), rest, length])
        last = torch.stack([sums[0], real[:n].sum(), rest]).detach()
        return sums, torch.cat([stats, F.pad(last, (0, 7))[None]])


def minus_truth(log_p: Tensor, x: Tensor) -> Tensor:
    """P(k) - [k = x], of log_p's shape (..., V), x (...)."""
    return log_p.exp() - (torch.arange(log_p.shape[-1], device=x.device) == x[..., None]).float()


def prior_kl(z: Tensor, shift: float) -> Tensor:
    """KL(q(z_1 | x) || N(0, I)) in nats of each token, z = Psi(x) (..., D) -> (...)."""
    a, sigma = signal_and_noise(torch.ones((), device=z.device), shift)
    sigma2 = sigma.square()
    per_dim = sigma2 - 1 - sigma2.log()
    return (0.5 * (z.shape[-1] * per_dim + a.square() * z.double().square().sum(-1))).to(z.dtype)


# ---------------------------------------------------------------------------------------------
# Sampler
# ---------------------------------------------------------------------------------------------


def predict(model: Denoiser, z: Tensor, t: Tensor, given: tuple, guidance: float = 0.0) -> Tensor:
    """log P(x | z_t, y; t) (B, L, V), float64, guided as in Eq. 4 and normalised again.

    guidance 0 is the conditional model. t is a scalar.
    """
    t = t.float().expand(len(z))
    if not model.classes or not guidance:
        return model(z, t, given).double().log_softmax(-1)
    [y] = given
    both = torch.cat([y, torch.full_like(y, model.classes)])
    logits = model(torch.cat([z, z]), torch.cat([t, t]), (both,))
    with_y, without = logits.double().log_softmax(-1).chunk(2)
    return ((1 + guidance) * with_y - guidance * without).log_softmax(-1)


@torch.no_grad()
def sample(
    model: Denoiser, shape: tuple[int, int], steps: int, given: tuple = (), *,
    sampler: str = "ancestral", guidance: float = 0.0, argmax: bool = False,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Algorithm 2: yields tokens of `shape` (B, L) after each of steps + 1 calls, the last is the
    sample. `given` comes from Denoiser.given.

    ancestral draws z_s from p(z_s | z_t) of Eq. 1; ddim takes the deterministic step below Eq. 3.
    The steps end at t_0. Before the last call the tokens are the most probable ones.
    """
    table = model.table().double()
    noise = dict(generator=generator, device=table.device)
    z = torch.randn(*shape, table.shape[1], **noise)
    clock = torch.linspace(1, model.cfg.t_0, steps + 1, dtype=torch.float64, device=table.device)
    for t, s in zip(clock[:-1], clock[1:]):
        log_p = predict(model, z, t, given, guidance)
        yield log_p.argmax(-1)
        z_hat = log_p.exp() @ table
        path = *signal_and_noise(t, model.cfg.shift), *signal_and_noise(s, model.cfg.shift)
        if sampler == "ancestral":
            mean, var = common.gaussian_posterior(z.double(), z_hat, *path)
            z = mean + var.sqrt() * torch.randn(z.shape, **noise)
        else:
            z = common.ddim(z.double(), z_hat, *path)
        z = z.float()
    log_p = predict(model, z, clock[-1], given, guidance)
    u = torch.rand(shape, dtype=torch.float64, **noise)
    yield log_p.argmax(-1) if argmax else common.sample_categorical(log_p, u=u)


# ---------------------------------------------------------------------------------------------
# Likelihood
# ---------------------------------------------------------------------------------------------


BOUND_ENDS = (LOGSNR, 8.0, 6.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -2.0)


@torch.no_grad()
def bound_terms(
    model: Denoiser, x: Tensor, y: Tensor | None, u: Tensor, eps: Tensor, eps0: Tensor,
    real: Tensor, end: float = LOGSNR, autocast=contextlib.nullcontext,
) -> Tensor:
    """One draw of Eq. 2's three terms in nats per real token, float64: (B, 3), prior,
    reconstruction, diffusion. Nothing is dropped.

    x, real (B, L), y as in training, u (B,) uniform, eps, eps0 (B, L, D) normal. The diffusion
    may end at any t_0 > 0, where x is decoded from z_t0: the bound holds for any schedule's ends.
    It matters: the weight e^logsnr charges a doubt of 1e-3 at logsnr 14 with nats.
    """
    table, shift, t_0 = model.table().double(), model.cfg.shift, time_of(end)
    z = F.embedding(x, table)
    with autocast():
        given, _ = model.given(y, real)

    def log_p(t: Tensor, eps: Tensor) -> Tensor:
        a, sigma = (c[:, None, None] for c in signal_and_noise(t, shift))
        with autocast():
            logits = model((a * z + sigma * eps).float(), t.float(), given)
        return logits.double().log_softmax(-1)
    t = t_0 + (1 - t_0) * u.double()
    recon = -log_p(torch.full_like(t, t_0), eps0).gather(-1, x[..., None])[..., 0]
    gap = minus_truth(log_p(t, eps), x) @ table
    diffusion = (1 - t_0) * diffusion_weight(t, shift)[:, None] * gap.square().sum(-1)
    terms = torch.stack([prior_kl(z, shift), recon, diffusion], -1)       # (B, L, 3)
    return (terms * real[..., None]).sum(1) / real.sum(1, keepdim=True)


def likelihoods(
    model: Denoiser, batches: Iterator[tuple[Tensor, Tensor | None]], draws: int, seed: int,
    pad: int | None = None, end: float = LOGSNR, autocast=contextlib.nullcontext,
) -> Tensor:
    """bound_terms of every sequence and draw: (n, 3), n = sequences x draws.

    Each row's sum is an estimate of a bound on -log p(x), or p(x | y). Times are low-discrepancy
    across the batch and across a sequence's draws, so the naive standard error is on the safe side.
    """
    rows = []
    for number, (x, y) in enumerate(batches):
        noise = dict(device=x.device, generator=torch.Generator(x.device).manual_seed(
            common.mix(seed, 77, number)))
        shift = torch.rand((), dtype=torch.float64, **noise)
        place = torch.randperm(len(x), **noise)
        real = x != pad if pad is not None else torch.ones_like(x, dtype=torch.bool)
        for draw in range(draws):
            u = common.low_discrepancy_t(draw * len(x) + place, len(x) * draws, shift, 0.0)
            eps, eps0 = torch.randn(2, *x.shape, model.cfg.embed_dim, **noise)
            rows.append(bound_terms(model, x, y, u, eps, eps0, real, end, autocast))
    return torch.cat(rows)


def evaluate(model: Denoiser, cfg: Config, data: Data, place: common.Setup) -> dict[str, dict]:
    """The bound and its parts on cfg.split, in bits per character (byte) or nats per token; for
    pairs also BLEU."""
    quiet = 0.2 if sys.stderr.isatty() else 10

    def terms(end: float, split: str, limit: int, seed: int) -> Tensor:
        part = dataclasses.replace(cfg, split=split, eval_sequences=limit)
        batches = tqdm(eval_batches(part, data, place), f"evaluate {split}", leave=False,
                       disable=not place.is_main or split != cfg.split, mininterval=quiet)
        return likelihoods(model, batches, cfg.eval_draws, seed, pad_of(data), end, place.autocast)

    model.eval()
    end = cfg.bound_end
    if end > LOGSNR:
        ends = [cfg.logsnr_max, *(e for e in BOUND_ENDS if e < cfg.logsnr_max)]
        sums = [place.sum(terms(e, "train", 128, cfg.seed).sum()) for e in ends]
        end = ends[int(torch.stack(sums).argmin())]
    end = min(end, cfg.logsnr_max)
    values = terms(end, cfg.split, cfg.eval_sequences, common.mix(cfg.seed, place.rank))
    model.train()
    unit = getattr(data, "unit", "token")
    scale, unit = (1.0, "nats/token") if unit == "token" else (1 / math.log(2), f"bits/{unit}")
    values = scale * torch.cat([values.sum(1, keepdim=True), values], 1)
    one = torch.ones_like(values)
    n, total, square = place.sum(torch.stack([one, values, values**2]).sum(1)).tolist()
    names = ("nll_bound", "prior", "reconstruction", "diffusion")
    figures = {name: dict(value=b / a, stderr=math.sqrt(max(0.0, c / a - (b / a) ** 2) / a),
                          unit=unit, draws=int(a), split=cfg.split, end=end)
               for name, a, b, c in zip(names, n, total, square)}
    if isinstance(data, PairData) and place.is_main:
        pairs = data.pairs_of(cfg.split, cfg.eval_sequences or None)
        found = tqdm(translate(model, [a for a, _ in pairs], data, cfg, place), "translate",
                     len(pairs), leave=False, mininterval=quiet)
        rows = [row | {"reference": b} for row, (_, b) in zip(found, pairs)]
        with open(Path(cfg.out) / f"translations-{cfg.split}.jsonl", "w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        figures |= score_translations(rows)
    return figures


# ---------------------------------------------------------------------------------------------
# Data: x is to be generated, y is given with it
# ---------------------------------------------------------------------------------------------

Data = ImageTokens | TextData | PairData


def load(cfg: Config) -> Data:
    if cfg.task == "pairs":
        return load_pairs(cfg.dataset, cfg.data_dir, cfg.length, cfg.vocab, cfg.max_number,
                          lower=cfg.lower)
    if cfg.task == "text":
        return load_dataset(cfg.dataset, cfg.data_dir, cfg.length)
    name = cfg.dataset
    if name in ARRAYS:
        name = cfg.tokens or str(Path(cfg.data_dir) / name / "tokens.npy")
    return load_images(name, cfg.data_dir, cfg.labels)


def pad_of(data: Data) -> int | None:
    return PAD if isinstance(data, PairData) else getattr(data, "pad_id", None)


def eval_batches(cfg: Config, data: Data, place: common.Setup
                 ) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(x, y) of cfg.split as in training, at most eval_sequences, this rank's share."""
    tokens = min(16384, 2**27 // data.vocab_size)  # logits of 1 GiB in float64
    batch = max(1, min(cfg.micro_batch, tokens // data.length))
    y, rows = None, data
    if not isinstance(data, TextData):  # x and y side by side
        if isinstance(data, PairData):
            pairs = data.pairs_of(cfg.split, cfg.eval_sequences or None)
            y, x = (data.rows(side) for side in zip(*pairs))
        else:
            x, y = data.splits[cfg.split], data.labels[cfg.split]
        both = x if y is None else np.concatenate([x, y.reshape(len(y), -1)], 1)
        rows = TextData(data.name, 2**31, both.shape[1], "token", {cfg.split: both}, codec=None)
    for ids in rows.eval_batches(cfg.split, batch, cfg.eval_sequences or None, place.rank,
                                 place.world):
        ids = torch.from_numpy(ids).to(place.device)
        given = None if y is None else ids[:, x.shape[1]:].squeeze(1) if y.ndim == 1 else (
            ids[:, x.shape[1]:])
        yield ids if y is None else ids[:, : x.shape[1]], given


def load_step(cfg: Config, data: Data, step: int, place: common.Setup) -> list[tuple]:
    """This rank's micro-batches of a step, with everything random: (x, y, t, u, eps, eps0).

    Every rank draws the noise of the global batch, 134 MB at most in the presets, and takes its
    rows: one call of the generator for each sample would take longer than a small step.
    """
    if isinstance(data, PairData):  # as many sentences as the step's tokens allow
        y, x = data.train_batch(cfg.seed, step, cfg.batch_tokens)
        n, share = len(x), cfg.micro_tokens * place.world
        parts = min(max(1, n // place.world), math.ceil(max(x.size, y.size) / share))
        indices = [torch.arange(k * place.world + place.rank, n, parts * place.world)
                   for k in range(parts)]
    else:
        n, indices = cfg.batch_size, common.micro_batches(cfg.batch_size, cfg.micro_batch, place)
    shift = np.random.default_rng(common.mix(cfg.seed, step, 1)).random()
    generator = torch.Generator(place.device).manual_seed(common.mix(cfg.seed, step))
    batches = []
    for index in indices:
        part = cfg.seed, step, n, index.numpy()
        if isinstance(data, PairData):
            ids, given = x[index], y[index]
        elif isinstance(data, ImageTokens):
            rows = data.train_rows(*part)
            ids = data.splits["train"][rows].astype(np.int64)
            given = data.labels["train"][rows] if data.classes else None
        else:
            ids, given = data.train_batch(*part), None
        if not batches:
            noise, L = dict(generator=generator, device=place.device), ids.shape[1]
            u, first = torch.rand(n, L + 3, **noise), math.ceil(cfg.recon_share * n)
            eps, eps0 = (torch.randn(k, L, cfg.embed_dim, **noise) for k in (n, first))

        def put(array):
            if isinstance(array, np.ndarray):
                array = torch.from_numpy(array)
            if array is not None and place.on_cuda:
                array = array.pin_memory()
            return array if array is None else array.to(place.device, non_blocking=True)
        rows = put(index)
        t = common.low_discrepancy_t(rows, n, shift, t_min=0.0)
        rows0 = rows[: int((index < first).sum())]  # index ascends
        batches.append((put(ids), put(given), t, u[rows], eps[rows], eps0[rows0]))
    return batches


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def train_step(net, model: CATDM, optimizer, ema, cfg: Config, step: int, batches, place) -> Tensor:
    """One optimizer step on this rank's micro-batches; returns (5, 10) statistics, no host sync."""
    for group in optimizer.param_groups:
        group["lr"] = common.learning_rate(step, cfg.lr, cfg.warmup, cfg.lr_schedule, cfg.steps)
    # Divide by the real tokens of the global batch, in L_0 by those of its samples; DDP averages
    # gradients, hence `world`.
    counts = torch.zeros(3, device=place.device)  # tokens in L_0, tokens, sentences
    for x, *_, eps0 in batches:
        real = (x != (-1 if model.pad is None else model.pad)).sum(1).float()
        counts += torch.stack([real[: len(eps0)].sum(), real.sum(), torch.ones_like(real).sum()])
    weights = 1 / place.sum(counts)
    weights[2] *= cfg.length_weight
    stats = torch.zeros(5, 10, device=place.device)
    for k, batch in enumerate(batches):
        last = k == len(batches) - 1
        with contextlib.nullcontext() if last or place.world == 1 else net.no_sync():
            with place.autocast():
                sums, part = net(*batch)
            ((sums * weights).sum() * place.world).backward()
        stats += part
    nn.utils.clip_grad_norm_(model.student.parameters(), cfg.clip, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.update_teacher(step)
    ema.update()
    return stats


def compiled(model: CATDM, cfg: Config, place: common.Setup, backend="inductor"):
    """`model` compiled; for translation once for all lengths, on a batch that is not a real one:
    sizes that are equal in the first call are taken for one and compiled again when they differ,
    and so is a size that is a layer's width, or no multiple of 8 as real lengths are."""
    if cfg.task != "pairs":
        return torch.compile(model, backend=backend)
    # The analysis left out fails an assertion of its own on shapes that vary (torch 2.11).
    options = {"triton.coalesce_tiling_analysis": False} if backend == "inductor" else None
    net = torch.compile(model, dynamic=True, backend=backend, options=options)
    at, D = dict(device=place.device), cfg.embed_dim
    lengths = [k for k in range(2, model.student.length + 1) if k not in (D, cfg.dim, cfg.heads)]
    M, N = sorted(lengths, key=lambda k: (k % 8 > 0, abs(k - 24)))[:2]
    B = max(98, min(cfg.batch_tokens, cfg.micro_tokens) // 24) | 1  # odd
    n = math.ceil(cfg.recon_share * B)
    y, x = (torch.ones(B, k, dtype=torch.long, **at) for k in (M, N))
    with place.autocast():
        sums, _ = net(x, y, torch.rand(B, **at), torch.rand(B, N + 3, **at),
                      torch.zeros(B, N, D, **at), torch.zeros(n, N, D, **at))
    sums.sum().backward()
    model.zero_grad(set_to_none=True)
    return net


def build(cfg: Config, data: Data, place: common.Setup):
    """Model, what to call in training (compiled, DDP), optimizer and EMA of the student."""
    model = CATDM(cfg, data.vocab_size, data.length, len(getattr(data, "classes", ())),
                  pad_of(data)).to(place.device)
    # Decay would shorten the embeddings, whose length is the loss's business.
    own = [p for name, p in model.student.named_parameters()
           if p.requires_grad and name != "embed.weight"]
    table = [p for p in [model.student.embed.weight] if p.requires_grad]
    groups = [dict(params=own), dict(params=table, weight_decay=0.0)][: 1 + len(table)]
    optimizer = torch.optim.AdamW(groups, cfg.lr, betas=(0.9, cfg.beta2), eps=1e-8,
                                  weight_decay=cfg.weight_decay, fused=True)
    net = model
    if cfg.compile and place.on_cuda:
        net = compiled(model, cfg, place)
    if place.world > 1:
        devices = [place.device.index] if place.on_cuda else None
        net = DistributedDataParallel(net, device_ids=devices, gradient_as_bucket_view=True)
    return model, net, optimizer, common.EMA(model.student, cfg.ema)


def flops_per_token(model: CATDM) -> float:
    """Model FLOPs of training per token: the student forward and backward on 1 + recon_share
    passes, the teacher forward."""
    student, cfg = model.student, model.cfg
    macs = sum(m.weight.numel() for name, m in student.named_modules() if isinstance(m, nn.Linear)
               and not any(part in name for part in ("adaln", "time", "by_label")))
    macs += 2 * cfg.depth * student.length * cfg.dim + student.V * cfg.embed_dim
    teacher = cfg.objective == "catdm" and cfg.cm == "cm"
    return 2.0 * macs * (3 * (1 + cfg.recon_share) + teacher)


def train(cfg: Config, place: common.Setup) -> None:
    out, checkpoint = Path(cfg.out), Path(cfg.out) / "checkpoint.pt"
    data = load(cfg)
    model, net, optimizer, ema = build(cfg, data, place)
    step, seconds, resumed = 0, 0.0, checkpoint.exists() and not cfg.overwrite
    if resumed:
        state = common.read_checkpoint(checkpoint, "catdm", place.device)
        common.check_same_run(state["config"], dataclasses.asdict(cfg), Config)
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
            f"another --out; to sample: python catdm.py --mode sample --out {out}")
        return

    out.mkdir(parents=True, exist_ok=True)
    info = common.environment(place)
    parameters = sum(p.numel() for p in model.student.parameters())
    if place.is_main:
        print(f"{data.name}: {data.vocab_size:,} symbols, {data.length} tokens | "
              f"{parameters / 1e6:.1f}M parameters | {info['hardware']}")
        print(f"{'resuming at step ' + str(step) if resumed else 'training'} -> {out}"
              + (", once compiled: one to three minutes" if cfg.compile and place.on_cuda else ""))
    start = dict(method="catdm", argv=sys.argv[1:], config=dataclasses.asdict(cfg),
                 parameters=parameters, **info)
    progress = common.Progress(out, place, start, step, cfg.steps, keep=resumed)
    stop = common.StopRequest()

    def save() -> None:
        rng = common.rng_states(place)
        if place.is_main:
            common.write_checkpoint(checkpoint, dict(
                method="catdm", config=dataclasses.asdict(cfg), model=model.state_dict(),
                ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step,
                seconds=seconds, rng=rng, tokenizer=data.tokenizer()))

    stats, logged, clock, first = torch.zeros(5, 10, device=place.device), step, time.time(), True
    finished = False
    while step < cfg.steps and not finished:
        batches = load_step(cfg, data, step, place)
        stats += train_step(net, model, optimizer, ema, cfg, step, batches, place)
        step += 1
        if first:  # compilation is not training time
            if place.on_cuda:
                torch.cuda.synchronize()
            clock, first, mark = time.time(), False, (step, time.time())
        now = time.time()
        progress.advance(step)

        at_log = step % cfg.log_every == 0 or step == cfg.steps
        out_of_time = bool(cfg.minutes) and seconds + now - clock >= 60 * cfg.minutes
        # Several ranks must agree before they leave the loop: they ask each other when they log.
        finished = stop.asked or out_of_time
        if place.world > 1:
            finished = place.any(finished) if at_log else False
        if at_log or finished:
            total = place.sum(stats.clone())  # the only wait for the device
            dm, kl, ce, tokens, (recon, recon_tokens, rest, *_) = total.tolist()
            n, loss = sum(tokens), recon / recon_tokens + rest / sum(tokens)
            if not math.isfinite(loss):
                progress.close()
                raise RunError(
                    f"the loss is {loss} between steps {logged} and {step}. "
                    + (f"{checkpoint} still holds an earlier, good state: " if checkpoint.exists()
                       else "Nothing was saved yet: ") + "try a lower --lr or --clip")
            now = time.time()
            rate = (step - mark[0]) * n / (step - logged) / max(1e-9, now - mark[1])
            use = common.utilisation(rate * flops_per_token(model), place)
            norms = model.student.table().detach().float().norm(dim=-1)
            record = dict(
                step=step, loss=loss, L_0=recon / recon_tokens, L_DM=sum(dm) / n,
                L_CM=sum(kl) / n, ce=sum(ce) / n,
                ce_by_t=[round(c / m, 4) if m else None for c, m in zip(ce, tokens)],
                embedding_norm=round(norms.mean().item(), 4),
                lr=optimizer.param_groups[0]["lr"], tokens_per_s=round(rate),
                mfu=use and round(use, 4), seconds=round(seconds + now - clock, 2))
            progress.log(record, dict(
                L_0=f"{record['L_0']:.3f}", L_CM=f"{record['L_CM']:.3f}", ce=f"{record['ce']:.3f}",
                **{"tok/s": f"{rate:,.0f}"}, **({"mfu": f"{use:.0%}"} if use else {})))
            stats.zero_()
            logged, mark = step, (step, time.time())
        if step % cfg.save_every == 0 or step == cfg.steps or finished:
            seconds, clock = seconds + time.time() - clock, time.time()
            if bool(torch.isfinite(stats).all()):
                save()
    progress.close()
    stop.restore()
    if stop.asked:
        place.is_main and print(f"stopped at step {step}, saved: the same command resumes")
        raise KeyboardInterrupt
    report(model.student, ema, cfg, data, place, step, seconds, info)


def report(model: Denoiser, ema, cfg: Config, data: Data, place, step: int, seconds: float, info
           ) -> None:
    """Evaluate and sample with the averaged weights; print and write result.json."""
    result = dict(method=name_of(cfg), dataset=cfg.dataset, step=step,
                  train_seconds=round(seconds, 1), config=dataclasses.asdict(cfg), **info)
    with ema.swapped_in():
        result["figures"] = evaluate(model, cfg, data, place)
        if place.is_main:
            result["samples"] = show_samples(model, cfg, data, place, graded=True)
    if not place.is_main:
        return
    if getattr(data, "unit", "token") in ("char", "byte"):
        unigram, bigram = ngram_entropies(data, cfg.split)
        result["data_entropy_bits"] = dict(unigram=unigram, bigram=bigram)
        print(f"entropy of {data.name}/{cfg.split}: unigram {unigram:.3f}, bigram {bigram:.3f} "
              f"bits/{data.unit}")
    print_figures(result["figures"])
    common.write_json(Path(cfg.out) / "result.json", result)
    print(f"{Path(cfg.out) / 'result.json'}: {step} steps, {seconds / 60:.1f} minutes of training")


def print_figures(figures: dict[str, dict]) -> None:
    for name, f in figures.items():
        error = f" ± {f['stderr']:.4f}" if "stderr" in f else ""
        print(f"{name:16s} {f['value']:.4f}{error} {f['unit']}")


def name_of(cfg: Config) -> str:
    """What tables call this run."""
    if cfg.objective == "csdm":
        return "csdm" + ("-l2" if cfg.l2_norm else "") + ("-fixed" if cfg.embeddings else "")
    return "catdm" + {"cm": "", "ce": "-ce", "none": "-without-cm"}[cfg.cm]


# ---------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def translate(model: Denoiser, sources: list[str], data: PairData, cfg: Config,
              place: common.Setup) -> Iterator[dict]:
    """Yields one {"source", "text"} per source, in order.

    length_beam lengths around the most probable one, noise_beam noises for each, the best by
    minimum Bayes risk: Difformer's decoding. The paper does not tell CATDM's own.
    """
    model.eval()
    generator = torch.Generator(place.device).manual_seed(common.mix(cfg.seed, 98))
    beams = cfg.length_beam * cfg.noise_beam
    for begin in range(0, len(sources), cfg.sample_batch):
        batch = sources[begin:begin + cfg.sample_batch]
        y = torch.from_numpy(data.rows(batch)).to(place.device)
        with place.autocast():
            (states, of_source, _), length = model.given(y, y != PAD)
            lengths = common.length_beam(length, of_source.sum(1), cfg.length_beam)
            lengths = lengths.clamp(3, data.length)
            lengths = lengths.repeat_interleave(cfg.noise_beam, 1).view(-1, 1)  # (b * beams, 1)
            real = torch.arange(int(lengths.max()), device=place.device) < lengths
            given = (*(g.repeat_interleave(beams, 0) for g in (states, of_source)), real)
            for x in sample(model, real.shape, cfg.sample_steps, given, sampler=cfg.sampler,
                            argmax=cfg.argmax, generator=generator):
                pass
        x = torch.where(real, x, PAD).view(len(batch), beams, -1).tolist()
        for text, candidates in zip(batch, x):
            candidates = [[i for i in c if i != PAD] for c in candidates]
            texts = [data.decode(c[1:]) for c in candidates]
            yield dict(source=text, text=texts[choose(candidates)], candidates=texts)


def draw_samples(model: Denoiser, cfg: Config, data: Data, place: common.Setup, guidance: float
                 ) -> tuple[Tensor, Tensor | None]:
    """cfg.samples sequences (n, L) on the CPU and their labels (n,), one class after the other."""
    model.eval()
    generator = torch.Generator(place.device).manual_seed(common.mix(cfg.seed, 99))
    y = None
    if model.classes:
        if cfg.label and cfg.label not in data.classes:
            raise RunError(f"--label {cfg.label}: choose one of {', '.join(data.classes)}")
        y = torch.arange(cfg.samples) % model.classes
        if cfg.label:
            y.fill_(data.classes.index(cfg.label))
    found = []
    if cfg.label and not model.classes:
        raise RunError("--label: this model has no classes")
    bar = tqdm(total=math.ceil(cfg.samples / cfg.sample_batch) * (cfg.sample_steps + 1),
               desc="sample", unit="step", leave=False,
               mininterval=0.2 if sys.stderr.isatty() else 10)
    for begin in range(0, cfg.samples, cfg.sample_batch):
        n = min(cfg.sample_batch, cfg.samples - begin)
        given = () if y is None else (y[begin:begin + n].to(place.device),)
        with place.autocast():
            for x in sample(model, (n, model.length), cfg.sample_steps, given, sampler=cfg.sampler,
                            guidance=guidance, argmax=cfg.argmax, generator=generator):
                bar.update()
        found.append(x.cpu())
    bar.close()
    model.train()
    return torch.cat(found), y


def show_samples(model: Denoiser, cfg: Config, data: Data, place, graded: bool = False) -> dict:
    """Text: print samples and write samples.jsonl; translations: print. Images: samples.png and
    samples.npz. After training (`graded`) by class at guidance 0, 1 and 2, with grades."""
    out = Path(cfg.out)
    if cfg.task == "pairs":
        sources = [a for a, _ in data.pairs_of(cfg.split, cfg.samples)]
        if cfg.source:
            file = Path(cfg.source)
            sources = read_lines(file) if len(cfg.source) < 256 and file.is_file() else [cfg.source]
        for row in translate(model, sources, data, cfg, place):
            print(f"{row['source']}\n  -> {row['text']}")
        return {}
    if cfg.task == "text":
        rows = [dict(text=data.decode(ids), ids=ids)
                for ids in draw_samples(model, cfg, data, place, 0.0)[0].tolist()]
        for row in rows:
            print(f"--- sample\n{row['text']}\n")
        with open(out / "samples.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return {}
    scales = [0.0] if not model.classes else [0.0, 1.0, 2.0] if graded else [cfg.guidance]
    drawn = {w: draw_samples(model, cfg, data, place, w) for w in scales}
    y = drawn[scales[0]][1]
    np.savez_compressed(out / "samples.npz", **{f"guidance{w:g}": x for w, (x, _) in drawn.items()},
                        **({} if y is None else {"labels": y}))
    columns = model.classes if 1 < model.classes <= 40 and not cfg.label else 16
    if data.pixels is not None:
        save_grids(out / "samples.png", [data.draw(x.numpy()) for x, _ in drawn.values()], columns)
        print(f"{out / 'samples.png'}: " + (f"classes {' '.join(data.classes)}, guidance "
              + ", ".join(f"{w:g}" for w in scales) if model.classes else "samples"))
    if not graded or y is None:
        return {}
    judge, grades = Judge(data), {}
    for name, (x, y) in {"valid": judge.real, **drawn}.items():
        name = name if name == "valid" else f"guidance {name:g}"
        grades[name] = judge.grade(x, y)
        print(f"{name:11s} a small classifier recognises {grades[name]['recognised']:6.1%}, "
              f"Fréchet distance {grades[name]['frechet']:.2f}")
    return grades


def save_grids(path: Path, groups: list[np.ndarray], columns: int) -> None:
    """One picture: the groups of grey images (n, H, W), `columns` in a row, below each other."""
    from torchvision.utils import make_grid, save_image
    grids = [make_grid(torch.from_numpy(g)[:, None] / 255, nrow=columns, pad_value=0.5)
             for g in groups]
    image = torch.cat([F.pad(g, (0, 0, 0, 8), value=1.0) for g in grids], 1)
    zoom = max(1, round(800 / image.shape[2]))
    save_image(image.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2), path)


class Judge:
    """A small convolutional network on the grid of tokens, trained on the labelled images for some
    seconds: which class does it see in samples, and how are its 64 features distributed?"""

    steps, batch = 300, 128

    def __init__(self, data: ImageTokens):
        rows, columns = data.shape
        self.real = (torch.from_numpy(data.splits["valid"].astype(np.int64)),
                     torch.from_numpy(data.labels["valid"]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(data.vocab_size, 32), nn.Linear(
                64, len(data.classes))
            self.net = nn.Sequential(
                nn.Unflatten(2, (rows, columns)), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
                nn.Conv2d(64, 64, 3, 2, padding=1), nn.ReLU(), nn.Flatten(),
                nn.Linear(64 * ((rows + 1) // 2) * ((columns + 1) // 2), 64), nn.ReLU())
            parts = [self.embed, self.net, self.head]
            optimizer = torch.optim.Adam([p for m in parts for p in m.parameters()], 2e-3)
            for step in range(self.steps):
                chosen = data.train_rows(0, step, self.batch, range(self.batch))
                x = torch.from_numpy(data.splits["train"][chosen].astype(np.int64))
                y = torch.from_numpy(data.labels["train"][chosen])
                F.cross_entropy(self.head(self.features(x)), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        self.real_features = self.all_features(self.real[0])

    def features(self, x: Tensor) -> Tensor:
        """(n, L) -> (n, 64)."""
        return self.net(self.embed(x).transpose(1, 2))

    @torch.no_grad()
    def all_features(self, x: Tensor) -> Tensor:
        """The same in parts, without gradient, float64."""
        return torch.cat([self.features(part) for part in x.split(512)]).double()

    @torch.no_grad()
    def grade(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Samples (n, L) of classes y (n,): the share recognised, and the Fréchet distance of
        their features to the valid split's (FID with this network; it grows as n falls)."""
        h, real = self.all_features(x), self.real_features
        right = (self.head(h.float()).argmax(-1) == y).double().mean().item()
        mean = (h.mean(0) - real.mean(0)).square().sum()
        a, b = h.T.cov(), real.T.cov()
        root = torch.linalg.eigvals(a @ b).real.clamp_min(0).sqrt().sum()  # tr (a b)^1/2
        return dict(recognised=right, frechet=(mean + a.trace() + b.trace() - 2 * root).item())


# ---------------------------------------------------------------------------------------------
# Modes: sample, eval, bench
# ---------------------------------------------------------------------------------------------


def load_run(cfg: Config, place: common.Setup) -> tuple[Denoiser, Data, int]:
    """A trained student with its averaged weights, its data (to sample, the tokenizer), step."""
    checkpoint = Path(cfg.out) / "checkpoint.pt"
    state = common.read_checkpoint(checkpoint, "catdm", place.device)
    kinds = dict(images=ImageTokens, text=TextData, pairs=PairData)
    alone = cfg.mode == "sample" and (cfg.task != "pairs" or cfg.source)
    data = kinds[cfg.task].from_tokenizer(state["tokenizer"]) if alone else load(cfg)
    model = Denoiser(cfg, data.vocab_size, data.length, len(getattr(data, "classes", ())))
    common.load_weights(model.to(place.device), state["ema"]["params"], checkpoint)
    return model, data, state["step"]


def open_run(out: str, flags: list[str]) -> tuple[Config, common.Setup, Denoiser, Data, int]:
    flags = ["--mode", "eval", "--out", out, "--eval_sequences", "0", *flags]
    cfg, _ = common.parse_config(Config, "catdm", __doc__, PRESETS, flags)
    place = common.setup(cfg)
    return cfg, place, *load_run(cfg, place)


def score(out: str, flags: list[str]) -> dict:
    """Figures of a run folder on the full split: what eval.py asks for."""
    cfg, place, model, data, step = open_run(out, flags)
    return dict(method=name_of(cfg), dataset=cfg.dataset, split=cfg.split, step=step,
                length=data.length, figures=figures_of(model, cfg, data, place))


def figures_of(model: Denoiser, cfg: Config, data: Data, place: common.Setup) -> dict[str, dict]:
    """`evaluate`, and for images with classes grades of cfg.samples at cfg.guidance."""
    figures = evaluate(model, cfg, data, place)
    if model.classes:
        grades = Judge(data).grade(*draw_samples(model, cfg, data, place, cfg.guidance))
        how = (f"{cfg.samples} samples, {cfg.sample_steps} {cfg.sampler} steps, guidance "
               f"{cfg.guidance:g}")
        figures |= {name: dict(value=value, unit=how) for name, value in grades.items()}
    return figures


@torch.no_grad()
def probe(out: str, flags: list[str]) -> dict:
    """What `eval.py collapse` asks: the embeddings (V, D), and at times (n,) the cross_entropy (n,)
    in nats per token given z_t (Figure 1 and 5), nothing dropped, with the same noise at all
    times; signal (n,) and sigma (n,) of z_t; tokens (at most 500, L) of the split."""
    cfg, place, model, data, _ = open_run(out, ["--eval_sequences", "500", *flags])
    model.eval()
    table, tokens, nll, count = model.table().float(), [], np.zeros(len(common.PROBE_TIMES)), 0.0
    times = np.maximum(common.PROBE_TIMES, cfg.t_0)  # z stays as it is where the diffusion ends
    signal, sigma = signal_and_noise(torch.from_numpy(times), cfg.shift)
    for number, (x, y) in enumerate(eval_batches(cfg, data, place)):
        generator = torch.Generator(x.device).manual_seed(common.mix(cfg.seed, 78, number))
        z = F.embedding(x, table)
        eps = torch.randn(z.shape, generator=generator, device=x.device)
        real = x != (-1 if pad_of(data) is None else pad_of(data))
        with place.autocast():
            given, _ = model.given(y, real)
            for k, t in enumerate(times):
                z_t = float(signal[k]) * z + float(sigma[k]) * eps
                log_p = predict(model, z_t, torch.tensor(t, device=x.device), given)
                nll[k] -= log_p.gather(-1, x[..., None])[..., 0][real].sum().item()
        count += real.sum().item()
        tokens.append(x.cpu())
    return dict(name=name_of(cfg), method="catdm", times=common.PROBE_TIMES,
                cross_entropy=nll / count, signal=signal, sigma=sigma,
                embeddings=table.detach().cpu(),
                tokens=None if cfg.task == "pairs" else torch.cat(tokens))


def bench(cfg: Config, place: common.Setup) -> None:
    """Time training steps of a preset on synthetic tokens (translation: on its pairs), one
    micro-batch per device and step."""
    cfg.micro_batch = min(cfg.micro_batch, cfg.batch_size)
    cfg.batch_size, rng = cfg.micro_batch * place.world, np.random.default_rng(0)
    if cfg.task == "images":
        V, side, classes = 1024, 16, 1000 if cfg.dataset == "imagenet" else 0
        x = rng.integers(0, V, (cfg.batch_size * 4, side * side))
        data: Data = ImageTokens(
            cfg.dataset, {"train": x}, {"train": x[:, 0] % classes if classes else None},
            tuple(map(str, range(classes))), V, (side, side))
    elif cfg.task == "text":
        x = rng.integers(0, 27, (cfg.batch_size * 4, cfg.length))
        data = TextData(cfg.dataset, 27, cfg.length, "token", {"train": x}, codec=None)
    else:
        data = load(cfg)
    model, net, optimizer, ema = build(cfg, data, place)
    begin, tokens = time.time(), 0
    for step in range(cfg.bench_steps + 5):
        if step == 5:
            place.on_cuda and torch.cuda.synchronize()
            warm, begin, tokens = time.time() - begin, time.time(), 0
        batches = load_step(cfg, data, step, place)
        tokens += place.world * sum(x.numel() for x, *_ in batches)
        train_step(net, model, optimizer, ema, cfg, step, batches, place)
    place.on_cuda and torch.cuda.synchronize()
    rate = tokens / (time.time() - begin)
    use = common.utilisation(rate * flops_per_token(model), place)
    memory = torch.cuda.max_memory_allocated() / 2**30 if place.on_cuda else None
    record = dict(
        dataset=cfg.dataset, batch=cfg.batch_size, length=data.length,
        parameters=sum(p.numel() for p in model.student.parameters()), tokens_per_s=round(rate),
        ms_per_step=round(1000 * tokens / rate / cfg.bench_steps, 2), mfu=use and round(use, 4),
        peak_gib=memory and round(memory, 2), warmup_s=round(warm, 1), **common.environment(place))
    place.is_main and print(json.dumps(record))


def main(argv: list[str] | None = None) -> None:
    cfg, _ = common.parse_config(Config, "catdm", __doc__, PRESETS, argv)
    place = common.setup(cfg)
    if cfg.mode == "train":
        train(cfg, place)
    elif cfg.mode == "bench":
        bench(cfg, place)
    else:
        model, data, _ = load_run(cfg, place)
        if cfg.mode == "sample":
            show_samples(model, cfg, data, place)
        else:
            figures = figures_of(model, cfg, data, place)
            place.is_main and print_figures(figures)


if __name__ == "__main__":
    common.run_main(main)
