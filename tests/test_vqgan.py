"""results/vqgan.py, with the public names of its weights, and results/vq_mnist.py."""
import os
import shutil
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import catdm
import common
import data
import vq_mnist
import vqgan
from data import DataError, load_dataset



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
        state = vqgan.VQGAN().state_dict()
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
    model = vqgan.VQGAN(**SMALL).eval().requires_grad_(False)
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
    model = vqgan.VQGAN(**SMALL | dict(embedding=16))
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
    assert torch.isclose(codebook, (z - e).square().mean()) and torch.isclose(
        codebook, commitment)
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
        state = torch.load(path, weights_only=False, pickle_module=vqgan.INERT)
        state["state_dict"]["transformer.head.weight"] = torch.zeros(3)
        torch.save(state["state_dict"], path)  # bare weights will do, too
    loaded = vqgan.load_vqgan(path)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    x = torch.rand(4, 1, 32, 32) * 2 - 1
    codes = small.encode(x)
    assert torch.equal(loaded.encode(x), codes) and len(codes.unique()) > 3
    assert torch.equal(loaded.decode(codes), small.decode(codes))
    config = vqgan.vqgan_config(small.state_dict())
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
        assert vqgan.load_vqgan(path).vocab_size == 20
    assert not (tmp_path / "attacked").exists()


def test_wrong_checkpoints_are_one_line(small, tmp_path):
    path = tmp_path / "last.ckpt"
    lightning(small, path)
    raw, weights = path.read_bytes(), small.state_dict()

    def refused(content, message):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(DataError, match=message) as error:
            vqgan.load_vqgan(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)

    refused(raw[:len(raw) // 2], "cannot be read as a checkpoint")
    refused(b"", "cannot be read as a checkpoint")
    refused(b"hello, world\n" * 9, "cannot be read as a checkpoint")
    refused([1, 2], "cannot be read as a checkpoint")
    refused({"state_dict": {"a": torch.zeros(2)}}, "as a VQGAN .*encoder.conv_in.weight")
    refused({"state_dict": {k: v for k, v in weights.items() if "quant_conv" not in k}},
            "as a VQGAN .*Missing key.*quant_conv")
    refused({"state_dict": weights | {"quantize.embed.weight": torch.zeros(2, 2)}},
            "Unexpected key.*quantize.embed.weight")
    refused({"state_dict": weights | {"quant_conv.bias": torch.zeros(3)}}, "size mismatch")
    with pytest.raises(DataError, match="missing.ckpt does not exist: download .*vq_mnist.py"):
        vqgan.load_vqgan(tmp_path / "missing.ckpt")


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
    own = load_dataset(str(out), labels=str(tmp_path / "made" / "labels.npy"))
    assert own.classes == ("ant", "bee", "cat") and own.vocab_size == 20 and own.shape == (4, 4)

    data.main(["vq-decode", str(out), "--ckpt", str(tmp_path / "last.ckpt"), "--out",
               str(tmp_path / "back"), "--batch", "3"])
    files = sorted((tmp_path / "back").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(4)]
    drawn = small.decode(torch.from_numpy(tokens.astype(int)).view(4, 4, 4))
    for file, image in zip(files, drawn):
        expected = ((image[0].clamp(-1, 1) + 1) * 127.5).round().numpy()
        assert np.abs(np.asarray(Image.open(file)) - expected).max() <= 1


def test_samples_of_a_trained_model_are_decoded(small, trained, tmp_path):
    """What catdm.py writes for tokens of one's own: --mode sample, then vq-decode."""
    shutil.copytree(trained("catdm"), tmp_path / "run")
    flags = "--mode sample --device cpu --samples 3 --sample_steps 2 --guidance 1 --out"
    common.main(catdm, [*flags.split(), str(tmp_path / "run")])
    samples = np.load(tmp_path / "run" / "samples.npz")
    assert samples.files == ["guidance1", "labels"]
    lightning(small, tmp_path / "last.ckpt")
    data.main(["vq-decode", str(tmp_path / "run" / "samples.npz"), "--ckpt",
               str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "back")])
    files = sorted((tmp_path / "back" / "guidance1").iterdir())
    drawn = small.decode(torch.from_numpy(samples["guidance1"]).view(3, 3, 3))
    assert len(files) == 3 and len(list((tmp_path / "back").iterdir())) == 1
    for file, image in zip(files, drawn):
        expected = ((image[0].clamp(-1, 1) + 1) * 127.5).round().numpy()
        assert np.abs(np.asarray(Image.open(file)) - expected).max() <= 1


def test_grey_of_16_bits(tmp_path):
    """A picture of 16 bits is that of its high bytes; of unknown white, or too large, refused."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name, pixels in (("a.png", grey), ("b.png", grey * np.uint16(257)),
                         ("c.tif", grey * np.uint16(257))):
        Image.fromarray(pixels).save(tmp_path / name)
        for channels in (1, 3):
            x = vqgan.read_image(tmp_path / name, 16, channels)
            np.testing.assert_array_equal(x, np.stack(channels * [grey]) / np.float32(127.5) - 1)
    for dtype in (np.int32, np.float32):
        Image.fromarray(grey.astype(dtype)).save(tmp_path / "d.tif")
        with pytest.raises(DataError, match="d.tif cannot .*no known white.*save it with 8 bits"):
            vqgan.read_image(tmp_path / "d.tif", 16, 1)


def test_decompression_bombs_are_one_line(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 31)  # Pillow refuses twice as many
    with pytest.raises(DataError, match="a.png cannot be read as an image .*decompression bomb"):
        vqgan.read_image(tmp_path / "a.png", 16, 1)


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
    np.save(out, np.zeros((2, 4), int))
    refused(f"{out}: .*File exists", "vq-decode", out)  # --out is a file
    (tmp_path / "samples.npz").write_bytes(b"PK\x03\x04")
    refused(".*samples.npz cannot be read as a .npz", "vq-decode", str(tmp_path / "samples.npz"))


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
    model = vqgan.VQGAN(**SMALL | dict(multipliers=(1, 1), attention=(), codes=8))
    args = types.SimpleNamespace(lr=2e-3, steps=40, batch_size=16)
    losses = vq_mnist.train(model, images, args)
    assert set(losses) == {"squared_error", "codebook", "commitment"}
    codes = vq_mnist.encode(model.eval(), images)
    assert vq_mnist.psnr(vq_mnist.decode(model, codes), images) > 10    # grey throughout: 3 dB
    assert not torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])
