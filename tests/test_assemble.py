"""
assemble.py: the strategies, the plain T5 of an assembly, its measure, its folder, the command line. About 7 s:

    python -m pytest tests/test_assemble.py
"""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import assemble as a  # noqa: E402
import data  # noqa: E402
import distill  # noqa: E402
import model as m  # noqa: E402
import modules as mod  # noqa: E402

PATHS = {"encoder": [(0, 2), (2, 3), (3, 4)], "decoder": [(0, 3), (3, 4), (4, 6)]}  # of 4+6 layers; layer 0 replaced


def tiny(encoder=4, decoder=6, seed=0, **options):
    """A random model in which every weight matters, norms and position tables included."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "num_heads": 3, "d_ff": 32, "num_layers": encoder,
             "num_decoder_layers": decoder, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
    model = m.T5(m.T5Config(**sizes | options)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


def make_bank(teacher, granularities=None):
    """A bank whose modules are unlike any of the teacher's layers."""
    bank = mod.Bank(teacher, granularities)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in bank.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return bank.eval()


def ids(*shape):
    return torch.randint(2, 40, shape, generator=torch.Generator().manual_seed(0))


def assert_tiles(path, n):
    """The spans of `path`, laid out in order, are exactly the layers 0 ... n-1."""
    layers = [layer for start, stop in path for layer in range(start, stop)]
    assert layers == list(range(n)), f"a path must run or replace each of {n} layers once and in order, not {layers}"


# ----------------------------------------------------------------------------- one stack


def all_paths(n, spans, start=0):
    """Every path from layer `start` to n, by brute force."""
    if start == n:
        return [[]]
    steps = [(start, start + 1), *sorted({span for span in spans if span[0] == start})]
    return [[step, *rest] for step in steps for rest in all_paths(n, spans, step[1])]


@pytest.mark.parametrize("n, granularities", (
    (1, []), (4, [2]), (4, [2, 4]), (5, [5]), (6, []), (6, [2, 3]), (6, [2, 3, 6]), (8, [2, 4]), (9, [3]),
    (12, [2, 3, 4, 6]), (12, [3, 4]), (12, [4]), (12, [3, 6, 12])))
def test_path_of_depth_is_the_best_of_all(n, granularities):
    spans = mod.module_spans(n, granularities)
    best = {}
    for path in all_paths(n, spans):
        lengths = [stop - start for start, stop in path]
        rank = (sum(length ** 2 for length in lengths), lengths)  # of equals, the lower layers are whole
        best[len(path)] = min(best.get(len(path), (rank, path)), (rank, path))
    for depth in range(1, n + 1):
        found, expected = a.path_of_depth(n, spans, depth), best[depth][1] if depth in best else None
        assert found == expected, \
            f"{depth} of {n} layers, {granularities}: the path of the least sum of squared lengths, of equals the " \
            f"one whose lower layers are whole, is {expected}, not {found}"
    assert a.possible_depths(n, spans) == sorted(best), "the depths are those that some path has, ascending"


@pytest.mark.parametrize("n, granularities", ((24, [2, 3, 4, 6]), (24, [4, 6]), (18, [2, 3, 6]), (15, [3, 5])))
def test_every_chosen_path_tiles(n, granularities):
    spans = mod.module_spans(n, granularities)
    for depth in a.possible_depths(n, spans):
        path = a.path_of_depth(n, spans, depth)
        assert len(path) == depth, f"a path of depth {depth} has {depth} spans"
        assert_tiles(path, n)
        mod.check_path(path, n, spans)


@pytest.mark.parametrize("depth, path", ((6, [2] * 6), (4, [3] * 4), (3, [4] * 3), (2, [6] * 2), (11, [1] * 10 + [2]),
                                         (9, [1] * 6 + [2] * 3), (12, [1] * 12), (1, None)))
def test_path_of_depth_by_hand(depth, path):
    spans = mod.module_spans(12, [2, 3, 4, 6])
    assert a.path_of_depth(12, spans, depth) == (path and mod.path_of(path)), \
        f"{depth} of 12 layers: equal spans if there are, else the upper layers go first: {path}"


def test_possible_depths_by_hand():
    assert a.possible_depths(12, mod.module_spans(12, [2, 3, 4, 6])) == list(range(2, 13)), "2 to 12 of 12 are possible"
    assert a.possible_depths(12, mod.module_spans(12, [6])) == [2, 7, 12], "spans of 6: none, one or both replaced"
    assert a.possible_depths(5, []) == [5], "without modules only the teacher's own depth"


# ----------------------------------------------------------------------------- both stacks


ALL = list(range(2, 13))


@pytest.mark.parametrize("strategy, ratio, shape", (
    ("size-first", 1.09, (11, 11)), ("size-first", 2, (6, 6)), ("size-first", 3, (4, 4)), ("size-first", 6, (2, 2)),
    ("speed-first", 1.09, (12, 10)), ("speed-first", 2, (10, 2)), ("speed-first", 3, (6, 2)),
    ("speed-first", 6, (2, 2)), ("size-first", 1, (12, 12)), ("speed-first", 1, (12, 12)),
    ("size-first", 24 / 13, (7, 6)), ("speed-first", 24 / 21, (12, 9))))
def test_choose_depths_by_hand(strategy, ratio, shape):
    """Of all depths whose sum comes nearest to (teacher's layers) / ratio, those that the strategy prefers."""
    assert a.choose_depths(ratio, strategy, ALL, ALL) == shape, \
        f"12+12 layers at {ratio:.2f}x, {strategy}: {shape[0]}+{shape[1]}; size-first shrinks both stacks by one " \
        f"share, speed-first takes the decoder's layers first, an odd layer stays in the encoder"


@pytest.mark.parametrize("strategy, shape", (("size-first", (2, 6)), ("speed-first", (4, 4))))
def test_choose_depths_of_an_asymmetric_model(strategy, shape):
    assert a.choose_depths(2, strategy, [1, 2, 3, 4], list(range(2, 13))) == shape, \
        "size-first shrinks both stacks by the same share (4 -> 2, 12 -> 6), speed-first leaves the encoder whole"


@pytest.mark.parametrize("encoder, decoder, total, shape", ((range(1, 13), [1, 3], 10, (9, 1)),
                                                            (range(1, 19), range(1, 7), 14, (11, 3))))
def test_choose_depths_of_two_that_are_equally_even(encoder, decoder, total, shape):
    found = a.choose_depths((encoder[-1] + decoder[-1]) / total, "size-first", encoder, decoder)
    assert found == shape, "of two that are equally far from one share, 9+1 and 7+3, 11+3 and 10+4, the smaller decoder"


@pytest.mark.parametrize("ratio", (2.5, 0.5, 0.0, -2.0, 7.0, float("nan"), float("inf"), float("-inf")))
def test_unreachable_ratio_lists_the_possible(ratio):
    with pytest.raises(ValueError) as caught:
        a.choose_depths(ratio, "size-first", [2, 7, 12], [2, 7, 12])  # 24, 19, 14, 9 or 4 layers
    for word in (f"{ratio:g}", "1.00, 1.26, 1.71, 2.67, 6.00"):
        assert word in str(caught.value), f"name the ratio and all those there are: {caught.value}"


def test_a_ratio_may_be_5_percent_off():
    for ratio in (1.64, 1.79):
        assert a.choose_depths(ratio, "size-first", [2, 7, 12], [2, 7, 12]) == (7, 7), "1.71x is near enough"
    for ratio in (1.6, 1.85):
        with pytest.raises(ValueError):
            a.choose_depths(ratio, "size-first", [2, 7, 12], [2, 7, 12])


def test_unknown_strategy():
    with pytest.raises(ValueError, match="quality-first.*size-first, speed-first"):
        a.choose_depths(2, "quality-first", ALL, ALL)


@pytest.mark.parametrize("strategy", a.STRATEGIES)
@pytest.mark.parametrize("encoder, decoder", ((4, 6), (6, 4), (6, 6)))
def test_choose_gives_paths_that_assemble(strategy, encoder, decoder):
    teacher = tiny(encoder, decoder)
    bank = make_bank(teacher)
    for total in range(encoder + decoder, 3, -1):
        ratio = (encoder + decoder) / total
        paths = a.choose(teacher, bank, ratio, strategy)
        assert_tiles(paths["encoder"], encoder)
        assert_tiles(paths["decoder"], decoder)
        assert sum(map(len, paths.values())) == total, f"{ratio:.2f}x of {encoder}+{decoder} means {total} layers"
        a.assemble(teacher, bank, paths)
    least = a.choose(teacher, bank, (encoder + decoder) / 6, "speed-first")
    assert len(least["decoder"]) < len(least["encoder"]), "speed-first takes the decoder's layers"


def test_choose_takes_each_stacks_own_modules():
    teacher = tiny(4, 6)
    paths = a.choose(teacher, make_bank(teacher, {"encoder": [4], "decoder": [2]}), 2.5, "size-first")
    assert paths == {"encoder": [(0, 4)], "decoder": [(0, 2), (2, 4), (4, 6)]}, "encoder and decoder must not mix"


# ----------------------------------------------------------------------------- building


@pytest.fixture(scope="module")
def assembly():
    teacher = tiny()
    bank = make_bank(teacher)
    return teacher, bank, a.assemble(teacher, bank, PATHS)


def logits_of_paths(teacher, bank, paths, x, y):
    """In the bank's frame; without a module, the teacher's."""
    layers = bank.layers(teacher, paths)
    frame = teacher if layers == {stack: list(getattr(teacher, stack).layers) for stack in mod.STACKS} else bank.frame
    memory = frame.encode(x, layers["encoder"]).hidden
    return frame.logits(frame.decode(y, memory, x != 0, layers["decoder"]).hidden)


SOME = ({"encoder": [(0, 1), (1, 2), (2, 4)], "decoder": [(0, 1), (1, 2), (2, 4), (4, 6)]}, PATHS,
        {"encoder": [(0, 4)], "decoder": [(0, 6)]}, {"encoder": [(0, 2), (2, 4)], "decoder": [(0, 2), (2, 4), (4, 6)]},
        {"encoder": [(i, i + 1) for i in range(4)], "decoder": [(i, i + 1) for i in range(6)]})


@torch.no_grad()
@pytest.mark.parametrize("paths", SOME)
@pytest.mark.parametrize("tied", (True, False))
def test_assembly_is_its_path(paths, tied, tmp_path):
    teacher = tiny(tie_word_embeddings=tied, scale_decoder_outputs=tied, dropout_rate=0.5)
    bank, x, y = make_bank(teacher), ids(3, 7), ids(3, 5)
    x[1, 4:] = 0
    expected = logits_of_paths(teacher, bank, paths, x, y)
    model = a.assemble(teacher.train(), bank.train(), paths)
    assert torch.allclose(model(x, y), expected, atol=1e-6), "an assembly's logits are its path's, without dropout"
    assert (model.head is model.embedding) is tied, "the head is tied as the teacher's is"
    shape = (len(paths["encoder"]), len(paths["decoder"]))
    assert (model.config.num_layers, model.config.num_decoder_layers) == shape, "the config tells the depth"
    assert (teacher.config.num_layers, teacher.config.num_decoder_layers) == (4, 6), "the teacher's stays"
    assert (len(model.encoder.layers), len(model.decoder.layers)) == shape
    m.save_t5(model, tmp_path)
    again = m.load_t5(tmp_path)
    assert torch.allclose(again(x, y), expected, atol=1e-6), "and so they are after save_t5 and load_t5"
    assert again.generate(x, 5).tolist() == model.generate(x, 5).tolist(), "it generates like any T5"


@torch.no_grad()
def test_other_paths_give_other_logits(assembly):
    teacher, bank, _ = assembly
    logits = [logits_of_paths(teacher, bank, paths, ids(3, 7), ids(3, 5)) for paths in SOME]
    for one, other in itertools.combinations(logits, 2):
        assert not torch.allclose(one, other, atol=1e-3), "paths that differ must differ in their logits"


@torch.no_grad()
def test_the_stack_keeps_its_position_table(assembly, tmp_path):
    teacher, bank, model = assembly
    m.save_t5(model, tmp_path)
    again = m.load_t5(tmp_path)
    for stack in mod.STACKS:
        assert PATHS[stack][0] != (0, 1), "layer 0, whose name in the file carries the table, is replaced here"
        table, norm = getattr(bank.frame, stack).positions.weight, getattr(bank.frame, stack).norm.weight
        for name, copy in (("assembly", model), ("saved assembly", again)):
            assert torch.equal(getattr(copy, stack).positions.weight, table), f"the {name} lost its {stack}'s positions"
            assert torch.equal(getattr(copy, stack).norm.weight, norm), f"the {name} lost its {stack}'s final norm"
    before = model(ids(2, 7), ids(2, 5))
    again.encoder.positions.weight.zero_()
    assert not torch.allclose(again(ids(2, 7), ids(2, 5)), before, atol=1e-3), "the table must matter for this test"


def test_assembly_shares_nothing_with_the_bank():
    teacher = tiny()
    bank = make_bank(teacher)
    teacher.requires_grad_(False)
    before = {name: tensor.clone() for owner in (teacher, bank) for name, tensor in owner.state_dict().items()}
    one, two = a.assemble(teacher, bank, PATHS), a.assemble(teacher, bank, PATHS)
    start = {name: tensor.clone() for name, tensor in two.state_dict().items()}
    batch = (ids(2, 6), ids(2, 6))
    distill.train_student(one, [batch] * 3, 3, lr=1e-2)
    for name, tensor in one.state_dict().items():
        assert not torch.equal(tensor, start[name]), f"{name} of an assembly must be trainable like any T5's"
    for owner in (teacher, bank):
        for name, tensor in owner.state_dict().items():
            assert torch.equal(tensor, before[name]), f"training the assembly changed {name} of teacher or bank"
    assert all(torch.equal(tensor, start[name]) for name, tensor in two.state_dict().items()), \
        "two assemblies must not share a tensor"
    assert not any(weight.requires_grad for weight in teacher.parameters()), "and the teacher stays frozen"


@pytest.mark.parametrize("stack, path, word", (
    ("encoder", [(0, 2)], "covers 2 of 4"), ("encoder", [(0, 2), (3, 4)], "starts at layer 2"),
    ("decoder", [(0, 4), (4, 6)], "no module was trained for layers 0-3"), ("decoder", [], "covers 0 of 6"),
    ("decoder", [(0, 3), (3, 6), (6, 7)], "covers 7 of 6")))
def test_assemble_refuses_paths(assembly, stack, path, word):
    teacher, bank, _ = assembly
    with pytest.raises(ValueError) as caught:
        a.assemble(teacher, bank, PATHS | {stack: path})
    assert word in str(caught.value), f"say what is wrong with {path}: {word}, not: {caught.value}"


def test_parameters_by_hand():
    for tied in (True, False):
        attention, feed_forward = 4 * 16 * 12, 2 * 16 * 32
        layers = 2 * (attention + feed_forward + 2 * 16) + 3 * (2 * attention + feed_forward + 3 * 16)
        expected = layers + 2 * (8 * 3 + 16) + (1 if tied else 2) * 40 * 16  # tables and final norms, embedding, head
        assert a.parameters(tiny(2, 3, tie_word_embeddings=tied)) == expected, \
            f"{expected} parameters; a tied head is the embedding and counts once"


# ----------------------------------------------------------------------------- measuring


def test_bytes_read_by_hand():
    """d_model 16, heads 3 x 4, d_ff 32, 40 words, 8 buckets: a matrix of attention has 192 weights, 4 bytes each."""
    attention, feed_forward, norm, table = 4 * 192, 2 * 16 * 32, 16, 8 * 3
    encoder = 4 * (attention + feed_forward + 2 * norm) + table + norm
    memory = 6 * 2 * 192                                       # keys and values of six cross-attentions, once
    decoder = 6 * (2 * attention + feed_forward + 3 * norm) + table + norm - memory
    for model, size in ((tiny(), 4), (tiny(tie_word_embeddings=False), 4), (tiny().bfloat16(), 2)):
        assert a.bytes_read(model) == (size * (encoder + memory), size * (decoder + 40 * 16)), \
            "once a sentence the encoder and the memory's keys and values, once a token the rest and the head"


def test_possible_speedup_is_the_ratio_of_bytes(monkeypatch):
    monkeypatch.setattr(a, "bytes_read", {"teacher": (100, 10), "model": (40, 1)}.get)
    assert a.possible_speedup("teacher", "model", tokens=20) == 300 / 60, "(100 + 20 * 10) / (40 + 20 * 1)"
    assert a.possible_speedup("teacher", "model") == 340 / 64, "24 tokens, as where speed is measured"


def test_a_small_model_is_faster():
    teacher = tiny(12, 12)
    student = a.assemble(teacher, make_bank(teacher, {"encoder": [12], "decoder": [12]}),
                         {"encoder": [(0, 12)], "decoder": [(0, 12)]})
    assert a.speedup(teacher, student, ids(2, 8), tokens=8, rounds=5) > 1.5, \
        "1+1 layers must generate faster than 12+12; the teacher's time stands above the fraction line"


def test_speedup_by_hand(monkeypatch):
    times = {"teacher": [50.0, 6.0, 8.0, 90.0, 7.0, 6.0], "model": [1.0, 2.0, 60.0, 4.0, 1.0, 2.0]}
    asked = []

    def seconds(model, source, tokens):
        assert tokens == 24, "sentences of 24 tokens, unless told otherwise"
        assert m.QUICK.copies is not None, "copies of the weights outlive a round, or making them would be timed, too"
        asked.append(model)
        return times[model][asked.count(model) - 1]
    monkeypatch.setattr(a, "seconds", seconds)
    assert a.speedup("teacher", "model", None, rounds=5) == 7.0 / 2.0, \
        "after one round to warm up, the median of 6, 8, 90, 7, 6 over that of 2, 60, 4, 1, 2"
    assert asked == ["teacher", "model"] * 6, "the two take turns, so that a slow minute hits both"
    monkeypatch.setattr(a, "seconds", lambda *x: asked.append(x) or 1.0)
    assert a.speedup("teacher", "model", None) == 1.0 and len(asked) == 12 + 16, "7 rounds after the first, by default"


def test_seconds_decodes_all_tokens(monkeypatch):
    model, lengths, decode = tiny(), [], m.T5.decode

    def spy(self, token, *args, **kwargs):
        lengths.append((token.shape, kwargs["cache"].length))
        assert (kwargs["cache"].memory_bias == 0).all(), "every token of the source is attended to, as none is padding"
        return decode(self, token, *args, **kwargs)
    monkeypatch.setattr(m.T5, "decode", spy)
    model.head.weight.data[1] = 1e3  # eos at once, for a search that stops
    assert a.seconds(model, ids(3, 5), 6) > 0
    assert lengths == [((3, 1), i + 1) for i in range(6)], "6 tokens, one a step, for 3 sentences: no early stop"


@pytest.mark.parametrize("strategy, wanted, shape", (("size-first", 2.0, (2, 3)), ("size-first", 1.2, (3, 5)),
                                                     ("speed-first", 1.2, (4, 4)), ("size-first", 5.0, (1, 1))))
def test_choose_speedup_takes_the_largest(monkeypatch, strategy, wanted, shape):
    monkeypatch.setattr(a, "speedup", lambda teacher, model, source: 10 / (len(model.encoder.layers)
                                                                          + len(model.decoder.layers)))
    teacher = tiny()
    paths = a.choose_speedup(teacher, make_bank(teacher), wanted, strategy, None)
    assert (len(paths["encoder"]), len(paths["decoder"])) == shape, \
        f"the most layers that are {wanted}x as fast, when the time is the number of layers: {shape}"


def test_choose_speedup_names_the_fastest(monkeypatch):
    monkeypatch.setattr(a, "speedup", lambda teacher, model, source: 1 / sum(model.depths.values()))  # slower than it
    teacher = tiny()
    with pytest.raises(ValueError, match="--speedup 9: no size-first .* 0.50"):
        a.choose_speedup(teacher, make_bank(teacher), 9.0, "size-first", None)


# ----------------------------------------------------------------------------- searching


BATCHES = [(torch.tensor([[5, 6, 7, 1], [8, 9, 1, 0]]), torch.tensor([[11, 12, 1], [13, 1, 0]])),
           (torch.tensor([[20, 21, 22, 23, 1]]), torch.tensor([[24, 25, 26, 1]]))]


def test_batches_come_back(tmp_path):
    batches = [*BATCHES, *BATCHES, BATCHES[0]]
    a.save_batches(batches, tmp_path / "valid.safetensors")
    found = a.load_batches(tmp_path / "valid.safetensors", 27)
    assert len(found) == 5 and all(torch.equal(x, y) for pair in zip(found, batches) for x, y in zip(*pair)), \
        "all of them, in order"
    with pytest.raises(ValueError, match=r"valid\.safetensors: tensor 'target.1' .* below 26"):
        a.load_batches(tmp_path / "valid.safetensors", 26)  # it has a 26
    m.write_safetensors({"source.0": torch.ones(1, 2), "target.0": torch.ones(1, 2)}, tmp_path / "valid.safetensors")
    with pytest.raises(ValueError, match="tensor 'source.0'"):
        a.load_batches(tmp_path / "valid.safetensors", 27)
    good = {f"{side}.{k}": torch.ones(2, 3, dtype=torch.long) for side in ("source", "target") for k in (0, 1)}
    for wrong, word in (({"target.1": None}, "'target.1' is missing"),
                        ({"target.1": good["target.1"][:1]}, "2 rows of 'source.1', 1 of 'target.1'"),
                        (dict.fromkeys(good, good["source.0"][:, :0]), "tensor 'source.0'")):
        m.write_safetensors({name: ids for name, ids in {**good, **wrong}.items() if ids is not None},
                            tmp_path / "valid.safetensors")
        with pytest.raises(ValueError, match=rf"valid\.safetensors: .*{word}"):
            a.load_batches(tmp_path / "valid.safetensors", 27)


@pytest.mark.parametrize("n, granularities", ((1, []), (6, [2, 3]), (8, [2, 4]), (12, [3, 4, 6])))
def test_best_paths_are_the_best_of_all(n, granularities):
    """{depth: (cost, path)}; all paths are tried one by one here, dynamic programming finds the same."""
    spans, rng = mod.module_spans(n, granularities), random.Random(n)
    every = [*spans, *((i, i + 1) for i in range(n))]
    price = {(previous, span): rng.random() for span in every for previous in [None, *every]}

    def total(path):
        return sum(price[pair] for pair in zip([None, *path], path))
    everything = all_paths(n, spans)
    found = a.best_paths(n, spans, lambda previous, span: price[previous, span])
    assert a.count_paths(n, spans) == len(everything), "every tiling is counted once"
    assert list(found) == sorted({len(path) for path in everything}), "every depth that a path has, ascending"
    for depth, (cost, path) in found.items():
        best = min((path for path in everything if len(path) == depth), key=total)
        assert cost == pytest.approx(total(best)) and path == best, \
            f"the cheapest path of {depth} layers; a path costs the sum of what its spans do after the one before"


def test_count_paths_by_hand():
    assert a.count_paths(4, [(0, 2), (2, 4)]) == 4, "1111, 211, 112, 22"
    assert a.count_paths(4, [(0, 2), (2, 4), (0, 4)]) == 5, "and 4"


def divergence_by_hand(teacher, model):
    """The mean over real tokens of sum_v p_teacher(v) log(p_teacher(v) / p_model(v)) on BATCHES."""
    total = []
    for source, target in BATCHES:
        start = torch.cat([torch.full((len(target), 1), teacher.config.decoder_start_token_id), target[:, :-1]], 1)
        p, q = (each(source, start).detach()[target != 0].softmax(-1) for each in (teacher, model))
        total.append((p * (p / q).log()).sum(-1))
    assert len(set(map(len, total))) > 1, "batches of like size could be averaged wrongly unseen"
    return torch.cat(total).mean().item()


def test_divergences_by_hand():
    teacher = tiny()
    bank = make_bank(teacher)
    paths = [{"encoder": [(0, 2), (2, 3), (3, 4)], "decoder": mod.path_of([3, 1, 1, 1])},
             {"encoder": mod.path_of([1] * 4), "decoder": mod.path_of([3, 3])}]
    found = a.divergences(teacher, [(bank.frame, bank.layers(teacher, each)) for each in paths], BATCHES)
    expected = [divergence_by_hand(teacher, a.assemble(teacher, bank, each)) for each in paths]
    assert found == pytest.approx(expected, rel=1e-3) and min(expected) > 1e-3 and found[0] != found[1]
    own = {stack: getattr(teacher, stack).layers for stack in mod.STACKS}
    assert a.divergences(teacher, [(teacher, own)], BATCHES) == [0.0], "the teacher is where it is"


def test_damage_is_the_rise_of_the_divergence():
    teacher = tiny()
    bank = make_bank(teacher)
    found, whole = a.damages(teacher, bank, BATCHES), {s: list(getattr(teacher, s).layers) for s in mod.STACKS}
    base = divergence_by_hand(teacher, mod.with_layers(bank.frame, whole))

    def rise(stack, *modules):
        lengths = {s: [1] * teacher.depths[s] for s in mod.STACKS}
        for start, stop in reversed(modules):
            lengths[stack][start:stop] = [stop - start]
        model = a.assemble(teacher, bank, {s: mod.path_of(lengths[s]) for s in mod.STACKS})
        return divergence_by_hand(teacher, model) - base
    for stack in mod.STACKS:
        spans = bank.spans[stack]
        pairs = {(x, y) for x in spans for y in spans if x[1] == y[0]}
        assert set(found[stack]) == {(span,) for span in spans} | pairs, "every module, and every two neighbours"
    for stack, span in (("encoder", (2, 4)), ("decoder", (0, 3)), ("decoder", (4, 6))):
        assert found[stack][span,] == pytest.approx(rise(stack, span), abs=1e-6) and abs(rise(stack, span)) > 1e-4, \
            f"{stack} {span}: the divergence with this module, less that without, in the bank's frame"
    for stack, x, y in (("encoder", (0, 2), (2, 4)), ("decoder", (0, 3), (3, 6)), ("decoder", (2, 4), (4, 6))):
        more = rise(stack, x, y) - rise(stack, x) - rise(stack, y)
        assert found[stack][x, y] == pytest.approx(more, abs=1e-6) and abs(more) > 1e-5, \
            f"{stack} {x} and {y}: what both do beyond the sum of each alone"


def test_damages_are_measured_once(run_folder, tmp_path, monkeypatch):
    teacher = m.load_t5(run_folder / "teacher")
    bank = mod.load_bank(run_folder / "bank.safetensors", teacher).eval()
    first = a.read_damages(tmp_path, teacher, bank, BATCHES)
    assert first == a.damages(teacher, bank, BATCHES), "what is stored is what was measured"
    monkeypatch.setattr(a, "damages", None)
    assert a.read_damages(tmp_path, teacher, bank, BATCHES) == first, "the second time they are read"
    stored = json.loads((tmp_path / "damage.json").read_text(encoding="utf-8"))
    (tmp_path / "damage.json").write_text(json.dumps({**stored, "decoder": {}}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"damage\.json.*remove it"):
        a.read_damages(tmp_path, teacher, bank, BATCHES)
    (tmp_path / "damage.json").write_text(json.dumps(stored), encoding="utf-8")
    measured = []
    monkeypatch.setattr(a, "damages", lambda teacher, bank, batches: measured.append(batches) or every_damage(bank))
    a.read_damages(tmp_path, teacher, bank, BATCHES[:1])
    with torch.no_grad():
        next(bank.parameters()).view(-1)[0] += 1
    assert a.read_damages(tmp_path, teacher, bank, BATCHES[:1]) == every_damage(bank)
    with torch.no_grad():
        next(teacher.parameters()).view(-1)[0] += 1
    a.read_damages(tmp_path, teacher, bank, BATCHES[:1])
    assert measured == [BATCHES[:1]] * 3, "for other batches they are measured anew, for another bank or teacher, too"


def test_layer_seconds_fits_the_line(monkeypatch):
    asked = []

    def seconds(model, source, tokens):
        asked.append((*model.depths.values(), tokens))
        assert m.QUICK.copies is not None, "copies of the weights outlive a round"
        return 0.5 + 0.01 * model.depths["encoder"] + 0.2 * model.depths["decoder"] + 9 * (len(asked) < 5)
    monkeypatch.setattr(a, "seconds", seconds)
    assert a.layer_seconds(tiny(), None) == pytest.approx([0.5, 0.01, 0.2]), \
        "a fixed part, and what each layer of either stack adds"
    assert asked == [(1, 1, 24), (1, 6, 24), (4, 1, 24), (4, 6, 24)] * 6, \
        "four depths in turn, 24 tokens, in 5 rounds after one to warm up"


def test_layer_seconds_stands_a_wrong_clock(monkeypatch):
    rng = random.Random(0)
    monkeypatch.setattr(a, "seconds", lambda model, source, tokens: (1 + 0.1 * rng.random()) * (
        0.01 + 0.002 * model.depths["encoder"] + 0.1 * model.depths["decoder"]))
    teacher = tiny()
    for _ in range(20):
        fixed, encoder, decoder = a.layer_seconds(teacher, None)
        assert min(fixed, encoder, decoder) >= 0, "no part of a model takes time away"
        speed = (fixed + 4 * encoder + 6 * decoder) / (fixed + encoder + decoder)
        assert speed == pytest.approx(0.618 / 0.112, rel=0.1), "times that are a tenth off predict to a tenth"


def test_layer_seconds_of_single_layers(monkeypatch):
    monkeypatch.setattr(a, "seconds", lambda model, source, tokens: 2.0)
    assert sum(a.layer_seconds(tiny(1, 1), None)) == pytest.approx(2.0), "one depth alone tells the sum"


def every_damage(bank, damage=0.0):
    """What `damages` would give if every module did this damage, whatever stands beside it."""
    return {stack: {modules: damage * (len(modules) == 1) for modules in a.neighbours(bank.spans[stack])}
            for stack in mod.STACKS}


def test_candidates_are_the_best_of_all_assemblies():
    teacher, rng = tiny(), random.Random(0)
    bank = make_bank(teacher)
    damage = {stack: {modules: rng.random() + 1.5 - len(modules) for modules in a.neighbours(bank.spans[stack])}
              for stack in mod.STACKS}

    def estimate(stack, path):
        alone = sum(damage[stack].get((span,), 0) for span in path)
        return alone + sum(damage[stack].get(pair, 0) for pair in zip(path, path[1:]))
    best = {}
    for e in all_paths(4, bank.spans["encoder"]):
        for d in all_paths(6, bank.spans["decoder"]):
            entry, depths = (estimate("encoder", e) + estimate("decoder", d), e, d), (len(e), len(d))
            if len(e) + 2 * len(d) <= 9:
                best[depths] = min(entry, best.get(depths, entry))
    found = a.candidates(teacher, bank, damage, lambda e, d: e + 2 * d <= 9)
    assert [total for total, _ in found] == pytest.approx([total for total, *_ in sorted(best.values())]), \
        "the least damage of modules and neighbours in both stacks, for each pair of depths within the budget"
    assert [tuple(paths.values()) for _, paths in found] == [entry[1:] for entry in sorted(best.values())]


def test_of_those_that_do_no_damage_the_fastest():
    teacher = tiny()
    bank = make_bank(teacher)
    for damage, depths in ((0.0, (1, 1)), (0.0004, (1, 1)), (0.0006, (4, 1)), (0.004, (4, 6))):
        found = a.candidates(teacher, bank, every_damage(bank, damage), lambda e, d: True)
        assert tuple(map(len, found[0][1].values())) == depths, "below a thousandth of a nat damage does not count"
    order = sorted(itertools.product((0.0009, 0.002), (3, 4), (3, 4)),
                   key=lambda each: a.preference(each[0], {"decoder": each[1] * "x", "encoder": each[2] * "x"}))
    assert order == sorted(order), "damage, then layers of the decoder, then of the encoder"


def test_search_scores_the_candidates_for_real(monkeypatch):
    teacher = tiny()
    bank = make_bank(teacher)
    damage = every_damage(bank)  # an estimate that knows nothing
    found = a.search(teacher, bank, damage, lambda e, d: e + d <= 8, BATCHES, k=1000)
    far = {str(paths): divergence_by_hand(teacher, a.assemble(teacher, bank, paths))
           for _, paths in a.candidates(teacher, bank, damage, lambda e, d: e + d <= 8)}
    assert len(far) > 10 and far[str(found)] == min(far.values()), "the candidate nearest to the teacher wins"
    even = a.even_paths(teacher, bank, 3, 4)
    for stack in mod.STACKS:
        for span in even[stack]:
            damage[stack][span,] = 9.0 * (span[1] - span[0] > 1)  # an estimate that is wrong about the even path
    monkeypatch.setattr(a, "divergences", lambda teacher, models, batches: [
        layers != bank.layers(teacher, even) for _, layers in models])
    assert a.search(teacher, bank, damage, lambda e, d: (e, d) == (3, 4), BATCHES) == even, "even paths are scored, too"
    scored = []
    monkeypatch.setattr(a, "divergences", lambda teacher, models, batches: [
        scored.append(frame) or len(scored) for frame, _ in models])
    a.search(teacher, bank, damage, lambda e, d: e + d >= 9, BATCHES, k=1000)
    assert scored.count(teacher) == 1 and set(scored) == {teacher, bank.frame}, \
        "what is scored is what would be built: without a module the teacher in its own frame, else the bank's"
    scored.clear()
    a.search(teacher, bank, damage, lambda e, d: True, BATCHES)
    uneven = sum(paths != a.even_paths(teacher, bank, *map(len, paths.values()))
                 for _, paths in a.candidates(teacher, bank, damage, lambda e, d: True)[:8])
    assert len(scored) == 8 + uneven, "eight by default, and the even paths of these depths"
    assert a.search(teacher, bank, damage, lambda e, d: False, BATCHES) is None, "nothing is within this budget"


def test_estimate_knows_what_neighbours_do():
    bank = make_bank(teacher := tiny())
    for spans in ([(0, 3), (3, 6)], [(0, 2), (2, 4), (4, 6)]):
        damage = every_damage(bank, 1.0)
        for pair in zip(spans, spans[1:]):
            damage["decoder"][pair] = -1.0  # these two do well beside each other
        (estimate, paths), = a.candidates(teacher, bank, damage, lambda e, d: (e, d) == (4, len(spans)))
        assert paths["decoder"] == spans and estimate == 1.0, "what each does alone, and less for each two of a kind"


@pytest.mark.parametrize("options, within", (
    (["--ratio", "2"], lambda e, d: e + d <= 5), (["--params", "22K"], None),
    (["--speedup", "1.5"], lambda e, d: 10 / (e + d) >= 1.5)))
def test_search_keeps_the_budget(run_folder, tmp_path, capsys, monkeypatch, options, within):
    monkeypatch.setattr(a, "seconds", lambda model, source, tokens: float(sum(model.depths.values())))
    status, out, error = command(capsys, run_folder, *options, "--out", tmp_path / "small")
    assert (status, error) == (0, ""), error
    model, teacher = m.load_t5(tmp_path / "small"), m.load_t5(run_folder / "teacher")
    assert within(*model.depths.values()) if within else a.parameters(model) <= 22_000 < a.parameters(teacher)
    words = {line.split()[0]: line for line in out.splitlines()}
    assert " 65 assemblies" in words["search"], "5 encoder paths of 4 layers, 13 decoder paths of 6"
    if options[0] == "--speedup":
        predicted, measured = (float(words[word].partition("speed-up")[2].split()[0].rstrip("x"))
                               for word in ("search", "speed-up"))
        assert predicted == pytest.approx(measured, abs=0.01), "the prediction is that of the model that was chosen"


@pytest.mark.parametrize("options", (["--ratio", "2"], ["--params", "22K"]))
def test_where_no_speed_is_asked_for_layers_are_not_timed(run_folder, capsys, quick, monkeypatch, options):
    monkeypatch.setattr(a, "layer_seconds", None)  # seconds of every search, for a number that is measured anyway
    status, out, _ = command(capsys, run_folder, *options)
    assert status == 0 and "measured" in out


def test_a_ratio_is_reached_as_it_is_printed(run_folder, capsys, quick, monkeypatch):
    asked = []
    monkeypatch.setattr(a, "search", lambda teacher, bank, damage, allowed, batches: asked.append(allowed))
    command(capsys, run_folder, "--ratio", "1.67")
    assert asked[0](2, 4) and not asked[0](3, 4), "6 of 10 layers are 1.666, printed as 1.67, 7 are 1.43"


def test_list_shows_what_is_worth_choosing(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(a, "seconds", lambda model, source, tokens: 1.0 + 2.0 * model.depths["encoder"]
                        + 3.0 * model.depths["decoder"])
    status, out, error = command(capsys, run_folder, "--list")
    assert (status, error) == (0, "")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[4:]]
    speeds, damages = [float(row[3].rstrip("x")) for row in rows], [float(row[4]) for row in rows]
    assert speeds == sorted(speeds) and damages == sorted(damages), "faster must cost more, or it would not be listed"
    teacher = m.load_t5(run_folder / "teacher")
    bank = mod.load_bank(run_folder / "bank.safetensors", teacher)
    monkeypatch.setattr(a, "damages", None)  # stored by the command
    damage = a.read_damages(run_folder, teacher, bank, a.load_batches(run_folder / "valid.safetensors", 10 ** 6))
    least = {tuple(map(len, paths.values())): estimate
             for estimate, paths in a.candidates(teacher, bank, damage, lambda e, d: True)}
    worth = [f"{e}+{d}" for (e, d), estimate in least.items() if not any(
        (2 * x + 3 * y, other) < (2 * e + 3 * d, estimate) and other <= estimate for (x, y), other in least.items())]
    assert sorted(row[0] for row in rows) == sorted(worth), "every depth that no other beats in speed and damage, once"
    for layers, ratio, size, speed, _, encoder, decoder in rows:
        e, d = map(int, layers.split("+"))
        assert (len(encoder.split(",")), len(decoder.split(","))) == (e, d) and ratio == f"{10 / (e + d):.2f}x"
        assert float(speed.rstrip("x")) == pytest.approx(27 / (1 + 2 * e + 3 * d), abs=0.006), "by the time of layers"
        paths = {stack: mod.path_of(map(int, lengths.split(",")))
                 for stack, lengths in zip(mod.STACKS, (encoder, decoder))}
        assert size == f"{a.parameters(a.assemble(teacher, bank, paths)):,}", "the parameters of that very assembly"


def test_export_removes_nothing_but_what_an_export_left(run_folder, tmp_path):
    model, (part, out) = tiny(), (tmp_path / ".out.part", tmp_path / "out")
    a.export(model, run_folder / "spiece.model", tmp_path / "out.part")  # a model that somebody calls so
    part.mkdir()
    for other in (part / "keep", part / "pytorch_model.bin"):
        other.mkdir() if other.name == "keep" else other.write_bytes(b"of something else")
        with pytest.raises(ValueError, match="out.part: is in the way"):
            a.export(model, run_folder / "spiece.model", out)
        assert other.exists() and not out.exists()
        other.rmdir() if other.name == "keep" else other.unlink()
    (part / "model.safetensors.part").write_bytes(b"half")  # of one that was killed
    a.export(model, run_folder / "spiece.model", out)
    assert out.exists() and not part.exists()
    assert len([*(tmp_path / "out.part").iterdir()]) == 5, "a whole model stays, whatever its name"


def test_spans_by_hand_take_no_strategy():
    with pytest.raises(ValueError, match="--encoder goes with --strategy search, not size-first"):
        a.parse_args(["run", "--encoder", "2,2", "--decoder", "4", "--strategy", "size-first"])


def test_list_has_no_slower_assembly_of_equal_damage(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(a, "seconds", lambda model, source, tokens: 1.0 + sum(model.depths.values()))
    monkeypatch.setattr(a, "damages", lambda teacher, bank, batches: every_damage(bank))
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "damage.json").unlink(missing_ok=True)
    out = command(capsys, folder, "--list")[1]
    shapes = [line.split()[1] for line in out.splitlines()[4:]]
    assert shapes == ["1+2"], "if no module does damage, the fastest is best"


def test_speedup_may_be_just_reached(run_folder, tmp_path, capsys, quick, monkeypatch):
    monkeypatch.setattr(a, "damages", lambda teacher, bank, batches: every_damage(bank, 1.0))
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "damage.json").unlink(missing_ok=True)
    monkeypatch.setattr(a, "search", lambda teacher, bank, damage, allowed, batches: a.candidates(
        teacher, bank, damage, allowed)[0][1])
    assert "4+6 of 4+6" in command(capsys, folder, "--speedup", "1")[1], "the teacher is as fast as the teacher"


def test_params_may_be_just_reached(run_folder, capsys, quick):
    teacher = m.load_t5(run_folder / "teacher")
    least = a.parameters(teacher) - 3 * a.parameters(teacher.encoder.layers[0]) \
        - 4 * a.parameters(teacher.decoder.layers[0])
    status, out, _ = command(capsys, run_folder, "--params", least)
    assert status == 0 and "1+2 of 4+6" in out, "at most so many parameters: the smallest assembly has exactly these"
    assert command(capsys, run_folder, "--params", least - 1)[0] == 2


def test_a_run_without_validation_pairs(run_folder, tmp_path, capsys):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "valid.safetensors").unlink()
    status, _, error = command(capsys, folder, "--ratio", "2")
    assert status == 2 and "valid.safetensors: missing" in error and error.count("\n") == 1
    m.write_safetensors({}, folder / "valid.safetensors")
    status, _, error = command(capsys, folder, "--ratio", "2")
    assert status == 2 and "valid.safetensors: not a file of batches" in error and error.count("\n") == 1
    m.write_safetensors(dict.fromkeys(("source.0", "source.1"), torch.ones(1, 2, dtype=torch.long)),
                        folder / "valid.safetensors")
    status, _, error = command(capsys, folder, "--ratio", "2")
    assert status == 2 and "valid.safetensors: not a file of batches" in error and error.count("\n") == 1


# ----------------------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What train.py leaves of a teacher of 4+6 layers, as far as assemble.py reads it."""
    folder = tmp_path_factory.mktemp("run")
    teacher = tiny(vocab_size=60)
    m.save_t5(teacher, folder / "teacher")
    mod.save_bank(make_bank(teacher, {"encoder": [2, 4], "decoder": [2, 3]}), folder / "bank.safetensors")
    data.train_tokenizer([text for pair in data.toy_corpus(100, seed=0) for text in pair], folder / "spiece.model", 60)
    a.save_batches(BATCHES, folder / "valid.safetensors")
    return folder


def test_export_writes_a_t5_folder(assembly, run_folder, tmp_path):
    model, folder = assembly[2], tmp_path / "new" / "small"
    a.export(model, run_folder / "spiece.model", folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "spiece.model",
                     "tokenizer_config.json"}, "a T5 folder with its tokenizer and generation config"
    assert [path.name for path in folder.parent.iterdir()] == ["small"], "and nothing beside it"
    text = "a b c"
    assert data.Tokenizer(folder).encode(text) == data.Tokenizer(run_folder).encode(text), "the tokenizer is the run's"
    config, tokenizer = [json.loads((folder / name).read_text(encoding="utf-8"))
                         for name in ("config.json", "tokenizer_config.json")]
    assert tokenizer["extra_ids"] == 100, "sentinels beyond the pieces"
    assert tokenizer["tokenizer_class"] == "T5Tokenizer", "Hugging Face reads from this which tokenizer it is"
    assert (config["num_layers"], config["num_decoder_layers"]) == (3, 3), "both depths are written"
    with torch.no_grad():
        x = ids(2, 6)
        assert torch.equal(m.load_t5(folder)(x, x), model(x, x)), "load_t5 reads it"


@pytest.mark.parametrize("kind", ("folder", "file"))
def test_export_refuses_what_is_there(assembly, run_folder, tmp_path, kind):
    folder = tmp_path / "small"
    folder.mkdir() if kind == "folder" else folder.write_text("precious", encoding="utf-8")
    with pytest.raises(ValueError, match="small: is there already"):
        a.export(assembly[2], run_folder / "spiece.model", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["small"], "nothing is written"
    assert not list(folder.iterdir()) if kind == "folder" else folder.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("where", ("tokenizer", "write", "replace"))
def test_failed_export_leaves_nothing(assembly, run_folder, tmp_path, monkeypatch, where):
    tokenizer = tmp_path / "none" / "spiece.model" if where == "tokenizer" else run_folder / "spiece.model"

    def full(*_):
        raise OSError("no space left on device")
    if where == "write":
        monkeypatch.setattr(a, "write_json", full)
    if where == "replace":
        monkeypatch.setattr(a.os, "replace", full)
    with pytest.raises(OSError):
        a.export(assembly[2], tokenizer, tmp_path / "small")
    assert list(tmp_path.iterdir()) == [], "a failed export leaves no part of a folder"


def test_export_after_a_crash(assembly, run_folder, tmp_path):
    (tmp_path / ".small.part").mkdir()
    (tmp_path / ".small.part" / "model.safetensors.part").write_bytes(b"half")
    a.export(assembly[2], run_folder / "spiece.model", tmp_path / "small")
    assert not (tmp_path / "small" / "model.safetensors.part").exists(), "what a killed run left must not get in"
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


# ----------------------------------------------------------------------------- the command line


def command(capsys, *args):
    """Run the command line here -> (exit status, stdout, stderr)."""
    status = a.main([str(arg) for arg in args])
    return status, *capsys.readouterr()


@pytest.fixture
def quick(monkeypatch):
    """Without measuring: the time is the number of layers."""
    monkeypatch.setattr(a, "speedup", lambda teacher, model, source: 10 / (len(model.encoder.layers)
                                                                          + len(model.decoder.layers)))
    monkeypatch.setattr(a, "layer_seconds", lambda teacher, source: (0.0, 1.0, 1.0))


def test_a_good_run(run_folder, tmp_path):
    out = tmp_path / "small"
    line = [sys.executable, str(ROOT / "assemble.py"), str(run_folder), "--ratio", "2", "--strategy", "size-first",
            "--out", str(out)]
    run = subprocess.run(line, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0 and run.stderr == "", f"a good run has exit status 0 and no errors: {run.stderr}"
    words = {line.split()[0]: line for line in run.stdout.splitlines()}
    teacher, model = m.load_t5(run_folder / "teacher"), m.load_t5(out)
    assert words["layers"].endswith("2+3 of 4+6") and "2.00x" in words["ratio"], run.stdout
    assert words["encoder"].endswith(" 2,2") and words["decoder"].endswith(" 2,2,2"), run.stdout
    assert f"{a.parameters(model):,} of {a.parameters(teacher):,}" in words["parameters"], run.stdout
    assert float(words["speed-up"].split()[1].rstrip("x")) > 0 and "measured" in words["speed-up"], run.stdout
    assert str(out) in words["written"] and "use_cache=False" in words["note:"], \
        "fewer encoder than decoder layers need a word on generating with transformers"
    bank = mod.load_bank(run_folder / "bank.safetensors", teacher).eval()
    paths = {"encoder": mod.path_of([2, 2]), "decoder": mod.path_of([2, 2, 2])}
    with torch.no_grad():
        x, y = ids(2, 7), ids(2, 5)
        assert torch.allclose(model(x, y), logits_of_paths(teacher, bank, paths, x, y), atol=1e-6), \
            "the folder holds the assembly of the run's bank"
    assert data.Tokenizer(out).encode("a b") == data.Tokenizer(run_folder).encode("a b"), "with the run's tokenizer"


@pytest.mark.parametrize("prefix, told", (("", False), ("summarize: ", True)))
def test_a_prefix_is_remembered(run_folder, tmp_path, capsys, quick, prefix, told):
    shutil.copytree(run_folder, tmp_path / "run")
    m.write_json({"prefix": prefix}, tmp_path / "run" / "args.json")
    line = (tmp_path / "run", "--ratio", "2", "--strategy", "size-first", "--out", tmp_path / "small")
    status, out, _ = command(capsys, *line)
    assert status == 0 and ("trained with 'summarize: '" in out) == told, "a model wants the prefix it was trained with"


@pytest.mark.parametrize("options, layers, note", (
    (["--ratio", "2", "--strategy", "speed-first"], "3+2 of", False),
    (["--encoder", "1,1,2", "--decoder", "3,1,2"], "3+3 of", False),
    (["--encoder", "4", "--decoder", "1,1,1,1,1,1"], "1+6 of", True),
    (["--speedup", "2.4", "--strategy", "size-first"], "2+2 of", False),
    (["--speedup", "1.2", "--strategy", "speed-first"], "4+4 of", False),
    (["--ratio", "1", "--strategy", "size-first"], "4+6 of", True)))
def test_ways_to_choose(run_folder, tmp_path, capsys, quick, options, layers, note):
    status, out, error = command(capsys, run_folder, *options, "--out", tmp_path / "small")
    assert (status, error) == (0, ""), f"{options} is a good command line"
    assert layers in out, f"{options} means {layers} 4+6, not\n{out}"
    kept = sum(map(int, layers.split()[0].split("+")))
    assert f"ratio       {10 / kept:.2f}x\n" in out, f"10 layers over {kept}, both stacks together, not\n{out}"
    assert ("note:" in out) is note, "the note is for fewer encoder than decoder layers"
    m.load_t5(tmp_path / "small")


def test_without_out_nothing_is_written(run_folder, capsys, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in run_folder.iterdir())
    status, out, _ = command(capsys, run_folder, "--ratio", "2", "--strategy", "size-first", "--batch-size", "3")
    assert status == 0 and "batch 3" in out and "written" not in out
    assert list(tmp_path.iterdir()) == [] and sorted(path.name for path in run_folder.iterdir()) == before


@pytest.mark.parametrize("options, words", (
    (["--ratio", "4", "--strategy", "size-first"], ["--ratio 4", "possible: 1.00, 1.11"]),
    (["--ratio", "nan", "--strategy", "size-first"], ["--ratio nan"]),
    (["--ratio", "4"], ["--ratio 4", "--list"]),
    (["--ratio", "nan"], ["--ratio nan", "above 0"]),
    (["--params", "1K"], ["--params 1000:", "--list"]),
    (["--params", "40KM"], ["--params: 40KM", "such as 40M"]),
    (["--params", "9" * 400], ["--params: 999", "such as 40M"]),
    (["--ratio", "0"], ["--ratio 0", "above 0"]),
    (["--speedup", "-1"], ["--speedup -1", "above 0"]),
    (["--params", "1M", "--strategy", "size-first"], ["--params", "--strategy search"]),
    (["--list", "--strategy", "speed-first"], ["--list", "--strategy search"]),
    (["--list", "--ratio", "2"], ["--list", "--ratio"]),
    (["--ratio", "2", "--speedup", "2"], ["--ratio", "--speedup", "--encoder"]),
    ([], ["--ratio", "--speedup", "--encoder"]),
    (["--encoder", "2,2"], ["--encoder", "--decoder"]),
    (["--ratio", "2", "--encoder", ""], ["--ratio", "--encoder"]),
    (["--encoder", "", "--decoder", "2,2,2"], ["--encoder : not span lengths"]),
    (["--decoder", "2,2,2"], ["--encoder", "--decoder"]),
    (["--encoder", "2,2", "--decoder", "2,2,2", "--ratio", "2"], ["--ratio", "--encoder"]),
    (["--encoder", "2", "--decoder", "2,2,2"], ["encoder path", "covers 2 of 4"]),
    (["--encoder", "2,2", "--decoder", "2,2,2,2"], ["no module", "6-7"]),
    (["--encoder", "1,2,1", "--decoder", "2,2,2"], ["no module", "1-2"]),
    (["--encoder", "2,2", "--decoder", "6"], ["no module", "0-5"]),
    (["--encoder", "0,2,2", "--decoder", "2,2,2"], ["--encoder 0,2,2", "2,2,1"]),
    (["--encoder", "2;2", "--decoder", "2,2,2"], ["--encoder 2;2", "2,2,1"]),
    (["--encoder", "2,2", "--decoder", "2,,2"], ["--decoder 2,,2"]),
    (["--speedup", "1000", "--strategy", "size-first"], ["--speedup 1000", "3.33"]),
    (["--speedup", "1000"], ["--speedup 1000", "--list"]),
    (["--ratio", "2", "--batch-size", "0"], ["--batch-size 0"]),
    (["--ratio", "2", "--batch-size", "-1"], ["--batch-size -1"]),
    (["--ratio", "2", "--batch-size", str(1 << 61)], ["--batch-size", "at most"])))
def test_bad_options(run_folder, tmp_path, capsys, quick, options, words):
    status, out, error = command(capsys, run_folder, *options, "--out", tmp_path / "small")
    assert status == 2, f"a wrong option is exit status 2: {options}"
    assert error.count("\n") == 1 and all(word in error for word in words), f"one line that names it, not: {error}"
    assert out == "" and list(tmp_path.iterdir()) == [], "nothing is printed and nothing written"


def test_count_by_hand():
    assert [a.count(text) for text in ("12", "500K", "40M", "1.5B")] == [12, 500_000, 40_000_000, 1_500_000_000]


@pytest.mark.parametrize("options", (["--ratio", "two"], ["--strategy", "best", "--ratio", "2"]))
def test_options_that_argparse_refuses(run_folder, tmp_path, capsys, options):
    status, _, error = command(capsys, run_folder, *options, "--out", tmp_path / "small")
    assert status == 2 and error.count("\n") == 1 and options[0] in error, f"one line with {options[0]}: {error!r}"
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_existing_out(run_folder, tmp_path, capsys, quick):
    (tmp_path / "small").mkdir()
    status, out, error = command(capsys, run_folder, "--ratio", "2", "--out", tmp_path / "small")
    assert status == 2 and error.count("\n") == 1 and str(tmp_path / "small") in error and out == "", \
        "what is there already is found before any work is done"
    assert list((tmp_path / "small").iterdir()) == [] and len(list(tmp_path.iterdir())) == 1, "and stays as it is"
    (tmp_path / "file").write_bytes(b"")
    status, out, error = command(capsys, run_folder, "--ratio", "2", "--out", tmp_path / "file" / "new" / "small")
    assert status == 2 and f"{tmp_path / 'file'} is not a folder" in error and error.count("\n") == 1 and out == ""


@pytest.mark.parametrize("name", ("spiece.model", "args.json"))
def test_what_writing_needs_is_read_before_the_work(run_folder, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(a, "search_budget", None)
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(b"damaged")
    status, out, error = command(capsys, tmp_path / "run", "--ratio", "2", "--out", tmp_path / "small")
    assert status == 2 and f"{name}: not " in error and error.count("\n") == 1 and out == "", error
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("change, word", (
    (lambda run: shutil.rmtree(run), "teacher"),
    (lambda run: shutil.rmtree(run / "teacher"), "teacher"),
    (lambda run: (run / "teacher" / "config.json").write_text("{}", encoding="utf-8"), "config.json"),
    (lambda run: (run / "bank.safetensors").unlink(), "bank.safetensors"),
    (lambda run: (run / "bank.safetensors").write_bytes(b"half"), "bank.safetensors"),
    (lambda run: mod.save_bank(mod.Bank(tiny(12, 12)), run / "bank.safetensors"), "bank.safetensors"),
    (lambda run: (run / "spiece.model").unlink(), "spiece.model")))
def test_bad_run_folder(run_folder, tmp_path, capsys, quick, monkeypatch, change, word):
    monkeypatch.setenv("MODULAR_T5_HUB", "http://127.0.0.1:9")  # should a name ever reach the network
    shutil.copytree(run_folder, tmp_path / "run")
    change(tmp_path / "run")
    status, _, error = command(capsys, tmp_path / "run", "--ratio", "2", "--out", tmp_path / "small")
    assert status == 2 and error.count("\n") == 1, f"a run that lacks something is one line and exit status 2: {error}"
    assert str(tmp_path / "run") in error and word in error, f"the line must name {word}: {error}"
    assert {path.name for path in tmp_path.iterdir()} <= {"run"}, "nothing is written"


def test_a_bug_keeps_its_traceback(run_folder, quick, monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")
    monkeypatch.setattr(a, "assemble", broken)
    with pytest.raises(RuntimeError):
        a.main([str(run_folder), "--ratio", "2"])


def test_random_paths_assemble(assembly):
    teacher, bank, _ = assembly
    rng = random.Random(0)
    for _ in range(20):
        paths = {stack: mod.sample_path(n, bank.spans[stack], 0.5, rng) for stack, n in zip(mod.STACKS, (4, 6))}
        model = a.assemble(teacher, bank, paths)
        assert [len(model.encoder.layers), len(model.decoder.layers)] == [len(paths[stack]) for stack in mod.STACKS], \
            "every path that training samples can be assembled"
