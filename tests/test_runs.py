"""Whole runs of every script: training, resuming, ranks, stopping, sampling, scoring, mistakes.

The same tests for all of RUNS (conftest.py); what is one script's alone is at the end.
"""

import dataclasses
import importlib
import importlib.util
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import cadd
import common
import data as data_module
import eval as metrics
from common import RunError
from conftest import (DESCENT, ONE_THREAD, ROOT, RUNS, SCRIPTS, checkpoint, curves, log_of,
                      plain_descent, script_of, tiny, two_ranks)

PAIRS = [name for name in RUNS if "numbers" in RUNS[name] or name.startswith("difformer")]
MICRO = {name: ["--micro_tokens", "70"] if name in PAIRS else ["--micro_batch", "3"]
         for name in RUNS}  # of 8 sequences: 4 parts of 2


def same(a, b, where="checkpoint"):
    """Equal to the bit, but for the clock, and for flags that say where and how long."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            if where != "checkpoint" or key not in ("seconds", "config"):
                same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            same(*pair, f"{where}/{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def close(a, b):
    """Logs of two runs: equal but for the rounding of sums in another order."""
    assert list(a) == list(b)
    for step in a:
        assert list(a[step]) == list(b[step])
        for key, value in a[step].items():
            if key == "hint_accuracy_by_t":  # of one rank's first micro-batch
                continue
            values, others = ([v or 0.0 for v in (x if isinstance(x, list) else [x])]
                              for x in (value, b[step][key]))
            # accuracies are counted at few positions: one may tip over
            assert values == pytest.approx(others, rel=2e-3, abs=2e-3), (step, key)


def close_weights(a, b):
    for key in ("model", "ema"):
        one, two = (c[key].get("params", c[key]) for c in (a, b))
        for name in one:
            assert torch.allclose(one[name], two[name], rtol=1e-3, atol=2e-5), name


@pytest.fixture()
def at_step(monkeypatch):
    """at_step(n, action): action(run) as step n begins; None: each step."""
    def go(n, action):
        steps = common.Run.steps

        def watched(run, *callables):
            for step in steps(run, *callables):
                if n in (step, None):
                    action(run)
                yield step
        monkeypatch.setattr(common.Run, "steps", watched)
    return go


@pytest.fixture()
def copy_of(trained, tmp_path):
    """copy_of(name) -> a copy of the run folder `trained(name)`."""
    return lambda name: shutil.copytree(trained(name), tmp_path / "copy")


def command(capsys, *words):
    """A script as `python SCRIPT.py FLAGS`, within this process: exit code, output, errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(w) for w in words])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
    return code, *capsys.readouterr()


def failed(capsys, message, *words, code=1):
    """The command ends with this code and one line that holds `message`."""
    found, _, errors = command(capsys, *words)
    lines = [line for line in errors.splitlines() if line.strip()]
    assert found == code and len(lines) == 1 and "error: " in lines[0], (found, errors)
    assert message in lines[0], lines[0]


# ------------------------------------------------------------------------- resuming and stopping


@pytest.mark.parametrize("name", RUNS)
def test_resume_is_exact_to_the_bit(run, trained, name):
    """3 + 3 steps equal 6: weights, EMA, optimizer, random state and log, dropout included."""
    whole = trained(name)
    run(name, 3, "--dropout", "0.2")
    first = checkpoint(run(name, 3, "--dropout", "0.2"))  # complete: nothing changes
    a = run(name, 6, "--dropout", "0.2")
    same(checkpoint(a), checkpoint(whole))
    assert curves(a)[6] == curves(whole)[6] and list(curves(a)) == [2, 3, 4, 6]
    assert curves(a)[2] == curves(whole)[2]
    assert first["step"] == 3 and "resuming" not in str(log_of(a))
    moved = [not torch.equal(first["model"][k], v) for k, v in checkpoint(a)["model"].items()]
    assert any(moved)


@pytest.mark.parametrize("name", RUNS)
def test_a_signal_saves_and_the_same_command_resumes(run, trained, at_step, name, capsys):
    """Ctrl-C or SIGTERM during step 4 of 6: the step is finished and saved, nothing is reported,
    and what follows is what would have been. The handlers are as they were."""
    number = signal.SIGTERM if list(RUNS).index(name) % 2 else signal.SIGINT
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "steps", common.Run.steps)
        at_step(3, lambda _: signal.raise_signal(number))
        with pytest.raises(KeyboardInterrupt):
            run(name, 6, "--dropout", "0.2", "--save_every", "100")
    out = run(name, 4, "--dropout", "0.2", "--save_every", "100", out="a")
    assert "stopped at step 4, saved: the same command resumes" in capsys.readouterr().out
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert checkpoint(out)["step"] == 4
    same(checkpoint(run(name, 6, "--dropout", "0.2")), checkpoint(trained(name)))


def test_a_signal_forwarded_at_once_is_the_same_request(monkeypatch):
    """torchrun repeats what its processes had; a second Ctrl-C three seconds later is meant."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = common.StopRequest()
    try:
        for seconds in (0, 0.5, 2.4):
            now[0] += seconds
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked
        now[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.restore()


def test_real_signals_end_with_130_and_leave_a_checkpoint(tmp_path, data_dir):
    """Two processes at once, one for each signal, as a terminal and a cluster send them."""
    jobs = []
    for number in (signal.SIGINT, signal.SIGTERM):
        out = tmp_path / str(int(number))
        flags = [*tiny("cadd", data_dir), "--steps", "1000000", "--save_every", "1000000",
                 "--out", str(out)]
        jobs.append((number, out, subprocess.Popen(
            [sys.executable, str(ROOT / "cadd.py"), *flags], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=ONE_THREAD)))
    deadline = time.time() + 120
    for number, out, process in jobs:
        while time.time() < deadline and (not (out / "log.jsonl").exists()
                                          or len(curves(out)) < 2):
            time.sleep(0.05)
        process.send_signal(number)
    for _, out, process in jobs:
        printed, errors = process.communicate(timeout=120)
        assert process.returncode == 130 and "the same command resumes" in printed, errors[-2000:]
        assert "Traceback" not in errors and not (out / "result.json").exists()
        assert checkpoint(out)["step"] >= 4


@pytest.mark.parametrize("name", SCRIPTS)
def test_same_command_again_says_complete_and_more_steps_continue(run, name, capsys):
    out = run(name, 4)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    capsys.readouterr()
    run(name, 4)
    printed = capsys.readouterr().out
    assert "is complete: 4 steps" in printed and "--steps" in printed and "--overwrite" in printed
    assert f"python {script_of(name).__name__}.py" in printed and "--mode sample" in printed
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    run(name, 6)
    assert "resuming at step 4" in capsys.readouterr().out
    assert sorted(curves(out)) == [2, 4, 6]
    run(name, 2, "--overwrite")
    assert sorted(curves(out)) == [2] and checkpoint(out)["step"] == 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_that_ended_without_its_report_makes_it(run, name):
    """Killed between the last checkpoint and result.json: the same command evaluates."""
    out = run(name, 3)
    state = checkpoint(out)
    (out / "result.json").unlink()
    run(name, 3)
    assert json.loads((out / "result.json").read_text())["step"] == 3
    same(checkpoint(out), state)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_older_result_does_not_make_a_run_complete(run, name, monkeypatch, capsys):
    """Continued, or started anew, and killed in its final evaluation: the same command makes the
    report, of the same step, and the next one finds it."""
    out, reports = run(name, 2), []

    def killed(*_):
        raise SystemExit(9)
    for steps, flags in [(4, []), (2, ["--overwrite"]), (10**6, ["--minutes", "0.002"])]:
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(common, "report", killed)
            run(name, steps, *flags)
        step = checkpoint(out)["step"]
        for _ in range(2):
            capsys.readouterr()
            run(name, steps, *(flag for flag in flags if flag != "--overwrite"))
            reports.append("is complete" not in capsys.readouterr().out)
            assert json.loads((out / "result.json").read_text())["step"] == step
    assert reports == [True, False] * 3


def test_what_a_kill_leaves_is_repaired(run, trained):
    """Rows that the checkpoint does not know, a torn line and half-written files; --overwrite
    leaves nothing of the run before."""
    out = run("cadd", 4, "--dropout", "0.2", "--save_every", "2")
    log, remnants = out / "log.jsonl", [out / "checkpoint.tmp123", out / "result.tmp4"]
    for torn in ('{"step": 6, "lr"', '{"step": 6, "lr": 0}\n{"st', "\0\0\0"):
        shutil.copy(log, out / "kept")
        with open(log, "a") as file:
            file.write('{"step": 5, "lr": 0}\n' + torn)
        for remnant in remnants:
            remnant.write_bytes(b"PK")
        state = (out / "checkpoint.pt").read_bytes()
        run("cadd", 6, "--dropout", "0.2")
        assert [r["step"] for r in log_of(out) if "tokens_per_s" in r] == [2, 4, 6]
        assert curves(out) == {k: curves(trained("cadd"))[k] | {"hint_accuracy_by_t": v[
            "hint_accuracy_by_t"]} for k, v in curves(out).items()}
        assert not any(remnant.exists() for remnant in remnants)
        (out / "checkpoint.pt").write_bytes(state)
        (out / "kept").replace(log)
    with pytest.raises(RunError, match="loss is nan.*Nothing was saved yet"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "share_moments", lambda share: (0.1, 0.0))
            run("cadd", 6, "--overwrite", "--length", "64")
    assert sorted(p.name for p in out.iterdir()) == [".training", "log.jsonl"]


def test_of_two_trainings_into_one_folder_the_second_is_refused(run, at_step, tmp_path, capsys,
                                                                data_dir):
    """In its loop and in its report; a lock that nobody holds, of a process that died, is none."""
    other = [*tiny("cadd", data_dir), "--steps", "6", "--out", tmp_path / "a", "--overwrite"]

    def refused(*_):
        failed(capsys, f"another run is training in {tmp_path / 'a'}: ", "cadd.py", *other)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".training").write_text("")
    at_step(3, refused)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "report", refused)
        run("cadd", 4)
    assert sorted(curves(tmp_path / "a")) == [2, 4]


@pytest.mark.parametrize("name", SCRIPTS)
def test_time_budget_ends_training_and_is_kept_over_resumes(run, name, capsys):
    out = run(name, 10**6, "--minutes", "0.004", "--log_every", "1000000")
    first = checkpoint(out)
    assert 0.24 <= first["seconds"] < 10 and (out / "result.json").exists()
    assert list(curves(out)) == [first["step"]]  # its last step is logged
    run(name, 10**6, "--minutes", "0.004")
    assert checkpoint(out)["step"] == first["step"]
    assert "is complete" in (printed := capsys.readouterr().out) and "or --minutes" in printed


@pytest.mark.parametrize("name", RUNS)
def test_the_valid_loss_is_of_valid_and_leaves_the_training_alone(run, trained, name, monkeypatch):
    """Logged at each save. It reads other data than the training, which is the same to the bit
    without it, dropout included."""
    kept, steps = {}, common.Run.steps
    losses = [(r["step"], r["valid_loss"]) for r in log_of(trained(name)) if "valid_loss" in r]
    for kind in (data_module.Sequences, data_module.PairData):
        def watched(self, *rest, inner=kind.train_batch):
            batch = inner(self, *rest)
            kept.setdefault(id(self), []).append(batch.ids)
            return batch
        monkeypatch.setattr(kind, "train_batch", watched)
    again = [r for r in log_of(run(name, 6, "--dropout", "0.2")) if "valid_loss" in r]
    assert [tuple(r.values()) for r in again] == losses and [step for step, _ in losses] == [3, 6]
    assert losses[0][1] != losses[1][1] and all(map(math.isfinite, dict(losses).values()))
    assert sorted(map(len, kept.values())) == [2, 6]  # saves, steps
    monkeypatch.setattr(common.Run, "steps", lambda run, summarise, valid: steps(run, summarise))
    alone = run(name, 6, "--dropout", "0.2", out="b")
    assert not any("valid_loss" in record for record in log_of(alone))
    same(checkpoint(alone), checkpoint(trained(name)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_best_checkpoint_is_kept_and_read(run, at_step, name, data_dir, monkeypatch, capsys):
    """The averaged weights are spoilt in steps 6 and 9: 3 stays the best, over a resume too."""
    script, seen = script_of(name), []
    at_step(None, lambda run: run.step in (5, 8) and [p.add_(9 * torch.randn(
        p.shape, generator=torch.Generator().manual_seed(1))) for p in run.ema.average])
    best = ["--keep", "best"]
    before = checkpoint(run(name, 3))
    out = run(name, 6, *best, "--overwrite")
    assert checkpoint(out)["step"] == 6
    kept = torch.load(out / "best.pt", weights_only=True)
    first = next(r["valid_loss"] for r in log_of(out) if "valid_loss" in r)
    assert kept.pop("valid_loss") == first and kept["step"] == 3
    same(kept, before)
    assert torch.load(run(name, 9, *best) / "best.pt", weights_only=True)["valid_loss"] == first
    monkeypatch.setattr(script, "evaluate", lambda model, *_: seen.append(model) or {})
    for flags, step, state in ((["--keep", "last"], 9, checkpoint(out)), ([], 3, kept)):
        common.main(script, ["--mode", "eval", "--out", str(out), "--device", "cpu", "--data_dir",
                             data_dir, *flags])
        assert json.loads((out / "eval.json").read_text())["step"] == step
        same(dict(seen[-1].state_dict()), dict(state["ema"]["params"]))
    assert common.score(script, str(out), ["--device", "cpu", "--data_dir", data_dir])["step"] == 3
    run(name, 2, "--overwrite")
    assert not (out / "best.pt").exists()


@pytest.mark.parametrize("name", RUNS)
def test_nan_loss_stops_and_leaves_the_last_checkpoint(run, at_step, name):
    """NaN from the seventh step on: it is not saved."""
    at_step(6, lambda run: run.ema.live[0].data.fill_(math.nan))
    with pytest.raises(RunError, match="the loss is nan between steps 6 and 7.*good state.*--lr"):
        run(name, 12, "--save_every", "1")
    out = run(name, 6, "--save_every", "1")
    kept = checkpoint(out)
    assert kept["step"] == 6 and sorted(curves(out)) == [2, 4, 6]
    assert all(torch.isfinite(v).all() for v in kept["model"].values())
    assert not list(out.glob("*.tmp*"))
    with pytest.raises(RunError, match="is nan between steps 6 and 7.*Nothing was saved yet"):
        run(name, 7, "--save_every", "100", out="b")


# ------------------------------------------------------------------------- one step


@pytest.mark.parametrize("name", RUNS)
def test_micro_batches_do_not_change_the_step(run, name, monkeypatch):
    """Batches in parts, divided by the tokens of the whole batch, some of them padding: the same
    gradient, by plain descent."""
    plain_descent(monkeypatch, script_of(name))
    more = ["--recon_share", "0.5"] if name.startswith("catdm") else []
    clip = torch.nn.utils.clip_grad_norm_
    a, b = (run(name, 4, *DESCENT, *more, *flags, out=out)
            for out, flags in (("a", []), ("b", MICRO[name])))
    close(curves(a), curves(b))
    close_weights(checkpoint(a), checkpoint(b))
    assert torch.nn.utils.clip_grad_norm_ is clip


@pytest.mark.parametrize("name", RUNS)
def test_the_step_is_adamw_with_clipping_and_averaging(run, name, monkeypatch, at_step):
    """Six steps of the real loop against their gradients in float64: global norm, cosine schedule,
    AdamW with decoupled decay, EMA with its warm-up."""
    seen, start, cleared, clip = [], {}, [], torch.nn.utils.clip_grad_norm_
    at_step(None, lambda run: cleared.append(
        not any(p.grad is not None and p.grad.any() for p in run.ema.live)))
    at_step(0, lambda run: start.update(
        (name, (id(p), p.detach().double())) for name, p in zip(run.ema.names, run.ema.live)))

    def record(parameters, *args, **kwargs):
        parameters = list(parameters)
        seen.append({id(p): p.grad.double() for p in parameters if p.grad is not None})
        return clip(parameters, *args, **kwargs)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    lr, clip_at, beta2, decay, ema = 1e-2, 0.05, 0.9, 0.3, 0.4
    out = run(name, 6, "--lr_schedule", "cosine", "--warmup", "3", "--lr", "1e-2", "--clip", "0.05",
              "--beta2", "0.9", "--weight_decay", "0.3", "--ema", "0.4", *MICRO[name])
    assert len(seen) == len(cleared) == 6 and all(cleared)
    rates = [lr / 3, lr * 2 / 3, lr, lr, lr * 0.75, lr * 0.25]  # cosine at 0, 1/3, 2/3 of the way
    assert [curves(out)[s]["lr"] for s in (2, 4, 6)] == pytest.approx(rates[1::2])
    norms = [math.sqrt(sum(g.square().sum().item() for g in step.values())) for step in seen]
    assert max(norms) > 2 * clip_at  # else the test would not see it
    kept = checkpoint(out)
    model = {k.removeprefix("student."): v for k, v in kept["model"].items()}
    for name_of_p, (key, p) in start.items():
        average, m, v = p.clone(), torch.zeros_like(p), torch.zeros_like(p)
        # CATDM's embeddings alone are not decayed
        shrink = 0.0 if name.startswith("catdm") and name_of_p == "embed.weight" else decay
        for k, (grads, rate, norm) in enumerate(zip(seen, rates, norms), 1):
            if key in grads:
                g = grads[key] * min(1.0, clip_at / norm)
                m, v = 0.9 * m + 0.1 * g, beta2 * v + (1 - beta2) * g**2
                p = p * (1 - rate * shrink)
                p = p - rate * (m / (1 - 0.9**k)) / ((v / (1 - beta2**k)).sqrt() + 1e-8)
            keep = min(ema, k / (9 + k))
            average = keep * average + (1 - keep) * p
        for got, want in ((model[name_of_p], p), (kept["ema"]["params"][name_of_p], average)):
            assert torch.allclose(got.double(), want, rtol=1e-4, atol=2e-6), name_of_p
    assert kept["ema"]["updates"] == 6


class TwoParameters(torch.nn.Module):
    """In CADD's place: loss per token a + 2 b + 2 (a^2 + b^2) at a = 1, b = 1, so the gradient is
    (1 + 4 a, 2 + 4 b) whatever the batch."""

    hidden_share = (0.5, 0.1)

    def __init__(self):
        super().__init__()
        self.net = types.SimpleNamespace(flops_per_token=lambda L: 0.0)
        self.p, self.cfg = torch.nn.Parameter(torch.ones(2)), cadd.Config(hint="none")
        self.head = types.SimpleNamespace(weight=torch.zeros(1))

    def forward(self, x0, t, u, eps, not_pad):
        loss = (self.p * torch.tensor([1.0, 2.0]) + 2 * self.p**2).sum() * not_pad.sum()
        zero = torch.zeros(10)
        return loss, dict(ce=zero, masked=zero + 1, bound=loss.detach() + zero)


@pytest.mark.parametrize("flags", [[], ["--micro_batch", "4"]])
def test_two_steps_of_two_parameters_by_hand(run, monkeypatch, flags):
    """Gradients (5, 6) at 1 and (4.4, 5.4) at .85, clipped to length 1. AdamW's first step is
    lr in each direction; the second has m = .09 g1 + .1 g2 over .19 and v = .09 g1^2 + .1 g2^2
    over .19; the decay takes lr x .5 of a parameter before each."""
    monkeypatch.setattr(cadd, "build", lambda *_: TwoParameters())
    out = run("cadd", 2, "--lr", "0.1", "--warmup", "0", "--clip", "1", "--beta2", "0.9",
              "--weight_decay", "0.5", "--ema", "0.9", *flags)
    one = [1 - 0.05 - 0.1] * 2                              # 0.85: after step 1
    g1 = [5 / math.sqrt(61), 6 / math.sqrt(61)]
    g2 = [4.4 / math.sqrt(4.4**2 + 5.4**2), 5.4 / math.sqrt(4.4**2 + 5.4**2)]  # 1 + 4 (.85), ...
    two = [p * 0.95 - 0.1 * ((0.09 * a + 0.1 * b) / 0.19)
           / math.sqrt((0.09 * a**2 + 0.1 * b**2) / 0.19) for p, a, b in zip(one, g1, g2)]
    kept = checkpoint(out)
    assert kept["model"]["p"].tolist() == pytest.approx(two, rel=1e-5)
    average = [1 / 10 * 1 + 9 / 10 * p for p in one]                       # decay 1/10, then 2/11
    average = [2 / 11 * a + 9 / 11 * p for a, p in zip(average, two)]
    assert kept["ema"]["params"]["p"].tolist() == pytest.approx(average, rel=1e-5)
    a, b = average  # the averaged weights' loss per token, whatever the batch
    assert log_of(out)[-1] == dict(
        step=2, valid_loss=pytest.approx(a + 2 * b + 2 * (a * a + b * b), rel=1e-5))


@pytest.mark.parametrize("name", RUNS)
def test_noise_differs_between_steps_and_data_too(run, name, monkeypatch, at_step):
    """With the same batch at every step and no learning the losses differ by their noise alone,
    each kind of which is new; and no two steps read the same data."""
    kept, noise = {}, []
    at_step(0, lambda run: run._model.register_forward_pre_hook(lambda model, batch: noise.extend(
        [[x for x in batch if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim()]]
        * model.training)))  # not of the valid loss
    for kind in (data_module.Sequences, data_module.PairData):
        def first(self, seed, step, *rest, inner=kind.train_batch):
            kept[step] = inner(self, seed, step, *rest).ids
            return inner(self, seed, 0, *rest)
        monkeypatch.setattr(kind, "train_batch", first)
    out = run(name, 4, "--lr", "0", "--log_every", "1")
    lines = [{k: v for k, v in r.items() if k not in ("step", "kl_weight")}
             for r in curves(out).values()]
    losses = [next(v for k, v in r.items() if k in (
        "bound_nats", "nll_discrete_nats", "delbo_nats", "loss", "mse")) for r in lines]
    assert len(set(losses)) == 4
    for kind in zip(*noise, strict=True):
        assert len({x.numpy().tobytes() for x in kind}) == len(kind) == 4
    batches = [kept[step].tobytes() for step in range(4)]
    assert len(set(batches)) == 4


def test_two_ranks_equal_one(run, tmp_path, data_dir, capsys):
    """The same gradients (plain descent, so that a wrong factor shows), with padding and two
    micro-batches a rank; two ranks resume what one began; two agree when the time is over, when
    one or both get signals and when one has no finite loss. Rank 1 may have nothing to evaluate;
    rank 0 alone prints."""
    jobs, single, few = [], {}, ["--eval_sequences", "1"]
    more = {"vadd": few, "catdm": ["--recon_share", "0.5", *few], "catdm-pairs": few}
    micro = {n: ["--micro_tokens", "40"] if n in PAIRS else ["--micro_batch", "2"] for n in RUNS}
    names = ["cadd", "vadd", "catdm", "catdm-pairs", "difformer"]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            plain_descent(patch, script_of(name))
            single[name] = run(name, 4, *DESCENT, *more.get(name, []), out=f"{name}-1", report=True)
            jobs.append((name, [*tiny(name, data_dir), "--steps", "4", "--out",
                                str(tmp_path / f"{name}-2"), *DESCENT, *more.get(name, []),
                                *micro[name]]))
        moved = shutil.copytree(single["cadd"], tmp_path / "moved")
        states = {name: checkpoint(out) for name, out in single.items()}
        longer = run("cadd", 6, *DESCENT, out="cadd-1", report=True)
    jobs.append(("cadd", [*tiny("cadd", data_dir), *DESCENT, "--steps", "6", "--out", str(moved)]))
    budget = tmp_path / "budget"
    jobs.append(("cadd", [*tiny("cadd", data_dir), *DESCENT, "--minutes", "0.003", "--steps",
                          "1000000", "--save_every", "1000000", "--out", str(budget)]))
    for trouble in ({"term": [1]}, {"term": [0, 1]}, {"nan": [1]}):
        jobs.append(("cadd", [*tiny("cadd", data_dir), *DESCENT, *micro["cadd"], "--steps", "5",
                              "--save_every", "3", "--log_every", "1000", "--out",
                              str(tmp_path / f"{trouble}")], trouble))
    for mode in ("eval", "sample"):
        jobs.append(("cadd", ["--mode", mode, "--out", str(tmp_path / "cadd-2"), "--device", "cpu",
                              "--data_dir", data_dir, *few]))
    printed = two_ranks(*jobs)
    assert printed.count("training ->") == 9 and printed.count("resuming at step 4") == 1
    assert printed.count("stopped at step 4, saved") == 2
    assert printed.count("eval.json") == 1
    for trouble in ({"term": [1]}, {"term": [0, 1]}):
        close_weights(states["cadd"], stopped := checkpoint(tmp_path / f"{trouble}"))
        assert stopped["step"] == 4 and not (tmp_path / f"{trouble}/result.json").exists()
    assert not list((tmp_path / "{'nan': [1]}").glob("*.pt"))
    for name in names:
        one, two = single[name], tmp_path / f"{name}-2"
        close({k: v for k, v in curves(one).items() if k <= 4}, curves(two))
        close_weights(states[name], checkpoint(two))
        rng = checkpoint(two)["rng"]
        assert len(rng) == 2 and not torch.equal(rng[0]["cpu"], rng[1]["cpu"])
        figures, others = (json.loads((out / "result.json").read_text())["figures"]
                           for out in (one, two))
        assert list(figures) == list(others)
        for key in figures:
            assert figures[key].get("draws") == others[key].get("draws"), (name, key)
            if figures[key].get("draws") == 1:  # rank 0 has it, with the noise of one rank
                assert figures[key]["value"] == pytest.approx(others[key]["value"], rel=1e-3)
        losses, others = ([r["valid_loss"] for r in log_of(out) if "valid_loss" in r]
                          for out in (one, two))
        assert losses[:len(others)] == pytest.approx(others, rel=1e-4) and len(others) == 2
    close(curves(longer), curves(moved))
    close_weights(checkpoint(longer), checkpoint(moved))
    assert checkpoint(budget)["seconds"] >= 0.18 and (budget / "result.json").exists()


# ------------------------------------------------------------------------- after training


@pytest.mark.parametrize("name", RUNS)
def test_reports_use_the_averaged_weights(run, name, monkeypatch, data_dir):
    """Figures and samples of a training and of --mode eval and sample; the training goes on with
    its own weights. The same figures are found again from the checkpoint."""
    script, seen = script_of(name), []
    for method in ("evaluate", "draw"):
        def spy(model, *rest, inner=getattr(script, method), **more):
            assert not model.training
            seen.append({k: v.clone() for k, v in model.state_dict().items()})
            return inner(model, *rest, **more)
        monkeypatch.setattr(script, method, spy)
    out = run(name, 3, "--sample_batch", "64", report=True)
    state = checkpoint(out)
    flags = ["--out", str(out), "--device", "cpu", "--data_dir", data_dir]
    monkeypatch.setattr(metrics.TokenClassifier, "steps", 20)
    common.main(script, [*flags, "--mode", "eval"])
    common.main(script, [*flags, "--mode", "sample"])
    assert len(seen) == 4
    for weights in seen:
        same(weights, dict(state["ema"]["params"]))
    own = {k.removeprefix("student."): v for k, v in state["model"].items()}
    assert any(not torch.equal(v, own[k]) for k, v in seen[0].items())
    result, again = (json.loads((out / f).read_text()) for f in ("result.json", "eval.json"))
    for key, figure in result["figures"].items():
        assert "speed" in key or again["figures"][key] == pytest.approx(figure), key
    assert result["method"] == again["method"] == script.name_of(script.Config(**state["config"]))
    for kept in (result, again):
        assert kept["step"] == 3 and kept["config"]["dim"] == 16
        assert kept["split"] == kept["config"]["split"]
        assert {"dataset", "figures", "commit", "python", "torch", "hardware"} <= set(kept)
    assert {"parameters", "train_seconds"} <= set(result) and "argv" in again


@pytest.mark.parametrize("name", RUNS)
def test_sample_needs_the_checkpoint_alone(copy_of, tmp_path, capsys, name):
    """No data (toys are drawn anew, pairs are given), a fixed seed, and nothing else is written."""
    out, nowhere = copy_of(name), tmp_path / "nothing here"
    flags = ["--mode", "sample", "--out", out, "--device", "cpu", "--data_dir", nowhere,
             "--samples", "3", *(["--source", "neun"] if name in PAIRS else [])]
    before = (out / "checkpoint.pt").read_bytes()
    script = f"{script_of(name).__name__}.py"
    first = command(capsys, script, *flags)
    assert first[0] == 0 and not nowhere.exists(), first[2]
    assert command(capsys, script, *flags)[:2] == first[:2]
    assert (out / "checkpoint.pt").read_bytes() == before
    if name in PAIRS:
        assert "neun\n" in first[1] and "->" in first[1]
    elif "pydoc" in RUNS[name]:
        assert first[1].count("--- sample") == 3
        assert len((out / "samples.jsonl").read_text().splitlines()) == 3
    else:
        file = out / ("samples.npz" if name == "catdm" else "samples.png")
        assert file.stat().st_mtime > (out / "log.jsonl").stat().st_mtime


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_loaded_from_python(trained, data_dir, name):
    """With the averaged weights; each script samples as documented."""
    script, out = script_of(name), str(trained(name))
    model, data = common.load_run(script, out, "--device", "cpu", "--data_dir", data_dir)
    kept = checkpoint(trained(name))["ema"]["params"]
    assert not model.training and all(torch.equal(p, kept[k]) for k, p in model.named_parameters())
    if script.__name__ in ("cadd", "vadd"):
        *_, x = script.sample(model, torch.full((4, data.length), data.mask_id), steps=3)
        assert all(map(data.decode, x.tolist())) and (x < data.vocab_size).all()
    elif name in PAIRS:
        ddp = common.DDP.start(model.cfg)
        [row] = script.translate(model, ["neun"], data, model.cfg, ddp)
        assert row["source"] == "neun" and row["text"] in row["candidates"]
    else:
        cond = (torch.tensor([2, 0, 1, 2]),) if data.classes else ()
        *_, x = script.sample(model, (4, data.length), 3, cond, guidance=1.0 if cond else 0.0)
        assert x.shape == (4, data.length) and (x < data.vocab_size).all()


@pytest.mark.parametrize("name", RUNS)
def test_eval_mode_writes_its_figures_and_settings(copy_of, tmp_path, data_dir, capsys, name,
                                                   monkeypatch):
    out, file = copy_of(name), tmp_path / "figures.json"
    monkeypatch.setattr(metrics.TokenClassifier, "steps", 20)
    flags = ["--mode", "eval", "--out", out, "--device", "cpu", "--data_dir", data_dir]
    script = f"{script_of(name).__name__}.py"
    code, printed, errors = command(capsys, script, *flags, "--split", "test", "--eval_sequences",
                                    "2", "--save", file)
    assert code == 0 and f"-> {file}" in printed, errors
    result = json.loads(file.read_text())
    assert result["config"]["eval_sequences"] == 2 and result["split"] == "test"
    assert result["config"]["lr"] == 1e-2  # the run's own
    assert result["step"] == 6 and str(file) in result["argv"] and result["figures"]
    for key, figure in result["figures"].items():
        assert math.isfinite(figure["value"]) and figure["unit"], key
        assert key in printed and f"{figure['value']:.4f}" in printed
    assert command(capsys, script, *flags)[0] == 0
    assert json.loads((out / "eval.json").read_text())["config"]["eval_sequences"] in (3, 4)


@pytest.mark.parametrize("name", RUNS)
def test_samples_and_figures_follow_the_seed(copy_of, name, monkeypatch, data_dir):
    """Each batch of samples goes on with the noise of one generator, which the seed makes; figures
    have noise of their own for each seed and rank."""
    script, flags = script_of(name), ["--device", "cpu", "--data_dir", data_dir]
    cfg, ddp, model, data, _ = common.open_run(script, str(copy_of(name)), flags)
    cfg, states = dataclasses.replace(cfg, mode="train", samples=4, sample_batch=2), []
    noise = {seed: dataclasses.replace(cfg, seed=seed) for seed in (0, 1)}

    def spy(*args, inner=script.sample, **more):
        states[-1].append(more.get("generator", args[-1]).get_state().numpy().tobytes())
        return inner(*args, **more)
    with monkeypatch.context() as patch:
        patch.setattr(script, "sample", spy)
        for seed in (0, 0, 1):
            states.append([])
            script.draw(model, noise[seed], data, ddp)
    assert states[0] == states[1] and len(states[0]) > 1
    assert len({*states[0], *states[2]}) == 2 * len(states[0])
    if name == "difformer":
        return  # its figures are of such samples
    inner = type(data).eval_batches  # every rank: all sequences
    monkeypatch.setattr(type(data), "eval_batches", lambda *a: inner(*a[:4]))
    other = common.DDP(1, 1, ddp.device, False)
    a, b, c, d = (next(iter(script.evaluate(model, noise[seed], data, rank).values()))["value"]
                  for seed, rank in ((0, ddp), (0, ddp), (1, ddp), (0, other)))
    assert a == b and len({a, c, d}) == 3


@pytest.mark.parametrize("name", ["cadd", "vadd"])
def test_what_is_scored_or_drawn_is_full_float32(copy_of, name, monkeypatch, data_dir):
    """Under autocast the networks round to bfloat16, but not the head, and nothing is TF32."""
    script, flags = script_of(name), ["--device", "cpu", "--data_dir", data_dir]
    cfg, ddp, model, data, _ = common.open_run(script, str(copy_of(name)), flags)
    ddp = dataclasses.replace(ddp, amp=True)
    seen = []
    for function in ("sample", "likelihoods"):
        monkeypatch.setattr(script, function, lambda *a, inner=getattr(script, function), **k: (
            seen.append((torch.get_float32_matmul_precision(),
                         torch.is_autocast_enabled("cpu"))), inner(*a, **k))[1])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        script.evaluate(model, cfg, data, ddp)
        script.draw(model, cfg, data, ddp)
        assert torch.get_float32_matmul_precision() == "high" and len(seen) >= 2
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {("highest", True)}
    weight, bias = (model.readout() if name == "cadd"
                    else (model.head.weight[:-1], model.head.bias[:-1]))
    h = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
    exact = h @ weight.T + bias
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(h)
        z0 = model.z0_hat(exact, "soft") if name == "cadd" else None
    if name == "cadd":
        assert torch.allclose(z0, exact.softmax(-1) @ model.embedding_matrix()[:-1], atol=1e-6)
    assert torch.allclose(logits, exact, atol=1e-5)  # bfloat16 would miss by 1e-2


@pytest.mark.parametrize("name,figure,flags", [
    ("cadd", "nll_prior", dict(hint="none", eval_draws=1)),
    ("vadd", "nll_bound_2", dict(latent_dim=0, bound_steps="2")), ("ar_baseline", "nll", {})])
def test_padding_is_given_and_the_unit_says_so(name, figure, flags):
    """Symbols of probability 3/4 and 1/4, and padding. Rows of one length cost -log of a product
    and have the sum of probabilities 1, all rows together 2, which the unit owns up to; and
    long rows weigh more in a mean over rows."""
    script, cpu = script_of(name), common.DDP(0, 1, torch.device("cpu"), False)
    cfg = script.Config(dim=8, heads=1, depth=1, length=2, micro_batch=1000, **flags)
    model = script.build(cfg, types.SimpleNamespace(vocab_size=3, pad_id=2, shape=None)).eval()
    p = torch.tensor([0.75, 0.25])
    head = model.out if name == "ar_baseline" else model.head
    head.bias.data[:3] = torch.cat([p.log(), torch.tensor([-1e4])])

    def score(*rows):
        rows = np.repeat(rows, 1000, 0)
        data = data_module.Sequences("toy", 3, 2, "token", {"valid": rows}, pad_id=2)
        found = script.evaluate(model, cfg, data, cpu)[figure]
        assert found.get("is_bound", True) and found["stderr"] < 0.07
        assert found["perplexity"] == pytest.approx(math.exp(found["value"]))
        return found["value"], found["unit"], 4 * found["stderr"] + 1e-6  # only cadd's is not exact

    total = {"nats/token": 0.0, "nats/token given the padding": 0.0}
    for row in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2)]:
        nats, unit, error = score(row)
        want = -math.log(math.prod(p[i].item() for i in row if i < 2))
        assert nats == pytest.approx(want / (2 - row.count(2)), abs=error)
        total[unit] += math.exp(-want)
    assert list(total.values()) == pytest.approx([1, 1])  # hence all rows 2
    nats, unit, error = score((0, 0), (1, 2))
    assert nats == pytest.approx(-math.log(0.75**2 * 0.25) / 3, abs=error)
    assert unit == "nats/token given the padding"


FEW = ["--batch_size", "2", "--micro_batch", "1"]  # their sequences are long
BENCH = {**MICRO, "catdm": ["--dataset", "imagenet", "--labels", "", *FEW],
         "cadd-pixels": ["--dataset", "cifar10", "--length", "3072", *FEW]}


@pytest.mark.parametrize("name", BENCH)
def test_bench_prints_one_json_line(capsys, tmp_path, data_dir, monkeypatch, name):
    """The script's own loop, on data that are neither read nor downloaded; nothing is written. A
    step is of the whole batch, in several micro-batches."""
    monkeypatch.chdir(tmp_path)
    flags = [*tiny(name, data_dir), *BENCH[name], "--data_dir", str(tmp_path / "none"), "--mode",
             "bench", "--bench_steps", "2"]
    code, printed, errors = command(capsys, f"{script_of(name).__name__}.py", *flags)
    assert code == 0, errors
    record = json.loads(printed)
    assert record["tokens_per_s"] > 0 and record["ms_per_step"] > 0 and record["parameters"] > 0
    assert record["method"] == script_of(name).__name__ and record["hardware"]
    sequences = 2 if BENCH[name][-4:] == FEW else 8
    assert record["tokens_per_step"] == {"catdm-pairs": 128, "difformer": 192}.get(
        name, sequences * record["length"])
    assert record["length"] == {"catdm": 256, "vadd-toy": 2, "vadd-informed": 2,
                                "difformer": 32}.get(name, record["length"])
    assert not list(tmp_path.iterdir())


NEWER = ("alpha", "save")  # flags that the first checkpoints did not have
OLD_IMAGES = ("name", "vocab_size", "shape", "classes", "pixels")  # their tokenizer's keys


@pytest.mark.parametrize("name", [n for n in RUNS if n != "cadd-mdlm"])  # has --alpha cosine
def test_checkpoints_older_than_a_flag_resume_sample_and_score(run, copy_of, name, capsys, data_dir,
                                                               monkeypatch):
    """Their configuration lacks it and may hold one that is gone; what is new had its default."""
    out, script, seen = copy_of(name), script_of(name), []
    state = checkpoint(out)
    state["config"] = {k: v for k, v in state["config"].items() if k not in NEWER} | {"gone": 1}
    if name == "catdm":
        state["tokenizer"] = {k: state["tokenizer"][k] for k in OLD_IMAGES}
    torch.save(state, out / "checkpoint.pt")
    again = run(name, 7, "--dropout", "0.2", out=str(out))
    assert checkpoint(again)["step"] == 7 and "resuming at step 6" in capsys.readouterr().out
    torch.save(state, out / "checkpoint.pt")
    monkeypatch.setattr(script, "evaluate", lambda model, cfg, *_: seen.append(cfg) or {})
    monkeypatch.setattr(script, "draw", lambda model, cfg, *_, **__: seen.append(cfg) or {})
    flags = ["--device", "cpu", "--data_dir", data_dir]
    for mode in ("sample", "eval"):
        common.main(script, [*flags, "--out", str(out), "--mode", mode])
    assert common.score(script, str(out), flags)["step"] == 6
    assert len(seen) == 3
    for cfg in seen:
        assert getattr(cfg, "alpha", "linear") == "linear" and cfg.save == "" and cfg.dim == 16
        assert not hasattr(cfg, "gone")


# ------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(capsys, name):
    """Grouped, every flag, and the values of the chosen data set, for each of them."""
    script = script_of(name)
    code, out, _ = command(capsys, f"{name}.py", "--help")
    assert code == 0 and script.__doc__.splitlines()[0] in out
    order = [out.index(f"\n{group}:\n") for group in common.GROUPS if f"\n{group}:\n" in out]
    assert order == sorted(order) and len(order) >= 5
    for field in dataclasses.fields(script.Config):
        assert f"--{field.name}" in out, field.name
    for dataset, row in script.PRESETS.items():
        if dataset not in ("folder", "images"):
            value = {**{f.name: f.default for f in dataclasses.fields(script.Config)}, **row}
            _, out, _ = command(capsys, f"{name}.py", "--help", "--dataset", dataset)
            text = " ".join(out.split())
            assert f"(default {value['steps']})" in text and f"(default {value['lr']})" in text
            assert f"Defaults are those of --dataset {dataset}." in text


WRONG = {  # values that each script's own flags refuse
    "cadd": ["--hint both", "--K 0", "--mse_weight -1", "--top_p 0", "--dropout 1"],
    "vadd": ["--prior laplace", "--latent_dim -1", "--K 0", "--heads x"],
    "catdm": ["--drop 1.5", "--cm kl", "--teacher 2", "--beta_dm -1"],
    "difformer": ["--loss anchors", "--factor -1", "--rescaling cosine", "--T x"]}
OTHER = {  # what defines a method: flag, the run's value, another
    "cadd": ("hint", "fm", "vp"), "vadd": ("latent_dim", "3", "4"),
    "catdm": ("shift", "-1.5", "0.0"), "difformer": ("loss", "anchor", "none")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_newcomer_mistakes_are_one_line_and_a_bad_exit_code(capsys, tmp_path, data_dir,
                                                            monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    script = f"{name}.py"
    if name == "difformer":  # its sets are a flag's choices
        failed(capsys, "not one of numbers, multi30k", script, "--dataset", "texxt8", code=2)
    else:
        known = [k for k in script_of(name).PRESETS if k not in ("folder", "images", ".npy")]
        failed(capsys, f"choose one of {', '.join(known)}, or", script, "--dataset", "texxt8")
    failed(capsys, "unrecognized arguments: --stepz", script, "--stepz", "3", code=2)
    failed(capsys, "0 is out of range", script, "--steps", "0", code=2)
    failed(capsys, "'x' is not of type float", script, "--lr", "x", code=2)
    failed(capsys, "'bench2' is not one of", script, "--mode", "bench2", code=2)
    failed(capsys, "expected one argument", script, "--dataset", code=2)
    for flag in WRONG[name]:
        failed(capsys, f"argument {flag.split()[0]}: ", script, *flag.split(), code=2)
    failed(capsys, "train first", script, "--mode", "sample", "--out", "nowhere")
    failed(capsys, "train first", script, "--mode", "eval", "--out", "nowhere")
    if not torch.cuda.is_available():
        failed(capsys, "--device cpu", script, "--device", "cuda")
    failed(capsys, "--device: 'mps' is not one of auto, cpu, cuda", script, "--device", "mps",
           code=2)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for out in ("file", "file/run"):
        failed(capsys, f"--out {out} cannot be written", script, *tiny(name, data_dir), "--steps",
               "1", "--out", out)
    if name != "difformer":
        failed(capsys, "train", script, "--dataset", "folder", "--device", "cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


LATE = [  # what evaluation or sampling would refuse
    ("cadd", "valid is shorter than one sequence of 40000", "--length 40000"),
    ("catdm-text", "valid is shorter than one sequence of 40000", "--length 40000"),
    ("vadd", "has no 'test' split", "--dataset DATA/own --split test"),
    ("difformer", "files has no test pairs", "--dataset files --train DATA/own/train.txt "
     "DATA/own/train.txt --split test"),
    ("cadd", "--prompt has no gap", "--prompt abc"),
    ("cadd", "--prompt has 17 tokens: 16", f"--prompt {'_' * 17}"),
    ("vadd", "--prompt has 17 tokens: 16", f"--prompt {'_' * 17}"),
    ("vadd-toy", "--prompt and --watch are for text", "--prompt _"),
    ("vadd-toy", "--prompt and --watch are for text", "--watch"),
    ("cadd", "'É' at offset 0 is not in the vocabulary", "--prompt É_"),
    ("catdm", "--label X: choose one of 0, 1, 2", "--label X"),
    ("catdm-text", "--label 1: this model has no classes", "--label 1"),
    ("catdm-pairs", "--label 1: this model has no classes", "--label 1"),
    ("catdm-text", "--tokens is for ffhq, lsun and imagenet: say --dataset x", "--tokens x.npy"),
    ("vadd", "give numbers of steps, 1 to 1000000", "--bound_steps 1,0"),
    ("vadd", "give numbers of steps, 1 to 1000000", "--bound_steps 1,1000001"),
    ("difformer", "--length is at most 30 and --K at most 2000", "--K 2001"),
    ("difformer", "--length is at most 30 and --K at most 2000", "--length 31"),
    ("difformer", "--valid and --test go with --train", "--valid a b"),
    ("cadd", "is a file: choose another --data_dir", "--data_dir DATA/tokens.npy")]


@pytest.mark.parametrize("name, message, flags", LATE)
def test_what_cannot_be_evaluated_is_not_trained(capsys, tmp_path, data_dir, name, message, flags):
    own = Path(data_dir) / "own"
    own.mkdir(exist_ok=True)
    for split in ("train", "valid"):
        (own / f"{split}.txt").write_text("ab cd\n" * 99)
    failed(capsys, message, f"{script_of(name).__name__}.py", *tiny(name, data_dir), "--steps", "1",
           "--out", tmp_path / "a", *flags.replace("DATA", data_dir).split())
    assert not (tmp_path / "a" / "log.jsonl").exists()


@pytest.mark.parametrize("name", ["cadd", "vadd", "catdm-text"])
def test_own_text_as_bytes(run, tmp_path, name):
    """256 symbols, figures in bits per byte, and samples from the checkpoint alone."""
    (tmp_path / "own.txt").write_text("héé " * 400)
    out = run(name, 2, "--dataset", str(tmp_path / "own.txt"), "--bytes", report=True)
    assert checkpoint(out)["tokenizer"]["vocab_size"] == 256
    assert '"bits/byte"' in (out / "result.json").read_text()


@pytest.mark.parametrize("name", ["cadd", "vadd", "catdm"])
def test_a_step_without_a_masked_token_is_logged(run, name):
    """One sequence a step: sometimes nothing is hidden."""
    lines = curves(run(name, 30, "--batch_size", "1", "--log_every", "1"))
    assert len(lines) == 30
    if name != "catdm":
        found = [r["ce_masked_nats"] for r in lines.values()]
        assert None in found and any(found)


def test_a_run_outlives_its_readers_and_an_ascii_terminal(tmp_path, data_dir, monkeypatch):
    """`python cadd.py | head -1`, stderr closed as well: result.json is there, exit code 0. Then a
    terminal without ±, and no streams at all."""
    flags = [*tiny("cadd", data_dir), "--steps", "3", "--out"]
    pipes = [os.pipe() for _ in range(2)]
    for reader, _ in pipes:
        os.close(reader)
    broken = [open(writer, "w") for _, writer in pipes]
    ascii_only = [io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True) for _ in range(2)]
    for name, streams in (("a", broken), ("b", ascii_only), ("c", (None, None))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            common.run_main(common.main, cadd, [*flags, str(tmp_path / name)])
            assert (sys.stdout, sys.stderr) == tuple(streams)
        assert json.loads((tmp_path / name / "result.json").read_text())["step"] == 3
    for stream in broken:
        stream.close()  # nothing left that could not be written
    assert b" ? " in ascii_only[0].buffer.getvalue()


@pytest.mark.parametrize("flags", ["--eval_draws 0", "--lr 3", "--metrics blue", "--steps 8,0",
                                   "--steps x", "--steps 2 --top_p 7"])
def test_eval_refuses_flags_in_its_own_name(capsys, trained, data_dir, flags):
    code, _, errors = command(capsys, "eval.py", trained("cadd"), "--data_dir", data_dir,
                              *flags.split())
    assert code == 2 and errors.startswith("eval.py: error: ") and flags.split()[-2] in errors
    assert errors.count("\n") == 1


def test_eval_fails_in_one_line(capsys, tmp_path, trained, data_dir):
    """Exit code 1 where a file or a folder is not what is needed."""
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"text"\n')
    (tmp_path / "few.jsonl").write_text('{"text": "a few words"}\n')
    flags = ["--dataset", "pydoc", "--data_dir", data_dir]
    failed(capsys, "is empty", "eval.py", tmp_path / "empty.jsonl", *flags)
    failed(capsys, "line 1, is broken", "eval.py", tmp_path / "broken.jsonl", *flags)
    failed(capsys, "has no checkpoint.pt", "eval.py", tmp_path)
    few = tmp_path / "few.jsonl", *flags
    failed(capsys, "nowhere does not exist", "eval.py", trained("cadd"), tmp_path / "nowhere")
    if importlib.util.find_spec("comet") is None:
        failed(capsys, "pip install unbabel-comet", "eval.py", trained("difformer"), "--metrics",
               "comet", *flags[2:])
    failed(capsys, "unrecognized arguments: --split", "eval.py", "images", trained("cadd"),
           "--split", "test", code=2)
    for name in ("cadd", "difformer"):  # before anything is scored
        assert not list(Path(trained(name)).glob("eval-*.json"))
    failed(capsys, "made by cadd.py: give a run of", "eval.py", *few, "--judge", trained("cadd"))
    if importlib.util.find_spec("mauve") is None:
        failed(capsys, "pip install mauve-text", "eval.py", *few, "--metrics", "mauve")


def test_no_home_is_needed(monkeypatch, tmp_path, data_dir):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("CATDIFF_CACHE", raising=False)
    assert data_module.folders_of(tmp_path, "x") == [tmp_path / "x"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_is_not_continued_with_other_settings(run, copy_of, capsys, data_dir, name):
    out = copy_of(name)
    flags = [*tiny(name, data_dir), "--dropout", "0.2", "--steps", "7", "--out", out]
    script = f"{name}.py"
    failed(capsys, "--lr 0.01, not 0.02", script, *flags, "--lr", "0.02")
    failed(capsys, "--seed 0, not 1", script, *flags, "--seed", "1")
    flag, own, other = OTHER[name]
    failed(capsys, f"--{flag} {own}, not {other}", script, *flags, f"--{flag}", other)
    failed(capsys, "--dropout 0.2, not 0.1", script, *flags, "--dropout", "0.1")
    failed(capsys, "--dim 16, not 32", script, "--mode", "sample", "--out", out, "--dim", "32")
    failed(capsys, "--dim 16, not 32", script, "--mode", "eval", "--out", out, "--dim", "32")
    assert checkpoint(out)["step"] == 6


@pytest.mark.parametrize("name", SCRIPTS)
def test_checkpoints_that_cannot_be_used(copy_of, capsys, data_dir, name):
    """Of another script, of another model, foreign, cut off: one line, and nothing is written."""
    out, script = copy_of(name), f"{name}.py"
    path, state = out / "checkpoint.pt", checkpoint(out)
    train = [*tiny(name, data_dir), "--dropout", "0.2", "--steps", "7", "--out", out]
    sample = ["--mode", "sample", "--out", out, "--device", "cpu", "--data_dir", data_dir]
    whole = path.read_bytes()
    other = "cadd" if name != "cadd" else "vadd"
    short = {k: dict(list(state[k].items())[1:]) for k in ("model",)}
    short["ema"] = {**state["ema"], "params": dict(list(state["ema"]["params"].items())[1:])}
    for message, made in [
            (f"a checkpoint of {other}.py", {**state, "method": other}),
            ("does not fit this model", {**state, **short}),
            ("not a checkpoint of this project", {"weights": torch.zeros(2)}),
            ("truncated or not a checkpoint", whole[:len(whole) // 2]),
            ("truncated or not a checkpoint", b"PK" + bytes(100)),
            ("truncated or not a checkpoint", b"")]:
        path.write_bytes(made) if isinstance(made, bytes) else torch.save(made, path)
        kept = path.read_bytes()
        for flags in (train, sample):
            failed(capsys, message, script, *flags)
        assert path.read_bytes() == kept
    path.write_bytes(whole)
    assert command(capsys, script, *sample)[0] == 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_debugger_sees_the_error_itself(monkeypatch, capsys, name):
    monkeypatch.setenv("CATDIFF_DEBUG", "1")
    with pytest.raises(RuntimeError, match="train first"):
        command(capsys, f"{name}.py", "--mode", "sample", "--out", "nowhere")


# ------------------------------------------------------------------------- cadd.py alone


def test_a_run_leaves_everything_it_should(run, capsys):
    out = run("cadd", 8, "--eval_sequences", "8", report=True)
    printed = capsys.readouterr().out
    for word in ("nll_joint", "nll_discrete", "unigram", "bigram", "--- sample", "±"):
        assert word in printed
    result = json.loads((out / "result.json").read_text())
    assert result["step"] == 8 and result["config"]["dim"] == 16 and result["torch"]
    for figure in result["figures"].values():
        assert figure["unit"] == "bits/char" and figure["stderr"] > 0 and figure["draws"] == 8
    assert not result["figures"]["nll_discrete"]["is_bound"]
    assert set(result["data_entropy_bits"]) == {"unigram", "bigram"}
    first = log_of(out)[0]["start"]
    assert {"argv", "config", "commit", "torch", "hardware"} <= set(first)
    texts = [json.loads(line)["text"] for line in (out / "samples.jsonl").open()]
    assert len(texts) == 32 and printed.count("\n--- sample\n") == 2  # a whole batch is kept
    # One sample's way, and what another order gains and costs
    way = re.findall(r"^ +(\d)  '(.*)'$", printed, re.M)
    assert [call for call, _ in way] == ["1", "2", "3"] and way[2][1] == texts[0]
    assert all(a in ("_", b) for (_, x), (_, y) in zip(way, way[1:]) for a, b in zip(x, y))
    assert way[0][1].count("_") > way[1][1].count("_") > 0
    again = re.findall("--- sample by --order confidence\n(.*)", printed)
    assert len(again) == 2 and not set(again) & set(texts)
    for order, columns in result["orders"].items():
        assert columns["samples"] == "32" and columns["entropy, nats"] in printed, order
    assert sorted(curves(out)) == [2, 4, 6, 8]


@pytest.mark.parametrize("name, figure", [("cadd", "nll_discrete"), ("cadd-mdlm", "bound")])
def test_only_a_bound_is_logged_as_one(trained, name, figure):
    """eval.py curves reads either; nll_discrete, given hints that nobody pays for, is none."""
    log, kept = curves(trained(name)), metrics.read_curves(trained(name))
    other = {"bound": "nll_discrete", "nll_discrete": "bound"}[figure]
    assert other not in str(log) and {f"{figure}_nats", f"{figure}_bits"} <= set(kept)
    for row in log.values():
        assert row[f"{figure}_bits"] == pytest.approx(row[f"{figure}_nats"] / math.log(2))


def test_training_learns(run):
    curve = [r["bound_nats"] for r in curves(run("cadd-mdlm", 80, "--alpha", "linear")).values()]
    assert sum(curve[-5:]) / 5 < sum(curve[:2]) / 2 - 0.15  # 80 tokens a step: noisy


def test_too_many_masked_positions_stop_the_run(run, monkeypatch):
    """A schedule that hides more than it says: an error, not too low a loss."""
    monkeypatch.setattr(common, "share_moments", lambda share: (0.1, 0.0))
    with pytest.raises(RunError, match="the loss is nan between steps 0 and 1.*Nothing was saved"):
        run("cadd", 4, "--save_every", "1", "--length", "64")


@pytest.mark.parametrize("alpha", ["linear", "cosine"])
def test_both_schedules_of_tokens_train_sample_and_score(run, capsys, alpha):
    out = run("cadd", 4, "--alpha", alpha, report=True)
    assert capsys.readouterr().out.count("--- sample") == 4  # two in each of two orders
    result = json.loads((out / "result.json").read_text())
    assert result["config"]["alpha"] == alpha and result["figures"]["nll_joint"]["value"] > 3
    with pytest.raises(RunError, match=f"made with --alpha {alpha}"):
        run("cadd", 6, "--alpha", "linear" if alpha == "cosine" else "cosine")


@pytest.mark.parametrize("name", ["cadd", "cadd-mdlm", "vadd"])
def test_prompts_and_watching(copy_of, capsys, name):
    """Gaps are filled, the rest is kept; samples.jsonl holds free samples only."""
    out, script = copy_of(name), f"{script_of(name).__name__}.py"
    flags = ["--mode", "sample", "--out", out, "--device", "cpu", "--samples", "3"]
    assert command(capsys, script, *flags)[0] == 0
    free = (out / "samples.jsonl").read_text()
    _, printed, _ = command(capsys, script, *flags, "--watch")
    assert "·" * 16 in printed
    assert (out / "watched.jsonl").read_text() == free and "·" not in free
    _, printed, _ = command(capsys, script, *flags, "--prompt", "the ___ of", "--watch")
    texts = [json.loads(line)["text"] for line in (out / "prompted.jsonl").open()]
    assert len(texts) == 3 and all(
        t.startswith("the ") and t.endswith(" of") and len(t) == 10 for t in texts)
    assert "the ···" in printed  # --watch shows the gaps
    assert (out / "samples.jsonl").read_text() == (out / "watched.jsonl").read_text() == free


def test_fine_tuning_starts_from_the_mdm(run, copy_of):
    """One step with learning rate 0 leaves what it starts from: the averaged weights. To resume,
    the source is not needed; it must be of the same network and vocabulary."""
    mdm = copy_of("cadd-mdlm")
    flags = ["--init_from", str(mdm), "--alpha", "cosine", "--fuse", "concat", "--lr", "0", "--ema",
             "0"]
    with pytest.raises(RunError, match="is an MDM: give --hint_at masked"):
        run("cadd", 1, *flags, out="tuned")
    flags += ["--hint_at", "masked"]
    for other in ("heads 1", "dim 32", "depth 2", "embed_norm 0.5", "time_cond", "alpha linear"):
        with pytest.raises(RunError, match=f"{mdm} was made with --{other.split()[0]} .*, not"):
            run("cadd", 1, *flags, *f"--{other}".split(), out="tuned")
    out = run("cadd", 1, *flags, out="tuned")
    own, weights = checkpoint(out), checkpoint(mdm)["ema"]["params"]
    assert {"fuse.weight", "fuse.bias"} == set(own["model"]) - set(weights)
    for name, value in weights.items():
        assert torch.equal(own["model"][name], value)
        assert torch.equal(own["ema"]["params"][name], value)
    with pytest.raises(RunError, match=f"{out} was made with --hint_at masked, not all"):
        run("cadd", 1, *flags, "--init_from", str(out), "--hint_at", "all", out="more")
    state = checkpoint(mdm)
    state["tokenizer"]["vocab"] = state["tokenizer"]["vocab"][::-1]
    torch.save(state, mdm / "checkpoint.pt")
    with pytest.raises(RunError, match=f"not those that {mdm} learned from"):
        run("cadd", 1, *flags, out="more")
    shutil.rmtree(mdm)
    assert checkpoint(run("cadd", 2, *flags, out="tuned"))["step"] == 2


@pytest.mark.parametrize("harm", ["cut", "transposed", "average", "half"])
def test_moments_and_averages_of_other_shapes_are_refused(run, copy_of, harm):
    """PyTorch loads them as they are: read past their end, or in another order."""
    out = copy_of("cadd")
    state = checkpoint(out)
    where = state["ema"]["params"] if harm == "average" else {
        (i, key): v for i, kept in state["optimizer"]["state"].items() for key, v in kept.items()}
    key = next(k for k, v in where.items() if v.dim() == 2 and len(set(v.shape)) == 2)
    v = where[key]
    v = {"cut": v[:1].clone(), "half": v.bfloat16()}.get(harm, v.T.contiguous())
    if harm == "average":
        where[key] = v
    else:
        state["optimizer"]["state"][key[0]][key[1]] = v
    torch.save(state, out / "checkpoint.pt")
    with pytest.raises(RunError, match="checkpoint.pt does not fit this model: its optimizer's"):
        run("cadd", 7, "--dropout", "0.2", out=str(out))


def test_a_cosine_ends_where_it_was_to_end(run, capsys):
    """More steps would raise the learning rate again, fewer would end above 0."""
    out = run("cadd", 4, "--lr_schedule", "cosine", "--save_every", "2")
    for steps in (3, 6):
        with pytest.raises(RunError, match=f"made with --steps 4, not {steps}: .*--overwrite"):
            run("cadd", steps, "--lr_schedule", "cosine")
    capsys.readouterr()
    run("cadd", 4, "--lr_schedule", "cosine")
    assert "is complete" in (printed := capsys.readouterr().out) and "--steps" not in printed
    assert sorted(curves(out)) == [2, 4]


def test_other_text_of_the_same_letters_is_refused(run, tmp_path):
    """On resuming and on evaluating; sampling does not read it, and old checkpoints do not know."""
    text, folder = "ab ba abba baab " * 20, tmp_path / "own"
    folder.mkdir()
    (folder / "valid.txt").write_text(text)

    def train(steps, text):
        (folder / "train.txt").write_text(text)
        return run("cadd", steps, "--dataset", str(folder))
    train(2, text)
    out = train(3, text)
    with pytest.raises(RunError, match="are not those that .* learned from: restore them"):
        train(4, text[::-1])
    flags = ["--out", str(out), "--device", "cpu", "--mode"]
    with pytest.raises(RunError, match="are not those that .* learned from: restore them"):
        common.main(cadd, [*flags, "eval"])
    common.main(cadd, [*flags, "sample"])
    state = checkpoint(out)
    del state["data"]
    torch.save(state, out / "checkpoint.pt")
    assert checkpoint(train(4, text[::-1]))["step"] == 4


def test_eval_scores_runs_and_samples_in_one_table(run, data_dir, capsys):
    a = run("cadd", 3, out="a", report=True)
    b = run("cadd-mdlm", 3, out="b", report=True)
    capsys.readouterr()
    metrics.main([str(a), str(b), str(a / "samples.jsonl"), "--dataset", "pydoc",
                  "--data_dir", data_dir, "--device", "cpu"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) >= 6 and "nll_joint, bits/char" in lines[0] and "entropy, nats" in lines[0]
    assert "(no bound)" in lines[2] and "mdlm" in lines[3] and lines[5].startswith("| data: pydoc")
    kept = json.loads((a / "eval-valid-pydoc.json").read_text())
    assert kept["figures"]["nll_joint"]["draws"] > 8  # the full split, not --eval_sequences


@pytest.fixture()
def scored(trained, tmp_path, data_dir, capsys):
    """scored(name, *flags) -> what eval.py prints of a copy of a run: {run: {column: cell}}."""
    def go(name, *flags):
        if not (tmp_path / name).exists():
            shutil.copytree(trained(name), tmp_path / name)
        capsys.readouterr()
        metrics.main([str(tmp_path / name), "--device", "cpu", "--data_dir", data_dir, *flags])
        lines = [[cell.strip() for cell in line.split("|")[1:-1]]
                 for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        return {line[0].rsplit("/")[-1]: dict(zip(lines[0], line)) for line in lines[2:]}
    return go


@pytest.mark.parametrize("name", [name for name in RUNS if name != "vadd-informed"])
def test_eval_gives_the_same_table_twice(scored, name, tmp_path, monkeypatch):
    """Of a run of each script; few sequences stand for the full split."""
    evaluate = script_of(name).evaluate
    monkeypatch.setattr(metrics.TokenClassifier, "steps", 5)
    monkeypatch.setattr(script_of(name), "evaluate", lambda model, cfg, data, ddp: evaluate(
        model, dataclasses.replace(cfg, eval_sequences=3), data, ddp))
    tables = [scored(name)]
    for kept in (tmp_path / name).glob("eval-*.json"):
        kept.unlink()
    tables.append(scored(name))
    for table in tables:
        assert len(table[name]) > 4
        table[name].pop("speed, sentences/s", None)
    assert tables[0] == tables[1]


def test_eval_draws_a_sweep_of_steps(scored, tmp_path):
    """As --mode sample does at each number of steps; the samples of the run stay as they are."""
    flags = ["--steps", "1,3", "--samples", "4", "--top_p", "0.5", "--split", "valid"]
    rows = scored("cadd", *flags)
    assert rows["cadd, 1 steps"]["nfe"] == "1" and rows["cadd, 3 steps"]["nfe"] == "3"
    assert rows["cadd, 3 steps"]["top_p"] == "0.5"
    assert rows["cadd, 3 steps"]["samples"].startswith("4: too few")
    assert rows["cadd, 1 steps"]["entropy, nats"] != rows["cadd, 3 steps"]["entropy, nats"]
    assert not (tmp_path / "cadd" / "samples.jsonl").exists()
    assert scored("cadd", *flags) == rows
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "cadd" / "steps.png").exists()
    common.main(cadd, ["--mode", "sample", "--out", str(tmp_path / "cadd"), "--device", "cpu",
                       "--sample_steps", "3", "--samples", "4", "--top_p", "0.5"])
    drawn, alone = ((tmp_path / "cadd" / f / "samples.jsonl").read_text() for f in ("steps-3", ""))
    assert drawn == alone
    with pytest.raises(RunError, match="draws no texts: drop --steps"):
        scored("vadd-toy", "--steps", "1")
    with pytest.raises(RunError, match="--samples says how --steps draws: give --steps too"):
        scored("cadd", "--samples", "4")


def test_eval_sweeps_translations(scored, tmp_path):
    """Difformer's K, early stopping counted in; the run's own translations stay as they are."""
    flags = ["--steps", "1,8", "--samples", "3", "--length_beam", "1", "--noise_beam", "2"]
    rows = scored("difformer", *flags)
    for T, nfe in ((1, "1"), (8, "7")):
        row = rows[f"difformer, {T} steps"]
        assert (row["samples"], row["nfe"], row["candidates"]) == ("3", nfe, "2")
        lines = (tmp_path / f"difformer/steps-{T}/translations-valid.jsonl").read_text().split("\n")
        figures = metrics.score_translations([json.loads(line) for line in lines[:-1]])
        assert row["bleu, lower case, 13a"] == f"{figures['bleu']['value']:.4f}"
    assert '"nfe": 3' in (tmp_path / "difformer/translations-valid.jsonl").read_text()
    assert scored("difformer", *flags)["difformer, 8 steps"] == rows["difformer, 8 steps"]


@pytest.mark.parametrize("name, kept", [("cadd", ["2", "6"]), ("vadd", ["2"])])
def test_eval_sweeps_K(scored, name, kept, tmp_path):
    """CADD's chains cost calls when it samples; VADD's draws of z are of its likelihood alone."""
    rows = scored(name, "--K", "1,3", "--steps", "2", "--samples", "2")
    assert [f"{name}, K = 1" in rows, f"{name}, K = 3" in rows] == [True, True]
    assert {p.name for p in (tmp_path / name).glob("eval-*")} >= {"eval-valid-K1.json",
                                                                  "eval-valid-K3.json"}
    figure = next(k for k in rows[f"{name}, K = 1"] if k.startswith(
        "nll_joint" if name == "cadd" else "nll_delbo"))
    assert rows[f"{name}, K = 1"][figure] != rows[f"{name}, K = 3"][figure]
    assert [row["nfe"] for run, row in rows.items() if run.endswith("2 steps")] == kept
    with pytest.raises(RunError, match="difformer.py: --K is for cadd.py and vadd.py"):
        scored("difformer", "--K", "3")


def test_eval_scores_a_run_on_another_set(scored, monkeypatch, tmp_path, data_dir):
    """Of the same vocabulary, with or without a train split."""
    def recipe(characters):
        texts = dict.fromkeys(("valid", "test"), "a set of other words " * 20)
        return data_module.Recipe("stream", lambda b: data_module.write_characters(
            b, texts, characters), len(characters), 16, "char")
    letters = data_module.load_dataset("pydoc", data_dir).codec.vocab
    monkeypatch.setitem(data_module.DATASETS, "other", recipe(letters))
    monkeypatch.setitem(data_module.DATASETS, "worse", recipe(letters[::-1]))
    row = scored("cadd", "--dataset", "other")["cadd"]
    assert row["data"] == "other/valid" and (tmp_path / "cadd/eval-valid-other.json").exists()
    own = scored("cadd")["cadd"]
    assert own["data"] == "pydoc/valid"
    assert own["nll_joint, bits/char"] != row["nll_joint, bits/char"]
    kept = json.loads((tmp_path / "cadd/eval-valid-other.json").read_text())
    assert kept["figures"]["nll_joint"]["draws"] == 420 // 16
    with pytest.raises(RunError, match="worse has another vocabulary than .*: choose a set with"):
        scored("cadd", "--dataset", "worse")


def test_eval_on_two_ranks_prints_and_writes_once(trained, tmp_path, data_dir, capsys):
    """More ranks than sequences, too; ranks share the numbers of steps; figures are those of one
    process, which rank 0's share is here."""
    text = "the quick brown fox jumps over a lazy dog "
    (tmp_path / "fox").mkdir()
    for split in ("train", "valid"):
        (tmp_path / "fox" / f"{split}.txt").write_text(text if split == "train" else text[:25])
    length = checkpoint(trained("cadd-mdlm"))["tokenizer"]["length"]
    assert length <= 25 < 2 * length  # one sequence
    tables, drawn = [], []
    for start in ([], ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port",
                       str(29500 + os.getpid() % 1000)]):
        run = shutil.copytree(trained("cadd-mdlm"), tmp_path / "run", dirs_exist_ok=True)
        argv = [str(run), "--device", "cpu", "--data_dir", data_dir, "--dataset",
                str(tmp_path / "fox"), "--steps", "2,3", "--samples", "2"]
        if start:
            done = subprocess.run([sys.executable, *start, str(ROOT / "eval.py"), *argv], text=True,
                                  capture_output=True, timeout=240, env=ONE_THREAD)
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            metrics.main(argv)
        tables.append([line for line in (done.stdout if start else capsys.readouterr().out
                                         ).splitlines() if line.startswith("|")])
        drawn.append([(run / f"steps-{T}" / "samples.jsonl").read_text() for T in (2, 3)])
        shutil.rmtree(run)
    assert tables[0] == tables[1] and drawn[0] == drawn[1] and len(tables[0]) == 6


# ------------------------------------------------------------------------- catdm.py alone


def test_the_teacher_follows_the_student(run, at_step):
    """It has left the start, which both share, and is not the student. Resuming keeps it: above."""
    start = {}
    at_step(0, lambda run: start.update(zip(run.ema.names, map(torch.clone, run.ema.live))))
    model = checkpoint(run("catdm", 3))["model"]
    for others in (start, {k.removeprefix("student."): v for k, v in model.items()}):
        assert any(not torch.equal(v, others[k.removeprefix("teacher.")])
                   for k, v in model.items() if k.startswith("teacher."))


# ------------------------------------------------------------------------- difformer.py alone


def test_other_training_text_is_refused_on_resume(run, tmp_path):
    sides = [tmp_path / "source", tmp_path / "target"]
    for side in sides:
        side.write_text(f"eins {side.name}\nzwei {side.name}\n" * 9)
    files = ["--dataset", "files", "--train", *map(str, sides)]
    run("difformer", 2, *files)
    run("difformer", 3, *files)
    sides[0].write_text("drei vier\n" * 18)
    with pytest.raises(RunError, match="not those that .* learned from"):
        run("difformer", 4, *files)


# ------------------------------------------------------------------------- GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", RUNS)
def test_compiled_bf16_training_on_the_gpu(run, name):
    flags = ["--device", "cuda", "--lr", "1e-3"]
    a = run(name, 10, *flags, out="a")
    b = run(name, 10, *flags, "--no-compile", "--amp", "none", out="b")
    keys = ("bound_nats", "nll_discrete_nats", "delbo_nats", "loss", "mse")
    one, two = ([[v for k, v in r.items() if k in keys] for r in curves(out).values()]
                for out in (a, b))
    assert np.allclose(one, two, rtol=0.03)  # bf16 keeps 8 bits


PAGES = ["README.md", *sorted(f"results/{path.name}" for path in (ROOT / "results").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_each_command_of_the_pages_is_one_that_the_parsers_take(page, tmp_path, monkeypatch):
    """Flags and values are checked; what is missing here, runs and files, is what stops them."""
    monkeypatch.chdir(tmp_path)
    for folder in ("my/pictures", "my/code", "data/nltk-gpt2"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(metrics, "Judge", lambda *_: None)  # would fetch GPT-2
    command = r"(?:python |torchrun [^`\n]*|`)(cadd|vadd|catdm|difformer|eval)\.py([^`#\n]*)"
    found = re.findall(command, (ROOT / page).read_text(encoding="utf-8"))
    assert found
    for name, rest in found:
        try:
            metrics.main(shlex.split(rest)) if name == "eval" and rest else common.parse_config(
                importlib.import_module(name if name != "eval" else "cadd"), shlex.split(rest))
        except SystemExit:
            pytest.fail(f"{page}: {name}.py{rest}")
        except (RunError, data_module.DataError) as error:
            assert re.search("checkpoint|does not exist|no run", str(error)), (name, rest, error)
