"""cadd.py: forward process, loss, sampler and likelihoods against exact small worlds."""

import dataclasses
import itertools
import json
import math
import types

import pytest
import torch
import torch.nn.functional as F

import cadd
import common
from cadd import CADD, Config
from conftest import ROOT
from data import DATASETS, ZERO_SHOT, Batch, load_dataset

# ------------------------------------------------------------------------- a tiny world
# 3 symbols x 2 positions, a distribution with strong dependence between the positions.

V, L = 3, 2
WORLD = torch.tensor([[0.30, 0.02, 0.01], [0.03, 0.25, 0.04], [0.05, 0.10, 0.20]],
                     dtype=torch.float64)  # p(x^1, x^2)
STATES = torch.tensor(list(itertools.product(range(V), repeat=L)))  # (9, 2)
P = WORLD.flatten()
ENTROPY = -(P * P.log()).sum().item()


class Oracle:
    """Stands in for CADD: the exact p(x_0 | x_t, z_t) of the tiny world, by Bayes' rule."""

    V, mask_id = V, V

    def __init__(self, hint="none", embeddings=None, prior=P, alpha="linear", noise=1.0):
        self.cfg = Config(hint=hint, dim=2, heads=1, alpha=alpha, hint_noise=noise)
        self.embeddings = embeddings if embeddings is not None else torch.zeros(V + 1, 2)
        self.prior = prior

    def embedding_matrix(self):
        return self.embeddings

    def w(self, x):
        return self.embeddings[x]

    def features(self, x_t, z_t, masked, t):
        """log p(x_0^i = v | x_t, z_t) (B, L, V): its own softmax's logits."""
        log_p = self.prior.log().expand(len(x_t), -1).clone()              # (B, 9)
        for i in range(L):
            visible = ~masked[:, i, None]
            log_p += torch.where(visible & (STATES[:, i] != x_t[:, i, None]), -torch.inf, 0.0)
            if self.cfg.hint != "none":
                a, sigma = (c[:, None].double() for c in cadd.latent_schedule(
                    t, self.cfg.hint, self.cfg.hint_noise))
                gap = z_t[:, i, None] - a[..., None] * self.embeddings[STATES[:, i]].double()
                log_p += torch.where(visible, 0.0, -0.5 * gap.square().sum(-1) / sigma**2)
        p = log_p.softmax(-1)
        one_hot = F.one_hot(STATES, V).double()                            # (9, L, V)
        return torch.einsum("bs,slv->blv", p, one_hot).clamp_min(1e-300).log()

    def logits(self, h):
        return h

    def z0_hat(self, logits, kind):
        if kind == "hard":
            return self.embeddings[logits.argmax(-1)]
        return logits.softmax(-1) @ self.embeddings[:V].double()


class Guess(Oracle):
    """An arbitrary denoiser: fixed random logits for each x_t, shaken by the hint."""

    def __init__(self, hint="none", embeddings=None, seed=0, alpha="linear", noise=1.0):
        super().__init__(hint, embeddings, alpha=alpha, noise=noise)
        g = torch.Generator().manual_seed(seed)
        self.net = torch.randn((V + 1) ** 2, L, V, generator=g, dtype=torch.float64)
        self.push = torch.randn(2, V, generator=g, dtype=torch.float64)

    def features(self, x_t, z_t, masked, t):
        h = self.net[x_t[:, 0] * (V + 1) + x_t[:, 1]]
        return h + (z_t.double() @ self.push if z_t is not None else 0.0)


EMBEDDINGS = torch.tensor([[1.5, 0.0], [-0.5, 1.0], [-0.5, -1.0], [0.0, 0.0]])


def bounds(model, figure, draws, K=1, t_min=1e-5):
    """Bound on -log p(x_0) in nats and its standard error for each of the nine states."""
    x0 = STATES.repeat_interleave(draws, 0)
    values = cadd.likelihoods(model, iter([x0]), 1, 0, K=K, t_min=t_min)[figure]
    values = L * values.view(len(STATES), draws)
    return values.mean(1), values.std(1) / math.sqrt(draws)


# ------------------------------------------------------------------------- schedules

HIDDEN = {"linear": lambda t: t, "cosine": lambda t: torch.sin(math.pi / 2 * t)}  # 1 - alpha_t
TIMES = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)


@pytest.mark.parametrize("alpha", HIDDEN)
def test_schedule_and_weight_against_finite_differences(alpha):
    """1 - alpha_t grows from 0 to 1; its slope is -alpha'_t; the weight is d log(1 - alpha_t)."""
    hidden, slope = cadd.schedule(TIMES, alpha)
    assert torch.allclose(hidden, HIDDEN[alpha](TIMES), atol=1e-12)
    dt = 1e-5
    before, after = HIDDEN[alpha](TIMES - dt), HIDDEN[alpha](TIMES + dt)
    assert torch.allclose(slope, (after - before) / (2 * dt), rtol=1e-6)
    weight = cadd.loss_weight(TIMES, alpha)
    assert torch.allclose(weight, (after.log() - before.log()) / (2 * dt), rtol=1e-5)
    if alpha == "linear":
        assert torch.allclose(weight, 1 / TIMES)
    ends = cadd.schedule(torch.tensor([0.0, 1.0]), alpha)[0]
    assert torch.allclose(ends, torch.tensor([0.0, 1.0]), atol=1e-6)
    near_0 = cadd.schedule(torch.tensor([1e-9]), alpha)[0].item()      # float32 keeps its digits
    assert near_0 == pytest.approx({"linear": 1e-9, "cosine": math.pi / 2 * 1e-9}[alpha], rel=1e-6)


@pytest.mark.parametrize("alpha", HIDDEN)
def test_flip_and_keep_probabilities_sum_to_one(alpha):
    """Eq. 38 for every pair of times; (t - s)/t and s/t with alpha_t = 1 - t."""
    visible = lambda t: 1 - HIDDEN[alpha](t)  # noqa: E731
    for s, t in itertools.combinations(torch.linspace(0, 1, 11, dtype=torch.float64), 2):
        flip, keep = cadd.flip_probability(t, s, alpha), (1 - visible(s)) / (1 - visible(t))
        assert flip.item() == pytest.approx(((visible(s) - visible(t)) / (1 - visible(t))).item())
        assert (flip + keep).item() == pytest.approx(1)
        if alpha == "linear":
            assert flip.item() == pytest.approx(((t - s) / t).item())
    zero = torch.tensor(0.0, dtype=torch.float64)
    assert (cadd.flip_probability(TIMES, zero, alpha) == 1).all()  # the last step reveals all


@pytest.mark.parametrize("alpha", HIDDEN)
@pytest.mark.parametrize("power", [1, 3])
def test_chains_of_flips_have_the_marginals(alpha, power):
    """Both chains as products of transition matrices over (visible, hidden), on uneven grids:
    forward by Eq. 7, backward by Eq. 38, each ends with 1 - alpha_t hidden. Given x_0 they are one
    process: the joint law of two neighbouring times is the same in both directions."""
    grid = torch.linspace(0, 1, 14, dtype=torch.float64) ** power
    hidden = HIDDEN[alpha](grid)
    forward = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for k, (s, t) in enumerate(zip(grid[:-1], grid[1:]), 1):
        stay = (1 - hidden[k]) / (1 - hidden[k - 1])                   # alpha_t / alpha_s
        zero, one = torch.zeros_like(stay), torch.ones_like(stay)
        step = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([zero, one])])
        joint = forward[:, None] * step                                # (state at s, state at t)
        forward = forward @ step
        assert forward[1].item() == pytest.approx(hidden[k].item(), abs=1e-12)
        flip = cadd.flip_probability(t, s, alpha)
        reverse = torch.stack([torch.stack([one, zero]), torch.stack([flip, 1 - flip])])
        assert torch.allclose((forward[:, None] * reverse).T, joint, atol=1e-12)
    backward = torch.tensor([0.0, 1.0], dtype=torch.float64)           # all hidden at t = 1
    for k in range(len(grid) - 1, 0, -1):
        flip = cadd.flip_probability(grid[k], grid[k - 1], alpha) * backward[1]
        backward = backward + torch.stack([flip, -flip])
        assert backward[1].item() == pytest.approx(hidden[k - 1].item(), abs=1e-12)


@pytest.mark.parametrize("alpha", HIDDEN)
def test_the_corrector_leaves_the_marginal_of_x_t_unchanged(alpha):
    """By enumeration of the 16 states of x_t: hide from t to u, then reveal from u to t, position
    by position from the exact p(x_0^i | x_u). One position at a time is exact, so what two at once
    change is of second order in u - t."""
    states = list(itertools.product(range(V + 1), repeat=L))

    def law(t):  # of x_t
        share, p = HIDDEN[alpha](t).item(), torch.zeros(len(states), dtype=torch.float64)
        for j, x in enumerate(states):
            fits = torch.tensor([all(b in (a, V) for a, b in zip(x0, x)) for x0 in STATES.tolist()])
            p[j] = (P * fits).sum() * math.prod(share if b == V else 1 - share for b in x)
        return p

    def reveal(t, u):  # (from x_u, to x_t), the sampler's step
        x_u, t_u = torch.tensor(states), torch.tensor([u]).expand(len(states))
        p = Oracle(alpha=alpha).features(x_u, None, x_u == V, t_u).exp()   # (16, L, V)
        flip = cadd.flip_probability(u, t, alpha)
        one = torch.cat([flip * p, (1 - flip).expand(len(states), L, 1)], -1)
        one = torch.where((x_u == V)[..., None], one, F.one_hot(x_u, V + 1).double())
        return torch.stack([one[:, 0, a] * one[:, 1, b] for a, b in states], 1)

    def hide(t, u):
        share = cadd.hide_probability(t, u, alpha)
        keep = lambda a, b: (share if b == V else 1 - share) if a != V else 1.0  # noqa: E731
        return torch.tensor([[math.prod(float(keep(a, b)) if b in (a, V) else 0.0 for a, b in zip(
            x, y)) for y in states] for x in states], dtype=torch.float64)

    for t in (0.2, 0.6):
        changes = []
        for dt in (0.02, 0.01):
            t = torch.as_tensor(t, dtype=torch.float64)
            s = t - dt
            u = cadd.corrected_time(t, s, 6.0, alpha)
            assert t < u <= 1 and torch.allclose(law(t) @ hide(t, u), law(u), atol=1e-12)
            hidden = HIDDEN[alpha]
            rate = (hidden(u) - hidden(t)) / (hidden(t) - hidden(s))
            assert rate.item() == pytest.approx(6 * (1 - t.item())**2 * t.item()**0.25)
            changes.append((law(t) @ hide(t, u) @ reveal(t, u) - law(t)).abs().max().item())
        assert changes[0] < 0.01 and changes[1] < 0.3 * changes[0]
    one = torch.tensor(1.0, dtype=torch.float64)
    assert cadd.corrected_time(one, 0.9 * one, 6.0, alpha) == 1


@pytest.mark.parametrize("hint", ["fm", "vp"])
def test_hints_are_noised_further_along_their_path(hint):
    """q(z_u | x_0) from q(z_t | x_t, x_0), hidden at t or not; 4 standard errors of 50,000."""
    t, u, z0, n = torch.tensor(0.3), torch.tensor(0.7), 0.8, 50_000
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(2, n, 1, 1, generator=generator)
    for was in (True, False):
        masked = torch.full((n, 1), was)
        z_t = cadd.add_noise_to_hints(torch.full((n, 1, 1), z0), masked, t.expand(n), eps[0], hint,
                                      2.0)
        z_u = cadd.noise_hints_further(z_t, eps[1], masked, t, u, hint, 2.0)
        a, sigma = cadd.latent_schedule(u, hint, 2.0)
        assert abs(z_u.mean() - a * z0) < 4 * sigma / n**0.5
        assert abs(z_u.var() - sigma**2) < 4 * sigma**2 * (2 / n) ** 0.5


def test_the_temperature_falls_to_nothing():
    assert [round(cadd.cooled(2.5, t), 3) for t in (1, 0.5, 0)] == [2.5, 1.25, 0]


# ------------------------------------------------------------------------- forward process


@pytest.mark.parametrize("hint,alpha", [("fm", "linear"), ("vp", "linear"), ("fm", "cosine")])
def test_marginals_equal_the_simulated_chain(hint, alpha):
    """Eq. 10-11 against Eq. 7-8 step by step; 200,000 chains, 5 standard errors.

    Where a token is first masked the latent jumps to N(sqrt(gamma-bar_t) z_0, 1 - gamma-bar_t):
    Eq. 11 holds only with the bar (as in the proof of Lemma 2), not with gamma_t.
    """
    torch.manual_seed(0)
    n, T, z0 = 200_000, 12, 0.8
    masked, z = torch.zeros(n, dtype=torch.bool), torch.full((n,), z0, dtype=torch.float64)
    times = torch.linspace(0, 1, T + 1, dtype=torch.float64)[:-2]  # stop short of t = 1
    for s, t in zip(times[:-1], times[1:]):
        (a_s, sigma_s), (a_t, sigma_t) = (cadd.latent_schedule(v, hint) for v in (s, t))
        beta = 1 - (1 - HIDDEN[alpha](t)) / (1 - HIDDEN[alpha](s))     # Eq. 7
        was, masked = masked, masked | (torch.rand(n) < beta)
        a_ts = a_t / a_s
        step = a_ts * z + (sigma_t**2 - a_ts**2 * sigma_s**2).sqrt() * torch.randn(n)
        jump = a_t * z0 + sigma_t * torch.randn(n)
        z = torch.where(was, step, torch.where(masked, jump, z))       # Eq. 8
    t = times[-1]
    a, sigma = cadd.latent_schedule(t, hint)
    share = HIDDEN[alpha](t).item()
    assert abs(masked.double().mean() - share) < 5 * math.sqrt(share * (1 - share) / n)
    assert (z[~masked] == z0).all()
    m = masked.sum()
    assert abs(z[masked].mean() - a * z0) < 5 * sigma / m.sqrt()
    assert abs(z[masked].var() - sigma**2) < 5 * sigma**2 * (2 / m).sqrt()

    # the closed form draws from the same distribution
    x0 = torch.zeros(n, 1, dtype=torch.long)
    t32 = t.float().expand(n)
    x_t, closed = cadd.add_noise(x0, t32, torch.rand(n, 1), mask_id=1, alpha=alpha)
    eps = torch.randn(n, 1, 1)
    z_t = cadd.add_noise_to_hints(torch.full((n, 1, 1), z0), closed, t32, eps, hint)
    assert torch.equal(x_t[:, 0] == 1, closed[:, 0]) and (z_t[~closed] == z0).all()
    assert abs(closed.double().mean() - share) < 5 * math.sqrt(share * (1 - share) / n)
    assert abs(z_t[closed].mean() - a * z0) < 5 * sigma / m.sqrt()
    assert abs(z_t[closed].var() - sigma**2) < 5 * sigma**2 * (2 / m).sqrt()


@pytest.mark.parametrize("hint,noise", [("fm", 1.0), ("vp", 1.0), ("fm", 3.0)])
def test_kl_rate_is_the_limit_of_the_posteriors_kl(hint, noise):
    """Eq. 19 for a short step, from the two posteriors themselves."""
    f64 = lambda v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    for t, z0, z0_hat in [(0.1, 0.3, 0.2), (0.5, 1.0, -1.0), (0.95, 0.0, 2.0)]:
        dt = 1e-6
        ab = [c for v in (t, t - dt) for c in cadd.latent_schedule(f64(v), hint, noise)]
        mean, var = common.gaussian_posterior(f64(0.4), f64(z0), *ab)
        mean_hat, _ = common.gaussian_posterior(f64(0.4), f64(z0_hat), *ab)
        rate = (mean - mean_hat) ** 2 / (2 * var) / dt
        want = cadd.latent_kl_rate(f64(t), hint, noise) * (z0 - z0_hat) ** 2
        assert rate.item() == pytest.approx(want.item(), rel=1e-3)  # error of order dt / t


# ------------------------------------------------------------------------- model and loss


def tiny_model(seed=0, std=0.4, **flags):
    torch.manual_seed(seed)
    flags = {"dim": 8, "heads": 2, "depth": 2, "dropout": 0.0, **flags}
    model = CADD(Config(**flags), vocab_size=5)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


def tiny_batch(seed=0, B=6, length=7, d=8):
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randint(5, (B, length), generator=g)
    t = common.low_discrepancy_t(torch.arange(B), B, 0.3, 1e-3)
    u = torch.rand(B, length, generator=g)
    eps = torch.randn(B, length, d, generator=g)
    return x0, t, u, eps, torch.ones_like(x0, dtype=torch.bool)


def test_published_parameter_count():
    with torch.device("meta"):
        model = CADD(Config(hint="none"), 50257)
    assert sum(p.numel() for p in model.parameters()) == 169_627_218  # "169.6M"


@pytest.mark.parametrize("alpha", HIDDEN)
def test_hint_none_is_mdlm(alpha):
    """Ten lines of MDLM, written independently: loss and every gradient agree."""
    model, (x0, t, u, _, not_pad) = tiny_model(hint="none", alpha=alpha), tiny_batch()
    loss, _ = model(x0, t, u, None, not_pad)
    loss.backward()
    got = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    x_t = x0.clone()
    x_t[u < HIDDEN[alpha](t)[:, None]] = 5                             # [MASK]
    h = model.net(x_t, torch.zeros(1))                                 # no time conditioning
    logits = h @ model.head.weight.T + model.head.bias
    logits[..., 5] = -torch.inf                                        # never predicts [MASK]
    log_p = logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0]
    weight = {"linear": 1 / t, "cosine": math.pi / 2 / torch.tan(math.pi / 2 * t)}[alpha]
    mdlm = -(log_p * (x_t == 5) * weight[:, None]).sum()
    mdlm.backward()
    assert loss.item() == pytest.approx(mdlm.item(), rel=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert (got[name] - p.grad).norm() < 1e-3 * p.grad.norm(), name  # float32


def algorithm_1(model, x0, t, u, eps, not_pad):
    """The loss with hints, written anew one sample at a time; sums of ce, masked and bound too."""
    cfg, w, total, stats = model.cfg, model.net.embed.weight, 0.0, torch.zeros(3)
    if cfg.embed_norm:
        w = w / w.norm(dim=1, keepdim=True) * cfg.embed_norm * math.sqrt(cfg.dim)
    for j, angle in enumerate(math.pi / 2 * t):
        hidden, elbo = ((t[j], 1 / t[j]) if cfg.alpha == "linear"
                        else (angle.sin(), math.pi / 2 * angle.cos() / angle.sin()))
        a, sigma = (1 - t[j], t[j]) if cfg.hint == "fm" else (angle.cos(), angle.sin())
        sigma = cfg.hint_noise * sigma
        masked = u[j] < hidden
        w_x, z_t = w[torch.where(masked, 5, x0[j])], w[x0[j]].clone()
        z0 = z_t[masked].detach() if cfg.detach_hints else z_t[masked]
        hint = a * z0 + sigma * eps[j][masked]
        evidence = -(hint[:, None] - a * w[:5]).square().sum(-1) / (2 * sigma**2)  # (M, V)
        if cfg.hint_in == "c_in":
            rms = w[:5].square().mean().sqrt().detach()
            hint = hint * rms / (a**2 * rms**2 + sigma**2).sqrt()
        elif cfg.hint_in == "mean":
            hint = evidence.softmax(1) @ w[:5]
        z_t[masked] = hint
        if cfg.hint_at == "masked":
            z_t = z_t * masked[:, None]
        if cfg.fuse == "concat":
            h = torch.cat([w_x, z_t], 1) @ model.fuse.weight.T + model.fuse.bias
        else:  # C.3's formula with the alpha_t of Eq. 1: hints count where much is hidden
            h = w_x + z_t if cfg.fuse == "add" else (1 - hidden) * w_x + hidden * z_t
        told = cfg.time_cond or cfg.hint_in != "raw"
        h = model.net(h[None], t[j:j + 1] if told else torch.zeros(1))[0]
        scored = masked & not_pad[j]
        logits = (h @ model.head.weight.T + model.head.bias)[scored][:, :5]
        if cfg.hint_out:
            logits = logits + evidence[not_pad[j][masked]].detach()
        nll = F.cross_entropy(logits, x0[j][scored], reduction="sum")
        total = total + nll * (elbo if cfg.weight == "elbo" else 1)
        stats += torch.stack([nll, scored.sum(), nll * elbo]).detach()
        if cfg.mse != "none":
            guess = (logits.softmax(1) @ w[:5] if cfg.mse == "soft" else w[logits.argmax(1)])
            gap = guess - w[x0[j][scored]].detach()
            total = total + cfg.mse_weight * gap.square().sum()
    return total, stats


OPTIONS = [
    {"fuse": "concat"}, {"fuse": "reweight"}, {"hint": "vp"}, {"hint_at": "masked"},
    {"embed_norm": 1.0}, {"time_cond": True}, {"mse": "soft"}, {"mse": "hard"},
    {"weight": "none"}, {"mse": "soft", "mse_weight": 3.0}, {"alpha": "cosine"},
    {"hint_in": "c_in"}, {"hint_in": "mean"}, {"hint_out": True}, {"detach_hints": True},
    {"hint_noise": 2.0}]
named = lambda flags: "-".join(map(str, flags.values()))  # noqa: E731


@pytest.mark.parametrize("flags", [
    {}, *OPTIONS, {"fuse": "reweight", "alpha": "cosine", "hint": "vp", "hint_at": "masked"},
    {"fuse": "concat", "hint_at": "masked", "mse": "hard", "embed_norm": 0.5},
    {"hint_in": "mean", "hint_out": True, "embed_norm": 0.5, "hint": "vp", "hint_noise": 3.0}],
    ids=named)
def test_loss_with_hints_follows_algorithm_1(flags):
    """Loss, statistics and every gradient, that through z_0 = w(x_0) included, of every option."""
    model, (x0, t, u, eps, not_pad) = tiny_model(**flags), tiny_batch()
    model.net.embed.weight.data *= 3  # else what is visible hardly counts beside the blocks
    not_pad[:, 5:] = False
    loss, stats = model(x0, t, u, eps, not_pad)
    want, sums = algorithm_1(model, x0, t, u, eps, not_pad)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for name, value in zip(("ce", "masked", "bound"), sums.tolist()):
        assert stats[name].sum().item() == pytest.approx(value, rel=1e-5), name
    if flags.get("weight") == "none":                                  # Eq. 20 as printed
        assert loss.item() == pytest.approx(stats["ce"].sum().item(), rel=1e-5)
    names, parameters = zip(*model.named_parameters())
    own, other = (torch.autograd.grad(f, parameters, allow_unused=True) for f in (loss, want))
    for name, a, b in zip(names, own, other):
        assert (a is None) == (b is None), name
        assert a is None or (a - b).norm() < 1e-3 * b.norm() + 1e-6, name  # float32


def test_padding_carries_no_loss():
    model, (x0, t, u, eps, not_pad) = tiny_model(), tiny_batch()
    not_pad[:, 4:] = False
    loss, stats = model(x0, t, u, eps, not_pad)
    assert stats["masked"].sum() == ((u < t[:, None]) & not_pad).sum()
    full, _ = model(x0, t, u, eps, torch.ones_like(not_pad))
    assert loss < full


@pytest.mark.parametrize("flags", [*OPTIONS, {"hint": "none"}], ids=named)
def test_every_option_changes_the_loss(flags):
    def loss(f):
        torch.manual_seed(0)
        x0, t, u, eps, not_pad = tiny_batch()
        eps = None if f.get("hint") == "none" else eps
        return tiny_model(**f)(x0, t, u, eps, not_pad)[0].item()
    base = {"mse": "soft"} if "mse_weight" in flags else {}
    if "detach_hints" in flags:  # which only the gradient shows, see above
        return
    assert loss(flags) != pytest.approx(loss(base), rel=1e-6)


def test_dropout_acts_in_training_only():
    model, batch = tiny_model(dropout=0.5), tiny_batch()
    assert model(*batch)[0] != model(*batch)[0]
    model.eval()
    assert model(*batch)[0] == model(*batch)[0]


def test_hints_at_masked_positions_leave_visible_input_alone():
    """What --init_from relies on: where nothing is masked, the input is the MDM's."""
    model, (x0, t, *_) = tiny_model(hint_at="masked"), tiny_batch()
    mdm = tiny_model(hint="none")
    mdm.load_state_dict(model.state_dict())
    masked = torch.zeros_like(x0, dtype=torch.bool)
    a = model.features(x0, model.w(x0), masked, t)
    assert torch.equal(a, mdm.features(x0, None, masked, t))
    assert not torch.equal(a, tiny_model(hint_at="all").features(x0, model.w(x0), masked, t))


def test_embed_norm_fixes_the_length_of_embeddings():
    model = tiny_model(embed_norm=0.5, hint_out=True)
    norms = model.embedding_matrix().norm(dim=-1)
    assert torch.allclose(norms, torch.full((6,), 0.5 * 8**0.5))
    assert model.readout()[0][:, -1].abs().max() < 1e-6  # else bfloat16 tells them apart


def test_hint_accuracy_is_one_without_noise_and_chance_under_noise():
    model = tiny_model(embed_norm=1.0)
    x0 = torch.arange(2000).remainder(5)[None].expand(2, -1)
    eps = torch.randn(2, 2000, 8, generator=torch.Generator().manual_seed(0))
    accuracy = model.hint_accuracy(x0, torch.tensor([0.01, 0.999]), torch.zeros(2, 2000), eps)
    assert accuracy[0] == 1.0 and accuracy[5] is None
    assert abs(accuracy[9] - 0.2) < 0.05  # 5 standard errors of 2,000 draws at 1/5


# ------------------------------------------------------------------------- sampler


def chi_square(x, p):
    """Statistic of samples (n, 2) against the nine probabilities p."""
    counts = torch.bincount(x[:, 0] * V + x[:, 1], minlength=9).double()
    expected = p * len(x)
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("hint,alpha,corrector", [
    ("none", "linear", 0), ("fm", "linear", 0), ("vp", "linear", 0), ("none", "cosine", 0),
    ("fm", "cosine", 0), ("fm", "noise", 0), ("none", "linear", 4), ("fm", "cosine", 4)])
def test_sampler_and_trainer_share_one_clock(hint, alpha, corrector):
    """The exact denoiser through the sampler gives the data's distribution.

    8 degrees of freedom: 35 is exceeded once in 30,000 times; 200 steps reveal both positions
    at once rarely enough (bias of order 1/200 of the dependence).
    """
    noise = alpha == "noise"
    model = (Oracle(hint, EMBEDDINGS, noise=0.5) if noise
             else Oracle(hint, EMBEDDINGS, alpha=alpha))
    generator = torch.Generator().manual_seed(1)
    start = torch.full((10_000, L), V)
    *_, x = cadd.sample(model, start, 200, corrector=corrector, generator=generator)
    assert (x < V).all()
    assert chi_square(x, P) < 35
    assert chi_square(x, torch.full((9,), 1 / 9, dtype=torch.float64)) > 1000  # it can fail


def test_hard_estimates_seek_the_mode():
    """Eq. 21, left: likelier samples than the data, at the price of the distribution.

    -log p of the data has standard deviation under 1 nat: 0.016 over 4,000 samples.
    """
    surprise = {}
    for z0_hat in ("soft", "hard"):
        generator = torch.Generator().manual_seed(1)
        start = torch.full((4000, L), V)
        *_, x = cadd.sample(Oracle("fm", EMBEDDINGS), start, 200, z0_hat=z0_hat,
                            generator=generator)
        surprise[z0_hat] = -P[x[:, 0] * V + x[:, 1]].log().mean().item()
    assert abs(surprise["soft"] - ENTROPY) < 0.06
    assert surprise["hard"] < ENTROPY - 0.065 and chi_square(x, P) > 35


def test_one_step_samples_the_product_of_marginals():
    *_, x = cadd.sample(Oracle(), torch.full((10_000, L), V), 1,
                        generator=torch.Generator().manual_seed(0))
    product = (WORLD.sum(1)[:, None] * WORLD.sum(0)).flatten()
    assert chi_square(x, product) < 35 and chi_square(x, P) > 500


@pytest.mark.parametrize("alpha", HIDDEN)
def test_reveal_counts_follow_the_schedule(alpha):
    """After k of T steps a token is still masked with probability 1 - alpha at time 1 - k/T."""
    T, n = 10, 20_000
    states = list(cadd.sample(Oracle(alpha=alpha), torch.full((n, L), V), T,
                              generator=torch.Generator().manual_seed(0)))
    for k, x in enumerate(states, 1):
        share, want = (x == V).double().mean().item(), HIDDEN[alpha](torch.tensor(1 - k / T))
        assert abs(share - want) < 5 * math.sqrt(0.25 / (2 * n)), k


@pytest.mark.parametrize("alpha", HIDDEN)
@pytest.mark.parametrize("order", ["first-hitting", "confidence", "entropy"])
def test_one_token_per_call_has_the_datas_distribution(order, alpha):
    """Whichever position is chosen by what is visible, the exact denoiser draws from the data:
    two calls a sample; 8 degrees of freedom, as above. The first hit of two is at a hidden share
    max(u_1, u_2): mean 2/3, variance 1/18; 5 standard errors."""
    model, seen, n = Oracle(alpha=alpha), [], 10_000
    features = model.features
    model.features = lambda x, z, m, t: seen.append(t) or features(x, z, m, t)
    states = list(cadd.sample(model, torch.full((n, L), V), 2, order=order,
                              generator=torch.Generator().manual_seed(1)))
    assert [(x == V).sum(1).unique().tolist() for x in states] == [[1], [0]] and len(seen) == 2
    assert chi_square(states[-1], P) < 35 and (seen[0] == 1).all()
    if order == "first-hitting":
        first = (states[0] == V).double().mean(0)[0]
        assert abs(first - 1 / 2) < 5 * 0.5 / n**0.5
        assert abs(HIDDEN[alpha](seen[1]).mean() - 2 / 3) < 5 / (18 * n) ** 0.5


@pytest.mark.parametrize("alpha", HIDDEN)
@pytest.mark.parametrize("order", ["first-hitting", "confidence", "entropy"])
@pytest.mark.parametrize("hint", ["fm", "none"])
def test_orders_follow_the_schedule_and_keep_what_is_given(order, alpha, hint):
    """6 and 2 gaps of 8 positions: after call k of 3 the schedule's share of them is left, or one
    less per call; given tokens stay."""
    model = tiny_model(hint=hint, alpha=alpha)
    x = torch.tensor([[5, 1, 5, 5, 5, 0, 5, 5], [2, 1, 3, 5, 4, 0, 5, 0]])
    states = list(cadd.sample(model, x, 3, order=order, K=2,
                              generator=torch.Generator().manual_seed(0)))
    gaps = torch.tensor([6, 2])
    want = [gaps * HIDDEN[alpha](torch.tensor(1 - k / 3)) for k in (1, 2, 3)]
    if order == "first-hitting":
        want = [(gaps - k).clamp_min(0) for k in range(1, 7)]
    assert [(s == 5).sum(1).tolist() for s in states] == [w.round().int().tolist() for w in want]
    assert all(torch.equal(s[x != 5], x[x != 5]) for s in states)


@pytest.mark.parametrize("order, second_first", [("confidence", 1), ("entropy", 0)])
def test_confidence_is_the_best_token_and_entropy_the_whole_distribution(order, second_first):
    """(.5, .5, 0) has less entropy than (.2, .6, .2), whose best token is likelier."""
    model = Oracle()
    log_p = torch.tensor([[0.5, 0.5, 0], [0.2, 0.6, 0.2]], dtype=torch.float64).log()
    model.features = lambda x, z, m, t: log_p.expand(len(x), -1, -1)
    first, _ = cadd.sample(model, torch.full((50, L), V), 2, order=order)
    assert ((first[:, 1] < V) == bool(second_first)).all()


def test_first_hits_are_those_of_the_gaps():
    """2 gaps of 8 positions: the first hit at a share of mean 2/3, variance 1/18; 5 standard
    errors."""
    model, seen, n = tiny_model(hint="none"), [], 2000
    features = model.features
    model.features = lambda x, z, m, t: seen.append(t) or features(x, z, m, t)
    x = torch.tensor([[2, 1, 3, 5, 4, 0, 5, 0]]).repeat(n, 1)
    list(cadd.sample(model, x, 1, order="first-hitting",
                     generator=torch.Generator().manual_seed(0)))
    assert len(seen) == 2 and abs(seen[1].mean() - 2 / 3) < 5 / (18 * n) ** 0.5


def test_first_hitting_moves_hints_to_the_time_of_each_hit():
    """ddim with the truth, as below: z_s = (1 - s) z_0 + s eps at each sequence's own times."""
    world = torch.zeros(9, dtype=torch.float64)
    world[4] = 1.0                                                     # the data are always (1, 1)
    model, seen = Oracle("fm", EMBEDDINGS, prior=world), []
    features = model.features
    model.features = lambda x, z, m, t: seen.append((z, m, t)) or features(x, z, m, t)
    list(cadd.sample(model, torch.full((500, L), V), 9, z_update="ddim", order="first-hitting",
                     generator=torch.Generator().manual_seed(0)))
    (z_1, _, _), (z_s, masked, s) = seen
    s = s[:, None, None].expand_as(z_1)
    assert s.std() > 0.1 and (masked.sum(1) == 1).all()
    want = torch.where(masked[..., None], (1 - s) * EMBEDDINGS[1] + s * z_1, EMBEDDINGS[1])
    assert torch.allclose(z_s, want, atol=1e-6)


class Linear(Oracle):
    """p(v | z) linear in sign(z): averages over chains have one expectation for every K.

    (An average of log-probabilities would not: these swing between .05 and .55.)
    """

    def features(self, x_t, z_t, masked, t):
        base = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        push = torch.tensor([0.25, -0.25, 0.0], dtype=torch.float64)
        return (base + z_t[..., :1].sign().double() * push).log()


@pytest.mark.parametrize("K", [1, 4])
def test_K_chains_agree_in_expectation_for_a_linear_model(K):
    """One step, 20,000 samples of two positions, 5 standard errors."""
    *_, x = cadd.sample(Linear("fm", EMBEDDINGS), torch.full((20_000, L), V), 1, K=K,
                        generator=torch.Generator().manual_seed(K))
    share = torch.bincount(x.flatten(), minlength=V) / x.numel()
    assert torch.allclose(share, torch.tensor([0.5, 0.3, 0.2]), atol=5 * math.sqrt(0.25 / 40_000))


def test_mean_over_chains_is_of_probabilities():
    p = torch.tensor([[[0.5, 0.3, 0.2]], [[0.1, 0.1, 0.8]]], dtype=torch.float64)
    mean = cadd.mean_over_chains([x.log() + 7 for x in p])             # any constant in the logits
    assert torch.allclose(mean.exp(), torch.tensor([[0.3, 0.2, 0.5]], dtype=torch.float64))
    assert mean.dtype == torch.float64


@pytest.mark.parametrize("z0_hat", ["soft", "hard"])
def test_each_chain_has_its_own_estimate(z0_hat):
    """Eq. 21 and 5 with K = 3 and ddim, which draws nothing: soft estimates are each chain's own,
    the hard one is the mode of the mean over chains. Sampling's noise never enters z."""
    model, seen = Guess("fm", EMBEDDINGS), []
    features = model.features

    def record(x, z, masked, t):
        seen.append((z, masked, t, features(x, z, masked, t)))
        return seen[-1][-1]
    model.features = record
    list(cadd.sample(model, torch.full((300, L), V), 4, z_update="ddim", K=3, z0_hat=z0_hat,
                     generator=torch.Generator().manual_seed(0)))
    assert len(seen) == 12
    before, after = seen[3:6], seen[6:9]                               # t = 3/4 and t = 1/2
    p = torch.stack([logits.softmax(-1) for *_, logits in before])
    for k, ((z_t, _, _, _), (z_s, masked, t, _)) in enumerate(zip(before, after)):
        z0 = (p[k] @ EMBEDDINGS[:V].double() if z0_hat == "soft"
              else EMBEDDINGS[p.mean(0).argmax(-1)])
        assert t[0] == 0.5
        want = 0.5 * z0 + 0.5 / 0.75 * (z_t.double() - 0.25 * z0)
        assert masked.any() and torch.allclose(z_s[masked].double(), want[masked], atol=1e-5)
    assert not torch.allclose(after[0][0], after[1][0])


def test_fresh_hints_forget_the_old_ones():
    """z_update=fresh: standard normal at every step, unrelated to before; 5 standard errors."""
    model, seen = Guess("fm", EMBEDDINGS), []
    features = model.features
    model.features = lambda x, z, m, t: seen.append((z, m)) or features(x, z, m, t)
    list(cadd.sample(model, torch.full((4000, L), V), 4, z_update="fresh",
                     generator=torch.Generator().manual_seed(0)))
    (one, _), (two, masked) = seen[1:3]
    pairs = torch.stack([one[masked].flatten(), two[masked].flatten()])
    n = pairs.shape[1]
    assert abs(pairs.mean()) < 5 / n**0.5 and abs(pairs[1].var() - 1) < 5 * (2 / n)**0.5
    assert abs(torch.corrcoef(pairs)[0, 1]) < 5 / n**0.5


@pytest.mark.parametrize("options", [
    {}, {"z_update": "ddim"}, {"z_update": "fresh"}, {"z0_hat": "hard"}, {"K": 3},
    {"temperature": 0.5}, {"top_p": 0.5}, {"corrector": 12.0}, {"cool": True}])
def test_infilling_never_touches_kept_positions(options):
    """Every sampler option: kept tokens stay at every step, gaps are filled, the option matters."""
    model = tiny_model(seed=3)
    model.head.weight.data *= 0.1  # unsure, so that soft and hard estimates differ
    x = torch.tensor([[5, 1, 5, 5, 4, 0, 5, 5]]).repeat(512, 1)

    def run(**kwargs):
        generator = torch.Generator().manual_seed(0)
        return list(cadd.sample(model, x, 8, generator=generator, **kwargs))
    states = run(**options)
    kept = x != 5
    for state in states:
        assert torch.equal(state[kept], x[kept])
    assert (states[-1] < 5).all() and (states[0] == 5).any()
    assert not options or not torch.equal(states[-1], run()[-1])


def test_ddim_with_the_truth_lands_on_the_path():
    """Equal noise before and after: z_s = a_s z_0 + sigma_s eps exactly, with z0hat = z_0."""
    world = torch.zeros(9, dtype=torch.float64)
    world[4] = 1.0                                                     # the data are always (1, 1)
    model = Oracle("fm", EMBEDDINGS, prior=world)
    seen = []
    features = model.features
    model.features = lambda x, z, m, t: seen.append((z, m, t)) or features(x, z, m, t)
    list(cadd.sample(model, torch.full((500, L), V), 4, z_update="ddim",
                     generator=torch.Generator().manual_seed(0)))
    (z_1, _, _), (z_s, masked, t) = seen[0], seen[1]
    want = (1 - t[0]) * EMBEDDINGS[1] + t[0] * z_1                     # at t = 1, z is eps itself
    assert masked.any() and torch.allclose(z_s[masked], want[masked], atol=1e-6)
    assert torch.equal(z_s[~masked], EMBEDDINGS[1].expand_as(z_s)[~masked])


# ------------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("alpha", HIDDEN)
def test_optimal_denoiser_reaches_the_entropy(alpha):
    mean, error = bounds(Oracle(alpha=alpha), "nll_prior", 4000)
    gap, se = (P * mean).sum() - ENTROPY, (P * error).square().sum().sqrt()
    assert abs(gap) < 4 * se and se < 0.02


@pytest.mark.parametrize("alpha", HIDDEN)
def test_the_bound_depends_on_no_schedule(alpha):
    """Of a model that ignores t and hints (Eq. 2 is an integral over 1 - alpha_t): by quadrature
    and enumeration of what is hidden, and as `likelihoods` estimates it."""
    model, want = Guess(), torch.zeros(len(STATES), dtype=torch.float64)
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    hidden, weight = cadd.schedule(t, alpha)[0], cadd.loss_weight(t, alpha)
    found = torch.zeros_like(want)
    for hide in itertools.product((False, True), repeat=L):
        masked = torch.tensor(hide).expand(len(STATES), L)
        x_t = torch.where(masked, V, STATES)
        log_p = model.features(x_t, None, masked, None).log_softmax(-1)
        nll = -(log_p.gather(-1, STATES[..., None])[..., 0] * masked).sum(1)
        n = sum(hide)
        found += nll * (weight * hidden**n * (1 - hidden) ** (L - n)).mean()
        want += nll * (1 / 2 if n else 0)  # integral of m^(n-1) (1-m)^(2-n) dm, n = 1 and 2
    assert torch.allclose(found, want, atol=1e-4)
    mean, error = bounds(Guess(alpha=alpha), "nll_prior", 20_000)
    gap, se = (P * (mean - want)).sum(), (P * error).square().sum().sqrt()
    assert abs(gap) < 4 * se and se < 0.03 and ((mean - want).abs() < 5 * error).all()


@pytest.mark.parametrize("hint,alpha,noise", [
    ("fm", "linear", 1.0), ("vp", "linear", 1.0), ("fm", "cosine", 1.0), ("fm", "linear", 2.0)])
def test_joint_bound_of_the_optimal_denoiser_reaches_the_entropy(hint, alpha, noise):
    """In continuous time the exact denoiser is the exact reverse process: Eq. 24 is tight.

    This fixes latent_kl_rate, the schedules and their weights; the discrete part alone is far
    below.
    """
    model = Oracle(hint, EMBEDDINGS, alpha=alpha, noise=noise)
    mean, error = bounds(model, "nll_joint", 20_000, t_min=1e-3)
    gap, se = (P * mean).sum() - ENTROPY, (P * error).square().sum().sqrt()
    assert abs(gap) < 4 * se and se < 0.05
    leaky, _ = bounds(model, "nll_discrete", 4000)
    assert (P * leaky).sum() < ENTROPY - 0.3 / noise
    assert (-leaky).exp().sum() > 1.3 - 0.1 * (noise > 1)              # no bound: more than 1
    # Valid, but of another model: the exact denoiser trusts noise that it takes for a hint.
    fresh, _ = bounds(model, "nll_prior", 4000)
    assert (P * fresh).sum() > ENTROPY + 1 / noise


@pytest.mark.parametrize("hint,alpha", [("fm", "linear"), ("vp", "linear"), ("fm", "cosine")])
def test_joint_bound_may_end_early(hint, alpha):
    """Where positions are independent the last jump is exact, so a chain that ends at t = 1/2
    still reaches the entropy: clamped times count the reveal, not the hints."""
    product = (WORLD.sum(1)[:, None] * WORLD.sum(0)).flatten()
    entropy = -(product * product.log()).sum()
    model = Oracle(hint, EMBEDDINGS, product, alpha)
    mean, error = bounds(model, "nll_joint", 10_000, t_min=0.5)
    gap, se = (product * mean).sum() - entropy, (product * error).square().sum().sqrt()
    assert abs(gap) < 4 * se and se < 0.02


@pytest.mark.parametrize("hint,figure,K,alpha", [
    ("none", "nll_prior", 1, "linear"), ("fm", "nll_prior", 1, "linear"),
    ("fm", "nll_prior", 4, "linear"), ("fm", "nll_joint", 1, "linear"),
    ("vp", "nll_joint", 1, "linear"), ("fm", "nll_joint", 1, "cosine")])
@pytest.mark.parametrize("seed", [0, 1])
def test_bounds_of_any_denoiser_sum_to_at_most_one(hint, figure, K, alpha, seed):
    mean, error = bounds(Guess(hint, EMBEDDINGS, seed, alpha), figure, 3000, K, t_min=1e-3)
    p = (-mean).exp()
    assert p.sum() <= 1 + 4 * (p * error).square().sum().sqrt()


def test_more_chains_tighten_the_prior_bound():
    one, error = bounds(Guess("fm", EMBEDDINGS), "nll_prior", 4000, K=1)
    four, _ = bounds(Guess("fm", EMBEDDINGS), "nll_prior", 4000, K=4)
    assert (P * four).sum() < (P * one).sum() - 2 * (P * error).square().sum().sqrt()


def test_likelihood_counts_tokens_that_are_no_padding():
    """A padded half changes neither numerator nor denominator: uniform denoiser, ln V per token."""
    class Uniform(Guess):
        def features(self, x_t, z_t, masked, t):
            return torch.zeros(*x_t.shape, V, dtype=torch.float64)
    x0 = STATES.repeat_interleave(3000, 0)
    padded = torch.cat([x0 % 2, torch.full_like(x0, 2)], 1)            # 2 is the padding here
    value = cadd.likelihoods(Uniform(), iter([padded]), 1, 0, pad_id=2)["nll_prior"]
    error = value.std().item() / len(value) ** 0.5
    assert value.mean().item() == pytest.approx(math.log(V), abs=5 * error)


# ------------------------------------------------------------------------- batches


@pytest.mark.parametrize("hint", ["fm", "none"])
def test_noise_is_a_function_of_seed_step_and_sample(hint):
    """Parts of a batch hold what the whole one holds for these samples; steps and seeds differ."""
    data = types.SimpleNamespace(
        length=5, not_pad=lambda x: x != 2,
        train_batch=lambda seed, step, n, index: types.SimpleNamespace(
            ids=torch.arange(n * 5).view(n, 5)[index].remainder(4).numpy()))
    ddp = common.DDP(0, 1, torch.device("cpu"), False)

    def batch(index, step=3, seed=0):
        cfg = Config(hint=hint, batch_size=12, dim=8, seed=seed)
        return cadd.load_batch(cfg, data, step, torch.tensor(index), ddp)
    whole, part = batch(range(12)), batch([7, 1])
    for name, a, b in zip(whole._fields, whole, part):
        assert (a is None and b is None and hint == "none") or torch.equal(a[[7, 1]], b), name
    assert torch.equal(whole.not_pad, whole.x0 != 2) and not whole.not_pad.all()
    gaps = whole.t.sort().values.diff()
    assert gaps.min() > 1 / 12 - 2e-3 and whole.t.min() >= 1e-3        # low discrepancy
    for other in (batch(range(12), step=4), batch(range(12), seed=1)):
        assert (other.t != whole.t).all() and (other.u != whole.u).all()
        assert hint == "none" or (other.eps != whole.eps).all()


# ------------------------------------------------------------------------- what flags reach


class Words:
    """Data of words in place of Sequences: ids 0 to 4, 0 is padding."""

    pad_id, length, unit, mask_id, vocab_size = 0, 6, "char", 5, 5
    splits = ("train", "valid")
    ids = torch.tensor([[1, 2, 3, 4, 0, 0], [4, 3, 2, 1, 1, 0], [2, 2, 2, 2, 2, 2]]).numpy()

    def num_sequences(self, split):
        return len(self.ids)

    def decode(self, ids):
        return str(ids)

    def eval_batches(self, split, batch_size, limit=None, start=0, stride=1):
        chosen = self.ids[:limit][start::stride]
        for i in range(0, len(chosen), batch_size):
            yield Batch(chosen[i:i + batch_size])


def test_the_chain_ends_where_training_data_say(monkeypatch):
    """A sequence weighs by its tokens; 0.01 is best on train, 0.1 on valid and by sequences."""
    def fake(model, batches, draws, seed, pad_id, K, t_min):
        n = len(torch.cat([x for x in batches]))
        tokens = torch.tensor([1, 15]).repeat(n // 2)
        nll = torch.where(tokens == 15, 1.0, 0.0 if t_min == 0.1 else 9.0)
        nll = nll + (t_min != {128: 0.01, 6: 0.1}[n])
        return {"tokens": tokens, "nll_joint": nll.double(), "nll_discrete": nll.double()}
    monkeypatch.setattr(cadd, "likelihoods", fake)
    monkeypatch.setattr(Words, "ids", torch.zeros(128, 7, dtype=torch.long).numpy())
    cfg = dataclasses.replace(tiny_model().cfg, eval_sequences=6)
    figures = cadd.evaluate(None, cfg, Words(), common.DDP(0, 1, torch.device("cpu"), False))
    assert figures["nll_joint"]["t_min"] == 0.01
    monkeypatch.setattr(Words, "splits", ("valid",))  # a zero-shot set has no training data
    figures = cadd.evaluate(None, cfg, Words(), common.DDP(0, 1, torch.device("cpu"), False))
    assert figures["nll_joint"]["t_min"] == cadd.T_MIN[0]
    cfg.t_min = 0.3
    figures = cadd.evaluate(None, cfg, Words(), common.DDP(0, 1, torch.device("cpu"), False))
    assert figures["nll_joint"]["t_min"] == 0.3


def test_the_stored_baseline_stands_beside_what_it_compares_with(monkeypatch):
    """It is the log's, and shown on the preset's valid split after the preset's steps alone."""
    for name, bits in cadd.MDLM_BITS.items():
        log = json.loads((ROOT / "results" / f"mdlm-{name}.json").read_text())
        figures = (log["runs"][0] if "runs" in log else log)["result"]["figures"]
        assert bits == round(figures["nll_prior"]["value"], 3)
        assert figures["nll_prior"]["split"] == "valid" and name in cadd.PRESETS
    model, ddp = tiny_model(), common.DDP(0, 1, torch.device("cpu"), False)
    cfg = dataclasses.replace(model.cfg, dataset="pydoc", steps=2000, t_min=0.1, eval_draws=1)
    for change, shown in (({}, True), (dict(steps=1999), False), (dict(split="test"), False),
                          (dict(dataset="text8"), False)):
        figures = cadd.evaluate(model, dataclasses.replace(cfg, **change), Words(), ddp)
        beside = [name for name, f in figures.items() if "MDLM's: 2.690" in f.get("beside", "")]
        assert beside == ["nll_joint"] * shown


def test_paper_is_the_papers_letter():
    """--paper takes the place of a preset's hints, and other flags still win."""
    parse = lambda *flags: common.parse_config(cadd, list(flags))  # noqa: E731
    letter = dict(hint_in="raw", hint_out=False, hint_noise=1.0, time_cond=False, embed_norm=0.0)
    for name in ("pydoc", "english27", "owt", "glyph-pixels"):
        want = dataclasses.replace(parse("--dataset", name), paper=True, **letter)
        assert parse("--dataset", name, "--paper") == want
        assert parse("--dataset", name) != dataclasses.replace(want, paper=False)
    assert parse("--paper", "--hint_noise", "3").hint_noise == 3


def test_calls_of_a_prompt_are_its_gaps(data_dir):
    """One each with --order first-hitting, else the steps; without a prompt all are gaps."""
    data = load_dataset("pydoc", data_dir, 16)
    for prompt, gaps in (("the ___ of", 3), ("", 16)):
        assert Config(prompt=prompt, order="first-hitting").calls(data) == gaps
        assert Config(prompt=prompt, sample_steps=7).calls(data) == 7


def test_evaluation_follows_its_flags():
    """Draws, chains, padding and the rank's noise reach `likelihoods`."""
    model = tiny_model()
    cfg = dataclasses.replace(model.cfg, eval_draws=3, K=2, micro_batch=2, seed=5, t_min=1e-3)
    for rank in (0, 1):
        ddp = common.DDP(rank, 1, torch.device("cpu"), False)
        figures = cadd.evaluate(model, cfg, Words(), ddp)
        batches = (torch.from_numpy(x) for x, _ in Words().eval_batches("valid", 2, None, rank))
        want = cadd.likelihoods(model, batches, 3, common.fold_in(5, rank), pad_id=0, K=2)
        tokens = want.pop("tokens").double()
        assert list(figures) == list(want)
        for name, values in want.items():
            mean = (values * tokens).sum() / tokens.sum()
            assert figures[name]["value"] == pytest.approx(mean.item() / math.log(2))
            assert figures[name]["draws"] == 3 * (3 - rank)
    assert [f["is_bound"] for f in figures.values()] == [True, True, False]


def test_sampling_follows_its_flags(monkeypatch, tmp_path, capsys):
    """Every sampler flag reaches `sample`, and so does what is given."""
    seen, options = [], dict(temperature=0.7, top_p=0.9, z0_hat="hard", z_update="ddim", K=3,
                         order="entropy", corrector=2.0, cool=True)

    def spy(model, x, steps, *, generator, **given):
        seen.append((tuple(x.shape), steps, given))
        yield x
    monkeypatch.setattr(cadd, "sample", spy)
    cfg = Config(samples=5, sample_batch=3, sample_steps=7, out=str(tmp_path), **options)
    cadd.draw(tiny_model(), cfg, Words(), common.DDP(0, 1, torch.device("cpu"), False))
    assert seen == [((3, 6), 7, options), ((2, 6), 7, options)]
    assert capsys.readouterr().out.count("--- sample") == 5


# ------------------------------------------------------------------------- configuration


def test_presets_name_fields_and_datasets():
    fields = {f.name for f in dataclasses.fields(Config)}
    kinds = "stream", "rows", "pixels"
    texts = {name for name, recipe in DATASETS.items() if recipe.kind in kinds}
    assert set(cadd.PRESETS) == texts - set(ZERO_SHOT) | {"folder", "images"}
    for name, row in cadd.PRESETS.items():
        assert set(row) <= fields, name
        Config(**row)


@pytest.mark.parametrize("name, hint_in", [("english27", "mean"), ("text8", "mean"),
                                           ("lm1b", "c_in"), ("lm1b-padded", "c_in"),
                                           ("owt", "c_in")])
def test_hints_of_large_texts_are_weak(name, hint_in):
    """Embeddings of length .24 at width 768, without Bayes' rule at the output, as cadd.md's table
    of GPT-2's vocabulary chose them."""
    cfg = Config(**cadd.PRESETS[name])
    assert (cfg.hint_in, cfg.hint_out, cfg.hint_noise, cfg.dim) == (hint_in, False, 1.0, 768)
    assert cfg.embed_norm * math.sqrt(cfg.dim) == pytest.approx(0.24, rel=1e-3)


def test_heads_must_divide_the_width():
    with pytest.raises(common.RunError, match="even multiple of --heads"):
        cadd.build(Config(dim=10, heads=3), types.SimpleNamespace(vocab_size=5, shape=None,
                                                                 unit="char"))


def test_prompt_needs_a_gap(data_dir):
    with pytest.raises(common.RunError, match="has no gap"):
        common.encode_prompt("nothing", load_dataset("pydoc", data_dir, 16))


def test_names_of_the_methods():
    assert [cadd.name_of(Config(hint=h)) for h in ("fm", "vp", "none")] == ["cadd", "cadd", "mdlm"]
