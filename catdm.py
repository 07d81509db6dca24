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
  forward     q(z_t | x), dropping of tokens       Algorithm 1  add_noise, CATDM.drop_tokens
  network     f(z_t; t) -> logits of x             section 3.2  Denoiser
  loss        L_0 + .005 L_DM + L_CM               section 4.2  CATDM.forward
  teacher     average of the student, nearer to x  Eq. 3        CATDM.consistency, update_teacher
  sampler     ancestral or DDIM, then x ~ P(x|z_0) Algorithm 2  sample
  guidance    towards a class                      Eq. 4        predict
  likelihood  prior, reconstruction and diffusion  Eq. 2        bound_terms
  translation encoder, length predictor            B.3          Translator, translate

Time runs from t = 0 (clean) to t = 1 (noise).
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import common
from common import RunError, arg, free
from data import PAD, PairData, Sequences, load_dataset, load_pairs
from eval import (TokenClassifier, choose, print_grades, save_grids, score_translations, sources_of,
                  translate_split)

Data = Sequences | PairData

# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------

_NET, _OPT = dict(group="network"), dict(group="optimisation")
_SAMPLE, _EVAL = dict(group="sampling"), dict(group="evaluation")


@dataclasses.dataclass
class Config(common.RunConfig):
    dataset: str = arg("glyphs", "glyphs, glyphs36, mnist, ffhq, lsun, imagenet, a tokens.npy or "
                       "a folder of images (images as tokens); numbers, multi30k (translation); "
                       "pydoc, pycode, shakespeare, text8, english27 or a folder of your own "
                       "(text)")
    images: bool = arg(False, "a folder of images; set where --dataset is one")
    tokens: str = arg("", "ffhq, lsun, imagenet: a tokens.npy of (N, L) ids (default: "
                      "DATA_DIR/DATASET/tokens.npy)")
    labels: str = arg("", "a labels.npy of (N,) classes for a tokens.npy")
    length: int = arg(256, "tokens per sequence of text, most tokens of a sentence", 1, 65536)
    bytes: bool = arg(False, "own text as 256 symbols, its UTF-8 bytes, not as characters")
    vocab: int = arg(10_000, "translation: tokens of the joint byte-pair encoding", 260, 10**6)
    lower: bool = arg(False, "translation: lower-case all text")
    distilled: str = arg("", "translation: file whose line i replaces training target i")
    max_number: int = arg(9999, "numbers: the largest", 20, 999_999)
    objective: str = arg("catdm", "catdm, or csdm: the bound of Eq. 2, without L_CM and dropping",
                         choices=("catdm", "csdm"))
    cm: str = arg("cm", "consistency matching: cm (Eq. 3), ce (cross-entropy instead), none",
                  choices=("cm", "ce", "none"))
    beta_cm: float = arg(1.0, "weight of L_CM", 0, 1e6)
    beta_dm: float = arg(0.005, "weight of L_DM", 0, 1e6)
    length_weight: float = arg(0.1, "translation: weight of the length loss", 0, 1e6)
    self_condition: bool = arg(False, "translation: the network sees its previous estimate")
    teacher: float = arg(0.99, "EMA decay eta of the teacher, network and embeddings", 0, 1)
    shift: float = arg(-1.0, "s of section 4.3, added to log-SNR; Difformer's rescaling by F is "
                       "-2 ln F", -30, 30)
    logsnr_max: float = arg(15.0, "log-SNR, before the shift, where the diffusion ends and tokens "
                            "are read off z; 15: at t = 0", -5, 15)
    dropping: str = arg("fixed", "share of tokens dropped: fixed, rand_drop (uniform for each "
                        "sample), linear (t) (Table 6)", choices=("fixed", "rand_drop", "linear"))
    drop: float = arg(0.2, "the fixed share; 0 drops nothing, whatever --dropping", 0, 1)
    dropped: str = arg("zero", "what stands for a dropped token: zero, or a learned vector",
                       choices=("zero", "learned"))
    null_labels: float = arg(0.1, "share of labels hidden in training, for guidance", 0, 1)
    recon_share: float = arg(1.0, "share of the batch on which L_0 is estimated", 1e-6, 1)
    embed_dim: int = arg(256, "D (Table 8)", 1, 65536)
    embed_init: str = arg("std", "N(0, D^-1/2): the standard deviation (norm 1), or the variance "
                          "(norm D^1/4)", choices=("std", "variance"))
    l2_norm: float = arg(0.0, "length of all embeddings; 0: learned freely", 0, 1e4)
    embeddings: str = arg("", "frozen embeddings: a .npy file of (V, D)")
    # appendix A, unconditional images
    dim: int = arg(512, "width", 8, 65536, **_NET)
    depth: int = arg(15, "layers", 1, 1000, **_NET)
    heads: int = arg(8, "attention heads", 1, 1000, **_NET)
    ffn: int = arg(1024, "translation: width of the MLPs (else 4 x dim)", 8, 10**6, **_NET)
    dropout: float = arg(0.1, "dropout", 0, 0.99, **_NET)
    init_std: float = arg(0.02, "initial linear weights, not text's; 0: fan-in^-1/2", 0, 10, **_NET)
    # unreported for images; this is VQ-Diffusion's
    steps: int = free(273_000, "training steps", 1, 10**9, **_OPT)
    batch_size: int = arg(128, "samples per step, over all devices", 1, 10**7, **_OPT)
    micro_batch: int = free(128, "most samples one device takes at once", 1, 10**7, **_OPT)
    batch_tokens: int = arg(8192, "translation: tokens of a step's sentences", 8, 10**8, **_OPT)
    micro_tokens: int = free(32_768, "translation: most tokens on a device", 1, 10**9, **_OPT)
    lr: float = arg(4.5e-4, "learning rate", 0, 10, **_OPT)
    warmup: int = arg(1000, "warm-up steps", 0, 10**9, **_OPT)
    beta2: float = arg(0.96, "AdamW beta2 (beta1 is .9)", 0, 0.999999, **_OPT)
    weight_decay: float = arg(0.045, "AdamW weight decay, not of embeddings", 0, 10, **_OPT)
    samples: int = free(64, "samples to draw, or sentences to translate", 1, 10**7, **_SAMPLE)
    sample_steps: int = free(200, "steps N; one more call draws the tokens", 1, 10**6, **_SAMPLE)
    sampler: str = free("ancestral", "ancestral (Algorithm 2) or ddim",
                        choices=("ancestral", "ddim"), **_SAMPLE)
    argmax: bool = free(False, "at the end the most probable tokens, not drawn ones", **_SAMPLE)
    guidance: float = free(1.0, "omega of Eq. 4, for samples of a class", 0, 1000, **_SAMPLE)
    label: str = free("", "only samples of this class", **_SAMPLE)
    length_beam: int = free(3, "translation: lengths around the predicted one", 1, 256, **_SAMPLE)
    noise_beam: int = free(3, "translation: noises tried for each length", 1, 10**4, **_SAMPLE)
    source: str = free("", "translate this text, or each line of this file", **_SAMPLE)
    sample_batch: int = free(64, "samples drawn at once", 1, 10**6, **_SAMPLE)
    bound_end: float = free(100.0, "log-SNR, before the shift, where the bound's diffusion ends "
                            "and x is decoded, at most --logsnr_max; above 15: the best of "
                            "BOUND_ENDS on training data", -15, 100, **_EVAL)
    eval_draws: int = free(4, "draws of (t, z_t, z_0) per sequence", 1, 10**6, **_EVAL)

    @property
    def t_0(self) -> float:
        """The time at which the diffusion ends."""
        return time_of(self.logsnr_max)

    @property
    def task(self) -> str:
        """images, pairs or text: what the data set holds."""
        if self.dataset in IMAGES or self.dataset.endswith(".npy") or self.images:
            return "images"
        return "pairs" if self.dataset in PAIRS else "text"


IMAGES = ("glyphs", "glyphs36", "mnist", "ffhq", "lsun", "imagenet")
PAIRS = ("numbers", "multi30k", "iwslt14", "wmt14")
_SMALL_TEXT = dict(embed_dim=128, dim=384, depth=6, heads=6, batch_size=64, micro_batch=64,
                   steps=20_000, lr=1e-3, warmup=500, beta2=0.99, weight_decay=0.0, samples=4)
_PAIRS = dict(embed_dim=128, ffn=1024, depth=6, heads=4, dropout=0.3, steps=300_000, lr=5e-4,
              lr_schedule="inverse_sqrt", warmup=10_000, beta2=0.98, weight_decay=0.01, ema=0.999,
              sample_steps=20, samples=4, self_condition=True)
PRESETS: dict[str, dict] = {
    # one CPU core, three minutes; a short run needs a young teacher
    "glyphs": dict(embed_dim=32, embed_init="variance", dim=96, depth=3, heads=4, dropout=0.0,
                   init_std=0.0, teacher=0.9, shift=-1.5, drop=0.1, recon_share=0.25, batch_size=32,
                   micro_batch=32, steps=2300, lr=3e-3, warmup=50, lr_schedule="cosine", beta2=0.99,
                   weight_decay=0.0, ema=0.99, samples=128, sample_steps=20, sample_batch=128,
                   log_every=20, save_every=500, eval_sequences=500),
    "mnist": dict(dim=256, depth=6, init_std=0.0, batch_size=256, micro_batch=256, steps=20_000,
                  lr=1e-3, lr_schedule="cosine", beta2=0.99, weight_decay=0.0, ema=0.999,
                  sample_steps=50, samples=160, sample_batch=512),
    "ffhq": {},  # Tables 1, 2 and 4 to 8: 500 epochs of 70K images
    "lsun": dict(steps=98_000),  # Churches: 100 epochs of 126K; Bedrooms: 500 of 3M
    "imagenet": dict(dim=768, depth=24, heads=16, steps=5_000_000, sample_steps=50),  # Table 3
    # text: CADD's networks and batches, and its steps but for pydoc, text8 and your own
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
    # translation (B.3): Difformer's networks, optimiser and batches
    "numbers": dict(vocab=400, length=32, embed_dim=64, dim=128, ffn=256, depth=2, heads=4,
                    dropout=0.0, init_std=0.0, teacher=0.9, batch_tokens=1024, steps=1000, lr=1e-3,
                    warmup=200, lr_schedule="cosine", beta2=0.98, weight_decay=0.01, ema=0.99,
                    sample_steps=20, samples=4, save_every=500, eval_sequences=200,
                    self_condition=True),
    "multi30k": _PAIRS | dict(length=128, lower=True, steps=15_000, warmup=1000,
                              lr_schedule="cosine"),
    "iwslt14": _PAIRS | dict(lower=True),
    "wmt14": _PAIRS | dict(vocab=40_000, ffn=2048, heads=8, dropout=0.1, batch_tokens=65_536,
                           sample_batch=16),
}
PRESETS["glyphs36"] = PRESETS["glyphs"]
# your own, two CPU cores, ten minutes: a folder of images (in 64 tokens), and of text
PRESETS["images"] = dict(PRESETS["glyphs"], images=True, steps=4000)
PRESETS["folder"] = dict(PRESETS["pydoc"], steps=3000)
PRESETS[".npy"] = dict(PRESETS["glyphs"], steps=4000)  # images as tokens, of data.py vq-encode

# ---------------------------------------------------------------------------------------------
# Noise schedule and forward process
# ---------------------------------------------------------------------------------------------

LOGSNR = 15.0  # the unshifted log-SNR is clamped to +- this


def logsnr(t: Tensor, shift: float) -> Tensor:
    """log(a_t^2 / sigma_t^2) of section 4.3 in float64: -2 ln tan(pi t / 2), clamped, plus shift.
    Difformer's variance-preserving rescaling (its Eq. 8) divides the SNR by F^2: the same with s =
    -2 ln F, so its DGS is a rule for choosing s."""
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


def coefficients(t: Tensor, shift: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """a_t and sigma_t (B, 1, 1) of times t (B,), to multiply z (B, L, D)."""
    return [c.to(dtype)[:, None, None] for c in signal_and_noise(t, shift)]


def add_noise(z: Tensor, t: Tensor, eps: Tensor, shift: float) -> Tensor:
    """q(z_t | x): a_t z + sigma_t eps in z's precision, z = Psi(x) and eps (B, L, D), t (B,)."""
    a_t, sigma_t = coefficients(t, shift, z.dtype)
    return a_t * z + sigma_t * eps


# ---------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------


def adaln(h: Tensor, scale_shift: Tensor) -> Tensor:
    """(1 + a) LayerNorm(h) + b (appendix A): h (B, L, d), a and b side by side (B, 2d)."""
    a, b = scale_shift[:, None].chunk(2, -1)                              # (B, 1, d)
    return (1 + a) * F.layer_norm(h.float(), h.shape[-1:]) + b


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
        # Paper: dropout in "the self-attention layers"; ours is on both branches.
        x = adaln(h, self.by_time(time))
        h = h + F.dropout(self.attention(x, x), self.dropout, self.training)
        x = self.norm(h) if y is None else adaln(h, self.by_label(F.silu(self.label(y))))
        return h + F.dropout(self.mlp(x), self.dropout, self.training)


class ImageTransformer(nn.Module):
    """(B, L, d) -> features (B, L, d): 15 x 512 with D = 256, V = 1,024 makes the paper's 56M
    parameters, 24 x 768 with 1,000 classes its 246M."""

    def __init__(self, d: int, depth: int, heads: int, classes: int, dropout: float, length: int):
        super().__init__()
        self.blocks = nn.ModuleList(ImageBlock(d, heads, classes, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(d)
        positions = common.sinusoids(torch.arange(length), d)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, h: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        h = h + self.positions.to(h.dtype)
        time = F.silu(common.sinusoids(1000 * t, h.shape[-1]))
        for block in self.blocks:
            h = block(h, time, y)
        return self.norm(h)


class Denoiser(nn.Module):
    """Embeddings phi and the network f_theta(z_t; t) -> logits of x (section 3.2), of images and
    of text; see Translator for sentences."""

    def __init__(self, cfg: Config, V: int, length: int, classes: int = 0):
        """V symbols, sequences of `length` tokens, `classes` labels (0: there are none)."""
        super().__init__()
        D = cfg.embed_dim
        if cfg.dim % cfg.heads or (cfg.dim // cfg.heads) % 2:
            raise RunError(f"--dim {cfg.dim} must be an even multiple of --heads {cfg.heads}")
        self.cfg, self.V, self.length, self.classes = cfg, V, length, classes
        self.embed = nn.Embedding(V, D)
        self.add_network()
        # Paper: "Gaussian initialization N(0, D^-1/2)", a variance by its own notation, which
        # makes rows of norm D^1/4 = 4; common practice (and fairseq's) is a standard deviation.
        nn.init.normal_(self.embed.weight, std=D ** (-0.5 if cfg.embed_init == "std" else -0.25))
        if cfg.dropped == "learned" and cfg.objective == "catdm" and cfg.drop > 0:
            self.dropped = nn.Parameter(torch.zeros(D))
        # Given and never trained: CSDM-dagger of Table 2. Later the checkpoint has them.
        if cfg.embeddings and cfg.mode not in ("sample", "eval"):
            rows = torch.from_numpy(np.load(cfg.embeddings))
            if rows.shape != (V, D):
                raise RunError(f"--embeddings {cfg.embeddings} has shape {tuple(rows.shape)}, this "
                               f"model needs {(V, D)}")
            self.embed = nn.Embedding.from_pretrained(rows.float())

    def add_network(self) -> None:
        cfg, d = self.cfg, self.cfg.dim
        self.enter, self.head = nn.Linear(cfg.embed_dim, d), nn.Linear(d, self.V)
        if cfg.task == "text":
            self.net = common.DiT(0, d, cfg.depth, cfg.heads, dropout=cfg.dropout,
                                  length=self.length)
            return
        self.net = ImageTransformer(d, cfg.depth, cfg.heads, self.classes, cfg.dropout, self.length)
        common.normal_init(self, cfg.init_std)
        for block in self.net.blocks:  # time and class start without effect
            nn.init.zeros_(block.by_time.weight)
            if self.classes:
                nn.init.zeros_(block.by_label.weight)

    def embedding_matrix(self) -> Tensor:
        """The embeddings (V, D) as they enter the diffusion."""
        w = self.embed.weight
        return F.normalize(w, dim=-1) * self.cfg.l2_norm if self.cfg.l2_norm else w

    def cond(self, y: Tensor | None, not_pad: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """What the network sees beside z_t, a tuple of tensors of B rows: labels y (B,), if there
        are any. And the length loss, which translation alone has."""
        return (() if y is None else (y,)), torch.zeros((), device=not_pad.device)

    def features(self, z: Tensor, t: Tensor, cond: tuple[Tensor, ...] = ()) -> Tensor:
        """What the head sees, from z (B, L, D), t (B,) and what `cond` returned."""
        return self.net(self.enter(z), t, *cond)

    def forward(self, z: Tensor, t: Tensor, cond: tuple[Tensor, ...] = ()) -> Tensor:
        """Logits (B, L, V) float32, the head's precision that of training; see predict."""
        return self.head(self.features(z, t, cond)).float()


# ---------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------


class CATDM(nn.Module):
    """Student and teacher; the training loss is the forward."""

    def __init__(self, student: Denoiser):
        super().__init__()
        self.cfg, self.student = student.cfg, student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> CATDM:
        super().train(mode)
        self.teacher.eval()  # no dropout in the targets
        return self

    @torch.no_grad()
    def update_teacher(self, step: int) -> None:
        """theta-bar <- eta theta-bar + (1 - eta) theta, phi-bar likewise (Eq. 3). Paper: eta = .99.
        Ours is less in the first 900 steps, as in common.EMA: what is learnt at t = 0 reaches
        t = 1 through several generations of teachers."""
        eta = min(self.cfg.teacher, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()),
                             1 - eta)

    def forward(self, x: Tensor, y: Tensor | None, t: Tensor, u: Tensor, eps: Tensor, eps0: Tensor,
                not_pad: Tensor, self_condition: bool = False
                ) -> tuple[Tensor, dict[str, Tensor]]:
        """Algorithm 1, lines 3 to 6: sums (3,) in nats of L_0 and of the rest over tokens, and of
        the length loss over sentences; and statistics. The arguments are a Batch. L_0 is taken at
        t_0 on the first n = len(eps0) samples. Every term is a sum over D."""
        cfg, student, (B, L), n = self.cfg, self.student, x.shape, len(eps0)
        drop, (ratio, back, hide) = u[:, :L], u[:, L:].unbind(1)
        t = cfg.t_0 + (1 - cfg.t_0) * t
        t_0 = torch.full_like(t[:n], cfg.t_0)
        if student.classes:
            y = torch.where(hide < cfg.null_labels, student.classes, y)

        w = student.embedding_matrix().float()
        z = F.embedding(x, w)                                             # Psi(x), (B, L, D)
        z_t = add_noise(self.drop_tokens(z, t, drop, ratio), t, eps, cfg.shift)
        # L_0 has a pass of its own, without dropping: Theorem 1 needs x to be decoded from z_0.
        z_0 = add_noise(z[:n], t_0, eps0, cfg.shift)
        cond, length_loss = student.cond(y, not_pad)
        logits = (student.twice if self_condition else student)(
            torch.cat([z_t, z_0]), torch.cat([t, t_0]), tuple(torch.cat([c, c[:n]]) for c in cond))
        log_p, log_p0 = logits.log_softmax(-1).split([B, n])

        L_0 = (cross_entropy(log_p0, x[:n]) * not_pad[:n]).sum()
        # The mean of all embeddings adds nothing to the error but, where they have collapsed,
        # would hide their differences from bfloat16.
        L_DM = squared_error(log_p, x, w - w.mean(0))                     # (B, L)
        L_CM = self.consistency(log_p, x, y, z_t, t, back, not_pad, self_condition)  # (B, L)
        if cfg.objective == "catdm":
            rest = cfg.beta_dm * L_DM + cfg.beta_cm * L_CM
        else:  # Eq. 2's diffusion and prior
            weight = (1 - cfg.t_0) * diffusion_weight(t, cfg.shift)[:, None]
            rest = weight.float() * L_DM + prior_kl(z, cfg.shift)
        rest = (rest * not_pad).sum()

        by_token = dict(L_DM=L_DM, L_CM=L_CM, ce=cross_entropy(log_p, x))
        stats = common.by_tenth(t, count=not_pad.sum(1), **{
            name: (value * not_pad).sum(1) for name, value in by_token.items()})
        stats |= dict(L_0=L_0.detach(), L_0_tokens=not_pad[:n].sum(), rest=rest.detach())
        return torch.stack([L_0, rest, length_loss]), stats

    def drop_tokens(self, z: Tensor, t: Tensor, u: Tensor, ratio: Tensor) -> Tensor:
        """Psi(x) . m_RD (B, L, D): the mask is on the embeddings z (Table 6). u (B, L) and
        ratio (B,) are uniform noise."""
        cfg = self.cfg
        if cfg.objective == "csdm" or not cfg.drop:
            return z
        share = {"fixed": torch.full_like(t, cfg.drop), "rand_drop": ratio, "linear": t}
        keep = u >= share[cfg.dropping][:, None]
        return torch.where(keep[..., None], z,
                           self.student.dropped if cfg.dropped == "learned" else 0.0)

    def consistency(self, log_p: Tensor, x: Tensor, y: Tensor | None, z_t: Tensor, t: Tensor,
                    back: Tensor, not_pad: Tensor, self_condition: bool) -> Tensor:
        """L_CM (B, L) of Eq. 3: the KL of the prediction log_p (B, L, V) at t from the teacher's,
        one DDIM step nearer to x, at a time s that the uniform `back` (B,) places below t. Where a
        token was dropped from z_t, z_s holds a_s - a_t sigma_s / sigma_t of its vector, not a_s."""
        cfg, teacher = self.cfg, self.teacher
        if cfg.objective == "csdm" or cfg.cm == "none":
            return torch.zeros_like(log_p[..., 0])
        if cfg.cm == "ce":  # CATDM-CE of Table 10
            return cross_entropy(log_p, x)
        with torch.no_grad():
            s = cfg.t_0 + back * (t - cfg.t_0)
            z_bar = F.embedding(x, teacher.embedding_matrix())
            z_s = common.ddim(z_t, z_bar, *coefficients(t, cfg.shift), *coefficients(s, cfg.shift))
            # On an estimate of its own where the student has one: L_CM ties two times of one
            # function, so it is 0 where s = t and student and teacher agree.
            call = teacher.twice if self_condition else teacher
            log_q = call(z_s, s, teacher.cond(y, not_pad)[0]).log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)


def cross_entropy(log_p: Tensor, x: Tensor) -> Tensor:
    """-log P(x) in nats (...) from log P (..., V)."""
    return -log_p.gather(-1, x[..., None])[..., 0]


def squared_error(log_p: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """|Psi(x) - Psihat|^2 (...), Psihat = sum_k P(k) w_k, from log P (..., V), x (...), w (V, D),
    as |sum_k (P(k) - [k = x]) w_k|^2, which is exact where P is nearly certain."""
    one_hot = (torch.arange(log_p.shape[-1], device=x.device) == x[..., None]).float()
    return ((log_p.exp() - one_hot) @ w).square().sum(-1)


def prior_kl(z: Tensor, shift: float) -> Tensor:
    """KL(q(z_1 | x) || N(0, I)) in nats of each token, z = Psi(x) (..., D) -> (...)."""
    a, sigma = signal_and_noise(torch.ones((), device=z.device), shift)
    sigma2 = sigma.square()
    per_dim = sigma2 - 1 - sigma2.log()
    return (0.5 * (z.shape[-1] * per_dim + a.square() * z.double().square().sum(-1))).to(z.dtype)


# ---------------------------------------------------------------------------------------------
# Sampler
# ---------------------------------------------------------------------------------------------


def predict(model: Denoiser, z: Tensor, t: Tensor, cond: tuple, guidance: float = 0.0) -> Tensor:
    """log P(x | z_t, y; t) (B, L, V), float64, guided as in Eq. 4, normalised again; z (B, L, D),
    t a scalar or (B,). Guidance 0 is the conditional model."""
    t, guided = t.float().expand(len(z)), bool(model.classes and guidance)
    if guided:
        z, t, [y] = torch.cat([z, z]), torch.cat([t, t]), cond
        cond = torch.cat([y, torch.full_like(y, model.classes)]),
    h = model.features(z, t, cond)
    with common.exact(z.device):
        log_p = model.head(h.float()).double().log_softmax(-1)
    if guided:
        with_y, without = log_p.chunk(2)
        log_p = ((1 + guidance) * with_y - guidance * without).log_softmax(-1)
    return log_p


@torch.no_grad()
def sample(
    model: Denoiser, shape: tuple[int, int], steps: int, cond: tuple = (), *,
    sampler: str = "ancestral", guidance: float = 0.0, argmax: bool = False,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Algorithm 2: yields tokens of `shape` (B, L) after each of steps + 1 calls, the last is the
    sample, before it the most probable ones. The steps end at t_0. `cond` is of Denoiser.cond.
    ancestral draws z_s from p(z_s | z_t) of Eq. 1; ddim takes the deterministic step below Eq. 3.
    With self-conditioning each call sees the previous estimate, the first one zeros.
    """
    shift, w = model.cfg.shift, model.embedding_matrix().double()
    noise = dict(generator=generator, device=w.device)
    z = torch.randn(*shape, w.shape[1], **noise)
    times = torch.linspace(1, model.cfg.t_0, steps + 1, dtype=torch.float64, device=w.device)
    given = cond
    for t, s in zip(times[:-1], times[1:]):
        log_p = predict(model, z, t, given, guidance)
        yield log_p.argmax(-1)
        z_hat = log_p.exp() @ w
        if model.cfg.self_condition:
            given = *cond, z_hat.float()
        path = z.double(), z_hat, *signal_and_noise(t, shift), *signal_and_noise(s, shift)
        if sampler == "ancestral":
            mean, variance = common.gaussian_posterior(*path)
            z = (mean + variance.sqrt() * torch.randn(z.shape, **noise)).float()
        else:
            z = common.ddim(*path).float()
    log_p = predict(model, z, times[-1], given, guidance)
    u = torch.rand(shape, dtype=torch.float64, **noise)
    yield log_p.argmax(-1) if argmax else common.sample_categorical(log_p, u=u)


# ---------------------------------------------------------------------------------------------
# Likelihood
# ---------------------------------------------------------------------------------------------

BOUND_ENDS = (LOGSNR, 12.0, 10.0, 8.0, 6.0, *map(float, range(4, -9, -1)))


@torch.no_grad()
def bound_terms(
    model: Denoiser, x: Tensor, y: Tensor | None, u: Tensor, eps: Tensor, eps0: Tensor,
    not_pad: Tensor, end: float = LOGSNR, start: float = -math.inf,
) -> Tensor:
    """One draw of Eq. 2's three terms in nats per token, float64: (B, 3), prior, reconstruction,
    diffusion, the latter's part between the log-SNRs start and end. Nothing is dropped.

    x, not_pad (B, L), y as in training, u (B,) uniform, eps, eps0 (B, L, D) normal. The diffusion
    may end at any t_0 > 0, where x is decoded from z_t0: the bound holds for any schedule's ends.
    It matters: the weight e^logsnr charges a doubt of 1e-3 at logsnr 14 with nats. A network with
    self-conditioning is called on zeros: it is a function of z_t then, as the bound wants.
    """
    w, shift = model.embedding_matrix().double(), model.cfg.shift
    z, t_0, t_1 = F.embedding(x, w), time_of(end), time_of(start)
    t = t_0 + (t_1 - t_0) * u.double()
    last = torch.full_like(t, t_0)
    cond, _ = model.cond(y, not_pad)
    log_p0 = predict(model, add_noise(z, last, eps0, shift).float(), last, cond)
    log_p = predict(model, add_noise(z, t, eps, shift).float(), t, cond)
    diffusion = (t_1 - t_0) * diffusion_weight(t, shift)[:, None] * squared_error(log_p, x, w)
    terms = torch.stack([prior_kl(z, shift), cross_entropy(log_p0, x), diffusion], -1)  # (B, L, 3)
    return (terms * not_pad[..., None]).sum(1) / not_pad.sum(1, keepdim=True)


def likelihoods(
    model: Denoiser, batches: Iterator[tuple[Tensor, Tensor | None]], draws: int, seed: int,
    pad_id: int | None = None, end: float = LOGSNR, start: float = -math.inf,
) -> Tensor:
    """bound_terms of every sequence and draw, whose sum estimates a bound on -log p(x), or
    p(x | y), given the padding; and how many tokens are none: (sequences x draws, 4). Times are
    low-discrepancy across the batch and across a sequence's draws, so the naive standard error is
    on the safe side."""
    rows = []
    for number, (x, y) in enumerate(batches):
        B, noise = len(x), dict(device=x.device, generator=torch.Generator(
            x.device).manual_seed(common.fold_in(seed, 77, number)))
        shift, perm = torch.rand((), dtype=torch.float64, **noise), torch.randperm(B, **noise)
        not_pad = x != (-1 if pad_id is None else pad_id)
        for k in range(draws):
            u = common.low_discrepancy_t(k * B + perm, B * draws, shift, 0.0)
            eps, eps0 = torch.randn(2, *x.shape, model.cfg.embed_dim, **noise)
            terms = bound_terms(model, x, y, u, eps, eps0, not_pad, end, start)
            rows.append(torch.cat([terms, not_pad.sum(1, keepdim=True)], 1))
    return torch.cat(rows or [torch.zeros(0, 4, dtype=torch.float64)])


# ---------------------------------------------------------------------------------------------
# Translation (B.3): Difformer's network and decoding, which the paper does not tell
# ---------------------------------------------------------------------------------------------


class Translator(Denoiser):
    """The Denoiser of sentences y -> x: an encoder of the source, whose states the decoder of z_t
    attends to, and a predictor of the target's length. Paper: "the same architecture and setup as
    that of Difformer", so with self_condition the decoder sees the estimate of the call before,
    sum_k P(k | z_t) Psi(k), or zeros: of a first call on the same z_t in half of the training
    steps, of the step before in decoding."""

    def add_network(self) -> None:
        cfg = self.cfg
        self.net = common.EncoderDecoder(
            cfg.embed_dim, cfg.dim, cfg.ffn, cfg.depth, cfg.heads, cfg.dropout, self.length,
            cfg.self_condition, init_std=cfg.init_std)
        self.head = nn.Linear(cfg.embed_dim, self.V)

    def encode(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sources (B, M) -> states (B, M, d), what is no padding (B, M), logits of the length."""
        source_not_pad = y != PAD
        states, logits = self.net.encode(F.embedding(y, self.embedding_matrix()), source_not_pad)
        return states, source_not_pad, logits

    def cond(self, y: Tensor, not_pad: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Of sources y (B, M) and targets' not_pad (B, N); the length loss in nats is a sum."""
        states, source_not_pad, logits = self.encode(y)
        loss = common.length_loss(logits, not_pad.sum(1), source_not_pad.sum(1))
        return (states, source_not_pad, not_pad), loss

    def features(self, z: Tensor, t: Tensor, cond: tuple[Tensor, ...]) -> Tensor:
        """(B, N, D) from z (B, N, D), t (B,) and what `cond` returned; a fourth of these is the
        previous estimate (B, N, D), in its absence zeros, so that all weights are in every loss."""
        states, source_not_pad, not_pad, *previous = cond
        none = torch.zeros_like(z) if self.cfg.self_condition else None
        return self.net.decode(z, t, *(previous or [none]), not_pad, states, source_not_pad)

    def twice(self, z: Tensor, t: Tensor, cond: tuple[Tensor, ...]) -> Tensor:
        """forward's logits (B, N, V) on the estimate of a first call, which gets no gradient."""
        with torch.no_grad():
            estimate = self(z, t, cond).softmax(-1) @ self.embedding_matrix()
        return self(z, t, (*cond, estimate))


@torch.no_grad()
def translate(model: Translator, sources: list[str], data: PairData, cfg: Config, ddp: common.DDP
              ) -> Iterator[dict]:
    """Yields one {"source", "text", "candidates"} per source, in order: length_beam lengths around
    the most probable one, noise_beam noises for each, the best by minimum Bayes risk."""
    generator = torch.Generator(ddp.device).manual_seed(common.fold_in(cfg.seed, 98))
    beams = cfg.length_beam * cfg.noise_beam
    for begin in range(0, len(sources), cfg.sample_batch):
        batch = sources[begin:begin + cfg.sample_batch]
        with ddp.autocast():
            states, source_not_pad, logits = model.encode(ddp.put(data.rows(batch)))
            lengths = common.length_beam(logits, source_not_pad.sum(1), cfg.length_beam)
            lengths = lengths.clamp(3, data.length)  # BOS, a token, EOS
            lengths = lengths.repeat_interleave(cfg.noise_beam, 1).view(-1, 1)  # (b * beams, 1)
            not_pad = torch.arange(int(lengths.max()), device=ddp.device) < lengths
            cond = *(c.repeat_interleave(beams, 0) for c in (states, source_not_pad)), not_pad
            *_, x = sample(model, not_pad.shape, cfg.sample_steps, cond, sampler=cfg.sampler,
                           argmax=cfg.argmax, generator=generator)
        x = torch.where(not_pad, x, PAD).view(len(batch), beams, -1).tolist()
        for text, candidates in zip(batch, x):
            candidates = [[i for i in c if i != PAD] for c in candidates]
            texts = [data.decode(c[1:]) for c in candidates]
            yield dict(source=text, text=texts[choose(candidates)], candidates=texts,
                       nfe=cfg.sample_steps + 1)


def compiled_for_all_lengths(model: CATDM, cfg: Config, ddp: common.DDP, backend: str = "inductor"):
    """`model` compiled once for sentences of all lengths, on a batch that is not a real one: sizes
    that are equal in the first call are taken for one and compiled again when they differ, and so
    is a size that is a layer's width, or no multiple of 8 as real lengths are."""
    # The first fails an assertion of its own on shapes that vary (torch 2.11); the second compiles
    # again, for minutes, where a batch is larger or smaller than some size of its own.
    left_out = ("triton.coalesce_tiling_analysis", "triton.mix_order_reduction")
    options = dict.fromkeys(left_out, False) if backend == "inductor" else None
    net = torch.compile(model, dynamic=True, backend=backend, options=options)
    at, D = dict(device=ddp.device), cfg.embed_dim
    lengths = [k for k in range(2, model.student.length + 1) if k not in (D, cfg.dim, cfg.heads)]
    M, N = sorted(lengths, key=lambda k: (k % 8 > 0, abs(k - 24)))[:2]
    B = max(98, min(cfg.batch_tokens, cfg.micro_tokens) // 24) | 1  # odd
    y, x = (torch.ones(B, k, dtype=torch.long, **at) for k in (M, N))
    eps, eps0 = (torch.zeros(k, N, D, **at) for k in (B, math.ceil(cfg.recon_share * B)))
    with ddp.random_state_kept():
        for coin in sorted({False, cfg.self_condition}):  # a graph each
            with ddp.autocast():
                losses, _ = net(x, y, torch.rand(B, **at), torch.rand(B, N + 3, **at), eps, eps0,
                                x != PAD, coin)
            losses.sum().backward()
    model.zero_grad(set_to_none=True)
    return net


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Samples of a step and everything random about them."""

    x: Tensor         # (B, L) token ids
    y: Tensor | None  # what is given with them: labels (B,) or sources (B, M)
    t: Tensor         # (B,) uniform in [0, 1): becomes a time in [t_0, 1]
    u: Tensor         # (B, L + 3) uniform: dropping of each token, its ratio, s, hiding of labels
    eps: Tensor       # (B, L, D) normal noise of z_t
    eps0: Tensor      # (n, L, D) of z_0, for the first n samples
    not_pad: Tensor   # (B, L) bool
    self_condition: bool = False  # on a first estimate, or on zeros

    def counts(self) -> Tensor:
        """How many tokens L_0 has, tokens, samples: (3,)."""
        n = len(self.eps0)
        return torch.stack([self.not_pad[:n].sum(), self.not_pad.sum(),
                            torch.full_like(self.x[0, 0], len(self.x))]).float()


def load(cfg: Config, tokenizer: dict | None = None) -> Data:
    """The data set; with a checkpoint's tokenizer only that, unless its sentences are asked for."""
    synthetic = cfg.mode == "bench"
    if cfg.tokens and cfg.dataset not in ("ffhq", "lsun", "imagenet"):
        raise RunError(f"--tokens is for ffhq, lsun and imagenet: say --dataset {cfg.tokens} alone")
    if cfg.task == "pairs" and not (tokenizer and cfg.source):
        return load_pairs(cfg.dataset, cfg.data_dir, cfg.length, cfg.vocab, cfg.max_number,
                          lower=cfg.lower, distilled=cfg.distilled, synthetic=synthetic)
    if tokenizer:
        return (PairData if cfg.task == "pairs" else Sequences).from_tokenizer(tokenizer)
    name = cfg.tokens if cfg.tokens and not synthetic else cfg.dataset
    return load_dataset(name, cfg.data_dir, cfg.length if cfg.task == "text" else None,
                        labels=cfg.labels, synthetic=synthetic, patches=cfg.images,
                        as_bytes=cfg.bytes)


def load_batches(cfg: Config, data: Data, step: int, ddp: common.DDP) -> list[Batch]:
    """This rank's micro-batches of a step, the same samples and noise on any number of ranks: each
    draws the noise of the global batch, 268 MB at most in the presets, and takes its rows. One
    call of the generator for each sample would take longer than a small step."""
    if cfg.task == "pairs":  # as many as cfg.batch_tokens hold
        x, y = data.train_batch(cfg.seed, step, cfg.batch_tokens)
        n, room = len(x), cfg.micro_tokens * ddp.world
        parts = min(max(1, n // ddp.world), math.ceil(max(x.size, y.size) / room))
        indices = [np.arange(ddp.rank, n, ddp.world)[k::parts] for k in range(parts)]
        samples = [(x[index], y[index]) for index in indices]
    else:
        n = cfg.batch_size
        indices = common.micro_batches(n, cfg.micro_batch, ddp)
        samples = [data.train_batch(cfg.seed, step, n, index) for index in indices]
    shift, coin = np.random.default_rng(common.fold_in(cfg.seed, step, 1)).random(2)
    self_condition = bool(cfg.self_condition and coin < 0.5)  # of a whole batch, as Difformer's
    noise, L = dict(device=ddp.device, generator=torch.Generator(ddp.device).manual_seed(
        common.fold_in(cfg.seed, step))), samples[0][0].shape[1]
    u, first = torch.rand(n, L + 3, **noise), math.ceil(cfg.recon_share * n)
    eps, eps0 = (torch.randn(k, L, cfg.embed_dim, **noise) for k in (n, first))
    batches = []
    for index, (x, y) in zip(indices, samples):
        x, y, rows = map(ddp.put, (x, y, index))
        rows0 = rows[: int((index < first).sum())]  # index ascends
        t = common.low_discrepancy_t(rows, n, shift, t_min=0.0)
        batches.append(Batch(x, y, t, u[rows], eps[rows], eps0[rows0], data.not_pad(x),
                             self_condition))
    return batches


def build(cfg: Config, data: Data) -> Denoiser:
    """The student: what is averaged, sampled and scored. Raises RunError if --label is no class,
    or --self_condition has nothing to act on."""
    classes = () if cfg.task == "pairs" else data.classes
    if cfg.label and cfg.label not in classes:
        raise RunError(f"--label {cfg.label}: " + (
            f"choose one of {', '.join(classes)}" if classes else "this model has no classes"))
    if cfg.self_condition and cfg.task != "pairs":
        raise RunError(f"--self_condition is for translation, of {', '.join(PAIRS)}")
    if cfg.task == "pairs":
        return Translator(cfg, data.vocab_size, data.length)
    return Denoiser(cfg, data.vocab_size, data.length, len(data.classes))


def flops_per_token(student: Denoiser) -> float:
    """Model FLOPs of training per token: the student forward and backward on 1 + recon_share
    passes, the teacher forward, both forward once more in half of self-conditioned steps."""
    cfg = student.cfg
    macs = sum(m.weight.numel() for name, m in student.named_modules() if isinstance(m, nn.Linear)
               and not any(part in name for part in ("adaln", "time", "by_label")))
    macs += 2 * cfg.depth * student.length * cfg.dim + student.V * cfg.embed_dim
    teacher = cfg.objective == "catdm" and cfg.cm == "cm"
    first = 0.5 * cfg.self_condition
    return 2.0 * macs * ((3 + first) * (1 + cfg.recon_share) + (1 + first) * teacher)


def train(cfg: Config, ddp: common.DDP, data: Data) -> common.Run:
    if cfg.task == "pairs":
        common.check_pairs(cfg, data, ddp)
    model = CATDM(build(cfg, data)).to(ddp.device)
    student, w = model.student, model.student.embed.weight
    groups = [dict(params=[p for p in student.parameters() if p.requires_grad and p is not w])]
    if w.requires_grad:  # decay would shorten the embeddings, whose length is the loss's business
        groups.append(dict(params=[w], weight_decay=0.0))
    optimizer = torch.optim.AdamW(groups, cfg.lr, betas=(0.9, cfg.beta2), eps=1e-8,
                                  weight_decay=cfg.weight_decay, fused=True)
    ema = common.EMA(student, cfg.ema)
    run = common.Run("catdm", cfg, ddp, data, model, optimizer, ema, flops_per_token(student))
    if cfg.task == "pairs" and cfg.compile and ddp.on_cuda and not run.complete:
        net = ddp.wrap(compiled_for_all_lengths(model, cfg, ddp), compile=False)
    else:
        net = ddp.wrap(model, cfg.compile)

    def valid(held_out: Data, step: int) -> Tensor:
        batches = load_batches(cfg, held_out, step, ddp)
        weights = 1 / ddp.sum(sum(batch.counts() for batch in batches))
        weights[2] *= cfg.length_weight
        return (sum(model(*batch)[0] for batch in batches) * weights).sum()

    for step in run.steps(lambda total: summarise(total, student), valid):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, cfg)
        batches = load_batches(cfg, data, step, ddp)
        counts = sum(batch.counts() for batch in batches)
        weights = 1 / ddp.sum(counts)  # means over the global batch
        weights[2] *= cfg.length_weight
        for k, batch in enumerate(batches):
            with ddp.no_sync(net, last=k == len(batches) - 1):
                with ddp.autocast():
                    losses, stats = net(*batch)
                ((losses * weights).sum() * ddp.world).backward()  # DDP averages, hence `world`
            run.add(**stats)
        run.add(tokens=counts[1])
        nn.utils.clip_grad_norm_(student.parameters(), cfg.clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_teacher(step)
        ema.update()
    return run


def summarise(total: dict, student: Denoiser) -> tuple[dict, dict]:
    """What log.jsonl gets and what the bar shows, from the sums since the last line."""
    tokens, L_0 = total["tokens"], total["L_0"] / total["L_0_tokens"]
    dm, cm, ce = (sum(total[name]) / tokens for name in ("L_DM", "L_CM", "ce"))
    norms = student.embedding_matrix().detach().float().norm(dim=-1)
    record = dict(
        loss=L_0 + total["rest"] / tokens, L_0=L_0, L_DM=dm, L_CM=cm, ce=ce,
        ce_by_t=[round(c / n, 4) if n else None for c, n in zip(total["ce"], total["count"])],
        embedding_norm=round(norms.mean().item(), 4))
    return record, dict(L_0=f"{L_0:.3f}", L_CM=f"{cm:.3f}", ce=f"{ce:.3f}")


# ---------------------------------------------------------------------------------------------
# Evaluation and samples
# ---------------------------------------------------------------------------------------------


def name_of(cfg: Config) -> str:
    """What tables call this run."""
    if cfg.objective == "csdm":
        return "csdm" + ("-l2" if cfg.l2_norm else "") + ("-fixed" if cfg.embeddings else "")
    return "catdm" + {"cm": "", "ce": "-ce", "none": "-without-cm"}[cfg.cm]


def eval_batches(cfg: Config, data: Data, split: str, limit: int, ddp: common.DDP
                 ) -> Iterator[tuple[Tensor, Tensor | None]]:
    """x and y of a split as in training, at most `limit` (0: all), this rank's share."""
    tokens = min(16384, 2**27 // data.vocab_size)  # logits of 1 GiB in float64
    batch = max(1, min(cfg.micro_batch, tokens // data.length))
    return common.eval_batches(data, split, batch, limit, ddp, show=split == cfg.split)


def evaluate(model: Denoiser, cfg: Config, data: Data, ddp: common.DDP) -> dict[str, dict]:
    """The bound and its parts on cfg.split, in bits per character (byte) or nats per token. For
    pairs also BLEU; in --mode eval for images with classes also grades of cfg.samples."""
    def terms(split: str, limit: int, draws: int, seed: int, *ends: float) -> Tensor:
        batches = eval_batches(cfg, data, split, limit, ddp)
        with ddp.autocast():
            return likelihoods(model, batches, draws, seed, data.pad_id, *ends).to(ddp.device)

    end = min(cfg.bound_end, cfg.logsnr_max)
    if cfg.bound_end > LOGSNR:  # the best on 128 training sequences
        ends = list(dict.fromkeys(min(end, cfg.logsnr_max) for end in BOUND_ENDS))
        # Draws of their own from each end to the next: those near t = 0 decide alone, by weights
        # of up to e^15, and of times drawn from all of [0, 1] hardly any is there.
        found = [terms("train", 128, 1, cfg.seed, *between)
                 for between in zip(ends, [*ends[1:], -math.inf])]
        _, reconstruction, diffusion = ddp.sum(
            torch.stack([(f[:, :3] * f[:, 3:]).sum(0) for f in found])).T
        end = ends[(reconstruction + diffusion.flip(0).cumsum(0).flip(0)).argmin()]
    bound, tokens = terms(cfg.split, cfg.eval_sequences, cfg.eval_draws,
                          common.fold_in(cfg.seed, ddp.rank), end).split([3, 1], 1)
    parts = dict(zip(("prior", "reconstruction", "diffusion"), bound.unbind(1)))
    figures = common.estimates({"nll_bound": bound.sum(1), **parts}, data, ddp, tokens[:, 0],
                               given="padding", split=cfg.split, end=end)
    if cfg.task == "pairs" and ddp.is_main:
        figures |= score_translations(translate_split(translate, model, cfg, data, ddp))
    if cfg.mode == "eval" and model.classes and ddp.is_main:
        how = (f"{cfg.samples} samples, {cfg.sample_steps} {cfg.sampler} steps, guidance "
               f"{cfg.guidance:g}")
        grades = TokenClassifier(data).grade(*draw_samples(model, cfg, data, ddp, cfg.guidance))
        figures |= {name: dict(value=value, unit=how) for name, value in grades.items()}
    return figures


def draw_samples(model: Denoiser, cfg: Config, data: Sequences, ddp: common.DDP, guidance: float
                 ) -> tuple[Tensor, Tensor | None]:
    """cfg.samples sequences (n, L) on the CPU and their labels (n,), one class after the other."""
    y = torch.arange(cfg.samples) % model.classes if model.classes else None
    if cfg.label:
        y.fill_(data.classes.index(cfg.label))
    generator = torch.Generator(ddp.device).manual_seed(common.fold_in(cfg.seed, 99))

    def sampler(begin: int, end: int) -> Iterator[Tensor]:
        cond = () if y is None else (ddp.put(y[begin:end]),)
        with ddp.autocast():
            yield from sample(model, (end - begin, model.length), cfg.sample_steps, cond,
                              sampler=cfg.sampler, guidance=guidance, argmax=cfg.argmax,
                              generator=generator)

    x = common.draw_in_batches(cfg.samples, cfg.sample_batch, cfg.sample_steps + 1, sampler)
    return x, y


def draw(model: Denoiser, cfg: Config, data: Data, ddp: common.DDP, trained: bool = False) -> dict:
    """Text: print samples, which samples.jsonl gets too; translations: print; images: samples.npz
    and .png (with --label labelled.npz and .png), of a model just trained on classes at guidance 0,
    1 and 2, with grades."""
    if cfg.task == "text":
        x, _ = draw_samples(model, cfg, data, ddp, 0.0)
        common.show_texts(x, data, cfg, cfg.sample_steps + 1)
        return {}
    if cfg.task == "pairs":
        for row in translate(model, sources_of(cfg, data), data, cfg, ddp):
            print(f"{row['source']}\n  -> {row['text']}")
        return {}
    scales = [0.0] if not model.classes else [0.0, 1.0, 2.0] if trained else [cfg.guidance]
    drawn, file = {}, Path(cfg.out) / ("labelled.png" if cfg.label else "samples.png")
    for g in scales:
        drawn[f"guidance {g:g}"], y = draw_samples(model, cfg, data, ddp, g)
    arrays = {name.replace(" ", ""): x for name, x in drawn.items()}
    np.savez_compressed(file.with_suffix(".npz"), **arrays, **({} if y is None else {"labels": y}))
    if data.pixels is not None:
        columns = model.classes if 1 < model.classes <= 40 and not cfg.label else 16
        save_grids(file, [data.draw(x) for x in drawn.values()], columns)
        print(f"{file}: " + (f"classes {cfg.label or ' '.join(data.classes)}, guidance "
              + ", ".join(f"{g:g}" for g in scales) if model.classes else "samples"))
    return {"samples": print_grades(data, drawn, y) if trained and model.classes else {}}


@torch.no_grad()
def probe(model: Denoiser, cfg: Config, data: Data, ddp: common.DDP, times: np.ndarray) -> dict:
    """What `eval.py collapse` asks: how the embeddings of a run lie, and what is left to predict.

    cross_entropy is of 500 sequences (CATDM's Figure 1), nothing dropped, with the same noise at
    all times; tokens (500 or fewer, L) are the split's, None for pairs. See eval.collapse.
    """
    t = torch.from_numpy(times).clamp_min(cfg.t_0)  # z stays as it is where the diffusion ends
    w, tokens = model.embedding_matrix().detach().float(), []
    nll, count = np.zeros(len(times)), 0
    for number, (x, y) in enumerate(eval_batches(cfg, data, cfg.split, 500, ddp)):
        generator = torch.Generator(x.device).manual_seed(common.fold_in(cfg.seed, 78, number))
        z = F.embedding(x, w)
        eps = torch.randn(z.shape, generator=generator, device=x.device)
        not_pad = data.not_pad(x)
        with ddp.autocast():
            cond, _ = model.cond(y, not_pad)
            for k, t_k in enumerate(t.to(x.device)):
                z_t = add_noise(z, t_k[None], eps, cfg.shift)
                log_p = predict(model, z_t, t_k, cond)
                nll[k] += cross_entropy(log_p, x)[not_pad].sum().item()
        count += not_pad.sum().item()
        tokens.append(x.cpu())
    signal, sigma = signal_and_noise(t, cfg.shift)
    return dict(cross_entropy=nll / count, signal=signal, sigma=sigma, embeddings=w.cpu(),
                tokens=None if cfg.task == "pairs" else torch.cat(tokens))


if __name__ == "__main__":
    common.run_main(common.main, sys.modules[__name__])
