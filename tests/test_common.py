"""The shared mathematics, network and plumbing of common.py."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import cadd
import common
import difformer
from common import RunError, arg, free
from conftest import ONE_THREAD, ROOT, log_of


def ddp(rank=0, world=1):
    return common.DDP(rank, world, torch.device("cpu"), amp=False)


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


SHARES = {"linear": lambda t: t, "cosine": lambda t: torch.sin(math.pi / 2 * t)}


def test_share_moments_in_closed_form():
    """E[m] and E[m (1 - m)] of m = t: 1/2, 1/6; of m = sin(pi t / 2): 2/pi, 2/pi - 1/2."""
    assert common.share_moments(SHARES["linear"]) == pytest.approx((1 / 2, 1 / 6), abs=1e-6)
    assert common.share_moments(SHARES["cosine"]) == pytest.approx(
        (2 / math.pi, 2 / math.pi - 1 / 2), abs=1e-6)


@pytest.mark.parametrize("name", SHARES)
def test_masked_positions_are_complete_and_never_exceed_their_room(name):
    """2,000 low-discrepancy batches of many shapes, every tenth with the worst shift, whole or one
    of the parts that micro_batches makes."""
    rng, moments = np.random.default_rng(0), common.share_moments(SHARES[name])
    smaller = 0
    for trial in range(2000):
        B, L = int(rng.integers(1, 65)), int(rng.choice([1, 2, 7, 16, 64, 200]))
        parts = int(rng.integers(1, 4))
        shift = 1 / (B * parts) * (1 - 1e-9) if trial % 10 == 0 else rng.random()
        index = torch.arange(trial % parts, B * parts, parts)
        t = common.low_discrepancy_t(index, B * parts, shift, 1e-3)
        masked = torch.from_numpy(rng.random((B, L), np.float32)) < SHARES[name](t)[:, None]
        if trial % 3 == 0:  # padding
            masked &= torch.from_numpy(rng.random((B, L)) < 0.9)
        index, used = common.masked_positions(masked, moments)
        assert sorted(index[used].tolist()) == masked.flatten().nonzero()[:, 0].tolist()
        assert len(index.unique()) == len(index) <= B * L
        assert torch.equal(used, masked.flatten()[index])
        smaller += len(index) < 0.9 * B * L
    assert smaller > 400  # the head does run at fewer positions


def masked_batch(B, L, d=6, V=4):
    torch.manual_seed(0)
    h, head = torch.randn(B, L, d, requires_grad=True), torch.nn.Linear(d, V + 1)
    return h, head, torch.randint(V, (B, L)), torch.rand(B) + 0.5


def readout(head):
    return head.weight[:-1], head.bias[:-1]


def test_masked_cross_entropy_is_the_plain_one_at_masked_positions():
    h, head, x0, weight = masked_batch(8, 32)
    masked = torch.rand(8, 32) < torch.linspace(0.05, 0.95, 8)[:, None]
    loss, nll = common.masked_cross_entropy(h, *readout(head), x0, masked, weight, (1 / 2, 1 / 6))
    plain = F.cross_entropy(head(h)[..., :-1].transpose(1, 2), x0, reduction="none") * masked
    assert torch.allclose(nll, plain.sum(1), rtol=1e-5)
    assert loss.item() == pytest.approx((plain.sum(1) * weight).sum().item(), rel=1e-5)
    own, want = (torch.autograd.grad(f, [h, head.weight, head.bias])
                 for f in (loss, (plain.sum(1) * weight).sum()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(own, want))


def test_masked_cross_entropy_is_nan_rather_than_too_low():
    """More masked positions than there is room for: in the loss, in the statistics by which a run
    stops, and in the gradient, so that nobody learns from a part of the batch."""
    h, head, x0, weight = masked_batch(8, 512)
    everything = torch.ones_like(x0, dtype=torch.bool)
    loss, nll = common.masked_cross_entropy(
        h, *readout(head), x0, everything, weight, (1 / 2, 1 / 6))
    loss.backward()
    assert loss.isnan() and nll.isnan().all() and head.weight.grad[:-1].isnan().all()
    loss, nll = common.masked_cross_entropy(h, *readout(head), x0, everything, weight, (1.0, 0.0))
    assert loss.isfinite() and nll.isfinite().all()


def test_by_tenth():
    t = torch.tensor([0.001, 0.0999, 0.1, 0.55, 0.9999, 1.0])
    found = common.by_tenth(t, a=torch.arange(6.0, requires_grad=True), n=torch.ones(6).bool())
    assert found["a"].tolist() == [1, 2, 0, 0, 0, 3, 0, 0, 0, 9]
    assert found["n"].tolist() == [2, 1, 0, 0, 0, 1, 0, 0, 0, 2]
    assert not found["a"].requires_grad and set(found) == {"a", "n"}


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
    def rates(steps, **flags):
        cfg = common.RunConfig(lr=1.0, steps=10, **flags)
        return [common.learning_rate(step, cfg) for step in steps]
    constant = rates(range(12), warmup=4)
    assert constant[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and constant[-1] == 1.0
    assert rates((0, 5, 10, 20), warmup=0, lr_schedule="cosine") == pytest.approx([1, 0.5, 0, 0])
    assert rates((1, 2, 6), warmup=2, lr_schedule="cosine") == pytest.approx([1, 1, 0.5])
    root = rates((1, 3, 4, 16, 64), warmup=4, lr_schedule="inverse_sqrt")
    assert root == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.25])


# ------------------------------------------------------------------------- processes and noise


@pytest.mark.parametrize("world,micro", [(1, 24), (1, 5), (2, 24), (3, 4), (4, 3)])
def test_micro_batches_partition_the_global_batch_and_span_all_times(world, micro):
    parts = [part for rank in range(world)
             for part in common.micro_batches(24, micro, ddp(rank, world))]
    assert sorted(torch.cat(parts).tolist()) == list(range(24))
    for part in parts:
        assert len(part) <= micro
        assert (part.diff() == 24 // len(part)).all()  # from end to end, evenly


def test_micro_batches_refuse_uneven_shares():
    with pytest.raises(RunError, match="multiple of the number of processes"):
        common.micro_batches(10, 4, ddp(0, 3))


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
    dataset: str = arg("a", "set")
    width: int = arg(4, "width, 100% of it", 1, 100)
    rate: float = free(0.5, "rate", 0, 1, group="sampling")
    kind: str = free("x", "kind", choices=("x", "y"))
    files: tuple = arg((), "two files")


toy_script = types.ModuleType("toy", "What it is.")
toy_script.__file__, toy_script.Config = "/somewhere/toy.py", Toy
toy_script.PRESETS = {"a": {}, "b": {"width": 9}, "folder": {"width": 7}}


def toy(*argv):
    return common.parse_config(toy_script, list(argv))


def test_flags_override_presets_override_defaults(tmp_path):
    assert (toy().width, toy("--dataset", "b").width) == (4, 9)
    assert toy("--dataset", "b", "--width", "5").width == 5
    assert toy("--no-compile").compile is False
    assert toy("--files", "m", "n").files == ["m", "n"]
    assert toy("--dataset", "b").out == "runs/toy-b"
    own = toy("--dataset", str(tmp_path))
    assert (own.out, own.width) == (f"runs/toy-{tmp_path.name}", 7)
    assert toy("--dataset", "own/tokens.npy").width == 7


@pytest.mark.parametrize("argv,message", [
    (["--widht", "3"], "unrecognized arguments: --widht"),
    (["--wid", "3"], "unrecognized arguments: --wid"),
    (["--width", "0"], "0 is out of range: 1 to 100"),
    (["--rate", "nan"], "nan is out of range: 0 to 1"),
    (["--rate", "much"], "'much' is not of type float"),
    (["--kind", "z"], "'z' is not one of x, y"),
    (["--dataset"], "expected one argument"),
    (["--files", "m"], "expected 2 arguments"),
])
def test_wrong_flags_exit_with_2_and_say_why(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        toy(*argv)
    printed = capsys.readouterr().err
    assert error.value.code == 2 and message in printed and printed.count("\n") == 1


def test_unknown_dataset_names_the_known():
    with pytest.raises(RunError, match="choose one of a, b, or give a folder"):
        toy("--dataset", "c")


def help_of(capsys, *argv):
    """--help as {group: {flag: its text}}, and all of it."""
    with pytest.raises(SystemExit) as error:
        toy("--help", *argv)
    out, groups = capsys.readouterr().out, {}
    assert error.value.code == 0
    for block in out.split("\n\n"):
        title, _, rest = block.partition(":\n")
        if title in common.GROUPS:
            groups[title] = {f.split()[0]: " ".join(f.split()) for f in rest.split("\n  --")}
    return {g: {k.removeprefix("--"): v for k, v in fs.items()} for g, fs in groups.items()}, out


def test_help_shows_every_field_in_its_group(capsys):
    groups, out = help_of(capsys)
    assert all(f"--{f.name}" in out for f in dataclasses.fields(Toy))
    for field in dataclasses.fields(Toy):
        names = [name.rstrip(",") for name in groups[field.metadata["group"]]]
        assert field.name in names, field.name
    assert "What it is." in out and "100% of it" in out
    order = [out.index(f"\n{name}:\n") for name in common.GROUPS if name in groups]
    assert order == sorted(order)


def test_help_shows_the_values_of_the_dataset(capsys, tmp_path):
    for argv, width in [([], 4), (["--dataset", "b"], 9), (["--dataset", str(tmp_path)], 7),
                        (["--dataset", "no such set"], 7)]:
        groups, out = help_of(capsys, *argv)
        assert f"(default {width})" in groups["method"]["width"], argv
        assert f"--dataset {argv[1] if argv else 'a'}" in out
    assert "(default" not in groups["method"]["files"] + groups["run"]["overwrite,"]


def saved_toy(out, config):
    """A run folder of toy.py whose checkpoint has this configuration."""
    out.mkdir()
    common.write_checkpoint(out / "checkpoint.pt", dict(method="toy", config=config))
    return ["--out", str(out)]


def test_a_trained_run_keeps_its_configuration(tmp_path):
    """Free flags may change, fixed ones may not; folders, device and mode are not the run's."""
    config = dataclasses.asdict(Toy(dataset="b", width=33, rate=0.25, device="cuda", mode="train",
                                    save="elsewhere", out="moved"))
    flags = [*saved_toy(tmp_path / "a", config), "--mode", "eval"]
    cfg = toy(*flags)
    assert (cfg.dataset, cfg.width, cfg.rate) == ("b", 33, 0.25)
    assert (cfg.device, cfg.mode, cfg.save, cfg.out) == ("auto", "eval", "", str(tmp_path / "a"))
    assert toy(*flags, "--rate", "0.75", "--width", "33").rate == 0.75
    with pytest.raises(RunError, match="made with --width 33, not 9: .*--overwrite"):
        toy(*flags, "--width", "9")
    with pytest.raises(RunError, match="--dataset b, not a"):
        toy(*flags, "--dataset", "a")
    assert toy(*flags[:2], "--width", "9").width == 9  # training: Run asks, once it resumes
    with pytest.raises(RunError, match="train first"):
        toy("--mode", "sample", "--out", str(tmp_path / "none"))


def test_a_checkpoint_may_lack_flags_and_have_others(tmp_path):
    """A flag newer than the checkpoint had its default; one that is gone is ignored."""
    config = dataclasses.asdict(Toy(rate=0.25)) | {"gone": 1}
    del config["width"]
    flags = [*saved_toy(tmp_path / "a", config), "--mode", "sample"]
    assert (toy(*flags).width, toy(*flags).rate) == (4, 0.25)
    assert toy(*flags, "--width", "4").width == 4
    with pytest.raises(RunError, match="made with --width 4, not 5"):
        toy(*flags, "--width", "5")


@pytest.mark.parametrize("name", ["seed", "lr", "clip", "ema", "beta2", "weight_decay", "warmup",
                                  "lr_schedule"])
def test_what_defines_a_run_is_fixed(name):
    fixed = {f.name: f.metadata["fixed"] for f in dataclasses.fields(common.RunConfig)}
    assert fixed[name] and not (fixed["steps"] or fixed["minutes"] or fixed["out"])
    with pytest.raises(RunError, match=f"--{name} 1, not 2"):
        common.check_same_run({name: 1}, {name: 2}, common.RunConfig)


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


def test_flipped_bits_are_refused_or_change_nothing(tmp_path):
    """Some 1,400 bits of the file, and those that call each of its parts a folder."""
    path, tensors = tmp_path / "checkpoint.pt", {str(n): torch.arange(n) + 0.5 for n in (1, 9, 40)}
    common.write_checkpoint(path, dict(method="toy", config={"lr": 0.5}, ema=tensors, step=7))
    whole, outcomes = path.read_bytes(), [0, 0]
    parts = [i for i in range(len(whole)) if whole.startswith(b"PK\1\2", i)]
    flips = [8 * i + k for i in parts for k in range(8 * 38, 8 * 42)]  # their external attributes
    flips += np.random.default_rng(0).choice(8 * len(whole), 1400, replace=False).tolist()
    for flip in flips:
        raw = bytearray(whole)
        raw[flip // 8] ^= 1 << flip % 8
        path.write_bytes(raw)
        for mmap in (True, False):
            try:
                state = common.read_checkpoint(path, mmap=mmap)
            except RunError as error:
                assert "truncated or not a checkpoint" in str(error)
            else:
                assert (state["method"], state["config"], state["step"]) == ("toy", {"lr": 0.5}, 7)
                good = all(torch.equal(state["ema"][k], v) for k, v in tensors.items())
                assert good or mmap, divmod(flip, 8)
                outcomes[mmap] += 1
    assert 300 < outcomes[False] < outcomes[True] < len(flips), "padding may change, or tensors"


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
        with pytest.raises(RunError, match="could not save .*rows.json.*nothing was saved"):
            common.write_json(tmp_path / "rows.json", "x" * 20_000)
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


def test_more_processes_than_gpus_are_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("too late"))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RunError, match="left for process 3 .* --nproc_per_node 2"):
        common.DDP.start(common.RunConfig())


def test_a_full_gpu_is_said_with_the_flags_that_help(capsys):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a "
                                     "total capacity of 79.10 GiB")
    with pytest.raises(SystemExit) as error:
        common.run_main(fail)
    told = capsys.readouterr().err
    assert error.value.code == 1 and told.count("\n") == 1
    assert told.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB: a smaller")
    for script, flags in ((cadd, ("micro_batch", "sample_batch")), (difformer, ["micro_tokens"])):
        assert all(f"--{flag}" in told and hasattr(script.Config, flag) for flag in flags)


def test_the_process_group_is_left_after_a_run_but_not_after_an_error(monkeypatch):
    """It waits for the other ranks, which after an error on one still train."""
    left = []
    monkeypatch.setattr(common, "dist", types.SimpleNamespace(
        is_initialized=lambda: True, destroy_process_group=lambda: left.append("left")))

    def fail(error):
        raise error
    for error, shown in [(RuntimeError, RuntimeError), (RunError, SystemExit),
                         (KeyboardInterrupt, SystemExit)]:
        with pytest.raises(shown):
            common.run_main(fail, error("why"))
    assert left == []
    common.run_main(lambda: None)
    assert left == ["left"]


TWO_FAILURES = """
import os, signal, sys, common

# As NCCL's, which waits for the other ranks; gloo's does not.
common.dist.destroy_process_group = signal.pause

def fails(error):
    ddp = common.DDP.start(common.RunConfig(device="cpu"))
    ddp.any(False)  # both are there
    if ddp.rank == 1:
        raise error
    ddp.any(False)  # waits

ranks = {}
for port, error in zip(sys.argv[1:], (RuntimeError("no memory"), common.RunError("do this"))):
    for rank in (0, 1):
        ranks[pid := os.fork()] = rank
        if pid == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
                              MASTER_PORT=port)
            with open(sys.argv[3] + f"/{type(error).__name__}-{rank}", "w") as file:
                os.dup2(file.fileno(), 2)
            common.run_main(fails, error)
            sys.exit(0)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid, rank in ranks.items() if rank]
[os.kill(pid, signal.SIGKILL) for pid, rank in ranks.items() if not rank]  # as torchrun ends it
print(codes)
"""


def test_a_rank_that_fails_says_so_and_ends_while_another_waits(tmp_path):
    """Any error with its traceback, a RunError in one line; neither waits for the other rank. The
    four processes are forked from one, which has imported torch."""
    with socket.socket() as one, socket.socket() as two:
        ports = [s.bind(("localhost", 0)) or str(s.getsockname()[1]) for s in (one, two)]
    with subprocess.Popen([sys.executable, "-c", TWO_FAILURES, *ports, str(tmp_path)], cwd=ROOT,
                          env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, start_new_session=True) as process:
        try:
            printed, errors = process.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert printed == "[1, 1]\n", errors
    said = (tmp_path / "RuntimeError-1").read_text()
    assert "Traceback" in said and said.endswith("RuntimeError: no memory\n")
    assert (tmp_path / "RunError-1").read_text() == "error: do this\n"


def test_flag_value_refuses_nan_bounds():
    field = next(f for f in dataclasses.fields(Toy) if f.name == "rate")
    with pytest.raises(argparse.ArgumentTypeError):
        common._flag_value(field, "inf")


# ------------------------------------------------------------------------- ranks


class Pair(common.DDP):
    """Rank 0 of two that hold the same values."""

    def sum(self, x):
        return 2 * x


def test_gradients_wait_for_the_last_micro_batch():
    calls, net = [], types.SimpleNamespace(no_sync=lambda: contextlib.nullcontext("not yet"))
    for world, last in [(1, False), (1, True), (2, False), (2, True)]:
        with ddp(0, world).no_sync(net, last) as state:
            calls.append(state)
    assert calls == [None, None, "not yet", None]


def test_gradients_travel_in_one_bucket():
    """Four layers of 9 MiB, in several by default. DDP chooses buckets after the first step and
    tells of them two steps later."""
    model = torch.nn.Sequential(*(torch.nn.Linear(1536, 1536, bias=False) for _ in range(4)))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = ddp(0, 2).wrap(model, True)
        for _ in range(3):
            net(torch.ones(1, 1536)).sum().backward()
        facts = net._get_ddp_logging_data()
    finally:
        dist.destroy_process_group()
    assert facts["has_rebuilt_buckets"] == 1
    assert facts["rebuilt_bucket_sizes"] == str(4 * 9 * 2**20)


def test_any_rank_is_enough():
    assert ddp().any(True) is True and ddp().any(False) is False
    assert Pair(0, 2, torch.device("cpu"), False).any(True) is True


def test_estimates_by_hand(monkeypatch, capsys):
    """Bits per character, nats per point of L bins, nats per token with perplexity."""
    values = {"nll": torch.tensor([1.0, 2.0, 3.0, 6.0]), "speed": torch.tensor([1.0])}
    data = types.SimpleNamespace(unit="char", length=7, vocab_size=21)
    figures = common.estimates(values, data, ddp(), split="valid")
    error = math.sqrt((4 + 1 + 0 + 9) / 4 / 4) / math.log(2)  # standard deviation over root n
    assert figures["nll"] == dict(value=pytest.approx(3 / math.log(2)), unit="bits/char", draws=4,
                                  stderr=pytest.approx(error), split="valid")
    data.unit = "bin"
    assert common.estimates(values, data, ddp())["nll"]["value"] == pytest.approx(21)
    data.unit = "token"
    figures = common.estimates(values, data, ddp())
    assert figures["nll"]["perplexity"] == pytest.approx(math.exp(3))
    assert figures["nll"]["unit"] == "nats/token" and "perplexity" not in figures["speed"]
    data.vocab_size = 20  # ln 20 < 3 < ln 21
    for unit in ("char", "bin", "token"):
        data.unit = unit
        flagged = common.estimates(values, data, ddp())
        assert flagged["nll"].pop("meaningful") is False and "meaningful" not in flagged["speed"]
        common.print_figures(flagged | {"nll_joint": flagged["nll"] | {"meaningful": False}})
        printed = capsys.readouterr().out.splitlines()
        assert [("not yet meaningful" in line) for line in printed] == [False, False, True]
    monkeypatch.setattr(common.dist, "broadcast_object_list", lambda names: None)
    two = common.estimates(values, data, Pair(0, 2, torch.device("cpu"), False))["nll"]
    assert (two["value"], two["draws"]) == (pytest.approx(3), 8)
    assert two["stderr"] == pytest.approx(figures["nll"]["stderr"] / math.sqrt(2))


def test_a_figure_per_token_weighs_sequences_by_their_tokens(monkeypatch):
    """1 + 3 x 5 nats in 4 tokens. The delta method's error is the root of the squares of what rows
    miss, 1 (1 - 4) and 3 (5 - 4), over the tokens. Rows as long as data.length are all scored."""
    values, rows = {"nll": torch.tensor([1.0, 5.0]).double()}, torch.tensor([1, 3])
    data = types.SimpleNamespace(unit="token", length=3, vocab_size=100)
    [figure] = common.estimates(values, data, ddp(), rows, given="rest").values()
    assert figure == dict(value=pytest.approx(4), unit="nats/token given the rest", draws=2,
                          stderr=pytest.approx(math.sqrt(18) / 4),
                          perplexity=pytest.approx(math.exp(4)))
    monkeypatch.setattr(common.dist, "broadcast_object_list", lambda names: None)
    two = common.estimates(values, data, Pair(0, 2, torch.device("cpu"), False), rows)["nll"]
    assert (two["value"], two["unit"]) == (pytest.approx(4), "nats/token")
    assert two["stderr"] == pytest.approx(figure["stderr"] / math.sqrt(2))
    same, plain = (common.estimates(values, data, ddp(), *rest)["nll"]
                   for rest in ([torch.tensor([3, 3]), "rest"], []))
    assert same["unit"] == plain["unit"] == "nats/token"
    for key in ("value", "stderr", "perplexity"):
        assert same[key] == pytest.approx(plain[key], rel=1e-14)


def test_samples_are_drawn_in_batches():
    """7 samples, 3 at once: the last of what each sampler yields, in order."""
    asked = []

    def sampler(begin, end):
        asked.append((begin, end))
        yield torch.full((end - begin, 2), -1)
        yield torch.arange(begin, end)[:, None].expand(-1, 2)
    x = common.draw_in_batches(7, 3, 2, sampler)
    assert asked == [(0, 3), (3, 6), (6, 7)] and x[:, 0].tolist() == list(range(7))


# ------------------------------------------------------------------------- the run by itself


@dataclasses.dataclass
class TinyConfig(common.RunConfig):
    dataset: str = arg("nothing", "set")


def tiny_run(tmp_path, ranks=None, data=None, **flags):
    cfg = TinyConfig(**{"steps": 6, "log_every": 2, "save_every": 4, "out": str(tmp_path / "run"),
                        **flags})
    data = data or types.SimpleNamespace(
        describe=lambda: "nothing: 0 sequences", tokenizer=lambda: {"vocab": [1]}, length=3,
        fingerprint=lambda: [3])
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    return common.Run("toy", cfg, ranks or ddp(), data, model, optimizer,
                      common.EMA(model, 0.5), note=" | noted")


def test_statistics_are_sums_since_the_last_line_over_all_ranks(tmp_path):
    """Numbers, tensors and lists, added several times a step; ranks' sums; nothing is carried."""
    seen, ranks = [], Pair(0, 2, torch.device("cpu"), False)
    run = tiny_run(tmp_path, ranks, save_every=100, steps=5)
    ranks.world = 1  # nothing to gather when it is saved
    for step in run.steps(lambda total: seen.append(total) or ({"loss": total["loss"]}, {})):
        for part in (1.0, 2.0):
            run.add(loss=torch.tensor(part * step, requires_grad=True), by_t=torch.ones(3) * part)
        run.add(tokens=10, accuracy=0.5)
    assert seen == [
        dict(loss=2 * 3.0, by_t=[12.0] * 3, tokens=40, accuracy=2.0),
        dict(loss=2 * 15.0, by_t=[12.0] * 3, tokens=40, accuracy=2.0),
        dict(loss=2 * 12.0, by_t=[6.0] * 3, tokens=20, accuracy=1.0)]
    lines = log_of(tmp_path / "run")
    assert [r["step"] for r in lines] == [0, 2, 4, 5] and lines[2]["loss"] == 30.0
    assert lines[1]["lr"] == 0.5 and {"tokens_per_s", "mfu", "seconds"} <= set(lines[1])
    start = lines[0]["start"]
    assert start["method"] == "toy" and start["parameters"] == 3 and start["config"]["steps"] == 5
    assert {"argv", "commit", "python", "torch", "hardware"} <= set(start)


def test_a_rank_leaves_the_loop_when_another_asks(tmp_path, monkeypatch):
    """They ask each other at each step whether a signal came, here to the other one in the second,
    and whether the time is over; and meet once more when rank 0 has saved."""
    ranks = Pair(0, 2, torch.device("cpu"), False)
    asked = []
    ranks.any = lambda flag: asked.append(flag) or len(asked) == 3
    run = tiny_run(tmp_path, ranks, steps=100, save_every=1000)
    monkeypatch.setattr(common, "rng_states", lambda ddp: [{}, {}])  # the gathering of both
    with pytest.raises(KeyboardInterrupt):
        for _ in run.steps(lambda total: ({}, {})):
            run.add(tokens=1)
    assert asked == [False] * 3 + [True] and run.step == 2
    assert common.read_checkpoint(tmp_path / "run" / "checkpoint.pt", "toy")["step"] == 2


def test_a_log_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    run = tiny_run(tmp_path)
    with pytest.raises(RunError, match="could not write .*log.jsonl .*the same command resumes"):
        for _ in run.steps(lambda total: ({}, {})):
            run.add(tokens=1)
            run._log = tmp_path / "gone" / "log.jsonl"


def test_an_error_in_the_loop_leaves_the_signals_as_they_were(tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    run = tiny_run(tmp_path)
    with pytest.raises(ZeroDivisionError):
        for _ in run.steps(lambda total: ({}, {})):
            assert signal.getsignal(signal.SIGINT) != before[0]
            raise ZeroDivisionError
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "monotonic", itertools.count(1, 4).__next__)  # seconds later
    with pytest.raises(KeyboardInterrupt):
        for step in tiny_run(tmp_path).steps(lambda total: ({}, {})):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_what_is_not_finite_is_never_saved(tmp_path):
    """Step 4 is saved between two lines of the log, 6 with one. Its statistics are infinite, or
    another rank's are nan, or only the weights after the update."""
    for begin, bad, log_every, message in [
            (3, "loss", 3, "the loss is inf between steps 3 and 4"),
            (3, "rank", 3, "the loss is nan between steps 3 and 4"),
            (3, "weight", 3, "the norm of the weights is nan between steps 3 and 4"),
            (5, "weight", 2, "the norm of the weights is nan between steps 4 and 6")]:
        run = tiny_run(tmp_path, ranks := ddp(), log_every=log_every, save_every=2, overwrite=True)
        with pytest.raises(RunError, match=f"{message}.*good state.*--lr"):
            for step in run.steps(lambda total: ({}, {})):
                now = bad if step == begin else ""
                run.add(tokens=1, loss=torch.tensor(math.inf if now == "loss" else 1.0))
                if now == "weight":
                    run.ema.live[1].data[0] = math.nan
                if now == "rank":
                    ranks.sum = lambda x: x + math.nan
        kept = common.read_checkpoint(tmp_path / "run" / "checkpoint.pt", "toy")
        assert kept["step"] == begin - 1 and torch.isfinite(kept["model"]["bias"]).all()


def test_the_first_line_says_what_is_trained(tmp_path, capsys):
    tiny_run(tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("nothing: 0 sequences | noted | 0.0M parameters | 1 x CPU")
    assert printed[1] == f"training -> {tmp_path / 'run'}"


@pytest.mark.parametrize("kept,now,fits", [
    (dict(vocab=[1]), dict(vocab=[1], classes=()), True), (dict(vocab=[1]), dict(vocab=[2]), False),
    (dict(pixels=[[1]]), dict(vocab=[2], pixels=[[1]]), True),
    (dict(pixels=[[1]]), dict(vocab=[2], pixels=[[3]]), False)])
def test_data_must_be_those_whose_tokens_were_learned(tmp_path, kept, now, fits):
    """Old checkpoints of images kept no vocabulary, but pictures."""
    before, after = (types.SimpleNamespace(describe=str, tokenizer=lambda t=t: t, length=3,
                                           fingerprint=list)
                     for t in (kept, now))
    run = tiny_run(tmp_path, data=before, steps=2)
    for _ in run.steps(lambda total: ({}, {})):
        run.add(tokens=1)
    with contextlib.nullcontext() if fits else pytest.raises(RunError, match="not those that"):
        assert tiny_run(tmp_path, data=after, steps=4).step == 2


def test_bench_times_the_loop_without_its_warm_up(tmp_path, capsys):
    """Five steps to warm up, then those that count; nothing is read or written."""
    run, steps = tiny_run(tmp_path, mode="bench", bench_steps=3), []
    for step in run.steps(None):
        steps.append(step)
        time.sleep(0.002)
        run.add(tokens=10 ** (6 - step) if step < 5 else 7)
    record = json.loads(capsys.readouterr().out)
    assert steps == list(range(8)) and record["tokens_per_step"] == 7
    assert record["tokens_per_s"] == pytest.approx(7000 / record["ms_per_step"], rel=0.02)
    assert record["parameters"] == 3 and record["length"] == 3 and record["method"] == "toy"
    assert not (tmp_path / "run").exists()
