"""catdm.py: schedule, loss, sampler and bound against exact small worlds; then whole runs."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cadd
import catdm
import common
from catdm import CATDM, Config, Denoiser, Translator
from common import DDP, RunError
from conftest import log_of
from data import PAD, DataError, load_dataset, load_pairs
from eval import PROBE_TIMES

CPU = DDP(0, 1, torch.device("cpu"), False)
T = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)

# ------------------------------------------------------------------------- schedule


def test_logsnr_is_the_papers_and_variance_is_preserved():
    want = torch.tensor([-2 * math.log(math.tan(math.pi * t / 2)) for t in T], dtype=T.dtype)
    assert torch.allclose(catdm.logsnr(T, 0.0), want, atol=1e-12)
    a, sigma = catdm.signal_and_noise(T, -1.3)
    assert torch.allclose(a**2 + sigma**2, torch.ones_like(T))
    assert torch.allclose((a**2 / sigma**2).log(), want - 1.3)
    z, eps = torch.randn(2, len(T), 5, 3, dtype=T.dtype)
    z_t = a[:, None, None] * z + sigma[:, None, None] * eps
    assert torch.equal(catdm.add_noise(z, T, eps, -1.3), z_t)  # in float64
    assert catdm.add_noise(z.float(), T, eps.float(), -1.3).dtype == torch.float32


def test_shift_adds_at_every_time_and_the_ends_are_finite():
    t = torch.tensor([0.0, 1e-6, 0.3, 1.0])
    for s in (-3.0, 2.0):
        assert torch.allclose(catdm.logsnr(t, s), catdm.logsnr(t, 0.0) + s)
    assert catdm.logsnr(t, -1.0)[[0, 3]].tolist() == [14.0, -16.0]
    assert torch.isfinite(torch.stack(catdm.signal_and_noise(t, -1.0))).all()


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_difformers_rescaling_is_the_shift(factor):
    """Eq. 8 of Difformer on the cosine's alpha-bar, which divides the SNR by F^2."""
    bar = catdm.signal_and_noise(T, 0.0)[0] ** 2
    rescaled = bar / (factor**2 - (factor**2 - 1) * bar)
    a, _ = catdm.signal_and_noise(T, -2 * math.log(factor))
    assert torch.allclose(a**2, rescaled, rtol=1e-10)


@pytest.mark.parametrize("shift", [0.0, -1.5])
def test_diffusion_weight_is_minus_half_the_derivative_of_the_snr(shift):
    snr, h = (lambda t: catdm.logsnr(t, shift).exp()), 1e-6
    slope = (snr(T + h) - snr(T - h)) / (2 * h)
    assert torch.allclose(catdm.diffusion_weight(T, shift), -slope / 2, rtol=1e-5)
    ends = torch.tensor([0.0, 1e-5, 1 - 1e-7, 1.0])
    assert (catdm.diffusion_weight(ends, shift) == 0).all()  # the clamp holds the SNR still


def test_time_of_inverts_the_schedule():
    for v in (-4.0, 0.0, 8.0):
        t = torch.tensor(catdm.time_of(v), dtype=torch.float64)
        assert catdm.logsnr(t, 0.0).item() == pytest.approx(v)


# ------------------------------------------------------------------------- a tiny world
# 3 symbols x 2 positions, a distribution with strong dependence between the positions.

V, L = 3, 2
WORLD = torch.tensor([[0.30, 0.02, 0.01], [0.03, 0.25, 0.04], [0.05, 0.10, 0.20]],
                     dtype=torch.float64)
STATES = torch.tensor(list(itertools.product(range(V), repeat=L)))  # (9, 2)
P = WORLD.flatten()
ENTROPY = -(P * P.log()).sum().item()
EMBEDDINGS = torch.tensor([[1.5, 0.0], [-0.5, 1.0], [-0.5, -1.0]], dtype=torch.float64)


class Oracle:
    """Stands in for Denoiser: the exact p(x | z_t) of the tiny world, by Bayes' rule."""

    V, length, classes = V, L, 0

    def __init__(self, prior=P, shift=-1.0, embeddings=EMBEDDINGS):
        self.cfg = Config(embed_dim=embeddings.shape[1], shift=shift)
        self.prior, self.embeddings = prior, embeddings

    def embedding_matrix(self):
        return self.embeddings

    def cond(self, y, not_pad):
        return (), torch.zeros(())

    head = torch.nn.Identity()

    def features(self, z, t, cond=()):
        return self(z, t, cond)

    def __call__(self, z, t, cond=()):
        a, sigma = (c[:, None, None] for c in catdm.signal_and_noise(t, self.cfg.shift))
        means = self.embeddings[STATES].flatten(1)                         # (9, L * D)
        gap = z.double().flatten(1)[:, None] - a * means
        log_p = self.prior.log() - 0.5 * gap.square().sum(-1) / sigma[..., 0] ** 2
        one_hot = F.one_hot(STATES, V).double()
        marginals = torch.einsum("bs,slv->blv", log_p.softmax(-1), one_hot)
        return marginals.clamp_min(1e-300).log()


class Guess(Oracle):
    """A denoiser that is wrong: random maps from z_t to logits, surer when there is less noise."""

    def __init__(self, seed=0, **kwargs):
        super().__init__(**kwargs)
        g = torch.Generator().manual_seed(seed)
        self.map = 2 * torch.randn(L * 2, L * V, generator=g, dtype=torch.float64)

    def __call__(self, z, t, cond=()):
        return super().__call__(z, t) + (z.double().flatten(1) @ self.map).view(-1, L, V)


def bounds(model, draws, end):
    """Bound on -log p(x) of all positions and its standard error for each of the nine states."""
    x = STATES.repeat_interleave(draws, 0)
    terms = catdm.likelihoods(model, iter([(x, None)]), 1, 0, end=end)
    values = L * terms[:, :3].sum(1).view(len(STATES), draws)
    return values.mean(1), values.std(1) / math.sqrt(draws)


@pytest.mark.parametrize("shift,end", [(-1.0, 15.0), (0.0, 6.0), (-1.0, 4.0)])
def test_bound_of_the_exact_posterior_is_the_entropy(shift, end):
    """For the true reverse process Eq. 2 is an equality on average, up to how x is decoded: at
    logsnr `end` each position by itself, which costs nothing once z_0 tells x. The naive error
    overstates: times are evenly spread, so two of it are plenty."""
    mean, error = bounds(Oracle(shift=shift), 8000, end)
    total, error = (P * mean).sum(), (P * error).square().sum().sqrt()
    assert error < 0.03 and total.item() == pytest.approx(ENTROPY, abs=2 * error.item())


@pytest.mark.parametrize("end", [5.0, 1.0, -1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_bounds_of_any_denoiser_sum_to_at_most_one(seed, end):
    """Wherever the diffusion ends, exp(-bound) is below a distribution."""
    mean, error = bounds(Guess(seed), 3000, end)
    p = (-mean).exp()
    assert p.sum() <= 1 + 4 * (p * error).square().sum().sqrt()


class Uniform(Oracle):
    """Every symbol is as likely as any other."""

    def __init__(self, V, D, shift=-1.0, scale=1.0):
        g = torch.Generator().manual_seed(0)
        super().__init__(None, shift, scale * torch.randn(V, D, generator=g, dtype=torch.float64))
        self.V = V

    def __call__(self, z, t, cond=()):
        return torch.zeros(*z.shape[:2], self.V)


@pytest.mark.parametrize("V,end,shift", [(2, 2.0, 0.0), (27, 4.0, -1.0), (27, 15.0, -9.0)])
def test_three_parts_of_the_bound_in_closed_form(V, end, shift):
    """A uniform prediction: ln V to decode, |e_x - mean|^2 / 2 times the fall of the SNR, and the
    Gaussian KL of z_1. 4,000 evenly spaced times stand for the expectation; text8 has V = 27."""
    D, n = 4, 4000
    model = Uniform(V, D, shift)
    x = (torch.arange(n) % V)[:, None].repeat(1, 3)
    not_pad = torch.ones_like(x, dtype=torch.bool)
    eps = torch.randn(n, 3, D, generator=torch.Generator().manual_seed(0))
    for v in (0, V - 1):  # one symbol at a time, at all times
        u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        if end == 15.0:  # the weight is steep there: evenly spaced in log-SNR instead
            edges = torch.linspace(-15, 15, n + 1, dtype=torch.float64)
            t = torch.tensor([catdm.time_of(float(e)) for e in (edges[1:] + edges[:-1]) / 2])
            t_0 = catdm.time_of(end)
            u = (t - t_0) / (1 - t_0)
        terms = catdm.bound_terms(model, torch.full_like(x, v), None, u, eps, eps, not_pad, end)
        e = model.embeddings
        snr = catdm.logsnr(torch.tensor([catdm.time_of(end), 1.0]), shift).exp()
        want = 0.5 * (snr[0] - snr[1]) * (e[v] - e.mean(0)).square().sum()
        if end == 15.0:
            width = 30 / n * torch.tensor([1 / (2 * math.pi / math.sin(math.pi * t)) for t in t])
            got = (terms[:, 2] / (1 - t_0) * width).sum()
        else:
            got = terms[:, 2].mean()
        assert got.item() == pytest.approx(want.item(), rel=2e-3)  # quadrature error
        assert torch.allclose(terms[:, 1], torch.full((n,), math.log(V), dtype=torch.float64))
        a, sigma = catdm.signal_and_noise(torch.ones(()), shift)
        q = torch.distributions.Normal(a * e[v], sigma)
        unit = torch.distributions.Normal(torch.zeros(D, dtype=torch.float64), 1.0)
        kl = torch.distributions.kl_divergence(q, unit).sum()
        assert torch.allclose(terms[:, 0], kl.expand(n), rtol=1e-6, atol=1e-12)


def test_bound_counts_real_tokens_only():
    model, x = Uniform(5, 2), torch.tensor([[0, 1, 2, 3], [4, 4, 4, 4]])
    not_pad = torch.tensor([[True, True, False, False], [True] * 4])
    noise = torch.randn(2, 4, 2)
    terms = catdm.bound_terms(model, x, None, torch.full((2,), 0.5), noise, noise, not_pad, 3.0)
    both = x[:1, :2].repeat(2, 1), not_pad[:1, :2].repeat(2, 1)
    short = catdm.bound_terms(model, both[0], None, torch.full((2,), 0.5), noise[:, :2],
                              noise[:, :2], both[1], 3.0)
    assert torch.allclose(terms[0], short[0])


# ------------------------------------------------------------------------- sampler


def test_ddim_recovers_z_s_when_the_prediction_is_the_truth():
    g = torch.Generator().manual_seed(0)
    z_0, eps = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    for s, t in [(0.0, 0.2), (0.3, 0.9), (0.5, 1.0)]:
        (a_t, sigma_t), (a_s, sigma_s) = (
            catdm.signal_and_noise(torch.tensor(v), -1.0) for v in (t, s))
        z_t, z_s = a_t * z_0 + sigma_t * eps, a_s * z_0 + sigma_s * eps
        assert torch.allclose(common.ddim(z_t, z_0, a_t, sigma_t, a_s, sigma_s), z_s, atol=1e-9)


@pytest.mark.parametrize("sampler,end", [("ancestral", 15.0), ("ddim", 15.0), ("ancestral", 4.0)])
def test_samples_of_the_exact_posterior_follow_the_world(sampler, end):
    """20,000 samples; the tolerance is 5 standard errors and what 64 steps leave. At log-SNR 4
    the tokens are all but certain already."""
    torch.manual_seed(0)
    n, model = 20_000, Oracle()
    model.cfg.logsnr_max = end
    for x in catdm.sample(model, (n, L), 64, sampler=sampler):
        pass
    freq = torch.bincount(x[:, 0] * V + x[:, 1], minlength=9) / n
    assert (freq - P).abs().max() < 5 * math.sqrt(0.3 * 0.7 / n) + 0.005


@pytest.mark.parametrize("end,t_0", [(15.0, 0.0), (0.0, 0.5)])
def test_ancestral_steps_use_the_general_posterior(monkeypatch, end, t_0):
    """One step by hand: Eq. 1 with the softmax-weighted embedding and the schedule's ends."""
    model, seen = Oracle(), []
    model.cfg.logsnr_max = end

    def record(z_t, z_0, *path):
        seen.append((z_t, z_0, path))
        return posterior(z_t, z_0, *path)
    posterior = common.gaussian_posterior
    monkeypatch.setattr(common, "gaussian_posterior", record)
    calls = list(catdm.sample(model, (4, L), 3))
    assert len(calls) == 4 and len(seen) == 3
    for k, (z_t, z_0, path) in enumerate(seen):
        t, s = 1 - k / 3 * (1 - t_0), 1 - (k + 1) / 3 * (1 - t_0)
        t, s = (torch.tensor(v, dtype=torch.float64).clamp_min(0) for v in (t, s))
        want = *catdm.signal_and_noise(t, -1.0), *catdm.signal_and_noise(s, -1.0)
        assert torch.allclose(torch.stack(path), torch.stack(want), atol=1e-7)
        p = model(z_t.float(), t.expand(4)).softmax(-1)
        assert torch.allclose(z_0, p @ EMBEDDINGS, atol=1e-6)
    a_t, sigma_t, a_s, sigma_s = seen[0][2]
    mean, var = posterior(*seen[0][:2], *seen[0][2])
    alpha, var_ts = a_t / a_s, sigma_t**2 - (a_t / a_s) ** 2 * sigma_s**2
    assert torch.allclose(mean, alpha * sigma_s**2 / sigma_t**2 * seen[0][0]
                          + a_s * var_ts / sigma_t**2 * seen[0][1])
    assert torch.allclose(var, var_ts * sigma_s**2 / sigma_t**2)


def test_the_last_call_draws_and_argmax_does_not():
    """A denoiser that never knows: drawn tokens are spread out, argmax takes the first."""
    model = Uniform(5, 2)
    model.length = 3
    torch.manual_seed(0)
    *_, drawn = catdm.sample(model, (2000, 3), 2)
    *_, best = catdm.sample(model, (2000, 3), 2, argmax=True)
    assert (best == 0).all()
    freq = torch.bincount(drawn.flatten()) / drawn.numel()
    assert (freq - 0.2).abs().max() < 5 * math.sqrt(0.16 / 6000)


def image_model(seed=0, classes=3, **flags):
    torch.manual_seed(seed)
    flags = dict(dim=8, heads=2, depth=2, dropout=0.0, embed_dim=4, init_std=0.4) | flags
    model = Denoiser(Config(dataset="glyphs", **flags), 5, 7, classes)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.eval()


def test_guidance_is_eq_4():
    model = image_model()
    z, y, t = torch.randn(6, 7, 4), torch.tensor([0, 1, 2] * 2), torch.tensor(0.4)
    plain = catdm.predict(model, z, t, (y,))
    with_y = model(z, t.expand(6), (y,)).double().log_softmax(-1)
    assert torch.allclose(plain, with_y) and torch.equal(
        plain, catdm.predict(model, z, t, (y,), guidance=0.0))
    null = model(z, t.expand(6), (torch.full_like(y, 3),)).double().log_softmax(-1)
    got = catdm.predict(model, z, t, (y,), guidance=1.5)
    want = (2.5 * with_y - 1.5 * null).exp()
    assert torch.allclose(got.exp(), want / want.sum(-1, keepdim=True), atol=1e-5)  # float32 model
    assert torch.allclose(got.logsumexp(-1), torch.zeros(6, 7, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("task", ["images", "pairs"])
def test_what_is_scored_or_drawn_has_a_float32_head(task):
    """Under autocast, with TF32 allowed, which comes back for what follows."""
    model = image_model() if task == "images" else pair_model().student.eval()
    h, seen = torch.randn(6, 7, model.head.in_features), []
    model.features = lambda *_: h.bfloat16() if task == "images" else h
    model.head.register_forward_hook(
        lambda *_: seen.append(torch.get_float32_matmul_precision()))
    exact = h.bfloat16().float() if task == "images" else h
    want = F.linear(exact, model.head.weight, model.head.bias).log_softmax(-1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", torch.bfloat16):
        log_p = catdm.predict(model, torch.zeros(6, 7, 4), torch.tensor(0.5), ())
    assert torch.get_float32_matmul_precision() == "high" and seen == ["highest"]
    torch.set_float32_matmul_precision(before)
    assert torch.allclose(log_p, want.double(), atol=1e-5)  # bfloat16 would miss by 1e-2


# ------------------------------------------------------------------------- network


@pytest.mark.parametrize("flags,V,classes,millions", [
    ({}, 1024, 0, 56.1), (dict(dim=768, depth=24, heads=16), 1024, 1000, 246.4)])
def test_published_parameter_counts(flags, V, classes, millions):
    with torch.device("meta"):
        model = Denoiser(Config(dataset="ffhq", **flags), V, 256, classes)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_presets_have_the_published_sizes():
    get = lambda name: Config(dataset=name, **catdm.PRESETS[name])  # noqa: E731
    assert (get("ffhq").dim, get("ffhq").depth, get("ffhq").heads) == (512, 15, 8)
    assert (get("imagenet").dim, get("imagenet").depth, get("imagenet").heads) == (768, 24, 16)
    assert (get("text8").dim, get("text8").depth, get("text8").batch_size) == (768, 12, 512)


def test_presets_name_fields_and_train_like_cadd():
    fields = {f.name for f in dataclasses.fields(Config)}
    for name, row in catdm.PRESETS.items():
        assert set(row) <= fields, name
        Config(**row)
    own, other = (Config(**catdm.PRESETS["english27"]), cadd.Config(**cadd.PRESETS["english27"]))
    for name in ("length", "dim", "depth", "heads", "dropout", "steps", "batch_size", "lr", "ema",
                 "lr_schedule", "warmup", "beta2", "weight_decay", "clip"):
        assert getattr(own, name) == getattr(other, name), name


@pytest.mark.parametrize("init,std", [("std", 256**-0.5), ("variance", 256**-0.25)])
def test_embedding_initialisation(init, std):
    model = Denoiser(Config(dataset="ffhq", dim=8, heads=2, depth=1, embed_init=init), 500, 4)
    assert model.embedding_matrix().std().item() == pytest.approx(std, rel=0.02)  # 128,000 draws


def test_l2_norm_and_frozen_embeddings(tmp_path):
    table = image_model(l2_norm=2.5).embedding_matrix()
    assert torch.allclose(table.norm(dim=-1), torch.full((5,), 2.5))
    rows = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    np.save(tmp_path / "e.npy", rows)
    flags = dict(dim=8, heads=2, depth=1, embed_dim=4, embeddings=str(tmp_path / "e.npy"))
    model = Denoiser(Config(dataset="glyphs", **flags), 5, 7)
    assert np.array_equal(model.embedding_matrix().numpy(), rows)
    assert not model.embed.weight.requires_grad
    with pytest.raises(RunError, match=r"shape \(5, 4\), this model needs \(6, 4\)"):
        Denoiser(Config(dataset="glyphs", **flags), 6, 7)
    (tmp_path / "e.npy").unlink()  # to sample, the checkpoint is enough
    later = Denoiser(Config(dataset="glyphs", mode="sample", **flags), 5, 7)
    later.load_state_dict(model.state_dict())
    assert torch.equal(later.embedding_matrix(), model.embedding_matrix())


def test_class_and_time_reach_the_network_only_through_their_layers():
    model = image_model(dropout=0.5)  # which an evaluation does not see
    z, t, y = torch.randn(2, 7, 4), torch.tensor([0.2, 0.2]), torch.tensor([0, 0])
    base = model(z, t, (y,))
    assert not torch.allclose(base, model(z, t, (y + 1,)))
    assert not torch.allclose(base, model(z, t + 0.3, (y,)))
    assert not torch.allclose(base, model(z.flip(1), t, (y,)).flip(1))  # positions matter
    for block in model.net.blocks:
        for layer in (block.by_time, block.by_label):
            torch.nn.init.zeros_(layer.weight)
    assert torch.allclose(model(z, t, (y,)), model(z, t + 0.3, (y + 1,)))


@pytest.mark.parametrize("classes", [0, 3])
def test_image_block_follows_appendix_a(classes):
    """h + attention(AdaLN(h, t)), then + MLP(AdaLN(h, y)), or of a plain layer norm."""
    torch.manual_seed(0)
    block = catdm.ImageBlock(8, 2, classes, 0.0)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.5)
    h, time, y = torch.randn(4, 5, 8), torch.randn(4, 8), torch.tensor([0, 2, 3, 1])

    def norm(h):
        h = h - h.mean(-1, keepdim=True)
        return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def adaln(h, layer, condition):
        out = condition @ layer.weight.T + layer.bias
        return (1 + out[:, None, :8]) * norm(h) + out[:, None, 8:]
    x = adaln(h, block.by_time, time)
    want = h + block.attention(x, x)
    if classes:
        label = block.label.weight[y]
        x = adaln(want, block.by_label, label * label.sigmoid())
    else:
        x = norm(want) * block.norm.weight + block.norm.bias
    want = want + block.mlp(x)
    assert torch.allclose(block(h, time, y if classes else None), want, atol=1e-4)


def test_heads_must_divide_the_width():
    with pytest.raises(RunError, match="even multiple of --heads"):
        Denoiser(Config(dim=10, heads=3), 5, 7)


# ------------------------------------------------------------------------- loss


def tiny(seed=0, dataset="glyphs", classes=3, **flags):
    """A random model whose teacher differs from the student, so that mixing them up shows."""
    torch.manual_seed(seed)
    flags = dict(dim=8, heads=2, depth=1, dropout=0.0, embed_dim=4, length=7) | flags
    model = CATDM(Denoiser(Config(dataset=dataset, **flags), 5, 7, classes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def tiny_batch(seed=0, B=6, n=3, length=7, D=4):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randint(5, (B, length), generator=g), torch.randint(3, (B,), generator=g)
    t = common.low_discrepancy_t(torch.arange(B), B, 0.3, 0.0)
    u = torch.rand(B, length + 3, generator=g)
    eps, eps0 = (torch.randn(b, length, D, generator=g) for b in (B, n))
    return catdm.Batch(x, y, t, u, eps, eps0, torch.ones_like(x, dtype=torch.bool))


def reference_loss(model, x, y, t, u, eps, eps0, *_):
    """Algorithm 1 one sample at a time, written from the paper; returns (L_0, the rest)."""
    cfg, student, teacher = model.cfg, model.student, model.teacher
    E, E_bar = student.embedding_matrix(), teacher.embedding_matrix().detach()

    def coef(t):
        snr = math.exp(max(-15, min(15, -2 * math.log(math.tan(math.pi * t / 2)))) + cfg.shift)
        return math.sqrt(snr / (1 + snr)), math.sqrt(1 / (1 + snr))
    # where logsnr_max is reached: 15 is t = 0
    end = 2 / math.pi * math.atan(math.exp(-cfg.logsnr_max / 2)) if cfg.logsnr_max < 15 else 0.0
    first = rest = 0.0
    for i in range(len(x)):
        label = y[i:i + 1] if u[i, -1] >= cfg.null_labels else torch.tensor([3])
        ti = end + (1 - end) * t[i].item()
        share = {"fixed": cfg.drop, "rand_drop": u[i, 7].item(), "linear": ti}[cfg.dropping]
        keep = (u[i, :7] >= share).float()[:, None] if cfg.drop else torch.ones(7, 1)
        gone = student.dropped if cfg.dropped == "learned" else torch.zeros(4)
        a_t, sigma_t = coef(ti)
        z_t = a_t * (E[x[i]] * keep + gone * (1 - keep)) + sigma_t * eps[i]
        log_p = student(z_t[None], torch.tensor([ti]), (label,))[0].log_softmax(-1)
        z_hat = log_p.exp() @ E
        dm = (E[x[i]] - z_hat).square().sum()
        s = end + (ti - end) * u[i, 8].item()
        a_s, sigma_s = coef(s)
        z_s = (a_s * E_bar[x[i]] + sigma_s / sigma_t * (z_t - a_t * E_bar[x[i]])).detach()
        q = teacher(z_s[None], torch.tensor([s]), (label,))[0].log_softmax(-1).detach()
        cm = {"cm": F.kl_div(log_p, q, reduction="sum", log_target=True),
              "ce": F.nll_loss(log_p, x[i], reduction="sum"), "none": 0.0}[cfg.cm]
        rest = rest + cfg.beta_dm * dm + cfg.beta_cm * cm
        if i < len(eps0):
            a_0, sigma_0 = coef(end or 1e-9)
            z_0 = a_0 * E[x[i]] + sigma_0 * eps0[i]
            first = first + F.cross_entropy(student(z_0[None], torch.tensor([end]), (label,))[0],
                                            x[i], reduction="sum")
    return first, rest


@pytest.mark.parametrize("flags", [
    {}, {"cm": "ce"}, {"cm": "none"}, {"dropping": "rand_drop"}, {"dropping": "linear"},
    {"drop": 0.0}, {"dropped": "learned", "drop": 0.5}, {"shift": 0.7}, {"l2_norm": 1.5},
    {"beta_dm": 0.3, "beta_cm": 2.0}, {"null_labels": 0.6}, {"logsnr_max": 0.5}])
def test_loss_and_all_gradients_follow_algorithm_1(flags):
    """Gradients reach the embeddings through z_t, both sides of L_DM and L_0, never through z_s:
    the reference detaches z_s and the teacher, and nothing else."""
    model, batch = tiny(**flags), tiny_batch()
    losses, _ = model(*batch)
    first, rest = reference_loss(model, *batch)
    assert losses[0].item() == pytest.approx(first.item(), rel=1e-4)
    assert losses[1].item() == pytest.approx(rest.item(), rel=1e-4)
    grads = []
    for loss in (losses[0] + 0.7 * losses[1], first + 0.7 * rest):
        model.zero_grad()
        loss.backward()
        grads.append({k: p.grad for k, p in model.student.named_parameters()})
        assert all(p.grad is None for p in model.teacher.parameters())
    for name, g in grads[0].items():
        other = grads[1][name]
        assert (g is None) == (other is None), name
        if g is not None:
            assert (g - other).norm() < 2e-3 * other.norm() + 1e-5, name  # float32


@pytest.mark.parametrize("path", ["recon", "input", "target"])
def test_gradient_reaches_the_embeddings_by_each_path(path):
    """One path at a time is opened, the others are cut."""
    model, batch = tiny(cm="none", beta_dm=1.0, drop=0.0), tiny_batch()
    student = model.student
    if path == "input":  # blind to z_t: what is left of the rest is both sides of L_DM
        pass
    else:
        torch.nn.init.zeros_(student.enter.weight)
    if path == "recon":
        torch.nn.init.normal_(student.enter.weight)
    losses, _ = model(*batch)
    losses[0 if path == "recon" else 1].backward()
    assert student.embed.weight.grad.abs().sum() > 1e-3


def test_consistency_loss_is_zero_iff_the_predictions_agree():
    model, batch = tiny(), tiny_batch()
    model.teacher.load_state_dict(model.student.state_dict())
    for part in (model.student, model.teacher):  # a prediction that depends on nothing
        torch.nn.init.zeros_(part.head.weight)
    _, stats = model(*batch)
    assert stats["L_CM"].abs().max() < 1e-5 and stats["ce"].sum() > 1
    with torch.no_grad():
        model.teacher.head.bias[0] += 0.5
    _, stats = model(*batch)
    q, p = (m.head.bias.softmax(-1) for m in (model.teacher, model.student))
    want = (q * (q / p).log()).sum().item()
    total = want * stats["count"].sum().item()
    assert stats["L_CM"].sum().item() == pytest.approx(total, rel=1e-4)


def test_the_teacher_sees_the_later_time_through_its_own_embeddings():
    model, (x, y, t, u, eps, eps0, not_pad, _) = tiny(drop=0.0), tiny_batch()
    seen = {}
    for name in ("student", "teacher"):
        net = getattr(model, name)
        forward = net.forward
        net.forward = lambda z, t, cond, name=name, forward=forward: (
            seen.__setitem__(name, (z, t)), forward(z, t, cond))[1]
    model(x, y, t, u, eps, eps0, not_pad)
    (z_t, times), (z_s, s) = seen["student"], seen["teacher"]
    assert torch.equal(times, torch.cat([t, torch.zeros(3)])) and torch.equal(s, u[:, -2] * t)
    assert ((s <= t) & (s >= 0)).all() and not z_s.requires_grad
    # on the line: z_s - a_s e-bar is sigma_s / sigma_t times z_t - a_t e-bar
    e = model.teacher.embedding_matrix()[x]
    (a_t, sigma_t), (a_s, sigma_s) = (
        [c.float()[:, None, None] for c in catdm.signal_and_noise(v, -1.0)] for v in (t, s))
    assert torch.allclose((z_s - a_s * e) * sigma_t, (z_t[:6] - a_t * e) * sigma_s, atol=1e-5)


@pytest.mark.parametrize("dropping", ["fixed", "rand_drop", "linear"])
def test_dropping_rates(dropping):
    """Dropped tokens enter as zero plus noise; 6,000 samples of 7, five standard errors."""
    model = tiny(dropping=dropping, drop=0.2, cm="none")
    B, seen = 6000, {}
    g = torch.Generator().manual_seed(1)
    x, y = torch.randint(5, (B, 7), generator=g), torch.zeros(B, dtype=torch.long)
    t = common.low_discrepancy_t(torch.arange(B), B, 0.3, 0.0)
    u = torch.rand(B, 10, generator=g)
    net, forward = model.student, model.student.forward
    net.forward = lambda z, t, cond: (seen.__setitem__("z", z), forward(z, t, cond))[1]
    with torch.no_grad():
        model(x, y, t, u, torch.zeros(B, 7, 4), torch.zeros(1, 7, 4), x >= 0)
    gone = (seen["z"][:B] == 0).all(-1)
    a, _ = catdm.signal_and_noise(t, -1.0)
    kept = a.float()[:, None, None] * net.embedding_matrix()[x]
    assert torch.allclose(seen["z"][:B][~gone], kept[~gone]) and not (seen["z"][B:] == 0).any()
    rate, share = gone.float().mean(1), {"fixed": 0.2, "rand_drop": u[:, 7], "linear": t}[dropping]
    assert abs(gone.float().mean() - torch.as_tensor(share).mean()) < 5 * 0.5 / math.sqrt(7 * B)
    if dropping != "fixed":
        high = share > 0.7
        assert rate[high].mean() > 0.8 and rate[share < 0.3].mean() < 0.2


def test_labels_are_hidden_at_the_given_rate():
    model, seen = tiny(null_labels=0.1, cm="none"), {}
    net, forward = model.student, model.student.forward
    net.forward = lambda z, t, cond: (seen.__setitem__("y", cond[0]), forward(z, t, cond))[1]
    B = 4000
    u = torch.rand(B, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(torch.zeros(B, 7).long(), torch.full((B,), 2), torch.full((B,), 0.5), u,
              torch.zeros(B, 7, 4), torch.zeros(1, 7, 4), torch.ones(B, 7, dtype=torch.bool))
    hidden = seen["y"][:B] == 3
    assert torch.equal(hidden, u[:, -1] < 0.1) and (seen["y"][:B][~hidden] == 2).all()
    assert abs(hidden.float().mean() - 0.1) < 5 * math.sqrt(0.09 / B)


@pytest.mark.parametrize("end", [15.0, 1.0])
def test_csdm_is_the_bound(end):
    """With the same noise the loss is bound_terms summed over tokens; nothing is dropped."""
    model = tiny(objective="csdm", null_labels=0.0, logsnr_max=end)
    x, y, t, u, eps, _, not_pad, _ = tiny_batch()
    eps0 = torch.randn(6, 7, 4, generator=torch.Generator().manual_seed(3))
    losses, stats = model(x, y, t, u, eps, eps0, not_pad)
    terms = catdm.bound_terms(model.student, x, y, t, eps, eps0, not_pad, end)
    want = 7 * terms.sum(0)
    assert losses[0].item() == pytest.approx(want[1].item(), rel=1e-4)
    assert losses[1].item() == pytest.approx((want[0] + want[2]).item(), rel=1e-3)
    assert not stats["L_CM"].any() and stats["L_DM"].sum() > 0


def test_csdm_pays_for_the_prior():
    """One symbol is predicted perfectly: KL(N(a_1 e, sigma_1^2) || N(0, 1)) is all that is left."""
    model = CATDM(Denoiser(Config(dataset="pydoc", objective="csdm", shift=12.0, dim=8, heads=2,
                                  depth=1, dropout=0.0, embed_dim=4), 1, 7))
    x, _, t, u, eps, eps0, not_pad, _ = tiny_batch()
    losses, _ = model(0 * x, None, t, u, eps, eps0, not_pad)
    a, sigma = catdm.signal_and_noise(torch.ones(()), 12.0)
    q = torch.distributions.Normal(a * model.student.embedding_matrix().double()[0], sigma)
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum()
    assert losses[0] == 0 and losses[1].item() == pytest.approx(x.numel() * kl.item(), rel=1e-5)


@pytest.mark.parametrize("task", ["images", "pairs"])
def test_a_step_descends_the_mean_per_token(data_dir, tmp_path, monkeypatch, task):
    """One step of `train` against the loss written out: L_0 over its own tokens, the rest over
    all, of translations the length loss over sentences."""
    flags = [*TINY, *(images_of(data_dir) if task == "images" else PAIRS), "--recon_share", "0.5",
             "--clip", "1e6", "--steps", "1", "--lr", "1", "--warmup", "0", "--out", str(tmp_path),
             "--weight_decay", "0.1"]
    cfg, seen = common.parse_config(catdm, flags), {}
    data = catdm.load(cfg)
    torch.manual_seed(0)
    model = CATDM(catdm.build(cfg, data))
    [batch] = catdm.load_batches(cfg, data, 0, CPU)
    B = len(batch.x)
    n, tokens = -(-B // 2), (batch.x != (PAD if task == "pairs" else -1)).sum(1)
    assert len(batch.eps0) == n and (task == "pairs" or tokens.tolist() == [9] * 8)
    losses, _ = model(*batch)
    loss = losses[0] / tokens[:n].sum() + losses[1] / tokens.sum() + 0.1 * losses[2] / B
    loss.backward()
    want = {k: p.detach() - p.grad for k, p in model.student.named_parameters()
            if p.grad is not None}

    def sgd(groups, lr, weight_decay, **_):
        seen["groups"], seen["decay"] = groups, weight_decay
        return torch.optim.SGD([p for group in groups for p in group["params"]], lr=1.0)
    monkeypatch.setattr(torch.optim, "AdamW", sgd)
    torch.manual_seed(0)
    student = catdm.train(cfg, CPU, data).ema.model
    decay = {id(p): g.get("weight_decay", seen["decay"]) for g in seen["groups"]
             for p in g["params"]}
    assert decay.pop(id(student.embed.weight)) == 0.0 and set(decay.values()) == {cfg.weight_decay}
    for name, p in student.named_parameters():
        assert name not in want or torch.allclose(p, want[name], atol=1e-5), name


def test_padding_carries_no_loss():
    batch = tiny_batch()._replace(y=None)
    batch.x[:, 4:] = 4
    padded = batch._replace(not_pad=batch.x != 4)
    assert padded.counts().tolist() == [(batch.x[:3] != 4).sum(), (batch.x != 4).sum(), 6]
    for objective in ("catdm", "csdm"):
        model = tiny(dataset="pydoc", classes=0, objective=objective)
        losses, stats = model(*padded)
        assert stats["count"].sum() == (batch.x != 4).sum()
        assert stats["L_0_tokens"] == (batch.x[:3] != 4).sum()
        assert (losses[:2] < model(*batch)[0][:2]).all()


@pytest.mark.parametrize("flags", [
    {"objective": "csdm"}, {"cm": "ce"}, {"cm": "none"}, {"beta_cm": 0.5}, {"beta_dm": 0.5},
    {"shift": 0.0}, {"drop": 0.0}, {"dropping": "linear"}, {"dropping": "rand_drop"},
    {"l2_norm": 1.0}, {"null_labels": 0.9}, {"dropped": "learned"}])
def test_every_option_changes_the_loss(flags):
    loss = lambda f: tiny(**f)(*tiny_batch())[0].sum().item()  # noqa: E731
    assert loss(flags) != pytest.approx(loss({}), rel=1e-6)


@pytest.mark.parametrize("flags", ["images", "text", "pairs"])
def test_the_teacher_of_a_training_drops_nothing(run, monkeypatch, flags):
    """In the loop, where the student has dropout."""
    modes, consistency = [], CATDM.consistency

    def spy(self, *args):
        if torch.is_grad_enabled():  # not for the valid loss
            modes.append([{m.training for m in net.modules()}
                          for net in (self.student, self.teacher)])
        return consistency(self, *args)
    monkeypatch.setattr(CATDM, "consistency", spy)
    monkeypatch.setattr(catdm, "evaluate", lambda *_: {})
    monkeypatch.setattr(catdm, "draw", lambda *_, **__: {})
    run(2, *{"images": [], "text": TEXT, "pairs": PAIRS}[flags], "--dropout", "0.5")
    assert modes == [[{True}, {False}]] * 2


def test_teacher_is_an_average_without_dropout_and_without_gradient():
    model = tiny(dropout=0.5, teacher=0.9).train()
    assert not model.teacher.training and model.student.training
    for step, eta in [(10**6, 0.9), (2, 0.25)]:
        before = [p.clone() for p in model.teacher.parameters()]
        model.update_teacher(step)
        for old, new, live in zip(before, model.teacher.parameters(), model.student.parameters()):
            want = eta * old + (1 - eta) * live
            assert torch.allclose(new, want, atol=1e-6) and not new.requires_grad


# ------------------------------------------------------------------------- translation


def pair_model(seed=0, **flags):
    torch.manual_seed(seed)
    flags = dict(dim=8, heads=2, depth=1, ffn=16, dropout=0.0, embed_dim=4, init_std=0.3) | flags
    return CATDM(Translator(Config(dataset="numbers", length=16, **flags), 9, 16))


def pair_batch(self_condition, n=3):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(3, 9, (4, 5), generator=g), torch.randint(3, 9, (4, 6), generator=g)
    x[0, 4] = y[1, 5] = PAD
    t, u = torch.rand(4, generator=g), torch.rand(4, 8, generator=g)
    eps, eps0 = torch.randn(4, 5, 4, generator=g), torch.randn(n, 5, 4, generator=g)
    return catdm.Batch(x, y, t, u, eps, eps0, x != PAD, self_condition)


def test_padding_of_source_and_target_changes_nothing():
    model = pair_model()
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(3, 9, (4, 5), generator=g), torch.randint(3, 9, (4, 6), generator=g)
    t, u = torch.rand(4, generator=g), torch.rand(4, 8, generator=g)
    eps, eps0 = torch.randn(4, 5, 4, generator=g), torch.randn(4, 5, 4, generator=g)
    losses, _ = model(x, y, t, u, eps, eps0, x != PAD)
    wide = [F.pad(a, (0, 0, 0, 3)) for a in (eps, eps0)]
    u = torch.cat([F.pad(u[:, :5], (0, 3)), u[:, 5:]], 1)
    x = F.pad(x, (0, 3), value=PAD)
    padded, _ = model(x, F.pad(y, (0, 2), value=PAD), t, u, *wide, x != PAD)
    assert torch.allclose(losses, padded, rtol=1e-4)
    # the length loss is the cross-entropy of length differences, here 5 - 6
    states = F.embedding(y, model.student.embedding_matrix())
    _, logits = model.student.net.encode(states, y != PAD)
    want = F.cross_entropy(logits, torch.full((4,), common.LENGTH_OFFSET - 1), reduction="sum")
    assert losses[2].item() == pytest.approx(want.item(), rel=1e-5)


SELF = dict(self_condition=True, drop=0.0, beta_dm=0.5)


def self_conditioned(**flags):
    """A model whose teacher differs from the student, so that mixing them up shows."""
    model, other = (pair_model(seed, **SELF | flags) for seed in (0, 1))
    model.teacher.load_state_dict(other.student.state_dict())
    return model


@pytest.mark.parametrize("coin", [False, True])
def test_self_conditioned_loss_and_all_gradients(coin):
    """Three predictions, each on its own first estimate, or on zeros: the student's of z_t and of
    z_0, the teacher's of z_s. No gradient passes through an estimate."""
    model, batch = self_conditioned(), pair_batch(coin)
    x, y, t, u, eps, eps0, not_pad, _ = batch
    E, E_bar = model.student.embedding_matrix(), model.teacher.embedding_matrix().detach()
    calls = []

    def log_p(net, w, z, t, rows):
        source_not_pad = y[:rows] != PAD
        states, _ = net.net.encode(F.embedding(y[:rows], w), source_not_pad)

        def call(previous):
            calls.append(previous)
            return net.head(net.net.decode(z, t, previous, not_pad[:rows], states,
                                           source_not_pad)).log_softmax(-1)
        previous = torch.zeros_like(z)
        return call((call(previous).exp() @ w).detach() if coin else previous)

    def noisy(w, t, eps):
        return catdm.add_noise(F.embedding(x[:len(eps)], w), t, eps, -1.0)
    z_t, s = noisy(E, t, eps), t * u[:, 6]
    (a_t, sigma_t), (a_s, sigma_s) = (catdm.coefficients(v, -1.0) for v in (t, s))
    z_bar = F.embedding(x, E_bar)
    z_s = (a_s * z_bar + sigma_s / sigma_t * (z_t - a_t * z_bar)).detach()
    p, p0 = log_p(model.student, E, z_t, t, 4), log_p(
        model.student, E, noisy(E, torch.zeros(3), eps0), torch.zeros(3), 3)
    q = log_p(model.teacher, E_bar, z_s, s, 4).detach()
    dm = (E[x] - p.exp() @ E).square().sum(-1)
    want = torch.stack([
        (catdm.cross_entropy(p0, x[:3]) * not_pad[:3]).sum(),
        ((0.5 * dm + (q.exp() * (q - p)).sum(-1)) * not_pad).sum(),
        model.student.cond(y, not_pad)[1]])
    losses, grads = model(*batch)[0], []
    assert torch.allclose(losses, want, rtol=1e-4)
    for loss in (losses, want):
        model.zero_grad()
        (loss * torch.tensor([1.0, 0.7, 0.1])).sum().backward()
        grads.append({name: p.grad for name, p in model.student.named_parameters()})
    for name, g in grads[0].items():
        assert (g - grads[1][name]).norm() < 2e-3 * g.norm() + 1e-5, name
    assert len(calls) == 3 * (1 + coin) and all(c.any() for c in calls[1::2]) == coin


@pytest.mark.parametrize("coin", [False, True])
def test_the_estimate_enters_by_weights_of_its_own_alone(coin):
    """Where the layer that joins z_t and the estimate passes z_t on, the loss on zeros is that of
    the network without that layer, whatever the estimate's own weights."""
    model, plain = (pair_model(self_condition=on) for on in (True, False))
    for part in ("student", "teacher"):
        net, other = getattr(model, part), getattr(plain, part)
        other.load_state_dict({k: v for k, v in net.state_dict().items() if "previous" not in k})
        join, _, out, _ = net.net.previous
        with torch.no_grad():  # relu(h + 9) - 9 is h
            join.weight[:, :8], join.bias[:], out.weight[:], out.bias[:] = (
                torch.eye(8), 9.0, torch.eye(8), -9.0)
    losses, want = model(*pair_batch(coin))[0], plain(*pair_batch(False))[0]
    assert torch.allclose(losses, want, rtol=1e-4) != coin


@pytest.mark.parametrize("coin", [False, True])
def test_consistency_is_of_one_function(coin):
    """A teacher that is the student, at the same time (s = t), has the same prediction."""
    model = pair_model(**SELF)
    batch = pair_batch(coin)
    batch.u[:, 6] = 1.0
    assert model(*batch)[1]["L_CM"].sum().abs() < 1e-5
    batch.u[:, 6] = 0.5
    assert model(*batch)[1]["L_CM"].sum() > 1e-3


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_decoding_sees_the_previous_estimate(monkeypatch, sampler):
    """Zeros in the first call of each batch, then sum_k P(k) Psi(k) of the call before."""
    data = load_pairs("numbers", max_length=16, vocab=400, max_number=99)
    cfg = Config(dataset="numbers", dim=8, heads=2, depth=1, ffn=16, dropout=0.0, embed_dim=4,
                 init_std=0.3, length=16, sample_batch=1, sample_steps=3, sampler=sampler,
                 self_condition=True)
    model, given, found = Translator(cfg, data.vocab_size, 16).eval(), [], []
    decode, predict = model.net.decode, catdm.predict
    model.net.decode = lambda z, t, previous, *rest: (
        given.append(previous), decode(z, t, previous, *rest))[1]
    monkeypatch.setattr(
        catdm, "predict", lambda *args: (found.append(predict(*args)), found[-1])[1])
    assert len(list(catdm.translate(model, ["eins", "zweiundzwanzig"], data, cfg, CPU))) == 2
    assert len(given) == len(found) == 2 * 4
    w = model.embedding_matrix().double()
    for k in range(8):
        want = found[k - 1].exp() @ w if k % 4 else torch.zeros(given[k].shape).double()
        assert torch.allclose(given[k].double(), want, atol=1e-6) and given[k].any() == (k % 4 > 0)


def test_the_coin_is_of_seed_and_step_alone():
    """The same on any number of ranks, in every micro-batch and for held-out pairs; it changes no
    other noise. Half of the steps estimate twice, none without the flag."""
    data = load_pairs("numbers", max_length=32, vocab=400, max_number=99)
    cfg = Config(dataset="numbers", batch_tokens=256, micro_tokens=48, embed_dim=2,
                 self_condition=True)

    def coins(rank=0, world=1, data=data, **flags):
        ddp = DDP(rank, world, torch.device("cpu"), False)
        parts = [catdm.load_batches(dataclasses.replace(cfg, **flags), data, step, ddp)
                 for step in range(40)]
        kinds = [{part.self_condition for part in step} for step in parts]
        assert all(len(kind) == 1 for kind in kinds)
        assert {type(part.self_condition) for step in parts for part in step} == {bool}
        return [kind.pop() for kind in kinds], parts
    one, parts = coins()
    assert 10 < sum(one) < 30 and all(len(step) > 1 for step in parts)
    assert one == coins(0, 2)[0] == coins(1, 2)[0] == coins(data=data.held_out())[0]
    assert one != coins(seed=1)[0]
    none, plain = coins(self_condition=False)
    assert not any(none)
    for a, b in zip(parts, plain):
        assert all(map(torch.equal, a[0][:7], b[0][:7]))
    t = torch.cat([part.t for part in parts[0]])  # the noise of runs that knew no coin
    shift = np.random.default_rng(common.fold_in(0, 0, 1)).random()
    want = common.low_discrepancy_t(torch.arange(len(t)), len(t), shift, 0.0)
    assert torch.equal(t.sort().values, want.sort().values)


def test_only_translation_has_self_conditioning(data_dir):
    cfg = common.parse_config(catdm, [*TINY, *images_of(data_dir), "--self_condition"])
    with pytest.raises(RunError, match="--self_condition is for translation"):
        catdm.build(cfg, catdm.load(cfg))
    student = pair_model(recon_share=0.5).student  # forward, backward: 4.5 calls; the teacher one
    before, student.cfg.self_condition = catdm.flops_per_token(student), True
    assert catdm.flops_per_token(student) == pytest.approx(before * (1 + (0.75 + 0.5) / 5.5))


def test_a_run_older_than_self_conditioning_is_used_as_it_is(run, capsys):
    """Sampled and scored without it, continued where it is not asked for."""
    out = run(3, *PAIRS, "--no-self_condition")
    state = weights(out)
    del state["config"]["self_condition"]
    torch.save(state, out / "checkpoint.pt")
    for mode in ("sample", "eval"):
        run(3, *PAIRS, "--mode", mode)
    with pytest.raises(RunError, match="made with --self_condition False, not True"):
        run(4, *PAIRS, "--self_condition")
    run(4, *PAIRS, "--no-self_condition")
    assert weights(out)["step"] == 4 and "resuming at step 3" in capsys.readouterr().out


def test_the_source_reaches_the_prediction():
    student = pair_model().student.eval()
    z, t = torch.randn(2, 5, 4), torch.full((2,), 0.5)
    not_pad = torch.ones(2, 5, dtype=torch.bool)
    one, two = (student(z, t, student.cond(y, not_pad)[0])
                for y in (torch.tensor([[3, 4, 5]] * 2), torch.tensor([[6, 7, 8]] * 2)))
    assert one.shape == (2, 5, 9) and not torch.allclose(one, two)


def test_candidates_see_their_own_source(monkeypatch):
    data, seen = load_pairs("numbers", max_length=16, vocab=400, max_number=99), []
    cfg = Config(dataset="numbers", dim=8, heads=2, depth=1, ffn=16, dropout=0.0, embed_dim=4,
                 length=16, length_beam=2, noise_beam=3, sample_batch=2, sample_steps=7,
                 sampler="ddim", argmax=True)

    def fake(model, shape, steps, cond, *, sampler, argmax, generator):
        assert (steps, sampler, argmax) == (7, "ddim", True)
        seen.append(cond)
        yield torch.arange(300, 300 + shape[0])[:, None].expand(shape)
    monkeypatch.setattr(catdm, "sample", fake)
    monkeypatch.setattr(catdm, "choose", lambda candidates: 4)
    model, sources = Translator(cfg, data.vocab_size, 16).eval(), ["eins", "zweiundzwanzig"]
    rows = list(catdm.translate(model, sources, data, cfg, CPU))
    assert [row["source"] for row in rows] == sources
    assert all(len(row["candidates"]) == 6 for row in rows)
    assert all(row["text"] == row["candidates"][4] != row["candidates"][0] for row in rows)
    states, source_not_pad, logits = model.encode(torch.from_numpy(data.rows(sources)))
    lengths = common.length_beam(logits, source_not_pad.sum(1), 2).clamp(3, 16)
    [cond] = seen
    for k in range(12):
        assert torch.equal(cond[0][k], states[k // 6])
        assert torch.equal(cond[1][k], source_not_pad[k // 6])
        assert cond[2][k].sum() == lengths[k // 6, k % 6 // 3]


def test_pairs_go_from_source_to_target_and_over_ranks_and_micro_batches():
    data = load_pairs("numbers", max_length=32, vocab=400, max_number=99)
    cfg = Config(dataset="numbers", batch_tokens=256, micro_tokens=48, embed_dim=2)

    def rows(rank, world):
        parts = catdm.load_batches(cfg, data, 0, DDP(rank, world, torch.device("cpu"), False))
        assert len(parts) > 1 and all(side.numel() <= 64 for part in parts for side in part[:2])
        return [tuple(map(repr, (x.tolist(), y.tolist(), float(t), eps.sum().item())))
                for part in parts for x, y, t, eps in zip(part.x, part.y, part.t, part.eps)]
    one, two = rows(0, 1), rows(0, 2) + rows(1, 2)
    assert len(one) > 4 and sorted(one) == sorted(two)
    x, y = (data.decode(json.loads(ids)[1:]) for ids in one[0][:2])
    assert (y, x) in data.pairs_of("train")


def test_bits_per_character_and_the_best_end(monkeypatch):
    """ln 2 nats are one bit; the end is chosen on training data, for the sum of the parts. Tokens
    weigh alike: sentences of 1 and 15 tokens."""
    seen = []

    def fake(model, batches, draws, seed, pad_id, end, start=-math.inf):
        """All parts are ln 2 where the diffusion ends at 4; its part adds up."""
        x = torch.cat([x for x, _ in batches])
        seen.append((len(x), draws, end, start))
        diffusion = [math.log(2) * (at > -9) + 2 * max(0.0, at - 4) for at in (end, start)]
        parts = math.log(2), math.log(2) + 4 - end, diffusion[0] - diffusion[1]
        tokens = torch.tensor([1.0, 15.0], dtype=torch.float64).repeat(len(x) // 2)[:, None]
        nats = torch.tensor(parts, dtype=torch.float64) * torch.where(tokens > 1, 1.0, 16.0)
        return torch.cat([nats, tokens], 1)
    monkeypatch.setattr(catdm, "likelihoods", fake)
    data = load_dataset("pydoc", length=16)
    cfg = Config(dataset="pydoc", length=16, eval_sequences=8)
    figures = catdm.evaluate(torch.nn.Identity(), cfg, data, CPU)
    mean = (16 + 15) / 16  # bits; by sentences 8.5
    assert figures["nll_bound"]["value"] == pytest.approx(3 * mean)
    assert figures["diffusion"]["value"] == pytest.approx(mean)
    assert figures["nll_bound"]["end"] == 4.0
    assert figures["nll_bound"]["unit"] == "bits/char given the padding"
    starts = [*catdm.BOUND_ENDS[1:], -math.inf]
    assert seen == [(128, 1, *pair) for pair in zip(catdm.BOUND_ENDS, starts)] + [
        (8, 4, 4.0, -math.inf)]
    seen.clear()  # a diffusion that ends at 1.5 cannot be charged beyond
    cfg.logsnr_max = 1.5
    catdm.evaluate(torch.nn.Identity(), cfg, data, CPU)
    assert [end for *_, end, _ in seen] == [1.5, *range(1, -9, -1), 1.5]
    cfg.bound_end = 3.0
    catdm.evaluate(torch.nn.Identity(), cfg, data, CPU)
    assert seen[-1] == (8, 4, 1.5, -math.inf)


class Doubt(Uniform):
    """All tokens are 0. What the other symbol gets falls with the log-SNR, but from 13 to 15 it
    is a half: the bound that ends at 15 pays e^15 for a thousandth of the times."""

    def __call__(self, z, t, cond=()):
        unshifted = catdm.logsnr(t, 0.0)
        wrong = (0.2 * (-unshifted / 4).exp()).clamp_max(0.5)
        wrong = torch.where((unshifted > 13) & (unshifted < 15), 0.5, wrong)
        return torch.stack([1 - wrong, wrong], -1).log()[:, None].expand(*z.shape[:2], 2)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("model,best", [(Doubt(2, 4, scale=0.003), 12.0), (Uniform(2, 4), -8.0)],
                         ids=["doubt", "uniform"])
def test_where_the_bound_ends_is_not_left_to_luck(monkeypatch, model, best, seed):
    """At 12 Doubt decodes 0 as well as anywhere; a uniform prediction has nothing to diffuse."""
    monkeypatch.setattr(catdm, "eval_batches", lambda cfg, data, split, limit, ddp: iter(
        [(torch.zeros(limit, 4, dtype=torch.long), None)]))
    cfg = Config(dataset="pydoc", seed=seed, eval_sequences=8)
    figures = catdm.evaluate(model, cfg, load_dataset("pydoc", length=16), CPU)
    assert figures["nll_bound"]["end"] == best


# ------------------------------------------------------------------------- runs

TINY = ["--device", "cpu", "--dim", "16", "--heads", "2", "--depth", "1", "--embed_dim", "8",
        "--dropout", "0",
        "--batch_size", "8", "--micro_batch", "8", "--lr", "1e-2", "--lr_schedule", "constant",
        "--warmup", "2", "--log_every", "2", "--save_every", "3", "--samples", "4",
        "--sample_steps", "3", "--eval_sequences", "8", "--eval_draws", "1"]
TEXT = ["--dataset", "pydoc", "--length", "16"]
PAIRS = ["--dataset", "numbers", "--max_number", "99", "--ffn", "16", "--batch_tokens", "128",
         "--length_beam", "1", "--noise_beam", "2"]


@pytest.fixture()
def run(tmp_path, data_dir, monkeypatch):
    """run(steps, *flags, out="a") -> the run folder; images unless flags say another set."""
    def go(steps, *flags, out="a"):
        folder = tmp_path / out
        # short runs, short judgement
        monkeypatch.setattr(catdm.TokenClassifier, "steps", min(steps, 100))
        images = [] if "--dataset" in flags else images_of(data_dir)
        common.main(catdm, [*TINY, "--data_dir", data_dir, "--out", str(folder), "--steps",
                            str(steps), *images, *flags])
        return folder
    return go


def images_of(data_dir):
    return ["--dataset", f"{data_dir}/tokens.npy", "--labels", f"{data_dir}/labels.npy"]


def losses(folder):
    lines = log_of(folder)
    return {r["step"]: r["loss"] for r in lines if "loss" in r}


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("flags", [[], TEXT, PAIRS], ids=["images", "text", "pairs"])
def test_a_run_leaves_everything_it_should(run, capsys, flags):
    out = run(4, *flags)
    printed = capsys.readouterr().out
    for word in ("nll_bound", "prior", "reconstruction", "diffusion", "±"):
        assert word in printed
    result = json.loads((out / "result.json").read_text())
    assert result["step"] == 4 and result["config"]["dim"] == 16 and result["method"] == "catdm"
    figures = result["figures"]
    parts = sum(figures[name]["value"] for name in ("prior", "reconstruction", "diffusion"))
    assert figures["nll_bound"]["value"] == pytest.approx(parts)
    given = " given the padding" if flags == PAIRS else ""
    unit = "bits/char" if flags == TEXT else "nats/token"
    assert figures["nll_bound"]["unit"] == unit + given
    assert figures["nll_bound"]["end"] in catdm.BOUND_ENDS
    first = json.loads((out / "log.jsonl").read_text().splitlines()[0])["start"]
    assert {"argv", "config", "commit", "torch", "hardware"} <= set(first)
    assert sorted(losses(out)) == [2, 4]
    kept, averaged = weights(out)["model"], weights(out)["ema"]["params"]
    teacher, student = ({k.removeprefix(f"{who}."): v for k, v in kept.items() if who in k}
                        for who in ("teacher", "student"))
    assert set(teacher) == set(student) == set(averaged)
    assert any(not torch.equal(teacher[k], student[k]) for k in teacher)
    if flags == TEXT:
        assert len((out / "samples.jsonl").read_text().splitlines()) == 4
        assert printed.count("--- sample") == 4
    elif flags == PAIRS:
        lines = (out / "translations-valid.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 5 and {"source", "text", "reference", "candidates", "nfe"} == set(
                rows[0])  # of 100
        assert {"bleu", "exact"} <= set(figures)
    else:
        with np.load(out / "samples.npz") as file:
            assert {k: file[k].shape for k in file.files} == {
                "guidance0": (4, 9), "guidance1": (4, 9), "guidance2": (4, 9), "labels": (4,)}
        assert set(result["samples"]) == {"valid", "guidance 0", "guidance 1", "guidance 2"}
        assert "guidance 2" in printed and set(result["samples"]["guidance 2"]) == {
            "recognised", "frechet"}


def test_training_learns_and_guided_samples_are_of_their_class(run):
    out = run(250, "--batch_size", "32", "--micro_batch", "32", "--teacher", "0.5",
              "--samples", "60", "--sample_steps", "8", "--drop", "0")
    result = json.loads((out / "result.json").read_text())
    curve = list(losses(out).values())
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])
    assert result["samples"]["valid"]["recognised"] > 0.95  # it is an easy set
    assert result["samples"]["guidance 2"]["recognised"] > 0.8
    # each token is one of two, evenly: ln 2 nats, and the bound is above it
    bound = result["figures"]["nll_bound"]
    assert bound["value"] > math.log(2) - 4 * bound["stderr"]
    assert bound["value"] < 1.3


def test_every_call_of_a_drawing_is_guided(monkeypatch, tmp_path, data_dir):
    """After training at 0, 1 and 2, by --mode sample and eval at --guidance: three steps and the
    call that draws the tokens."""
    cfg = common.parse_config(catdm, [*TINY, *images_of(data_dir), "--out", str(tmp_path),
                                      "--guidance", "1.5", "--sampler", "ddim", "--argmax"])
    data, seen, predict, sample = catdm.load(cfg), [], catdm.predict, catdm.sample
    model = catdm.build(cfg, data).eval()

    def spy(model, z, t, cond, guidance=0.0):
        seen.append(guidance)
        return predict(model, z, t, cond, guidance)
    monkeypatch.setattr(catdm, "predict", spy)

    def spy_sample(*args, sampler, argmax, **more):
        assert sampler == "ddim" and argmax
        return sample(*args, sampler=sampler, argmax=argmax, **more)
    monkeypatch.setattr(catdm, "sample", spy_sample)
    monkeypatch.setattr(catdm, "print_grades", lambda *_: {})
    monkeypatch.setattr(catdm.TokenClassifier, "steps", 1)
    monkeypatch.setattr(catdm, "likelihoods", lambda *_: torch.ones(2, 4))
    catdm.draw(model, cfg, data, CPU, trained=True)
    catdm.draw(model, cfg, data, CPU)
    cfg.mode = "eval"
    catdm.evaluate(model, cfg, data, CPU)
    assert seen == [0.0] * 4 + [1.0] * 4 + [2.0] * 4 + [1.5] * 8


def test_pictures_show_every_guidance(tmp_path):
    groups = [np.full((6, 4, 4), v, np.uint8) for v in (0, 128, 255)]
    catdm.save_grids(tmp_path / "a.png", groups, 3)
    from torchvision.io import decode_image
    image = decode_image(str(tmp_path / "a.png"))
    assert image.shape[0] == 3 and image.shape[1] > image.shape[2]  # groups below each other
    assert {0, 128, 255} <= set(image.unique().tolist())


@pytest.mark.parametrize("flags", [[], PAIRS], ids=["images", "pairs"])
def test_micro_batches_change_nothing(run, flags):
    share = ["--recon_share", "0.5"]
    a, b = run(6, *flags, *share, out="a"), run(
        6, *flags, *share, "--micro_batch", "3", "--micro_tokens", "4", out="b")
    assert losses(a) == pytest.approx(losses(b), rel=1e-4)  # float32 sums in another order


def test_sample_needs_the_checkpoint_alone(run, tmp_path, capsys):
    nowhere = ["--data_dir", str(tmp_path / "nothing here"), "--device", "cpu", "--mode", "sample"]
    out = run(3, *TEXT, out="text")
    capsys.readouterr()
    for _ in range(2):
        common.main(catdm, [*nowhere, "--out", str(out), *TEXT[:2], "--samples", "3"])
    printed = capsys.readouterr().out
    assert printed.count("--- sample") == 6
    assert printed[: len(printed) // 2] == printed[len(printed) // 2:]  # a fixed seed
    out = run(3, out="images")
    dataset = json.loads((out / "result.json").read_text())["dataset"]
    flags = [*nowhere, "--out", str(out), "--dataset", dataset]
    common.main(catdm, [*flags, "--label", "1", "--samples", "5", "--sampler", "ddim", "--argmax"])
    with np.load(out / "labelled.npz") as file, np.load(out / "samples.npz") as free:
        assert file["labels"].tolist() == [1] * 5 and file.files[0] == "guidance1"
        assert set(free["labels"]) == {0, 1, 2}
    cfg, ddp, model, data, _ = common.open_run(catdm, str(out), [
        "--mode", "sample", "--device", "cpu", "--label", "1"])
    data.pixels = np.zeros((5, 1, 1), np.uint8)
    capsys.readouterr()
    catdm.draw(model, cfg, data, ddp)
    assert "labelled.png: classes 1, guidance 1" in capsys.readouterr().out
    with pytest.raises(RunError, match="--label X: choose one of 0, 1, 2"):
        common.main(catdm, [*flags, "--label", "X"])
    out = run(3, *PAIRS, out="pairs")
    capsys.readouterr()
    common.main(catdm, [*nowhere, "--out", str(out), *PAIRS[:2], "--source", "neun"])
    assert capsys.readouterr().out.startswith("neun\n  -> ")


def test_probe_and_score(run, data_dir):
    for flags, name in [([], "a"), (TEXT, "b"), (PAIRS, "c")]:
        out = run(3, *flags, out=name)
        more = ["--data_dir", data_dir, "--device", "cpu", "--dataset",
                flags[1] if flags else images_of(data_dir)[1], "--sample_batch", "64"]
        cfg, ddp, model, data, _ = common.open_run(catdm, str(out), more)
        found = catdm.probe(model, cfg, data, ddp, PROBE_TIMES)
        n = len(PROBE_TIMES)
        assert found["embeddings"].shape[1] == 8
        assert all(found[k].shape == (n,) for k in ("cross_entropy", "signal", "sigma"))
        assert np.allclose(found["signal"] ** 2 + found["sigma"] ** 2, 1)
        # near t = 0 it is L_0's task, which is nearly learnt; near t = 1 nothing is known
        assert 0 < found["cross_entropy"].min() and np.isfinite(found["cross_entropy"]).all()
        kept = weights(out)["ema"]["params"]["embed.weight"]
        assert torch.equal(torch.as_tensor(found["embeddings"]), kept)
        if flags == PAIRS:
            assert found["tokens"] is None
        else:
            assert found["tokens"].shape == ((20, 9) if not flags else (500, 16))
    flags = ["--device", "cpu", *images_of(data_dir)[:2]]
    figures = common.score(catdm, str(run(3)), flags)["figures"]
    assert figures["nll_bound"]["draws"] == 20  # the full split of 20, one draw each
    assert {"recognised", "frechet"} <= set(figures)
    assert figures["frechet"]["unit"] == "4 samples, 3 ancestral steps, guidance 1"


def test_probe_stays_where_the_diffusion_ends(run, data_dir, monkeypatch):
    """At log-SNR 0, t = .5: nothing nearer to the data was trained."""
    out, seen, predict = run(2, "--logsnr_max", "0"), [], catdm.predict

    def record(model, z, t, cond):
        seen.append(t.item())
        return predict(model, z, t, cond)
    monkeypatch.setattr(catdm, "predict", record)
    cfg, ddp, model, data, _ = common.open_run(
        catdm, str(out), [*images_of(data_dir)[:2], "--device", "cpu"])
    found = catdm.probe(model, cfg, data, ddp, PROBE_TIMES)
    early = PROBE_TIMES < 0.5
    assert min(seen) == pytest.approx(0.5) and max(seen) == PROBE_TIMES[-1]
    assert np.allclose(found["signal"][early], torch.tensor(cfg.shift).sigmoid().sqrt())
    assert (np.diff(found["signal"][~early]) < 0).all()


@pytest.mark.parametrize("flags,name", [
    ([], "catdm"), (["--cm", "ce"], "catdm-ce"), (["--cm", "none"], "catdm-without-cm"),
    (["--objective", "csdm", "--l2_norm", "1"], "csdm-l2")])
def test_names_of_the_ablations(flags, name):
    cfg = common.parse_config(catdm, flags)
    assert catdm.name_of(cfg) == name


def test_what_load_reads(data_dir):
    """Arrays where --tokens points to, or else in DATA_DIR; to translate --source, no pairs."""
    files = dict(tokens=f"{data_dir}/tokens.npy", labels=f"{data_dir}/labels.npy")
    data = catdm.load(Config(dataset="imagenet", **files))
    assert data.length == 9 and len(data.classes) == 3
    with pytest.raises(ValueError, match="tokens.npy"):
        common.main(catdm, ["--dataset", "ffhq", "--device", "cpu", "--data_dir",
                            data_dir + "/none"])
    pairs = dict(dataset="numbers", vocab=400, max_number=99, length=16)
    kept = catdm.load(Config(**pairs)).tokenizer()
    assert catdm.load(Config(**pairs, source="neun"), kept).pairs == 0
    assert catdm.load(Config(**pairs), kept).pairs > 0


@pytest.mark.parametrize("flags", [["--dataset", "imagenet"], TEXT, PAIRS])
def test_bench_prints_one_json_line(capsys, flags):
    common.main(catdm, ["--mode", "bench", "--device", "cpu", *TINY[2:], *flags, "--bench_steps",
                        "2"])
    record = json.loads(capsys.readouterr().out)
    assert record["tokens_per_s"] > 0
    assert record["tokens_per_step"] == 8 * {"imagenet": 256, "pydoc": 16, "numbers": 16}[flags[1]]


def test_translation_compiles_once():
    """Sentences of any length, batches of any size: one graph, whatever sizes agree by chance, and
    one more for steps that estimate twice."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    flags = [*TINY, *PAIRS, "--out", "none", "--recon_share", "0.5", "--embed_dim", "16",
             "--self_condition"]
    cfg = common.parse_config(catdm, flags)
    model = CATDM(Translator(cfg, 50, 32))
    state = torch.get_rng_state()
    net = catdm.compiled_for_all_lengths(model, cfg, CPU, backend=count)
    assert torch.equal(torch.get_rng_state(), state)  # a resumed run's dropout goes on
    for B, M, N in [(16, 16, 16), (8, 4, 4), (13, 13, 11), (8, 16, 6), (5, 7, 32), (32, 32, 8)]:
        x, y = (torch.randint(1, 50, (B, k)) for k in (N, M))
        noise = torch.rand(B), torch.rand(B, N + 3), torch.randn(B, N, 16)
        for coin in (False, True):
            batch = x, y, *noise, torch.randn((B + 1) // 2, N, 16), x != PAD, coin
            assert torch.allclose(net(*batch)[0], model(*batch)[0], rtol=1e-4)
    assert len(graphs) == 2


def test_distilled_targets_are_asked_for(tmp_path):
    (tmp_path / "file.txt").write_text("one\n")
    flags = [*TINY, *PAIRS, "--out", "none", "--distilled", str(tmp_path / "file.txt")]
    with pytest.raises(DataError, match="file.txt has 1 lines for"):
        catdm.load(common.parse_config(catdm, flags))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_translation_compiles_once_on_a_gpu():
    """Though torch's own compiler would cut B x N x dim x 1.25 at 5 x 2^20 (torch 2.11)."""
    cfg = common.parse_config(catdm, [*TINY, *PAIRS, "--out", "none", "--recon_share", "0.25",
                                      "--dim", "512", "--self_condition", "--device", "cuda"])
    ddp = common.DDP.start(cfg)
    model = CATDM(Translator(cfg, 50, 32)).to(ddp.device)
    net = catdm.compiled_for_all_lengths(model, cfg, ddp)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, N in [(8, 8), (300, 16), (512, 16), (600, 24)]:
            x = torch.ones(B, N, dtype=torch.long, device=ddp.device)
            noise = torch.rand(B), torch.rand(B, N + 3), torch.randn(B, N, cfg.embed_dim)
            noise += torch.randn(-(-B // 4), N, cfg.embed_dim),
            for coin in (False, True):
                with ddp.autocast():
                    net(x, x.clone(), *map(ddp.put, noise), x != PAD, coin)[0].sum().backward()


@pytest.mark.parametrize("length,want", [(32, (24, 32)), (8, (8, 7))])
def test_translation_compiles_on_lengths_like_real_ones(length, want, monkeypatch):
    """Multiples of 8 that differ and are no layer's width (16), as far as there are any; and this
    torch knows the options that are given to its compiler."""
    seen, compile = [], torch.compile

    def record(model, **flags):
        assert flags["dynamic"] and flags["options"]
        compile(model, **flags)  # refuses options that it does not know

        def net(x, y, *noise):
            seen.append((y.shape[1], x.shape[1]))
            return model(x, y, *noise)
        return net
    monkeypatch.setattr(torch, "compile", record)
    flags = [*TINY, *PAIRS, "--out", "none", "--embed_dim", "16"]
    cfg = common.parse_config(catdm, flags)
    catdm.compiled_for_all_lengths(CATDM(Translator(cfg, 50, length)), cfg, CPU)
    assert seen == [want] * (1 + cfg.self_condition)


def test_collapsed_embeddings_differ_in_bfloat16_too():
    """L_DM of vectors that are alike up to 1/1000, under autocast, with probabilities that do not
    depend on z_t: exact up to bfloat16's rounding of differences, 1/256 each."""
    model = tiny(cm="none")
    model.student.embed.weight.data.mul_(1e-3).add_(1.0)
    model.student.head.weight.data.zero_()
    model.student.head.bias.data.copy_(torch.arange(5) / 2)
    batch = tiny_batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*batch)[1]["L_DM"].sum().item()
    table = model.student.embedding_matrix().double()
    p = (torch.arange(5).double() / 2).softmax(0)
    assert found == pytest.approx((p @ table - table[batch.x]).square().sum().item(), rel=0.02)


@pytest.mark.parametrize("flags", [
    dict(), dict(objective="csdm"), dict(cm="none"), dict(dropped="learned"),
    dict(dropped="learned", objective="csdm"), dict(dropped="learned", drop=0.0)])
def test_every_parameter_takes_part_in_the_loss(flags):
    """Or DDP would wait for its gradient."""
    model = tiny(**flags)
    model(*tiny_batch())[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("coin", [False, True])
def test_every_parameter_of_self_conditioning_takes_part_in_the_loss(coin):
    """Also under autocast, which keeps weights in bfloat16 from a call without gradient."""
    model = self_conditioned()
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = model(*pair_batch(coin))
    losses.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_tokens_of_ones_own_get_the_preset_of_images(data_dir):
    """Not that of texts, whose flags the network for images would misread."""
    parse = lambda name: common.parse_config(catdm, ["--dataset", name])  # noqa: E731
    own, drawn = parse(f"{data_dir}/tokens.npy"), parse("glyphs")
    assert (own.dim, own.shift, own.init_std) == (drawn.dim, drawn.shift, drawn.init_std)
    assert own.task == "images" and parse(data_dir).task == "text"
    assert common.parse_config(cadd, ["--dataset", "x.npy"]).dim == cadd.PRESETS["folder"]["dim"]
