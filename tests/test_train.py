"""The recipe, run small from end to end, and everything a user can get wrong on its command line.

    pytest tests/test_train.py
"""
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import distill
import train
from assemble import assemble
from assemble import main as assemble_main
from data import Batches, Tokenizer, encode_pairs, read_pairs, toy_corpus
from distill import save_checkpoint
from model import (MAX_HEADER, QUICK, T5, T5Config, load_t5, read_json, read_safetensors, write_json,
                   write_safetensors)
from modules import STACKS, Bank, default_granularities, load_bank, module_spans

FIXTURES = Path(__file__).parent / "fixtures"
SHORT = ["--teacher-steps", "5", "--self-distill-steps", "3", "--steps", "4", "--lr", "2e-2", "--batch-tokens", "512",
         "--max-length", "12", "--device", "cpu", "--dtype", "float32"]
SMALL = ["--layers", "6", "--d-model", "32", "--vocab", "80", *SHORT]
BASELINES = "sft:3+3,kd:3+2,calibrated:1+6,pseudo:1+1,theseus:2+3"


@pytest.fixture(scope="module", autouse=True)
def quick():
    """No speed is measured, as nobody reads these: the time is the number of layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "speedup", lambda teacher, model, source: sum(teacher.depths.values())
                      / sum(model.depths.values()))
        yield


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A training, a validation and a test file of toy pairs, as .tsv, .jsonl and two parallel files."""
    folder = tmp_path_factory.mktemp("data")
    pairs = toy_corpus(120, seed=1)
    (folder / "train.tsv").write_text("".join(f"{s}\t{t}\n" for s, t in pairs[:100]), encoding="utf-8")
    (folder / "valid.jsonl").write_text("".join(json.dumps({"source": s, "target": t}) + "\n"
                                                for s, t in pairs[102:110]), encoding="utf-8")
    (folder / "test.src").write_text("".join(s + "\n" for s, _ in pairs[110:]), encoding="utf-8")
    (folder / "test.tgt").write_text("".join(t + "\n" for _, t in pairs[110:]), encoding="utf-8")
    return folder


def data_args(files):
    return ["--train", str(files / "train.tsv"), "--valid", str(files / "valid.jsonl"),
            "--test", str(files / "test.src"), str(files / "test.tgt")]


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """The folder of one small run with every kind of baseline; beside it, in "printed", what it printed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = train.main([*data_args(files), *SMALL, "--out", str(out), "--metric", "exact",
                             "--baselines", BASELINES])
    assert status == 0, "a run on good files ends with exit status 0"
    (out.parent / "printed").write_text(printed.getvalue(), encoding="utf-8")
    return out


def test_without_a_terminal_progress_is_lines(finished):
    lines = (finished.parent / "printed").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("bank: step 1 of 4, loss") for line in lines), "no progress bar there: a line instead"


def test_run_folder_is_complete(finished):
    for name in ("args.json", "log.jsonl", "spiece.model", "valid.safetensors", "teacher/model.safetensors",
                 "first-teacher/model.safetensors", "first-teacher/pseudo.json", "pseudo.json", "bank.safetensors",
                 "results.json", "frontier.svg", "baselines/kd-3+2/config.json"):
        assert (finished / name).exists(), f"a finished run holds {name}"
    assert not (finished / "checkpoint.pt").exists(), "a finished run needs no checkpoint any more"
    assert not list(finished.rglob("*.part")), "nothing half-written stays"
    settings = json.loads((finished / "args.json").read_text(encoding="utf-8"))
    assert settings["steps"] == 4 and not {"out", "resume", "device"} & set(settings), \
        "args.json holds the run's settings, and not what --resume may change"


FILES = ["--train", "a", "--valid", "b", "--test", "c"]
SETTINGS = {"seed": 0, "prefix": "", "num_beams": 1, "granularities": None, "init": "calibrated",
            "lr": 3e-2, "out": Path("run"), "resume": False, "device": "cuda:0" if torch.cuda.is_available() else "cpu"}
TOY = {"dtype": "float32", "metric": "exact", "layers": 6, "d_model": 64, "vocab": 200, "batch_tokens": 2048,
       "dropout": 0.0,
       "teacher_steps": 900, "self_distill_steps": 0, "teacher_lr": 1.5e-2, "steps": 50, "targets": "data",
       "max_length": 64, "baselines": "sft:3+3,kd:3+3,sft:1+1,kd:1+1"}
REAL = {"dtype": "auto", "metric": "bleu", "layers": 12, "d_model": 128, "vocab": 8000, "batch_tokens": 4096,
        "dropout": 0.1,
        "teacher_steps": 4700, "self_distill_steps": 1880, "teacher_lr": 3e-2, "steps": 1880, "targets": "teacher",
        "max_length": 128, "baselines": ""}
FINE_TUNE = {**REAL, "teacher_lr": 1e-3, "lr": 5e-3, "self_distill_steps": 0,
             **dict.fromkeys(("layers", "d_model", "dropout", "vocab"))}  # the teacher has its own


@pytest.mark.parametrize("options, settings", (
    ([], TOY), (FILES, REAL), ([*FILES, "--teacher", "t5-small"], FINE_TUNE),
    (["--lr", "0.5", "--steps", "7"], {**TOY, "lr": 0.5, "steps": 7}),
    (["--layers", "4"], {**TOY, "layers": 4, "baselines": "sft:2+2,kd:2+2,sft:1+1,kd:1+1"})),
                         ids=("toy", "real", "fine-tuning", "options", "depth"))
def test_settings_by_default(options, settings):
    found = vars(train.parse_args(options))
    for name, value in {**SETTINGS, **settings}.items():
        assert found[name] == value, f"the README's results are those of {name} {value}: with another, measure anew"


@pytest.mark.parametrize("options, words", (
    (["--teacher", "t5-small"], "--teacher needs --train, --valid and --test"),
    ([*FILES, "--teacher", ""], "--teacher: empty"),
    ([*FILES, "--teacher", "t5-small", "--d-model", "64"], "--d-model: of a teacher from scratch; --teacher brings"),
    ([*FILES, "--teacher", "t5-small", "--dropout", "0"], "--dropout: of a teacher from scratch"),
    (["--prefix", "translate: "], "--prefix needs --train, --valid and --test"),
    (FILES[:4], "go together; only train, valid came"), (["--d-model", "48"], "--d-model 48: not a multiple of 32"),
    (["--lr", "-1"], "--lr -1.0: must be above 0"), (["--teacher-lr", "nan"], "--teacher-lr nan: must be above 0"),
    (["--lr", "inf"], "--lr inf: must be above 0, and finite"),
    (["--seed", "4294967296"], "--seed 4294967296: must be at most 4294967295"),
    (["--vocab", "1000000000000"], "--vocab 1000000000000: must be at most 1000000"),
    (["--layers", "100000"], "--layers 100000: must be at most 300")))
def test_settings_that_do_not_go_together(options, words):
    with pytest.raises(ValueError, match=words):
        train.parse_args(options)


def test_files_and_teacher_are_found_from_elsewhere():
    args = train.parse_args([*FILES, "--test", "c", "d", "--teacher", "."])
    assert (args.train, args.test) == ([str(Path("a").absolute())], [str(Path(x).absolute()) for x in "cd"])
    assert args.teacher == str(Path.cwd()), "a folder's name is absolute, so that --resume works from another one"


def test_lists_of_settings_by_hand():
    assert train.span_lengths("3,2,3") == [2, 3] and train.parse_baselines("") == []
    assert train.parse_baselines("kd:6+5,sft:2+2,kd:6+5") == [("kd", 6, 5), ("sft", 2, 2)], "in order, each once"


def test_the_search_sees_pairs_from_everywhere():
    rows = train.probe_rows(1000)
    assert rows == train.probe_rows(1000) and len(set(rows)) == 300, "300 pairs, the same ones every time"
    assert sorted(train.probe_rows(20)) == list(range(20)), "all of a small set"
    assert 120 < sum(row % 2 for row in rows) < 180, "of a file of short and long lines in turn, both"
    assert 120 < sum(row < 500 for row in rows) < 180, "of a sorted file, both ends"


@pytest.mark.parametrize("baselines, good", (
    ("kd:1+1,sft:6+4", True), ("kd:0+1", False), ("kd:1+0", False), ("kd:7+1", False), ("kd:1+5", False),
    ("theseus:3+2,theseus:6+1,theseus:2+4", True), ("theseus:4+2", False), ("theseus:3+3", False),
    ("theseus:6+4", False), ("calibrated:3+2,calibrated:6+1", True), ("calibrated:4+2", False),
    ("calibrated:6+4", False)))
def test_baselines_of_a_teacher_of_6_and_4_layers(baselines, good):
    args = Namespace(granularities=None, baselines=baselines)
    if good:
        train.check_plan(args, 6, 4)
    else:
        with pytest.raises(ValueError, match=f"--baselines {baselines}".replace("+", ".")):
            train.check_plan(args, 6, 4)


def test_a_depth_without_modules():
    train.check_plan(args := Namespace(granularities=None, baselines=""), 7, 4)  # the decoder alone has some
    with pytest.raises(ValueError, match="7.7 layers"):
        train.check_plan(args, 7, 7)


PAIRS = {"train": toy_corpus(100, 0), "valid": toy_corpus(5, 1)}


def test_a_teacher_from_scratch_by_hand(tmp_path):
    weights = []
    for i, seed in enumerate("001"):
        args = train.parse_args(["--layers", "2", "--d-model", "256", "--vocab", "70", "--baselines", "", "--dtype",
                                 "float32", "--dropout", "0.2", "--seed", seed, "--out", str(tmp_path / str(i))])
        teacher, tokenizer = train.start_run(args, PAIRS)
        weights.append(teacher.embedding.weight)
    c = teacher.config
    assert (c.vocab_size, len(tokenizer.pieces), c.num_layers, c.num_decoder_layers) == (170, 70, 2, 2)
    assert (c.d_model, c.num_heads, c.d_kv, c.d_ff) == (256, 8, 32, 1024), "heads of 32 numbers, d_ff 4 times d_model"
    assert c.dropout_rate == 0.2
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2]), "the seed draws the weights"


def test_a_teacher_with_more_pieces_than_words_is_refused(tmp_path):
    shutil.copytree(FIXTURES / "t5_tied", tmp_path / "t5")  # of 99 words
    args = train.parse_args([*FILES, "--teacher", str(tmp_path / "t5"), "--out", str(tmp_path / "run"),
                             "--dtype", "float32"])
    texts = [text for pair in toy_corpus(200, 0) for text in pair]
    train.train_tokenizer(texts, tmp_path / "t5" / "spiece.model", 100)
    with pytest.raises(ValueError, match="t5: spiece.model has 100 pieces, the embedding 99 rows"):
        train.start_run(args, PAIRS)
    tokenizer = train.train_tokenizer(texts, tmp_path / "t5" / "spiece.model", 99)
    with pytest.raises(ValueError, match="t5: the embedding has no rows for sentinels"):
        train.start_run(args, {**PAIRS, "valid": [("one <extra_id_0> sheep", "one")]})
    assert not (tmp_path / "run").exists(), "nothing half-written"
    assert train.start_run(args, PAIRS)[1].model_bytes == tokenizer.model_bytes, "as many pieces as rows is fine"


@pytest.mark.parametrize("value", (float("inf"), float("nan")))
@pytest.mark.parametrize("name", ("shared.weight", "decoder.block.1.layer.2.DenseReluDense.wo.weight"))
def test_a_teacher_that_is_not_finite_is_refused(tmp_path, name, value):
    shutil.copytree(FIXTURES / "t5_tied", tmp_path / "t5")
    weights = read_safetensors(tmp_path / "t5" / "model.safetensors")
    weights[name][1, 2] = value
    write_safetensors(weights, tmp_path / "t5" / "model.safetensors")
    train.train_tokenizer((text for pair in toy_corpus(200, 0) for text in pair), tmp_path / "t5" / "spiece.model", 99)
    args = train.parse_args([*FILES, "--teacher", str(tmp_path / "t5"), "--out", str(tmp_path / "run")])
    with pytest.raises(ValueError, match=f"t5: tensor {name} does not hold finite numbers"):
        train.start_run(args, PAIRS)
    assert not (tmp_path / "run").exists(), "nothing half-written"


@pytest.mark.parametrize("name, value", (("pad_token_id", 3), ("eos_token_id", 2)))
def test_a_teacher_whose_tokenizer_is_another_ones_is_refused(tmp_path, name, value):
    shutil.copytree(FIXTURES / "t5_tied", tmp_path / "t5")
    config = json.loads((tmp_path / "t5" / "config.json").read_text())
    (tmp_path / "t5" / "config.json").write_text(json.dumps({**config, name: value}))
    train.train_tokenizer((text for pair in toy_corpus(200, 0) for text in pair), tmp_path / "t5" / "spiece.model", 99)
    args = train.parse_args([*FILES, "--teacher", str(tmp_path / "t5"), "--out", str(tmp_path / "run")])
    with pytest.raises(ValueError, match=f"t5: config.json has .*{name} {value}.*spiece.model 0 and 1"):
        train.start_run(args, PAIRS)


def test_least_settings():
    train.parse_args(["--seed", "4294967295"])
    for name, least in {"layers": 2, "d-model": 32, "vocab": 1, "max-length": 2, "batch-tokens": 1, "num-beams": 1,
                        "steps": 1, "teacher-steps": 0, "self-distill-steps": 0, "seed": 0}.items():
        train.parse_args([f"--{name}", str(least)])
        with pytest.raises(ValueError, match=f"--{name} {least - 1}: must be at least {least}"):
            train.parse_args([f"--{name}", str(least - 1)])
    for name in ("seed", "layers", "vocab", "d-model", "max-length", "batch-tokens", "num-beams"):
        with pytest.raises(ValueError, match=f"--{name} {10 ** 20}: must be at most"):  # torch would fail, later
            train.parse_args([f"--{name}", str(10 ** 20)])
    with pytest.raises(ValueError, match="--prefix: not valid UTF-8"):
        train.parse_args(["--train", "a.tsv", "--valid", "a.tsv", "--test", "a.tsv", "--prefix", "\udcff"])
    for rate in ("-0.1", "1", "nan"):
        with pytest.raises(ValueError, match=f"--dropout {float(rate)}: must be"):
            train.parse_args(["--dropout", rate])


def test_a_bank_of_the_most_layers_can_be_read():
    """Its tensors' names and places fit into a header, also with all the granularities there can be."""
    teacher, end = T5(T5Config(9, 32, 8, 16, 4, 1, 1)), 10 ** 12  # of T5-11B's size
    for grains in (None, [g for g in range(2, 300) if 300 % g == 0]):
        spans = module_spans(300, grains or default_granularities(300))
        header = {f"{stack}.{start}-{stop}.{name}": {"dtype": "F32", "shape": [4096, 4096], "data_offsets": [end, end]}
                  for stack in STACKS for start, stop in spans
                  for name, _ in getattr(teacher, stack).layers[0].named_parameters()}
        assert 9000 < len(header) and len(json.dumps(header)) < MAX_HEADER - 10_000, "and the frame's few"


def test_prefix_stands_before_every_source(files, two_processes):
    """It asks for two_processes so that they start early: see conftest.py."""
    plain, prefixed = (train.read_data(train.parse_args([*data_args(files), *options]))
                       for options in ([], ["--prefix", "x: "]))
    for name, pairs in plain.items():
        assert prefixed[name] == [("x: " + source, target) for source, target in pairs], f"of the {name} pairs, too"


def test_toy_data_by_default():
    pairs = train.read_data(train.parse_args(["--seed", "3"]))
    assert {name: len(part) for name, part in pairs.items()} == {"train": 20000, "valid": 500, "test": 500}
    assert set(pairs["train"]) < set(toy_corpus(21024, seed=3)), "the seed is that of the data, too"


@pytest.mark.parametrize("encoder, decoder, shapes", (
    (12, 12, [(11, 11), (9, 9), (8, 8), (6, 6), (5, 5), (4, 4), (3, 3), (2, 2), (6, 12), (12, 6), (2, 12), (12, 2)]),
    (6, 12, [(5, 11), (5, 9), (4, 8), (3, 6), (2, 4), (1, 2), (3, 12), (6, 6), (1, 12), (6, 2)]),  # none near 2.4, 4
    (2, 2, [(2, 1), (1, 1), (1, 2)]),
    (4, 1, [(1, 1), (2, 1)])))  # the others are far from a ratio, and 4+1 is the teacher
def test_shapes_of_the_table_by_hand(encoder, decoder, shapes):
    teacher = Namespace(depths={"encoder": encoder, "decoder": decoder})
    bank = Namespace(spans={stack: module_spans(n, default_granularities(n)) for stack, n in teacher.depths.items()})
    assert train.study_shapes(teacher, bank) == shapes, \
        f"{encoder}+{decoder}: 1.1x to 6x, both stacks alike, then half and the least of each stack alone; none twice"


@pytest.fixture(scope="session")
def two_processes(aside, files, tmp_path_factory):
    """A folder, and the future of the end of torchrun with two processes that make a run in it."""
    folder = tmp_path_factory.mktemp("two")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            str(Path(train.__file__)), *data_args(files), *SMALL, "--layers", "2", "--granularities", "2",
            "--out", str(folder / "run"), "--metric", "exact", "--baselines", "kd:1+1"]
    return folder, aside.submit(subprocess.run, line, capture_output=True, text=True, timeout=300,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_make_one_run(two_processes):
    tmp_path, run = two_processes[0], two_processes[1].result()
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("% of teacher") == 1, "the first process prints the table, the second nothing"
    records = [json.loads(text) for text in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(record["stage"], record["step"]) for record in records] == \
        [(stage, step + 1) for stage, steps in (("teacher", 5), ("self-distillation", 3), ("bank", 4), ("kd 1+1", 4))
         for step in range(steps)], "and one writes the log"
    rows = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))["rows"]
    assert {"teacher", "assembly 1+1", "kd 1+1"} < set(rows)
    both = read_json(tmp_path / "run" / "pseudo.json")
    (tmp_path / "run" / "pseudo.json").unlink()
    args = train.parse_args(["--resume", "--out", str(tmp_path / "run"), "--device", "cpu"])
    tokenizer, teacher = Tokenizer(tmp_path / "run"), load_t5(tmp_path / "run" / "teacher")
    pairs = encode_pairs(tokenizer, train.read_data(args)["train"], args.max_length)[0]
    train.relabel(teacher, Batches(pairs, args.batch_tokens, tokenizer.pad_id, args.seed), args)
    assert both == read_json(tmp_path / "run" / "pseudo.json"), "two share the pseudo-labels: each is in its place"


def test_table_has_the_teacher_eight_assemblies_and_the_baselines(finished):
    rows = json.loads((finished / "results.json").read_text(encoding="utf-8"))["rows"]
    assemblies = {name: row for name, row in rows.items() if name.startswith("assembly")}
    assert rows["teacher"]["ratio"] == 1 and rows["teacher"]["share"] in (0, 100), "the teacher is 100 % of itself"
    assert len(assemblies) >= 8, "the table shows at least eight assemblies"
    ratios = [row["ratio"] for row in assemblies.values()]
    assert min(ratios) < 1.1 and max(ratios) == 6, "assemblies range from 1.1x to 6x"
    shapes = {(row["encoder"], row["decoder"]) for row in assemblies.values()}
    assert (6, 1) in shapes and (1, 6) in shapes, "encoder-only and decoder-only compression are in the table"
    assert {"sft 3+3", "kd 3+2", "calibrated 1+6", "pseudo 1+1", "theseus 2+3"} < set(rows), \
        "every baseline asked for has a row"
    for name, row in rows.items():
        folder = "teacher" if name == "teacher" else f"baselines/{name.replace(' ', '-')}"
        if (finished / folder).exists():
            model = load_t5(finished / folder)
            assert (len(model.encoder.layers), len(model.decoder.layers)) == (row["encoder"], row["decoder"])


def test_scores_by_hand(finished, tmp_path, monkeypatch):
    args = train.parse_args(["--resume", "--out", str(finished), "--device", "cpu"])
    teacher, tokenizer = load_t5(finished / "teacher"), Tokenizer(finished)
    args.out, pairs, qualities, timed = tmp_path, train.read_data(args), [40.0, 10.0, 0.0], []
    outputs = [tokenizer.decode(ids) for ids in train.translate(
        teacher, [tokenizer.encode(source)[:11] + [1] for source, _ in pairs["test"]], 1, args, "")]

    def metric(hypotheses, references):
        assert references == [target for _, target in pairs["test"]], "held against the targets of the test pairs"
        assert len(qualities) < 3 or hypotheses == outputs, "what the model makes of their sources"
        return qualities.pop(0)
    monkeypatch.setitem(train.METRICS, "exact", metric)
    monkeypatch.setattr(train, "speedup", lambda *models_and_source: timed.append(models_and_source) or 2.5)
    score, small = train.Scorer(args, tokenizer, pairs, teacher), train.shrink(teacher, 3, 1)
    for name, model in (("teacher", teacher), ("small", small), ("small", small), ("none", small)):
        score(name, model)
    row = score.rows["small"]
    assert not qualities and score.rows["none"]["share"] == 0, "what has a row is not measured again"
    for name, value in {"encoder": 3, "decoder": 1, "ratio": 12 / 4, "speedup": 2.5, "exact": 10.0, "share": 25.0,
                        "parameters": sum(p.numel() for p in small.parameters())}.items():
        assert row[name] == value, f"{name} of 3+1 layers that score 10 where the teacher, 6+6, scores 40: {value}"
    valid = Batches(encode_pairs(tokenizer, pairs["valid"], 12)[0], 512, 0, seed=0)
    assert row["valid_loss"] == distill.validation_loss(small, [valid[k] for k in range(len(valid))])
    assert score.rows["teacher"]["share"] == 100
    (*models, source), middle = timed[1], tokenizer.encode(pairs["test"][5][0])
    assert models == [teacher, small] and source.tolist() == [middle[:11] + [1] if len(middle) > 12 else middle], \
        "speed is measured on the test's sentence in the middle, the teacher's time over the model's"
    again = train.Scorer(args, tokenizer, pairs, teacher)
    assert again.rows == score.rows, "rows are kept in the file"


POINTS = {"teacher": {"speedup": 1.0, "exact": 30.0}, "kd 2+2": {"speedup": 3.0, "exact": 10.0}}


def test_frontier_by_hand():
    root = ElementTree.fromstring(train.frontier(POINTS, "exact"))
    points = [(c.get("cx"), c.get("cy"), c.get("fill")) for c in root.iter() if c.tag.endswith("circle")]
    assert points == [("103.3", "45.0", "#1c7ed6"), ("536.7", "295.0", "#e8590c")], \
        "speed to the right, from 60 to 580, quality upwards, from 320 to 20: the axes go a tenth beyond the points"
    labels = [e.text for e in root.iter() if e.tag.endswith("text")]
    for i in range(6):
        assert f"{0.8 + 0.48 * i:.1f}x" in labels and f"{8 + 4.8 * i:.1f}" in labels, "six marks on each axis"
    marks = [(e.text, float(e.get("y"))) for e in root.iter() if e.tag.endswith("text") and e.get("x") == "54"]
    assert marks == [(f"{8 + 4.8 * i:.1f}", 324 - 60 * i) for i in range(6)], "the marks of quality, from 320 up to 20"
    one = ElementTree.fromstring(train.frontier({"teacher": POINTS["teacher"]}, "exact"))
    points = [(c.get("cx"), c.get("cy")) for c in one.iter() if c.tag.endswith("circle")]
    assert points == [("320.0", "170.0")], "a single point is in the middle"
    crowd = {f"{kind}{i}": POINTS["teacher"] for kind in ("kd ", "assembly ") for i in range(3)}
    labels = [(e.get("x"), e.get("y"), e.get("text-anchor"), e.text)
              for e in ElementTree.fromstring(train.frontier(crowd, "exact")).iter() if e.get("font-size") == "10"]
    assert labels == [("326.0", "174.0", "start", "kd 0"), ("314.0", "174.0", "end", "kd 1"),
                      ("326.0", "165.0", "start", "kd 2"), ("314.0", "165.0", "end", "0"),
                      ("326.0", "183.0", "start", "1"), ("314.0", "183.0", "end", "2")], "no label covers another"


def teacher_and_batches(finished):
    """That run's teacher, and its training pairs in batches."""
    tokenizer = Tokenizer(finished)
    pairs = encode_pairs(tokenizer, read_pairs(*train.read_json(finished / "args.json")["train"]), 12)[0]
    return load_t5(finished / "teacher"), Batches(pairs, 512, tokenizer.pad_id, 0)


@pytest.mark.parametrize("init", ("calibrated", "copy", "average"))
def test_how_the_modules_start(finished, init):
    """As --init says, and calibrated on the first batches of what the bank will learn."""
    teacher, batches = teacher_and_batches(finished)
    args = Namespace(granularities=[2, 6], init=init)
    bank = train.new_bank(teacher, batches, args)
    assert bank.spans == {stack: module_spans(6, [2, 6]) for stack in STACKS}
    plain = Bank(teacher, dict.fromkeys(STACKS, [2, 6]), "average" if init == "average" else "copy")
    same = all(torch.equal(a, b) for a, b in zip(bank.parameters(), plain.parameters(), strict=True))
    assert same is (init != "calibrated")
    if init == "calibrated":
        distill.calibrate(teacher, plain, [batches[k] for k in range(train.CALIBRATION)])
        assert all(torch.equal(a, b) for a, b in zip(bank.parameters(), plain.parameters()))


def test_how_a_calibrated_student_starts(finished, monkeypatch):
    """As the assembly of its shape does that a calibrated bank makes."""
    teacher, batches = teacher_and_batches(finished)
    args = train.parse_args(["--resume", "--out", str(finished)])
    monkeypatch.setattr(train, "train_student", lambda *_, **__: None)
    bank = train.new_bank(teacher, batches, args)
    for encoder, decoder in ((3, 2), (6, 1)):
        student = train.train_baseline("calibrated", encoder, decoder, teacher, {args.targets: batches}, args, "kd", {},
                                       lambda model: 0.0).state_dict()
        expected = assemble(teacher, bank, train.even_paths(teacher, bank, encoder, decoder)).state_dict()
        assert student.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(student[name], tensor), f"{encoder}+{decoder}, {name}: the start is the bank's"


def test_calibration_out_of_memory_is_one_line(finished, monkeypatch):
    def calibrate(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(train, "calibrate", calibrate)
    with pytest.raises(MemoryError, match="calibration: lower --batch-tokens, or begin anew with a lower --max-"):
        train.new_bank(load_t5(finished / "teacher"), [None] * train.CALIBRATION,
                       Namespace(granularities=[2, 6], init="calibrated"))


def test_printed_table_matches_the_results(finished):
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    lines = train.table(results["rows"], "exact").splitlines()
    assert len(lines) == 2 + len(results["rows"]), "a header, a rule, and one line a model"
    assert all(line.count("|") == lines[0].count("|") for line in lines), "every line has the header's columns"
    assert "6.00x" in next(line for line in lines if "assembly 1+1" in line), "6+6 layers to 1+1 is 6x"


def test_log_teaches_rate_and_terms(finished):
    records = [json.loads(line) for line in (finished / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    bank = [record for record in records if record["stage"] == "bank"]
    assert len(bank) == 4 and {record["stage"] for record in records} >= {"teacher", "bank", "kd 3+2", "theseus 2+3"}
    for record in bank:
        assert {"rate", "rate_encoder", "rate_decoder", "tokens_per_s", "grad_norm"} < set(record)
        total = sum(record[f"{term}_weighted"] for term in distill.WEIGHTS if term in record)
        assert record["loss"] == pytest.approx(total, rel=1e-5), "the loss is the sum of the weighted terms"
    assert bank[-1]["rate"] == 1, "the replacement rate has risen to 1 at the end"


def test_log_shows_what_the_bank_makes_of_one_sentence(finished, files):
    records = [json.loads(line) for line in (finished / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    samples = {(record["stage"], record["step"]): record["sample"] for record in records if "sample" in record}
    assert set(samples) == {("bank", 1), ("bank", 4)}, "the first and the last step of four, and no tenth between"
    source, target = read_pairs(files / "valid.jsonl")[0]
    for sample in samples.values():
        assert list(sample) == ["source", "reference", "teacher", "2x", "6x"]
        assert (sample["source"], sample["reference"]) == (source, target)
    tokenizer, teacher = Tokenizer(finished), load_t5(finished / "teacher")
    ids = teacher.generate(torch.tensor([tokenizer.encode(source)[:11] + [1]]), 12)[0]
    assert sample["teacher"] == tokenizer.decode(ids), "the teacher's own words"
    bank = load_bank(finished / "bank.safetensors", teacher)
    small = assemble(teacher, bank, dict.fromkeys(STACKS, [(0, 6)]))
    ids = small.generate(torch.tensor([tokenizer.encode(source)[:11] + [1]]), 12)[0]
    assert sample["6x"] == tokenizer.decode(ids), "and in the last record those of the finished bank's 1+1"


def test_tenths():
    assert [k for k in range(1, 1001) if train.tenth({"step": k, "steps": 1000})] == [1, *range(100, 1001, 100)]
    assert [k for k in range(1, 26) if train.tenth({"step": k, "steps": 25})] == [1, 10, 20, 25]


def test_cut_sequences_are_counted(files, tmp_path, capsys):
    arguments = [*data_args(files), *SMALL, "--layers", "2", "--teacher-steps", "0", "--steps", "1"]
    assert train.main([*arguments, "--max-length", "5", "--out", str(tmp_path / "run")]) == 0
    cut, tokenizer = {}, Tokenizer(tmp_path / "run")
    for name, paths in (("train", ["train.tsv"]), ("valid", ["valid.jsonl"]), ("test", ["test.src", "test.tgt"])):
        texts = [text for pair in read_pairs(*(files / path for path in paths)) for text in pair]
        cut[name] = sum(len(tokenizer.encode(text)) > 5 for text in texts)
    assert 0 < cut["test"] <= 20
    assert f"cut at 5 tokens: {cut['train']} of train, {cut['valid']} of valid, {cut['test']} of test" in \
        capsys.readouterr().out


def test_frontier_is_valid_svg_for_white_and_dark_pages(finished):
    text = (finished / "frontier.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    rows = json.loads((finished / "results.json").read_text(encoding="utf-8"))["rows"]
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == len(rows), "one point a model"
    _, _, width, height = map(float, root.get("viewBox").split())
    assert all(0 < float(c.get("cx")) < width and 0 < float(c.get("cy")) < height for c in circles)
    assert not any((e.tail or "").strip() for e in root.iter()), "words outside of <text> are not drawn"
    assert not any(colour in text for colour in ("#000", "#fff", "black", "white")), "mid-tones read on any page"


def test_a_run_makes_a_model_elsewhere(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("assemble.seconds", lambda model, source, tokens: float(sum(model.depths.values())))
    status = assemble_main([str(finished), "--ratio", "2", "--out", str(tmp_path / "half"), "--device", "cpu"])
    out, layers = capsys.readouterr().out, sum(load_t5(tmp_path / "half").depths.values())
    assert status == 0 and layers <= 6, "--ratio 2 is at most half of 6+6 layers; what 4 steps made may be best smaller"
    assert f"ratio       {12 / layers:.2f}x\n" in out, "the ratio printed is that of the model written"


@pytest.mark.parametrize("most", (70, 20, 1))
def test_outputs_are_in_order_and_without_padding(monkeypatch, most):
    """Also where the memory is enough for no more than so many sentences."""
    torch.manual_seed(0)
    generate, copies, sizes = train.T5.generate, [], []

    def limited(model, ids, *args):
        sizes.append(len(ids))
        if len(ids) > most:
            torch.empty(10**15)
        copies.append(getattr(QUICK, "copies", None))
        return generate(model, ids, *args)
    monkeypatch.setattr(train.T5, "generate", limited)
    model = train.T5(train.T5Config(vocab_size=20, d_model=16, d_kv=4, num_heads=4, d_ff=32, num_layers=1,
                                    num_decoder_layers=1, tie_word_embeddings=False)).eval()
    sources = [[2 + i % 18] * (1 + i * 7 % 5) + [1] for i in range(70)]  # more than one batch, of any lengths
    found = train.translate(model, sources, 1, Namespace(max_length=4, device="cpu"), "teacher")
    assert sizes == {70: [64, 6], 20: [64, 32, 16, 16, 16, 16, 6], 1: [64, 32, 16, 8, 4, 2, *[1] * 70]}[most]
    assert copies[0] is not None and all(own is copies[0] for own in copies), "one block for all batches"
    assert len(set(map(tuple, found))) > 5, "outputs that are all alike would not show their order"
    for source, ids in zip(sources, found, strict=True):
        alone = model.generate(torch.tensor([source]), 4)[0].tolist()
        assert ids == [i for i in alone if i != 0], f"{source} is answered with {alone}, whatever stands beside it"


def test_pseudo_labels_by_hand(tmp_path, monkeypatch):
    """Four sources in portions of two, with an interrupt behind the first of them."""
    asked, outputs = [], {9: [5, 6, 1], 10: [5, 6, 7], 11: [5, 6], 12: []}

    def translate(teacher, sources, num_beams, *_):
        asked.append([source[0] for source in sources])
        if asked == [[9, 10], [11, 12]]:
            raise KeyboardInterrupt
        assert num_beams == 4
        return [outputs[source[0]] for source in sources]
    monkeypatch.setattr(train, "translate", translate)
    monkeypatch.setattr(train, "PORTION", 2)
    pairs, teacher = [([9 + i, 1], [8, 1]) for i in range(4)], Namespace(config=train.T5Config())
    args = Namespace(out=tmp_path, max_length=3)
    with pytest.raises(KeyboardInterrupt):
        train.relabel(teacher, train.Batches(pairs, 10, 0, seed=5), args)
    for _ in range(2):
        found = train.relabel(teacher, train.Batches(pairs, 10, 0, seed=5), args)
        assert found.examples == [
            ([9, 1], [5, 6, 1]), ([10, 1], [5, 6, 1]), ([11, 1], [5, 6, 1]), ([12, 1], [1])], \
            "the same sources, the teacher's outputs as targets: of at most 3 tokens, the last of them eos"
        assert (found.tokens, found.pad_id, found.seed) == (10, 0, 5), "batches like those of the pairs"
        assert asked == [[9, 10], [11, 12], [11, 12]], "what is in the run folder is not made again"
    for others in (pairs[:3], [*pairs[:3], ([13, 1], [8, 1])]):
        with pytest.raises(ValueError, match=f"pseudo.json: not of these {len(others)} sources: remove it"):
            train.relabel(teacher, train.Batches(others, 10, 0, seed=5), args)
    write_json({"sources": read_json(tmp_path / "pseudo.json")["sources"]}, tmp_path / "pseudo.json")
    with pytest.raises(ValueError, match="pseudo.json: not of these 4 sources: remove it"):
        train.relabel(teacher, train.Batches(pairs, 10, 0, seed=5), args)


@pytest.mark.parametrize("targets, more", (
    ("data", []), ("teacher", ["--paths", "two", "--baseline-dropout", "off"])), ids=("by default", "otherwise"))
def test_what_each_kind_learns_to_write(files, tmp_path, monkeypatch, targets, more):
    learnt, distilled, rising, two_paths, dropout, labelled, how = {}, [], {}, {}, {}, [], {}

    def training(*args, name, **options):
        at = next(i for i, arg in enumerate(args) if isinstance(arg, train.Batches))
        batches, how[name] = args[at], (args[at + 1], options["lr"], options["seed"])
        learnt[name] = "teacher" if batches.examples[0][1] == [7, 1] else "data"
        rising.update({name: options["rate_rise"]} if "rate_rise" in options else {})
        two_paths.update({name: options["two_paths"]} if "two_paths" in options else {})
        dropout.update({name: options["dropout"]} if "dropout" in options else {})

    def student(model, batches, steps, teacher=None, **options):
        training(batches, steps, **options)
        distilled.extend([options["name"]] if teacher else [])
    def relabel(teacher, batches, args, folder=None):
        labelled.append(folder and folder.name)
        return train.Batches([(source, [7, 1]) for source, _ in batches.examples], batches.tokens, batches.pad_id,
                             batches.seed)
    monkeypatch.setattr(train, "relabel", relabel)
    monkeypatch.setattr(train, "train_student", student)
    monkeypatch.setattr(train, "train_modules", training)
    train.main([*data_args(files), *SMALL, "--layers", "2", "--out", str(tmp_path / "run"), "--targets", targets,
                "--baselines", "sft:1+1,kd:1+1,calibrated:1+1,pseudo:1+1,theseus:1+1", "--seed", "3", *more])
    others = dict.fromkeys(list(learnt)[2:], (4, 2e-2, 3))
    assert how == {"teacher": (5, 3e-2, 3), "self-distillation": (3, 2e-2, 3), **others}, \
        "--teacher-steps at --teacher-lr; --self-distill-steps, then --steps, at --lr; all of --seed"
    assert learnt == {"teacher": "data", "self-distillation": "teacher", "bank": targets, "sft 1+1": "data",
                      "kd 1+1": targets, "calibrated 1+1": targets, "pseudo 1+1": "teacher",
                      "theseus 1+1": "data"}, "the bank and KD alike; others by their names"
    assert distilled == ["self-distillation", "kd 1+1", "calibrated 1+1"], \
        "of the students KD alone has the teacher in its loss, from either start"
    assert labelled == ["first-teacher", None], "what the first teacher writes is not what the second does"
    assert two_paths == {"bank": bool(more)}, "--paths two is the bank's"
    assert dropout == dict.fromkeys((f"{kind} 1+1" for kind in train.BASELINES), not more), \
        "--baseline-dropout is that of all static students, and of nothing else"
    assert rising == {"theseus 1+1": 0.3}, "Theseus alone, not calibrated, takes longer over the teacher's layers"


def test_the_others_wait_for_the_first_and_end_when_it_fails(monkeypatch):
    sent, failed = [], [False]
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "broadcast_object_list", lambda x: sent.append(list(x)))
    with train.first_goes_first(True):
        assert not sent, "the others wait until the first is done"
    with pytest.raises(ValueError), train.first_goes_first(True):
        raise ValueError
    assert sent == [[False], [True]], "the first tells the others whether it failed"
    monkeypatch.setattr(train.dist, "broadcast_object_list", lambda x: x.__setitem__(0, failed[0]))
    with train.first_goes_first(False):
        failed[0] = True
    assert failed[0], "after a first one that did not fail the others run the block, too"
    with pytest.raises(SystemExit) as ended, train.first_goes_first(False):
        pytest.fail("after a first one that failed they do not")
    assert ended.value.code == 2


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    args, joined = Namespace(device="cuda"), []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", joined.append)
    monkeypatch.setattr(train.dist, "init_process_group", lambda backend, **_: joined.append(backend))
    monkeypatch.setattr(train.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 2 .* there are 1"):
        train.join_processes(args)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert not train.join_processes(args) and args.device == "cuda:1" and joined == [1, "nccl"], \
        "the second process has the second GPU"


def test_second_run_does_not_overwrite_the_first(finished, files, capsys):
    before = (finished / "results.json").read_bytes()
    assert train.main([*data_args(files), *SMALL, "--out", str(finished)]) == 2
    assert "--resume" in capsys.readouterr().err, "the line says how to go on"
    assert (finished / "results.json").read_bytes() == before


def test_resume_tries_no_other_device(finished, monkeypatch):
    tried = []
    monkeypatch.setattr(train.Parser, "device", staticmethod(lambda name: tried.append(name) or name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train.parse_args(["--resume", "--out", str(finished), "--device", "cpu"]).device == "cpu"
    assert set(tried) == {"cpu"}, "a GPU that is full, or broken, must not stop a run on the CPU"


@pytest.mark.parametrize("option", ("train", "valid", "test"))
def test_resume_knows_its_data(finished, files, tmp_path, capsys, option):
    """Half of a bank trained on one file and half on another, or scores on two, would be no error, only wrong."""
    shutil.copytree(files, tmp_path / "data")
    shutil.copytree(finished, out := tmp_path / "run")
    settings = {name: [value.replace(str(files), str(tmp_path / "data")) for value in values]
                if name in ("train", "valid", "test") else values
                for name, values in read_json(out / "args.json").items()}
    write_json(settings, out / "args.json")
    train.read_data(args := train.parse_args(["--resume", "--out", str(out)]))  # the same, elsewhere
    file = Path(getattr(args, option)[-1])
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("a", "b", 1), encoding="utf-8")
    assert train.main(["--resume", "--out", str(out)]) == 2
    assert f"run: the pairs of --{option} are not those that this run began with" in capsys.readouterr().err
    write_json({k: v for k, v in settings.items() if not k.endswith("sha256")}, out / "args.json")
    train.read_data(train.parse_args(["--resume", "--out", str(out)]))  # of an older version, which kept no sums


def test_a_row_that_was_removed_is_scored_anew(finished, tmp_path):
    shutil.copytree(finished, out := tmp_path / "run")
    results = read_json(out / "results.json")
    write_json({**results, "rows": {k: row for k, row in results["rows"].items() if k not in ("teacher", "kd 3+2")}},
               out / "results.json")
    assert train.main(["--resume", "--out", str(out), "--device", "cpu"]) == 0
    assert read_json(out / "results.json")["rows"] == results["rows"]


@pytest.mark.parametrize("rows", ("{}", '{"rows": {"teacher": {}}}', '{"rows": {"teacher": 1}}'))
def test_results_that_are_none_are_named(finished, tmp_path, capsys, rows):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text(rows, encoding="utf-8")
    assert train.main(["--resume", "--out", str(tmp_path / "run"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "results.json: holds no scores" in error.splitlines()[-1]


class Killed(BaseException):
    """Stands for a kill: nothing in the program catches it."""


def test_resume_ends_bitwise_where_an_uninterrupted_run_does(finished, files, tmp_path, monkeypatch):
    """One run, killed in both stages of the teacher's training, in the bank's and in a baseline's, and taken up."""
    out, fit = tmp_path / "run", distill.fit
    kills = [("teacher", 3), ("self-distillation", 2), ("bank", 2), ("kd 3+2", 3)]

    def killing_fit(*args, log=None, **kwargs):
        def killing_log(record):
            log(record)
            if kills and (record["stage"], record["step"]) == kills[0]:
                raise Killed(kills.pop(0))
        fit(*args, log=killing_log, **{**kwargs, "save_every": 0})

    monkeypatch.setattr(distill, "fit", killing_fit)
    arguments = [*data_args(files), *SMALL, "--out", str(out), "--metric", "exact", "--baselines", BASELINES]
    while kills:
        with pytest.raises(Killed):
            train.main(arguments)
        assert (out / "checkpoint.pt").exists(), "the kill left a checkpoint"
        arguments = ["--resume", "--out", str(out), "--device", "cpu"]
    assert train.main(arguments) == 0
    for name in ("first-teacher/pseudo.json", "teacher/model.safetensors", "bank.safetensors",
                 "baselines/kd-3+2/model.safetensors"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), f"{name}: resumed = uninterrupted, bitwise"
    rows = [read_json(folder / "results.json")["rows"] for folder in (out, finished)]
    scores = [{name: (row["exact"], row["valid_loss"]) for name, row in own.items()} for own in rows]
    assert scores[0] == scores[1]


def test_teacher_folder_is_taken_with_its_tokenizer(finished, files, tmp_path):
    out = tmp_path / "run"
    arguments = [*data_args(files), *SHORT, "--teacher", str(finished / "teacher"), "--out", str(out)]
    assert train.main([*arguments, "--teacher-steps", "0", "--self-distill-steps", "0",
                       "--granularities", "3"]) == 0
    assert (out / "teacher/model.safetensors").read_bytes() == (finished / "teacher/model.safetensors").read_bytes(), \
        "with 0 teacher steps the teacher is taken as it is"
    assert (out / "spiece.model").read_bytes() == (finished / "spiece.model").read_bytes()


def test_a_teacher_learns_from_itself(finished, files, tmp_path, monkeypatch):
    """First as without --self-distill-steps; then as a KD student of its own size, on its own outputs."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "relabel", lambda *_: int("enough"))  # the teacher is there, and nothing else is looked at
        assert train.main([*data_args(files), *SMALL, "--out", str(out), "--metric", "exact",
                           "--self-distill-steps", "0"]) == 2
    assert not (out / "first-teacher").exists()
    first = read_safetensors(finished / "first-teacher/model.safetensors")
    for name, tensor in read_safetensors(out / "teacher/model.safetensors").items():
        assert torch.equal(tensor, first[name]), "what it was before"

    args = train.parse_args(["--resume", "--out", str(finished), "--device", "cpu"])
    teacher, tokenizer = load_t5(finished / "first-teacher"), Tokenizer(finished)
    pairs = encode_pairs(tokenizer, train.read_data(args)["train"], args.max_length)[0]
    batches = Batches(pairs, args.batch_tokens, tokenizer.pad_id, 0)
    own = train.relabel(teacher, batches, args, tmp_path)
    assert read_json(tmp_path / "pseudo.json") == read_json(finished / "first-teacher/pseudo.json")
    student = train.shrink(teacher, 6, 6)
    distill.train_student(student, own, 3, teacher, lr=2e-2)
    again = load_t5(finished / "teacher").state_dict()
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, again[name]), "all losses, the students' rate, dropout"


def bad(name, edit=None, *extra, says=()):
    return pytest.param(edit, extra, says, id=name)


@pytest.mark.parametrize("edit, extra, says", [
    bad("missing file", lambda d: (d / "train.tsv").unlink(), says=["train.tsv"]),
    bad("empty file", lambda d: (d / "train.tsv").write_text(""), says=["train.tsv"]),
    bad("three columns", lambda d: (d / "train.tsv").write_text("a\tb\na\tb\tc\n"), says=["train.tsv", "2"]),
    bad("unequal lengths", lambda d: (d / "test.src").write_text("one\n"), says=["test.src", "test.tgt"]),
    bad("invalid UTF-8", lambda d: (d / "test.tgt").write_bytes(b"a\n\xff\n" + b"a\n" * 8), says=["test.tgt", "2"]),
    bad("not JSON", lambda d: (d / "valid.jsonl").write_text('{"source": "a", "target": "b"}\n{\n'),
        says=["valid.jsonl", "2"]),
    bad("no such teacher", None, "--teacher", "./nowhere", says=["./nowhere"]),
    bad("teacher without a tensor", lambda d: None, "--teacher", "{incomplete}",
        says=["decoder.final_layer_norm.weight"]),
    bad("granularity that does not tile", None, "--granularities", "4",
        says=["--granularities", "4", "6 layers", "2, 3, 6"]),
    bad("granularity that is no number", None, "--granularities", "2,x", says=["--granularities: 2,x", "2,3,6"]),
    bad("unknown baseline", None, "--baselines", "magic:1+1", says=["magic"]),
    bad("malformed baseline", None, "--baselines", "kd:6", says=["kd:6"]),
    bad("baseline deeper than the teacher", None, "--baselines", "kd:9+1", says=["kd:9+1", "6+6 layers"]),
    bad("Theseus with unequal spans", None, "--baselines", "theseus:4+3", says=["theseus:4+3"]),
    bad("width that no head divides", None, "--d-model", "33", says=["--d-model 33"]),
    bad("length that holds no token", None, "--max-length", "0", says=["--max-length 0"]),
    bad("depth without a divisor", None, "--layers", "7", says=["7+7 layers", "--granularities"]),
    bad("letters for lengths", None, "--granularities", "x", says=["--granularities", "x"]),
    bad("only --train", None, "--valid", says=["--valid"]),
])
def test_bad_input_is_one_line_and_leaves_nothing(files, tmp_path, capsys, edit, extra, says):
    folder = tmp_path / "data"
    shutil.copytree(files, folder)
    if edit:
        edit(folder)
    broken = tmp_path / "incomplete"
    shutil.copytree(FIXTURES / "t5_tied", broken)
    weights = read_safetensors(broken / "model.safetensors")
    del weights["decoder.final_layer_norm.weight"]
    write_safetensors(weights, broken / "model.safetensors")
    arguments = [*data_args(folder), *(SHORT if "--teacher" in extra else SMALL), "--out", str(tmp_path / "run"),
                 *(str(broken) if e == "{incomplete}" else e for e in extra)]
    if extra == ("--valid",):
        arguments = ["--train", str(folder / "train.tsv"), "--out", str(tmp_path / "run")]
    status, err = train.main(arguments), capsys.readouterr().err
    assert status == 2, "what the user got wrong ends with exit status 2"
    assert err.count("\n") == 1 and "Traceback" not in err, f"one line on stderr, not: {err}"
    assert all(word in err for word in says), f"the line names {says}: {err}"
    assert not (tmp_path / "run").exists(), "nothing is left half-written"


@pytest.mark.parametrize("option, value", (("--steps", "7"), ("--seed", "0"), ("--init", "calibrated"),
                                           ("--num-beams", "1"), ("--prefix", "")))
def test_resume_takes_no_other_settings(finished, capsys, option, value):
    assert train.main(["--resume", "--out", str(finished), option, value]) == 2
    assert option in capsys.readouterr().err, "an option is refused, not silently dropped, a default's value, too"


@pytest.mark.parametrize("option, value", (("--batch-tokens", "0"), ("--lr", "nan"), ("--teacher-lr", "-1")))
def test_resume_checks_what_it_takes(finished, capsys, option, value):
    before = (finished / "args.json").read_bytes()
    assert train.main(["--resume", "--out", str(finished), option, value]) == 2
    assert f"{option} {value}" in capsys.readouterr().err.replace(".0", "")
    assert (finished / "args.json").read_bytes() == before


def test_what_an_error_advises_can_be_done(files, tmp_path, capsys, monkeypatch):
    """Out of memory, or a loss that is not finite: --resume goes on with fewer tokens a batch, or a lower rate."""
    out, run, seen = tmp_path / "run", distill.losses, []

    def full(student, source, *rest, **options):
        if source.size(0) > 4:
            torch.empty(10**15)
        seen.append(source.size(0))
        return run(student, source, *rest, **options)
    monkeypatch.setattr(distill, "losses", full)
    assert train.main([*data_args(files), *SMALL, "--layers", "2", "--out", str(out)]) == 2
    assert "lower --batch-tokens" in capsys.readouterr().err.splitlines()[-1] and not seen
    assert train.main(["--resume", "--out", str(out), "--batch-tokens", "40", "--lr", "1e-3",
                       "--teacher-lr", "2e-3"]) == 0
    assert seen and max(seen) <= 4
    settings = json.loads((out / "args.json").read_text(encoding="utf-8"))
    assert {"batch_tokens": 40, "lr": 1e-3, "teacher_lr": 2e-3}.items() <= settings.items(), \
        "they are the run's settings from now on"


def test_a_run_begun_anew_makes_its_own_validation_sample(finished, files, tmp_path):
    """That of the run before it may be of another tokenizer."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "valid.safetensors").write_bytes(b"of another run")
    train.start_run(args := train.parse_args([*data_args(files), *SMALL, "--out", str(tmp_path / "run")]),
                    train.read_data(args))
    assert (tmp_path / "run" / "valid.safetensors").read_bytes() == (finished / "valid.safetensors").read_bytes()


def test_a_model_trained_anew_takes_only_its_own_scores_away(finished, tmp_path):
    args = train.parse_args(["--resume", "--out", str(finished), "--device", "cpu"])
    scorer = train.Scorer.__new__(train.Scorer)
    scorer.args, scorer.file = args, tmp_path / "results.json"
    scorer.rows = dict.fromkeys(("teacher", "assembly 6+1", "assembly 2+2", "kd 6+1", "kd 6+12"), {})
    scorer.forget("kd 6+1")
    assert list(scorer.rows) == ["teacher", "assembly 6+1", "assembly 2+2", "kd 6+12"]
    scorer.forget("assembly")
    assert list(scorer.rows) == ["teacher", "kd 6+12"]


@pytest.mark.parametrize("left", (None, ".", "spiece.model", "args.json.part"))
def test_resume_without_a_run_is_one_line(tmp_path, capsys, left):
    """Nothing there, or a folder of a run that was killed before it had settings: it has to begin anew, and can."""
    if left:
        (tmp_path / "run").mkdir()
        if left != ".":
            (tmp_path / "run" / left).write_bytes(b"{")
    assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 2
    assert "run: holds no run to go on with: begin one without --resume\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ("first-teacher", "teacher", "checkpoint.pt", "log.jsonl", "config.json",
                                  "frontier.svg"))
def test_a_run_without_its_settings_is_not_taken_for_a_new_one(files, tmp_path, capsys, name):
    """Nor is a T5 folder, or the project's own."""
    (tmp_path / "run" / name).mkdir(parents=True)
    assert train.main([*data_args(files), *SMALL, "--out", str(tmp_path / "run")]) == 2
    assert "holds a run or a model already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name], "nothing is written"


def test_damaged_settings_are_named(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    settings = (tmp_path / "run" / "args.json").read_bytes()
    good = json.loads(settings)
    changed = [({**good, **change}, word) for change, word in (
        ({"steps": "many"}, "--steps"), ({"lr": None}, "lacks lr"), ({"metric": "x"}, "--metric"),
        ({"steps": 0}, "--steps 0"), ({"granularities": "2;3"}, "--granularities"), ({"dtype": 16}, "--dtype"),
        ({"new": 1}, "--new"))]
    for content, word in ((settings[:100], "not JSON"), (b"", "not JSON"), (b"{}", "lacks"),
                          *((json.dumps(content).encode(), word) for content, word in changed)):
        (tmp_path / "run" / "args.json").write_bytes(content)
        assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "args.json" in err and word in err


def test_settings_come_back_as_they_were(files, tmp_path):
    """Words that look like options, none at all, numbers with a point, and lists."""
    given = [*data_args(files), "--out", str(tmp_path), "--prefix", "-x: ", "--lr", "1e-5", "--granularities", "3,2",
             "--baselines", "", "--device", "cpu", "--dtype", "float32", "--layers", "6"]
    args = train.parse_args(given)
    write_json({name: value for name, value in vars(args).items() if name not in train.NOT_OF_THE_RUN},
               tmp_path / "args.json")
    again = train.parse_args(["--resume", "--out", str(tmp_path), "--device", "cpu"])
    assert vars(again) == {**vars(args), "resume": True} and again.prefix == "-x: " and again.granularities == [2, 3]


def remove(path):
    """A file or a folder of a run."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_resume_puts_right_what_was_left(finished, tmp_path, monkeypatch):
    """A kill after the settings, another while a checkpoint was written, a log line that a full disk cut short. A bank,
    and a student, that are trained anew are scored anew, if that training is interrupted, too."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in ("valid.safetensors", "bank.safetensors", "baselines/sft-3+3"):
        remove(out / name)
    results = read_json(out / "results.json")
    before = results["rows"]
    for name in ("kd 3+2", "sft 3+3", "assembly 3+3"):
        before[name]["share"] = -1.0
    write_json(results, out / "results.json")
    (out / "checkpoint.pt.part").write_bytes(b"half")
    log = (out / "log.jsonl").read_bytes()
    (out / "log.jsonl").write_bytes(log + b'{"stage": "ba')
    arguments = ["--resume", "--out", str(out), "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_baseline", lambda *_: int("interrupted"))
        assert train.main(arguments) == 2
    gone = {name for name in before if name.startswith("assembly") or name == "sft 3+3"}
    assert set(before) - set(read_json(out / "results.json")["rows"]) == gone, "theirs, and no others"
    assert train.main(arguments) == 0
    assert (out / "valid.safetensors").read_bytes() == (finished / "valid.safetensors").read_bytes()
    assert not list(out.rglob("*.part")) and (out / "log.jsonl").read_bytes().startswith(log + b'{"stage": "bank"')
    assert (out / "bank.safetensors").read_bytes() == (finished / "bank.safetensors").read_bytes()
    rows = read_json(out / "results.json")["rows"]
    assert rows.keys() == before.keys() and all(rows[name] == before[name] for name in set(before) - gone)
    assert all(rows[name]["share"] >= 0 for name in gone), "its scores too, but no others"


@pytest.mark.parametrize("name", ("bank.safetensors", "pseudo.json", "baselines", "results.json", "study"))
def test_what_another_teacher_left_is_named(finished, tmp_path, capsys, name):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "study").mkdir()  # of tests/bench_quality.py
    for other in {"teacher", "bank.safetensors", "pseudo.json", "baselines", "results.json", "study"} - {name}:
        remove(out / other)
    assert train.main(["--resume", "--out", str(out)]) == 2
    assert f"{name}: of a teacher that is no longer there: remove it, too\n" in capsys.readouterr().err


@pytest.mark.parametrize("stage, gone", (("bank", ()), ("kd 1+1", ("first-teacher",)),
                                         ("self-distillation", ("first-teacher",))))
def test_a_checkpoint_of_another_teachers_bank_is_named(finished, tmp_path, capsys, stage, gone):
    """Else a bank half trained for the teacher that was removed goes on with the next one."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "first-teacher").mkdir(exist_ok=True)
    for other in ("teacher", "bank.safetensors", "pseudo.json", "baselines", "results.json", *gone):
        remove(out / other)
    if (out / "first-teacher").exists():
        shutil.copytree(finished / "teacher", out / "first-teacher", dirs_exist_ok=True)
    save_checkpoint({"stage": stage, "step": 1, "sizes": [], "weights": {}, "optimizer": {}, "scaler": {}},
                    out / "checkpoint.pt")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert train.main(["--resume", "--out", str(out)]) == 2
    assert "checkpoint.pt: of a teacher that is no longer there: remove it, too\n" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}, "nothing is lost"


def fails(files, out, capsys, *options):
    """The one line of a run that must end with exit status 2."""
    status = train.main([*data_args(files), *SMALL, "--layers", "2", "--out", str(out), *options])
    err = capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    return err


def test_the_log_is_json_whatever_is_measured(files, tmp_path, capsys, monkeypatch):
    def training(*_, log, **__):
        log({"stage": "teacher", "step": 1, "steps": 9, "loss": 2.5, "grad_norm": float("inf"), "tokens_per_s": 0.5})
        raise ValueError("enough")
    monkeypatch.setattr(train, "train_student", training)
    fails(files, tmp_path / "run", capsys)
    assert (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8") == '{"stage": "teacher", "step": 1, ' \
        '"steps": 9, "loss": 2.5, "grad_norm": null, "tokens_per_s": 0.5}\n', "JSON has no infinity"


def test_a_loss_that_explodes_is_one_line(files, tmp_path, capsys):
    err = fails(files, tmp_path / "run", capsys, "--teacher-lr", "1e38")
    assert "teacher: the loss is not finite at step " in err and "ce " in err and "lower learning rate" in err


@pytest.mark.parametrize("where, words", (
    ("losses", ("teacher, step 0", "tokens: lower --batch-tokens, or begin anew with a lower --max-length")),
    ("optimizer", ("teacher, step 0", "tokens: lower --batch-tokens, or begin anew with a lower --max-length")),
    ("pseudo-labels", ("pseudo-labels: 4 beams for a sentence of", "--max-length")),
    ("scoring", ("teacher: 3 beams for a sentence of", "--max-length"))))
def test_out_of_memory_is_one_line(files, tmp_path, capsys, monkeypatch, where, words):
    def full(*_, **__):
        torch.empty(10**15)
    if where == "losses":
        monkeypatch.setattr(distill, "losses", full)
        err = fails(files, tmp_path / "run", capsys)
    elif where == "optimizer":  # its two moments, as large as the weights, come with the first step
        monkeypatch.setattr(torch.optim.AdamW, "step", full)
        err = fails(files, tmp_path / "run", capsys)
    else:
        monkeypatch.setattr(train, "show_sample", lambda *_: None)
        monkeypatch.setattr(train.T5, "generate", full)
        err = fails(files, tmp_path / "run", capsys, "--num-beams", "3",
                    *(["--targets", "data", "--self-distill-steps", "0"] if where == "scoring" else []))
    assert all(word in err for word in words), err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, as Linux has")
def test_a_full_disk_names_the_log(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "open_log", lambda path: open("/dev/full", "wb"))
    assert "No space left on device" in (err := fails(files, tmp_path / "run", capsys)) and "log.jsonl" in err


def test_multi30k_trap_is_named(tmp_path):
    """`paste train.en train.de` makes one row of three columns, as one line of train.de holds a TAB."""
    data = Path(__file__).parent.parent.parent / "shared" / "multi30k"
    if not data.exists():
        pytest.skip("Multi30k is not beside the project")
    english, german = (open(data / f"train.{x}", encoding="utf-8").read().split("\n")[:-1] for x in ("en", "de"))
    pasted = tmp_path / "pasted.tsv"
    pasted.write_text("".join(f"{e}\t{g}\n" for e, g in zip(english, german)), encoding="utf-8")
    wrong = 1 + next(i for i, line in enumerate(german) if "\t" in line)
    with pytest.raises(ValueError, match=f"pasted.tsv.*{wrong}"):
        read_pairs(pasted)
    assert len(read_pairs(data / "train.en", data / "train.de")) == 29000
