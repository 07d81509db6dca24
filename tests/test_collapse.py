"""eval.py collapse: embeddings with known answers, what the scripts hand over, the pictures."""
import json
import math
import sys

import numpy as np
import pytest
import torch

import cadd
import catdm
import common
import data
import difformer
import eval as metrics
import vadd
from common import RunError

TINY = ["--device", "cpu", "--dim", "16", "--heads", "2", "--depth", "1", "--length", "16",
        "--batch_size", "8", "--micro_batch", "8", "--warmup", "2", "--samples", "1",
        "--sample_steps", "2", "--eval_sequences", "8", "--eval_draws", "1", "--steps", "2"]


def collapse_of(embeddings, tokens=None):
    """Figures and curves; signal falls from 1 to 0 while the noise grows from 0 to 1."""
    times = np.linspace(0, 1, 11)
    result = metrics.collapse(times, dict(embeddings=embeddings, cross_entropy=2 * times,
                                          signal=1 - times, sigma=times, tokens=tokens))
    return result["figures"], result["curves"]


# ------------------------------------------------------------------------- figures


def test_collapsed_embeddings():
    table = torch.full((50, 8), 0.3) * torch.arange(1.0, 9)       # all rows alike, not 0
    f, c = collapse_of(table, torch.arange(50).view(10, 5))
    assert (f["V"], f["D"], f["spread"], f["effective_rank"]) == (50, 8, 0, 0)
    assert f["ani"] == pytest.approx(1) and f["variance_largest"] < 1e-12
    assert c["distances"].max() == 0
    assert f["norm"] == pytest.approx(0.3 * math.sqrt(204))
    assert f["dgs"] == pytest.approx(1 / 50)                      # a tie: always the same guess


def test_orthogonal_embeddings():
    table = 3.0 * torch.eye(8)
    f, c = collapse_of(table)
    assert f["ani"] == pytest.approx(0, abs=1e-12) and f["norm"] == pytest.approx(3)
    # the covariance is 9/8 (1 - 1/8 ones): seven variances of 9/8, none along the mean
    assert c["axes"].tolist() == pytest.approx([9 / 8] * 7)
    assert f["effective_rank"] == pytest.approx(7) and f["spread"] == pytest.approx(7 / 8)
    away = c["distances"][~torch.eye(8, dtype=torch.bool)]
    assert torch.allclose(away, torch.tensor(3 * math.sqrt(2), dtype=torch.float64))
    assert c["norms"].tolist() == [3] * 8
    assert c["dgs"][0] == 1 and c["dgs"][-1] == pytest.approx(1 / 8, abs=0.03)  # 4,000 draws
    assert f["dgs"] == pytest.approx(c["dgs"].mean().item())
    assert f["ce_mean"] == pytest.approx(1) and f["ce_half_time"] == pytest.approx(0.5)
    assert "variance_median" not in f and "variances" not in c    # no tokens were given


def test_isotropic_embeddings():
    """N(0, I / D) + offset: V D numbers make each figure sure to about (V D)^-1/2 = 0.4%."""
    V, D = 4000, 16
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(0)) / D**0.5
    f, _ = collapse_of(table)
    assert f["effective_rank"] == pytest.approx(D / (1 + D / V), rel=0.01)
    assert f["spread"] == pytest.approx(1, abs=0.01) and f["ani"] == pytest.approx(0, abs=0.005)
    shifted = table + torch.full((D,), D**-0.5)                   # the mean has norm 1, too
    f, _ = collapse_of(shifted)
    assert f["spread"] == pytest.approx(0.5, abs=0.02)
    assert f["effective_rank"] == pytest.approx(D / (1 + D / V), rel=0.01)
    assert f["ani"] == pytest.approx(0.5, abs=0.03)


def test_dgs_of_two_embeddings_in_closed_form():
    """+-e: the degenerate model takes the sign of z e, so DGS_t = Phi(signal |e| / sigma)."""
    table = 0.7 * torch.nn.functional.normalize(torch.ones(2, 6), dim=-1)
    table[1] *= -1
    _, c = collapse_of(table)
    for k in (3, 5, 8, 10):
        t = k / 10
        phi = 0.5 * (1 + math.erf((1 - t) / t * 0.7 / math.sqrt(2)))
        assert c["dgs"][k] == pytest.approx(phi, abs=0.03)        # 4,000 draws: 4 errors


def test_spectrum_is_the_covariances():
    table = torch.randn(30, 5, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 6)
    expected = torch.linalg.eigvalsh(torch.cov(table.double().T, correction=0)).flip(0)
    assert torch.allclose(metrics.spectrum(table), expected)
    assert len(metrics.spectrum(table[:4])) == 3                  # four points span three axes
    assert metrics.effective_rank(torch.tensor([2.0, 2.0, 0.0])) == pytest.approx(2)
    assert metrics.effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(1.6)


def test_latent_variances_by_hand():
    table = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 6.0]])
    tokens = torch.tensor([[0, 1, 0], [0, 1, 1], [0, 1, 0], [0, 1, 2]])
    # positions 0 and 1 never vary; position 2 is 0, 0, e_1, e_2: E x^2 - (E x)^2
    expected = [36 / 4 - (6 / 4) ** 2, 4 / 4 - (2 / 4) ** 2, 0, 0, 0, 0]
    assert metrics.latent_variances(table, tokens).tolist() == pytest.approx(expected)
    f, _ = collapse_of(table, tokens.numpy())
    assert f["variance_largest"] == pytest.approx(6.75) and f["variance_median"] == 0


def test_time_to_half():
    def half(*values):
        return metrics.time_to_half(torch.linspace(0, 1, len(values)), torch.tensor(values))
    assert half(0.0, 0.0, 1.0, 4.0, 4.0) == pytest.approx(0.5 + 0.25 / 3)
    assert half(0.0, 4.0) == pytest.approx(0.5) and half(3.0, 4.0) == 0


def test_distances_of_many_embeddings_are_a_sample():
    table = torch.arange(1000.0)[:, None]
    d = metrics.distances(table, 4)
    assert d.shape == (4, 4) and d[0].tolist() == [0, 333, 666, 999]


# ------------------------------------------------------------------------- pictures


@pytest.fixture()
def figures(monkeypatch):
    """The matplotlib figures that are saved, by file name."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    found, save = {}, Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (found.update({path.name: self}),
                                                               save(self, path)))
    return found


def test_pictures_hold_the_curves(tmp_path, figures):
    """Each panel has the runs that have this curve, each run the same colour everywhere."""
    table = 3.0 * torch.eye(8)
    results = {name: dict(curves=collapse_of(table * scale, tokens)[1])
               for name, scale, tokens in (("a", 1, None), ("b", 0, torch.arange(8)[:, None]))}
    paths = metrics.draw_collapse(results, tmp_path)
    assert [path.name for path in paths] == ["collapse.png", "distances.png"]
    assert all(path.exists() for path in paths)
    axes = figures["collapse.png"].axes
    titles = ["variance of dim", "cross-entropy", "DGS_t", "variance of emb", "magnitudes"]
    assert all(ax.get_title().startswith(t) for ax, t in zip(axes, titles, strict=True))
    assert [ax.get_yscale() for ax in axes] == ["log", "linear", "linear", "log", "linear"]
    lines = [{line.get_color(): line.get_xydata() for line in ax.get_lines()} for ax in axes]
    assert [list(found) for found in lines] == [["C1"]] + [["C0", "C1"]] * 4
    times = np.linspace(0, 1, 11)
    np.testing.assert_allclose(lines[1]["C0"], np.stack([times, 2 * times], 1))
    np.testing.assert_allclose(lines[4]["C0"], np.stack([np.linspace(0, 1, 8), np.full(8, 3)], 1))
    assert (lines[3]["C1"][:, 1] == 1e-8).all()                   # nothing left, on a log axis
    images = [ax.images[0].get_array() for ax in figures["distances.png"].axes if ax.get_title()]
    for image, run in zip(images, "ab", strict=True):
        np.testing.assert_array_equal(image, results[run]["curves"]["distances"])


# ------------------------------------------------------------------------- CADD's probe


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"free": ["--embed_norm", "0"], "mdlm": ["--hint", "none"],
                        "vp": ["--hint", "vp", "--embed_norm", "0.2"]}.items():
        common.main(cadd, [*TINY, "--data_dir", str(folder / "data"), "--out", str(folder / name),
                           *flags])
    return folder


@pytest.mark.parametrize("name", ["free", "vp"])
def test_cadds_probe(runs, monkeypatch, name):
    """Noise, embeddings and cross-entropy as defined, the latter against a fixed prediction."""
    seen, log_p = [], torch.randn(27, generator=torch.Generator().manual_seed(0)).log_softmax(-1)

    def features(self, x_t, z_t, masked, t):
        seen.append((x_t, z_t, masked, t))
        return torch.zeros(*x_t.shape, 1)
    monkeypatch.setattr(cadd.CADD, "features", features)
    monkeypatch.setattr(cadd.CADD, "logits", lambda self, h: log_p.expand(len(h), 27))
    flags = ["--device", "cpu", "--data_dir", str(runs / "data")]
    cfg, ddp, model, data, _ = common.open_run(cadd, str(runs / name), flags)
    times = metrics.PROBE_TIMES
    probe = cadd.probe(model, cfg, data, ddp, times)
    weights = torch.load(runs / name / "checkpoint.pt", weights_only=True)["ema"]["params"]
    table = weights["net.embed.weight"][:27]
    if name == "vp":
        table = torch.nn.functional.normalize(table, dim=-1) * 0.8
    assert torch.allclose(probe["embeddings"], table) and not probe["embeddings"].requires_grad
    np.testing.assert_allclose(times, np.arange(0.02, 1, 0.04))
    signal, sigma = (1 - times, times) if name == "free" else (np.cos(np.pi / 2 * times),
                                                              np.sin(np.pi / 2 * times))
    np.testing.assert_allclose(probe["signal"], signal)
    np.testing.assert_allclose(probe["sigma"], sigma * cfg.hint_noise)
    assert cfg.hint_noise != 1
    assert len(seen) == 8 * 25                                    # 64 sequences, eight at a time
    tokens, noise = probe["tokens"], None
    assert tokens.shape[1] == 16 and 64 < len(tokens) <= 10_000
    # Batch 3 at time k: z_t recombines to one noise, the same for all k where it is masked
    chosen = torch.from_numpy(tokens[np.arange(64) * len(tokens) // 64][24:32]).long()
    z0, nll, total = table[chosen], np.zeros(25), np.zeros(25)
    before = None
    for k, (x_t, z_t, masked, t) in enumerate(seen[75:100]):
        assert torch.allclose(t, torch.tensor(times[k], dtype=torch.float32))
        assert torch.equal(x_t, torch.where(masked, 27, chosen))
        eps = (z_t - float(signal[k]) * z0) / float(sigma[k])
        assert torch.allclose(z_t[~masked], z0[~masked])
        if noise is not None:
            assert not (before & ~masked).any()                   # the same places, and more
            assert torch.allclose(eps[before], noise[before], atol=1e-4)
        before, noise = masked, eps
    assert abs(noise[masked].std().item() / cfg.hint_noise - 1) < 0.05
    assert 0.9 < masked.double().mean() <= 1
    for i, (x_t, _, masked, _) in enumerate(seen):
        rows = torch.from_numpy(tokens[np.arange(64) * len(tokens) // 64]).long()
        x0 = rows[8 * (i // 25):8 * (i // 25) + 8]
        nll[i % 25] -= log_p[x0[masked]].double().sum().item()
        total[i % 25] += masked.sum().item()
    np.testing.assert_allclose(probe["cross_entropy"], nll / total, rtol=1e-6)


def test_the_command(runs, capsys, tmp_path, figures):
    flags = ["--data_dir", str(runs / "data"), "--device", "cpu"]
    metrics.main(["collapse", str(runs / "free"), str(runs / "vp"), *flags])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| run | method | V x D |") and "| ANI |" in lines[0]
    assert lines[2].startswith("| free | cadd | 27 x 16 |") and lines[3].startswith("| vp | cadd")
    assert "| 0.800 |" in lines[3]                                # the norm: 0.2 sqrt(16)
    kept = json.loads((runs / "free" / "collapse.json").read_text())
    assert len(kept["vp"]["dgs"]) == 25 and kept["free"]["figures"]["V"] == 27
    assert lines[4:] == [str(runs / "free" / name) for name in ("collapse.png", "distances.png")]
    assert [len(figures[name].axes) for name in ("collapse.png", "distances.png")] == [5, 4]
    metrics.main(["collapse", str(runs / "vp"), *flags, "--out", str(tmp_path / "new")])
    assert (tmp_path / "new" / "collapse.png").exists()


def test_without_matplotlib_there_are_figures_and_a_hint(runs, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    metrics.main(["collapse", str(runs / "vp"), "--data_dir", str(runs / "data"), "--device", "cpu",
                  "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert "| vp | cadd |" in printed.out and "pip install matplotlib" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["collapse.json"]


def test_one_diagnosis_for_three_papers(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "GLYPH_SPLITS", {"train": 480, "valid": 32, "test": 32})
    monkeypatch.setattr(metrics.TokenClassifier, "steps", 5)      # catdm.py's report
    tiny = ["--device", "cpu", "--steps", "2", "--samples", "1", "--depth", "1", "--heads", "2",
            "--eval_sequences", "4", "--embed_dim", "8"]
    common.main(difformer, [*tiny, "--dim", "16", "--ffn", "16", "--batch_tokens", "192",
                            "--max_number", "99", "--vocab", "300", "--K", "4", "--early_stop", "1",
                            "--out", str(tmp_path / "difformer")])
    common.main(catdm, [*tiny, "--dim", "16", "--batch_size", "8", "--sample_steps", "2",
                        "--data_dir", str(tmp_path / "data"), "--out", str(tmp_path / "catdm")])
    capsys.readouterr()
    folders = [str(tmp_path / "catdm"), str(tmp_path / "difformer")]
    metrics.main(["collapse", *folders, "--data_dir", str(tmp_path / "data"), "--device", "cpu"])
    lines = [[cell.strip() for cell in line.split("|")] for line in
             capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line[1:4] for line in lines[2:]] == [
        ["catdm", "catdm", "256 x 8"], ["difformer", "difformer", "300 x 8"]]
    column = next(i for i, name in enumerate(lines[0]) if name.startswith("variance of EMB"))
    assert lines[2][column] and not lines[3][column]              # sentences vary in length


def test_the_command_refuses(runs, tmp_path):
    flags = ["--data_dir", str(runs / "data"), "--device", "cpu"]
    with pytest.raises(RunError, match="mdlm is an MDLM"):
        metrics.main(["collapse", str(runs / "mdlm"), *flags])
    with pytest.raises(RunError, match="not a run folder"):
        metrics.main(["collapse", str(tmp_path), *flags])
    common.write_checkpoint(tmp_path / "checkpoint.pt", dict(method="vadd"))
    with pytest.raises(RunError, match="vadd learns no embeddings that are diffused"):
        metrics.main(["collapse", str(tmp_path), *flags])
    common.write_checkpoint(tmp_path / "checkpoint.pt", dict(method="os"))
    with pytest.raises(RunError, match="was made by os.py, and there is no such script here"):
        metrics.main(["collapse", str(tmp_path), *flags])
    (tmp_path / "checkpoint.pt").write_bytes(b"PK")
    with pytest.raises(RunError, match="truncated or not a checkpoint"):
        metrics.main(["collapse", str(tmp_path), *flags])
    assert not hasattr(vadd, "probe")
