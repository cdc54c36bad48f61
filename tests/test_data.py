"""
data.py: tokenizer, toy task, readers, batches, metrics. About 10 seconds:

    python -m pytest tests/test_data.py

The tests that want real data (Multi30k, T5's spiece.model) look in ../shared and are skipped without it.
"""

import io
import json
import os
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

T5_MODEL = ROOT.parent / "shared" / "t5-base" / "spiece.model"
MULTI30K = ROOT.parent / "shared" / "multi30k"
needs_t5 = pytest.mark.skipif(not T5_MODEL.exists(), reason=f"no {T5_MODEL}")
needs_multi30k = pytest.mark.skipif(not MULTI30K.exists(), reason=f"no {MULTI30K}")

# ----------------------------------------------------------------------------- the tokenizer


@pytest.fixture(scope="module")
def toy_tokenizer(tmp_path_factory):
    texts = [text for pair in data.toy_corpus(300, seed=0) for text in pair]
    return data.train_tokenizer(texts, tmp_path_factory.mktemp("toy") / "spiece.model", 60)


@needs_t5
def test_t5_ids():
    tokenizer = data.Tokenizer(T5_MODEL)
    expected = [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5, 1]
    text = "translate English to German: The house is wonderful."
    assert tokenizer.encode(text) == expected, "T5's own tokenizer gives these ids, eos last"
    assert tokenizer.decode(expected) == text, "decoding undoes encoding"
    assert tokenizer.vocab_size == 32100, "T5 has 32,000 pieces and 100 sentinels"
    assert tokenizer.encode("") == [1], "an empty text is just eos"
    # Hugging Face's T5Tokenizer (transformers 5.23) gives these
    ids = tokenizer.encode("A <extra_id_0> house<extra_id_99>. x")
    assert ids == [71, 32099, 629, 32000, 3, 5, 3, 226, 1], \
        "sentinels count down from the last id, and split the text"
    assert 32099 not in tokenizer.encode("<extra_id_100> <extra_id_00>"), "these are not sentinels"


@needs_t5
def test_t5_decode_skips_what_is_not_text():
    tokenizer = data.Tokenizer(T5_MODEL.parent)
    assert tokenizer.decode([0, 37, 1, 629, 0, 32127, 32100, -100]) == "The house", \
        "pad, eos, padded embedding rows and negative labels are not text"
    text = tokenizer.decode(torch.tensor([37, 32099, 629, 32000]))
    assert text == "The <extra_id_0> house <extra_id_99>", "sentinels decode to their names"
    assert "⁇" in tokenizer.decode(tokenizer.encode("a { b")), "unk shows as SentencePiece's mark"


@pytest.mark.parametrize("text", ["jump left twice", "walk <extra_id_0> run <extra_id_99>", "<extra_id_7>"])
def test_round_trip(toy_tokenizer, text):
    assert toy_tokenizer.decode(toy_tokenizer.encode(text)) == text, "decoding undoes encoding"


def test_decode_skips_what_is_not_text(toy_tokenizer):
    ids = toy_tokenizer.encode("jump left")  # 60 pieces, the sentinels are 60 to 159
    assert toy_tokenizer.decode([0, *ids, 160, 161, -100, 60, 159, 0]) == "jump left <extra_id_99> <extra_id_0>", \
        "pad, eos, ids past the vocabulary and negative labels are not text"


def test_trained_tokenizer_has_t5_ids(toy_tokenizer):
    ids = toy_tokenizer.encode("paints § nearby")
    assert ids[-1] == toy_tokenizer.eos_id == 1, "eos is 1 and ends every text"
    assert toy_tokenizer.unk_id == 2 and 2 in ids, "an unknown letter is unk, 2"
    assert toy_tokenizer.pad_id == 0 and 0 not in ids, "pad is 0 and never in a text"
    assert toy_tokenizer.vocab_size == 160, "60 pieces and 100 sentinels"
    assert toy_tokenizer.encode("<extra_id_0>") == [159, 1], "the first sentinel is the last id"


def test_sentinels_among_the_pieces(tmp_path):
    """mT5's file has them, so there are no ids behind the pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 20), model_writer=model, vocab_size=12, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, user_defined_symbols=["▁<extra_id_1>", "▁<extra_id_0>"], hard_vocab_limit=False, minloglevel=2)
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    tokenizer = data.Tokenizer(tmp_path)
    assert tokenizer.vocab_size == len(tokenizer.pieces), "no more ids than pieces"
    assert tokenizer.encode("<extra_id_0>") == [tokenizer.pieces.piece_to_id("▁<extra_id_0>"), 1], "it is a piece"
    assert tokenizer.decode(tokenizer.encode("a <extra_id_0> b")) == "a <extra_id_0> b"


def test_half_a_surrogate_pair_is_a_value_error(toy_tokenizer):
    with pytest.raises(ValueError, match="surrogates not allowed"):  # what a command line that is not UTF-8 holds
        toy_tokenizer.encode("jump \udcff")


def test_training_repeats_and_saving_copies(toy_tokenizer, tmp_path):
    texts = [text for pair in data.toy_corpus(300, seed=0) for text in pair]
    again = data.train_tokenizer(texts, tmp_path / "again.model", 60)
    assert again.model_bytes == toy_tokenizer.model_bytes, "the same texts must give the same file"
    again.save(tmp_path / "new" / "folder")
    saved = tmp_path / "new" / "folder" / "spiece.model"
    assert saved.read_bytes() == again.model_bytes, "save copies the bytes"
    names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["again.model", "spiece.model"], "no temporary file may stay behind"


def test_an_interrupted_save_keeps_the_old_file(toy_tokenizer, tmp_path, monkeypatch):
    (tmp_path / "spiece.model").write_bytes(b"old")

    def fail(*_):
        raise OSError("disk gone")

    monkeypatch.setattr(data.os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        toy_tokenizer.save(tmp_path)
    assert (tmp_path / "spiece.model").read_bytes() == b"old", "the old file stays until the new one is whole"
    assert len(list(tmp_path.iterdir())) == 1, "the unfinished file must go"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full, the disk that is always full")
def test_a_full_disk_names_the_file(toy_tokenizer, tmp_path):
    (tmp_path / "spiece.model.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device: .*spiece.model"):
        toy_tokenizer.save(tmp_path)


def test_training_is_quiet_and_takes_tiny_and_long_texts(tmp_path, capfd):
    tiny = data.train_tokenizer(["one sheep"], tmp_path / "a.model", 8000)
    assert tiny.decode(tiny.encode("one sheep")) == "one sheep", "a corpus of one sentence is enough"
    long = data.train_tokenizer(["abc " * 3000 + "xyz"], tmp_path / "b.model", 30)
    assert long.unk_id not in long.encode("xyz"), "neither long texts nor rare letters may be left out"
    assert capfd.readouterr() == ("", ""), "SentencePiece's own log must not reach the terminal"


def test_training_errors(tmp_path):
    with pytest.raises(ValueError, match="100 SentencePiece pieces: .*no text"):
        data.train_tokenizer([], tmp_path / "c.model", 100)
    with pytest.raises(ValueError, match="5 SentencePiece pieces: .*Vocabulary size"):
        data.train_tokenizer(["abcdefghij"], tmp_path / "c.model", 5)
    assert not list(tmp_path.iterdir()), "a training that failed leaves no file"


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\0" * 100, b'{"a": 1}'])
def test_not_a_sentencepiece_model(tmp_path, capfd, content):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(ValueError, match="spiece.model: not a SentencePiece model"):
        data.Tokenizer(tmp_path)
    assert capfd.readouterr() == ("", ""), "the exception says it all"


def test_tokenizer_missing_or_with_other_ids(tmp_path):
    with pytest.raises(OSError, match="spiece.model"):
        data.Tokenizer(tmp_path)
    with open(tmp_path / "other.model", "wb") as file:  # SentencePiece's own ids: unk 0, bos 1, eos 2, no pad
        data.sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["one sheep"]), model_writer=file, vocab_size=20, hard_vocab_limit=False,
            minloglevel=2)
    with pytest.raises(ValueError, match="other.model: .*pad"):
        data.Tokenizer(tmp_path / "other.model")


# ------------------------------------------------------------------------------- the toy task


def test_toy_repeats_and_seeds_differ():
    assert data.toy_corpus(200, seed=1) == data.toy_corpus(200, seed=1), "one seed, one corpus"
    shared = set(data.toy_corpus(200, seed=1)) & set(data.toy_corpus(200, seed=2))
    assert len(shared) < 20, "another seed must give other sentences"


def test_toy_sizes_and_splits():
    train, valid, test = data.toy_splits(seed=3, train=2000, valid=200, test=300)
    assert (len(train), len(valid), len(test)) == (2000, 200, 300), "the sizes asked for"
    sources = [source for split in (train, valid, test) for source, _ in split]
    assert len(set(sources)) == 2500, "no source may appear twice, least of all in two splits"
    assert not {target for _, target in train} & {target for _, target in valid + test}, \
        "what is asked for in valid and test, no training pair may have told"
    assert max(len(source.split()) for source in sources) <= 15, "sources of at most 15 words"
    assert max(len(target.split()) for _, target in train) <= 20, "targets of at most 20 words"
    assert all(source and target for source, target in train), "no empty sentence"


def test_toy_splits_are_as_long_as_asked_for():
    for seed in range(40):
        assert list(map(len, data.toy_splits(seed, 30, 3, seed))) == [30, 3, seed], "whatever falls into the last group"


def test_toy_means_what_it_says():
    """Read a target back by itself: words in the order who, act, thing, place, particles that agree."""
    lexicons = list(data.TOY_WORDS.values())
    for source, target in data.toy_corpus(300, seed=4):
        words, particles = target.split()[::2], [data.PARTICLES.index(p) for p in target.split()[1::2]]
        assert len(words) == len(particles) == 4, f"{target!r}: four words, a particle behind each"
        for lexicon, word, particle, following in zip(lexicons, words, particles, [*particles[1:], 0]):
            english, word_class = next((e, c) for e, (t, c) in lexicon.items() if t == word)
            assert english in source, f"{source!r}: {word} translates {english}"
            assert particle == (0, following, (following + 1) % 3)[word_class], \
                f"{target!r}, {word}: class 0 settles the particle, class 1 takes over the next one, class 2 turns it"


@pytest.mark.parametrize("chosen, source, target", (
    ([0, 0, 0, 0], "anna sees a ball at home", "mira na vidan ko bola ko domar na"),
    ([2, 1, 0, 2], "the cat takes a ball outside", "sefi ko rimu na bola shi foril ko")))
def test_toy_pair_by_hand(chosen, source, target):
    rng = SimpleNamespace(choice=lambda words: words[chosen.pop(0)], sample=lambda words, n: words[:n])
    assert data.toy_pair(rng) == (source, target), "from the last word back: na, then as each word's class says"


def test_first_particle_depends_on_every_word():
    """What makes depth matter: whichever word changes, the first particle may change with it."""
    pairs = [(source, target.split()) for source, target in data.toy_corpus(4000, seed=5)]
    for changed in range(4):
        outcomes = {}
        for _, target in pairs:
            others = tuple(word for i, word in enumerate(target[::2]) if i != changed)
            outcomes.setdefault(others, set()).add(target[1])
        assert any(len(particles) > 1 for particles in outcomes.values()), f"word {changed} must matter"


def test_toy_impossible_size(monkeypatch):
    monkeypatch.setattr(data, "toy_pair", lambda rng: (rng.choice("ab"), "x"))
    with pytest.raises(ValueError, match="fewer than 3"):
        data.toy_corpus(3, seed=0)


# ------------------------------------------------------------------------------ reading pairs


def write(folder, **files):
    """write(tmp_path, a_txt="…") -> the paths; text or bytes, underscore for the dot."""
    paths = []
    for name, content in files.items():
        paths.append(folder / name.replace("_", "."))
        paths[-1].write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return paths


@pytest.mark.parametrize("files", [
    dict(a_tsv="ein Haus\ta house\nzwei\ttwo\n"),
    dict(a_TSV=b"\xef\xbb\xbfein Haus\ta house\r\nzwei\ttwo"),
    dict(a_jsonl='{"source": "ein Haus", "target": "a house", "n": 7}\n{"target": "two", "source": "zwei"}'),
    dict(a_de="ein Haus\nzwei\n", a_en="a house\ntwo"),
    dict(a_txt=b"\xef\xbb\xbfein Haus\r\nzwei\r\n", b_txt="a house\ntwo\n"),
])
def test_formats(tmp_path, files):
    pairs = data.read_pairs(*write(tmp_path, **files), prefix="translate: ")
    assert pairs == [("translate: ein Haus", "a house"), ("translate: zwei", "two")], \
        "every format, with or without BOM, carriage returns and a last newline, holds the same two pairs"


def test_only_newline_ends_a_line(tmp_path):
    odd = "a\u2028b\x85c\x0bd\x0ce\x1cf\rg\th"
    pairs = data.read_pairs(*write(tmp_path, a_de=f"{odd}\nzwei\n", a_en="one\ntwo\n"))
    assert pairs == [(odd, "one"), ("zwei", "two")], "only \\n ends a line, and a TAB is plain text here"


@pytest.mark.parametrize("files, message", [
    (dict(a_tsv="a\tb\na\tb\tc\n"), r"a\.tsv:2: 3 column"),
    (dict(a_tsv="a\tb\n\na\tb\n"), r"a\.tsv:2: 1 column"),
    (dict(a_tsv="a\tb\na\t \n"), r"a\.tsv:2: the target is empty"),
    (dict(a_tsv=""), r"a\.tsv: empty file"),
    (dict(a_tsv=b"\xef\xbb\xbf"), r"a\.tsv: empty file"),
    (dict(a_tsv=b"a\tb\n\xc3\xa9\tb\na\t\xe9\n"), r"a\.tsv:3: not valid UTF-8"),
    (dict(a_tsv=b"\xef\xbb\xbfa\tb\na\t\xe9\n"), r"a\.tsv:2: not valid UTF-8"),
    (dict(a_csv="a,b\n"), r"a\.csv: give one \.tsv"),
    (dict(a_tsv="a\tb\n", b_tsv="a\tb\n"), r"a\.tsv .*b\.tsv: give one \.tsv"),
    (dict(a_de="a\n", a_en="b\n", a_fr="c\n"), r"a\.fr: give one \.tsv"),
    (dict(), "give one .tsv"),
    (dict(a_de="a\nb\nc\n", a_en="a\nb\n"), r"a\.de has 3 lines but .*a\.en has 2"),
    (dict(a_de="a\nb\n", a_en="a\n\n"), r"a\.en:2: the target is empty"),
    (dict(a_de="a\n\u200b\n", a_en="a\nb\n"), r"a\.de:2: the source is empty"),
    (dict(a_de="a\n\n", a_en="a\nb\n"), r"a\.de:2: the source is empty"),
    (dict(a_de="a\n", a_en=""), r"a\.en: empty file"),
    (dict(a_de="a\nb\n", a_en=b"a\n\xff\n"), r"a\.en:2: not valid UTF-8"),
    (dict(a_jsonl='{"source": "a", "target": "b"}\n{"source": \n'), r"a\.jsonl:2: expected .*source"),
    (dict(a_jsonl='{"source": "a"}\n'), r"a\.jsonl:1: expected .*target"),
    (dict(a_jsonl='{"source": "a", "target": 3}\n'), r"a\.jsonl:1: expected"),
    (dict(a_jsonl='{"source": ["a"], "target": ["b"]}\n'), r"a\.jsonl:1: expected"),
    (dict(a_jsonl='["a", "b"]\n'), r"a\.jsonl:1: expected"),
    (dict(a_jsonl='{"source": "a", "target": "\\ud800"}\n'), r"a\.jsonl:1: expected"),
    (dict(a_jsonl="[" * 100_000), r"a\.jsonl:1: expected"),
    (dict(a_jsonl='{"source": "", "target": "b"}\n'), r"a\.jsonl:1: the source is empty"),
])
def test_bad_files(tmp_path, files, message):
    with pytest.raises(ValueError, match=message) as caught:
        data.read_pairs(*write(tmp_path, **files))
    assert "\n" not in str(caught.value), "the message must fit on one line of stderr"


def test_missing_file(tmp_path):
    for paths in ([tmp_path / "no.tsv"], write(tmp_path, a_de="a\n") + [tmp_path / "no.en"]):
        with pytest.raises(OSError, match=r"no\.(tsv|en)"):
            data.read_pairs(*paths)


@needs_multi30k
def test_multi30k_line_with_a_tab(tmp_path):
    paths = MULTI30K / "train.en", MULTI30K / "train.de"
    pairs = data.read_pairs(*paths)
    assert len(pairs) == 29_000, "Multi30k's README says 29,000 pairs"
    tabs = [n for n, pair in enumerate(pairs, start=1) if "\t" in "".join(pair)]
    assert len(tabs) == 1, "one line of train.de holds a TAB, which parallel files may"
    (tmp_path / "pasted.tsv").write_text("\n".join(map("\t".join, pairs)), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"pasted\.tsv:{tabs[0]}: 3 column"):
        data.read_pairs(tmp_path / "pasted.tsv")


# ------------------------------------------------------------------------------------ batches


def random_examples(n, longest=20, seed=0):
    """Every example starts with its own number, to tell them apart; no id is 0, the padding."""
    rng = random.Random(seed)
    return [([i + 1] + [5] * rng.randrange(longest), [7] * rng.randint(1, longest)) for i in range(n)]


def epoch(batches, number):
    return [batches[k] for k in range(number * len(batches), (number + 1) * len(batches))]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))


def test_encode_pairs_truncates_before_eos(toy_tokenizer):
    pairs = [("jump left twice and walk", "tavo"), ("run", "rimu rimu rimu rimu")]
    whole, none = data.encode_pairs(toy_tokenizer, pairs, max_length=100)
    assert none == 0 and whole[1][0] == toy_tokenizer.encode("run"), "what fits is left alone"
    cut, truncated = data.encode_pairs(toy_tokenizer, pairs, max_length=4)
    expected = [tuple(ids if len(ids) <= 4 else ids[:3] + [1] for ids in pair) for pair in whole]
    assert cut == expected, "a long sequence keeps its first ids and, as the last, eos"
    assert truncated == sum(len(ids) > 4 for pair in whole for ids in pair) > 0, "cut sequences are counted"
    exact = max(len(ids) for pair in whole for ids in pair)
    assert data.encode_pairs(toy_tokenizer, pairs, exact) == (whole, 0), "max_length itself still fits"


def test_pad():
    padded = data.pad([[3, 4], [5], []], pad_id=9)
    assert padded.dtype == torch.long, "ids index an embedding"
    assert padded.tolist() == [[3, 4], [5, 9], [9, 9]], "rows are padded on the right"


def test_an_epoch_is_every_example_once_within_the_budget():
    examples = random_examples(500) + [([501] + [5] * 400, [7])]  # one example over the budget
    batches = data.Batches(examples, tokens=300, pad_id=0, seed=1)
    seen = []
    for number in (0, 1, 2):
        rows = epoch(batches, number)
        for source, target in rows:
            assert source.numel() + target.numel() <= 300 or len(source) == 1, "padding counts for the budget"
        pairs = [(s[s != 0].tolist(), t[t != 0].tolist()) for batch in rows for s, t in zip(*batch)]
        assert sorted(pairs) == sorted(examples), "an epoch has every example once, source with its target"
        seen.append(rows)
    assert not equal(seen[0], seen[1]) and not equal(seen[1], seen[2]), "epochs are shuffled differently"
    shapes = [sorted((tuple(s.shape), tuple(t.shape)) for s, t in rows) for rows in seen]
    assert shapes[0] == shapes[1] == shapes[2], "the packing's shape is the same in every epoch"
    widths = [target.shape[1] for _, target in seen[0]]
    assert widths != sorted(widths), "batches must not come in the order of their lengths"


def test_a_batch_is_as_full_as_its_own_lengths_allow():
    examples = [([5] * 30, [7])] + [([5], [7, 7])] * 10  # 31 tokens, then ten times 3
    assert len(data.Batches(examples, tokens=32, pad_id=0, seed=0)) == 2, "a long one must not shrink the next"


def test_examples_of_equal_length_change_company():
    batches = data.Batches([([i + 1], [7]) for i in range(40)], tokens=20, pad_id=0, seed=0)
    assert len(batches) == 4, "ten pairs of two tokens fill a budget of 20: it may be reached, not passed"
    company = [{frozenset(source[:, 0].tolist()) for source, _ in epoch(batches, n)} for n in (0, 1)]
    assert len(company[0] & company[1]) <= 1, "ties must be broken anew in every epoch"


def test_batches_can_be_resumed_anywhere():
    examples = random_examples(200)
    stream = data.Batches(examples, tokens=200, pad_id=0, seed=5)
    first = [stream[k] for k in range(3 * len(stream))]
    resumed = data.Batches(examples, tokens=200, pad_id=0, seed=5)
    for k in (2 * len(stream) + 3, 0, len(stream) - 1, len(stream)):
        anew = data.Batches(examples, tokens=200, pad_id=0, seed=5)
        for batches in (resumed, anew):
            assert equal([batches[k]], [first[k]]), f"batch {k} must depend on seed and k alone, not on what was asked"
    other = data.Batches(examples, tokens=200, pad_id=0, seed=6)
    assert not equal(epoch(other, 0), first[:len(stream)]), "another seed, another order"


def test_no_examples():
    with pytest.raises(ValueError, match="no examples"):
        data.Batches([], tokens=100, pad_id=0, seed=0)


@needs_multi30k
def test_padding_on_multi30k(tmp_path):
    pairs = data.read_pairs(MULTI30K / "train.en", MULTI30K / "train.de")
    texts = [text for pair in pairs[::4] for text in pair]  # a quarter of them, for time
    tokenizer = data.train_tokenizer(texts, tmp_path / "spiece.model", 8000)
    assert len(tokenizer.pieces) == 8000, "Multi30k has 8,000 pieces to give"
    examples, truncated = data.encode_pairs(tokenizer, pairs, max_length=128)
    assert truncated == 0, "no sentence of Multi30k has 128 tokens"
    batches = epoch(data.Batches(examples, tokens=4096, pad_id=0, seed=0), 0)
    total = sum(source.numel() + target.numel() for source, target in batches)
    padding = 1 - sum(len(source) + len(target) for source, target in examples) / total
    assert padding <= 0.05, f"{padding:.1%} of the tokens are padding, at most 5 % were promised"


# ------------------------------------------------------------------------------------ metrics

CORPORA = json.loads((ROOT / "tests" / "fixtures" / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("corpus", CORPORA, ids=lambda corpus: corpus["name"])
def test_scores_equal_the_references(corpus):
    bleu = data.bleu(corpus["hypotheses"], corpus["references"])
    assert bleu == pytest.approx(corpus["bleu"], abs=0.005), "sacreBLEU gives another BLEU"
    rouge = data.rouge(corpus["hypotheses"], corpus["references"])
    assert rouge == pytest.approx(corpus["rouge"], abs=0.01), "rouge-score gives another ROUGE"


def test_perfect_and_worthless():
    texts = ["a man walks his dog", "two women sing a song"]
    assert data.bleu(texts, texts) == pytest.approx(100), "equal texts score 100"
    assert data.rouge(texts, texts) == pytest.approx(dict(rouge1=100, rouge2=100, rougeL=100))
    assert data.bleu(texts, ["x", "y"]) == 0 == data.rouge(texts, ["x", "y"])["rougeL"], "no overlap scores 0"


def test_exact_match():
    assert data.exact_match(["a", "b ", "C", "d"], ["a", "b", "c", "d"]) == 50, "equal means every character"


@pytest.mark.parametrize("metric", [data.bleu, data.rouge, data.exact_match])
def test_metrics_refuse_lists_that_do_not_match(metric):
    for hypotheses, references in ((["a"], ["a", "b"]), ([], [])):
        with pytest.raises(ValueError, match="hypotheses"):
            metric(hypotheses, references)


def test_longest_common_subsequence():
    def table(a, b):  # the textbook's dynamic program
        row = [0] * (len(b) + 1)
        for x in a:
            old = row[:]
            for j, y in enumerate(b, start=1):
                row[j] = old[j - 1] + 1 if x == y else max(old[j], row[j - 1])
        return row[-1]

    rng = random.Random(0)
    for _ in range(300):
        a, b = (rng.choices("abcd", k=rng.randrange(90)) for _ in range(2))  # past 64 bits, too
        assert data._lcs(a, b) == table(a, b), f"the longest common subsequence of {a} and {b} is wrong"


def test_rouge_is_fast_enough():
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefghij", k=60)) for _ in range(1000)]
    start = time.perf_counter()
    data.rouge(texts, texts[::-1])
    assert time.perf_counter() - start < 5, "1,000 sentences of 60 words take about 0.1 s, not seconds"
