"""The recipe, top to bottom: data -> teacher -> bank of modules -> assemblies -> one table.

    python train.py                                                   # the toy task: no file and no network needed
    python train.py --train train.en train.de --valid valid.en valid.de --test test.en test.de --out runs/m30k
    python train.py --train data.tsv --valid valid.tsv --test test.tsv --teacher t5-small --prefix "summarize: "
    python train.py --resume --out runs/m30k                          # go on after an interruption
    torchrun --nproc_per_node=2 train.py ...                          # the same on two GPUs, or two CPU processes

The run folder holds args.json, log.jsonl, spiece.model, valid.safetensors, first-teacher/ (what the teacher was
before it learnt from itself), teacher/, pseudo.json (what it makes of the training sources), bank.safetensors,
baselines/, checkpoint.pt while something trains, results.json and frontier.svg; `python assemble.py RUN --ratio 2`
makes a model of it, and adds damage.json. In log.jsonl the last record of a step counts: some come twice after an
interruption.
"""
import argparse
import copy
import ctypes
import hashlib
import json
import math
import os
import random
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import timedelta
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from assemble import assemble, choose, even_paths, export, parameters, possible_depths, save_batches, speedup
from data import (Batches, Tokenizer, bleu, encode_pairs, exact_match, pad, read_pairs, rouge, toy_splits,
                  train_tokenizer)
from distill import (CE_ONLY, calibrate, load_checkpoint, pick_dtype, processes, shrink, train_modules, train_student,
                     validation_loss)
from model import (T5, Parser, T5Config, check_ids, checkpoint_name, command_line, find_t5, load_t5, memory_for, naming,
                   new_file, quick_products, read_json, write_json)
from modules import STACKS, Bank, default_granularities, load_bank, module_spans, path_of, save_bank

METRICS = {"bleu": bleu, "rougeL": lambda h, r: rouge(h, r)["rougeL"], "exact": exact_match}
BASELINES = ("sft", "kd", "calibrated", "pseudo", "theseus")
SPANNING = ("calibrated", "theseus")  # those whose layers are modules at first, of one granularity in each stack

SHAPE = ("layers", "d_model", "dropout", "vocab")  # of a teacher from scratch

# What differs between the toy run, a real one, and one from T5 weights. An option on the command line beats them all.
TOY = dict(dtype="float32", metric="exact", layers=6,  # matrices too small for 16 bit to pay
           targets="data",                             # there is one right answer, and the teacher gives it
           dropout=0.0,                                # no pair is seen more than four times
           self_distill_steps=0,                       # the teacher makes no mistakes
           steps=50,                                   # by which sizes and methods differ: 400 make all perfect
           d_model=64, vocab=200, batch_tokens=2048, teacher_steps=900, teacher_lr=1.5e-2, lr=3e-2, max_length=64)
REAL = dict(dtype="auto", metric="bleu", targets="teacher", dropout=0.1, layers=12, d_model=128, vocab=8000,
            batch_tokens=4096, teacher_steps=4700, self_distill_steps=1880, steps=1880, teacher_lr=3e-2, lr=3e-2,
            max_length=128)
FINE_TUNE = dict(REAL, teacher_lr=1e-3, lr=5e-3,  # T5's own rate of fine-tuning, of a tensor's size too
                 self_distill_steps=0,            # not tried with T5's weights
                 **dict.fromkeys(SHAPE))          # it brings its own
ALWAYS = dict(seed=0, prefix="", num_beams=1, init="calibrated")  # what does not differ
NOT_OF_THE_RUN = ("out", "resume", "device")  # each command line has its own
DATA = ("train", "valid", "test")
SUMS = [f"{name}_sha256" for name in DATA]  # of the pairs: no options, but kept among the settings
CHANGEABLE = ("batch_tokens", "lr", "teacher_lr")  # by --resume: a training step's memory, and how far it goes
PSEUDO_BEAMS = 4  # of the teacher, where its outputs are what others learn
CALIBRATION = 8  # batches for fitting the modules before the first step
PORTION = 4096  # so many of the teacher's outputs are made, and written, at a time
PROBE = 300  # at most so many validation pairs on which `assemble.py --strategy search` measures the modules


def parse_args(argv):
    """The command line -> argparse.Namespace, with the toy run's or a real run's settings where none were given. Raises
    ValueError for options that are wrong or do not go together, or a run that --resume cannot go on with."""
    p = Parser(description="Train a bank of modules for a T5 and assemble smaller T5s from it.")
    p.add_argument("--train", nargs="+", metavar="FILE", help="one .tsv or .jsonl, or two parallel text files")
    p.add_argument("--valid", nargs="+", metavar="FILE")
    p.add_argument("--test", nargs="+", metavar="FILE")
    p.add_argument("--prefix", help='put before every source, such as "summarize: "')
    p.add_argument("--teacher", help="a T5 folder or a name such as t5-small; without it one is trained from scratch")
    p.add_argument("--out", type=Path, default=Path("run"), help="the run folder")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own settings; "
                   "--batch-tokens, --lr and --teacher-lr may change them for the steps to come")
    p.add_argument("--seed", type=int, help="0 by default")
    p.add_device()
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"],
                   help="of matrix products in training; weights are float32")
    p.add_argument("--metric", choices=METRICS)
    p.add_argument("--num-beams", type=int, help="for scoring; 1 by default")
    p.add_argument("--layers", type=int, help="of each stack of a teacher from scratch")
    p.add_argument("--d-model", type=int, help="width of a teacher from scratch, a multiple of 32")
    p.add_argument("--dropout", type=float, help="of a teacher from scratch, and so of its students")
    p.add_argument("--vocab", type=int, help="pieces of a tokenizer trained on the corpus")
    p.add_argument("--max-length", type=int, help="tokens; longer sequences are cut")
    p.add_argument("--batch-tokens", type=int,
                   help="source and target tokens a batch, padding included, all processes together")
    p.add_argument("--teacher-steps", type=int, help="steps to train or fine-tune the teacher; 0 takes it as it is")
    p.add_argument("--self-distill-steps", type=int, help="further steps in which the teacher learns from itself: from "
                   "its own outputs and probabilities, with dropout")
    p.add_argument("--steps", type=int, help="steps for the bank, and for each baseline")
    p.add_argument("--teacher-lr", type=float,
                   help="peak learning rate of the teacher, as a share of each tensor's size")
    p.add_argument("--lr", type=float, help="the same of self-distillation, the bank and the baselines")
    p.add_argument("--granularities", type=span_lengths,
                   help="layers a module stands for, such as 2,3,6; by default all from 2 to 6 that divide the stack")
    p.add_argument("--paths", choices=["all", "two"], help="that a step of the bank runs: by default one of each "
                   "granularity, on a part of the batch; or two, on all of it: fewer kernels for a GPU to launch")
    p.add_argument("--targets", choices=["data", "teacher"], help="what the bank and KD students learn to write: the "
                   "targets of the training pairs, or what the teacher makes of their sources")
    p.add_argument("--init", choices=["calibrated", "copy", "average"],
                   help="how a module starts: by default a copy of a layer of its span, fitted to the span in closed "
                   "form; the copy alone; the mean of the span's layers")
    p.add_argument("--baselines", help='static students, such as "sft:6+6,kd:2+2"; of ' + ", ".join(BASELINES))
    p.add_argument("--baseline-dropout", choices=["on", "off"], help="of static students: on by default, at the "
                   "teacher's rate; a bank trains without")
    args = p.parse_args(argv)
    if args.resume:
        given = {name: value for name, value in vars(args).items() if name not in NOT_OF_THE_RUN and value is not None}
        for name in given:
            if name not in CHANGEABLE:
                raise ValueError(f"--resume keeps the run's own settings: leave out --{name.replace('_', '-')}")
        if not (args.out / "args.json").exists():
            raise ValueError(f"{args.out}: holds no run to go on with: begin one without --resume")
        settings = read_settings(args.out / "args.json", p)
        args = argparse.Namespace(**{**settings, **given, "out": args.out, "device": args.device, "resume": True})
        check_numbers(vars(args))
        return args
    given = [name for name in DATA if getattr(args, name)]
    if len(given) not in (0, 3):
        raise ValueError(f"--train, --valid and --test go together; only {', '.join(given)} came")
    if args.teacher == "":
        raise ValueError("--teacher: empty: give a folder or a name, or leave it out")
    if args.teacher and not given:
        raise ValueError("--teacher needs --train, --valid and --test: the toy task has its own teacher")
    if args.prefix and not given:
        raise ValueError("--prefix needs --train, --valid and --test: the toy task has none")
    try:
        (args.prefix or "").encode()
    except UnicodeError:
        raise ValueError("--prefix: not valid UTF-8") from None
    for name in SHAPE:
        if args.teacher and getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: of a teacher from scratch; --teacher brings its own")
    for name, value in {**ALWAYS, **(FINE_TUNE if args.teacher else REAL if given else TOY)}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.baselines is None:
        shapes = () if given else (f"{k}+{k}" for k in (args.layers // 2, 1))
        args.baselines = ",".join(f"{kind}:{shape}" for shape in shapes for kind in ("sft", "kd"))
    check_numbers(vars(args))
    parse_baselines(args.baselines)
    for name in given:  # absolute, so that --resume works from another folder
        setattr(args, name, [str(Path(file).absolute()) for file in getattr(args, name)])
    if args.teacher and Path(args.teacher).is_dir():
        args.teacher = str(Path(args.teacher).absolute())
    return args


def read_settings(file, parser):
    """A run's args.json -> its settings by name, read as the options they came from, so that they are checked like
    these. Raises ValueError naming the file."""
    settings, words = read_json(file), []
    sums = {name: settings.pop(name) for name in SUMS if name in settings}
    brought = SHAPE if settings.get("teacher") else ()
    if missing := [name for name in {**REAL, **ALWAYS} if settings.get(name) is None and name not in brought]:
        raise ValueError(f"{file}: lacks {', '.join(missing)}")
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if name in DATA and isinstance(value, list):
            words += [option, *map(str, value)]
        elif value is not None:
            words.append(f"{option}={','.join(map(str, value)) if isinstance(value, list) else value}")
    try:
        settings = vars(parser.parse_args([*words, "--device=cpu"]))  # a device is not the run's: try no GPU for it
        check_numbers(settings)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return {**settings, **sums}


def check_numbers(settings):
    """Raise ValueError, naming the option, for a setting that is no possible number."""
    least = dict(layers=2, d_model=32, vocab=1, max_length=2, batch_tokens=1, num_beams=1, steps=1, teacher_steps=0,
                 self_distill_steps=0, seed=0)
    # More layers are more tensors than `read_safetensors` takes, more pieces would take for ever to fail, and tensors
    # beyond these sizes fail in torch, not for want of memory.
    most = dict(layers=300, vocab=1_000_000, seed=(1 << 32) - 1, d_model=1 << 20, max_length=1 << 20,
                num_beams=1 << 20, batch_tokens=1 << 40)
    for name, value in settings.items():
        if value is None:  # SHAPE of a teacher that brings its own
            continue
        option = f"--{name.replace('_', '-')} {value}"
        if name in least and value < least[name]:
            raise ValueError(f"{option}: must be at least {least[name]}")
        if name in most and value > most[name]:
            raise ValueError(f"{option}: must be at most {most[name]}")
        if name in ("teacher_lr", "lr") and not 0 < value < math.inf:
            raise ValueError(f"{option}: must be above 0, and finite")
        if name == "dropout" and not 0 <= value < 1:
            raise ValueError(f"{option}: must be at least 0, and below 1")
        if name == "d_model" and value % 32:
            raise ValueError(f"{option}: not a multiple of 32")


def span_lengths(text):
    """"2,3,6" -> [2, 3, 6], each once. Raises ArgumentTypeError."""
    try:
        return sorted({int(length) for length in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: not layers such as 2,3,6") from None


def parse_baselines(text):
    """"kd:6+6,sft:2+2" -> [("kd", 6, 6), ("sft", 2, 2)]. Raises ValueError naming the part that is wrong."""
    parsed = []
    for part in filter(None, text.split(",")):
        try:
            kind, shape = part.split(":")
            encoder, decoder = map(int, shape.split("+"))
        except ValueError:
            raise ValueError(f"--baselines {part}: not of the form kd:6+6") from None
        if kind not in BASELINES:
            raise ValueError(f"--baselines {part}: not one of {', '.join(BASELINES)}")
        parsed.append((kind, encoder, decoder))
    return list(dict.fromkeys(parsed))


# ---- the recipe

@command_line
def main(argv):
    """Everything: prepare the data, train what is not yet trained, score it, print the table."""
    args = parse_args(argv)
    first = join_processes(args)
    with first_goes_first(first):  # it makes the run folder, the others read its settings there
        if not first:
            args = parse_args(["--resume", "--out", str(args.out), "--device", args.device])
        pairs = read_data(args)
        teacher, tokenizer = start_run(args, pairs)
    out, dtype = args.out, getattr(torch, args.dtype)
    log_file = open_log(out / "log.jsonl") if first else None

    def log(record):
        """Append a record to log.jsonl; without a progress bar, print every tenth. Every tenth of the bank's shows what
        the models make of one sentence by now."""
        if tenth(record) and not sys.stderr.isatty():  # no progress bar there
            say(f"{record['stage']}: step {record['step']} of {record['steps']}, loss {record['loss']:.3f}, "
                f"{record['tokens_per_s']:,.0f} tokens/s")
        if tenth(record) and record["stage"] == "bank":
            record["sample"] = show_sample(teacher, bank, tokenizer, pairs["valid"][0], args)
        record = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}  # JSON
        with naming(out / "log.jsonl"):
            log_file.write(json.dumps(record).encode() + b"\n")
            log_file.flush()

    train, cut = encode_pairs(tokenizer, pairs["train"], args.max_length)
    batches = {"data": Batches(train, args.batch_tokens, tokenizer.pad_id, args.seed)}
    score = Scorer(args, tokenizer, pairs, teacher)
    say(f"{len(train):,} training pairs, {len(batches['data'])} batches an epoch; sequences cut at {args.max_length} "
        f"tokens: {cut} of train, {score.cut['valid']} of valid, {score.cut['test']} of test; {args.device}, "
        f"{args.dtype}")
    loop = dict(seed=args.seed, dtype=dtype, log=log, checkpoint=out / "checkpoint.pt")

    teacher.to(args.device)
    if not (out / "teacher").exists():
        train_teacher(teacher, batches["data"], args, loop)

    baselines = parse_baselines(args.baselines)
    if args.targets == "teacher" or "pseudo" in [kind for kind, _, _ in baselines]:
        batches["teacher"] = relabel(teacher, batches["data"], args)

    bank_file = out / "bank.safetensors"
    if bank_file.exists():
        bank = load_bank(bank_file, teacher).to(args.device).eval()
    else:
        if first:  # what was measured of an older bank
            score.forget("assembly")
        bank = new_bank(teacher, batches[args.targets], args)
        say(f"bank: {sum(map(len, bank.spans.values()))} modules, {args.steps} steps")
        train_modules(teacher, bank, batches[args.targets], args.steps, lr=args.lr, two_paths=args.paths == "two",
                      name="bank", **loop)
        if first:
            save_bank(bank, bank_file)

    folders = {}
    for kind, encoder, decoder in baselines:
        name = f"{kind} {encoder}+{decoder}"
        folder = folders[name] = out / "baselines" / name.replace(" ", "-")
        if not folder.exists():
            if first:
                score.forget(name)
            student = train_baseline(kind, encoder, decoder, teacher, batches, args, name, loop, score.valid)
            if first:
                folder.parent.mkdir(exist_ok=True)
                export(student, out / "spiece.model", folder)
    if dist.is_initialized():
        dist.barrier()  # none leaves while another still talks to it
        dist.destroy_process_group()
    if not first:
        os._exit(0)  # Python's own exit would now and then abort a thread of gloo's, and torchrun then stop the first

    score("teacher", teacher)
    for shape in study_shapes(teacher, bank):
        score(f"assembly {shape[0]}+{shape[1]}", assemble(teacher, bank, even_paths(teacher, bank, *shape)))
    for name, folder in folders.items():
        score(name, load_t5(folder).to(args.device))
    with new_file(out / "frontier.svg") as f:
        f.write(frontier(score.rows, args.metric).encode())
    for name in ("checkpoint.pt", "checkpoint.pt.part"):  # the latter of a run that was killed as it wrote
        (out / name).unlink(missing_ok=True)
    say("\n" + table(score.rows, args.metric) + f"\n\nrun folder: {out}")


def join_processes(args):
    """Under torchrun, join the other processes, one GPU each unless on the CPU. Returns whether this is the first: the
    one that writes files, prints and scores. Raises ValueError if there are fewer GPUs than processes."""
    if "LOCAL_RANK" not in os.environ:
        return True
    cuda, mine = args.device.startswith("cuda"), int(os.environ["LOCAL_RANK"])
    if cuda:
        if mine >= torch.cuda.device_count():
            raise ValueError(f"process {mine + 1} of this machine has no GPU of its own: there are "
                             f"{torch.cuda.device_count()}")
        torch.cuda.set_device(mine)
        args.device = f"cuda:{mine}"
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))  # a tokenizer may take its time
    return dist.get_rank() == 0


@contextmanager
def first_goes_first(first):
    """The first process runs the block before the others. If it fails there it says why, and they end in silence."""
    failed = [True]
    if first:
        try:
            yield
            failed = [False]
        finally:
            if dist.is_initialized():
                dist.broadcast_object_list(failed)
    else:
        dist.broadcast_object_list(failed)
        if failed[0]:
            sys.exit(2)
        yield


def say(text):
    """Print past the progress bars, at once; of several processes the first."""
    if processes()[0] == 0:
        tqdm.write(text)
        sys.stdout.flush()


def open_log(path):
    """The file, to append lines to: cut back to its last whole one, as a full disk may have cut one short."""
    f = open(path, "a+b")
    f.seek(0)
    f.truncate(f.read().rfind(b"\n") + 1)
    return f


def tenth(record):
    """Is this a stage's first record, its last, or a tenth one between? They come each hundredth of the steps."""
    step, steps = record["step"], record["steps"]
    return step in (1, steps) or step % (10 * max(1, steps // 100)) == 0


def read_data(args):
    """{"train": [(source, target), ...], "valid": ..., "test": ...} of the files asked for, or of the toy task. Their
    sums become settings, by which --resume knows them. Raises ValueError for pairs that are not those of the run."""
    if args.train:
        pairs = {name: read_pairs(*getattr(args, name), prefix=args.prefix) for name in DATA}
    else:
        pairs = dict(zip(DATA, toy_splits(args.seed, 20000, 500, 500)))
    for name, kept in zip(DATA, SUMS):
        found = sha256(pairs[name])
        if getattr(args, kept, found) != found:
            raise ValueError(f"{args.out}: the pairs of --{name} are not those that this run began with: bring back "
                             f"the old file, or begin anew with another --out")
        setattr(args, kept, found)
    return pairs


def sha256(texts):
    """Of a list of texts or pairs, or of ids: whether it is the one that was there before."""
    return hashlib.sha256(repr(texts).encode()).hexdigest()


def start_run(args, pairs):
    """Make the run folder, or check the one to resume. Returns the teacher, trained or yet to train, and the tokenizer.
    Raises ValueError if there is a run in the folder and --resume was not given: nothing is overwritten."""
    out, teacher = args.out, None
    if not args.resume and any((out / name).exists() for name in (
            "args.json", "log.jsonl", "first-teacher", "teacher", "checkpoint.pt", "frontier.svg", "config.json")):
        raise ValueError(f"{out}: holds a run or a model already: go on with --resume, or choose another --out")
    if not (out / "teacher").exists():
        later = ["bank.safetensors", "pseudo.json", "baselines", "results.json", "study"]  # all made after the teacher
        stages = ("teacher", "self-distillation") if (out / "first-teacher").exists() else ("teacher",)
        if not load_checkpoint(out / "checkpoint.pt", *stages):
            later.append("checkpoint.pt")
        for name in later:
            if (out / name).exists():
                raise ValueError(f"{out / name}: of a teacher that is no longer there: remove it, too")
    if args.resume:
        tokenizer = Tokenizer(out)
    trained = [out / name for name in ("teacher", "first-teacher") if (out / name).exists()]
    if trained:
        teacher = load_t5(trained[0])
    elif args.teacher:
        folder = find_t5(args.teacher)
        teacher, tokenizer = load_t5(folder), Tokenizer(folder)
        for name, parameter in teacher.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(f"{folder}: tensor {checkpoint_name(name)} does not hold finite numbers")
        c = teacher.config
        if len(tokenizer.pieces) > c.vocab_size:
            raise ValueError(f"{folder}: spiece.model has {len(tokenizer.pieces)} pieces, the embedding "
                             f"{c.vocab_size} rows")
        texts = (text for part in pairs.values() for pair in part for text in pair)
        if tokenizer.vocab_size > c.vocab_size and any(max(tokenizer.encode(text)) >= c.vocab_size for text in texts):
            raise ValueError(f"{folder}: the embedding has no rows for sentinels such as <extra_id_0>: take them out "
                             f"of the data")
        check_ids(folder, c, tokenizer)
    check_plan(args, *((teacher.config.num_layers, teacher.config.num_decoder_layers) if teacher else
                       (args.layers, args.layers)))
    if not teacher and not args.resume:
        with tempfile.TemporaryDirectory() as folder:
            texts = (text for pair in pairs["train"] for text in pair)
            tokenizer = train_tokenizer(texts, Path(folder) / "spiece.model", args.vocab)
    if not teacher:
        torch.manual_seed(args.seed)
        heads = max(4, args.d_model // 32)
        teacher = T5(T5Config(vocab_size=tokenizer.vocab_size, d_model=args.d_model, d_kv=args.d_model // heads,
                              num_heads=heads, d_ff=4 * args.d_model, num_layers=args.layers,
                              num_decoder_layers=args.layers, dropout_rate=args.dropout))
    if not args.resume:
        dtype = pick_dtype(args.dtype, args.device, teacher.config.d_model)
        args.dtype = str(dtype).removeprefix("torch.")  # settled once, also for --resume
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(out)
    settings = {name: value for name, value in vars(args).items() if name not in NOT_OF_THE_RUN}
    if not args.resume or settings != read_json(out / "args.json"):
        write_json(settings, out / "args.json")
    if not args.resume or not (out / "valid.safetensors").exists():  # anew: one there is of another tokenizer
        probe = [pairs["valid"][i] for i in probe_rows(len(pairs["valid"]))]
        save_batches(Batches(encode_pairs(tokenizer, probe, args.max_length)[0], args.batch_tokens, tokenizer.pad_id,
                             seed=0), out / "valid.safetensors")
    return teacher, tokenizer


def probe_rows(n):
    """Which of n validation pairs the search measures modules on: at most PROBE, drawn, as a file may be sorted, or of
    short and long lines in turn, like Multi30k's."""
    return random.Random(0).sample(range(n), min(n, PROBE))


def check_plan(args, encoder, decoder):
    """Raise ValueError, before anything is written, for modules or baselines that the teacher's depth cannot have."""
    try:
        spans = [module_spans(n, args.granularities or default_granularities(n)) for n in (encoder, decoder)]
    except ValueError as error:
        raise ValueError(f"--granularities, which are those of both stacks: {error}") from None
    if not any(spans):
        raise ValueError(f"{encoder}+{decoder} layers have no divisor from 2 to 6 for modules: give --granularities, "
                         f"or another depth")
    for kind, e, d in parse_baselines(args.baselines):
        if not (1 <= e <= encoder and 1 <= d <= decoder):
            raise ValueError(f"--baselines {kind}:{e}+{d}: the teacher has {encoder}+{decoder} layers")
        if kind in SPANNING and (encoder % e or decoder % d or (e, d) == (encoder, decoder)):
            raise ValueError(f"--baselines {kind}:{e}+{d}: not a shape that equal spans make of {encoder}+{decoder}")


def train_teacher(teacher, batches, args, loop):
    """Train the teacher, or fine-tune it, on the pairs. With --self-distill-steps it then trains once more, as a KD
    student of its own size whose teacher is a frozen copy of itself (born-again networks,
    https://arxiv.org/abs/1805.04770). With dropout a student may become better than its teacher; a bank trains without,
    so the better one has to be there before. first-teacher/ keeps the model between the two, with its outputs.
    loop: the options of `fit`."""
    first = processes()[0] == 0  # it writes files
    folder = args.out / ("first-teacher" if args.self_distill_steps else "teacher")
    if not folder.exists():
        say(f"teacher: {parameters(teacher):,} parameters, {args.teacher_steps} steps")
        train_student(teacher, batches, args.teacher_steps, lr=args.teacher_lr, name="teacher", **loop)
        if first:
            export(teacher, args.out / "spiece.model", folder)
    if args.self_distill_steps:
        say(f"self-distillation: the teacher learns from its own outputs, {args.self_distill_steps} steps")
        itself = copy.deepcopy(teacher)
        train_student(teacher, relabel(itself, batches, args, folder), args.self_distill_steps, itself, lr=args.lr,
                      name="self-distillation", **loop)
        if first:
            export(teacher, args.out / "spiece.model", args.out / "teacher")


def new_bank(teacher, batches, args):
    """The bank before its first step, as --granularities and --init say."""
    chosen = args.granularities and dict.fromkeys(STACKS, args.granularities)
    bank = Bank(teacher, chosen, "average" if args.init == "average" else "copy")
    if args.init == "calibrated":
        calibrate_on(batches, teacher, bank)
    return bank


def calibrate_on(batches, teacher, bank):
    """`calibrate` the bank on the first CALIBRATION batches. Raises MemoryError that says what to lower."""
    say(f"calibration: modules are fitted to the teacher's states on {CALIBRATION} batches")
    with memory_for("calibration: lower --batch-tokens, or begin anew with a lower --max-length"):
        calibrate(teacher, bank, [batches[k] for k in range(CALIBRATION)])


def train_baseline(kind, encoder, decoder, teacher, batches, args, name, loop, valid):
    """One static student of encoder+decoder layers for comparison, trained for as many steps as the bank. batches:
    {"data": Batches, "teacher": the same sources with the teacher's outputs as targets}; KD, "calibrated" too, learns
    what the bank does. valid: model -> its loss on the validation pairs."""
    distilled, dropout = kind in ("kd", "calibrated"), args.baseline_dropout != "off"
    batches = batches[args.targets if distilled else "teacher" if kind == "pseudo" else "data"]
    if kind in SPANNING:
        shape, n = dict(zip(STACKS, (encoder, decoder))), teacher.depths
        bank = Bank(teacher, {stack: [n[stack] // k] if k < n[stack] else [] for stack, k in shape.items()})
        if kind == "calibrated":
            calibrate_on(batches, teacher, bank)
        else:
            # Its modules are not calibrated: they stand among the teacher's layers for longer.
            train_modules(teacher, bank, batches, args.steps, lr=args.lr, weights=CE_ONLY, rate_rise=0.3, name=name,
                          dropout=dropout, **loop)
        student = assemble(teacher, bank, {stack: path_of([n[stack] // k] * k) for stack, k in shape.items()})
    else:
        student = shrink(teacher, encoder, decoder)
    if kind != "theseus":
        say(f"{name}: {args.steps} steps; cross-entropy on the validation pairs before them: {valid(student):.3f}")
        train_student(student, batches, args.steps, teacher if distilled else None, lr=args.lr, name=name,
                      dropout=dropout, **loop)
    return student


def relabel(teacher, batches, args, folder=None):
    """The same sources with the teacher's outputs as targets (pseudo-labels; Kim & Rush 2016, sequence-level
    distillation, https://arxiv.org/abs/1606.07947). pseudo.json in the folder, by default the run's, keeps them: an
    interruption loses one portion. Raises ValueError naming that file if it is of other sources."""
    file = (folder or args.out) / "pseudo.json"
    sources = [source for source, _ in batches.examples]
    made = {"sources": sha256(sources), "targets": []}
    if file.exists():
        stored = read_json(file)
        if stored.get("sources") != made["sources"] or not isinstance(stored.get("targets"), list):
            raise ValueError(f"{file}: not of these {len(sources)} sources: remove it to make it anew")
        made = stored
    rank, world = processes()
    for start in range(len(made["targets"]), len(sources), PORTION):
        say(f"pseudo-labels: what the teacher makes of {len(sources):,} sources with {PSEUDO_BEAMS} beams; {start:,} "
            f"are there")
        portion = sources[start:start + PORTION]
        parts = [translate(teacher, portion[rank::world], PSEUDO_BEAMS, args, "pseudo-labels")] * world
        if world > 1:  # a place for each process's: the others' come now
            dist.all_gather_object(parts, parts[rank])
        made["targets"] += [parts[i % world][i // world] for i in range(len(portion))]
        if rank == 0:
            write_json(made, file, indent=None)
    targets = [ended(ids, teacher.config.eos_token_id, args.max_length) for ids in made["targets"]]
    return Batches(list(zip(sources, targets)), batches.tokens, batches.pad_id, batches.seed)


def ended(ids, eos, max_length):
    """An output as a target: one that was cut ends here, too."""
    return ids if ids[-1:] == [eos] else [*ids[:max_length - 1], eos]


@quick_products()
def translate(model, sources, num_beams, args, name):
    """Lists of ids -> lists of ids, in order; batches of like length, so that little is padding, and of half as many
    sentences where the memory is too small: outputs do not depend on their batch. Raises MemoryError where it is too
    small for one."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    outputs, size, done = [None] * len(order), 64, 0
    with tqdm(total=len(order), desc=name, leave=False, disable=processes()[0] > 0 or None) as bar:
        while rows := order[done:done + size]:
            ids = pad([sources[row] for row in rows], model.config.pad_token_id).to(args.device)
            try:
                with memory_for(f"{name}: {num_beams} beams for a sentence of {ids.size(1)} tokens: begin anew with a "
                                f"lower --max-length"):
                    generated = model.generate(ids, args.max_length, num_beams).tolist()
            except MemoryError:
                if len(rows) == 1:
                    raise
                size = len(rows) // 2
                continue
            for row, output in zip(rows, generated):
                outputs[row] = [token for token in output if token != model.config.pad_token_id]
            done += len(rows)
            bar.update(len(rows))
    return outputs


# ---- scoring and showing

def study_shapes(teacher, bank):
    """(encoder, decoder) depths for the table: 1.1x to 6x shrinking both stacks, then one stack alone."""
    n = list(teacher.depths.values())
    possible = [possible_depths(k, bank.spans[stack]) for k, stack in zip(n, STACKS)]
    shapes = []
    for ratio in (1.1, 1.33, 1.5, 2, 2.4, 3, 4, 6):
        try:
            paths = choose(teacher, bank, ratio, "size-first")
            shapes.append((len(paths["encoder"]), len(paths["decoder"])))
        except ValueError:
            pass  # no assembly of this bank comes near this ratio
    half, least = [min(p, key=lambda d: abs(d - k / 2)) for p, k in zip(possible, n)], [p[0] for p in possible]
    shapes += [(half[0], n[1]), (n[0], half[1]), (least[0], n[1]), (n[0], least[1])]
    return [shape for shape in dict.fromkeys(shapes) if shape != tuple(n)]


def show_sample(teacher, bank, tokenizer, pair, args):
    """Print and return one pair and what the models make of it: {"source": ..., "reference": ..., "teacher": ...,
    "2x": ..., "6x": ...}, those assemblies that the bank can make."""
    models = {"teacher": teacher}
    for ratio in (2, 6):
        try:
            models[f"{ratio}x"] = assemble(teacher, bank, choose(teacher, bank, ratio, "size-first"))
        except ValueError:
            pass  # no assembly of this bank comes near this ratio
    source = torch.tensor([encode_pairs(tokenizer, [pair], args.max_length)[0][0][0]], device=args.device)
    sample = {"source": pair[0], "reference": pair[1],
              **{name: tokenizer.decode(model.generate(source, args.max_length)[0]) for name, model in models.items()}}
    say("\n".join(f"    {name:<9}  {text[:100]}" for name, text in sample.items()))
    return sample


class Scorer:
    """Scores models on the test pairs, one row each, and keeps results.json up to date. Raises ValueError for one that
    holds something else."""
    def __init__(self, args, tokenizer, pairs, teacher):
        self.args, self.tokenizer, self.pairs, self.teacher = args, tokenizer, pairs["test"], teacher
        self.file, self.rows = args.out / "results.json", {}
        if self.file.exists():
            self.rows = read_json(self.file).get("rows")
            if not (isinstance(self.rows, dict) and all(isinstance(row, dict) and args.metric in row
                                                        for row in self.rows.values())):
                raise ValueError(f"{self.file}: holds no scores: remove it to score anew")
        test, cut = encode_pairs(tokenizer, self.pairs, args.max_length)
        valid, cut_valid = encode_pairs(tokenizer, pairs["valid"], args.max_length)
        self.sources, self.cut = [source for source, _ in test], {"valid": cut_valid, "test": cut}
        batches = Batches(valid, args.batch_tokens, tokenizer.pad_id, seed=0)
        self.valid_batches = [batches[k] for k in range(len(batches))]

    def forget(self, name):
        """Drop the rows of that kind, "assembly", or of that one model, "kd 6+1": it is trained anew."""
        kept = {row: scores for row, scores in self.rows.items() if row != name and not row.startswith(f"{name} ")}
        if kept != self.rows:
            self.rows = kept
            self.write()

    def write(self):
        """Bring the file up to date."""
        write_json({"metric": self.args.metric, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
                    "device": self.args.device, "rows": self.rows}, self.file)

    def valid(self, model):
        """Cross-entropy of the validation pairs, in nats a token."""
        return validation_loss(model.eval(), self.valid_batches)

    def __call__(self, name, model):
        """Measure what is not measured yet: metric, size, and speed-up over the teacher at batch 1, greedy."""
        if name in self.rows:
            return
        outputs = translate(model, self.sources, self.args.num_beams, self.args, name)
        quality = METRICS[self.args.metric]([self.tokenizer.decode(ids) for ids in outputs],
                                            [target for _, target in self.pairs])
        layers, full = [list(m.depths.values()) for m in (model, self.teacher)]
        source = torch.tensor([self.sources[len(self.sources) // 2]], device=self.args.device)
        base = quality if name == "teacher" else self.rows["teacher"][self.args.metric]
        self.rows[name] = {"encoder": layers[0], "decoder": layers[1], "ratio": sum(full) / sum(layers),
                           "parameters": parameters(model), "speedup": speedup(self.teacher, model, source),
                           "valid_loss": self.valid(model), self.args.metric: quality,
                           "share": 100 * quality / base if base else 0.0}
        self.write()
        say(f"{name}: {self.args.metric} {quality:.1f}, validation loss {self.rows[name]['valid_loss']:.3f}")


def table(rows, metric):
    """The rows as a Markdown table, which is readable as text too."""
    lines = [f"| {'model':<16} | layers | ratio | parameters | speed-up | {metric:>6} | % of teacher |",
             f"|{'-' * 18}|--------|------:|-----------:|---------:|-------:|-------------:|"]
    for name, r in rows.items():
        layers = f"{r['encoder']}+{r['decoder']}"
        lines.append(f"| {name:<16} | {layers:<6} | {r['ratio']:4.2f}x | {r['parameters']:10,} | {r['speedup']:7.2f}x "
                     f"| {r[metric]:6.1f} | {r['share']:12.1f} |")
    return "\n".join(lines)


def frontier(rows, metric):
    """An SVG of quality against measured speed-up. Mid-tone colours and no background: it reads on white and black."""
    left, top, width, height, grey = 60, 20, 520, 300, "#808080"
    speeds, scores = [r["speedup"] for r in rows.values()], [r[metric] for r in rows.values()]

    def scale(values):
        """(low, high, value -> share of the axis) of an axis that goes a tenth beyond the values at both ends."""
        margin = 0.1 * (max(values) - min(values)) or 1.0
        low, high = min(values) - margin, max(values) + margin
        return low, high, lambda value: (value - low) / (high - low)
    (x_low, x_high, x_of), (y_low, y_high, y_of) = scale(speeds), scale(scores)

    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 40} {top + height + 50}" '
           f'font-family="sans-serif" font-size="12" fill="{grey}">',
           f'<path d="M{left},{top}V{top + height}H{left + width}" fill="none" stroke="{grey}"/>',
           f'<text x="{left + width / 2}" y="{top + height + 40}" text-anchor="middle">measured speed-up</text>',
           f'<text x="14" y="{top + height / 2}" transform="rotate(-90 14 {top + height / 2})" '
           f'text-anchor="middle">{metric}</text>',
           f'<text x="{left + width}" y="{top}" text-anchor="end"><tspan fill="#1c7ed6">● one bank</tspan>'
           f'<tspan fill="#e8590c">&#8195;● static students</tspan></text>']
    for i in range(6):
        x, y = left + width * i / 5, top + height * (1 - i / 5)
        svg.append(f'<text x="{x:.0f}" y="{top + height + 18}" text-anchor="middle">'
                   f'{x_low + (x_high - x_low) * i / 5:.1f}x</text>')
        svg.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">'
                   f'{y_low + (y_high - y_low) * i / 5:.1f}</text>')
    places = [(left + width * x_of(r["speedup"]), top + height * (1 - y_of(r[metric]))) for r in rows.values()]
    boxes = [(x - 5, x + 5, y - 4, y + 4) for x, y in places]  # what a label must not cover: points, other labels
    for (name, r), (x, y) in zip(rows.items(), places):
        colour, label = "#e8590c" if name.split()[0] in BASELINES else "#1c7ed6", name.removeprefix("assembly ")
        for down, side in product((4, -5, 13, -14, 22), (1, -1)):  # beside the point, then above or below it
            start, end = sorted((x + 6 * side, x + 6 * side * (1 + len(label))))
            if all(start > e or end < s or y + down - 8 > low or y + down < high for s, e, high, low in boxes):
                break
        boxes.append((start, end, y + down - 8, y + down))
        svg.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{name}: {r[metric]:.1f}</title>'
                   f'</circle><text x="{x + 6 * side:.1f}" y="{y + down:.1f}" font-size="10" fill="{colour}" '
                   f'text-anchor="{"start" if side > 0 else "end"}">{label}</text>')
    return "\n".join(svg + ["</svg>", ""])


def keep_heap():
    """Keep glibc from handing large buffers back to the kernel after every use: a CPU training step of a small model
    spent a quarter of its time in the kernel getting them again. Does nothing without glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)        # M_MMAP_MAX: no buffer gets a mapping of its own
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: bytes free at the heap's top before they go back
    except (OSError, AttributeError):
        pass


if __name__ == "__main__":
    keep_heap()
    sys.exit(main())
