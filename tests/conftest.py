"""Shared by all tests."""

import sys
from pathlib import Path

import pytest
import torch

from lightning_iwae.cli import main

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)  # tests are small, and threads that wait for each other on a busy machine cost far more


LONGEST = ("test_mnist", "test_kills", "test_docker", "test_snr_command")  # slow ones; two files run at a time


def pytest_collection_modifyitems(items):
    """The longest files first, so that none is left alone at the end."""
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(
        key=lambda item: order.get(item.path.stem, len(order)) if item.get_closest_marker("slow") else len(order)
    )


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


@pytest.fixture(scope="session")
def gaussian_run(tmp_path_factory):
    """The directory of a short fit of conf/gaussian.yaml in 3 dimensions, seed 3: 70 data of each kind."""
    run = tmp_path_factory.mktemp("gaussian") / "run"
    small = ["--data.init_args.size", "70", "--data.init_args.batch_size", "32", "--trainer.max_epochs", "2"]
    small += ["--data.init_args.dim", "3", "--model.network.init_args.dim", "3", "--trainer.callbacks", "null"]
    small += ["--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1", "--seed_everything", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)
        patch.setattr(sys, "argv", ["lightning_iwae"])
        main(["fit", "-c", str(ROOT / "conf/gaussian.yaml"), *small, "--trainer.default_root_dir", str(run)])
    return run
