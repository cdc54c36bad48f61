"""How fast: every figure a ratio of two things that take turns in one process, with the limit of the machine beside it.

    python tests/bench_speed.py                                # all rows, half an hour or more on 2 CPU cores
    python tests/bench_speed.py --only generate train          # some
    python tests/bench_speed.py --device cuda --data DIR       # DIR holds train.en and train.de: the padding row

Random weights of T5-base's and T5-small's shapes: nothing is downloaded. Hugging Face transformers and CTranslate2 are
compared with where they are installed, after a check that they give the same output. Not collected by pytest.
"""
import copy
import functools
import gc
import importlib.util
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from assemble import assemble, bytes_read, even_paths, export, parameters, possible_speedup, seconds
from data import Batches, encode_pairs, read_pairs, toy_corpus, train_tokenizer
from distill import CE_ONLY, WEIGHTS, losses, shrink, train_modules, train_student
from model import T5, Parser, T5Config, checkpoint_name, command_line, load_t5, quick_products
from modules import Bank, replacement_rate
from train import keep_heap

HERE = dict(eos_token_id=0, pad_token_id=1, decoder_start_token_id=5)  # ids that random weights do not run into
SMALL = dict(d_model=512, d_kv=64, d_ff=2048, num_heads=8, num_layers=6, num_decoder_layers=6, **HERE)
BASE = dict(d_model=768, d_kv=64, d_ff=3072, num_heads=12, num_layers=12, num_decoder_layers=12, **HERE)
NARROW = dict(SMALL, d_model=256, d_ff=1024, vocab_size=8000)
BATCH = (124, 16, 17)  # sentences, source and target tokens: 4,092 tokens of Multi30k's mean lengths


# ---- measuring

def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def alternate(device, *runs, rounds, warm_up=1):
    """Seconds of each run in each round, (rounds, runs): they take turns, after some rounds to warm up. Copies of
    `quick_products` are made in the first two calls."""
    times = []
    for _ in range(warm_up + rounds):
        times.append([])
        for run in runs:
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            times[-1].append(time.perf_counter() - start)
    return np.array(times[warm_up:])


def show(work, times, target, limit=""):
    """One row: how many times faster the first of two is, the median and the range over the rounds."""
    ratios = sorted(times[:, 1] / times[:, 0])
    ours, theirs = (statistics.median(column) for column in times.T)
    print(f"| {work} | {statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {target} | "
          f"{1e3 * ours:,.1f} against {1e3 * theirs:,.1f} ms | {limit} |", flush=True)


def bandwidth(device):
    """Bytes a second that a sum over 800 MB reads."""
    x = torch.ones(200_000_000, device=device)
    return x.numel() * x.itemsize / alternate(device, x.sum, rounds=5).min()


def matrix_rate(device, dtype):
    """Floating-point operations a second of a large matrix product."""
    n = 8192 if device == "cuda" else 2048
    x = torch.ones(n, n, dtype=dtype, device=device)
    return 2 * n ** 3 / alternate(device, lambda: x @ x, rounds=5).min()


# ---- models

def make(shape, device="cpu"):
    torch.manual_seed(0)
    return T5(T5Config(**shape)).to(device).eval()


def hugging_face(model):
    """The same weights in transformers' T5, which never stops early; None where that library is missing."""
    if not importlib.util.find_spec("transformers"):
        return None
    from transformers import T5Config as TheirConfig, T5ForConditionalGeneration
    c = model.config
    theirs = T5ForConditionalGeneration(TheirConfig(
        vocab_size=c.vocab_size, d_model=c.d_model, d_kv=c.d_kv, d_ff=c.d_ff, num_heads=c.num_heads,
        num_layers=c.num_layers, num_decoder_layers=c.num_decoder_layers, dropout_rate=c.dropout_rate,
        pad_token_id=c.pad_token_id, decoder_start_token_id=c.decoder_start_token_id)).eval()
    theirs.load_state_dict({checkpoint_name(name): weight for name, weight in model.state_dict().items()
                            if not name.startswith("head")}, strict=False)
    theirs.tie_weights()
    theirs.generation_config.eos_token_id = None
    return theirs.to(model.embedding.weight.device)


# ---- the rows

def generate(device, tokens=32):
    """Greedy generation, T5-base's shape, against transformers and, on the CPU, CTranslate2."""
    model = make(BASE, device)
    theirs = hugging_face(model)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        speed, rate = bandwidth(device), matrix_rate(device, dtype)
        for rows in (1, 32):
            source = torch.randint(6, 32000, (rows, 16), device=device)
            once, each = bytes_read(model)
            flops = 2 * rows * (16 * once + tokens * each) / dtype.itemsize
            limit = (f"reading the weights {1e3 * (once + tokens * each) / speed:,.0f} ms, "
                     f"products {1e3 * flops / rate:,.0f} ms")
            work = f"greedy, {rows} x {tokens} tokens, {str(dtype)[6:]}, against "
            if theirs:
                theirs.to(dtype)

                def ours():
                    return model.generate(source, tokens)

                def other():
                    return theirs.generate(source, max_new_tokens=tokens, do_sample=False)[:, 1:]
                same = (ours() == other()).float().mean().item()
                assert same == 1 or dtype is torch.bfloat16, "the two must give the same ids in float32"
                targets = {("cpu", 1): ("1.5x", "2.5x"), ("cpu", 32): ("1.3x", "1.3x"),
                           ("cuda", 1): ("–", "6x"), ("cuda", 32): ("–", "3x")}
                work += f"transformers ({100 * same:.0f} % of ids equal)"
                target = targets[device, rows][dtype is torch.bfloat16]
                show(work, alternate(device, ours, other, rounds=5), target, limit)
                if device == "cpu":
                    with quick_products():
                        times = alternate(device, ours, other, rounds=5, warm_up=2)
                        show(work + ", one of many calls", times, target, limit)
            if theirs and device == "cpu" and dtype is torch.float32 and rows == 1 and importlib.util.find_spec(
                    "ctranslate2"):  # whose converter needs transformers
                with quick_products():  # CTranslate2, too, makes its copies of the weights before the first call
                    show(f"greedy, {tokens} tokens, against CTranslate2", against_ctranslate2(model, source, tokens),
                         "1.0x", limit)


def against_ctranslate2(model, source, tokens):
    """Times of our generation and of CTranslate2's, from the folder that `export` writes."""
    import ctranslate2
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        texts = (text for pair in toy_corpus(500, seed=0) for text in pair)
        tokenizer = train_tokenizer(texts, folder / "spiece.model", 100)
        source = source % (len(tokenizer.pieces) - 6) + 6  # pieces that this tokenizer has
        export(model, folder / "spiece.model", folder / "t5")
        ctranslate2.converters.TransformersConverter(str(folder / "t5")).convert(str(folder / "ct2"))
        pieces = [[tokenizer.pieces.id_to_piece(i) for i in row] for row in source.tolist()]

        def theirs():
            return translator.translate_batch(pieces, beam_size=1, min_decoding_length=tokens,
                                              max_decoding_length=tokens)[0].hypotheses[0]
        rounds = []
        model.generate(source, tokens)  # each round's own warm-up is the second call: see `alternate`
        for _ in range(5):
            mine = alternate("cpu", lambda: model.generate(source, tokens), rounds=1)
            # Loaded anew each time: while its threads exist torch's run at 0.6 times their speed, even if they sleep.
            translator = ctranslate2.Translator(str(folder / "ct2"), intra_threads=torch.get_num_threads())
            rounds.append([mine.item(), alternate("cpu", theirs, rounds=1).item()])
            output = theirs()
            del translator
        ours = model.generate(source, tokens)[0].tolist()
        assert [i if i < len(tokenizer.pieces) else f"<extra_id_{i - len(tokenizer.pieces)}>" for i in ours] == [
            tokenizer.pieces.piece_to_id(piece) if not piece.startswith("<extra_id_") else piece
            for piece in output], "the two must give the same pieces"
        return np.array(rounds)


def train(device):
    """A training step, T5-small's shape: forward, backward, clipping, AdamW, under bfloat16 autocast."""
    model = make(SMALL, device)
    theirs, (rows, *lengths) = hugging_face(model), BATCH
    source, target = (torch.randint(6, 32000, (rows, length), device=device) for length in lengths)

    def stepper(m, loss_of):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True)

        def step():
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(m)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return step

    def ours(m):
        return losses(m, source, target, CE_ONLY)["ce"]

    def other(m):
        return m(input_ids=source, labels=target).loss
    flops = 6 * (rows * lengths[0] * parameters(model.encoder) + rows * lengths[1] * (
        parameters(model.decoder) + model.embedding.weight.numel()))
    limit = f"products {1e3 * flops / matrix_rate(device, torch.bfloat16):,.0f} ms"
    if theirs:
        with torch.no_grad():
            assert torch.isclose(ours(model), other(theirs), rtol=1e-4), "the two must have the same loss"
        show("training step, T5-small's shape, bfloat16, against transformers",
             alternate(device, stepper(model.train(), ours), stepper(theirs.train(), other), rounds=5), "1.5x", limit)


def replace(device):
    """Module replacing against fine-tuning the teacher, and one bank against nine students, through the real loops. The
    replacement rate is the mean of a run's, as paths are longer while it rises. On a GPU 30 steps, whose paths of seed
    0 are as long as a run's; on a CPU 10, whose are longer by 4 to 6 %."""
    teacher, steps = make(dict(NARROW, num_layers=12, num_decoder_layers=12), device), 30 if device == "cuda" else 10
    loop = dict(lr=1e-4, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    rate = np.mean([replacement_rate(step, 1000) for step in range(1000)])
    replacing = functools.partial(train_modules, rate_start=rate, rate_rise=math.inf, **loop)
    ways = {"": replacing}
    if device == "cuda":  # what they are for
        ways[", two paths"] = functools.partial(replacing, two_paths=True)
    for way, function in ways.items():
        bank, batches = against_tuning(teacher, device, f"12+12 layers, d_model 256{way}", function, loop, steps)
        if device == "cuda":  # where such layers are too small to fill it
            against_tuning(make(BASE, device), device, f"T5-base's shape, 16 times the batch{way}", function, loop,
                           steps, times=16)
    students = [shrink(teacher, k, k) for k in (11, 10, 9, 8, 6, 5, 4, 3, 2)]

    def nine():
        for student in students:
            train_student(student, batches, len(batches), teacher, weights=WEIGHTS, **loop)
    for way, function in ways.items():
        times = alternate(device, lambda: function(teacher, bank, batches, len(batches)), nine, rounds=2)
        show(f"one bank against nine KD students, the same number of steps each{way}", times, "≥ 3x")


def against_tuning(teacher, device, shape, replacing, loop, steps, times=1):
    """One row; returns the bank and the batches."""
    rows, *lengths = BATCH
    batches = [[torch.randint(6, 8000, (times * rows, length)) for length in lengths]] * steps
    bank, model = Bank(teacher), copy.deepcopy(teacher)

    def tuning():
        train_student(model, batches, steps, **loop)
    show(f"{steps} module-replacing steps against {steps} fine-tuning steps of the teacher, {shape}",
         alternate(device, lambda: replacing(teacher, bank, batches, steps), tuning, rounds=3), "≥ 0.77x")
    return bank, batches


def assembly(device, tokens=32):
    """The speed-up of the smallest assembly over its teacher, batch 1, as a share of what the bytes read allow."""
    teacher = make(BASE, device)
    bank = Bank(teacher)
    small = assemble(teacher, bank, even_paths(teacher, bank, 2, 2))
    source = torch.randint(6, 32000, (1, 16), device=device)
    for dtype in (torch.float32, torch.bfloat16):
        teacher.to(dtype), small.to(dtype)
        possible = possible_speedup(teacher, small, tokens)
        with quick_products():
            times = alternate(device, lambda: seconds(small, source, tokens), lambda: seconds(teacher, source, tokens),
                              rounds=7, warm_up=2)
        share = np.median(times[:, 1]) / np.median(times[:, 0]) / possible
        show(f"2+2 assembly against its 12+12 teacher, {str(dtype)[6:]}", times, "85 %" if device == "cpu" else "70 %",
             f"bytes read allow {possible:.2f}x: {100 * share:.0f} % of it")


def padding(folder):
    """The share of padding in the training batches of Multi30k, or of any train.en and train.de."""
    pairs = read_pairs(folder / "train.en", folder / "train.de")
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = train_tokenizer((text for pair in pairs for text in pair), Path(temporary) / "spiece.model", 8000)
    batches = Batches(encode_pairs(tokenizer, pairs, 128)[0], 4096, tokenizer.pad_id, seed=0)
    ids = [side for k in range(len(batches)) for side in batches[k]]
    share = sum((side == tokenizer.pad_id).sum().item() for side in ids) / sum(side.numel() for side in ids)
    print(f"| padding in the training batches of {folder.name} | {100 * share:.1f} % | ≤ 5 % | | |", flush=True)


LOAD = """import sys, torch
sys.path.insert(0, sys.argv[1])
from model import load_t5
def peak():  # of this process, in bytes; Linux alone tells it
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
before = peak()
load_t5(sys.argv[2])
print(peak() - before)"""


def load(device):
    """Loading a T5-base folder against reading the bytes of its weights, and the peak memory it takes."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        train_tokenizer((text for pair in toy_corpus(500, seed=0) for text in pair), folder / "spiece.model", 100)
        export(make(BASE), folder / "spiece.model", folder / "t5")
        gc.collect()
        file = folder / "t5" / "model.safetensors"

        def read():
            buffer = torch.empty(file.stat().st_size, dtype=torch.uint8).numpy()
            with open(file, "rb") as f:
                f.readinto(buffer)
        times = alternate("cpu", lambda: load_t5(folder / "t5"), read, rounds=5)
        code = [sys.executable, "-c", LOAD, str(Path(__file__).resolve().parent.parent), str(folder / "t5")]
        peak = int(subprocess.run(code, capture_output=True, text=True, check=True).stdout) / file.stat().st_size
        show("loading a T5-base folder against reading its bytes", times, "≥ 0.67x; memory ≤ 1.15x",
             f"peak memory {peak:.2f}x the file")


def scale(device):
    """Is the cost linear in the layers and in the generated tokens? A line through four points each."""
    source = torch.randint(6, 8000, (1, 16), device=device)
    models = {k: make(dict(NARROW, num_layers=k, num_decoder_layers=k), device) for k in (2, 4, 8, 16)}
    with quick_products():
        deep = alternate(device, *(lambda m=m: seconds(m, source, 24) for m in models.values()), rounds=7,
                         warm_up=2)
        long = alternate(device, *(lambda n=n: seconds(models[4], source, n) for n in (32, 64, 128, 256)), rounds=7)
    for name, x, times in (("layers", list(models), deep), ("generated tokens", [32, 64, 128, 256], long)):
        y = np.median(times, axis=0)
        slope, start = np.polyfit(x, y, 1)
        worst = max(abs(slope * a + start - b) / b for a, b in zip(x, y))
        print(f"| time against {name} {x}: {1e3 * start:.2f} ms + {1e3 * slope:.3f} ms each | "
              f"off the line by at most {100 * worst:.0f} % | linear | {', '.join(f'{1e3 * t:.1f}' for t in y)} ms | |",
              flush=True)


ROWS = {"generate": generate, "train": train, "replace": replace, "assembly": assembly, "load": load, "scale": scale}


@command_line
def main(argv):
    """Print the table, row by row."""
    parser = Parser(description="Speed, as ratios.")
    parser.add_argument("--only", nargs="+", choices=[*ROWS, "padding"])
    parser.add_argument("--data", type=Path, help="a folder with train.en and train.de")
    parser.add_device()
    args = parser.parse_args(argv)
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    args.device = torch.device(args.device).type
    args.only = args.only or [*ROWS, *["padding"] * bool(args.data)]
    if "padding" in args.only and not args.data:
        raise ValueError("--only padding needs --data")
    for name in ("train.en", "train.de") if args.data else ():
        if not (args.data / name).exists():
            raise FileNotFoundError(f"{args.data / name}: missing")
    print(f"{args.device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, bandwidth "
          f"{bandwidth(args.device) / 1e9:.0f} GB/s, products " + ", ".join(
              f"{matrix_rate(args.device, dtype) / 1e9:,.0f} GFLOP/s in {str(dtype)[6:]}"
              for dtype in (torch.float32, torch.bfloat16)))
    print("\n| work | median (range) | target | time | limit of the machine |\n|---|---|---|---|---|", flush=True)
    for name in args.only:
        ROWS[name](args.device) if name in ROWS else padding(args.data)


if __name__ == "__main__":
    keep_heap()
    sys.exit(main())
