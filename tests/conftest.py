"""Shared by all tests."""

import pytest
import torch

torch.set_num_threads(1)  # tests are small, and threads that wait for each other on a busy machine cost far more


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """Torch's global settings, put back after each test."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    anomaly = torch.is_anomaly_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.autograd.set_detect_anomaly(anomaly)
