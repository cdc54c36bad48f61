"""The assembler: one bank, many models. Chooses an encoder and a decoder path and writes the plain T5 they make.

    python assemble.py RUN --ratio 2                                   # half the layers, both stacks shrunk alike
    python assemble.py RUN --ratio 2 --strategy speed-first --out DIR  # half the layers, the decoder's go first
    python assemble.py RUN --encoder 2,2,2,2,2,2 --decoder 6,6         # these spans, in order
    python assemble.py RUN --speedup 2.5                               # the largest model that runs 2.5x as fast
    pytest tests/test_assemble.py
"""
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

from model import Cache, Parser, command_line, load_t5, save_t5, write_json
from modules import STACKS, check_path, load_bank, path_of, with_layers

STRATEGIES = ("size-first", "speed-first")


# ---- choosing a pair of paths

def path_of_depth(n, spans, depth):
    """The path of `depth` layers through a stack of n whose spans are most alike, or None if there is none.

    Of all tilings the one with the smallest sum of squared lengths, that is the least work for the busiest module;
    of equals the one that keeps the lower layers whole, on which all others build. By dynamic programming: best[i, d]
    is the best path of d layers through the first i.
    """
    best = {(0, 0): (0, ())}
    for stop in range(1, n + 1):
        for start, d in [(s, d) for s in range(stop) for d in range(depth)]:
            if (start, d) in best and (stop - start == 1 or (start, stop) in spans):
                cost, path = best[start, d]
                longer = (cost + (stop - start) ** 2, path + ((start, stop),))
                best[stop, d + 1] = min(best.get((stop, d + 1), longer), longer,
                                        key=lambda c: (c[0], [b - a for a, b in c[1]]))
    return list(best[n, depth][1]) if (n, depth) in best else None


def depths(n, spans):
    """The numbers of layers that paths through a stack of n can have, ascending."""
    return [d for d in range(1, n + 1) if path_of_depth(n, spans, d)]


def choose_depths(ratio, strategy, encoder, decoder):
    """(encoder layers, decoder layers) for a compression ratio; `encoder` and `decoder` list the possible depths.

    size-first shrinks both stacks by the same share: of all models with that many layers the most even one.
    speed-first takes the decoder's layers first: they run once a token, the encoder's once a sentence.
    Raises ValueError when no pair comes within 5 % of the ratio, and says which ratios there are.
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
        return min(pairs, key=lambda p: (abs(p[0] / encoder[-1] - p[1] / decoder[-1]), p[1]))
    raise ValueError(f"--strategy {strategy}: not one of {', '.join(STRATEGIES)}")


def choose(bank, teacher, ratio, strategy):
    """The assembly {"encoder": path, "decoder": path} of a ratio under a strategy. Raises as `choose_depths`."""
    n = teacher.depths
    pair = choose_depths(ratio, strategy, *(depths(n[stack], bank.spans[stack]) for stack in STACKS))
    return {stack: path_of_depth(n[stack], bank.spans[stack], d) for stack, d in zip(STACKS, pair)}


# ---- building, measuring, writing

def assemble(teacher, bank, paths):
    """The plain T5 of an assembly: copies of the layers on its paths, of the embedding, the position tables, the norms
    and the head. Raises ValueError for a path that does not tile its stack."""
    for stack in STACKS:
        check_path(paths[stack], teacher.depths[stack], bank.spans[stack])
    return with_layers(teacher, {stack: bank.layers(teacher, stack, paths[stack]) for stack in STACKS})


def parameters(model):
    """The number of parameters, a tied tensor counted once."""
    return sum(p.numel() for p in model.parameters())


def bytes_read(model):
    """(once a sentence, once a token): bytes of weights that generation must read, whatever the implementation.

    Once a sentence the encoder and what makes the cross-attention's keys and values; once a token the rest of the
    decoder and the head, which no compression of layers shrinks. For one sentence the memory's speed is the limit.
    """
    def size(*modules):
        return sum(p.numel() * p.itemsize for module in modules for p in module.parameters())
    memory = size(*(matrix for layer in model.decoder.layers
                    for matrix in (layer.cross_attention.k, layer.cross_attention.v)))
    return size(model.encoder) + memory, size(model.decoder, model.head) - memory


def possible_speedup(teacher, model, tokens=24):
    """The speed-up for one sentence of `tokens` tokens if reading weights took all the time."""
    slow, fast = (once + tokens * each for once, each in map(bytes_read, (teacher, model)))
    return slow / fast


@torch.inference_mode()
def seconds(model, source, tokens):
    """Seconds to encode `source` (B, S) and decode `tokens` positions greedily, never stopping early."""
    mask, token = source != model.config.pad_token_id, source.new_zeros(len(source), 1)
    wait = torch.cuda.synchronize if source.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    memory = model.encode(source).hidden
    cache = Cache(model, memory, mask, tokens)
    for _ in range(tokens):
        token = model.logits(model.decode(token, None, None, cache=cache).hidden).argmax(-1)
    wait()
    return time.perf_counter() - start


def speedup(teacher, model, source, tokens=24, rounds=7):
    """How many times faster `model` generates than `teacher`: the ratio of median times over `rounds` rounds, in
    which the two take turns, on `source` (B, S), for the same number of tokens. Both in eval mode on one device."""
    times = [(seconds(teacher, source, tokens), seconds(model, source, tokens)) for _ in range(rounds + 1)][1:]
    return statistics.median(t for t, _ in times) / statistics.median(m for _, m in times)


def export(model, tokenizer_file, folder):
    """Write `model` with its tokenizer as a T5 folder that this project and Hugging Face read. The folder appears only
    when complete. Raises ValueError if it is there already."""
    folder, part = Path(folder), Path(f"{folder}.part")
    if folder.exists():
        raise ValueError(f"{folder}: is there already: choose another --out, or remove it")
    shutil.rmtree(part, ignore_errors=True)
    try:
        save_t5(model, part)
        shutil.copyfile(tokenizer_file, part / "spiece.model")
        write_json({"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "eos_token": "</s>", "unk_token": "<unk>",
                    "pad_token": "<pad>"}, part / "tokenizer_config.json")
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@command_line
def main(argv):
    """Choose, build, report and write one assembly."""
    parser = Parser(description="Assemble a smaller T5 from a run of train.py.")
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--ratio", type=float, help="compression ratio: the teacher's layers / the assembly's")
    parser.add_argument("--strategy", choices=STRATEGIES, default="size-first", help="which layers go first")
    parser.add_argument("--speedup", type=float, help="the largest model at least this many times as fast, measured")
    parser.add_argument("--encoder", help="span lengths, such as 2,2,1,1,6")
    parser.add_argument("--decoder", help="span lengths")
    parser.add_argument("--out", type=Path, help="write the model to this folder")
    parser.add_argument("--batch-size", type=int, default=1, help="sentences a batch when measuring speed")
    parser.add_device()
    args = parser.parse_args(argv)
    if sum([args.ratio is not None, args.speedup is not None, bool(args.encoder or args.decoder)]) != 1:
        raise ValueError("give one of --ratio, --speedup, or --encoder with --decoder")
    if args.out and args.out.exists():
        raise ValueError(f"{args.out}: is there already: choose another --out, or remove it")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: must be at least 1")
    teacher = load_t5(args.run / "teacher")
    bank = load_bank(args.run / "bank.safetensors", teacher).eval()
    teacher, bank = teacher.to(args.device), bank.to(args.device)
    source = torch.randint(3, teacher.config.vocab_size, (args.batch_size, 16), device=args.device)

    if args.ratio is not None:
        paths, reached = choose(bank, teacher, args.ratio, args.strategy), None
    elif args.speedup is not None:
        paths, reached = choose_speedup(bank, teacher, args.speedup, args.strategy, source)
    else:
        if not (args.encoder and args.decoder):
            raise ValueError("--encoder and --decoder go together")
        paths = {"encoder": parse_path(args.encoder, "--encoder"), "decoder": parse_path(args.decoder, "--decoder")}
        reached = None
    model = assemble(teacher, bank, paths)
    layers = [len(paths[stack]) for stack in STACKS]
    full = list(teacher.depths.values())
    for stack in STACKS:
        print(f"{stack}     {','.join(str(b - a) for a, b in paths[stack])}")
    print(f"layers      {layers[0]}+{layers[1]} of {full[0]}+{full[1]}")
    print(f"ratio       {sum(full) / sum(layers):.2f}x")
    print(f"parameters  {parameters(model):,} of {parameters(teacher):,}")
    reached = reached or speedup(teacher, model, source)
    print(f"speed-up    {reached:.2f}x measured, batch {args.batch_size}, {args.device}; for one sentence "
          f"{possible_speedup(teacher, model):.2f}x by the weights read")
    if args.out:
        export(model.cpu(), args.run / "spiece.model", args.out)
        print(f"written to  {args.out}")
        if layers[0] < layers[1]:
            print("note: transformers 5.23 sizes its generation cache by the encoder's layers and fails on a T5 with "
                  "fewer encoder than decoder layers: pass use_cache=False to its generate")


def choose_speedup(bank, teacher, wanted, strategy, source):
    """The assembly with the most layers, under a strategy, whose measured speed-up on `source` reaches `wanted`, and
    that speed-up. Raises ValueError, naming the largest that was reached, when none does."""
    n = teacher.depths
    pairs = [depths(n[stack], bank.spans[stack]) for stack in STACKS]
    totals = sorted({e + d for e in pairs[0] for d in pairs[1]}, reverse=True)
    reached = 0.0
    for total in totals:
        paths = choose(bank, teacher, sum(n.values()) / total, strategy)
        got = speedup(teacher, assemble(teacher, bank, paths), source)
        if got >= wanted:
            return paths, got
        reached = max(reached, got)
    raise ValueError(f"--speedup {wanted:g}: no {strategy} assembly is that fast here; the fastest reached "
                     f"{reached:.2f}")


def parse_path(text, option):
    """"2,2,1" -> [(0, 2), (2, 4), (4, 5)]. Raises ValueError naming the option."""
    try:
        return path_of([int(length) for length in text.split(",")])
    except ValueError:
        raise ValueError(f"{option} {text}: not span lengths such as 2,2,1") from None


if __name__ == "__main__":
    sys.exit(main())
