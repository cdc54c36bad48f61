"""What no single file answers for: kills, full disks, files from strangers, other Pythons, other folders. About 15 s.

    pytest tests/test_survival.py
    python tests/bench_survival.py                 # the same stops and mutations, but many
"""
import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")])
needs_fork = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs fork and /proc, as Linux has")


def run(*line, **options):
    return subprocess.run([sys.executable, *map(str, line)], capture_output=True, text=True, encoding="utf-8",
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


@pytest.fixture(scope="session")
def survival(aside):
    """Future of the end of bench_survival.py. It runs on a second core beside other tests: see conftest.py."""
    return aside.submit(run, ROOT / "tests" / "bench_survival.py", "--stops", 1, "--mutations", 100)


@pytest.fixture(scope="session")
def two_commands(aside, tmp_path_factory):
    """Future of the ends of a run and of its --resume: relative paths, with a blank and letters in them, and from
    another folder. Also on the second core."""
    home = tmp_path_factory.mktemp("two") / "ein Häuschen"
    home.mkdir()
    for name, words in (("a.tsv", "bcde"), ("b.tsv", "fg")):
        (home / name).write_text("".join(f"{word} a\t{word} é\n" for word in words), encoding="utf-8")

    def both():
        done = run(ROOT / "train.py", "--train", "a.tsv", "--valid", "b.tsv", "--test", "b.tsv", "--layers", 2,
                   "--d-model", 32, "--vocab", 30, "--teacher-steps", 1, "--self-distill-steps", 1, "--steps", 1,
                   "--max-length", 4, "--device", "cpu", "--dtype", "float32", cwd=home)
        (home / "run" / "results.json").unlink(missing_ok=True)
        return done, run(ROOT / "train.py", "--resume", "--out", "ein Häuschen/run", cwd=home.parent)
    return aside.submit(both)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_python_3_10_reads_it(file):
    """And 3.11 to 3.13, which took nothing away that is used here. Nothing is imported that does not come along."""
    tree = ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 10))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} | {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    allowed = {*sys.stdlib_module_names, *(f.stem for f in FILES), "torch", "numpy", "sentencepiece", "tqdm", "pytest"}
    if not file.name.startswith(("bench_", "make_")):  # these compare with other libraries
        assert {name.partition(".")[0] for name in imported} <= allowed


@needs_fork
@pytest.mark.parametrize("name", ("bench_quality", "bench_search", "bench_speed"))
def test_benchmarks_find_what_they_import(name, monkeypatch, survival, two_commands):
    """The first asks for what the last tests wait for, so that it starts early: see conftest.py."""
    monkeypatch.syspath_prepend(ROOT / "tests")
    assert importlib.import_module(name).main(["--no-such-option"]) == 2


@pytest.mark.parametrize("file", sorted(ROOT.glob("*.py")), ids=lambda file: file.name)
def test_text_files_are_utf_8_on_every_system(file):
    for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call):
            name = getattr(call.func, "id", getattr(call.func, "attr", None))
            if name in ("read_text", "write_text") or name == "open" and "b" not in ast.unparse(call.args[1:2]):
                assert any(keyword.arg == "encoding" for keyword in call.keywords), \
                    f"{file.name}:{call.lineno}: without an encoding, {name} takes another one on Windows"


def test_two_commands_from_another_folder_without_a_terminal(two_commands):
    done, again = two_commands.result()
    assert done.returncode == 0 and "| teacher " in done.stdout, done.stderr
    assert done.stderr == "", "without a terminal no progress bar is drawn"
    assert again.returncode == 0 and again.stderr == "", again.stderr
    assert "| teacher " in again.stdout, "the data files are found from another folder"


@needs_fork
def test_stopped_and_resumed_is_uninterrupted(survival):
    done = survival.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 stops in" in done.stdout and "bitwise" in done.stdout


@needs_fork
def test_mutated_files_are_refused_or_read(survival):
    done = survival.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("'loaded'") == done.stdout.count("'ValueError'") == 6, \
        "of each kind of file some mutations are good and some are not"
