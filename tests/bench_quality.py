"""What each part of the recipe is worth: banks trained with one thing changed, scored on the validation pairs.

    python train.py --out run                          # the toy run, or any other: its teacher and settings are used
    python tests/bench_quality.py run --seeds 0 1      # all variants; rows are kept in RUN/ablation.json
    python tests/bench_quality.py run --only recipe "equal chances" --seeds 0

Not collected by pytest. The test pairs are not scored. A seed is the bank's; the teacher is the run's one. Remove
ablation.json after a change of the recipe.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import distill
from assemble import assemble, depths, path_of_depth
from data import Batches, Tokenizer, encode_pairs
from distill import WEIGHTS, train_modules
from model import Parser, command_line, load_t5, read_json, write_json
from modules import STACKS, Bank, sample_path
from train import METRICS, keep_heap, parse_args, read_data, translate


class EqualChances:
    """A random generator whose weighted choice ignores the weights: every module that starts here alike."""
    def __init__(self, rng):
        self.rng, self.random = rng, rng.random

    def choices(self, population, weights):
        return [self.rng.choice(population)]


def without(term):
    return {name: weight for name, weight in WEIGHTS.items() if name != term}


def equal_chances(n, spans, rate, rng):
    return sample_path(n, spans, rate, EqualChances(rng))


# name: (init of the bank, options of train_modules, what stands in for sample_path, dropout in modules)
VARIANTS = {
    "recipe": ("first", {}, sample_path, False),
    "average init": ("average", {}, sample_path, False),
    "equal chances": ("first", {}, equal_chances, False),
    "with dropout": ("first", {}, sample_path, True),
    "constant rate 1": ("first", {"rate_start": 1.0}, sample_path, False),
    "no hidden-state loss": ("first", {"weights": without("hidden")}, sample_path, False),
    "no attention loss": ("first", {"weights": without("attention")}, sample_path, False),
    "attention loss x 10": ("first", {"weights": {**WEIGHTS, "attention": 1.0}}, sample_path, False),
    "no logit distillation": ("first", {"weights": without("logits")}, sample_path, False),
}


@command_line
def main(argv):
    """Train and score what is not in RUN/ablation.json yet, then print the table."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    asked = parser.parse_args(argv)
    args = parse_args(["--resume", "--out", str(asked.run)])
    tokenizer, teacher, pairs = Tokenizer(args.out), load_t5(args.out / "teacher").to(args.device), read_data(args)
    file = args.out / "ablation.json"
    for name in asked.only:
        for seed in asked.seeds:
            rows = read_json(file) if file.exists() else {}
            if f"{name} {seed}" not in rows:
                scores = run(name, seed, args, tokenizer, teacher, pairs)
                rows = read_json(file) if file.exists() else {}  # another process may have added to it
                write_json({**rows, f"{name} {seed}": scores}, file)
    print(table(read_json(file), asked.only))


def run(name, seed, args, tokenizer, teacher, pairs):
    """{"3+3": score on the validation pairs, ...} of the assemblies of a bank trained as the variant says."""
    init, options, sampler, dropout = VARIANTS[name]
    batches = Batches(encode_pairs(tokenizer, pairs["train"], args.max_length)[0], args.batch_tokens,
                      tokenizer.pad_id, seed)
    bank = Bank(teacher, args.granularities and dict.fromkeys(STACKS, args.granularities), init)
    started = time.time()
    distill.sample_path = sampler
    if dropout:
        bank.train = lambda mode: Bank.train(bank, True)
    train_modules(teacher, bank, batches, args.steps, seed=seed, lr=args.lr, name=f"{name} {seed}",
                  dtype=getattr(torch, args.dtype), **options)
    Bank.train(bank, False)
    sources = [source for source, _ in encode_pairs(tokenizer, pairs["valid"], args.max_length)[0]]
    n = teacher.depths
    scores = {"seconds": time.time() - started}
    for depth in depths(n["encoder"], bank.spans["encoder"])[:-1]:
        if n["encoder"] % depth == 0:
            model = assemble(teacher, bank, {s: path_of_depth(n[s], bank.spans[s], depth) for s in STACKS})
            outputs = [tokenizer.decode(ids) for ids in translate(model, sources, args, name)]
            scores[f"{depth}+{depth}"] = METRICS[args.metric](outputs, [target for _, target in pairs["valid"]])
    print(name, seed, {key: round(value, 1) for key, value in scores.items()}, flush=True)
    return scores


def table(rows, names):
    """Markdown: a line a variant, a column an assembly, the seeds' scores side by side."""
    shapes = [key for key in next(iter(rows.values())) if key != "seconds"]
    lines = ["| variant | " + " | ".join(shapes) + " |", "|---|" + "---:|" * len(shapes)]
    for name in names:
        seeds = [row for key, row in sorted(rows.items()) if key.rpartition(" ")[0] == name]
        cells = [", ".join(f"{row[shape]:.1f}" for row in seeds) for shape in shapes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    keep_heap()
    sys.exit(main())
