"""Images as tokens, the VQGAN with its public names, and the pictures and figures of collapse."""
import gzip
import json
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import vq_mnist
from data import DataError, ImageTokens, load_images


FEW = {"train": 480, "valid": 96, "test": 32}


@pytest.fixture(autouse=True)
def small_and_alone(monkeypatch, tmp_path):
    """No network, and few glyphs."""
    monkeypatch.setenv("CATDIFF_MIRROR", (tmp_path / "nowhere").as_uri())
    monkeypatch.setenv("CATDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "GLYPH_SPLITS", FEW)


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "GLYPH_SPLITS", FEW)
        return load_images("glyphs", tmp_path_factory.mktemp("glyphs"))


# ---------------------------------------------------------------- patches and codes


def test_patches_are_row_major_and_draw_is_their_inverse():
    image = np.arange(24, dtype=np.uint8).reshape(1, 4, 6)
    patches = data.cut_patches(image, 2)
    assert patches.shape == (1, 6, 4)
    assert patches[0].tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11],
                                   [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23]]
    ids = np.array([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
    tokens = ImageTokens("six", {"train": ids}, {"train": None}, (), 6, (2, 3),
                         patches[0].reshape(6, 2, 2))
    drawn = tokens.draw(ids)
    assert drawn.shape == (2, 4, 6) and drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[0], image[0])
    np.testing.assert_array_equal(data.cut_patches(drawn, 2)[1], patches[0][::-1])


def test_nearest_code_by_brute_force_with_ties():
    rng = np.random.default_rng(0)
    x, codes = rng.integers(0, 256, (70_000, 3)), rng.integers(0, 256, (9, 3)).astype(np.uint8)
    codes[7] = codes[2]  # the first of equals wins
    brute = ((x[:, None] - codes.astype(int)) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(data.nearest_code(x, codes), brute)


def test_learn_codes_finds_separate_clusters_and_sorts_them():
    rng = np.random.default_rng(1)
    centres = np.array([[10, 10], [10, 240], [200, 30], [230, 230]])
    x = (centres[rng.integers(0, 4, 4000)] + rng.integers(-9, 10, (4000, 2))).astype(np.uint8)
    codes = data.learn_codes(x, 4)
    assert codes.dtype == np.uint8 and np.abs(codes[[0, 1, 2, 3]].astype(int)
                                              - centres[[0, 2, 1, 3]]).max() <= 1
    # the means that k-means ends with, rounded
    own = data.nearest_code(x, codes)
    means = [np.rint(x[own == k].mean(0)) for k in range(4)]
    np.testing.assert_array_equal(codes, means)
    np.testing.assert_array_equal(codes, data.learn_codes(x, 4))
    with pytest.raises(DataError, match="only 2 different patches, not 3"):
        data.learn_codes(np.array([[0, 0], [1, 1], [0, 0]], np.uint8), 3)


# ---------------------------------------------------------------- glyphs and MNIST


def test_glyphs_are_a_function_of_seed_and_index():
    few, classes = data.draw_glyphs("01AB", 8, 3)
    many, _ = data.draw_glyphs("01AB", 40, 3)
    np.testing.assert_array_equal(few, many[:8])
    assert classes.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    other, _ = data.draw_glyphs("01AB", 8, 4)
    assert not (few == other).all((1, 2)).any() and not (few[:4] == few[4:]).all((1, 2)).any()


def test_glyphs_move_scale_and_shear_within_the_image():
    images, _ = data.draw_glyphs("L", 300, 0)
    ink = images.astype(float)
    assert (ink.max((1, 2)) > 200).all() and ink[:, [0, -1]].max() < 128  # whole, seen
    where = np.arange(24)
    total = ink.sum((1, 2))
    x, y = (ink.sum(1) * where).sum(1) / total, (ink.sum(2) * where).sum(1) / total
    assert 1 < x.std() < 2.5 and 1 < y.std() < 2.5                # +-2.4 pixels, uniform: 1.39
    # An L's stem leans with the shear: upper ink against lower ink, +-.3 of the height between
    rows = np.stack([(i[5:9].sum(0) * where).sum() / max(1, i[5:9].sum())
                     - (i[11:13].sum(0) * where).sum() / max(1, i[11:13].sum()) for i in ink])
    assert rows.min() < -0.7 and rows.max() > 0.7
    height = [np.ptp(np.flatnonzero(i.max(1) > 128)) + 1 for i in ink]
    assert min(height) <= 13 and max(height) >= 16


def test_glyphs_set(glyphs):
    assert (glyphs.vocab_size, glyphs.shape, glyphs.length) == (256, (6, 6), 36)
    assert glyphs.classes == tuple("0123456789ABCDEF")
    assert {s: x.shape for s, x in glyphs.splits.items()} == {
        "train": (480, 36), "valid": (96, 36), "test": (32, 36)}
    for seed, split in enumerate(glyphs.splits):
        images, labels = data.draw_glyphs("0123456789ABCDEF", len(glyphs.splits[split]), seed)
        np.testing.assert_array_equal(glyphs.labels[split], labels)
        assert glyphs.labels[split].dtype == np.int64
        error = glyphs.draw(glyphs.splits[split]).astype(float) - images
        psnr = 10 * np.log10(255**2 / (error**2).mean())
        assert psnr > 21                                          # black alone has 10
        # each token is the nearest code, so any other token is no better
        x = data.cut_patches(images, 4)[:5].astype(int)
        codes = glyphs.pixels.reshape(256, 16).astype(int)
        brute = ((x[:, :, None] - codes) ** 2).sum(-1).argmin(-1)
        np.testing.assert_array_equal(glyphs.splits[split][:5], brute)


def test_prepared_once_damaged_rebuilt_read_only_elsewhere(tmp_path, monkeypatch, capsys):
    first = load_images("glyphs36", tmp_path)
    assert "preparing glyphs36" in capsys.readouterr().err and len(first.classes) == 36
    file = tmp_path / "glyphs36" / "tokens.npz"
    assert sorted(p.name for p in file.parent.iterdir()) == [".preparing", "tokens.npz"]

    def same(a, b):
        return all(np.array_equal(a.splits[s], b.splits[s]) for s in a.splits)
    assert same(first, load_images("glyphs36", tmp_path)) and capsys.readouterr().err == ""
    raw = file.read_bytes()
    for damage in (raw[:5000], b"no zip", raw[:2000] + bytes(3000) + raw[5000:]):
        file.write_bytes(damage)
        assert same(first, load_images("glyphs36", tmp_path))
        assert "preparing" in capsys.readouterr().err and file.read_bytes() == raw
    monkeypatch.setattr(data, "IMAGE_VERSION", "2")
    load_images("glyphs36", tmp_path)
    assert "preparing" in capsys.readouterr().err
    monkeypatch.setitem(data.IMAGES, "glyphs36",
                        data.ImageRecipe(data.glyph_images, "01", 3, 64))
    assert load_images("glyphs36", tmp_path).vocab_size == 64
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o555)
    load_images("glyphs36", tmp_path / "closed")
    assert (tmp_path / "cache" / "glyphs36" / "tokens.npz").exists()
    monkeypatch.setattr(data, "writable", lambda folder: False)
    with pytest.raises(DataError, match="set --data_dir"):
        load_images("glyphs", tmp_path)


def test_a_failed_preparation_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        Path(args[0]).write_bytes(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="disk full"):
        load_images("glyphs", tmp_path)
    assert [p.name for p in (tmp_path / "glyphs").iterdir()] == [".preparing"]


def test_no_freetype_no_pillow(tmp_path, monkeypatch):
    from PIL import features
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(DataError, match="without FreeType: pip install"):
        load_images("glyphs", tmp_path)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DataError, match="pip install pillow"):
        load_images("glyphs", tmp_path)


def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(head + array.tobytes(), 1))


def test_mnist_from_files_of_any_order(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    few = np.random.default_rng(0).integers(0, 256, (97, 28, 28), dtype=np.uint8)
    images, labels = np.resize(few, (60_000, 28, 28)), (np.arange(60_000) % 7).astype(np.uint8)
    write_idx(folder / "train-images-idx3-ubyte.gz", images)
    write_idx(folder / "train-labels-idx1-ubyte.gz", labels)
    write_idx(folder / "t10k-images-idx3-ubyte.gz", images[:10_000] // 2)
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", labels[5:10_005])
    shop = data.Workshop([folder], folder, folder, 0)
    made = data.mnist_images(shop, "")
    np.testing.assert_array_equal(made["train"][0], images[:55_000])
    np.testing.assert_array_equal(made["train"][1], labels[:55_000])
    np.testing.assert_array_equal(made["valid"][0], images[55_000:])
    np.testing.assert_array_equal(made["valid"][1], labels[55_000:])
    np.testing.assert_array_equal(made["test"][0], images[:10_000] // 2)
    np.testing.assert_array_equal(made["test"][1], labels[5:10_005])

    test_labels = folder / "t10k-labels-idx1-ubyte.gz"
    good = test_labels.read_bytes()
    for bad in (good[:100], b"", b"no gzip", gzip.compress(b"\0\0\x0d\1" + bytes(8)),
                gzip.compress(b""), good[:-20] + bytes(20)):
        test_labels.write_bytes(bad)
        with pytest.raises(DataError, match="t10k-labels.* is damaged .*remove it"):
            data.read_idx(test_labels)
    write_idx(test_labels, labels[:9_999])
    with pytest.raises(DataError, match=r"shape \(9999,\), which is not MNIST's"):
        data.mnist_images(shop, "")


def test_mnist_downloads_are_checked(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="cannot download .*train-images"):
        load_images("mnist", tmp_path)
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    write_idx(mirror / "train-images-idx3-ubyte.gz", np.zeros((60_000, 1, 1), np.uint8))
    monkeypatch.setenv("CATDIFF_MIRROR", mirror.as_uri())
    with pytest.raises(DataError, match="not the file expected"):
        load_images("mnist", tmp_path)
    assert not list((tmp_path / "mnist").glob("*.gz*"))


# ---------------------------------------------------------------- tokens of one's own


def test_own_tokens_are_split_once_each_with_their_labels(tmp_path):
    path, labels = tmp_path / "tokens.npy", tmp_path / "labels.npy"
    ids = np.arange(400)[:, None] % 100 * np.ones((1, 9), int)    # image i is all i mod 100
    np.save(path, ids.astype(np.uint16))
    np.save(labels, np.arange(400) % 100)
    own = load_images(str(path), labels=str(labels))
    assert (own.shape, own.vocab_size, own.pixels, len(own.classes)) == ((3, 3), 100, None, 100)
    assert own.draw(own.splits["train"]) is None
    assert {s: len(x) for s, x in own.splits.items()} == {"valid": 20, "test": 20, "train": 360}
    for split, x in own.splits.items():
        np.testing.assert_array_equal(x[:, 4], own.labels[split])
    everything = np.concatenate([x[:, 0] for x in own.splits.values()])
    assert np.bincount(everything).tolist() == [4] * 100
    assert own.labels["valid"].tolist() != list(range(20))        # shuffled
    bare = load_images(str(path))
    assert bare.classes == () and set(bare.labels.values()) == {None}

    np.save(path, ids.reshape(-1, 1, 9))
    (tmp_path / "tokens.json").write_text(json.dumps(
        {"vocab_size": 1024, "classes": [f"c{i}" for i in range(100)]}))
    own = load_images(str(path), labels=str(labels))
    assert (own.shape, own.vocab_size, own.classes[3]) == ((1, 9), 1024, "c3")


@pytest.mark.parametrize("ids, labels, meta, message", [
    (np.zeros((9, 8), int), None, None, r"\(N, L\), L a square, .*\(9, 8\)"),
    (np.zeros((9, 2, 2, 2), int), None, None, "L a square"),
    (np.zeros((9, 4)), None, None, "must hold integers; it has float64"),
    (np.zeros((0, 4), int), None, None, "must hold integers"),
    (np.zeros((2, 4), int), None, None, "holds 2 images"),
    (np.full((9, 4), -1), None, None, "tokens -1 to -1"),
    (np.full((9, 4), 8), None, {"vocab_size": 8}, r"tokens 8 to 8; they must lie in 0..7"),
    (np.zeros((9, 4), int), np.zeros(8, int), None, "must hold 9 classes"),
    (np.zeros((9, 4), int), np.full(9, -1), None, "must hold 9 classes"),
    (np.zeros((9, 4), int), np.full(9, 1), {"classes": ["one"]}, "labels in 0..0"),
    (np.zeros((9, 4), int), None, "{", "tokens.json cannot be read"),
])
def test_own_tokens_errors(tmp_path, ids, labels, meta, message):
    np.save(tmp_path / "tokens.npy", ids)
    if labels is not None:
        np.save(tmp_path / "labels.npy", labels)
    if meta:
        (tmp_path / "tokens.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
    with pytest.raises(DataError, match=message):
        load_images(str(tmp_path / "tokens.npy"),
                    labels="" if labels is None else str(tmp_path / "labels.npy"))


def test_names_that_are_none(tmp_path):
    with pytest.raises(DataError, match="unknown image set 'glyph': choose one of glyphs, "):
        load_images("glyph", tmp_path)
    with pytest.raises(DataError, match="labels is for a tokens.npy"):
        load_images("glyphs", tmp_path, labels="labels.npy")
    with pytest.raises(DataError, match="missing.npy does not exist: .* vq-encode"):
        load_images(str(tmp_path / "missing.npy"))
    (tmp_path / "text.npy").write_text("text")
    with pytest.raises(DataError, match="text.npy cannot be read"):
        load_images(str(tmp_path / "text.npy"))


def test_rows_of_a_batch_and_the_tokenizer(glyphs):
    epoch = np.concatenate([glyphs.train_rows(5, k, 48, range(48)) for k in range(10)])
    assert sorted(epoch) == list(range(480)) and epoch.tolist() != list(range(480))
    part = glyphs.train_rows(5, 3, 48, [1, 3, 5])
    np.testing.assert_array_equal(part, epoch[144:192][[1, 3, 5]])
    assert not np.array_equal(glyphs.train_rows(6, 0, 48, range(48)), epoch[:48])
    kept = pickle.loads(pickle.dumps(glyphs.tokenizer()))
    again = ImageTokens.from_tokenizer(kept)
    ids = glyphs.splits["valid"][:2]
    np.testing.assert_array_equal(again.draw(ids), glyphs.draw(ids))
    assert (again.classes, again.shape) == (glyphs.classes, glyphs.shape)


def test_command_line_describes_and_draws(tmp_path, capsys):
    data.main(["glyphs", "--data_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "256 tokens, images of 6 x 6, 16 classes 0 1" in printed and "480 images" in printed
    grid = np.asarray(Image.open(tmp_path / "glyphs" / "examples.png"))
    glyphs = load_images("glyphs", tmp_path)
    counts = np.bincount(glyphs.splits["train"].ravel(), minlength=256) / (480 * 36)
    bits = -sum(p * np.log2(p) for p in counts if p)
    assert f"unigram entropy {bits:.3f} bits per token" in printed
    assert grid.shape == (3 * 6 * 24, 3 * 16 * 24)
    np.testing.assert_array_equal(grid[72:144:3, 72:144:3], glyphs.draw(glyphs.splits["valid"])[17])
    np.save(tmp_path / "own.npy", np.zeros((40, 4), int))
    data.main([str(tmp_path / "own.npy")])
    assert "1 tokens, images of 2 x 2, 0 classes\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: unknown dataset .*glyphs36"):
        data.main(["nonesuch"])


# ---------------------------------------------------------------- VQGAN


# f16-1024 as NOTES and the paper's appendix describe it: name, kind, channels in and out.
PUBLIC = """
encoder.conv_in 3x3 3 128
encoder.down.0.block.0 block 128 128
encoder.down.0.block.1 block 128 128
encoder.down.0.downsample.conv 3x3 128 128
encoder.down.1.block.0 block 128 128
encoder.down.1.block.1 block 128 128
encoder.down.1.downsample.conv 3x3 128 128
encoder.down.2.block.0 block 128 256
encoder.down.2.block.1 block 256 256
encoder.down.2.downsample.conv 3x3 256 256
encoder.down.3.block.0 block 256 256
encoder.down.3.block.1 block 256 256
encoder.down.3.downsample.conv 3x3 256 256
encoder.down.4.block.0 block 256 512
encoder.down.4.block.1 block 512 512
encoder.down.4.attn.0 attention 512 512
encoder.down.4.attn.1 attention 512 512
encoder.mid.block_1 block 512 512
encoder.mid.attn_1 attention 512 512
encoder.mid.block_2 block 512 512
encoder.norm_out norm 512 512
encoder.conv_out 3x3 512 256
quant_conv 1x1 256 256
post_quant_conv 1x1 256 256
decoder.conv_in 3x3 256 512
decoder.mid.block_1 block 512 512
decoder.mid.attn_1 attention 512 512
decoder.mid.block_2 block 512 512
decoder.up.4.block.0 block 512 512
decoder.up.4.block.1 block 512 512
decoder.up.4.block.2 block 512 512
decoder.up.4.attn.0 attention 512 512
decoder.up.4.attn.1 attention 512 512
decoder.up.4.attn.2 attention 512 512
decoder.up.4.upsample.conv 3x3 512 512
decoder.up.3.block.0 block 512 256
decoder.up.3.block.1 block 256 256
decoder.up.3.block.2 block 256 256
decoder.up.3.upsample.conv 3x3 256 256
decoder.up.2.block.0 block 256 256
decoder.up.2.block.1 block 256 256
decoder.up.2.block.2 block 256 256
decoder.up.2.upsample.conv 3x3 256 256
decoder.up.1.block.0 block 256 128
decoder.up.1.block.1 block 128 128
decoder.up.1.block.2 block 128 128
decoder.up.1.upsample.conv 3x3 128 128
decoder.up.0.block.0 block 128 128
decoder.up.0.block.1 block 128 128
decoder.up.0.block.2 block 128 128
decoder.norm_out norm 128 128
decoder.conv_out 3x3 128 3
"""


def public_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {"quantize.embedding.weight": (1024, 256)}

    def add(name, kind, c_in, c):
        if kind == "block":
            for part in (("norm1", "norm", c_in, c_in), ("conv1", "3x3", c_in, c),
                         ("norm2", "norm", c, c), ("conv2", "3x3", c, c)):
                add(f"{name}.{part[0]}", *part[1:])
            if c_in != c:
                add(f"{name}.nin_shortcut", "1x1", c_in, c)
        elif kind == "attention":
            add(f"{name}.norm", "norm", c, c)
            for part in ("q", "k", "v", "proj_out"):
                add(f"{name}.{part}", "1x1", c, c)
        else:
            side = {"3x3": (c_in, 3, 3), "1x1": (c_in, 1, 1), "norm": ()}[kind]
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (c, *side), (c,)

    for line in PUBLIC.split("\n"):
        if line:
            name, kind, c_in, c = line.split()
            add(name, kind, int(c_in), int(c))
    return shapes


def test_f16_1024_has_the_public_names_and_shapes():
    with torch.device("meta"):
        state = data.VQGAN().state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes == public_shapes()
    assert len(shapes) == 343
    assert sum(np.prod(shape) for shape in shapes.values()) == 72_141_699  # 72.142M


SMALL = dict(channels=32, multipliers=(1, 2, 1), blocks=1, attention=(0, 2), z_channels=16,
             embedding=8, codes=20, in_channels=1)


@pytest.fixture()
def small():
    """A small VQGAN whose codebook lies among its encoder's outputs, so that codes vary."""
    torch.manual_seed(0)
    model = data.VQGAN(**SMALL).eval().requires_grad_(False)
    for name, p in model.named_parameters():  # norms and biases too: each must matter
        p.add_(0.2 * torch.randn_like(p))
    z = model.quant_conv(model.encoder(torch.rand(5, 1, 8, 8) * 2 - 1))
    model.quantize.embedding.weight.copy_(z.movedim(1, -1).reshape(20, 8))
    return model


def reference(w: dict, x: torch.Tensor, levels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """The networks of SMALL's weights w, written out: x -> codes; codes -> image."""
    def conv(name, h, **kwargs):
        weight = w[f"{name}.weight"]
        kwargs = kwargs or dict(padding=weight.shape[-1] // 2)
        return F.conv2d(h, weight, w[f"{name}.bias"], **kwargs)

    def norm(name, h):
        g = h.reshape(len(h), 32, -1)
        g = (g - g.mean(-1, keepdim=True)) / (g.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return (g.reshape(h.shape) * w[f"{name}.weight"][:, None, None]
                + w[f"{name}.bias"][:, None, None])

    def swish(h):
        return h * torch.sigmoid(h)

    def block(name, h):
        r = conv(f"{name}.conv1", swish(norm(f"{name}.norm1", h)))
        r = conv(f"{name}.conv2", swish(norm(f"{name}.norm2", r)))
        return (conv(f"{name}.nin_shortcut", h) if f"{name}.nin_shortcut.bias" in w else h) + r

    def attention(name, h):
        n = norm(f"{name}.norm", h)
        q, k, v = (conv(f"{name}.{part}", n).flatten(2) for part in "qkv")     # (B, c, HW)
        score = torch.einsum("bci,bcj->bij", q, k) * q.shape[1] ** -0.5
        out = torch.einsum("bij,bcj->bci", score.softmax(-1), v)
        return h + conv(f"{name}.proj_out", out.reshape(h.shape))

    def level(name, h):
        j = 0
        while f"{name}.block.{j}.norm1.bias" in w:
            h = block(f"{name}.block.{j}", h)
            if f"{name}.attn.{j}.q.bias" in w:
                h = attention(f"{name}.attn.{j}", h)
            j += 1
        return h

    def middle(name, h):
        return block(f"{name}.block_2", attention(f"{name}.attn_1", block(f"{name}.block_1", h)))

    h = conv("encoder.conv_in", x)
    for i in range(levels):
        h = level(f"encoder.down.{i}", h)
        if i < levels - 1:
            h = torch.cat([h, torch.zeros_like(h[..., :1])], -1)
            h = torch.cat([h, torch.zeros_like(h[..., :1, :])], -2)
            h = conv(f"encoder.down.{i}.downsample.conv", h, stride=2)
    h = conv("encoder.conv_out", swish(norm("encoder.norm_out", middle("encoder.mid", h))))
    z = conv("quant_conv", h)
    table = w["quantize.embedding.weight"]
    codes = (z.movedim(1, -1)[..., None, :] - table).square().sum(-1).argmin(-1)
    h = conv("decoder.conv_in", conv("post_quant_conv", table[codes].movedim(-1, 1)))
    h = middle("decoder.mid", h)
    for i in reversed(range(levels)):
        h = level(f"decoder.up.{i}", h)
        if i:
            h = h.repeat_interleave(2, -1).repeat_interleave(2, -2)
            h = conv(f"decoder.up.{i}.upsample.conv", h)
    return codes, conv("decoder.conv_out", swish(norm("decoder.norm_out", h)))


def test_networks_against_a_second_implementation(small):
    x = torch.rand(3, 1, 16, 12) * 2 - 1
    codes, image = reference(small.double().state_dict(), x.double())
    assert codes.shape == (3, 4, 3) and len(codes.unique()) > 3
    assert torch.equal(small.encode(x.double()), codes)
    assert torch.allclose(small.decode(codes), image, atol=1e-9)
    assert image.shape == (3, 1, 16, 12)


def test_codes_survive_an_invertible_decoder():
    """Networks replaced by cutting into patches: what is left must return every code in place."""
    model = data.VQGAN(**SMALL | dict(embedding=16))
    model.encoder, model.decoder = torch.nn.PixelUnshuffle(4), torch.nn.PixelShuffle(4)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    with torch.no_grad():
        model.quant_conv.weight.copy_(turn[:, :, None, None])
        model.post_quant_conv.weight.copy_(turn.T[:, :, None, None])
        model.quant_conv.bias.fill_(0.5)
        model.post_quant_conv.bias.copy_(-(turn.T @ model.quant_conv.bias))
        model.quantize.embedding.weight.normal_()
    codes = torch.arange(20).reshape(1, 4, 5)
    image = model.decode(codes)
    assert image.shape == (1, 1, 16, 20) and torch.equal(model.encode(image), codes)
    patch = (turn.T @ (model.quantize.embedding.weight[7] - 0.5)).view(4, 4)  # row 1, column 2
    assert torch.allclose(image[0, 0, 4:8, 8:12], patch, atol=1e-5)
    assert not torch.equal(model.encode(image.flip(-1)), codes)


def test_straight_through_gradients(small):
    """Reconstruction: gradient reaches the encoder as if z were decoded, and not the codebook."""
    small.double().requires_grad_(True)
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64) * 2 - 1
    image, codebook, commitment, codes = small(x)
    assert torch.allclose(image, small.decode(codes), atol=1e-9)
    z = small.quant_conv(small.encoder(x))
    e = small.quantize.embedding(codes).movedim(-1, 1)
    assert torch.isclose(codebook, (z - e).square().mean()) and codebook == commitment
    weight = small.quantize.embedding.weight
    encoder = small.encoder.conv_in.weight

    def gradient(value, to):
        return torch.autograd.grad(value, to, retain_graph=True, allow_unused=True)[0]
    assert gradient(image.sum(), weight) is None
    direct = z.detach().clone().requires_grad_()
    through = gradient(small.decoder(small.post_quant_conv(e.detach() + direct - z.detach())).sum(),
                       direct)
    assert torch.allclose(gradient(image.sum(), encoder), gradient((z * through).sum(), encoder),
                          atol=1e-8)
    assert gradient(codebook, encoder) is None and gradient(codebook, weight) is not None
    assert gradient(commitment, weight) is None and gradient(commitment, encoder) is not None


def lightning(model, path, prefix="", **more):
    """A checkpoint as the public ones: objects of another library, and tensors of the loss."""
    module = types.ModuleType("lightning_like")

    class Callback:
        def __init__(self):
            self.best = 3.5
    Callback.__module__, Callback.__qualname__ = "lightning_like", "Callback"
    module.Callback = sys.modules.setdefault("lightning_like", module).Callback = Callback
    weights = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save({"state_dict": weights | {"loss.logvar": torch.zeros(())}, "epoch": 3,
                "callbacks": {Callback: Callback()}, **more}, path)
    del sys.modules["lightning_like"]


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_checkpoints_of_lightning_load_without_it(small, tmp_path, prefix):
    path = tmp_path / "last.ckpt"
    lightning(small, path, prefix)
    if prefix:
        state = torch.load(path, weights_only=False, pickle_module=data.INERT)
        state["state_dict"]["transformer.head.weight"] = torch.zeros(3)
        torch.save(state["state_dict"], path)  # bare weights will do, too
    loaded = data.load_vqgan(path)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    x = torch.rand(4, 1, 32, 32) * 2 - 1
    codes = small.encode(x)
    assert torch.equal(loaded.encode(x), codes) and len(codes.unique()) > 3
    assert torch.equal(loaded.decode(codes), small.decode(codes))
    config = data.vqgan_config(small.state_dict())
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()} == SMALL


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_runs_no_code(small, tmp_path):
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.ckpt"
        torch.save({"callbacks": Attack(str(tmp_path / "attacked")),
                    "state_dict": small.state_dict()}, path, _use_new_zipfile_serialization=zipped)
        assert data.load_vqgan(path).vocab_size == 20
    assert not (tmp_path / "attacked").exists()


def test_wrong_checkpoints_are_one_line(small, tmp_path):
    path = tmp_path / "last.ckpt"
    lightning(small, path)
    raw, weights = path.read_bytes(), small.state_dict()

    def refused(content, message):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(DataError, match=message) as error:
            data.load_vqgan(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)

    refused(raw[:len(raw) // 2], "truncated or not a checkpoint")
    refused(b"", "truncated or not a checkpoint")
    refused(b"hello, world\n" * 9, "truncated or not a checkpoint")
    refused([1, 2], "truncated or not a checkpoint")
    refused({"state_dict": {"a": torch.zeros(2)}}, "not a VQGAN .*encoder.conv_in.weight")
    refused({"state_dict": {k: v for k, v in weights.items() if "quant_conv" not in k}},
            "not a VQGAN .*Missing key.*quant_conv")
    refused({"state_dict": weights | {"quantize.embed.weight": torch.zeros(2, 2)}},
            "Unexpected key.*quantize.embed.weight")
    refused({"state_dict": weights | {"quant_conv.bias": torch.zeros(3)}}, "size mismatch")
    with pytest.raises(DataError, match="no VQGAN checkpoint at .*vq_mnist.py"):
        data.load_vqgan(tmp_path / "missing.ckpt")


@pytest.fixture()
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in [("cat/b.png", (20, 16)), ("cat/a.PNG", (16, 16)), ("ant/z.jpg", (16, 40)),
                        ("bee/nested/1.png", (32, 32))]:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, format="JPEG" if "jpg" in name else "PNG")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def test_encode_and_decode_folders(small, photographs, tmp_path, capsys):
    lightning(small, tmp_path / "last.ckpt")
    out = tmp_path / "made" / "tokens.npy"
    data.main(["vq-encode", str(photographs), "--ckpt", str(tmp_path / "last.ckpt"), "--out",
               str(out), "--size", "16", "--batch", "3"])
    tokens = np.load(out)
    assert tokens.shape == (4, 16) and tokens.dtype == np.uint8
    assert "4 images of 16 codes" in capsys.readouterr().out
    names = ["ant/z.jpg", "bee/nested/1.png", "cat/a.PNG", "cat/b.png"]
    for row, name in zip(tokens, names):
        image = Image.open(photographs / name).convert("L")
        if image.width != image.height:  # the middle square
            short = min(image.size)
            left, upper = (image.width - short) // 2, (image.height - short) // 2
            image = image.crop((left, upper, left + short, upper + short))
        x = torch.from_numpy(np.array(image.resize((16, 16), Image.BICUBIC))).float() / 127.5 - 1
        assert small.encode(x[None, None]).flatten().tolist() == row.tolist(), name
    np.testing.assert_array_equal(np.load(tmp_path / "made" / "labels.npy"), [0, 1, 2, 2])
    own = load_images(str(out), labels=str(tmp_path / "made" / "labels.npy"))
    assert own.classes == ("ant", "bee", "cat") and own.vocab_size == 20 and own.shape == (4, 4)

    data.main(["vq-decode", str(out), "--ckpt", str(tmp_path / "last.ckpt"), "--out",
               str(tmp_path / "back"), "--batch", "3"])
    files = sorted((tmp_path / "back").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(4)]
    drawn = small.decode(torch.from_numpy(tokens.astype(int)).view(4, 4, 4))
    for file, image in zip(files, drawn):
        expected = ((image[0].clamp(-1, 1) + 1) * 127.5).round().numpy()
        assert np.abs(np.asarray(Image.open(file)) - expected).max() <= 1


def test_encode_and_decode_errors(small, photographs, tmp_path):
    lightning(small, tmp_path / "last.ckpt")
    ckpt, out = str(tmp_path / "last.ckpt"), str(tmp_path / "tokens.npy")

    def refused(message, *argv):
        with pytest.raises(SystemExit, match=f"^error: {message}"):
            data.main([*argv, "--ckpt", ckpt, "--out", out])
    refused("--size 30 must be a multiple of 4", "vq-encode", str(photographs), "--size", "30")
    (tmp_path / "empty").mkdir()
    refused(".*holds no images", "vq-encode", str(tmp_path / "empty"))
    (photographs / "ant" / "broken.png").write_bytes(b"\x89PNG")
    refused(".*broken.png cannot be read as an image", "vq-encode", str(photographs))
    Image.new("L", (8, 8)).save(photographs / "loose.png")
    refused(".*both directly and in subfolders", "vq-encode", str(photographs))
    np.save(out, np.full((2, 4), 20))
    refused(".*codes 20 to 20, .*only 0 to 19", "vq-decode", out)
    with pytest.raises(SystemExit):
        data.main(["vq-decode", out, "--ckpt", ckpt, "--out", out, "--batch", "0"])


# ---------------------------------------------------------------- results/vq_mnist.py


def test_idle_codes_move_to_encoder_outputs(small):
    weight = small.quantize.embedding.weight
    weight.uniform_(100, 101)
    before, idle = weight.clone(), torch.arange(20) % 3 == 0
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    vq_mnist.revive(small, x, idle)
    assert torch.equal(weight[~idle], before[~idle])
    z = small.quant_conv(small.encoder(x)).movedim(1, -1).reshape(-1, 8)
    assert (torch.cdist(weight[idle], z).min(1).values < 1e-4).all()
    assert vq_mnist.psnr(torch.zeros(3), torch.full((3,), 0.2)) == pytest.approx(20)


def test_a_vq_vae_learns():
    """Two kinds of images that differ in one half: a few steps tell them apart."""
    torch.manual_seed(0)
    images = torch.full((64, 1, 8, 8), -1.0)
    images[::2, :, :, 4:] = 1
    model = data.VQGAN(**SMALL | dict(multipliers=(1, 1), attention=(), codes=8))
    args = types.SimpleNamespace(lr=2e-3, steps=40, batch_size=16)
    losses = vq_mnist.train(model, images, args)
    assert set(losses) == {"squared_error", "codebook", "commitment"}
    codes = vq_mnist.encode(model.eval(), images)
    assert vq_mnist.psnr(vq_mnist.decode(model, codes), images) > 10    # grey throughout: 3 dB
    assert not torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])
