"""What kills a run, and what strangers' files do: many times over, with a fixed seed.

    python tests/bench_survival.py                               # 20 stops of each kind, 2,000 mutations of each file
    python tests/bench_survival.py --stops 1 --mutations 100     # as in tests/test_survival.py

Every case runs in a forked child, so that it can be killed and its memory read from /proc: Linux only. Not collected by
pytest.
"""
import argparse
import contextlib
import errno
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path
from signal import SIGINT, SIGKILL

import torch
import torch._dynamo  # a second or two, which every child would spend anew  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import distill
import model
import train

TINY = ["--layers", "2", "--granularities", "2", "--d-model", "32", "--vocab", "80", "--teacher-steps", "6",
        "--self-distill-steps", "6", "--steps", "6", "--batch-tokens", "512", "--max-length", "12", "--device", "cpu",
        "--dtype", "float32", "--metric", "exact", "--baselines", "kd:1+1"]
RESULTS = ("teacher/model.safetensors", "bank.safetensors", "baselines/kd-1+1/model.safetensors", "spiece.model",
           "valid.safetensors")


def forked(run, errors=None):
    """Start run() in a child that never returns here, standard output silent, standard error in the file `errors`; its
    process id."""
    child = os.fork()
    if child == 0:
        status = 70  # a bug
        try:
            if errors:
                os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                status = run()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


# ---- kills, interrupts and full disks

class Watched(io.BufferedWriter):
    """A file that tells when half of a write is in it."""
    def __init__(self, path, happened):
        super().__init__(io.FileIO(path, "wb"))
        self.happened, self.called = happened, Path(path).name.removesuffix(".part")
        happened(f"begin {self.called}")

    def write(self, content):
        content = memoryview(content).cast("B")
        super().write(content[:len(content) // 2])
        self.flush()
        self.happened(f"half {self.called}")
        super().write(content[len(content) // 2:])
        return len(content)


def watch(happened):
    """Have happened(text) called at every moment of writing a file."""
    replace = os.replace

    def watched_replace(source, target):
        happened(f"whole {Path(target).name}")
        replace(source, target)
        happened(f"there {Path(target).name}")

    os.replace = watched_replace
    model.open = lambda path, mode, **options: Watched(path, happened) if mode == "wb" else open(path, mode, **options)


def start(arguments, happened=None, errors=None):
    """A run in a child that writes a checkpoint at every step, watched."""
    def run():
        if happened:
            watch(happened)
        fit = distill.fit
        distill.fit = lambda *args, **loop: fit(*args, **{**loop, "save_every": 0})
        train.speedup = lambda *_: 1.0
        return train.main(arguments)
    return forked(run, errors)


def kill():
    os.kill(os.getpid(), SIGKILL)


def interrupt():
    os.kill(os.getpid(), SIGINT)


def fill_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def stop_at(wanted, number, stop):
    """happened(text) that stops the run when `wanted` has happened `number` times."""
    seen = []

    def happened(text):
        seen.append(text)
        if text == wanted and seen.count(wanted) == number:
            stop()
    return happened


def write_pairs(folder):
    """Small data files; the options that name them."""
    pairs = data.toy_corpus(120, seed=1)
    options = []
    for name, part in (("train", pairs[:100]), ("valid", pairs[100:110]), ("test", pairs[110:])):
        (folder / f"{name}.tsv").write_text("".join(f"{s}\t{t}\n" for s, t in part), encoding="utf-8")
        options += [f"--{name}", str(folder / f"{name}.tsv")]
    return options


def uninterrupted(folder, options):
    """Run once. (seconds, [what happened])"""
    began, notes = time.perf_counter(), folder / "events"

    def note(text):
        with open(notes, "a", encoding="utf-8") as f:
            f.write(text + "\n")
    _, status = os.waitpid(start([*options, *TINY, "--out", str(folder / "whole")], note), 0)
    assert status == 0, "the run that nobody kills must end well"
    return time.perf_counter() - began, notes.read_text(encoding="utf-8").splitlines()


def go_on(out, options):
    """The command line that a user would type after a kill."""
    resumed = ["--resume", "--device", "cpu"] if (out / "args.json").exists() else [*options, *TINY]
    return [*resumed, "--out", str(out)]


def stops(folder, count, seed=0):
    """Stop a run `count` times in each of five ways, take it up again each time, and compare what it leaves with an
    uninterrupted run's. The ways: a kill and an interrupt at a random time; a kill, an interrupt and a full disk at a
    random moment of a file's writing. Yields a line a stop; raises AssertionError."""
    rng, options, out, errors = random.Random(seed), write_pairs(folder), folder / "run", folder / "errors"
    seconds, moments = uninterrupted(folder, options)
    names = sorted({text.split()[1] for text in moments})  # each way stops at each file as often as at any other
    due, stopped, runs, left = [SIGKILL, kill, SIGINT, interrupt, fill_disk] * count, 0, 0, set()
    rng.shuffle(names)
    while due or out.exists():
        arguments, where = go_on(out, options), "let run to its end"
        errors.touch()
        if not due:
            child = start(arguments, errors=errors)
        elif due[0] in (SIGKILL, SIGINT):
            wait = rng.uniform(0.1, seconds / 2)  # a child needs a moment to get into `main`
            child, where = start(arguments, errors=errors), f"{due[0].name} after {wait:.2f} s"
            time.sleep(wait)
            os.kill(child, due[0])
        else:
            name = names[(stopped // 5 + stopped % 5) % len(names)]  # of the five ways this is number stopped % 5
            moment = rng.choice([text for text in moments if text.split()[1] == name])
            number = 1 + rng.randrange(min(4, moments.count(moment)))
            where = f"{due[0].__name__} at: {moment}, time {number}"
            child = start(arguments, stop_at(moment, number, due[0]), errors)
        status, said = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), errors.read_text(encoding="utf-8")
        if status:
            before, left = left, {str(part.relative_to(out)) for part in out.rglob("*.part")}
            stop = due.pop(0)
            expected = {SIGKILL: -SIGKILL, kill: -SIGKILL, SIGINT: 130, interrupt: 130, fill_disk: 2}[stop]
            assert (status, said.count("\n")) == (expected, status > 0), \
                f"{where}: {' '.join(arguments)} ended with status {status}: {said}"
            if stop is fill_disk and not moment.startswith(("whole", "there")):  # there a real error brings its names
                assert name in said, f"{where}: the line must name the file: {said}"
            assert status < 0 or left <= before, f"{where}: {left - before} left behind"
            stopped += 1
            yield f"{stopped}: {where}; status {status}; {said.strip() or 'left behind: ' + ' '.join(sorted(left))}"
        else:  # the moment did not come any more
            for name in RESULTS:
                same = (out / name).read_bytes() == (folder / "whole" / name).read_bytes()
                assert same, f"{name} is not what an uninterrupted run makes"
            assert not list(out.rglob("*.part")), "a finished run leaves nothing half-written"
            shutil.rmtree(out)
            runs, left = runs + 1, set()
    yield f"{stopped} stops in {runs} runs: every result is bitwise that of the uninterrupted run, {seconds:.1f} s"


# ---- files from strangers

NUMBERS = (0, 1, -1, 3, 2**31, 2**53, 2**63, 2**64, 10**30, -10**30, 0.5, 4.0, 1e308, math.nan, math.inf, -math.inf)
VALUES = (*NUMBERS, None, True, "", "F32", "x" * 1000, "\ud800", [], {}, [0, 0], [[]], {"a": 1},
          {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})


def mutate_bytes(rng, raw):
    """raw with one thing done to its bytes, most of the time near the start."""
    raw, at = bytearray(raw), int(len(raw) * rng.random() ** rng.choice((1, 4)))
    end, some = at + rng.choice((1, 2, 8, 100, 5000)), rng.randbytes(rng.choice((1, 8, 300)))
    kind = rng.randrange(8)
    if kind == 0:
        raw[at:at + 1] = bytes([rng.randrange(256)])
    elif kind == 1:
        del raw[at:end]
    elif kind == 2:
        raw[at:at] = some
    elif kind == 3:
        raw[at:at] = raw[at:end]
    elif kind == 4:
        del raw[at:]
    elif kind == 5:
        raw[at:at + 1] = rng.choice((b"\0", b"\xff", b"\t", b"\n", b"\r\n", b'"', b"\\", b"{", b"\xed\xa0\x80",
                                     b"\xef\xbb\xbf", "\u2028".encode(), b"\xc3", b"9" * 30))
    elif kind == 6:
        raw[:8] = struct.pack("<Q", rng.choice((0, 1, 8, len(raw) - 8, len(raw), 2**31, 2**63, 2**64 - 1)))
    else:
        raw += some
    return bytes(raw)


def mutate_header(rng, raw):
    """A safetensors file with one to three things changed in its header."""
    length = int.from_bytes(raw[:8], "little")
    good, buffer = json.loads(raw[8:8 + length]), raw[8 + length:]
    good.pop("__metadata__")
    header = dict(good)
    for _ in range(rng.choice((1, 1, 2, 3))):
        name, other = rng.choice(list(good)), rng.choice(list(good.values()))
        entry = {key: value if key == "dtype" else list(value) for key, value in good[name].items()}
        kind, numbers = rng.randrange(5), entry[rng.choice(("shape", "data_offsets"))]
        i = rng.randrange(len(numbers))
        if kind == 0:
            name = rng.choice((name, "new", "__metadata__", "a\nb\u001b[2J", "\ud800"))
            entry = rng.choice((*VALUES, other))
        elif kind == 1:
            key = rng.choice(("dtype", "shape", "data_offsets"))
            entry[key] = rng.choice((*VALUES, other[key], *model.DTYPES))
        elif kind == 2:
            entry["shape"] += rng.choice(((0,), (0, 2**62), (-1, -1), (1,) * 100, (1,) * 9, (2,), (1.0,)))
        elif kind == 3:
            del entry[rng.choice(list(entry))]
        else:
            numbers[i] = rng.choice((*NUMBERS, numbers[i] + 1, numbers[i] - 4, 2 * numbers[i]))
        header[name] = entry
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        deep, wide = rng.choice((500, 3000, 100_000)), rng.choice((b"[],", b"{},", b'"ab",', b'{"":0},'))
        wide *= rng.choice((2**20, 2**24)) // len(wide) - 1
        text = rng.choice((b"[" * deep, b'{"a":' * deep, b"[" * deep + b"]" * deep, b"9" * 5000, b"1" * 5000 + b"]",
                           b"[" + wide + b"0]", text[:-1] + b"," + text[1:],  # as duplicate keys
                           text.decode().encode("utf-16"),
                           text.replace(b"[", b"[1" + b"0" * 5000, 1)))
    return len(text).to_bytes(8, "little") + text + buffer


def mutate_fields(rng, raw):
    """A JSON object with one to three fields changed."""
    fields = json.loads(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        fields[rng.choice(list(fields))] = rng.choice((*VALUES, rng.randrange(2000), 2**20))
    return json.dumps(fields).encode()


@contextlib.contextmanager
def at_most(size):
    """In the block this process can map no more than `size` bytes beyond what it has."""
    mapped = 1024 * int(Path("/proc/self/status").read_text(encoding="utf-8").partition("VmSize:")[2].split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limits[0] if size == math.inf else int(mapped + size), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def fuzz(path, mutations, load, count, memory=math.inf, seed=0):
    """Load `count` mutations of the file at `path` in a child. load() must raise a ValueError or OSError of one line
    that names the file or its folder, or return; in two seconds and one for each megabyte, with the file's size and
    `memory` bytes at most. What is wrong is raised as an AssertionError. Returns {outcome: how often}."""
    found, errors, raw = path.parent / "found", path.parent / "errors", path.read_bytes()

    def run():
        outcomes = {}
        load()  # once, so that what is made on first use is there
        for i in range(count):
            rng = random.Random(f"{seed} {i}")
            mutated = rng.choice(mutations)(rng, raw)
            path.write_bytes(mutated)
            began = time.process_time()
            signal.alarm(60)  # kills a load that hangs
            try:
                with at_most(len(mutated) + memory):
                    outcome = load() or "loaded"
            except (ValueError, OSError) as error:
                outcome, line = type(error).__name__, str(error)
                if not line.startswith(str(path.parent)) or "\n" in line:
                    raise AssertionError(f"mutation {i}: {line[:300]!r} is not a line about the file") from error
            except BaseException as error:
                raise AssertionError(f"mutation {i}: {type(error).__name__}") from error
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            took = time.process_time() - began
            assert took < 2 + len(mutated) / 1e6, f"mutation {i} took {took:.1f} s"
        found.write_text(json.dumps(outcomes), encoding="utf-8")
        return 0
    status = os.waitstatus_to_exitcode(os.waitpid(forked(run, errors), 0)[1])
    path.write_bytes(raw)
    assert status == 0, f"{path.name}: status {status}: {errors.read_text(encoding='utf-8')}"
    return json.loads(found.read_text(encoding="utf-8"))


def fuzz_weights(folder, count, seed=0):
    """Mutations of model.safetensors, config.json and pytorch_model.bin of a small T5: (file, outcomes) of each."""
    t5 = folder / "t5"
    shutil.copytree(Path(__file__).parent / "fixtures" / "t5_tied", t5)

    def load():
        model.load_t5(t5)
    for file, *mutations in (("model.safetensors", mutate_bytes, mutate_header, mutate_header),
                             ("config.json", mutate_bytes, mutate_fields, mutate_fields),
                             ("pytorch_model.bin", mutate_bytes)):
        if file.endswith(".bin"):
            torch.save(model.read_safetensors(t5 / "model.safetensors"), t5 / file)
            (t5 / "model.safetensors").unlink()
        yield file, fuzz(t5 / file, mutations, load, count, 64e6, seed)


def enlarge(rng, raw):
    """raw with a long line in it, once in a while of a megabyte."""
    at = rng.randrange(len(raw))
    some = rng.choice((b"a", b"a b ", "\u20ac".encode(), b"\xff", b"\t", b"\0", b"\\", b" "))
    return raw[:at] + some * (rng.choice((100,) * 19 + (1_000_000,)) // len(some)) + raw[at:]


def escape(rng, raw):
    """raw with a JSON escape or another value where a letter was."""
    at = rng.randrange(len(raw))
    return raw[:at] + rng.choice((b"\\ud800", b"\\udc00\\ud800", b"\\u0000", b"\\u2028", b"\\n", b"\\", b'": {"',
                                  b'": NaN, "', b'": ' + b"9" * 5000 + b', "', b'": ' + b"[" * 9999)) + raw[at + 1:]


def fuzz_text(folder, count, seed=0):
    """Mutations of a .tsv, a .jsonl and a spiece.model: what is read must go through the tokenizer and into batches."""
    pairs = [(f"{s} \u00e9", t) for s, t in data.toy_corpus(40, seed=1)]
    tokenizer = data.train_tokenizer((text for pair in pairs for text in pair), folder / "spiece.model", 100)
    (folder / "pairs.tsv").write_bytes("".join(f"{s}\t{t}\n" for s, t in pairs).encode())
    (folder / "pairs.jsonl").write_bytes("".join(json.dumps({"source": s, "target": t}) + "\n"
                                                 for s, t in pairs).encode())
    for file in ("pairs.tsv", "pairs.jsonl"):
        def load():
            try:
                read = data.read_pairs(folder / file)
            except ValueError as error:
                assert re.match(rf"{re.escape(str(folder / file))}(:\d+: |: empty file)", str(error)), error
                raise
            batches = data.Batches(data.encode_pairs(tokenizer, read, 64)[0], 512, tokenizer.pad_id, 0)
            for k in range(len(batches)):
                for ids in batches[k]:
                    assert 0 <= ids.min() and ids.max() < tokenizer.vocab_size
        yield file, fuzz(folder / file, (mutate_bytes, mutate_bytes, enlarge, escape), load, count, seed=seed)

    def load():
        changed = data.Tokenizer(folder / "spiece.model")
        changed.decode(changed.encode(pairs[0][0]))
    yield "spiece.model", fuzz(folder / "spiece.model", (mutate_bytes,), load, count, 64e6, seed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--stops", type=int, default=20, help="of each of five ways to stop a run")
    parser.add_argument("--mutations", type=int, default=2000, help="of each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if asked.stops:
            for line in stops(Path(folder), asked.stops, asked.seed):
                print(line, flush=True)
        for fuzz_kind in (fuzz_weights, fuzz_text) if asked.mutations else ():
            for file, outcomes in fuzz_kind(Path(folder), asked.mutations, asked.seed):
                print(f"{asked.mutations} mutations of {file}: {outcomes}", flush=True)
