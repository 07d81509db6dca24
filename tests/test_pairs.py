"""data.py's pairs of sentences: sets, tokens, batches, BLEU. Nothing is downloaded."""

import gzip
import io
import itertools
import json
import math
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch

import data
import eval as metrics
from common import RunError
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
    pairs = load_pairs("numbers", length=32, vocab=300, max_number=199)
    whole = pairs.train_batch(0, 7, 256)
    other = load_pairs("numbers", length=32, vocab=300, max_number=199)
    other.train_batch(1, 3, 128)
    assert all(map(np.array_equal, whole, other.train_batch(0, 7, 256)))
    assert not np.array_equal(whole[0], other.train_batch(1, 7, 256)[0])
    x, y = whole
    assert (x[:, 0] == 1).all() and ((x == 2).sum(1) == 1).all() and x.shape[1] % 8 == 0


def test_an_epoch_has_every_pair_and_full_batches():
    pairs = load_pairs("numbers", length=40, vocab=300, max_number=199)
    known = {tuple(map(tuple, map(pairs.encode, pair))) for pair in pairs.pairs_of("train")}
    steps = len(pairs.cuts(256)) - 1
    orders = []
    for epoch in range(2):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            x, y = pairs.train_batch(0, step, 256)
            L = max(x.shape[1], y.shape[1])
            assert 256 - L < len(x) * L <= 256 and len(x) == len(y)
            seen += [(tuple(a[a > 0]), tuple(b[b > 0])) for a, b in zip(x, y)]
        assert set(seen) == known and len(known) == 180
        assert len(seen) - len(known) < 256 // 8  # the last batch is filled up
        orders.append(seen)
    assert orders[0] != orders[1]


def test_own_files_and_their_mistakes(tmp_path, capsys):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    a, b = write("a", "eins\n\nzwei\n" + "drei " * 99 + "\n"), write("b", "one\nx\ntwo\nthree\n")
    pairs = load_pairs("files", length=24, vocab=300, files={"train": (a, b), "valid": (a, b)})
    assert pairs.pairs == 2 and "2 of 4 training pairs are left out" in capsys.readouterr().err
    assert len(pairs.texts["test"]) == 4
    with pytest.raises(DataError, match="has 4 lines, .* has 1"):
        load_pairs("files", files={"train": (a, write("c", "one\n"))})
    with pytest.raises(DataError, match="--train a.de a.en"):
        load_pairs("files", files={"train": ()})
    with pytest.raises(DataError, match="nowhere does not exist: give a text file"):
        load_pairs("files", files={"train": (a, str(tmp_path / "nowhere"))})
    (tmp_path / "d").write_bytes(b"\xff\xfe\n" * 4)
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        load_pairs("files", files={"train": (a, str(tmp_path / "d"))})
    with pytest.raises(DataError, match="raise --max_length"):
        load_pairs("files", length=2, vocab=300, files={"train": (a, b), "valid": (a, b)})


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
    sums = {}
    for name, n in (("train", 40), ("val", 3), ("test_2016_flickr", 2)):
        for language, text in zip(("de", "en"), numbered(n, f"Hund {name}", f"dog {name}")):
            (mirror / f"{name}.{language}.gz").write_bytes(gzip.compress(text.encode()))
        sums[name] = tuple(data.sha256_of(mirror / f"{name}.{e}.gz") for e in ("de", "en"))
    with pytest.raises(DataError, match="not the file expected"):
        load_pairs("multi30k", tmp_path / "data", vocab=300)
    monkeypatch.setattr(data, "MULTI30K_SHA256", sums)
    pairs = load_pairs("multi30k", tmp_path / "data", vocab=300)
    assert pairs.pairs == 40 and pairs.pairs_of("train", 1) == [("Hund train 0", "dog train 0")]
    assert pairs.texts["valid"][2] == ("Hund val 2", "dog val 2") and len(pairs.texts["test"]) == 2
    for file in mirror.iterdir():
        file.unlink()
    load_pairs("multi30k", tmp_path / "data", vocab=300)  # what was downloaded is used
    data.describe_pairs(pairs)
    assert "40 train, 3 valid, 2 test pairs" in capsys.readouterr().out


def test_iwslt14(mirror, tmp_path):
    lines = [("<url>x</url>", "<url>y</url>"), ("<title>Das da</title>", "<title>That</title>"),
             ("<keywords>a</keywords>", "<keywords>b</keywords>"),
             (" eins zwei drei vier ", "one two three four")]
    lines += [(f"Satz {i}", f"Sentence {i}") for i in range(50)]
    lines += [("a b c d", "a b"), ("x " * 176, "x " * 176), ("", "y")]  # too different, long, empty
    files = {f"de-en/train.tags.de-en.{end}": "\n".join(line[k] for line in lines) + "\n"
             for k, end in enumerate(("de", "en"))}
    for name in data.IWSLT14_TEST:
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
    pack(mirror / "gigaword.zip", {"org_data/train.src.txt": "a\n"})
    with pytest.raises(DataError, match="does not hold"):
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
    (folder / "valid.jsonl").write_text('{"src": "a"}\n')
    with pytest.raises(DataError, match='valid.jsonl: each line must be {"src"'):
        load_pairs("qqp", tmp_path, vocab=300)

    folder = tmp_path / "wmt14"
    folder.mkdir()
    for split in ("train", "valid"):
        for end, text in zip(("en", "de"), numbered(30, f"{split} en", f"{split} de")):
            (folder / f"{split}.{end}").write_text(text)
    pairs = load_pairs("wmt14", tmp_path, vocab=300)  # prepared files come before downloads
    assert pairs.texts["test"] == pairs.texts["valid"] and pairs.pairs == 30
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
    monkeypatch.setattr(data, "WORTH_KEEPING", 90)
    folder = tmp_path / "wmt14"
    folder.mkdir()
    for split, n in (("train", 90), ("valid", 2)):
        for end, text in zip(("en", "de"), numbered(n, f"{split} en", f"{split} de")):
            (folder / f"{split}.{end}").write_text(text)
    first = load_pairs("wmt14", tmp_path, vocab=300)
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


# ------------------------------------------------------------------------- BLEU


def test_bleu_gives_the_published_examples():
    """The examples of NLTK's documentation: 0.5046 and, for two sentences, 0.5921."""
    hyp1 = ("It is a guide to action which ensures that the military always obeys the commands of "
            "the party").split()
    refs = ["It is a guide to action that ensures that the military will forever heed Party "
            "commands", "It is the guiding principle which guarantees the military forces always "
            "being under the command of the Party", "It is the practical guide for the army "
            "always to heed the directions of the party"]
    refs1 = [r.split() for r in refs]
    hyp2 = "he read the book because he was interested in world history".split()
    refs2 = ["he was interested in world history because he read the book".split()]
    assert data.bleu([hyp1], [refs1]) == pytest.approx(0.5045666840058485)
    assert data.bleu([hyp1, hyp2], [refs1, refs2]) == pytest.approx(0.5920778868801042)
    assert data.bleu([["a", "b"]], [[["a", "b", "c", "d"]]]) == 0
    smooth = data.bleu([["a", "b"]], [[["a", "b", "c", "d"]]], smooth=True)
    assert smooth == pytest.approx(math.exp(1 - 4 / 2))
    smooth = data.bleu([list("abcde")], [[list("abcdf")]], smooth=True)
    assert smooth == pytest.approx((4 / 5 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)


def test_tokeniser_and_figures():
    assert data.tokenise_13a('"Hi," he said: 3.5%-off...') == [
        '"', "Hi", ",", '"', "he", "said", ":", "3.5", "%", "-off", ".", ".", "."]
    rows = [dict(text="A cat sat here .", reference="a cat sat here."),
            dict(text="a b c d e", reference="a b c d e")]
    figures = data.score_translations(rows)
    assert figures["exact"]["value"] == 50 and figures["bleu"]["value"] == pytest.approx(100)




# ------------------------------------------------------------------------- eval.py


def test_rouge_gives_the_published_examples():
    """rouge_score's documentation and Lin's paper (2004)."""
    one, two, longest = metrics.rouge("The quick brown dog jumps on the log.",
                                      "The quick brown fox jumps over the lazy dog")
    p, r = 6 / 8, 6 / 9
    assert one == pytest.approx(2 * p * r / (p + r)) and two == pytest.approx(2 * 2 / (7 + 8))
    p, r = 5 / 8, 5 / 9
    assert longest == pytest.approx(2 * p * r / (p + r))
    reference = "police killed the gunman"
    assert metrics.rouge("police kill the gunman", reference) == pytest.approx((3/4, 1/3, 3/4))
    assert metrics.rouge("the gunman kill police", reference) == pytest.approx((3/4, 1/3, 2/4))
    assert metrics.rouge("", "a") == metrics.rouge("b", "a") == metrics.rouge("b", "") == (0, 0, 0)


def test_common_subsequence_by_enumeration():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (rng.integers(0, 3, n).tolist() for n in rng.integers(0, 8, 2))
        subsequences = [{tuple(x for x, keep in zip(s, mask) if keep)
                         for mask in itertools.product((0, 1), repeat=len(s))} for s in (a, b)]
        assert metrics.common_subsequence(a, b) == max(map(len, set.intersection(*subsequences)))


def test_diversity_counts_distinct_four_grams():
    assert metrics.diversity(["a b c d e", "a b c d f"]) == 3 / 4
    assert metrics.diversity(["a b c d"] * 5) == 1 / 5
    assert metrics.diversity(["a b c", "d"]) is None


ROWS = [dict(source="x", text="a b c d e", reference="a b c d e",
             candidates=["a b c d e", "a b c d f"]),
        dict(source="y", text="F g h", reference="f g h i", candidates=["F g h", "f g h i j"])]


def test_all_figures_of_translations(tmp_path, capsys):
    figures = metrics.translation_figures(ROWS)
    assert figures["exact"]["value"] == 50
    assert figures["rouge1"]["value"] == pytest.approx(100 * (1 + 6 / 7) / 2)
    assert figures["div4"]["value"] == pytest.approx((3 / 4 + 1) / 2)
    assert 0 < figures["bleu"]["value"] < 100
    file = tmp_path / "translations.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    metrics.main([str(file)])
    printed = capsys.readouterr().out
    assert "rougeL, F1" in printed and "div4, per source" in printed and "50.0000" in printed


def test_packages_with_models(monkeypatch):
    for name, install in (("bertscore", "pip install bert-score"),
                          ("comet", "pip install unbabel-comet")):
        monkeypatch.setitem(sys.modules, "bert_score", None)
        monkeypatch.setitem(sys.modules, "comet", None)
        with pytest.raises(RunError, match=install):
            metrics.translation_figures(ROWS, [name])

    def score(texts, references, model_type):
        assert texts == ["a b c d e", "F g h"] and references == ["a b c d e", "f g h i"]
        return None, None, torch.tensor([0.5, 1.0])
    monkeypatch.setitem(sys.modules, "bert_score", types.SimpleNamespace(score=score))

    class Model:
        def predict(self, triples, batch_size, gpus):
            assert triples[1] == dict(src="y", mt="F g h", ref="f g h i")
            return types.SimpleNamespace(system_score=0.8)
    monkeypatch.setitem(sys.modules, "comet", types.SimpleNamespace(
        download_model=str, load_from_checkpoint=lambda name: Model()))
    figures = metrics.translation_figures(ROWS, ["bertscore", "comet"])
    assert figures["bertscore"]["value"] == 75 and figures["comet"]["value"] == 0.8
    with pytest.raises(RunError, match='each translation.s "source"'):
        metrics.comet([dict(text="a", reference="b")])


def test_sacrebleu_agrees_where_it_is_installed():
    package = pytest.importorskip("sacrebleu")
    lines = ['"Hi," he said: 3.5%-off...', "It is a guide to action.", "the cat sat on the mat, ok"]
    rows = [dict(text=a, reference=b) for a, b in zip(lines, lines[:2] + ["a cat sat on the mat"])]
    ours = data.bleu([data.tokenise_13a(r["text"]) for r in rows],
                     [[data.tokenise_13a(r["reference"])] for r in rows])
    assert metrics.sacrebleu(rows)["sacrebleu"]["value"] == pytest.approx(100 * ours)
    assert package.__version__ in metrics.sacrebleu(rows)["sacrebleu"]["unit"]
