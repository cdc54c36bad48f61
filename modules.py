"""Modularized layers: spans, paths, the bank, and how a training step draws a path.

    teacher   0  1  2  3  4  5  6  7  8  9 10 11       twelve layers of one stack
    path     [0][ 1-- 3 ][4][5][  6 ------ 11  ]       spans that tile them: here 5 layers do the work of 12

A span (start, stop) of length 1 is the teacher's own layer, a longer one a *module*: one layer that has learnt to turn
the hidden state before layer `start` into the one after layer `stop - 1`. Since a module's input and output are hidden
states of the teacher, modules and the teacher's layers fit together in any order that tiles the stack: the training
step samples such a path, an assembly chooses one. Modular Transformers, https://arxiv.org/abs/2306.02379.

What is no layer (embedding, head, position tables, final norms) is the *frame*: the bank has one of its own, which
starts as the teacher's and serves all paths.

    pytest tests/test_modules.py
"""
import copy
import re
from dataclasses import replace
from itertools import accumulate

import torch
from torch import nn

from model import T5, read_safetensors, write_safetensors

STACKS = ("encoder", "decoder")


def default_granularities(n):
    """The granularities from 2 to 6, the paper's 6x, that tile n layers with equal spans: 12 -> [2, 3, 4, 6]."""
    return [g for g in range(2, 7) if n % g == 0]


def module_spans(n, granularities):
    """All spans of modules in a stack of n layers: each granularity g tiles it, (0, g), (g, 2g), ...

    Spans start at multiples of their own length, so that every path of modules alone ends exactly at n.
    Raises ValueError for a granularity that does not divide n.
    """
    for g in granularities:
        if g < 2 or n % g:
            raise ValueError(f"granularity {g} does not tile {n} layers; possible: "
                             f"{[g for g in range(2, n + 1) if n % g == 0]}")
    return [(start, start + g) for g in granularities for start in range(0, n, g)]


def spans_from(start, spans):
    """All that a path may do at layer `start`: run the teacher's own layer, or take a module of `spans`."""
    return [(start, start + 1), *(span for span in spans if span[0] == start)]


def check_path(path, n, spans):
    """Raise ValueError unless `path` tiles [0, n) in order with single layers and the modules in `spans`."""
    position = 0
    for start, stop in path:
        if start != position or stop <= start:
            raise ValueError(f"path {path}: a span that starts at layer {position} must come before {(start, stop)}")
        if stop - start > 1 and (start, stop) not in spans:
            raise ValueError(f"path {path}: no module was trained for layers {start}-{stop - 1}; "
                             f"there are {sorted(spans)}")
        position = stop
    if position != n:
        raise ValueError(f"path {path}: covers {position} of {n} layers")


def path_of(lengths):
    """Span lengths in order -> a path: [2, 1, 3] -> [(0, 2), (2, 3), (3, 6)]."""
    ends = [0, *accumulate(lengths)]
    return list(zip(ends, ends[1:]))


class Bank(nn.Module):
    """All modularized layers of both stacks, one layer of the teacher's own kind for each span, and the frame that
    they run in: a T5 without layers, a copy of the teacher's that trains with them. A model of few layers reads its
    words in another way than one of many (README, "Ablations").

    granularities: {"encoder": [2, 3], "decoder": [2, 3]}; by default all of `default_granularities`.
    init: how a module starts, see `merge`. `distill.calibrate` then fits it to its span without a training step.
    """
    def __init__(self, teacher, granularities=None, init="copy"):
        super().__init__()
        self.spans = {}
        for stack in STACKS:
            layers = getattr(teacher, stack).layers
            chosen = default_granularities(len(layers)) if granularities is None else granularities[stack]
            self.spans[stack] = module_spans(len(layers), chosen)
            modules = {f"{start}-{stop}": merge(layers, start, stop, init) for start, stop in self.spans[stack]}
            setattr(self, stack, nn.ModuleDict(modules))
        self.frame = with_layers(teacher, dict.fromkeys(STACKS, ()))
        self.requires_grad_(True)

    def module(self, stack, span):
        """The module of that stack, "encoder" or "decoder", for layers start to stop - 1 of the teacher."""
        start, stop = span
        return getattr(self, stack)[f"{start}-{stop}"]

    def layers(self, teacher, paths):
        """{"encoder": path, "decoder": path} -> the lists of layers that they name, for `T5.encode` and `T5.decode`."""
        return {stack: [getattr(teacher, stack).layers[start] if stop - start == 1
                        else self.module(stack, (start, stop)) for start, stop in paths[stack]]
                for stack in STACKS}


@torch.no_grad()
def merge(layers, start, stop, init):
    """A new layer for one span of all `layers` of a stack. init: "copy", a copy of one layer of the span, so that the
    modules of a granularity are those layers that a static student keeps (`evenly`); "average", the mean of the span's
    layers, tensor by tensor. Raises ValueError for another init."""
    if init not in ("copy", "average"):
        raise ValueError(f"init is {init!r}, not 'copy' or 'average'")
    g = stop - start
    module = copy.deepcopy(layers[evenly(len(layers), len(layers) // g)[start // g]])
    if init == "average":
        for parameter, *others in zip(module.parameters(), *(layer.parameters() for layer in layers[start:stop])):
            parameter.copy_(torch.stack(others).mean(0))
    return module


def evenly(n, k):
    """The indices of k of n layers, evenly spaced from the first to the last: 12, 4 -> [0, 4, 7, 11].

    What to keep of a teacher: Shleifer & Rush 2020, section 3.1 (https://arxiv.org/abs/2010.13002).
    """
    return [round(i * (n - 1) / max(k - 1, 1)) for i in range(k)]


def with_layers(teacher, layers):
    """A plain T5 of {"encoder": [layer, ...], "decoder": [...]}: copies of these, and of all else of the teacher: the
    embedding, the head, the stacks' position tables and final norms. All of it can train; it is in eval mode."""
    with torch.device("meta"):  # shapes only: every part is about to be replaced
        model = T5(replace(teacher.config, num_layers=0, num_decoder_layers=0))
    model.config = replace(teacher.config, num_layers=len(layers["encoder"]), num_decoder_layers=len(layers["decoder"]))
    model.embedding, model.head = copy.deepcopy((teacher.embedding, teacher.head))  # together: they may be one tensor
    for stack in STACKS:
        own, source = getattr(model, stack), getattr(teacher, stack)
        own.layers = copy.deepcopy(nn.ModuleList(layers[stack]))
        own.positions, own.norm = copy.deepcopy(source.positions), copy.deepcopy(source.norm)
    return model.requires_grad_(True).eval()


def save_bank(bank, path):
    """Write all modules and the frame to one safetensors file, as "encoder.0-2.self_attention.q.weight" and so on."""
    write_safetensors(dict(bank.named_parameters()), path)  # a tied head once


def load_bank(path, teacher):
    """Read a `save_bank` file for this teacher. Raises ValueError naming the file and the tensor that does not fit."""
    weights = read_safetensors(path)
    names = [re.match(r"(encoder|decoder)\.(\d{1,9})-(\d{1,9})\.", name)  # int() refuses thousands of digits
             for name in weights if not name.startswith("frame.")]
    if not names or not all(names):
        raise ValueError(f"{path}: not a bank of modules")
    granularities = {stack: sorted({int(m[3]) - int(m[2]) for m in names if m[1] == stack}) for stack in STACKS}
    try:
        bank = Bank(teacher, granularities)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    ours = dict(bank.named_parameters())
    for name in {**ours, **weights}:
        if name not in weights or name not in ours or weights[name].shape != ours[name].shape:
            raise ValueError(f"{path}: tensor {name!r} is missing or does not fit the teacher")
        if not weights[name].is_floating_point() or not weights[name].isfinite().all():
            raise ValueError(f"{path}: tensor {name!r} does not hold finite numbers")
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(weights[name])
    return bank


def replacement_rate(step, steps, start=0.5, rise=0.1):
    """The rate r(t) of a step: linear from `start` to 1 over the first share `rise` of all steps, 1 after it.

    BERT-of-Theseus, section 3.3 (https://arxiv.org/abs/2002.02925): at first modules learn beside the teacher's
    layers, in the end beside each other, as they will run. start=1 is a constant rate of 1; rise=inf keeps `start`.
    """
    return min(1.0, start + (1.0 - start) * step / (rise * steps)) if rise > 0 else 1.0


def sample_path(n, spans, rate, rng):
    """Draw a path through n layers: walk from 0; wherever modules start, one draw takes a module (of several, any) with
    probability `rate`, else the teacher's layer. One draw a position, not one a stack: a module must meet every
    neighbourhood. rng: random.Random.
    """
    path, start = [], 0
    while start < n:
        own, *here = spans_from(start, spans)
        path.append(rng.choice(here) if here and rng.random() < rate else own)
        start = path[-1][1]
    return path


def systematic_sample(chances, rng):
    """Of {item: chance, at most 1} draw each item with its own chance, and always as many as the chances sum to,
    rounded up or down: from one random offset on, an item at every whole number that their running sum reaches
    (Madow 1949, https://doi.org/10.1214/aoms/1177729988). rng: random.Random.
    """
    drawn, total = [], rng.random()
    for item, chance in chances.items():
        total += chance
        if total >= 1.0:
            drawn.append(item)
            total -= 1.0
    return drawn


def by_granularity(spans):
    """The modules of one stack, apart: {2: [spans of 2 layers], 3: [spans of 3], ...}."""
    lengths = sorted({stop - start for start, stop in spans})
    return {length: [span for span in spans if span[1] - span[0] == length] for length in lengths}


def realised_rate(path, spans):
    """The share of this path's positions with a choice that took a module; 0 in a stack without modules."""
    starts = {start for start, _ in spans}
    drawn = [stop - start > 1 for start, stop in path if start in starts]
    return sum(drawn) / max(1, len(drawn))
