"""A small VQ-VAE on MNIST, of the class that vqgan.py loads public checkpoints into.

    python results/vq_mnist.py                        one GPU
    python results/vq_mnist.py --steps 200 --batch_size 32 --images 500    a first look on a CPU
    python data.py vq-encode PNGS --ckpt runs/vq-mnist/last.ckpt --out tokens.npy --size 28
    python data.py vq-decode tokens.npy --ckpt runs/vq-mnist/last.ckpt --out folder

It proves the way from images to tokens and back with weights that are trained, not random:
28 x 28 pixels become 7 x 7 codes. The loss is van den Oord et al.'s (2017): squared error,
codebook, and a quarter of the commitment loss; a VQGAN has a perceptual loss and a discriminator
besides. Codes that nobody uses for 100 steps move to an encoder output of the batch.

RUNS/vq-mnist holds the checkpoint (names as taming-transformers'), tokens.npy and labels.npy of
all images; RESULTS/vq-mnist.json the figures, RESULTS/vq-mnist.png test images above their
reconstructions.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import data  # noqa: E402
import vqgan  # noqa: E402

# 28 -> 14 -> 7, attention at 7 x 7 alone, as f16-1024 has it at its smallest level alone
SIZE = dict(channels=32, multipliers=(1, 1, 2), blocks=1, attention=(2,), z_channels=64,
            embedding=64, codes=256, in_channels=1)


def mnist(data_dir: str, most: int) -> dict[str, tuple[Tensor, np.ndarray]]:
    """split -> at most `most` images (N, 1, 28, 28) in [-1, 1], labels (N,)."""
    builder = data.DatasetBuilder(data.folders_of(data_dir, "mnist"))
    return {split: (torch.from_numpy(images[:most].astype(np.float32))[:, None] / 127.5 - 1,
                    labels[:most])
            for split, (images, labels) in data.mnist_images(builder).items()}


@torch.no_grad()
def revive(model, x: Tensor, idle: Tensor) -> None:
    """Moves idle codes (V,) bool to random outputs of the encoder for images x."""
    z = model.quant_conv(model.encoder(x)).movedim(1, -1).flatten(0, 2)      # (B h w, d)
    weight = model.quantize.embedding.weight
    chosen = z[torch.randint(len(z), (len(weight),), device=z.device)]
    weight.copy_(torch.where(idle[:, None], chosen, weight))


def train(model, images: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Adam on random batches; returns the losses' means over the last 100 steps."""
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(model.parameters(), args.lr, betas=(0.9, 0.99))
    schedule = common.RunConfig(steps=args.steps, lr=args.lr, lr_schedule="cosine", warmup=100)
    used = torch.zeros(model.vocab_size, dtype=torch.bool, device=device)
    losses: list[Tensor] = []
    bar = tqdm(range(args.steps), desc="training", mininterval=1 if sys.stderr.isatty() else 10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, schedule)
        x = images[torch.randint(len(images), (args.batch_size,))].to(device)
        if step == 0:
            revive(model, x, ~used)  # all of them: the codebook starts among the outputs
        image, codebook, commitment, codes = model(x)
        squared = F.mse_loss(image, x)
        (squared + codebook + 0.25 * commitment).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        used[codes.flatten()] = True
        if step % 100 == 99 and step < args.steps * 3 // 4:
            revive(model, x, ~used)
            used.zero_()
        losses.append(torch.stack([squared, codebook, commitment]).detach())
        if step % 50 == 0:
            bar.set_postfix(squared=f"{squared.item():.4f}", refresh=False)
    means = torch.stack(losses[-100:]).mean(0).tolist()
    return dict(zip(("squared_error", "codebook", "commitment"), means))


@torch.inference_mode()
def encode(model, images: Tensor) -> Tensor:
    """(N, 1, 28, 28) to codes (N, 7, 7) on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model.encode(x.to(device)).cpu() for x in images.split(500)])


@torch.inference_mode()
def decode(model, codes: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return torch.cat([model.decode(c.to(device)).cpu() for c in codes.split(500)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data", help="where mnist/ is, or is downloaded to")
    parser.add_argument("--runs", default="runs", help="where the run folder goes")
    parser.add_argument("--results", default="results", help="where figures and picture go")
    parser.add_argument("--steps", type=int, default=4000, help="training steps")
    parser.add_argument("--batch_size", type=int, default=64, help="images per step")
    parser.add_argument("--images", type=int, default=60_000, help="at most so many of a split")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args()
    ddp = common.DDP.start(common.RunConfig(seed=args.seed, device=args.device))
    sets = mnist(args.data_dir, args.images)
    model = vqgan.VQGAN(**SIZE).to(ddp.device)
    begin = time.time()
    losses = train(model, sets["train"][0], args)
    seconds = time.time() - begin

    out, results = Path(args.runs) / "vq-mnist", Path(args.results)
    out.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": model.cpu().state_dict()}, out / "last.ckpt")
    model = vqgan.load_vqgan(out / "last.ckpt").to(ddp.device)  # what follows uses the file
    codes = {split: encode(model, images) for split, (images, _) in sets.items()}
    tokens = torch.cat([codes[split].flatten(1) for split in sets]).numpy().astype(np.uint8)
    np.save(out / "tokens.npy", tokens)
    np.save(out / "labels.npy", np.concatenate([labels for _, labels in sets.values()]))

    images = sets["test"][0]
    back = decode(model, codes["test"]).clamp(-1, 1)
    patches = data.load_dataset("mnist", args.data_dir)  # what k-means on pixels reaches
    drawn = patches.draw(patches.splits["test"][:len(images)])
    drawn = torch.from_numpy(drawn).float()[:, None] / 127.5 - 1
    counts = np.bincount(codes["test"].flatten().numpy(), minlength=model.vocab_size)
    figures = dict(
        psnr_db=psnr(back, images), psnr_db_of_the_patch_codes=psnr(drawn, images),
        codes_in_use=int((counts > 0).sum()), codes=model.vocab_size,
        code_perplexity=2 ** data.entropy(counts), bits_per_token=data.entropy(counts))
    record = dict(figures=figures, losses=losses, train_seconds=round(seconds, 1),
                  parameters=sum(p.numel() for p in model.parameters()),
                  settings=vars(args) | {k: v for k, v in SIZE.items()},
                  **common.environment(ddp))
    common.write_json(results / "vq-mnist.json", record)
    rows = [torch.cat(list(x[k:k + 20, 0]), 1) for k in (0, 20, 40) for x in (images, back)]
    picture = ((torch.cat(rows) + 1) * 127.5).round().byte().numpy()
    Image.fromarray(picture).resize((2 * picture.shape[1], 2 * picture.shape[0])).save(
        results / "vq-mnist.png")
    for name, value in figures.items():
        print(f"{name:27s} {value:.2f}" if isinstance(value, float) else f"{name:27s} {value}")
    print(f"{out}: last.ckpt, tokens.npy, labels.npy; {results}: vq-mnist.json, vq-mnist.png; "
          f"{args.steps} steps in {seconds / 60:.1f} minutes")


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]: 10 log10(4 / mean squared error)."""
    return 10 * np.log10(4 / F.mse_loss(a, b).item())


if __name__ == "__main__":
    common.run_main(main)
