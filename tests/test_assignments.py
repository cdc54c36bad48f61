"""
The course: twelve exercises (README, "Assignments"), and the test of the tests that grade them. About 25 s:

    python -m pytest tests/test_assignments.py
    python tests/test_assignments.py DIR      # a copy of the project to work in, the bodies of all exercises removed

An exercise is done when its grading command passes. That is worth something only if the command fails on wrong
answers and says why. So each exercise's body is removed here, and typical wrong versions are put in its place, in a
copy of the project: the command must fail, and its output must name the rule that was broken. A wrong version is a
piece of the source and what stands in its place; where a change of the source breaks that, the test says so.
"""

import ast
import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("model.py", "data.py", "modules.py", "distill.py", "assemble.py", "train.py")


class Wrong(NamedTuple):
    """A typical mistake: `old`, which occurs once in the exercise's file, becomes `new`."""
    what: str
    old: str
    new: str
    rule: str   # words of the failure's message: the rule that was broken


class Exercise(NamedTuple):
    file: str
    bodies: dict  # what the student writes: {function: words of the rule in the output while it is missing}
    command: str  # what follows `python -m pytest -q`
    wrong: list


# In the order of the course. An exercise's command needs this and the earlier ones, no later one.
EXERCISES = {
    "1 relative-position buckets": Exercise(
        "model.py", {"relative_position_bucket": "half of the buckets hold one exact distance each"},
        "tests/test_model.py -k buckets", [
            Wrong("the encoder's buckets are not bidirectional", "if bidirectional:\n        num_buckets //= 2",
                  "if False:\n        num_buckets //= 2", "before the query falls in bucket"),
            Wrong("keys to the right and to the left are swapped", "(distance > 0).long() * num_buckets",
                  "(distance < 0).long() * num_buckets", "before the query falls in bucket"),
            Wrong("the logarithm starts at distance 1", "torch.log(distance.float().clamp(min=1) / exact)",
                  "torch.log(distance.float().clamp(min=1))", "the rest log-spaced up to distance 128"),
            Wrong("distances beyond the largest get buckets that do not exist", "far.clamp(max=num_buckets - 1)", "far",
                  "positions before the query falls in bucket")]),
    "2 RMSNorm": Exercise(
        "model.py", {"RMSNorm.forward": "x / sqrt(mean(x^2) + eps) * weight"},
        "tests/test_model.py -k rms_norm", [
            Wrong("the mean is subtracted, as in LayerNorm", "x32 = x.float()",
                  "x32 = x.float() - x.float().mean(-1, keepdim=True)", "no mean subtracted"),
            Wrong("one mean for all positions", "x32.square().mean(-1, keepdim=True)", "x32.square().mean()",
                  "every position has a mean of its own"),
            Wrong("epsilon outside the root", "torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)",
                  "1 / (x32.square().mean(-1, keepdim=True).sqrt() + self.eps)", "under the root"),
            Wrong("the mean square in 16 bit", "x32 = x.float()", "x32 = x", "square it in float32")]),
    "3 attention with a cache": Exercise(
        "model.py", {"Attention.forward": "(B, T, d_model), keys and values (B, H, K, d_kv), bias",
                     "LayerCache.append": "new keys and values at `positions` (T,), return those"},
        "tests/test_model.py -k test_attention", [
            Wrong("scores divided by sqrt(d_kv)", "(queries @ keys.transpose(-1, -2)).float()",
                  "(queries @ keys.transpose(-1, -2)).float() / self.d_kv ** 0.5",
                  "does not divide scores by sqrt(d_kv)"),
            Wrong("the fused kernel divides by sqrt(d_kv), as is its default",
                  "attn_mask=bias.to(queries.dtype), scale=1.0", "attn_mask=bias.to(queries.dtype)",
                  "both branches of attention must agree"),
            Wrong("a softmax over the queries", ".float() + bias, dim=-1)", ".float() + bias, dim=-2)",
                  "the softmax goes over the keys"),
            Wrong("the position bias forgotten", ".float() + bias, dim=-1)", ".float(), dim=-1)",
                  "the bias is added to the scores"),
            Wrong("all heads mixed up", "x.unflatten(-1, (-1, self.d_kv)).transpose(1, 2)",
                  "x.unflatten(-1, (self.d_kv, -1)).permute(0, 3, 1, 2)", "head 0 sees numbers 0 and 1"),
            Wrong("new keys overwrite the first position", "self.keys.index_copy_(2, positions, keys)",
                  "self.keys[:, :, :keys.size(2)] = keys", "returns all 2, each in its place"),
            Wrong("the cache shows all its room", "return self.keys[:, :, :visible], self.values[:, :, :visible]",
                  "return self.keys, self.values", "returns all 1, each in its place"),
            Wrong("the cache's position off by one", "self.places[:self.visible] - self.positions",
                  "self.places[:self.visible] - (self.positions - 1).clamp(min=0)",
                  "each with the position bias of its distance")]),
    "4 the names of a checkpoint": Exercise(
        "model.py", {"checkpoint_name": "its name in a checkpoint", "T5.logits": "d_model^-0.5"},
        "tests/test_model.py -k 'checkpoint_name or tied_head_by_hand'", [
            Wrong("the position table is looked for in the stack, where we keep it",
                  '"block.0.layer.0.SelfAttention.relative_attention_bias"', '"relative_attention_bias"',
                  "the stack's position table is in block 0"),
            Wrong("the decoder's feed-forward where the encoder has it", '"feed_forward": "layer.2.DenseReluDense"',
                  '"feed_forward": "layer.1.DenseReluDense"', "sub-layers are numbered in their order"),
            Wrong("cross-attention under the name of self-attention", '"layer.1.EncDecAttention"',
                  '"layer.1.SelfAttention"', "cross in the decoder"),
            Wrong("a tied head without the scale", "hidden = hidden * self.config.d_model ** -0.5", "pass",
                  "times d_model^-0.5, here 1/4"),
            Wrong("an untied head with the scale", "if self.config.scale_decoder_outputs:", "if True:",
                  "as it is")]),
    "5 the safetensors reader": Exercise(
        "model.py", {"read_safetensors": "8 bytes little-endian header length"},
        "tests/test_model.py -k read_safetensors", [
            Wrong("the header's length in the other byte order", 'int.from_bytes(f.read(8), "little")',
                  'int.from_bytes(f.read(8), "big")', "header's length, little-endian"),
            Wrong("offsets count from the start of the file", "tensors[name], end_of_data =",
                  "f.seek(begin)\n                tensors[name], end_of_data =", "offsets count from the header's end"),
            Wrong("tensors in the header's order", 'sorted(header.items(), key=lambda item: item[1]["data_offsets"])',
                  "header.items()", "in any order"),
            Wrong("the metadata taken for a tensor", 'header.pop("__metadata__", None)', "pass", "a good file"),
            Wrong("everything is float32", 'DTYPES[entry["dtype"]]', "torch.float32", "a good file")]),
    "6 spans that tile": Exercise(
        "modules.py", {"module_spans": "each granularity g tiles it"},
        "tests/test_modules.py -k 'module_spans or granularity'", [
            Wrong("the last span is missing", "for start in range(0, n, g)]", "for start in range(0, n - g, g)]",
                  "the last one ends at 6"),
            Wrong("stop is the last layer", "(start, start + g) for g", "(start, start + g - 1) for g",
                  "end where the next one starts"),
            Wrong("a span at every layer", "for start in range(0, n, g)]", "for start in range(0, n - g + 1)]",
                  "start at multiples of its length"),
            Wrong("a granularity that does not divide", "if g < 2 or n % g:", "if g < 2:", "do not tile")]),
    "7 copying layers": Exercise(
        "modules.py", {"merge": "a copy of one layer of the span", "with_layers": "copies of these"},
        "tests/test_modules.py -k 'init_ or copies'", [
            Wrong("the module is the teacher's layer, not a copy",
                  "module = copy.deepcopy(layers[evenly(len(layers), len(layers) // g)[start // g]])",
                  "module = layers[evenly(len(layers), len(layers) // g)[start // g]]",
                  "must not share a tensor with the teacher"),
            Wrong("always the first layer of the span",
                  "module = copy.deepcopy(layers[evenly(len(layers), len(layers) // g)[start // g]])",
                  "module = copy.deepcopy(layers[start])", "a copy, evenly spaced"),
            Wrong("a sum, not a mean", "torch.stack(others).mean(0)", "torch.stack(others).sum(0)",
                  "the mean of the span"),
            Wrong("the mean misses the first layer", "torch.stack(others).mean(0)", "torch.stack(others[1:]).mean(0)",
                  "the mean of the span"),
            Wrong("the position table lost with layer 0", "own.positions, own.norm = copy.deepcopy(source.positions),",
                  "own.positions, own.norm = nn.Embedding(*source.positions.weight.shape),", "the stack owns it"),
            Wrong("a tied head copied by itself", "copy.deepcopy((teacher.embedding, teacher.head))",
                  "copy.deepcopy(teacher.embedding), copy.deepcopy(teacher.head)", "stay one tensor"),
            Wrong("the final norm shared with the teacher", "copy.deepcopy(source.norm)", "source.norm",
                  "must not share a tensor with the teacher")]),
    "8 drawing a path": Exercise(
        "modules.py", {"sample_path": "Draw a path through n layers"},
        "tests/test_modules.py -k 'sampled_path or position or random_state'", [
            Wrong("a path that skips a layer", "start = path[-1][1]", "start = path[-1][1] + 1",
                  "each of 2 layers once and in order"),
            Wrong("always the shortest module", "rng.choice(here)", "here[0]", "all modules have the same chance"),
            Wrong("the rate of the teacher's layers", "rng.random() < rate", "rng.random() >= rate",
                  "at rate 0 the teacher's layers run alone"),
            Wrong("a generator of its own", "rng.random() < rate", "__import__('random').random() < rate",
                  "the same random state must give the same path")]),
    "9 the distillation losses": Exercise(
        "distill.py", {"cross_entropy": "L_ce = ", "logit_distillation": "L_kd = ", "hidden_distillation": "L_hid = ",
                       "attention_distillation": "L_att = "},
        "tests/test_distill.py -k 'entropy or distillation_by_hand'", [
            Wrong("a sum over tokens, not a mean", 'reduction="sum") / over_processes(len(targets), student)',
                  'reduction="sum")', "the mean over tokens of -log p"),
            Wrong("KL the wrong way round", "F.kl_div(student, teacher,", "F.kl_div(teacher, student,",
                  "the teacher's p stands before the log"),
            Wrong("a mean over the vocabulary, too", 'reduction="sum", log_target=True)',
                  'reduction="mean", log_target=True)', "the mean over tokens of sum_v"),
            Wrong("divided by the batch, as batchmean does, not by its tokens",
                  "log_target=True) / over_processes(len(student), student)", "log_target=True) / 2",
                  "does not grow with their number"),
            Wrong("padding in the hidden states", "states.float().masked_fill(~mask[..., None], 0)", "states.float()",
                  "of the real tokens"),
            Wrong("an absolute error", "/ over_processes(teacher.square().sum((1, 2, 3)), teacher)",
                  "/ over_processes(teacher.numel(), teacher)", "over the teacher's mean square"),
            Wrong("attention's KL the wrong way round", "teacher * ((teacher + 1e-9) / (student + 1e-9)).log()",
                  "student * ((student + 1e-9) / (teacher + 1e-9)).log()", "KL(teacher || student)"),
            Wrong("attention summed over the heads", " * teacher.size(2))", ")", "2 queries and 2 heads"),
            Wrong("log 0", "/ (student + 1e-9)", "/ student", "must not make the loss infinite")]),
    "10 the replacing step": Exercise(
        "distill.py", {"run_stacks": "its decoder reads its own memory", "losses": "Those terms of one batch",
                       "train_modules": "draw an encoder and a decoder path"},
        "tests/test_distill.py -k 'modules_by_hand or padding or gradients_reach or sampled_rates or rows_of_every or "
        "two_paths'", [
            Wrong("padding left in the loss", 'masks = {"encoder": source != student.config.pad_token_id,',
                  'masks = {"encoder": source >= 0,', "after the last layer of its span"),
            Wrong("the decoder reads the memory before its norm", "shift_right(target, model.config), encoded.hidden,",
                  "shift_right(target, model.config), encoded.states[-1],", "the decoder reads targets shifted right"),
            Wrong("the decoder sees the source's padding",
                  "dict.fromkeys(STACKS), source != model.config.pad_token_id",
                  "dict.fromkeys(STACKS), source == source", "without padding"),
            Wrong("the target is not shifted", "model.decode(shift_right(target, model.config),",
                  "model.decode(target,", "the decoder reads targets shifted right"),
            Wrong("held against the state after the span's first layer",
                  "[stop - 1 for _, stop in paths[stack]]\n            states",
                  "[start for start, _ in paths[stack]]\n            states", "after the last layer of its span"),
            Wrong("held against the state before the span's last layer", "torch.stack([theirs[stack].states[i] for i",
                  "torch.stack([theirs[stack].states[i - 1] for i", "after the last layer of its span"),
            Wrong("only the first layer of a path is distilled", "hidden_distillation(*states,",
                  "hidden_distillation(states[0][:1], states[1][:1],", "each module"),
            Wrong("attention of the span's first layer", "zip(*(theirs[stack].probs[i] for i in last))",
                  "zip(*(theirs[stack].probs[start] for start, _ in paths[stack]))",
                  "the last layer of its span: self- and cross-attention"),
            Wrong("a teacher that is not frozen", "fit(bank, step_loss",
                  "teacher.requires_grad_(True)\n    fit(bank, step_loss", "no gradient is kept for the teacher"),
            Wrong("the teacher's rows in another order", "some_rows(theirs, rows,", "some_rows(theirs, rows.flip(0),",
                  "must be those of the rows that the path runs"),
            Wrong("every granularity on as many rows", 'min(1.0, passes * g / sum(grains["decoder"]))',
                  'min(1.0, passes / len(grains["decoder"]))', "rows, rounded up"),
            Wrong("of two paths, always the largest granularities", 'systematic_sample(shares["decoder"], rng)',
                  'list(shares["decoder"])[-2:]', "are drawn in proportion"),
            Wrong("every granularity on the first rows", "rng.sample(range(whole), n)", "range(n)",
                  "draws the rows anew"),
            Wrong("the encoder's granularities with equal chances", 'weights=list(grains["encoder"])', "weights=None",
                  "in proportion to it"),
            Wrong("the same draw in every step", 'random.Random(f"{seed} {step}")', "random.Random(seed)",
                  "anew")]),
    "11 choosing an assembly": Exercise(
        "assemble.py", {"best_paths": "the cheapest path of every depth",
                        "choose_depths": "shrinks both stacks by the same share"},
        "tests/test_assemble.py -k 'best_paths or path_of_depth or choose_depths'", [
            Wrong("the dearest span, not the sum", "longer = total + cost(previous, span), ",
                  "longer = max(total, cost(previous, span)), ", "the least sum of squared lengths"),
            Wrong("the span before does not matter", "total + cost(previous, span)", "total + cost(None, span)",
                  "after the one before"),
            Wrong("only the best way to a layer is kept, whatever its last span", "here[depth + 1, span] = min(longer, "
                  "here.get((depth + 1, span), longer))", "here[depth + 1, None] = min(longer, "
                  "here.get((depth + 1, None), longer))", "after the one before"),
            Wrong("of equals the upper layers stay whole", "min(longer, here.get((depth + 1, span), longer))",
                  "min(here.get((depth + 1, span), longer), longer, key=lambda x: (x[0], [a - b for a, b in x[1]]))",
                  "lower layers are whole"),
            Wrong("speed-first takes the encoder's layers", "min(pairs, key=lambda p: p[1])",
                  "min(pairs, key=lambda p: p[0])", "speed-first takes the decoder's layers first"),
            Wrong("size-first by the number of layers, not their share", "abs(p[0] * decoder[-1] - p[1] * encoder[-1])",
                  "abs(p[0] - p[1])", "by the same share")]),
    "12 beam search": Exercise(
        "model.py", {"T5._beam_search": "Keep the K best prefixes"},
        "tests/test_model.py -k beam", [
            Wrong("the length counts the start token", "newly = best[:, :K] / (t + 1) ** length_penalty",
                  "newly = best[:, :K] / (t + 2) ** length_penalty", "the length counts eos and not the start token"),
            Wrong("no length penalty", "newly = best[:, :K] / (t + 1) ** length_penalty", "newly = best[:, :K]",
                  "the length counts eos"),
            Wrong("K candidates, not 2K", ".topk(2 * K)", ".topk(K)", "draw 2K candidates"),
            Wrong("K equal beams at the start", "score[:, 0] = 0.0", "score[:] = 0.0", "expand one start, not two"),
            Wrong("the cache does not follow the beams", "cache.reorder(", "str(", "row i of the cache must follow"),
            Wrong("stops at the first finished hypothesis", "(score[:, 0] / (t + 1) ** length_penalty > "
                  "finished_score[:, -1])", "(finished_score[:, 0] <= low / 2)",
                  "go on while the best running prefix")]),
}


# ---- changing a source file

def without_body(text, function):
    """The source `text` with nothing left of `function` ("name" or "Class.name") but its docstring."""
    nodes = ast.parse(text).body
    for name in function.split("."):
        node = next(node for node in nodes if getattr(node, "name", None) == name)
        nodes = node.body
    lines = text.splitlines(keepends=True)
    empty = " " * nodes[0].col_offset + "raise NotImplementedError\n"
    return "".join([*lines[:nodes[0].end_lineno], empty, *lines[node.end_lineno:]])


def without_bodies(exercises):
    """{file: source} with the bodies of all these exercises removed."""
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file in FILES}
    for exercise in exercises:
        for function in exercise.bodies:
            sources[exercise.file] = without_body(sources[exercise.file], function)
    return sources


def copy_project(folder, sources):
    """Write the six files as they are in `sources`, the README and all that the grading tests need to a new folder."""
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", Path(__file__).name))
    for name in ("README.md", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    for file, text in sources.items():
        (folder / file).write_text(text, encoding="utf-8")


# ---- grading: pytest in a fork of a process that has imported torch already

def grader():
    """For each line [folder, arguments, seconds] of standard input run pytest there, and print [exit status, output].

    The process that forks is a fresh one: one that has trained, above all on a GPU, can not be forked safely.
    """
    import sentencepiece, torch, tqdm  # noqa: E401, F401, what the six files import
    torch.set_num_threads(1)
    with torch.device("meta"):
        torch.nn.Embedding(1, 1)  # the first use imports half of torch, a second that the children need not spend
    assert not {Path(file).stem for file in FILES} & set(sys.modules), "every child imports its folder's own"
    sys.dont_write_bytecode = False  # the tests, rewritten by pytest, are the same for every child
    gc.freeze()                      # pytest collects garbage: not among what all children share
    for line in sys.stdin:
        folder, arguments, seconds = json.loads(line)
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                status = 70
                try:
                    signal.alarm(seconds)  # nothing catches it: the child ends
                    os.chdir(folder)
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                    sys.path.insert(0, folder)
                    own = ["--basetemp", f"{folder}/tmp", "-p", "no:cacheprovider"]
                    status = pytest.main(["-q", "-x", *own, *arguments])
                    sys.stdout.flush()
                finally:
                    os._exit(status)  # whatever happened, the child must not go on with the loop
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            print(json.dumps([status, output.read().decode(errors="replace")]), flush=True)


class Grader:
    """A process that runs `grader`, and a copy of the project for it to work on."""
    def __init__(self, folder):
        self.folder = folder
        copy_project(folder, without_bodies([]))
        line = [sys.executable, "-c", f"import {Path(__file__).stem}; {Path(__file__).stem}.grader()"]
        self.process = subprocess.Popen(line, cwd=ROOT / "tests", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def grade(self, command, sources):
        """The exit status and output of a grading command where the six files are `sources`."""
        for file, text in sources.items():
            if (path := self.folder / file).read_text(encoding="utf-8") != text:
                path.write_text(text, encoding="utf-8")
                for compiled in (self.folder / "__pycache__").glob(f"{path.stem}.*"):
                    compiled.unlink()  # it goes by the second and the size of a file
        print(json.dumps([str(self.folder), shlex.split(command), 60]), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="session")
def graded(aside, tmp_path_factory, request):
    """{test id: future of the exit status and output}. The grader works on a second core while other tests run."""
    grader = Grader(tmp_path_factory.mktemp("course") / "project")
    yield {item.nodeid: aside.submit(lambda exercise, sources: grader.grade(exercise.command, sources),
                                     *QUESTIONS[item.originalname](**item.callspec.params))
           for item in request.session.items if getattr(item, "originalname", "") in QUESTIONS}
    aside.shutdown(cancel_futures=True)
    grader.process.stdin.close()
    grader.process.wait()


def missing_body(name, function):
    exercise, sources = EXERCISES[name], without_bodies([])
    return exercise, sources | {exercise.file: without_body(sources[exercise.file], function)}


def wrong_version(name, wrong):
    exercise, sources = EXERCISES[name], without_bodies([])
    return exercise, sources | {exercise.file: sources[exercise.file].replace(wrong.old, wrong.new)}


def later_bodies_missing(number):
    exercise, *later = list(EXERCISES.values())[number:]
    return exercise, without_bodies(later)


QUESTIONS = {"test_a_missing_body_is_caught": missing_body, "test_a_wrong_version_is_caught": wrong_version,
             "test_an_exercise_needs_no_later_one": later_bodies_missing}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="grades in forks of one process; this system has none")


def assert_caught(status, output, rule, command):
    """The command failed in a test, not for want of tests, and its output has the words of the rule."""
    assert status != 0, f"`{command}` passes: strengthen the tests that it selects"
    assert status == 1, f"`{command}` must fail in a test, and not with exit status {status}:\n{output[-2000:]}"
    assert rule in output, f"the failure must say: ... {rule} ..., so that a student learns from it:\n{output[-4000:]}"


@needs_fork
def test_grading_begins(graded, request):
    """The first test of all: see conftest.py."""
    waiting = {item.nodeid for item in request.session.items if "graded" in getattr(item, "fixturenames", ())}
    assert set(graded) == waiting - {request.node.nodeid}, "who waits for a grade has asked for it"


@needs_fork
@pytest.mark.parametrize("name, function", [(name, function) for name, exercise in EXERCISES.items()
                                            for function in exercise.bodies])
def test_a_missing_body_is_caught(graded, request, name, function):
    status, output = graded[request.node.nodeid].result()
    assert_caught(status, output, EXERCISES[name].bodies[function], EXERCISES[name].command)
    assert "NotImplementedError" in output


@needs_fork
@pytest.mark.parametrize("name, wrong", [pytest.param(name, wrong, id=f"{name}: {wrong.what}")
                                         for name, exercise in EXERCISES.items() for wrong in exercise.wrong])
def test_a_wrong_version_is_caught(graded, request, name, wrong):
    exercise = EXERCISES[name]
    found = (ROOT / exercise.file).read_text(encoding="utf-8").count(wrong.old)
    assert found == 1, f"{exercise.file} has changed: {wrong.old!r} occurs {found} times in it, not once"
    status, output = graded[request.node.nodeid].result()
    messages = "\n".join(re.findall(r"^E  .*(?:AssertionError|Failed): (.*)", output, re.MULTILINE))
    assert_caught(status, messages if status == 1 else output, wrong.rule, exercise.command)


@needs_fork
@pytest.mark.parametrize("number", range(len(EXERCISES)))
def test_an_exercise_needs_no_later_one(graded, request, number):
    """The bodies of all later exercises are missing, as in a course; the last one is graded in an unchanged copy."""
    status, output = graded[request.node.nodeid].result()
    command = list(EXERCISES.values())[number].command
    assert status == 0, f"`{command}` must pass once this and the earlier ones are done:\n{output[-4000:]}"


def test_the_course_is_complete():
    assert len(EXERCISES) == 12
    for name, exercise in EXERCISES.items():
        assert len(exercise.wrong) >= 2, f"{name}: at least two typical mistakes"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for exercise in EXERCISES.values():
        assert f"`python -m pytest -q {exercise.command}`" in readme, "the README gives every grading command"


def test_a_copy_to_work_in(tmp_path):
    line = [sys.executable, __file__, str(tmp_path / "course")]
    run = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    text = "".join((tmp_path / "course" / file).read_text(encoding="utf-8") for file in FILES)
    functions = sum(len(exercise.bodies) for exercise in EXERCISES.values())
    assert text.count("raise NotImplementedError\n") == functions, "every body of every exercise is removed, no other"
    assert (tmp_path / "course" / "README.md").exists(), "the exercises tell the student to read it"
    for file in FILES:
        compile((tmp_path / "course" / file).read_text(encoding="utf-8"), file, "exec")


if __name__ == "__main__":
    copy_project(Path(sys.argv[1]), without_bodies(EXERCISES.values()))
