import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products gain nothing from threads, and lose much where several processes share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
