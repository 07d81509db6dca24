"""results/rerun.py: the queue of GPU runs, and results/gpt2_text.py, which it asks for."""

import argparse
import importlib
import json
import re
import shlex
import zipfile
from types import SimpleNamespace

import gpt2_text
import numpy as np
import pytest
import rerun
from conftest import ROOT

import common
import data as data_module
from common import RunError

FOLDERS = dict(data="data", runs="runs", results="results", photos="photos", steps="10")


def queue(tmp_path, names, gpus=2, **more):
    args = argparse.Namespace(runs=tmp_path, data_dir=tmp_path, results=tmp_path, photos=tmp_path,
                              steps=10, gpus=gpus, pause=0.02, **more)
    rerun.main(args, names)


def test_each_job_is_one_that_the_parsers_take(tmp_path, monkeypatch):
    """Scripts exist, needs are jobs, and flags of trainings and their values are checked."""
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "data/nltk-gpt2"):
        (tmp_path / folder).mkdir(parents=True)
    parsed = 0
    for name, job in rerun.JOBS.items():
        assert set(job.needs) <= set(rerun.JOBS) - {name} and 0 < job.share <= 1
        for part in job.commands.format(**FOLDERS).split(";"):
            script, *flags = shlex.split(part)
            if script == "results/kernels.py":  # takes a script and its flags
                script, *flags = (x for x in flags if x != "--host")
            text = (ROOT / script).read_text()
            if "eval" in flags:  # they are those of the run
                continue
            if "PRESETS" in text:
                module = importlib.import_module(script.removeprefix("results/")[:-3])
                assert common.parse_config(module, flags).dataset in flags
                parsed += 1
            else:
                for flag in (x for x in flags if x.startswith("--") and " " not in x):
                    assert re.search(rf'"{flag}"|"--{{f', text) or flag in text, (name, flag)
    assert parsed > 30


def test_jobs_wait_for_what_they_need_and_share_gpus(tmp_path, monkeypatch):
    """Two halves share a GPU, a whole one waits for both, `last` for its need; a failure stops
    what needs it alone; the same queue again makes what failed, and nothing else."""
    script = tmp_path / "job.py"
    script.write_text(
        "import json, os, sys, time\n"
        f"log = open({str(tmp_path / 'log')!r}, 'a')\n"
        "def say(what):\n    log.write(json.dumps([what, sys.argv[1], "
        "os.environ['CUDA_VISIBLE_DEVICES']]) + '\\n'); log.flush()\n"
        "say('begin'); time.sleep(0.2); say('end')\n"
        f"sys.exit(sys.argv[1] == 'bad' and not os.path.exists({str(tmp_path / 'mended')!r}))\n")
    monkeypatch.setattr(rerun, "ROOT", tmp_path)
    jobs = {"half": ((), 0.5), "other": ((), 0.5), "whole": ((), 1.0), "last": (("half",), 1.0),
            "bad": ((), 0.5), "lost": (("bad",), 1.0)}
    monkeypatch.setattr(rerun, "JOBS", {name: rerun.Job("g", 1, f"job.py {name}", *more)
                                        for name, more in jobs.items()})
    with pytest.raises(RunError, match="bad, lost"):
        queue(tmp_path, list(jobs), gpus=1)
    told = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {x[2] for x in told} == {"0"} and "lost" not in {x[1] for x in told}
    order = [tuple(x[:2]) for x in told]
    at = {x: i for i, x in enumerate(order)}
    assert max(at["begin", "half"], at["begin", "other"]) < min(at["end", "half"],
                                                                at["end", "other"])
    for name in ("whole", "last"):  # alone on the GPU
        assert at["end", name] == at["begin", name] + 1
    assert at["begin", "last"] > at["end", "half"]
    state = json.loads((tmp_path / "rerun/state.json").read_text())
    assert {name: x["code"] for name, x in state.items()} == {
        "half": 0, "other": 0, "whole": 0, "last": 0, "bad": 1}
    (tmp_path / "mended").touch()
    queue(tmp_path, list(jobs), gpus=2)
    again = (tmp_path / "log").read_text().splitlines()[len(told):]
    assert [json.loads(line)[:2] for line in again] == [
        ["begin", "bad"], ["end", "bad"], ["begin", "lost"], ["end", "lost"]]


def test_a_job_ends_with_its_first_failing_command(tmp_path, monkeypatch):
    """And what a job needs must be among the jobs asked for, or done."""
    (tmp_path / "a.py").write_text("import sys\nprint('said', sys.argv[1:])\nsys.exit(3)")
    monkeypatch.setattr(rerun, "ROOT", tmp_path)
    monkeypatch.setattr(rerun, "JOBS", {
        "a": rerun.Job("g", 1, "a.py {data} {steps}; a.py 2"),
        "b": rerun.Job("g", 1, "a.py", ("c",)),
        "c": rerun.Job("g", 1, "a.py")})
    with pytest.raises(RunError, match="a, b"):
        queue(tmp_path, ["a", "b"])
    assert (tmp_path / "rerun/a.txt").read_text() == f"said ['{tmp_path}', '10']\n"
    assert not (tmp_path / "rerun/b.txt").exists()


def test_nltk_text_in_gpt2s_tokens(tmp_path, monkeypatch):
    """Documents keep capitals and lines, lose tags, end with the end token; short ones and READMEs
    go; the folder is one that load_dataset takes."""
    (tmp_path / "nltk").mkdir()
    text = "The Dog said\n\n<b>no</b>  to 42 Cats. " * 8
    for name, file in (("abc", "abc/a.txt"), ("pil", "pil/x.sgml")):
        with zipfile.ZipFile(tmp_path / f"nltk/{name}.zip", "w") as archive:
            for path, content in ((file, text), (f"{name}/README", text), (file + "2", "short")):
                archive.writestr(path, content)
    monkeypatch.setattr(data_module, "ENGLISH27_ARCHIVES", ["abc", "pil"])
    coder = SimpleNamespace(encode_ordinary=lambda x: list(x.encode()), eot_token=256, n_vocab=257)
    monkeypatch.setattr(gpt2_text.tiktoken, "get_encoding", lambda name: coder)
    gpt2_text.main(argparse.Namespace(data_dir=tmp_path, out=None))
    made = data_module.load_dataset(str(tmp_path / "nltk-gpt2"), tmp_path, 16)
    assert (made.vocab_size, made.eos_id) == (257, 256)
    ids = np.concatenate([made.splits[split] for split in ("train", "valid", "test")])
    documents = bytes(min(i, 255) for i in ids).split(b"\xff")
    kept = b"The Dog said\n\n<b>no</b> to 42 Cats."
    want = {b" ".join([x] * 8) for x in (kept, kept.replace(b"<b>no</b>", b" no"))}
    assert set(documents) == want | {b""}
    assert len(made.splits["valid"]) == len(ids) * 95 // 100 - len(ids) * 90 // 100
