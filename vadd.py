"""VADD: Variational Autoencoding Discrete Diffusion, and its baseline MDLM.

    python vadd.py                                        CPU, 3 minutes: the checkerboard, a PNG
    python vadd.py --dataset circles                      another toy: swissroll, circles
    python vadd.py --dataset text8                        one GPU
    torchrun --nproc_per_node 8 vadd.py --dataset owt     eight GPUs, the paper's main run
    python vadd.py --dataset text8 --latent_dim 0 --out runs/mdlm-text8    the same with MDLM

Masked diffusion fills in several positions at once, each by itself: what it writes there need not
fit together. VADD draws one latent vector z per step for the whole sequence; given z positions
are independent, over z they are not. A recognition network, used in training only, finds z for the
data as in a VAE. Equation numbers are the paper's ("Variational Autoencoding Discrete Diffusion
with Enhanced Dimensional Correlations Modeling").

  forward      q(x_t | x_0)                        Eq. 1       add_noise
  denoiser     mu(x_t, z, t) -> logits of x_0      Eq. 7       MLPDenoiser, DiTDenoiser
  recognition  r(z | x_0, x_t) = N(m, s^2)         Eq. 10      MLPRecognition, DiTRecognition
  prior        p(z) = N(0, I), or p(z | x_t)       Eq. 6       VADD.prior_at
  loss         (log-likelihood + KL ramp) / t      Eq. 11      VADD.forward
  sampler      a fresh z per step                  Algorithm 2 sample
  likelihood   a valid bound, and the paper's      Eq. 20      likelihoods

Time runs from t = 0 (clean) to t = 1 (noise); alpha_t = 1 - t is the share of visible tokens.
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
from data import TOY_BINS, TOYS, TextData, load_dataset, ngram_entropies

# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config(common.RunConfig):
    dataset: str = arg("checkerboard", "checkerboard, swissroll, circles (toys); pydoc, pycode, "
                       "shakespeare, text8, english27, lm1b, lm1b-padded, owt, or a folder of your "
                       "own", fixed=True)
    length: int = arg(256, "tokens per sequence", 1, 65536, fixed=True)
    # Method
    latent_dim: int = arg(128, "dimensions of the latent z; 0 = MDLM", 0, 65536, fixed=True)
    prior: str = arg("normal", "p(z): normal = N(0, I) (the paper), informed = p(z | x_t), learned",
                     choices=("normal", "informed"), fixed=True)
    components: int = arg(32, "Gaussians that the informed prior mixes", 1, 10000, fixed=True)
    kl_ramp: int = arg(100_000, "steps over which the KL's weight grows from 0 to 1 (Eq. 11)",
                       0, 10**9, fixed=True)
    time_cond: bool = arg(False, "condition the networks on t (toys yes, text no: appendix B)",
                          fixed=True)
    # Networks: the DiT of SEDD and MDLM for text, MLPs for the toys
    net: str = arg("dit", "architecture: dit, or mlp for a few positions", choices=("dit", "mlp"),
                   fixed=True)
    dim: int = arg(768, "width", 8, 65536, fixed=True)
    depth: int = arg(12, "layers", 1, 1000, fixed=True)
    heads: int = arg(12, "attention heads (dit)", 1, 1000, fixed=True)
    dropout: float = arg(0.1, "dropout on residual branches (dit)", 0, 0.99, fixed=True)
    # Optimisation. Paper: section 5.3 has lr 2e-4, width 784 and a ramp of 200K steps, B.3 has
    # 3e-4, 768 and 100K. We take B.3, which is MDLM's recipe.
    steps: int = arg(1_000_000, "training steps", 1, 10**9)
    batch_size: int = arg(512, "sequences per step, over all devices", 1, 10**7, fixed=True)
    micro_batch: int = arg(64, "most sequences one device takes at once", 1, 10**7)
    lr: float = arg(3e-4, "learning rate", 0, 10, fixed=True)
    lr_schedule: str = arg("constant", "after warm-up", choices=("constant", "cosine"), fixed=True)
    warmup: int = arg(2500, "warm-up steps", 0, 10**9, fixed=True)
    beta2: float = arg(0.999, "AdamW beta2 (beta1 is .9)", 0, 0.999999, fixed=True)
    weight_decay: float = arg(0.0, "AdamW weight decay", 0, 10, fixed=True)
    clip: float = arg(1.0, "gradient norm", 1e-6, 1e6, fixed=True)
    ema: float = arg(0.9999, "EMA decay", 0, 1, fixed=True)
    # Sampling
    samples: int = arg(4, "samples to draw", 1, 10**7)
    sample_steps: int = arg(256, "sampling steps T, one network call each", 1, 10**6)
    sample_batch: int = arg(32, "samples drawn at once", 1, 10**6)
    temperature: float = arg(1.0, "of the token draw", 0, 100)
    top_p: float = arg(1.0, "nucleus of the token draw", 1e-6, 1)
    # Evaluation
    split: str = arg("valid", "split to evaluate", choices=("train", "valid", "test"))
    eval_draws: int = arg(1, "draws of (t, x_t) per sequence", 1, 10**6)
    eval_sequences: int = arg(0, "sequences to evaluate; 0: the whole split", 0, 10**9)
    K: int = arg(10, "draws of z per likelihood (Eq. 20; the paper: 1000)", 1, 10**6)
    bound_steps: str = arg("1,16", "nll_bound is computed for samplers of so many steps")
    bench_steps: int = arg(20, "timed steps of --mode bench", 1, 10**6)


# B.1's networks are 512 wide and train for 500 epochs (195,312 steps) at 3e-4: that is
# results/vadd_toys.py. These rows take two CPU cores less than three minutes.
_TOY = dict(net="mlp", length=2, latent_dim=2, time_cond=True, dim=128, depth=4, dropout=0.0,
            steps=6000, batch_size=256, micro_batch=8192, lr=3e-3, lr_schedule="cosine", warmup=100,
            ema=0.99, kl_ramp=3000, samples=100_000, sample_batch=25_000, sample_steps=1,
            split="train", eval_draws=2, eval_sequences=2000, K=50, bound_steps="1,5,20",
            log_every=100, save_every=1000)
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
    "path": dict(_SMALL, steps=20_000, lr=1e-3, warmup=500, kl_ramp=4000),
}

# ---------------------------------------------------------------------------------------------
# Forward process, Gaussians
# ---------------------------------------------------------------------------------------------


def add_noise(x0: Tensor, t: Tensor, u: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """q(x_t | x_0), section 2: hide each token with probability 1 - alpha_t = t.

    x0 (B, L), t (B,), u (B, L) uniform noise -> x_t (B, L), masked (B, L).
    """
    masked = u < t[:, None]
    return torch.where(masked, mask_id, x0), masked


def log_normal(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(z; mean, std^2), summed over the last dimension, in nats."""
    e = (z - mean) * (-log_std).exp()
    return (-0.5 * e.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(mean: Tensor, log_std: Tensor, mean_0: Tensor, log_std_0: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(mean_0, std_0^2)) of each dimension, in nats; one shape for all."""
    variance = (2 * (log_std - log_std_0)).exp()
    shift = ((mean - mean_0) * (-log_std_0).exp()).square()
    return 0.5 * (variance + shift - 1) + log_std_0 - log_std


@dataclasses.dataclass
class Mixture:
    """Gaussian mixture over z: logits (B, C), mean (B, C, latent), log_std (B, C, latent).

    The prior: N(0, I) is the mixture of one (C = 1, and B = 1 for all sequences).
    """

    logits: Tensor
    mean: Tensor
    log_std: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """z (..., B, latent) -> (..., B)."""
        each = log_normal(z[..., None, :], self.mean, self.log_std)       # (..., B, C)
        return (self.logits.log_softmax(-1) + each).logsumexp(-1)

    def draw(self, u: Tensor, eps: Tensor) -> Tensor:
        """u (..., B) uniform, eps (..., B, latent) normal -> z (..., B, latent)."""
        C, n = self.mean.shape[1:]
        component = common.sample_categorical(self.logits.expand(*u.shape, C), u=u)
        index = component[..., None, None].expand(*u.shape, 1, n)
        mean, log_std = (p.expand(*u.shape, C, n).gather(-2, index)[..., 0, :]
                         for p in (self.mean, self.log_std))
        return mean + log_std.exp() * eps

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of each dimension: (B, latent) each."""
        weight = self.logits.softmax(-1)[..., None]
        mean = (weight * self.mean).sum(1)
        square = (weight * (self.mean.square() + (2 * self.log_std).exp())).sum(1)
        return mean, 0.5 * (square - mean.square()).clamp_min(1e-12).log()


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ELU between them (B.1)."""
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-1], widths[1:]):
        layers += [nn.Linear(a, b), nn.ELU()]
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
        return self.readout(h).unflatten(-1, self.shape)


class MLPRecognition(nn.Module):
    """B.1, siamese: the mean of one MLP on x_0 and on x_t, read out to `outputs` numbers."""

    def __init__(self, cfg: Config, V: int, outputs: int):
        super().__init__()
        self.embed = BinEmbedding(V + 1, cfg.length, cfg.dim)
        self.time = common.TimeEmbedding(cfg.dim)
        self.trunk = mlp(*[cfg.dim] * (cfg.depth + 1))
        self.readout = mlp(cfg.dim, cfg.dim, outputs)

    def forward(self, x0: Tensor, x_t: Tensor, masked: Tensor, t: Tensor) -> Tensor:
        h = self.embed(torch.stack([x0, x_t])) + self.time(t)             # (2, B, d)
        return self.readout(self.trunk(h).mean(0))


class DiTDenoiser(nn.Module):
    """Section 3.3, Fig. 2a: a DiT whose adaLN layers are driven by z; features (B, L, d).

    Paper: d_c, the width of emb(z), is not given. 128, the DiT's own condition, makes the adaLN
    layers the "around 6%" of the parameters that section 5.3 speaks of.
    """

    def __init__(self, cfg: Config, V: int):
        super().__init__()
        self.net = common.DiT(V + 1, cfg.dim, cfg.depth, cfg.heads,
                              dropout=cfg.dropout, length=cfg.length)
        if cfg.latent_dim:
            self.latent = nn.Sequential(nn.Linear(cfg.latent_dim, 128), nn.SiLU(),
                                        nn.Linear(128, 128))

    def forward(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Tensor:
        return self.net(x_t, t, None if z is None else self.latent(z))


class DiTRecognition(nn.Module):
    """Section 3.3, Fig. 2b: a DiT on x_0 that is told M_t by adaLN at masked positions only.

    R is the shared learned vector behind all shifts and scales. Paper: how the sequence becomes
    one vector is not said; we take the mean over positions.
    """

    def __init__(self, cfg: Config, V: int, outputs: int):
        super().__init__()
        self.net = common.DiT(V + 1, cfg.dim, cfg.depth, cfg.heads,
                              dropout=cfg.dropout, length=cfg.length)
        self.R = nn.Parameter(torch.randn(1, 128))
        self.readout = nn.Linear(cfg.dim, outputs)

    def forward(self, x0: Tensor, x_t: Tensor, masked: Tensor, t: Tensor) -> Tensor:
        return self.readout(self.net(x0, t, self.R, at=masked).mean(1))


# ---------------------------------------------------------------------------------------------
# Model and loss
# ---------------------------------------------------------------------------------------------


class VADD(nn.Module):
    """Denoiser, recognition network and prior; the training loss is its forward."""

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        if cfg.net == "dit" and (cfg.dim % cfg.heads or (cfg.dim // cfg.heads) % 2):
            raise RunError(f"--dim {cfg.dim} must be an even multiple of --heads {cfg.heads}")
        self.cfg, self.V, self.mask_id = cfg, vocab_size, vocab_size
        V, n = vocab_size, cfg.latent_dim
        Denoiser, Recognition = {"dit": (DiTDenoiser, DiTRecognition),
                                 "mlp": (MLPDenoiser, MLPRecognition)}[cfg.net]
        self.denoiser = Denoiser(cfg, V)
        if cfg.net == "dit":
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
        """What `logits` reads: features (B, L, d), or the logits themselves (mlp)."""
        return self.denoiser(x_t, z, self.time(t))

    def logits(self, h: Tensor) -> Tensor:
        """`denoise`'s output, at any positions, -> float32 logits (..., V): mu(x_t, z, t)."""
        if self.cfg.net == "dit":
            h = F.linear(h, self.head.weight[: self.V], self.head.bias[: self.V])
        return h.float()

    def recognise(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """r(z | x_0, x_t), Eq. 10: mean and log standard deviation, (B, latent) each."""
        out = self.recognition(x0, x_t, x_t == self.mask_id, self.time(t)).float()
        mean, log_std = out.chunk(2, -1)
        return mean, log_std.clamp(-8, 8)

    def prior_at(self, x_t: Tensor, t: Tensor) -> Mixture:
        """p(z) = N(0, I), or p(z | x_t), which section 6 leaves to the future: a mixture of
        Gaussians, since one Gaussian at x_1 = all [MASK] could do no more than N(0, I)."""
        n, C = self.cfg.latent_dim, self.cfg.components
        if self.cfg.prior == "normal":
            zeros = torch.zeros(1, 1, n, device=x_t.device)
            return Mixture(zeros[..., 0], zeros, zeros)
        out = self.prior(x_t, x_t, x_t == self.mask_id, self.time(t)).float()
        logits, mean, log_std = out.split([C, C * n, C * n], -1)
        mean, log_std = mean.unflatten(-1, (C, n)), log_std.unflatten(-1, (C, n))
        return Mixture(logits, mean, log_std.clamp(-8, 8))

    def infer(
        self, x0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z ~ r(z | x_0, x_t) from noise eps (B, latent), KL(r || p) (B,), KL per dimension.

        The KL is exact where the prior is N(0, I), else its unbiased estimate at z. Per dimension
        (B, latent): to the Gaussian of the prior's mean and variance, for the log.
        """
        mean, log_std = self.recognise(x0, x_t, t)
        z = mean + log_std.exp() * eps                                    # reparametrised
        prior = self.prior_at(x_t, t)
        per_dim = gaussian_kl(mean, log_std, *prior.moments())
        if self.cfg.prior == "normal":
            return z, per_dim.sum(-1), per_dim
        return z, log_normal(z, mean, log_std) - prior.log_prob(z), per_dim

    def forward(
        self, x0: Tensor, t: Tensor, u: Tensor, eps: Tensor, valid: Tensor, kl_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 11 summed over the batch, in nats (divide by the valid tokens).

        x0 (B, L), t (B,), u (B, L), eps (B, latent), valid (B, L) bool, kl_weight () = lambda.
        Returns the sum of [ -log p(x_0 | x_t, z) + lambda KL ] / t; (6, 10) statistics by tenth
        of t: cross-entropy, masked tokens, both parts of the bound (each over t), KL, sequences
        with a masked token; and the sum over these sequences of the KL per dimension (latent,).
        """
        B, L = x0.shape
        x_t, masked = add_noise(x0, t, u, self.mask_id)
        scored = masked & valid
        # With nothing to predict the exact posterior is the prior: z is not used, its KL is 0.
        some = scored.any(1)
        z, kl, per_dim = None, torch.zeros_like(t), torch.zeros_like(eps)
        if self.cfg.latent_dim:
            z, kl, per_dim = self.infer(x0, x_t, t, eps)
            kl, per_dim = kl * some, per_dim.detach() * some[:, None]
        h = self.denoise(x_t, z, t)

        if self.cfg.net == "mlp":
            nll = F.cross_entropy(self.logits(h).flatten(0, 1), x0.flatten(), reduction="none")
            nll = (nll.view(B, L) * scored).sum(1)                        # (B,)
            loss = (nll / t).sum()
        else:  # the vocabulary head is a third of the FLOPs: only masked positions need it
            index, live = common.masked_positions(scored, common.mask_capacity(B, L))
            h = h.flatten(0, 1).index_select(0, index)                    # (M, d)
            scale = live / t.repeat_interleave(L)[index]
            loss, nll = common.linear_cross_entropy(
                h, self.head.weight[: self.V], self.head.bias[: self.V], x0.flatten()[index],
                scale, compiled=self.cfg.compile and h.is_cuda)
            nll = torch.zeros_like(t).index_add(0, index // L, nll * live)
        loss = loss + kl_weight * (kl / t).sum()

        rows = torch.stack([nll, scored.sum(1).float(), nll / t, kl / t, kl, some.float()]).detach()
        tenth = (10 * t).long().clamp_max(9)
        return loss, torch.zeros(6, 10, device=t.device).index_add(1, tenth, rows), per_dim.sum(0)


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
    def uniform(shape):
        return torch.rand(shape, device=x.device, generator=generator, dtype=torch.float64)

    B, L = x.shape
    clock = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=x.device)
    for t, s in zip(clock[:-1], clock[1:]):
        masked = x == model.mask_id
        if not masked.any():
            yield x
            continue
        t_b, z = t.float().expand(B), None
        if model.cfg.latent_dim:
            eps = torch.randn((B, model.cfg.latent_dim), device=x.device, generator=generator)
            z = model.prior_at(x, t_b).draw(uniform((B,)), eps)
        logits = model.logits(model.denoise(x, z, t_b)[masked])           # (M, V)
        # Eq. 7: reveal with probability (alpha_s - alpha_t) / (1 - alpha_t) = (t - s) / t. First
        # whether, then what.
        reveal = uniform((B, L))[masked] < (t - s) / t
        token = common.sample_categorical(logits, temperature, top_p, uniform(reveal.shape))
        x = x.masked_scatter(masked, torch.where(reveal, token, model.mask_id))
        yield x


# ---------------------------------------------------------------------------------------------
# Likelihood
# ---------------------------------------------------------------------------------------------


def log_evidence(
    model: VADD, x0: Tensor, x_t: Tensor, t: Tensor, scored: Tensor, K: int,
    generator: torch.Generator, from_prior: int = 0, autocast=contextlib.nullcontext,
) -> Tensor:
    """log of an unbiased estimate of E_z prod_i mu_i(x_t, z)[x_0^i] over positions i `scored`.

    z ~ p(z | x_t), by importance sampling with K draws: `from_prior` of them from the prior, the
    others from r(z | x_0, x_t). Returns (B,) float64 nats. The log makes it a lower bound in
    expectation for any proposal (Jensen).
    """
    B, L = x0.shape

    def log_mu(z: Tensor | None) -> Tensor:  # (k, B, latent) -> (k, B)
        k = 1 if z is None else len(z)
        at = scored.repeat(k, 1)
        with autocast():
            h = model.denoise(x_t.repeat(k, 1), None if z is None else z.flatten(0, 1), t.repeat(k))
            logits = model.logits(h[at])
        nll = F.cross_entropy(logits.double(), x0.repeat(k, 1)[at], reduction="none")
        row = torch.arange(k * B, device=x0.device)[:, None].expand_as(at)[at]
        return torch.zeros(k * B, device=x0.device, dtype=torch.float64).index_add(
            0, row, -nll).view(k, B)

    if not model.cfg.latent_dim:
        return log_mu(None)[0]
    with autocast():
        mean, log_std = model.recognise(x0, x_t, t)
        prior = model.prior_at(x_t, t)
    log_w: list[Tensor] = []
    tokens = 2**14 if model.cfg.net == "dit" else 2**20 if x0.is_cuda else 2**15
    at_once = max(1, tokens // x0.numel())  # draws of z per network call
    for begin in range(0, K, at_once):
        k = min(at_once, K - begin)
        eps = torch.randn((k, B, mean.shape[1]), generator=generator, device=x0.device)
        u = torch.rand((k, B), generator=generator, device=x0.device)
        z, n = mean + log_std.exp() * eps, max(0, min(k, from_prior - begin))
        if n:
            z[:n] = prior.draw(u[:n], eps[:n])
        log_p, log_r = prior.log_prob(z).double(), log_normal(z, mean, log_std).double()
        share = torch.tensor(from_prior / K, dtype=torch.float64)         # mixture proposal
        proposal = torch.logaddexp(share.log() + log_p, (1 - share).log() + log_r)
        log_w.append(log_mu(z) + log_p - proposal)
    return torch.cat(log_w).logsumexp(0) - math.log(K)


@torch.no_grad()
def likelihoods(
    model: VADD, batches: Iterator[Tensor], draws: int, seed: int, pad_id: int | None = None,
    K: int = 1, bound_steps: tuple[int, ...] = (1,), autocast=contextlib.nullcontext,
) -> dict[str, Tensor]:
    """One estimate per sequence and draw of each figure, in nats per valid token.

    nll_delbo    Eq. 20: E_t E_x_t 1/t times -log of K-sample importance estimates of
                 p(x_0 | x_t). Paper: "bounds" rest on Eq. 3, which needs p(x_0 | x_t) to
                 factorise: its derivation lets one position be revealed at a time, so only the
                 marginals count. With a correlated denoiser Eq. 3 exceeds log p(x_0), and so may
                 Eq. 9 and 20: no bound. With latent_dim 0 it is MDLM's bound.
    nll_bound_T  the sampler of T steps: its transition p(x_s | x_t) is Eq. 6-7, so with the set R
                 of positions that q reveals in a step,
                     -log p(x_0) <= sum over steps of E_q [ -log E_z prod_{i in R} mu_i(x_t, z) ]
                 (the revealing itself has the same probability in q and p and cancels). T = 1 is
                 a VAE's bound; T -> infinity reveals one at a time: MDLM's with the marginals.
                 r knows all of x_0, but only R has to be explained: where R is small r is too
                 narrow, so half of the draws come from the prior, which bounds the weights by 2.

    The integral over t is taken by the number n of masked positions. Substituting
    C(L, n) int t^(n-1) (1-t)^(L-n) dt = 1/n, the same expectation is that of L/n, in place of 1/t,
    with n uniform over 1..L, t the n-th smallest of L uniforms u and u <= t masked: exact down to
    t = 0 and without 1/t's heavy tail. n is low-discrepancy over batch and draws.

    Each tensor is (n,) float64, n = sequences x draws; batches are (B, L).
    """
    figures: dict[str, list[Tensor]] = {"nll_delbo": []}
    figures |= {f"nll_bound_{T}": [] for T in bound_steps}
    for number, x0 in enumerate(batches):
        (B, L), device = x0.shape, x0.device
        generator = torch.Generator(device).manual_seed(common.mix(seed, 77, number))
        shift = torch.rand((), generator=generator, device=device, dtype=torch.float64)
        place = torch.randperm(B, generator=generator, device=device)
        valid = x0 != pad_id if pad_id is not None else torch.ones_like(x0, dtype=torch.bool)
        tokens = valid.sum(1)

        def minus_log(t: Tensor, masked: Tensor, scored: Tensor, from_prior: int) -> Tensor:
            """-log_evidence where something is scored, 0 elsewhere: (B,)."""
            x_t, some = torch.where(masked, model.mask_id, x0), scored.any(1)
            out = torch.zeros(B, device=device, dtype=torch.float64)
            if some.any():
                out[some] = -log_evidence(model, x0[some], x_t[some], t[some], scored[some], K,
                                          generator, from_prior, autocast)
            return out

        for draw in range(draws):
            even = common.low_discrepancy_t(draw * B + place, B * draws, shift, 0.0)
            n = (even * L).long().clamp_max(L - 1) + 1                    # (B,) in 1..L
            u = torch.rand(x0.shape, generator=generator, device=device)
            t = u.sort(1).values.gather(1, n[:, None] - 1)[:, 0]
            masked = u <= t[:, None]
            value = minus_log(t, masked, masked & valid, from_prior=0)
            figures["nll_delbo"].append(value * L / n / tokens)
            for T in bound_steps:
                # q reveals each position in one of the T steps, from t = k/T to (k-1)/T, at random
                step = torch.randint(1, T + 1, x0.shape, generator=generator, device=device)
                total = torch.zeros(B, device=device, dtype=torch.float64)
                for k in range(T, 0, -1):
                    t = torch.full((B,), k / T, device=device)
                    total += minus_log(t, step <= k, (step == k) & valid, from_prior=K // 2)
                figures[f"nll_bound_{T}"].append(total / tokens)
    return {name: torch.cat(values) for name, values in figures.items()}


def bound_steps(cfg: Config) -> tuple[int, ...]:
    """--bound_steps "1,16" -> (1, 16)."""
    try:
        steps = tuple(int(part) for part in cfg.bound_steps.split(","))
    except ValueError:
        steps = (0,)
    if min(steps) < 1:
        raise RunError(f'--bound_steps {cfg.bound_steps!r}: give numbers of steps such as "1,16"')
    return steps


def evaluate(model: VADD, cfg: Config, data: TextData, place: common.Setup) -> dict[str, dict]:
    """Figures of `likelihoods` over cfg.split: bits per character, nats per token or point."""
    limit = cfg.eval_sequences or None
    batch = max(1, min(cfg.micro_batch, 16384 // data.length or 1))

    def batches() -> Iterator[Tensor]:
        total = math.ceil(min(limit or 10**12, data.num_sequences(cfg.split)) / batch / place.world)
        rows = data.eval_batches(cfg.split, batch, limit, place.rank, place.world)
        for x0 in tqdm(rows, f"evaluate {cfg.split}", total, disable=not place.is_main, leave=False,
                       mininterval=0.2 if sys.stderr.isatty() else 10):
            yield torch.from_numpy(x0).to(place.device)

    model.eval()
    values = likelihoods(model, batches(), cfg.eval_draws, common.mix(cfg.seed, place.rank),
                         data.pad_id, cfg.K, bound_steps(cfg), autocast=place.autocast)
    model.train()
    scale, unit = {"token": (1.0, "nats/token"), "bin": (data.length, "nats/point")}.get(
        data.unit, (1 / math.log(2), f"bits/{data.unit}"))
    figures = {}
    for name, v in values.items():
        v = v * scale
        n, total, square = place.sum(torch.stack([torch.ones_like(v), v, v**2]).sum(1)).tolist()
        figures[name] = dict(
            value=total / n, stderr=math.sqrt(max(0.0, square / n - (total / n) ** 2) / n),
            unit=unit, draws=int(n), K=cfg.K, split=cfg.split,
            is_bound=name != "nll_delbo" or not cfg.latent_dim)
        if data.unit == "token":
            figures[name]["perplexity"] = math.exp(total / n)
    return figures


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
# Training
# ---------------------------------------------------------------------------------------------


def load_noise(cfg: Config, data: TextData, step: int, index: Tensor, place: common.Setup):
    """Everything random about the samples `index` of a step: (x0, t, u, eps, valid).

    The noise is small (no embedding is noised): each rank draws the global batch's and takes its
    rows, so the number of ranks and the micro-batch size change nothing.
    """
    x0 = torch.from_numpy(data.train_batch(cfg.seed, step, cfg.batch_size, index.numpy()))
    if place.on_cuda:
        x0 = x0.pin_memory()
    x0, rows = (x.to(place.device, non_blocking=True) for x in (x0, index))
    shift = np.random.default_rng(common.mix(cfg.seed, step, 1)).random()
    t = common.low_discrepancy_t(rows, cfg.batch_size, shift, t_min=1e-3)
    generator = torch.Generator(place.device).manual_seed(common.mix(cfg.seed, step))
    noise = dict(generator=generator, device=place.device)
    u = torch.rand(cfg.batch_size, data.length, **noise)[rows]
    eps = torch.randn(cfg.batch_size, cfg.latent_dim, **noise)[rows]
    valid = x0 != data.pad_id if data.pad_id is not None else torch.ones_like(x0, dtype=torch.bool)
    return x0, t, u, eps, valid


def kl_weight(step: int, cfg: Config) -> float:
    """lambda of Eq. 11: 0 at the first step, 1 from step kl_ramp on."""
    return min(1.0, step / cfg.kl_ramp) if cfg.kl_ramp else 1.0


def train_step(net, model: VADD, optimizer, ema, cfg: Config, step: int, batches, place) -> Tensor:
    """One optimizer step on this rank's micro-batches; returns flat statistics, no host sync."""
    for group in optimizer.param_groups:
        group["lr"] = common.learning_rate(step, cfg.lr, cfg.warmup, cfg.lr_schedule, cfg.steps)
    # Divide by the valid tokens of the global batch; DDP averages gradients, hence `world`.
    tokens = place.sum(torch.stack([valid.sum() for *_, valid in batches]).sum())
    weight = torch.full((), kl_weight(step, cfg), device=place.device)
    stats = torch.zeros(60 + cfg.latent_dim, device=place.device)
    for k, batch in enumerate(batches):
        last = k == len(batches) - 1
        with contextlib.nullcontext() if last or place.world == 1 else net.no_sync():
            with place.autocast():
                loss, by_t, per_dim = net(*batch, weight)
            (loss * place.world / tokens).backward()
        stats += torch.cat([by_t.flatten(), per_dim])
    nn.utils.clip_grad_norm_(model.parameters(), cfg.clip, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ema.update()
    return torch.cat([(tokens / place.world)[None], stats])


def build(cfg: Config, vocab_size: int, place: common.Setup):
    """Model, what to call in training (compiled, DDP), optimizer and EMA."""
    model = VADD(cfg, vocab_size).to(place.device)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, betas=(0.9, cfg.beta2), eps=1e-8,
                                  weight_decay=cfg.weight_decay, fused=True)
    net = torch.compile(model, dynamic=False) if cfg.compile and place.on_cuda else model
    if place.world > 1:
        devices = [place.device.index] if place.on_cuda else None
        net = DistributedDataParallel(net, device_ids=devices, gradient_as_bucket_view=True)
    return model, net, optimizer, common.EMA(model, cfg.ema)


def name_of(cfg: Config) -> str:
    return "mdlm" if not cfg.latent_dim else "vadd" if cfg.prior == "normal" else "vadd-informed"


def flops_per_token(model: VADD, L: int) -> float:
    """Model FLOPs of training per token (dit): the head sees half of the positions."""
    nets = [m for m in model.modules() if isinstance(m, common.DiT)]
    return sum(net.flops_per_token(L) for net in nets) + 0.5 * 6 * model.head.weight.numel()


def train(cfg: Config, place: common.Setup) -> None:
    out, checkpoint = Path(cfg.out), Path(cfg.out) / "checkpoint.pt"
    bound_steps(cfg)  # a mistake there should not cost a training run
    data = load_dataset(cfg.dataset, cfg.data_dir, cfg.length)
    model, net, optimizer, ema = build(cfg, data.vocab_size, place)
    parts = common.micro_batches(cfg.batch_size, cfg.micro_batch, place)
    step, seconds, resumed = 0, 0.0, checkpoint.exists() and not cfg.overwrite
    if resumed:
        state = common.read_checkpoint(checkpoint, "vadd", place.device)
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
            f"another --out; to sample: python vadd.py --dataset {cfg.dataset} --mode sample "
            f"--out {out}")
        return

    out.mkdir(parents=True, exist_ok=True)
    info = common.environment(place)
    parameters = sum(p.numel() for p in model.parameters())
    if place.is_main:
        print(f"{data.name}: {data.num_sequences('train'):,} sequences of {data.length} "
              f"{data.unit}s, {data.vocab_size} symbols | {parameters / 1e6:.1f}M parameters | "
              f"{info['hardware']}")
        print(f"{'resuming at step ' + str(step) if resumed else 'training'} -> {out}"
              + (", once compiled: one to three minutes" if cfg.compile and place.on_cuda else ""))
    start = dict(method="vadd", argv=sys.argv[1:], config=dataclasses.asdict(cfg),
                 parameters=parameters, **info)
    progress = common.Progress(out, place, start, step, cfg.steps, keep=resumed)
    stop = common.StopRequest()

    def save() -> None:
        rng = common.rng_states(place)
        if place.is_main:
            common.write_checkpoint(checkpoint, dict(
                method="vadd", config=dataclasses.asdict(cfg), model=model.state_dict(),
                ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step,
                seconds=seconds, rng=rng, tokenizer=data.tokenizer()))

    stats = torch.zeros(61 + cfg.latent_dim, device=place.device)
    logged, clock, first, finished, warned = step, time.time(), True, False, False
    while step < cfg.steps and not finished:
        batches = [load_noise(cfg, data, step, index, place) for index in parts]
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
            tokens, by_t, per_dim = total[0].item(), total[1:61].view(6, 10), total[61:].tolist()
            ce, masked, nll, kl_over_t, kl, some = by_t.sum(1).tolist()
            if not math.isfinite(nll + kl_over_t):
                progress.close()
                raise RunError(
                    f"the loss is {nll + kl_over_t} between steps {logged} and {step}. "
                    + (f"{checkpoint} still holds an earlier, good state: " if checkpoint.exists()
                       else "Nothing was saved yet: ") + "try a lower --lr or --clip")
            now = time.time()
            rate = (step - mark[0]) * cfg.batch_size * data.length / max(1e-9, now - mark[1])
            use = common.utilisation(rate * flops_per_token(model, data.length), place) \
                if cfg.net == "dit" else None
            delbo = (nll + kl_over_t) / tokens  # Eq. 9 per token: the KL in full
            record = dict(
                step=step, delbo_nats=delbo, delbo_bits=delbo / math.log(2),
                nll_given_z_nats=nll / tokens, ce_masked_nats=ce / masked,
                lr=optimizer.param_groups[0]["lr"], tokens_per_s=round(rate),
                mfu=use and round(use, 4), seconds=round(seconds + now - clock, 2),
                ce_by_t=[round(c / m, 4) if m else None for c, m in by_t[:2].T.tolist()])
            shown = dict(loss=f"{delbo:.3f}", lr=f"{record['lr']:.1e}")
            if cfg.latent_dim:
                per_dim = [round(k / max(1.0, some), 4) for k in per_dim]
                active = sum(k > 0.01 for k in per_dim)
                record |= dict(kl_weight=kl_weight(step, cfg), kl_nats=kl / max(1.0, some),
                               active_dims=active, kl_per_dim=per_dim)
                shown |= dict(kl=f"{record['kl_nats']:.2f}", active=f"{active}/{cfg.latent_dim}")
                if step >= cfg.kl_ramp and not active and not warned and place.is_main:
                    warned = True
                    tqdm.write(f"warning: posterior collapse at step {step}: no dimension of z "
                               "carries 0.01 nats, so this is MDLM. Try a longer --kl_ramp, a "
                               "lower --lr or a smaller --latent_dim", file=sys.stderr)
            progress.log(record, shown | {"tok/s": f"{rate:,.0f}"}
                         | ({"mfu": f"{use:.0%}"} if use else {}))
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
    report(model, ema, cfg, data, place, step, seconds, info)


def report(model, ema, cfg: Config, data: TextData, place, step: int, seconds: float, info) -> None:
    """Evaluate and sample with the averaged weights; print and write result.json."""
    result = dict(method=name_of(cfg), dataset=cfg.dataset, step=step,
                  train_seconds=round(seconds, 1), config=dataclasses.asdict(cfg), **info)
    with ema.swapped_in():
        result["figures"] = evaluate(model, cfg, data, place)
        if place.is_main and data.unit == "bin":
            result["toy"] = sample_toy(model, cfg, data, place, TOY_STEPS)
        elif place.is_main:
            for row in draw_texts(model, cfg, data, place):
                print(f"\n--- sample\n{row['text']}")
    if not place.is_main:
        return
    print()
    if data.unit in ("char", "byte"):
        unigram, bigram = ngram_entropies(data, cfg.split)
        result["data_entropy_bits"] = dict(unigram=unigram, bigram=bigram)
        print(f"entropy of {data.name}/{cfg.split}: unigram {unigram:.3f}, bigram {bigram:.3f} "
              f"bits/{data.unit}")
    elif data.unit == "bin":
        p = histogram(data.splits[cfg.split])
        result["data_entropy_nats"] = histogram_entropy(p)
        print(f"entropy of {data.name}/{cfg.split}: {result['data_entropy_nats']:.3f} nats")
    for name, f in result["figures"].items():
        note = "" if f["is_bound"] else "  (the paper's figure: no bound)"
        ppl = f"  perplexity {f['perplexity']:.2f}" if "perplexity" in f else ""
        print(f"{name:13s} {f['value']:.4f} ± {f['stderr']:.4f} {f['unit']}{ppl}{note}")
    common.write_json(Path(cfg.out) / "result.json", result)
    print(f"{Path(cfg.out) / 'result.json'}: {step} steps, {seconds / 60:.1f} minutes of training")


# ---------------------------------------------------------------------------------------------
# Modes: sample, eval, bench
# ---------------------------------------------------------------------------------------------


def draw(model: VADD, cfg: Config, L: int, steps: int, place: common.Setup) -> Tensor:
    """cfg.samples sequences of `steps` steps: ids (samples, L) on the CPU."""
    model.eval()
    generator = torch.Generator(place.device).manual_seed(common.mix(cfg.seed, 99))
    batches = []
    bar = tqdm(total=math.ceil(cfg.samples / cfg.sample_batch) * steps, unit="step", desc="sample",
               leave=False, mininterval=0.2 if sys.stderr.isatty() else 10)
    for begin in range(0, cfg.samples, cfg.sample_batch):
        n = min(cfg.sample_batch, cfg.samples - begin)
        x = torch.full((n, L), model.mask_id, device=place.device)
        with place.autocast():
            for x in sample(model, x, steps, temperature=cfg.temperature, top_p=cfg.top_p,
                            generator=generator):
                bar.update()
        batches.append(x.cpu())
    bar.close()
    return torch.cat(batches)


def draw_texts(model: VADD, cfg: Config, data: TextData, place: common.Setup) -> list[dict]:
    """cfg.samples texts with their ids; also written to samples.jsonl in the run folder."""
    ids = draw(model, cfg, data.length, cfg.sample_steps, place).tolist()
    rows = [dict(text=data.decode(row), ids=row) for row in ids]
    with open(Path(cfg.out) / "samples.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def sample_toy(
    model: VADD, cfg: Config, data: TextData, place: common.Setup, steps: tuple[int, ...]
) -> dict[str, dict]:
    """Histograms of cfg.samples points for each number of steps, against the training points.

    Prints the table, writes histograms.npz and samples.png; returns {row: {steps: divergences}}.
    """
    out = Path(cfg.out)
    own = {T: histogram(draw(model, cfg, data.length, T, place).numpy()) for T in steps}
    rows, shown = toy_rows(data, own, name_of(cfg), cfg.samples)
    np.savez_compressed(out / "histograms.npz", **{str(T): p.astype(np.float32)
                                                   for T, p in own.items()})
    save_histograms(out / "samples.png", [shown])
    print(toy_table(rows))
    print(f"{out / 'samples.png'}: data, MDLM at best, {name_of(cfg)}; {steps[0]} step"
          f"{'s' if steps[0] > 1 else ''}")
    return rows


def load_run(cfg: Config, place: common.Setup) -> tuple[VADD, TextData, int]:
    """A trained model with its averaged weights, its data (to sample, the tokenizer), its step."""
    checkpoint = Path(cfg.out) / "checkpoint.pt"
    state = common.read_checkpoint(checkpoint, "vadd", place.device)
    if cfg.mode == "sample" and cfg.dataset not in TOYS:
        data = TextData.from_tokenizer(state["tokenizer"])
    else:
        data = load_dataset(cfg.dataset, cfg.data_dir, cfg.length)
    model = VADD(cfg, data.vocab_size).to(place.device)
    common.load_weights(model, state["ema"]["params"], checkpoint)
    return model, data, state["step"]


def score(out: str, flags: list[str]) -> dict:
    """Figures of a run folder, on the --eval_sequences it was trained with: what eval.py asks for.

    The full split costs K network calls per step of each bound: say --eval_sequences 0 if wanted.
    """
    flags = ["--mode", "eval", "--out", out, *flags]
    cfg, _ = common.parse_config(Config, "vadd", __doc__, PRESETS, flags)
    place = common.setup(cfg)
    model, data, step = load_run(cfg, place)
    return dict(method=name_of(cfg), dataset=cfg.dataset, split=cfg.split, step=step,
                length=data.length, figures=evaluate(model, cfg, data, place))


def bench(cfg: Config, place: common.Setup) -> None:
    """Time training steps of a preset on synthetic tokens, one micro-batch per device and step."""
    V = {"owt": 50257, "lm1b": 30522, "lm1b-padded": 30522, "pycode": 256}.get(
        cfg.dataset, 100 if cfg.dataset in TOYS else 27)
    cfg.micro_batch = min(cfg.micro_batch, cfg.batch_size)
    cfg.batch_size = cfg.micro_batch * place.world
    tokens = np.random.default_rng(0).integers(0, V, (cfg.batch_size * 4, cfg.length))
    data = TextData(cfg.dataset, V, cfg.length, "token", {"train": tokens}, codec=None)
    model, net, optimizer, ema = build(cfg, V, place)
    [index] = common.micro_batches(cfg.batch_size, cfg.micro_batch, place)
    begin = time.time()
    for step in range(cfg.bench_steps + 5):
        if step == 5:
            place.on_cuda and torch.cuda.synchronize()
            warm, begin = time.time() - begin, time.time()
        batch = load_noise(cfg, data, step, index, place)
        train_step(net, model, optimizer, ema, cfg, step, [batch], place)
    place.on_cuda and torch.cuda.synchronize()
    seconds = (time.time() - begin) / cfg.bench_steps
    rate = cfg.batch_size * cfg.length / seconds
    use = common.utilisation(rate * flops_per_token(model, cfg.length), place) \
        if cfg.net == "dit" else None
    memory = torch.cuda.max_memory_allocated() / 2**30 if place.on_cuda else None
    record = dict(
        dataset=cfg.dataset, method=name_of(cfg), batch=cfg.batch_size, length=cfg.length,
        parameters=sum(p.numel() for p in model.parameters()), tokens_per_s=round(rate),
        ms_per_step=round(1000 * seconds, 2), mfu=use and round(use, 4),
        peak_gib=memory and round(memory, 2), warmup_s=round(warm, 1), **common.environment(place))
    place.is_main and print(json.dumps(record))


def main(argv: list[str] | None = None) -> None:
    cfg, _ = common.parse_config(Config, "vadd", __doc__, PRESETS, argv)
    place = common.setup(cfg)
    if cfg.mode == "train":
        train(cfg, place)
    elif cfg.mode == "bench":
        bench(cfg, place)
    else:
        model, data, _ = load_run(cfg, place)
        if cfg.mode == "eval":
            for name, figure in evaluate(model, cfg, data, place).items():
                place.is_main and print(json.dumps({name: figure}))
        elif data.unit == "bin":
            sample_toy(model, cfg, data, place, (cfg.sample_steps,))
        else:
            for row in draw_texts(model, cfg, data, place):
                print(f"--- sample\n{row['text']}\n")


if __name__ == "__main__":
    common.run_main(main)
