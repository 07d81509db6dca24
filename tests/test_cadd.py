"""cadd.py: forward process, loss, sampler and likelihoods against exact small worlds."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

import cadd
import common
from cadd import CADD, Config

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

    def __init__(self, hint="none", embeddings=None, prior=P):
        self.cfg = Config(hint=hint, dim=2, heads=1)
        self.embeddings = embeddings if embeddings is not None else torch.zeros(V + 1, 2)
        self.prior = prior

    def table(self):
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
                a, sigma = (c[:, None].double() for c in cadd.path(t, self.cfg.hint))
                gap = z_t[:, i, None] - a[..., None] * self.embeddings[STATES[:, i]].double()
                log_p += torch.where(visible, 0.0, -0.5 * gap.square().sum(-1) / sigma**2)
        p = log_p.softmax(-1)
        one_hot = F.one_hot(STATES, V).double()                            # (9, L, V)
        return torch.einsum("bs,slv->blv", p, one_hot).clamp_min(1e-300).log()

    def logits(self, h):
        return h

    def z0_soft(self, logits):
        return logits.softmax(-1) @ self.embeddings[:V].double()


class Guess(Oracle):
    """An arbitrary denoiser: fixed random logits for each x_t, shaken by the hint."""

    def __init__(self, hint="none", embeddings=None, seed=0):
        super().__init__(hint, embeddings)
        g = torch.Generator().manual_seed(seed)
        self.net = torch.randn((V + 1) ** 2, L, V, generator=g, dtype=torch.float64)
        self.mix = torch.randn(2, V, generator=g, dtype=torch.float64)

    def features(self, x_t, z_t, masked, t):
        h = self.net[x_t[:, 0] * (V + 1) + x_t[:, 1]]
        return h + (z_t.double() @ self.mix if z_t is not None else 0.0)


EMBEDDINGS = torch.tensor([[1.5, 0.0], [-0.5, 1.0], [-0.5, -1.0], [0.0, 0.0]])


def bounds(model, figure, draws, K=1, t_min=1e-5):
    """Bound on -log p(x_0) in nats and its standard error for each of the nine states."""
    x0 = STATES.repeat_interleave(draws, 0)
    values = cadd.likelihoods(model, iter([x0]), 1, 0, K=K, t_min=t_min)[figure]
    values = L * values.view(len(STATES), draws)
    return values.mean(1), values.std(1) / math.sqrt(draws)


# ------------------------------------------------------------------------- forward process


@pytest.mark.parametrize("hint", ["fm", "vp"])
def test_marginals_equal_the_simulated_chain(hint):
    """Eq. 10-11 against Eq. 7-8 step by step; 200,000 chains, 5 standard errors.

    Where a token is first masked the latent jumps to N(sqrt(gamma-bar_t) z_0, 1 - gamma-bar_t):
    Eq. 11 holds only with the bar (as in the proof of Lemma 2), not with gamma_t.
    """
    torch.manual_seed(0)
    n, T, z0 = 200_000, 12, 0.8
    masked, z = torch.zeros(n, dtype=torch.bool), torch.full((n,), z0, dtype=torch.float64)
    clock = torch.linspace(0, 1, T + 1, dtype=torch.float64)[:-2]  # stop short of t = 1
    for s, t in zip(clock[:-1], clock[1:]):
        (a_s, sigma_s), (a_t, sigma_t) = cadd.path(s, hint), cadd.path(t, hint)
        beta = 1 - (1 - t) / (1 - s)                                   # Eq. 7
        was, masked = masked, masked | (torch.rand(n) < beta)
        a_ts = a_t / a_s
        step = a_ts * z + (sigma_t**2 - a_ts**2 * sigma_s**2).sqrt() * torch.randn(n)
        jump = a_t * z0 + sigma_t * torch.randn(n)
        z = torch.where(was, step, torch.where(masked, jump, z))       # Eq. 8
    t = clock[-1]
    a, sigma = cadd.path(t, hint)
    assert abs(masked.double().mean() - t) < 5 * math.sqrt(t * (1 - t) / n)
    assert (z[~masked] == z0).all()
    m = masked.sum()
    assert abs(z[masked].mean() - a * z0) < 5 * sigma / m.sqrt()
    assert abs(z[masked].var() - sigma**2) < 5 * sigma**2 * (2 / m).sqrt()

    # the closed form draws from the same distribution
    x0 = torch.zeros(n, 1, dtype=torch.long)
    t32 = t.float().expand(n)
    x_t, closed = cadd.add_noise(x0, t32, torch.rand(n, 1), mask_id=1)
    eps = torch.randn(n, 1, 1)
    z_t = cadd.add_noise_to_hints(torch.full((n, 1, 1), z0), closed, t32, eps, hint)
    assert torch.equal(x_t[:, 0] == 1, closed[:, 0]) and (z_t[~closed] == z0).all()
    assert abs(closed.double().mean() - t) < 5 * math.sqrt(t * (1 - t) / n)
    assert abs(z_t[closed].mean() - a * z0) < 5 * sigma / m.sqrt()
    assert abs(z_t[closed].var() - sigma**2) < 5 * sigma**2 * (2 / m).sqrt()


def test_flip_and_keep_probabilities_sum_to_one():
    """Eq. 38 with alpha_t = 1 - t: (t - s)/t and s/t, for every pair of times."""
    alpha = lambda t: 1 - t  # noqa: E731
    for s, t in itertools.combinations(torch.linspace(0, 1, 11, dtype=torch.float64), 2):
        flip, keep = (alpha(s) - alpha(t)) / (1 - alpha(t)), (1 - alpha(s)) / (1 - alpha(t))
        assert flip + keep == pytest.approx(1) and flip == pytest.approx((t - s) / t)


@pytest.mark.parametrize("hint", ["fm", "vp"])
def test_kl_rate_is_the_limit_of_the_posteriors_kl(hint):
    """Eq. 19 for a short step, from the two posteriors themselves."""
    f64 = lambda v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    for t, z0, z0_hat in [(0.1, 0.3, 0.2), (0.5, 1.0, -1.0), (0.95, 0.0, 2.0)]:
        dt = 1e-6
        ab = [*cadd.path(f64(t), hint), *cadd.path(f64(t - dt), hint)]
        mean, var = common.gaussian_posterior(f64(0.4), f64(z0), *ab)
        mean_hat, _ = common.gaussian_posterior(f64(0.4), f64(z0_hat), *ab)
        rate = (mean - mean_hat) ** 2 / (2 * var) / dt
        want = cadd.path_kl_rate(f64(t), hint) * (z0 - z0_hat) ** 2
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


def test_hint_none_is_mdlm():
    """Ten lines of MDLM, written independently: loss and every gradient agree."""
    model, (x0, t, u, _, valid) = tiny_model(hint="none"), tiny_batch()
    loss, _ = model(x0, t, u, None, valid)
    loss.backward()
    got = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    x_t = x0.clone()
    x_t[u < t[:, None]] = 5                                            # [MASK]
    h = model.net(x_t, torch.zeros(1))                                 # no time conditioning
    logits = h @ model.head.weight.T + model.head.bias
    logits[..., 5] = -torch.inf                                        # never predicts [MASK]
    log_p = logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0]
    mdlm = -(log_p * (x_t == 5) / t[:, None]).sum()
    mdlm.backward()
    assert loss.item() == pytest.approx(mdlm.item(), rel=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert (got[name] - p.grad).norm() < 1e-3 * p.grad.norm(), name  # float32


def test_loss_with_hints_follows_algorithm_1():
    model, (x0, t, u, eps, valid) = tiny_model(), tiny_batch()
    loss, stats = model(x0, t, u, eps, valid)
    w = model.net.embed.weight
    want = 0.0
    for j in range(len(x0)):                                           # one sample at a time
        masked = u[j] < t[j]
        z_disc, z_t = w[torch.where(masked, 5, x0[j])], w[x0[j]].clone()
        z_t[masked] = (1 - t[j]) * z_t[masked] + t[j] * eps[j][masked]
        h = model.net((z_disc + z_t)[None], torch.zeros(1))[0]
        nll = F.cross_entropy(model.logits(h[masked]), x0[j][masked], reduction="sum")
        want = want + nll / t[j]
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    masked = u < t[:, None]
    assert stats[1].sum() == masked.sum() and stats[2].sum().item() == pytest.approx(loss.item())
    unweighted, _ = tiny_model(weight="none")(x0, t, u, eps, valid)
    assert unweighted.item() == pytest.approx(stats[0].sum().item(), rel=1e-5)  # Eq. 20 printed


def test_padding_carries_no_loss():
    model, (x0, t, u, eps, valid) = tiny_model(), tiny_batch()
    valid[:, 4:] = False
    loss, stats = model(x0, t, u, eps, valid)
    assert stats[1].sum() == ((u < t[:, None]) & valid).sum()
    full, _ = model(x0, t, u, eps, torch.ones_like(valid))
    assert loss < full


@pytest.mark.parametrize("flags", [
    {"fuse": "concat"}, {"fuse": "reweight"}, {"hint": "vp"}, {"hint_at": "masked"},
    {"embed_norm": 1.0}, {"time_cond": True}, {"mse": "soft"}, {"mse": "hard"},
    {"weight": "none"}, {"hint": "none"}, {"mse": "soft", "mse_weight": 3.0},
])
def test_every_option_changes_the_loss(flags):
    def loss(f):
        torch.manual_seed(0)
        x0, t, u, eps, valid = tiny_batch()
        return tiny_model(**f)(x0, t, u, None if f.get("hint") == "none" else eps, valid)[0].item()
    base = {"mse": "soft"} if "mse_weight" in flags else {}
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
    norms = tiny_model(embed_norm=0.5).table().norm(dim=-1)
    assert torch.allclose(norms, torch.full((6,), 0.5 * 8**0.5))


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


@pytest.mark.parametrize("hint,update", [
    ("none", "posterior"), ("fm", "posterior"), ("vp", "posterior")])
def test_sampler_and_trainer_share_one_clock(hint, update):
    """The exact denoiser through the sampler gives the data's distribution.

    8 degrees of freedom: 35 is exceeded once in 30,000 times; 200 steps reveal both positions
    at once rarely enough (bias of order 1/200 of the dependence).
    """
    model = Oracle(hint, EMBEDDINGS)
    generator = torch.Generator().manual_seed(1)
    start = torch.full((10_000, L), V)
    *_, x = cadd.sample(model, start, 200, z_update=update, generator=generator)
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


def test_reveal_counts_follow_the_schedule():
    """After k of T steps a token is still masked with probability 1 - k/T."""
    T, n = 10, 20_000
    states = list(cadd.sample(Oracle(), torch.full((n, L), V), T,
                              generator=torch.Generator().manual_seed(0)))
    for k, x in enumerate(states, 1):
        share = (x == V).double().mean().item()
        assert abs(share - (1 - k / T)) < 5 * math.sqrt(0.25 / (2 * n))


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


@pytest.mark.parametrize("options", [
    {}, {"z_update": "ddim"}, {"z_update": "fresh"}, {"z0_hat": "hard"}, {"K": 3},
    {"temperature": 0.5}, {"top_p": 0.5}])
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


def test_optimal_denoiser_reaches_the_entropy():
    mean, error = bounds(Oracle(), "nll_prior", 4000)
    gap, se = (P * mean).sum() - ENTROPY, (P * error).square().sum().sqrt()
    assert abs(gap) < 4 * se and se < 0.02


@pytest.mark.parametrize("hint", ["fm", "vp"])
def test_joint_bound_of_the_optimal_denoiser_reaches_the_entropy(hint):
    """In continuous time the exact denoiser is the exact reverse process: Eq. 24 is tight.

    This fixes path_kl_rate, both paths and their weights; the discrete part alone is far below.
    """
    model = Oracle(hint, EMBEDDINGS)
    mean, error = bounds(model, "nll_joint", 20_000, t_min=1e-3)
    gap, se = (P * mean).sum() - ENTROPY, (P * error).square().sum().sqrt()
    assert abs(gap) < 4 * se and se < 0.05
    leaky, _ = bounds(model, "nll_discrete", 4000)
    assert (P * leaky).sum() < ENTROPY - 0.3
    assert (-leaky).exp().sum() > 1.3                                  # no bound: more than 1
    # Valid, but of another model: the exact denoiser trusts noise that it takes for a hint.
    fresh, _ = bounds(model, "nll_prior", 4000)
    assert (P * fresh).sum() > ENTROPY + 1


@pytest.mark.parametrize("hint", ["fm", "vp"])
def test_joint_bound_may_end_early(hint):
    """Where positions are independent the last jump is exact, so a chain that ends at t = 1/2
    still reaches the entropy: clamped times count the reveal, not the hints."""
    product = (WORLD.sum(1)[:, None] * WORLD.sum(0)).flatten()
    entropy = -(product * product.log()).sum()
    mean, error = bounds(Oracle(hint, EMBEDDINGS, product), "nll_joint", 10_000, t_min=0.5)
    gap, se = (product * mean).sum() - entropy, (product * error).square().sum().sqrt()
    assert abs(gap) < 4 * se and se < 0.02


@pytest.mark.parametrize("hint,figure,K", [
    ("none", "nll_prior", 1), ("fm", "nll_prior", 1), ("fm", "nll_prior", 4),
    ("fm", "nll_joint", 1), ("vp", "nll_joint", 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_bounds_of_any_denoiser_sum_to_at_most_one(hint, figure, K, seed):
    mean, error = bounds(Guess(hint, EMBEDDINGS, seed), figure, 3000, K, t_min=1e-3)
    p = (-mean).exp()
    assert p.sum() <= 1 + 4 * (p * error).square().sum().sqrt()


def test_more_chains_tighten_the_prior_bound():
    one, error = bounds(Guess("fm", EMBEDDINGS), "nll_prior", 4000, K=1)
    four, _ = bounds(Guess("fm", EMBEDDINGS), "nll_prior", 4000, K=4)
    assert (P * four).sum() < (P * one).sum() - 2 * (P * error).square().sum().sqrt()


def test_likelihood_counts_valid_tokens_only():
    """A padded half changes neither numerator nor denominator: uniform denoiser, ln V per token."""
    class Uniform(Guess):
        def features(self, x_t, z_t, masked, t):
            return torch.zeros(*x_t.shape, V, dtype=torch.float64)
    x0 = STATES.repeat_interleave(3000, 0)
    padded = torch.cat([x0 % 2, torch.full_like(x0, 2)], 1)            # 2 is the padding here
    value = cadd.likelihoods(Uniform(), iter([padded]), 1, 0, pad_id=2)["nll_prior"]
    error = value.std().item() / len(value) ** 0.5
    assert value.mean().item() == pytest.approx(math.log(V), abs=5 * error)


# ------------------------------------------------------------------------- configuration


def test_presets_name_fields_and_datasets():
    from data import DATASETS
    fields = {f.name for f in dataclasses.fields(Config)}
    assert set(cadd.PRESETS) == set(DATASETS) | {"path"}
    for name, row in cadd.PRESETS.items():
        assert set(row) <= fields, name
        Config(**row)


def test_heads_must_divide_the_width():
    with pytest.raises(common.RunError, match="even multiple of --heads"):
        CADD(Config(dim=10, heads=3), 5)


def test_prompt_needs_a_gap():
    from data import load_dataset
    with pytest.raises(common.RunError, match="has no gap"):
        cadd.encode_prompt("nothing", load_dataset("pydoc", length=16))


def test_bench_prints_one_json_line(capsys):
    cadd.main(["--mode", "bench", "--device", "cpu", "--dim", "16", "--heads", "2", "--depth", "1",
               "--length", "8", "--micro_batch", "4", "--bench_steps", "2"])
    record = json.loads(capsys.readouterr().out)
    assert record["tokens_per_s"] > 0 and record["batch"] == 4
