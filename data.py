"""
Text in, batches out, and the scores at the end: tokenizer, toy task, reading pairs, batches by token
budget, metrics. Nothing here knows about models; from model.py comes how a file is written.
A look at the toy task:  python -c "import data; print(*data.toy_corpus(5, seed=0), sep='\\n')"
"""

import io
import json
import math
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from model import new_file

# --------------------------------------------------------------- the tokenizer
SENTINELS = 100  # <extra_id_0> … <extra_id_99>, the blanks of T5's pre-training task
SENTINEL = re.compile(r"<extra_id_(0|[1-9][0-9]?)>")


class Tokenizer:
    """
    T5's tokenizer: SentencePiece pieces, then 100 sentinels counted down from the end, so that in T5
    <extra_id_0> is 32099 and <extra_id_99> is 32000. https://arxiv.org/abs/1910.10683, section 3.1.4
    """

    def __init__(self, path):
        """path: a `spiece.model`, or a folder that holds one. ValueError if it is not such a file."""
        path = Path(path, "spiece.model") if os.path.isdir(path) else Path(path)
        self.model_bytes = path.read_bytes()
        try:  # SentencePiece takes b"" for "load nothing", which is no error to it
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes or b"empty")
        except RuntimeError as error:
            raise ValueError(f"{path}: not a SentencePiece model; copy T5's spiece.model there") from error
        self.pad_id, self.eos_id, self.unk_id = 0, 1, 2
        if (self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id()) != (0, 1, 2):
            raise ValueError(f"{path}: not a T5 tokenizer: its pad, eos and unk are not ids 0, 1 and 2")
        # mT5 has them among its pieces: "▁<extra_id_0>" is 250099 there.
        self.sentinels = SENTINELS if self.pieces.piece_to_id("▁<extra_id_0>") == self.unk_id else 0
        self.vocab_size = len(self.pieces) + self.sentinels

    def encode(self, text):
        """Text -> ids, ending in eos. The text on either side of a sentinel is encoded by itself. ValueError for half a
        surrogate pair, which is what Python makes of bytes that are not UTF-8."""
        text.encode()  # raises it; SentencePiece would end in a RuntimeError
        ids = []
        for i, part in enumerate(SENTINEL.split(text) if self.sentinels else [text]):  # text, number, text, …, text
            ids += [self.vocab_size - 1 - int(part)] if i % 2 else self.pieces.encode(part)
        return ids + [self.eos_id]

    def decode(self, ids):
        """Ids -> text, without pad, eos, and ids past the vocabulary: T5 has 32,128 for 32,100 tokens."""
        parts, run = [], []
        for i in map(int, ids):
            if len(self.pieces) <= i < self.vocab_size:
                parts += [self.pieces.decode(run), f"<extra_id_{self.vocab_size - 1 - i}>"]
                run = []
            elif self.eos_id < i < len(self.pieces):
                run.append(i)
        return " ".join(part for part in parts + [self.pieces.decode(run)] if part)

    def save(self, folder):
        """Write `folder/spiece.model`, byte for byte what was loaded."""
        os.makedirs(folder, exist_ok=True)
        with new_file(Path(folder, "spiece.model")) as f:
            f.write(self.model_bytes)


def train_tokenizer(texts, path, vocab_size):
    """
    Train at most `vocab_size` SentencePiece unigram pieces on an iterable of texts, write them to `path`
    and return the Tokenizer. ValueError if there is no text, or it has more letters than `vocab_size`.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, model_type="unigram",
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name="nmt_nfkc",  # as T5's
            hard_vocab_limit=False,       # a small corpus may not have vocab_size pieces to give
            character_coverage=0.99999,   # every letter, but not all the noise of a large corpus
            max_sentence_length=1 << 20,  # the default drops texts over 4,192 bytes: articles, say
            num_threads=2, minloglevel=2)  # sums are per thread: a fixed number gives the same file anywhere
    except RuntimeError as error:
        reason = str(error).split("] ")[-1] or "no text in lines up to 1 MB, or more letters than pieces"
        raise ValueError(f"cannot train a tokenizer of {vocab_size} SentencePiece pieces: {reason}") from error
    with new_file(path) as f:
        f.write(model.getvalue())
    return Tokenizer(path)


# ---------------------------------------------------------------- the toy task
# Translation into an invented language. The source names somebody, an act, a thing and a place in any order; the target
# puts them in this order, and a particle behind each word agrees with the word's class *and with the next particle*:
# class 0 settles it, class 1 takes over the next one, class 2 turns it. So a particle may depend on every word after
# its own, through a chain of steps from the last word to the first: the decoder, which writes from first to last, can
# not walk along it. Word: (translation, class).
TOY_WORDS = {
    "who": {"anna": ("mira", 0), "bob": ("tavo", 1), "the cat": ("sefi", 2), "a child": ("lunda", 0),
            "the king": ("orbo", 1), "my aunt": ("peka", 2), "a sailor": ("dremi", 0), "the fox": ("vulo", 1)},
    "act": {"sees": ("vidan", 1), "takes": ("rimu", 2), "paints": ("fisto", 0), "hides": ("kelba", 1),
            "sells": ("jopar", 2), "wants": ("nulo", 0), "cleans": ("savik", 1), "breaks": ("trog", 2)},
    "thing": {"a ball": ("bola", 2), "the lamp": ("lumi", 0), "a box": ("kista", 1), "the stone": ("sten", 2),
              "an apple": ("omena", 0), "a knife": ("veits", 1), "the drum": ("tamba", 2), "a coat": ("palto", 0)},
    "place": {"at home": ("domar", 0), "in town": ("urbe", 1), "outside": ("foril", 2), "by the sea": ("merin", 0),
              "upstairs": ("supra", 1), "in a cave": ("grota", 2), "nearby": ("laka", 0), "far away": ("distu", 1)}}
PARTICLES = ("na", "ko", "shi")
AGREEMENT = ((0, 0, 0), (0, 1, 2), (1, 2, 0))  # [class of the word][number of the next particle] -> this one's number


def toy_pair(rng):
    """One sentence and its translation, drawn with random.Random `rng`."""
    words = [rng.choice([*lexicon.items()]) for lexicon in TOY_WORDS.values()]
    target, particle = [], 0  # behind the last word: as if particle 0 followed
    for _, (translation, word_class) in reversed(words):
        particle = AGREEMENT[word_class][particle]
        target = [translation, PARTICLES[particle], *target]
    return " ".join(word for word, _ in rng.sample(words, len(words))), " ".join(target)


def toy_corpus(n, seed):
    """n pairs, no source twice. ValueError if n is too many."""
    rng, pairs = random.Random(seed), {}
    for _ in range(100 * n + 100):
        if len(pairs) == n:
            return list(pairs.items())
        source, target = toy_pair(rng)
        pairs[source] = target
    raise ValueError(f"the toy task has fewer than {n} different sentences: {len(pairs)} were found")


def toy_splits(seed, train, valid, test):
    """Three lists of pairs of these sizes. No target of `train` is in the others: a sentence has 24 sources, its words
    in any order, and who has seen one of them knows the target."""
    pairs = toy_corpus(train + valid + test + 24, seed)
    orders, held, size = Counter(target for _, target in pairs), set(), 0
    for target in orders:
        if size < valid + test:
            held.add(target)
            size += orders[target]
    seen, unseen = [pair for pair in pairs if pair[1] not in held], [pair for pair in pairs if pair[1] in held]
    return seen[:train], unseen[:valid], unseen[valid:valid + test]


# --------------------------------------------------------------- reading pairs
def read_pairs(*paths, prefix=""):
    """
    One `.tsv` (source TAB target), one `.jsonl` ({"source": …, "target": …}), or two parallel text files
    -> list of (prefix + source, target), no text without a visible letter. A ValueError or OSError names the
    file and the line at fault.
    """
    kinds = [Path(path).suffix.lower() for path in paths]
    parse = {(".tsv",): _parse_tsv, (".jsonl",): _parse_json}.get(tuple(kinds))
    if not parse and (len(paths) != 2 or {".tsv", ".jsonl"} & set(kinds)):
        raise ValueError(f"{' '.join(map(str, paths))}: give one .tsv, one .jsonl or two parallel text files")
    columns = [_read_lines(path) for path in paths]
    if len(columns[0]) != len(columns[-1]):
        raise ValueError(f"{paths[0]} has {len(columns[0])} lines but {paths[1]} has {len(columns[1])}; "
                         f"line N must belong to line N")
    pairs = []
    for n, row in enumerate(zip(*columns), start=1):
        source, target = parse(f"{paths[0]}:{n}", *row) if parse else row
        for path, name, text in ((paths[0], "source", source), (paths[-1], "target", target)):
            if not any(c.isprintable() and not c.isspace() for c in text):  # nor a lone zero-width space
                raise ValueError(f"{path}:{n}: the {name} is empty; remove the pair or fill it in")
        pairs.append((prefix + source, target))
    return pairs


def _read_lines(path):
    """
    The lines of a UTF-8 file, without a byte order mark. Only "\\n" (or "\\r\\n") ends a line: str.splitlines
    would also split at U+2028, \\x85 and others, and shift one parallel file against the other.
    """
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not valid UTF-8; save the file as UTF-8") from error
    if not text:
        raise ValueError(f"{path}: empty file; expected one sentence a line")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _parse_tsv(place, line):
    if line.count("\t") != 1:
        raise ValueError(f"{place}: {line.count(chr(9)) + 1} column(s), expected source TAB target")
    return line.split("\t")


def _parse_json(place, line):
    try:
        row = json.loads(line)
        (row["source"] + "" + row["target"]).encode("utf-8")  # strings, with no half of a surrogate pair
        return row["source"], row["target"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{place}: expected {{"source": "text", "target": "text"}} on one line; '
                         f"{type(error).__name__}: {error}") from error


# --------------------------------------------------------------------- batches
def encode_pairs(tokenizer, pairs, max_length):
    """Pairs of texts -> ([(source_ids, target_ids), …], number of sequences cut to max_length >= 1). eos stays."""
    pairs = [tuple(map(tokenizer.encode, pair)) for pair in pairs]
    truncated = sum(len(ids) > max_length for pair in pairs for ids in pair)
    return [tuple(ids[:-1][:max_length - 1] + ids[-1:] for ids in pair) for pair in pairs], truncated


def pad(sequences, pad_id):
    """Lists of ids -> LongTensor (B, longest), padded on the right."""
    longest = max(map(len, sequences))
    return torch.tensor([list(ids) + [pad_id] * (longest - len(ids)) for ids in sequences], dtype=torch.long)


class Batches:
    """
    An endless stream: `batches[k]` is the k-th batch, `len(batches)` is how many make an epoch. A batch is a
    function of (seed, k) alone: a resumed run goes on at its own k, and there is no state to restore. It is
    (source (B, S), target (B, T)) with B * (S + T) <= tokens, padding included; only an example longer than
    that gets a batch to itself. `examples`: list of (source_ids, target_ids).
    """

    def __init__(self, examples, tokens, pad_id, seed):
        if not examples:
            raise ValueError("no examples to make batches of")
        self.examples, self.tokens, self.pad_id, self.seed = examples, tokens, pad_id, seed
        self.lengths = np.array([(len(source), len(target)) for source, target in examples])
        self.epoch, self.plan = 0, self._plan(0)

    def __len__(self):
        return len(self.plan)

    def __getitem__(self, k):
        epoch, position = divmod(k, len(self))
        if epoch != self.epoch:
            self.epoch, self.plan = epoch, self._plan(epoch)
        source, target = zip(*(self.examples[i] for i in self.plan[position]))
        return pad(source, self.pad_id), pad(target, self.pad_id)

    def _plan(self, epoch):
        """One epoch: lists of example numbers. Only equal lengths trade places: len(self) stays."""
        rng = np.random.default_rng((self.seed, epoch))
        source, target = self.lengths.T
        # Up the source lengths at one target length, down at the next: neighbours differ little in both.
        snake = np.where(target % 2, source, -source)
        plan, batch, longest = [], [], (0, 0)
        for i in np.lexsort((rng.random(len(target)), snake, target)):
            longest = np.maximum(longest, self.lengths[i])
            if batch and (len(batch) + 1) * longest.sum() > self.tokens:
                plan.append(batch)
                batch, longest = [], self.lengths[i]
            batch.append(i)
        plan.append(batch)
        return [plan[i] for i in rng.permutation(len(plan))]


# --------------------------------------------------------------------- metrics
def _check(hypotheses, references):
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references: give one for each")


def _ngrams(words, n):
    return Counter(zip(*(words[i:] for i in range(n))))


def exact_match(hypotheses, references):
    """Percentage of hypotheses equal to their reference, character by character."""
    _check(hypotheses, references)
    return 100 * sum(h == r for h, r in zip(hypotheses, references)) / len(hypotheses)


def _tokenize_13a(text):
    """mteval-v13a's words. https://github.com/mjpost/sacrebleu, sacrebleu/tokenizers/tokenizer_13a.py"""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    text = re.sub(r"([{-~[-` -&(-+:-@/])", r" \1 ", f" {text} ")  # ASCII punctuation but ' , - .
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)  # a period or comma, unless between digits: 1,000.5
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def bleu(hypotheses, references):
    """
    Corpus BLEU, 0 to 100, as sacreBLEU computes it (13a, one reference, case-sensitive, smoothing "exp"):

        BLEU = 100 * min(1, exp(1 - |ref| / |hyp|)) * (p1 p2 p3 p4)^(1/4)
        p_n  = matching n-grams / n-grams of the hypotheses, over the whole corpus;
               the j-th p_n without a match counts 1 / 2^j matching n-grams instead of none

    Papineni et al. 2002, https://aclanthology.org/P02-1040; Post 2018, https://aclanthology.org/W18-6319
    """
    _check(hypotheses, references)
    matches, totals, reference_length = [0] * 4, [0] * 4, 0
    for texts in zip(hypotheses, references):
        hypothesis, reference = map(_tokenize_13a, texts)
        reference_length += len(reference)
        for n in range(4):
            ours = _ngrams(hypothesis, n + 1)
            matches[n] += (ours & _ngrams(reference, n + 1)).total()
            totals[n] += ours.total()
    if not any(matches) or not all(totals):
        return 0.0
    smoothing, log_precision = 1.0, 0.0
    for match, total in zip(matches, totals):
        smoothing = smoothing if match else smoothing / 2
        log_precision += math.log((match or smoothing) / total) / 4
    return 100 * math.exp(min(0.0, 1 - reference_length / totals[0]) + log_precision)


def _lcs(a, b):
    """
    Length of the longest common subsequence of two lists. A row of the textbook's table is one integer here:
    bit i says that the length grows at a[i]. Allison & Dix 1986, doi:10.1016/0020-0190(86)90091-8
    """
    where = Counter()
    for i, word in enumerate(a):
        where[word] |= 1 << i
    row = 0
    for word in b:
        ones = row | where[word]
        row = ones & ((ones - (row << 1 | 1)) ^ ones)
    return row.bit_count()


def rouge(hypotheses, references):
    """
    {"rouge1", "rouge2", "rougeL"}, 0 to 100: the mean over the pairs of the F1 of unigrams, of bigrams and of
    the longest common subsequence, as rouge-score computes it without stemming (rougeL, not rougeLsum):
    F1 = 2 P R / (P + R) = 2 * matching / (number in the hypothesis + number in the reference)
    Lin 2004, https://aclanthology.org/W04-1013; https://pypi.org/project/rouge-score
    """
    _check(hypotheses, references)
    sums = {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    for texts in zip(hypotheses, references):
        ours, theirs = (re.findall("[a-z0-9]+", text.lower()) for text in texts)
        for name, n in (("rouge1", 1), ("rouge2", 2)):
            a, b = _ngrams(ours, n), _ngrams(theirs, n)
            sums[name] += 2 * (a & b).total() / max(1, a.total() + b.total())
        sums["rougeL"] += 2 * _lcs(ours, theirs) / max(1, len(ours) + len(theirs))
    return {name: 100 * total / len(hypotheses) for name, total in sums.items()}
