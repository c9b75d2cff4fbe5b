"""The main path on real MNIST, as long as it takes."""

import math
import os
import sys

import pytest
import torch

from lightning_iwae.cli import main
from lightning_iwae.data import MNIST, DataError
from lightning_iwae.data.batches import to_float
from lightning_iwae.evaluation import importance_sample
from lightning_iwae.models import MLP

from .test_cli import ROOT

FIVE_PASSES = ["-c", "conf/mnist.yaml", "--trainer.max_epochs", "5"]
FIVE_PASSES += ["--model.scheduler_theta", "null", "--model.scheduler_phi", "null"]
FIVE_PASSES += ["--model.optimizer_theta.init_args.lr", "1e-3", "--model.optimizer_phi.init_args.lr", "1e-3"]
FIVE_PASSES += ["--data.init_args.validation", "400"]  # the papers' split


@pytest.mark.slow
def test_five_passes_at_a_constant_rate_of_1e_3_reach_102_nats_on_held_out_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning_iwae"])
    data = MNIST(validation=400)
    try:
        data.prepare_data()
    except DataError as error:
        pytest.skip(f"MNIST can't be reached: {error}")
    data.setup()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    run = tmp_path / "run"
    main(["fit", *FIVE_PASSES, "--trainer.default_root_dir", str(run), "--trainer.enable_progress_bar", "false"])
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 5 * 596
    network = MLP()
    network.load_state_dict({k.removeprefix("network."): v for k, v in state["state_dict"].items()})
    torch.manual_seed(0)
    images = data.test[:5000].split(500)
    l_64 = torch.cat([importance_sample(network, to_float(x), 64).log_px for x in images])
    mean, se = l_64.mean().item(), l_64.std().item() / math.sqrt(len(l_64))
    with capsys.disabled():
        print(f"\nL_64 on the first 5,000 MNIST test images after five passes: {mean:.2f} +- {se:.2f} nats")
    assert mean > -102.0
