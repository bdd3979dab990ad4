import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Small tensors: threads that wait for each other cost more than they compute.
    torch.set_num_threads(1)
