"""The evidence: all that the README says about quality, measured.

    python train.py --train ... --out RUN                    # any run: its teacher, data and settings are used
    python tests/bench_quality.py RUN                        # everything, seed 0; again: what is not there yet
    python tests/bench_quality.py RUN main --seeds 0 1       # a bank and fifteen students a seed, on the test pairs
    python tests/bench_quality.py RUN beam --seeds 0 1       # their scores with four beams
    python tests/bench_quality.py RUN little --steps 235     # fewer of them, from 1,000, 3,000, 10,000 and all pairs
    python tests/bench_quality.py RUN ablations --steps 470  # one thing changed at a time, on the validation pairs
    python tests/bench_quality.py RUN tuned                  # assemblies distilled alone for a tenth of the steps more
    python tests/bench_quality.py RUN speed                  # speed-ups of main's models, when nothing else runs, on
                                                             # the GPU if there is one (CUDA_VISIBLE_DEVICES= hides it)
    python tests/bench_quality.py RUN teacher                # Hugging Face's T5 instead of ours (needs transformers)

Results are in RUN/study/results.json, models and the picture beside it, and tables of them are printed at the end. A
seed is that of the bank or student, its batches and its sample of pairs; the teacher is the run's one, and so is the
bank of the run's seed. Several processes may work on one run, with a seed each, or parts that train nothing in common:
beam and tuned come after main. Not collected by pytest. Remove RUN/study after a change of the recipe, of the run's
bank or of its settings.
"""
import argparse
import fcntl
import importlib.util
import math
import random
import sys
import time
from itertools import product
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from assemble import assemble, divergences, even_paths, export, parameters, possible_depths, speedup
from data import Batches, Tokenizer, encode_pairs
from distill import CE_ONLY, WEIGHTS, cross_entropy, fit, shift_right, train_modules, train_student, validation_loss
from model import Parser, command_line, load_t5, new_file, read_json, save_t5, write_json
from modules import STACKS, default_granularities, load_bank, module_spans, save_bank, with_layers
from train import (BASELINES, METRICS, PSEUDO_BEAMS, ended, frontier, keep_heap, new_bank, parse_args, parse_baselines,
                   read_data, relabel, study_shapes, train_baseline, translate)

PARTS = ("main", "beam", "little", "ablations", "tuned", "teacher", "speed")
LITTLE = (1000, 3000, 10000)


def without(term):
    return {name: weight for name, weight in WEIGHTS.items() if name != term}


# name: what differs. settings: train.py's; options: of train_modules. "Its rows": as many as in the recipe,
# which two paths on all rows cannot have: a step might run none
VARIANTS = {
    "recipe": {},
    "rate 1 from the start": {"options": {"rate_start": 1.0}},
    "modules as copies, not calibrated": {"settings": {"init": "copy"}},
    "calibrated, not trained": {"settings": {"steps": 0}},
    "modules as the mean of their layers": {"settings": {"init": "average"}},
    "no hidden-state loss": {"options": {"weights": without("hidden")}},
    "no attention loss": {"options": {"weights": without("attention")}},
    "a quarter of the logit distillation": {"options": {"weights": {**WEIGHTS, "logits": 0.25}}},
    "no logit distillation": {"options": {"weights": without("logits")}},
    "dropout": {"options": {"dropout": True}},
    "the frame at the full rate": {"options": {"frame_lr": 1.0}},
    "two paths a step": {"settings": {"paths": "two"}},
    "granularity 2 alone": {"settings": {"granularities": [2]}},
    "granularity 2 alone, its rows": {"settings": {"granularities": [2], "paths": None}, "its rows": True},
    "granularity 6 alone": {"settings": {"granularities": [6]}},
    "granularity 6 alone, its rows": {"settings": {"granularities": [6], "paths": None}, "its rows": True},
    "granularities 2, 3, 6": {"settings": {"granularities": [2, 3, 6]}},
}


@command_line
def main(argv):
    """Train and score what is not in the file yet, then print the tables."""
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all but teacher by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="in little, ablations and teacher; by default the run's of each")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="these ablations")
    parser.add_argument("--students", help='in main, such as "sft:6+6,kd:2+2"; by default all five kinds at 2x, 3x, 6x')
    asked = parser.parse_args(argv)
    for part in set(asked.parts) - set(PARTS):
        raise ValueError(f"{part}: not one of {', '.join(PARTS)}")
    if asked.steps is not None and asked.steps < 1:
        raise ValueError(f"--steps {asked.steps}: must be at least 1")
    if "teacher" in asked.parts and not importlib.util.find_spec("transformers"):
        raise ValueError("teacher: compares with transformers, which is not installed")
    study, parts = Study(asked.run, asked.steps), asked.parts or [part for part in PARTS if part != "teacher"]
    if not study.own_steps and {"main", "beam", "tuned"} & set(parts):
        raise ValueError("--steps: main, beam and tuned take those of the run; train another one with other --steps")
    for name in asked.only or ():
        if not study.has(name):
            raise ValueError(f"--only {name}: not of a teacher of this depth, or what the run has anyway")
    if "teacher" in parts and study.args.teacher:
        raise ValueError("teacher: compares teachers from scratch; this run's was fine-tuned")
    for part in parts:
        for seed in asked.seeds if part != "speed" else [0]:
            if part == "main":
                for title, name, model in models(study, seed, asked.students):
                    study.measured(title, name, seed, lambda: study.score(model(), "test"))
            elif part == "beam":
                for title, name, model in models(study, seed, asked.students):
                    if title == "main":
                        study.measured("beam 4", name, seed, lambda: {"score": study.metric(model(), "test", 4)[1]})
            elif part == "little":
                little_data(study, seed)
            elif part == "ablations":
                for name in asked.only or filter(study.has, VARIANTS):
                    study.measured(f"ablation {study.args.steps}", name, seed, lambda: ablation(study, name, seed))
            elif part == "tuned":
                tuned(study, seed)
            elif part == "teacher":
                reference_teacher(study, seed)
            else:
                speed(study)
    results = study.results()
    for title in dict.fromkeys(key.partition("|")[0] for key in results):
        if title != "beam 4" and not title.startswith("speed"):  # columns of main
            print(f"\n{title}\n" + table(results, title))
    write_picture(results, study)


class Study:
    """A run's data, tokenizer, teacher and settings, and what has been measured of it."""
    def __init__(self, run, steps):
        self.args = parse_args(["--resume", "--out", str(run)])
        self.own_steps = steps in (None, self.args.steps)
        self.args.steps, self.teacher_steps = steps or self.args.steps, steps or self.args.teacher_steps
        self.folder = run / "study"
        self.folder.mkdir(exist_ok=True)
        self.file = self.folder / "results.json"
        self.tokenizer, self.pairs = Tokenizer(run), read_data(self.args)
        self.teacher = load_t5(run / "teacher").to(self.args.device)
        self.examples = {name: encode_pairs(self.tokenizer, pairs, self.args.max_length)[0]
                         for name, pairs in self.pairs.items()}
        self.teacher_outputs, self.checkpoints = {}, []  # by set; of what this process trains
        self.teacher_labels = None  # for the validation sources

    def has(self, name):
        """Can this teacher have the modules of that ablation, and are they others than those it has anyway?"""
        chosen, depths = VARIANTS[name].get("settings", {}).get("granularities", []), self.teacher.depths.values()
        return not any(n % g for g in chosen for n in depths) and any(self.granularities(n) != chosen for n in depths)

    def granularities(self, n):
        """Those of the run's bank in a stack of n layers."""
        return self.args.granularities or default_granularities(n)

    def settings(self, **changes):
        """The run's, with some changes."""
        return argparse.Namespace(**{**vars(self.args), **changes})

    def sizes(self):
        """(encoder, decoder) depths at 2x, 3x and 6x, those that the run's bank can make."""
        depths = self.teacher.depths.values()
        possible = [possible_depths(n, module_spans(n, self.granularities(n))) for n in depths]
        return [tuple(n // k for n in depths) for k in (2, 3, 6)
                if all(n % k == 0 and n // k in found for n, found in zip(depths, possible))]

    def batches(self, examples, seed):
        return Batches(examples, self.args.batch_tokens, self.tokenizer.pad_id, seed)

    def results(self):
        """{"table|row|seed": {...}, ...}: what there is."""
        return read_json(self.file) if self.file.exists() else {}

    def measured(self, title, row, seed, measure):
        """That entry of the file, measured now if it is not there. The teacher has one, whatever the seed."""
        key = f"{title}|{row}|{self.args.seed if row == 'teacher' else seed}"
        if key not in self.results():
            value = {**measure(), "date": time.strftime("%Y-%m-%d")}
            with open(self.folder / "lock", "w") as lock:  # one process at a time, and read again: others add to it
                fcntl.flock(lock, fcntl.LOCK_EX)
                write_json({**self.results(), key: value}, self.file)
            print(key, value, flush=True)
        while self.checkpoints:  # what they were of is kept by now
            self.checkpoints.pop().unlink(missing_ok=True)
        return self.results()[key]

    def train(self, seed, targets, rows=None):
        """{"data": Batches, "teacher": Batches}, as `train_baseline` takes them, with those of the two that `targets`
        names, of all training pairs or of some rows."""
        pairs = self.batches(self.examples["train"], seed)
        found = {name: pairs if name == "data" else relabel(self.teacher, pairs, self.args) for name in targets}
        if rows is None:
            return found
        return {name: self.batches([batches.examples[row] for row in rows], seed) for name, batches in found.items()}

    def bank(self, name, batches, seed):
        """The bank of that name, trained if it is not there. That of the run's own seed and steps is the run's."""
        own = self.own_steps and name == f"bank-{self.args.seed}"
        file = self.args.out / "bank.safetensors" if own else self.folder / f"{name}.safetensors"
        if not file.exists():
            bank = new_bank(self.teacher, batches[self.args.targets], self.args)
            train_modules(self.teacher, bank, batches[self.args.targets], self.args.steps, lr=self.args.lr, name=name,
                          two_paths=self.args.paths == "two", **self.loop(name, seed))
            save_bank(bank, file)
        return load_bank(file, self.teacher).to(self.args.device).eval()

    def student(self, kind, encoder, decoder, name, batches, seed, **changes):
        """The static student of that name, trained, with those changes of the settings, if it is not there."""
        folder = self.folder / name
        if not folder.exists():
            model = train_baseline(kind, encoder, decoder, self.teacher, batches, self.settings(**changes), name,
                                   self.loop(name, seed), lambda model: self.score(model, "valid", False)["loss"])
            export(model, self.args.out / "spiece.model", folder)
        return load_t5(folder).to(self.args.device)

    def loop(self, name, seed):
        """The options of `fit`. A checkpoint of its own, so that another process may train something else."""
        self.checkpoints.append(self.folder / f"{name}.{seed}.pt")
        return dict(seed=seed, dtype=getattr(torch, self.args.dtype), checkpoint=self.checkpoints[-1])

    def metric(self, model, part, beams):
        """(what the model makes of a set's sources, lists of ids; the run's metric of it)."""
        outputs = translate(model, [source for source, _ in self.examples[part]], beams, self.args, part)
        return outputs, METRICS[self.args.metric](list(map(self.tokenizer.decode, outputs)),
                                                  [target for _, target in self.pairs[part]])

    def score(self, model, part, generate=True):
        """{"loss": nats a token, "greedy": the run's metric, "identical": % of these outputs that are the teacher's,
        word for word, and the model's size}."""
        batches = self.batches(self.examples[part], seed=0)
        scores = {**model.depths, "parameters": parameters(model),
                  "loss": validation_loss(model.eval(), [batches[k] for k in range(len(batches))])}
        if generate:
            outputs, scores["greedy"] = self.metric(model, part, 1)
            if part not in self.teacher_outputs:
                self.teacher_outputs[part], _ = self.metric(self.teacher, part, 1)
            same = sum(a == b for a, b in zip(outputs, self.teacher_outputs[part]))
            scores["identical"] = 100 * same / len(outputs)
        return scores

    def imitation(self, model):
        """{"imitation": cross-entropy of what the teacher, with the beams of the pseudo-labels, makes of the validation
        sources, "divergence": from its probabilities there}, in nats a token. Banks of two seeds differ by some 0.003
        in these, where BLEU differs by half a point."""
        if self.teacher_labels is None:
            eos, sources = self.teacher.config.eos_token_id, [source for source, _ in self.examples["valid"]]
            outputs = translate(self.teacher, sources, PSEUDO_BEAMS, self.args, "valid")
            batches = self.batches([(source, ended(ids, eos, self.args.max_length))
                                    for source, ids in zip(sources, outputs)], seed=0)
            self.teacher_labels = [batches[k] for k in range(len(batches))]
        return {"imitation": validation_loss(model.eval(), self.teacher_labels),
                "divergence": divergences(self.teacher, [(model, None)], self.teacher_labels)[0]}

    def assembly(self, bank, encoder, decoder):
        """The most even one of those depths."""
        return assemble(self.teacher, bank, even_paths(self.teacher, bank, encoder, decoder))


def models(study, seed, students):
    """All models of the main table and of the grid of depths: (table, name, function that gives the model, trained if
    it is not there). The teacher; a bank's assemblies; static students."""
    n = study.teacher.depths
    if students is None:
        students = ",".join(f"{kind}:{e}+{d}" for e, d in study.sizes() for kind in BASELINES)
    students = parse_baselines(students)
    train = study.train(seed, {"data", study.args.targets} | {"teacher" for kind, _, _ in students if kind == "pseudo"})
    bank = study.bank(f"bank-{seed}", train, seed)
    grid = [[n[stack] // k for k in (6, 3, 2, 1) if n[stack] // k in possible_depths(n[stack], bank.spans[stack])]
            for stack in STACKS]
    yield "main", "teacher", lambda: study.teacher
    shapes = study_shapes(study.teacher, bank)
    for e, d in dict.fromkeys(shapes + [(e, d) for e in grid[0] for d in grid[1]]):
        if (e, d) != tuple(n.values()):
            yield "main" if (e, d) in shapes else "grid", f"assembly {e}+{d}", lambda: study.assembly(bank, e, d)
    for kind, e, d in students:
        yield "main", f"{kind} {e}+{d}", lambda: study.student(kind, e, d, f"{kind}-{e}+{d}-{seed}", train, seed)


def little_data(study, seed):
    """The teacher has seen all pairs; what compresses it sees a few. The largest and the smallest size."""
    steps, sizes, everything = study.args.steps, study.sizes(), range(len(study.pairs["train"]))
    for k in (*(k for k in LITTLE if k < len(everything)), len(everything)):
        batches = study.train(seed, {"data", study.args.targets}, random.Random(seed).sample(everything, k))
        title, kinds = f"little {steps}", ("bank", "sft", "kd", "calibrated", "kd without dropout")
        for kind, (e, d) in product(kinds, dict.fromkeys(sizes[:1] + sizes[-1:])):
            def score():
                name = f"{kind}-{e}+{d}-{k}-{steps}-{seed}"
                if kind == "bank":
                    bank = study.bank(f"bank-{k}-{steps}-{seed}", batches, seed)
                    model = study.assembly(bank, e, d)
                elif kind == "kd without dropout":  # as a bank trains
                    model = study.student("kd", e, d, name, batches, seed, baseline_dropout="off")
                else:
                    model = study.student(kind, e, d, name, batches, seed)
                return {**study.score(model, "test"), "valid": study.score(model, "valid")}
            study.measured(title, f"{k:,} {kind} {e}+{d}", seed, score)


def ablation(study, name, seed):
    """{"6+6": {...}, ...}: `Study.score` and `Study.imitation`, on the validation pairs, of the main table's assemblies
    of a bank trained as the variant says; the metric only of those that modules alone make.

    Its rows: in the recipe the granularities share two batches in proportion, 2 * g / (1 + 2 + 3 + 4 + 6) of one for g
    of 12 layers; beside granularity 1 alone that takes 2 * (1 + g) / 16 passes."""
    variant, teacher = VARIANTS[name], study.teacher
    args = study.settings(**variant.get("settings", {}))
    options = dict(variant.get("options", {}))
    if "its rows" in variant:
        usual = study.granularities(teacher.depths["decoder"])
        options["passes"] = 2 * (1 + sum(args.granularities)) / (1 + sum(usual))
    batches = study.train(seed, {args.targets})[args.targets]
    bank = new_bank(teacher, batches, args)
    loop, started = study.loop(f"{name}-{study.args.steps}", seed), time.time()
    resumed = loop["checkpoint"].exists()
    train_modules(teacher, bank, batches, args.steps, lr=args.lr, name=f"{name} {seed}",
                  two_paths=args.paths == "two", **loop, **options)
    scores, n = {"seconds": None if resumed else time.time() - started}, teacher.depths
    for e, d in study_shapes(teacher, bank):
        model = study.assembly(bank, e, d)
        scores[f"{e}+{d}"] = study.score(model, "valid", e == d and n["encoder"] % e == 0) | study.imitation(model)
    return scores


def tuned(study, seed):
    """What the paper does without: an assembly, once chosen, learns on as a KD student does, for a tenth of the bank's
    steps at a third of its rate. On the validation pairs."""
    args, train = study.args, study.train(seed, {study.args.targets})
    bank = study.bank(f"bank-{seed}", train, seed)
    for e, d in study.sizes():
        def score():
            model = study.assembly(bank, e, d)
            train_student(model, train[args.targets], round(args.steps / 10), study.teacher, lr=args.lr / 3,
                          name=f"tuned {e}+{d}", **study.loop(f"tuned-{e}+{d}", seed))
            return study.score(model, "valid")
        study.measured("tuned", f"assembly {e}+{d}", seed, lambda: study.score(study.assembly(bank, e, d), "valid"))
        study.measured("tuned", f"tuned {e}+{d}", seed, score)


def reference_teacher(study, seed):
    """Our T5 and Hugging Face's, each from its own start, in the same loop on the same batches, scored alike."""
    from transformers import T5Config as Config, T5ForConditionalGeneration
    batches, config = study.train(seed, {"data"})["data"], study.teacher.config
    steps, lr = study.teacher_steps, study.args.teacher_lr

    def theirs():
        torch.manual_seed(seed)
        folder = study.folder / f"hugging-face-{steps}-{seed}"
        save_t5(study.teacher, folder)  # for its config
        model = T5ForConditionalGeneration(Config.from_pretrained(folder)).to(study.args.device).train()

        def step_loss(step, source, target):
            logits = model(input_ids=source, attention_mask=source != config.pad_token_id,
                           decoder_input_ids=shift_right(target, config)).logits
            real = target != config.pad_token_id
            return {"ce": cross_entropy(logits[real].float().log_softmax(-1), target[real])}, {}
        fit(model, step_loss, batches, steps, weights=CE_ONLY, lr=lr, name="hugging face",
            **study.loop(f"hugging-face-{steps}", seed))
        model.save_pretrained(folder)
        return study.score(load_t5(folder).to(study.args.device), "valid")

    def ours():
        if (steps, seed) == (study.args.teacher_steps, study.args.seed):  # the run's own, before it learnt from itself
            first = study.args.out / "first-teacher"
            return study.score(load_t5(first).to(study.args.device) if first.exists() else study.teacher, "valid")
        torch.manual_seed(seed)
        model = type(study.teacher)(config).to(study.args.device)
        train_student(model, batches, steps, lr=lr, name="ours", **study.loop(f"ours-{steps}", seed))
        return study.score(model, "valid")
    for name, measure in (("ours", ours), ("hugging face", theirs)):
        study.measured(f"teacher {steps}", name, seed, measure)


def speed(study):
    """Speed-ups over the teacher at batch 1, greedy, one per shape: models of a shape are equally fast. Those on a GPU
    are kept beside those on a CPU."""
    title = speed_title(study.args.device)
    source = torch.tensor([study.examples["test"][len(study.examples["test"]) // 2][0]], device=study.args.device)
    shapes = {(r["encoder"], r["decoder"]) for key, r in study.results().items() if key.startswith(("main|", "grid|"))}
    for e, d in sorted(shapes):
        layers = {stack: getattr(study.teacher, stack).layers[:k] for stack, k in zip(STACKS, (e, d))}
        study.measured(title, f"{e}+{d}", 0, lambda: {
            "speedup": 1.0 if (e, d) == tuple(study.teacher.depths.values()) else
            speedup(study.teacher, with_layers(study.teacher, layers), source)})


def table(results, title):
    """Markdown: a line a row of that table, means over the seeds; of ablations in each cell divergence; imitation; the
    metric."""
    rows = {}
    for key, entry in results.items():
        if key.startswith(f"{title}|"):
            rows.setdefault(key.split("|")[1], []).append(entry)
    if title == "main":
        return main_lines(results, rows)
    if title == "grid":
        return grid_lines(results)
    if title.startswith("ablation"):
        shapes = list(dict.fromkeys(shape for own in rows.values() for shape in own[0] if "+" in shape))
        lines = ["| variant | " + " | ".join(shapes) + " |", "|---|" + "---:|" * len(shapes)]
        return "\n".join(lines + [f"| {name} | " + " | ".join(
            "; ".join(f"{mean(r[shape][column] for r in own):.{digits}f}"
                      for column, digits in (("divergence", 3), ("imitation", 3), ("greedy", 1))
                      if column in own[0].get(shape, ())) or "–" for shape in shapes) + " |"
            for name, own in rows.items()])
    if title.startswith("little"):
        return little_lines(rows)
    columns = ("loss", "greedy", "identical")
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    return "\n".join(lines + [f"| {name} | " + " | ".join(
        spread([r[column] for r in own], 3 if column == "loss" else 1) for column in columns) + " |"
        for name, own in rows.items()])


def spread(values, digits=1):
    """"33.7 (33.4 to 34.0)": the mean, and the range of more than one."""
    middle = f"{mean(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def speed_title(device):
    """Where the results keep the speed-ups on that device."""
    return "speed" if device == "cpu" else "speed on a GPU"


def measured_speed(results, row, device="cpu"):
    """A row's speed-up, or None while it is not measured."""
    return results.get(f"{speed_title(device)}|{row['encoder']}+{row['decoder']}|0", {}).get("speedup")


def main_lines(results, rows):
    """The main table: means over the seeds, and the range of the metric; students by their depth. % of the teacher:
    greedily, and with four beams."""
    teacher, beams = rows["teacher"][0], {}
    for key, entry in results.items():
        if key.startswith("beam 4|"):
            beams.setdefault(key.split("|")[1], []).append(entry["score"])
    head = ["model", "ratio", "parameters", "CPU", "GPU", "greedy", "beam 4", "% of teacher", "identical", "loss"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name, own in sorted(rows.items(), key=lambda item: -depth_of(item[1][0]) if is_student(item[0]) else -math.inf):
        fast = [measured_speed(results, own[0], device) for device in ("cpu", "cuda")]
        greedy, beam = [r["greedy"] for r in own], beams.get(name)
        share = [f"{100 * mean(found) / (theirs or math.nan):.1f}"
                 for found, theirs in ((greedy, teacher["greedy"]), (beam, beams.get("teacher", [None])[0])) if found]
        cells = [name, f"{depth_of(teacher) / depth_of(own[0]):.2f}x", f"{own[0]['parameters']:,}",
                 *(f"{each:.2f}x" if each else "–" for each in fast), spread(greedy), spread(beam) if beam else "–",
                 "; ".join(share), f"{mean(r['identical'] for r in own):.0f} %", f"{mean(r['loss'] for r in own):.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def depth_of(row):
    """Layers of both stacks."""
    return sum(row[stack] for stack in STACKS)


def is_student(name):
    """Is this row of the main table that of a static student?"""
    return name.split()[0] in BASELINES


def little_lines(rows):
    """Training pairs down, models across: the metric."""
    pairs, models = (list(dict.fromkeys(part)) for part in zip(*(name.split(" ", 1) for name in rows)))
    lines = ["| pairs | " + " | ".join(models) + " |", "|---|" + "---:|" * len(models)]
    return "\n".join(lines + [f"| {k} | " + " | ".join(
        spread([r["greedy"] for r in rows.get(f"{k} {model}", [])] or [math.nan]) for model in models) + " |"
        for k in pairs])


def grid_lines(results):
    """Encoder depths down, decoder depths across: the metric of the bank's assemblies, and the speed-up on a CPU."""
    cells = {}
    for key, row in results.items():
        title, name, _ = key.split("|")
        if title in ("main", "grid") and name.startswith(("teacher", "assembly")):
            cells.setdefault((row["encoder"], row["decoder"]), []).append(row)
    encoders = sorted({e for e, d in cells if d == max(cells)[1]})
    decoders = sorted({d for e, d in cells if all((e, d) in cells for e in encoders)})
    lines = ["| encoder \\ decoder | " + " | ".join(map(str, decoders)) + " |", "|---|" + "---:|" * len(decoders)]
    for e in encoders:
        lines.append(f"| {e} | " + " | ".join(
            ", ".join([spread([r["greedy"] for r in cells[e, d]]),
                       *(f"{fast:.2f}x" for fast in [measured_speed(results, cells[e, d][0])] if fast)])
            for d in decoders) + " |")
    return "\n".join(lines)


def write_picture(results, study):
    """The README's picture, RUN/study/frontier.svg, of the rows whose speed-up on a CPU is measured: means over
    the seeds."""
    rows = {}
    for key, row in results.items():
        title, name, _ = key.split("|")
        if title in ("main", "grid") and measured_speed(results, row):
            rows.setdefault(name, []).append(row)
    points = {name: {"speedup": measured_speed(results, own[0]),
                     study.args.metric: sum(r["greedy"] for r in own) / len(own)} for name, own in rows.items()}
    if points:
        with new_file(study.folder / "frontier.svg") as f:
            f.write(frontier(points, study.args.metric).encode())


if __name__ == "__main__":
    keep_heap()
    sys.exit(main())
