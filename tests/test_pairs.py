"""data.py's pairs of sentences: sets, tokens, batches. Nothing is downloaded."""

import gzip
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest

import data
from data import DataError, load_pairs


@pytest.fixture(autouse=True)
def mirror(monkeypatch, tmp_path):
    """A folder in the place of all servers, and a cache of its own."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("CATDIFF_MIRROR", folder.as_uri())
    monkeypatch.setenv("CATDIFF_CACHE", str(tmp_path / "cache"))
    return folder


# ------------------------------------------------------------------------- numbers, tokens


@pytest.mark.parametrize("n, german, english", [
    (0, "null", "zero"), (1, "eins", "one"), (16, "sechzehn", "sixteen"),
    (17, "siebzehn", "seventeen"), (21, "einundzwanzig", "twenty-one"),
    (30, "dreißig", "thirty"), (34, "vierunddreißig", "thirty-four"),
    (60, "sechzig", "sixty"), (70, "siebzig", "seventy"),
    (101, "einhunderteins", "one hundred one"), (1000, "eintausend", "one thousand"),
    (9999, "neuntausendneunhundertneunundneunzig",
     "nine thousand nine hundred ninety-nine"),
    (101_001, "einhunderteintausendeins", "one hundred one thousand one"),
    (21_012, "einundzwanzigtausendzwölf", "twenty-one thousand twelve")])
def test_number_words(n, german, english):
    assert data.german_number(n) == german and data.english_number(n) == english


def test_numbers_are_split_without_overlap():
    pairs = data.number_pairs(9999)
    assert pairs == data.number_pairs(9999)
    everything = [p for split in pairs.values() for p in split]
    assert len(set(everything)) == 10_000 and len({a for a, _ in everything}) == 10_000
    assert [len(pairs[s]) for s in ("train", "valid", "test")] == [9000, 500, 500]
    with pytest.raises(DataError, match="largest number"):
        data.number_pairs(10**6)


def test_bpe_joins_the_most_frequent_pair_and_loses_nothing():
    vocab = [bytes.fromhex(t) for t in data.learn_bpe(["hug hug hug pug pun bun"], 259)]
    assert vocab[256] == b"ug" and len(vocab) == 259  # 4 times; " h" and "hu" 2 and 3
    codec = data.BPECodec(data.learn_bpe(["der Hund bellt"] * 5, 300))
    for text in ("der Hund", "  zwei   Leer ", "\u4f60\u597d\n\U0001f600", ""):
        assert codec.decode(codec.encode(text)) == text
    assert len(codec.encode("der Hund bellt")) == 3 and codec.encode("a").min() >= 3


def test_train_batch_is_a_function_of_its_arguments():
    pairs = load_pairs("numbers", max_length=32, vocab=300, max_number=199)
    whole = pairs.train_batch(0, 7, 256)
    other = load_pairs("numbers", max_length=32, vocab=300, max_number=199)
    other.train_batch(1, 3, 128)
    assert all(map(np.array_equal, whole, other.train_batch(0, 7, 256)))
    assert not np.array_equal(whole.ids, other.train_batch(1, 7, 256).ids)
    y, x = whole
    assert (x[:, 0] == 1).all() and ((x == 2).sum(1) == 1).all() and x.shape[1] % 8 == 0


def test_an_epoch_has_every_pair_and_full_batches():
    pairs = load_pairs("numbers", max_length=40, vocab=300, max_number=199)
    known = {tuple(map(tuple, map(pairs.encode, pair))) for pair in pairs.pairs_of("train")}
    steps = len(pairs.cuts(256)) - 1
    orders = []
    for epoch in range(2):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            y, x = pairs.train_batch(0, step, 256)
            L = max(x.shape[1], y.shape[1])
            assert 256 - L < len(x) * L <= 256 and len(x) == len(y)
            seen += [(tuple(a[a > 0]), tuple(b[b > 0])) for a, b in zip(x, y)]
        assert set(seen) == known and len(known) == 180
        assert len(seen) - len(known) < 256 // 8  # the last batch is filled up
        orders.append(seen)
    assert orders[0] != orders[1]


def test_eval_batches_are_the_first_pairs_at_one_width():
    pairs = load_pairs("numbers", max_length=32, vocab=300, max_number=199)
    sources, targets = (pairs.rows(side) for side in zip(*pairs.pairs_of("valid", 9)))
    whole = list(pairs.eval_batches("valid", 4, 9))
    assert [len(batch.ids) for batch in whole] == [4, 4, 1] and whole[0].ids.dtype == np.int64
    np.testing.assert_array_equal(np.concatenate([batch.ids for batch in whole]), targets)
    np.testing.assert_array_equal(np.concatenate([batch.given for batch in whole]), sources)
    for rank in range(2):
        part = list(pairs.eval_batches("valid", 2, 9, rank, 2))
        np.testing.assert_array_equal(np.concatenate([b.ids for b in part]), targets[rank::2])
        np.testing.assert_array_equal(np.concatenate([b.given for b in part]), sources[rank::2])
    assert sum(len(batch.ids) for batch in pairs.eval_batches("train", 50)) == pairs.pairs == 180
    with pytest.raises(DataError, match="numbers has no other pairs"):
        next(pairs.eval_batches("other", 4))
    assert [pairs.num_sequences(split) for split in ("train", "valid", "other")] == [180, 10, 0]
    assert pairs.unit == "token" and pairs.not_pad(targets[0]).sum() == (targets[0] > 0).sum()
    assert pairs.describe() == "numbers: 180 pairs, 300 tokens" and pairs.entropies("valid") == {}


def test_checkpoint_keeps_the_tokenizer():
    pairs = load_pairs("numbers", max_length=32, vocab=300, max_number=199, lower=True)
    kept = json.loads(json.dumps(pairs.tokenizer()))
    assert set(kept) == {"name", "length", "vocab", "lower"}  # as in all old checkpoints
    again = data.PairData.from_tokenizer(kept)
    assert again.encode("ZWEI").tolist() == pairs.encode("zwei").tolist() and again.pairs == 0
    assert (again.length, again.vocab_size, again.pad_id) == (32, 300, 0)


def test_synthetic_pairs(tmp_path):
    pairs = load_pairs("wmt14", tmp_path, 64, 5000, synthetic=True)
    assert not list(tmp_path.iterdir()) or [p.name for p in tmp_path.iterdir()] == ["mirror"]
    assert pairs.vocab_size == 5000 and pairs.pairs >= 65_536 // 32
    targets, sources = pairs.train_batch(0, 3, 65_536)
    assert targets.shape == sources.shape == (2048, 32) and not np.array_equal(targets, sources)
    assert (targets[:, 0] == data.BOS).all() and (targets[:, -1] == data.EOS).all()
    inner = targets[:, 1:-1]
    assert inner.min() == data.SPECIALS and 4990 < inner.max() < 5000


def test_own_files_and_their_mistakes(tmp_path, capsys):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    a, b = write("a", "eins\n\nzwei\n" + "drei " * 99 + "\n"), write("b", "one\nx\ntwo\nthree\n")
    pairs = load_pairs("files", max_length=24, vocab=300, files={"train": (a, b), "valid": (a, b)})
    assert pairs.pairs == 2 and "2 of 4 training pairs are left out" in capsys.readouterr().err
    assert len(pairs.texts["valid"]) == 4
    with pytest.raises(DataError, match="files has no test pairs; it has valid"):
        pairs.pairs_of("test")
    with pytest.raises(DataError, match="has 4 lines, .* has 1"):
        load_pairs("files", files={"train": (a, write("c", "one\n"))})
    one = (write("c", "\ufeffone"), write("c", "\ufeffone"))  # some editors begin files like this
    with pytest.raises(DataError, match="one training pair is too few to hold it out: give valid"):
        load_pairs("files", files={"train": one})
    pairs = load_pairs("files", vocab=300, files={"train": one, "valid": one})
    assert pairs.texts["valid"] == pairs.pairs_of("train") == [("one", "one")]
    targets, _ = pairs.train_batch(0, 5, 4096)
    assert [row[row > 0].tolist() for row in targets] == [pairs.encode("one").tolist()]
    for empty in ("", "\n\n"):
        for split in ("train", "valid"):
            files = {"train": (a, b), split: (write("e", empty), str(tmp_path / "e"))}
            with pytest.raises(DataError, match="/e and .*/e: no line has text on both sides"):
                load_pairs("files", files=files)
    for name in ("numbers", "multi30k"):
        with pytest.raises(DataError, match=f"go with --train a.de a.en, and not with {name}"):
            load_pairs(name, files={"train": (), "valid": (a, b)})
    with pytest.raises(DataError, match="--train a.de a.en"):
        load_pairs("files", files={"train": ()})
    with pytest.raises(DataError, match="nowhere does not exist: give a text file"):
        load_pairs("files", files={"train": (a, str(tmp_path / "nowhere"))})
    (tmp_path / "d").write_bytes(b"\xff\xfe\n" * 4)
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        load_pairs("files", files={"train": (a, str(tmp_path / "d"))})
    with pytest.raises(DataError, match=r"raise --length \(difformer.py: --max_length\)"):
        load_pairs("files", max_length=3, vocab=300, files={"train": (a, b), "valid": (a, b)})


# ------------------------------------------------------------------------- sets


def pack(path, files):
    """An archive of {name: text}."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name, text in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))


def numbered(n, *words):
    return ["".join(f"{word} {i}\n" for i in range(n)) for word in words]


def sgm(*texts):
    segments = (f'<seg id="{i}"> {text} </seg>\n' for i, text in enumerate(texts))
    return f"<doc>\n{''.join(segments)}</doc>"


def test_multi30k_from_a_mirror(mirror, tmp_path, monkeypatch, capsys):
    parts = {}
    for split, name, n in (("train", "train", 40), ("valid", "val", 3),
                           ("test", "test_2016_flickr", 2)):
        for language, text in zip(("de", "en"), numbered(n, f"Hund {name}", f"dog {name}")):
            (mirror / f"{name}.{language}.gz").write_bytes(gzip.compress(text.encode()))
        known = data.PAIR_SETS["multi30k"].parts[split][0]
        assert known.url.endswith(f"/{name}.{{}}.gz")
        parts[split] = [known._replace(sha256=tuple(
            data.sha256_of(mirror / f"{name}.{e}.gz") for e in ("de", "en")))]
    with pytest.raises(DataError, match="not the file expected"):
        load_pairs("multi30k", tmp_path / "data", vocab=300)
    monkeypatch.setitem(data.PAIR_SETS, "multi30k", data.PairSet(("de", "en"), parts))
    pairs = load_pairs("multi30k", tmp_path / "data", vocab=300)
    assert pairs.pairs == 40 and pairs.pairs_of("train", 1) == [("Hund train 0", "dog train 0")]
    assert capsys.readouterr().err.startswith("up to 1 MB to download")
    assert pairs.texts["valid"][2] == ("Hund val 2", "dog val 2") and len(pairs.texts["test"]) == 2
    for file in mirror.iterdir():
        file.unlink()
    load_pairs("multi30k", tmp_path / "data", vocab=300)  # what was downloaded is used
    data.report(pairs, tmp_path)
    assert "40 train, 3 valid, 2 test pairs" in capsys.readouterr().out


def test_iwslt14(mirror, tmp_path):
    lines = [("<url>x</url>", "<url>y</url>"), ("<title>Das da</title>", "<title>That</title>"),
             ("<keywords>a</keywords>", "<keywords>b</keywords>"),
             (" eins zwei drei vier ", "one two three four")]
    lines += [(f"Satz {i}", f"Sentence {i}") for i in range(50)]
    lines += [("a b c d", "a b"), ("x " * 176, "x " * 176), ("", "y")]  # too different, long, empty
    files = {f"de-en/train.tags.de-en.{end}": "\n".join(line[k] for line in lines) + "\n"
             for k, end in enumerate(("de", "en"))}
    for name in ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012"):
        for end in ("de", "en"):
            files[f"de-en/IWSLT14.{name}.de-en.{end}.xml"] = sgm(f"{name} &amp; {end}", "ja")
    pack(mirror / "de-en.tgz", files)
    pairs = load_pairs("iwslt14", tmp_path / "data", vocab=300, lower=True)
    everything = [("eins zwei drei vier", "one two three four")] + [
        (f"satz {i}", f"sentence {i}") for i in range(50)]  # "Das da" and "That" are 2 to 1
    assert pairs.texts["valid"] == everything[22::23]
    assert pairs.pairs_of("train") == [p for i, p in enumerate(everything) if i % 23 != 22]
    assert len(pairs.texts["test"]) == 10
    assert pairs.texts["test"][2] == ("tedx.dev2012 & de", "tedx.dev2012 & en")
    assert pairs.decode(pairs.encode("SATZ 7")) == "satz 7"
    (tmp_path / "data/iwslt14/de-en.tgz").write_bytes(b"x")
    with pytest.raises(DataError, match="move it away"):
        load_pairs("iwslt14", tmp_path / "data", vocab=300)


def test_wmt14_wmt16_and_gigaword(mirror, tmp_path):
    for file, name in (("europarl-v7", "training/europarl-v7"), ("commoncrawl", "commoncrawl"),
                       ("nc-v9", "training/news-commentary-v9")):
        pack(mirror / f"training-parallel-{file}.tgz", dict(zip(
            (f"{name}.de-en.en", f"{name}.de-en.de"), numbered(3, f"{file} en", f"{file} de"))))
    pack(mirror / "dev.tgz", {
        "dev/newstest2013.en": "a\nb\n", "dev/newstest2013.de": "c\nd\n",
        "dev/newsdev2016-enro-src.en.sgm": sgm("e"), "dev/newsdev2016-enro-ref.ro.sgm": sgm("f")})
    pack(mirror / "test-full.tgz", {"test-full/newstest2014-deen-src.en.sgm": sgm("g", "h"),
                                    "test-full/newstest2014-deen-ref.de.sgm": sgm("i", "j")})
    pairs = load_pairs("wmt14", tmp_path / "data", vocab=300)
    assert pairs.pairs == 9 and pairs.pairs_of("train", 4)[3] == ("commoncrawl en 0",
                                                                  "commoncrawl de 0")
    assert pairs.texts == {"valid": [("a", "c"), ("b", "d")], "test": [("g", "i"), ("h", "j")]}

    pack(mirror / "training-parallel-ep-v8.tgz", dict(zip(
        (f"training-parallel-ep-v8/europarl-v8.ro-en.{end}" for end in ("en", "ro")),
        numbered(3, "en", "ro"))))
    pack(mirror / "en-ro.txt.zip", dict(zip(
        ("SETIMES.en-ro.en", "SETIMES.en-ro.ro"), numbered(2, "set en", "set ro"))))
    pack(mirror / "test.tgz", {"test/newstest2016-enro-src.en.sgm": sgm("k"),
                               "test/newstest2016-enro-ref.ro.sgm": sgm("l")})
    pairs = load_pairs("wmt16", tmp_path / "data", vocab=300)
    assert pairs.pairs == 5 and pairs.pairs_of("train")[-1] == ("set en 1", "set ro 1")
    assert pairs.texts == {"valid": [("e", "f")], "test": [("k", "l")]}

    pack(mirror / "gigaword.zip", {
        f"org_data/{split}.{end}.txt": f"{end} <unk> {split}\n" * 3
        for split in ("train", "dev", "test") for end in ("src", "tgt")})
    pairs = load_pairs("gigaword", tmp_path / "data", vocab=300)
    assert pairs.texts["valid"] == [("src UNK dev", "tgt UNK dev")] * 3
    pack(mirror / "gigaword.zip", {"org_data/train.src.txt": "a\n",
                                   "org_data/train.tgt.txt": "b\nc\n"} | {
        f"org_data/{split}.{end}.txt": "a\n" for split in ("dev", "test")
        for end in ("src", "tgt")})
    with pytest.raises(DataError, match="gigaword.zip/org_data/train.src.txt has 1 lines"):
        load_pairs("gigaword", tmp_path / "uneven", vocab=300)
    pack(mirror / "gigaword.zip", {"org_data/train.src.txt": "a\n"})
    with pytest.raises(DataError, match="cannot be read as an archive of org_data/train.src.txt"):
        load_pairs("gigaword", tmp_path / "other", vocab=300)


def test_jsonl_and_prepared_files(tmp_path):
    with pytest.raises(DataError, match=rf"train.jsonl.*put them into {tmp_path}.*qqp"):
        load_pairs("qqp", tmp_path)
    folder = tmp_path / "qqp"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        rows = [{"src": f"wie {i}", "trg": f"{split} {i}"} for i in range(4)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    pairs = load_pairs("qqp", tmp_path, vocab=300)
    assert pairs.pairs == 4 and pairs.texts["test"][3] == ("wie 3", "test 3")
    good = (folder / "valid.jsonl").read_text().strip()
    for row in ('{"src": "a"}', '{"src": "a", "trg": 3}', '{"src": null, "trg": "b"}', "[1, 2]",
                "7", '"src trg"', "null", "{"):
        (folder / "valid.jsonl").write_text(f"{good}\n\n{row}\n")
        with pytest.raises(DataError, match='^line 6 of .*valid.jsonl cannot be read as {"src":'):
            load_pairs("qqp", tmp_path, vocab=300)

    folder = tmp_path / "wmt14"
    folder.mkdir()
    for split in ("train", "valid"):
        for end, text in zip(("en", "de"), numbered(30, f"{split} en", f"{split} de")):
            (folder / f"{split}.{end}").write_text(text)
    pairs = load_pairs("wmt14", tmp_path, vocab=300)  # prepared files come before downloads
    assert set(pairs.texts) == {"valid"} and pairs.pairs == 30
    assert pairs.texts["valid"][1] == ("valid en 1", "valid de 1")
    (folder / "train.en").unlink()
    with pytest.raises(DataError, match="neither train.jsonl nor train.en"):
        load_pairs("wmt14", tmp_path, vocab=300)


def test_distilled_targets(tmp_path):
    files = []
    for name, text in zip("abc", numbered(40, "eins", "one", "new")):
        (tmp_path / name).write_text(text)
        files.append(str(tmp_path / name))
    pairs = load_pairs("files", vocab=300, files={"train": tuple(files[:2])}, distilled=files[2])
    known = {(f"eins {i}", f"new {i}") for i in range(40)}
    assert pairs.pairs == 38 and set(pairs.pairs_of("train")) < known  # two are held out
    (tmp_path / "c").write_text("x\n")
    with pytest.raises(DataError, match="has 1 lines for 40 training pairs"):
        load_pairs("files", vocab=300, files={"train": tuple(files[:2])}, distilled=files[2])


def test_large_sets_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "WORTH_KEEPING", 0)
    folder = tmp_path / "wmt14"
    folder.mkdir()
    for split, n in (("train", 90), ("valid", 2)):
        for end, text in zip(("en", "de"), numbered(n, f"{split} en", f"{split} de")):
            (folder / f"{split}.{end}").write_text(text)
    first = load_pairs("wmt14", tmp_path, vocab=300)
    assert len(list(tmp_path.glob("cache/pairs/*/.preparing"))) == 1  # under a lock
    inner = data.learn_bpe
    monkeypatch.setattr(data, "learn_bpe", lambda *_: pytest.fail("learned again"))
    again = load_pairs("wmt14", tmp_path, vocab=300)
    assert again.codec.vocab == first.codec.vocab and again.texts == first.texts
    for a, b in zip(first.train_batch(0, 3, 512), again.train_batch(0, 3, 512)):
        assert np.array_equal(a, b)
    seen = []
    monkeypatch.setattr(data, "learn_bpe", lambda *a: (seen.append(1), inner(*a))[1])
    load_pairs("wmt14", tmp_path, vocab=301)
    load_pairs("wmt14", tmp_path, vocab=300, lower=True)
    (folder / "valid.de").write_text("other\nlines\n")
    assert load_pairs("wmt14", tmp_path, vocab=300).texts["valid"][0][1] == "other"
    assert len(seen) == 3
    # What is kept is of these splits, not only of these files.
    a, b = (tuple(str(folder / f"{split}.{end}") for end in ("en", "de"))
            for split in ("train", "valid"))
    own = lambda **files: load_pairs("files", tmp_path, vocab=300, files=files)  # noqa: E731
    assert set(own(train=a, valid=b).texts) == {"valid"} and own(train=a, valid=b).pairs == 90
    assert "test" in own(train=a, test=b).texts and own(train=a, test=b).pairs < 90
