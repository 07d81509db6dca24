"""CADD: Continuously Augmented Discrete Diffusion, and its baseline MDLM.

    python cadd.py                                      CPU, 3 minutes, nothing to download
    python cadd.py --mode sample --watch                watch the trained model unmask text
    python cadd.py --hint none --out runs/mdlm-pydoc    the same with MDLM
    python cadd.py --dataset text8                      one GPU
    torchrun --nproc_per_node 8 cadd.py --dataset owt   eight GPUs; the paper's main run: --paper
    torchrun --nproc_per_node 8 cadd.py --backbone Qwen2.5-Coder-7B --dataset CODE --fsdp
    python cadd.py --mode sample --out runs/cadd-CODE --prompts HumanEval.jsonl      Table 3
    python cadd.py --dataset glyph-pixels               images, CPU, 4 minutes; also a folder of own

Masked diffusion hides tokens and learns to fill them in. CADD gives every hidden position a
hint: the token's own embedding under Gaussian noise that grows with t. Equation numbers are the
paper's ("Continuously Augmented Discrete Diffusion Model for Categorical Generative Modeling").

  schedules   alpha_t of tokens, (a_t, sigma_t) of hints      schedule, latent_schedule
  forward     q(x_t, z_t | x_0)                   Eq. 9-11    add_noise, add_noise_to_hints
  network     f(x_t, z_t) -> logits of x_0        Eq. 13      CADD.features, CADD.logits
  loss        cross-entropy at masked positions   Eq. 20      CADD.forward
  sampler     reveal tokens, denoise hints        Algorithm 2 sample
  likelihood  two bounds, and the paper's figure  Eq. 24      likelihoods
  adaptation  an autoregressive model as network  5.3, B.2    annealed_mask, Backbone

Time runs from t = 0 (clean) to t = 1 (noise).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import common
from common import RunError, arg, free
from data import Sequences, backbone_facts, load_code, load_dataset, read_prompts
from eval import sample_columns, show_images

# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config(common.MaskedConfig):
    dataset: str = arg("pydoc", "pydoc, pycode, shakespeare, text8, english27, lm1b, lm1b-padded, "
                       "owt; pixels: glyph-pixels, mnist-binary, mnist-pixels, cifar10, "
                       "imagenet32; or a folder of your own, texts or images")
    length: int = arg(256, "tokens per sequence", 1, 65536)
    hint: str = arg("fm", "schedule of the hints z_t: fm (linear, B.1), vp (Table 9), none = MDLM "
                    "(as published with --embed_norm 0)",
                    choices=("fm", "vp", "none"))
    hint_at: str = arg("all", "where the hint enters: all positions (Algorithm 1), or only masked "
                       "ones (the authors' code; with --fuse add it keeps an MDM's inputs for "
                       "--init_from, with --hint_in raw what it computes of them too)",
                       choices=("all", "masked"))
    fuse: str = arg("add", "how w(x_t) and z_t meet (Table 8)",
                    choices=("add", "concat", "reweight"))
    embed_norm: float = arg(0.0, "length of embeddings in units of sqrt(d); 0: learned freely "
                            "(the paper), 1: CDCD's and Plaid's", 0, 100)
    hint_in: str = arg("raw", "what the network gets of a hint at masked positions: raw = z_t (the "
                       "paper); the others with t: c_in = z_t as large as an embedding, mean = "
                       "E[z_0 | z_t] of this position alone (costs V d per token)",
                       choices=("raw", "c_in", "mean"))
    hint_out: bool = arg(False, "add the log-likelihood of a position's own hint to its logits: "
                         "Bayes' rule need not be learned")
    hint_noise: float = arg(1.0, "standard deviation of z_1 (the paper: 1): more weakens hints and "
                            "leaves the network long embeddings", 1e-3, 1e6)
    detach_hints: bool = arg(False, "no gradient through z_0 into the embeddings where masked")
    paper: bool = arg(False, "the paper's letter in place of the preset's hints: --hint_in raw "
                      "--no-hint_out --hint_noise 1 --no-time_cond --embed_norm 0")
    weight: str = arg("elbo", "weight of the loss: elbo (Eq. 2), none = Eq. 20 as printed",
                      choices=("elbo", "none"))
    mse: str = arg("none", "extra embedding loss |z0hat - z0|^2 (Table 10)",
                   choices=("none", "soft", "hard"))
    mse_weight: float = arg(1.0, "its weight", 0, 1e6)
    time_cond: bool = arg(False, "condition the network on t (MDLM and the paper's f: no)")
    init_from: str = arg("", "start from the weights of this run folder (fine-tuning, C.1)")
    backbone: str = free("", "adapt the autoregressive model in this folder (config.json, "
                         "safetensors, tokenizer.json; Qwen2's family): its network takes the "
                         "place of --dim to --dropout and of t")
    anneal: int = arg(10_000, "steps in which a backbone's attention turns from causal to full; 0: "
                      "at once, for one that is a masked diffusion model already", 0, 10**9)
    recompute: bool = free(False, "a backbone's activations are computed again for the backward "
                           "pass: less memory")
    fsdp: bool = free(False, "weights, averages and moments are cut over the ranks (fully_shard)")
    z0_hat: str = free("soft", "estimate of z_0 (Eq. 21): soft keeps the distribution, hard (the "
                       "paper's main runs) seeks its modes", choices=("soft", "hard"),
                       group="sampling")
    z_update: str = free("posterior", "of hints that stay masked: posterior (Eq. 17), ddim (no "
                         "noise), fresh (new noise; the model that nll_prior scores)",
                         choices=("posterior", "ddim", "fresh"), group="sampling")
    order: str = free("random", "what a step reveals: random = a coin flip each; confidence, "
                      "entropy = the schedule's number, those of the likeliest best token or least "
                      "entropy; first-hitting = one per call, whatever --sample_steps", group=
                      "sampling", choices=("random", "confidence", "entropy", "first-hitting"))
    K: int = free(1, "latent chains whose predictions are averaged (Eq. 5), in nll_prior too: K "
                  "times the network calls", 1, 1000, group="sampling")
    prompts: str = free("", "complete the prompts of this .jsonl, such as HumanEval.jsonl; "
                        "--samples of each", group="sampling")
    completion: int = free(512, "most tokens of a completion", 1, 65536, group="sampling")
    corrector: float = free(0.0, "each step first hides what is visible at the rate corrector x "
                            "(1-t)^2 t^.25, and reveals as much more (images: 12)", 0, 1e6,
                            group="sampling")
    cool: bool = free(False, "the token draw's temperature falls by a cosine from --temperature at "
                      "t = 1 to 0 (images: from 2.5)", group="sampling")
    augment: float = arg(0.0, "probability that a training image's flip is drawn (half are none), "
                         "and that its turn is (a quarter are none)", 0, 1, group="optimisation")
    eval_draws: int = free(4, "draws of (t, x_t, z_t) per sequence", 1, 10**6, group="evaluation")
    t_min: float = free(0.0, "time at which nll_joint's chain ends; 0: the best of T_MIN on "
                        "training data", 0, 0.99, group="evaluation")

    def __post_init__(self):
        if self.backbone:  # the other flags of the network have no say
            self.dim, self.time_cond = backbone_facts(Path(self.backbone))["hidden_size"], False

    def calls(self, data: Sequences) -> int:
        """Calls of the network, of each latent chain, for a sample: all free, or of --prompt."""
        if self.order != "first-hitting":
            return self.sample_steps
        if not self.prompt:
            return data.length
        return int((common.encode_prompt(self.prompt, data, self.prompt_mask) == data.mask_id).sum())


_HINTS = dict(hint_in="mean", hint_out=True, embed_norm=0.1)  # ours; --paper undoes it
_WEAK = dict(hint_in="mean", embed_norm=0.00866)  # at width 768 its length is 0.24
# Noise so that an embedding's length is 0.3 of it: weak hints.
_SMALL = dict(length=256, dim=384, depth=6, heads=6, batch_size=64, steps=20_000, lr=1e-3,
              warmup=500, hint_noise=6.5, **_HINTS)
# At GPT-2's vocabulary "mean" triples a step and takes gigabytes; results/cadd.md compares them.
_LARGE = dict(_WEAK, hint_in="c_in")
_LM = dict(batch_size=512, micro_batch=512, length=128, steps=1_000_000, **_LARGE)
PRESETS: dict[str, dict] = {
    # two CPU cores, three minutes
    "pydoc": dict(length=64, dim=96, depth=3, heads=3, dropout=0.0, batch_size=32, micro_batch=32,
                  steps=2000, lr=3e-3, warmup=100, lr_schedule="cosine", beta2=0.99, ema=0.99,
                  hint_noise=3.3, **_HINTS, temperature=0.7, sample_steps=64, log_every=20,
                  save_every=200, eval_draws=8),
    "pycode": dict(_SMALL, save_every=1000),
    # nanoGPT's character benchmark, its width and depth
    "shakespeare": dict(_SMALL, dropout=0.2, steps=5000, warmup=100, lr_schedule="cosine",
                        beta2=0.99, ema=0.999, save_every=500),
    # Table 5; MD4's and SEDD's protocol: 1M x 512. Hints as english27's, which has its symbols
    "text8": dict(length=256, micro_batch=256, **_WEAK),
    # our public benchmark: ten minutes on one H200 (410M characters)
    "english27": dict(length=256, batch_size=256, micro_batch=256, steps=6250, lr=6e-4,
                      lr_schedule="cosine", warmup=300, beta2=0.99, dropout=0.0, ema=0.999,
                      log_every=100, sample_batch=256, **_WEAK),
    "lm1b": _LM,         # packed sentences: Table 6, MDLM 31.8
    "lm1b-padded": _LM,  # padded sentences: MDLM 27.0; the two never share a table
    # Figure 3
    "owt": dict(length=1024, sample_steps=1024, eval_draws=1, sample_batch=16, **_LARGE),
}
# Images (Tables 1 and 2): ADM's U-Net, as in MDM-Prime. Paper: batches and ImageNet's dropout are
# not given; 200M and 4B images.
_PIXELS = dict(net="unet", time_cond=True, alpha="linear", lr=1e-4, split="test", eval_draws=1,
               samples=64, sample_batch=64)
_ADM = dict(_PIXELS, dim=96, mults="3,4,4", depth=5, heads=6, pixel_dim=96, scale_shift=True,
            length=3072, warmup=5000, temperature=2.5, cool=True, corrector=12.0)
PRESETS |= {
    "cifar10": dict(_ADM, dropout=0.4, augment=0.15, batch_size=256, micro_batch=256,
                    steps=781_250, sample_steps=512),
    "imagenet32": dict(_ADM, dropout=0.0, batch_size=1024, micro_batch=256, steps=3_906_250,
                       sample_steps=1024),
    # VADD's data and network
    "mnist-binary": dict(_PIXELS, dim=64, depth=8, heads=1, length=1024, batch_size=256,
                         micro_batch=256, steps=200_000, lr=2e-4, warmup=500, beta2=0.99,
                         weight_decay=0.01, sample_steps=100),
    # two CPU cores, four minutes
    "glyph-pixels": dict(_PIXELS, **_HINTS, hint_noise=2.0, dim=24, mults="1,2,4", depth=1, heads=2,
                         pixel_dim=24, length=256, dropout=0.0, batch_size=32, micro_batch=32,
                         steps=1000, lr=3e-3, warmup=50, lr_schedule="cosine", beta2=0.99, ema=0.99,
                         sample_steps=64, log_every=20, save_every=200, eval_sequences=500),
    # 32 x 32 pixels in colours, one GPU
    "images": dict(_PIXELS, dim=64, mults="1,2,2", depth=3, heads=4, pixel_dim=32,
                   scale_shift=True, length=3072, dropout=0.2, augment=0.15, batch_size=128,
                   micro_batch=128, steps=50_000, lr=3e-4, warmup=1000, beta2=0.99, ema=0.999,
                   sample_steps=256),
}
PRESETS["mnist-pixels"] = PRESETS["mnist-binary"]
PRESETS["folder"] = dict(PRESETS["pydoc"], steps=8000)  # two CPU cores, ten minutes
MDLM_BITS = {"pydoc": 2.690, "english27": 1.944}  # its bound with seed 0: results/mdlm-*.json
FLAG_PRESETS = {
    # Table 3: 65B tokens, of which the paper gives no batch; its embeddings' norm is near 0.6
    "--backbone": dict(
        length=2048, batch_size=512, micro_batch=4, steps=62_000, lr=1e-5, warmup=2000, dropout=0.0,
        lr_schedule="constant", beta2=0.999, ema=0.9999, hint_at="masked", hint_in="c_in",
        hint_out=False, hint_noise=1.0, embed_norm=0.0, recompute=True, compile=False,
        sample_steps=512, order="entropy", temperature=0.2, samples=1, save_every=1000,
        eval_draws=1, eval_sequences=1000, net="dit", augment=0.0, split="valid"),
    "--paper": dict(hint_in="raw", hint_out=False, hint_noise=1.0, time_cond=False,
                    embed_norm=0.0)}

# ---------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------


def schedule(t: Tensor, alpha: str) -> tuple[Tensor, Tensor]:
    """1 - alpha_t, the share of hidden tokens, and its slope -alpha'_t (Eq. 1), of t's shape.

    Only this and its inverse know the formula. 1 - alpha_t is given, since alpha_t loses digits
    near t = 0.
    """
    if alpha == "cosine":
        return torch.sin(math.pi / 2 * t), math.pi / 2 * torch.cos(math.pi / 2 * t)
    return t, torch.ones_like(t)


def time_of(hidden: Tensor, alpha: str) -> Tensor:
    """The time t at which a share `hidden` of the tokens is: schedule's inverse."""
    return 2 / math.pi * torch.asin(hidden) if alpha == "cosine" else hidden


def loss_weight(t: Tensor, alpha: str) -> Tensor:
    """-alpha'_t / (1 - alpha_t), the weight of Eq. 2: 1/t if alpha_t = 1 - t."""
    hidden, slope = schedule(t, alpha)
    return slope / hidden


def flip_probability(t: Tensor, s: Tensor, alpha: str) -> Tensor:
    """rho_flip = (alpha_s - alpha_t) / (1 - alpha_t), Eq. 38: a token hidden at t is visible at
    s < t. Paper: the text under Algorithm 2 prints rho_keep = 1 - rho_flip here."""
    hidden_t, hidden_s = schedule(t, alpha)[0], schedule(s, alpha)[0]
    return (hidden_t - hidden_s) / hidden_t


def latent_schedule(t: Tensor, hint: str, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """(a_t, sigma_t) of the hints z_t = a_t z_0 + sigma_t eps, of t's shape; sigma_1 = noise."""
    if hint == "vp":  # cosine: a^2 + sigma^2 = 1 (Eq. 3 with gamma-bar = cos^2)
        return torch.cos(math.pi / 2 * t), noise * torch.sin(math.pi / 2 * t)
    return 1 - t, noise * t  # flow matching (B.1)


def latent_kl_rate(t: Tensor, hint: str, noise: float = 1.0) -> Tensor:
    """r(t) such that the hints' part of the bound is E_t of r(t) |z_0 - z0hat|^2 per masked token.

    One step's KL (Eq. 19) is 1/2 (SNR_s - SNR_t) |z_0 - z0hat|^2 with SNR = a^2 / sigma^2: insert
    the general posterior's coefficient a_s var_ts / sigma_t^2 and its variance. It counts where
    the position stays masked, rho_keep -> 1 (Eq. 18). So r = -SNR'(t) / 2:
    FM: SNR = (1-t)^2/t^2, r = (1-t)/t^3.  VP: SNR = cot^2(pi t/2), r = pi/2 cos/sin^3. Both over
    noise^2.
    """
    if hint == "vp":
        rate = math.pi / 2 * torch.cos(math.pi / 2 * t) / torch.sin(math.pi / 2 * t) ** 3
    else:
        rate = (1 - t) / t**3
    return rate / noise**2


# ---------------------------------------------------------------------------------------------
# Forward process
# ---------------------------------------------------------------------------------------------


def add_noise(x0: Tensor, t: Tensor, u: Tensor, mask_id: int, alpha: str
              ) -> tuple[Tensor, Tensor]:
    """q(x_t | x_0), Eq. 10: hide each token with probability 1 - alpha_t.

    x0 (B, L), t (B,), u (B, L) uniform noise -> x_t (B, L), masked (B, L).
    """
    masked = u < schedule(t, alpha)[0][:, None]
    return torch.where(masked, mask_id, x0), masked


def add_noise_to_hints(z0: Tensor, masked: Tensor, t: Tensor, eps: Tensor, hint: str,
                       noise: float = 1.0) -> Tensor:
    """q(z_t | x_t, x_0), Eq. 11: exact at visible positions, Gaussian at masked ones.

    z0 = w(x_0) (B, L, d), masked (B, L), t (B,), eps (B, L, d) normal noise -> z_t (B, L, d).
    """
    a, sigma = (c[:, None, None] for c in latent_schedule(t, hint, noise))
    return torch.where(masked[..., None], a * z0 + sigma * eps, z0)


# ---------------------------------------------------------------------------------------------
# Model and loss
# ---------------------------------------------------------------------------------------------


class CADD(nn.Module):
    """f(x_t, z_t) -> logits of x_0 (Eq. 13), and the training loss as its forward."""

    def __init__(self, cfg: Config, vocab_size: int, pretrained: bool = False,
                 shape: tuple[int, ...] | None = None):
        super().__init__()
        self.cfg, self.V, self.mask_id = cfg, vocab_size, vocab_size
        self.hidden_share = common.share_moments(lambda t: schedule(t, cfg.alpha)[0])
        # One class too many, as in the published models: [MASK] is never the answer.
        if cfg.backbone:
            self.net = Backbone(cfg, vocab_size + 1, pretrained)
            self.head = self.net.own_head()
        elif cfg.net == "unet":  # of images of `shape`; its last convolution is the head
            self.net, self.head = common.unet(cfg, vocab_size, shape, vocab_size + 1), None
        else:
            self.net = common.DiT(vocab_size + 1, cfg.dim, cfg.depth, cfg.heads,
                                  dropout=cfg.dropout, length=cfg.length)
            self.head = nn.Linear(cfg.dim, vocab_size + 1)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        if cfg.fuse == "concat" and cfg.hint != "none":
            self.fuse = nn.Linear(2 * cfg.embed_dim, cfg.embed_dim)

    def embedding_matrix(self) -> Tensor:
        """w (V + 1, d), its last row for [MASK].

        Its scale beside --hint_noise decides what a hint tells. At noise 1, in each direction, rows
        of norm 0.6 (the start) hide the token until t is near 0, long rows give it away at once.
        """
        w = self.net.embed.weight
        if self.cfg.embed_norm > 0:
            w = F.normalize(w.float(), dim=-1) * (self.cfg.embed_norm * self.cfg.embed_dim**0.5)
        return w

    def w(self, x: Tensor) -> Tensor:
        """Embeddings (..., d) of token ids (...)."""
        return F.embedding(x, self.embedding_matrix())

    def features(self, x_t: Tensor, z_t: Tensor | None, masked: Tensor, t: Tensor,
                 attend: Tensor | None = None) -> Tensor:
        """Algorithm 1, line 9: features (B, L, d) from tokens x_t (B, L) and hints z_t (B, L, d).

        z_t is None without hints, and w(x_t) at visible positions, as Eq. 11 has it. `attend`
        (L, L), see `annealed_mask`, is for a backbone only.
        """
        told = self.cfg.time_cond or (self.cfg.hint != "none" and self.cfg.hint_in != "raw")
        time = t if told else torch.zeros_like(t[:1])
        if self.cfg.hint == "none":
            return self.net(self.w(x_t), time, attend)
        # w(x_t) is in z_t already: one look-up, and one gradient of it, instead of two.
        w_x = torch.where(masked[..., None], self.embedding_matrix()[self.mask_id], z_t)
        z_in = torch.where(masked[..., None], self.hint_input(z_t, t),
                           z_t if self.cfg.hint_at == "all" else 0.0)
        h = self.net(self.fuse_hints(w_x, z_in, t), time, attend)
        return torch.cat([h, *self.evidence(z_t, t)], -1) if self.cfg.hint_out else h

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a_t, sigma_t) of this model's hints."""
        return latent_schedule(t, self.cfg.hint, self.cfg.hint_noise)

    def hint_input(self, z_t: Tensor, t: Tensor) -> Tensor:
        """What the network gets of hints z_t (B, L, d) at masked positions (ours, see --hint_in).

        Pre-norm cannot see how noisy a raw hint is, whose noise drowns a short embedding. c_in
        divides by the root mean square, as EDM does (Karras et al. 2022, Table 1). mean is what the
        hint says by itself: sum_v w(v) p(v), p(v) from N(z_t; a w(v), sigma^2), no noise is left.
        """
        w = self.embedding_matrix()[:-1].float()
        a, sigma = (c[:, None, None] for c in self.path(t))
        if self.cfg.hint_in == "c_in":
            square = w.detach().square().mean()
            return z_t * (square / (a**2 * square + sigma**2)).sqrt()
        if self.cfg.hint_in == "mean":
            with torch.autocast(z_t.device.type, enabled=False):
                log_p = (z_t.float() @ w.T - 0.5 * a * w.square().sum(-1)) * (a / sigma**2)
                return log_p.softmax(-1) @ w
        return z_t

    def evidence(self, z_t: Tensor, t: Tensor) -> list[Tensor]:
        """Features (B, L, d) and (B, L, 1) that `readout` turns into log N(z_t; a w(v), sigma^2) up
        to a constant, = a/sigma^2 z_t.w(v) - a^2/(2 sigma^2) |w(v)|^2 (ours, see --hint_out).

        Given x_0 a position's hint depends on nothing else, so by Bayes' rule p(x_0 | x_t, z_t) is
        this times p(x_0 | everything else): the network learns only that. No gradient: at small t
        that of w would be a multiple of the network's, and clipping would stop the latter.
        """
        a, sigma = (c[:, None, None] for c in self.path(t))
        return [z_t.detach() * (a / sigma**2), (a**2 / sigma**2).expand(*z_t.shape[:2], 1)]

    def readout(self) -> tuple[Tensor, Tensor]:
        """Weight (V, d or 2 d + 1) and bias (V,) that make logits of features."""
        if self.cfg.net == "unet":
            w = self.net.embed.weight
            weight, bias = torch.eye(self.V, self.V + 1).to(w), torch.zeros(self.V).to(w)
        else:
            head = self.head or self.net.embed  # tied
            weight, bias = head.weight[:-1], getattr(head, "bias", None)
            bias = weight.new_zeros(len(weight)) if bias is None else bias[:-1]
        if self.cfg.hint_out and self.cfg.hint != "none":
            w = self.embedding_matrix()[:-1].detach().float()
            square = w.square().sum(-1, keepdim=True)
            square = square - square.mean()  # 0 if all are of one length, without rounding in bf16
            weight = torch.cat([weight, w, -0.5 * square], -1)
        return weight, bias

    def fuse_hints(self, w_x: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The network's input (B, L, d) from w(x_t) and z_t (B, L, d) (Table 8)."""
        if self.cfg.fuse == "add":
            return w_x + z_t
        if self.cfg.fuse == "concat":
            return self.fuse(torch.cat([w_x, z_t], -1)).float()
        # Paper (C.3): "alpha_t z_disc + (1 - alpha_t) z_t, where alpha_t decreases as the position
        # is more likely to be clean" and "when a token is unlikely to be masked, lean more on
        # z_t". Both sentences reverse its own alpha_t (Eq. 1), the share of visible tokens, which
        # *grows* towards clean. We take the formula with Eq. 1's alpha_t: tokens carry clean
        # input, hints carry noisy input.
        alpha_t = 1 - schedule(t, self.cfg.alpha)[0][:, None, None]
        return alpha_t * w_x + (1 - alpha_t) * z_t

    def logits(self, h: Tensor) -> Tensor:
        """Features (..., d) -> logits (..., V) of the data symbols, float32 under any autocast."""
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(h.float(), *self.readout())

    def z0_hat(self, logits: Tensor, kind: str) -> Tensor:
        """Eq. 21, estimate (..., d) of z_0 from logits (..., V): soft = sum_v p(v) w(v), or hard =
        w of the most probable token."""
        if kind == "hard":
            return self.w(logits.argmax(-1))
        with torch.autocast(logits.device.type, enabled=False):
            return logits.softmax(-1) @ self.embedding_matrix()[:-1].float()

    def forward(self, x0: Tensor, t: Tensor, u: Tensor, eps: Tensor | None, not_pad: Tensor,
                attend: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Algorithm 1: the loss summed over the batch in nats (divide by the tokens that are no
        padding), and statistics (10,) by tenth of t. The arguments are a Batch, and `annealed_mask`
        (L, L) for a backbone."""
        cfg, z0, z_t = self.cfg, None, None
        x_t, masked = add_noise(x0, t, u, self.mask_id, cfg.alpha)
        if cfg.hint != "none":
            z0 = self.w(x0)
            if cfg.detach_hints:
                z0 = torch.where(masked[..., None], z0.detach(), z0)
            z_t = add_noise_to_hints(z0, masked, t, eps, cfg.hint, cfg.hint_noise)
        h = self.features(x_t, z_t, masked, t, attend)

        # Eq. 20 as printed has no weight; with the weight of Eq. 2 it is a bound.
        elbo, scored = loss_weight(t, cfg.alpha), masked & not_pad
        weight = elbo if cfg.weight == "elbo" else torch.ones_like(t)
        loss, ce = common.masked_cross_entropy(
            h, *self.readout(), x0, scored, weight, self.hidden_share, cfg.compile and h.is_cuda)
        stats = common.by_tenth(t, ce=ce, masked=scored.sum(1), bound=ce * elbo)
        if cfg.mse != "none" and cfg.hint != "none":  # Table 10
            index, used = common.masked_positions(scored, self.hidden_share)
            z0_hat = self.z0_hat(self.logits(h.flatten(0, 1).index_select(0, index)), cfg.mse)
            square = (z0_hat - z0.detach().flatten(0, 1)[index]).square().sum(-1) * used
            loss = loss + cfg.mse_weight * square.sum()
            stats["mse"] = square.sum().detach()
        return loss, stats

    @torch.no_grad()
    def hint_accuracy(self, x0: Tensor, t: Tensor, u: Tensor, eps: Tensor) -> list[float | None]:
        """How often the nearest embedding to z_t is the token, at masked positions, by tenth of t.

        This is what the hint gives away by itself (Difformer's DGS_t). Where it is 1 the network
        need not learn from context; where it is 1/V the hint is useless.
        """
        z0, (_, masked) = self.w(x0).float(), add_noise(x0, t, u, self.mask_id, self.cfg.alpha)
        z_t = add_noise_to_hints(z0, masked, t, eps, self.cfg.hint, self.cfg.hint_noise)[masked]
        t_i = t[:, None].expand_as(x0)[masked]                                    # (M,)
        a, w = self.path(t_i)[0], self.embedding_matrix()[:-1].float()
        # argmin_v |z_t - a w_v|^2
        nearest = (z_t @ w.T - 0.5 * a[:, None] * w.square().sum(-1)).argmax(-1)
        sums = common.by_tenth(t_i, hits=nearest == x0[masked], all=torch.ones_like(t_i))
        pairs = zip(sums["hits"].tolist(), sums["all"].tolist())
        return [round(h / n, 4) if n else None for h, n in pairs]


# ---------------------------------------------------------------------------------------------
# An autoregressive model as the network (5.3)
# ---------------------------------------------------------------------------------------------


def annealed_mask(cfg: Config, step: int, L: int, device: torch.device) -> Tensor:
    """Which positions (L, L) each one sees in a step: causal OR Bernoulli(step / anneal), the same
    for the whole batch on all ranks (Gong et al. 2025, which 5.3 follows)."""
    noise = torch.Generator(device).manual_seed(common.fold_in(cfg.seed, step, 3))
    u = torch.rand(L, L, generator=noise, device=device)
    share = step / cfg.anneal if cfg.anneal else 1.0
    return torch.ones(L, L, dtype=torch.bool, device=device).tril() | (u < share)


class Backbone(nn.Module):
    """A causal model of the transformers package, in DiT's place, with `rows` symbols, [MASK] the
    last."""

    def __init__(self, cfg: Config, rows: int, pretrained: bool):
        super().__init__()
        causal = common.causal_model(Path(cfg.backbone), rows, pretrained)
        if cfg.recompute:
            (getattr(causal, "activation_checkpointing_enable", None)  # the newer name
             or causal.gradient_checkpointing_enable)()
        self.body, head = causal.base_model.train(), causal.get_output_embeddings()
        self._head = [] if head.weight is self.embed.weight else [head]  # CADD registers it

    def own_head(self) -> nn.Linear | None:
        """The vocabulary head, None if it is the embeddings'."""
        return self._head[0] if self._head else None

    @property
    def embed(self) -> nn.Embedding:
        return self.body.get_input_embeddings()

    def forward(self, x: Tensor, t: Tensor, attend: Tensor | None = None) -> Tensor:
        """Embeddings (B, L, d) -> features (B, L, d), of which those at i - 1 tell token i, as the
        model has learned; the first token is told by its own. `attend` (L, L); None: all."""
        (B, L, _), device = x.shape, x.device
        if torch.is_autocast_enabled(device.type):
            x = x.to(torch.get_autocast_dtype(device.type))
        if attend is None:
            attend = torch.ones(L, L, dtype=torch.bool, device=device)
        h = self.body(inputs_embeds=x, attention_mask=attend.expand(B, 1, L, L), use_cache=False)[0]
        return torch.cat([h[:, :1], h[:, :-1]], 1)

    def flops_per_token(self, L: int) -> float:
        """As DiT's."""
        matmul = sum(m.weight.numel() for m in self.body.modules() if isinstance(m, nn.Linear))
        depth, d = self.body.config.num_hidden_layers, self.embed.embedding_dim
        return 6.0 * matmul + 12.0 * depth * L * d


# ---------------------------------------------------------------------------------------------
# Sampler
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: CADD, x: Tensor, steps: int, *, temperature: float = 1.0, top_p: float = 1.0,
    z0_hat: str = "soft", z_update: str = "posterior", K: int = 1, order: str = "random",
    corrector: float = 0.0, cool: bool = False, generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Algorithm 2: yields x_t (B, L) after each step; the last one has no [MASK].

    x (B, L): mask_id where a token is to be found, anything else is kept. `steps` times K network
    calls. Draws in float64. See Config for the options.

    order first-hitting (Zheng et al. 2024) is the limit of many steps without the calls that reveal
    nothing: as many steps as gaps, at exact times. Its tokens are exact, hints still take steps.
    """
    cfg, (B, L) = model.cfg, x.shape
    noise = dict(device=x.device, generator=generator)
    w = model.embedding_matrix().float()
    z = [None]  # K chains of hints share x_t (Eq. 5)
    if cfg.hint != "none":
        z = [torch.where((x == model.mask_id)[..., None], cfg.hint_noise * torch.randn(
            B, L, w.shape[1], **noise), w[x]) for _ in range(K)]
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=x.device)
    free = x == model.mask_id
    gaps = free.sum(1)                                                             # (B,)
    if order == "first-hitting":  # i is revealed at the time when a share hit[i] is hidden
        hit = torch.rand(B, L, dtype=torch.float64, **noise) * free
        hits = hit.sort(1, descending=True).values[:, :max(1, gaps.max())]
        times = torch.cat([torch.ones_like(hits[:, :1]), time_of(hits, cfg.alpha)], 1).T  # (, B)
    for t, s in zip(times[:-1], times[1:]):
        if corrector and (u := corrected_time(t, s, corrector, cfg.alpha)) > t:
            was = x == model.mask_id
            again = torch.rand(B, L, dtype=torch.float64, **noise)
            x = torch.where((again < hide_probability(t, u, cfg.alpha)) & free, model.mask_id, x)
            for k, z_k in enumerate(z if cfg.hint != "none" else []):
                eps = torch.randn(z_k.shape, **noise)
                z_u = eps * cfg.hint_noise if z_update == "fresh" else noise_hints_further(
                    z_k, eps, was, t, u, cfg.hint, cfg.hint_noise)
                z[k] = torch.where((x == model.mask_id)[..., None], z_u, z_k)
            t = u
        masked = x == model.mask_id
        if not masked.any():
            yield x
            continue
        t_b = t.float().expand(B)
        logits = [model.logits(model.features(x, z_k, masked, t_b)[masked]) for z_k in z]  # (M, V)
        log_p = mean_over_chains(logits)
        # First whether a token is revealed, then which.
        if order == "random":
            u = torch.rand(B, L, dtype=torch.float64, **noise)[masked]
            reveal = u < flip_probability(t, s, cfg.alpha)
        elif order == "first-hitting":
            row = masked.nonzero()[:, 0]
            reveal = hit[masked] == (hit * masked).amax(1)[row]
            t, s = t[row, None], s[row, None]
        else:
            stay = (gaps * schedule(s, cfg.alpha)[0]).round()
            reveal = surest(log_p, masked, masked.sum(1) - stay, order)
        u = torch.rand(reveal.shape, dtype=torch.float64, **noise)
        tau = cooled(temperature, t.item()) if cool else temperature
        token = common.sample_categorical(log_p, tau, top_p, u)
        x = x.masked_scatter(masked, torch.where(reveal, token, model.mask_id))
        for k, z_k in enumerate(z if cfg.hint != "none" and s.any() else []):
            z0 = model.z0_hat(log_p if z0_hat == "hard" else logits[k], z0_hat)
            eps = torch.randn(z0.shape, **noise)
            z_s = denoise_hints(z_k[masked], z0, eps, t, s, cfg.hint, z_update, cfg.hint_noise)
            z_s = torch.where(reveal[:, None], w[token], z_s)
            z[k] = z_k.masked_scatter(masked[..., None], z_s)
        yield x


def corrected_time(t: Tensor, s: Tensor, corrector: float, alpha: str) -> Tensor:
    """The time u >= t back to which the corrector goes before a step from t to s.

    Discrete flow matching's (Gat et al. 2024): tokens are hidden at the rate b and revealed at the
    rate 1 + b, in units of -alpha'; b = 12 t^2 (1-t)^.25 in that family's clock, which runs
    towards the data. With a linear alpha a step forward of (1 + b) dt after one back of b dt, along
    q itself: nothing is lost but network calls that would have revealed more.
    """
    hidden_t, hidden_s = schedule(t, alpha)[0], schedule(s, alpha)[0]
    rate = corrector * (1 - t)**2 * t**0.25
    return torch.maximum(t, time_of((hidden_t + rate * (hidden_t - hidden_s)).clamp_max(1), alpha))


def hide_probability(t: Tensor, u: Tensor, alpha: str) -> Tensor:
    """1 - alpha_u / alpha_t: a token visible at t is hidden at u > t, q(x_u | x_t)."""
    hidden_t, hidden_u = schedule(t, alpha)[0], schedule(u, alpha)[0]
    return (hidden_u - hidden_t) / (1 - hidden_t)


def noise_hints_further(z_t: Tensor, eps: Tensor, masked: Tensor, t: Tensor, u: Tensor, hint: str,
                        noise: float = 1.0) -> Tensor:
    """z_u of q(z_u | z_t), u > t, for z_t, eps (B, L, d); exact where not masked (B, L) at t."""
    a_u, sigma_u = latent_schedule(u, hint, noise)
    a_t, sigma_t = latent_schedule(t, hint, noise)
    a = a_u / torch.where(masked, a_t, 1.0)
    variance = sigma_u**2 - a**2 * torch.where(masked, sigma_t**2, 0.0)
    return (a[..., None] * z_t + variance.clamp_min(0).sqrt()[..., None] * eps).float()


def cooled(temperature: float, t: float) -> float:
    """Cosine decay from `temperature` at t = 1 to 0. Paper: "a cosine decay for temperature with
    tau_max = 2.5", no formula: that of learning rates."""
    return temperature * 0.5 * (1 - math.cos(math.pi * t))


def surest(log_p: Tensor, masked: Tensor, n: Tensor, order: str) -> Tensor:
    """Which (M,) of the positions masked (B, L), whose tokens have log_p (M, V), are the n (B,) of
    each sequence with the most probable best token (confidence) or the least entropy."""
    score = log_p.amax(-1) if order == "confidence" else -torch.special.entr(log_p.exp()).sum(-1)
    rows = torch.full(masked.shape, -torch.inf, dtype=score.dtype, device=score.device)
    rank = rows.masked_scatter(masked, score).argsort(dim=1, descending=True).argsort(1)
    return (rank < n[:, None])[masked]


def mean_over_chains(logits: list[Tensor]) -> Tensor:
    """Eq. 5: log of the mean over K chains of p(x_0 | x_t, z_t), float64; logits K x (M, V)."""
    log_p = torch.stack([l.double().log_softmax(-1) for l in logits])
    return log_p.logsumexp(0) - math.log(len(logits))


def denoise_hints(z_t: Tensor, z0: Tensor, eps: Tensor, t: Tensor, s: Tensor, hint: str,
                  z_update: str, noise: float = 1.0) -> Tensor:
    """z_s (M, d) of positions that stay masked, from z_t, the estimate z0 and noise eps (M, d)."""
    if z_update == "fresh":
        return noise * eps
    path = (z_t.double(), z0.double(), *latent_schedule(t, hint, noise),
            *latent_schedule(s, hint, noise))
    if z_update == "ddim":
        return common.ddim(*path).float()
    mean, variance = common.gaussian_posterior(*path)                        # Eq. 16-17
    return (mean + variance.sqrt() * eps).float()


# ---------------------------------------------------------------------------------------------
# Likelihood
# ---------------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """A draw of the forward process: sequences, tokens at time t, what is hidden and counts."""

    x0: Tensor      # (B, L)
    t: Tensor       # (B,)
    x_t: Tensor     # (B, L)
    masked: Tensor  # (B, L) bool
    scored: Tensor  # (B, L) bool: masked and no padding; M of them
    tokens: Tensor  # (B,) that are no padding

    def per_token(self, value: Tensor) -> Tensor:
        """Values (M,) at scored positions -> their sums over sequences, per token (B,) float64."""
        row = self.scored.nonzero()[:, 0]
        out = torch.zeros(len(self.x0), device=row.device, dtype=torch.float64)
        return out.index_add(0, row, value.double()) / self.tokens


def nll_at(model: CADD, draw: Draw, z_t: Tensor | None) -> tuple[Tensor, Tensor]:
    """-log p(x_0 | x_t, z_t) (M,) float64 at the scored positions, and the logits (M, V)."""
    h = model.features(draw.x_t, z_t, draw.masked, draw.t)
    logits = model.logits(h[draw.scored])
    return F.cross_entropy(logits.double(), draw.x0[draw.scored], reduction="none"), logits


def bound_weight(t: Tensor, alpha: str, t_min: float) -> Tensor:
    """The weight of Eq. 2 for a chain that ends at t_min, where what is still hidden is revealed at
    once: times below are clamped to t_min, their share is t_min, and they weigh 1 / t_min."""
    return torch.where(t > t_min, loss_weight(t.double(), alpha), 1 / t_min)


def prior_bound(model: CADD, draw: Draw, eps: list[Tensor], t_min: float) -> Tensor:
    """MDM bound (Eq. 2) with z_t = sigma_1 eps drawn afresh, eps K x (B, L, d): (B,).

    E_t E_x_t [ weight sum -log E_z p ]. The hints carry nothing about x_0, so this bounds
    -log p(x_0) of the model that samples with fresh noise (z_update=fresh). p is averaged over the
    K draws. Training never shows such z_t at t < 1, so a denoiser that relies on its hints, as the
    exact one does, has a bad bound. Without hints (eps empty) it is MDLM's.
    """
    z0 = model.w(draw.x0).float()
    noise = model.cfg.hint_noise
    z = [torch.where(draw.masked[..., None], noise * e, z0) for e in eps] or [None]
    log_p = torch.stack([-nll_at(model, draw, z_t)[0] for z_t in z])
    nll = -(log_p.logsumexp(0) - math.log(len(z)))
    return draw.per_token(nll) * bound_weight(draw.t, model.cfg.alpha, t_min)


def joint_bound(model: CADD, draw: Draw, eps: Tensor, t_min: float
                ) -> tuple[Tensor, Tensor]:
    """The ELBO of Eq. 24 in continuous time, eps (B, L, d), and its discrete part: (B,) each.

    The discrete part is the figure of Tables 5-7. Its z_t ~ q(z_t | x_0) leaks the answer, for
    which nobody pays: no bound. The other part is latent_kl_rate times |z_0 - z0hat|^2 per masked
    token; the sum bounds -log p(x_0) of the paper's sampler.
    """
    z0, path = model.w(draw.x0).float(), (model.cfg.hint, model.cfg.hint_noise)
    z_t = add_noise_to_hints(z0, draw.masked, draw.t, eps, *path)
    nll, logits = nll_at(model, draw, z_t)
    discrete = draw.per_token(nll) * bound_weight(draw.t, model.cfg.alpha, t_min)
    gap = (z0[draw.scored] - model.z0_hat(logits, "soft")).double().square().sum(-1)
    rate = latent_kl_rate(draw.t.double(), *path) * (draw.t > t_min)
    return discrete + draw.per_token(gap) * rate, discrete


T_MIN = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2)  # ends of the chain that evaluation tries


@torch.no_grad()
def likelihoods(
    model: CADD, batches: Iterator[Tensor], draws: int, seed: int, pad_id: int | None = None,
    K: int = 1, t_min: float | None = None,
) -> dict[str, Tensor]:
    """nll_prior, nll_joint and nll_discrete (without hints the three are one, nll_prior), in nats
    per token, one estimate per sequence and draw: (sequences x draws,) float64; and `tokens` that
    are no padding, which is given and not scored. Batches (B, L). No nll_prior with hint_out.

    The chain ends at t_min, 1e-5 or with hints 1e-3, where what is still hidden is revealed at
    once and no hint moves any more. Below, the hints' rate t^-3 would charge for the least doubt of
    the softmax without limit. Any t_min gives a bound. Times are low-discrepancy across the batch
    and across a sequence's draws, so the naive standard error is on the safe side.
    """
    hint = model.cfg.hint
    t_min = t_min or (1e-5 if hint == "none" else 1e-3)
    # With hint_out a hint that is noise is believed: nobody samples so.
    names = ["tokens"] + ["nll_prior"] * (hint == "none" or not model.cfg.hint_out) + [
        "nll_joint", "nll_discrete"]
    found: list[list[Tensor]] = []
    for number, x0 in enumerate(batches):
        B, noise = len(x0), dict(device=x0.device, generator=torch.Generator(
            x0.device).manual_seed(common.fold_in(seed, 77, number)))
        shift, perm = torch.rand((), dtype=torch.float64, **noise), torch.randperm(B, **noise)
        not_pad = x0 != (-1 if pad_id is None else pad_id)
        for k in range(draws):
            t = common.low_discrepancy_t(k * B + perm, B * draws, shift, t_min)
            x_t, masked = add_noise(x0, t, torch.rand(x0.shape, **noise), model.mask_id,
                                    model.cfg.alpha)
            draw = Draw(x0, t, x_t, masked, masked & not_pad, not_pad.sum(1))
            shape = (*x0.shape, model.cfg.embed_dim)
            eps = [torch.randn(shape, **noise) for _ in range(K if hint != "none" else 0)]
            found.append([draw.tokens])
            if "nll_prior" in names:
                found[-1].append(prior_bound(model, draw, eps, t_min))
            if hint != "none":
                eps = torch.randn(shape, **noise)
                found[-1] += joint_bound(model, draw, eps, t_min)
    return {name: torch.cat(values) for name, values in zip(names, zip(*found))}


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Everything random about some samples of a step."""

    x0: Tensor          # (B, L) token ids
    t: Tensor           # (B,) times
    u: Tensor           # (B, L) uniform noise: what is hidden
    eps: Tensor | None  # (B, L, d) normal noise of the hints
    not_pad: Tensor     # (B, L) bool


def load(cfg: Config, tokenizer: dict | None = None) -> Sequences:
    """The data set; of a checkpoint's tokenizer without its text, which sampling does not need."""
    if tokenizer:
        return Sequences.from_tokenizer(tokenizer)
    bench = cfg.mode == "bench"
    if getattr(cfg, "backbone", ""):  # results/ar_baseline.py has none
        return load_code(cfg.dataset, cfg.data_dir, cfg.length, Path(cfg.backbone), synthetic=bench)
    data = load_dataset(cfg.dataset, cfg.data_dir, cfg.length, synthetic=bench, as_bytes=cfg.bytes)
    if not getattr(cfg, "augment", 0.0):
        return data
    if data.unit != "dimension" or data.shape[0] != data.shape[1]:
        raise RunError("--augment flips and turns square images: drop it")
    return dataclasses.replace(data, augment=cfg.augment)


def load_batch(cfg: Config, data: Sequences, step: int, index: Tensor, ddp: common.DDP) -> Batch:
    """The samples `index` (B,) of the global batch of a step, the same on any number of ranks."""
    x0 = ddp.put(data.train_batch(cfg.seed, step, cfg.batch_size, index.numpy()).ids)
    rows = ddp.put(index)
    shift = np.random.default_rng(common.fold_in(cfg.seed, step, 1)).random()
    t = common.low_discrepancy_t(rows, cfg.batch_size, shift, t_min=1e-3)
    # u is small: every rank draws the global batch's and takes its rows; eps is not.
    generator = torch.Generator(ddp.device).manual_seed(common.fold_in(cfg.seed, step))
    u = torch.rand(cfg.batch_size, data.length, generator=generator, device=ddp.device)[rows]
    eps = None
    if cfg.hint != "none":
        eps = common.sample_normal(cfg.seed, step, index, (data.length, cfg.embed_dim),
                                   ddp.device)
    return Batch(x0, t, u, eps, data.not_pad(x0))


def build(cfg: Config, data: Sequences, pretrained: bool = False) -> CADD:
    """The network, untrained, or `pretrained` its backbone. Raises RunError if its width does not
    suit rotary attention, or if --prompt or --prompts do not suit the data."""
    if cfg.order == "first-hitting" and (cfg.corrector or cfg.cool):  # a mistake costs no training
        raise RunError("--order first-hitting has no common time: not with --corrector or --cool")
    common.check_prompt(cfg, data)
    if cfg.prompts:
        if data.unit == "dimension":
            raise RunError("--prompts is for text")
        tasks = read_prompts(Path(cfg.prompts))
        longest = max((len(data.encode(task["prompt"])) for task in tasks), default=0)
        if not cfg.backbone and longest + cfg.completion > data.length:
            raise RunError(f"--prompts: {longest} tokens and --completion {cfg.completion} are "
                           f"more than this model's {data.length}")
    return CADD(cfg, data.vocab_size, pretrained, data.shape)


def start_from(source: str, model: CADD, data: Sequences) -> None:
    """Fine-tuning (C.1) from a run's averaged weights. Raises RunError where the network is not the
    same; an MDM's may get hints at masked positions, where its own inputs carry no token."""
    path, cfg = Path(source) / "checkpoint.pt", model.cfg
    state = common.read_checkpoint(path, "cadd")
    same = ["net", "dim", "depth", "heads", "mults", "pixel_dim", "scale_shift", "embed_norm",
            "time_cond", "alpha"]
    if state["config"]["hint"] != "none":
        same += ["hint", "hint_at", "hint_in", "hint_out", "hint_noise", "fuse"]
    elif cfg.hint != "none" and cfg.hint_at != "masked":
        raise RunError(f"--init_from {source} is an MDM: give --hint_at masked, which keeps its "
                       "inputs")
    common.check_same_run(state["config"], {k: getattr(cfg, k) for k in same}, Config,
                          f"--init_from {source}", "its network stays the same")
    state.pop("data", None)  # other text of the same symbols may follow
    common.check_same_data(state, data, dataclasses.replace(cfg, out=source))
    own = {k: v for k, v in model.state_dict().items() if k.startswith("fuse.")}
    common.load_weights(model, {**own, **state["ema"]["params"]}, path)


def train(cfg: Config, ddp: common.DDP, data: Sequences) -> common.Run:
    """Algorithm 1, on all ranks, from where the run folder's checkpoint stands."""
    fresh = cfg.overwrite or not (Path(cfg.out) / "checkpoint.pt").exists()
    model = build(cfg, data, fresh and cfg.mode == "train" and not cfg.init_from)
    if cfg.init_from and fresh:
        start_from(cfg.init_from, model, data)
    model = ddp.shard(model) if cfg.fsdp else model.to(ddp.device)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, betas=(0.9, cfg.beta2), eps=1e-8,
                                  weight_decay=cfg.weight_decay, fused=True)
    ema = common.EMA(model, cfg.ema)
    # The vocabulary head sees the masked share of the positions, forward and backward 3 x 2 FLOPs.
    flops = model.net.flops_per_token(cfg.length) + 6 * (
        model.hidden_share[0] * (data.vocab_size + 1) * cfg.dim * (cfg.net == "dit"))
    run = common.Run("cadd", cfg, ddp, data, model, optimizer, ema, flops)
    net = ddp.wrap(model, cfg.compile)
    parts = common.micro_batches(cfg.batch_size, cfg.micro_batch, ddp)

    def valid(held_out: Sequences, step: int) -> Tensor:
        batches = [load_batch(cfg, held_out, step, index, ddp) for index in parts]
        tokens = ddp.sum(sum(batch.not_pad.sum() for batch in batches))
        return sum(model(*batch)[0] for batch in batches) / tokens

    for step in run.steps(lambda total: summarise(total, model, batches[0]), valid):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, cfg)
        batches = [load_batch(cfg, data, step, index, ddp) for index in parts]
        own_tokens = sum(batch.not_pad.sum() for batch in batches)
        tokens = ddp.sum(own_tokens)  # of the global batch
        attend = [annealed_mask(cfg, step, data.length, ddp.device)] if cfg.backbone else []
        for k, batch in enumerate(batches):
            with ddp.no_sync(net, last=k == len(batches) - 1):
                with ddp.autocast():
                    loss, stats = net(*batch, *attend)
                (loss * ddp.world / tokens).backward()  # DDP averages gradients, hence `world`
            run.add(**stats)
        run.add(tokens=own_tokens)
        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()
    return run


def summarise(total: dict, model: CADD, batch: Batch) -> tuple[dict, dict]:
    """What log.jsonl gets and what the bar shows, from the sums since the last line."""
    bound, masked = sum(total["bound"]) / total["tokens"], sum(total["masked"])
    name = "bound" if model.cfg.hint == "none" else "nll_discrete"  # no bound: see joint_bound
    record = {f"{name}_nats": bound, f"{name}_bits": bound / math.log(2)} | dict(
        ce_masked_nats=sum(total["ce"]) / masked if masked else None,
        ce_by_t=[round(c / m, 4) if m else None for c, m in zip(total["ce"], total["masked"])])
    if "mse" in total and masked:
        record["mse"] = total["mse"] / masked
    if model.cfg.hint != "none":
        record["hint_accuracy_by_t"] = model.hint_accuracy(*batch[:4])
        norms = model.embedding_matrix()[:-1].float().norm(dim=-1)
        record["embedding_norm"] = round(norms.mean().item(), 3)
    return record, dict(loss=f"{bound:.3f}")


# ---------------------------------------------------------------------------------------------
# Evaluation and samples
# ---------------------------------------------------------------------------------------------


def name_of(cfg: Config) -> str:
    """What tables call this run."""
    return "mdlm" if cfg.hint == "none" else "cadd"


def evaluate(model: CADD, cfg: Config, data: Sequences, ddp: common.DDP) -> dict[str, dict]:
    """Figures of `likelihoods` over cfg.split, in bits per character (byte) or nats per token."""
    batch = cfg.scored_at_once(data.length)

    def values(split: str, limit: int, t_min: float | None) -> dict[str, Tensor]:
        batches = common.eval_batches(data, split, batch, limit, ddp, show=split == cfg.split)
        with common.exact(ddp.device), ddp.autocast():
            return likelihoods(model, (x0 for x0, _ in batches), cfg.eval_draws,
                               common.fold_in(cfg.seed, ddp.rank), data.pad_id, cfg.K, t_min)

    def on_training_data(t_min: float) -> float:
        v = values("train", 128, t_min)  # {} on a rank without sequences
        total = (v["nll_joint"] * v["tokens"]).sum() if v else torch.zeros(())
        return ddp.sum(total.double().to(ddp.device)).item()

    t_min = cfg.t_min or None
    if cfg.hint != "none" and not t_min:  # zero-shot sets have no training data
        t_min = min(T_MIN, key=on_training_data) if "train" in data.splits else T_MIN[0]
    found = values(cfg.split, cfg.eval_sequences, t_min)
    figures = common.estimates(found, data, ddp, found.pop("tokens", None), given="padding",
                               split=cfg.split)
    for name, figure in figures.items():
        figure["is_bound"] = name != "nll_discrete"
        if cfg.hint != "none":
            figure["t_min"] = t_min
    preset = cfg.split == "valid" and cfg.steps == PRESETS.get(cfg.dataset, {}).get("steps")
    if preset and cfg.dataset in MDLM_BITS and "nll_joint" in figures:
        figures["nll_joint"]["beside"] = (f"MDLM's: {MDLM_BITS[cfg.dataset]:.3f}, stored in "
                                          f"results/mdlm-{cfg.dataset}.json")
    return figures


def sampler_of(model: CADD, cfg: Config, ddp: common.DDP
               ) -> Callable[[Tensor], Iterator[Tensor]]:
    """`sample` as the flags have it; batch after batch draws from one generator."""
    generator = torch.Generator(ddp.device).manual_seed(common.fold_in(cfg.seed, 99))
    return functools.partial(
        sample, model, steps=cfg.sample_steps, temperature=cfg.temperature, top_p=cfg.top_p,
        z0_hat=cfg.z0_hat, z_update=cfg.z_update, K=cfg.K, order=cfg.order,
        corrector=cfg.corrector, cool=cfg.cool, generator=generator)


def draw_ids(model: CADD, cfg: Config, data: Sequences, steps: int, ddp: common.DDP) -> Tensor:
    """cfg.samples sequences of `steps` steps: ids (samples, L) on the CPU."""
    cfg = dataclasses.replace(cfg, sample_steps=steps)
    return common.fill_in(cfg, data, ddp, cfg.calls(data), sampler_of(model, cfg, ddp))


def draw(model: CADD, cfg: Config, data: Sequences, ddp: common.DDP, trained: bool = False
         ) -> dict:
    """Print cfg.samples texts; a file in the run folder gets them with their ids. Of a model just
    trained it gets a whole batch, and below stand one sample's way, as many texts drawn most
    confident first, and what that order gains and costs. With --prompts completions instead."""
    if cfg.prompts:
        return common.complete(cfg, data, ddp, sampler_of(model, cfg, ddp))
    if data.unit == "dimension":
        ids = draw_ids(model, cfg, data, cfg.sample_steps, ddp)
        return show_images({f"{cfg.sample_steps} steps": ids}, data, cfg, graded=trained)
    calls = cfg.calls(data)
    compares = trained and cfg.order == "random" and not (cfg.prompt or cfg.watch)
    n = max(cfg.samples, cfg.sample_batch) if compares else cfg.samples

    def drawn(order: str) -> tuple[Tensor, list[Tensor]]:
        """Samples (n, L) in an order, and the first one of a batch after each call."""
        own, way = dataclasses.replace(cfg, order=order, samples=n), []
        plain = sampler_of(model, own, ddp)

        def sampler(x: Tensor) -> Iterator[Tensor]:
            for x in plain(x):
                way.append(x[0].clone())
                yield x

        return common.fill_in(own, data, ddp, calls, sampler), way

    ids, way = drawn(cfg.order)
    common.show_texts(ids, data, cfg, calls * (1 if cfg.hint == "none" else cfg.K))
    if not compares:
        return {}
    print("\n--- how the first one came about: after so many calls, _ for what is hidden")
    for call in sorted({max(1, calls * part // 5) for part in range(1, 6)}):
        print(f"{call:4d}  {data.decode(way[call - 1].tolist())[:90]!r}")
    rows = [[dict(text=data.decode(x), ids=x) for x in some.tolist()]
            for some in (ids, drawn("confidence")[0])]
    for row in rows[1][:cfg.samples]:
        print(f"\n--- sample by --order confidence\n{row['text']}")
    orders = dict(zip(("random", "confidence"), (sample_columns(some, data) for some in rows)))
    print(f"\nwhat --order confidence gains and costs, of {n} samples (random order): " + ", ".join(
        f"{name} {value} ({orders['random'].get(name)})"
        for name, value in orders["confidence"].items() if name != "samples"))
    return {"orders": orders}


@torch.no_grad()
def probe(model: CADD, cfg: Config, data: Sequences, ddp: common.DDP, times: np.ndarray) -> dict:
    """What `eval.py collapse` asks: how the embeddings of a run lie, and what is left to predict.

    embeddings (V, d) as they enter the diffusion; at times (n,) the mean cross_entropy (n,) in nats
    at the masked positions of 64 sequences, given x_t and z_t (visible tokens cost nothing), with
    the same noise at all times; signal (n,) and sigma (n,) of z_t = signal z_0 + sigma eps; tokens
    (10,000 or fewer, L) of the split.
    """
    if cfg.hint == "none":
        raise RunError(f"{cfg.out} is an MDLM: it has no embeddings that are diffused")
    batch = cfg.scored_at_once(data.length)
    nll, count = np.zeros(len(times)), np.zeros(len(times))
    for number, (x0, _) in enumerate(common.eval_batches(data, cfg.split, batch, 64, ddp)):
        noise = dict(device=x0.device, generator=torch.Generator(
            x0.device).manual_seed(common.fold_in(cfg.seed, 78, number)))
        z0, u = model.w(x0).float(), torch.rand(x0.shape, **noise)
        eps, not_pad = torch.randn(z0.shape, **noise), data.not_pad(x0)
        for k, time_k in enumerate(times):
            t = torch.full((len(x0),), time_k, device=x0.device)
            x_t, masked = add_noise(x0, t, u, model.mask_id, cfg.alpha)
            z_t = add_noise_to_hints(z0, masked, t, eps, cfg.hint, cfg.hint_noise)
            point = Draw(x0, t, x_t, masked, masked & not_pad, not_pad.sum(1))
            with common.exact(ddp.device), ddp.autocast():
                nll[k] += nll_at(model, point, z_t)[0].sum().item()
            count[k] += point.scored.sum().item()
    signal, sigma = model.path(torch.from_numpy(times))
    tokens = np.concatenate([b.ids for b in data.eval_batches(cfg.split, 1000, 10_000)])
    return dict(cross_entropy=nll / count, signal=signal, sigma=sigma, tokens=tokens,
                embeddings=model.embedding_matrix()[:-1].detach().float().cpu())


if __name__ == "__main__":
    common.run_main(common.main, sys.modules[__name__])
