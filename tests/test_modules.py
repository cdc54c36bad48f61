"""
modules.py: spans and paths, the bank, how a path is drawn. About 4 s:

    python -m pytest tests/test_modules.py
"""

import itertools
import math
import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as m  # noqa: E402
import modules as mod  # noqa: E402

ONES = {n: [(i, i + 1) for i in range(n)] for n in (4, 6)}


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


def assert_tiles(path, n):
    """The spans of `path`, laid out in order, are exactly the layers 0 ... n-1."""
    layers = [layer for start, stop in path for layer in range(start, stop)]
    assert layers == list(range(n)), f"a path must run or replace each of {n} layers once and in order, not {layers}"


# ----------------------------------------------------------------------------- spans


@pytest.mark.parametrize("n, expected", (
    (1, []), (4, [2, 4]), (5, [5]), (6, [2, 3, 6]), (7, []), (8, [2, 4]), (12, [2, 3, 4, 6]), (24, [2, 3, 4, 6])))
def test_default_granularities_by_hand(n, expected):
    assert mod.default_granularities(n) == expected, f"the granularities from 2 to 6 that divide {n} are {expected}"


def test_module_spans_by_hand():
    """Each granularity g tiles the stack by itself: (0, g), (g, 2g), ... up to n, the stop not counted."""
    spans = mod.module_spans(6, [2, 3])
    assert spans == [(0, 2), (2, 4), (4, 6), (0, 3), (3, 6)], \
        "6 layers, granularities 2 and 3: spans of each start at multiples of its length, end where the next one " \
        f"starts, and the last one ends at 6: (0, 2), (2, 4), (4, 6), (0, 3), (3, 6), not {spans}"
    assert mod.module_spans(6, []) == [], "no granularity, no module"
    assert mod.module_spans(6, [6]) == [(0, 6)], "one module may stand for the whole stack"


@pytest.mark.parametrize("n", (4, 6, 7, 12, 24))
def test_each_granularity_tiles(n):
    for g in mod.default_granularities(n) + ([n] if n > 1 else []):
        spans = mod.module_spans(n, [g])
        assert_tiles(spans, n)
        assert {stop - start for start, stop in spans} == {g}, f"granularity {g} means spans of {g} layers"


@pytest.mark.parametrize("n, g", ((6, 4), (6, 5), (6, 12), (6, 1), (6, 0), (6, -2), (7, 2)))
def test_granularity_that_does_not_tile(n, g):
    message, possible = "no error", {6: "[2, 3, 6]", 7: "[7]"}[n]
    try:
        mod.module_spans(n, [g])
    except ValueError as error:
        message = str(error)
    assert f"granularity {g} " in message and possible in message, \
        f"spans of {g} do not tile {n} layers: a ValueError names granularity {g} and lists {possible}, not: {message}"


def test_path_of_by_hand():
    assert mod.path_of([2, 1, 3]) == [(0, 2), (2, 3), (3, 6)], "each span starts where the one before it stops"


@pytest.mark.parametrize("path", (ONES[6], [(0, 2), (2, 4), (4, 6)], [(0, 3), (3, 4), (4, 6)], [(0, 1), (1, 2), (2, 4),
                                  (4, 5), (5, 6)]))
def test_check_path_takes_what_tiles(path):
    mod.check_path(path, 6, mod.module_spans(6, [2, 3]))


@pytest.mark.parametrize("path, word", (
    ([], "covers 0 of 6"),
    ([(0, 2), (2, 4)], "covers 4 of 6"),                            # stops early
    ([(0, 3), (3, 6), (6, 7)], "covers 7 of 6"),                    # goes on too long
    ([(0, 2), (3, 6)], "starts at layer 2"),                        # a hole
    ([(0, 3), (2, 4), (4, 6)], "starts at layer 3"),                # layer 2 twice
    ([(2, 4), (0, 2), (4, 6)], "starts at layer 0"),                # not in order
    ([(0, 0), (0, 3), (3, 6)], "starts at layer 0"),                # a span of nothing
    ([(0, 3), (3, 2), (2, 4), (4, 6)], "starts at layer 3"),        # backwards
    ([(0, 1), (1, 3), (3, 6)], "no module was trained for layers 1-2"),
    ([(0, 6)], "no module was trained for layers 0-5")))
def test_check_path_refuses(path, word):
    with pytest.raises(ValueError) as caught:
        mod.check_path(path, 6, mod.module_spans(6, [2, 3]))
    assert word in str(caught.value), f"the message must say what is wrong with {path}: {word}, not: {caught.value}"


# ----------------------------------------------------------------------------- drawing a path


@pytest.mark.parametrize("n", (1, 2, 4, 5, 6, 7, 8, 12, 24))
@pytest.mark.parametrize("rate", (0.0, 0.3, 0.7, 1.0))
def test_every_sampled_path_tiles(n, rate):
    divisors, rng = [g for g in range(2, n + 1) if n % g == 0], random.Random(n)
    for granularities in itertools.chain.from_iterable(itertools.combinations(divisors, k) for k in range(4)):
        spans = mod.module_spans(n, granularities)
        for _ in range(20):
            path = mod.sample_path(n, spans, rate, rng)
            assert_tiles(path, n)
            mod.check_path(path, n, spans)
            longer = [stop - start > 1 for start, stop in path]
            if rate == 0.0 or not spans:
                assert not any(longer), "at rate 0 the teacher's layers run alone"
            if rate == 1.0 and spans:
                assert all(longer), f"at rate 1 modules run alone, but a teacher's layer is on {path}"


@pytest.mark.parametrize("n, granularities", ((12, [2, 3, 4, 6]), (6, [2, 3]), (8, [2])))
@pytest.mark.parametrize("rate", (0.25, 0.5, 0.8))
def test_each_position_takes_modules_at_the_rate(n, granularities, rate):
    spans, rng = mod.module_spans(n, granularities), random.Random(1)
    seen, took, chosen = [0] * n, [0] * n, {}
    for _ in range(3000):
        for start, stop in mod.sample_path(n, spans, rate, rng):
            seen[start] += 1
            took[start] += stop - start > 1
            if stop - start > 1:
                chosen[start, stop] = chosen.get((start, stop), 0) + 1
    for start in range(n):
        here = [span for span in spans if span[0] == start]
        expected, sigma = seen[start] * rate, math.sqrt(seen[start] * rate * (1 - rate))
        if not here:
            assert took[start] == 0, f"no module starts at layer {start}"
            continue
        assert abs(took[start] - expected) < 5 * sigma, \
            f"rate {rate}: layer {start} of {n} took a module {took[start]} of {seen[start]} times, not {expected:.0f}"
        for span in here:
            p = 1 / len(here)
            sigma = math.sqrt(took[start] * p * (1 - p))
            assert abs(chosen.get(span, 0) - took[start] * p) <= 5 * sigma, \
                f"at layer {start} all modules have the same chance, but {span} was taken {chosen.get(span)} times"


def test_by_granularity():
    assert mod.by_granularity(mod.module_spans(6, [3, 2])) == {2: [(0, 2), (2, 4), (4, 6)], 3: [(0, 3), (3, 6)]}, \
        "the spans of a stack, apart by their length, the shortest first"
    assert list(mod.by_granularity([(0, 6), (0, 3), (3, 6)])) == [3, 6], "in ascending order"
    assert mod.by_granularity([]) == {}, "a stack without modules has no granularity"


@pytest.mark.parametrize("rate", (0.3, 0.5))
def test_positions_are_drawn_independently(rate):
    spans, rng, M = mod.module_spans(12, [2]), random.Random(2), 6000
    rows = []
    for _ in range(M):  # with one granularity of 2 every even layer is a position of every path
        path = set(mod.sample_path(12, spans, rate, rng))
        rows.append([float(span in path) for span in spans])
    z = (torch.tensor(rows) - rate) / math.sqrt(rate * (1 - rate))
    correlation = z.T @ z / M - torch.eye(6)
    correlation.fill_diagonal_(0.0)
    worst = correlation.abs().max().item()
    assert worst < 5 / math.sqrt(M), f"one draw a position: two positions of a path must not correlate ({worst:.2f})"
    both = sum(all(row) for row in rows)
    sigma = math.sqrt(M * rate ** 6 * (1 - rate ** 6))
    assert abs(both - M * rate ** 6) < 5 * sigma, "all six positions take their module with probability rate^6"


def test_a_path_follows_from_its_random_state():
    spans = mod.module_spans(12, [2, 3, 4, 6])
    draw = [[mod.sample_path(12, spans, 0.5, random.Random(seed)) for seed in range(20)] for _ in range(2)]
    assert draw[0] == draw[1], "the same random state must give the same path"
    assert len({tuple(path) for path in draw[0]}) > 10, "another state gives other paths"


@pytest.mark.parametrize("chances, sizes", (
    ({1: 1 / 8, 2: 1 / 4, 3: 3 / 8, 4: 1 / 2, 6: 3 / 4}, {2}), ({1: 1 / 6, 2: 1 / 3, 3: 1 / 2, 6: 1.0}, {2}),
    ({1: 2 / 3, 2: 1.0}, {1, 2}), ({1: 1.0}, {1})))
def test_systematic_sample_draws_each_with_its_chance(chances, sizes):
    draws = [mod.systematic_sample(chances, random.Random(seed)) for seed in range(2000)]
    assert {len(drawn) for drawn in draws} == sizes, "as many as the chances sum to, rounded up or down"
    assert all(len(set(drawn)) == len(drawn) for drawn in draws), "each at most once"
    for item, p in chances.items():
        share = sum(item in drawn for drawn in draws) / len(draws)
        assert abs(share - p) <= 5 * (p * (1 - p) / len(draws)) ** 0.5, f"{item} has chance {p:.2f}, not {share:.2f}"


@pytest.mark.parametrize("path, share", (
    ([(0, 2), (2, 3), (3, 6)], 2 / 3),                             # a choice at 0, 2 and 3; modules at 0 and 3
    ([(0, 1), (1, 2), (2, 4), (4, 5), (5, 6)], 1 / 3),             # no choice at 1 and 5; of 0, 2 and 4 only 2
    ([(0, 3), (3, 6)], 1.0), (ONES[6], 0.0)))
def test_realised_rate_by_hand(path, share):
    spans = mod.module_spans(6, [2, 3])
    assert mod.realised_rate(path, spans) == pytest.approx(share), \
        f"of the positions of {path} at which modules start, {share:.2f} took one"


def test_realised_rate_of_a_stack_without_modules():
    assert mod.realised_rate(ONES[4], []) == 0.0, "where there are no modules none is taken: 0, not 0 / 0"


@pytest.mark.parametrize("step, start, rise, rate", (
    (0, 0.5, 0.6, 0.5), (30, 0.5, 0.6, 0.75), (60, 0.5, 0.6, 1.0), (99, 0.5, 0.6, 1.0),  # of 100 steps
    (0, 0.2, 1.0, 0.2), (25, 0.2, 1.0, 0.4), (99, 0.2, 1.0, 0.992),
    (0, 1.0, 0.6, 1.0), (50, 1.0, 0.6, 1.0), (0, 0.5, 0.0, 1.0),                         # constant 1
    (0, 0.3, math.inf, 0.3), (99, 0.3, math.inf, 0.3), (99, 0.0, math.inf, 0.0)))        # constant
def test_replacement_rate_by_hand(step, start, rise, rate):
    assert mod.replacement_rate(step, 100, start, rise) == pytest.approx(rate), \
        f"linear from {start} to 1 over the first {rise:.0%} of 100 steps: {rate} at step {step}"


def test_replacement_rate_by_default():
    rates = [mod.replacement_rate(step, 30) for step in range(30)]
    assert rates == pytest.approx([0.5 + step / 6 for step in range(3)] + [1.0] * 27), \
        "by default the rate rises from 0.5 to 1 over 10 % of the steps"


# ----------------------------------------------------------------------------- the bank


@pytest.mark.parametrize("init", ("copy", "average"))
def test_init_by_hand(init):
    teacher = tiny()
    with torch.no_grad():
        for stack in (teacher.encoder, teacher.decoder):
            for i, layer in enumerate(stack.layers):
                for weight in layer.parameters():
                    weight.fill_(i + 1)  # layer 2 is full of threes
    bank = mod.Bank(teacher, {"encoder": [2], "decoder": [2, 3]}, init)
    assert not set(map(id, teacher.parameters())) & set(map(id, bank.parameters())), \
        "a module starts as a copy: it must not share a tensor with the teacher, which would be trained with it"
    expected = {"copy": {("encoder", 0, 2): 1, ("encoder", 2, 4): 4, ("decoder", 4, 6): 6, ("decoder", 3, 6): 6},
                "average": {("encoder", 0, 2): 1.5, ("encoder", 2, 4): 3.5, ("decoder", 4, 6): 5.5,
                            ("decoder", 3, 6): 5}}[init]
    for (stack, start, stop), value in expected.items():
        for name, weight in getattr(bank, stack)[f"{start}-{stop}"].named_parameters():
            assert (weight == value).all(), \
                f"init {init}: layer i is full of i + 1, so {name} of the module for layers {start} to {stop - 1} is " \
                f"{value}, {'the mean of the span' if init == 'average' else 'a copy, evenly spaced'}, not " \
                f"{weight.max()}"


@pytest.mark.parametrize("init", ("copy", "average"))
def test_init_of_random_weights(init):
    teacher = tiny()
    bank = mod.Bank(teacher, {"encoder": [2], "decoder": [3]}, init)
    for stack, start, stop in (("encoder", 2, 4), ("decoder", 3, 6)):
        layers = [dict(layer.named_parameters()) for layer in getattr(teacher, stack).layers[start:stop]]
        for name, weight in getattr(bank, stack)[f"{start}-{stop}"].named_parameters():
            mean = sum(layer[name] for layer in layers) / len(layers)
            assert torch.allclose(weight, layers[-1][name] if init == "copy" else mean, atol=1e-6), \
                f"init {init}: {name} of {stack} {start}-{stop} must come from the layers of its own span"


def test_unknown_init():
    with pytest.raises(ValueError, match="'last'"):
        mod.Bank(tiny(), init="last")


def test_default_granularities_of_each_stack():
    bank = mod.Bank(tiny(4, 6))
    assert bank.spans == {"encoder": mod.module_spans(4, [2, 4]), "decoder": mod.module_spans(6, [2, 3, 6])}, \
        "by default each stack has every granularity from 2 to 6 that divides its own depth"
    assert mod.Bank(tiny(4, 6), {"encoder": [], "decoder": [6]}).spans == {"encoder": [], "decoder": [(0, 6)]}, \
        "a stack has the granularities asked for, and may have none"


def test_modules_are_layers_of_their_stack_and_copies():
    teacher = tiny().requires_grad_(False)
    before = {name: weight.clone() for name, weight in teacher.named_parameters()}
    bank = mod.Bank(teacher)
    assert all(type(module) is m.EncoderLayer for module in bank.encoder.values()), "encoder modules are encoder layers"
    assert all(type(module) is m.DecoderLayer for module in bank.decoder.values()), "decoder modules are decoder layers"
    assert all(weight.requires_grad for weight in bank.parameters()), "modules train, even when the teacher is frozen"
    assert not any(weight.requires_grad for weight in teacher.parameters()), "the bank must not thaw the teacher"
    with torch.no_grad():
        for i, weight in enumerate(bank.parameters()):
            weight.fill_(i)
    assert all((weight == i).all() for i, weight in enumerate(bank.parameters())), "two modules share a tensor"
    for name, weight in teacher.named_parameters():
        assert torch.equal(weight, before[name]), f"changing a module changed the teacher's {name}"


@torch.no_grad()
@pytest.mark.parametrize("tied", (True, False))
def test_with_layers_copies_them_and_all_else(tied):
    """A T5 of these layers, and of the teacher's embedding, head, position tables and final norms, all copied."""
    teacher = tiny(tie_word_embeddings=tied)
    layers = {"encoder": [teacher.encoder.layers[i] for i in (1, 3)],
              "decoder": [teacher.decoder.layers[i] for i in (2, 0, 5)]}
    before = {name: weight.clone() for name, weight in teacher.named_parameters()}
    model = mod.with_layers(teacher, layers)
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 3), "the config tells the new depths"
    assert (teacher.config.num_layers, teacher.config.num_decoder_layers) == (4, 6), "the teacher's config stays"
    for stack in mod.STACKS:
        own, theirs = getattr(model, stack), getattr(teacher, stack)
        for i, (layer, source) in enumerate(zip(own.layers, layers[stack], strict=True)):
            for a, b in zip(layer.parameters(), source.parameters(), strict=True):
                assert torch.equal(a, b), f"layer {i} of the {stack} must be a copy of layer {i} of the list"
        assert torch.equal(own.positions.weight, theirs.positions.weight), \
            f"the {stack}'s position table must be the teacher's, also without its layer 0: the stack owns it"
        assert torch.equal(own.norm.weight, theirs.norm.weight), f"the {stack}'s final norm must be the teacher's"
    assert torch.equal(model.embedding.weight, teacher.embedding.weight), "the embedding is the teacher's"
    assert torch.equal(model.head.weight, teacher.head.weight), "the head is the teacher's"
    assert (model.head is model.embedding) is tied, \
        "a tied head and the embedding stay one tensor: copied one by one they are two, which drift apart in training"
    for weight in model.parameters():
        weight.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.named_parameters()), \
        "training the new model must not change the teacher: nothing is shared"


def test_layers_are_those_the_path_names():
    teacher = tiny()
    bank = mod.Bank(teacher)
    layers = bank.layers(teacher, {"encoder": [], "decoder": [(0, 2), (2, 3), (3, 6)]})["decoder"]
    expected = [bank.decoder["0-2"], teacher.decoder.layers[2], bank.decoder["3-6"]]
    assert len(layers) == 3 and all(a is b for a, b in zip(layers, expected)), \
        "a span of one layer is the teacher's own, a longer one its module, in the path's order and the stack asked for"


@torch.no_grad()
@pytest.mark.parametrize("encoder, decoder", ((4, 6), (6, 6), (6, 4)))
def test_rate_0_is_the_teacher_bitwise(encoder, decoder):
    teacher, rng = tiny(encoder, decoder), random.Random(0)
    bank = mod.Bank(teacher, init="average")
    x = torch.randint(2, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    x[1, 4:] = 0
    mask, logits = x != 0, {}
    for rate in (0.0, 1.0):
        paths = {stack: mod.sample_path(teacher.depths[stack], bank.spans[stack], rate, rng) for stack in mod.STACKS}
        layers = bank.layers(teacher, paths)
        for stack in mod.STACKS:
            modules = set(getattr(bank, stack).values())
            assert {layer in modules for layer in layers[stack]} == {rate == 1.0}, \
                f"at rate {rate} {'only modules' if rate else 'no module'} may run"
        memory = bank.frame.encode(x, layers["encoder"]).hidden
        logits[rate] = bank.frame.logits(bank.frame.decode(x, memory, mask, layers["decoder"]).hidden)
    assert torch.equal(logits[0.0], teacher(x, x)), "rate 0 in the bank's frame must begin as the teacher"
    assert not torch.allclose(logits[1.0], logits[0.0], atol=1e-3), "modules must make a difference to say much"


# ----------------------------------------------------------------------------- the bank's file


@pytest.mark.parametrize("granularities", (None, {"encoder": [4], "decoder": [2, 3]}, {"encoder": [], "decoder": [6]}))
def test_round_trip(tmp_path, granularities):
    teacher = tiny()
    bank = mod.Bank(teacher, granularities, "average")
    with torch.no_grad():
        for weight in bank.parameters():
            weight.normal_()
    mod.save_bank(bank, tmp_path / "bank.safetensors")
    again = mod.load_bank(tmp_path / "bank.safetensors", teacher)
    assert {s: set(spans) for s, spans in again.spans.items()} == {s: set(spans) for s, spans in bank.spans.items()}, \
        "a bank comes back with the modules it was saved with"
    ours, theirs = bank.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), \
        "a bank comes back bit for bit"
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"], "nothing else is written"


def test_names_in_the_file(tmp_path):
    mod.save_bank(mod.Bank(tiny()), tmp_path / "bank.safetensors")
    names = set(m.read_safetensors(tmp_path / "bank.safetensors"))
    assert {"encoder.0-2.self_attention.q.weight", "decoder.3-6.cross_norm.weight"} <= names, \
        "a tensor is named after its stack, its span and its place in the layer"


def refused(path, teacher, *words):
    with pytest.raises(ValueError) as caught:
        mod.load_bank(path, teacher)
    for word in (str(path), *words):
        assert word in str(caught.value), f"the message must name the file and what is wrong, {word}: {caught.value}"
    assert "\n" not in str(caught.value), "one line"


@pytest.fixture
def file(tmp_path):
    mod.save_bank(mod.Bank(tiny()), tmp_path / "bank.safetensors")
    return tmp_path / "bank.safetensors"


def change(path, function):
    """Rewrite the file after function(weights), which changes the dictionary."""
    weights = m.read_safetensors(path)
    function(weights)
    m.write_safetensors(weights, path)


NAME = "decoder.2-4.cross_attention.k.weight"


def test_missing_tensor(file):
    change(file, lambda weights: weights.pop(NAME))
    refused(file, tiny(), NAME, "missing")


def test_missing_module(file):
    def function(weights):
        for name in [name for name in weights if name.startswith("encoder.2-4.")]:
            del weights[name]
    change(file, function)
    refused(file, tiny(), "encoder.2-4.")


@pytest.mark.parametrize("cut", (lambda t: t[:-1], lambda t: t.flatten(), lambda t: t[:1, :1]))
def test_wrong_shape(file, cut):
    change(file, lambda weights: weights.update({NAME: cut(weights[NAME]).clone()}))
    refused(file, tiny(), NAME)


@pytest.mark.parametrize("name", ("encoder.0-2.extra.weight", "encoder.1-3.self_norm.weight",
                                  "decoder.6-8.self_norm.weight"))
def test_unexpected_tensor(file, name):
    change(file, lambda weights: weights.update({name: torch.zeros(16)}))
    refused(file, tiny(), name)


@pytest.mark.parametrize("name", ("encoder.0-3.self_norm.weight", "encoder.2-2.self_norm.weight"))
def test_impossible_span(file, name):
    change(file, lambda weights: weights.update({name: torch.zeros(16)}))
    refused(file, tiny(), "granularity")


@pytest.mark.parametrize("encoder, decoder, options", ((2, 6, {}), (4, 4, {}), (6, 6, {}), (4, 12, {}),
                                                       (4, 6, {"d_model": 8}), (4, 6, {"d_ff": 64})))
def test_bank_of_another_teacher(file, encoder, decoder, options):
    refused(file, tiny(encoder, decoder, **options))


def test_file_that_is_no_bank(file, tmp_path):
    m.save_t5(tiny(), tmp_path / "t5")
    refused(tmp_path / "t5" / "model.safetensors", tiny(), "not a bank")
    m.write_safetensors({}, file)
    refused(file, tiny(), "not a bank")
    m.write_safetensors({"my.encoder.0-2.self_norm.weight": torch.zeros(16)}, file)
    refused(file, tiny(), "not a bank")


@pytest.mark.parametrize("spoil", (lambda x: torch.cat([torch.tensor([math.nan]), x[1:]]),
                                   lambda x: torch.cat([torch.tensor([math.inf]), x[1:]]), lambda x: x.to(torch.int8)))
def test_numbers_that_no_training_leaves(file, spoil):
    name = "decoder.0-3.feed_forward_norm.weight"
    change(file, lambda weights: weights.update({name: spoil(weights[name])}))
    refused(file, tiny(), f"tensor '{name}' does not hold finite numbers")


def test_an_endless_number_in_a_name(file):
    change(file, lambda weights: weights.update({f"encoder.0-{'9' * 5000}.self_norm.weight": torch.zeros(16)}))
    refused(file, tiny(), "not a bank")


@pytest.mark.parametrize("share", (0.0, 0.001, 0.5, 0.999))
def test_truncated_file(file, share):
    raw = file.read_bytes()
    file.write_bytes(raw[:int(share * len(raw))])
    refused(file, tiny(), "truncated")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        mod.load_bank(tmp_path / "none.safetensors", tiny())
