"""
distill.py: the losses against hand calculations, one training loop, what it moves and how it resumes. About 7 s:

    python -m pytest tests/test_distill.py
"""

import contextlib
import copy
import io
import itertools
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import distill as d  # noqa: E402
import model as m  # noqa: E402
import modules as mod  # noqa: E402

START = 3  # the decoder's first token; not pad, so that no test mixes them up
TERMS = ("ce", "logits", "hidden", "attention")


def tiny(encoder=4, decoder=6, seed=0, **options):
    """A random model in which every weight matters, norms and position tables included."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "num_heads": 3, "d_ff": 32, "num_layers": encoder,
             "num_decoder_layers": decoder, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
             "decoder_start_token_id": START, "scale_decoder_outputs": False}
    model = m.T5(m.T5Config(**sizes | options)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


def make_bank(teacher, granularities=None, seed=1):
    """A bank whose modules are unlike any of the teacher's layers."""
    bank = mod.Bank(teacher, granularities)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in bank.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return bank


def padded(rows):
    """[[id, ...], ...] -> (B, S), padded with 0."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


SOURCE, TARGET = padded([[5, 6, 7, 8, 1], [9, 1], [11, 12, 1]]), padded([[21, 1], [22, 23, 24, 1], [25, 26, 1]])


def toy_batches(n, seed=0):
    """n batches of sources of 3 to 6 tokens, the targets are the sources backwards."""
    generator, batches = torch.Generator().manual_seed(seed), []
    for _ in range(n):
        rows = [torch.randint(4, 40, (int(length),), generator=generator).tolist()
                for length in torch.randint(3, 7, (4,), generator=generator)]
        batches.append((padded([row + [1] for row in rows]), padded([row[::-1] + [1] for row in rows])))
    return batches


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def log_probs(row):
    """A list of logits -> a list of log probabilities, with the standard library alone."""
    total = math.log(sum(math.exp(x) for x in row))
    return [x - total for x in row]


# ----------------------------------------------------------------------------- the losses, by hand


def test_cross_entropy_by_hand():
    """L_ce = -1/N sum_n log p_student(y_n | y_<n, x)."""
    student = torch.tensor([[1 / 4, 3 / 4], [1 / 2, 1 / 2]]).log()
    expected = -(math.log(3 / 4) + math.log(1 / 2)) / 2
    assert d.cross_entropy(student, torch.tensor([1, 0])).item() == pytest.approx(expected, abs=1e-6), \
        "the mean over tokens of -log p(token): here -(log 3/4 + log 1/2) / 2"


def test_logit_distillation_by_hand():
    """L_kd = 1/N sum_n KL(p_teacher || p_student)."""
    teacher = torch.tensor([[1 / 4, 3 / 4], [1 / 2, 1 / 2]]).log()
    student = torch.tensor([[1 / 2, 1 / 2], [1 / 2, 1 / 2]]).log()
    expected = (0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)) / 2  # the second token agrees
    assert d.logit_distillation(student, teacher).item() == pytest.approx(expected, abs=1e-6), \
        "the mean over tokens of sum_v p_teacher log(p_teacher / p_student): the teacher's p stands before the log"
    twice = d.logit_distillation(student.repeat(2, 1), teacher.repeat(2, 1)).item()
    assert twice == pytest.approx(expected, abs=1e-6), "a mean over tokens does not grow with their number"


def test_hidden_distillation_by_hand():
    """L_hid = sum_n |s_n - t_n|^2 / sum_n |t_n|^2 over the real tokens."""
    teacher = torch.tensor([[[3.0, 4.0], [0.0, 5.0]], [[6.0, 8.0], [999.0, 999.0]]])
    student = torch.tensor([[[3.0, 2.0], [3.0, 5.0]], [[6.0, 8.0], [-77.0, 55.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    expected = ((4 + 9 + 0) / 3) / ((25 + 25 + 100) / 3)
    one, same, scaled = d.hidden_distillation(  # of three layers
        torch.stack([student, teacher, student * 10]), torch.stack([teacher, teacher, teacher * 10]), mask).tolist()
    assert one == pytest.approx(expected, rel=1e-6) and same == 0, \
        "mean squared error of the real tokens over the teacher's mean square: (4 + 9 + 0) / (25 + 25 + 100)"
    assert scaled == pytest.approx(expected, rel=1e-5), "a share of the teacher's own size does not depend on the scale"


def test_attention_distillation_by_hand():
    """L_att = 1/(N H) sum_n,h KL(a_teacher || a_student) over the keys."""
    teacher = torch.tensor([[[[[0.25, 0.75], [1.0, 0.0]], [[0.5, 0.5], [1.0, 0.0]]]]])  # 1 layer, 1 sentence, 2 heads,
    student = torch.tensor([[[[[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [1.0, 0.0]]]]])    # 2 queries, 2 keys
    zero = torch.tensor([[[[[1.0, 0.0]]]]])
    assert math.isfinite(d.attention_distillation(1 - zero, zero, torch.tensor([[True]])).item()), \
        "a probability of 0 in the student must not make the loss infinite"
    first = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    both = d.attention_distillation(student, teacher, torch.tensor([[True, True]])).item()
    assert both == pytest.approx((first + math.log(2)) / 4, abs=1e-6), \
        "the mean over 2 queries and 2 heads of KL(teacher || student); two of the four agree"
    masked = d.attention_distillation(student, teacher, torch.tensor([[True, False]])).item()
    assert masked == pytest.approx(first / 2, abs=1e-6), "a query that is padding must not count"
    two = d.attention_distillation(torch.cat([student, teacher]), torch.cat([teacher, teacher]),
                                   torch.tensor([[True, True]])).tolist()
    assert two == pytest.approx([both, 0.0], abs=1e-6), "each layer has a loss of its own"


def test_losses_are_computed_in_float32():
    torch.manual_seed(0)
    a, b = (torch.randn(1, 2, 3, 40).mul(5).bfloat16() for _ in range(2))
    mask = torch.ones(2, 3, dtype=torch.bool)
    ours, exact = d.hidden_distillation(a, b, mask), d.hidden_distillation(a.float(), b.float(), mask)
    assert ours.dtype is torch.float32 and torch.equal(ours, exact), "16-bit states are summed in float32"
    model = tiny().bfloat16()
    outputs = d.run_stacks(model, SOURCE, TARGET)
    logits = model.logits(outputs["decoder"].hidden[TARGET != 0])
    assert logits.dtype is torch.bfloat16 and torch.equal(outputs["log_probs"], logits.float().log_softmax(-1)), \
        "16-bit logits become probabilities in float32"
    teacher, paths = tiny(seed=3).bfloat16(), dict.fromkeys(mod.STACKS, [(0, 1)])
    theirs = d.run_stacks(teacher, SOURCE, TARGET)
    terms = d.losses(model, SOURCE, TARGET, {"ce": 1.0, "logits": 1.0}, theirs, paths=paths)
    ours, target = logits.float(), teacher.logits(theirs["decoder"].hidden[TARGET != 0]).float().softmax(-1)
    kl = F.cross_entropy(ours, target) - torch.special.entr(target).sum(-1).mean()
    for term, exact in (("ce", F.cross_entropy(ours, TARGET[TARGET != 0])), ("logits", kl)):
        assert terms[term].dtype is torch.float32, f"{term} is summed in float32"
        assert terms[term].item() == pytest.approx(exact.item(), rel=1e-4), f"{term} is that of the logits in float32"


def test_shift_right_by_hand():
    config = m.T5Config(decoder_start_token_id=START)
    shifted = d.shift_right(torch.tensor([[7, 8, 1], [9, 1, 0]]), config)
    assert shifted.tolist() == [[START, 7, 8], [START, 9, 1]], \
        "position t of the decoder reads target t - 1, and the start token at first"


# ----------------------------------------------------------------------------- a batch's loss


@torch.no_grad()
def run_by_hand(model, layers, source, target):
    """One sentence without padding, layer by layer. Returns the states and attention probabilities after each layer of
    both stacks, and the logits (T, vocab)."""
    states, probs = {"encoder": [], "decoder": []}, {"encoder": [], "decoder": []}
    x, bias = model.embedding(source)[None], model.encoder.position_bias(len(source))
    for layer in layers["encoder"]:
        x, p = layer(x, bias, need_probs=True)
        states["encoder"].append(x[0])
        probs["encoder"].append(p)
    memory, everything = model.encoder.norm(x), torch.zeros(1, 1, 1, len(source))
    inputs = torch.tensor([START, *target[:-1].tolist()])
    x, bias = model.embedding(inputs)[None], model.decoder.position_bias(len(inputs))
    for layer in layers["decoder"]:
        x, p = layer(x, bias, memory, everything, need_probs=True)
        states["decoder"].append(x[0])
        probs["decoder"].append(p)
    return states, probs, model.logits(model.decoder.norm(x))[0]


def losses_by_hand(student, teacher, layers, own, compared):
    """All terms, sentence by sentence, number by number. compared: {stack: [(layer of the student, of the teacher)]}"""
    ce, kl = [], []
    pairs = {(stack, i, j): {"error": [], "size": [], "attention": {}}
             for stack in compared for i, j in compared[stack]}
    for source, target in zip(SOURCE, TARGET):
        source, target = source[source != 0], target[target != 0]
        states, probs, logits = run_by_hand(student, layers, source, target)
        their_states, their_probs, their_logits = run_by_hand(teacher, own, source, target)
        for t, token in enumerate(target.tolist()):
            p, q = log_probs(their_logits[t].tolist()), log_probs(logits[t].tolist())
            ce.append(-q[token])
            kl.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q)))
        for (stack, i, j), sums in pairs.items():
            s, t = states[stack][i], their_states[stack][j]
            sums["error"] += [(a - b).square().sum().item() for a, b in zip(s, t)]
            sums["size"] += [b.square().sum().item() for b in t]
            for kind, (a, b) in enumerate(zip(probs[stack][i], their_probs[stack][j])):  # self, cross
                visible = b > 0  # a later position has probability 0
                term = torch.where(visible, b * (b / a).log(), 0.0).sum(-1)  # (1, H, T)
                sums["attention"].setdefault(kind, []).extend(term.flatten().tolist())
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {"ce": mean(ce), "logits": mean(kl),
            "hidden": mean([mean(sums["error"]) / mean(sums["size"]) for sums in pairs.values()]),
            "attention": mean([mean(terms) for sums in pairs.values() for terms in sums["attention"].values()])}


RULES = {"ce": "-log p(target), the mean over real tokens, without padding; the decoder reads targets shifted right",
         "logits": "KL(teacher || student) over real target tokens; the teacher's decoder reads the teacher's memory",
         "hidden": "each module (or student's layer) against the teacher after the last layer of its span, both stacks",
         "attention": "each module (or student's layer) against the last layer of its span: self- and cross-attention"}


def assert_close(terms, expected, what):
    assert set(terms) == set(expected), f"{what}: the terms are {sorted(expected)}, not {sorted(terms)}"
    for name, value in expected.items():
        value = value.item() if isinstance(value, torch.Tensor) else value
        assert terms[name].item() == pytest.approx(value, rel=2e-4, abs=1e-6), \
            f"{what}: {name} must be {value:.6f}, not {terms[name].item():.6f}: {RULES[name]}"


def own_layers(model):
    return {stack: list(getattr(model, stack).layers) for stack in mod.STACKS}


def states_of(teacher, source=SOURCE, target=TARGET):
    return d.run_teacher(teacher, source, target, d.WEIGHTS)


PATHS = {"encoder": [(0, 1), (1, 2), (2, 4)], "decoder": [(0, 2), (2, 3), (3, 6)]}


def test_losses_of_modules_by_hand():
    """Both models run freely; a module is held against the teacher after the last layer of its span."""
    teacher = tiny()
    bank = make_bank(teacher)
    layers = bank.layers(teacher, PATHS)
    with torch.no_grad():
        for weight in bank.frame.parameters():
            weight.mul_(1.1)  # it is not the teacher's
    terms = d.losses(bank.frame, SOURCE, TARGET, d.WEIGHTS, states_of(teacher), layers, PATHS)
    # Each layer of a path is held against the teacher's last layer of its span: modules, and the teacher's own layers,
    # whose input is another than in the teacher.
    compared = {"encoder": [(0, 0), (1, 1), (2, 3)], "decoder": [(0, 1), (1, 2), (2, 5)]}
    assert_close(terms, losses_by_hand(bank.frame, teacher, layers, own_layers(teacher), compared), "modules")
    assert all(terms[name].requires_grad for name in TERMS), "every term must train the modules"


def test_losses_of_a_student_by_hand():
    teacher, student = tiny(), tiny(2, 3, seed=5)
    paths = {"encoder": [(0, 1), (1, 4)], "decoder": [(0, 1), (1, 4), (4, 6)]}
    terms = d.losses(student, SOURCE, TARGET, d.WEIGHTS, states_of(teacher), paths=paths)
    # Every layer of a static student can learn, so those that stand for one layer count, too.
    compared = {"encoder": [(0, 0), (1, 3)], "decoder": [(0, 0), (1, 3), (2, 5)]}
    expected = losses_by_hand(student, teacher, own_layers(student), own_layers(teacher), compared)
    assert_close(terms, expected, "student")
    without = {name: 1.0 for name in ("ce", "logits", "hidden")}
    terms = d.losses(student, SOURCE, TARGET, without, d.run_teacher(teacher, SOURCE, TARGET, without), paths=paths)
    assert_close(terms, {name: expected[name] for name in without}, "without attention")
    alone = d.losses(student, SOURCE, TARGET, d.CE_ONLY)
    assert_close(alone, {"ce": expected["ce"]}, "without a teacher")


@pytest.mark.parametrize("names", (("ce",), ("ce", "logits"), ("hidden",), ("ce", "attention"), TERMS))
def test_only_terms_with_a_weight(names):
    teacher, student = tiny(), tiny(2, 3, seed=5)
    paths = {"encoder": d.spread(4, 2), "decoder": d.spread(6, 3)}
    weights = dict.fromkeys(names, 1.0)
    terms = d.losses(student, SOURCE, TARGET, weights, d.run_teacher(teacher, SOURCE, TARGET, weights), paths=paths)
    assert set(terms) == set(names), f"weights name the terms of the loss: {names}, not {sorted(terms)}"


@pytest.mark.parametrize("kind", ("modules", "student"))
def test_padding_changes_nothing(kind):
    teacher = tiny()
    student, layers, paths = teacher, None, PATHS
    if kind == "modules":
        bank = make_bank(teacher)
        layers = bank.layers(teacher, PATHS)
    else:
        student = tiny(3, 3, seed=5)
    plain = d.losses(student, SOURCE, TARGET, d.WEIGHTS, states_of(teacher), layers, paths)
    for source, target in ((F.pad(SOURCE, (0, 6)), TARGET), (SOURCE, F.pad(TARGET, (0, 5))),
                           (F.pad(SOURCE, (0, 1)), F.pad(TARGET, (0, 9)))):
        more = d.losses(student, source, target, d.WEIGHTS, states_of(teacher, source, target), layers, paths)
        for name in TERMS:
            assert more[name].item() == pytest.approx(plain[name].item(), rel=1e-5), \
                f"{name} must not change when padding is appended to source or target"


@pytest.mark.parametrize("names", (TERMS, ("ce", "logits", "hidden")))
def test_a_student_identical_to_the_teacher_has_no_distillation_loss(names):
    teacher = tiny(dropout_rate=0.1)
    student = d.shrink(teacher, 4, 6)
    paths = {"encoder": d.spread(4, 4), "decoder": d.spread(6, 6)}
    weights = dict.fromkeys(names, 1.0)
    theirs = d.run_teacher(teacher, SOURCE, TARGET, weights)
    terms = d.losses(student, SOURCE, TARGET, weights, theirs, paths=paths)
    for name in names[1:]:
        assert abs(terms[name].item()) < 1e-6, f"{name} of a student that is the teacher must be 0"
    assert terms["ce"].item() > 0.1, "its cross-entropy is the teacher's own, not 0"
    other = d.losses(tiny(seed=9), SOURCE, TARGET, weights, theirs, paths=paths)
    assert all(other[name].item() > 1e-3 for name in names), "another model must have a loss, or 0 says nothing"


def test_validation_loss_is_the_mean_over_all_tokens():
    model = tiny()
    batches = [(SOURCE[:2], TARGET[:2]), (SOURCE[2:], TARGET[2:])]  # of unlike numbers of tokens
    counts = [(target != 0).sum().item() for _, target in batches]
    terms = [d.losses(model, *batch, d.CE_ONLY)["ce"].item() for batch in batches]
    expected = sum(n * ce for n, ce in zip(counts, terms)) / sum(counts)
    assert counts[0] != counts[1] and d.validation_loss(model, batches) == pytest.approx(expected, rel=1e-6)
    assert d.validation_loss(model, batches) == pytest.approx(
        d.losses(model, SOURCE, TARGET, d.CE_ONLY)["ce"].item(), rel=1e-4), "however the pairs are put into batches"


def test_no_gradient_reaches_the_teacher_through_its_targets():
    teacher, student = tiny(), tiny(2, 3, seed=5)
    paths = {"encoder": d.spread(4, 2), "decoder": d.spread(6, 3)}
    sum(d.losses(student, SOURCE, TARGET, d.WEIGHTS, states_of(teacher), paths=paths).values()).backward()
    assert all(weight.grad is None for weight in teacher.parameters()), "the teacher's outputs are constants"
    assert all(weight.grad is not None for weight in student.parameters()), "all of a static student trains"


# ----------------------------------------------------------------------------- one training step of the bank


def record_paths(monkeypatch):
    """A list that gets every path `train_modules` samples, encoder and decoder in turn."""
    paths = []

    def sample(*args):
        paths.append(mod.sample_path(*args))
        return paths[-1]
    monkeypatch.setattr(d, "sample_path", sample)
    return paths


def test_gradients_reach_the_bank_and_nothing_else(monkeypatch):
    """Draw a path for each stack, run it, move the modules on it. The teacher is frozen, gradients go through it."""
    teacher = tiny(dropout_rate=0.1)
    bank, paths, grads = make_bank(teacher), record_paths(monkeypatch), {}
    before, start = copy_of(teacher), copy_of(bank)
    for name, weight in bank.named_parameters():
        weight.register_hook(lambda grad, name=name: grads.update({name: grad.abs().max().item()}))
    d.train_modules(teacher, bank, toy_batches(2), 2, lr=1e-2, seed=3, rate_start=0.4, rate_rise=math.inf)
    assert same(copy_of(teacher), before), "training modules must leave the teacher as it was, bit for bit"
    assert all(weight.grad is None and not weight.requires_grad for weight in teacher.parameters()), \
        "no gradient is kept for the teacher"
    used = {f"{stack}.{a}-{b}."
            for path, stack in zip(paths, itertools.cycle(mod.STACKS)) for a, b in path if b - a > 1}
    assert 1 < len(used) < sum(map(len, bank.spans.values())), "the test needs modules on the paths and off them"
    for name, weight in bank.named_parameters():
        if name.startswith(("frame.", *used)):
            assert grads.get(name, 0.0) > 0.0, f"{name} is on a path and must get a gradient"
            assert not torch.equal(weight, start[name]), f"{name} is on a path and must move"
        else:
            assert name not in grads and torch.equal(weight, start[name]), f"{name} is on no path and must stay"


def test_some_rows_are_what_the_teacher_makes_of_these_rows_alone():
    """One forward pass of the teacher serves all paths, each of which runs some rows of the batch."""
    teacher, rows = tiny(), torch.tensor([0, 2])
    layers = {stack: len(getattr(teacher, stack).layers) for stack in mod.STACKS}
    every = {stack: [(i, i + 1) for i in range(n)] for stack, n in layers.items()}
    few = d.some_rows(states_of(teacher), rows, TARGET != 0, every)
    last = d.some_rows(states_of(teacher), rows, TARGET != 0, {stack: [(0, n)] for stack, n in layers.items()})
    for stack in mod.STACKS:
        *others, state = last[stack].states
        assert torch.equal(state, few[stack].states[-1]) and others == [None] * (layers[stack] - 1), \
            "of the layers in which no span ends, nothing is needed"
    alone = states_of(teacher, SOURCE[rows], TARGET[rows])
    for what, ours, theirs in (("log p", [few["log_probs"]], [alone["log_probs"]]), *(
            (f"{stack} {what}", *map(flat, (getattr(few[stack], what), getattr(alone[stack], what))))
            for stack in mod.STACKS for what in ("hidden", "states", "probs"))):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: {text}")


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [tensor for part in value for tensor in flat(part)]


def granularity(path):
    """Of a path drawn at rate 1."""
    lengths = {b - a for a, b in path}
    assert len(lengths) == 1, "at rate 1 a path is of one granularity"
    return lengths.pop()


def assert_encoders_in_proportion(drawn, granularities):
    """Those of all encoder paths, in the order drawn."""
    for g in granularities:
        p = g / sum(granularities)
        assert abs(drawn.count(g) / len(drawn) - p) <= 5 * math.sqrt(p * (1 - p) / len(drawn)), \
            f"every path draws anew: the encoder's granularity is drawn in proportion to it, {g} with chance {p:.2f}"


@pytest.mark.parametrize("granularities, weights", (
    ({"encoder": [2, 4], "decoder": [2, 3, 6]}, dict.fromkeys(TERMS, 1.0)),
    ({"encoder": [2, 4], "decoder": [2, 3, 6]}, d.CE_ONLY), ({"encoder": [], "decoder": [3]}, d.CE_ONLY),
    ({"encoder": [2], "decoder": []}, dict.fromkeys(TERMS, 1.0))))
@pytest.mark.parametrize("rows", (1, 12))
def test_each_granularity_has_its_rows_of_every_batch(monkeypatch, granularities, rows, weights):
    teacher, seen = tiny(), []
    bank = make_bank(teacher, granularities)
    ids = torch.arange(2, 2 + rows)[:, None].expand(rows, 3).clone()  # the row's number
    ids[1::2, 2] = 0  # rows of three tokens and of two

    def losses(student, source, target, names, theirs, layers, paths):
        assert torch.equal(source, target), "a row keeps its target"
        assert names is weights and (theirs is None) == (weights is d.CE_ONLY), "without distillation no teacher runs"
        if theirs is not None:
            alone = d.run_teacher(teacher, source, target, weights)
            for ours, wanted in ((theirs["log_probs"], alone["log_probs"]), *(
                    (theirs[stack].states[-1], alone[stack].states[-1]) for stack in mod.STACKS)):
                torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4,
                                           msg="the teacher's outputs must be those of the rows that the path runs")
        seen.append((sorted(source[:, 0].tolist()), *(granularity(paths[stack]) for stack in mod.STACKS)))
        return {"ce": torch.tensor(float(len(seen)), requires_grad=True)}
    monkeypatch.setattr(d, "losses", losses)
    records, steps = [], 12
    d.train_modules(teacher, bank, [(ids, ids)] * steps, steps, lr=1e-2, rate_start=1.0, weights=weights,
                    log=records.append)
    # 1, the teacher's own layers, for the frame's sake; without distillation only where there is no module
    encoder, decoder = ([1, *own] if weights is not d.CE_ONLY or not own else own for own in granularities.values())
    assert len(seen) == steps * len(decoder), "a path for each of the decoder's granularities in every step"
    for step in range(steps):
        mine = seen[step * len(decoder):(step + 1) * len(decoder)]
        assert sorted(g for *_, g in mine) == decoder, "every granularity of the decoder runs in every step"
        for own, _, g in mine:
            assert len(set(own)) == len(own) and set(own) <= set(ids[:, 0].tolist()), "no row is there twice"
            assert len(own) == min(rows, math.ceil(2 * rows * g / sum(decoder))), \
                f"granularity {g} of {decoder} has {2 * g} / {sum(decoder)} of {rows} rows, rounded up: not {len(own)}"
        of_step = range(step * len(decoder) + 1, (step + 1) * len(decoder) + 1)
        assert records[step]["ce"] == pytest.approx(sum(of_step) / len(decoder)), "the loss is the mean over the paths"
    if rows == 12:
        for g in decoder:
            drawn = [tuple(own) for own, _, length in seen if length == g]
            assert len(set(drawn)) > steps / 3 or len(drawn[0]) == rows, "every step draws the rows anew"
    assert_encoders_in_proportion([other for _, other, _ in seen], encoder)


@pytest.mark.parametrize("granularities", (
    {"encoder": [2, 4], "decoder": [2, 3, 6]}, {"encoder": [2], "decoder": [2]}, {"encoder": [2], "decoder": []}))
def test_of_two_paths_granularities_are_drawn_in_proportion(monkeypatch, granularities):
    teacher, seen, outputs, weights = tiny(), [], object(), dict.fromkeys(TERMS, 1.0)
    bank = make_bank(teacher, granularities)

    def losses(student, source, target, names, theirs, layers, paths):
        assert source.shape == target.shape == (4, 3), "a path runs the whole batch"
        assert names is weights and theirs is outputs, "one run of the teacher serves all paths of a step"
        seen.append((source[0, 0].item(), *(granularity(paths[stack]) for stack in mod.STACKS)))
        return {"ce": torch.tensor(float(len(seen)), requires_grad=True)}
    monkeypatch.setattr(d, "losses", losses)
    monkeypatch.setattr(d, "run_teacher", lambda *_: outputs)
    records, steps = [], 100
    d.train_modules(teacher, bank, [(torch.full((4, 3), step),) * 2 for step in range(steps)], steps, lr=1e-2,
                    rate_start=1.0, weights=weights, two_paths=True, log=records.append)
    encoder, decoder = ([1, *own] for own in granularities.values())  # 1, the teacher's own layers, for the frame
    chances = {g: min(1.0, 2 * g / sum(decoder)) for g in decoder}
    for step, record in enumerate(records):
        of_step = [i for i, (own, *_) in enumerate(seen) if own == step]
        assert len(of_step) == len({seen[i][2] for i in of_step}), "the paths of a step are of different granularities"
        assert abs(len(of_step) - sum(chances.values())) < 1 - 1e-9, f"two paths a step, or as many as {chances} sum to"
        assert record["ce"] == pytest.approx(sum(i + 1 for i in of_step) / len(of_step)), "the mean over the paths"
    _, theirs, ours = zip(*seen)
    for g, p in chances.items():
        assert abs(ours.count(g) / steps - p) <= 5 * math.sqrt(p * (1 - p) / steps), \
            f"the decoder's granularities are drawn in proportion: {g} in {p:.2f} of the steps"
    assert_encoders_in_proportion(theirs, encoder)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_theseus_may_draw_no_module_at_all(dtype):
    """Then there is nothing to train: the frame is frozen, too."""
    teacher, records = tiny(), []
    bank = make_bank(teacher, {"encoder": [2], "decoder": [2]})
    before = copy_of(bank)
    d.train_modules(teacher, bank, toy_batches(3), 3, lr=1e-2, weights=d.CE_ONLY, rate_start=0.0, rate_rise=math.inf,
                    dtype=dtype, log=records.append)
    assert same(copy_of(bank), before), "a step without a module moves nothing"
    assert len(records) == 3 and all(record["ce"] > 0 and record["grad_norm"] == 0 for record in records)


@pytest.mark.parametrize("weights", ({"hidden": 1.0}, {"logits": 2.0}))
def test_one_distillation_loss_alone_trains_modules(weights):
    teacher, records = tiny(), []
    bank = make_bank(teacher)
    before = copy_of(bank.frame)
    d.train_modules(teacher, bank, toy_batches(2), 2, lr=1e-2, weights=weights, log=records.append)
    assert set(weights) <= set(records[0]) and "ce" not in records[0], "the terms that have a weight"
    assert not same(copy_of(bank.frame), before), "under distillation the frame trains"


def test_a_student_with_a_teacher_is_distilled_by_default():
    records = []
    d.train_student(tiny(2, 2, seed=5), toy_batches(1), 1, tiny(), lr=1e-2, log=records.append)
    d.train_student(tiny(2, 2, seed=5), toy_batches(1), 1, lr=1e-2, log=records.append)
    assert set(TERMS) <= set(records[0]), "with a teacher: all four losses"
    assert "ce" in records[1] and "hidden" not in records[1], "without: cross-entropy"


def test_the_optimizer_sees_the_bank_and_clipped_gradients(monkeypatch):
    teacher, seen = tiny(), []
    bank, step = make_bank(teacher), torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        weights = [weight for group in self.param_groups for weight in group["params"]]
        norm = math.sqrt(sum(weight.grad.square().sum().item() for weight in weights if weight.grad is not None))
        seen.append((list(map(id, weights)), norm, [(group["lr"], group["size"]) for group in self.param_groups]))
        assert all(group["betas"] == (0.9, 0.98) and group["weight_decay"] == 0.01 for group in self.param_groups)
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    records = []
    d.train_modules(teacher, bank, toy_batches(20), 20, lr=1e-2, weights=dict.fromkeys(TERMS, 50.0),
                    log=records.append)
    assert [record["rate"] for record in records] == pytest.approx([0.5, 0.75] + [1.0] * 18), \
        "by default the replacement rate rises from 0.5 to 1 over 10 % of the steps"
    for i, ((ids, norm, rates), record) in enumerate(zip(seen, records, strict=True)):
        assert sorted(ids) == sorted(map(id, bank.parameters())), "the optimizer must see exactly the bank's parameters"
        assert record["grad_norm"] > 1.0 and norm == pytest.approx(1.0, abs=1e-3), "gradients are clipped to norm 1"
        assert record["lr"] == d.learning_rate(i, 20, 1e-2), "each step has the learning rate of its own place"
        assert all(rate == size * record["lr"] for rate, size in rates), "a tensor's rate is a share of its size"


@pytest.mark.parametrize("values, expected", (
    ([1.0, -1.0], 1.0), ([0.2, 0.3], 0.25), ([3.0, 4.0], 4.0), ([0.0, 0.0], 2.0 ** -10), ([1e-9], 2.0 ** -10)))
def test_size_is_the_rms_as_a_power_of_two(values, expected):
    assert d.size(torch.tensor(values)) == expected, f"{values}: the root mean square, at least 1e-3, as a power of two"


def test_one_learning_rate_moves_every_tensor_by_a_like_share():
    """What plain Adam does not do: one step of it moves an embedding of std 1 by a sixtieth of q's share."""
    torch.manual_seed(0)
    model = m.T5(m.T5Config(vocab_size=40, d_model=32, d_kv=32, num_heads=1, d_ff=64, num_layers=1,
                            num_decoder_layers=1, dropout_rate=0.0))
    start = copy_of(model)
    assert d.size(model.embedding.weight) >= 16 * d.size(model.encoder.layers[0].self_attention.q.weight), \
        "T5's initial sizes differ widely"
    d.train_student(model, [(SOURCE, TARGET)], 1, lr=0.1)
    for name, tensor in model.state_dict().items():
        share = (tensor - start[name]).abs().max() / start[name].square().mean().sqrt()
        assert 0.06 < share < 0.15, f"{name}: the first step of AdamW must be a tenth of its size, not {share:.3f}"


def test_modules_that_see_fewer_rows_take_smaller_steps():
    """A bank of granularities 2 and 3 beside the teacher's own layers, 1: shares of 2 / 6 and 3 / 6 of all rows run."""
    teacher = tiny(6, 6)
    bank = mod.Bank(teacher, dict.fromkeys(mod.STACKS, [2, 3]))
    start = copy_of(bank)
    d.train_modules(teacher, bank, [(SOURCE, TARGET)], 1, lr=0.01, passes=1.5, rate_start=1.0)
    taken = dict.fromkeys((2, 3, None))
    for name, tensor in bank.state_dict().items():
        if name.endswith("wo.weight") or name == "frame.embedding.weight":
            span = re.match(r".*coder\.(\d)-(\d)", name)
            step = (tensor - start[name]).abs().max().item() / d.size(start[name])
            g = int(span[2]) - int(span[1]) if span else None
            taken[g] = max(step, taken[g] or 0.0)
    for g, share in ((2, 1.5 * 2 / 6), (3, 1.5 * 3 / 6)):
        assert taken[g] == pytest.approx(0.01 * share ** 0.5, rel=0.05), \
            f"granularity {g} sees {share} of the rows: its first step is the root of that share of the rate"
    assert taken[None] == pytest.approx(0.01 * 0.25, rel=0.05), "the frame moves at a quarter of the rate"


def test_modules_beside_a_decoder_of_one_layer_have_its_rows_alone(monkeypatch):
    """Six encoder layers, granularities 1, 2, 3 and 6 drawn 1 to 2 to 3 to 6; one decoder layer: each row once."""
    teacher, found = tiny(6, 1), {}
    bank = mod.Bank(teacher)
    monkeypatch.setattr(d, "fit", lambda *_, lr_factors, **__: found.update(lr_factors))
    d.train_modules(teacher, bank, [(SOURCE, TARGET)], 1, lr=0.01, passes=2.0)
    for start, stop in bank.spans["encoder"]:
        wanted = ((stop - start) / 12) ** 0.5
        for parameter in bank.encoder[f"{start}-{stop}"].parameters():
            assert found[parameter] == pytest.approx(wanted), \
                f"no row runs twice: module {start}-{stop} sees {stop - start} / 12 of them"


# ---- several processes

RUNS = {"teacher": dict(weights={"ce": 1.0}), "kd": dict(weights=dict.fromkeys(TERMS, 1.0)),
        "modules": dict(weights=dict.fromkeys(TERMS, 1.0)),
        "modules, two paths": dict(weights=dict.fromkeys(TERMS, 1.0), two_paths=True,
                                   lr=1e-3)}  # fewer steps a module, where Adam makes much of last bits
UNEVEN = [*toy_batches(3), (SOURCE, TARGET), (SOURCE[:1], TARGET[:1])]  # three rows and one: a share may be empty


def train_all(folder, rank=None):
    """A teacher, a KD student and a bank, five steps each, into `folder`. rank: of two processes, None for one."""
    if rank is not None:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, options in RUNS.items():
        teacher, records = tiny(dropout_rate=0.0), []
        options = {"lr": 1e-2, "log": records.append, "checkpoint": folder / f"{name}.{rank}.pt", "save_every": 0.0,
                   **options}
        trained = {"teacher": teacher, "kd": tiny(2, 2, seed=5, dropout_rate=0.0)}.get(name) or make_bank(teacher)
        if name.startswith("modules"):
            d.calibrate(teacher, trained, toy_batches(2, seed=rank or 0), ridge=100.0)  # the first process decides
            d.train_modules(teacher, trained, UNEVEN, len(UNEVEN), **options)
        else:
            d.train_student(trained, UNEVEN, len(UNEVEN), teacher if name == "kd" else None, **options)
        torch.save((trained.state_dict(), [[record[key] for key in ("loss", "ce", "grad_norm")] for record in records]),
                   folder / f"{name} {rank}")
    if rank is not None:
        for dtype in (torch.float32, torch.float16):
            def step_loss(step, source, target):
                ce = d.losses(model, source, target, d.CE_ONLY)["ce"]
                return {"ce": ce * (math.nan if (step, rank) == (1, 1) else 1.0)}, {}
            model = tiny(1, 1, dropout_rate=0.0)
            with pytest.raises(FloatingPointError) as caught:
                d.fit(model, step_loss, toy_batches(3), 3, weights=d.CE_ONLY, lr=1e-3, name="bank", dtype=dtype)
            (folder / f"nan {dtype} {rank}").write_text(str(caught.value), encoding="utf-8")
        torch.distributed.destroy_process_group()


def in_two_processes(rank, folder):
    train_all(folder, rank)


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    method = "forkserver" if "forkserver" in torch.multiprocessing.get_all_start_methods() else "spawn"
    torch.multiprocessing.set_forkserver_preload(["torch._dynamo", "pytest"])  # once for both: seconds
    two = torch.multiprocessing.start_processes(in_two_processes, (tmp_path,), nprocs=2, join=False,
                                                start_method=method)
    train_all(tmp_path)
    while not two.join():
        pass
    for name in RUNS:
        weights, logs = zip(*(torch.load(tmp_path / f"{name} {rank}") for rank in (None, 0, 1)))
        assert same(weights[1], weights[2]), f"{name}: both processes must hold the same weights, bit for bit"
        for key, one in weights[0].items():
            torch.testing.assert_close(weights[1][key], one, rtol=1e-5, atol=1e-5, msg=lambda text: (
                f"{name}, {key}: two processes with half of each batch must do what one does with all of it: {text}"))
        assert logs[2] == [], f"{name}: the second process logs nothing"
        torch.testing.assert_close(torch.tensor(logs[1]), torch.tensor(logs[0]), rtol=1e-4, atol=1e-5, msg=lambda text:
                                   f"{name}: logged is the loss of the whole batch, not of the own share: {text}")
        assert (tmp_path / f"{name}.0.pt").exists() and not (tmp_path / f"{name}.1.pt").exists(), \
            f"{name}: the first process writes the checkpoint"
    for dtype in (torch.float32, torch.float16):
        first, second = ((tmp_path / f"nan {dtype} {rank}").read_text(encoding="utf-8") for rank in (0, 1))
        assert first == second and "bank: the loss is not finite at step 1: ce nan;" in first, \
            f"{dtype}: if the loss of one share is not finite both processes stop, and say the same: {first}, {second}"


def test_gradients_do_not_pile_up():
    model, seen = tiny(1, 1, dropout_rate=0.0), []
    model.encoder.norm.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    d.train_student(model, toy_batches(1) * 3, 3, lr=0.0, weights={"ce": 1e-3})  # so small that nothing is clipped
    assert len(seen) == 3 and torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2]), \
        "three equal steps that move nothing have equal gradients: each must start from none"


def test_a_step_whose_encoder_paths_had_no_choice_logs_no_rate():
    teacher, seen = tiny(), []
    for seed in range(12):
        bank = mod.Bank(teacher, {"encoder": [2], "decoder": [2]})
        d.train_modules(teacher, bank, [(SOURCE, TARGET)], 1, lr=0.0, seed=seed, rate_start=1.0, log=seen.append)
    assert all(record["rate_decoder"] == 1.0 for record in seen)
    assert {str(record["rate_encoder"]) for record in seen} == {"1.0", "nan"}, "at rate 1 never 0: there was no draw"


def test_module_replacing_runs_without_dropout():
    records = {}
    for rate in (0.0, 1.0):
        for seed in range(8):
            teacher, log = tiny(dropout_rate=0.3), []
            bank = mod.Bank(teacher, {"encoder": [2], "decoder": [2]})
            d.train_modules(teacher.train(), bank, [(SOURCE, TARGET)], 1, lr=1e-3, seed=seed, rate_start=rate,
                            rate_rise=math.inf, log=log.append)
            records[rate, seed] = log[0]
    for seed in (0, 1):
        record = records[0.0, seed]
        assert abs(record["logits"]) < 1e-6, "at rate 0 the student is the teacher, without dropout"
        assert abs(record["hidden"]) < 1e-6 and abs(record["attention"]) < 1e-6, "its states are the teacher's"
        assert record["rate"] == record["rate_encoder"] == record["rate_decoder"] == 0.0
        assert records[1.0, seed]["rate_encoder"] == records[1.0, seed]["rate_decoder"] == 1.0
    assert len({records[1.0, seed]["ce"] for seed in range(8)}) < 8, \
        "distilled modules train without dropout: few paths and rows can be drawn, so two of 8 seeds have one loss"


@pytest.mark.parametrize("dropout", (True, False))
def test_theseus_may_have_dropout(dropout):
    """Of one batch and one path: with dropout another seed gives another loss."""
    losses = []
    for seed in (0, 1):
        teacher, records = tiny(dropout_rate=0.3), []
        bank = mod.Bank(teacher, {"encoder": [2], "decoder": [2]})
        d.train_modules(teacher, bank, [(SOURCE, TARGET)], 1, lr=1e-3, seed=seed, weights=d.CE_ONLY, rate_start=1.0,
                        dropout=dropout, log=records.append)
        losses.append(records[0]["ce"])
    assert (losses[0] != losses[1]) is dropout, "dropout where it is asked for, and nowhere else"


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_a_step_without_any_module_moves_the_frame_alone(dtype):
    teacher = tiny()
    bank = make_bank(teacher)
    before, records = copy_of(bank), []
    d.train_modules(teacher, bank, toy_batches(2), 2, lr=1e-2, rate_start=0.0, rate_rise=math.inf, dtype=dtype,
                    log=records.append)
    moved = {name for name, weight in copy_of(bank).items() if not torch.equal(weight, before[name])}
    assert len(records) == 2 and moved == {name for name in before if name.startswith("frame.")}, \
        "with no module on its paths a step moves the frame, which is on every path, and nothing else"


def test_a_stack_without_modules_trains_the_other():
    teacher, records = tiny(), []
    bank = make_bank(teacher, {"encoder": [], "decoder": [3]})
    before, frame = copy_of(bank), copy_of(bank.frame)
    d.train_modules(teacher, bank, toy_batches(2), 2, lr=1e-2, rate_start=1.0, weights=d.CE_ONLY, log=records.append)
    assert records[0]["rate_encoder"] == 0.0 and records[0]["rate_decoder"] == 1.0, "Theseus may shrink one stack alone"
    assert not same(copy_of(bank), before), "the other stack's modules must train"
    assert same(copy_of(bank.frame), frame), "Theseus freezes what is no module"


def test_sampled_rates_of_a_training(monkeypatch):
    """The real step, but for the losses: first at rate 0.3, then at a rising rate."""
    teacher = tiny(6, 6)
    bank, seen = make_bank(teacher, {"encoder": [2], "decoder": [2]}), []
    own = teacher

    def losses(student, source, target, weights, theirs, layers, paths):
        assert student is bank.frame, "all paths run in the bank's frame"
        seen.append([[float(b - a > 1) for a, b in paths[stack] if a % 2 == 0] for stack in mod.STACKS])
        for stack in mod.STACKS:
            expected = bank.layers(own, paths)[stack]
            assert len(layers[stack]) == len(expected) and all(a is b for a, b in zip(layers[stack], expected)), \
                "the layers that run are those of the sampled path"
        return {"ce": torch.zeros((), requires_grad=True)}
    monkeypatch.setattr(d, "losses", losses)
    monkeypatch.setattr(d, "fit", lambda bank, step_loss, batches, steps, **_: [
        step_loss(step, *batches[step]) for step in range(steps)])  # nothing moves: no optimizer
    steps = 600
    batches = [(SOURCE, TARGET)] * steps
    options = dict(lr=1e-2, weights=d.CE_ONLY)  # without distillation no path is of the teacher's layers
    d.train_modules(teacher, bank, batches, steps, rate_start=0.3, rate_rise=math.inf, **options)
    took = torch.tensor(seen).flatten(1)  # (steps, 3 of the encoder and 3 of the decoder)
    sigma = math.sqrt(0.3 * 0.7 / steps)
    assert ((took.mean(0) - 0.3).abs() < 5 * sigma).all(), \
        f"each position takes a module in 30 % of the steps, and every step draws anew: not {took.mean(0)}"
    z = (took - 0.3) / math.sqrt(0.3 * 0.7)
    correlation = (z.T @ z / steps).fill_diagonal_(0.0).abs().max().item()
    assert correlation < 5 / math.sqrt(steps), "positions of both stacks are drawn one by one"
    lagged = (z[1:].T @ z[:-1] / steps).abs().max().item()
    assert lagged < 5 / math.sqrt(steps), "every step draws anew"
    first = list(seen)
    seen.clear()
    d.train_modules(teacher, bank, batches, 100, seed=1, rate_start=0.3, rate_rise=math.inf, **options)
    assert seen != first[:100] and seen[:50] != first[1:51], "another seed samples other paths, not the same a step on"
    seen.clear()
    d.train_modules(teacher, bank, batches, steps, rate_start=0.2, rate_rise=0.5, **options)
    took = torch.tensor(seen).flatten(1).mean(1)
    assert (took[steps // 2:] == 1.0).all(), "after half of the steps the rate is 1"
    rates = torch.tensor([0.2 + 0.8 * step / (steps / 2) for step in range(steps // 2)])
    for part in range(4):
        window = slice(part * 75, part * 75 + 75)
        expected = rates[window].mean().item()
        sigma = math.sqrt((rates[window] * (1 - rates[window])).mean().item() / (6 * 75))
        assert abs(took[window].mean().item() - expected) < 5 * sigma, "the rate must rise evenly from 0.2 to 1"


# ----------------------------------------------------------------------------- both trainings: repeatable, resumable


def train(kind, seed=0, batches=None, steps=10, fresh=None, **loop):
    """One short training of `kind` -> (its final weights, the logged records)."""
    teacher, records = tiny(4, 4, dropout_rate=0.1), []
    log = loop.pop("log", records.append)
    if kind == "modules":
        trained = make_bank(teacher, seed=fresh or 1)
        function = lambda **options: d.train_modules(teacher, trained, **options)  # noqa: E731
    else:
        trained = tiny(2, 2, seed=fresh or 5, dropout_rate=0.1)
        taught = dict(teacher=teacher, weights=d.WEIGHTS) if kind == "kd" else {}
        function = lambda **options: d.train_student(trained, **taught, **options)  # noqa: E731
    function(batches=batches or toy_batches(steps), steps=steps, seed=seed, lr=1e-2, name=kind, log=log,
             **loop)
    return copy_of(trained), records


@pytest.fixture(scope="module")
def uninterrupted():
    return {kind: train(kind) for kind in ("modules", "kd", "sft")}


KINDS = pytest.mark.parametrize("kind", ("modules", "kd", "sft"))


@KINDS
def test_same_seed_same_weights(kind, uninterrupted):
    expected = uninterrupted[kind][0]
    torch.randn(7)  # the state of the global generator must not matter
    assert same(train(kind)[0], expected), "the same seed must give the same weights, bit for bit"
    if kind != "kd":  # distillation into a fixed student draws nothing
        assert not same(train(kind, seed=1)[0], expected), "another seed draws other paths or other dropout"


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind, dtype", (("modules", torch.float32), ("kd", torch.float32), ("sft", torch.float32),
                                         ("modules", torch.float16)))  # float16 has a loss scale to restore, too
def test_resumed_is_uninterrupted(kind, dtype, uninterrupted, tmp_path):
    path, steps = tmp_path / "checkpoint.pt", []

    def log(record):
        steps.append(record["step"])
        if record["step"] == 7:
            raise Stop
    with pytest.raises(Stop):
        train(kind, log=log, dtype=dtype, checkpoint=path, save_every=0)
    assert steps == [1, 2, 3, 4, 5, 6, 7], "the first run was cut off in its 7th step"
    weights, records = train(kind, fresh=77, dtype=dtype, checkpoint=path, save_every=0)  # its own start must not count
    expected, all_records = uninterrupted[kind] if dtype is torch.float32 else train(kind, dtype=dtype)
    assert [record["step"] for record in records] == [7, 8, 9, 10], "it goes on after the last checkpoint"
    timeless = [{k: v for k, v in record.items() if k != "tokens_per_s"} for record in (*records, *all_records[6:])]
    assert timeless[:4] == timeless[4:], "the resumed steps must be those of the uninterrupted run"
    assert same(weights, expected), "interrupted and resumed must be uninterrupted, bit for bit"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"], "no half-written file stays"


def test_checkpoint_of_another_stage_is_ignored(uninterrupted, tmp_path):
    path = tmp_path / "checkpoint.pt"
    train("kd", steps=3, checkpoint=path, save_every=0)
    assert torch.load(path, weights_only=True)["stage"] == "kd", "the checkpoint says whose it is"
    weights, records = train("sft", checkpoint=path, save_every=1e9)
    assert records[0]["step"] == 1 and same(weights, uninterrupted["sft"][0]), \
        "a checkpoint that another stage left must change nothing"


def test_checkpoints_are_written_by_time_and_not_at_the_end(tmp_path, monkeypatch):
    train("sft", steps=3, checkpoint=tmp_path / "checkpoint.pt", save_every=1e9)
    assert not (tmp_path / "checkpoint.pt").exists(), "none is due within a second"
    train("sft", steps=3, checkpoint=tmp_path / "checkpoint.pt", save_every=0)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2, "after the last step there is nothing to go on with"
    saved = []
    monkeypatch.setattr(d, "save_checkpoint", lambda state, path: saved.append(state["step"]))
    monkeypatch.setattr(d.time, "perf_counter", itertools.count(0, 20).__next__)  # read at the start, twice a step
    train("sft", steps=4, checkpoint=tmp_path / "other.pt")
    assert saved == [2], "by default, one is due when more than 60 seconds have passed: not after 60, but after 100"


def test_failed_checkpoint_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    train("sft", steps=3, checkpoint=path, save_every=0)
    before = path.read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError("no space left on device")
    monkeypatch.setattr(d.torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        train("sft", steps=5, checkpoint=path, save_every=0)
    assert path.read_bytes() == before, "the old checkpoint stays until the new one is complete"
    assert list(tmp_path.iterdir()) == [path], "and the half of a new one is removed"


@pytest.mark.parametrize("error", (OSError(28, "no space left on device"), KeyboardInterrupt()))
def test_what_stops_the_writing_of_a_checkpoint_comes_out(error, tmp_path, monkeypatch):
    """torch.save makes a RuntimeError of it, which would be a bug's traceback on the command line."""
    path, opened, writes = tmp_path / "checkpoint.pt", open, []

    def stops(name, mode):
        file = opened(name, mode)

        class Stops(io.BytesIO):
            def write(self, content):
                writes.append(content)
                if len(writes) == 3:
                    raise error
                return file.write(content)
        return Stops()
    train("sft", steps=3, checkpoint=path, save_every=0)
    before = path.read_bytes()
    monkeypatch.setattr(m, "open", stops, raising=False)
    with pytest.raises(type(error)):
        train("sft", steps=5, checkpoint=path, save_every=0)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    train("sft", steps=3, checkpoint=path, save_every=0)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="checkpoint.pt: damaged"):
        train("sft", steps=5, checkpoint=path, save_every=0)


def test_a_checkpoint_that_cannot_be_read_is_not_damaged(tmp_path):
    (tmp_path / "checkpoint.pt").mkdir()
    with pytest.raises(IsADirectoryError, match="checkpoint.pt"):
        d.load_checkpoint(tmp_path / "checkpoint.pt", "sft")


def test_a_checkpoint_too_large_for_the_memory_is_not_damaged(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1500000000 bytes.")
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError, match="out of memory: .*checkpoint.pt"):
        d.load_checkpoint(tmp_path / "checkpoint.pt", "sft")


# ----------------------------------------------------------------------------- students


def count_encodes(monkeypatch):
    """{model's id: how often its `encode` ran}."""
    counts, encode = {}, m.T5.encode

    def spy(self, *args, **kwargs):
        counts[id(self)] = counts.get(id(self), 0) + 1
        return encode(self, *args, **kwargs)
    monkeypatch.setattr(m.T5, "encode", spy)
    return counts


def test_without_a_teacher_none_runs(monkeypatch):
    counts, student, records = count_encodes(monkeypatch), tiny(1, 1), []
    d.train_student(student, toy_batches(3), 3, lr=1e-2, log=records.append)
    assert counts == {id(student): 3}, "shrink-and-fine-tune runs the student once a step, and no other model"
    assert records[0]["loss"] == records[0]["ce"] and "logits" not in records[0], "its loss is cross-entropy alone"
    counts.clear()
    teacher = tiny()
    one = make_bank(teacher, {"encoder": [2], "decoder": [3]})  # of one granularity
    d.train_modules(teacher, one, toy_batches(3), 3, lr=1e-2, weights=d.CE_ONLY)
    assert counts == {id(one.frame): 3}, "Theseus runs its path once a step, and not the teacher beside it"
    counts.clear()
    d.train_student(student, toy_batches(3), 3, teacher=teacher, weights=d.WEIGHTS, lr=1e-2)
    assert counts == {id(student): 3, id(teacher): 3}, "with a teacher each runs once"


def test_kd_moves_the_student_alone():
    teacher, student = tiny(dropout_rate=0.1).train(), tiny(2, 3, seed=5).requires_grad_(False)
    before, start = copy_of(teacher), copy_of(student)
    d.train_student(student, toy_batches(2), 2, teacher=teacher, weights=d.WEIGHTS, lr=1e-2)
    assert same(copy_of(teacher), before), "distillation must leave the teacher as it was, bit for bit"
    assert not teacher.training, "the teacher answers without dropout"
    assert not any(torch.equal(tensor, start[name]) for name, tensor in student.state_dict().items()), \
        "all of a static student trains, whatever was frozen before"
    assert not student.training, "a trained student comes back ready to use"


@pytest.mark.parametrize("options", ({}, {"dropout": False}), ids=("by default", "without"))
@pytest.mark.parametrize("distilled", (False, True))
def test_students_train_with_dropout(distilled, options):
    teacher, losses = tiny(dropout_rate=0.3), []
    for seed in (0, 1):
        records = []
        d.train_student(tiny(1, 1, seed=5, dropout_rate=0.3), [(SOURCE, TARGET)], 1, teacher if distilled else None,
                        lr=0.0, seed=seed, log=records.append, **options)
        losses.append(records[0]["ce"])
    assert (losses[0] != losses[1]) is (not options), \
        "a student trains with dropout, distilled or not, unless told otherwise: another seed, another loss"


def test_training_lowers_the_loss():
    teacher, few = tiny(2, 2), toy_batches(2)
    student = tiny(1, 1, seed=5)
    bank = make_bank(teacher, {"encoder": [2], "decoder": [2]})
    first_last = {}
    for name, run in {
            "SFT": lambda log: d.train_student(student, few * 18, 36, lr=1e-1, log=log),
            "KD": lambda log: d.train_student(tiny(1, 1, seed=5), few * 18, 36, teacher=teacher, weights=d.WEIGHTS,
                                              lr=1e-1, log=log),
            "modules": lambda log: d.train_modules(teacher, bank, few * 18, 36, lr=1e-1, rate_start=1.0,
                                                   weights={"logits": 1.0, "hidden": 2.0}, log=log)}.items():
        records = []
        run(records.append)
        first_last[name] = records[0], records[-1]
    for name, terms in (("SFT", ["ce"]), ("KD", ["loss", "logits", "hidden"]), ("modules", ["logits", "hidden"])):
        first, last = first_last[name]
        for term in terms:
            assert last[term] < 0.8 * first[term], \
                f"{name}: 36 steps on two batches must lower {term} ({first[term]:.3f} -> {last[term]:.3f})"


@pytest.mark.parametrize("n, k, spans", (
    (12, 2, [(0, 6), (6, 12)]), (6, 4, [(0, 2), (2, 3), (3, 4), (4, 6)]), (5, 5, [(i, i + 1) for i in range(5)]),
    (4, 1, [(0, 4)])))
def test_spread_by_hand(n, k, spans):
    assert d.spread(n, k) == spans, f"{k} spans tile {n} layers as evenly as can be: {spans}"


def test_a_student_deeper_than_its_teacher_is_refused():
    for n, k in ((4, 0), (2, 3)):
        with pytest.raises(ValueError, match=f"a student of {k} layers: its teacher has {n},"):
            d.spread(n, k)
    student = tiny(2, 5)
    before = copy_of(student)
    with pytest.raises(ValueError, match="a student of 5 layers: its teacher has 2"):
        d.train_student(student, toy_batches(1), 1, tiny(2, 2), lr=1e-3)
    assert same(copy_of(student), before)


def test_distillation_without_a_teacher_is_refused():
    with pytest.raises(ValueError, match="^attention, hidden, logits: a loss that needs a teacher"):
        d.train_student(tiny(1, 1), toy_batches(1), 1, weights=d.WEIGHTS, lr=1e-3)


def test_two_paths_of_less_than_one_batch_are_refused():
    teacher = tiny()
    with pytest.raises(ValueError, match="passes is 0.5: two_paths needs at least 1"):
        d.train_modules(teacher, make_bank(teacher), toy_batches(1), 1, passes=0.5, two_paths=True, lr=1e-3)


def test_spread_tiles():
    for n in range(1, 26):
        for k in range(1, n + 1):
            spans = d.spread(n, k)
            layers = [layer for start, stop in spans for layer in range(start, stop)]
            lengths = {stop - start for start, stop in spans}
            assert layers == list(range(n)) and len(spans) == k, f"{k} spans must tile {n} layers: {spans}"
            assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 1, f"and be of like length: {spans}"


# ----------------------------------------------------------------------------- calibration


def module_of(bank, stack, start, stop):
    return getattr(bank, stack)[f"{start}-{stop}"]


@torch.no_grad()
def residuals(teacher, bank, batches):
    """{(stack, start, stop): the squared error of each module's output, given the teacher's own input}, by the run
    of the teacher with one module in it."""
    total = {}
    for source, target in batches:
        theirs = d.run_stacks(teacher, source, target)
        for stack, tokens in (("encoder", source), ("decoder", target)):
            for start, stop in bank.spans[stack]:
                n = teacher.depths[stack]
                path = [*((i, i + 1) for i in range(start)), (start, stop), *((i, i + 1) for i in range(stop, n))]
                paths = {each: mod.path_of([1] * teacher.depths[each]) for each in mod.STACKS} | {stack: path}
                ours = d.run_stacks(teacher, source, target, bank.layers(teacher, paths))
                wrong = (ours[stack].states[start] - theirs[stack].states[stop - 1])[tokens != 0]
                key = (stack, start, stop)
                total[key] = total.get(key, 0.0) + wrong.square().sum().item()
    return total


def test_calibration_brings_every_module_nearer_to_its_span():
    teacher, batches = tiny(), toy_batches(6)
    bank = mod.Bank(teacher)
    before = residuals(teacher, bank, batches)
    d.calibrate(teacher, bank, batches)
    after = residuals(teacher, bank, batches)
    assert before.keys() == after.keys() and len(before) == 9
    for span in before:
        assert after[span] < 0.8 * before[span], f"{span}: squared error {before[span]:.1f} -> {after[span]:.1f}"


def test_calibration_undoes_what_was_done_to_an_output_matrix():
    """A teacher whose second layers do nothing: a copy of the first is the answer, and scaling it is undone."""
    teacher = tiny(2, 2)
    with torch.no_grad():
        for stack in (teacher.encoder, teacher.decoder):
            for name, weight in stack.layers[1].named_parameters():
                if name.endswith((".o.weight", ".wo.weight")):
                    weight.zero_()
        bank = mod.Bank(teacher)
        bank.encoder["0-2"].feed_forward.wo.weight.mul_(3.0)
        bank.decoder["0-2"].cross_attention.o.weight.mul_(-1.0)
        before = residuals(teacher, bank, toy_batches(20))
        d.calibrate(teacher, bank, toy_batches(20), rounds=5, ridge=1e-6)
        after = residuals(teacher, bank, toy_batches(20))
    for span in before:
        assert after[span] < 1e-2 * before[span], \
            f"{span}: a module can do all that the span does; squared error {before[span]:.1f} -> {after[span]:.1f}"


@torch.no_grad()
@pytest.mark.parametrize("stack, parts", (("encoder", ("self_attention.o", "feed_forward.wo")),
                                          ("decoder", ("self_attention.o", "cross_attention.o", "feed_forward.wo"))))
def test_a_round_of_calibration_is_ridge_regression(stack, parts):
    """Against torch's least squares, in float64, of the problem written out: a row a token, and one a weight's size."""
    teacher, batches, xs, rs = tiny(4, 4), toy_batches(8), [], []
    bank = mod.Bank(teacher, {"encoder": [2], "decoder": [2]})
    module, seen = module_of(copy.deepcopy(bank), stack, 2, 4), {}
    for part in parts:
        module.get_submodule(part).register_forward_pre_hook(lambda _, x, part=part: seen.update({part: x[0]}))
    for source, target in batches:
        theirs, mask = d.run_stacks(teacher, source, target), (source if stack == "encoder" else target) != 0
        layers = {each: list(getattr(teacher, each).layers) for each in mod.STACKS}
        layers[stack][2:] = [module]
        state = d.run_stacks(teacher, source, target, layers)[stack].states[2]
        rs.append((theirs[stack].states[3] - state)[mask].double())
        xs.append(torch.cat([seen[part] for part in parts], -1)[mask].double())
    x, r, ridge = torch.cat(xs), torch.cat(rs), 0.3
    widths = [module.get_submodule(part).weight.size(1) for part in parts]
    sizes = torch.cat([own.square().sum(0).mean().expand(own.size(1)) for own in x.split(widths, 1)])
    rows = torch.cat([x, (ridge * sizes).sqrt().diag()])
    moves = torch.linalg.lstsq(rows, F.pad(r, (0, 0, 0, len(sizes)))).solution.T.split(widths, 1)
    d.calibrate(teacher, bank, batches, rounds=1, ridge=ridge)
    for part, move in zip(parts, moves):
        before = module.get_submodule(part).weight
        after = module_of(bank, stack, 2, 4).get_submodule(part).weight
        assert torch.allclose(after - before, move.float(), atol=1e-4), \
            f"{part} moves by the D that leaves least of r - D x, with the ridge a share of this sub-layer's own size"


def test_a_larger_ridge_moves_the_weights_less():
    moved = []
    for ridge in (0.01, 1.0, 1e6):
        teacher = tiny(2, 2)
        bank = mod.Bank(teacher)
        d.calibrate(teacher, bank, toy_batches(4), ridge=ridge)
        moved.append((bank.encoder["0-2"].feed_forward.wo.weight
                      - teacher.encoder.layers[0].feed_forward.wo.weight).norm().item())
    assert moved[0] > moved[1] > moved[2] and moved[2] < 1e-3, f"the ridge holds the weights where they are: {moved}"


def test_calibration_leaves_a_silent_sub_layer_alone():
    """Of which no feature is ever active, as in a pruned model: nothing to fit, and no matrix to invert."""
    teacher = tiny(2, 2)
    with torch.no_grad():
        teacher.encoder.layers[0].feed_forward.wi.weight.zero_()
    bank = mod.Bank(teacher)
    d.calibrate(teacher, bank, toy_batches(4))
    assert torch.equal(bank.encoder["0-2"].feed_forward.wo.weight, teacher.encoder.layers[0].feed_forward.wo.weight)


def test_calibration_moves_output_matrices_alone():
    teacher = tiny().train()
    bank = mod.Bank(teacher)
    before, own = copy_of(bank), copy_of(teacher)
    d.calibrate(teacher, bank, toy_batches(2))
    assert same(copy_of(teacher), own), "the teacher stays"
    for name, weight in copy_of(bank).items():
        outputs = name.endswith((".o.weight", ".wo.weight")) and not name.startswith("frame.")
        assert torch.equal(weight, before[name]) is not outputs, f"{name} must {'move' if outputs else 'stay'}"
    assert all(weight.requires_grad for weight in bank.parameters()), "and all of it can train"


def test_calibration_does_not_see_padding():
    teacher, banks = tiny(), []
    for extra in (0, 3):
        banks.append(mod.Bank(teacher))
        d.calibrate(teacher, banks[-1], [tuple(F.pad(ids, (0, extra)) for ids in batch) for batch in toy_batches(4)])
    for (name, weight), other in zip(banks[0].named_parameters(), banks[1].parameters()):
        assert torch.allclose(weight, other, atol=2e-3), f"{name}: three columns of padding changed it"


def test_calibration_of_gated_feed_forward_and_of_one_stack():
    teacher = tiny(feed_forward_proj="gated-gelu")
    bank = mod.Bank(teacher, {"encoder": [], "decoder": [3]})
    before = residuals(teacher, bank, toy_batches(6))
    d.calibrate(teacher, bank, toy_batches(6))
    after = residuals(teacher, bank, toy_batches(6))
    assert list(after) == [("decoder", 0, 3), ("decoder", 3, 6)] and all(after[span] < before[span] for span in after)


KEPT = {(6, 1): [0], (6, 2): [0, 5], (6, 6): [0, 1, 2, 3, 4, 5], (12, 4): [0, 4, 7, 11], (12, 2): [0, 11],
        (4, 2): [0, 3]}


@pytest.mark.parametrize("n, k", KEPT)
@pytest.mark.parametrize("tied", (True, False))
def test_shrink_copies_spaced_layers(n, k, tied):
    teacher = tiny(n, 4, tie_word_embeddings=tied)
    student = d.shrink(teacher, k, 2)
    assert (student.config.num_layers, student.config.num_decoder_layers) == (k, 2), "the config must tell the depth"
    assert (teacher.config.num_layers, teacher.config.num_decoder_layers) == (n, 4), "and the teacher's stay"
    for stack, kept in (("encoder", KEPT[n, k]), ("decoder", [0, 3])):
        own, theirs = getattr(student, stack), getattr(teacher, stack)
        assert len(own.layers) == len(kept)
        for layer, i in zip(own.layers, kept):
            assert same(layer.state_dict(), theirs.layers[i].state_dict()), f"{k} of {n}: layers {kept} are kept"
        assert same(own.positions.state_dict(), theirs.positions.state_dict()), "the position table stays"
        assert same(own.norm.state_dict(), theirs.norm.state_dict()), "the final norm stays"
    assert torch.equal(student.embedding.weight, teacher.embedding.weight)
    assert torch.equal(student.head.weight, teacher.head.weight)
    assert (student.head is student.embedding) is tied, "the head is tied as the teacher's is"
    before = copy_of(teacher)
    with torch.no_grad():
        for weight in student.parameters():
            weight.zero_()
    assert same(copy_of(teacher), before), "a student has weights of its own"


def test_shrink_keeps_first_and_last():
    teacher = tiny(12, 1)
    for i, layer in enumerate(teacher.encoder.layers):
        layer.self_norm.weight.data.fill_(i)
    for k in range(2, 13):
        kept = [int(layer.self_norm.weight[0]) for layer in d.shrink(teacher, k, 1).encoder.layers]
        steps = {b - a for a, b in zip(kept, kept[1:])}
        assert kept[0] == 0 and kept[-1] == 11 and max(steps) - min(steps) <= 1, \
            f"{k} of 12 layers: evenly spaced from the first to the last, not {kept}"


@torch.no_grad()
def test_shrink_to_full_depth_is_the_teacher():
    teacher = tiny(dropout_rate=0.5)
    assert torch.equal(d.shrink(teacher, 4, 6)(SOURCE, TARGET), teacher(SOURCE, TARGET)), \
        "all layers copied: the same logits at once, without dropout"
    trained = d.shrink(teacher.train(), 2, 2)
    assert torch.equal(trained(SOURCE, TARGET), trained(SOURCE, TARGET)), "also of a teacher in training mode"


@pytest.mark.parametrize("shape", ((0, 2), (2, 0), (-1, 2), (5, 2), (4, 7)))
def test_shrink_refuses_impossible_depths(shape):
    stack, k = ("encoder", shape[0]) if not 1 <= shape[0] <= 4 else ("decoder", shape[1])
    with pytest.raises(ValueError) as caught:
        d.shrink(tiny(), *shape)
    for word in (stack, str(k), "4" if stack == "encoder" else "6"):
        assert word in str(caught.value), f"name the stack, the wish and the teacher's depth: {caught.value}"


# ----------------------------------------------------------------------------- the loop


def test_learning_rate_by_hand():
    rates = [d.learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0]), "5 of 100 steps rise to the peak"
    assert rates[5:] == pytest.approx([2.0 * (100 - step) / 95 for step in range(5, 100)]), "then linear towards 0"
    assert min(rates) > 0, "no step is wasted on a rate of 0"
    assert d.learning_rate(0, 1, 2.0) == 2.0, "a single step has the peak"
    assert max(d.learning_rate(step, 7, 2.0) for step in range(7)) == 2.0, "never above the peak"


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_a_loss_that_is_not_finite_raises_at_once(bad):
    model, taken = tiny(1, 1), []

    def step_loss(step, source, target):
        taken.append(step)
        ce = d.losses(model, source, target, d.CE_ONLY)["ce"]
        return {"ce": ce, "hidden": ce * bad if step == 2 else ce}, {}
    with pytest.raises(FloatingPointError) as caught:
        d.fit(model, step_loss, toy_batches(5), 5, seed=0, weights={"ce": 1.0, "hidden": 0.5}, lr=1e-3, name="bank")
    assert taken == [0, 1, 2], "stop at the step, not later"
    for word in ("bank", "step 2", "ce ", f"hidden {bad:.4g}"):
        assert word in str(caught.value), f"the message must name stage, step and terms: {caught.value}"
    assert all(weight.isfinite().all() for weight in model.parameters()), "the bad step must not move the weights"


def test_a_gradient_that_is_not_finite_moves_nothing(tmp_path):
    """Else the weights are lost one step before the loss shows it, and the checkpoint with them."""
    model, path = tiny(1, 1), tmp_path / "checkpoint.pt"

    def step_loss(step, source, target):
        ce = d.losses(model, source, target, d.CE_ONLY)["ce"]
        return {"ce": ce + (0 * model.embedding.weight.sum()).sqrt() if step == 2 else ce}, {}  # 0; its slope: 0 / 0
    with pytest.raises(FloatingPointError, match="bank: the gradient is not finite at step 2: ce [0-9]"):
        d.fit(model, step_loss, toy_batches(5), 5, seed=0, weights=d.CE_ONLY, lr=1e-3, name="bank", checkpoint=path,
              save_every=0)
    assert all(weight.isfinite().all() for weight in model.parameters()), "the bad step must not move the weights"
    state = d.load_checkpoint(path, "bank")
    assert state["step"] == 2 and all(weight.isfinite().all() for weight in state["weights"].values()), \
        "--resume with a lower rate must find weights to go on from"


def test_training_does_not_use_cudnns_attention():
    torch.backends.cuda.enable_cudnn_sdp(True)
    d.train_student(tiny(1, 1), toy_batches(1), 1, lr=1e-3)
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "its gradients may be NaN"


def test_float16_gives_up_where_no_scale_helps():
    """Else all steps are skipped, and what comes out has learnt nothing."""
    model = tiny(1, 1)

    def step_loss(step, source, target):
        return {"ce": d.losses(model, source, target, d.CE_ONLY)["ce"] + (0 * model.embedding.weight.sum()).sqrt()}, {}
    with pytest.raises(FloatingPointError, match="bank: the gradient is not finite at step 17"):  # 2^16 halved to 1/2
        d.fit(model, step_loss, toy_batches(40), 40, weights=d.CE_ONLY, lr=1e-3, name="bank", dtype=torch.float16)


def test_out_of_memory_names_the_batch():
    def step_loss(step, source, target):
        if step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return {"ce": d.losses(model, source, target, d.CE_ONLY)["ce"]}, {}
    model, batches = tiny(1, 1), [(SOURCE, TARGET), (SOURCE[:2], TARGET[:2])]
    with pytest.raises(MemoryError) as caught:
        d.fit(model, step_loss, batches, 2, seed=0, weights=d.CE_ONLY, lr=1e-3, name="bank")
    for word in ("bank", "step 1", "2 x 5 source", "2 x 4 target", "--batch-tokens", "--max-length"):
        assert word in str(caught.value), f"the line must name stage, step, shape and options: {caught.value}"


def test_float16_skips_steps_that_overflow_and_counts_them():
    weights, records = {}, []

    def step_loss(step, source, target):
        weights[step] = copy_of(model)
        return {"ce": 300 * d.losses(model, source, target, d.CE_ONLY)["ce"]}, {}
    model = tiny(1, 1)
    d.fit(model, step_loss, toy_batches(30), 30, seed=0, weights=d.CE_ONLY, lr=1e-3, dtype=torch.float16,
          log=records.append)
    moved = [not same(weights[step], weights[step + 1]) for step in range(29)]
    skipped = [record["skipped"] for record in records[:29]]
    assert skipped == [not each for each in moved], "a step that overflowed moves nothing and is counted"
    assert 1 < sum(skipped) < 29 and moved[-1], "the scale falls until steps fit, and training goes on"
    d.fit(model, step_loss, toy_batches(2), 2, seed=0, weights=d.CE_ONLY, lr=1e-3, log=records.append)
    assert "skipped" not in records[-1], "float32 has no scale to overflow"


def test_skipped_steps_are_counted_over_an_interruption(tmp_path):
    def run(stop, checkpoint):
        def step_loss(step, source, target):
            if step == stop:
                raise Stop
            return {"ce": 300 * d.losses(model, source, target, d.CE_ONLY)["ce"]}, {}
        model, records = tiny(1, 1), []
        try:
            d.fit(model, step_loss, toy_batches(5) * 40, 200, weights=d.CE_ONLY, lr=1e-3, dtype=torch.float16,
                  log=records.append, checkpoint=checkpoint, save_every=0.0)
        except Stop:
            pass
        return records
    whole = run(4, None)  # its records are of steps 1, 2 and 4
    assert [(record["step"], record["skipped"]) for record in whole] == [(1, 1), (2, 1), (4, 2)]
    run(3, tmp_path / "checkpoint.pt")
    resumed = run(4, tmp_path / "checkpoint.pt")
    assert [(record["step"], record["skipped"]) for record in resumed] == [(4, 2)], \
        "a step that was skipped before the interruption counts in the next record"


def test_log_of_every_percent():
    records, ce = [], torch.tensor(3.0, requires_grad=True)
    d.fit(tiny(1, 1), lambda step, source, target: ({"ce": ce, "hidden": torch.tensor(0.25)}, {"rate": 0.5}),
          toy_batches(1) * 250, 250, seed=0, weights={"ce": 1.0, "hidden": 2.0}, lr=1e-3, name="stage",
          log=records.append)
    assert [record["step"] for record in records] == [1, *range(2, 251, 2)], "the first step, then every 1 %"
    more = []
    d.fit(tiny(1, 1), lambda step, source, target: ({"ce": ce}, {}), toy_batches(1) * 200, 200, seed=0,
          weights=d.CE_ONLY, lr=1e-3, log=more.append)
    assert [record["step"] for record in more] == [1, *range(2, 201, 2)], "200 steps: every other one"
    for name, value in {"stage": "stage", "steps": 250, "loss": 3.5, "ce": 3.0, "hidden": 0.25, "ce_weighted": 3.0,
                        "hidden_weighted": 0.5, "rate": 0.5}.items():
        assert records[0][name] == value, f"{name} must be logged as {value}: terms raw and weighted"
    assert {"grad_norm", "lr", "tokens_per_s"} <= records[0].keys()


def test_loss_is_the_weighted_sum():
    assert d.WEIGHTS == {"ce": 1.0, "logits": 1.0, "hidden": 2.0, "attention": 0.1} and d.CE_ONLY == {"ce": 1.0}, \
        "the README's results are those of these weights: with others, measure them anew"
    teacher, records, weights = tiny(), [], {"ce": 1.0, "logits": 0.5, "hidden": 2.0, "attention": 0.25}
    d.train_modules(teacher, make_bank(teacher), toy_batches(1), 1, lr=1e-3, weights=weights, rate_start=1.0,
                    log=records.append)
    record = records[0]
    assert record["loss"] == pytest.approx(sum(weights[name] * record[name] for name in TERMS), rel=1e-5), \
        "the loss is the sum of weight times term"
    assert record["hidden_weighted"] == pytest.approx(2 * record["hidden"]), "weighted terms are logged beside the raw"


def test_tokens_per_second_by_hand(monkeypatch):
    model, records = tiny(1, 1), []
    monkeypatch.setattr(d.time, "perf_counter", itertools.count(0, 2).__next__)  # a record every 2 seconds
    d.train_student(model, [(SOURCE, TARGET)] * 3, 3, lr=1e-3, log=records.append)
    assert [record["tokens_per_s"] for record in records] == [27 / 2, 54 / 4, 81 / 6], \
        "3 sources of 5 tokens and 3 targets of 4 a step, padding included, over the seconds since the start"


@pytest.mark.parametrize("dtype, bound", ((torch.bfloat16, 0.1), (torch.float16, 0.02)))
def test_sixteen_bit_costs_digits_only(dtype, bound):
    first, weights = {}, dict.fromkeys(TERMS, 0.01)  # so small that float16's loss scale does not overflow
    for kind in (torch.float32, dtype):
        teacher, records = tiny(2, 2), []
        bank = make_bank(teacher)
        before = copy_of(bank)
        d.train_modules(teacher, bank, toy_batches(1), 1, lr=1e-2, weights=weights, rate_start=1.0, dtype=kind,
                        log=records.append)
        first[kind] = records[0]
        assert all(weight.dtype is torch.float32 for weight in bank.parameters()), "weights stay in float32"
        assert not same(copy_of(bank), before), f"{kind}: training must move the bank"
    for name in ("loss", "grad_norm"):
        error = abs(first[dtype][name] / first[torch.float32][name] - 1)
        assert 0 < error < bound, f"{dtype} must be used, and change {name} in its last digits only ({error:.4f})"


def test_pick_dtype(monkeypatch):
    assert [d.pick_dtype(name, "cpu", 64) for name in ("float32", "bfloat16", "float16")] == \
        [torch.float32, torch.bfloat16, torch.float16], "a dtype that is named is taken"
    assert d.pick_dtype("auto", "cpu", 64) in (torch.float32, torch.bfloat16), "a CPU has no fast float16"
    for clock, dtype in (((0, 6, 10, 20), torch.bfloat16), ((0, 8, 10, 20), torch.float32)):
        monkeypatch.setattr(d.time, "perf_counter", iter(clock).__next__)
        assert d.pick_dtype("auto", "cpu", 64) is dtype, "bfloat16 on a CPU where it takes less than 0.7 of the time"
    monkeypatch.setattr(d.time, "perf_counter", iter((0, 6, 10, 20)).__next__)
    assert d.pick_dtype("auto", "mps", 64) is torch.float32, "elsewhere auto takes no risk"
    current = [None]

    @contextlib.contextmanager
    def device(name):
        current.append(name)
        yield
    monkeypatch.setattr(torch.cuda, "device", device)
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported
                            or including_emulation)
        assert d.pick_dtype("auto", "cuda:1", 64) is dtype, "bfloat16 on a GPU that has it, not one that emulates it"
        assert current[-1] == "cuda:1", "that one is asked, not the first"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
@pytest.mark.parametrize("length", (64, 128, 192))
def test_cuda_trains_with_low_scores(length):
    """Attention scores far below -88 in rows with a mask, where cuDNN's kernel makes NaN of the queries' gradients."""
    model = tiny(1, 1, d_kv=32, dropout_rate=0.0).to("cuda")
    with torch.no_grad():
        cross = model.decoder.layers[0].cross_attention
        cross.q.weight.normal_(0, 20)
        cross.k.weight.copy_(-cross.q.weight)  # of like inputs the products are negative
    source = torch.randint(3, 40, (1, 1)).repeat(4, length)
    target = source[:, :1].repeat(1, length)
    d.train_student(model, [(source, target)] * 2, 2, lr=1e-3, dtype=torch.bfloat16)  # raises if one is not finite
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
@pytest.mark.parametrize("dtype, bound", ((torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)))
def test_cuda_trains_modules_in_mixed_precision(dtype, bound):
    """As on a CPU in float32: the same paths on the same rows, so the same first losses but for rounding."""
    teacher, records = tiny(4, 4), {"cpu": [], "cuda": []}
    bank = make_bank(teacher)
    for device, own in records.items():
        trained, options = copy.deepcopy(bank).to(device), {"dtype": dtype} if device == "cuda" else {}
        d.train_modules(copy.deepcopy(teacher).to(device), trained, toy_batches(60), 60, lr=3e-2, rate_start=1.0,
                        log=own.append, **options)
    assert all(p.dtype is torch.float32 for p in trained.parameters()), "weights stay float32, only products are 16 bit"
    for term in d.WEIGHTS:
        assert records["cuda"][0][term] == pytest.approx(records["cpu"][0][term], rel=bound), f"{dtype}: {term}"
    start, end = (sum(record["loss"] for record in part) for part in (records["cuda"][:6], records["cuda"][-6:]))
    assert end < 0.9 * start, f"{dtype}: the modules must come closer to the teacher"
