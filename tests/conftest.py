"""What all test files share."""
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
    """Of the tests that wait for a grader (test_assignments.py) the first starts it, the others come last."""
    waiting = [item for item in items if "graded" in getattr(item, "fixturenames", ())]
    items[:] = [*waiting[:1], *(item for item in items if item not in waiting), *waiting[1:]]
