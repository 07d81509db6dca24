"""The shared mathematics, network and plumbing of common.py."""

import argparse
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
from common import RunError, arg


def place(rank=0, world=1):
    return common.Setup(rank, world, torch.device("cpu"), amp=False)


# ------------------------------------------------------------------------- mathematics


def test_low_discrepancy_t_covers_the_interval_evenly():
    n = 40
    t = common.low_discrepancy_t(torch.arange(n), n, u=0.3719, t_min=1e-3)
    assert torch.equal(torch.bincount((t * n).long(), minlength=n), torch.ones(n).long())
    assert t.min() >= 1e-3 and t.max() < 1


def test_low_discrepancy_t_clamps_only_near_zero():
    t = common.low_discrepancy_t(torch.arange(4), 4, u=0.0, t_min=1e-3)
    assert t.tolist() == pytest.approx([1e-3, 0.25, 0.5, 0.75])


def test_categorical_frequencies_of_a_rare_token():
    """p = 1e-6: 16M draws give 16 +- 4; 5 standard deviations either way."""
    torch.manual_seed(0)
    logits = torch.tensor([math.log(1 - 1e-6), math.log(1e-6)], dtype=torch.float64)
    hits = sum(common.sample_categorical(logits.expand(4_000_000, 2)).sum() for _ in range(4))
    assert 0 < hits < 36


def test_categorical_inverts_the_distribution_function_exactly():
    p = torch.tensor([0.25, 0.0, 0.5, 1e-9, 0.25 - 1e-9], dtype=torch.float64)
    u = torch.tensor([0.0, 0.2499999, 0.2500001, 0.7499999, 0.75 + 5e-10, 0.75 + 2e-9, 1 - 1e-12],
                     dtype=torch.float64)
    x = common.sample_categorical(p.log().expand(7, 5), u=u)
    assert x.tolist() == [0, 0, 2, 2, 3, 4, 4]  # never 1, which has probability 0


def test_categorical_temperature_and_top_p():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    count = lambda **k: torch.bincount(  # noqa: E731
        common.sample_categorical(p.log().expand(10_000, 4), u=u, **k), minlength=4) / 10_000
    # half a grid cell per boundary
    assert torch.allclose(count(), p.float(), atol=2e-4)
    assert torch.allclose(count(temperature=0.5), (p**2 / (p**2).sum()).float(), atol=2e-4)
    assert torch.allclose(count(top_p=0.79), torch.tensor([0.625, 0.375, 0, 0]), atol=2e-4)
    assert torch.allclose(count(top_p=0.81), torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95, atol=2e-4)
    assert torch.equal(count(top_p=1e-6), torch.tensor([1.0, 0, 0, 0]))
    assert torch.equal(count(temperature=0), torch.tensor([1.0, 0, 0, 0]))


@pytest.mark.parametrize("path", ["fm", "vp"])
def test_posterior_equals_bayes_on_a_grid(path):
    """q(z_s | z_t, z_0) from q(z_s | z_0) q(z_t | z_s), integrated numerically."""
    def ab(t):
        angle = math.pi / 2 * t
        return (1 - t, t) if path == "fm" else (math.cos(angle), math.sin(angle))
    for s, t in [(0.2, 0.3), (0.05, 0.9), (0.6, 1.0)]:
        (a_s, sigma_s), (a_t, sigma_t) = ab(s), ab(t)
        z0, zt = 0.7, -0.4
        a_ts = a_t / a_s
        var_ts = sigma_t**2 - a_ts**2 * sigma_s**2
        grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
        log_q = -0.5 * ((grid - a_s * z0) / sigma_s) ** 2 - 0.5 * (zt - a_ts * grid) ** 2 / var_ts
        q = (log_q - log_q.max()).exp()
        q /= q.sum()
        mean = (q * grid).sum()
        var = (q * (grid - mean) ** 2).sum()
        values = torch.tensor([zt, z0, a_t, sigma_t, a_s, sigma_s], dtype=torch.float64)
        got_mean, got_var = common.gaussian_posterior(*values)
        assert got_mean.item() == pytest.approx(mean.item(), abs=1e-6)  # grid spacing 1e-4
        assert got_var.item() == pytest.approx(var.item(), abs=1e-6)


def test_posterior_ends():
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    z_t, z_0 = torch.tensor(5.0), torch.tensor(2.0)
    mean, var = common.gaussian_posterior(z_t, z_0, zero, one, one, zero)
    assert (mean, var) == (2.0, 0.0)  # straight from t = 1 to s = 0


# ------------------------------------------------------------------------- network


def tiny_dit(**kwargs):
    torch.manual_seed(0)
    net = common.DiT(7, 16, 2, 2, cond_dim=8, **kwargs)
    for p in net.parameters():  # adaLN-zero starts as the identity: wake it up
        torch.nn.init.normal_(p, std=0.3)
    return net.eval()


def test_dit_takes_ids_or_embeddings_and_sees_all_positions():
    net, x, t = tiny_dit(), torch.randint(7, (3, 5)), torch.rand(3)
    out = net(x, t)
    assert out.shape == (3, 5, 16)
    assert torch.allclose(out, net(net.embed(x), t), atol=1e-6)
    y = x.clone()
    y[:, 4] = (y[:, 4] + 1) % 7
    assert (net(y, t)[:, 0] - out[:, 0]).abs().amax(-1).gt(1e-4).all()


def test_dit_is_conditioned_per_sample_and_accepts_one_condition_for_all():
    net, x = tiny_dit(), torch.randint(7, (3, 5))
    t = torch.tensor([0.2, 0.2, 0.9])
    out = net(x, t)
    assert torch.allclose(out[:2], net(x, torch.tensor([0.2]))[:2], atol=1e-6)
    assert not torch.allclose(out[2], net(x, torch.tensor([0.2]))[2], atol=1e-3)


def test_rotary_scores_depend_on_relative_position():
    torch.manual_seed(0)
    qk = torch.randn(1, 1, 2, 3, 4).expand(1, 10, 2, 3, 4)  # (B, L, q and k, heads, d_head)
    q, k = common.rotate(qk, common.rope_table(10, 4))[0, :, :, 0].unbind(1)
    score = q @ k.T
    assert torch.allclose(score[1:, 1:], score[:-1, :-1], atol=1e-5)
    assert not torch.allclose(score[0, :5], score[0, 1:6], atol=1e-3)


@pytest.mark.parametrize("chunks", [1, 3, 7])
def test_linear_cross_entropy_and_its_gradients(chunks):
    torch.manual_seed(1)
    h, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True)
               for s in [(20, 6), (11, 6), (11,)])
    target, scale = torch.randint(11, (20,)), torch.rand(20, dtype=torch.float64)
    loss, nll = common._LinearCrossEntropy.apply(h, w, b, target, scale, chunks, False)
    (2 * loss).backward()
    got = [p.grad.clone() for p in (h, w, b)]
    for p in (h, w, b):
        p.grad = None
    want_nll = F.cross_entropy(h @ w.T + b, target, reduction="none")
    (2 * (want_nll * scale).sum()).backward()
    assert torch.allclose(nll, want_nll, atol=1e-12)
    for mine, p in zip(got, (h, w, b)):
        assert torch.allclose(mine, p.grad, atol=1e-12)


def test_dit_refuses_more_tokens_than_it_has_positions_for():
    with pytest.raises(RunError, match="9 tokens are more than this model's 8"):
        tiny_dit(length=8)(torch.zeros(1, 9, dtype=torch.long), torch.zeros(1))


def test_masked_positions_are_complete_and_fit_the_capacity():
    rng = np.random.default_rng(0)
    for trial in range(200):
        B, L = 8, 32
        t = common.low_discrepancy_t(torch.arange(B), B, rng.random(), 1e-3)
        masked = torch.from_numpy(rng.random((B, L)).astype(np.float32)) < t[:, None]
        capacity = common.mask_capacity(B, L)
        index, live = common.masked_positions(masked, capacity)
        assert len(index) == capacity <= B * L
        assert sorted(index[live].tolist()) == masked.flatten().nonzero()[:, 0].tolist()


# ------------------------------------------------------------------------- EMA, learning rate


def test_ema_follows_its_definition_and_swaps_back():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema, want = common.EMA(model, 0.9), 1.0
    for n in range(30):
        with torch.no_grad():
            model.weight.fill_(float(n))
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        want = decay * want + (1 - decay) * n
    with ema.swapped_in():
        assert model.weight.item() == pytest.approx(want, rel=1e-5)
    assert model.weight.item() == 29.0


def test_ema_refuses_another_model():
    ema = common.EMA(torch.nn.Linear(1, 1), 0.9)
    with pytest.raises(RunError, match="does not belong"):
        ema.load_state_dict({"updates": 0, "params": {"other": torch.zeros(1)}})


def test_learning_rate_schedules():
    constant = [common.learning_rate(s, 1.0, 4, "constant", 10) for s in range(12)]
    assert constant[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and constant[-1] == 1.0
    cosine = [common.learning_rate(s, 1.0, 0, "cosine", 10) for s in (0, 5, 10, 20)]
    assert cosine == pytest.approx([1.0, 0.5, 0.0, 0.0])


# ------------------------------------------------------------------------- processes and noise


@pytest.mark.parametrize("world,micro", [(1, 24), (1, 5), (2, 24), (3, 4), (4, 3)])
def test_micro_batches_partition_the_global_batch_and_span_all_times(world, micro):
    parts = [part for rank in range(world)
             for part in common.micro_batches(24, micro, place(rank, world))]
    assert sorted(torch.cat(parts).tolist()) == list(range(24))
    for part in parts:
        assert len(part) <= micro
        assert len({(part[i + 1] - part[i]).item() for i in range(len(part) - 1)}) <= 1


def test_micro_batches_refuse_uneven_shares():
    with pytest.raises(RunError, match="multiple of the number of processes"):
        common.micro_batches(10, 4, place(0, 3))


def test_noise_belongs_to_the_sample_not_to_the_rank():
    cpu = torch.device("cpu")
    whole = common.sample_normal(3, 7, torch.arange(6), (5, 2), cpu)
    part = common.sample_normal(3, 7, torch.tensor([4, 1]), (5, 2), cpu)
    assert torch.equal(whole[[4, 1]], part)
    assert not torch.equal(common.sample_normal(3, 8, torch.arange(6), (5, 2), cpu), whole)
    assert not torch.equal(common.sample_normal(4, 7, torch.arange(6), (5, 2), cpu), whole)


def test_noise_has_the_right_distribution_across_samples():
    """4,000 samples x 8: standard errors .0056 and .008; neighbouring streams are unrelated."""
    eps = common.sample_normal(0, 0, torch.arange(4000), (8,), torch.device("cpu"))
    assert abs(eps.mean()) < 0.028 and abs(eps.var() - 1) < 0.04
    assert abs(torch.corrcoef(torch.stack([eps[:-1, 0], eps[1:, 0]]))[0, 1]) < 0.08


# ------------------------------------------------------------------------- configuration


@dataclasses.dataclass
class Toy(common.RunConfig):
    dataset: str = arg("a", "set", fixed=True)
    width: int = arg(4, "width", 1, 100, fixed=True)
    rate: float = arg(0.5, "rate", 0, 1)
    kind: str = arg("x", "kind", choices=("x", "y"))


PRESETS = {"a": {}, "b": {"width": 9}, "path": {}}


def toy(*argv):
    return common.parse_config(Toy, "toy", "doc", PRESETS, list(argv))[0]


def test_flags_override_presets_override_defaults(tmp_path):
    assert (toy().width, toy("--dataset", "b").width) == (4, 9)
    assert toy("--dataset", "b", "--width", "5").width == 5
    assert toy("--no-compile").compile is False
    assert toy("--dataset", "b").out == "runs/toy-b"
    assert toy("--dataset", str(tmp_path)).out == f"runs/toy-{tmp_path.name}"


@pytest.mark.parametrize("argv,message", [
    (["--widht", "3"], "unrecognized arguments: --widht"),
    (["--wid", "3"], "unrecognized arguments: --wid"),
    (["--width", "0"], "0 is out of range: 1 to 100"),
    (["--rate", "nan"], "nan is out of range: 0 to 1"),
    (["--rate", "much"], "'much' is not of type float"),
    (["--kind", "z"], "'z' is not one of x, y"),
])
def test_wrong_flags_exit_with_2_and_say_why(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        toy(*argv)
    printed = capsys.readouterr().err
    assert error.value.code == 2 and message in printed and printed.count("\n") == 1


def test_unknown_dataset_names_the_known():
    with pytest.raises(RunError, match="choose one of a, b, or give a folder"):
        toy("--dataset", "c")


def test_help_shows_every_field(capsys):
    with pytest.raises(SystemExit):
        toy("--help")
    out = capsys.readouterr().out
    assert all(f"--{f.name}" in out for f in dataclasses.fields(Toy))


# ------------------------------------------------------------------------- checkpoints


def test_checkpoint_round_trip_and_foreign_files(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(RunError, match="train first"):
        common.read_checkpoint(path, "cadd")
    common.write_checkpoint(path, dict(method="cadd", x=torch.arange(3)))
    assert common.read_checkpoint(path, "cadd")["x"].tolist() == [0, 1, 2]
    with pytest.raises(RunError, match="a checkpoint of cadd.py, not of vadd.py"):
        common.read_checkpoint(path, "vadd")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(RunError, match="truncated"):
        common.read_checkpoint(path, "cadd")
    torch.save({"weights": 1}, path)
    with pytest.raises(RunError, match="not a checkpoint of this project"):
        common.read_checkpoint(path, "cadd")


def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    """A file-size limit makes the kernel refuse the write, as a full disk does."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "checkpoint.pt"
    common.write_checkpoint(path, dict(method="cadd", step=1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(RunError, match="the previous checkpoint is intact"):
            common.write_checkpoint(path, dict(method="cadd", step=2, big=torch.zeros(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert common.read_checkpoint(path, "cadd")["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_main_turns_errors_into_one_line(capsys):
    def fail():
        raise RunError("do this")
    with pytest.raises(SystemExit) as error:
        common.run_main(fail)
    assert error.value.code == 1 and capsys.readouterr().err == "error: do this\n"


def test_flag_value_refuses_nan_bounds():
    field = next(f for f in dataclasses.fields(Toy) if f.name == "rate")
    with pytest.raises(argparse.ArgumentTypeError):
        common._flag_value(field, "inf")
