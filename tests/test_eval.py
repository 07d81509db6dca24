"""eval.py: each metric against examples with known answers, tables, curves, what goes wrong."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch

import common
import eval as metrics
from common import RunError
from data import load_dataset

# ------------------------------------------------------------------------- samples of text


def test_sample_metrics_by_hand():
    assert metrics.entropy([[1, 1, 2, 2], [3, 3, 3, 3]]) == pytest.approx(0.5 * 0.693147, 1e-4)
    words = {"the", "cat"}
    assert metrics.spelled(["e the cat xq th", "b the c"], words) == pytest.approx(3 / 4)
    assert metrics.spelled([*["a cat\nxq b"] * 2, "a the b"], words) == pytest.approx(3 / 5)
    assert metrics.spelled(["the cat"], words) is None
    texts = ["x\n    a = 1\n    b = 2\nif", "x\na = = 1\nif", "no lines"]
    assert metrics.parses(texts) == 1 / 3


def test_no_samples_no_figures():
    for metric in (metrics.entropy, metrics.parses, metrics.score_translations):
        with pytest.raises(RunError, match="there are no"):
            metric([])


@pytest.fixture()
def gpt2(tmp_path):
    """A folder with a tiny GPT-2 of random weights, whose context is 4 tokens, and its tokenizer:
    words to numbers, 9 for unknown ones."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = {w: i for i, w in enumerate("the cat sat on a mat dog ran x ?".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    folder = tmp_path / "gpt2"
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=10, n_positions=4, n_embd=8, n_layer=1, n_head=1, initializer_range=1.0,
        bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder


def by_hand(w, ids):
    """-log p (n - 1,) of a one-layer, one-head GPT-2 with weights w, by the formulas of its
    paper."""
    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w["h.0." + name + ".weight"] + w["h.0." + name + ".bias"]
    w = {k.removeprefix("transformer."): v.double() for k, v in w.items()}
    h = w["wte.weight"][ids] + w["wpe.weight"][:len(ids)]
    q, k, v = linear(norm(h, "h.0.ln_1"), "attn.c_attn").chunk(3, -1)
    scores = q @ k.T / q.shape[-1]**0.5
    scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1) > 0, -math.inf)
    h = h + linear(scores.softmax(-1) @ v, "attn.c_proj")
    u = linear(norm(h, "h.0.ln_2"), "mlp.c_fc")
    u = 0.5 * u * (1 + (math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)).tanh())
    log_p = (norm(h + linear(u, "mlp.c_proj"), "ln_f") @ w["wte.weight"].T).log_softmax(-1)
    return [-log_p[i, y].item() for i, y in enumerate(ids[1:])]


def test_generative_perplexity_by_hand(gpt2):
    """Two texts of unlike length, and one longer than the context, whose parts are judged alone."""
    from safetensors.torch import load_file
    w = load_file(gpt2 / "model.safetensors")
    several = [[0, 1, 2], [6, 7, 3, 0], [4, 5, 2, 3, 9, 1], [1]]
    words = "the cat sat on a mat dog ran x unheard".split()
    terms = [sum((by_hand(w, part) for part in (ids[:4], ids[4:]) if part), [])
             for ids in several[:3]]
    judge = metrics.Judge(str(gpt2), "cpu")
    corpus, each = judge.perplexities([" ".join(words[i] for i in ids) for ids in several], 2)
    assert corpus == pytest.approx(math.exp(np.mean(sum(terms, []))), rel=1e-5)  # float32
    assert each[:3] == pytest.approx([math.exp(np.mean(t)) for t in terms], rel=1e-5)
    assert math.isnan(each[3])                        # its only token follows nothing
    for p in judge.model.parameters():
        p.data.zero_()
    assert judge.perplexities(["the cat"])[0] == pytest.approx(10)  # uniform: V
    with pytest.raises(RunError, match="no token that it can score"):
        judge.perplexities(["the"])
    judge.vocab_size = 9
    with pytest.raises(RunError, match="id 9 is beyond its vocabulary of 9: its tokenizer"):
        judge.perplexities(["the unheard"])


def test_a_judge_with_anothers_tokenizer_ends_the_command(gpt2, tmp_path, capsys):
    import transformers
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=9, n_positions=4, n_embd=8, n_layer=1, n_head=1, bos_token_id=0,
        eos_token_id=0)).save_pretrained(gpt2)
    (tmp_path / "samples.jsonl").write_text('{"text": "the unheard"}\n')
    with pytest.raises(SystemExit) as ended:
        common.run_main(metrics.main, [
            str(tmp_path / "samples.jsonl"), "--dataset", "pydoc", "--data_dir", str(tmp_path),
            "--device", "cpu", "--judge", str(gpt2)])
    assert ended.value.code == 1 and "id 9 is beyond its vocabulary" in capsys.readouterr().err


def test_help_defines_every_metric(capsys):
    with pytest.raises(SystemExit) as ended:
        metrics.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in ("bound figures", "nfe", "entropy", "distinct-n", "generative perplexity", "MAUVE",
                 "spelled", "parses", "jeffreys_1e-6", "recognised", "frechet", "exact", "bleu",
                 "div4", "rouge1, 2, L", "speed", "ANI", *metrics.EXTRA):
        assert f"\n    {name}" in shown, name


def test_mauve_asks_the_package_for_the_papers_protocol(monkeypatch):
    asked = {}
    monkeypatch.setitem(sys.modules, "mauve", types.SimpleNamespace(compute_mauve=lambda **given: (
        asked.update(given), types.SimpleNamespace(mauve=0.25))[1]))
    real, texts = [["a"] * 500, ["b"] * 500]
    assert metrics.mauve(p_text=real, q_text=texts) == 0.25
    assert asked["p_text"] is real and asked["q_text"] is texts
    assert (asked["featurize_model_name"], asked["mauve_scaling_factor"], asked["num_buckets"],
            asked["max_text_length"]) == ("gpt2-large", 5, 500, 1024)
    with pytest.raises(RunError, match="500 buckets, and there are 499 samples or real texts"):
        metrics.mauve(p_text=real, q_text=texts[1:])
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(RunError, match="pip install mauve-text"):
        metrics.mauve(p_text=real, q_text=texts)


def test_mauve_of_equal_and_of_disjoint_features():
    pytest.importorskip("mauve")
    a = np.random.default_rng(0).standard_normal((600, 4))
    assert metrics.mauve(p_features=a, q_features=a) == pytest.approx(1, abs=0.01)
    assert metrics.mauve(p_features=a, q_features=a + 100) < 0.02


def test_judges_that_cannot_be_had(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    with pytest.raises(RunError, match="no run of results/ar_baseline.py and no Hugging Face"):
        metrics.Judge(str(tmp_path), "cpu")
    with pytest.raises(RunError, match="made by cadd.py: give a run of results/ar_baseline.py"):
        metrics.Judge(str(made_run(tmp_path / "a", "cadd")), "cpu")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RunError, match="pip install transformers"):
        metrics.Judge(str(tmp_path), "cpu")


def test_our_own_judge_and_how_samples_were_drawn(tmp_path, monkeypatch, capsys):
    """A run of ar_baseline.py judges by its exact likelihood; before its first step it is uniform.
    Samples say how they were drawn."""
    import ar_baseline
    flags = ["--dataset", "pydoc", "--data_dir", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(ar_baseline, "evaluate", lambda *_: {})
    common.main(ar_baseline, [*flags, *"--length 8 --dim 16 --heads 2 --depth 1 --steps 3 --lr .01 "
                              "--batch_size 4 --micro_batch 4 --warmup 1 --samples 2 --top_p .9 "
                              "--temperature .5".split(), "--out", str(tmp_path / "ar")])
    judge = metrics.Judge(str(tmp_path / "ar"), "cpu")
    text = "the cat sat"                              # 11 characters: 8 and 3
    ids = torch.from_numpy(judge.encode(text))
    log_p = [ar_baseline.log_likelihood(judge.model, x[None]).item() for x in (ids[:8], ids[8:])]
    assert judge.perplexities([text])[0] == pytest.approx(math.exp(-sum(log_p) / 11), rel=1e-5)
    with pytest.raises(RunError, match="ar_baseline.py, which has no number of steps: drop"):
        metrics.main([str(tmp_path / "ar"), *flags, "--steps", "2"])
    judge.model.out.weight.data.zero_(), judge.model.out.bias.data.zero_()
    assert judge.perplexities(["ab", "c"])[0] == pytest.approx(27)
    with pytest.raises(ValueError, match="vocabulary"):
        judge.perplexities(["é"])
    capsys.readouterr()
    metrics.main([str(tmp_path / "ar" / "samples.jsonl"), *flags, "--judge", str(tmp_path / "ar")])
    _, rows = table_of(capsys.readouterr().out)
    drawn = rows[str(tmp_path / "ar" / "samples.jsonl")]
    how = [drawn[k] for k in ("samples", "nfe", "top_p", "temperature")]
    assert how == ["2: too few, draw 64 or more", "8", "0.9", "0.5"]
    assert float(drawn["generative perplexity by own ar, 3 steps"].split()[0]) > 1


# ------------------------------------------------------------------------- translations


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
    assert metrics.bleu([hyp1], [refs1]) == pytest.approx(0.5045666840058485)
    assert metrics.bleu([hyp1, hyp2], [refs1, refs2]) == pytest.approx(0.5920778868801042)
    assert metrics.bleu([["a", "b"]], [[["a", "b", "c", "d"]]]) == 0
    smooth = metrics.bleu([["a", "b"]], [[["a", "b", "c", "d"]]], smooth=True)
    assert smooth == pytest.approx(math.exp(1 - 4 / 2))
    smooth = metrics.bleu([list("abcde")], [[list("abcdf")]], smooth=True)
    assert smooth == pytest.approx((4 / 5 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)


def test_bleu_of_several_references():
    """An n-gram counts as often as it stands in any one reference; the length is the nearest."""
    found = metrics.bleu([["the"] * 4], [["the cat".split(), "the the dog".split()]], smooth=True)
    assert found == pytest.approx((2 / 4 * 2 / 4 * 1 / 3 * 1 / 2) ** 0.25)
    assert metrics.bleu(["abcd"], [["ab", "abcde"]]) == pytest.approx(math.exp(1 - 5 / 4))
    assert metrics.bleu(["abcd"], [["abc", "abcde"]]) == 1  # of equally near ones the shorter


def test_tokeniser_and_figures():
    assert metrics.tokenise_13a('"Hi," he said: 3.5%-off...') == [
        '"', "Hi", ",", '"', "he", "said", ":", "3.5", "%", "-off", ".", ".", "."]
    assert metrics.tokenise_13a(" 3 &lt; 5, 1.") == ["3", "<", "5", ",", "1", "."]
    rows = [dict(text="A cat sat here .", reference="a cat sat here."),
            dict(text="a b c d e", reference="a b c d e")]
    figures = metrics.score_translations(rows)
    assert figures["exact"]["value"] == 50 and figures["bleu"]["value"] == pytest.approx(100)
    assert figures["exact"]["stderr"] == pytest.approx(100 * (0.25 / 2) ** 0.5)


def test_choose_takes_the_medoid():
    a, b, c = [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 2, 3, 4, 8, 7]
    assert metrics.choose([a, b, c]) == 1 and metrics.choose([b, a, c]) == 0
    assert metrics.choose([[9, 9, 9], a, a]) == 1
    assert metrics.choose([a]) == 0


def test_choose_is_the_best_mean_sentence_bleu():
    rng = np.random.default_rng(0)
    for _ in range(20):
        several = [rng.integers(0, 5, n).tolist() for n in rng.integers(1, 9, 6)]
        value = [sum(metrics.bleu([c], [[o]], smooth=True) for o in several) for c in several]
        assert value[metrics.choose(several)] == pytest.approx(max(value))


def test_rouge_gives_the_published_examples():
    """rouge_score's documentation and Lin's paper (2004), which pairs the texts so."""
    pytest.importorskip("rouge_score")
    pairs = [("The quick brown dog jumps on the log.",
              "The quick brown fox jumps over the lazy dog", 2 * 6 / 17, 2 * 2 / 15, 2 * 5 / 17),
             ("police kill the gunman", "police killed the gunman", 3 / 4, 1 / 3, 3 / 4),
             ("the gunman kill police", "police killed the gunman", 3 / 4, 1 / 3, 2 / 4)]
    found = metrics.rouge([dict(text=a, reference=b) for a, b, *_ in pairs])
    for name, *values in zip(("rouge1", "rouge2", "rougeL"), *(values for _, _, *values in pairs)):
        assert found[name]["value"] == pytest.approx(100 * np.mean(values))


def test_distinct_counts_different_ngrams():
    assert metrics.distinct(["a b c d e", "a b c d f"], 4) == 3 / 4
    assert metrics.distinct(["a b c d"] * 5, 4) == 1 / 5
    assert metrics.distinct(["a b a", "b a"], 1) == 2 / 5  # nothing runs across two texts
    assert metrics.distinct(["a b a", "b a"], 2) == 2 / 3
    assert metrics.distinct(["a b c", "d"], 4) is None


ROWS = [dict(source="x", text="a b c d e", reference="a b c d e",
             candidates=["a b c d e", "a b c d f"]),
        dict(source="y", text="F g h", reference="f g h i", candidates=["F g h", "f g h i j"])]


def test_all_figures_of_translations(tmp_path, capsys):
    figures = metrics.translation_figures(ROWS)
    assert figures["exact"]["value"] == 50
    assert figures["div4"]["value"] == pytest.approx((3 / 4 + 1) / 2)
    assert 0 < figures["bleu"]["value"] < 100
    file = tmp_path / "translations.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    metrics.main([str(file)])
    printed = capsys.readouterr().out
    assert "exact, %" in printed and "div4, per source" in printed and "50.0000" in printed


def test_packages_with_models(monkeypatch):
    for name, module, install in (("sacrebleu", "sacrebleu.metrics", "pip install sacrebleu"),
                                  ("rouge", "rouge_score.rouge_scorer", "pip install rouge-score"),
                                  ("bertscore", "bert_score", "pip install bert-score"),
                                  ("comet", "comet", "pip install unbabel-comet")):
        monkeypatch.setitem(sys.modules, module, None)
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


def test_sacrebleu_agrees_with_ours_and_has_an_interval():
    """Cased and lower-cased it is our BLEU; "tokenised" splits at spaces alone."""
    package = pytest.importorskip("sacrebleu")
    lines = ['"Hi," he said: 3.5%-off...', "It is a guide to action.", "the cat sat on the mat, ok"]
    rows = [dict(text=a, reference=b) for a, b in zip(
        lines, [lines[0], "It is a Guide to action.", "a cat sat on the mat"])]
    found = metrics.sacrebleu(rows)
    for name, cut in (("", metrics.tokenise_13a), ("_tokenised", str.split),
                      ("_lc", lambda text: metrics.tokenise_13a(text.lower()))):
        ours = metrics.bleu([cut(r["text"]) for r in rows], [[cut(r["reference"])] for r in rows])
        figure = found["sacrebleu" + name]
        assert figure["value"] == pytest.approx(100 * ours) and 0 < figure["ci95"] < 50
        assert package.__version__ in figure["unit"] and "seed:12345" in figure["unit"]
        assert "|" not in figure["unit"]              # it stands in a table
    assert found == metrics.sacrebleu(rows)


# ------------------------------------------------------------------------- toys


@pytest.mark.parametrize("name,entropy,one_step,five_steps", [
    ("checkerboard", 8.491, 1.389, 0.211), ("swissroll", 7.085, 2.593, 0.287),
    ("circles", 7.411, 2.271, 0.263)])
def test_toys_are_the_papers(name, entropy, one_step, five_steps):
    """Entropies; a perfect MDM's samples give Table 1's MDLM rows, 1.395/2.619/2.273 at 1 step."""
    data = load_dataset(name, "nowhere")
    p = metrics.histogram(data.splits["train"])
    assert data.splits["train"].shape == (100_000, 2)
    assert data.length == 2 and data.vocab_size == 100
    assert metrics.histogram_entropy(p) == pytest.approx(entropy, abs=0.015)
    rows, (_, best, own) = metrics.toy_rows(data, {1: p, 5: p}, "own", 100_000)
    assert rows["mdlm at best"][1]["jeffreys_1e-6"] == pytest.approx(one_step, rel=0.03)
    assert rows["mdlm at best"][5]["jeffreys_1e-6"] == pytest.approx(five_steps, rel=0.15)
    assert rows["own"][1] == pytest.approx({"jeffreys_1e-6": 0, "js": 0}, abs=1e-12)
    assert 0.01 < rows["data"][1]["jeffreys_1e-6"] < 0.07                  # sampling noise alone
    assert own is p and not np.array_equal(data.splits["train"], data.splits["valid"])


def test_histogram_counts_points():
    p = metrics.histogram(np.array([[0, 0], [99, 3], [99, 3], [7, 99]], np.uint8))
    assert p.shape == (100, 100) and p.sum() == 1
    assert (p[0, 0], p[99, 3], p[7, 99]) == (0.25, 0.5, 0.25)
    assert metrics.histogram_entropy(p) == pytest.approx(1.5 * math.log(2))


def test_divergences_by_hand():
    p, q = np.array([[0.5, 0.5, 0.0]]), np.array([[0.5, 0.0, 0.5]])
    assert metrics.jensen_shannon(p, q) == pytest.approx(0.5 * math.log(2))
    kl = 0.5 * (math.log(0.5 + 1e-6) - math.log(1e-6))
    assert metrics.jeffreys(p, q) == pytest.approx(kl) and metrics.jeffreys(p, q) > math.log(2)


def test_perfect_mdm_by_enumeration_of_reveal_steps():
    """Each position is revealed in a step of its own, uniform over T: the second given the first,
    or both at once from their marginals."""
    p = np.array([[0.30, 0.02, 0.01], [0.03, 0.25, 0.04], [0.05, 0.10, 0.20]])
    rows, columns = p.sum(1, keepdims=True), p.sum(0, keepdims=True)
    for T in (1, 2, 5):
        parts = [rows * columns if i == j else rows * (p / rows) if i < j else columns * (
            p / columns) for i in range(T) for j in range(T)]
        assert np.allclose(metrics.perfect_mdm(p, T), sum(parts) / T**2)


def test_a_toy_table_and_a_picture(tmp_path):
    from PIL import Image
    row = {T: {"jeffreys_1e-6": 2.5 / T, "js": 0.5} for T in (1, 20)}
    assert metrics.toy_columns(row) == {"jeffreys_1e-6 (js), T = 1": "2.500 (0.500)",
                                        "jeffreys_1e-6 (js), T = 20": "0.125 (0.500)"}
    p = np.zeros((100, 100))
    p[10, 80] = 1                                     # x = 10, y = 80: from the bottom
    metrics.save_histograms(tmp_path / "a.png", [[p, 1 - p]])
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert pixels.shape == (316, 624)
    dark = np.argwhere(pixels[8:-8, 8:308] == 0)      # a point is 3 x 3 pixels
    assert (dark.min(0).tolist(), dark.max(0).tolist()) == ([57, 30], [59, 32])


# ------------------------------------------------------------------------- classifier


def test_the_classifier_tells_classes_and_distances(tmp_path, monkeypatch):
    """The Fréchet distance is 0 between equal sets, and |difference of means|^2 for a shift."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    np.save(tmp_path / "tokens.npy", (labels[:, None] + rng.integers(0, 2, (400, 9))) % 5)
    np.save(tmp_path / "labels.npy", labels)
    monkeypatch.setattr(metrics.TokenClassifier, "steps", 60)
    data = load_dataset(str(tmp_path / "tokens.npy"), labels=str(tmp_path / "labels.npy"))
    state, asked, batch = torch.get_rng_state(), [], data.train_batch
    monkeypatch.setattr(data, "train_batch", lambda *a: (asked.append(a), batch(*a))[1])
    classifier = metrics.TokenClassifier(data)
    assert asked == [(0, step, 128, range(128)) for step in range(60)]
    assert torch.equal(torch.get_rng_state(), state)  # it takes nothing from the caller's draws
    x, y = classifier.real
    same = classifier.grade(x, y)
    assert same["recognised"] == 1.0 and abs(same["frechet"]) < 1e-3
    assert classifier.grade(x, (y + 1) % 3)["recognised"] == 0.0
    noise = torch.randint(4, x.shape, generator=torch.Generator().manual_seed(0))
    assert classifier.grade(noise, y)["frechet"] > 1.0
    features, by = classifier.features, iter([0.5, 0.0])
    classifier.features = lambda a: features(a) + next(by)
    moved = classifier.grade(x, y)
    assert moved["frechet"] == pytest.approx(64 * 0.25, rel=1e-3)


def test_frechet_of_gaussians_in_closed_form():
    """Diagonal covariances a, b and means m apart: |m|^2 + sum (sqrt a - sqrt b)^2."""
    classifier = metrics.TokenClassifier.__new__(metrics.TokenClassifier)
    classifier.head = torch.nn.Linear(2, 2)
    points = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    classifier.real_features = points
    classifier.all_features = lambda x: x
    found = classifier.grade(points * torch.tensor([3.0, 0.5]) + 2, torch.zeros(4))["frechet"]
    deviation = (4 / 3) ** 0.5                        # of `points`, unbiased
    assert found == pytest.approx(8 + (2 * deviation) ** 2 + (0.5 * deviation) ** 2)


# ------------------------------------------------------------------------- embeddings


def test_anisotropy():
    assert metrics.anisotropy(torch.ones(5, 3)) == pytest.approx(1)
    assert metrics.anisotropy(torch.eye(4)) == pytest.approx(0)
    embeddings = torch.tensor([[1.0, 0], [1, 1], [-2, 0]])
    by_hand = (0.5**0.5 - 1 - 0.5**0.5) / 3
    assert metrics.anisotropy(embeddings) == pytest.approx(by_hand)


# ------------------------------------------------------------------------- runs and tables


@pytest.fixture()
def scored(monkeypatch):
    """Stands in for common.score: [(script's name, folder, flags)], asked so far."""
    asked = []

    def score(script, out, flags, dataset=None):
        asked.append((script.__name__, out, flags))
        name = "checkerboard" if script.__name__ == "vadd" else "pydoc"
        return dict(method=f"{script.__name__}-x", dataset=name, split=flags[1], step=12345,
                    length=None, figures={
                        "nll": dict(value=1.5, stderr=0.25, unit="nats", perplexity=4.5),
                        "other": dict(value=2.0, unit="%", is_bound=False)})
    monkeypatch.setattr(common, "score", score)
    return asked


def made_run(folder, method):
    folder.mkdir(exist_ok=True)
    common.write_checkpoint(folder / "checkpoint.pt", dict(method=method))
    return folder


def table_of(printed):
    """The columns' names, and {run: {column: cell}}."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in printed.splitlines() if line.startswith("|")]
    return lines[0], {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


def test_runs_and_their_samples_make_one_table(tmp_path, scored, capsys):
    a, b = made_run(tmp_path / "a", "cadd"), made_run(tmp_path / "b", "vadd")
    (a / "samples.jsonl").write_text('{"text": "x the of q"}\n')
    flags = ["--data_dir", str(tmp_path), "--device", "cpu", "--split", "test"]
    metrics.main([str(a), str(b), str(a / "samples.jsonl"), "--dataset", "pydoc", *flags,
                  "--eval_draws", "7"])
    names, rows = table_of(capsys.readouterr().out)
    assert names == ["run", "method", "data", "steps", "nll, nats", "other, %", "samples",
                     "entropy, nats", "distinct-1", "distinct-2", "distinct-3", "spelled"]
    row = rows[str(a)]
    assert list(row.values())[1:6] == ["cadd-x", "pydoc/test", "12,345",
                                       "1.5000 ± 0.2500 (ppl 4.50)", "2.0000 (no bound)"]
    nats = 0.7 * math.log(10) - 0.3 * math.log(0.3)   # three of its ten characters are spaces
    assert row["samples"] == "1: too few, draw 64 or more" and row["spelled"] == "100.0%"
    assert row["entropy, nats"] == f"{nats:.4f}"
    assert rows[str(b)]["method"] == "vadd-x" and not rows[str(b)]["samples"]
    alone = rows[str(a / "samples.jsonl")]
    assert not alone["method"] and alone["spelled"] == "100.0%"
    assert list(rows)[3] == "data: pydoc/test" and int(rows["data: pydoc/test"]["samples"]) > 50
    assert scored[0] == ("cadd", str(a), ["--split", "test", "--data_dir", str(tmp_path),
                                          "--device", "cpu", "--eval_draws", "7"])
    with pytest.raises(RunError, match="made by difformer.py, which draws nothing .* drop"):
        metrics.main([str(made_run(tmp_path / "c", "difformer")), "--eval_draws", "7"])


def test_figures_are_kept_until_the_checkpoint_or_the_question_changes(tmp_path, scored, capsys):
    run = made_run(tmp_path / "a", "cadd")

    def ask(*flags):
        before = len(scored)
        metrics.main([str(run), "--device", "cpu", *flags])
        return len(scored) - before
    assert [ask(), ask(), ask("--split", "test"), ask("--split", "test")] == [1, 0, 1, 0]
    assert [ask("--eval_draws", "2"), ask("--eval_draws", "2"), ask()] == [1, 0, 1]
    kept = json.loads((run / "eval-valid.json").read_text())
    assert kept["figures"]["nll"]["value"] == 1.5 and kept["step"] == 12345
    made_run(run, "cadd")                             # another checkpoint
    assert [ask(), ask()] == [1, 0]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {run}")]
    assert len(rows) == 9 and len(set(row.replace("test", "valid") for row in rows)) == 1


def test_translations_of_a_run_get_all_figures(tmp_path, monkeypatch, capsys):
    run = made_run(tmp_path / "a", "difformer")
    (run / "translations-valid.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    monkeypatch.setattr(common, "score", lambda script, out, flags, dataset=None: dict(
        method="d", dataset="numbers", split="valid", step=1, length=None,
        figures={"bleu": dict(value=0.0, unit="lower case, 13a")}))
    metrics.main([str(run)])
    _, rows = table_of(capsys.readouterr().out)
    assert rows[str(run)]["div4, per source"] == "0.8750"
    assert float(rows[str(run)]["bleu, lower case, 13a"]) > 0  # of the rows, not what was logged


def test_toy_runs_have_divergences(tmp_path, scored, capsys):
    folders = [made_run(tmp_path / name, "vadd") for name in "ab"]
    train = metrics.histogram(load_dataset("checkerboard").splits["train"])
    for folder in folders:
        np.savez(folder / "histograms.npz", **{"1": train, "5": train})
    metrics.main([*map(str, folders), "--device", "cpu"])
    _, rows = table_of(capsys.readouterr().out)
    assert list(rows) == [*map(str, folders), "data: checkerboard", "mdlm at best: checkerboard"]
    assert rows[str(folders[0])]["jeffreys_1e-6 (js), T = 5"] == "0.000 (0.000)"
    jeffreys, js = (float(rows[f"{source}: checkerboard"]["jeffreys_1e-6 (js), T = 1"].split()[i]
                          .strip("()")) for i, source in enumerate(("mdlm at best", "data")))
    assert 1.3 < jeffreys < 1.5 and 0 < js < 0.1


def test_eval_errors(tmp_path):
    for argv, message in [([str(tmp_path / "none")], "does not exist"),
                          ([str(tmp_path)], "not a run folder")]:
        with pytest.raises(RunError, match=message):
            metrics.main(argv)
    file = tmp_path / "samples.jsonl"
    file.write_text('{"text": "a"}\n')
    with pytest.raises(RunError, match="say --dataset"):
        metrics.main([str(file)])
    flags = [str(file), "--dataset", "pydoc", "--data_dir", str(tmp_path)]
    for content, message in (('{"text": "a"}\n{broken\n', "line 2, is broken .* mend or remove it"),
                             ('{"ids": [1]}\n', "line 1, is no sample"), ("5\n", "line 1, is no s"),
                             ('{"text": 5}\n', "line 1, is no s"), ("\n", "is empty: it holds no"),
                             ('{"text": "a", "reference": "b"}\n{"text": "a"}\n',
                              "line 2, is no sample: it needs text, reference")):
        file.write_text(content)
        with pytest.raises(RunError, match=message):
            metrics.main(flags)
    file.write_bytes(b"\xff")
    with pytest.raises(RunError, match="cannot read samples .* decode"):
        metrics.main(flags)
    run = made_run(tmp_path / "a", "os")              # a module, but no script of ours
    with pytest.raises(RunError, match="a was made by os.py, and there is no such script here"):
        metrics.main([str(run)])
    (run / "checkpoint.pt").write_bytes(b"PK")
    with pytest.raises(RunError, match="truncated or not a checkpoint"):
        metrics.main([str(run)])


# ------------------------------------------------------------------------- curves


def write_log(folder, *records, end=""):
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + end)
    return folder


@pytest.fixture()
def logs(tmp_path):
    a = write_log(tmp_path / "a", dict(start={"argv": []}, step=0),
                  dict(step=50, bound_bits=4.0, lr=0.1, ce_by_t=[1.0, None], mfu=None, loss=3),
                  dict(step=100, bound_bits=9.0, loss=2.0), dict(start={}, step=50),
                  dict(step=100, bound_bits=3.5, loss=2.5), dict(step=2000, bound_bits=3.25,
                                                                 hint_accuracy=0.5),
                  end='{"step": 2050, "bound_b')
    b = write_log(tmp_path / "b", dict(step=10, loss=1.0, kl_nats=0.125, length_loss=5.0))
    return a, b


def test_curves_of_a_log(logs, tmp_path):
    """Steps logged twice count once; lists, missing values and lines cut short do not."""
    assert metrics.read_curves(logs[0]) == {
        "bound_bits": {50: 4.0, 100: 3.5, 2000: 3.25}, "loss": {50: 3, 100: 2.5},
        "hint_accuracy": {2000: 0.5}}
    assert metrics.read_curves(logs[1]) == {"loss": {10: 1.0}, "kl_nats": {10: 0.125}}
    with pytest.raises(RunError, match="not a run folder: it has no log.jsonl"):
        metrics.read_curves(tmp_path)
    with pytest.raises(RunError, match="no losses yet"):
        metrics.read_curves(write_log(tmp_path / "c", dict(start={}, step=0)))


def test_curves_print_the_last_values_and_draw_all(logs, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (figures.append(self),
                                                               save(self, path)))
    metrics.main(["curves", *map(str, logs)])
    printed = capsys.readouterr().out
    names, rows = table_of(printed)
    assert names == ["run", "steps", "bound_bits", "loss", "hint_accuracy", "kl_nats"]
    assert list(rows["a"].values()) == ["a", "2,000", "3.2500", "2.5000", "0.5000", ""]
    assert list(rows["b"].values()) == ["b", "10", "", "1.0000", "", "0.1250"]
    assert printed.splitlines()[-1] == str(logs[0] / "curves.png")
    assert (logs[0] / "curves.png").exists()
    drawn = {ax.get_title(): [(line.get_color(), line.get_xydata().tolist())
                              for line in ax.get_lines()] for ax in figures[0].axes}
    assert drawn == {"bound_bits": [("C0", [[50, 4], [100, 3.5], [2000, 3.25]])],
                     "loss": [("C0", [[50, 3], [100, 2.5]]), ("C1", [[10, 1]])],
                     "hint_accuracy": [("C0", [[2000, 0.5]])], "kl_nats": [("C1", [[10, 0.125]])]}
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["a", "b"]
    metrics.main(["curves", str(logs[1]), "--out", str(tmp_path / "new")])
    assert (tmp_path / "new" / "curves.png").exists()


def test_without_matplotlib_there_is_a_table_and_a_hint(logs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    metrics.main(["curves", str(logs[1])])
    printed = capsys.readouterr()
    assert "| 1.0000 |" in printed.out and "pip install matplotlib" in printed.err
    assert not (logs[1] / "curves.png").exists()


def test_runs_of_equal_names_keep_their_paths(tmp_path):
    a, b = tmp_path / "x" / "run", tmp_path / "y" / "run"
    assert metrics.names_of([a, b]) == {"run": a, str(b): b}
