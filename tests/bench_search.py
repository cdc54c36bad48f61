"""Is the assembler's estimate any good? Random assemblies, and the search against both rules, on validation pairs.

    python train.py --out run                  # or any other run that has finished
    python tests/bench_search.py run --random 60

Prints the rank correlation (Spearman) of the estimated damage with the divergence from the teacher, and with the loss,
on validation pairs that the estimate has not seen, how far the predicted speed-ups are off, and for five budgets each
rule's assembly beside the one that the search finds at the same predicted speed. The test pairs are not touched. Not
collected by pytest.
"""
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from assemble import (STRATEGIES, assemble, assemblies, choose, divergences, load_batches, path_damage,
                      read_damages, search, speed_predictor, speedup)
from data import Batches, Tokenizer, encode_pairs
from distill import validation_loss
from model import Parser, command_line, load_t5
from modules import STACKS, load_bank, sample_path
from train import METRICS, keep_heap, parse_args, probe_rows, read_data, translate


def spearman(x, y):
    """The correlation of the ranks of two sequences; equal values share the mean of their ranks."""
    def ranks(values):
        _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[which]
    return np.corrcoef(ranks(x), ranks(y))[0, 1]


def draw(teacher, bank, n):
    """n distinct assemblies, from hardly any module to modules alone; not the teacher itself."""
    if not 2 < n < assemblies(teacher, bank) / 2:
        raise ValueError(f"--random {n}: above 2, and below half of {assemblies(teacher, bank)}")
    rng, drawn, whole = random.Random(0), [], sum(teacher.depths.values())
    while len(drawn) < n:
        rate = rng.random()
        paths = {stack: sample_path(teacher.depths[stack], bank.spans[stack], rate, rng) for stack in STACKS}
        if paths not in drawn and sum(map(len, paths.values())) < whole:
            drawn.append(paths)
    return drawn


@command_line
def main(argv):
    """Print both tables."""
    parser = Parser(description="The estimate against the truth.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--random", type=int, default=60, help="random assemblies")
    asked = parser.parse_args(argv)
    args = parse_args(["--resume", "--out", str(asked.run)])
    teacher, tokenizer = load_t5(args.out / "teacher").to(args.device), Tokenizer(args.out)
    bank = load_bank(args.out / "bank.safetensors", teacher).to(args.device).eval()
    probe = load_batches(args.out / "valid.safetensors", teacher.config.vocab_size)
    valid = read_data(args)["valid"]
    unseen = [valid[i] for i in sorted({*range(len(valid))} - {*probe_rows(len(valid))})]
    if not unseen:
        raise ValueError(f"{args.valid}: the search has seen all {len(valid)} pairs: none are left to judge it by")
    examples = encode_pairs(tokenizer, unseen, args.max_length)[0]
    batches = Batches(examples, args.batch_tokens, tokenizer.pad_id, seed=0)
    batches = [batches[k] for k in range(len(batches))]
    start, known = time.perf_counter(), (args.out / "damage.json").exists()
    damage = read_damages(args.out, teacher, bank, probe)
    source = torch.randint(3, teacher.config.vocab_size, (1, 16), device=args.device)
    predict = speed_predictor(teacher, source)
    print(f"{assemblies(teacher, bank):,} assemblies; measuring {'' if known else 'modules and '}layers "
          f"{time.perf_counter() - start:.1f} s\n")

    def speed(paths):
        return predict(*(len(paths[stack]) for stack in STACKS))

    def estimate(paths):
        return sum(path_damage(damage[stack])(*pair) for stack in STACKS
                   for pair in zip([None, *paths[stack]], paths[stack]))

    def divergence(assemblies):
        return divergences(teacher, [(bank.frame, bank.layers(teacher, paths)) for paths in assemblies], batches)

    def loss(paths):
        return validation_loss(assemble(teacher, bank, paths), batches)

    drawn = draw(teacher, bank, asked.random)
    guess = list(map(estimate, drawn))
    print("rank correlation of the estimate with divergence and loss over {} random assemblies: {:.3f}, {:.3f}".format(
        len(drawn), spearman(guess, divergence(drawn)), spearman(guess, list(map(loss, drawn)))))
    off = [abs(speed(paths) / speedup(teacher, assemble(teacher, bank, paths), source) - 1)
           for paths in drawn[:12]]
    print(f"predicted speed-up off the measured one, 12 of them: median {100 * statistics.median(off):.0f} %, "
          f"at most {100 * max(off):.0f} %\n")

    def row(name, paths, far):
        model = assemble(teacher, bank, paths)
        outputs = translate(model, [source for source, _ in examples], 1, args, name)
        quality = METRICS[args.metric]([tokenizer.decode(ids) for ids in outputs], [target for _, target in unseen])
        e, d = model.depths.values()
        return f"{e}+{d} | {speed(paths):.2f}x | {far:.3f} | {loss(paths):.3f} | {quality:.1f}"
    head = f"layers | speed-up | divergence | loss | {args.metric}"
    print(f"| rule | its {head} | the search's {head} | seconds |\n"
          "|---|---|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|")
    for strategy in STRATEGIES:
        for ratio in (1.2, 1.5, 2, 3, 4):
            try:
                rule = choose(teacher, bank, ratio, strategy)
            except ValueError:  # no assembly of this bank comes near this ratio
                continue
            start = time.perf_counter()
            found = search(teacher, bank, damage, lambda e, d: predict(e, d) >= speed(rule) - 1e-9, probe)
            took = time.perf_counter() - start
            columns = map(row, ("rule", "search"), (rule, found), divergence([rule, found]))
            print(f"| {strategy} {ratio}x | {' | '.join(columns)} | {took:.1f} |", flush=True)


if __name__ == "__main__":
    keep_heap()
    sys.exit(main())
