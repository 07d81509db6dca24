"""results/ar_baseline.py: exact likelihoods, causality, sampling and beam search by enumeration."""

import dataclasses
import itertools
import json
import math

import ar_baseline
import common
import eval as metrics
import pytest
import torch
import torch.nn.functional as F
from conftest import log_of
from data import BOS, EOS, PAD, load_pairs

TINY = dict(dim=16, depth=2, heads=2, dropout=0.0)
NETWORK = ["--dim", "16", "--depth", "1", "--heads", "2"]


@dataclasses.dataclass
class World:
    """What a model asks of its data."""

    vocab_size: int
    pad_id: int | None = None


def model_of(dataset, V, pad_id=None, **flags):
    """A tiny network with random weights everywhere, the zeros of its initialisation included."""
    torch.manual_seed(0)
    cfg = ar_baseline.Config(dataset=dataset, **(TINY | flags))
    model = ar_baseline.build(cfg, World(V, pad_id)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return model


def text_model(V=3, L=3, **flags):
    return model_of("pydoc", V, length=L, **flags)


def pair_model(V=5, **flags):
    return model_of("numbers", V, PAD, length=16, **flags)


def all_sequences(V, L):
    return torch.tensor(list(itertools.product(range(V), repeat=L)))


@pytest.mark.parametrize("V, L", [(2, 3), (3, 3), (3, 1)])
def test_likelihoods_of_all_sequences_sum_to_one(V, L):
    log_p = ar_baseline.log_likelihood(text_model(V, L), all_sequences(V, L))
    assert log_p.shape == (V**L,) and log_p.dtype == torch.float64
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert log_p.std() > 0.1, "a uniform model would prove nothing"


def test_a_likelihood_is_the_product_over_prefixes_run_one_by_one():
    for model, memory, given in (
            (text_model(V=9, L=6), (), 0),
            (pair_model(V=9), (torch.tensor([[BOS, 5, 4, EOS]]),), 1)):
        x, expected = torch.tensor([[BOS, 4, 3, 8, 7, EOS]]), 0.0
        states = model.encode(*memory) if memory else ()
        for n in range(given, 6):
            log_p = model.out(model.features(x[:, :n], *states)[:, -1]).log_softmax(-1)
            expected += log_p[0, x[0, n]].item()
        found = ar_baseline.log_likelihood(model, x, *memory).item()
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("pairs", [False, True])
def test_no_position_looks_ahead(pairs):
    model = pair_model(V=9) if pairs else text_model(V=9, L=8)
    x = torch.randint(3, 9, (4, 7))
    memory = model.encode(torch.randint(3, 9, (4, 5))) if pairs else ()
    before = model.features(x, *memory)
    for i in range(7):
        changed = x.clone()
        changed[:, i:] = torch.randint(3, 9, changed[:, i:].shape)
        after = model.features(changed, *memory)
        seen = i if pairs else i + 1  # text: one more, after the start symbol
        torch.testing.assert_close(after[:, :seen], before[:, :seen])
        assert not torch.allclose(after[:, seen:], before[:, seen:])


def test_each_token_of_the_prefix_and_of_the_source_matters():
    model, source = pair_model(V=9), torch.tensor([[BOS, 6, 7, EOS]])
    x = torch.tensor([[BOS, 4, 5]])
    before = model.features(x, *model.encode(source))[:, -1]
    for ids in (x, source):
        for i in range(1, ids.shape[1]):
            kept, ids[0, i] = ids[0, i].item(), 8
            after = model.features(x, *model.encode(source))[:, -1]
            assert (after - before).abs().max() > 1e-3
            ids[0, i] = kept


def test_padding_changes_nothing():
    model = pair_model(V=9)
    x, source = torch.tensor([[BOS, 4, 5, EOS]]), torch.tensor([[BOS, 6, 7, EOS]])
    exact = ar_baseline.log_likelihood(model, x, source)
    padded = ar_baseline.log_likelihood(model, F.pad(x, (0, 3)), F.pad(source, (0, 2)))
    torch.testing.assert_close(padded, exact, rtol=1e-5, atol=1e-5)
    model = model_of("folder", 6, pad_id=5, length=8)
    x = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(ar_baseline.log_likelihood(model, F.pad(x, (0, 4), value=5)),
                               ar_baseline.log_likelihood(model, x), rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_mean_over_smoothed_targets():
    model, eps = pair_model(V=9, smoothing=0.1), 0.1
    x, source = torch.randint(3, 9, (4, 6)), torch.randint(3, 9, (4, 5))
    x[:, 0], x[2, 4:] = BOS, PAD
    loss, nll = model(x, source)
    logits = model.out(model.features(x[:, :-1], *model.encode(source))).flatten(0, 1)
    target = x[:, 1:].flatten()
    torch.testing.assert_close(loss, F.cross_entropy(
        logits, target, ignore_index=PAD, reduction="sum", label_smoothing=eps))
    torch.testing.assert_close(nll.flatten(), F.cross_entropy(
        logits, target, ignore_index=PAD, reduction="none"))
    gradients = torch.autograd.grad(loss, model.out.parameters(), retain_graph=True)
    expected = torch.autograd.grad(F.cross_entropy(
        logits, target, ignore_index=PAD, reduction="sum", label_smoothing=eps),
        model.out.parameters())
    for mine, theirs in zip(gradients, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert not nll.requires_grad


def test_samples_are_as_frequent_as_the_model_says():
    model, n = text_model(V=2, L=3), 8000
    torch.manual_seed(1)
    *_, x = ar_baseline.sample(model, n)
    worlds = all_sequences(2, 3)
    p = ar_baseline.log_likelihood(model, worlds).exp()
    count = torch.bincount((x * torch.tensor([4, 2, 1])).sum(1), minlength=8)
    chi2 = ((count - n * p) ** 2 / (n * p)).sum().item()
    assert chi2 < 24.3  # 7 degrees of freedom: exceeded once in a thousand


def test_cold_samples_are_greedy():
    model = text_model(V=3, L=5, temperature=0.0)
    steps = list(ar_baseline.sample(model, 2))
    assert [tuple(s.shape) for s in steps] == [(2, n) for n in range(1, 6)]
    for n in range(5):
        greedy = model.out(model.features(steps[-1][:, :n])[:, -1]).argmax(-1)
        assert torch.equal(steps[-1][:, n], greedy)


def exhaustive(model, source, most, penalty):
    """The best target of one source (1, M) and its score, among all of at most `most` ids."""
    best = (-math.inf, None)
    for n in range(most - 1):
        for middle in itertools.product(range(EOS + 1, model.out.out_features), repeat=n):
            row = (BOS, *middle, EOS)
            log_p = ar_baseline.log_likelihood(model, torch.tensor([row]), source).item()
            best = max(best, (log_p / (n + 1)**penalty, row))
    return best


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_a_beam_as_large_as_the_tree_finds_the_best_target(penalty):
    model, most = pair_model(V=6), 5  # three words: 27 prefixes of three
    source = torch.tensor([[BOS, 3, 4, EOS, PAD], [BOS, 5, EOS, PAD, PAD], [BOS, 5, 5, 4, EOS]])
    rows, scores = ar_baseline.beam_search(model, source, 27, most, penalty)
    for row, score, x in zip(rows.tolist(), scores.tolist(), source):
        best, expected = exhaustive(model, x[None, x != PAD], most, penalty)
        assert tuple(row) == expected + (PAD,) * (most - len(expected))
        assert score == pytest.approx(best, abs=1e-5)


def test_a_beam_scores_what_it_returns_and_a_larger_one_is_no_worse():
    model = pair_model(V=12)
    source, scores = torch.randint(3, 12, (6, 5)), []
    for beam in (1, 2, 4, 16):
        rows, score = ar_baseline.beam_search(model, source, beam, 10, 1.0)
        log_p = ar_baseline.log_likelihood(model, rows, source)
        torch.testing.assert_close(score.double(), log_p / ((rows != PAD).sum(1) - 1),
                                   rtol=1e-4, atol=1e-4)
        assert (rows[:, 0] == BOS).all() and ((rows == EOS).sum(1) == 1).all()
        scores.append(score.mean().item())
    assert scores[-1] >= scores[0]


def test_text_is_mdlm_s_recipe_and_size():
    """The yardstick's row is at equal size: but for one class, MDLM's 12 x 768."""
    import cadd
    for name in ("pydoc", "english27", "shakespeare", "text8", "pycode", "folder"):
        mine, mdlm = (c(**{"dataset": name} | p[name]) for c, p in (
            (ar_baseline.Config, ar_baseline.PRESETS), (cadd.Config, cadd.PRESETS)))
        for key in ("length", "dim", "depth", "heads", "dropout", "steps", "batch_size", "lr",
                    "lr_schedule", "warmup", "beta2", "weight_decay", "clip", "ema"):
            assert getattr(mine, key) == getattr(mdlm, key), (name, key)
    sizes = []
    for script, flags in ((ar_baseline, {}), (cadd, {"hint": "none"})):
        cfg = script.Config(dataset="english27", **TINY, **flags)
        model = script.build(cfg, ar_baseline.Sequences("english27", 27, 256, "char", {}))
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes[1] - sizes[0] == TINY["dim"] + 1  # cadd's head has a row for [MASK]


@pytest.fixture
def letters(tmp_path):
    """Text whose next letter is certain: a, b, c, a, ..."""
    folder = tmp_path / "letters"
    folder.mkdir()
    for split, n in (("train", 4000), ("valid", 160)):
        (folder / f"{split}.txt").write_text("abc" * n)
    return ["--dataset", str(folder), "--length", "16", *NETWORK, "--batch_size", "16"]


def test_text_run(letters, tmp_path, capsys):
    """Train, stop and resume, evaluate, sample: what is certain costs nothing, but the first."""
    out = tmp_path / "run"
    flags = [*letters, "--out", str(out), "--lr", "1e-2", "--warmup", "5", "--ema", "0.9",
             "--log_every", "10", "--micro_batch", "8", "--data_dir", str(tmp_path),
             "--lr_schedule", "constant"]
    common.main(ar_baseline, [*flags, "--steps", "30"])
    common.main(ar_baseline, [*flags, "--steps", "60"])
    result = json.loads((out / "result.json").read_text())
    assert result["method"] == "ar" and result["step"] == 60
    nll = result["figures"]["nll"]
    assert nll["unit"] == "bits/char" and nll["exact"] and nll["draws"] == 30
    assert nll["value"] == pytest.approx(math.log2(3) / 16, abs=0.02)  # where it begins
    lines = [line for line in log_of(out) if "nll_bits" in line]
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[-1]["nll_bits"] == pytest.approx(lines[-1]["nll_nats"] / math.log(2))
    common.main(ar_baseline, ["--mode", "eval", "--data_dir", str(tmp_path), *flags[:2],
                              "--out", str(out)])
    again = json.loads((out / "eval.json").read_text())["figures"]["nll"]
    assert again["value"] == pytest.approx(nll["value"])
    common.main(ar_baseline, ["--mode", "sample", *flags[:2], "--out", str(out), "--samples", "5",
                              "--sample_batch", "2", "--top_p", "0.9"])
    texts = [json.loads(line)["text"] for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(texts) == 5 and all(text in "abc" * 10 for text in texts)
    assert "nll" in capsys.readouterr().out
    # as eval.py's judge of texts
    assert metrics.script_of(out) is ar_baseline
    _, _, model, data, step = common.open_run(ar_baseline, str(out), flags[:2])
    ids = torch.stack([torch.from_numpy(data.encode(text)) for text in ("abcabcabc", "abcaacabc")])
    good, bad = ar_baseline.log_likelihood(model, ids).tolist()
    assert step == 60 and good > -2 and bad < good - 5


def test_a_resumed_text_run_equals_one_that_was_not_stopped(letters, tmp_path):
    flags = [*letters, "--log_every", "4", "--warmup", "2", "--dropout", "0.1", "--eval_sequences",
             "4", "--data_dir", str(tmp_path), "--lr_schedule", "constant"]
    for steps in (4, 8):
        common.main(ar_baseline, [*flags, "--out", str(tmp_path / "a"), "--steps", str(steps)])
    common.main(ar_baseline, [*flags, "--out", str(tmp_path / "b"), "--steps", "8"])
    a, b = (common.read_checkpoint(tmp_path / run / "checkpoint.pt") for run in "ab")
    for key in ("model", "optimizer", "ema"):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


@pytest.fixture
def few_numbers(monkeypatch):
    def load(name, data_dir, length, vocab, **flags):
        return load_pairs(name, data_dir, length, vocab, 60, **flags)
    monkeypatch.setattr(ar_baseline, "load_pairs", load)


def test_pairs_run_and_distilled_targets(few_numbers, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--dataset", "numbers", "--out", str(out), *NETWORK, "--vocab", "300",
             "--batch_tokens", "256", "--warmup", "10", "--log_every", "20", "--steps", "40"]
    common.main(ar_baseline, flags)
    result = json.loads((out / "result.json").read_text())
    assert result["method"] == "transformer" and {"exact", "bleu"} <= set(result["figures"])
    lines = [line for line in log_of(out) if "nll_nats" in line]
    assert lines[-1]["nll_nats"] < lines[0]["nll_nats"]
    rows = [json.loads(line)
            for line in (out / "translations-valid.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {"source", "text", "reference"}
    capsys.readouterr()
    common.main(ar_baseline, ["--dataset", "numbers", "--mode", "sample", "--out", str(out),
                              "--samples", "2"])
    assert capsys.readouterr().out.count("->") == 2
    common.main(ar_baseline, ["--dataset", "numbers", "--mode", "eval", "--split", "train", "--out",
                              str(out), "--beam", "2"])
    file = out / "translations-train.txt"
    lines = file.read_text().splitlines()
    raw = load_pairs("numbers", tmp_path, 32, 300, 60)
    assert len(lines) == raw.pairs == len(raw.train[0].lengths), "a line for each training pair"
    distilled = load_pairs("numbers", tmp_path, 32, 300, 60, distilled=str(file))
    sources = [source for source, _ in raw.pairs_of("train")]
    assert distilled.pairs_of("train") == [pair for pair in zip(sources, lines) if pair[1]]


@pytest.mark.parametrize("dataset", ["english27", "multi30k"])
def test_bench_needs_no_data(dataset, capsys, tmp_path):
    common.main(ar_baseline, [
        "--dataset", dataset, "--mode", "bench", "--bench_steps", "1", *NETWORK, "--length", "32",
        "--batch_size", "4", "--batch_tokens", "256", "--vocab", "300", "--data_dir",
        str(tmp_path)])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["method"] == "ar_baseline" and record["tokens_per_s"] > 0


def test_a_width_that_does_not_divide_is_named():
    with pytest.raises(common.RunError, match="--dim 18"):
        text_model(dim=18, heads=2 * 2)
