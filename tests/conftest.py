"""What all test files share."""
import gc

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only get into each other's way on models of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    """Some tests wait for a process that works on a second core. The first that asks for it starts it, so the grader's
    (test_assignments.py), which works longest, is the first of all; those that wait come last."""
    graded, survival = ([item for item in items if fixture in getattr(item, "fixturenames", ())]
                        for fixture in ("graded", "survival"))
    first, last = graded[:1], survival[1:] + graded[1:]
    items[:] = [*first, *(item for item in items if item not in first + last), *last]


def pytest_collection_finish():
    """Not to look through all of torch and all tests whenever garbage is collected: a twentieth of the time."""
    gc.freeze()
