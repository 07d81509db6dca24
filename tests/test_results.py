"""Scripts of results/ that run others, whose commands are stubbed: nothing is trained."""

import argparse
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import common
import difformer_multi30k
import kernels
import pixels
import scaling
import temperatures

# ------------------------------------------------------------------------- results/scaling.py


@pytest.mark.parametrize("intervals, want", [
    ([], 0), ([(2, 5)], 3), ([(2, 5), (5, 6)], 4), ([(0, 10), (2, 3), (4, 5)], 10),
    ([(4, 6), (0, 1), (5, 9), (0.5, 2)], 7), ([(1, 4), (1, 2), (6, 7), (6, 6.5)], 4)])
def test_length_is_of_the_union(intervals, want):
    """What overlaps, touches or lies within another counts once; any order."""
    assert scaling.length(intervals) == want


def test_unions_equal_brute_force():
    """On a grid of cells, of which each interval covers some."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        begin, size = rng.integers(0, 30, 8), rng.integers(1, 9, 8)
        cells = np.zeros(41, int)
        for b, n in zip(begin, size):
            cells[b:b + n] = 1
        edges = np.diff(cells, prepend=0)
        intervals = list(zip(begin.tolist(), (begin + size).tolist()))
        assert scaling.length(intervals) == cells.sum()
        begins, ends = scaling.busy(intervals)
        assert begins.tolist() == np.flatnonzero(edges == 1).tolist()
        assert ends.tolist() == np.flatnonzero(edges == -1).tolist()


def test_rows_are_kept_at_once_replaced_by_command_and_compared_with_one_gpu(tmp_path, monkeypatch):
    """Efficiency is speed per GPU over one GPU's, weak and strong apart. Two GPUs that fail leave
    what is measured; two measured before one have theirs as soon as one is measured."""
    file, speed, asked = tmp_path / "scaling.json", {}, []

    def bench(script, gpus, flags):
        batch = int(flags[flags.index("--batch_size") + 1])
        asked.append((script, gpus, batch, flags[-len(scaling.TINY):] == scaling.TINY))
        if (gpus, batch) not in speed:
            raise common.RunError("no memory")
        return dict(command=f"{script} {gpus} {batch}", gpus=gpus, method=script[:-3],
                    tokens_per_s=speed[gpus, batch])

    def table(*gpus):
        scaling.table(argparse.Namespace(scripts=["cadd.py"], gpus=gpus, out=file, tiny=True,
                                         device="cpu"))
        return [(x["scaling"], x["command"], x["tokens_per_s"], x.get("efficiency"))
                for x in json.loads(file.read_text())]

    monkeypatch.setattr(scaling, "bench", bench)
    speed[2, 4] = 150
    with pytest.raises(common.RunError, match="no memory"):
        table(2)
    assert [x["tokens_per_s"] for x in json.loads(file.read_text())] == [150]
    speed[2, 8], speed[1, 2], speed[1, 8] = 300, 100, 200
    weak, strong = (("weak", "cadd.py 2 4", 150, 0.75), ("strong", "cadd.py 2 8", 300, 0.75))
    assert table(2) == [(*x[:3], None) for x in (weak, strong)]
    assert table(1) == [weak, strong, ("weak", "cadd.py 1 2", 100, 1),
                        ("strong", "cadd.py 1 8", 200, 1)]
    speed[2, 8] = 360
    assert table(2) == [("weak", "cadd.py 1 2", 100, 1), ("strong", "cadd.py 1 8", 200, 1),
                        weak, ("strong", "cadd.py 2 8", 360, 0.9)]
    speed[4, 8] = 400  # one batch is both kinds' here
    assert table(4)[4:] == [("weak", "cadd.py 4 8", 400, 1), ("strong", "cadd.py 4 8", 400, 0.5)]
    assert asked == [("cadd.py", g, b, True) for g, b in [
        (2, 4), (2, 8), (2, 4), (2, 8), (1, 2), (1, 8), (2, 4), (2, 8), (4, 8), (4, 8)]]


def test_bench_reads_the_line_or_shows_what_went_wrong(tmp_path, monkeypatch):
    """The command that is kept has one process, or torchrun's."""
    for gpus, how in [(1, "python"), (2, "torchrun --nproc_per_node 2")]:
        said, seen = ["resuming", '{"tokens_per_s": 7}', ""], []
        monkeypatch.setattr(scaling.subprocess, "run", lambda command, **_: seen.append(
            command) or argparse.Namespace(stdout="\n".join(said), stderr="no GPU", returncode=0))
        assert scaling.bench("vadd.py", gpus, ["--x", "1"]) == dict(
            command=f"{how} vadd.py --dataset owt --mode bench --x 1", gpus=gpus, tokens_per_s=7)
        assert ("torch.distributed.run" in seen[0]) == (gpus == 2)
        assert seen[0][-7:] == [str(scaling.ROOT / "vadd.py"), "--dataset", "owt", "--mode",
                                "bench", "--x", "1"]
        said.clear()
        with pytest.raises(common.RunError, match="no GPU"):
            scaling.bench("vadd.py", gpus, [])


# ------------------------------------------------------------------------- results/pixels.py


@pytest.fixture()
def pixel_runs(tmp_path, monkeypatch):
    """pixel_runs(FLAGS) -> the commands that results/pixels.py gives, each [script, flags]; they
    leave what it reads of them."""
    def go(*flags):
        commands = []

        def python(script, *words):
            words = [str(word) for word in words]
            commands.append([script, *words])
            value = dict(zip(words, words[1:]))
            out = tmp_path / value["--out"]
            out.mkdir(parents=True, exist_ok=True)
            (out / "result.json").write_text(json.dumps(dict(
                config={}, figures={}, step=10, commit="a", hardware="b", train_seconds=1)))
            (out / "log.jsonl").write_text("")
            (out / "images.json").write_text("{}")
            Image.new("RGB", (4, 2), (len(commands), 0, 0)).save(out / "images.png")
        monkeypatch.setattr(pixels, "python", python)
        monkeypatch.setattr(sys, "argv", ["pixels.py", *flags, "--runs", str(tmp_path / "runs"),
                                          "--results", str(tmp_path / "results")])
        pixels.main()
        return commands
    return go


def test_one_method_alone_is_trained_and_graded_once(pixel_runs, tmp_path):
    """--only: no table, as others may still train. The same command trains on, where it stopped,
    and does not grade again, nor does it without --only."""
    out = tmp_path / "runs/pixels-mnist-vadd-20000-seed-0"
    train, grade = pixel_runs("mnist", "--only", "vadd")
    assert train[:3] == ["vadd.py", "--dataset", "mnist-binary"] and "--mode" not in train
    assert train[train.index("--out") + 1] == str(out) and (
        train[train.index("--kl_ramp") + 1] == "10000")
    assert grade[:3] == ["eval.py", "images", str(out)] and "1000" in grade
    assert grade[grade.index("--out") + 1] == str(out / "plain")
    assert not (tmp_path / "results").exists()
    assert pixel_runs("mnist", "--only", "vadd") == [train]
    graded = [x[2].split("/")[-1].split("-20000")[0] for x in pixel_runs("mnist")
              if x[0] == "eval.py"]
    assert graded == ["pixels-mnist-mdlm", "pixels-mnist-cadd"]
    found = json.loads((tmp_path / "results/pixels-mnist.json").read_text())
    assert list(found) == [f"{name}, seed 0" for name in pixels.MNIST]
    assert list(found["vadd, seed 0"]["grades"]) == ["plain"]


def test_on_a_folder_each_sampler_is_graded_and_pictures_stand_below_each_other(
        pixel_runs, tmp_path):
    """The picture is of the first seed, one group for each method."""
    commands = pixel_runs("folder", "--dataset", "x", "--seeds", "0,1")
    graded = [x for x in commands if x[0] == "eval.py"]
    assert len(graded) == 2 * 2 * len(pixels.SAMPLERS)
    cool = next(x for x in graded if x[x.index("--out") + 1].endswith("cadd-20000-seed-0/cool-1"))
    assert "--cool" in cool and cool[cool.index("--temperature") + 1] == "1"
    assert "--corrector" not in cool
    found = json.loads((tmp_path / "results/pixels-folder.json").read_text())
    assert list(found) == ["mdlm, seed 0", "cadd, seed 0", "mdlm, seed 1", "cadd, seed 1"]
    assert list(found["cadd, seed 1"]["grades"]) == list(pixels.SAMPLERS)
    picture = np.asarray(Image.open(tmp_path / "results/pixels-folder.png"))[:, :, 0]
    at = [1 + commands.index(next(x for x in graded if x[2].endswith(f"{name}-20000-seed-0")))
          for name in ("mdlm", "cadd")]
    assert picture.tolist() == [4 * [at[0]]] * 2 + [4 * [at[1]]] * 2


def test_a_name_that_is_no_method_is_refused(pixel_runs, capsys):
    for flags in (["mnist", "--only", "mdml"], ["folder", "--dataset", "x", "--only", "vadd"]):
        with pytest.raises(SystemExit) as error:
            pixel_runs(*flags)
        assert error.value.code == 2 and "mdlm" in capsys.readouterr().err


# ------------------------------------------------------------------------- results/kernels.py


def test_rows_are_the_longest_first():
    events = [SimpleNamespace(key=key, count=2, took=took) for key, took in (
        ("short", 10), ("long", 3000), ("middle", 500))]
    assert kernels.rows(events, "took", 2) == ["       3.0 ms       2 x long",
                                               "       0.5 ms       2 x middle"]


def test_the_host_is_profiled_where_there_is_no_gpu(monkeypatch, capsys):
    """The script gets its flags twice; operations of the timed steps alone are counted."""
    asked, ddp = [], common.DDP(0, 1, torch.device("cpu"), False)

    def main(script, flags):
        asked.append((script.__name__, flags))
        for steps in (5, 3):
            for _ in range(steps):
                torch.ones(3, 3) @ torch.ones(3, 3)
            ddp.sync()

    monkeypatch.setattr(kernels.common, "main", main)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernels.main("cadd.py", ["--dim", "8"], 7, 99, False)
    assert asked == [("cadd", ["--dim", "8", "--mode", "bench", "--bench_steps", "7"])] * 2
    begin, *rows = capsys.readouterr().out.splitlines()
    assert begin == "the host:" and any("      3 x aten::mm" in row for row in rows)
    assert common.DDP.sync.__name__ == "sync"


# ------------------------------------------------- results/difformer_multi30k.py, temperatures.py


@pytest.fixture
def translations(tmp_path, monkeypatch):
    """Runs difformer_multi30k.py with the flags given -> the commands, whose BLEU on valid is
    best at 5 x 2, on test at 1 x 1."""
    best = {"valid": ("5", "2"), "test": ("1", "1")}

    def go(*flags):
        commands = []

        def call(command, log):
            commands.append(command)
            told = dict(zip(command, command[1:]))
            beam = told.get("--length_beam"), told.get("--noise_beam")
            split = told.get("--split", "valid")
            if split == "test":
                made = Path(told["--out"], "translations-test.jsonl")
                made.write_text(" x ".join(map(str, beam)))
            figures = {name: dict(value=float(beam == best[split])) for name in (
                "bleu", "anisotropy")}
            common.write_json(Path(told.get("--save", f"{told['--out']}/result.json")),
                              dict(step=3, figures=figures))

        monkeypatch.setattr(difformer_multi30k, "call", call)
        monkeypatch.setattr(sys, "argv", ["x", *flags, "--runs", str(tmp_path / "runs"), "--out",
                                          str(tmp_path)])
        difformer_multi30k.main()
        return commands
    return go


def test_candidates_are_chosen_on_valid(translations, tmp_path):
    """All settings on valid come first; the first on test is valid's best, whose translations are
    kept. What was scored is not scored again."""
    commands = translations("train", "beams", "--only", "main")
    asked = [(told["--split"], told["--length_beam"], told["--noise_beam"]) for told in (
        dict(zip(x, x[1:])) for x in commands) if "--length_beam" in told]
    assert [x[0] for x in asked] == ["valid"] * 9 + ["test"] * 9 and len(set(asked)) == 18
    assert asked[9] == ("test", "5", "2")
    assert (tmp_path / "runs/main/chosen-test.jsonl").read_text() == "5 x 2"
    table = json.loads((tmp_path / "difformer-multi30k.json").read_text())
    assert list(table) == ["main"] and len(table["main"]["valid_beams"]) == 9
    assert table["main"]["valid_beams"]["beams-5-2"]["bleu"]["value"] == 1
    assert table["main"]["test"]["beams-5-2"]["bleu"]["value"] == 0
    assert translations("train", "beams", "--only", "main") == []


def test_distilled_targets_go_to_one_run_alone(translations, tmp_path, capsys):
    """Which is made when it is asked for; then both runs' candidates are chosen."""
    assert sum("--mode" not in x for x in translations("train", "beams")) == 5
    (tmp_path / "runs/main/result.json").unlink()
    commands = translations("train", "beams", "--distilled", "file.txt")
    trained = [dict(zip(x, x[1:])) for x in commands if "--mode" not in x]
    assert {Path(x["--out"]).name: x.get("--distilled") for x in trained} == {
        "main": None, "distilled": "file.txt"} and len(commands) == 2 + 1 + 18
    with pytest.raises(SystemExit) as error:
        translations("train", "--only", "distilled")
    assert error.value.code == 2 and "--distilled FILE" in capsys.readouterr().err


def test_points_of_a_run_are_drawn_once_and_judged(tmp_path, monkeypatch):
    """[temperature, words, entropy, perplexity], by temperature; flags of a run reach the sampler;
    what is there is not drawn again."""
    (tmp_path / "result.json").write_text('{"dataset": "pydoc"}')
    drawn = []

    def draw_sweep(out, steps, flags):
        drawn.append((list(steps), flags))
        for T in steps:
            text = "a the a" if flags[-1] == "0.5" else "a xqz a"
            common.write_jsonl(tmp_path / f"{T}.jsonl", [dict(text=text, ids=[0, 1])])
        return {T: tmp_path / f"{T}.jsonl" for T in steps}

    class Judge:
        def perplexities(self, texts, batch):
            return float(len(texts) + (texts == ["a the a"])), None

    monkeypatch.setattr(temperatures.metrics, "draw_sweep", draw_sweep)
    monkeypatch.setattr(temperatures.metrics, "words", lambda data: {"the"})
    monkeypatch.setattr(temperatures, "load_dataset", lambda *_: None)
    known, run = {}, f"{tmp_path} --z0_hat hard"
    made = temperatures.points(run, [2, 4], [1.0, 0.5], ["--samples", "1"], known, "d", Judge())
    assert list(made) == [1.0, 0.5]
    even = pytest.approx(np.log(2))
    assert known[f"{run}, 2 steps"] == [[0.5, 1, even, 2.0], [1.0, 0, even, 1.0]]
    assert [x[0] for x in drawn] == [[2, 4]] * 2 and drawn[0][1][:4] == [
        "--z0_hat", "hard", "--samples", "1"]
    list(temperatures.points(run, [2, 8], [0.5], [], known, "d", None))
    assert [x[0] for x in drawn[2:]] == [[8]] and known[f"{run}, 8 steps"] == [[0.5, 1, even]]


def test_temperatures_are_kept_one_by_one_and_mistakes_are_told(tmp_path, monkeypatch, capsys):
    def points(run, steps, drawn, flags, known, *_):
        known[f"{run}, 2 steps"] = [[drawn[0], 0.5, 2.8]]
        yield drawn[0]
        raise KeyboardInterrupt
    monkeypatch.setattr(temperatures, "points", points)
    run = lambda *runs: common.run_main(temperatures.main, argparse.Namespace(  # noqa: E731
        runs=[*runs], steps=[2], temperatures=[1.0, 0.5], out=tmp_path / "new/x", judge="",
        data_dir="d"), [])
    for runs, told in (((), "nothing is drawn yet"), (["typo"], "typo is not a run folder")):
        with pytest.raises(SystemExit):
            run(*runs)
        assert told in capsys.readouterr().err
    monkeypatch.setattr(temperatures.metrics, "script_of", lambda out: None)
    with pytest.raises(SystemExit):
        run("a --K 2")
    kept = json.loads((tmp_path / "new/x.json").read_text())
    assert kept == {"points": {"a --K 2, 2 steps": [[1.0, 0.5, 2.8]]}}


def test_temperatures_without_matplotlib(tmp_path, monkeypatch, capsys):
    """The points are kept, and what is missing is named, without an error."""
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"points": {"a, 2 steps": [[1.0, 0.5, 2.8]]}}))
    monkeypatch.setattr(temperatures.metrics.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["temperatures.py", "--out", str(tmp_path / "x")])
    runpy.run_path(str(ROOT / "results/temperatures.py"), run_name="__main__")
    told = capsys.readouterr()
    assert str(file) in told.out and "pip install matplotlib" in told.err
    assert not file.with_suffix(".png").exists()
