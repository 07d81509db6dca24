"""VQGAN (Esser et al. 2021): photographs as tokens and back, with public checkpoints.

    python data.py vq-encode IMAGES --ckpt last.ckpt --out tokens.npy     # subfolders are classes
    python data.py vq-decode tokens.npy --ckpt last.ckpt --out folder     # and back to PNG

data.py hands these two commands over to this file. First the network, then what reads public
checkpoints without running their code, then the commands.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing.pool
import pickle
import re
import sys
import types
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import DataError, groups, image_grid, reading  # noqa: E402


def group_norm(c: int) -> nn.Module:
    return nn.GroupNorm(32, c, eps=1e-6)


def conv3(c_in: int, c: int) -> nn.Module:
    return nn.Conv2d(c_in, c, 3, padding=1)


def named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


class VQResidual(nn.Module):
    def __init__(self, c_in: int, c: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), conv3(c_in, c)
        self.norm2, self.conv2 = group_norm(c), conv3(c, c)
        self.nin_shortcut = nn.Conv2d(c_in, c, 1) if c_in != c else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class VQAttention(nn.Module):
    """One head over all positions."""

    def __init__(self, c: int):
        super().__init__()
        self.norm = group_norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)           # (B, 1, H W, c)
        return x + self.proj_out(h[:, 0].mT.reshape(x.shape))


class VQLevel(nn.Module):
    """The blocks of one resolution, attention behind each if the level has it, and the change to
    the next resolution: down, up or none."""

    def __init__(self, c_in: int, c: int, blocks: int, attention: bool, down: bool = False,
                 up: bool = False):
        super().__init__()
        self.down, self.up = down, up
        if down:                                              # one more pixel on the right, below
            self.downsample = named(pad=nn.ZeroPad2d((0, 1, 0, 1)),
                                    conv=nn.Conv2d(c, c, 3, stride=2))
        if up:
            self.upsample = named(nearest=nn.Upsample(scale_factor=2.0), conv=conv3(c, c))
        self.block = nn.ModuleList(VQResidual(c if j else c_in, c) for j in range(blocks))
        self.attn = nn.ModuleList(
            VQAttention(c) if attention else nn.Identity() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.block, self.attn):
            x = attention(block(x))
        return self.downsample(x) if self.down else self.upsample(x) if self.up else x


def vq_middle(c: int) -> nn.Module:
    return named(block_1=VQResidual(c, c), attn_1=VQAttention(c), block_2=VQResidual(c, c))


class VQGAN(nn.Module):
    """Images (B, C, H, W) in [-1, 1] <-> codes (B, H / f, W / f), f = 2^(levels - 1).

    Esser et al. 2021, with the names of taming-transformers' public checkpoints. The defaults
    are f16-1024's: 72.1M parameters, 256 x 256 pixels in 16 x 16 codes. `attention` lists the
    levels that have it; channels must be multiples of 32.
    """

    def __init__(self, channels: int = 128, multipliers: Sequence[int] = (1, 1, 2, 2, 4),
                 blocks: int = 2, attention: Sequence[int] = (4,), z_channels: int = 256,
                 embedding: int = 256, codes: int = 1024, in_channels: int = 3):
        super().__init__()
        widths = [channels * m for m in multipliers]
        top, c = len(widths) - 1, widths[-1]
        self.factor = 2**top
        self.encoder = named(
            conv_in=conv3(in_channels, channels),
            down=nn.Sequential(*(
                VQLevel(before, w, blocks, i in attention, down=i < top)
                for i, (before, w) in enumerate(zip([channels, *widths], widths)))),
            mid=vq_middle(c), norm_out=group_norm(c), swish=nn.SiLU(),
            conv_out=conv3(c, z_channels))
        # Levels are numbered as the encoder's, so the last one comes first.
        self.decoder = named(
            conv_in=conv3(z_channels, c), mid=vq_middle(c),
            up=named(**dict(reversed([
                (str(i), VQLevel(before, w, blocks + 1, i in attention, up=i > 0))
                for i, (before, w) in enumerate(zip([*widths[1:], c], widths))]))),
            norm_out=group_norm(widths[0]), swish=nn.SiLU(),
            conv_out=conv3(widths[0], in_channels))
        self.quantize = named(embedding=nn.Embedding(codes, embedding))
        nn.init.uniform_(self.quantize.embedding.weight, -1 / codes, 1 / codes)
        self.quant_conv = nn.Conv2d(z_channels, embedding, 1)
        self.post_quant_conv = nn.Conv2d(embedding, z_channels, 1)

    @property
    def vocab_size(self) -> int:
        return len(self.quantize.embedding.weight)

    @property
    def device(self) -> torch.device:
        return self.quantize.embedding.weight.device

    def nearest(self, z: Tensor) -> Tensor:
        """(B, d, h, w) to the nearest codes (B, h, w)."""
        e = self.quantize.embedding.weight                    # (V, d)
        z = z.movedim(1, -1)
        return (e.square().sum(-1) - 2 * z @ e.T).argmin(-1)  # |z|^2 is the same for all

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] to codes (B, H / f, W / f) int64."""
        return self.nearest(self.quant_conv(self.encoder(x)))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) to images (B, C, h f, w f), in [-1, 1] or little beyond."""
        z = self.quantize.embedding(codes).movedim(-1, 1)     # (B, d, h, w)
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For training: reconstruction, codebook and commitment loss (means), codes.

        The gradient passes the codes unchanged (van den Oord et al. 2017: straight-through).
        """
        z = self.quant_conv(self.encoder(x))
        codes = self.nearest(z)
        e = self.quantize.embedding(codes).movedim(-1, 1)
        reconstruction = self.decoder(self.post_quant_conv(z + (e - z).detach()))
        return (reconstruction, (e - z.detach()).square().mean(),
                (z - e.detach()).square().mean(), codes)


def vqgan_config(weights: dict[str, Tensor]) -> dict:
    """The arguments of VQGAN that these weights fit, read off their names and shapes."""
    def numbers(pattern: str) -> list[int]:
        return sorted({int(m[1]) for m in (re.fullmatch(pattern, key) for key in weights) if m})

    channels, in_channels = weights["encoder.conv_in.weight"].shape[:2]
    codes, embedding = weights["quantize.embedding.weight"].shape
    widths = [len(weights[f"encoder.down.{i}.block.0.conv2.bias"])
              for i in numbers(r"encoder\.down\.(\d+)\.block\.0\.conv2\.bias")]
    return dict(channels=channels, in_channels=in_channels, codes=codes, embedding=embedding,
                multipliers=[width // channels for width in widths],
                blocks=len(numbers(r"encoder\.down\.0\.block\.(\d+)\.conv2\.bias")),
                attention=numbers(r"encoder\.down\.(\d+)\.attn\.0\.q\.bias"),
                z_channels=len(weights["encoder.conv_out.bias"]))


class Inert(dict):
    """Stands for an object of a library that the weights do not need."""

    __hash__ = object.__hash__

    def __init__(self, *args, **kwargs) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass

    append = extend = __setstate__


class InertUnpickler(pickle.Unpickler):
    """Reads tensors; any other object becomes an Inert, and none of a file's code is run."""

    allowed = {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
               ("collections", "OrderedDict")}

    def find_class(self, module: str, name: str) -> object:
        return super().find_class(module, name) if (module, name) in self.allowed else Inert


INERT = types.SimpleNamespace(  # what torch.load wants of a pickle module
    __name__="inert", Unpickler=InertUnpickler,
    load=lambda file, **options: InertUnpickler(file, **options).load())


def load_vqgan(path: str | Path, device: str | None = None) -> VQGAN:
    """A VQGAN of any size from a taming-transformers checkpoint, on the GPU if there is one.

    Discriminator and perceptual loss (`loss.*`) are dropped; a transformer's checkpoint has the
    VQGAN under `first_stage_model.`. Raises DataError.
    """
    with reading(path, "a checkpoint", "download last.ckpt of f16-1024 (see the taming-"
                 "transformers repository), or train one: results/vq_mnist.py"):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # Lightning has put objects of its own beside the weights
            state = torch.load(path, map_location="cpu", weights_only=False, pickle_module=INERT)
        state = {k: v for k, v in state.get("state_dict", state).items() if isinstance(v, Tensor)}
    inner = "first_stage_model."
    inner = inner if any(key.startswith(inner) for key in state) else ""
    weights = {key.removeprefix(inner): value for key, value in state.items()
               if key.startswith(inner) and not key.startswith(inner + "loss.")}
    with reading(path, "a VQGAN of taming-transformers' kind"):
        model = VQGAN(**vqgan_config(weights))
        model.load_state_dict(weights)
    return model.eval().requires_grad_(False).to(
        device or ("cuda" if torch.cuda.is_available() else "cpu"))


def image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """All images below `folder`, sorted, and the subfolder of each: its class, if there are any."""
    suffixes = ".bmp .gif .jpeg .jpg .png .tif .tiff .webp".split()
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    if not paths:
        raise DataError(f"{folder} holds no images ({', '.join(suffixes)})")
    names = [p.relative_to(folder).parts for p in paths]
    classes = [parts[0] for parts in names if len(parts) > 1]
    if classes and len(classes) < len(paths):
        raise DataError(f"{folder} holds images both directly and in subfolders: a subfolder is a "
                        "class, so move all images into subfolders, or none")
    return paths, classes


def read_image(path: Path, size: int, channels: int) -> np.ndarray:
    """The largest square in the middle, resized: (channels, size, size) float32 in [-1, 1]."""
    with reading(path, "an image", "save it with 8 bits a channel"), Image.open(path) as file:
        image = file
        if file.mode.startswith("I;16"):  # grey, which Pillow would cut off at 255
            image = Image.fromarray((np.asarray(file) / 257).round().astype(np.uint8))
        elif file.mode in ("I", "F"):
            raise ValueError(f"its mode {file.mode} has no known white")
        image = ImageOps.fit(image.convert("RGB" if channels == 3 else "L"), (size, size),
                             Image.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32).reshape(size, size, channels)
    return pixels.transpose(2, 0, 1) / 127.5 - 1


def vq_encode(folder: Path, ckpt: Path, out: Path, size: int = 256, batch: int = 32) -> None:
    """Images to codes (N, L) in `out`, and what data.load_array wants beside them."""
    model = load_vqgan(ckpt)
    if size % model.factor:
        raise DataError(f"--size {size} must be a multiple of {model.factor}")
    channels = model.encoder.conv_in.weight.shape[1]
    paths, subfolders = image_files(folder)
    classes, codes = sorted(set(subfolders)), []
    with multiprocessing.pool.ThreadPool(8) as pool, torch.inference_mode():
        for group in groups(tqdm(paths, "encoding", unit="image"), batch):
            images = pool.map(lambda path: read_image(path, size, channels), group)
            x = torch.from_numpy(np.stack(images)).to(model.device)
            codes.append(model.encode(x).flatten(1).short())  # stays there: no waiting
    tokens = torch.cat(codes).cpu().numpy().astype(np.min_scalar_type(model.vocab_size - 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    np.save(out, tokens)
    out.with_suffix(".json").write_text(json.dumps({"vocab_size": model.vocab_size,
                                                    "classes": classes}) + "\n")
    print(f"{out}: {len(tokens):,} images of {tokens.shape[1]} codes, "
          f"{len(np.unique(tokens)):,} of {model.vocab_size:,} codes in use")
    if classes:
        labels = out.with_name(out.name.replace("tokens", "labels") if "tokens" in out.name
                               else f"{out.stem}-labels.npy")
        np.save(labels, np.array([classes.index(name) for name in subfolders]))
        print(f"{labels}: {len(classes)} classes")


def vq_decode(tokens: Path, ckpt: Path, out: Path, batch: int = 32) -> None:
    """Codes (N, L) or (N, rows, columns) to out/000000.png and so on; those of catdm.py's
    samples.npz to a folder for each guidance."""
    model, names = load_vqgan(ckpt), [""]
    if tokens.suffix == ".npz":
        with reading(tokens, "a .npz", "catdm.py --mode sample writes one"):
            names = [name for name in np.load(tokens).files if name != "labels"]
    for name in names:
        codes, folder = image_grid(tokens, name), out / name
        if codes.max() >= model.vocab_size:
            raise DataError(f"{tokens} has codes {codes.min()} to {codes.max()}, {ckpt} has only "
                            f"0 to {model.vocab_size - 1}")
        folder.mkdir(parents=True, exist_ok=True)
        with torch.inference_mode():
            for i in tqdm(range(0, len(codes), batch), "decoding", unit="batch"):
                x = torch.from_numpy(codes[i:i + batch].astype(np.int64)).to(model.device)
                x = (model.decode(x).clamp(-1, 1) + 1) * 127.5
                x = x.round().byte().movedim(1, -1).cpu().numpy()
                for j, image in enumerate(x):                     # (H, W, 3 or 1)
                    Image.fromarray(image.squeeze()).save(folder / f"{i + j:06d}.png")
        print(f"{folder}: {len(codes):,} images of {x.shape[2]} x {x.shape[1]} pixels")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, prog="data.py",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    encode = commands.add_parser("vq-encode", description="Images to a VQGAN's codes")
    encode.add_argument("images", type=Path, help="folder; subfolders, if any, are classes")
    encode.add_argument("--size", type=int, default=256, help="pixels of a side (default 256)")
    decode = commands.add_parser("vq-decode", description="A VQGAN's codes to PNG files")
    decode.add_argument("tokens", type=Path, help="tokens.npy, or catdm.py's samples.npz")
    for command in (encode, decode):
        command.add_argument("--ckpt", type=Path, required=True, help="checkpoint, as "
                             "taming-transformers writes them; its weights alone are read")
        command.add_argument("--out", type=Path, required=True, help="tokens.npy, or a folder")
        command.add_argument("--batch", type=int, default=32, help="images at once (default 32)")
    args = parser.parse_args(argv)
    if args.batch < 1:
        commands.choices[args.command].error("--batch must be at least 1")
    try:
        if args.command == "vq-encode":
            vq_encode(args.images, args.ckpt, args.out, args.size, args.batch)
        else:
            vq_decode(args.tokens, args.ckpt, args.out, args.batch)
    except DataError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a full disk does not say where
        sys.exit(f"error: {args.out}: {error}")


if __name__ == "__main__":
    main()
