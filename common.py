"""Building blocks and plumbing shared by cadd.py, vadd.py, catdm.py and difformer.py.

Read the scripts, not this file: each holds its method in full. Here stand, in this order,
  1. diffusion mathematics that several methods use word for word (time, draws, posteriors),
  2. the network: DiT blocks and a cross-entropy that never stores the (tokens, vocabulary) logits,
  3. EMA and learning-rate schedules,
  4. configuration: a typed dataclass becomes the command line,
  5. processes, devices and noise that does not depend on the number of GPUs,
  6. checkpoints, logs, progress.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm


class RunError(RuntimeError):
    """A problem the user can solve; `main` prints its one line and exits with code 1."""


# ---------------------------------------------------------------------------------------------
# 1. Diffusion mathematics
# ---------------------------------------------------------------------------------------------


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


PROBE_TIMES = (np.arange(25) + 0.5) / 25  # where `eval.py collapse` asks each script's probe

# ---------------------------------------------------------------------------------------------
# 2. Networks
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

    def __init__(self, d: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoids(1000.0 * t, 256))


class DiTBlock(nn.Module):
    """Pre-norm attention and MLP, each shifted, scaled and gated by the condition (adaLN-zero)."""

    def __init__(self, d: int, heads: int, cond_dim: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
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
        h = F.scaled_dot_product_attention(q, k, qkv[:, :, 2].transpose(1, 2))
        h = self.out(h.transpose(1, 2).reshape(B, L, d))
        x = x + gate1 * F.dropout(h, self.dropout, self.training)
        h = self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x + gate2 * F.dropout(h, self.dropout, self.training)


class DiT(nn.Module):
    """Token-sequence transformer: ids (B, L) or embeddings (B, L, d) -> features (B, L, d).

    The head is the caller's, so that logits are computed only where they are needed; with rows = 0
    so are the embeddings. At
    12 x 768 x 12 heads, cond_dim 128, 50,258 rows and an untied head of as many classes this is
    the 169.6M-parameter network of SEDD, MDLM and CADD.
    """

    def __init__(
        self, rows: int, d: int, depth: int, heads: int, cond_dim: int = 128, dropout: float = 0.1,
        length: int = 1024,
    ):
        super().__init__()
        self.embed = nn.Embedding(rows, d) if rows else None
        self.time = TimeEmbedding(cond_dim)
        self.blocks = nn.ModuleList(DiTBlock(d, heads, cond_dim, dropout) for _ in range(depth))
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

    def forward(self, x: Tensor, memory: Tensor, real: Tensor | None = None) -> Tensor:
        """real (B, M) is False at padding of the memory, which nobody sees; None: no padding."""
        B, L, d = x.shape
        q = self.q(x).view(B, L, self.heads, -1).transpose(1, 2)          # (B, heads, L, d_head)
        kv = self.kv(memory).view(B, memory.shape[1], 2, self.heads, -1)
        k, v = kv.transpose(1, 3).unbind(2)                               # (B, heads, M, d_head)
        mask = None if real is None else real[:, None, None]
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(h.transpose(1, 2).reshape(B, L, d))


class PostNormBlock(nn.Module):
    """The original transformer's block: x = norm(x + f(x)) for self-attention, attention on the
    encoder's output (decoders only) and an MLP with ReLU."""

    def __init__(self, d: int, heads: int, ffn: int, dropout: float, cross: bool):
        super().__init__()
        self.dropout = dropout
        self.attention, self.norm1 = Attention(d, heads), nn.LayerNorm(d)
        if cross:
            self.cross, self.norm2 = Attention(d, heads), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, ffn), nn.ReLU(), nn.Linear(ffn, d))
        self.norm3 = nn.LayerNorm(d)

    def forward(
        self, x: Tensor, real: Tensor, memory: Tensor | None = None,
        memory_real: Tensor | None = None,
    ) -> Tensor:
        """x (B, L, d), real (B, L); memory (B, M, d), memory_real (B, M) in a decoder."""
        def drop(h: Tensor) -> Tensor:
            return F.dropout(h, self.dropout, self.training)

        x = self.norm1(x + drop(self.attention(x, x, real)))
        if memory is not None:
            x = self.norm2(x + drop(self.cross(x, memory, memory_real)))
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
    gives the decoder a second input, its previous estimate.
    """

    def __init__(self, e: int, d: int, ffn: int, depth: int, heads: int, dropout: float,
                 length: int, self_condition: bool = True, init_std: float = 0.02,
                 place_std: float = 0.02):
        super().__init__()
        if d % heads:
            raise RunError(f"--dim {d} must be a multiple of --heads {heads}")
        self.d, self.dropout = d, dropout
        self.source_in, self.target_in = (nn.Linear(e, d, bias=False) for _ in range(2))
        self.out = nn.Linear(d, e, bias=False)
        self.source_place, self.target_place = (nn.Embedding(length, d) for _ in range(2))
        self.source_norm, self.target_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.time = nn.Sequential(nn.Linear(d, 4 * d), nn.ReLU(), nn.Linear(4 * d, d))
        if self_condition:
            self.previous = nn.Sequential(nn.Linear(2 * d, d), nn.ReLU(), nn.Linear(d, d))
        self.encoder, self.decoder = (
            nn.ModuleList(PostNormBlock(d, heads, ffn, dropout, cross) for _ in range(depth))
            for cross in (False, True))
        self.length_head = nn.Linear(d, LENGTH_CLASSES)
        normal_init(self, init_std)
        for table in (self.source_place, self.target_place):
            nn.init.normal_(table.weight, std=place_std)

    def encode(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Source embeddings (B, M, e), real (B, M) False at padding -> states (B, M, d), length
        logits (B, LENGTH_CLASSES) float32."""
        h = self.source_in(x) + self.source_place.weight[: x.shape[1]]
        h = F.dropout(self.source_norm(h), self.dropout, self.training)
        for block in self.encoder:
            h = block(h, real)
        mean = (h * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return h, self.length_head(mean).float()

    def decode(self, z: Tensor, t: Tensor, previous: Tensor | None, real: Tensor, memory: Tensor,
               memory_real: Tensor) -> Tensor:
        """Estimate (B, N, e) float32 from noisy z (B, N, e), times t (B,) in [0, 1] and the
        previous estimate; memory (B, M, d) are the encoder's states."""
        h = self.target_in(z)
        if previous is not None:
            h = self.previous(torch.cat([h, self.target_in(previous)], -1))
        h = h + self.time(sinusoids(1000.0 * t, self.d))[:, None]
        h = self.target_norm(h + self.target_place.weight[: z.shape[1]])
        h = F.dropout(h, self.dropout, self.training)
        for block in self.decoder:
            h = block(h, real, memory, memory_real)
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


_cross_entropy_chunk_compiled = torch.compile(_cross_entropy_chunk, dynamic=False)


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
        chunk = _cross_entropy_chunk_compiled if compiled else _cross_entropy_chunk
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


def masked_positions(masked: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Flat indices (capacity,) of the True entries of masked (B, L) first, and which are True.

    A fixed size lets torch.compile keep one graph and spares the host from asking the GPU how
    many there are. Callers choose a capacity that cannot be exceeded in practice.
    """
    flat = masked.flatten()
    index = torch.argsort(flat.logical_not().to(torch.uint8), stable=True)[:capacity]
    return index, flat[index]


def mask_capacity(B: int, L: int) -> int:
    """Room for the masked positions of B sequences whose low-discrepancy t are 1/B apart.

    Their number has mean at most (B + 1) L / 2 and variance at most B L / 6; eight standard
    deviations are exceeded once in 10^15 batches. Rounded up to a multiple of 64 for equal chunks.
    """
    return min(B * L, 64 * math.ceil((L * (B + 1) / 2 + 8 * math.sqrt(B * L / 6)) / 64))


# ---------------------------------------------------------------------------------------------
# 3. EMA and learning rate
# ---------------------------------------------------------------------------------------------


class EMA:
    """Exponential moving average of parameters, kept as a copy that starts equal to them.

    decay_n = min(decay, (1 + n) / (10 + n)) after n updates, so that short runs are not ruled by
    their initial weights (as in MDLM). Buffers are not averaged: the networks here have none.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.names = [name for name, _ in model.named_parameters()]
        self.live = [p for _, p in model.named_parameters()]
        self.average = [p.detach().clone() for p in self.live]
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self.average, self.live, 1.0 - decay)

    @contextlib.contextmanager
    def swapped_in(self):
        """Within this block the model carries the averaged weights."""
        live = [p.detach().clone() for p in self.live]
        with torch.no_grad():
            torch._foreach_copy_(self.live, self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.live, live)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "params": dict(zip(self.names, self.average))}

    def load_state_dict(self, state: dict) -> None:
        if list(state["params"]) != self.names:
            raise RunError("the checkpoint's EMA does not belong to this model")
        self.updates = state["updates"]
        for mine, theirs in zip(self.average, state["params"].values()):
            mine.copy_(theirs)


def learning_rate(step: int, peak: float, warmup: int, schedule: str, steps: int) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then "constant", "cosine" down to 0, or
    "inverse_sqrt": peak * sqrt(warmup / step)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    if schedule == "inverse_sqrt":
        return peak * math.sqrt(max(1, warmup) / max(1, step))
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * done))


# ---------------------------------------------------------------------------------------------
# 4. Configuration: one dataclass, its fields are the flags
# ---------------------------------------------------------------------------------------------


def arg(
    default: Any, help: str, lo: float | None = None, hi: float | None = None,
    choices: Sequence[str] | None = None, fixed: bool = False,
) -> Any:
    """A dataclass field that is also a flag: help text, closed range [lo, hi], choices.

    `fixed` marks what defines the run: it cannot change when a checkpoint is resumed or sampled.
    """
    meta = dict(help=help, lo=lo, hi=hi, choices=choices, fixed=fixed)
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass
class RunConfig:
    """What every script needs; each script's Config adds its method."""

    mode: str = arg("train", "what to do", choices=("train", "sample", "eval", "bench"))
    out: str = arg("", "run folder (default runs/METHOD-DATASET)")
    data_dir: str = arg("data", "where datasets are, or are downloaded to")
    overwrite: bool = arg(False, "start anew although the run folder holds a checkpoint")
    seed: int = arg(0, "seed of data order, noise and initialisation", 0, 2**31 - 1, fixed=True)
    device: str = arg("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    compile: bool = arg(True, "torch.compile on CUDA")
    amp: str = arg("auto", "autocast: bf16, or none; auto is bf16 on CUDA",
                   choices=("auto", "bf16", "none"))
    minutes: float = arg(0.0, "stop training after so many minutes, over all resumes; 0: never",
                         0, 1e6)
    log_every: int = arg(50, "steps between lines of log.jsonl", 1, 10**9)
    save_every: int = arg(2000, "steps between checkpoints", 1, 10**9)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help explains every flag)\n")


def _flag_value(field: dataclasses.Field, text: str) -> Any:
    """Parse and check one flag's value; argparse turns the ValueError into a message."""
    kind = type(field.default)
    lo, hi, choices = (field.metadata[k] for k in ("lo", "hi", "choices"))
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of type {kind.__name__}") from None
    if choices is not None and value not in choices:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(map(str, choices))}")
    too_low = lo is not None and not value >= lo  # `not >=` also refuses nan
    if too_low or (hi is not None and value > hi):
        low, high = (x if isinstance(x, int) else f"{x:g}" for x in (lo, hi))
        raise argparse.ArgumentTypeError(f"{text} is out of range: {low} to {high}")
    return value


def parse_config(
    cls: type, method: str, doc: str, presets: dict[str, dict], argv: list[str] | None = None
) -> tuple[Any, set[str]]:
    """Command line -> config: dataclass defaults < the dataset's preset < flags.

    Returns the config and the names of the flags that were given. In modes sample and eval the
    checkpoint's own configuration takes the place of the preset. Presets are keyed by dataset;
    the key "path" serves folders. Exits with code 2 and one line on unknown or invalid flags.
    """
    parser = _Parser(
        prog=f"{method}.py", usage="%(prog)s [--FLAG VALUE ...]", description=doc,
        allow_abbrev=False,
        epilog="The dataset's row of PRESETS overrides these defaults, flags override both.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(cls):
        default = "" if field.default in ("", False) else f" (default {field.default})"
        kwargs: dict[str, Any] = dict(
            default=argparse.SUPPRESS,
            help=(field.metadata["help"] + default).replace("%", "%%"),
        )
        if type(field.default) is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif type(field.default) is tuple:  # two files
            kwargs |= dict(nargs=2, metavar=("SOURCE", "TARGET"))
        else:
            kwargs["type"] = lambda text, field=field: _flag_value(field, text)
            kwargs["metavar"] = (
                "{" + ",".join(map(str, field.metadata["choices"])) + "}"
                if field.metadata["choices"] else type(field.default).__name__.upper()
            )
        parser.add_argument(f"--{field.name}", **kwargs)
    given = vars(parser.parse_args(argv))
    dataset = given.get("dataset", next(f.default for f in dataclasses.fields(cls)
                                        if f.name == "dataset"))
    key = dataset if dataset in presets else "path"
    if key == "path" and not os.path.isdir(dataset) and not dataset.endswith(".npy"):
        names = ", ".join(k for k in presets if k != "path")
        raise RunError(f"unknown dataset {dataset!r}: choose one of {names}, or give a folder "
                       "with train.txt and valid.txt")
    cfg = cls(**{**presets[key], **given, "dataset": dataset})
    if not cfg.out:
        cfg.out = f"runs/{method}-{Path(dataset).resolve().name if key == 'path' else dataset}"
    if cfg.mode in ("sample", "eval"):
        saved = read_checkpoint(Path(cfg.out) / "checkpoint.pt", method)["config"]
        check_same_run(saved, given, cls)
        own = {f.name for f in dataclasses.fields(cls)}
        kept = {k: v for k, v in saved.items() if k in own and k not in ("mode", "out", "device")}
        cfg = cls(**{**kept, **given, "out": cfg.out})
    return cfg, set(given)


def check_same_run(saved: dict, wanted: dict, cls: type) -> None:
    """Refuse to continue a run with other values of the fields that define it."""
    for field in dataclasses.fields(cls):
        name = field.name
        if field.metadata["fixed"] and name in wanted and saved.get(name) != wanted[name]:
            raise RunError(
                f"this run was made with --{name} {saved.get(name)}, not {wanted[name]}: "
                "drop that flag, choose another --out, or start anew with --overwrite"
            )


# ---------------------------------------------------------------------------------------------
# 5. Processes, devices, noise
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Setup:
    """This process's place: rank of world, its device, its autocast context."""

    rank: int
    world: int
    device: torch.device
    amp: bool

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x over ranks, on the device, without waiting for it."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """True on every rank if it is on one (waits for all ranks)."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item() > 0)


def setup(cfg: RunConfig) -> Setup:
    """Device, precision and, under torchrun, the process group (nccl on GPUs, gloo on CPUs)."""
    cuda = torch.cuda.is_available() if cfg.device == "auto" else cfg.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise RunError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    amp = cfg.amp == "bf16" or (cfg.amp == "auto" and cuda)
    torch.manual_seed(cfg.seed)  # the same initial weights on every rank
    return Setup(rank, world, device, amp)


def micro_batches(batch_size: int, micro_batch: int, place: Setup) -> list[Tensor]:
    """This rank's sample indices within the global batch, one tensor per accumulation step.

    The global batch stays the same on any number of ranks: `micro_batch` is only the most that
    one device takes at once. Indices are interleaved, so that each micro-batch covers the whole
    range of low-discrepancy times. Raises RunError if the batch does not divide evenly.
    """
    if batch_size % place.world:
        raise RunError(f"--batch_size {batch_size} must be a multiple of the number of "
                       f"processes, {place.world}")
    share = batch_size // place.world
    parts = -(-share // micro_batch)
    while share % parts:
        parts += 1
    groups = parts * place.world
    return [torch.arange(k * place.world + place.rank, batch_size, groups) for k in range(parts)]


def mix(*numbers: int) -> int:
    """A 63-bit seed from integers (seed, step, sample, ...): near ones give unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def sample_normal(
    seed: int, step: int, index: Tensor, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Standard normal noise (B, *shape) for the samples `index` (B,) of a step's global batch.

    Each sample has a stream of its own, a function of (seed, step, its index), so the number of
    ranks and the micro-batch size change nothing and no rank draws another's share.
    """
    generator, base = torch.Generator(device), mix(seed, step, 2)
    out = torch.empty(len(index), *shape, device=device)
    for row, i in zip(out, index.tolist()):
        generator.manual_seed(base ^ (i * 0x9E3779B97F4A7C15 & 2**63 - 1))
        row.normal_(generator=generator)
    return out


# ---------------------------------------------------------------------------------------------
# 6. Checkpoints, logs, progress
# ---------------------------------------------------------------------------------------------


def write_checkpoint(path: Path, state: dict) -> None:
    """Save atomically: a crash or a full disk leaves the previous checkpoint as it was."""
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": "catdiff-1", **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        kept = "the previous checkpoint is intact" if path.exists() else "nothing was saved"
        raise RunError(f"could not save {path} ({error}): {kept}; free some disk space and run "
                       "the same command again") from error


def read_checkpoint(path: Path, method: str, device: str | torch.device = "cpu") -> dict:
    """Load a checkpoint of `method` with weights_only=True, or say what is wrong with it."""
    if not path.exists():
        raise RunError(f"no checkpoint at {path}: train first, or point --out at a run folder")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for truncated and foreign files
        raise RunError(f"{path} is truncated or not a checkpoint ({type(error).__name__}): "
                       "restore it from a copy, or start anew with --overwrite") from error
    if not isinstance(state, dict) or state.get("format") != "catdiff-1":
        raise RunError(f"{path} is not a checkpoint of this project")
    if state["method"] != method:
        raise RunError(f"{path} is a checkpoint of {state['method']}.py, not of {method}.py")
    return state


def load_weights(model: nn.Module, weights: dict, path: Path) -> None:
    """Strict loading; one line names the first differences."""
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise RunError(f"{path} does not fit this model: {detail}") from error


def rng_states(place: Setup) -> list[dict]:
    """The random state of every rank (for dropout: all other noise is a function of the step)."""
    mine = {"cpu": torch.get_rng_state()}
    if place.on_cuda:
        mine["cuda"] = torch.cuda.get_rng_state(place.device)
    if place.world == 1:
        return [mine]
    states: list[Any] = [None] * place.world
    dist.all_gather_object(states, mine)
    return states


def restore_rng(states: list[dict], place: Setup, step: int) -> None:
    """Exact on the same number of ranks; another layout starts fresh dropout streams."""
    if len(states) == place.world:
        torch.set_rng_state(states[place.rank]["cpu"].cpu())
        if place.on_cuda and "cuda" in states[place.rank]:
            torch.cuda.set_rng_state(states[place.rank]["cuda"].cpu(), place.device)
    else:
        torch.manual_seed(mix(step, place.rank))


def environment(place: Setup) -> dict:
    """Commit ($CATDIFF_COMMIT if set, else what git says), versions and hardware, for logs."""
    commit = os.environ.get("CATDIFF_COMMIT", "")
    git = ["git", "-C", str(Path(__file__).parent)]
    run = dict(capture_output=True, text=True, check=True, timeout=10)
    try:
        if not commit:
            commit = subprocess.run(git + ["rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
            status = git + ["status", "--porcelain", "--untracked-files=no"]
            commit += "+changes" if subprocess.run(status, **run).stdout.strip() else ""
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    if place.on_cuda:
        hardware = f"{place.world} x {torch.cuda.get_device_name(place.device)}"
    else:
        hardware = f"{place.world} x CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    return dict(commit=commit, python=platform.python_version(), torch=torch.__version__,
                hardware=hardware)


PEAK_BF16 = {  # dense bf16 FLOP/s by the vendor's data sheets, without sparsity
    "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12,
}


def utilisation(flops_per_s: float, place: Setup) -> float | None:
    """Model FLOP/s over the devices' peak, None where the peak is not known."""
    if not place.on_cuda or not place.amp:
        return None
    name = torch.cuda.get_device_name(place.device)
    peak = next((v for k, v in PEAK_BF16.items() if k in name), None)
    return flops_per_s / (peak * place.world) if peak else None


def write_json(path: Path, content: Any) -> None:
    """Indented JSON, atomically."""
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


class Progress:
    """Bar on the terminal and log.jsonl in the run folder; the first line says what ran."""

    def __init__(self, out: Path, place: Setup, start: dict, step: int, steps: int, keep: bool):
        self.place, self.bar, self.file = place, None, None
        if place.is_main:
            self.file = open(out / "log.jsonl", "a" if keep else "w")
            self.write({"start": start, "step": step})
            quiet = not sys.stderr.isatty()
            self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True,
                            mininterval=10 if quiet else 0.2)

    def write(self, record: dict) -> None:
        if self.file:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()

    def advance(self, step: int) -> None:
        if self.bar:
            self.bar.update(step - self.bar.n)

    def log(self, record: dict, shown: dict) -> None:
        """Append `record` to the log and show `shown` beside the bar."""
        self.write(record)
        if self.bar:
            self.bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        if self.bar:
            self.bar.close()
            self.file.close()


class StopRequest:
    """Ctrl-C and SIGTERM ask the loop to save and end; a second Ctrl-C ends at once."""

    def __init__(self):
        self.asked = False
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def run_main(main: Callable[[], None]) -> None:
    """Call main; a RunError (or a ValueError of data.py) becomes one line and exit code 1."""
    try:
        main()
    except (RunError, ValueError, FileNotFoundError) as error:
        if os.environ.get("CATDIFF_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
