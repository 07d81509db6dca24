"""Pixel images: the U-Net of common.py, data.py's pixel sets, and what cadd.py, vadd.py and eval.py
add for them."""
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pickle
import sys
import tarfile
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cadd
import common
import data
import eval as metrics
import vadd
from common import RunError, UNet
from data import DataError, Sequences, load_dataset

VDM = dict(mults=(1,), pixel_dim=32)
ADM = dict(mults=(3, 4, 4), pixel_dim=96, dropout=0.4, scale_shift=True)


def shaken(model, seed=0, by=0.2):
    """The model with random weights, also where they start at 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn_like(p))
    return model.eval()


# ---------------------------------------------------------------- the U-Net


@pytest.mark.parametrize("net, count", [
    (lambda: UNet(3, 2, (32, 32, 1), 64, 8, 1, **VDM), 2.2),          # VADD, Table 2: 2.2M
    (lambda: UNet(257, 256, (32, 32, 3), 128, 32, 32, **VDM), 31.6),  # 32M
    (lambda: UNet(257, 257, (32, 32, 3), 96, 5, 6, **ADM), 123.7)])
def test_the_papers_networks_have_the_papers_parameters(net, count):
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in net().named_parameters()}
    assert round(sum(sizes.values()) / 1e6, 1) == count
    if count > 100:  # without what tells it the time
        rest = (n for name, n in sizes.items() if not {"condition", "time"} & {*name.split(".")})
        assert round(sum(rest) / 1e6, 1) == 114.0


@pytest.mark.parametrize("shape, kwargs", [
    ((4, 6, 1), VDM), ((4, 4, 3), dict(mults=(3, 6, 3), pixel_dim=8, scale_shift=True)),
    ((32, 32, 1), dict(mults=(1, 2), pixel_dim=4))])
def test_the_unet_has_the_dits_interface(shape, kwargs):
    """Ids or embeddings, t of all or of each, a condition; every output sees every input, and the
    operations are as many as it says (within 5%: without time and condition)."""
    H, W, colours = shape
    L, dim = H * W * colours, 8
    net = shaken(UNet(6, 5, shape, dim, 1, 2, **kwargs))
    assert isinstance(net.conv_in, torch.nn.Identity) == (colours * kwargs["pixel_dim"] == net.down[
        0].conv1.in_channels)
    x, t, c = torch.randint(6, (2, L)), torch.rand(2), torch.randn(2, 4 * dim)
    # As plain products: not every torch counts its CPU kernel for attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(x, t)
    y = net(x, t)
    assert y.shape == (2, L, 5)
    assert counter.get_total_flops() * 3 / 2 / L == pytest.approx(net.flops_per_token(L), rel=0.05)
    assert torch.equal(y, net(net.embed(x), t)) and not torch.allclose(y, net(x, t, c))
    assert torch.allclose(net(x, t[:1])[0], y[0], atol=1e-4)
    e = net.embed(x[:1]).detach().requires_grad_()
    net(e, t[:1])[0, L // 2, 0].backward()
    assert (e.grad[0].abs().sum(-1) > 0).all()


def test_sub_pixels_stand_as_in_an_image():
    """With blocks that are the identity, a change of one pixel's colour reaches the pixels around
    it alone, all their colours."""
    H, W, colours = 5, 4, 3
    net = UNet(6, 2, (H, W, colours), 8, 1, 1, **VDM)
    with torch.no_grad():
        net.head.weight.normal_()
        net.norm = torch.nn.Identity()
        for part in [*net.down, *net.up]:
            part.norm1 = part.norm2 = torch.nn.Identity()
    x = torch.zeros(1, H * W * colours, dtype=torch.long)
    z = x.clone().view(1, H, W, colours)
    z[0, 1, 2, 1] = 5
    changed = (net(x, torch.zeros(1)) != net(z.view(1, -1), torch.zeros(1)))
    changed = changed.view(H, W, colours * 2)
    assert changed.all(-1)[1, 2] and torch.equal(changed.all(-1), changed.any(-1))
    rows, columns = changed.all(-1).nonzero().T
    assert (rows.max(), columns.min(), columns.max()) == (3, 0, 3) and not changed[4].any()


def test_equal_blocks_are_compiled_once(monkeypatch):
    """However deep, ADM's network is 10 kinds of blocks, time, readout and loss: none compiled
    again in a second step, none left out; loss and gradients are the same numbers."""
    graphs, compile = [], torch.compile

    def count(graph, _):
        graphs.append(sum("conv2d" in str(node.target) for node in graph.graph.nodes))
        return graph
    monkeypatch.setattr(torch, "compile", lambda net, **flags: compile(net, backend=count, **flags))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # put back

    class Loss(torch.nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.net = shaken(UNet(6, 5, (8, 8, 1), 8, depth, 2, **ADM | dict(
                mults=(1, 2, 2), pixel_dim=8, dropout=0.0))).train()

        def forward(self, x, t):
            return (self.net(x, t) - 1).square().mean()

    def step(net):
        torch.manual_seed(0)
        loss = net(torch.randint(6, (2, 64)), torch.rand(2))
        return [loss, *torch.autograd.grad(loss, [*net.parameters()])]
    ddp = common.DDP(0, 1, torch.device("cuda"), False)  # nothing is put there
    for depth in (2, 4):
        model = Loss(depth)
        torch._dynamo.reset()
        graphs.clear()
        with torch._dynamo.config.patch(recompile_limit=8):  # torch's, and put back
            net = ddp.wrap(model, True)
            for _ in range(2):
                assert all(map(torch.equal, step(net), step(model)))
        assert len(graphs) == 13 and sum(n >= 2 for n in graphs) == 10  # 2 or 3 convolutions
    assert torch.backends.cudnn.benchmark


def test_the_norm_by_channels_is_torchs():
    """Output and gradients, with a mean far above the deviation, and of a group that is all 0; half
    precision is normalised in float32, and channels stay last."""
    torch.manual_seed(0)
    own, other = common.GroupNorm(4, 12), torch.nn.GroupNorm(4, 12)
    for p, q in zip(own.parameters(), other.parameters()):
        q.data.copy_(torch.nn.init.normal_(p))
    x = (30 + torch.randn(3, 12, 4, 6)).to(memory_format=torch.channels_last)
    x[:, :3] = 0
    scale, weight = torch.rand(3, 12, 1, 1), torch.randn(3, 12, 4, 6)
    found = []
    for norm in (own.by_channel, own, other):
        module = other if norm is other else own
        z = (x * scale).requires_grad_()
        y = norm(z)
        assert y.is_contiguous(memory_format=torch.channels_last)
        found.append([y, *torch.autograd.grad((y * weight).sum(), [z, *module.parameters()])])
    for y in found[:2]:  # 1e-4: float32 at 30 deviations from 0
        torch.testing.assert_close(y, found[2], rtol=1e-4, atol=1e-4)
    y = own.by_channel(x.bfloat16())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, other(x.bfloat16().float()), rtol=1e-4, atol=1e-4)


def test_the_norm_by_channels_is_for_gpus_alone(monkeypatch):
    """torch's own is faster elsewhere, and where nothing is compiled."""
    norm, used = common.GroupNorm(1, 2), []
    monkeypatch.setattr(common.GroupNorm, "by_channel", lambda _, x: used.append(1) or x)
    for compiled, cuda in itertools.product((False, True), repeat=2):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
        x = torch.ones(1, 2, 1, 1)
        monkeypatch.setattr(torch.Tensor, "is_cuda", cuda)
        norm(x)
        assert len(used) == (compiled and cuda)


@pytest.mark.parametrize("amp", [False, True])
def test_channels_stay_last_in_memory(amp):
    """Convolutions of a network with skips, halves and attention need not turn what they get."""
    net = shaken(UNet(6, 5, (8, 4, 3), 8, 2, 2, mults=(1, 2), pixel_dim=4))
    seen = []
    for module in net.modules():
        if isinstance(module, (torch.nn.Conv2d, common.UNetBlock)):
            module.register_forward_hook(lambda _, given, out: seen.extend([given[0], out]))
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = net(torch.randint(6, (2, 96)), torch.rand(2))
    assert len(seen) > 60 and all(h.is_contiguous(memory_format=torch.channels_last) for h in seen)
    assert y.data_ptr() == seen[-1].data_ptr()  # and the output is the head's, not a copy


@pytest.mark.parametrize("message, shape, kwargs", [
    ("cannot be halved 2 times: give fewer --mults", (6, 6, 1), dict(mults=(1, 1, 1))),
    ("must be multiples of 3 and of --heads 2", (4, 4, 1), dict(dim=13))])
def test_sizes_that_do_not_fit(message, shape, kwargs):
    with pytest.raises(RunError, match=message):
        UNet(3, 2, shape, **dict(dim=8, depth=1, heads=2) | kwargs)


# ---------------------------------------------------------------- data


@pytest.fixture(autouse=True)
def small_and_alone(monkeypatch, tmp_path):
    """No network, and few glyphs."""
    monkeypatch.setenv("CATDIFF_MIRROR", (tmp_path / "nowhere").as_uri())
    monkeypatch.setenv("CATDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "GLYPH_SPLITS", {"train": 64, "valid": 32, "test": 16})


def test_glyph_pixels(tmp_path):
    glyphs = load_dataset("glyph-pixels", tmp_path)
    recipe = data.DATASETS["glyph-pixels"]
    assert (glyphs.vocab_size, glyphs.length, glyphs.unit, glyphs.shape) == (
        recipe.vocab_size, recipe.length, "dimension", recipe.shape)
    ids = glyphs.splits["valid"]
    assert isinstance(ids, np.memmap) and ids.dtype == np.uint8 and ids.shape == (32, 256)
    drawn = glyphs.draw(ids)
    assert drawn.shape == (32, 16, 16, 1) and np.unique(drawn).tolist() == [0, 255]
    grey = data.draw_glyphs("0123456789ABCDEF", 32, 1, 16)[0]
    np.testing.assert_array_equal(drawn[..., 0] > 0, grey > 127.5)      # threshold .5
    assert 0.08 < ids.mean() < 0.4 and glyphs.labels["valid"].tolist() == [*range(16)] * 2
    again = Sequences.from_tokenizer(glyphs.tokenizer())
    np.testing.assert_array_equal(again.draw(ids), drawn)


@pytest.mark.parametrize("name, V", [("mnist-binary", 2), ("mnist-pixels", 256)])
def test_mnist_is_padded_and_cut_at_half(tmp_path, monkeypatch, name, V):
    images = np.arange(5 * 28 * 28).reshape(5, 28, 28).astype(np.uint8)
    monkeypatch.setattr(data, "mnist_images", lambda _: dict.fromkeys(
        ("train", "valid", "test"), (images, np.arange(5))))
    ids = load_dataset(name, tmp_path).splits["test"].reshape(5, 32, 32)
    inner = images if V == 256 else images / 255 > 0.5
    np.testing.assert_array_equal(ids[:, 2:30, 2:30], inner)
    assert ids.sum() == inner.sum()


def test_augmentations_only_permute_pixels():
    """Each image is one of its eight flips and turns, colours together; each of the four turns at
    its rate; the batch is the same in parts; what validates stays as it is."""
    n, shape, p = 2000, (4, 4, 3), 0.6
    ids = np.tile(np.arange(48), (n, 1))
    pixels = Sequences("p", 48, 48, "dimension", {"train": ids, "valid": ids}, shape=shape,
                       augment=p)
    got = pixels.train_batch(0, 3, n, range(n)).ids
    one = ids[0].reshape(shape)
    eight = {np.rot90(flipped, k).tobytes(): (f, k) for f, flipped in enumerate((one, one[:, ::-1]))
             for k in range(4)}
    assert len(eight) == 8
    found = np.array([eight[image.tobytes()] for image in got.reshape(n, *shape)])
    # Five standard deviations of a share of 2,000 are at most .056
    for f in (0, 1):
        assert abs((found[:, 0] == f).mean() - (p / 2 if f else 1 - p / 2)) < 0.056
    for k in range(4):
        assert abs((found[:, 1] == k).mean() - (p / 4 if k else 1 - 0.75 * p)) < 0.056
    parts = [pixels.train_batch(0, 3, n, range(i, n, 2)).ids for i in (0, 1)]
    np.testing.assert_array_equal(np.stack(parts, 1).reshape(n, 48), got)
    assert (pixels.held_out().train_batch(0, 3, n, range(n)).ids == ids).all()


def picture(path, size=(4, 5), value=None, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)) if value is None else value)
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return np.asarray(Image.open(path))


def test_a_folder_of_images_with_splits_and_classes(tmp_path):
    folder = tmp_path / "mine"
    shown = {}
    for split, n in (("train", 40), ("test", 3)):
        for k, name in enumerate(("cat", "dog")):
            for i in range(n):
                image = picture(folder / split / name / f"{i:02d}.png", value=1000 * k + i + n)
                shown[image.tobytes()] = split, k
    (folder / "train" / "notes.md").write_text("not an image")
    own = load_dataset(str(folder), tmp_path / "data", 60)
    assert (own.shape, own.vocab_size, own.classes) == ((4, 5, 3), 256, ("cat", "dog"))
    assert {s: len(x) for s, x in own.splits.items()} == {"train": 76, "valid": 4, "test": 6}
    assert isinstance(own.splits["train"], np.memmap) and own.splits["train"].dtype == np.uint8
    for split, ids in own.splits.items():
        for image, y in zip(own.draw(ids), own.labels[split]):
            assert shown.pop(image.tobytes()) == ("test" if split == "test" else "train", y)
    assert not shown
    with pytest.raises(DataError, match="images of 4 x 5 x 3 have 60 dimensions: give --length 60"):
        load_dataset(str(folder), tmp_path / "data", 256)
    before = (tmp_path / "data" / "mine-pixels" / "train.npy").stat().st_mtime_ns
    load_dataset(str(folder), tmp_path / "data")
    assert (tmp_path / "data" / "mine-pixels" / "train.npy").stat().st_mtime_ns == before
    (folder / "test" / "cat" / "00.png").unlink()
    assert len(load_dataset(str(folder), tmp_path / "data").splits["test"]) == 5


def test_a_folder_of_images_alone(tmp_path):
    for i in range(20):
        picture(tmp_path / "mine" / f"{i}.png", mode="L")
    own = load_dataset(str(tmp_path / "mine"), tmp_path)
    assert (own.shape, own.classes, own.labels) == ((4, 5, 1), (), {})
    assert {s: len(x) for s, x in own.splits.items()} == {"train": 18, "valid": 1, "test": 1}


@pytest.mark.parametrize("trouble, message", [
    ("odd", "07.png is 5 x 4, not 4 x 5: images must be of one size; resize it"),
    ("corrupt", "07.png cannot be read as an image .*: remove it, or replace it"),
    ("no image", "07.png cannot be read as an image .*: remove it, or replace it"),
    ("few", "holds 2 images: train, valid and test need one each")])
def test_an_image_that_does_not_fit_is_named(tmp_path, trouble, message):
    for i in range(2 if trouble == "few" else 9):
        picture(tmp_path / "mine" / f"{i:02d}.png")
    path = tmp_path / "mine" / "07.png"
    if trouble == "odd":
        picture(path, (5, 4))
    elif trouble != "few":
        path.write_bytes(path.read_bytes()[:60] if trouble == "corrupt" else b"hello")
    with pytest.raises(DataError, match=message):
        load_dataset(str(tmp_path / "mine"), tmp_path)


def test_cifar10_through_torchvision(tmp_path, monkeypatch):
    """An archive as the public one, but of 1,050 + 20 images."""
    from torchvision.datasets import CIFAR10
    rng = np.random.default_rng(0)
    made = {}
    (tmp_path / "cifar10").mkdir()
    path = tmp_path / "cifar10" / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        lists = CIFAR10.train_list, CIFAR10.test_list
        meta = [("batches.meta", CIFAR10.meta["md5"])]
        for name, _ in [*lists[0], *lists[1], *meta]:
            n = 210 if name.startswith("data") else 20
            made[name] = {"data": rng.integers(0, 256, (n, 3072), np.uint8),
                          "labels": [*range(10)] * (n // 10), "label_names": [*data.CIFAR10]}
            content = pickle.dumps(made[name])
            made[name]["md5"] = hashlib.md5(content).hexdigest()
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    for attribute, files in zip(("train_list", "test_list"), lists):
        monkeypatch.setattr(CIFAR10, attribute, [[n, made[n]["md5"]] for n, _ in files])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": made["batches.meta"]["md5"]})
    with pytest.raises(DataError, match="tar.gz cannot be read as CIFAR-10 .*md5 is another"):
        load_dataset("cifar10", tmp_path)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    found = load_dataset("cifar10", tmp_path)
    assert {s: len(x) for s, x in found.splits.items()} == {"train": 50, "valid": 1000, "test": 20}
    planes = made["test_batch"]["data"].reshape(20, 3, 32, 32)
    np.testing.assert_array_equal(found.splits["test"].reshape(20, 32, 32, 3),
                                  planes.transpose(0, 2, 3, 1))
    assert found.labels["test"].tolist() == [*range(10)] * 2
    assert not [f for f in os.listdir(tmp_path / "cifar10") if "batches" in f]


def test_imagenet32_from_arrays_and_from_images(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "HELD_OUT", 5)
    with pytest.raises(DataError, match="needs train_data_batch_1.npz .* or images in train/CLASS"):
        load_dataset("imagenet32", tmp_path)
    folder, rng = tmp_path / "imagenet32", np.random.default_rng(0)
    last = rng.integers(0, 256, (7, 3072), np.uint8)
    for i in range(1, 11):
        x = last if i == 10 else np.full((2, 3072), i, np.uint8)
        np.savez(folder / f"train_data_batch_{i}.npz", data=x, labels=np.full(len(x), i))
    np.savez(folder / "val_data.npz", data=last[:3], labels=[1, 500, 1000])
    found = load_dataset("imagenet32", tmp_path)
    assert found.splits["train"][:18, 7].tolist() == [i for i in range(1, 10) for _ in (0, 1)]
    for split, x in {"valid": last[2:], "test": last[:3]}.items():
        np.testing.assert_array_equal(found.draw(found.splits[split]),
                                      x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert found.labels["test"].tolist() == [0, 499, 999] and len(found.splits["train"]) == 20

    (folder / "train_data_batch_3.npz").write_bytes(b"PK")
    (folder / "meta.json").unlink()
    with pytest.raises(DataError, match="batch_3.npz cannot be read as an .npz .*: fetch it again"):
        load_dataset("imagenet32", tmp_path)

    for split in ("train", "val"):  # other sizes; the middle square is of one colour
        for i in range(4):
            wide = np.zeros((48, 80 + i, 3), np.uint8)
            wide[:, 16:64 + i] = 9 * i
            path = folder / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(wide).save(path)
    found = load_dataset("imagenet32", tmp_path)
    assert found.classes == ("a", "b") and found.splits["test"].shape == (4, 3072)
    assert sorted(map(sorted, map(set, found.splits["test"].tolist()))) == [[0], [9], [18], [27]]
    assert found.num_sequences("valid") == 1 and found.num_sequences("train") == 3


# ---------------------------------------------------------------- both methods


SMALL = dict(net="unet", dim=8, depth=1, heads=2, pixel_dim=6, dropout=0.0, length=4, eval_draws=1)
ALL16 = torch.tensor([*itertools.product((0, 1), repeat=4)])


@pytest.mark.parametrize("script, flags, figures", [
    (cadd, dict(hint="none"), ["nll_prior"]),
    (cadd, dict(hint="fm", time_cond=True), ["nll_prior"]),
    (cadd, dict(hint="fm", hint_in="mean", hint_out=True, embed_norm=0.5), ["nll_joint"]),
    (cadd, dict(hint="vp", hint_in="mean", hint_out=True, embed_norm=0.5), ["nll_joint"]),
    (vadd, dict(latent_dim=0, K=1), ["nll_bound_2"]),
    (vadd, dict(latent_dim=2, time_cond=True), ["nll_bound_1", "nll_bound_2"])])
def test_bounds_of_2_x_2_binary_pixels_sum_to_at_most_one(script, flags, figures):
    """Any network's, here of random weights: 16 images, means of 2,000 draws (VADD: 800), 4
    standard errors."""
    model = shaken(script.build(script.Config(**SMALL | flags), Sequences(
        "four", 2, 4, "dimension", {}, shape=(2, 2, 1))), by=0.1)
    found = bounds(model, script, **dict(n=800, K=4, bound_steps=(1, 2)) if script is vadd else {})
    for figure in figures:
        mean, error = found[figure]
        p = (-4 * mean).exp()
        slack = 4 * (p * 4 * error).square().sum().sqrt()
        assert 0.02 < p.sum() <= 1 + slack and slack < 0.2, figure


def bounds(model, script, n=2000, **kwargs):
    """{figure: (mean, standard error) (16,) in nats per pixel} of all binary images of 2 x 2."""
    batches = [ALL16.repeat_interleave(100, 0)] * (n // 100)
    values = script.likelihoods(model, iter(batches), 1, 0, **kwargs)
    values.pop("tokens")
    each = {k: v.view(-1, 16, 100).transpose(0, 1).flatten(1) for k, v in values.items()}
    return {k: (v.mean(1), v.std(1) / n**0.5) for k, v in each.items()}


@pytest.mark.parametrize("script", [cadd, vadd])
def test_a_picture_is_completed_and_what_is_kept_stays(script, tmp_path):
    """--prompt and --prompt_mask: pixels at white stay through every step, black is drawn."""
    shape, cfg = (4, 4, 3), script.Config(**SMALL | dict(
        length=48, prompt=str(tmp_path / "p.png"), prompt_mask=str(tmp_path / "m.png"), samples=3,
        sample_steps=4, out=str(tmp_path)))
    pixels = Sequences("p", 256, 48, "dimension", {}, shape=shape)
    image = picture(tmp_path / "p.png", (4, 4))
    white = np.zeros((4, 4), np.uint8)
    white[:2] = 255
    Image.fromarray(white).save(tmp_path / "m.png")
    model = shaken(script.build(cfg, pixels))
    ddp = common.DDP(0, 1, torch.device("cpu"), False)
    seen, sample = [], script.sample

    def watched(*args, **kwargs):
        for x in sample(*args, **kwargs):
            seen.append(x)
            yield x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "sample", watched)
        script.draw(model, cfg, pixels, ddp)
    assert len(seen) == 4 and (seen[0] == 256).any() and not (seen[-1] == 256).any()
    for x in seen:
        assert (x.view(3, *shape)[:, :2].numpy() == image[:2]).all()
    drawn = np.load(tmp_path / "prompted.npz")["4 steps"]
    assert drawn.shape == (3, *shape) and (drawn[:, 2:] != image[2:]).any()
    assert Image.open(tmp_path / "prompted.png").size[0] > 100
    for flags, message in [(dict(prompt_mask=""), "needs --prompt_mask"),
                           (dict(watch=True), "--watch .* for text")]:
        with pytest.raises(RunError, match=message):
            script.build(dataclasses.replace(cfg, **flags), pixels)
    picture(tmp_path / "p.png", (4, 5))
    with pytest.raises(DataError, match="p.png is 4 x 5, not 4 x 4"):
        script.build(cfg, pixels)


@pytest.mark.parametrize("script, flags, message", [
    (cadd, dict(net="unet"), "--net unet is for pixels"),
    (vadd, dict(net="unet"), "--net unet is for pixels"),
    (vadd, dict(positions=True), "are for --net dit"),
    (cadd, dict(mults="3,x"), "--mults '3,x': give a whole number for each level"),
    (cadd, dict(corrector=1.0, order="first-hitting"), "not with --corrector or --cool"),
    (cadd, dict(cool=True, order="first-hitting"), "not with --corrector or --cool")])
def test_flags_that_do_not_suit_pixels(script, flags, message):
    shape = None if "net" in flags else (2, 2, 1)
    with pytest.raises(RunError, match=message):
        script.build(script.Config(**SMALL | flags), Sequences(
            "p", 2, 4, "dimension" if shape else "char", {}, shape=shape))


def test_augment_is_for_square_images(tmp_path):
    for i in range(9):
        picture(tmp_path / "mine" / f"{i}.png")
    cfg = cadd.Config(dataset=str(tmp_path / "mine"), data_dir=str(tmp_path), length=60, augment=1)
    with pytest.raises(RunError, match="square images"):
        cadd.load(cfg)


# ---------------------------------------------------------------- metrics


def test_frechet_distance_of_gaussians():
    """|m - m'|^2 + tr(C + C' - 2 (C C')^1/2): of samples made to have these moments exactly."""
    rng = np.random.default_rng(0)

    def gaussian(mean, root, n=50):
        x = rng.normal(size=(n, 3))
        x = x - x.mean(0)
        white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
        return torch.from_numpy(white @ root.T + mean)
    a, b, rotation = np.diag([1.0, 2, 3]), np.diag([2.0, 2, 0.5]), np.linalg.qr(rng.normal(
        size=(3, 3)))[0]
    one, two = gaussian([1, 0, 2], a), gaussian([0, 2, 2], b, 70)
    # commuting covariances: the sum of squared differences of standard deviations
    assert metrics.frechet(one, two) == pytest.approx(5 + 1 + 0 + 6.25)
    turned = gaussian([1, 0, 2], rotation @ a), gaussian([0, 2, 2], rotation @ b)
    assert metrics.frechet(*turned) == pytest.approx(12.25)
    assert metrics.frechet(one, one) == pytest.approx(0, abs=1e-9)
    # and one that does not commute, by the symmetric form tr (A^1/2 B A^1/2)^1/2
    c = rotation @ np.diag([1.0, 4, 9]) @ rotation.T
    root = np.sqrt(np.linalg.eigvalsh(a @ c @ a)).sum()
    found = metrics.frechet(gaussian([0, 0, 0], a), gaussian([0, 0, 0], np.linalg.cholesky(c)))
    assert found == pytest.approx(14 + 14 - 2 * root)


def test_fidelity_names_what_it_is(monkeypatch):
    """torch-fidelity gets uint8 images of three colours, and its figures their names."""
    with pytest.raises(RunError, match="pip install 'torch-fidelity"):
        monkeypatch.setitem(sys.modules, "torch_fidelity", None)
        metrics.fidelity(np.zeros((2, 4, 4, 1), np.uint8), np.zeros((3, 4, 4, 1), np.uint8), "x")

    def calculate_metrics(input1, input2, **kwargs):
        for images, n in ((input1, 2), (input2, 3)):  # 0.4 refuses anything but a Dataset
            assert isinstance(images, torch.utils.data.Dataset) and len(images) == n
            assert images[n - 1].shape == (3, 4, 4) and images[n - 1].dtype == torch.uint8
        assert (input1[1] == 7).all()
        assert kwargs["fid"] and kwargs["isc"] and kwargs["prc"]
        return dict(frechet_inception_distance=1.5, inception_score_mean=2.0, precision=0.5,
                    recall=0.25)
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(
        __version__="0.4", calculate_metrics=calculate_metrics))
    found = metrics.fidelity(np.full((2, 4, 4, 1), 7, np.uint8), np.zeros((3, 4, 4, 3), np.uint8),
                             "cifar10/train")
    assert {k: v["value"] for k, v in found.items()} == dict(
        fid=1.5, inception_score=2.0, precision=0.5, recall=0.25)
    for name, net in (("fid", "inception-v3-compat"), ("recall", "vgg16")):
        assert found[name]["unit"] == (f"torch-fidelity 0.4, {net}, 2 samples, reference "
                                       "cifar10/train (3)")


def test_images_are_refused_before_they_are_drawn(monkeypatch):
    """Runs of two sizes, whose images make no one picture, and --fid without its package."""
    shapes = {"a": (4, 4, 1), "b": [4, 4, 1], "c": (8, 8, 1)}
    monkeypatch.setattr(metrics, "script_of", lambda run: vadd)
    monkeypatch.setattr(common, "read_checkpoint", lambda file, mmap: {
        "tokenizer": {"shape": shapes[file.parent.name]}})
    monkeypatch.setattr(common, "open_run", lambda *_: pytest.exit("opened"))
    with pytest.raises(RunError, match="different sizes"):
        metrics.images_main(["a", "b", "c"])
    with pytest.raises(pytest.exit.Exception, match="opened"):
        metrics.images_main(["a", "b"])
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(RunError, match="pip install 'torch-fidelity>=0.4'"):
        metrics.images_main(["a", "--fid"])


def test_the_classifier_sees_pixels(tmp_path, monkeypatch):
    """Four classes of colours are learned; without classes of their own images are recognised
    where it is sure, and grey noise is far in Fréchet distance."""
    rng = np.random.default_rng(0)
    y = np.arange(200) % 4
    image = np.zeros((200, 4, 4, 3), int)
    image[np.arange(200), :, :, y % 3] = 3 - (y // 3)[:, None, None]
    image += rng.integers(0, 2, image.shape)
    ids = image.reshape(200, 48)
    monkeypatch.setattr(metrics.TokenClassifier, "steps", 40)
    pixels = Sequences("p", 5, 48, "dimension", dict.fromkeys(("train", "valid"), ids), shape=(
        4, 4, 3), labels=dict.fromkeys(("train", "valid"), y), classes=tuple("abcd"))
    classifier = metrics.TokenClassifier(pixels)
    true = classifier.grade(*classifier.real)
    sure = classifier.grade(classifier.real[0])
    assert true["recognised"] > 0.95 and sure["recognised"] > 0.9
    noise = classifier.grade(torch.from_numpy(rng.integers(0, 5, (100, 48))))
    assert noise["frechet"] > 10 * abs(sure["frechet"]) + 1
    assert classifier.grade(classifier.real[0], (classifier.real[1] + 1) % 4)["recognised"] < 0.05


# ---------------------------------------------------------------- vadd


def test_the_latent_reaches_every_block_and_recognition_is_siamese():
    """z acts as the condition; r(z | x_0, x_t) is symmetric in its two images."""
    cfg = vadd.Config(**SMALL | dict(length=48, latent_dim=3, mults="1,2", time_cond=True))
    model = shaken(vadd.build(cfg, Sequences("p", 6, 48, "dimension", {}, shape=(4, 4, 3))))
    x, z, t = torch.randint(7, (2, 48)), torch.randn(2, 3), torch.rand(2)
    seen = []
    for block in [*model.denoiser.net.modules()]:
        if isinstance(block, common.UNetBlock):
            block.condition.register_forward_hook(lambda _, given, out: seen.append(given[0]))
    y = model.logits(model.denoise(x, z, t))
    want = torch.nn.functional.silu(model.denoiser.net.time(t) + model.denoiser.latent(z))
    assert y.shape == (2, 48, 6) and len(seen) == 8
    assert all(torch.allclose(c, want) for c in seen)
    assert not torch.allclose(y, model.logits(model.denoise(x, -z, t)))
    r = model.recognition
    one, two = x, torch.randint(7, (2, 48))
    assert r(one, two, one == 6, t).shape == (2, 6)
    assert torch.allclose(r(one, two, one == 6, t), r(two, one, one == 6, t), atol=1e-5)
    assert not torch.allclose(r(one, two, one == 6, t), r(one, one, one == 6, t), atol=1e-2)
    rows = []
    r.net.register_forward_hook(lambda _, given, out: rows.append(len(given[0])))
    # Of one image, as a prior has, it runs once and says the same.
    assert torch.allclose(r(one, one, one == 6, t), r(one, one.clone(), one == 6, t), atol=1e-5)
    assert rows == [2, 4]


def test_vadds_flops_follow_the_images_that_each_network_sees():
    """The denoiser and an informed prior see one, the recognition network two (--hide_xt: one)."""
    flops = lambda **flags: vadd.flops_per_token(vadd.build(  # noqa: E731
        vadd.Config(**SMALL | dict(length=48, mults="1,2", depth=4) | flags),
        Sequences("p", 6, 48, "dimension", {}, shape=(4, 4, 3))), 48)
    mdlm, plain = flops(latent_dim=0), flops(latent_dim=3)
    hidden = flops(latent_dim=3, hide_xt=True)
    assert plain - hidden == hidden - mdlm > 0
    prior = flops(latent_dim=3, prior="informed") - plain  # of a quarter of the depth
    assert prior == flops(latent_dim=3, hide_xt=True, depth=1) - flops(latent_dim=0, depth=1)


def test_vadds_parameters():
    """Table 2: 2.3M and 32M, MDLM 2.2M, of the denoiser: what samples."""
    for name, V, shape, sizes in (("mnist-binary", 2, (32, 32, 1), (2.3, 2.2)),
                                  ("cifar10", 256, (32, 32, 3), (32, 32))):
        for latent, size in zip((vadd.PRESETS[name]["latent_dim"], 0), sizes):
            cfg = vadd.Config(**vadd.PRESETS[name] | dict(latent_dim=latent))
            with torch.device("meta"):
                net = vadd.UNetDenoiser(cfg, V, shape)
            count = sum(p.numel() for p in net.parameters()) / 1e6
            assert round(count, 1 if size < 10 else 0) == size


def test_vadd_trains_on_glyphs_and_draws_figure_3(tmp_path, monkeypatch, capsys):
    """A whole run with its report; then `eval.py images` of it, from the same checkpoint."""
    monkeypatch.setattr(metrics.TokenClassifier, "steps", 5)
    out = ["--out", str(tmp_path / "run"), "--data_dir", str(tmp_path), "--device", "cpu"]
    common.main(vadd, ["--dataset", "glyph-pixels", "--dim", "8", "--pixel_dim", "4", "--mults",
                       "1,1", "--steps", "3", "--samples", "2", "--eval_sequences", "2", *out])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert list(result["samples"]) == ["valid", *(f"{T} steps" for T in vadd.IMAGE_STEPS)]
    assert result["figures"]["nll_bound_5"]["unit"] == "bits/dimension"
    assert not result["figures"]["nll_delbo"]["is_bound"] and result["split"] == "test"
    drawn = np.load(tmp_path / "run" / "samples.npz")
    assert drawn["1 steps"].shape == (2, 16, 16, 1)
    metrics.main(["images", str(tmp_path / "run"), "--steps", "1,3", "--samples", "4", *out[2:]])
    assert "| run, 3 steps |" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "images.json").read_text())
    assert list(found) == ["data: glyph-pixels/valid", "run, 1 steps", "run, 3 steps"]
    assert found["run, 3 steps"]["samples"] == 4 and found["run, 3 steps"]["trained"] == 3
    assert (tmp_path / "run" / "images.png").exists()
