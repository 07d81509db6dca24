"""difformer.py: schedules, degeneration, loss, decoding and whole runs on pairs of sentences."""

import contextlib
import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import catdm
import common
import data
import difformer
import difformer_factors
import eval as metrics
from common import RunError
from conftest import log_of
from data import PairData
from difformer import Config, Difformer, Noise

ALONE = common.DDP(0, 1, torch.device("cpu"), False)
SMALL = dict(embed_dim=8, dim=16, ffn=16, depth=1, heads=2, max_length=16, dropout=0.0, factor=2.0,
             init_std=0.0, embed_std=0.5)
TINY = ["--device", "cpu", "--embed_dim", "8", "--dim", "16", "--ffn", "16", "--depth", "1",
        "--heads", "2", "--batch_tokens", "192", "--factor", "2", "--dropout",
        "0.1", "--max_number", "99", "--max_length", "32", "--vocab", "300",
        "--eval_sequences", "3", "--K", "4", "--early_stop", "1", "--log_every", "2",
        "--save_every", "3",
        "--length_beam", "1", "--noise_beam", "2", "--samples", "1"]


@pytest.fixture()
def model():
    torch.manual_seed(0)
    return Difformer(Config(**SMALL), 20)


@pytest.fixture()
def run(tmp_path):
    """run(steps, *flags, out="a") -> the run folder."""
    def go(steps, *flags, out="a"):
        folder = tmp_path / out
        difformer.main([*TINY, "--out", str(folder), "--steps", str(steps), *flags])
        return folder
    return go


def losses(folder):
    lines = log_of(folder)
    return {r["step"]: r["cross_entropy"] + r["mse"] for r in lines if "mse" in r}


# ------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("schedule, formula", [
    ("linear", lambda t: math.exp(-9.95 * t * t - 0.1 * t)),
    ("cosine", lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2),
    ("sqrt", lambda t: 1 - math.sqrt(t + 1e-4))])
def test_schedules_are_the_authors_formulas(schedule, formula):
    noise = Noise(schedule, 1.0, "plain", 2000)
    for i in (0, 1, 10, 99, 400, 777, 1000, 1500, 1900, 1989):
        expected = formula((i + 1) / 2000) / formula(0)
        assert noise.signal[i].item() ** 2 == pytest.approx(expected, rel=1e-9)
    assert torch.allclose(noise.signal**2 + noise.sigma**2, torch.ones(2000, dtype=torch.float64))
    assert (noise.signal > 0).all() and (noise.signal.diff() < 0).all()


def test_rescaling_divides_the_snr_by_f_squared():
    index = torch.arange(0, 1900, 100)
    one = Noise("sqrt", 1.0, "plain", 2000)
    a, s = one.at(index, train=True)
    b, r = Noise("sqrt", 4.0, "plain", 2000).at(index, train=True)
    assert torch.allclose(b**2 / r**2, a**2 / s**2 / 16)
    for rescaling in ("plain", "vp"):  # C.7: not in sampling
        assert all(map(torch.equal, Noise("sqrt", 4.0, rescaling, 2000).at(index), (a, s)))
    # Eq. 8 acts on alpha-bar(t), which at t = 0 is 1 for "linear": there it is exact.
    a, s = Noise("linear", 1.0, "plain", 2000).at(index)
    b, r = Noise("linear", 4.0, "vp", 2000).at(index, train=True)
    assert torch.allclose(b**2 / r**2, a**2 / s**2 / 16) and torch.allclose(b**2 + r**2,
                                                                            torch.ones_like(b))


def test_posterior_of_the_kept_steps_is_bayes_rule():
    """Joint Gaussian of (z_s, z_t) given z_0, conditioned on z_t, by its covariance matrix."""
    noise = Noise("sqrt", 4.0, "plain", 2000)
    kept = difformer.kept_steps(2000, 20, 0)
    for t, s in zip(kept, kept[1:] + [-1]):
        (a, sa), (b, sb) = noise.at(torch.tensor(t)), noise.at(torch.tensor(s))
        z_t, z_0 = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-1.2, dtype=torch.float64)
        mean, var = common.gaussian_posterior(z_t, z_0, a, sa, b, sb)
        covariance = a / b * sb**2
        assert mean.item() == pytest.approx((b * z_0 + covariance / sa**2 * (z_t - a * z_0)).item())
        assert var.item() == pytest.approx((sb**2 - covariance**2 / sa**2).item(), abs=1e-12)
    assert mean == z_0 and var == 0  # the last step ends at clean data


def test_kept_steps():
    steps = difformer.kept_steps(2000, 20, 5)
    assert len(steps) == 15 and steps[0] == 1999 and steps[-1] == round(5 * 1999 / 19)
    assert difformer.kept_steps(2000, 1, 5) == [1999]
    assert difformer.kept_steps(2000, 2000, 0) == list(range(1999, -1, -1))


# ------------------------------------------------------------------------- degeneration


@pytest.mark.parametrize("schedule, dgs_max, V, factor", [
    ("linear", 0.05, 10_000, 21.17), ("cosine", 0.05, 10_000, 40.82), ("sqrt", 0.05, 10_000, 6.88),
    ("linear", 0.2, 10_000, 4.23), ("sqrt", 0.15, 10_000, 4.05), ("sqrt", 0.5, 10_000, 1.82),
    ("sqrt", 0.05, 20_000, None), ("cosine", 0.5, 40_000, None), ("sqrt", 0.15, 40_000, None)])
def test_search_reproduces_table_19(schedule, dgs_max, V, factor):
    """The factors before rounding were computed elsewhere; columns 20K and 40K: the table's."""
    found = difformer.search_factor(schedule, dgs_max, V, 128)
    if factor:
        assert found == pytest.approx(factor, rel=0.02)
    cell = difformer_factors.TABLE_19[schedule][dgs_max][(10_000, 20_000, 40_000).index(V)]
    assert abs(round(2 * found) / 2 - cell) <= (0.5 if factor else 0)


def test_search_reproduces_tables_14_and_17():
    assert round(2 * difformer.search_factor("sqrt", 0.15, 10_000, 512)) / 2 == 8.5
    vp = [difformer.search_factor("sqrt", m, 10_000, 128, "vp") for m in (0.05, 0.15)]
    assert [round(2 * f) / 2 for f in vp] == [9.5, 4.5]


def test_the_model_takes_the_factor_found_to_the_nearest_half(monkeypatch):
    """As Table 19's; Algorithm 1 would round up. So DGS may end a little above dgs_max."""
    seen = []
    monkeypatch.setattr(difformer, "search_factor", lambda *args: seen.append(args) or 3.2)
    model = Difformer(Config(**SMALL | dict(factor=0.0, schedule="cosine", dgs_max=0.3, T=100,
                                            rescaling="vp")), 20)
    assert seen == [("cosine", 0.3, 20, 8, "vp", 100)] and model.factor == 3.0
    assert torch.equal(model.noise.trained, Noise("cosine", 3.0, "vp", 100).trained)


def test_dgs_of_table_2_and_by_monte_carlo():
    for schedule, paper in (("linear", 0.47), ("cosine", 0.77), ("sqrt", 0.77)):
        noise = Noise(schedule, 1.0, "plain", 2000)
        assert difformer.degeneration_score(noise, 10_000, 128) == pytest.approx(paper, abs=0.006)
    # Algorithm 2 on drawn embeddings agrees with the competitors integrated out.
    noise = Noise("sqrt", 3.0, "plain", 2000)
    a, s = noise.at(difformer.grid(2000, 9), train=True)
    embeddings = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    sampled = difformer.dgs_monte_carlo(a, s, embeddings, draws=10)
    assert torch.allclose(sampled, difformer.dgs_at(a, s, 300, 64), atol=0.04)


def test_the_papers_tables_beside_ours(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(difformer_factors, "search_factor", lambda s, m, V, d, r, T, dense: (
        9.0 if dense else {0.05: 9.4, 0.15: 4.2, 0.5: 3.2}[m]) if r == "vp" else d / 32)
    file = tmp_path / "t.json"
    difformer_factors.main(["--tables", "17", "14", "--save", str(file)])
    printed = capsys.readouterr().out
    assert "1 of 3 cells are the paper's, 1 are one step of .5 off" in printed
    assert "1 of 4 cells are the paper's, 1 are one step of .5 off" in printed
    cells = json.loads(file.read_text())["table_17"]
    assert [(c["ours"], c["paper"], c["dense"]) for c in cells] == [(9.5, 9.5, 9), (4, 4.5, 9),
                                                                    (3, 2, 9)]
    assert len(difformer_factors.CELLS[19]) == 51


def test_dgs_mode(capsys):
    difformer.main("--mode dgs --schedule sqrt --vocab 10000 --embed_dim 128".split())
    printed = capsys.readouterr().out
    found, dense = (float(re.search(rf"{word} (\d+\.\d+)", printed)[1])
                    for word in ("F =", "times"))
    assert "to the nearest .5 4;" in printed and dense < found - 0.05  # it depends on the grid


# ------------------------------------------------------------------------- model and loss


def batch(model, M=6, N=8):
    rng = torch.Generator().manual_seed(1)
    x, y = (torch.randint(3, model.V, (4, n), generator=rng) for n in (M, N))
    x[1, 3:], y[0, 5:] = 0, 0
    return x, y, torch.rand(4, generator=rng), torch.randn(4, N, 8, generator=rng)


def test_padding_changes_nobody_elses_output(model):
    model.eval()
    x, y, u, eps = batch(model)
    memory, memory_not_pad, length = model.encode(x)
    z = torch.randn(4, 8, 8)
    index, not_pad = torch.tensor([3, 500, 1000, 1999]), y != 0
    out = model.denoise(z, index, z, not_pad, memory, memory_not_pad)
    longer, _, length_2 = model.encode(torch.nn.functional.pad(x, (0, 5)))
    assert torch.allclose(longer[:, :6], memory, atol=1e-5)
    assert torch.allclose(length, length_2, atol=1e-5)
    z_long = torch.cat([z, torch.full((4, 3, 8), 9.0)], 1)
    out_2 = model.denoise(z_long, index, z_long, torch.nn.functional.pad(not_pad, (0, 3)),
                          torch.cat([memory, memory + 5], 1),
                          torch.nn.functional.pad(memory_not_pad, (0, 6)))
    assert torch.allclose(out_2[:, :8][not_pad], out[not_pad], atol=1e-5)
    z[0, 6] += 10  # padding of sentence 0
    changed = model.denoise(z, index, z, not_pad, memory, memory_not_pad)
    assert torch.allclose(changed[0, :5], out[0, :5], atol=1e-5)
    z[2, 0] += 10  # a real token, on the contrary, is seen
    assert not torch.allclose(model.denoise(z, index, z, not_pad, memory, memory_not_pad)[2, 5],
                              out[2, 5], atol=1e-5)


def test_the_network_is_pytorchs_transformer(model):
    """Encoder, decoder and their inputs, with the layers of torch.nn in place of ours."""
    net, d = model.net.eval(), 16

    def copy(theirs, ours):
        theirs.in_proj_weight.data = torch.cat([ours.q.weight, ours.kv.weight])
        theirs.in_proj_bias.data = torch.cat([ours.q.bias, ours.kv.bias])
        theirs.out_proj.load_state_dict(ours.out.state_dict())

    def layer(kind, block):
        theirs = kind(d, 2, 16, dropout=0.0, batch_first=True).eval()
        copy(theirs.self_attn, block.attention)
        norms = [block.norm1, block.norm3]
        if kind is torch.nn.TransformerDecoderLayer:
            copy(theirs.multihead_attn, block.cross)
            norms.insert(1, block.norm2)
        for number, norm in enumerate(norms, 1):
            getattr(theirs, f"norm{number}").load_state_dict(norm.state_dict())
        theirs.linear1.load_state_dict(block.mlp[0].state_dict())
        theirs.linear2.load_state_dict(block.mlp[2].state_dict())
        return theirs

    for p in net.parameters():  # biases and norms differ from their start
        p.data += 0.1 * torch.randn_like(p)
    x, y, _, eps = batch(model)
    memory, memory_not_pad, length_logits = model.encode(x)
    h = net.source_in(model.embed(x) * 8**0.5) + net.source_place.weight[:6]
    h = layer(torch.nn.TransformerEncoderLayer, net.encoder[0])(h, src_key_padding_mask=x == 0)
    assert torch.allclose(memory[x > 0], h[x > 0], atol=1e-5)
    means = torch.stack([row[ids > 0].mean(0) for row, ids in zip(h, x)])
    assert torch.allclose(length_logits, means @ net.length_head.weight.T, atol=1e-5)

    index, previous = torch.tensor([0, 700, 1500, 1999]), torch.randn(4, 8, 8)
    found = model.denoise(eps, index, previous, y > 0, memory, memory_not_pad)
    angles = torch.tensor([[i / 2 * 1e4 ** (-k / 8) for k in range(8)] for i in index.tolist()])
    t = net.time(torch.cat([angles.cos(), angles.sin()], -1))
    both = torch.cat([net.target_in(eps), net.target_in(previous)], -1)
    h = net.target_norm(net.previous(both) + t[:, None] + net.target_place.weight[:8])
    h = layer(torch.nn.TransformerDecoderLayer, net.decoder[0])(
        h, memory, tgt_key_padding_mask=y == 0, memory_key_padding_mask=x == 0)
    assert torch.allclose(found[y > 0], net.out(h)[y > 0], atol=1e-4)
    # CATDM's encoder has two parts more.
    others = common.EncoderDecoder(8, 16, 16, 1, 2, 0.0, 16).state_dict()
    assert set(others) - set(net.state_dict()) == {
        "source_norm.weight", "source_norm.bias", "length_head.bias"}


def test_the_encoder_can_start_as_fairseqs():
    """Xavier's bounds (6 / (in + out))^.5, 2^-.5 of that for q, k and v; PyTorch's own: in^-.5."""
    def network(fairseq):
        torch.manual_seed(0)
        return Difformer(Config(embed_dim=32, dim=64, ffn=128, depth=1, heads=2, factor=1.0,
                                fairseq_encoder=fairseq), 5)
    model, other = network(True), network(False)
    [block] = model.net.encoder
    layers = block.attention.q, block.attention.kv, block.attention.out, block.mlp[0], block.mlp[2]
    (q, q_bias), (kv, kv_bias), (out, out_bias), (up, up_bias), (down, down_bias) = (
        layer.parameters() for layer in layers)
    start, small, large = model.net.source_in.weight, 64**-0.5, 128**-0.5
    for values, bound in [(q, 1.5**0.5 * small), (kv, 1.5**0.5 * small), (out, 3**0.5 * small),
                          (q_bias, small), (kv_bias, small), (up, small), (up_bias, small),
                          (down, large), (down_bias, large), (start, 32**-0.5)]:
        # The largest of n >= 64 uniform draws is below .9 of the bound with probability .9^n.
        assert 0.9 * bound < values.abs().max() <= bound
    assert not out_bias.any()
    place = model.net.source_place.weight  # 256 x 64 normal draws
    assert place.std().item() == pytest.approx(small, rel=0.03) and place.abs().max() > 3 * small
    for name, values in other.state_dict().items():
        kept = not name.startswith(("net.source", "net.encoder")) or "norm" in name
        assert torch.equal(values, model.state_dict()[name]) == (
            kept or name.endswith("attention.out.bias")), name


def test_the_self_conditioning_mlp_ends_with_dropout():
    net = Difformer(Config(**SMALL | dict(dropout=0.5)), 20).net
    both = torch.randn(64, 32)
    dropped, whole = net.previous(both), net.eval().previous(both)
    gone = dropped == 0
    assert torch.allclose(dropped, torch.where(gone, 0, 2 * whole))
    assert 0.4 < gone.float().mean() < 0.6  # of 1,024: six standard deviations


def test_self_conditioning_passes_no_gradient(model, monkeypatch):
    x, y, u, eps = batch(model)
    seen = []
    inner = Difformer.denoise

    def spy(self, z_t, index, previous, *rest):
        seen.append((torch.is_grad_enabled(), previous))
        return inner(self, z_t, index, previous, *rest)
    monkeypatch.setattr(Difformer, "denoise", spy)
    once, *_ = model(x, y, u, eps, False)
    assert [g for g, _ in seen] == [True] and not seen[0][1].any()
    conditioned, *_ = model(x, y, u, eps, True)
    assert [g for g, _ in seen[1:]] == [False, True]
    assert seen[2][1].any() and not seen[2][1].requires_grad
    assert once != conditioned


def test_losses_by_hand(model):
    x, y, u, eps = batch(model)
    loss, length_loss, stats = model(x, y, u, eps, False)
    not_pad = y != 0
    index = (u * 2000).long()
    a, s = model.noise.signal[index].float(), 2.0 * model.noise.sigma[index].float()  # F = 2
    z0 = model.embed(y) * 8**0.5
    z_t = a[:, None, None] * z0 + s[:, None, None] * eps
    memory, memory_not_pad, logits = model.encode(x)
    out = model.denoise(z_t, index, torch.zeros_like(z_t), not_pad, memory, memory_not_pad)
    mse = (out - z0)[not_pad].square().sum() / 8
    log_p = (out @ model.embed.weight.T).log_softmax(-1)[not_pad]
    ce = -(0.9 * log_p.gather(-1, y[not_pad][:, None]).sum() + 0.1 * log_p.mean(-1).sum())
    assert loss.item() == pytest.approx((mse + ce).item(), rel=1e-5)
    classes = torch.tensor([5 - 6, 8 - 3, 8 - 6, 8 - 6]) + 128
    expected = -logits.log_softmax(-1)[range(4), classes].sum()
    assert length_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    [reached] = torch.autograd.grad(length_loss, model.embed.weight, retain_graph=True)
    assert set(reached.any(1).nonzero()[:, 0].tolist()) == set(x[x > 0].tolist())
    right = ((out @ model.embed.weight.T).argmax(-1) == y)[not_pad].sum()
    by_hand = dict(square=mse, ce=ce, right=right, length_loss=expected, tokens=29, pairs=4)
    assert {k: v.item() for k, v in stats.items()} == pytest.approx(
        {k: float(torch.as_tensor(v).detach()) for k, v in by_hand.items()}, rel=1e-5)
    model.cfg.loss = "none"
    loss = model(x, y, u, eps, False)[0]
    assert loss.item() == pytest.approx(mse.item(), rel=1e-5)
    # Gradients reach the embeddings from both sides of the squared error, and through z_t.
    ours, by_hand = (torch.autograd.grad(value, model.embed.weight, retain_graph=True)[0]
                     for value in (loss, mse))
    assert torch.allclose(ours, by_hand, atol=1e-5)
    model.cfg.loss = "rounding"
    log_p = (z0 @ model.embed.weight.T).log_softmax(-1)[not_pad]
    ce = -(0.9 * log_p.gather(-1, y[not_pad][:, None]).sum() + 0.1 * log_p.mean(-1).sum())
    assert model(x, y, u, eps, False)[0].item() == pytest.approx((mse + ce).item(), rel=1e-5)


def test_frozen_embeddings(tmp_path):
    rows = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    np.save(tmp_path / "e.npy", rows)
    model = Difformer(Config(**SMALL, embeddings=str(tmp_path / "e.npy")), 20)
    assert torch.allclose(model.z0(torch.arange(20)), torch.from_numpy(rows), atol=1e-6)
    assert not model.embed.weight.requires_grad
    with pytest.raises(RunError, match=r"shape \(20, 8\).*needs \(21, 8\)"):
        Difformer(Config(**SMALL, embeddings=str(tmp_path / "e.npy")), 21)
    (tmp_path / "e.npy").unlink()  # to sample, the checkpoint is enough
    later = Difformer(Config(**SMALL, embeddings=str(tmp_path / "e.npy"), mode="eval"), 20)
    later.load_state_dict(model.state_dict())
    assert torch.equal(later.embed.weight, model.embed.weight)


# ------------------------------------------------------------------------- decoding


def test_a_perfect_denoiser_is_found_and_padding_stays(model):
    """With z0hat fixed to a sentence's embeddings every call decodes that sentence."""
    with torch.no_grad():
        model.embed.weight.copy_(torch.nn.functional.one_hot(torch.arange(20) % 8, 8) * 1.0)
    target = torch.tensor([[1, 5, 7, 2]])
    model.denoise = lambda *_: model.z0(target)
    not_pad = torch.tensor([[True, True, True, False]])
    history = list(difformer.sample(model, None, None, not_pad, 20, 5))
    assert len(history) == 15 and all(h.tolist() == [[1, 5, 7, 0]] for h in history)


@pytest.mark.parametrize("clamp", [False, True])
def test_sampling_follows_the_posterior(model, clamp):
    """Each call sees the step, its last estimate and a z drawn from q(z_s | z_t, z0hat)."""
    not_pad = torch.ones(2, 3, dtype=torch.bool)
    estimates = torch.randn(4, 2, 3, 8, generator=torch.Generator().manual_seed(5))
    seen = []
    model.denoise = lambda z, index, previous, *_: (
        seen.append((z, index.tolist(), previous)), estimates[len(seen) - 1])[1]
    tokens = list(difformer.sample(model, None, None, not_pad, 5, 1, clamp,
                                    torch.Generator().manual_seed(3)))
    steps = [1999, 1499, 1000, 500, 0]
    assert [index for _, index, _ in seen] == [[s, s] for s in steps[:4]]
    assert not seen[0][2].any()
    rng = torch.Generator().manual_seed(3)
    z, bar = torch.randn(2, 3, 8, generator=rng), model.noise.signal**2
    assert torch.equal(seen[0][0], z)
    for i in range(3):
        ids = (estimates[i] @ model.embed.weight.T).argmax(-1)
        assert torch.equal(tokens[i], ids)
        z0 = model.z0(ids) if clamp else estimates[i]
        assert torch.equal(seen[i + 1][2], z0)
        now, then = bar[steps[i]], bar[steps[i + 1]]
        alpha = now / then  # of the steps between; the posterior as in appendix B
        mean = (then.sqrt() * (1 - alpha) * z0 + alpha.sqrt() * (1 - then) * z) / (1 - now)
        deviation = ((1 - then) / (1 - now) * (1 - alpha)).sqrt()
        z = mean + deviation * torch.randn(2, 3, 8, generator=rng)
        assert torch.allclose(seen[i + 1][0], z.float(), atol=1e-4)
        z = seen[i + 1][0]


def pair_data(texts, length=16):
    codec = data.BPECodec(data.learn_bpe([t for pair in texts for t in pair], 260))
    train = tuple(data.Sentences.encode(side, codec) for side in zip(*texts))
    return PairData("toy", length, codec, train, {"valid": texts, "test": texts})


def predict(model, difference):
    """Make the length head say: so many tokens more than the source."""
    model.net.length_head = torch.nn.Linear(16, 256)
    with torch.no_grad():
        model.net.length_head.bias[128 + difference] = 100.0


def test_hard_input_is_translated_line_by_line(capsys):
    """An empty line, 1,000 words, unknown characters: one output each, the long one announced."""
    pairs = pair_data([("a b", "b a"), ("b b", "a a")])
    cfg = Config(**SMALL, K=2, early_stop=0, sample_batch=3)
    model = Difformer(cfg, pairs.vocab_size)
    sources = ["a b", "", "a " * 1000, "\u4f60\u597d \U0001f600", "b"]
    rows = list(difformer.translate(model, sources, pairs, cfg, ALONE))
    assert [r["source"] for r in rows] == sources and rows[1]["text"] == ""
    assert "is cut to 16, --length" in capsys.readouterr().err
    long = pairs.rows(["a " * 1000, "b"])
    assert long.shape == (2, 16) and long[0, -1] == 2 and (long[0, :-1] != 2).all()


@pytest.mark.parametrize("wanted", [0, 5, 14])
def test_the_length_is_predicted_or_given(wanted):
    """Around the prediction by the length beam, each length with the noise beam's draws."""
    pairs = pair_data([("a b", "b a")])
    cfg = Config(**SMALL, K=1, length_beam=3, noise_beam=2, length=wanted)
    model = Difformer(cfg, pairs.vocab_size)
    predict(model, 2)
    seen = []
    model.denoise = lambda z, i, p, not_pad, memory, memory_not_pad: (
        seen.append((not_pad.sum(1).tolist(), memory, memory_not_pad)), torch.zeros_like(z))[1]
    rows = list(difformer.translate(model, ["a b a", "a"], pairs, cfg, ALONE))
    [(lengths, memory, memory_not_pad)] = seen
    predicted = [len(pairs.encode(text)) + 2 for text in ("a b a", "a")]
    around = [p + k for p in predicted for k in (-1, -1, 0, 0, 1, 1)]
    assert lengths == ([wanted + 2] * 12 if wanted else around)
    assert memory_not_pad.sum(1).tolist() == [predicted[0] - 2] * 6 + [predicted[1] - 2] * 6
    assert torch.equal(memory[0], memory[5]) and not torch.equal(memory[5], memory[6])
    assert all(len(row["candidates"]) == 6 for row in rows)


def test_lengths_stay_within_what_the_model_knows():
    cfg = Config(**{**SMALL, "max_length": 13}, length_beam=3, noise_beam=2)
    logits = torch.nn.functional.one_hot(torch.tensor([128 + 4, 128 - 7]), 256).float()
    found = difformer.candidate_lengths(logits, torch.tensor([9, 9]), cfg)
    assert found.tolist() == [[12, 12, 13, 13, 13, 13], [2, 2, 2, 2, 3, 3]]


def test_the_choice_is_among_real_tokens_and_so_are_its_steps(monkeypatch):
    """No length is above max_length, which need not be a multiple of 8; candidates are compared
    without padding; the steps are those of the candidate chosen."""
    pairs = pair_data([("a b", "b a")], 13)
    cfg = Config(**{**SMALL, "max_length": 13}, K=4, early_stop=1, length_beam=3, noise_beam=2,
                 show_steps=True)
    torch.manual_seed(0)
    model = Difformer(cfg, pairs.vocab_size)
    predict(model, 13 - len(pairs.encode("a b a")))
    with torch.no_grad():
        model.embed.weight[data.PAD] = 0  # no prediction
    seen, decode = [], model.denoise
    monkeypatch.setattr(difformer, "choose", lambda c: seen.append(c) or len(c) - 1)
    model.denoise = lambda z, i, p, not_pad, *rest: (
        seen.append(not_pad), decode(z, i, p, not_pad, *rest))[1]
    [row] = difformer.translate(model, ["a b a"], pairs, cfg, ALONE)
    *masks, candidates = seen
    assert [mask.sum(1).tolist() for mask in masks] == [[12, 12, 13, 13, 13, 13]] * 3
    assert masks[0].shape == (6, 13)
    assert [len(c) for c in candidates[:2]] == [12, 12] and all(map(all, candidates))
    assert row["text"] == row["candidates"][-1] == row["steps"][-1] != row["candidates"][0]
    assert len(row["steps"]) == 3


def test_all_steps_are_printed_and_after_training_the_distinct_ones(model, monkeypatch, capsys):
    row = dict(source="x", text="c", steps=["b", "b", "c", "c"])
    monkeypatch.setattr(difformer, "translate", lambda *_: [row])
    pairs = pair_data([("a b", "b a")])
    assert difformer.draw(model, model.cfg, pairs, ALONE) == {"factor": 2}
    assert capsys.readouterr().out == "\nx\n  call   1  b\n  call   3  c\n  ->        c\n"
    difformer.draw(model, dataclasses.replace(model.cfg, show_steps=True), pairs, ALONE)
    steps = "".join(f"  call {i:3d}  {text}\n" for i, text in enumerate("bbcc", 1))
    assert capsys.readouterr().out == f"\nx\n{steps}  ->        c\n"


def test_flags_of_decoding_reach_the_sampler(monkeypatch):
    pairs, seen, inner = pair_data([("a b", "b a")]), [], difformer.sample
    cfg = Config(**SMALL, K=3, early_stop=1, clamp=True)
    monkeypatch.setattr(difformer, "sample", lambda *args: (
        seen.append(args[4:7]), inner(*args))[1])
    list(difformer.translate(Difformer(cfg, pairs.vocab_size), ["a"], pairs, cfg, ALONE))
    assert seen == [(3, 1, True)]


def test_impossible_decoding_is_refused_before_training():
    pairs = pair_data([("a b", "b a")])
    for wrong in (dict(length=15), dict(K=2001)):
        with pytest.raises(RunError, match="--length is at most 14 and --K at most 2000"):
            difformer.build(Config(**SMALL, **wrong), pairs)


def test_logits_are_float32_under_autocast(model, monkeypatch):
    """The vocabulary's, without TF32 where they are read or scored, and the length's."""
    z, seen = model.z0(torch.arange(20)), []
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(z)
        h, _, lengths = model.encode(torch.tensor([[3, 4]]))
    assert torch.equal(logits, z @ model.embed.weight.T)
    assert torch.equal(lengths, h.mean(1) @ model.net.length_head.weight.T)

    def spy(z):
        seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return z @ model.embed.weight.T
    pairs, ddp = pair_data([("a", "b")]), dataclasses.replace(ALONE, amp=True)
    model = Difformer(model.cfg, pairs.vocab_size)
    monkeypatch.setattr(model, "logits", spy)
    torch.set_float32_matmul_precision("high")
    try:
        list(difformer.translate(model, ["a"], pairs, Config(**SMALL, K=2), ddp))
        difformer.probe(model, model.cfg, pairs, ddp, np.array([0.5]))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [("highest", False)] * 2


# ------------------------------------------------------------------------- training


def test_parts_of_all_ranks_make_the_batch():
    """Ranks and micro-batches divide the rows and their noise without loss."""
    cfg = Config(dataset="numbers", max_number=99, vocab=300, max_length=32, batch_tokens=512)
    pairs = data.load_pairs("numbers", max_length=32, vocab=300, max_number=99)
    [whole], n, tokens = difformer.load_batches(cfg, pairs, 3, ALONE)
    assert n == len(whole.x) == len(whole.u) and tokens == (whole.y > 0).sum()
    targets, sources = pairs.train_batch(0, 3, 512)
    assert np.array_equal(whole.x, sources) and np.array_equal(whole.y, targets)
    cfg.micro_tokens = 100
    found = []
    for rank in range(2):
        ddp = dataclasses.replace(ALONE, rank=rank, world=2)
        batches, *sizes = difformer.load_batches(cfg, pairs, 3, ddp)
        assert sizes == [n, tokens] and len(batches) == 3
        assert all(b.self_condition == whole.self_condition for b in batches)
        assert all(b.x.shape[1] == whole.x.shape[1] for b in batches)
        found += batches
    for i in range(4):
        rows = torch.cat([b[i].flatten(1) if b[i].dim() > 1 else b[i][:, None] for b in found])
        expected = whole[i].flatten(1) if whole[i].dim() > 1 else whole[i][:, None]
        assert sorted(rows.tolist()) == sorted(expected.tolist())
    cfg.micro_tokens = 512
    [other], *_ = difformer.load_batches(cfg, pairs, 4, ALONE)
    assert whole.u[0] != other.u[0] and not torch.equal(whole.eps[0, 0], other.eps[0, 0])
    kinds = [difformer.load_batches(cfg, pairs, step, ALONE)[0][0].self_condition
             for step in range(40)]
    assert 10 < sum(kinds) < 30  # half of the steps estimate twice


def test_the_gradient_is_that_of_the_global_batch(model, monkeypatch):
    """Per token of all ranks, .3 of the length loss per pair of all ranks, times the ranks that
    DDP divides by; parts add up. The loop also tells Run what its steps cost and where F is."""
    x, y, u, eps = batch(model)
    cfg = Config(**SMALL, clip=1e6, length_weight=0.3)
    pairs = pair_data([("a b", "b a"), ("b b", "a a a")])
    pairs.texts["valid"] = pairs.texts["valid"] * 2  # one for each rank
    grads, total, told = [], {}, {}

    class Optimizer:
        param_groups = [{}]

        def zero_grad(self, set_to_none):
            model.zero_grad(set_to_none)

        def step(self):
            grads.append([p.grad.clone() for p in model.parameters()])

    class Run:
        def __init__(self, *args, note):
            told.update(flops=args[-1], note=note)

        def steps(self, summarise, valid):
            yield 50

        def add(self, **stats):
            for name, value in stats.items():
                total[name] = total.get(name, 0) + value.item()

    class Rank(common.DDP):
        def wrap(self, net, compile):
            assert not compile  # parts of it are
            return net
    optimizer = Optimizer()
    model.no_sync = contextlib.nullcontext
    monkeypatch.setattr(torch.optim, "AdamW", lambda *_, **__: optimizer)
    monkeypatch.setattr(common, "Run", Run)
    monkeypatch.setattr(difformer, "build", lambda *_: model)
    loss, length_loss, expected = model(x, y, u, eps, False)
    by_hand = torch.autograd.grad(loss / 300 + 0.3 * length_loss / 40, list(model.parameters()))
    parts = [difformer.Batch(*(v[i:i + 2] for v in (x, y, u, eps)), False) for i in (0, 2)]
    for batches, world in (([(x, y, u, eps, False)], 1), (parts, 1), (parts, 3)):
        total.clear()
        monkeypatch.setattr(difformer, "load_batches", lambda *_: (batches, 40, 300))
        monkeypatch.setattr(pairs, "pairs", world)
        difformer.train(cfg, Rank(0, world, torch.device("cpu"), False), pairs)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4 * 51 / 10_000)
        for a, b in zip(grads[-1], by_hand):
            assert torch.allclose(a, world * b, atol=1e-5 * world)
        assert total == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-4)
    M, N = (np.mean([len(pairs.encode(text)) for text in side])
            for side in (("a b", "b b"), ("b a", "a a a")))
    assert M != N and told == dict(flops=difformer.flops_per_pair(model, M, N) / N, note=" | F 2")


def test_speed_is_measured_without_data(tmp_path):
    pairs = difformer.load(Config(mode="bench", dataset="wmt14", vocab=300, data_dir=str(tmp_path)))
    assert (pairs.name, pairs.vocab_size) == ("wmt14", 300) and set(pairs.longest) == {32}


def test_too_few_pairs_for_the_processes():
    cfg, many = Config(**SMALL, batch_tokens=192), dataclasses.replace(ALONE, world=16)
    pairs = pair_data([("a b", "b a")] * 20)
    with pytest.raises(RunError, match="127 or 20 pairs are too few for 16 processes.* 8 tokens"):
        difformer.train(dataclasses.replace(cfg, batch_tokens=127), many, pairs)
    pairs = pair_data([("a b", "b a")] * 15)
    with pytest.raises(RunError, match="192 or 15 pairs are too few for 16 processes"):
        difformer.train(cfg, many, pairs)
    pairs = pair_data([("a b", "b a")] * 20)
    pairs.texts["valid"] = pairs.texts["valid"][:15]  # else noticed when first validated
    for script in (difformer, catdm):
        given = script.Config(**SMALL if script is difformer else {}, dataset="numbers",
                              batch_tokens=192)
        with pytest.raises(RunError, match="192 or 15 pairs of valid are too few for 16 proc"):
            script.train(given, many, pairs)
    common.check_pairs(dataclasses.replace(cfg, mode="bench"), pairs, many)
    common.check_pairs(dataclasses.replace(cfg, batch_tokens=1), pairs, ALONE)


def test_the_loss_compiles_once_for_all_lengths(monkeypatch):
    """Encoder, losses, and the denoiser with and without gradient: four graphs, whatever sizes
    agree by chance."""
    graphs, compile = [], torch.compile

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda part, **flags: compile(
        part, backend=count, **flags))
    model, plain = (Difformer(Config(**{**SMALL, "dim": 20, "max_length": 32}), 20)
                    for _ in range(2))
    plain.load_state_dict(model.state_dict())
    difformer.compile_parts(model, model.cfg, ALONE)
    assert len(graphs) == 4 and all(p.grad is None for p in model.parameters())
    for B, M, N in [(16, 16, 16), (8, 4, 4), (13, 13, 11), (8, 32, 6), (24, 20, 8)]:
        x, y = (torch.randint(1, 20, (B, k)) for k in (M, N))
        for self_condition in (False, True):
            noise = torch.rand(B), torch.randn(B, N, 8), self_condition
            assert torch.allclose(model(x, y, *noise)[0], plain(x, y, *noise)[0], rtol=1e-4)
    assert len(graphs) == 4


def test_compiling_leaves_a_resumed_runs_dropout_alone(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda part, **flags: part)
    model = Difformer(Config(**SMALL | dict(dropout=0.5)), 20)
    state = torch.get_rng_state()
    difformer.compile_parts(model, model.cfg, ALONE)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_the_log_says(model):
    total = dict(square=6.0, ce=9.0, right=2.0, length_loss=10.0, tokens=3.0, pairs=5.0)
    record, shown = difformer.summarise(total, model)
    embeddings = model.z0(torch.arange(20))
    assert record == dict(
        mse=2, cross_entropy=3, accuracy=2 / 3, length_loss=2,
        embedding_std=round(embeddings.std().item(), 4),
        anisotropy=round(metrics.anisotropy(embeddings), 4))
    assert shown == dict(mse="2.000", ce="3.000", right="66.7%")


# ------------------------------------------------------------------------- whole runs


def test_a_run_leaves_everything(run, capsys):
    out = run(4)
    printed = capsys.readouterr().out
    assert "exact" in printed and "bleu" in printed and "call   1" in printed
    assert "numbers: 90 pairs, 300 tokens | F 2 |" in printed
    result = json.loads((out / "result.json").read_text())
    assert result["step"] == 4 and result["figures"]["speed"]["value"] > 0
    assert result["factor"] == 2
    assert {"mse", "cross_entropy", "accuracy", "length_loss", "embedding_std", "anisotropy", "lr",
            "tokens_per_s", "seconds"} <= set(log_of(out)[-2])
    assert len((out / "translations-valid.jsonl").read_text().splitlines()) == 3
    metrics.main([str(out), "--device", "cpu"])
    assert "exact, %" in capsys.readouterr().out


def test_other_training_text_is_refused(run, tmp_path):
    """On resuming and on evaluating."""
    sides = [tmp_path / "source", tmp_path / "target"]
    for side in sides:
        side.write_text(f"eins {side.name}\nzwei {side.name}\n" * 9)
    files = ["--dataset", "files", "--train", *map(str, sides), "--lr_schedule", "constant"]
    run(2, *files)
    out = run(3, *files)
    sides[0].write_text("drei vier\n" * 18)
    with pytest.raises(RunError, match="files are not those that .* learned from"):
        run(4, *files)
    for mode in ("eval", "sample"):
        with pytest.raises(RunError, match="files are not those that .* learned from"):
            difformer.main(["--mode", mode, "--device", "cpu", "--out", str(out)])


def test_sample_needs_the_checkpoint_alone(run, tmp_path, capsys, monkeypatch):
    out = run(2)
    capsys.readouterr()
    file = tmp_path / "input.txt"
    file.write_text("eins\n\nzwei\n")
    sample = ["--mode", "sample", "--out", str(out), "--device", "cpu"]
    difformer.main([*sample, "--samples", "2"])  # of the split
    printed = capsys.readouterr().out
    assert printed.count("->") == 2 and "call" not in printed
    assert all(source in printed for source, _ in data.number_pairs(99)["valid"][:2])
    monkeypatch.setattr(difformer, "load_pairs", lambda *_, **__: pytest.fail("reads data"))
    difformer.main([*sample, "--source", str(file), "--show_steps"])
    printed = capsys.readouterr().out
    assert printed.count("->") == 3 and "call   1" in printed
    difformer.main([*sample, "--source", "drei vier"])
    assert "\ndrei vier\n  -> " in capsys.readouterr().out


def test_one_rank_translates(model):
    other = dataclasses.replace(ALONE, rank=1, world=2)
    assert difformer.evaluate(model, model.cfg, None, other) == {}


def test_nothing_is_dropped_out_in_decoding(run, monkeypatch):
    """For the valid loss, after training, of a loaded run and in its diagnosis; TINY trains with
    dropout."""
    seen, inner = [], Difformer.encode

    def spy(model, x):
        seen.append((torch.is_grad_enabled(), model.training))
        return inner(model, x)
    monkeypatch.setattr(Difformer, "encode", spy)
    folder = run(1)
    for mode in ("eval", "sample"):
        difformer.main(["--mode", mode, "--device", "cpu", "--out", str(folder)])
    cfg, ddp, model, pairs, _ = common.open_run(difformer, str(folder), ["--device", "cpu"])
    difformer.probe(model, cfg, pairs, ddp, np.array([0.5]))
    assert seen == [(True, True)] + [(False, False)] * 6


def test_eval_mode_writes_its_figures_and_settings(run, tmp_path):
    out = run(2)
    file = tmp_path / "figures.json"
    flags = ["--device", "cpu", "--out", str(out), "--split", "test", "--eval_sequences", "2"]
    difformer.main(["--mode", "eval", *flags, "--K", "3", "--save", str(file)])
    result = json.loads(file.read_text())
    assert result["config"]["K"] == 3 and result["split"] == "test" and result["step"] == 2
    assert {"exact", "bleu", "speed", "anisotropy"} <= set(result["figures"])
    rows = [json.loads(r) for r in (out / "translations-test.jsonl").read_text().splitlines()]
    pairs = data.number_pairs(99)["test"][:2]
    assert [(r["source"], r["reference"]) for r in rows] == pairs
    assert all(len(r["candidates"]) == 2 for r in rows)
    difformer.main(["--mode", "eval", *flags])
    assert json.loads((out / "eval.json").read_text())["config"]["K"] == 4  # the run's


def test_micro_batches_change_nothing(run):
    flags = ["--dropout", "0"]
    a, b = run(4, *flags, out="a"), run(4, *flags, "--micro_tokens", "70", out="b")
    assert losses(a) == pytest.approx(losses(b), rel=1e-4) and list(losses(a)) == [2, 4]


def test_probe_says_what_is_left_to_predict(run):
    out, times = run(4, "--loss", "anchor"), (np.arange(25) + 0.5) / 25

    def probe():
        cfg, ddp, model, pairs, _ = common.open_run(difformer, str(out), ["--device", "cpu"])
        return difformer.probe(model, cfg, pairs, ddp, times)
    found = probe()
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    embeddings = state["ema"]["params"]["embed.weight"] * 8**0.5
    assert torch.equal(found["embeddings"], embeddings) and len(found["cross_entropy"]) == 25
    noise = Noise("sqrt", 2.0, "plain", 2000)
    index = torch.tensor([40, 120])  # the middle of the first two of 25 parts of 2000 steps
    assert torch.equal(found["sigma"][:2], 2 * noise.sigma[index])
    assert torch.equal(found["signal"][:2], noise.signal[index])
    ce = found["cross_entropy"]
    assert 0.5 * math.log(300) < ce[-1] < 1.2 * math.log(300)  # hardly trained
    assert found["cross_entropy"] == probe()["cross_entropy"]


@pytest.mark.parametrize("files", [("own.de", "own.en"), ("own.txt", "translated.txt")])
def test_own_pairs_from_the_command_line(tmp_path, monkeypatch, capsys, files):
    """The run folder has the files' name."""
    monkeypatch.chdir(tmp_path)
    for file, text in zip(files, ("eins\nzwei\n", "one\ntwo\n")):
        Path(file).write_text(text * 30)
    difformer.main([*TINY, "--train", *files, "--steps", "2"])
    assert "files: 57 pairs" in capsys.readouterr().out
    config = json.loads(Path("runs/difformer-own/result.json").read_text())["config"]
    assert config["warmup"] == difformer.PRESETS["files"]["warmup"]


def test_presets_name_fields():
    fields = {f.name for f in dataclasses.fields(Config)}
    for name, row in difformer.PRESETS.items():
        assert set(row) <= fields, name
        assert Config(**row)


@pytest.mark.parametrize("dim, heads", [(10, 4), (33, 3)])
def test_heads_and_two_must_divide_the_width(dim, heads):
    with pytest.raises(RunError, match=f"--dim {dim} must be even and a multiple of --heads"):
        Difformer(Config(**{**SMALL, "dim": dim, "heads": heads}), 5)
