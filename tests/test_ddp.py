"""Two processes through the real module and a real Trainer equal one process on the joined batch."""

import multiprocessing
import os
import socket
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader

from lightning_iwae.annealing import Annealing
from lightning_iwae.callbacks import AIS, BDMC, Predictions
from lightning_iwae.data import Digits, Gaussian
from lightning_iwae.models import MLP, LinearGaussian
from lightning_iwae.module import IWModule
from lightning_iwae.sides import Side

RANKS = 2
PATIENCE = 60  # seconds that a rank waits for another before it gives up: reached only by a bug
OBJECTIVES = {
    "vae": (Side("elbo", 1), Side("elbo", 1)),
    "iwae": (Side("iwae", 8), Side("iwae", 8)),
    "piwae": (Side("iwae", 8), Side("iwae", 2)),
    "ciwae": (Side("ciwae", 8, beta=0.3), Side("ciwae", 4, beta=0.6)),
    "dreg": (Side("iwae", 8), Side("dreg", 8)),
}


# --------------------------------------------------------------------------------------------------- the processes
def join(rank, port):
    """Makes a process one rank of a gloo group, as a launcher would."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    all_gather = "torch.distributed.nn.functional.all_gather is deprecated"
    for by_lightning in (".*LeafSpec", all_gather, "The `srun` command is available"):
        warnings.filterwarnings("ignore", by_lightning)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else the host's name is looked up
    torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=timedelta(seconds=PATIENCE))


class Ranks:
    """Calls a function in both processes at once."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        spawn = multiprocessing.get_context("spawn")
        self.pools = [ProcessPoolExecutor(1, spawn, join, (rank, port)) for rank in range(RANKS)]

    def __call__(self, function, *args, **kwargs):
        """Each rank's result."""
        futures = [pool.submit(function, *args, **kwargs) for pool in self.pools]
        return [future.result(timeout=3 * PATIENCE) for future in futures]

    def close(self):
        for pool in self.pools:
            pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks()
    yield ranks
    ranks.close()


# ------------------------------------------------------------------------------------- what each of them is asked for
def quiet_trainer(**options):
    if torch.distributed.is_initialized():
        options |= {"strategy": "ddp", "devices": RANKS}
    return Trainer(
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def iw_module(theta, phi, **options):
    torch.manual_seed(0)
    network = MLP(pixels=64, latent=3, hidden=[8])
    return IWModule(network, samples=8, theta=theta, phi=phi, seed=5, **options)


class Count(Callback):
    """All-reduces of gradients, per batch."""

    def __init__(self):
        self.reduced = []

    def on_train_start(self, trainer, pl_module):
        def count(state, bucket):
            self.reduced[-1] += 1
            return allreduce_hook(state, bucket)

        if torch.distributed.is_initialized():
            trainer.strategy.model.register_comm_hook(None, count)

    def on_train_batch_start(self, *args):
        self.reduced.append(0)


def train(objective, **options):
    """Parameters before and after two epochs of five batches, and the all-reduces of each batch."""
    module, count = iw_module(*OBJECTIVES[objective], **options), Count()
    before = [p.detach().double() for p in module.parameters()]
    trainer = quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=[count])
    trainer.fit(module, Digits(batch_size=20, limit_train=100))
    return before, [p.detach() for p in module.parameters()], count.reduced


def distance(left, right):
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(("objective", "options"), [
    *((objective, {}) for objective in OBJECTIVES),
    ("piwae", {"accumulate": 2}),
    ("dreg", {"accumulate": 2}),
    ("piwae", {"clip_theta": 0.05, "clip_phi": 0.02}),
    ("piwae", {"method": "separate"}),
    ("piwae", {"chunk": 3}),
    ("dreg", {"chunk": 3, "accumulate": 2}),
], ids=str)  # fmt: skip
def test_two_processes_equal_one(ranks, objective, options):
    torch.set_num_threads(1)
    options = options | {"whole_batch_noise": True}
    before, alone, _ = train(objective, **options)
    (_, first, reduced), (_, second, _) = ranks(train, objective, **options)
    assert distance(first, second) == 0
    assert distance(first, alone) < 1e-10
    assert distance(before, alone) > 1e-3
    steps = [0, 1, 0, 1, 1] * 2 if "accumulate" in options else [1] * 10
    assert [min(n, 1) for n in reduced] == steps  # all-reduced at a window's end only


def test_without_whole_batch_noise_two_processes_are_another_run(ranks):
    torch.set_num_threads(1)
    _, alone, _ = train("piwae")
    (_, first, _), (_, second, _) = ranks(train, "piwae")
    assert distance(first, second) == 0
    assert distance(first, alone) > 1e-3


# ---------------------------------------------------------------------------------------------------------- noise
def noise(whole_batch_noise):
    """What two batches' samples were made of."""
    module, seen = iw_module(*OBJECTIVES["iwae"], whole_batch_noise=whole_batch_noise), []
    constant = nn.Linear(64, 6)  # q(z | x) = N(0, 1) whatever x: samples are the noise
    nn.init.zeros_(constant.weight)
    nn.init.zeros_(constant.bias)
    module.network.inference = constant
    module.optimizer_phi = module.optimizer_theta = partial(torch.optim.SGD, lr=0.0)
    module.network.generative.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    quiet_trainer(max_steps=2, limit_val_batches=0).fit(module, Digits(batch_size=20, limit_train=100))
    return torch.stack(seen)


def test_ranks_draw_different_noise(ranks):
    first, second = ranks(noise, False)
    assert first.shape == second.shape == (2, 8, 10, 3)
    values = torch.stack([first, second])
    assert len(values.unique()) == values.numel()


def test_whole_batch_noise_is_that_of_one_process(ranks):
    torch.set_num_threads(1)
    assert torch.equal(torch.cat(ranks(noise, True), 2), noise(True))
    assert torch.equal(noise(True), noise(False))


# ----------------------------------------------------------------------------------------------------- not finite
class NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


class Fragile(MLP):
    """On one rank and from one batch on, breaks in the way that `fault` names."""

    fault = ""

    def likelihood(self, z):
        p = super().likelihood(z)
        if self.fault == "gradient":
            return type(p)(NaNGradient.apply(p.logits))
        return type(p)(p.logits * float("nan")) if self.fault == "bound" else p


class BreakAt(Callback):
    def __init__(self, fault, rank, batch):
        self.fault, self.rank, self.batch = fault, rank, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_rank, batch_idx) == (self.rank, self.batch):
            pl_module.network.fault = self.fault
        self.before = [p.detach().clone() for p in pl_module.parameters()]


def broken(fault, rank, accumulate):
    """The error, and how far weights moved in the batch that raised it. A rank left waiting raises RuntimeError."""
    torch.manual_seed(0)
    network = Fragile(pixels=64, latent=3, hidden=[8])
    module = IWModule(network, samples=8, theta=Side("iwae", 8), phi=Side("iwae", 2), accumulate=accumulate)
    callback = BreakAt(fault, rank, batch=2)
    trainer = quiet_trainer(max_epochs=1, limit_val_batches=0, callbacks=[callback])
    try:
        trainer.fit(module, Digits(batch_size=20, limit_train=100))
    except FloatingPointError as error:
        return str(error), distance(module.parameters(), callback.before)
    return "no error", 0.0


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("fault", "named"), [
    ("gradient", "the generative network's gradient is not finite"),
    ("bound", "the bound is not finite, by the generative network's log p(x|z)"),
])  # fmt: skip
def test_what_is_not_finite_on_one_rank_ends_both(ranks, fault, named, rank, accumulate):
    results = ranks(broken, fault, rank, accumulate)
    assert named in results[rank][0]
    for message, moved in results:
        assert message.startswith(f"Step {2 // accumulate}: ")
        assert "not finite" in message
        assert moved == 0


# ----------------------------------------------------------------------------------------------------- evaluation
def exact_toy(size, batch_size):
    """Data, and a module whose log-weights are log p(x) whatever z, so that every estimate is exact."""
    data = Gaussian(batch_size=batch_size, dim=4, size=size)
    data.setup()
    network = LinearGaussian(dim=4, variance=0.5)
    with torch.no_grad():
        network.mu.copy_(data.mu_true)
        network.inference.weight.copy_(torch.eye(4) / 2)
        network.inference.bias.copy_(data.mu_true / 2)
    module = IWModule(network, samples=2, theta=Side("iwae", 2), phi=Side("iwae", 2), test_particles=70)
    module.optimizer_phi = module.optimizer_theta = partial(torch.optim.SGD, lr=0.0)
    return data, module


def evaluated(size, batch_size):
    data, module = exact_toy(size, batch_size)
    network = module.network
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, data)
    validated = {name: trainer.callback_metrics[f"val/{name}"].item() for name in ("elbo", "iwae_64")}
    trainer.test(module, data, verbose=False)
    logged = trainer.callback_metrics["test/log_px"].item()
    with torch.no_grad():
        exact = [network.exact_log_px(x.double()) for x in (data.val, data.test)]
        active = int((network.posterior(data.test.double()).mean.var(0) > 0.01).sum())
    return validated, module.result, logged, *exact, active


@pytest.mark.parametrize(("size", "batch_size"), [(26, 8), (9, 4)])  # last batches of 1 + 1 and of 0 + 1
def test_evaluation_takes_every_datum_once(ranks, size, batch_size):
    for validated, result, logged, val, test, active in ranks(evaluated, size, batch_size):
        assert validated == pytest.approx({"elbo": val.mean().item(), "iwae_64": val.mean().item()}, rel=1e-9)
        for name in ("elbo", "iwae_64", "log_px"):
            expected = {"mean": test.mean().item(), "se": test.std().item() / size**0.5}
            assert result[name] == pytest.approx(expected, rel=1e-9)
        assert result["ess"]["mean"] == pytest.approx(1, rel=1e-9)
        assert result["kl_q_posterior"]["mean"] == pytest.approx(0, abs=1e-9)
        assert result["active_units"] == active
        assert logged == pytest.approx(test.mean().item(), rel=1e-6)


def annealed(size, batch_size):
    data, module = exact_toy(size, batch_size)
    settings = Annealing(2, 3, 1, start="posterior")
    quiet_trainer(callbacks=[AIS(7, settings), BDMC(7, settings)]).test(module, data, verbose=False)
    with torch.no_grad():
        return module.result, module.network.exact_log_px(data.test.double())


@pytest.mark.parametrize(("size", "batch_size"), [(26, 8), (5, 4)])  # four data of each process; batches of 0 + 1
def test_annealing_takes_each_process_share_of_the_data(ranks, size, batch_size):
    for result, exact in ranks(annealed, size, batch_size):
        assert result["ais"]["data"] == result["bdmc"]["data"] == min(size, 8)
        assert result["log_px_ais"]["mean"] == pytest.approx(exact[:8].mean().item(), rel=1e-5)
        assert result["bdmc_gap"]["mean"] == pytest.approx(0, abs=1e-5)


class PlainLoader(Gaussian):
    """Whose batches torch cuts, and Lightning's sampler shares out: every other datum to each process."""

    def predict_dataloader(self):
        return DataLoader(self.test, batch_size=self.batch_size)


def predicted(loader, size, batch_size, path):
    warnings.filterwarnings("ignore", ".*does not have many workers")
    data, module = exact_toy(size, batch_size)
    data.__class__ = loader
    quiet_trainer(callbacks=[Predictions(path)]).predict(module, data)
    with torch.no_grad():
        x = data.test.double()
        return module.network.exact_log_px(x), module.network.posterior(x).mean


@pytest.mark.parametrize("loader", [Gaussian, PlainLoader])
@pytest.mark.parametrize(("size", "batch_size"), [(26, 8), (9, 4)])
def test_predictions_are_of_every_datum_once_in_order(ranks, loader, size, batch_size, tmp_path):
    path = str(tmp_path / "predictions.npz")
    exact, mean = ranks(predicted, loader, size, batch_size, path)[0]
    with np.load(path) as rows:
        np.testing.assert_array_equal(rows["index"], np.arange(size))
        np.testing.assert_allclose(rows["log_px"], exact, rtol=1e-9)
        np.testing.assert_allclose(rows["mean"], mean, rtol=1e-9)
