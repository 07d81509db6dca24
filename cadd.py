"""CADD: Continuously Augmented Discrete Diffusion, and its baseline MDLM.

    python cadd.py                                      CPU, 3 minutes, nothing to download
    python cadd.py --mode sample --watch                watch the trained model unmask text
    python cadd.py --hint none --out runs/mdlm-pydoc    the same with MDLM
    python cadd.py --dataset text8                      one GPU
    torchrun --nproc_per_node 8 cadd.py --dataset owt   eight GPUs, the paper's main run

Masked diffusion hides tokens and learns to fill them in. CADD gives every hidden position a
hint: the token's own embedding under Gaussian noise that grows with t. Equation numbers are the
paper's ("Continuously Augmented Discrete Diffusion Model for Categorical Generative Modeling").

  forward     q(x_t, z_t | x_0)                   Eq. 9-11    add_noise
  network     f(x_t, z_t) -> logits of x_0        Eq. 13      CADD.features, CADD.logits
  loss        cross-entropy at masked positions   Eq. 20      CADD.forward
  sampler     reveal tokens, denoise hints        Algorithm 2 sample
  likelihood  two bounds, and the paper's figure  Eq. 24      likelihoods

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
from data import TextData, load_dataset, ngram_entropies

# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config(common.RunConfig):
    dataset: str = arg("pydoc", "pydoc, pycode, shakespeare, text8, english27, lm1b, lm1b-padded, "
                       "owt, or a folder of your own", fixed=True)
    length: int = arg(256, "tokens per sequence", 1, 65536, fixed=True)
    # Method
    hint: str = arg("fm", "path of the hints z_t: fm (linear, B.1), vp (Table 9), none = MDLM",
                    choices=("fm", "vp", "none"), fixed=True)
    hint_at: str = arg("all", "where the hint enters: all positions (Algorithm 1), or only masked "
                       "ones (the authors' code; keeps an MDM's inputs for --init_from)",
                       choices=("all", "masked"), fixed=True)
    fuse: str = arg("add", "how w(x_t) and z_t meet (Table 8)",
                    choices=("add", "concat", "reweight"), fixed=True)
    embed_norm: float = arg(0.0, "length of embeddings in units of sqrt(d); 0: learned freely "
                            "(the paper), 1: CDCD's and Plaid's", 0, 100, fixed=True)
    weight: str = arg("elbo", "weight of the loss: elbo = 1/t (Eq. 2), none = Eq. 20 as printed",
                      choices=("elbo", "none"), fixed=True)
    mse: str = arg("none", "extra embedding loss |z0hat - z0|^2 (Table 10)",
                   choices=("none", "soft", "hard"), fixed=True)
    mse_weight: float = arg(1.0, "its weight", 0, 1e6, fixed=True)
    time_cond: bool = arg(False, "condition the network on t (MDLM and the paper's f: no)",
                          fixed=True)
    # Network: the DiT of SEDD and MDLM
    dim: int = arg(768, "width", 8, 65536, fixed=True)
    depth: int = arg(12, "layers", 1, 1000, fixed=True)
    heads: int = arg(12, "attention heads", 1, 1000, fixed=True)
    dropout: float = arg(0.1, "dropout on residual branches", 0, 0.99, fixed=True)
    init_from: str = arg("", "start from the weights of this run folder (fine-tuning, C.1)",
                         fixed=True)
    # Optimisation (B.2 = MDLM's recipe)
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
    sample_steps: int = arg(256, "sampling steps T, one network call each and K of them if K > 1",
                            1, 10**6)
    sample_batch: int = arg(32, "samples drawn at once", 1, 10**6)
    temperature: float = arg(1.0, "of the token draw", 0, 100)
    top_p: float = arg(1.0, "nucleus of the token draw (.9 in the protocol of Fig. 3)", 1e-6, 1)
    z0_hat: str = arg("soft", "estimate of z_0 (Eq. 21): soft keeps the distribution, hard (the "
                      "paper's main runs) seeks its modes", choices=("soft", "hard"))
    z_update: str = arg("posterior", "of hints that stay masked: posterior (Eq. 17), ddim (no "
                        "noise), fresh (new noise; the model that nll_prior scores)",
                        choices=("posterior", "ddim", "fresh"))
    K: int = arg(1, "latent chains whose predictions are averaged (Eq. 5)", 1, 1000)
    prompt: str = arg("", "fill in the gaps of this text, a _ for each token to be found")
    watch: bool = arg(False, "show the unmasking in the terminal")
    # Evaluation
    split: str = arg("valid", "split to evaluate", choices=("train", "valid", "test"))
    eval_draws: int = arg(4, "draws of (t, x_t, z_t) per sequence", 1, 10**6)
    eval_sequences: int = arg(0, "sequences to evaluate; 0: the whole split", 0, 10**9)
    bench_steps: int = arg(20, "timed steps of --mode bench", 1, 10**6)


_LM = dict(batch_size=512, micro_batch=512, length=128, steps=1_000_000)
PRESETS: dict[str, dict] = {
    # two CPU cores, under three minutes; short embeddings keep the hints hard (see README)
    "pydoc": dict(length=64, dim=96, depth=3, heads=3, dropout=0.0, batch_size=32, micro_batch=32,
                  steps=2000, lr=3e-3, warmup=100, lr_schedule="cosine", beta2=0.99, ema=0.99,
                  embed_norm=0.1, temperature=0.7, sample_steps=64, log_every=20, save_every=200,
                  eval_draws=8),
    "pycode": dict(length=256, dim=384, depth=6, heads=6, batch_size=64, steps=20_000, lr=1e-3,
                   warmup=500, save_every=1000),
    # nanoGPT's character benchmark, its width and depth
    "shakespeare": dict(length=256, dim=384, depth=6, heads=6, dropout=0.2, batch_size=64,
                        steps=5000, lr=1e-3, warmup=100, lr_schedule="cosine", beta2=0.99,
                        ema=0.999, save_every=500),
    "text8": dict(length=256, micro_batch=256),  # Table 5; MD4's and SEDD's protocol: 1M x 512
    # our public benchmark: ten minutes on one H200 (410M characters), hints of norm 2.8
    "english27": dict(length=256, batch_size=256, micro_batch=256, steps=6250, lr=6e-4,
                      lr_schedule="cosine", warmup=300, beta2=0.99, dropout=0.0, ema=0.999,
                      embed_norm=0.1, log_every=100, sample_batch=256),
    "lm1b": _LM,         # packed sentences: Table 6, MDLM 31.8
    "lm1b-padded": _LM,  # padded sentences: MDLM 27.0; the two never share a table
    "owt": dict(length=1024, sample_steps=1024, eval_draws=1, sample_batch=16),  # Fig. 3
    "path": dict(length=256, dim=384, depth=6, heads=6, batch_size=64, steps=20_000, lr=1e-3,
                 warmup=500),
}

# ---------------------------------------------------------------------------------------------
# Forward process
# ---------------------------------------------------------------------------------------------


def path(t: Tensor, hint: str) -> tuple[Tensor, Tensor]:
    """(a_t, sigma_t) of the hints z_t = a_t z_0 + sigma_t eps; t and results of one shape."""
    if hint == "vp":  # cosine: a^2 + sigma^2 = 1 (Eq. 3 with gamma-bar = cos^2)
        return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    return 1 - t, t  # flow matching (B.1)


def path_kl_rate(t: Tensor, hint: str) -> Tensor:
    """r(t) such that the hints' part of the bound is E_t of r(t) |z_0 - z0hat|^2 per masked token.

    One step's KL (Eq. 19) is 1/2 (SNR_s - SNR_t) |z_0 - z0hat|^2 with SNR = a^2 / sigma^2: insert
    the general posterior's coefficient a_s var_ts / sigma_t^2 and its variance. It counts where
    the position stays masked, rho_keep = s/t -> 1 (Eq. 18). So r = -SNR'(t) / 2:
    FM: SNR = (1-t)^2/t^2, r = (1-t)/t^3.  VP: SNR = cot^2(pi t/2), r = pi/2 cos/sin^3.
    """
    if hint == "vp":
        return math.pi / 2 * torch.cos(math.pi / 2 * t) / torch.sin(math.pi / 2 * t) ** 3
    return (1 - t) / t**3


def add_noise(
    x0: Tensor, t: Tensor, u: Tensor, mask_id: int
) -> tuple[Tensor, Tensor]:
    """q(x_t | x_0), Eq. 10: hide each token with probability 1 - alpha_t = t.

    x0 (B, L), t (B,), u (B, L) uniform noise -> x_t (B, L), masked (B, L).
    """
    masked = u < t[:, None]
    return torch.where(masked, mask_id, x0), masked


def add_noise_to_hints(z0: Tensor, masked: Tensor, t: Tensor, eps: Tensor, hint: str) -> Tensor:
    """q(z_t | x_t, x_0), Eq. 11: exact at visible positions, Gaussian at masked ones.

    z0 = w(x_0) (B, L, d), masked (B, L), t (B,), eps (B, L, d) normal noise -> z_t (B, L, d).
    """
    a, sigma = (c[:, None, None] for c in path(t, hint))
    return torch.where(masked[..., None], a * z0 + sigma * eps, z0)


# ---------------------------------------------------------------------------------------------
# Model and loss
# ---------------------------------------------------------------------------------------------


class CADD(nn.Module):
    """f(x_t, z_t) -> logits of x_0 (Eq. 13), and the training loss as its forward."""

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        if cfg.dim % cfg.heads or (cfg.dim // cfg.heads) % 2:
            raise RunError(f"--dim {cfg.dim} must be an even multiple of --heads {cfg.heads}")
        self.cfg, self.V, self.mask_id = cfg, vocab_size, vocab_size
        self.net = common.DiT(vocab_size + 1, cfg.dim, cfg.depth, cfg.heads,
                              dropout=cfg.dropout, length=cfg.length)
        # One class too many, as in the published models: [MASK] is never the answer, and the
        # methods below read the first V rows only.
        self.head = nn.Linear(cfg.dim, vocab_size + 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if cfg.fuse == "concat" and cfg.hint != "none":
            self.fuse = nn.Linear(2 * cfg.dim, cfg.dim)

    def table(self) -> Tensor:
        """The embedding matrix w (V + 1, d), its last row for [MASK].

        Its scale decides what a hint tells. The noise has unit variance in each direction: rows
        of norm 0.6 (the start) hide the token until t is near 0, long rows give it away at once.
        """
        w = self.net.embed.weight
        if self.cfg.embed_norm > 0:
            w = F.normalize(w.float(), dim=-1) * (self.cfg.embed_norm * self.cfg.dim**0.5)
        return w

    def w(self, x: Tensor) -> Tensor:
        """Embeddings (..., d) of token ids (...)."""
        return F.embedding(x, self.table())

    def features(self, x_t: Tensor, z_t: Tensor | None, masked: Tensor, t: Tensor) -> Tensor:
        """Fuse tokens and hints and run the network: (B, L), (B, L, d) -> (B, L, d).

        z_t must be w(x_t) at visible positions, as Eq. 11 has it.
        """
        cfg = self.cfg
        if cfg.hint == "none":
            h = self.w(x_t)
        else:
            # w(x_t) is in z_t already: one look-up, and one gradient of it, instead of two.
            h = torch.where(masked[..., None], self.table()[self.mask_id], z_t)
            if cfg.hint_at == "masked":
                z_t = z_t * masked[..., None]
            if cfg.fuse == "add":  # Algorithm 1, line 9
                h = h + z_t
            elif cfg.fuse == "concat":
                h = self.fuse(torch.cat([h, z_t], -1)).float()
            else:
                # Paper (C.3): "alpha_t z_disc + (1 - alpha_t) z_t, where alpha_t decreases as the
                # position is more likely to be clean" and "when a token is unlikely to be masked,
                # lean more on z_t". Both sentences reverse its own alpha_t (Eq. 1), the share of
                # visible tokens, which *grows* towards clean. We take the formula with Eq. 1's
                # alpha_t: tokens carry clean input, hints carry noisy input.
                alpha = 1 - t[:, None, None]
                h = alpha * h + (1 - alpha) * z_t
        return self.net(h, t if cfg.time_cond else torch.zeros_like(t[:1]))

    def logits(self, h: Tensor) -> Tensor:
        """Features (..., d) -> float32 logits (..., V) of the data symbols."""
        return F.linear(h, self.head.weight[: self.V], self.head.bias[: self.V]).float()

    def z0_soft(self, logits: Tensor) -> Tensor:
        """sum_v p(v) w(v), Eq. 21: (..., V) -> (..., d)."""
        return logits.softmax(-1) @ self.table()[: self.V].float()

    def forward(
        self, x0: Tensor, t: Tensor, u: Tensor, eps: Tensor | None, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss of Algorithm 1, summed over the batch, in nats (divide by the valid tokens).

        x0 (B, L), t (B,), u (B, L), eps (B, L, d) or None without hints, valid (B, L) bool.
        Returns the sum over masked valid positions of -log p(x_0 | x_t, z_t) / t, plus the MSE
        if asked; and (4, 10) statistics by tenth of t: cross-entropy, masked tokens, the bound's
        integrand, MSE.
        """
        cfg, (B, L) = self.cfg, x0.shape
        with_mse = cfg.mse != "none" and cfg.hint != "none"
        x_t, masked = add_noise(x0, t, u, self.mask_id)
        z0 = self.w(x0) if cfg.hint != "none" else None
        z_t = add_noise_to_hints(z0, masked, t, eps, cfg.hint) if cfg.hint != "none" else None
        h = self.features(x_t, z_t, masked, t)

        # The vocabulary head is a third of the FLOPs: only masked positions need it.
        index, live = common.masked_positions(masked & valid, common.mask_capacity(B, L))
        h = h.flatten(0, 1).index_select(0, index)                    # (M, d)
        target = x0.flatten()[index]                                  # (M,)
        t_i = t.repeat_interleave(L)[index]                           # (M,)
        # Table 10's target; gathered here, so that z_0 need not outlive the network
        z0_target = z0.detach().flatten(0, 1)[index] if with_mse else None
        # Eq. 20 as printed has no 1/t; with -alpha'_t / (1 - alpha_t) = 1/t it is the bound Eq. 2.
        scale = live / t_i if cfg.weight == "elbo" else live.float()
        loss, nll = common.linear_cross_entropy(
            h, self.head.weight[: self.V], self.head.bias[: self.V], target, scale,
            compiled=cfg.compile and h.is_cuda)

        sq = torch.zeros_like(nll)
        if with_mse:
            logits = self.logits(h)
            z0_hat = self.z0_soft(logits) if cfg.mse == "soft" else self.w(logits.argmax(-1))
            sq = (z0_hat - z0_target).square().sum(-1)
            loss = loss + cfg.mse_weight * (sq * live).sum()
        rows = torch.stack([nll, torch.ones_like(nll), nll / t_i, sq.detach()]) * live
        tenth = (10 * t_i).long().clamp_max(9)
        return loss, torch.zeros(4, 10, device=t.device).index_add(1, tenth, rows)

    @torch.no_grad()
    def hint_accuracy(self, x0: Tensor, t: Tensor, u: Tensor, eps: Tensor) -> list[float | None]:
        """How often the nearest embedding to z_t is the token, at masked positions, by tenth of t.

        This is what the hint gives away by itself (Difformer's DGS_t). Where it is 1 the network
        need not learn from context; where it is 1/V the hint is useless.
        """
        z0, masked = self.w(x0).float(), u < t[:, None]
        a, _ = path(t, self.cfg.hint)
        z_t = add_noise_to_hints(z0, masked, t, eps, self.cfg.hint)[masked]       # (M, d)
        a = a[:, None].expand_as(x0)[masked][:, None]                             # (M, 1)
        table = self.table()[: self.V].float()
        # argmin_v |z_t - a w_v|^2
        nearest = (z_t @ table.T - 0.5 * a * table.square().sum(-1)).argmax(-1)
        hit = (nearest == x0[masked]).float()
        tenth = (10 * t).long().clamp_max(9)[:, None].expand_as(x0)[masked]
        hits = torch.zeros(2, 10, device=t.device).index_add(
            1, tenth, torch.stack([hit, torch.ones_like(hit)]))
        return [round(h / n, 4) if n else None for h, n in hits.T.tolist()]


# ---------------------------------------------------------------------------------------------
# Sampler
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: CADD, x: Tensor, steps: int, *, temperature: float = 1.0, top_p: float = 1.0,
    z0_hat: str = "soft", z_update: str = "posterior", K: int = 1,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Algorithm 2: yields x_t (B, L) after each step; the last one has no [MASK].

    x (B, L): mask_id where a token is to be found, anything else is kept. `steps` times K network
    calls. Draws in float64. See Config for the options.
    """
    def normal(shape):
        return torch.randn(shape, device=x.device, generator=generator)

    def uniform(shape):
        return torch.rand(shape, device=x.device, generator=generator, dtype=torch.float64)

    hints = model.cfg.hint != "none"
    B, L = x.shape
    table = model.table().float()
    # p(z_T | x_T) = N(0, I) at masked positions; w(x) at given ones
    z = [torch.where((x == model.mask_id)[..., None], normal((B, L, table.shape[1])), table[x])
         for _ in range(K if hints else 1)] if hints else [None]
    clock = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=x.device)
    for t, s in zip(clock[:-1], clock[1:]):
        masked = x == model.mask_id
        if not masked.any():
            yield x
            continue
        t_b = t.float().expand(B)
        logits = [model.logits(model.features(x, z_k, masked, t_b)[masked]) for z_k in z]  # (M, V)
        log_pi = torch.stack([l.double().log_softmax(-1) for l in logits])
        log_pi = log_pi.logsumexp(0) - math.log(len(z))                    # Eq. 5, averaged
        # rho_flip = (alpha_s - alpha_t) / (1 - alpha_t) = (t - s) / t, Eq. 38; first whether, then
        # what. Paper: the text under Algorithm 2 prints rho_keep as the unmask probability.
        reveal = uniform((B, L))[masked] < (t - s) / t
        token = common.sample_categorical(log_pi, temperature, top_p, uniform(reveal.shape))
        x = x.masked_scatter(masked, torch.where(reveal, token, model.mask_id))
        if hints and s > 0:
            a_t, sigma_t, a_s, sigma_s = *path(t, model.cfg.hint), *path(s, model.cfg.hint)
            for k in range(len(z)):
                z_t = z[k][masked].double()                                # (M, d)
                if z0_hat == "hard":
                    z0 = table[log_pi.argmax(-1)].double()                 # Eq. 21, left
                else:
                    z0 = model.z0_soft(logits[k]).double()                 # Eq. 21, right
                noise = normal(z_t.shape)
                if z_update == "posterior":                                # Eq. 16-17
                    mean, var = common.gaussian_posterior(z_t, z0, a_t, sigma_t, a_s, sigma_s)
                    z_s = mean + var.sqrt() * noise
                elif z_update == "ddim":                                   # same eps, no new noise
                    z_s = common.ddim(z_t, z0, a_t, sigma_t, a_s, sigma_s)
                else:
                    z_s = noise
                z_s = torch.where(reveal[:, None], table[token], z_s.float())
                z[k] = z[k].masked_scatter(masked[..., None], z_s)
        yield x


# ---------------------------------------------------------------------------------------------
# Likelihood
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def likelihoods(
    model: CADD, batches: Iterator[Tensor], draws: int, seed: int, pad_id: int | None = None,
    K: int = 1, t_min: float | None = None, autocast=contextlib.nullcontext,
) -> dict[str, Tensor]:
    """One estimate per sequence and draw of each figure, in nats per valid token.

    nll_prior     MDM bound with z_t ~ N(0, I) drawn afresh: E_t E_x_t [1/t sum -log E_z p]. The
                  hints carry nothing about x_0, so this bounds -log p(x_0) of the model that
                  samples with fresh noise (z_update=fresh). K > 1 averages p over K draws of z.
                  Training never shows such z_t at t < 1, so a denoiser that relies on its hints,
                  as the exact one does, has a bad nll_prior.
    nll_joint     the ELBO of Eq. 24 in continuous time: discrete part plus path_kl_rate times
                  |z_0 - z0hat|^2 per masked token: bounds -log p(x_0) of the paper's sampler.
    nll_discrete  the paper's Tables 5-7: the discrete part alone with z_t ~ q(z_t | x_0). The
                  hint leaks the answer, nobody pays for it: no bound on -log p(x_0).

    The chain ends at t_min, 1e-5 or with hints 1e-3, where what is still hidden is revealed at
    once. That is what clamped times estimate: 1/t_min times their share t_min; no hint moves any
    more there. Below, the hints' rate t^-3 would charge for the least doubt of the softmax without
    limit.

    Without hints the three are one, reported as nll_prior. Each tensor is (n,) float64, n =
    sequences x draws; batches are (B, L). Times are low-discrepancy across the batch and across
    a sequence's draws, so the naive standard error is on the safe side.
    """
    hint = model.cfg.hint
    t_min = t_min or (1e-5 if hint == "none" else 1e-3)
    names = ["nll_prior"] + (["nll_joint", "nll_discrete"] if hint != "none" else [])
    figures: dict[str, list[Tensor]] = {name: [] for name in names}
    for number, x0 in enumerate(batches):
        B, L = x0.shape
        generator = torch.Generator(x0.device).manual_seed(common.mix(seed, 77, number))
        shift = torch.rand((), generator=generator, device=x0.device, dtype=torch.float64)
        place = torch.randperm(B, generator=generator, device=x0.device)
        valid = x0 != pad_id if pad_id is not None else torch.ones_like(x0, dtype=torch.bool)
        for draw in range(draws):
            t = common.low_discrepancy_t(draw * B + place, B * draws, shift, t_min)
            u = torch.rand(x0.shape, generator=generator, device=x0.device)
            x_t, masked = add_noise(x0, t, u, model.mask_id)
            scored = masked & valid
            row = torch.arange(B, device=x0.device)[:, None].expand_as(x0)[scored]

            def per_sequence(value: Tensor) -> Tensor:  # (M,) -> (B,), per valid token
                out = torch.zeros(B, device=x0.device, dtype=torch.float64)
                return out.index_add(0, row, value.double()) / valid.sum(1)

            def predict(z_t: Tensor | None) -> tuple[Tensor, Tensor]:
                with autocast():
                    logits = model.logits(model.features(x_t, z_t, masked, t)[scored])
                nll = F.cross_entropy(logits.double(), x0[scored], reduction="none")
                return logits, nll

            if hint == "none":
                figures["nll_prior"].append(per_sequence(predict(None)[1]) / t)
                continue
            z0 = model.w(x0).float()
            log_p = []
            for _ in range(K):
                eps = torch.randn(z0.shape, generator=generator, device=x0.device)
                fresh = torch.where(masked[..., None], eps, z0)
                log_p.append(-predict(fresh)[1])
            log_p = torch.stack(log_p).logsumexp(0) - math.log(K)
            figures["nll_prior"].append(per_sequence(-log_p) / t)

            eps = torch.randn(z0.shape, generator=generator, device=x0.device)
            logits, nll = predict(add_noise_to_hints(z0, masked, t, eps, hint))
            discrete = per_sequence(nll) / t
            sq = (z0[scored] - model.z0_soft(logits)).double().square().sum(-1)
            figures["nll_discrete"].append(discrete)
            figures["nll_joint"].append(
                discrete + per_sequence(sq) * path_kl_rate(t.double(), hint) * (t > t_min))
    return {name: torch.cat(values) for name, values in figures.items()}


def evaluate(model: CADD, cfg: Config, data: TextData, place: common.Setup) -> dict[str, dict]:
    """Figures of `likelihoods` over cfg.split, in bits per character (byte) or nats per token."""
    limit = cfg.eval_sequences or None
    batch = max(1, min(cfg.micro_batch, 16384 // data.length or 1))

    def batches() -> Iterator[Tensor]:
        total = math.ceil(min(limit or 10**12, data.num_sequences(cfg.split)) / batch / place.world)
        rows = data.eval_batches(cfg.split, batch, limit, place.rank, place.world)
        for x0 in tqdm(rows, f"evaluate {cfg.split}", total, disable=not place.is_main, leave=False,
                       mininterval=0.2 if sys.stderr.isatty() else 10):
            yield torch.from_numpy(x0).to(place.device)

    model.eval()
    seed = common.mix(cfg.seed, place.rank)
    values = likelihoods(model, batches(), cfg.eval_draws, seed, data.pad_id, cfg.K,
                         autocast=place.autocast)
    model.train()
    in_bits = data.unit in ("char", "byte")
    scale = 1 / math.log(2) if in_bits else 1.0
    figures = {}
    for name, v in values.items():
        v = v * scale
        n, total, square = place.sum(torch.stack([torch.ones_like(v), v, v**2]).sum(1)).tolist()
        figures[name] = dict(
            value=total / n, stderr=math.sqrt(max(0.0, square / n - (total / n) ** 2) / n),
            unit=f"bits/{data.unit}" if in_bits else "nats/token", draws=int(n),
            split=cfg.split, is_bound=name != "nll_discrete")
        if not in_bits:
            figures[name]["perplexity"] = math.exp(total / n)
    return figures


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def load_noise(cfg: Config, data: TextData, step: int, index: Tensor, place: common.Setup):
    """Everything random about the samples `index` of a step: (x0, t, u, eps, valid)."""
    x0 = torch.from_numpy(data.train_batch(cfg.seed, step, cfg.batch_size, index.numpy()))
    if place.on_cuda:
        x0 = x0.pin_memory()
    x0 = x0.to(place.device, non_blocking=True)
    shift = np.random.default_rng(common.mix(cfg.seed, step, 1)).random()
    rows = index.to(place.device, non_blocking=True)
    t = common.low_discrepancy_t(rows, cfg.batch_size, shift, t_min=1e-3)
    # u is small: every rank draws the global batch's and takes its rows; eps is not.
    generator = torch.Generator(place.device).manual_seed(common.mix(cfg.seed, step))
    u = torch.rand(cfg.batch_size, data.length, generator=generator, device=place.device)[rows]
    eps = None
    if cfg.hint != "none":
        shape = (data.length, cfg.dim)
        eps = common.sample_normal(cfg.seed, step, index, shape, place.device)
    valid = x0 != data.pad_id if data.pad_id is not None else torch.ones_like(x0, dtype=torch.bool)
    return x0, t, u, eps, valid


def train_step(net, model: CADD, optimizer, ema, cfg: Config, step: int, batches, place) -> Tensor:
    """One optimizer step on this rank's micro-batches; returns (5, 10) statistics, no host sync."""
    for group in optimizer.param_groups:
        group["lr"] = common.learning_rate(step, cfg.lr, cfg.warmup, cfg.lr_schedule, cfg.steps)
    # Divide by the valid tokens of the global batch; DDP averages gradients, hence `world`.
    tokens = place.sum(torch.stack([valid.sum() for *_, valid in batches]).sum())
    stats = torch.zeros(4, 10, device=place.device)
    for k, batch in enumerate(batches):
        last = k == len(batches) - 1
        with contextlib.nullcontext() if last or place.world == 1 else net.no_sync():
            with place.autocast():
                loss, part = net(*batch)
            (loss * place.world / tokens).backward()
        stats += part
    nn.utils.clip_grad_norm_(model.parameters(), cfg.clip, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ema.update()
    return torch.cat([stats, (tokens / place.world).expand(1, 10)])


def build(cfg: Config, vocab_size: int, place: common.Setup):
    """Model, what to call in training (compiled, DDP), optimizer and EMA."""
    model = CADD(cfg, vocab_size).to(place.device)
    if cfg.init_from:
        source = Path(cfg.init_from) / "checkpoint.pt"
        weights = common.read_checkpoint(source, "cadd", place.device)["ema"]["params"]
        own = {k: v for k, v in model.state_dict().items() if k.startswith("fuse.")}
        common.load_weights(model, {**own, **weights}, source)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, betas=(0.9, cfg.beta2), eps=1e-8,
                                  weight_decay=cfg.weight_decay, fused=True)
    net = torch.compile(model, dynamic=False) if cfg.compile and place.on_cuda else model
    if place.world > 1:
        devices = [place.device.index] if place.on_cuda else None
        net = DistributedDataParallel(net, device_ids=devices, gradient_as_bucket_view=True)
    return model, net, optimizer, common.EMA(model, cfg.ema)


def name_of(cfg: Config) -> str:
    return "mdlm" if cfg.hint == "none" else "cadd"


def flops_per_token(model: CADD, L: int) -> float:
    """Model FLOPs of training per token: the head sees half of the positions (E_t t = 1/2)."""
    return model.net.flops_per_token(L) + 0.5 * 6 * model.head.weight.numel()


def train(cfg: Config, place: common.Setup) -> None:
    out, checkpoint = Path(cfg.out), Path(cfg.out) / "checkpoint.pt"
    data = load_dataset(cfg.dataset, cfg.data_dir, cfg.length)
    model, net, optimizer, ema = build(cfg, data.vocab_size, place)
    parts = common.micro_batches(cfg.batch_size, cfg.micro_batch, place)
    step, seconds, resumed = 0, 0.0, checkpoint.exists() and not cfg.overwrite
    if resumed:
        state = common.read_checkpoint(checkpoint, "cadd", place.device)
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
            f"another --out; to sample: python cadd.py --mode sample --out {out}")
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
    start = dict(method="cadd", argv=sys.argv[1:], config=dataclasses.asdict(cfg),
                 parameters=parameters, **info)
    progress = common.Progress(out, place, start, step, cfg.steps, keep=resumed)
    stop = common.StopRequest()

    def save() -> None:
        rng = common.rng_states(place)
        if place.is_main:
            common.write_checkpoint(checkpoint, dict(
                method="cadd", config=dataclasses.asdict(cfg), model=model.state_dict(),
                ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step,
                seconds=seconds, rng=rng, tokenizer=data.tokenizer()))

    stats, logged, clock, first = torch.zeros(5, 10, device=place.device), step, time.time(), True
    finished = False
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
            ce, masked, bound, sq, tokens = total.sum(1).tolist()
            tokens = total[4, 0].item()
            if not math.isfinite(bound):
                progress.close()
                raise RunError(
                    f"the loss is {bound} between steps {logged} and {step}. "
                    + (f"{checkpoint} still holds an earlier, good state: " if checkpoint.exists()
                       else "Nothing was saved yet: ") + "try a lower --lr or --clip")
            now = time.time()
            rate = (step - mark[0]) * cfg.batch_size * data.length / max(1e-9, now - mark[1])
            use = common.utilisation(rate * flops_per_token(model, data.length), place)
            record = dict(
                step=step, bound_nats=bound / tokens, bound_bits=bound / tokens / math.log(2),
                ce_masked_nats=ce / masked, lr=optimizer.param_groups[0]["lr"],
                tokens_per_s=round(rate), mfu=use and round(use, 4),
                seconds=round(seconds + now - clock, 2),
                ce_by_t=[round(c / m, 4) if m else None for c, m in total[:2].T.tolist()])
            if cfg.mse != "none":
                record["mse"] = sq / masked
            if cfg.hint != "none" and place.is_main:
                x0, t, u, eps, _ = batches[0]
                record["hint_accuracy_by_t"] = model.hint_accuracy(x0, t, u, eps)
                norms = model.table()[: model.V].float().norm(dim=-1)
                record["embedding_norm"] = round(norms.mean().item(), 3)
            progress.log(record, dict(
                loss=f"{record['bound_nats']:.3f}", lr=f"{record['lr']:.1e}",
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
    report(model, ema, cfg, data, place, step, seconds, info)


def report(model, ema, cfg: Config, data: TextData, place, step: int, seconds: float, info) -> None:
    """Evaluate and sample with the averaged weights; print and write result.json."""
    with ema.swapped_in():
        figures = evaluate(model, cfg, data, place)
        texts = draw_samples(model, cfg, data, place) if place.is_main else []
    if not place.is_main:
        return
    for row in texts:
        print(f"\n--- sample\n{row['text']}")
    print()
    result = dict(method=name_of(cfg), dataset=cfg.dataset, step=step,
                  train_seconds=round(seconds, 1), figures=figures,
                  config=dataclasses.asdict(cfg), **info)
    if data.unit in ("char", "byte"):
        unigram, bigram = ngram_entropies(data, cfg.split)
        result["data_entropy_bits"] = dict(unigram=unigram, bigram=bigram)
        print(f"entropy of {data.name}/{cfg.split}: unigram {unigram:.3f}, bigram {bigram:.3f} "
              f"bits/{data.unit}")
    for name, f in figures.items():
        note = "" if f["is_bound"] else "  (the paper's figure; the hint leaks x_0: no bound)"
        ppl = f"  perplexity {f['perplexity']:.2f}" if "perplexity" in f else ""
        print(f"{name:13s} {f['value']:.4f} ± {f['stderr']:.4f} {f['unit']}{ppl}{note}")
    common.write_json(Path(cfg.out) / "result.json", result)
    print(f"{Path(cfg.out) / 'result.json'}: {step} steps, {seconds / 60:.1f} minutes of training")


# ---------------------------------------------------------------------------------------------
# Modes: sample, eval, bench
# ---------------------------------------------------------------------------------------------


def encode_prompt(prompt: str, data: TextData) -> Tensor:
    """Text with a _ for each token to be found -> ids (L,), mask_id in the gaps."""
    ids: list[int] = [] if data.bos_id is None else [data.bos_id]
    for i, part in enumerate(prompt.split("_")):
        ids += ([data.mask_id] if i else []) + (data.encode(part).tolist() if part else [])
    if data.mask_id not in ids:
        raise RunError('--prompt has no gap: write a _ for each token to be found')
    return torch.tensor(ids)


def draw_samples(model: CADD, cfg: Config, data: TextData, place: common.Setup) -> list[dict]:
    """cfg.samples texts with their ids; also written to samples.jsonl in the run folder."""
    model.eval()
    generator = torch.Generator(place.device).manual_seed(common.mix(cfg.seed, 99))
    if cfg.prompt:
        x = encode_prompt(cfg.prompt, data).to(place.device)
    else:
        x = torch.full((data.length,), data.mask_id, device=place.device)
    rows: list[dict] = []
    bar = tqdm(total=math.ceil(cfg.samples / cfg.sample_batch) * cfg.sample_steps, unit="step",
               desc="sample", leave=False, disable=cfg.watch,
               mininterval=0.2 if sys.stderr.isatty() else 10)
    for begin in range(0, cfg.samples, cfg.sample_batch):
        n = min(cfg.sample_batch, cfg.samples - begin)
        cfg.watch and show(x, data)
        with place.autocast():
            for x_t in sample(model, x.expand(n, -1), cfg.sample_steps, temperature=cfg.temperature,
                              top_p=cfg.top_p, z0_hat=cfg.z0_hat, z_update=cfg.z_update, K=cfg.K,
                              generator=generator):
                bar.update()
                if cfg.watch:
                    show(x_t[0], data)
        rows += [dict(text=data.decode(ids), ids=ids) for ids in x_t.tolist()]
    bar.close()
    with open(Path(cfg.out) / "samples.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def show(x: Tensor, data: TextData) -> None:
    """Redraw one sequence in place, a dot for each [MASK]."""
    text = "".join("·" if i == data.mask_id else data.decode([i]) for i in x.tolist())
    print("\x1b[2J\x1b[H" + text, flush=True)
    time.sleep(0.03)


def load_run(cfg: Config, place: common.Setup) -> tuple[CADD, TextData, int]:
    """A trained model with its averaged weights, its data (to sample, the tokenizer), its step."""
    checkpoint = Path(cfg.out) / "checkpoint.pt"
    state = common.read_checkpoint(checkpoint, "cadd", place.device)
    if cfg.mode == "sample":
        data = TextData.from_tokenizer(state["tokenizer"])
    else:
        data = load_dataset(cfg.dataset, cfg.data_dir, cfg.length)
    model = CADD(cfg, data.vocab_size).to(place.device)
    common.load_weights(model, state["ema"]["params"], checkpoint)
    return model, data, state["step"]


def score(out: str, flags: list[str]) -> dict:
    """Figures of a run folder on the full split: what eval.py asks for."""
    flags = ["--mode", "eval", "--out", out, "--eval_sequences", "0", *flags]
    cfg, _ = common.parse_config(Config, "cadd", __doc__, PRESETS, flags)
    place = common.setup(cfg)
    model, data, step = load_run(cfg, place)
    return dict(method=name_of(cfg), dataset=cfg.dataset, split=cfg.split, step=step,
                length=data.length, figures=evaluate(model, cfg, data, place))


PROBE_SEQUENCES = 64  # the network's; 10,000 for the embeddings' variance, which costs nothing


@torch.no_grad()
def probe(out: str, flags: list[str]) -> dict:
    """What `eval.py collapse` asks: how the embeddings of a run lie, and what is left to predict.

    embeddings (V, d) of the averaged weights as they enter the diffusion; at times (n,) the mean
    cross_entropy (n,) in nats at the masked positions, given x_t and z_t (visible tokens cost
    nothing), with the same noise at all times; signal (n,) and sigma (n,) of z_t = signal z_0 +
    sigma eps; tokens (10,000 or fewer, L) of the split.
    """
    flags = ["--mode", "eval", "--out", out, *flags]
    cfg, _ = common.parse_config(Config, "cadd", __doc__, PRESETS, flags)
    place = common.setup(cfg)
    model, data, _ = load_run(cfg, place)
    if cfg.hint == "none":
        raise RunError(f"{out} is an MDLM: it has no embeddings that are diffused")
    model.eval()
    batch = max(1, min(cfg.micro_batch, 16384 // data.length))
    nll, count = (np.zeros(len(common.PROBE_TIMES)) for _ in range(2))
    for number, rows in enumerate(data.eval_batches(cfg.split, batch, PROBE_SEQUENCES)):
        x0 = torch.from_numpy(rows).to(place.device)
        generator = torch.Generator(place.device).manual_seed(common.mix(cfg.seed, 78, number))
        u = torch.rand(x0.shape, generator=generator, device=place.device)
        z0 = model.w(x0).float()
        eps = torch.randn(z0.shape, generator=generator, device=place.device)
        for k, time_k in enumerate(common.PROBE_TIMES):
            t = torch.full((len(x0),), time_k, device=place.device)
            x_t, masked = add_noise(x0, t, u, model.mask_id)
            scored = masked & (x0 != data.pad_id) if data.pad_id is not None else masked
            z_t = add_noise_to_hints(z0, masked, t, eps, cfg.hint)
            with place.autocast():
                logits = model.logits(model.features(x_t, z_t, masked, t)[scored])
            nll[k] += F.cross_entropy(logits.double(), x0[scored], reduction="sum").item()
            count[k] += scored.sum().item()
    signal, sigma = path(torch.from_numpy(common.PROBE_TIMES), cfg.hint)
    tokens = np.concatenate(list(data.eval_batches(cfg.split, 1000, 10_000)))
    return dict(name=name_of(cfg), method="cadd", times=common.PROBE_TIMES,
                cross_entropy=nll / count, signal=signal, sigma=sigma, tokens=tokens,
                embeddings=model.table()[: model.V].detach().float().cpu())


def bench(cfg: Config, place: common.Setup) -> None:
    """Time training steps of a preset on synthetic tokens, one micro-batch per device and step."""
    V = {"owt": 50257, "lm1b": 30522, "lm1b-padded": 30522, "pycode": 256}.get(cfg.dataset, 27)
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
    use = common.utilisation(rate * flops_per_token(model, cfg.length), place)
    memory = torch.cuda.max_memory_allocated() / 2**30 if place.on_cuda else None
    record = dict(
        dataset=cfg.dataset, hint=cfg.hint, batch=cfg.batch_size, length=cfg.length,
        parameters=sum(p.numel() for p in model.parameters()), tokens_per_s=round(rate),
        ms_per_step=round(1000 * seconds, 2), mfu=use and round(use, 4),
        peak_gib=memory and round(memory, 2), warmup_s=round(warm, 1), **common.environment(place))
    place.is_main and print(json.dumps(record))


def main(argv: list[str] | None = None) -> None:
    cfg, _ = common.parse_config(Config, "cadd", __doc__, PRESETS, argv)
    place = common.setup(cfg)
    if cfg.mode == "train":
        train(cfg, place)
    elif cfg.mode == "bench":
        bench(cfg, place)
    else:
        model, data, _ = load_run(cfg, place)
        if cfg.mode == "sample":
            for row in draw_samples(model, cfg, data, place):
                print(f"--- sample\n{row['text']}\n")
        else:
            for name, figure in evaluate(model, cfg, data, place).items():
                place.is_main and print(json.dumps({name: figure}))


if __name__ == "__main__":
    common.run_main(main)
