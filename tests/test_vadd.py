"""vadd.py: loss, sampler and likelihoods against exact small worlds; what its runs leave."""

import dataclasses
import itertools
import json
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import eval as metrics
import vadd
import vadd_toys
from common import RunError
from data import DATASETS, ZERO_SHOT, load_dataset
from vadd import VADD, Config, InformedPrior, StandardNormal

# ------------------------------------------------------------------------- a tiny world
# 3 symbols x 2 positions with a strong dependence, and a latent of one dimension.

V, L = 3, 2
WORLD = torch.tensor([[0.30, 0.02, 0.01], [0.03, 0.25, 0.04], [0.05, 0.10, 0.20]],
                     dtype=torch.float64)  # p(x^1, x^2)
STATES = torch.tensor(list(itertools.product(range(V), repeat=L)))  # (9, 2)
P = WORLD.flatten()
ENTROPY = -(P * P.log()).sum().item()
# Quadrature over z ~ N(0, 1) at the midpoints of equal quantiles: exact here, where the denoiser
# jumps at multiples of .01 in z's quantile.
QUANTILE = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
GRID, WEIGHT = torch.special.ndtri(QUANTILE), torch.full((2000,), 1 / 2000, dtype=torch.float64)


class World:
    """Stands in for VADD. Given z the positions are independent, over z ~ N(0, 1) they are not:
    z's quantile names a state of the world, which the denoiser then writes; in a partly visible
    x_t it gives the exact conditional. `sharp` < 1 blurs it, `latent=0` makes it the exact MDM."""

    V, mask_id = V, V
    takes_prior = VADD.takes_prior

    def __init__(self, latent=1, sharp=0.98, recognition=(0.0, 0.0), alpha="linear", below=0):
        self.cfg = Config(latent_dim=latent, net="mlp", length=L, alpha=alpha, prior_below=below)
        self.sharp, self.recognition = sharp, recognition

    def denoise(self, x_t, z, t):
        """log mu (B, L, V) float64."""
        out = torch.empty(len(x_t), L, V, dtype=torch.float64)
        one = torch.stack([WORLD.sum(1), WORLD.sum(0)])                    # marginals (L, V)
        if z is None:
            both = one.expand(len(x_t), L, V)
        else:
            q = 0.5 * (1 + torch.erf(z[:, 0].double() / math.sqrt(2)))
            state = STATES[torch.searchsorted(P.cumsum(0), q).clamp_max(8)]     # (B, L)
            both = self.sharp * F.one_hot(state, V).double() + (1 - self.sharp) * one
        other = x_t.flip(1).clamp_max(V - 1)                               # the other one's
        given = torch.stack([WORLD[:, other[:, 0]].T, WORLD[other[:, 1]]], 1)   # (B, L, V)
        given = given / given.sum(-1, keepdim=True)
        out = torch.where((x_t.flip(1) == V)[..., None], both, given)
        return out.log()

    def logits(self, h):
        return h

    def recognise(self, x0, x_t, t):
        """An arbitrary Gaussian: N(mean by x_0, std)."""
        mean, log_std = self.recognition
        return mean * (x0[:, :1] - 1.0), torch.full((len(x0), 1), log_std)

    def prior_at(self, x_t, t):
        return StandardNormal()


def estimates(model, draws, K, T=(1,), seed=0):
    """{figure: (mean nats of each of the nine states, its standard error)}."""
    x0 = STATES.repeat_interleave(draws, 0)
    values = vadd.likelihoods(model, iter([x0]), 1, seed, K=K, bound_steps=T)
    values = {name: L * v.view(9, draws) for name, v in values.items() if name != "tokens"}
    return {name: (v.mean(1), v.std(1) / math.sqrt(draws)) for name, v in values.items()}


HIDDEN = {"linear": lambda t: t, "cosine": lambda t: math.sin(math.pi / 2 * t)}  # 1 - alpha_t


def sampled_exactly(model, T):
    """The distribution (9,) of the T-step sampler, by enumeration and quadrature over z."""
    all_states = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))      # (16, 2)
    p = (all_states == V).all(1).double()                                  # starts all masked
    for k in range(T, 0, -1):
        hidden = HIDDEN[model.cfg.alpha]
        flip, new = 1 - hidden((k - 1) / T) / hidden(k / T), torch.zeros_like(p)
        for x_t, mass in zip(all_states, p):
            if mass == 0:
                continue
            z = GRID[:, None] if model.cfg.latent_dim else None
            n = len(GRID) if model.cfg.latent_dim else 1
            mu = model.denoise(x_t.expand(n, L), z, None).exp()            # (n, L, V)
            step = torch.zeros(n, L, V + 1, dtype=torch.float64)
            for i in range(L):
                if x_t[i] == V:
                    step[:, i, :V], step[:, i, V] = flip * mu[:, i], 1 - flip
                else:
                    step[:, i, x_t[i]] = 1
            both = step[:, 0, :, None] * step[:, 1, None, :]               # (n, 4, 4)
            weight = WEIGHT if model.cfg.latent_dim else torch.ones(1, dtype=torch.float64)
            new += mass * torch.einsum("n,nab->ab", weight, both).flatten()
        p = new
    return p[(all_states < V).all(1)]


@pytest.mark.parametrize("alpha", ["linear", "cosine"])
def test_bounds_sum_to_at_most_one_and_the_papers_figure_does_not(alpha):
    """The point of nll_bound: 3 x 3 states, a denoiser that models their dependence in one step."""
    model = World(alpha=alpha)
    out = estimates(model, 400, K=200, T=(1, 2, 4, 16))
    for T in (1, 2, 4, 16):
        mean, error = out[f"nll_bound_{T}"]
        p = (-mean).exp()
        slack = 4 * (p * error).square().sum().sqrt()
        assert p.sum() <= 1 + slack and slack < 0.05
        exact = -sampled_exactly(model, T).log()
        assert (mean > exact - 4 * error - 0.02).all()                     # state by state
    mean, error = out["nll_delbo"]
    p = (-mean).exp()
    assert p.sum() > 1.2 + 4 * (p * error).square().sum().sqrt()           # no bound
    assert (P * mean).sum() < ENTROPY - 0.1                                # below the entropy


@pytest.mark.parametrize("recognition", [(0.0, 0.0), (0.8, -0.5)])
def test_one_step_bound_equals_the_exact_marginal_likelihood(recognition):
    """Quadrature over z against importance sampling with two proposals; K = 8,000."""
    model = World(recognition=recognition)
    mu = model.denoise(torch.full((len(GRID), L), V), GRID[:, None], None).exp()
    exact = torch.einsum("n,na,nb->ab", WEIGHT, mu[:, 0], mu[:, 1]).flatten()
    assert exact.sum().item() == pytest.approx(1)
    assert torch.allclose(sampled_exactly(model, 1), exact)
    assert (exact - P).abs().max() > 0.001
    out = estimates(model, 40, K=8000)
    mean, error = out["nll_bound_1"]
    # the log's bias is half of the relative variance of the mean over K draws: Var = error^2 n
    assert ((mean + exact.log()).abs() < 4 * error + 20 * error**2).all() and error.max() < 0.04
    # Eq. 20: one hidden position, given the other, or both at once
    given = (WORLD / WORLD.sum(0)).log() + (WORLD / WORLD.sum(1, keepdim=True)).log()
    mean, error = out["nll_delbo"]
    want = -0.5 * (given.flatten() + exact.log())
    assert ((mean - want).abs() < 4 * error).all() and error.max() < 0.3


def test_a_narrow_recognition_network_cannot_spoil_the_bound():
    """Half of the draws come from the prior: a proposal that misses costs at most ln 2 or so. All
    of them do where r is the prior (--prior_below), and nothing is lost."""
    model = World(recognition=(5.0, -3.0))
    exact = -sampled_exactly(model, 1).log()
    mean, error = estimates(model, 100, K=400)["nll_bound_1"]
    assert (mean > exact - 4 * error).all() and (mean < exact + 1.0).all()
    assert (mean > exact + 0.05).any()  # half of the draws are wasted
    mean, error = estimates(World(recognition=(5.0, -3.0), below=2), 100, K=400)["nll_bound_1"]
    same, _ = estimates(World(recognition=(0.0, 0.0), below=2), 100, K=400)["nll_bound_1"]
    assert torch.equal(mean, same)
    # the log's bias is half of the relative variance of the mean over K draws: error^2 n / 2
    assert ((mean - exact).abs() < 4 * error + 50 * error**2).all()


@pytest.mark.parametrize("T", [1, 2, 16])
@pytest.mark.parametrize("alpha", ["linear", "cosine"])
def test_without_a_latent_both_figures_are_mdlms(T, alpha):
    """Exact values: E_t of the MDM bound is the mean over orders, whatever the schedule; T steps
    reveal both at once with the probability that two tokens fall into the same step."""
    model = World(latent=0, alpha=alpha)
    one, two = WORLD.sum(1), WORLD.sum(0)
    orders = -torch.stack([one.log()[:, None] + (WORLD / one[:, None]).log(),
                           two.log()[None] + (WORLD / two).log()]).mean(0).flatten()
    product = -(one.log()[:, None] + two.log()).flatten()
    out = estimates(model, 3000, K=1, T=(T,))
    mean, error = out["nll_delbo"]
    assert ((mean - orders).abs() < 4.5 * error + 1e-9).all() and error.max() < 0.1
    mean, error = out[f"nll_bound_{T}"]
    shares = [HIDDEN[alpha](k / T) - HIDDEN[alpha]((k - 1) / T) for k in range(1, T + 1)]
    together = sum(share**2 for share in shares)
    want = product * together + orders * (1 - together)
    assert ((mean - want).abs() < 4.5 * error + 1e-9).all()


def test_steps_that_reveal_nothing_cost_nothing():
    """Of 32 steps most reveal none of two positions."""
    values = vadd.likelihoods(World(sharp=0.9), iter([STATES[:1]]), 1, 0, K=2, bound_steps=(32,))
    assert values["nll_bound_32"].shape == (1,) and 0 < values["nll_bound_32"].item() < 10


def test_every_batch_and_draw_has_noise_of_its_own():
    values = vadd.likelihoods(World(), iter([STATES, STATES]), 2, 0, K=3, bound_steps=(2,))
    other = vadd.likelihoods(World(), iter([STATES, STATES]), 2, 1, K=3, bound_steps=(2,))
    for name in ("nll_delbo", "nll_bound_2"):
        parts = [*values[name].view(4, 9), *other[name].view(4, 9)]
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(parts, 2)), name


def test_the_number_of_hidden_tokens_is_even_over_draws():
    """Two draws of one sequence of two tokens hide one and both, in some order."""
    seen = []

    class Watched(World):
        def denoise(self, x_t, z, t):
            seen.append((x_t == V).sum().item())
            return super().denoise(x_t, z, t)
    for seed in range(10):
        vadd.likelihoods(Watched(latent=0), iter([STATES[:1]]), 2, seed, bound_steps=())
    assert all(sorted(pair) == [1, 2] for pair in zip(seen[::2], seen[1::2]))


def test_more_draws_of_z_raise_the_delbo():
    """Eq. 21 for K = 1, 4, 16, by more than three standard errors each."""
    model = World(sharp=0.8, recognition=(0.5, -0.3))
    values = []
    for K in (1, 4, 16):
        mean, error = estimates(model, 400, K)["nll_delbo"]
        values.append(((P * mean).sum(), (P * error).square().sum().sqrt()))
    for (a, ea), (b, eb) in zip(values, values[1:]):
        assert b < a - 3 * (ea**2 + eb**2).sqrt()


class Clock(World):
    """Without a latent: says the right token with probability e^-f(t) wherever it stands."""

    def __init__(self, f, alpha):
        super().__init__(latent=0, alpha=alpha)
        self.f = f

    def denoise(self, x_t, z, t):
        right = (-self.f(t.double())).exp()[:, None, None]
        return torch.cat([right, 1 - right, 0 * right], -1).log().expand(-1, L, V)


@pytest.mark.parametrize("alpha", ["linear", "cosine"])
def test_the_network_is_told_the_schedules_time(alpha):
    """E_t E_x_t of the weight times f(t) per hidden token is the mean of L w(t) (1 - alpha_t) f(t);
    T steps ask at times k/T for the tokens that q reveals there."""
    model, x0 = Clock(lambda t: 0.1 + t**2, alpha), torch.zeros(20_000, L, dtype=torch.long)
    values = vadd.likelihoods(model, iter([x0]), 1, 0, bound_steps=(4,))
    grid = (np.arange(1000) + 0.5) / 1000
    slope = {"linear": np.ones(1000), "cosine": np.pi / 2 * np.cos(np.pi / 2 * grid)}[alpha]
    want = {"nll_delbo": (slope * (0.1 + grid**2)).mean(), "nll_bound_4": sum(
        (HIDDEN[alpha](k / 4) - HIDDEN[alpha](k / 4 - 0.25)) * (0.1 + (k / 4) ** 2)
        for k in range(1, 5))}
    for name, v in list(values.items())[1:]:  # the first are the tokens
        assert v.mean().item() == pytest.approx(want[name], abs=5 * v.std().item() / len(v) ** 0.5)


def test_padding_is_neither_scored_nor_counted():
    """A denoiser that hardly expects the padding, whatever it sees: ln (2 + e^-5) per token."""
    class Blind(World):
        def denoise(self, x_t, z, t):
            return torch.tensor([0.0, 0.0, -5.0], dtype=torch.float64).expand(*x_t.shape, V)
    x0 = torch.cat([STATES % 2, torch.full_like(STATES, 2)], 1).repeat(500, 1)  # 2 is the padding
    values = vadd.likelihoods(Blind(latent=0), iter([x0]), 1, 0, pad_id=2, bound_steps=(1, 3))
    assert (values.pop("tokens") == 2).all()
    for name, v in values.items():
        error, want = v.std().item() / len(v) ** 0.5, math.log(2 + math.exp(-5))
        assert v.mean().item() == pytest.approx(want, abs=5 * error + 1e-9), name


# ------------------------------------------------------------------------- Gaussians


def test_kl_in_closed_form_equals_monte_carlo():
    torch.manual_seed(0)
    mean, log_std, mean_0, log_std_0 = torch.randn(4, 3, dtype=torch.float64) * 0.5
    z = mean + log_std.exp() * torch.randn(200_000, 3, dtype=torch.float64)
    log_ratio = vadd.log_normal(z, mean, log_std) - vadd.log_normal(z, mean_0, log_std_0)
    # a shift and a scale of z change no KL
    scaled = (mean - mean_0) / log_std_0.exp(), log_std - log_std_0
    exact = vadd.kl_from_standard(*scaled).sum()
    assert abs(log_ratio.mean() - exact) < 5 * log_ratio.std() / len(z) ** 0.5
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(mean, log_std.exp()),
                                             normal(mean_0, log_std_0.exp()))
    assert torch.allclose(vadd.kl_from_standard(*scaled), want)
    prior = StandardNormal()
    assert torch.equal(prior.draw(z, z[:, 0]), z)
    assert torch.allclose(prior.log_prob(z), normal(0.0, 1.0).log_prob(z).sum(-1))
    total, each = prior.kl(z, mean[None], log_std[None])
    assert torch.allclose(total, each.sum(-1)) and torch.allclose(
        each[0], torch.distributions.kl_divergence(normal(mean, log_std.exp()), normal(0.0, 1.0)))


def test_informed_prior_draws_from_its_density():
    """It integrates to one; draws have the moments to which `kl` compares, and its entropy by
    log_prob."""
    mixture = InformedPrior(torch.tensor([[1.0, 0.0, -1.0, 2.0, 0.5, -0.5],
                                          [0.0, 1.0, -2.0, 1.0, -1.0, 0.2]]), C=2, n=1)
    grid, dz = torch.linspace(-8, 8, 4001), 16 / 4000
    density = mixture.log_prob(grid[:, None, None].expand(-1, 2, 1))[:, 1].exp()
    assert density.sum().item() * dz == pytest.approx(1, abs=1e-4)
    n, g = 100_000, torch.Generator().manual_seed(0)
    z = mixture.draw(torch.randn(n, 2, 1, generator=g), torch.rand(n, 2, generator=g))
    both, z = z, z[:, 1]
    mean = (density * grid).sum() * dz
    std = ((density * (grid - mean) ** 2).sum() * dz).sqrt()
    assert abs(z.mean() - mean) < 5 * std / n**0.5 and abs(z.std() - std) < 0.02
    for shift, want in ((0.0, 0.0), (1.0, 0.5)):                           # in units of std
        _, per_dim = mixture.kl(both[0], (mean + shift * std).expand(2, 1), std.log().expand(2, 1))
        assert per_dim[1].item() == pytest.approx(want, abs=1e-4)
    entropy = -(density * density.log()).sum() * dz
    assert abs(-mixture.log_prob(both)[:, 1].mean() - entropy) < 0.02


# ------------------------------------------------------------------------- model and loss


def tiny_model(seed=0, std=0.3, **flags):
    torch.manual_seed(seed)
    flags = {"dim": 8, "heads": 2, "depth": 2, "dropout": 0.0, "latent_dim": 3, "length": 7,
             "components": 4, **flags}
    model = VADD(Config(**flags), vocab_size=5)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


def tiny_batch(seed=0, B=6, length=7, latent=3):
    """The fields of a Batch, and lambda."""
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randint(5, (B, length), generator=g)
    t = common.low_discrepancy_t(torch.arange(B), B, 0.3, 1e-3)
    u = torch.rand(B, length, generator=g)
    u[0] = 1.0                                                             # nothing masked here
    eps = torch.randn(B, latent, generator=g)
    return x0, t, u, eps, torch.ones_like(x0, dtype=torch.bool), torch.tensor(0.5)


@pytest.mark.parametrize("net", ["dit", "mlp"])
def test_latent_dim_0_is_mdlm(net):
    """Ten lines of MDLM, written independently: loss and every gradient agree."""
    model = tiny_model(latent_dim=0, net=net)
    x0, t, u, eps, not_pad, weight = tiny_batch(latent=0)
    loss, stats = model(x0, t, u, eps, not_pad, weight)
    loss.backward()
    got = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    x_t = x0.clone()
    x_t[u < t[:, None]] = 5                                                # [MASK]
    if net == "dit":
        logits = model.denoiser.net(x_t, torch.zeros(1)) @ model.head.weight.T + model.head.bias
        logits[..., 5] = -torch.inf                                        # never predicts [MASK]
    else:
        logits = model.denoiser(x_t, None, torch.zeros(1))
    log_p = logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0]
    mdlm = -(log_p * (x_t == 5) / t[:, None]).sum()
    mdlm.backward()
    assert loss.item() == pytest.approx(mdlm.item(), rel=1e-5) and len(stats["kl_per_dim"]) == 0
    assert stats["weighted_kl"].sum() == 0 and stats["kl"].sum() == 0
    assert stats["weighted_nll"].sum().item() == pytest.approx(loss.item(), rel=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert (got[name] - p.grad).norm() < 1e-3 * p.grad.norm(), name
    assert not [k for k in got if "latent" in k or "recognition" in k or "prior" in k]


def test_latent_dim_0_has_mdlms_parameters():
    with torch.device("meta"):
        model = VADD(Config(latent_dim=0), 50257)
    assert sum(p.numel() for p in model.parameters()) == 169_627_218       # cadd --hint none


@pytest.mark.parametrize("net", ["dit", "mlp"])
@pytest.mark.parametrize("prior", ["normal", "informed"])
def test_loss_follows_equation_11(net, prior):
    """One sample at a time; the KL by torch.distributions; nothing masked counts nothing."""
    model = tiny_model(net=net, prior=prior, time_cond=True)
    x0, t, u, eps, not_pad, weight = tiny_batch()
    loss, stats = model(x0, t, u, eps, not_pad, weight)
    want, want_kl = 0.0, 0.0
    normal = torch.distributions.Normal
    for j in range(len(x0)):
        masked = u[j] < t[j]
        if not masked.any():
            continue
        x_t = torch.where(masked, 5, x0[j])[None]
        mean, log_std = model.recognise(x0[j:j + 1], x_t, t[j:j + 1])
        z = mean + log_std.exp() * eps[j]
        log_r = normal(mean, log_std.exp()).log_prob(z).sum()
        if prior == "normal":
            posterior = normal(mean, log_std.exp())
            kl = torch.distributions.kl_divergence(posterior, normal(0.0, 1.0)).sum()
        else:
            mix = model.prior_at(x_t, t[j:j + 1])
            comps = normal(mix.mean, mix.log_std.exp()).log_prob(z[:, None]).sum(-1)
            kl = log_r - (mix.logits.log_softmax(-1) + comps).logsumexp(-1)[0]
        logits = model.logits(model.denoise(x_t, z, t[j:j + 1]))[0, masked]
        nll = F.cross_entropy(logits, x0[j][masked], reduction="sum")
        want = want + (nll + 0.5 * kl) / t[j]
        want_kl = want_kl + kl
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    assert stats["kl"].sum().item() == pytest.approx(want_kl.item(), rel=1e-4)
    assert stats["sequences"].sum() == 5 and stats["masked"].sum() == (u < t[:, None]).sum()
    assert loss.item() == pytest.approx(
        (stats["weighted_nll"] + 0.5 * stats["weighted_kl"]).sum().item(), rel=1e-5)
    assert torch.equal(model.time(t), t) and not tiny_model(net=net).time(t).any()
    if prior == "normal":
        per_dim = stats["kl_per_dim"].sum().item()
        assert per_dim == pytest.approx(want_kl.item(), rel=1e-4)


@pytest.mark.parametrize("net", ["dit", "mlp"])
@pytest.mark.parametrize("alpha", ["linear", "cosine"])
def test_the_loss_of_mdlm_is_its_bound_with_any_schedule(net, alpha):
    """Averaged over t and x_t the weighted loss of a network that ignores t is the bound: with n of
    two tokens hidden, L / n times what they cost, averaged over n and which."""
    model = tiny_model(latent_dim=0, net=net, length=2, alpha=alpha, std=0.5)
    x0 = torch.tensor([[3, 1]])
    one = [[5, 1], [3, 5]]                                                 # one token hidden
    log_p = [model.logits(model.denoise(torch.tensor([x]), None, torch.zeros(1))).log_softmax(-1)
             for x in [[5, 5], *one]]
    both, first, second = (p[0, [0, 1], x0[0]] for p in log_p)
    want = -(both.sum() + first[0] + second[1]).item() / 2
    n = 20_000
    x0, g = x0.repeat(n, 1), torch.Generator().manual_seed(0)
    t = common.low_discrepancy_t(torch.arange(n), n, 0.5 / n, 1e-6)
    batch = vadd.Batch(x0, t, torch.rand(n, 2, generator=g), torch.zeros(n, 0), x0 == x0)
    with torch.no_grad():
        loss = [model(*(x[k::10] for x in batch), torch.tensor(1.0))[0] * 10 / n / 2
                for k in range(10)]
    loss = torch.stack(loss)
    assert abs(loss.mean().item() - want / 2) < 5 * loss.std().item() / 10**0.5
    values = vadd.likelihoods(model, iter([x0]), 1, 0, bound_steps=())["nll_delbo"]
    assert abs(values.mean().item() - want / 2) < 5 * values.std().item() / n**0.5


@pytest.mark.parametrize("alpha", ["linear", "cosine"])
def test_schedule_and_its_inverse(alpha):
    """Slope by differences, the weight of Eq. 3, reveal and keep probabilities of Eq. 1."""
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    hidden, slope = vadd.schedule(t, alpha)
    assert torch.allclose(hidden, torch.tensor([HIDDEN[alpha](x) for x in t.tolist()]).double())
    assert torch.allclose(
        slope, (vadd.schedule(t + 1e-6, alpha)[0] - vadd.schedule(t - 1e-6, alpha)[0]) / 2e-6)
    assert torch.allclose(vadd.loss_weight(t, alpha), slope / hidden)
    assert torch.allclose(vadd.time_of(hidden, alpha), t)
    keep = 1 - vadd.reveal_probability(t[1:], t[:-1], alpha)
    assert torch.allclose(keep * hidden[1:], hidden[:-1])


def test_padding_carries_no_loss():
    model, (x0, t, u, eps, not_pad, weight) = tiny_model(), tiny_batch()
    full, _ = model(x0, t, u, eps, not_pad, weight)
    part = not_pad.clone()
    part[:, 4:] = False
    loss, stats = model(x0, t, u, eps, part, weight)
    assert loss < full and stats["masked"].sum() == ((u < t[:, None]) & part).sum()
    _, stats = model(x0, t, u, eps, torch.zeros_like(not_pad), weight)
    assert all(value.sum() == 0 for value in stats.values())


@pytest.mark.parametrize("flags", [
    {"prior": "informed"}, {"time_cond": True}, {"net": "mlp"}, {"latent_dim": 0},
    {"alpha": "cosine"}, {"net": "mlp", "alpha": "cosine"},
    {"prior": "informed", "components": 2}])
def test_every_option_changes_the_loss(flags):
    def loss(f):
        return tiny_model(**f)(*tiny_batch(latent=f.get("latent_dim", 3)))[0].item()
    base = {"prior": "informed"} if "components" in flags else {}
    assert loss(flags) != pytest.approx(loss(base), rel=1e-6)


def test_dropout_acts_in_training_only():
    model, batch = tiny_model(dropout=0.5), tiny_batch()
    assert model(*batch)[0] != model(*batch)[0]
    model.eval()
    assert model(*batch)[0] == model(*batch)[0]


@pytest.mark.parametrize("net", ["dit", "mlp"])
def test_z_reaches_every_position_and_every_block(net):
    model = tiny_model(net=net)
    x_t, t = torch.full((2, 7), 5), torch.zeros(2)
    z = torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 2.0]])
    a, b = model.logits(model.denoise(x_t, z, t))
    assert ((a - b).abs().amax(-1) > 1e-4).all()
    if net == "dit":
        for i in range(2):  # with the other blocks' adaLN (and the last one) silenced
            model = tiny_model()
            for k, layer in enumerate([*[b.adaln for b in model.denoiser.net.blocks],
                                       model.denoiser.net.adaln]):
                if k != i:
                    torch.nn.init.zeros_(layer.weight)
            a, b = model.logits(model.denoise(x_t, z, t))
            assert not torch.allclose(a, b, atol=1e-4)


def test_recognition_network_applies_adaln_at_masked_positions_only():
    """Section 3.3: unmasked positions see no shift, scale or gate; M_t matters for equal x_0."""
    model = tiny_model()
    net, x0 = model.recognition, tiny_batch()[0]

    def run(masked):
        return net(x0, None, masked, torch.zeros(1))
    none, some = torch.zeros(6, 7, dtype=torch.bool), torch.zeros(6, 7, dtype=torch.bool)
    some[:, 2] = True
    before, before_some = run(none), run(some)
    assert not torch.allclose(before, before_some, atol=1e-4)              # it does see M_t
    h = net.net(x0, torch.zeros(1), net.R, at=some)                        # all positions count
    assert torch.allclose(before_some, net.readout(sum(h.unbind(1)) / 7), atol=1e-5)
    with torch.no_grad():
        net.R.add_(1.0)
        for layer in [*[b.adaln for b in net.net.blocks], net.net.adaln]:
            layer.weight.mul_(-2).add_(0.1)
            layer.bias.add_(1.0)
    assert torch.equal(run(none), before) and not torch.allclose(run(some), before_some, atol=1e-4)

    # one block, position by position: modulation where masked, a plain pre-norm block elsewhere
    block, c, h = net.net.blocks[0], torch.randn(1, 128), torch.randn(2, 7, 8)
    rope = torch.stack([torch.ones(7, 2), torch.zeros(7, 2)])              # no rotation
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaln(c)[0].chunk(6)
    at = some[:2, :, None].float()
    y = block.norm1(h) * (1 + at * scale1) + at * shift1
    q, k, v = block.qkv(y).view(2, 7, 3, 2, 4).permute(2, 0, 3, 1, 4)
    y = block.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 7, 8))
    want = h + (1 + at * gate1) * y
    y = block.mlp(block.norm2(want) * (1 + at * scale2) + at * shift2)
    want = want + (1 + at * gate2) * y
    assert torch.allclose(block(h, c, rope, some[:2]), want, atol=1e-5)


def test_siamese_recognition_depends_on_both_inputs():
    model, (x0, t, *_) = tiny_model(net="mlp"), tiny_batch()
    x_t = torch.where(torch.arange(7) < 3, 5, x0)
    mean, _ = model.recognise(x0, x_t, t)
    assert not torch.allclose(mean, model.recognise(x0, x0, t)[0], atol=1e-5)
    assert not torch.allclose(mean, model.recognise((x0 + 1) % 5, x_t, t)[0], atol=1e-5)
    rows, r = [], model.recognition
    r.trunk.register_forward_hook(lambda _, given, out: rows.append(len(given[0])))
    # Of one input, as a prior has, it runs once and says the same.
    assert torch.allclose(r(x0, x0, x0 == 5, t), r(x0, x0.clone(), x0 == 5, t), atol=1e-5)
    assert rows == [1, 2]


@pytest.mark.parametrize("net", ["dit", "mlp"])
def test_hide_xt_hides_x_t(net):
    model, (x0, t, *_) = tiny_model(net=net, hide_xt=True), tiny_batch()
    x_t = torch.where(torch.arange(7) < 3, 5, x0)
    assert torch.equal(model.recognise(x0, x_t, t)[0], model.recognise(x0, x0, t)[0])
    assert not torch.allclose(model.recognise((x0 + 1) % 5, x_t, t)[0], model.recognise(
        x0, x_t, t)[0], atol=1e-5)


@pytest.mark.parametrize("latent_at", ["adaln", "prefix"])
def test_only_a_position_table_tells_masks_apart(latent_at):
    """Where all is [MASK], whatever z; and a permuted x_0 looks the same to r only without order:
    the table is in the recognition network too."""
    all_masked, z = torch.full((2, 7), 5), torch.randn(2, 3)
    for positions in (False, True):
        model = tiny_model(latent_at=latent_at, positions=positions)
        h = model.denoise(all_masked, z, torch.ones(2))
        assert h.shape == (2, 7, 8)
        alike = torch.allclose(h, h[:, :1].expand_as(h), atol=1e-5)
        # A prefix is at another distance from each position, so rotary attention tells them apart.
        assert alike == (not positions and latent_at == "adaln")
        assert not torch.allclose(h[0], h[1], atol=1e-4)                   # z is heard
        same = torch.zeros(1, 7, dtype=torch.long)
        first = model.recognition.net.embed(same) - model.recognition.embed(same)
        assert first.any() == positions


def test_attention_pools_by_a_learned_query():
    model, (x0, t, *_) = tiny_model(pool="attention"), tiny_batch()
    net = model.recognition
    h = net.net(x0, torch.zeros(1), net.R, at=x0 == 5)
    q = net.attend.q(net.query).view(2, 4)
    k, v = net.attend.kv(h).view(6, 7, 2, 2, 4).unbind(2)
    share = (torch.einsum("he,nlhe->nlh", q, k) / 2).softmax(1)            # sqrt(4) = 2
    pooled = net.attend.out(torch.einsum("nlh,nlhe->nhe", share, v).flatten(1))
    want = net.readout(pooled).chunk(2, -1)[0]
    assert torch.allclose(model.recognise(x0, x0, t)[0], want, atol=1e-5)


def test_where_r_is_the_prior_z_comes_from_there_and_costs_nothing():
    """The loss is that of the denoiser at z ~ p(z), the KL 0, the recognition network untouched."""
    model, (x0, t, u, eps, not_pad, one) = tiny_model(prior_below=7), tiny_batch()
    x_t, masked = vadd.add_noise(x0, t, u, 5, "linear")
    want, _ = model.cross_entropy(model.denoise(x_t, eps, t), x0, masked & not_pad, 1 / t)
    loss, stats = model(x0, t, u, eps, not_pad, one)
    assert torch.allclose(loss, want, rtol=1e-5) and not stats["kl"].any()
    assert not stats["kl_per_dim"].any()
    loss.backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.recognition.parameters())

    model.cfg.prior_below = few = masked.sum(1).sort()[0][2].item()        # some rows
    per_row = [model(*(v[i:i + 1] for v in (x0, t, u, eps, not_pad)), one)[1]["kl"].sum()
               for i in range(len(x0))]
    assert [bool(kl) for kl in per_row] == (masked.sum(1) > few).tolist() and any(per_row)
    assert not tiny_model(prior="informed", prior_below=7).takes_prior(x_t).any()


def test_noise_is_a_function_of_seed_step_and_sample():
    """New at every step, with another seed, and for every sample; no matter which rank."""
    data = load_dataset("circles")
    cfg = Config(length=2, latent_dim=2, batch_size=8)
    ddp = common.DDP.start(Config(device="cpu"))
    load = lambda step, index, cfg=cfg: vadd.load_batch(  # noqa: E731
        cfg, data, step, torch.tensor(index), ddp)[1:4]
    whole, seen = load(3, range(8)), []
    for part, full in zip(load(3, [5, 1]), whole):
        assert torch.equal(part, full[[5, 1]])
    for other in [whole, load(9, range(8)), load(3, range(8), dataclasses.replace(cfg, seed=1))]:
        seen += [x.flatten() for x in other]
    values = torch.cat(seen)
    assert len(values.unique()) == len(values)
    batch = vadd.load_batch(cfg, data, 3, torch.arange(8), ddp)
    ids = data.train_batch(cfg.seed, 3, 8, range(8)).ids
    assert torch.equal(batch.x0, torch.from_numpy(ids)) and batch.not_pad.all()
    token = int(ids[0, 0])
    batch = vadd.load_batch(cfg, dataclasses.replace(data, pad_id=token), 3, torch.arange(8), ddp)
    assert torch.equal(batch.not_pad, batch.x0 != token) and not batch.not_pad.all()


def test_kl_weight_ramps_from_0_to_1():
    cfg = Config(kl_ramp=4)
    assert [vadd.kl_weight(s, cfg) for s in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert vadd.kl_weight(0, Config(kl_ramp=0)) == 1


def test_what_the_log_says():
    total = dict(tokens=40.0, weighted_nll=[60.0, *[0.0] * 8, 20.0], weighted_kl=[4.0, *[0.0] * 9],
                 ce=[6.0, *[0.0] * 8, 4.0], masked=[2.0, *[0.0] * 8, 8.0], kl=[3.0, *[0.0] * 9],
                 sequences=[1.0, *[0.0] * 8, 3.0], kl_per_dim=[2.8, 0.02, 0.18])
    record, shown = vadd.summarise(total, Config(latent_dim=3, kl_ramp=10), 4)
    assert record.pop("ce_by_t") == [3.0, *[None] * 8, 0.5]
    assert record.pop("kl_per_dim") == [0.7, 0.005, 0.045]
    assert record == pytest.approx(dict(
        delbo_nats=2.1, delbo_bits=2.1 / math.log(2), nll_given_z_nats=2.0, ce_masked_nats=1.0,
        kl_weight=0.4, kl_nats=0.75, active_dims=2))
    assert shown == dict(loss="2.100", kl="0.75", active="2/3")
    record, shown = vadd.summarise(total | dict(kl_per_dim=[]), Config(latent_dim=0), 4)
    assert "kl_nats" not in record and shown == dict(loss="2.100")


def test_flops_follow_the_networks_and_the_schedule():
    """Two DiTs, or MDLM's one; a cosine schedule hides 2/pi of the positions instead of half."""
    linear, cosine, mdlm = (vadd.flops_per_token(tiny_model(**flags), 7) for flags in (
        {}, {"alpha": "cosine"}, {"latent_dim": 0}))
    head = 6 * (5 + 1) * 8
    assert cosine - linear == pytest.approx((2 / math.pi - 0.5) * head, rel=1e-3)
    assert mdlm - head / 2 == pytest.approx((linear - head / 2) / 2)
    assert vadd.flops_per_token(tiny_model(net="mlp"), 7) == 0


# ------------------------------------------------------------------------- sampler


def chi_square(x, p):
    counts = torch.bincount(x[:, 0] * V + x[:, 1], minlength=9).double()
    return ((counts - p * len(x)) ** 2 / (p * len(x))).sum().item()


def draw(model, T, n=10_000, **options):
    start = torch.full((n, L), V)
    return list(vadd.sample(model, start, T, generator=torch.Generator().manual_seed(1), **options))


@pytest.mark.parametrize("alpha", ["linear", "cosine"])
def test_sampler_and_trainer_share_one_clock(alpha):
    """The exact denoiser without latent gives the data's distribution; 35 is exceeded once in
    30,000 times at 8 degrees of freedom. After k of T steps a share 1 - alpha is masked."""
    states = draw(World(latent=0, alpha=alpha), 200)
    assert chi_square(states[-1], P) < 35
    for k, x in enumerate(states, 1):
        share = (x == V).double().mean().item()
        assert abs(share - HIDDEN[alpha](1 - k / 200)) < 5 * math.sqrt(0.25 / 20_000)


@pytest.mark.parametrize("T,alpha", [(1, "linear"), (2, "linear"), (4, "linear"), (3, "cosine")])
def test_samples_follow_the_exact_transition(T, alpha):
    """Algorithm 2 against enumeration and quadrature: one z per step, shared by both positions."""
    model = World(sharp=0.9, alpha=alpha)
    x = draw(model, T)[-1]
    assert chi_square(x, sampled_exactly(model, T)) < 35
    product = (WORLD.sum(1)[:, None] * WORLD.sum(0)).flatten()
    assert chi_square(x, product) > 500                                    # what MDLM would do


def test_the_sampler_asks_the_prior_and_the_denoiser_at_t():
    """At t = 1, 3/4, 1/2, 1/4 of four steps, of the x_t that is there; z is what the prior drew."""
    class Watched(World):
        def prior_at(self, x_t, t):
            asked.append((x_t, t, torch.randn(len(x_t), 1)))
            return types.SimpleNamespace(draw=lambda eps, u: asked[-1][2])

        def denoise(self, x_t, z, t):
            assert all(a is b for a, b in zip((x_t, t, z), asked[-1]))
            return super().denoise(x_t, z, t)
    asked = []
    states = [torch.full((100, L), V), *draw(Watched(), 4, 100)]
    for k, (x_t, t, _) in enumerate(asked):
        assert torch.equal(x_t, states[k]) and (t == 1 - k / 4).all()
    assert len(asked) == 4


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_p": 0.5}])
def test_infilling_never_touches_kept_positions(options):
    model = tiny_model(seed=3)
    x = torch.tensor([[5, 1, 5, 5, 4, 0, 5]]).repeat(512, 1)

    def run(**kwargs):
        return list(vadd.sample(model, x, 8, generator=torch.Generator().manual_seed(0), **kwargs))
    states, kept = run(**options), x != 5
    for state in states:
        assert torch.equal(state[kept], x[kept])
    assert (states[-1] < 5).all() and (states[0] == 5).any()
    assert not options or not torch.equal(states[-1], run()[-1])


# ------------------------------------------------------------------------- toys


@pytest.mark.parametrize("name", ["checkerboard", "swissroll", "circles"])
def test_every_twentieth_point_is_a_fair_sample(name):
    """Evaluations take strided subsets; alternating circles once left one of the two out."""
    points = load_dataset(name, "nowhere").splits["train"].astype(float)
    radius = np.linalg.norm(points - 49.5, axis=1)
    part, rest = radius[::20], np.delete(radius, np.s_[::20])
    error = radius.std() / len(part) ** 0.5
    assert abs(part.mean() - rest.mean()) < 4 * error                     # 4 sigma


def test_perfect_mdm_is_the_samplers_distribution():
    p = WORLD.numpy()
    for T in (1, 2, 5):
        exact = sampled_exactly(World(latent=0), T)
        assert np.allclose(metrics.perfect_mdm(p, T).ravel(), exact.numpy())


# ------------------------------------------------------------------------- whole runs

TINY = ["--device", "cpu", "--dim", "16", "--depth", "1", "--batch_size", "8", "--micro_batch", "8",
        "--lr", "1e-2", "--lr_schedule", "constant", "--warmup", "2", "--kl_ramp", "4",
        "--log_every", "2", "--save_every", "3", "--sample_steps", "4", "--eval_sequences", "8",
        "--eval_draws", "1", "--K", "2", "--bound_steps", "1,2"]
TOY = [*TINY, "--samples", "50"]
TEXT = [*TINY, "--dataset", "pydoc", "--heads", "2", "--length", "16", "--latent_dim", "3",
        "--samples", "2"]


def main(*argv):
    common.main(vadd, list(argv))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture()
def run(tmp_path, data_dir):
    """run(steps, *flags, kind=TOY, out="a") -> the run folder."""
    def go(steps, *flags, kind=TOY, out="a"):
        folder = tmp_path / out
        main(*kind, "--data_dir", data_dir, "--out", str(folder), "--steps", str(steps), *flags)
        return folder
    return go


def records(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {r["step"]: r for r in lines if "delbo_nats" in r}


def losses(folder):
    return {step: r["delbo_nats"] for step, r in records(folder).items()}


def test_a_toy_run_leaves_everything_it_should(run, capsys):
    out = run(8)
    printed = capsys.readouterr().out
    for word in ("nll_delbo", "nll_bound_1", "nll_bound_2", "no bound", "mdlm at best",
                 "samples.png", "entropy of checkerboard/train: points 8.49"):
        assert word in printed, word
    result = json.loads((out / "result.json").read_text())
    assert set(result["toy"]) == {"data", "mdlm at best", "vadd"}
    assert set(result["toy"]["vadd"]) == {"1", "5", "10", "20"}
    figures = result["figures"]
    assert not figures["nll_delbo"]["is_bound"] and figures["nll_bound_1"]["is_bound"]
    assert figures["nll_delbo"]["unit"] == "nats/point" and figures["nll_delbo"]["draws"] == 8
    from PIL import Image
    assert Image.open(out / "samples.png").size == (932, 316)
    assert np.load(out / "histograms.npz")["1"].sum() == pytest.approx(1, abs=1e-4)
    last = records(out)[8]
    assert last["kl_weight"] == 1 and len(last["kl_per_dim"]) == 2 and "active_dims" in last


def test_a_text_run_and_its_samples(run, capsys, tmp_path, monkeypatch):
    out = run(4, kind=TEXT)
    printed = capsys.readouterr().out
    assert printed.count("--- sample") == 2 and "bits/char" in printed and "unigram" in printed
    flags = ["--dataset", "pydoc", "--mode", "sample", "--out", str(out), "--device", "cpu",
             "--data_dir", str(tmp_path / "nothing here"), "--samples", "3", "--sample_batch", "2"]
    with monkeypatch.context() as patch:
        patch.delattr(vadd, "load_dataset")  # the checkpoint is enough
        main(*flags)
    first = capsys.readouterr().out
    assert first.count("--- sample") == 3
    assert len((out / "samples.jsonl").read_text().splitlines()) == 3
    main(*flags)
    assert capsys.readouterr().out == first                                # a fixed seed
    for option in (["--temperature", "0.05"], ["--top_p", "0.1"]):
        main(*flags, *option)
        assert capsys.readouterr().out != first
    main("--dataset", "pydoc", "--mode", "eval", "--out", str(out), "--split", "test",
         "--data_dir", str(tmp_path / "d"), "--eval_draws", "2", "--bound_steps", "3")
    figures = json.loads((out / "eval.json").read_text())["figures"]
    figure = figures["nll_delbo"]
    assert set(figures) == {"nll_delbo", "nll_bound_3"}
    assert figure["split"] == "test" and figure["draws"] == 16 and figure["K"] == 2


def test_sampling_a_toy_writes_its_picture(run, capsys):
    out = run(2)
    (out / "samples.png").unlink()
    capsys.readouterr()
    main("--mode", "sample", "--out", str(out), "--sample_steps", "3", "--samples", "10")
    assert "3 steps" in capsys.readouterr().out and (out / "samples.png").exists()


def test_the_loop_follows_its_flags(run, monkeypatch):
    """Ramp of the KL, warm-up, clipping, EMA; what the log divides by."""
    forward, ramps, sums = VADD.forward, [], []

    def watched(self, *batch):
        loss, stats = forward(self, *batch)
        if self.training:
            ramps.append(batch[-1].item())
            sums.append((stats["weighted_nll"] + stats["weighted_kl"]).sum().item())
        return loss, stats
    monkeypatch.setattr(VADD, "forward", watched)
    out = run(6, "--micro_batch", "4", "--warmup", "4", "--clip", "1e-3")
    assert ramps[::2] == ramps[1::2] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert losses(out)[6] == pytest.approx(sum(sums[8:]) / (2 * 8 * 2))    # steps, points, bins
    assert [r["lr"] for r in records(out).values()] == pytest.approx([5e-3, 1e-2, 1e-2])
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    momentum = torch.cat([p["exp_avg"].flatten() for p in state["optimizer"]["state"].values()])
    assert 1e-4 < momentum.norm() < 1e-3
    assert state["ema"]["updates"] == 6


def test_posterior_collapse_is_said_once(run, capsys, monkeypatch):
    run(12, "--kl_ramp", "0")
    assert "posterior collapse" not in capsys.readouterr().err
    recognise = VADD.recognise
    monkeypatch.setattr(VADD, "recognise", lambda *args: tuple(0 * v for v in recognise(*args)))
    run(12, out="b")
    errors = capsys.readouterr().err
    assert errors.count("warning: posterior collapse at step 4:") == 1 and "--kl_ramp" in errors


@pytest.mark.parametrize("kind", [TOY, TEXT])
def test_the_cosine_schedule_from_training_to_samples(run, kind, capsys):
    out = run(6, "--alpha", "cosine", kind=kind)
    result = json.loads((out / "result.json").read_text())
    assert all(math.isfinite(f["value"]) for f in result["figures"].values())
    with pytest.raises(RunError, match="--alpha cosine, not linear"):
        run(8, "--alpha", "linear", kind=kind)
    linear = run(6, kind=kind, out="b")
    assert losses(out)[6] != losses(linear)[6]


def test_score_takes_the_sequences_of_the_run(run):
    """Not the full split: each bound costs K network calls per step."""
    out = run(2)
    assert common.score(vadd, str(out), [])["figures"]["nll_bound_1"]["draws"] == 8
    more = common.score(vadd, str(out), ["--eval_sequences", "12", "--split", "valid"])
    assert more["figures"]["nll_bound_1"]["draws"] == 12 and more["method"] == "vadd"
    mdlm = common.score(vadd, str(run(2, "--latent_dim", "0", out="b")), [])
    assert mdlm["method"] == "mdlm" and mdlm["figures"]["nll_delbo"]["is_bound"]


def test_wrong_bound_steps_and_widths_end_before_training(run, tmp_path):
    with pytest.raises(RunError, match="even multiple of --heads"):
        run(2, "--dim", "10", "--heads", "3", kind=TEXT)
    for wrong in ("1,x", "0", ""):
        with pytest.raises(RunError, match="give numbers of steps"):
            run(2, "--bound_steps", wrong)
    assert not (tmp_path / "a" / "log.jsonl").exists()


def test_presets_name_fields_and_datasets():
    fields = {f.name for f in dataclasses.fields(Config)}
    kinds = "stream", "rows", "toy", "pixels"
    ours = {name for name, recipe in DATASETS.items() if recipe.kind in kinds} - {"imagenet32"}
    assert set(vadd.PRESETS) == ours - set(ZERO_SHOT) | {"folder", "images"}
    for name, row in vadd.PRESETS.items():
        assert set(row) <= fields, name
        Config(**row)


def test_the_published_text_model():
    """12 x 768, latent 512: adaLN and z's embedding are about 6% of GPT-2 small (section 5.3)."""
    with torch.device("meta"):
        model = VADD(Config(**vadd.PRESETS["owt"]), 50257)
    count = lambda modules: sum(p.numel() for m in modules for p in m.parameters())  # noqa: E731
    net = model.denoiser.net
    extra = count([model.denoiser.latent, *[b.adaln for b in net.blocks]])
    assert 0.05 < extra / 125e6 < 0.07


# ------------------------------------------------------------------------- the table's trainer


def test_stacked_runs_equal_single_ones():
    """Three steps of two models under vmap, against each by itself with the same noise."""
    ddp = common.DDP.start(Config(device="cpu"))
    flags = dict(net="mlp", length=2, latent_dim=2, dim=8, depth=2, time_cond=True,
                 prior="informed", components=3, clip=1e6, ema=0)
    cfgs = [Config(**flags, seed=s) for s in (0, 1)]
    stack = vadd_toys.Stack(cfgs, ddp, compiled=False)
    g = torch.Generator().manual_seed(0)
    points = torch.randint(100, (2, 100_000, 2), generator=g)
    noise = [x[:3] for x in vadd_toys.epoch_noise(points, 2, g)]
    lr, weight = torch.tensor([1e-2, 2e-2, 1e-2]), torch.tensor([0.0, 0.5, 1.0])
    stacked = stack([*noise, lr, weight])
    for r, cfg in enumerate(cfgs):
        torch.manual_seed(cfg.seed)
        model = VADD(cfg, 100)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
        for i in range(3):
            optimizer.param_groups[0]["lr"] = lr[i].item()
            loss = model(*[x[i, r] for x in noise], weight[i])[0] / 512
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert loss.item() == pytest.approx(stacked[i, r].item(), rel=1e-3)
        mine, state = stack.unstack(r)
        for a, b in zip(mine.parameters(), model.parameters()):
            assert torch.allclose(a, b, atol=2e-3)
        assert state["state"][0]["step"] == 3
        assert len(state["state"]) == len(list(mine.parameters()))


def test_epoch_noise_takes_each_point_at_most_once():
    points = torch.stack([torch.arange(200_000).view(-1, 2), -torch.arange(200_000).view(-1, 2)])
    x0, t, u, eps, not_pad = vadd_toys.epoch_noise(points, 2, torch.Generator().manual_seed(0))
    assert x0.shape == (390, 2, 256, 2) and eps.shape == (390, 2, 256, 2) and not_pad.all()
    assert len(x0[:, 0].reshape(-1).unique()) == 390 * 256 * 2 and (x0[:, 1] <= 0).all()
    assert (t.sort(-1).values.diff(dim=-1) - 1 / 256).abs().max() < 2e-3   # low discrepancy


def test_the_table_from_start_to_end(tmp_path, capsys, monkeypatch):
    """One short epoch of tiny networks; its run folders are vadd.py's."""
    monkeypatch.setattr(vadd_toys, "steps_per_epoch", lambda: 30)
    flags = ["--seeds", "1", "--epochs", "1", "--dim", "8", "--samples", "500", "--device", "cpu",
             "--eval_sequences", "4", "--methods", "mdlm", "vadd",
             "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    vadd_toys.main(flags)
    printed = capsys.readouterr().out
    assert "| circles | vadd |" in printed and "(no bound)" in printed
    kept = json.loads((tmp_path / "results" / "vadd-toys.json").read_text())
    assert len(kept["runs"]) == 6 and len(kept["rows"]) == 9
    assert (tmp_path / "results" / "vadd-toys.png").exists()
    vadd_toys.main(flags)                                                  # nothing is done twice
    again = capsys.readouterr().out
    assert "mdlm: complete" in again and "30/30" not in again and "| circles | vadd |" in again
    assert json.loads((tmp_path / "results" / "vadd-toys.json").read_text()) == kept
    folder = tmp_path / "runs" / "vadd-circles-0"
    main("--dataset", "circles", "--out", str(folder), "--mode", "eval", "--device", "cpu",
         "--K", "2", "--bound_steps", "1")
    assert "nll_bound_1" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [True, False])
def test_cuda_graph_equals_plain_steps(compiled):
    """Three graphs' worth of steps (the first is not a graph yet) against the CPU."""
    flags = dict(net="mlp", length=2, latent_dim=2, dim=32, depth=2, time_cond=True, clip=1e6,
                 ema=0, amp="none", prior="informed", components=4)
    noise = vadd_toys.epoch_noise(torch.randint(100, (2, 100_000, 2)), 2,
                                  torch.Generator().manual_seed(0))
    lr, weight = torch.full((390,), 1e-3), torch.linspace(0, 1, 390)
    curves = []
    for device in ("cpu", "cuda"):
        ddp = common.DDP.start(Config(device=device, amp="none"))
        stack = vadd_toys.Stack([Config(**flags, seed=s) for s in (0, 1)], ddp, compiled)
        curves.append(torch.cat([
            stack([x[i:i + 10].to(ddp.device) for x in (*noise, lr, weight)]).cpu().clone()
            for i in (0, 10, 20)]))
    assert torch.allclose(*curves, rtol=0.03)                              # tf32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_bf16_training_on_the_gpu(run):
    flags = ["--device", "cuda", "--lr", "1e-3"]
    a = run(10, *flags, kind=TEXT, out="a")
    b = run(10, *flags, "--no-compile", "--amp", "none", kind=TEXT, out="b")
    assert losses(a) == pytest.approx(losses(b), rel=0.03)
