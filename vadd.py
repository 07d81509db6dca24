"""VADD: Variational Autoencoding Discrete Diffusion, and its baseline MDLM.

    python vadd.py                                        CPU, 3 minutes: the checkerboard, a PNG
    python vadd.py --dataset circles                      another toy: swissroll, circles
    python vadd.py --dataset glyph-pixels                 CPU, 4 minutes: images
    python vadd.py --dataset text8                        one GPU
    torchrun --nproc_per_node 8 vadd.py --dataset owt     eight GPUs, the paper's main run
    python vadd.py --dataset text8 --latent_dim 0 --out runs/mdlm-text8    the same with MDLM

Masked diffusion fills in several positions at once, each by itself: what it writes there need not
fit together. VADD draws one latent vector z per step for the whole sequence; given z positions
are independent, over z they are not. A recognition network, used in training only, finds z for the
data as in a VAE. Equation numbers are the paper's ("Variational Autoencoding Discrete Diffusion
with Enhanced Dimensional Correlations Modeling").

  schedule     alpha_t of tokens                   Eq. 1, 3    schedule, loss_weight
  forward      q(x_t | x_0)                        Eq. 1       add_noise
  prior        p(z) = N(0, I)                      Eq. 6       StandardNormal
  denoiser     mu(x_t, z, t) -> logits of x_0      Eq. 7       MLP-, DiT-, UNetDenoiser
  recognition  r(z | x_0, x_t) = N(m, s^2)         Eq. 10      MLP-, DiT-, UNetRecognition
  loss         log-likelihood, KL ramp             Eq. 11      VADD.forward, kl_weight
  sampler      a fresh z per step                  Algorithm 2 sample
  likelihood   the paper's, and a valid bound      Eq. 20      delbo, bound

Time runs from t = 0 (clean) to t = 1 (noise).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common
from common import RunError, arg, free
from data import TOYS, Sequences, load_dataset
from eval import TOY_STEPS, histogram, show_images, show_toys

# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config(common.MaskedConfig):
    # Paper: section 5.3 has lr 2e-4, width 784 and a ramp of 200K steps, B.3 has 3e-4, 768 and
    # 100K. We take B.3, which is MDLM's recipe.
    dataset: str = arg("checkerboard", "checkerboard, swissroll, circles (toys); pydoc, pycode, "
                       "shakespeare, text8, english27, lm1b, lm1b-padded, owt; pixels: "
                       "glyph-pixels, mnist-binary, mnist-pixels, cifar10; or a folder of your "
                       "own, texts or images")
    length: int = arg(256, "tokens per sequence", 1, 65536)
    latent_dim: int = arg(128, "dimensions of the latent z; 0 = MDLM", 0, 65536)
    prior: str = arg("normal", "p(z): normal = N(0, I) (the paper), informed = p(z | x_t), learned",
                     choices=("normal", "informed"))
    components: int = arg(32, "Gaussians that the informed prior mixes", 1, 10000)
    kl_ramp: int = arg(100_000, "steps over which the KL's weight grows from 0 to 1 (Eq. 11)",
                       0, 10**9)
    prior_below: int = arg(0, "r = p(z) where at most so many positions are hidden: z has little "
                           "to decide there (the paper: 0; --prior informed: nowhere)", 0, 65536)
    hide_xt: bool = arg(False, "r(z | x_0): the recognition network does not see x_t")
    time_cond: bool = arg(False, "condition the networks on t (toys yes, text no: appendix B)")
    positions: bool = arg(False, "add a learned vector per position to the inputs: without, all "
                          "positions of an all-[MASK] sequence are alike", group="network")
    latent_at: str = arg("adaln", "where z enters the DiT: adaln (the paper), or a prefix token",
                         choices=("adaln", "prefix"), group="network")
    pool: str = arg("mean", "from the recognition DiT's sequence to one vector: the mean, or "
                    "attention with a learned query", choices=("mean", "attention"),
                    group="network")
    net: str = arg("dit", "architecture: dit (SEDD's and MDLM's), for pixels unet: --depth blocks "
                   "a level, or mlp for a few positions, without heads and dropout",
                   choices=("dit", "unet", "mlp"), group="network")
    K: int = free(10, "draws of z per likelihood (Eq. 20; the paper: 1000)", 1, 10**6,
                  group="evaluation")
    bound_steps: str = free("1,16", "nll_bound is computed for samplers of so many steps",
                            group="evaluation")


# B.1's networks are 512 wide and train for 500 epochs (195,312 steps) at 3e-4: that is
# results/vadd_toys.py. These rows take two CPU cores less than three minutes. prior_below is ours:
# where one of two positions is hidden a latent can only add noise.
_TOY = dict(net="mlp", length=2, latent_dim=2, prior_below=1, time_cond=True, dim=128, depth=4,
            dropout=0.0, steps=6000, batch_size=256, micro_batch=8192, lr=3e-3,
            lr_schedule="cosine", warmup=100, ema=0.99, kl_ramp=3000, samples=100_000,
            sample_batch=25_000, sample_steps=1, split="train", eval_draws=2, eval_sequences=2000,
            K=50, bound_steps="1,5,20", log_every=100, save_every=1000)
_SMALL = dict(length=256, dim=384, depth=6, heads=6, batch_size=64, latent_dim=64)
_LM = dict(batch_size=512, micro_batch=512, length=128, steps=1_000_000)  # latent 128: section 5.3
PRESETS: dict[str, dict] = {
    # Paper: Table 1's NLLs are below what held-out data allow MDLM (8.503 < ln 5000 = 8.517): they
    # were taken on the training points, hence split="train"; eval.py scores valid.
    "checkerboard": _TOY, "swissroll": _TOY, "circles": _TOY,
    "pydoc": dict(length=64, dim=96, depth=3, heads=3, dropout=0.0, batch_size=32, micro_batch=32,
                  latent_dim=16, kl_ramp=700, steps=2000, lr=3e-3, warmup=100,
                  lr_schedule="cosine", beta2=0.99, ema=0.99, sample_steps=16, log_every=20,
                  save_every=200, eval_sequences=100, K=4, bound_steps="1,4"),
    "pycode": dict(_SMALL, steps=20_000, lr=1e-3, warmup=500, kl_ramp=4000, save_every=1000),
    "shakespeare": dict(_SMALL, dropout=0.2, steps=5000, lr=1e-3, warmup=100, kl_ramp=1000,
                        lr_schedule="cosine", beta2=0.99, ema=0.999, save_every=500),
    "text8": dict(length=256, micro_batch=256),
    # our public benchmark: CADD's length, batch, steps and optimiser (410M characters); a ramp of
    # 1000 steps is too short for the latent to learn anything
    "english27": dict(length=256, batch_size=256, micro_batch=256, steps=6250, lr=6e-4,
                      lr_schedule="cosine", warmup=300, beta2=0.99, dropout=0.0, ema=0.999,
                      kl_ramp=5000, log_every=100, sample_batch=256, eval_sequences=500,
                      bound_steps="1,8,32"),
    "lm1b": _LM,         # packed sentences
    "lm1b-padded": _LM,  # padded sentences: the paper's (Table 5)
    "owt": dict(length=1024, latent_dim=512, sample_steps=1024, sample_batch=16),  # section 5.3
}
# Images (B.2): VDM's U-Net; the paper's Table 2 trains CIFAR-10 for 2M steps.
_PIXELS = dict(net="unet", time_cond=True, lr=2e-4, warmup=0, beta2=0.99, weight_decay=0.01,
               batch_size=256, split="test", eval_sequences=1000, bound_steps="1,20", samples=64,
               sample_batch=64, sample_steps=100)
PRESETS |= {
    "mnist-binary": dict(_PIXELS, dim=64, depth=8, heads=1, length=1024, latent_dim=64,
                         micro_batch=256, steps=200_000),
    "cifar10": dict(_PIXELS, dim=128, depth=32, heads=32, length=3072, latent_dim=128,
                    micro_batch=128, steps=1_000_000, eval_sequences=200),
    # two CPU cores, four minutes; the KL's weight ends at .1, with a faster ramp z stays unused
    "glyph-pixels": dict(_PIXELS, dim=16, mults="1,2,4", depth=1, heads=2, pixel_dim=16, length=256,
                         scale_shift=True, latent_dim=16, kl_ramp=7000, prior_below=100,
                         dropout=0.0, batch_size=32, micro_batch=32, steps=700, lr=4e-3, warmup=50,
                         lr_schedule="cosine", weight_decay=0.0, ema=0.99, sample_steps=20,
                         log_every=20, save_every=200, eval_sequences=60, K=4, bound_steps="1,5"),
    # 32 x 32 pixels in colours, one GPU
    "images": dict(_PIXELS, dim=64, mults="1,2,2", depth=3, heads=4, length=3072, latent_dim=64,
                   dropout=0.2, batch_size=128, micro_batch=128, steps=50_000, kl_ramp=20_000,
                   ema=0.999, eval_sequences=200),
}
PRESETS["mnist-pixels"] = PRESETS["mnist-binary"]
PRESETS["folder"] = dict(PRESETS["pydoc"], steps=4000, kl_ramp=1400)  # two CPU cores, ten minutes
# eval.py scores the --eval_sequences of the run: the full split costs K network calls per step of
# each bound. Say --eval_sequences 0 if wanted.
SCORE_FLAGS: list[str] = []
IMAGE_STEPS = (1, 5, 10, 20, 100)  # Figure 3

# ---------------------------------------------------------------------------------------------
# Schedule and forward process
# ---------------------------------------------------------------------------------------------


def schedule(t: Tensor, alpha: str) -> tuple[Tensor, Tensor]:
    """1 - alpha_t, the share of hidden tokens, and its slope -alpha'_t, of t's shape. Only this
    function and its inverse know the formula."""
    if alpha == "cosine":
        return torch.sin(math.pi / 2 * t), math.pi / 2 * torch.cos(math.pi / 2 * t)
    return t, torch.ones_like(t)


def time_of(hidden: Tensor, alpha: str) -> Tensor:
    """The time t at which a share `hidden` of the tokens is: schedule's inverse."""
    return 2 / math.pi * torch.asin(hidden) if alpha == "cosine" else hidden


def loss_weight(t: Tensor, alpha: str) -> Tensor:
    """-alpha'_t / (1 - alpha_t) of Eq. 3: 1/t if alpha_t = 1 - t."""
    hidden, slope = schedule(t, alpha)
    return slope / hidden


def reveal_probability(t: Tensor, s: Tensor, alpha: str) -> Tensor:
    """(alpha_s - alpha_t) / (1 - alpha_t), Eq. 1: what is hidden at t is visible at s < t."""
    hidden_t, hidden_s = schedule(t, alpha)[0], schedule(s, alpha)[0]
    return (hidden_t - hidden_s) / hidden_t


def add_noise(x0: Tensor, t: Tensor, u: Tensor, mask_id: int, alpha: str) -> tuple[Tensor, Tensor]:
    """q(x_t | x_0), section 2: hide each token with probability 1 - alpha_t.

    x0 (B, L), t (B,), u (B, L) uniform noise -> x_t (B, L), masked (B, L). The same u at s < t
    gives an x_s of q(x_s | x_t, x_0), Eq. 1.
    """
    masked = u < schedule(t, alpha)[0][:, None]
    return torch.where(masked, mask_id, x0), masked


# ---------------------------------------------------------------------------------------------
# Latents and their prior
# ---------------------------------------------------------------------------------------------


def log_normal(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(z; mean, std^2), summed over the last dimension, in nats."""
    e = (z - mean) * (-log_std).exp()
    return (-0.5 * e.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def kl_from_standard(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)) of each dimension, in nats."""
    return 0.5 * ((2 * log_std).exp() + mean.square() - 1) - log_std


class StandardNormal:
    """The paper's prior p(z) = N(0, I), Eq. 6, of latents z (..., B, latent)."""

    def draw(self, eps: Tensor, u: Tensor) -> Tensor:
        """z from normal noise eps (..., B, latent); uniform noise u (..., B) is not needed."""
        return eps

    def log_prob(self, z: Tensor) -> Tensor:
        """(..., B), in nats."""
        return log_normal(z, torch.zeros_like(z), torch.zeros_like(z))

    def kl(self, z: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        """KL(N(mean, std^2) || p) in nats: (B,), and of each dimension (B, latent). Exact: the
        draw z is not needed."""
        per_dim = kl_from_standard(mean, log_std)
        return per_dim.sum(-1), per_dim


class InformedPrior:
    """--prior informed, ours: p(z | x_t), which the paper's section 6 leaves to the future. A
    mixture of C Gaussians, since one at x_1 = all [MASK] could do no more than N(0, I)."""

    def __init__(self, out: Tensor, C: int, n: int):
        """out (B, C (2 n + 1)) of the network, n the latent's dimensions."""
        self.logits, mean, log_std = out.float().split([C, C * n, C * n], -1)
        self.mean = mean.unflatten(-1, (C, n))                            # (B, C, latent)
        self.log_std = log_std.unflatten(-1, (C, n)).clamp(-8, 8)

    def draw(self, eps: Tensor, u: Tensor) -> Tensor:
        row = torch.arange(u.shape[-1], device=u.device)
        k = common.sample_categorical(self.logits.expand(*u.shape, -1), u=u)
        return self.mean[row, k] + self.log_std[row, k].exp() * eps

    def log_prob(self, z: Tensor) -> Tensor:
        each = log_normal(z[..., None, :], self.mean, self.log_std)       # (..., B, C)
        return (self.logits.log_softmax(-1) + each).logsumexp(-1)

    def kl(self, z: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        """An unbiased estimate at z ~ N(mean, std^2), (B,); for the log of each dimension
        (B, latent) the KL to the Gaussian of the mixture's mean and variance."""
        weight = self.logits.softmax(-1)[..., None]
        mean_0 = (weight * self.mean).sum(1)
        square = (weight * (self.mean.square() + (2 * self.log_std).exp())).sum(1)
        log_std_0 = 0.5 * (square - mean_0.square()).clamp_min(1e-12).log()
        per_dim = kl_from_standard((mean - mean_0) * (-log_std_0).exp(), log_std - log_std_0)
        return log_normal(z, mean, log_std) - self.log_prob(z), per_dim


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ELU between them (B.1)."""
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ELU())]
    return nn.Sequential(*layers[:-1])


class BinEmbedding(nn.Module):
    """The sum of one embedding per position: ids (..., L) -> (..., d)."""

    def __init__(self, rows: int, L: int, d: int):
        super().__init__()
        self.rows, self.table = rows, nn.Embedding(L * rows, d)

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.arange(x.shape[-1], device=x.device) * self.rows
        return self.table(x + shift).sum(-2)


class MLPDenoiser(nn.Module):
    """B.1: mlp(emb(x_t) + emb(z) + emb(t)) -> logits (B, L, V).

    Paper: the readout has V outputs for all positions together and emb(x) is not explained. We
    give each position its own V outputs, and its own embeddings, which are added. Its sinusoidal
    embedding of t has 1,024 channels; ours 256, as elsewhere here.
    """

    def __init__(self, cfg: Config, V: int):
        super().__init__()
        self.shape = (cfg.length, V)
        self.embed = BinEmbedding(V + 1, cfg.length, cfg.dim)
        self.time = common.TimeEmbedding(cfg.dim)
        if cfg.latent_dim:
            self.latent = nn.Linear(cfg.latent_dim, cfg.dim)
        self.readout = mlp(*[cfg.dim] * cfg.depth, cfg.length * V)

    def forward(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Tensor:
        h = self.embed(x_t) + self.time(t)
        h = h + self.latent(z) if z is not None else h
        h = self.readout[:-1](h)
        with torch.autocast(h.device.type, enabled=False):
            return self.readout[-1](h.float()).unflatten(-1, self.shape)


class MLPRecognition(nn.Module):
    """B.1, siamese: the mean of one MLP on x_0 and on x_t, read out to `outputs` numbers."""

    def __init__(self, cfg: Config, V: int, outputs: int):
        super().__init__()
        self.embed = BinEmbedding(V + 1, cfg.length, cfg.dim)
        self.time = common.TimeEmbedding(cfg.dim)
        self.trunk = mlp(*[cfg.dim] * (cfg.depth + 1))
        self.readout = mlp(cfg.dim, cfg.dim, outputs)

    def forward(self, x0: Tensor, x_t: Tensor, masked: Tensor, t: Tensor) -> Tensor:
        x = x_t[None] if x0 is x_t else torch.stack([x0, x_t])            # a prior has x_t alone
        h = self.embed(x) + self.time(t)                                  # (2, B, d), or 1
        return self.readout(self.trunk(h).mean(0))


class PositionedDiT(nn.Module):
    """A DiT whose input x (B, L) may get a learned vector per position (--positions, ours).

    Where all is [MASK] every position of a plain DiT computes the same: rotary attention knows
    distances alone, z and t are global. So from one z it could draw letters' frequencies only.
    """

    def __init__(self, cfg: Config, V: int):
        super().__init__()
        self.net = common.DiT(V + 1, cfg.dim, cfg.depth, cfg.heads, 128, cfg.dropout,
                              cfg.length + (cfg.latent_at == "prefix"))
        if cfg.positions:
            self.position = nn.Parameter(torch.randn(cfg.length, cfg.dim) / (3 * cfg.dim) ** 0.5)

    def embed(self, x: Tensor) -> Tensor:
        h = self.net.embed(x)
        return h + self.position[: x.shape[1]] if hasattr(self, "position") else h


class DiTDenoiser(PositionedDiT):
    """Section 3.3, Fig. 2a: a DiT whose adaLN layers are driven by z; features (B, L, d).

    Paper: d_c, the width of emb(z), is not given. 128, the DiT's own condition, makes the adaLN
    layers the "around 6%" of the parameters that section 5.3 speaks of. With --latent_at prefix,
    ours, emb(z) is a token before the first: attention then chooses where z counts.
    """

    def __init__(self, cfg: Config, V: int):
        super().__init__(cfg, V)
        self.prefix = cfg.latent_at == "prefix"
        width = cfg.dim if self.prefix else 128
        if cfg.latent_dim:
            self.latent = nn.Sequential(nn.Linear(cfg.latent_dim, width), nn.SiLU(),
                                        nn.Linear(width, width))

    def forward(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Tensor:
        h, c = self.embed(x_t), None if z is None else self.latent(z)
        if c is None or not self.prefix:
            return self.net(h, t, c)
        return self.net(torch.cat([c[:, None], h], 1), t)[:, 1:]


class DiTRecognition(PositionedDiT):
    """Section 3.3, Fig. 2b: a DiT on x_0 that is told M_t by adaLN at masked positions only.

    R is the shared learned vector behind all shifts and scales. Paper: how the sequence becomes
    one vector is not said; we take the mean over positions, or attend with a query (--pool).
    """

    def __init__(self, cfg: Config, V: int, outputs: int):
        super().__init__(cfg, V)
        self.R = nn.Parameter(torch.randn(1, 128))
        if cfg.pool == "attention":
            self.query = nn.Parameter(torch.randn(cfg.dim))
            self.attend = common.Attention(cfg.dim, cfg.heads)
        self.readout = nn.Linear(cfg.dim, outputs)

    def forward(self, x0: Tensor, x_t: Tensor, masked: Tensor, t: Tensor) -> Tensor:
        h = self.net(self.embed(x0), t, self.R, at=masked)
        if hasattr(self, "query"):
            return self.readout(self.attend(self.query.expand(len(h), 1, -1), h)[:, 0])
        return self.readout(h.mean(1))


class UNetDenoiser(nn.Module):
    """B.2: emb(z) joins the condition that is added in every block; logits (B, L, V)."""

    def __init__(self, cfg: Config, V: int, shape: tuple[int, ...]):
        super().__init__()
        self.net, width = common.unet(cfg, V, shape, V), 4 * cfg.dim
        if cfg.latent_dim:
            self.latent = nn.Sequential(nn.Linear(cfg.latent_dim, width), nn.SiLU(),
                                        nn.Linear(width, width))

    def forward(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Tensor:
        return self.net(x_t, t, None if z is None else self.latent(z))


class UNetRecognition(nn.Module):
    """B.2, siamese: the mean of one U-Net's outputs for x_0 and for x_t, halved by convolutions
    down to one pixel of `outputs` numbers. Paper: the U-Net's outputs are not said; `dim` each."""

    def __init__(self, cfg: Config, V: int, outputs: int, shape: tuple[int, ...]):
        super().__init__()
        self.net = common.unet(cfg, V, shape, cfg.dim)
        c = [shape[2] * cfg.dim] + [cfg.dim] * math.ceil(math.log2(max(shape[:2])))
        self.down = nn.Sequential(*(m for a, b in itertools.pairwise(c) for m in (
            nn.Conv2d(a, b, 3, 2, padding=1), nn.SiLU())))
        self.readout = nn.Linear(cfg.dim, outputs)
        for layer in (self.net.head, *self.down[::2]):  # from near 0 nobody would learn to use z
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, x0: Tensor, x_t: Tensor, masked: Tensor, t: Tensor) -> Tensor:
        x = x_t if x0 is x_t else torch.cat([x0, x_t])                    # a prior has x_t alone
        h = self.net(x, t if len(t) == 1 else t.repeat(len(x) // len(x_t)))
        h = h.unflatten(0, (-1, len(x_t))).mean(0)                        # (B, L, dim)
        h = h.reshape(len(h), *self.net.shape[:2], -1).movedim(-1, 1)
        return self.readout(self.down(h).flatten(1))


# ---------------------------------------------------------------------------------------------
# Model and loss
# ---------------------------------------------------------------------------------------------


class VADD(nn.Module):
    """Denoiser, recognition network and prior; the training loss is its forward."""

    def __init__(self, cfg: Config, vocab_size: int, shape: tuple[int, ...] | None = None):
        """`shape` of the images (unet)."""
        super().__init__()
        self.cfg, self.mask_id = cfg, vocab_size
        V, n = vocab_size, cfg.latent_dim
        dit = cfg.net == "dit"
        if cfg.net == "unet":
            Recognition = functools.partial(UNetRecognition, shape=shape)
            self.denoiser = UNetDenoiser(cfg, V, shape)
        else:
            Recognition = DiTRecognition if dit else MLPRecognition
            self.denoiser = DiTDenoiser(cfg, V) if dit else MLPDenoiser(cfg, V)
        if dit:
            self.hidden_share = common.share_moments(lambda t: schedule(t, cfg.alpha)[0])
            self.head = nn.Linear(cfg.dim, V + 1)  # [MASK] is never the answer: first V rows only
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        if n:
            self.recognition = Recognition(cfg, V, 2 * n)
        if n and cfg.prior == "informed":  # a smaller one: sampling pays for it at every step
            small = dataclasses.replace(cfg, depth=max(1, cfg.depth // 4))
            self.prior = Recognition(small, V, cfg.components * (2 * n + 1))

    def time(self, t: Tensor) -> Tensor:
        return t if self.cfg.time_cond else torch.zeros_like(t[:1])

    def denoise(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Tensor:
        """What `logits` reads: features (B, L, d), or the logits themselves (unet, mlp)."""
        return self.denoiser(x_t, z, self.time(t))

    def logits(self, h: Tensor) -> Tensor:
        """`denoise`'s output, at any positions, -> logits (..., V), float32 under any autocast:
        mu(x_t, z, t)."""
        if self.cfg.net != "dit":
            return h.float()
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(h.float(), self.head.weight[:-1], self.head.bias[:-1])

    def recognise(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """r(z | x_0, x_t), Eq. 10: mean and log standard deviation, (B, latent) each."""
        x_t = x0 if self.cfg.hide_xt else x_t
        out = self.recognition(x0, x_t, x_t == self.mask_id, self.time(t)).float()
        mean, log_std = out.chunk(2, -1)
        return mean, log_std.clamp(-8, 8)

    def prior_at(self, x_t: Tensor, t: Tensor) -> StandardNormal | InformedPrior:
        """p(z) of Eq. 6, or p(z | x_t)."""
        if self.cfg.prior == "normal":
            return StandardNormal()
        out = self.prior(x_t, x_t, x_t == self.mask_id, self.time(t))
        return InformedPrior(out, self.cfg.components, self.cfg.latent_dim)

    def takes_prior(self, x_t: Tensor) -> Tensor:
        """(B,) where r is N(0, I) = p(z), ours (--prior_below). Any r keeps the bounds bounds."""
        few = (x_t == self.mask_id).sum(1) <= self.cfg.prior_below
        return few & (self.cfg.prior == "normal")

    def cross_entropy(self, h: Tensor, x0: Tensor, scored: Tensor, weight: Tensor
                      ) -> tuple[Tensor, Tensor]:
        """-log p(x_0 | x_t, z) at the positions `scored` (B, L) from h = denoise(x_t, z, t), in
        nats: the sum of weight (B,) times it, and its sums (B,)."""
        if self.cfg.net == "dit":
            return common.masked_cross_entropy(
                h, self.head.weight[:-1], self.head.bias[:-1], x0, scored, weight,
                self.hidden_share, self.cfg.compile and h.is_cuda)
        nll = F.cross_entropy(self.logits(h).flatten(0, 1), x0.flatten(), reduction="none")
        nll = (nll.view(x0.shape) * scored).sum(1)
        return (weight * nll).sum(), nll

    def forward(
        self, x0: Tensor, t: Tensor, u: Tensor, eps: Tensor, not_pad: Tensor, kl_weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 11 with the sign of a loss, summed over the batch in nats (divide by the tokens that
        are no padding), and statistics. The arguments are a Batch and lambda = kl_weight ()."""
        weight = loss_weight(t, self.cfg.alpha)
        x_t, masked = add_noise(x0, t, u, self.mask_id, self.cfg.alpha)
        scored = masked & not_pad
        z, kl, per_dim = None, torch.zeros_like(t), torch.zeros_like(eps)  # MDLM has no z
        if self.cfg.latent_dim:
            mean, log_std = self.recognise(x0, x_t, t)
            z = mean + log_std.exp() * eps                                # reparametrised
            kl, per_dim = self.prior_at(x_t, t).kl(z, mean, log_std)
            free = self.takes_prior(x_t)
            z = torch.where(free[:, None], eps, z)
            kl, per_dim = kl.masked_fill(free, 0.0), per_dim.masked_fill(free[:, None], 0.0)
        # With nothing to predict the exact posterior is the prior: z is not used, its KL is 0.
        some = scored.any(1)
        kl, per_dim = kl * some, per_dim.detach() * some[:, None]
        loss, nll = self.cross_entropy(self.denoise(x_t, z, t), x0, scored, weight)
        loss = loss + kl_weight * (weight * kl).sum()
        stats = common.by_tenth(
            t, ce=nll, masked=scored.sum(1), weighted_nll=weight * nll, weighted_kl=weight * kl,
            kl=kl, sequences=some)
        return loss, stats | dict(kl_per_dim=per_dim.sum(0))


# ---------------------------------------------------------------------------------------------
# Sampler
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: VADD, x: Tensor, steps: int, *, temperature: float = 1.0, top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Algorithm 2: yields x_t (B, L) after each step; the last one has no [MASK].

    x (B, L): mask_id where a token is to be found, anything else is kept. One fresh z per step
    and sequence, one call of the denoiser per step. Draws in float64 (Table 8).
    """
    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=x.device, generator=generator, dtype=torch.float64)

    (B, L), z = x.shape, None
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=x.device)
    for t, s in itertools.pairwise(times):
        masked = x == model.mask_id
        if not masked.any():
            yield x
            continue
        t_b = t.float().expand(B)
        if model.cfg.latent_dim:
            eps = torch.randn(B, model.cfg.latent_dim, device=x.device, generator=generator)
            z = model.prior_at(x, t_b).draw(eps, uniform(B))
        logits = model.logits(model.denoise(x, z, t_b)[masked])           # (M, V)
        # Eq. 7: first whether a token is revealed, then which.
        reveal = uniform(B, L)[masked] < reveal_probability(t, s, model.cfg.alpha)
        token = common.sample_categorical(logits, temperature, top_p, uniform(len(reveal)))
        x = x.masked_scatter(masked, torch.where(reveal, token, model.mask_id))
        yield x


# ---------------------------------------------------------------------------------------------
# Likelihood
# ---------------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """A draw of the forward process, and which of the hidden tokens are to be explained."""

    x0: Tensor      # (B, L)
    t: Tensor       # (B,)
    x_t: Tensor     # (B, L)
    scored: Tensor  # (B, L) bool


def log_likelihood(model: VADD, draw: Draw, z: Tensor | None) -> Tensor:
    """log p(x_0 | x_t, z) = log prod_i mu_i(x_t, z)[x_0^i] over the positions `scored`, for k
    latents z (k, B, latent) each: (k, B) float64. Without latents k is 1."""
    k, B = 1 if z is None else len(z), len(draw.x0)
    x0, x_t, scored = (x.repeat(k, 1) for x in (draw.x0, draw.x_t, draw.scored))
    h = model.denoise(x_t, None if z is None else z.flatten(0, 1), draw.t.repeat(k))
    nll = F.cross_entropy(model.logits(h[scored]).double(), x0[scored], reduction="none")
    out = torch.zeros(k * B, device=x0.device, dtype=torch.float64)
    return out.index_add(0, scored.nonzero()[:, 0], -nll).view(k, B)


def log_evidence(model: VADD, draw: Draw, K: int, generator: torch.Generator,
                 from_prior: float = 0.0) -> Tensor:
    """log of an unbiased estimate of Eq. 8, E_z p(x_0 | x_t, z) of the positions `scored`: (B,)
    float64 nats, 0 where there are none. By Jensen its mean is a lower bound for any proposal.

    Importance sampling with K draws of z: a share `from_prior` of them from the prior, the others
    from r(z | x_0, x_t); all where r is the prior.
    """
    out, some = torch.zeros_like(draw.t, dtype=torch.float64), draw.scored.any(1)
    if not some.any():
        return out
    draw = Draw(*(x[some] for x in draw))
    if not model.cfg.latent_dim:
        return out.masked_scatter(some, log_likelihood(model, draw, None))
    mean, log_std = model.recognise(draw.x0, draw.x_t, draw.t)
    prior = model.prior_at(draw.x_t, draw.t)
    noise = dict(generator=generator, device=out.device)
    prior_draws = torch.where(model.takes_prior(draw.x_t), K, int(from_prior * K))  # come first
    share = prior_draws.double() / K                                      # (B,)
    log_w: list[Tensor] = []
    tokens = 2**14 if model.cfg.net == "dit" else 2**20 if out.is_cuda else 2**15
    at_once = max(1, tokens // draw.x0.numel())  # draws of z per network call
    for begin in range(0, K, at_once):
        k = torch.arange(begin, min(K, begin + at_once), device=out.device)
        eps, u = torch.randn(len(k), *mean.shape, **noise), torch.rand(len(k), len(mean), **noise)
        z = torch.where((k[:, None] < prior_draws)[..., None], prior.draw(eps, u),
                        mean + log_std.exp() * eps)                       # (k, B, latent)
        log_p, log_r = prior.log_prob(z).double(), log_normal(z, mean, log_std).double()
        proposal = torch.logaddexp(share.log() + log_p, (1 - share).log() + log_r)
        log_w.append(log_likelihood(model, draw, z) + log_p - proposal)
    return out.masked_scatter(some, torch.cat(log_w).logsumexp(0) - math.log(K))


def delbo(model: VADD, x0: Tensor, not_pad: Tensor, n: Tensor, K: int,
          generator: torch.Generator) -> Tensor:
    """Eq. 20 at one x_t with n (B,) hidden positions: (B,) in nats per token.

    E_t E_x_t of the weight times -log of K-sample estimates of p(x_0 | x_t). Paper: "bounds" rest
    on Eq. 3, which needs p(x_0 | x_t) to factorise: its derivation lets one position be revealed
    at a time, so only the marginals count. With a correlated denoiser Eq. 3 exceeds log p(x_0),
    and so may Eq. 9 and 20: no bound. With latent_dim 0 it is MDLM's.

    The integral over t is taken by the number n of hidden positions. With m = 1 - alpha_t the
    weight is dm / m, and C(L, n) int m^(n-1) (1-m)^(L-n) dm = 1/n. So the same expectation, for
    any schedule, is that of L/n with n uniform over 1..L, m the n-th smallest of L uniforms u and
    u <= m hidden: exact down to t = 0 and without the weight's heavy tail.
    """
    u = torch.rand(x0.shape, device=x0.device, generator=generator)
    m = u.sort(1).values.gather(1, n[:, None] - 1)                        # (B, 1)
    masked = u <= m
    draw = Draw(x0, time_of(m[:, 0], model.cfg.alpha), torch.where(masked, model.mask_id, x0),
                masked & not_pad)
    return -log_evidence(model, draw, K, generator) * x0.shape[1] / n / not_pad.sum(1)


def bound(model: VADD, x0: Tensor, not_pad: Tensor, T: int, K: int,
          generator: torch.Generator) -> Tensor:
    """A valid bound, of the sampler of T steps: (B,) in nats per token.

    The sampler's transition p(x_s | x_t) is Eq. 6-7, so with the set R of positions that q reveals
    in a step,
        -log p(x_0) <= sum over steps of E_q [ -log E_z prod_{i in R} mu_i(x_t, z) ]
    (the revealing itself has the same probability in q and p and cancels). T = 1 is a VAE's bound;
    T -> infinity reveals one at a time: MDLM's with the marginals. r knows all of x_0, but only R
    has to be explained: where R is small r is too narrow, so half of the draws (rounded down)
    come from the prior, which for even K bounds the weights by 2.
    """
    u = torch.rand(x0.shape, device=x0.device, generator=generator)
    total = torch.zeros(len(x0), device=x0.device, dtype=torch.float64)
    times = torch.linspace(1, 0, T + 1, device=x0.device).expand(len(x0), -1).T  # (T + 1, B)
    for t, s in itertools.pairwise(times):
        x_t, masked = add_noise(x0, t, u, model.mask_id, model.cfg.alpha)
        still_masked = add_noise(x0, s, u, model.mask_id, model.cfg.alpha)[1]
        draw = Draw(x0, t, x_t, masked & ~still_masked & not_pad)
        total -= log_evidence(model, draw, K, generator, from_prior=0.5)
    return total / not_pad.sum(1)


@torch.no_grad()
def likelihoods(
    model: VADD, batches: Iterator[Tensor], draws: int, seed: int, pad_id: int | None = None,
    K: int = 1, bound_steps: tuple[int, ...] = (1,),
) -> dict[str, Tensor]:
    """nll_delbo and nll_bound_T for T in bound_steps, in nats per token, one estimate per sequence
    and draw: (sequences x draws,) float64 each; and `tokens` that are no padding, which is given
    and not scored. Batches (B, L).

    The number of hidden positions is low-discrepancy across the batch and across a sequence's
    draws, so the naive standard error is on the safe side.
    """
    found: list[list[Tensor]] = []
    for number, x0 in enumerate(batches):
        B, L = x0.shape
        generator = torch.Generator(x0.device).manual_seed(common.fold_in(seed, 77, number))
        noise = dict(generator=generator, device=x0.device)
        shift, perm = torch.rand((), dtype=torch.float64, **noise), torch.randperm(B, **noise)
        not_pad = x0 != (-1 if pad_id is None else pad_id)
        for k in range(draws):
            even = common.low_discrepancy_t(k * B + perm, B * draws, shift, 0.0)
            n = (even * L).long().clamp_max(L - 1) + 1                    # (B,) in 1..L
            found.append([not_pad.sum(1), delbo(model, x0, not_pad, n, K, generator)])
            found[-1] += [bound(model, x0, not_pad, T, K, generator) for T in bound_steps]
    names = ["tokens", "nll_delbo", *(f"nll_bound_{T}" for T in bound_steps)]
    return {name: torch.cat(values) for name, values in zip(names, zip(*found))}


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Everything random about some samples of a step."""

    x0: Tensor       # (B, L) token ids
    t: Tensor        # (B,) times
    u: Tensor        # (B, L) uniform noise: what is hidden
    eps: Tensor      # (B, latent) normal noise of z
    not_pad: Tensor  # (B, L) bool


def load(cfg: Config, tokenizer: dict | None = None) -> Sequences:
    """The samples of a toy are compared with its points, so those are always loaded."""
    if tokenizer and cfg.dataset not in TOYS:
        return Sequences.from_tokenizer(tokenizer)
    return load_dataset(cfg.dataset, cfg.data_dir, cfg.length, synthetic=cfg.mode == "bench",
                        as_bytes=cfg.bytes)


def load_batch(cfg: Config, data: Sequences, step: int, index: Tensor, ddp: common.DDP) -> Batch:
    """The samples `index` (B,) of the global batch of a step, the same on any number of ranks: each
    draws the whole batch's noise, which is small, and takes its rows."""
    x0 = ddp.put(data.train_batch(cfg.seed, step, cfg.batch_size, index.numpy()).ids)
    rows = ddp.put(index)
    shift = np.random.default_rng(common.fold_in(cfg.seed, step, 1)).random()
    t = common.low_discrepancy_t(rows, cfg.batch_size, shift, t_min=1e-3)
    noise = dict(device=ddp.device, generator=torch.Generator(
        ddp.device).manual_seed(common.fold_in(cfg.seed, step)))
    u = torch.rand(cfg.batch_size, data.length, **noise)[rows]
    eps = torch.randn(cfg.batch_size, cfg.latent_dim, **noise)[rows]
    return Batch(x0, t, u, eps, data.not_pad(x0))


def kl_weight(step: int, cfg: Config) -> float:
    """lambda of Eq. 11: 0 at the first step, 1 from step kl_ramp on."""
    return min(1.0, step / cfg.kl_ramp) if cfg.kl_ramp else 1.0


def build(cfg: Config, data: Sequences) -> VADD:
    """The networks, untrained. Raises RunError if a DiT's width does not suit its heads, or if
    --prompt does not suit the data."""
    bound_steps(cfg)  # a mistake there should not cost a training run
    if cfg.net != "dit" and (cfg.positions or cfg.latent_at == "prefix" or cfg.pool != "mean"):
        raise RunError("--positions, --latent_at and --pool are for --net dit")
    if (cfg.prompt or cfg.watch) and (cfg.net == "mlp" or data.unit == "bin"):
        raise RunError("--prompt and --watch are for text and pictures, not for --net mlp")
    common.check_prompt(cfg, data)
    return VADD(cfg, data.vocab_size, data.shape)


def flops_per_token(model: VADD, L: int) -> float:
    """Model FLOPs of a training step per token (mlp: not counted). The head sees the hidden share
    of the positions, forward and backward 3 x 2 FLOPs."""
    if model.cfg.net == "mlp":
        return 0.0
    if model.cfg.net == "unet":  # the recognition network's runs twice
        nets = [m for m in model.modules() if isinstance(m, common.UNet)]
        nets += [model.recognition.net] if model.cfg.latent_dim and not model.cfg.hide_xt else []
        return sum(net.flops_per_token(L) for net in nets)
    head = 6 * model.hidden_share[0] * model.head.weight.numel()
    return head + sum(m.flops_per_token(L) for m in model.modules() if isinstance(m, common.DiT))


def train(cfg: Config, ddp: common.DDP, data: Sequences) -> common.Run:
    model = build(cfg, data).to(ddp.device)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, betas=(0.9, cfg.beta2), eps=1e-8,
                                  weight_decay=cfg.weight_decay, fused=True)
    ema = common.EMA(model, cfg.ema)
    run = common.Run("vadd", cfg, ddp, data, model, optimizer, ema,
                     flops_per_token(model, cfg.length))
    net = ddp.wrap(model, cfg.compile)
    parts = common.micro_batches(cfg.batch_size, cfg.micro_batch, ddp)
    warned = False

    def summary(total: dict) -> tuple[dict, dict]:
        nonlocal warned
        record, shown = summarise(total, cfg, run.step)
        if run.step >= cfg.kl_ramp and record.get("active_dims") == 0 and not warned:
            warned = True
            ddp.is_main and tqdm.write(
                f"warning: posterior collapse at step {run.step}: no dimension of z carries 0.01 "
                "nats, so this is MDLM. Try a longer --kl_ramp, a lower --lr or a smaller "
                "--latent_dim", file=sys.stderr)
        return record, shown

    def valid(held_out: Sequences, step: int) -> Tensor:  # the KL in full
        batches = [load_batch(cfg, held_out, step, index, ddp) for index in parts]
        tokens = ddp.sum(sum(batch.not_pad.sum() for batch in batches))
        return sum(model(*batch, torch.ones_like(batch.t[0]))[0] for batch in batches) / tokens

    for step in run.steps(summary, valid):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, cfg)
        ramp = torch.full((), kl_weight(step, cfg), device=ddp.device)
        batches = [load_batch(cfg, data, step, index, ddp) for index in parts]
        own_tokens = sum(batch.not_pad.sum() for batch in batches)
        tokens = ddp.sum(own_tokens)  # of the global batch
        for k, batch in enumerate(batches):
            with ddp.no_sync(net, last=k == len(batches) - 1):
                with ddp.autocast():
                    loss, stats = net(*batch, ramp)
                (loss * ddp.world / tokens).backward()  # DDP averages gradients, hence `world`
            run.add(**stats)
        run.add(tokens=own_tokens)
        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()
    return run


def summarise(total: dict, cfg: Config, step: int) -> tuple[dict, dict]:
    """What log.jsonl gets and what the bar shows, from the sums since the last line."""
    nll, kl = (sum(total[name]) / total["tokens"] for name in ("weighted_nll", "weighted_kl"))
    masked = sum(total["masked"])
    delbo = nll + kl  # Eq. 9 per token: the KL in full
    record = dict(
        delbo_nats=delbo, delbo_bits=delbo / math.log(2), nll_given_z_nats=nll,
        ce_masked_nats=sum(total["ce"]) / masked if masked else None,
        ce_by_t=[round(c / m, 4) if m else None for c, m in zip(total["ce"], total["masked"])])
    shown = dict(loss=f"{delbo:.3f}")
    if cfg.latent_dim:
        sequences = max(1.0, sum(total["sequences"]))  # with a hidden token
        per_dim = [round(k / sequences, 4) for k in total["kl_per_dim"]]
        record |= dict(kl_weight=kl_weight(step, cfg), kl_nats=sum(total["kl"]) / sequences,
                       active_dims=sum(k > 0.01 for k in per_dim), kl_per_dim=per_dim)
        shown |= dict(kl=f"{record['kl_nats']:.2f}",
                      active=f"{record['active_dims']}/{cfg.latent_dim}")
    return record, shown


# ---------------------------------------------------------------------------------------------
# Evaluation and samples
# ---------------------------------------------------------------------------------------------


def name_of(cfg: Config) -> str:
    return "mdlm" if not cfg.latent_dim else "vadd" if cfg.prior == "normal" else "vadd-informed"


def bound_steps(cfg: Config) -> tuple[int, ...]:
    """--bound_steps "1,16" -> (1, 16)."""
    parts = cfg.bound_steps.split(",")
    if not all(part.strip().isdecimal() and 0 < int(part) <= 10**6 for part in parts):
        raise RunError(f'--bound_steps {cfg.bound_steps!r}: give numbers of steps, 1 to 1000000, '
                       'such as "1,16"')
    return tuple(map(int, parts))


def evaluate(model: VADD, cfg: Config, data: Sequences, ddp: common.DDP) -> dict[str, dict]:
    """Figures of `likelihoods` over cfg.split: bits per character, nats per token or point."""
    batch = cfg.scored_at_once(data.length)
    batches = common.eval_batches(data, cfg.split, batch, cfg.eval_sequences, ddp)
    seed = common.fold_in(cfg.seed, ddp.rank)
    with common.exact(ddp.device), ddp.autocast():  # which leaves float64 alone
        values = likelihoods(model, (x0 for x0, _ in batches), cfg.eval_draws, seed, data.pad_id,
                             cfg.K, bound_steps(cfg))
    figures = common.estimates(values, data, ddp, values.pop("tokens", None), given="padding",
                               K=cfg.K, split=cfg.split)
    for name, figure in figures.items():
        figure["is_bound"] = name != "nll_delbo" or not cfg.latent_dim
    return figures


def draw_ids(model: VADD, cfg: Config, data: Sequences, steps: int, ddp: common.DDP) -> Tensor:
    """cfg.samples sequences of `steps` steps: ids (samples, L) on the CPU."""
    generator = torch.Generator(ddp.device).manual_seed(common.fold_in(cfg.seed, 99))
    return common.fill_in(cfg, data, ddp, steps, lambda x: sample(
        model, x, steps, temperature=cfg.temperature, top_p=cfg.top_p, generator=generator))


def draw(model: VADD, cfg: Config, data: Sequences, ddp: common.DDP, trained: bool = False) -> dict:
    """Print cfg.samples texts, or how far a toy's points are from the training points, after
    training for the paper's numbers of steps; files in the run folder get them."""
    if data.unit == "dimension":
        steps = IMAGE_STEPS if trained else (cfg.sample_steps,)
        return show_images({f"{T} steps": draw_ids(model, cfg, data, T, ddp) for T in steps}, data,
                           cfg, graded=trained)
    if data.unit != "bin":
        ids = draw_ids(model, cfg, data, cfg.sample_steps, ddp)
        common.show_texts(ids, data, cfg, cfg.sample_steps)
        return {}
    steps = TOY_STEPS if trained else (cfg.sample_steps,)
    own = {T: histogram(draw_ids(model, cfg, data, T, ddp).numpy()) for T in steps}
    return dict(toy=show_toys(data, own, name_of(cfg), cfg.samples, Path(cfg.out)))


if __name__ == "__main__":
    common.run_main(common.main, sys.modules[__name__])
