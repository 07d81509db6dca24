"""Text, toys, pairs of sentences, images as tokens: classes that hand out batches, and recipes.

    python data.py multi30k                   # pairs: German and English captions
    python data.py pydoc                      # no download: prepares the set and describes it
    python data.py text8 --data_dir data      # downloads 31 MB
    python data.py my/folder                  # train / valid / test as .txt, .txt.xz or .npy
    python data.py glyphs                     # drawn digits and letters, no download
    python data.py vq-encode IMAGES --ckpt last.ckpt --out tokens.npy     # photographs, by a VQGAN
    python data.py tokens.npy --labels labels.npy
    python data.py vq-decode tokens.npy --ckpt last.ckpt --out folder     # and back

Every text set ends as arrays of token ids, one file per split, memory-mapped. A split is either a
stream (N,), cut into sequences of any length L when it is read, or rows (N, L) that were cut when
the set was prepared. Ids 0..V-1 are the data's symbols; [MASK] is V, one past them.
"""
import argparse
import contextlib
import functools
import gzip
import hashlib
import heapq
import html
import importlib
import io
import itertools
import json
import lzma
import math
import multiprocessing.pool
import operator
import os
import pickle
import random
import re
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import types
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm


class DataError(ValueError):
    """A problem with the data that the user can solve; the message says how."""


# ---------------------------------------------------------------- batches


@dataclass
class TextData:
    """One data set, ready to be read. Shapes: L = `length`, V = `vocab_size`."""

    name: str
    vocab_size: int  # V: the symbols a model may produce, ids 0..V-1
    length: int  # L: tokens per sequence
    unit: str  # what one id is: "char", "byte", "token" or "bin" (toys)
    splits: dict[str, np.ndarray]  # "train", "valid", "test" -> (N,) stream or (N, L) rows
    codec: "Codec"  # text <-> ids
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    _epochs: dict = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Raises DataError if special ids collide, or if rows have another length than L."""
        special = [i for i in (self.bos_id, self.eos_id, self.pad_id) if i is not None]
        if any(not 0 <= i < self.vocab_size for i in special):
            raise DataError(f"{self.name}: special ids {special} must be below {self.vocab_size}")
        # GPT-2 has one id for bos and eos. Padding is left out of every loss: it must stand alone.
        if self.pad_id is not None and self.pad_id in (self.bos_id, self.eos_id):
            raise DataError(f"{self.name}: pad_id {self.pad_id} must differ from bos_id and eos_id")
        if self.length < 1:
            raise DataError(f"{self.name}: length must be at least 1, not {self.length}")
        for split, tokens in self.splits.items():
            if tokens.ndim == 2 and tokens.shape[1] != self.length:
                raise DataError(f"{self.name}: {split} has rows of {tokens.shape[1]} tokens; "
                                f"use that length, not {self.length}")

    @property
    def mask_id(self) -> int:
        return self.vocab_size

    def encode(self, text: str) -> np.ndarray:
        """Text to ids (n,) int64. Raises DataError at a character the vocabulary lacks."""
        return self.codec.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids (n,) to text; [MASK] is shown as "_"."""
        ids = np.asarray(ids).reshape(-1)
        runs = np.split(ids, np.flatnonzero(np.diff(ids == self.mask_id)) + 1)
        return "".join("_" * len(run) if self.mask_id in run else self.codec.decode(run)
                       for run in runs)

    def tokenizer(self) -> dict:
        """All but the splits, in plain types: what a checkpoint keeps to be sampled from alone."""
        keys = ("name", "vocab_size", "length", "unit", "bos_id", "eos_id", "pad_id")
        kept = {key: getattr(self, key) for key in keys}
        return kept | {"codec": self.codec.kind, "vocab": self.codec.vocab}

    @classmethod
    def from_tokenizer(cls, kept: dict, splits: dict[str, np.ndarray] | None = None) -> "TextData":
        """The inverse of `tokenizer`."""
        codec = CODECS[kept["codec"]](kept["vocab"])
        rest = {key: value for key, value in kept.items() if key not in ("codec", "vocab")}
        return cls(splits=splits or {}, codec=codec, **rest)

    def num_sequences(self, split: str) -> int:
        """Sequences that `eval_batches` yields. A stream's tail shorter than L is not scored."""
        tokens = self._tokens(split)
        return len(tokens) if tokens.ndim == 2 else len(tokens) // self.length

    def train_batch(self, seed: int, step: int, batch_size: int, indices: Sequence[int]
                    ) -> np.ndarray:
        """Rows `indices` of the global batch of `step`: (len(indices), L) int64.

        Sample i of step k is number k * batch_size + i of an endless sequence of epochs, so a
        batch depends neither on the number of processes nor on what was asked before.
        """
        indices = np.asarray(indices, dtype=np.int64)  # (b,)
        if indices.size and not 0 <= indices.min() <= indices.max() < batch_size:
            raise DataError(f"indices must lie in 0..{batch_size - 1}, the global batch")
        tokens = self._tokens("train")
        epochs, places = np.divmod(step * batch_size + indices, self._windows_per_epoch())
        batch = np.empty((len(indices), self.length), dtype=np.int64)
        for epoch in np.unique(epochs):  # one, or two where the batch straddles epochs
            here = epochs == epoch
            offset, order = self._epoch(seed, int(epoch))
            batch[here] = self._gather(tokens, order[places[here]], offset)
        return batch

    def eval_batches(self, split: str, batch_size: int, limit: int | None = None, start: int = 0,
                     stride: int = 1) -> Iterator[np.ndarray]:
        """Yields (b, L) int64: the split in order, each window once, the last batch smaller.

        `limit`: at most so many sequences, spread evenly over the split. `start`, `stride`: every
        stride-th of them from the start-th on, for process `start` of `stride`.
        """
        tokens, total = self._tokens(split), self.num_sequences(split)
        if total == 0:
            raise DataError(f"{self.name}: {split} is shorter than one sequence of {self.length}")
        count = total if limit is None else min(limit, total)
        chosen = (np.arange(count) * total // max(count, 1))[start::stride]
        for i in range(0, len(chosen), batch_size):
            yield self._gather(tokens, chosen[i:i + batch_size])

    def _tokens(self, split: str) -> np.ndarray:
        if split not in self.splits:
            raise DataError(f"{self.name} has no {split!r} split; it has {', '.join(self.splits)}")
        return self.splits[split]

    def _gather(self, tokens: np.ndarray, windows: np.ndarray, offset: int = 0) -> np.ndarray:
        if tokens.ndim == 1:  # (b, 1) + (L,) -> (b, L)
            windows = offset + windows[:, None] * self.length + np.arange(self.length)
        return np.asarray(tokens[windows], dtype=np.int64)

    def _windows_per_epoch(self) -> int:
        tokens = self._tokens("train")
        if tokens.ndim == 2:
            return len(tokens)
        if len(tokens) < self.length:
            raise DataError(f"{self.name}: train has {len(tokens)} tokens; choose a length below")
        # One window fewer than fits leaves room to shift the cuts, at least L - 1 places.
        return max(1, (len(tokens) - self.length + 1) // self.length)

    def _epoch(self, seed: int, epoch: int) -> tuple[int, np.ndarray]:
        """Where the first window begins, and the order of the windows: functions of both."""
        if (seed, epoch) not in self._epochs:
            tokens, count = self._tokens("train"), self._windows_per_epoch()
            rng = np.random.Generator(np.random.PCG64([seed, epoch]))
            # Up to the whole remainder, so that every token is seen in some epoch.
            spare = len(tokens) - count * self.length if tokens.ndim == 1 else 0
            while len(self._epochs) > 1:  # keep two: a batch may straddle them
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[seed, epoch] = int(rng.integers(spare + 1)), rng.permutation(count)
        return self._epochs[seed, epoch]


# ---------------------------------------------------------------- text <-> ids


class Codec:
    """Text (str) <-> ids (n,) int64. `kind` and `vocab`, in plain types, rebuild it by CODECS."""

    kind = ""

    def __init__(self, vocab: str | list[str] | None = None) -> None:
        self.vocab = vocab

    def encode(self, text: str) -> np.ndarray:
        raise NotImplementedError

    def decode(self, ids: np.ndarray) -> str:
        raise NotImplementedError


class CharCodec(Codec):
    """One id per character: its place in the string `vocab`."""

    kind = "char"

    def __init__(self, vocab: str) -> None:
        super().__init__(vocab)
        self.points = code_points(vocab)  # (V,)
        self.table = np.full(0x110000, -1, dtype=np.int32)  # code point -> id
        self.table[self.points] = np.arange(len(vocab))

    def encode(self, text: str) -> np.ndarray:
        ids = self.table[code_points(text)]
        if len(ids) and ids.min() < 0:
            at = int(np.argmax(ids < 0))
            raise DataError(f"character {text[at]!r} at offset {at} is not in the vocabulary; "
                            "remove it, or let the training text contain it")
        return ids.astype(np.int64)

    def decode(self, ids: np.ndarray) -> str:
        return self.points[ids].tobytes().decode("utf-32-le")


class ByteCodec(Codec):
    """One id per byte of the UTF-8 text."""

    kind = "byte"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode(errors="replace")


class GPT2Codec(Codec):
    """GPT-2's byte-pair encoding, by tiktoken; loaded when first used."""

    kind = "gpt2"

    def encode(self, text: str) -> np.ndarray:
        return np.array(gpt2_encoder().encode_ordinary(text), dtype=np.int64)

    def decode(self, ids: np.ndarray) -> str:
        return gpt2_encoder().decode(ids.tolist())


class WordPieceCodec(Codec):
    """BERT's WordPiece, lower-cased, with a list `vocab`; `tokenizers` is needed to encode only."""

    kind = "wordpiece"
    tokenizer = None

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self.tokenizer is None:
            self.tokenizer = wordpiece_tokenizer(self.vocab)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in
                self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: np.ndarray) -> str:
        words = (self.vocab[i] for i in ids)
        return " ".join(word for word in words if word != "[PAD]").replace(" ##", "")


class IdCodec(Codec):
    """For arrays of ids whose meaning we do not know: "3 1 4" <-> [3, 1, 4]."""

    kind = "id"

    def encode(self, text: str) -> np.ndarray:
        return np.array([int(word) for word in text.split()], dtype=np.int64)

    def decode(self, ids: np.ndarray) -> str:
        return " ".join(str(i) for i in ids)


CODECS = {codec.kind: codec for codec in Codec.__subclasses__()}


def code_points(text: str) -> np.ndarray:
    """(n,) uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def gpt2_encoder():
    """tiktoken's GPT-2 encoder. Raises DataError if its vocabulary cannot be had."""
    import tiktoken
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever its HTTP library raises
        raise DataError(f"cannot get GPT-2's vocabulary ({type(error).__name__}): connect once, or "
                        "set TIKTOKEN_CACHE_DIR to a folder that holds it") from error


def wordpiece_tokenizer(vocab: list[str]):
    """The Rust tokenizer of bert-base-uncased. Raises DataError if it is not installed."""
    try:
        from tokenizers import BertWordPieceTokenizer
    except ImportError as error:
        raise DataError("WordPiece needs one more package: pip install tokenizers") from error
    return BertWordPieceTokenizer({word: i for i, word in enumerate(vocab)}, lowercase=True)


# ---------------------------------------------------------------- files


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(url: str, path: str | Path, sha256: str | None = None, size: int | None = None
             ) -> Path:
    """Fetches `url` into `path`; a broken download continues from `path`.part.

    The environment's CATDIFF_MIRROR replaces all of the URL but the file's name. `size` in bytes.
    Raises DataError if the file cannot be had or is not the one expected.
    """
    path = Path(path)
    if mirror := os.environ.get("CATDIFF_MIRROR"):
        url = mirror.rstrip("/") + "/" + url.rsplit("/", 1)[1]
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            if response.status != 206:  # the server sends the file from its beginning
                have = 0
            rest = response.headers["Content-Length"]
            total = have + int(rest) if rest else size
            known = f"{total / 1e6:.1f} MB" if total else "size unknown"
            print(f"downloading {path.name} ({known}) from {url}", file=sys.stderr)
            bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=path.name)
            with bar, open(part, "ab" if have else "wb") as file:
                while block := response.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
    except OSError as error:
        if getattr(error, "code", None) == 416:  # .part is longer than the file: not a part of it
            part.unlink()
            return download(url, path, sha256, size)
        raise DataError(f"cannot download {url} ({error}); run again, or put {path.name} at "
                        f"{path} yourself") from error
    if total and part.stat().st_size < total:
        raise DataError(f"{url} broke off after {part.stat().st_size} of {total} bytes; run again "
                        "to continue")
    if sha256 and (got := sha256_of(part)) != sha256:
        part.unlink()
        raise DataError(f"{url} is not the file expected: sha256 is {got}, expected {sha256}; "
                        "removed it")
    os.replace(part, path)
    return path


def cache_folder() -> Path:
    """Where prepared sets go when `data_dir` cannot be written."""
    return Path(os.environ.get("CATDIFF_CACHE", Path.home() / ".cache" / "catdiff"))


def writable(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    # The mode bits count for root too, who could write anywhere.
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """One process at a time holds `path`; yields False where the file system knows no locks.

    The system itself frees the lock of a process that dies, so none is ever stale.
    """
    with open(path, "w") as file:
        try:
            import fcntl
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process to free {path}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except (ImportError, OSError):
            alone = False  # each process then builds its own copy, and the renames are atomic
        yield alone


@dataclass
class Workshop:
    """What a recipe works with: where raw files may lie, where to put arrays, which length."""

    folders: list[Path]  # searched for raw files
    downloads: Path
    out: Path
    length: int
    shapes: dict[str, list[int]] = field(default_factory=dict)  # of the splits written
    largest: int = 0  # id written

    def find(self, file: str) -> Path | None:
        return next((f / file for f in self.folders if (f / file).exists()), None)

    def fetch(self, url: str, sha256: str | None = None, size: int | None = None) -> Path:
        """The raw file, found or downloaded. Raises DataError if it is not the one expected."""
        file = url.rsplit("/", 1)[1]
        if self.find(file) is None:
            self.downloads.mkdir(parents=True, exist_ok=True)
            with locked(self.downloads / ".downloading"):
                if self.find(file) is None:  # another process may have fetched it
                    return download(url, self.downloads / file, sha256, size)
        path = self.find(file)
        if sha256 and (got := sha256_of(path)) != sha256:
            raise DataError(f"{path} is not the file expected: sha256 is {got}, expected "
                            f"{sha256}; move it away to have it downloaded")
        return path

    def write(self, split: str, arrays: Iterable[np.ndarray], dtype: type, row: tuple = ()) -> None:
        """Appends `arrays`, each (n, *row), to one .npy file: the whole may exceed memory."""
        header = {"descr": np.dtype(dtype).str, "fortran_order": False}
        count = 0
        with open(self.out / f"{split}.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (0, *row)})
            begin = file.tell()
            for array in filter(len, arrays):
                file.write(array.astype(dtype).tobytes())
                count += len(array)
                self.largest = max(self.largest, int(array.max()))
            file.seek(0)  # numpy leaves room in the header for the count to grow
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, *row)})
            assert file.tell() == begin
        self.shapes[split] = [count, *row]

    def write_text(self, split: str, text: str, codec: CharCodec) -> None:
        pieces = (text[i:i + (1 << 22)] for i in range(0, len(text), 1 << 22))
        self.write(split, (codec.encode(piece) for piece in pieces), np.uint8)


# ---------------------------------------------------------------- recipes: characters and bytes

# text8's alphabet. The space is id 0, as in any sorted vocabulary.
LETTERS = " abcdefghijklmnopqrstuvwxyz"
DIGITS = str.maketrans({str(i): f" {word} " for i, word in enumerate(
    "zero one two three four five six seven eight nine".split())})


def normalise(text: str) -> str:
    """To text8's alphabet: lower case, digits spelled out, any other run is one space."""
    return re.sub("[^a-z]+", " ", text.lower().translate(DIGITS)).strip()


def char_tokenizer(characters: str) -> dict:
    return {"unit": "char", "codec": "char", "vocab": characters, "vocab_size": len(characters)}


def cut(text: str) -> dict[str, str]:
    """90 / 5 / 5 % of the characters."""
    a, b = len(text) * 90 // 100, len(text) * 95 // 100
    return {"train": text[:a], "valid": text[a:b], "test": text[b:]}


def build_pydoc(shop: Workshop) -> dict:
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
    for split, text in cut(" ".join(paragraphs)).items():
        shop.write_text(split, text, CharCodec(LETTERS))
    return char_tokenizer(LETTERS)


PYCODE_LIMIT = 10_000_000  # bytes
PYCODE_SKIPPED = {  # not ours, tests, or tables rather than code
    "site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings"}


def build_pycode(shop: Workshop) -> dict:
    """The sources of Python's own library; a file's split is a hash of its name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, list[np.ndarray]] = {"train": [], "valid": [], "test": []}
    total = 0
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if PYCODE_SKIPPED & set(name.split("/")) or total + path.stat().st_size > PYCODE_LIMIT:
            continue
        place = hashlib.sha256(name.encode()).digest()[0] % 20
        split = {0: "valid", 1: "test"}.get(place, "train")
        texts[split].append(np.frombuffer(path.read_bytes() + b"\n", dtype=np.uint8))
        total += len(texts[split][-1])
    for split, arrays in texts.items():
        shop.write(split, arrays, np.uint8)
    return {"unit": "byte", "codec": "byte", "vocab": None, "vocab_size": 256}


def build_shakespeare(shop: Workshop) -> dict:
    """nanoGPT's character benchmark: first 90% train, last 10% valid. There is no test split."""
    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    text = shop.fetch(url + "input.txt", sha256, 1_115_394).read_bytes().decode()
    characters, cut_at = "".join(sorted(set(text))), len(text) * 9 // 10
    shop.write_text("train", text[:cut_at], CharCodec(characters))
    shop.write_text("valid", text[cut_at:], CharCodec(characters))
    return char_tokenizer(characters) | {"alias": {"test": "valid"}}


def build_text8(shop: Workshop) -> dict:
    """100M characters of Wikipedia: the first 90M train, 5M valid, 5M test."""
    if path := shop.find("text8"):
        text = path.read_bytes().decode("ascii", "replace")
    else:
        sha256 = "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232"
        path = shop.fetch("http://mattmahoney.net/dc/text8.zip", sha256, 31_344_016)
        text = zipfile.ZipFile(path).read("text8").decode("ascii")
    if len(text) != 100_000_000:
        raise DataError(f"{path} has {len(text)} characters, not text8's 100,000,000; remove it")
    for split, part in cut(text).items():
        shop.write_text(split, part, CharCodec(LETTERS))
    return char_tokenizer(LETTERS)


NLTK_URL = "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/corpora/"
ENGLISH27_ARCHIVES = {  # in the order of the recipe; sha256
    "abc": "129bb6001beb828049a90a59b7dd3c2f0594a47012e48fc5177dfae38e658565",
    "brown": "9b275f9b3b95d7bd66ccfb7cd259f445a13bbe5d1f4107aba09fd3e8364bafa6",
    "genesis": "0cac241f88d7999f81a45e26b1764b2d1f3b4d21654aa954e0d5349eb4784cd0",
    "inaugural": "7c5fb5793e31fbeae12bf1aa0ffda5336468f07cedb50654c6d31ca384e2046b",
    "masc_tagged": "678a5141cf3381bedb1839c58a330507337be07c7c71603279c0ef5337032304",
    "movie_reviews": "a41211ae685019137410268134db6a1a14428c89b671eb83056151a878539008",
    "pil": "0538ee1d94de616004fd2434cf03840dffab5507cf8b56725b6ef82b572deb76",
    "product_reviews_1": "627bfb0bb7c87586246d99b4402c3d7e4fb77ac14559d8695c283bd6850615ac",
    "product_reviews_2": "272b08fe130882e5867aa7ecc69a65616099183c4ccc10374a62c271801b0bc1",
    "sentence_polarity": "6e1ed4405b65c7eabf1d199a7f7c437091ac21da0ea7467b410a74062574566b",
    "shakespeare": "f1251d8c254710363254ba29c9dc0888d5cb13d5ac736ebc6fb14380f447cfc3",
    "state_union": "366c1dc82b2abf896f42b2ec50ba802a0141a29f75d29ca48a7a243ce5bfbe8d",
    "subjectivity": "741f3371e1a4375051b874fd82fd55857b90975473c91c19a3101cbe17fc4d8c",
    "treebank": "9da92d76c3666cfb6cddeaed0f7e86b344cce0f0928a286d439e555f19c37399",
    "webtext": "9e32dbae4879464b8f420a0dc721855bb26167b720d7695588d2ca2aeadf501a"}
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


def english27_documents(corpus: str, path: Path) -> Iterator[str]:
    """The normalised documents of one NLTK archive, those of at least 200 characters."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(n for n in archive.namelist() if not n.endswith("/")):
            file = name.rsplit("/", 1)[-1]
            if corpus in ENGLISH27_KEPT:
                kept = re.fullmatch(ENGLISH27_KEPT[corpus], name)
            else:
                kept = "readme" not in file.lower() and not file.startswith(".")
            if kept:
                text = archive.read(name).decode("latin-1")
                text = normalise(re.sub(*ENGLISH27_CLEANED.get(corpus, ("^$", "")), text))
                if len(text) >= 200:
                    yield text


def build_english27(shop: Workshop) -> dict:
    """33M characters of free English corpora in text8's alphabet, from 15 NLTK archives."""
    given = {s: shop.find(f"{s}.txt.xz") for s in ENGLISH27_SHA256}
    if all(given.values()):
        splits = {s: lzma.open(path, "rt").read() for s, path in given.items()}
    else:
        documents = []
        for corpus, sha256 in ENGLISH27_ARCHIVES.items():
            path = shop.fetch(f"{NLTK_URL}{corpus}.zip", sha256)
            documents.extend(english27_documents(corpus, path))
        random.Random(0).shuffle(documents)
        splits = cut(" ".join(documents))
    for split, text in splits.items():
        got = hashlib.sha256(text.encode()).hexdigest()
        if got != ENGLISH27_SHA256[split]:
            raise DataError(f"{given[split] or split} is not english27's text: the sha256 of what "
                            f"it holds is {got}, expected {ENGLISH27_SHA256[split]}; remove it")
        shop.write_text(split, text, CharCodec(LETTERS))
    return char_tokenizer(LETTERS)


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


OWT_URL = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/"
# The last revision we know with the original archives; later ones hold Parquet files instead.
OWT_URL += "f3808c30e817981b845ec549c43e82bb467d8144/subsets/urlsf_subset{:02d}.tar"
OWT_ARCHIVES = 21
OWT_HELD_OUT = 100_000  # documents, the last ones
OWT_EOS = 50256  # <|endoftext|>, GPT-2's only special token: bos and eos alike


def owt_tokens(subset: bytes) -> list[np.ndarray]:
    """Tokenises one .xz archive of .txt documents: (n,) uint16 each, with eos at its end."""
    documents, codec = [], GPT2Codec()
    with tarfile.open(fileobj=io.BytesIO(subset), mode="r:xz") as archive:
        for member in archive:
            if member.name.endswith(".txt"):
                text = archive.extractfile(member).read().decode()
                ids = codec.encode(re.sub("\n\n\n+", "\n\n", text).strip())
                documents.append(np.append(ids, OWT_EOS).astype(np.uint16))
    return documents


def owt_documents(archives: list[Path], workers: int) -> Iterator[np.ndarray]:
    """All documents in order; at most 4 subsets (1,000 documents or less) per worker in memory."""
    def subsets() -> Iterator[bytes]:
        for path in tqdm(archives, desc="tokenising", unit="archive"):
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.name.endswith(".xz"):
                        yield archive.extractfile(member).read()

    with multiprocessing.Pool(workers) as pool:
        for group in groups(subsets(), 4 * workers):
            for documents in pool.map(owt_tokens, group, chunksize=1):
                yield from documents


def hold_out(documents: Iterable[np.ndarray], count: int, held: deque) -> Iterator[np.ndarray]:
    """Passes documents on but the last `count`, which are left in `held`."""
    for document in documents:
        held.append(document)
        if len(held) > count:
            yield held.popleft()


def build_owt(shop: Workshop) -> dict:
    """OpenWebText in GPT-2's tokens, as MDLM has it. 12 GB to download, 18 GB prepared."""
    archives = [shop.fetch(OWT_URL.format(i)) for i in range(OWT_ARCHIVES)]
    held: deque = deque()
    frame = dict(length=shop.length, bos=OWT_EOS, eos=OWT_EOS)
    documents = owt_documents(archives, os.cpu_count() or 1)
    train = hold_out(documents, OWT_HELD_OUT, held)
    shop.write("train", pack(train, **frame), np.uint16, (shop.length,))
    shop.write("valid", pack(held, **frame), np.uint16, (shop.length,))
    return {"unit": "token", "codec": "gpt2", "vocab": None, "vocab_size": 50257,
            "bos_id": OWT_EOS, "eos_id": OWT_EOS, "alias": {"test": "valid"}}


LM1B_URL = "https://www.statmt.org/lm-benchmark/"
LM1B_URL += "1-billion-word-language-modeling-benchmark-r13output.tar.gz"
LM1B_SHA256 = "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e"
LM1B_FILES = {  # 30,301,028 and 306,688 sentences; MDLM validates and tests on the latter
    "train": r".*/training-monolingual\.tokenized\.shuffled/news\.en-\d+-of-\d+",
    "test": r".*/heldout-monolingual\.tokenized\.shuffled/news\.en\.heldout-\d+-of-\d+"}
BERT_URL = "https://huggingface.co/google-bert/bert-base-uncased/resolve/"
BERT_URL += "86b5e0934494bd15c9632b12f734a8a67f723594/vocab.txt"
BERT_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"


def detokenise(sentence: str) -> str:
    """Undoes lm1b's spaces as far as WordPiece can tell.

    MDLM's rules also join words with their punctuation (it 's, $ 5, ( so ) ...), but BERT splits
    at those signs with or without spaces. The pound is none of them: £5 is another token.
    """
    return sentence.replace("£ ", "£")


def lm1b_sentences(path: Path, split: str) -> Iterator[str]:
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            if member.isfile() and re.fullmatch(LM1B_FILES[split], member.name):
                for line in tqdm(archive.extractfile(member), desc=member.name[-20:], leave=False):
                    yield detokenise(line.decode().strip())


def build_lm1b(shop: Workshop, padded: bool = False) -> dict:
    """The One Billion Word benchmark in BERT's tokens, as rows of 128.

    Packed (`lm1b`): sentences, each ended by [SEP], run through rows that begin with [CLS] and end
    with [SEP]; MDLM's perplexity there is 31.8. Padded (`lm1b-padded`): a row per sentence; MDLM's
    is 27.0. The two predict different tokens: their figures must never share a table.
    """
    vocab = shop.fetch(BERT_URL, BERT_SHA256).read_text(encoding="utf-8").splitlines()
    archive = shop.fetch(LM1B_URL, LM1B_SHA256, 1_792_209_805)
    codec = WordPieceCodec(vocab)
    pad_id, bos, eos = (vocab.index(word) for word in ("[PAD]", "[CLS]", "[SEP]"))
    for split in LM1B_FILES:
        sentences = groups(lm1b_sentences(archive, split), 10_000)
        documents = (ids for group in sentences for ids in codec.encode_batch(group))
        if padded:
            rows = pad(documents, shop.length, bos, eos, pad_id)
        else:
            rows = pack((np.append(ids, eos) for ids in documents), shop.length, bos, eos)
        shop.write(split, rows, np.uint16, (shop.length,))
    return {"unit": "token", "codec": "wordpiece", "vocab": vocab, "vocab_size": len(vocab),
            "bos_id": bos, "eos_id": eos, "pad_id": pad_id, "alias": {"valid": "test"}}


def build_lm1b_padded(shop: Workshop) -> dict:
    return build_lm1b(shop, padded=True)


# ---------------------------------------------------------------- toys: points in the plane

TOY_BINS = 100   # per axis: V
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


def load_toy(name: str) -> TextData:
    """A toy of VADD's section 5.1: rows (100,000, 2) of bins 0..99, drawn in a moment.

    Each axis is rescaled to [0, 1] by the training points' extremes and cut into 100 bins. The
    train histograms' entropies: 8.492, 7.088, 7.422 nats; eight dark squares have ln 5000 = 8.517,
    the rest is the bias of 100,000 counts in 5,000 cells.
    """
    draw, low, high, splits = TOYS[name], None, None, {}
    for number, split in enumerate(("train", "valid", "test")):
        points = draw(np.random.default_rng(number), TOY_POINTS)
        if low is None:
            low, high = points.min(0), points.max(0)
        bins = np.floor((points - low) / (high - low) * TOY_BINS)
        splits[split] = np.clip(bins, 0, TOY_BINS - 1).astype(np.uint8)
    return TextData(name, TOY_BINS, 2, "bin", splits, IdCodec())


# ---------------------------------------------------------------- pairs of sentences

PAD, BOS, EOS = 0, 1, 2  # of every PairData; the tokens follow
SPECIALS = 3
# Words with the space before them, numbers, and runs of other signs, as GPT-2 cuts text.
BPE_PATTERN = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"


class BPECodec(Codec):
    """Byte-pair encoding learned on the training text: any text <-> ids >= 3, without loss.

    `vocab` lists the tokens' bytes in hexadecimal, in the order they were learned; 256 bytes come
    first, so no character is unknown and decoding restores spaces as they were.
    """

    kind = "bpe"

    def __init__(self, vocab: list[str]) -> None:
        super().__init__(vocab)
        import tiktoken
        ranks = {bytes.fromhex(token): i for i, token in enumerate(vocab)}
        self.encoder = tiktoken.Encoding("pairs", pat_str=BPE_PATTERN, mergeable_ranks=ranks,
                                         special_tokens={})

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.encoder.encode_ordinary(text), dtype=np.int64) + SPECIALS

    def decode(self, ids: np.ndarray) -> str:
        """PAD, BOS and EOS have no text."""
        return self.encoder.decode([int(i) - SPECIALS for i in ids if i >= SPECIALS])


def learn_bpe(texts: Iterable[str], size: int) -> list[str]:
    """The tokens of a byte-pair encoding (Sennrich et al. 2016): 256 bytes, then the merges.

    Each round joins the most frequent pair of neighbours within words (the first in byte order
    among equals), until there are `size` tokens or no pair occurs twice.
    """
    import regex
    counts = Counter(word for text in texts for word in regex.findall(BPE_PATTERN, text))
    words = [[bytes([b]) for b in word.encode()] for word in counts]
    weights = list(counts.values())
    pairs: Counter = Counter()
    places: dict[tuple, set[int]] = defaultdict(set)  # pair -> the words that have or had it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += weights[i]
            places[pair].add(i)
    tokens = [bytes([b]) for b in range(256)]
    known = set(tokens)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    while len(tokens) < size and heap:
        n, pair = heapq.heappop(heap)
        if -n != pairs[pair]:  # outdated: its present count is elsewhere in the heap
            continue
        if -n < 2:
            break
        joined, changed = pair[0] + pair[1], set()
        for i in places.pop(pair):
            old, new = words[i], []
            for piece in old:
                if new and (new[-1], piece) == pair:
                    new[-1] = joined
                else:
                    new.append(piece)
            for sign, pieces in ((-1, old), (1, new)):
                for other in zip(pieces, pieces[1:]):
                    pairs[other] += sign * weights[i]
                    changed.add(other)
                    if sign == 1:
                        places[other].add(i)
            words[i] = new
        pairs.pop(pair, None)
        for other in changed:
            if pairs[other] > 0:
                heapq.heappush(heap, (-pairs[other], other))
        if joined not in known:  # the same bytes can be joined in two ways
            known.add(joined)
            tokens.append(joined)
    return [token.hex() for token in tokens]


@dataclass
class Sentences:
    """Token sequences one after the other: sentence i is ids[starts[i]:starts[i + 1]]."""

    ids: np.ndarray  # (tokens,) int32
    starts: np.ndarray  # (n + 1,) int64

    def __post_init__(self) -> None:
        self.lengths = np.diff(self.starts)

    @classmethod
    def join(cls, sentences: Sequence[Sequence[int]]) -> "Sentences":
        ids = np.fromiter(itertools.chain.from_iterable(sentences), np.int32)
        return cls(ids, np.cumsum([0, *map(len, sentences)]))

    @classmethod
    def encode(cls, texts: Sequence[str], codec: BPECodec) -> "Sentences":
        """BOS, tokens, EOS of each text; several threads work."""
        parts = []
        for some in groups(tqdm(texts, "tokenising", disable=len(texts) < 10**6), 100_000):
            rows = codec.encoder.encode_ordinary_batch([text.strip() for text in some])
            parts.append(cls.join([[BOS, *(i + SPECIALS for i in row), EOS] for row in rows]))
        if not parts:
            return cls.join([])
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

    def __post_init__(self) -> None:
        self.vocab_size = SPECIALS + len(self.codec.vocab)
        shortest, longest = (f(*(s.lengths for s in self.train)) for f in (np.minimum, np.maximum))
        kept = (shortest > 2) & (longest <= self.length)  # an empty sentence is BOS EOS
        self.kept = np.flatnonzero(kept)
        self.pairs = len(self.kept)
        self.longest = -(-longest[self.kept] // 8) * 8  # (pairs,)
        if len(kept) and not self.pairs:
            raise DataError(f"{self.name}: no training pair has two sides of 1 to "
                            f"{self.length - 2} tokens; raise --max_length")
        if lost := len(kept) - self.pairs:
            print(f"{self.name}: {lost:,} of {len(kept):,} training pairs are left out, a side "
                  f"is empty or longer than {self.length - 2} tokens", file=sys.stderr)

    def pairs_of(self, split: str, limit: int | None = None) -> list[tuple[str, str]]:
        """Texts of the split's first pairs."""
        if split != "train":
            return self.texts.get(split, [])[:limit]
        sides = ([self.decode(side.ids[side.starts[i] + 1:side.starts[i + 1]])
                  for i in self.kept[:limit]] for side in self.train)
        return list(zip(*sides))

    def encode(self, text: str) -> np.ndarray:
        """Text to BOS, tokens, EOS: (n,) int64."""
        text = text.strip().lower() if self.lower else text.strip()
        return np.concatenate([[BOS], self.codec.encode(text), [EOS]])

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """Texts (b,) to rows of ids (b, L), filled with PAD; too long ones are cut, and named."""
        encoded = [self.encode(text) for text in texts]
        for i, ids in enumerate(encoded):
            if len(ids) > self.length:
                print(f"a sentence of {len(ids)} tokens is cut to --max_length {self.length}: "
                      f"{texts[i][:40]!r}...", file=sys.stderr)
                encoded[i] = np.append(ids[:self.length - 1], EOS)
        return Sentences.join(encoded).rows(np.arange(len(texts)), self.length)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids (n,) to text, up to the first EOS."""
        ids = np.asarray(ids)
        ends = np.flatnonzero(ids == EOS)
        return self.codec.decode(ids[:ends[0]] if len(ends) else ids).strip()

    def tokenizer(self) -> dict:
        """What a checkpoint keeps to translate alone."""
        return {"name": self.name, "length": self.length, "vocab": self.codec.vocab,
                "lower": self.lower}

    @classmethod
    def from_tokenizer(cls, kept: dict) -> "PairData":
        """To translate: without pairs."""
        none = Sentences.join([])
        return cls(kept["name"], kept["length"], BPECodec(kept["vocab"]), (none, none), {},
                   kept["lower"])

    def cuts(self, batch_tokens: int) -> list[int]:
        """Where batches begin among the pairs in order of falling length, and the end: as many as
        fit into batch_tokens when each is as long as its longer side's multiple of 8."""
        falling, cuts = np.sort(self.longest)[::-1], [0]
        while cuts[-1] < self.pairs:
            cuts.append(cuts[-1] + max(1, batch_tokens // falling[cuts[-1]]))
        return cuts

    def train_batch(self, seed: int, step: int, batch_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of a step: sources (b, M), targets (b, N), int64; a function of its arguments.

        A batch has pairs of similar length. Each epoch shuffles the pairs, sorts them by length,
        cuts them into batches and shuffles those; every pair occurs, and the last batch is filled
        up with pairs that occurred already.
        """
        if self._plan.get("tokens") != batch_tokens:
            self._plan = {"tokens": batch_tokens, "cuts": self.cuts(batch_tokens)}
        cuts = self._plan["cuts"]
        epoch, place = divmod(step, len(cuts) - 1)
        if self._plan.get("epoch") != (seed, epoch):
            rng = np.random.Generator(np.random.PCG64([seed, epoch]))
            order = rng.permutation(self.pairs)
            self._plan |= {"epoch": (seed, epoch), "turns": rng.permutation(len(cuts) - 1),
                           "order": order[np.argsort(-self.longest[order], kind="stable")]}
        turn = self._plan["turns"][place]
        end = min(cuts[turn + 1], self.pairs)
        rows = self.kept[self._plan["order"][max(0, end - cuts[turn + 1] + cuts[turn]):end]]
        return tuple(side.rows(rows, self.length) for side in self.train)


GERMAN = ("null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn "
          "fünfzehn sechzehn siebzehn achtzehn neunzehn").split()
GERMAN_TENS = ". . zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
ENGLISH = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
           "fifteen sixteen seventeen eighteen nineteen").split()
ENGLISH_TENS = ". . twenty thirty forty fifty sixty seventy eighty ninety".split()
MAX_NUMBER = 999_999


def german_number(n: int) -> str:
    """0..999,999 in one German word, units before tens: 34 is vierunddreißig."""
    def below(n: int, last: str) -> str:  # 1..999; the final 1 is "eins", but "ein" inside
        hundreds, rest = divmod(n, 100)
        word = GERMAN[hundreds] + "hundert" if hundreds else ""
        if rest == 1:
            return word + last
        if rest < 20:
            return word + (GERMAN[rest] if rest else "")
        tens, units = divmod(rest, 10)
        return word + (GERMAN[units] + "und" if units else "") + GERMAN_TENS[tens]

    if n == 0:
        return GERMAN[0]
    thousands, rest = divmod(n, 1000)
    word = below(thousands, "ein") + "tausend" if thousands else ""
    return word + (below(rest, "eins") if rest else "")


def english_number(n: int) -> str:
    """0..999,999 in American English, without "and": 34 is thirty-four."""
    def below(n: int) -> list[str]:  # 1..999
        hundreds, rest = divmod(n, 100)
        words = [ENGLISH[hundreds], "hundred"] if hundreds else []
        if 0 < rest < 20:
            words.append(ENGLISH[rest])
        elif rest:
            tens, units = divmod(rest, 10)
            words.append(ENGLISH_TENS[tens] + (f"-{ENGLISH[units]}" if units else ""))
        return words

    if n == 0:
        return ENGLISH[0]
    thousands, rest = divmod(n, 1000)
    return " ".join((below(thousands) + ["thousand"] if thousands else []) + below(rest))


def number_pairs(max_number: int) -> dict[str, list[tuple[str, str]]]:
    """0..max_number as German and English words: a twentieth each is held out, at most 1,000."""
    if not 19 < max_number <= MAX_NUMBER:
        raise DataError(f"numbers: choose a largest number of 20 to {MAX_NUMBER}")
    order = list(range(max_number + 1))
    random.Random(0).shuffle(order)
    pairs = [(german_number(n), english_number(n)) for n in order]
    held = min(1000, len(pairs) // 20)
    return {"valid": pairs[:held], "test": pairs[held:2 * held], "train": pairs[2 * held:]}


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, perhaps .gz. Raises DataError if it is not UTF-8 text."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            text = file.read().decode()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: give a text file with a sentence per line"
                        ) from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    # Only newlines end a line: str.splitlines would also cut at rare signs inside sentences.
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]


def read_pairs(source: str | Path, target: str | Path) -> list[tuple[str, str]]:
    """Line i of both files is a pair. Raises DataError if their numbers of lines differ."""
    a, b = read_lines(Path(source)), read_lines(Path(target))
    if len(a) != len(b):
        raise DataError(f"{source} has {len(a)} lines, {target} has {len(b)}: line i of one must "
                        "be the translation of line i of the other")
    return list(zip(a, b))


MULTI30K_URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"
MULTI30K_SHA256 = {  # German, English; 29,000 / 1,014 / 1,000 captions of photographs
    "train": ("726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
              "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f"),
    "val": ("f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
            "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28"),
    "test_2016_flickr": ("9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
                         "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9")}


Pairs = list[tuple[str, str]]


def multi30k_pairs(shop: Workshop) -> dict[str, Pairs]:
    """German and English captions (Elliott et al. 2016); test is test_2016_flickr."""
    pairs = {}
    for name, sums in MULTI30K_SHA256.items():
        files = [shop.fetch(f"{MULTI30K_URL}{name}.{language}.gz", sha256)
                 for language, sha256 in zip(("de", "en"), sums)]
        pairs[name] = read_pairs(*files)
    return {"train": pairs["train"], "valid": pairs["val"], "test": pairs["test_2016_flickr"]}


def archived(archive: Path, source: str, target: str) -> Pairs:
    """Pairs of lines of two files in a .tgz or .zip; of an .sgm or .xml file, its segments."""
    found = {}
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                found = {name: file.read(name) for name in (source, target)}
        else:
            with tarfile.open(archive) as file:
                for member in file:
                    if (name := member.name.removeprefix("./")) in (source, target):
                        found[name] = file.extractfile(member).read()
        texts = [found[name].decode() for name in (source, target)]
    except (KeyError, OSError, EOFError, UnicodeDecodeError, tarfile.TarError,
            zipfile.BadZipFile) as error:
        raise DataError(f"{archive} does not hold {source} and {target} ({error}); move it away "
                        "to have it downloaded again") from error
    sides = [re.findall(r"<seg[^>]*>(.*?)</seg>", text, re.S) if name.endswith((".sgm", ".xml"))
             else text.removesuffix("\n").split("\n")
             for name, text in zip((source, target), texts)]
    if len(sides[0]) != len(sides[1]):
        raise DataError(f"{archive}: {source} has {len(sides[0])} lines, {target} has "
                        f"{len(sides[1])}")
    return [(html.unescape(a).strip(), html.unescape(b).strip()) for a, b in zip(*sides)]


IWSLT14_URL = "http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"
IWSLT14_TEST = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")


def iwslt14_pairs(shop: Workshop) -> dict[str, Pairs]:
    """TED talks, German to English, divided as is usual: every 23rd pair is held out to validate.

    Pairs of more than 175 words, or 1.5 times as many on one side, are left out; words are
    counted by `tokenise_13a` and not by Moses, so a few of the 160,215 + 7,282 differ. The archive
    is taken as it comes (no checksum is published).
    """
    path = shop.fetch(IWSLT14_URL)
    pairs = []
    for pair in archived(path, *(f"de-en/train.tags.de-en.{end}" for end in ("de", "en"))):
        if re.match(r"<(url|talkid|keywords)>", pair[0]):
            continue
        pair = tuple(re.sub(r"</?(title|description)>", "", side).strip() for side in pair)
        short, long = sorted(len(tokenise_13a(side)) for side in pair)
        if 0 < short and long <= min(175, 1.5 * short):
            pairs.append(pair)
    test = [archived(path, *(f"de-en/IWSLT14.{name}.de-en.{end}.xml" for end in ("de", "en")))
            for name in IWSLT14_TEST]
    return {"train": [p for i, p in enumerate(pairs, 1) if i % 23],
            "valid": pairs[22::23], "test": sum(test, [])}


def wmt14_pairs(shop: Workshop) -> dict[str, Pairs]:
    """English to German news: Europarl 7, Common Crawl, News Commentary 9; newstest2013 and 2014.

    1.7 GB to download, taken as it comes (no checksums are published).
    """
    def part(url: str, name: str, ends: tuple = ("en", "de")) -> Pairs:
        return archived(shop.fetch(url), *(name.format(end) for end in ends))

    old, new = "https://www.statmt.org/wmt13/", "https://www.statmt.org/wmt14/"
    train = part(old + "training-parallel-europarl-v7.tgz", "training/europarl-v7.de-en.{}")
    train += part(old + "training-parallel-commoncrawl.tgz", "commoncrawl.de-en.{}")
    train += part(new + "training-parallel-nc-v9.tgz", "training/news-commentary-v9.de-en.{}")
    return {"train": train,
            "valid": part("https://data.statmt.org/wmt17/translation-task/dev.tgz",
                          "dev/newstest2013.{}"),
            "test": part(new + "test-full.tgz", "test-full/newstest2014-deen-{}.sgm",
                         ("src.en", "ref.de"))}


def wmt16_pairs(shop: Workshop) -> dict[str, Pairs]:
    """English to Romanian news: Europarl 8 and SETIMES 2; newsdev2016 and newstest2016.

    Taken as it comes (no checksums are published).
    """
    url = "https://data.statmt.org/wmt16/translation-task/"
    setimes = "https://object.pouta.csc.fi/OPUS-SETIMES/v2/moses/en-ro.txt.zip"
    train = archived(shop.fetch(url + "training-parallel-ep-v8.tgz"), *(
        f"training-parallel-ep-v8/europarl-v8.ro-en.{end}" for end in ("en", "ro")))
    train += archived(shop.fetch(setimes), *(f"SETIMES.en-ro.{end}" for end in ("en", "ro")))
    return {"train": train} | {
        split: archived(shop.fetch(url + f"{file}.tgz"), *(
            f"{file}/{name}2016-enro-{end}.sgm" for end in ("src.en", "ref.ro")))
        for split, file, name in (("valid", "dev", "newsdev"), ("test", "test", "newstest"))}


# What follows # is not sent to the server: it names the file.
GIGAWORD_URL = ("https://drive.usercontent.google.com/download?export=download&confirm=t&"
                "id=1USoQ8lJgN8kAWnUnRrupMGrPMLlDVqlV#/gigaword.zip")


def gigaword_pairs(shop: Workshop) -> dict[str, Pairs]:
    """First sentences of news and their headlines (Rush et al. 2015), tokenised and lower-cased.

    280 MB to download, taken as it comes (no checksum is published).
    """
    path = shop.fetch(GIGAWORD_URL)
    pairs = {split: archived(path, *(f"org_data/{file}.{end}.txt" for end in ("src", "tgt")))
             for split, file in (("train", "train"), ("valid", "dev"), ("test", "test"))}
    return {split: [tuple(side.replace("<unk>", "UNK") for side in pair) for pair in some]
            for split, some in pairs.items()}


def diffuseq_pairs(shop: Workshop) -> dict[str, Pairs]:
    raise DataError(
        f"{shop.downloads.name} has no download address: get train.jsonl, valid.jsonl and "
        'test.jsonl with lines {"src": ..., "trg": ...} by the links in README of '
        f"https://github.com/Shark-NLP/DiffuSeq and put them into {shop.downloads}")


PAIR_SETS = {  # name -> the suffixes of prepared files, the recipe for raw ones
    "multi30k": (("de", "en"), multi30k_pairs), "iwslt14": (("de", "en"), iwslt14_pairs),
    "wmt14": (("en", "de"), wmt14_pairs), "wmt16": (("en", "ro"), wmt16_pairs),
    "gigaword": (("src", "tgt"), gigaword_pairs), "qqp": (("src", "trg"), diffuseq_pairs),
    "wiki_auto": (("src", "trg"), diffuseq_pairs), "quasar_t": (("src", "trg"), diffuseq_pairs)}


WORTH_KEEPING = 20_000  # pairs; fewer are encoded faster than they are looked up


def read_jsonl(path: Path) -> Pairs:
    """DiffuSeq's format: {"src": ..., "trg": ...} on each line."""
    try:
        rows = [json.loads(line) for line in read_lines(path) if line.strip()]
        return [(row["src"], row["trg"]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{path}: each line must be {{"src": ..., "trg": ...}} ({error!r})'
                        ) from error


def find_pairs(folder: Path, ends: tuple[str, str]) -> dict[str, Pairs]:
    """Prepared files: {train,valid,test}.jsonl, or pairs like train.de and train.en."""
    found = {}
    for split in ("train", "valid", "test"):
        if (path := folder / f"{split}.jsonl").exists():
            found[split] = read_jsonl(path)
        elif (path := folder / f"{split}.{ends[0]}").exists():
            found[split] = read_pairs(path, folder / f"{split}.{ends[1]}")
    if "valid" in found and "train" not in found:
        raise DataError(f"{folder} has valid pairs, but neither train.jsonl nor train.{ends[0]}")
    return found


def load_texts_of(name: str, bases: list[Path], max_number: int, files: dict[str, tuple],
                  distilled: str = "") -> dict[str, Pairs]:
    """All three splits. Without valid pairs a twentieth of the training pairs is held out;
    without test pairs test is valid."""
    def distil(texts: dict[str, Pairs]) -> dict[str, Pairs]:
        if not distilled:
            return texts
        targets = read_lines(Path(distilled))
        if len(targets) != len(texts["train"]):
            raise DataError(f"{distilled} has {len(targets)} lines for {len(texts['train'])} "
                            "training pairs: line i must belong to pair i")
        return texts | {"train": [(a, b) for (a, _), b in zip(texts["train"], targets)]}

    if name == "numbers":
        return distil(number_pairs(max_number))
    if name == "files":
        texts = {split: read_pairs(*pair) for split, pair in files.items() if pair}
        if "train" not in texts:
            raise DataError("give the training pairs as two files: --train a.de a.en")
    else:
        ends, recipe = PAIR_SETS[name]
        folders = [base / name for base in bases]
        texts = next(filter(None, (find_pairs(folder, ends) for folder in folders)), None)
        if texts is None:
            downloads = next(folder for folder in folders if writable(folder))
            texts = recipe(Workshop(folders, downloads, downloads, 0))
    texts = distil(texts)
    if "valid" not in texts:
        pairs = texts["train"]
        random.Random(0).shuffle(pairs)
        held = min(1000, max(1, len(pairs) // 20))
        texts |= {"valid": pairs[:held], "train": pairs[held:]}
    texts.setdefault("test", texts["valid"])
    return {split: texts[split] for split in ("train", "valid", "test")}


def load_pairs(
    name: str, data_dir: str | Path = "data", length: int = 256, vocab: int = 10_000,
    max_number: int = 9999, files: dict[str, tuple[str, ...]] | None = None, lower: bool = False,
    distilled: str = "",
) -> PairData:
    """`numbers`, one of PAIR_SETS, or `files`: split -> (source file, target file).

    At most `vocab` tokens are learned on both sides of the training pairs. Line i of the file
    `distilled` takes the place of training target i. Prepared files in data_dir/NAME
    (`find_pairs`) come before downloads. A large set is encoded once and kept in the cache folder
    until one of its files changes. Raises DataError.
    """
    bases, files = [Path(data_dir), cache_folder()], files or {}

    def kept() -> Path:
        """Where the encoded set is, by its files' names, sizes and times."""
        own = [Path(distilled)] if distilled else []
        own += [Path(file) for pair in files.values() for file in pair]
        own += [file for base in bases for file in sorted((base / name).glob("*"))]
        stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns)
                 for f in own if f.is_file() and not f.name.startswith(".")]
        what = json.dumps([name, vocab, max_number, lower, stats])
        return cache_folder() / "pairs" / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.npz"

    if (path := kept()).exists():
        with np.load(path) as file:
            train = tuple(Sentences(file[f"ids{i}"], file[f"starts{i}"]) for i in (0, 1))
            words, texts = (json.loads(str(file[key])) for key in ("vocab", "texts"))
        return PairData(name, length, BPECodec(words), train,
                        {split: [tuple(p) for p in pairs] for split, pairs in texts.items()}, lower)
    texts = load_texts_of(name, bases, max_number, files, distilled)
    if lower:
        texts = {split: [(a.lower(), b.lower()) for a, b in pairs]
                 for split, pairs in texts.items()}
    codec = BPECodec(learn_bpe(itertools.chain.from_iterable(texts["train"]), vocab - SPECIALS))
    train = tuple(Sentences.encode(side, codec) for side in zip(*texts.pop("train")))
    path = kept()  # with the files that were just downloaded
    if len(train[0].lengths) >= WORTH_KEEPING and writable(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, vocab=json.dumps(codec.vocab), texts=json.dumps(texts),
                 **{f"ids{i}": s.ids for i, s in enumerate(train)},
                 **{f"starts{i}": s.starts for i, s in enumerate(train)})
        os.replace(temporary, path)
    return PairData(name, length, codec, train, texts, lower)


def tokenise_13a(text: str) -> list[str]:
    """Words and signs as mteval-v13a and sacreBLEU's default cut them."""
    for pattern, by in ((r"([{-~\[-` -&(-+:-@/])", r" \1 "), (r"([^0-9])([.,])", r"\1 \2 "),
                        (r"([.,])([^0-9])", r" \1 \2"), (r"([0-9])(-)", r"\1 \2 ")):
        text = re.sub(pattern, by, text if text.startswith(" ") else f" {text} ")
    return text.split()


def ngrams(words: Sequence) -> list[Counter]:
    """Counts of the 1-, 2-, 3- and 4-grams."""
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in range(1, 5)]


def bleu_of_counts(hits: list[int], totals: list[int], length: int, reference_length: int,
                   smooth: bool = False) -> float:
    """BLEU-4 in [0, 1] (Papineni et al. 2002) from the n-grams that match and all, n = 1..4.

    `smooth` adds one to both counts of n > 1 (Lin and Och 2004): for single sentences, which
    often share no 4-gram with their reference.
    """
    if smooth:
        hits, totals = ([x[0], *(n + 1 for n in x[1:])] for x in (hits, totals))
    if not min(hits):
        return 0.0
    brevity = min(0.0, 1 - reference_length / length)
    return math.exp(brevity + sum(math.log(h / t) for h, t in zip(hits, totals)) / 4)


def bleu(hypotheses: Sequence[Sequence], references: Sequence[Sequence[Sequence]],
         smooth: bool = False) -> float:
    """Corpus BLEU-4 in [0, 1] of token lists; each has one or more references."""
    hits, totals, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for hypothesis, several in zip(hypotheses, references, strict=True):
        length += len(hypothesis)
        reference_length += min((abs(len(r) - len(hypothesis)), len(r)) for r in several)[1]
        for n, (found, *known) in enumerate(zip(*map(ngrams, [hypothesis, *several]))):
            most = functools.reduce(operator.or_, known)  # of each n-gram, in any one reference
            hits[n] += (found & most).total()
            totals[n] += found.total()
    return bleu_of_counts(hits, totals, length, reference_length, smooth)


def score_translations(rows: Sequence[dict]) -> dict[str, dict]:
    """Figures of {"text", "reference"} rows: exact matches and corpus BLEU, lower-cased and
    tokenised. eval.py has more."""
    if not rows:
        raise DataError("there are no translations to score")
    texts, references = ([tokenise_13a(row[k].lower()) for row in rows]
                         for k in ("text", "reference"))
    p = sum(row["text"] == row["reference"] for row in rows) / len(rows)
    return {
        "exact": dict(value=100 * p, unit="%", stderr=100 * math.sqrt(p * (1 - p) / len(rows))),
        "bleu": dict(value=100 * bleu(texts, [[r] for r in references]), unit="lower case, 13a")}


def choose(candidates: Sequence[Sequence[int]]) -> int:
    """Minimum Bayes risk: which candidate (token ids) has the best mean sentence BLEU with the
    others. Paper: or by an autoregressive model's likelihood, as its published scripts do."""
    several = Counter(map(tuple, candidates))
    if len(several) == 1:
        return 0
    counts = {c: ngrams(c) for c in several}

    def similar(c: tuple, o: tuple) -> float:
        hits = [sum(min(k, b[g]) for g, k in a.items()) for a, b in zip(counts[c], counts[o])]
        totals = [max(0, len(c) - n) for n in range(4)]
        return bleu_of_counts(hits, totals, len(c), len(o), smooth=True)

    # Each counts itself too, which adds the same to all.
    value = {c: sum(n * similar(c, o) for o, n in several.items()) for c in several}
    return list(map(tuple, candidates)).index(max(value, key=value.get))


# ---------------------------------------------------------------- images as tokens


@dataclass
class ImageTokens:
    """Images as sequences of L = rows * columns tokens, row by row from the top left."""

    name: str
    splits: dict[str, np.ndarray]  # "train", "valid", "test" -> (N, L) integers
    labels: dict[str, np.ndarray | None]  # (N,) int64, the class of each image; None: no classes
    classes: tuple[str, ...]  # their names
    vocab_size: int  # V
    shape: tuple[int, int]  # rows and columns of tokens
    pixels: np.ndarray | None = None  # (V, p, p) uint8, each token's picture; None: see vq-decode
    _order: dict = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Raises DataError if anything is out of range."""
        for split, ids in self.splits.items():
            labels, L = self.labels[split], self.shape[0] * self.shape[1]
            if ids.shape[1:] != (L,) or len(ids) == 0:
                raise DataError(f"{self.name}: {split} has shape {ids.shape}, not (N, {L})")
            if not 0 <= ids.min() <= ids.max() < self.vocab_size:
                raise DataError(f"{self.name}: {split} has tokens {ids.min()} to {ids.max()}; "
                                f"they must lie in 0..{self.vocab_size - 1}")
            if labels is not None and (labels.shape != (len(ids),) or labels.min() < 0
                                       or labels.max() >= len(self.classes)):
                raise DataError(f"{self.name}: {split} needs {len(ids)} labels in "
                                f"0..{len(self.classes) - 1}; there are {len(labels)}, from "
                                f"{labels.min()} to {labels.max()}")

    @property
    def length(self) -> int:
        return self.shape[0] * self.shape[1]

    def train_rows(self, seed: int, step: int, batch_size: int, indices: Sequence[int]
                   ) -> np.ndarray:
        """Which training images make up `indices` of the global batch of `step`: (b,) int64.

        As TextData.train_batch: a function of its arguments alone, each image once per epoch.
        """
        if not self._order:
            rows = np.arange(len(self.splits["train"]))[:, None]
            self._order["rows"] = TextData(self.name, len(rows), 1, "row", {"train": rows},
                                           IdCodec())
        return self._order["rows"].train_batch(seed, step, batch_size, indices)[:, 0]

    def tokenizer(self) -> dict:
        """All but the splits, in plain types: what a checkpoint keeps to be sampled from alone."""
        return {"name": self.name, "vocab_size": self.vocab_size, "shape": self.shape,
                "classes": self.classes,
                "pixels": None if self.pixels is None else self.pixels.tolist()}

    @classmethod
    def from_tokenizer(cls, kept: dict) -> "ImageTokens":
        """The inverse of `tokenizer`."""
        pixels = None if kept["pixels"] is None else np.array(kept["pixels"], np.uint8)
        return cls(kept["name"], {}, {}, tuple(kept["classes"]), kept["vocab_size"],
                   tuple(kept["shape"]), pixels)

    def draw(self, ids: np.ndarray) -> np.ndarray | None:
        """Tokens (N, L) to grey images (N, H, W) uint8; None if the tokens have no pictures."""
        if self.pixels is None:
            return None
        rows, columns = self.shape
        p = self.pixels.shape[1]
        patches = self.pixels[np.asarray(ids).reshape(-1, rows, columns)]  # (N, rows, cols, p, p)
        return patches.swapaxes(2, 3).reshape(-1, rows * p, columns * p)


def cut_patches(images: np.ndarray, p: int) -> np.ndarray:
    """(N, H, W) to (N, L, p * p): the patches row by row from the top left."""
    N, H, W = images.shape
    return images.reshape(N, H // p, p, W // p, p).swapaxes(2, 3).reshape(N, -1, p * p)


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


GLYPH_SIZE, GLYPH_SPLITS = 24, {"train": 20_000, "valid": 2_000, "test": 2_000}


def draw_glyphs(characters: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` images (count, 24, 24) uint8 of characters in turn, and which: (count,) int64.

    Pillow's own font, at random place, scale and shear: image i is a function of (seed, i).
    """
    Image, ImageDraw, ImageFont, features = pillow("Image", "ImageDraw", "ImageFont", "features")
    if not features.check("freetype2"):
        raise DataError("this Pillow cannot draw its font, it was built without FreeType: "
                        "pip install --force-reinstall pillow")
    big = 4 * GLYPH_SIZE  # drawn four times larger, then averaged
    font, stencils = ImageFont.load_default(size=0.85 * big), []
    for character in characters:
        stencils.append(Image.new("L", (big, big)))
        ImageDraw.Draw(stencils[-1]).text((big / 2, big / 2), character, 255, font, anchor="mm",
                                          stroke_width=2)
    labels = np.arange(count) % len(characters)
    images = np.empty((count, GLYPH_SIZE, GLYPH_SIZE), np.uint8)
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


def pillow(*names: str) -> list:
    """Pillow's modules. Raises DataError if it is not installed."""
    try:
        return [importlib.import_module(f"PIL.{name}") for name in names]
    except ImportError as error:
        raise DataError("images need Pillow: pip install pillow") from error


def glyph_images(shop: Workshop, characters: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Valid and test have other seeds, so they hold other images than train."""
    return {split: draw_glyphs(characters, count, seed)
            for seed, (split, count) in enumerate(GLYPH_SPLITS.items())}


MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_FILES = {  # file: sha256, size in bytes
    "train-images-idx3-ubyte.gz":
        ("440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609", 9_912_422),
    "train-labels-idx1-ubyte.gz":
        ("3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c", 28_881),
    "t10k-images-idx3-ubyte.gz":
        ("8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6", 1_648_877),
    "t10k-labels-idx1-ubyte.gz":
        ("f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6", 4_542)}


def read_idx(path: Path) -> np.ndarray:
    """An IDX .gz file of bytes (MNIST's format). Raises DataError if it is not one."""
    try:
        raw = gzip.decompress(path.read_bytes())
        zeros, kind, rank = raw[:2], raw[2], raw[3]
        sizes = np.frombuffer(raw, ">u4", rank, 4)
        if zeros != b"\0\0" or kind != 8:
            raise ValueError("no IDX file of bytes")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(sizes)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}): remove it to have it downloaded") from error


def mnist_images(shop: Workshop, classes: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """MNIST (LeCun et al. 1998); the last 5,000 training images are the valid split.

    Files that are there already may be any copy of the right sizes: their order varies.
    """
    arrays = []
    for file, (sha256, size) in MNIST_FILES.items():
        path = shop.find(file) or shop.fetch(MNIST_URL + file, sha256, size)
        arrays.append(read_idx(path))
        count = 60_000 if file.startswith("train") else 10_000
        if arrays[-1].shape not in ((count, 28, 28), (count,)):
            raise DataError(f"{path} has shape {arrays[-1].shape}, which is not MNIST's: remove "
                            "it to have it downloaded")
    images, labels, *test = arrays
    return {"train": (images[:55_000], labels[:55_000]),
            "valid": (images[55_000:], labels[55_000:]), "test": tuple(test)}


@dataclass(frozen=True)
class ImageRecipe:
    build: Callable[[Workshop, str], dict]  # split -> images (N, H, W) uint8, labels (N,)
    classes: str  # a character each
    patch: int  # p: pixels of a patch's side
    vocab_size: int


IMAGES = {  # 6 x 6 and 7 x 7 tokens
    "glyphs": ImageRecipe(glyph_images, "0123456789ABCDEF", 4, 256),
    "glyphs36": ImageRecipe(glyph_images, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", 4, 256),
    "mnist": ImageRecipe(mnist_images, "0123456789", 4, 256),
}
IMAGE_FILE, IMAGE_VERSION = "tokens.npz", "1"


def load_images(name: str, data_dir: str | Path = "data", labels: str = "") -> ImageTokens:
    """A set of IMAGES, prepared under `data_dir` at the first call, or your own tokens.

    `name`: "glyphs" (0-9, A-F; nothing to download), "glyphs36" (0-9, A-Z), "mnist", or a file
    tokens.npy of (N, L) or (N, rows, columns) integers, with `labels`, a .npy of (N,) classes, or
    without. The images of the sets are cut into p x p patches, and a patch's token is the nearest
    of V codes: a vector quantiser without a network. Raises DataError.
    """
    if name.endswith(".npy"):
        return load_tokens(Path(name), labels and Path(labels))
    if name not in IMAGES:
        raise DataError(f"unknown image set {name!r}: choose one of {', '.join(IMAGES)}, or give a "
                        "tokens.npy (see data.py vq-encode)")
    if labels:
        raise DataError(f"--labels is for a tokens.npy of your own: {name} has its own classes")
    bases = [Path(data_dir), cache_folder()]
    for base in bases:
        if data := open_images(base / name / IMAGE_FILE, name):
            return data
    base = next((base for base in bases if writable(base / name)), None)
    if base is None:
        raise DataError(f"neither {bases[0]} nor {bases[1]} can be written; set --data_dir")
    folder, recipe = base / name, IMAGES[name]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".preparing"):
        if data := open_images(folder / IMAGE_FILE, name):  # by the process we waited for
            return data
        print(f"preparing {name} in {folder}", file=sys.stderr)
        shop = Workshop([b / name for b in bases], folder, folder, 0)
        made = recipe.build(shop, recipe.classes)
        patches = {split: cut_patches(images, recipe.patch) for split, (images, _) in made.items()}
        arrays = {f"{split}_labels": labels for split, (_, labels) in made.items()}
        flat = {split: x.reshape(-1, recipe.patch**2) for split, x in patches.items()}
        arrays["codes"] = learn_codes(flat["train"], recipe.vocab_size)
        for split, x in patches.items():
            ids = nearest_code(flat[split], arrays["codes"]).reshape(x.shape[:2])
            arrays[split] = ids.astype(np.uint8)
        temporary = folder / f"preparing-{os.getpid()}.npz"
        try:
            np.savez_compressed(temporary, version=IMAGE_VERSION, **arrays)
            os.replace(temporary, folder / IMAGE_FILE)
        finally:
            temporary.unlink(missing_ok=True)
    data = open_images(folder / IMAGE_FILE, name)
    assert data is not None, f"{folder} cannot be read right after its preparation"
    return data


def open_images(path: Path, name: str) -> ImageTokens | None:
    """The prepared set, or None if there is none, or only a damaged or an outdated one."""
    recipe = IMAGES[name]
    try:
        with np.load(path) as file:
            arrays = dict(file)
        shape = (recipe.vocab_size, recipe.patch**2)
        if str(arrays["version"]) != IMAGE_VERSION or arrays["codes"].shape != shape:
            return None
        splits = {split: arrays[split] for split in ("train", "valid", "test")}
        labels = {split: arrays[f"{split}_labels"].astype(np.int64) for split in splits}
        side = round(splits["train"].shape[1] ** 0.5)
        pixels = arrays["codes"].reshape(-1, recipe.patch, recipe.patch)
    except (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile):
        return None
    return ImageTokens(name, splits, labels, tuple(recipe.classes), recipe.vocab_size,
                       (side, side), pixels)


def load_tokens(path: Path, labels: Path | None) -> ImageTokens:
    """Your own images: a twentieth each, at most 5,000, is held out as valid and as test.

    A file tokens.json beside tokens.npy may give "vocab_size" and, with labels, "classes", their
    names. Raises DataError.
    """
    ids = image_grid(path)
    if len(ids) < 3:
        raise DataError(f"{path} holds {len(ids)} images: train, valid and test need one each")
    meta = path.with_suffix(".json")
    try:
        known = json.loads(meta.read_text()) if meta.exists() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{meta} cannot be read: {error}") from error
    N, shape = len(ids), ids.shape[1:]
    classes: tuple[str, ...] = ()
    if labels:
        y = read_integers(labels)
        if y.shape != (N,) or y.min() < 0:
            raise DataError(f"{labels}: must hold {N} classes >= 0, one for each image of {path}; "
                            f"it has shape {y.shape}")
        count = int(y.max()) + 1
        classes = tuple(known.get("classes", map(str, range(count))))
    held = min(5000, max(1, N // 20))
    order = np.random.default_rng(0).permutation(N)  # files are often sorted by class
    parts = {"valid": order[:held], "test": order[held:2 * held], "train": order[2 * held:]}
    splits = {split: ids[rows].reshape(len(rows), -1) for split, rows in parts.items()}
    return ImageTokens(path.stem, splits, {split: y[rows].astype(np.int64) if labels else None
                                           for split, rows in parts.items()},
                       classes, known.get("vocab_size", int(ids.max()) + 1), shape)


def image_grid(path: Path) -> np.ndarray:
    """Tokens (N, L), L a square, or (N, rows, columns) as (N, rows, columns). Raises DataError."""
    ids = read_integers(path)
    side = math.isqrt(ids.shape[1]) if ids.ndim == 2 else 0
    if ids.ndim == 2 and side * side == ids.shape[1]:
        return ids.reshape(-1, side, side)
    if ids.ndim != 3:
        raise DataError(f"{path} must hold images as (N, L), L a square, or as (N, rows, columns); "
                        f"it has shape {ids.shape}")
    return ids


def read_integers(path: Path) -> np.ndarray:
    """An array of integers from a .npy file, memory-mapped. Raises DataError."""
    try:
        array = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: give a .npy file of integers; python data.py "
                        "vq-encode makes one of images") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as a .npy array: {error}") from error
    if array.dtype.kind not in "iu" or array.size == 0:
        raise DataError(f"{path} must hold integers; it has {array.dtype} of shape {array.shape}")
    return array


# ---------------------------------------------------------------- VQGAN: photographs as tokens


def group_norm(c: int) -> nn.Module:
    return nn.GroupNorm(32, c, eps=1e-6)


class VQResidual(nn.Module):
    def __init__(self, c_in: int, c: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c), nn.Conv2d(c, c, 3, padding=1)
        if c_in != c:
            self.nin_shortcut = nn.Conv2d(c_in, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class VQAttention(nn.Module):
    """One head over all places."""

    def __init__(self, c: int):
        super().__init__()
        self.norm = group_norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)           # (B, 1, H W, c)
        return x + self.proj_out(h[:, 0].mT.reshape(x.shape))


class VQDownsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))              # one more on the right and below


class VQUpsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class VQLevel(nn.Module):
    """The blocks of one resolution, each followed by attention if the level has it."""

    def __init__(self, c_in: int, c: int, blocks: int, attention: bool, resize: dict):
        super().__init__()
        self.block = nn.ModuleList(VQResidual(c if j else c_in, c) for j in range(blocks))
        self.attn = nn.ModuleList(VQAttention(c) for _ in range(blocks * attention))
        for name, module in resize.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for j, block in enumerate(self.block):
            x = block(x)
            x = self.attn[j](x) if len(self.attn) else x
        for resize in ("downsample", "upsample"):
            x = getattr(self, resize)(x) if hasattr(self, resize) else x
        return x


class VQMiddle(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = VQResidual(c, c), VQAttention(c), VQResidual(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class VQEncoder(nn.Module):
    def __init__(self, widths: list[int], first: int, blocks: int, attention: Sequence[int],
                 c_in: int, c_out: int):
        super().__init__()
        top, c = len(widths) - 1, widths[-1]
        self.conv_in = nn.Conv2d(c_in, first, 3, padding=1)
        self.down = nn.ModuleList(
            VQLevel(widths[i - 1] if i else first, w, blocks, i in attention,
                  {"downsample": VQDownsample(w)} if i < top else {})
            for i, w in enumerate(widths))
        self.mid = VQMiddle(c)
        self.norm_out, self.conv_out = group_norm(c), nn.Conv2d(c, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class VQDecoder(nn.Module):
    """Levels are numbered as the encoder's: the last one comes first."""

    def __init__(self, widths: list[int], blocks: int, attention: Sequence[int], c_in: int,
                 c_out: int):
        super().__init__()
        top, c = len(widths) - 1, widths[-1]
        self.conv_in = nn.Conv2d(c_in, c, 3, padding=1)
        self.mid = VQMiddle(c)
        self.up = nn.ModuleList(
            VQLevel(widths[min(i + 1, top)], w, blocks + 1, i in attention,
                  {"upsample": VQUpsample(w)} if i else {})
            for i, w in enumerate(widths))
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQQuantizer(nn.Module):
    def __init__(self, codes: int, d: int):
        super().__init__()
        self.embedding = nn.Embedding(codes, d)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def forward(self, z: Tensor) -> Tensor:
        """The nearest code to each vector: (B, d, h, w) to (B, h, w) int64."""
        e = self.embedding.weight                             # (V, d)
        z = z.movedim(1, -1)
        return (e.square().sum(-1) - 2 * z @ e.T).argmin(-1)  # |z|^2 is the same for all


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
        self.factor = 2 ** (len(widths) - 1)
        self.encoder = VQEncoder(widths, channels, blocks, attention, in_channels, z_channels)
        self.decoder = VQDecoder(widths, blocks, attention, z_channels, in_channels)
        self.quantize = VQQuantizer(codes, embedding)
        self.quant_conv = nn.Conv2d(z_channels, embedding, 1)
        self.post_quant_conv = nn.Conv2d(embedding, z_channels, 1)

    @property
    def vocab_size(self) -> int:
        return len(self.quantize.embedding.weight)

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] to codes (B, H / f, W / f) int64."""
        return self.quantize(self.quant_conv(self.encoder(x)))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) to images (B, C, h f, w f), in [-1, 1] or little beyond."""
        z = self.quantize.embedding(codes).movedim(-1, 1)     # (B, d, h, w)
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For training: reconstruction, codebook and commitment loss (means), codes.

        The gradient passes the codes unchanged, as if they were not there (van den Oord et
        al. 2017: straight-through).
        """
        z = self.quant_conv(self.encoder(x))
        codes = self.quantize(z)
        e = self.quantize.embedding(codes).movedim(-1, 1)
        reconstruction = self.decoder(self.post_quant_conv(z + (e - z).detach()))
        return (reconstruction, (e - z.detach()).square().mean(),
                (z - e.detach()).square().mean(), codes)


def vqgan_config(weights: dict) -> dict:
    """The arguments of VQGAN that these weights fit, read off their names and shapes."""
    def numbers(pattern: str) -> list[int]:
        return sorted({int(m[1]) for m in (re.fullmatch(pattern, key) for key in weights) if m})

    channels, in_channels = weights["encoder.conv_in.weight"].shape[:2]
    codes, embedding = weights["quantize.embedding.weight"].shape
    levels = numbers(r"encoder\.down\.(\d+)\.block\.0\.conv2\.bias")
    widths = [len(weights[f"encoder.down.{i}.block.0.conv2.bias"]) for i in levels]
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

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"),
                              ("torch._utils", "_rebuild_parameter"),
                              ("collections", "OrderedDict")):
            return super().find_class(module, name)
        return Inert


INERT = types.SimpleNamespace(  # what torch.load wants of a pickle module
    __name__="inert", Unpickler=InertUnpickler,
    load=lambda file, **options: InertUnpickler(file, **options).load())


def load_vqgan(path: str | Path):
    """A VQGAN of any size from a taming-transformers checkpoint, ready to encode and decode.

    Discriminator and perceptual loss (`loss.*`) are dropped; a transformer's checkpoint has the
    VQGAN under `first_stage_model.`. Raises DataError.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no VQGAN checkpoint at {path}: download last.ckpt of f16-1024 (see the "
                        "taming-transformers repository), or train one: results/vq_mnist.py")
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # Lightning has put objects of its own beside the weights
            state = torch.load(path, map_location="cpu", weights_only=False,
                               pickle_module=INERT)
        state = {key: value for key, value in state.get("state_dict", state).items()
                 if isinstance(value, Tensor)}
    except Exception as error:  # torch raises many kinds for truncated and foreign files
        raise DataError(f"{path} is truncated or not a checkpoint ({type(error).__name__})"
                        ) from error
    inner = "first_stage_model."
    if any(key.startswith(inner) for key in state):
        state = {key[len(inner):]: v for key, v in state.items() if key.startswith(inner)}
    weights = {key: value for key, value in state.items() if not key.startswith("loss.")}
    try:
        model = VQGAN(**vqgan_config(weights))
        model.load_state_dict(weights)
    except (KeyError, ValueError, RuntimeError) as error:
        detail = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is not a VQGAN of taming-transformers' kind: {detail}") from error
    return model.eval().requires_grad_(False)


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """All images below `folder`, sorted, and the subfolder of each: its class, if there are any."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    names = [p.relative_to(folder).parts for p in paths]
    classes = [parts[0] for parts in names if len(parts) > 1]
    if classes and len(classes) < len(paths):
        raise DataError(f"{folder} holds images both directly and in subfolders: a subfolder is a "
                        "class, so move all images into subfolders, or none")
    return paths, classes


def read_image(path: Path, size: int, channels: int) -> np.ndarray:
    """The largest square in the middle, resized: (channels, size, size) float32 in [-1, 1]."""
    Image, ImageOps = pillow("Image", "ImageOps")
    try:
        with Image.open(path) as file:
            image = ImageOps.fit(file.convert("RGB" if channels == 3 else "L"), (size, size),
                                 Image.BICUBIC)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error
    pixels = np.asarray(image, dtype=np.float32).reshape(size, size, channels)
    return pixels.transpose(2, 0, 1) / 127.5 - 1


def vq_encode(folder: Path, ckpt: Path, out: Path, size: int = 256, batch: int = 32) -> None:
    """Images to codes (N, L) in `out`, and what load_images wants beside them."""
    model, device = load_vqgan(ckpt), "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    if size % model.factor:
        raise DataError(f"--size {size} must be a multiple of {model.factor}")
    channels = model.encoder.conv_in.weight.shape[1]
    paths, subfolders = image_files(folder)
    classes, codes = sorted(set(subfolders)), []
    with multiprocessing.pool.ThreadPool(8) as pool, torch.inference_mode():
        with tqdm(total=len(paths), unit="image", desc="encoding") as bar:
            for group in groups(paths, batch):
                images = pool.map(lambda path: read_image(path, size, channels), group)
                x = torch.from_numpy(np.stack(images)).to(device)
                codes.append(model.encode(x).flatten(1).short())  # stays there: no waiting
                bar.update(len(group))
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
    """Codes (N, L) or (N, rows, columns) to out/000000.png and so on."""
    (Image,) = pillow("Image")
    model, device = load_vqgan(ckpt), "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    codes = image_grid(tokens)
    if not 0 <= codes.min() <= codes.max() < model.vocab_size:
        raise DataError(f"{tokens} has codes {codes.min()} to {codes.max()}, {ckpt} has only "
                        f"0 to {model.vocab_size - 1}")
    out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(), tqdm(total=len(codes), unit="image", desc="decoding") as bar:
        for i in range(0, len(codes), batch):
            x = model.decode(torch.from_numpy(codes[i:i + batch].astype(np.int64)).to(device))
            x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).cpu().numpy()
            for j, image in enumerate(x):                         # (H, W, 3 or 1)
                Image.fromarray(image.squeeze()).save(out / f"{i + j:06d}.png")
            bar.update(len(x))
    print(f"{out}: {len(codes):,} images of {x.shape[2]} x {x.shape[1]} pixels")


# ---------------------------------------------------------------- loading


@dataclass(frozen=True)
class Recipe:
    build: Callable[[Workshop], dict]  # writes the splits; returns the tokenizer, and aliases
    length: int
    rows: bool = False  # cut into rows when prepared, so another length is another preparation
    raw: str = ""  # folder of the raw files under data_dir, where it is not the set's own name
    version: str = "1"  # a set prepared by another version is rebuilt


PYTHON = f"1, Python {sys.version.split()[0]}"  # whose texts these two are
DATASETS = {
    "pydoc": Recipe(build_pydoc, length=128, version=PYTHON),
    "pycode": Recipe(build_pycode, length=256, version=PYTHON),
    "shakespeare": Recipe(build_shakespeare, length=256),
    "text8": Recipe(build_text8, length=256),
    "english27": Recipe(build_english27, length=256, raw="nltk"),
    "owt": Recipe(build_owt, length=1024, rows=True),
    "lm1b": Recipe(build_lm1b, length=128, rows=True),
    "lm1b-padded": Recipe(build_lm1b_padded, length=128, rows=True, raw="lm1b"),
}


def load_dataset(name: str, data_dir: str | Path = "data", length: int | None = None) -> TextData:
    """A set of DATASETS, prepared under `data_dir` at the first call, or a folder of your own.

    Raw files already in data_dir/NAME are used, others downloaded there. If that folder cannot be
    written, the cache folder is (~/.cache/catdiff, or $CATDIFF_CACHE). Toys (TOYS) are drawn, not
    stored. Raises DataError.
    """
    if name in TOYS:
        if length not in (None, 2):
            raise DataError(f"{name} has points of 2 numbers: drop --length {length}")
        return load_toy(name)
    if name not in DATASETS:
        if Path(name).is_dir():
            return load_folder(Path(name), length)
        raise DataError(f"unknown dataset {name!r}: choose one of {', '.join([*DATASETS, *TOYS])} "
                        f"(images: {', '.join(IMAGES)}), or give a folder with train and valid as "
                        ".txt, .txt.xz or .npy")
    recipe = DATASETS[name]
    length = length or recipe.length
    key = name if length == recipe.length or not recipe.rows else f"{name}-{length}"
    bases = [Path(data_dir), cache_folder()]
    for base in bases:
        if data := open_prepared(base / key, name, length):
            return data
    base = next((base for base in bases if writable(base / key)), None)
    if base is None:
        raise DataError(f"neither {bases[0]} nor {bases[1]} can be written; set --data_dir")
    folder = base / key
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".preparing") as alone:
        if data := open_prepared(folder, name, length):  # by the process we waited for
            return data
        for leftover in folder.glob("preparing-*") if alone else []:  # of killed processes
            shutil.rmtree(leftover)
        build(name, folder, bases, length)
        data = open_prepared(folder, name, length)
    assert data is not None, f"{folder} cannot be read right after its preparation"
    return data


def build(name: str, folder: Path, bases: list[Path], length: int) -> None:
    """Runs a recipe in a temporary folder, then moves its files into place, meta.json last."""
    recipe = DATASETS[name]
    raw = recipe.raw or name
    downloads = next(base for base in bases if writable(base / raw)) / raw
    out = Path(tempfile.mkdtemp(prefix="preparing-", dir=folder))
    print(f"preparing {name} in {folder}", file=sys.stderr)
    try:
        shop = Workshop([b / f for b in bases for f in (name, raw)], downloads, out, length)
        made = recipe.build(shop)
        if shop.largest >= made["vocab_size"]:
            raise DataError(f"{name}: id {shop.largest} is none of {made['vocab_size']} symbols")
        meta = {"version": recipe.version, "shapes": shop.shapes, "alias": made.pop("alias", {}),
                "tokenizer": {"name": name, "length": length} | made}
        (out / "meta.json").write_text(json.dumps(meta))
        for file in (*(f"{split}.npy" for split in shop.shapes), "meta.json"):
            os.replace(out / file, folder / file)
    finally:
        shutil.rmtree(out)


def open_prepared(folder: Path, name: str, length: int) -> TextData | None:
    """The prepared set, or None if there is none, or only a damaged or an outdated one."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        splits = {split: np.load(folder / f"{split}.npy", mmap_mode="r")
                  for split in meta["shapes"]}
        shapes = {split: list(tokens.shape) for split, tokens in splits.items()}
        if meta["version"] != DATASETS[name].version or shapes != meta["shapes"]:
            return None
        splits |= {split: splits[other] for split, other in meta["alias"].items()}
        tokenizer = meta["tokenizer"] | {"length": length}
    except (OSError, ValueError, EOFError, KeyError):  # such as a file shorter than it says
        return None
    return TextData.from_tokenizer(tokenizer, splits)


def load_folder(folder: Path, length: int | None = None) -> TextData:
    """Your own data: {train, valid, test} as .txt, .txt.xz (characters) or .npy (ids).

    .npy: (N,) streams or (N, L) rows of integers; a meta.json may give vocab_size, bos_id, eos_id
    and pad_id. Text is encoded in memory: save gigabytes as .npy. Raises DataError.
    """
    paths = {}
    for split, stems in {"train": ["train"], "valid": ["valid", "val"], "test": ["test"]}.items():
        for file in (stem + end for stem in stems for end in (".npy", ".txt", ".txt.xz")):
            if (folder / file).exists():
                paths.setdefault(split, folder / file)
    if missing := {"train", "valid"} - set(paths):
        raise DataError(f"{folder} lacks {' and '.join(sorted(missing))} as .txt, .txt.xz or .npy; "
                        "hold out some 5% of your training data as valid")
    if len({path.suffix == ".npy" for path in paths.values()}) > 1:
        raise DataError(f"{folder} mixes text and .npy; give all splits in one form")
    if paths["train"].suffix == ".npy":
        data = load_id_arrays(folder, paths, length)
    else:
        data = load_texts(folder, paths, length)
    data.splits.setdefault("test", data.splits["valid"])
    return data


def load_id_arrays(folder: Path, paths: dict[str, Path], length: int | None) -> TextData:
    splits = {split: np.load(path, mmap_mode="r") for split, path in paths.items()}
    for split, ids in splits.items():
        if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or ids.size == 0 or ids.min() < 0:
            raise DataError(f"{paths[split]}: must hold integers >= 0 of shape (N,) or (N, L); "
                            f"these are {ids.dtype} of shape {ids.shape}")
    meta_path, largest = folder / "meta.json", max(int(ids.max()) for ids in splits.values())
    meta = json.loads(meta_path.read_text()) if meta_path.exists() else {}
    if (vocab_size := meta.get("vocab_size", largest + 1)) <= largest:
        raise DataError(f"{meta_path}: vocab_size {vocab_size} is not above id {largest}")
    width = next((ids.shape[1] for ids in splits.values() if ids.ndim == 2), 256)
    special = {key: meta.get(key) for key in ("bos_id", "eos_id", "pad_id")}
    return TextData(folder.name, vocab_size, length or width, "token", splits, IdCodec(), **special)


def load_texts(folder: Path, paths: dict[str, Path], length: int | None) -> TextData:
    texts = {}
    for split, path in paths.items():
        try:
            with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as file:
                texts[split] = file.read().decode()
        except (UnicodeDecodeError, EOFError, lzma.LZMAError) as error:
            raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    codec = CharCodec("".join(sorted(set(texts["train"]))))
    dtype = np.min_scalar_type(len(codec.points))
    splits = {}
    for split, text in texts.items():
        try:
            splits[split] = codec.encode(text).astype(dtype)
        except DataError as error:
            raise DataError(f"{paths[split]}: {error}") from error
    return TextData(folder.name, len(codec.points), length or 256, "char", splits, codec)


# ---------------------------------------------------------------- statistics


def ngram_entropies(data: TextData, split: str = "train") -> tuple[float, float]:
    """(H(x_i), H(x_i | x_{i-1})) in bits per symbol, of the split's own frequencies.

    What a model that knows only these frequencies would reach. Characters and bytes only.
    """
    V, tokens = data.vocab_size, data._tokens(split)
    if data.unit not in ("char", "byte") or tokens.ndim != 1:
        raise DataError(f"{data.name}: n-gram entropies are for streams of characters or bytes")
    pairs = np.zeros(V * V, dtype=np.int64)
    for i in range(0, len(tokens) - 1, 1 << 24):  # in pieces, to bound memory
        piece = tokens[i:i + (1 << 24) + 1].astype(np.int64)
        pairs += np.bincount(piece[:-1] * V + piece[1:], minlength=V * V)
    before = pairs.reshape(V, V).sum(1)
    last = np.bincount(tokens[-1:], minlength=V)
    return entropy(before + last), entropy(pairs) - entropy(before)


def entropy(counts: np.ndarray) -> float:
    """In bits, of the distribution in proportion to `counts` (n,)."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def words(data: TextData, split: str = "train") -> set[str]:
    """What stands between spaces in a split: the words that count as spelled right."""
    return set(data.decode(data._tokens(split)).split())


def describe(data: TextData) -> None:
    print(f"{data.name}: {data.vocab_size} symbols (unit: {data.unit}), sequences of {data.length}")
    print(f"special ids: bos {data.bos_id}, eos {data.eos_id}, pad {data.pad_id}, "
          f"mask {data.mask_id}")
    for split, tokens in data.splits.items():
        print(f"{split:>6}: {tokens.size:,} {data.unit}s, {data.num_sequences(split):,} sequences")
    first = next(data.eval_batches("valid", 1, limit=1))[0]
    print(f"excerpt of valid: {data.decode(first)[:300]!r}")
    if data.unit in ("char", "byte"):
        one, two = ngram_entropies(data, "valid")
        print(f"entropy of valid: {one:.3f} bits per {data.unit}, {two:.3f} given the one before")


def describe_pairs(data: PairData) -> None:
    print(f"{data.name}: {data.vocab_size:,} joint byte-pair tokens; {data.pairs:,} train, "
          + ", ".join(f"{len(pairs):,} {split}" for split, pairs in data.texts.items()) + " pairs")
    for side, name in zip(data.train, ("source", "target")):
        lengths = side.lengths[data.kept]
        print(f"{name}: {lengths.mean():.1f} tokens a sentence with BOS and EOS, half have at most "
              f"{np.median(lengths):.0f}, 99% at most {np.percentile(lengths, 99):.0f}")
    source, target = data.texts["valid"][0]
    for text in (source, target):
        print(f"{text!r}\n  {'|'.join(data.codec.decode([i]) for i in data.encode(text)[1:-1])!r}")


def describe_images(data: ImageTokens, folder: Path) -> None:
    rows, columns = data.shape
    print(f"{data.name}: {data.vocab_size} tokens, images of {rows} x {columns}, "
          f"{len(data.classes)} classes {' '.join(data.classes)[:60]}".rstrip())
    for split, ids in data.splits.items():
        counts = np.bincount(ids.ravel(), minlength=data.vocab_size)
        print(f"{split:>6}: {len(ids):,} images, {(counts > 0).sum()} tokens in use, unigram "
              f"entropy {entropy(counts):.3f} bits per token")
    images = data.draw(data.splits["valid"][:96])
    if images is not None and len(images) == 96:
        (Image,) = pillow("Image")
        H, W = images.shape[1:]
        grid = images.reshape(6, 16, H, W).swapaxes(1, 2).reshape(6 * H, 16 * W)
        folder = next(base for base in (folder, cache_folder()) if writable(base / data.name))
        path = folder / data.name / "examples.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grid).resize((3 * 16 * W, 3 * 6 * H), Image.NEAREST).save(path)
        print(f"{path}: 96 images of valid, as their tokens show them")


def vq_main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"data.py {argv[0]}", description=(
        "Images to a VQGAN's codes" if argv[0] == "vq-encode" else "A VQGAN's codes to PNG files"))
    if argv[0] == "vq-encode":
        parser.add_argument("images", type=Path, help="folder; its subfolders, if any, are classes")
        parser.add_argument("--size", type=int, default=256, help="pixels of a side (default 256)")
    else:
        parser.add_argument("tokens", type=Path, help="tokens.npy")
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint, as "
                        "taming-transformers writes them; its weights alone are read")
    parser.add_argument("--out", type=Path, required=True, help="tokens.npy, or folder of images")
    parser.add_argument("--batch", type=int, default=32, help="images at once (default 32)")
    args = parser.parse_args(argv[1:])
    if args.batch < 1:
        parser.error("--batch must be at least 1")
    if argv[0] == "vq-encode":
        vq_encode(args.images, args.ckpt, args.out, args.size, args.batch)
    else:
        vq_decode(args.tokens, args.ckpt, args.out, args.batch)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join([*DATASETS, *TOYS, "numbers", *PAIR_SETS, *IMAGES])
    parser.add_argument("name", help=f"one of {names}, a folder, or a tokens.npy")
    parser.add_argument("--data_dir", default="data", help="where data sets are kept")
    parser.add_argument("--length", type=int, help="tokens per sequence (texts)")
    parser.add_argument("--labels", default="", help="labels.npy, the classes of a tokens.npy")
    try:
        if argv[:1] in (["vq-encode"], ["vq-decode"]):
            return vq_main(argv)
        args = parser.parse_args(argv)
        if args.name in IMAGES or args.name.endswith(".npy"):
            images = load_images(args.name, args.data_dir, args.labels)
            describe_images(images, Path(args.data_dir))
        elif args.name in ("numbers", *PAIR_SETS):
            describe_pairs(load_pairs(args.name, args.data_dir, args.length or 256))
        else:
            describe(load_dataset(args.name, args.data_dir, args.length))
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
