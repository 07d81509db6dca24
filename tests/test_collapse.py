"""eval.py collapse: embeddings with known answers, what the scripts hand over, the pictures."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

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


def made_probe(table, **more):
    """A probe with these embeddings; signal from 1 to 0 while the noise grows from 0 to 1."""
    times = np.linspace(0, 1, 11)
    return dict(name="made", method="cadd", embeddings=table, times=times, cross_entropy=2 * times,
                signal=1 - times, sigma=times, **more)


# ------------------------------------------------------------------------- figures


def test_collapsed_embeddings():
    table = torch.full((50, 8), 0.3) * torch.arange(1.0, 9)       # all rows alike, not 0
    result = metrics.collapse(made_probe(table, tokens=torch.arange(50).view(10, 5)))
    f = result["figures"]
    assert (f["V"], f["D"], f["spread"], f["effective_rank"]) == (50, 8, 0, 0)
    assert f["ani"] == pytest.approx(1) and f["variance_largest"] < 1e-12
    assert result["curves"]["distances"].max() == 0
    assert f["norm"] == pytest.approx(0.3 * math.sqrt(204))
    assert f["dgs"] == pytest.approx(1 / 50)                      # a tie: always the same guess


def test_orthogonal_embeddings():
    table = 3.0 * torch.eye(8)
    result = metrics.collapse(made_probe(table))
    f, c = result["figures"], result["curves"]
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
    f = metrics.collapse(made_probe(table))["figures"]
    assert f["effective_rank"] == pytest.approx(D / (1 + D / V), rel=0.01)
    assert f["spread"] == pytest.approx(1, abs=0.01) and f["ani"] == pytest.approx(0, abs=0.005)
    shifted = table + torch.full((D,), D**-0.5)                   # the mean has norm 1, too
    f = metrics.collapse(made_probe(shifted))["figures"]
    assert f["spread"] == pytest.approx(0.5, abs=0.02)
    assert f["effective_rank"] == pytest.approx(D / (1 + D / V), rel=0.01)
    assert f["ani"] == pytest.approx(0.5, abs=0.03)


def test_dgs_of_two_embeddings_in_closed_form():
    """+-e: the degenerate model takes the sign of z e, so DGS_t = Phi(signal |e| / sigma)."""
    table = 0.7 * torch.nn.functional.normalize(torch.ones(2, 6), dim=-1)
    table[1] *= -1
    c = metrics.collapse(made_probe(table))["curves"]
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
    f = metrics.collapse(made_probe(table, tokens=tokens.numpy()))["figures"]
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


def test_ticks_are_round():
    assert metrics.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert metrics.ticks(0.02, 0.98) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert metrics.ticks(0, 3.2) == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5, 3])
    for low, high in [(0, 7), (-3, 11), (0, 1e-3), (5, 5.5), (0, 940)]:
        found = metrics.ticks(low, high)
        assert 4 <= len(found) <= 10 and low <= min(found) and max(found) <= high * (1 + 1e-9)


def near(pixels, x, y, colour):
    """Is there a pixel of about this colour within two of (x, y)?"""
    part = pixels[round(y) - 2:round(y) + 3, round(x) - 2:round(x) + 3].astype(int)
    return (np.abs(part - colour).max(-1) < 60).any()


@pytest.mark.parametrize("log", [False, True])
def test_line_plot_puts_points_where_they_belong(log):
    x = np.linspace(0, 2, 9)
    y = 10 ** (-x) if log else x / 1.05                            # falls, or rises to the top
    pixels = np.asarray(metrics.line_plot([("#ff0000", x, y), ("#0000ff", x, y * 0 + 0.1)],
                                          "title", "x", log))
    H, W = metrics.PANEL[1], metrics.PANEL[0]
    assert pixels.shape == (H, W, 3)
    left, right, top, bottom = 55, W - 15, 30, H - 45
    for part in (0.2, 0.5, 0.75):
        place = left + part * (right - left)
        height = 1 - part if log else part / 1.05 / 1.0
        assert near(pixels, place, bottom - height * (bottom - top), (255, 0, 0))
        height = 0.5 if log else 0.1 / 2
        assert near(pixels, place, bottom - height * (bottom - top), (0, 0, 255)) or part == 0.5
    assert (pixels[top:bottom, left + 4:right - 4] != 255).any() and (pixels[:, :9] == 255).all()


def test_plots_of_next_to_nothing():
    for log in (False, True):
        metrics.line_plot([("#ff0000", [0.0], [0.0])], "", "", log)
    pixels = np.asarray(metrics.heat_map(torch.zeros(3, 3), "none"))
    assert (pixels[100, metrics.PANEL[0] // 2] == 255).all()


def test_heat_map_and_panels(tmp_path):
    matrix = torch.tensor([[0.0, 4.0], [2.0, 0.0]])
    image = metrics.heat_map(matrix, "two")
    pixels = np.asarray(image).astype(int)
    W, H = metrics.PANEL
    left, side = W // 2 - (2 * H - 130) // 4, (2 * H - 130) // 2
    quarters = [[pixels[30 + y, left + x, 0] for x in (side // 4, 3 * side // 4)]
                for y in (side // 4, 3 * side // 4)]
    assert quarters[0] == [255, 0] and 126 <= quarters[1][0] <= 128 and quarters[1][1] == 255
    metrics.save_panels(tmp_path / "sheet.png", [image] * 4, 3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * H, 3 * W, 3)
    np.testing.assert_array_equal(sheet[H:, :W], pixels)
    assert (sheet[H:, W:] == 255).all()


# ------------------------------------------------------------------------- CADD's probe


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"free": ["--embed_norm", "0"], "mdlm": ["--hint", "none"],
                        "vp": ["--hint", "vp", "--embed_norm", "0.2"]}.items():
        cadd.main([*TINY, "--data_dir", str(folder / "data"), "--out", str(folder / name), *flags])
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
    probe = cadd.probe(str(runs / name), ["--device", "cpu", "--data_dir", str(runs / "data")])
    weights = torch.load(runs / name / "checkpoint.pt", weights_only=True)["ema"]["params"]
    table = weights["net.embed.weight"][:27]
    if name == "vp":
        table = torch.nn.functional.normalize(table, dim=-1) * 0.8
    assert torch.allclose(probe["embeddings"], table) and not probe["embeddings"].requires_grad
    times = probe["times"]
    np.testing.assert_allclose(times, np.arange(0.02, 1, 0.04))
    signal, sigma = (1 - times, times) if name == "free" else (np.cos(np.pi / 2 * times),
                                                              np.sin(np.pi / 2 * times))
    np.testing.assert_allclose(probe["signal"], signal)
    np.testing.assert_allclose(probe["sigma"], sigma)
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
    assert abs(noise[masked].std().item() - 1) < 0.05 and 0.9 < masked.double().mean() <= 1
    for i, (x_t, _, masked, _) in enumerate(seen):
        rows = torch.from_numpy(tokens[np.arange(64) * len(tokens) // 64]).long()
        x0 = rows[8 * (i // 25):8 * (i // 25) + 8]
        nll[i % 25] -= log_p[x0[masked]].double().sum().item()
        total[i % 25] += masked.sum().item()
    np.testing.assert_allclose(probe["cross_entropy"], nll / total, rtol=1e-6)


def test_the_command(runs, capsys, tmp_path):
    flags = ["--data_dir", str(runs / "data"), "--device", "cpu"]
    metrics.main(["collapse", str(runs / "free"), str(runs / "vp"), *flags])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| run | method | V x D |") and "| ANI |" in lines[0]
    assert lines[2].startswith("| free | cadd | 27 x 16 |") and lines[3].startswith("| vp | cadd")
    assert "| 0.800 |" in lines[3]                                # the norm: 0.2 sqrt(16)
    kept = json.loads((runs / "free" / "collapse.json").read_text())
    assert len(kept["vp"]["dgs"]) == 25 and kept["free"]["figures"]["V"] == 27
    sizes = [Image.open(runs / "free" / name).size for name in ("collapse.png", "distances.png")]
    W, H = metrics.PANEL
    assert sizes == [(3 * W, 2 * H), (2 * W, H)]
    metrics.main(["collapse", str(runs / "vp"), *flags, "--out", str(tmp_path / "new")])
    assert (tmp_path / "new" / "collapse.png").exists()


def test_one_diagnosis_for_three_papers(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "GLYPH_SPLITS", {"train": 480, "valid": 32, "test": 32})
    tiny = ["--device", "cpu", "--steps", "2", "--samples", "1", "--depth", "1", "--heads", "2",
            "--eval_sequences", "4", "--embed_dim", "8"]
    difformer.main([*tiny, "--dim", "16", "--ffn", "16", "--batch_tokens", "192", "--max_number",
                    "99", "--vocab", "300", "--K", "4", "--early_stop", "1", "--out",
                    str(tmp_path / "difformer")])
    catdm.main([*tiny, "--dim", "16", "--batch_size", "8", "--sample_steps", "2", "--data_dir",
                str(tmp_path / "data"), "--out", str(tmp_path / "catdm")])
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
    with pytest.raises(RunError, match="os learns no embeddings"):
        metrics.main(["collapse", str(tmp_path), *flags])
    (tmp_path / "checkpoint.pt").write_bytes(b"PK")
    with pytest.raises(RunError, match="truncated or not a checkpoint"):
        metrics.main(["collapse", str(tmp_path), *flags])
    assert not hasattr(vadd, "probe")
