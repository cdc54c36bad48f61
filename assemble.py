"""The assembler: one bank, many models. Chooses an encoder and a decoder path and writes the plain T5 they make.

    python assemble.py RUN --ratio 2                                   # the best model of at most half the layers
    python assemble.py RUN --speedup 2.5                               # the best one that runs 2.5x as fast here
    python assemble.py RUN --params 40M --out DIR                      # the best one of at most 40 million parameters
    python assemble.py RUN --list                                      # every budget worth choosing
    python assemble.py RUN --ratio 2 --strategy speed-first            # by rule: the decoder's layers go first
    python assemble.py RUN --encoder 2,2,2,2,2,2 --decoder 6,6         # these spans, in order
    pytest tests/test_assemble.py

A bank of a 12+12 teacher makes 85,264 models. The search measures once, on a few hundred validation pairs, the damage
of each module, and of each two neighbours, adds damages up along a path, finds the best path of every depth by dynamic
programming, and scores the best few pairs of paths for real, with the even paths of their depths. Damage is how much
farther from the teacher's probabilities those of the model are.
"""
import argparse
import hashlib
import math
import os
import re
import shutil
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from data import Tokenizer
from distill import logit_distillation, run_stacks
from model import (Cache, Parser, command_line, load_t5, quick_products, read_json, read_safetensors, save_t5,
                   write_json, write_safetensors)
from modules import STACKS, check_path, load_bank, path_of, spans_from, with_layers

STRATEGIES = ("size-first", "speed-first")


# ---- choosing a pair of paths

def best_paths(n, spans, cost):
    """{depth: (cost, path)}, depths ascending: the cheapest path of every depth through n layers.

    A path costs the sum of cost(previous, span) over its spans; before the first, previous is None. By dynamic
    programming: a path of d layers that ends with `span` is one of d-1 layers that ends with some `previous`, up to
    where `span` starts, and `span`:
        C(d, span) = min over previous of C(d-1, previous) + cost(previous, span).
    Of equals that one is taken that keeps the lower layers whole, on which all others build.
    """
    best = [{(0, None): (0, [])}] + [{} for _ in range(n)]  # where a path has come to: {(depth, last span): C and path}
    for start in range(n):
        for span in spans_from(start, spans):
            here = best[span[1]]
            for (depth, previous), (total, path) in best[start].items():
                longer = total + cost(previous, span), [*path, span]
                here[depth + 1, span] = min(longer, here.get((depth + 1, span), longer))
    ends = {}
    for (depth, _), entry in best[n].items():
        ends[depth] = min(entry, ends.get(depth, entry))
    return dict(sorted(ends.items()))


def path_of_depth(n, spans, depth):
    """The path of `depth` layers through a stack of n whose spans are most alike, or None if there is none: the one
    with the smallest sum of squared lengths, that is the least work for the busiest module."""
    return best_paths(n, spans, lambda previous, span: (span[1] - span[0]) ** 2).get(depth, (None, None))[1]


def possible_depths(n, spans):
    """The numbers of layers that paths through a stack of n can have, ascending."""
    return list(best_paths(n, spans, lambda previous, span: 0))


def count_paths(n, spans):
    """How many paths tile a stack of n."""
    ways = [1] + [0] * n
    for start in range(n):
        for span in spans_from(start, spans):
            ways[span[1]] += ways[start]
    return ways[n]


def choose_depths(ratio, strategy, encoder, decoder):
    """(encoder layers, decoder layers) for a compression ratio; `encoder` and `decoder` list the possible depths.

    size-first shrinks both stacks by the same share: of all models with that many layers the most even one, of two that
    are equally even the one with fewer decoder layers.
    speed-first takes the decoder's layers first: they run once a token, the encoder's once a sentence.
    Raises ValueError when no pair has a ratio of which this one is within 5 %, saying which there are; or for another
    strategy.
    """
    full = encoder[-1] + decoder[-1]
    pairs = [(e, d) for e in encoder for d in decoder]
    total = min({e + d for e, d in pairs}, key=lambda k: abs(full / k - ratio))
    if not abs(full / total - ratio) <= 0.05 * full / total:  # so put, it catches nan and inf
        possible = ", ".join(f"{full / k:.2f}" for k in sorted({e + d for e, d in pairs}, reverse=True))
        raise ValueError(f"--ratio {ratio:g}: no assembly comes near; possible: {possible}")
    pairs = [(e, d) for e, d in pairs if e + d == total]
    if strategy == "speed-first":
        return min(pairs, key=lambda p: p[1])
    if strategy == "size-first":
        return min(pairs, key=lambda p: (abs(p[0] * decoder[-1] - p[1] * encoder[-1]), p[1]))
    raise ValueError(f"--strategy {strategy}: not one of {', '.join(STRATEGIES)}")


def even_paths(teacher, bank, encoder, decoder):
    """The assembly {"encoder": path, "decoder": path} of these depths whose spans are most alike: `path_of_depth`."""
    return {stack: path_of_depth(teacher.depths[stack], bank.spans[stack], depth)
            for stack, depth in zip(STACKS, (encoder, decoder))}


def choose(teacher, bank, ratio, strategy):
    """The assembly of a ratio under a strategy. Raises as `choose_depths`."""
    possible = (possible_depths(teacher.depths[stack], bank.spans[stack]) for stack in STACKS)
    return even_paths(teacher, bank, *choose_depths(ratio, strategy, *possible))


# ---- searching

def save_batches(batches, path):
    """Write one epoch of (source, target) batches of token ids to one safetensors file."""
    ids = [batches[k] for k in range(len(batches))]
    write_safetensors({f"{name}.{k}": side for k, pair in enumerate(ids)
                       for name, side in zip(("source", "target"), pair)}, path)


def load_batches(path, vocab_size):
    """What `save_batches` wrote. Raises ValueError or OSError naming the file, also for ids beyond the vocabulary."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing: `python train.py --resume --out {path.parent}` writes it; or choose "
                                f"by rule, --ratio or --speedup with --strategy {STRATEGIES[0]}")
    tensors = read_safetensors(path)
    for name, ids in tensors.items():
        if ids.dtype is not torch.long or ids.dim() != 2 or not ids.numel() or ((ids < 0) | (ids >= vocab_size)).any():
            raise ValueError(f"{path}: tensor {name!r} does not hold rows of token ids below {vocab_size}")
    try:
        batches = [(tensors[f"source.{k}"], tensors[f"target.{k}"]) for k in range(max(1, (len(tensors) + 1) // 2))]
    except KeyError as name:
        raise ValueError(f"{path}: not a file of batches: {name} is missing") from None
    for k, (source, target) in enumerate(batches):
        if len(source) != len(target):
            raise ValueError(f"{path}: not a file of batches: {len(source)} rows of 'source.{k}', {len(target)} of "
                             f"'target.{k}'")
    return batches


def neighbours(spans):
    """What is measured of a stack's modules: each alone, (span,), and each two that can stand side by side, (a, b)."""
    return [(span,) for span in spans] + [(a, b) for a in spans for b in spans if a[1] == b[0]]


@torch.no_grad()
def divergences(teacher, models, batches):
    """How far each of `models`, pairs (frame, {"encoder": layers, "decoder": layers}), is from the teacher: the mean of
    KL(p_teacher || p_model) over the target tokens, in nats.

    Not the loss on these targets: that looks at one word of each distribution, the one that happened to be written, and
    on 300 pairs it is too noisy to tell like assemblies apart (README, "What did not work").
    """
    total, tokens = [0.0] * len(models), 0
    for source, target in batches:
        source, target = (ids.to(teacher.embedding.weight.device) for ids in (source, target))
        theirs = run_stacks(teacher, source, target)["log_probs"]  # once for all models
        for i, (frame, layers) in enumerate(models):
            ours = run_stacks(frame, source, target, layers)["log_probs"]
            total[i] += len(theirs) * logit_distillation(ours, theirs).item()
        tokens += len(theirs)
    return [each / tokens for each in total]


def damages(teacher, bank, batches):
    """By how many nats a token the teacher's layers, in the bank's frame, move away from the teacher when modules
    replace some: {"encoder": {(span,): by this one alone, (a, b): by these two beyond the sum of both, ...}, "decoder":
    ...}. Modules of one length trained side by side: beside each other they do less than beside the teacher's layers.
    """
    whole, result = {stack: path_of([1] * n) for stack, n in teacher.depths.items()}, {stack: {} for stack in STACKS}
    cases = [(stack, modules) for stack in STACKS for modules in neighbours(bank.spans[stack])]
    models = [(bank.frame, bank.layers(teacher, whole))]
    for stack, modules in cases:
        kept = [(i, j) for i, j in whole[stack] if not any(start <= i < stop for start, stop in modules)]
        models.append((bank.frame, bank.layers(teacher, {**whole, stack: sorted([*kept, *modules])})))
    base, *far = divergences(teacher, models, tqdm(batches, desc="modules", leave=False, disable=None))
    for (stack, modules), each in zip(cases, far):
        alone = sum(result[stack].get((span,), 0.0) for span in modules)  # of two: single modules come first
        result[stack][modules] = each - base - alone
    return result


def read_damages(run, teacher, bank, batches):
    """`damages`, from RUN/damage.json, {"of": a hash of teacher, bank and batches, "encoder": {"0-2": 0.01, "0-2,2-4":
    -0.001, ...}, "decoder": ...}, which is written on first use, and anew for another of the three. Raises ValueError
    naming a file that is no JSON or lacks some."""
    file, of = run / "damage.json", hashlib.sha256()
    for tensor in [*teacher.parameters(), *bank.parameters(), *(ids for pair in batches for ids in pair)]:
        of.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())

    def name(modules):
        """((0, 2), (2, 4)) -> "0-2,2-4"."""
        return ",".join(f"{a}-{b}" for a, b in modules)
    stored = read_json(file) if file.exists() else {}
    if stored.get("of") != of.hexdigest():
        stored = {"of": of.hexdigest(), **{stack: {name(modules): each for modules, each in found.items()}
                                           for stack, found in damages(teacher, bank, batches).items()}}
        write_json(stored, file)
    try:
        return {stack: {modules: float(stored[stack][name(modules)]) for modules in neighbours(bank.spans[stack])}
                for stack in STACKS}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: does not fit the bank ({error}): remove it to measure anew") from None


@quick_products()  # copies are made in the first two rounds: one does not count, one the median leaves out
def layer_seconds(teacher, source):
    """(fixed, one encoder layer, one decoder layer): seconds of generating 24 positions for `source`, none below
    0, fitted to the measured times of four depths. The errors' squares are summed as shares of the times, or the
    noise in those of large models would swamp those of small ones. All layers of a stack have one shape, so that a
    model's time follows from its depths."""
    n = teacher.depths
    shapes = sorted({(e, d) for e in (1, n["encoder"]) for d in (1, n["decoder"])})
    models = [with_layers(teacher, {"encoder": teacher.encoder.layers[:e], "decoder": teacher.decoder.layers[:d]})
              for e, d in shapes]
    times = [[seconds(model, source, tokens=24) for model in models] for _ in range(6)][1:]
    median = torch.tensor(times, dtype=torch.float64).median(0).values
    rows = torch.tensor([(1.0, e, d) for e, d in shapes], dtype=torch.float64) / median[:, None]
    return torch.linalg.lstsq(rows, torch.ones_like(median), driver="gelsd").solution.clamp(min=0).tolist()


def speed_predictor(teacher, source):
    """A function of (encoder layers, decoder layers) that tells a model's speed-up over the teacher on `source` (B, S)
    without building it, from `layer_seconds`."""
    fixed, encoder, decoder = layer_seconds(teacher, source)
    n = teacher.depths
    return lambda e, d: ((fixed + n["encoder"] * encoder + n["decoder"] * decoder)
                         / (fixed + e * encoder + d * decoder))


def parameters_of(teacher, e, d):
    """The number of parameters of a model of these depths: the teacher's less those of the layers that go."""
    return parameters(teacher) - sum((teacher.depths[stack] - k) * parameters(getattr(teacher, stack).layers[0])
                                     for stack, k in zip(STACKS, (e, d)))


def path_damage(damage):
    """The cost of a span after another one, for `best_paths`, by one stack of `damages`: what the module does alone,
    and beside the one before it. A layer of the teacher does none."""
    return lambda previous, span: damage.get((span,), 0.0) + damage.get((previous, span), 0.0)


def preference(damage, paths):
    """The order of assemblies: less damage first; of those that do next to none the fastest, whose decoder, which runs
    once a token, has the fewest layers. 300 sentences do not tell a thousandth of a nat."""
    return max(damage, 1e-3), len(paths["decoder"]), len(paths["encoder"])


def candidates(teacher, bank, damage, allowed):
    """The assembly of least estimated damage for each pair of depths that allowed(e, d) holds for, in the order of
    `preference`: [(damage, {"encoder": path, "decoder": path}), ...]. The search through all tilings is exact; the
    estimate takes it that damages of modules, and of neighbours, add up."""
    encoders, decoders = (best_paths(teacher.depths[stack], bank.spans[stack], path_damage(damage[stack]))
                          for stack in STACKS)
    return sorted(((a + b, {"encoder": encoder, "decoder": decoder})
                   for e, (a, encoder) in encoders.items()
                   for d, (b, decoder) in decoders.items() if allowed(e, d)), key=lambda found: preference(*found))


def search(teacher, bank, damage, allowed, batches, k=8):
    """The best assembly under a budget: of the first k `candidates` and the even paths of the same depths that which is
    nearest to the teacher, in the order of `preference`; None if no depths are allowed. Even paths, as what trained
    together as a whole may do better than any two neighbours of it tell."""
    found = []
    for _, paths in candidates(teacher, bank, damage, allowed)[:k]:
        even = even_paths(teacher, bank, *map(len, paths.values()))
        found += [paths] if even == paths else [paths, even]
    if not found:
        return None
    far = divergences(teacher, [(frame_of(teacher, bank, each), bank.layers(teacher, each)) for each in found], batches)
    return min(zip(far, found), key=lambda each: preference(*each))[1]


# ---- building, measuring, writing

def frame_of(teacher, bank, paths):
    """The T5 whose embedding, head, position tables and norms an assembly has: the bank's, or the teacher's if there is
    no module on its paths."""
    return bank.frame if any(stop - start > 1 for stack in STACKS for start, stop in paths[stack]) else teacher


def assemble(teacher, bank, paths):
    """The plain T5 of an assembly: copies of the layers on its paths and of their frame. Raises ValueError for a path
    that does not tile its stack."""
    for stack in STACKS:
        try:
            check_path(paths[stack], teacher.depths[stack], bank.spans[stack])
        except ValueError as error:
            raise ValueError(f"{stack} {error}") from None
    return with_layers(frame_of(teacher, bank, paths), bank.layers(teacher, paths))


def parameters(model):
    """The number of parameters, a tied tensor counted once."""
    return sum(p.numel() for p in model.parameters())


def bytes_read(model):
    """(once a sentence, once a token): bytes of weights that generation must read, whatever the implementation.

    Once a sentence the encoder and what makes the cross-attention's keys and values; once a token the rest of the
    decoder and the head, which no compression of layers shrinks. For one sentence the memory's speed is the limit.
    """
    def size(*modules):
        """Bytes of all their weights."""
        return sum(p.numel() * p.itemsize for module in modules for p in module.parameters())
    memory = size(*(matrix for layer in model.decoder.layers
                    for matrix in (layer.cross_attention.k, layer.cross_attention.v)))
    return size(model.encoder) + memory, size(model.decoder, model.head) - memory


def possible_speedup(teacher, model, tokens=24):
    """The speed-up for one sentence of `tokens` tokens if reading weights took all the time."""
    slow, fast = (once + tokens * each for once, each in map(bytes_read, (teacher, model)))
    return slow / fast


@torch.inference_mode()
@quick_products()
def seconds(model, source, tokens):
    """Seconds to encode `source` (B, S) and decode `tokens` positions greedily, never stopping early."""
    mask, token = source != model.config.pad_token_id, source.new_zeros(len(source))
    wait = partial(torch.cuda.synchronize, source.device) if source.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    memory = model.encode(source).hidden
    cache = Cache(model, memory, mask, tokens)
    for _ in range(tokens):
        token = model.next_logits(token, cache).argmax(-1)
    wait()
    return time.perf_counter() - start


@quick_products()  # as in `layer_seconds`
def speedup(teacher, model, source, tokens=24, rounds=7):
    """How many times faster `model` generates than `teacher`: the ratio of median times over `rounds` rounds, in
    which the two take turns, on `source` (B, S), for the same number of tokens. Both in eval mode on one device."""
    times = [(seconds(teacher, source, tokens), seconds(model, source, tokens)) for _ in range(rounds + 1)][1:]
    return statistics.median(t for t, _ in times) / statistics.median(m for _, m in times)


def export(model, tokenizer_file, folder):
    """Write `model` with its tokenizer as a T5 folder that this project and Hugging Face read. The folder appears only
    when complete; until then it is .FOLDER.part beside it, a name that no model of somebody's has. Raises ValueError if
    it is there already, or if something else has that name."""
    folder, tokenizer = Path(folder), Tokenizer(tokenizer_file)
    part = folder.with_name(f".{folder.name}.part")
    if folder.exists():
        raise ValueError(f"{folder}: is there already: choose another --out, or remove it")
    ours = {"config.json", "generation_config.json", "model.safetensors", "spiece.model", "tokenizer_config.json"}
    if part.exists() and not (part.is_dir() and {f.name.removesuffix(".part") for f in part.iterdir()} <= ours):
        raise ValueError(f"{part}: is in the way, and not what an interrupted export left: choose another --out")
    shutil.rmtree(part, ignore_errors=True)
    try:
        save_t5(model, part)
        tokenizer.save(part)
        write_json({"tokenizer_class": "T5Tokenizer", "extra_ids": tokenizer.sentinels, "eos_token": "</s>",
                    "unk_token": "<unk>", "pad_token": "<pad>"}, part / "tokenizer_config.json")
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@command_line
def main(argv):
    """Choose, build, report and write one assembly, or list what there is."""
    args = parse_args(argv)
    teacher = load_t5(args.run / "teacher")
    bank = load_bank(args.run / "bank.safetensors", teacher).eval()
    teacher, bank = teacher.to(args.device), bank.to(args.device)
    n, prefix = teacher.depths, None
    if args.out:  # what writing needs, before the work
        Tokenizer(args.run / "spiece.model")
        prefix = (args.run / "args.json").exists() and read_json(args.run / "args.json").get("prefix")
    source = torch.randint(3, teacher.config.vocab_size, (args.batch_size, 16), device=args.device)
    if args.encoder is not None:
        paths = {"encoder": parse_path(args.encoder, "--encoder"), "decoder": parse_path(args.decoder, "--decoder")}
    elif args.list or args.strategy == "search":
        paths = search_budget(args, teacher, bank, source)
    elif args.ratio is not None:
        paths = choose(teacher, bank, args.ratio, args.strategy)
    else:
        paths = choose_speedup(teacher, bank, args.speedup, args.strategy, source)
    if args.list:
        return
    model = assemble(teacher, bank, paths)
    layers = [len(paths[stack]) for stack in STACKS]
    for stack in STACKS:
        print(f"{stack}     {','.join(str(b - a) for a, b in paths[stack])}")
    print(f"layers      {layers[0]}+{layers[1]} of {n['encoder']}+{n['decoder']}")
    print(f"ratio       {sum(n.values()) / sum(layers):.2f}x")
    print(f"parameters  {parameters(model):,} of {parameters(teacher):,}")
    reached = speedup(teacher, model, source)
    print(f"speed-up    {reached:.2f}x measured, batch {args.batch_size}, {args.device}; for one sentence "
          f"{possible_speedup(teacher, model):.2f}x by the weights read")
    if args.speedup is not None and reached < args.speedup:
        print(f"note: less than {args.speedup:g}x this time: timings vary; ask for more to be sure")
    if args.out:
        export(model.cpu(), args.run / "spiece.model", args.out)
        print(f"written to  {args.out}")
        if prefix:
            print(f"note: it was trained with {prefix!r} before every source")
        if layers[0] < layers[1]:
            print("note: transformers 5.23 sizes its generation cache by the encoder's layers and fails on a T5 with "
                  "fewer encoder than decoder layers: pass use_cache=False to its generate")


def parse_args(argv):
    """The command line -> argparse.Namespace. Raises ValueError for options that do not go together."""
    parser = Parser(description="Assemble a smaller T5 from a run of train.py.")
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--ratio", type=float, help="compression ratio: the teacher's layers / the assembly's; "
                        "at least this, or by rule the nearest, at most 5 %% off")
    parser.add_argument("--speedup", type=float, help="at least this many times as fast as the teacher on this device: "
                        "predicted from the time of a layer, or by rule measured")
    parser.add_argument("--params", type=count, help="at most so many parameters, such as 40M")
    parser.add_argument("--encoder", help="span lengths, such as 2,2,1,1,6")
    parser.add_argument("--decoder", help="span lengths")
    parser.add_argument("--list", action="store_true", help="list, by estimate, the depths that no faster ones beat")
    parser.add_argument("--strategy", choices=("search", *STRATEGIES), default="search",
                        help="the best of all assemblies, or by rule which layers go first")
    parser.add_argument("--out", type=Path, help="write the model to this folder")
    parser.add_argument("--batch-size", type=int, default=1, help="sentences a batch when measuring speed")
    parser.add_device()
    args = parser.parse_args(argv)
    budgets = [args.ratio is not None, args.speedup is not None, args.params is not None]
    spans = [args.encoder is not None, args.decoder is not None]
    if sum([*budgets, any(spans), args.list]) != 1:
        raise ValueError("give one of --ratio, --speedup, --params, --list, or --encoder with --decoder")
    if any(spans) and not all(spans):
        raise ValueError("--encoder and --decoder go together")
    if (args.params is not None or args.list or any(spans)) and args.strategy != "search":
        option = "--list" if args.list else "--encoder" if any(spans) else "--params"
        raise ValueError(f"{option} goes with --strategy search, not {args.strategy}")
    if args.out and (args.list or args.out.exists()):
        raise ValueError(f"--out {args.out}: " + ("--list writes no model" if args.list else
                                                  "is there already: choose another, or remove it"))
    if args.out and not (parent := next(p for p in args.out.absolute().parents if p.exists())).is_dir():
        raise ValueError(f"--out {args.out}: {parent} is not a folder")
    for option in ("ratio", "speedup"):
        if getattr(args, option) is not None and not getattr(args, option) > 0:
            raise ValueError(f"--{option} {getattr(args, option)}: must be above 0")
    if not 1 <= args.batch_size <= 1 << 20:
        raise ValueError(f"--batch-size {args.batch_size}: must be at least 1, at most {1 << 20}")
    return args


def search_budget(args, teacher, bank, source):
    """The paths of the best assembly within --ratio, --speedup or --params; for --list, the table and no paths. Raises
    ValueError if nothing is within the budget."""
    start = time.perf_counter()
    batches = load_batches(args.run / "valid.safetensors", teacher.config.vocab_size)
    damage, predicted = read_damages(args.run, teacher, bank, batches), ""
    if args.list:
        return print_frontier(teacher, bank, damage, speed_predictor(teacher, source))
    if args.ratio is not None:
        full = sum(teacher.depths.values())
        option, allowed = f"--ratio {args.ratio}", lambda e, d: full / (e + d) >= args.ratio - 0.005  # as it is printed
    elif args.speedup is not None:
        speed = speed_predictor(teacher, source)
        option, allowed = f"--speedup {args.speedup}", lambda e, d: speed(e, d) >= args.speedup
    else:
        option, allowed = f"--params {args.params}", lambda e, d: parameters_of(teacher, e, d) <= args.params
    paths = search(teacher, bank, damage, allowed, batches)
    if paths is None:
        raise ValueError(f"{option}: no assembly of this bank is within it; --list shows what there is")
    if args.speedup is not None:
        predicted = f"; predicted speed-up {speed(*map(len, paths.values())):.2f}x"
    print(f"search      {time.perf_counter() - start:.1f} s through {assemblies(teacher, bank):,} assemblies"
          f"{predicted}")
    return paths


def count(text):
    """"40M" -> 40,000,000; "500K" and plain numbers, too. Raises ArgumentTypeError."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d*)?)([KMB]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text}: not a number such as 40M")
    return round(float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[match[2]])


def assemblies(teacher, bank):
    """How many models this bank makes."""
    return math.prod(count_paths(teacher.depths[stack], bank.spans[stack]) for stack in STACKS)


def print_frontier(teacher, bank, damage, speed):
    """All pairs of depths that no faster pair beats: a Markdown table, from the largest, the teacher unless a model's
    estimate is below 0, to the smallest."""
    best = [(len(paths["encoder"]), len(paths["decoder"]), estimate, paths)
            for estimate, paths in candidates(teacher, bank, damage, lambda e, d: True)]
    print(f"{assemblies(teacher, bank):,} assemblies; worth choosing, by estimated damage in nats a token over "
          "the teacher's layers in the bank's frame:\n\n"
          "| layers | ratio | parameters | predicted speed-up | damage | encoder | decoder |\n"
          "|---|---:|---:|---:|---:|---|---|")
    least, rows = math.inf, []
    # Rounded: speeds that are equal but for the last bit of a fit are equal.
    for e, d, estimate, paths in sorted(best, key=lambda row: (-round(speed(*row[:2]), 6), row[2])):
        if estimate < least:  # slower than all before it, so it must be better
            least = estimate
            spans = " | ".join(",".join(str(b - a) for a, b in paths[stack]) for stack in STACKS)
            rows.append(f"| {e}+{d} | {sum(teacher.depths.values()) / (e + d):.2f}x | "
                        f"{parameters_of(teacher, e, d):,} | {speed(e, d):.2f}x | {estimate:.4f} | {spans} |")
    print("\n".join(rows[::-1]))


def choose_speedup(teacher, bank, wanted, strategy, source):
    """The assembly with the most layers, under a strategy, whose measured speed-up on `source` reaches `wanted`.
    Raises ValueError, naming the largest that was reached, when none does."""
    encoder, decoder = (possible_depths(n, bank.spans[stack]) for stack, n in teacher.depths.items())
    reached = 0.0
    for total in sorted({e + d for e in encoder for d in decoder}, reverse=True):
        paths = choose(teacher, bank, sum(teacher.depths.values()) / total, strategy)
        got = speedup(teacher, assemble(teacher, bank, paths), source)
        if got >= wanted:
            return paths
        reached = max(reached, got)
    raise ValueError(f"--speedup {wanted:g}: no {strategy} assembly is that fast here; the fastest reached "
                     f"{reached:.2f}")


def parse_path(text, option):
    """"2,2,1" -> [(0, 2), (2, 4), (4, 5)]. Raises ValueError naming the option."""
    try:
        lengths = [int(length) for length in text.split(",")]
        if min(lengths) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(f"{option} {text}: not span lengths such as 2,2,1") from None
    return path_of(lengths)


if __name__ == "__main__":
    sys.exit(main())
