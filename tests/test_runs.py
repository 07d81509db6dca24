"""Whole runs: training, resuming, ranks, interruption, sampling, scoring and what goes wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cadd
import common
import eval as catdiff_eval
from common import RunError
from conftest import interrupt, log_of, torchrun

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--device", "cpu", "--dim", "16", "--heads", "2", "--depth", "1", "--length", "16",
        "--batch_size", "8", "--micro_batch", "8", "--lr", "1e-2", "--lr_schedule", "constant",
        "--warmup", "2", "--log_every", "2", "--save_every", "3", "--samples", "2",
        "--sample_steps", "4", "--eval_sequences", "8", "--eval_draws", "1"]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture()
def run(tmp_path, data_dir):
    """run(steps, *flags, out="a") -> the run folder."""
    def go(steps, *flags, out="a"):
        folder = tmp_path / out
        cadd.main([*TINY, "--data_dir", data_dir, "--out", str(folder), "--steps", str(steps),
                   *flags])
        return folder
    return go


def losses(folder):
    lines = log_of(folder)
    return {r["step"]: r["bound_nats"] for r in lines if "bound_nats" in r}


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


# ------------------------------------------------------------------------- training


def test_a_run_leaves_everything_it_should(run, capsys):
    out = run(8)
    printed = capsys.readouterr().out
    for word in ("nll_prior", "nll_joint", "nll_discrete", "unigram", "bigram", "--- sample", "±"):
        assert word in printed
    result = json.loads((out / "result.json").read_text())
    assert result["step"] == 8 and result["config"]["dim"] == 16 and result["torch"]
    for figure in result["figures"].values():
        assert figure["unit"] == "bits/char" and figure["stderr"] > 0 and figure["draws"] == 8
    assert not result["figures"]["nll_discrete"]["is_bound"]
    first = json.loads((out / "log.jsonl").read_text().splitlines()[0])["start"]
    assert {"argv", "config", "commit", "torch", "hardware"} <= set(first)
    assert len((out / "samples.jsonl").read_text().splitlines()) == 2
    assert sorted(losses(out)) == [2, 4, 6, 8]


def test_training_learns(run):
    curve = list(losses(run(80, "--hint", "none")).values())
    assert sum(curve[-5:]) / 5 < sum(curve[:2]) / 2 - 0.15  # 80 tokens a step: noisy


def test_same_command_again_says_complete_and_more_steps_continue(run, capsys):
    out = run(4)
    before = (out / "checkpoint.pt").stat().st_mtime_ns
    capsys.readouterr()
    run(4)
    printed = capsys.readouterr().out
    assert "is complete: 4 steps" in printed and "--steps" in printed and "--overwrite" in printed
    assert (out / "checkpoint.pt").stat().st_mtime_ns == before
    run(6)
    assert sorted(losses(out)) == [2, 4, 6]
    run(2, "--overwrite")
    assert sorted(losses(out)) == [2]


@pytest.mark.parametrize("flags", [[], ["--hint", "none", "--dropout", "0.2"]])
def test_resume_is_exact_to_the_bit(run, flags):
    """6 + 6 steps equal 12: weights, EMA, optimizer and loss curve, dropout included."""
    run(6, *flags, out="a")
    a, b = run(12, *flags, out="a"), run(12, *flags, out="b")
    assert losses(a) == losses(b)
    one, two = weights(a), weights(b)
    for get in (lambda w: w["model"], lambda w: w["ema"]["params"]):
        assert all(torch.equal(x, y) for x, y in zip(get(one).values(), get(two).values()))
    states = [w["optimizer"]["state"] for w in (one, two)]
    assert all(torch.equal(states[0][i]["exp_avg"], states[1][i]["exp_avg"]) for i in states[0])


def test_micro_batches_change_nothing(run):
    a, b = run(6, out="a"), run(6, "--micro_batch", "3", out="b")
    assert losses(a) == pytest.approx(losses(b), rel=1e-4)  # float32 sums in another order


def test_two_ranks_equal_one_and_a_run_moves_between_them(run, tmp_path, data_dir):
    """The same loss curve to float tolerance; then two ranks resume what one rank began."""
    one = run(6, out="one")
    common_flags = [*TINY, "--data_dir", data_dir]
    done = torchrun(2, "cadd.py", *common_flags, "--out", str(tmp_path / "two"), "--steps", "6")
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-4)
    figures = [json.loads((p / "result.json").read_text())["figures"]["nll_prior"]
               for p in (one, tmp_path / "two")]
    assert figures[0]["draws"] == figures[1]["draws"]
    done = torchrun(2, "cadd.py", *common_flags, "--out", str(one), "--steps", "10")
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(one) == pytest.approx(losses(run(10, out="three")), rel=1e-4)


def test_ctrl_c_saves_and_the_same_command_resumes(tmp_path, data_dir):
    out = tmp_path / "a"
    flags = [*TINY, "--data_dir", data_dir, "--save_every", "100000"]
    code, printed, errors = interrupt("cadd.py", out, *flags, "--steps", "100000")
    assert code == 130 and "the same command resumes" in printed, errors[-2000:]
    step = weights(out)["step"]
    assert step >= 6 and not (out / "result.json").exists()
    cadd.main([*flags, "--out", str(out), "--steps", str(step + 1)])
    assert weights(out)["step"] == step + 1


def test_time_budget_ends_training_and_is_kept_over_resumes(run):
    out = run(10**6, "--minutes", "0.02", "--log_every", "1000000")
    first = weights(out)
    assert 1.2 <= first["seconds"] < 10 and (out / "result.json").exists()
    run(10**6, "--minutes", "0.02")
    assert weights(out)["step"] == first["step"]


# ------------------------------------------------------------------------- sampling and scoring


def test_sample_needs_the_checkpoint_alone(run, tmp_path, capsys):
    out = run(3)
    capsys.readouterr()
    flags = ["--mode", "sample", "--out", str(out), "--device", "cpu", "--data_dir",
             str(tmp_path / "nothing here"), "--samples", "3"]
    cadd.main(flags)
    first = capsys.readouterr().out
    assert first.count("--- sample") == 3 and not (tmp_path / "nothing here").exists()
    cadd.main(flags)
    assert capsys.readouterr().out == first  # a fixed seed
    cadd.main([*flags, "--seed", "0", "--prompt", "the ___ of", "--watch"])
    printed = capsys.readouterr().out
    texts = [json.loads(line)["text"] for line in (out / "samples.jsonl").read_text().splitlines()]
    assert all(t.startswith("the ") and t.endswith(" of") and len(t) == 10 for t in texts)
    assert "the ···" in printed  # --watch shows the gaps


def test_fine_tuning_starts_from_the_mdm(run, tmp_path):
    mdm = run(4, "--hint", "none", out="mdm")
    place = common.setup(cadd.Config(device="cpu"))
    flags = ["--init_from", str(mdm), "--hint_at", "masked", "--fuse", "concat", "--steps", "1"]
    cfg, _ = common.parse_config(cadd.Config, "cadd", "", cadd.PRESETS, [*TINY, *flags])
    model, *_ = cadd.build(cfg, 27, place)
    for name, value in weights(mdm)["ema"]["params"].items():
        assert torch.equal(model.state_dict()[name], value)


def test_eval_scores_runs_and_samples_in_one_table(run, data_dir, capsys):
    a, b = run(3, out="a"), run(3, "--hint", "none", out="b")
    capsys.readouterr()
    catdiff_eval.main([str(a), str(b), str(a / "samples.jsonl"), "--dataset", "pydoc",
                       "--data_dir", data_dir, "--device", "cpu"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) >= 6 and "nll_joint, bits/char" in lines[0] and "entropy, nats" in lines[0]
    assert "(no bound)" in lines[2] and "mdlm" in lines[3] and lines[5].startswith("| data: pydoc")
    kept = json.loads((a / "eval-valid.json").read_text())
    assert kept["figures"]["nll_prior"]["draws"] > 8  # the full split, not --eval_sequences


def test_sample_metrics_by_hand():
    assert catdiff_eval.entropy([[1, 1, 2, 2], [3, 3, 3, 3]]) == pytest.approx(0.5 * 0.693147, 1e-4)
    words = {"the", "cat"}
    assert catdiff_eval.spelled(["e the cat xq th", "b the c"], words) == pytest.approx(3 / 4)
    assert catdiff_eval.spelled(["the cat"], words) is None
    texts = ["x\n    a = 1\n    b = 2\nif", "x\na = = 1\nif", "no lines"]
    assert catdiff_eval.parses(texts) == 1 / 3


def test_eval_errors(tmp_path):
    for argv, message in [([str(tmp_path / "none")], "does not exist"),
                          ([str(tmp_path)], "not a run folder")]:
        with pytest.raises(RunError, match=message):
            catdiff_eval.main(argv)
    file = tmp_path / "samples.jsonl"
    file.write_text("{broken\n")
    with pytest.raises(RunError, match="say --dataset"):
        catdiff_eval.main([str(file)])
    with pytest.raises(RunError, match="cannot read samples"):
        catdiff_eval.main([str(file), "--dataset", "pydoc"])


# ------------------------------------------------------------------------- what goes wrong


def test_a_run_is_not_continued_with_other_settings(run):
    run(3)
    with pytest.raises(RunError, match="--lr 0.01, not 0.02"):
        run(6, "--lr", "0.02")
    with pytest.raises(RunError, match="--dim 16, not 32"):
        run(6, "--mode", "sample", "--dim", "32")


def test_nan_loss_stops_and_leaves_the_last_checkpoint(run, monkeypatch):
    out = run(4)
    good, load = weights(out), cadd.load_noise

    def poisoned(cfg, data, step, index, place):
        x0, t, u, eps, valid = load(cfg, data, step, index, place)
        return x0, t, u, eps * (float("nan") if step >= 6 else 1.0), valid
    monkeypatch.setattr(cadd, "load_noise", poisoned)
    with pytest.raises(RunError, match="the loss is nan between steps 6 and 8.*good state"):
        run(12)
    kept = weights(out)
    assert good["step"] < kept["step"] <= 6  # saved at step 6, before the poison
    assert all(torch.isfinite(v).all() for v in kept["model"].values())


def test_checkpoints_that_cannot_be_used(run, tmp_path):
    out = run(3)
    path = out / "checkpoint.pt"
    state = weights(out)
    torch.save({**state, "method": "vadd"}, path)
    with pytest.raises(RunError, match="a checkpoint of vadd.py"):
        run(6)
    path.write_bytes(b"PK" + bytes(100))
    with pytest.raises(RunError, match="truncated or not a checkpoint"):
        run(6)
    with pytest.raises(RunError, match="train first"):
        run(6, "--mode", "sample", out="missing")


def test_newcomer_mistakes_are_one_line_and_a_bad_exit_code(tmp_path):
    def cli(*flags):
        return subprocess.run([sys.executable, str(ROOT / "cadd.py"), *flags], text=True,
                              capture_output=True, timeout=120, cwd=tmp_path)
    unknown = cli("--dataset", "texxt8")
    assert unknown.returncode == 1 and unknown.stderr.count("\n") == 1
    assert "choose one of" in unknown.stderr
    (tmp_path / "folder").mkdir()
    empty = cli("--dataset", "folder")
    assert empty.returncode == 1 and "Traceback" not in empty.stderr and "train" in empty.stderr
    wrong = cli("--stepz", "3")
    assert wrong.returncode == 2 and "--stepz" in wrong.stderr
    if not torch.cuda.is_available():
        gpu = cli("--device", "cuda")
        assert gpu.returncode == 1 and "--device cpu" in gpu.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("hint", ["fm", "none"])
def test_compiled_bf16_training_on_the_gpu(tmp_path, data_dir, hint):
    flags = [*TINY[2:], "--device", "cuda", "--data_dir", data_dir, "--hint", hint, "--lr", "1e-3"]
    curves = []
    for name, extra in [("a", []), ("b", ["--no-compile", "--amp", "none"])]:
        cadd.main([*flags, *extra, "--out", str(tmp_path / name), "--steps", "10"])
        curves.append(losses(tmp_path / name))
    assert curves[0] == pytest.approx(curves[1], rel=0.02)  # bf16 keeps 8 bits
