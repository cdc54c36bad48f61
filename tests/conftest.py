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
