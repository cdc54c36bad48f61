"""What all test files share."""
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

ASIDE = ("graded", "survival", "two_commands", "two_processes")  # fixtures: futures of what works on a second core


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only get into each other's way on models of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def aside():
    """A thread that waits for processes on a second core, one after the other, so that it is never idle."""
    with ThreadPoolExecutor(1) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)  # those of tests that will not run, after a failure or an interrupt


def pytest_collection_modifyitems(items):
    """The first test that asks for a fixture of ASIDE starts it, and does not wait for it: those are the first of all.
    Those that wait come last."""
    asking = [[item for item in items if name in getattr(item, "fixturenames", ())] for name in ASIDE]
    first = list(dict.fromkeys(own[0] for own in asking if own))
    last = list(dict.fromkeys(item for own in asking for item in own[1:] if item not in first))
    items[:] = [*first, *(item for item in items if item not in first + last), *last]


def pytest_collection_finish():
    """Not to look through all of torch and all tests whenever garbage is collected: a twentieth of the time."""
    gc.freeze()
