"""What each part of the recipe is worth: banks trained with one thing changed, scored on the validation pairs.

    python train.py --out run                          # the toy run, or any other: its teacher and settings are used
    python tests/bench_quality.py run --seeds 0 1      # all variants; rows are kept in RUN/ablation-STEPS.json
    python tests/bench_quality.py run --only recipe "mixed paths" --seeds 0 --steps 470

Not collected by pytest. The test pairs are not scored. A seed is the bank's; the teacher is the run's one. Remove
that file after a change of the recipe.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import distill
from assemble import assemble, depths, path_of_depth
from data import Batches, Tokenizer, encode_pairs
from distill import WEIGHTS, train_modules, train_student, validation_loss
from model import Parser, command_line, load_t5, read_json, write_json
from modules import STACKS, Bank, by_granularity
from train import METRICS, keep_heap, parse_args, read_data, translate


def without(term):
    return {name: weight for name, weight in WEIGHTS.items() if name != term}


# name: what differs. options: of train_modules; grains: what stands in for by_granularity, so which modules the paths
# of a part of the batch are drawn from; tune: steps of fine-tuning each assembly has afterwards, as a share
VARIANTS = {
    "recipe": {},
    "mixed paths": {"grains": lambda spans: [spans]},
    "mixed paths in four parts": {"grains": lambda spans: [spans] * 4},
    "constant rate 1": {"options": {"rate_start": 1.0}},
    "rate rises for 60 %": {"options": {"rate_rise": 0.6}},
    "half the learning rate": {"lr": 0.5},
    "average init": {"init": "average"},
    "with dropout": {"dropout": True},
    "no hidden-state loss": {"options": {"weights": without("hidden")}},
    "no attention loss": {"options": {"weights": without("attention")}},
    "no logit distillation": {"options": {"weights": without("logits")}},
    "granularity 2 alone": {"granularities": [2]},
    "granularity 3 alone": {"granularities": [3]},
    "granularity 6 alone": {"granularities": [6]},
    "tuned after assembling": {"tune": 0.1},
}


@command_line
def main(argv):
    """Train and score what is not in the file yet, then print the table."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of each bank; by default the run's")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    asked = parser.parse_args(argv)
    args = parse_args(["--resume", "--out", str(asked.run)])
    tokenizer, teacher, pairs = Tokenizer(args.out), load_t5(args.out / "teacher").to(args.device), read_data(args)
    args.steps = asked.steps or args.steps
    file = args.out / f"ablation-{args.steps}.json"
    for name in asked.only:
        for seed in asked.seeds:
            rows = read_json(file) if file.exists() else {}
            if f"{name} {seed}" not in rows:
                scores = run(name, seed, args, tokenizer, teacher, pairs)
                rows = read_json(file) if file.exists() else {}  # another process may have added to it
                write_json({**rows, f"{name} {seed}": scores}, file)
    print(table(read_json(file), asked.only))


def run(name, seed, args, tokenizer, teacher, pairs):
    """{"6+6": [validation loss, score on the validation pairs], ...} of the assemblies of a bank trained as the variant
    says, as deep as its modules alone make them."""
    variant, tune = VARIANTS[name], round(args.steps * VARIANTS[name].get("tune", 0.0))
    chosen = variant.get("granularities", args.granularities)
    batches = Batches(encode_pairs(tokenizer, pairs["train"], args.max_length)[0], args.batch_tokens,
                      tokenizer.pad_id, seed)
    bank = Bank(teacher, chosen and dict.fromkeys(STACKS, chosen), variant.get("init", "first"))
    started, options = time.time(), dict(seed=seed, dtype=getattr(torch, args.dtype))
    distill.by_granularity = variant.get("grains", by_granularity)
    if "dropout" in variant:
        bank.train = lambda mode: Bank.train(bank, True)
    train_modules(teacher, bank, batches, args.steps, lr=args.lr * variant.get("lr", 1.0), name=f"{name} {seed}",
                  **options, **variant.get("options", {}))
    Bank.train(bank, False)
    scores = {"seconds": time.time() - started}
    examples = encode_pairs(tokenizer, pairs["valid"], args.max_length)[0]
    valid = Batches(examples, args.batch_tokens, tokenizer.pad_id, seed=0)
    valid = [valid[k] for k in range(len(valid))]
    n = teacher.depths
    for depth in depths(n["encoder"], bank.spans["encoder"])[:-1]:
        if n["encoder"] % depth == 0:
            model = assemble(teacher, bank, {s: path_of_depth(n[s], bank.spans[s], depth) for s in STACKS})
            if tune:
                train_student(model, batches, tune, teacher, lr=args.lr / 3, name=f"{name} {depth}", weights=WEIGHTS,
                              **options)
            outputs = translate(model, [source for source, _ in examples], args, name)
            texts, references = list(map(tokenizer.decode, outputs)), [target for _, target in pairs["valid"]]
            scores[f"{depth}+{depth}"] = [validation_loss(model, valid), METRICS[args.metric](texts, references)]
    print(name, seed, scores, flush=True)
    return scores


def table(rows, names):
    """Markdown: a line a variant, a column an assembly; loss and score, the seeds one after the other."""
    shapes = list(dict.fromkeys(shape for row in rows.values() for shape in row if shape != "seconds"))
    lines = ["| variant | " + " | ".join(shapes) + " |", "|---|" + "---:|" * len(shapes)]
    for name in names:
        seeds = [row for key, row in sorted(rows.items()) if key.rpartition(" ")[0] == name]
        cells = ["; ".join(f"{row[shape][0]:.3f}, {row[shape][1]:.1f}" for row in seeds if shape in row)
                 for shape in shapes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    keep_heap()
    sys.exit(main())
