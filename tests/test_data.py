"""Data: batches by index, their independence of processes and interruptions, and the data modules' common part."""

import doctest
import inspect
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_iwae.data import (
    KMNIST,
    MNIST,
    ArrayData,
    Batches,
    Digits,
    FashionMNIST,
    Gaussian,
    Omniglot,
    base,
    batches,
)
from lightning_iwae.data.batches import binarize, draw_bytes, generator_for


def random_pixels(n, x, seed=0):
    return torch.randint(256, (n, x), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class Toy(ArrayData):
    """31 training items of 40 pixels, of which `validation` are held out, and 5 test items."""

    def __init__(self, batch_size=4, validation=3, seed=0, binarization="dynamic", limit_train=None):
        super().__init__(batch_size, validation, seed, binarization, limit_train)

    def load(self):
        train, val = self.split(random_pixels(31, 40))
        return train, val, random_pixels(5, 40, seed=1)


def ready(data):
    data.prepare_data()
    data.setup()
    return data


# --- noise --------------------------------------------------------------------------------------------------


def z_of_binarisation(noise_of):
    """z-score, against pixel / 255, of the mean of 20,000 draws of each pixel value 0..255."""
    pixels = torch.arange(256, dtype=torch.uint8).expand(20_000, 256).contiguous()
    drawn = binarize(pixels, noise_of(pixels.shape)).double()
    excess = drawn - pixels.double() / 255
    return (excess.mean(0).sum() / (drawn.var(0) / len(drawn)).sum().sqrt()).item(), drawn.mean(0)


def test_binarised_pixel_is_one_with_probability_pixel_over_255():
    z, mean = z_of_binarisation(lambda shape: draw_bytes(shape, generator_for("test")))
    assert abs(z) < 4
    assert mean[0] == 0 and mean[255] == 1
    p = torch.arange(1, 255, dtype=torch.float64) / 255
    assert ((mean[1:255] - p) / (p * (1 - p) / 20_000).sqrt()).abs().max() < 4.5


def test_noise_on_0_to_255_would_be_found_biased():
    z, _ = z_of_binarisation(
        lambda shape: torch.randint(256, shape, dtype=torch.uint8, generator=generator_for("test"))
    )
    assert abs(z) > 8


def test_noise_is_uniform_below_255():
    counts = draw_bytes(torch.Size((1_000, 255)), generator_for(3)).flatten().bincount(minlength=256)
    assert counts[255] == 0
    chi2 = ((counts[:255] - 1_000.0) ** 2 / 1_000).sum().item()
    assert abs(chi2 - 254) < 4 * (2 * 254) ** 0.5


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 5), (4, 8)])
def test_noise_has_the_asked_shape(shape):
    assert draw_bytes(torch.Size(shape), generator_for(0)).shape == shape


# --- batches ------------------------------------------------------------------------------------------------


def indices(batch):
    """Toy pixels are told apart by their content."""
    return [tuple(row.tolist()) for row in batch]


def test_training_drops_the_last_short_batch_and_repeats_no_item():
    loader = Batches(random_pixels(31, 40), 4, shuffle=True)
    seen = [row for batch in loader for row in indices(batch)]
    assert len(loader) == 7 and len(seen) == 28 and len(set(seen)) == 28
    assert all(batch.shape == (4, 40) and batch.dtype == torch.float32 for batch in loader)


def test_evaluation_gives_every_item_once_in_order():
    items = random_pixels(31, 40)
    loader = Batches(items, 4, shuffle=False)
    assert len(loader) == len(list(loader)) == 8
    assert torch.equal(torch.cat(list(loader)), items.float() / 255)


def test_float_items_are_not_scaled():
    items = torch.randn(6, 2)
    assert torch.equal(torch.cat(list(Batches(items, 4, shuffle=False))), items)


SAME_ROWS = torch.full((16, 50), 128, dtype=torch.uint8)  # nothing but the noise can differ


@pytest.mark.parametrize("items, dynamic", [(random_pixels(16, 50), False), (SAME_ROWS, True)])
def test_epochs_differ_and_an_epoch_repeats(items, dynamic):
    epoch = [0]
    loader = Batches(items, 4, shuffle=True, dynamic=dynamic, epoch=lambda: epoch[0])
    runs = []
    for epoch[0] in (0, 1, 0):
        runs.append(torch.stack(list(loader)))
    assert torch.equal(runs[0], runs[2])
    assert len({batch.numpy().tobytes() for run in runs[:2] for batch in run}) == 8


@pytest.mark.parametrize("items, dynamic", [(random_pixels(16, 50), False), (SAME_ROWS, True)])
def test_seed_changes_order_and_noise(items, dynamic):
    first, other = (next(iter(Batches(items, 4, shuffle=True, dynamic=dynamic, seed=s))) for s in (0, 1))
    assert not torch.equal(first, other)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dynamic", [True, False])
def test_joined_training_batch_does_not_depend_on_the_number_of_processes(world_size, dynamic):
    loader = partial(Batches, random_pixels(31, 41), 6, shuffle=True, dynamic=dynamic, epoch=lambda: 2)
    ranks = [loader(rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole, *parts in zip(loader(), *ranks, strict=True):
        assert [len(part) for part in parts] == [6 // world_size] * world_size
        assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_evaluation_pads_nothing_and_ranks_have_the_same_number_of_batches(world_size):
    items = random_pixels(21, 4)
    ranks = [Batches(items, 5, shuffle=False, rank=r, world_size=world_size) for r in range(world_size)]
    joined = [torch.cat(parts) for parts in zip(*ranks, strict=True)]
    assert torch.equal(torch.cat(joined), items.float() / 255)
    last = [list(rank)[-1].shape for rank in ranks]  # one item for all of them
    assert sorted(last) == [(0, 4)] * (world_size - 1) + [(1, 4)]


@pytest.mark.parametrize(
    "batch_size, world_size, message",
    [
        (100, 3, r"data.batch_size .* divisible by the world size 3. Got 100; 99 or 102 would work."),
        (2, 4, r"world size 4. Got 2; 4 would work."),
        (201, 1, r"data.batch_size must be at most the 200 training items. Got 201."),
    ],
)
def test_batch_size_that_cannot_be_cut(batch_size, world_size, message):
    with pytest.raises(ValueError, match=message):
        Batches(random_pixels(200, 2), batch_size, shuffle=True, world_size=world_size)


def test_batches_check_their_items():
    with pytest.raises(ValueError, match=r"shape \(N, X\). Got \(3,\)"):
        Batches(torch.zeros(3), 1, shuffle=False)
    with pytest.raises(ValueError, match=r"torch.uint8. Got torch.float32"):
        Batches(torch.zeros(3, 2), 1, shuffle=True, dynamic=True)


# --- resume -------------------------------------------------------------------------------------------------


def test_loaded_state_skips_what_was_seen_once():
    epoch = [0]
    loader = partial(Batches, random_pixels(31, 40), 4, shuffle=True, dynamic=True, epoch=lambda: epoch[0])
    broken = loader()
    whole = list(broken)
    assert broken.state_dict() == {"epoch": 0, "batches": 7}
    taken = iter(broken)
    next(taken), next(taken)
    resumed = loader()
    resumed.load_state_dict(broken.state_dict())
    assert resumed.state_dict() == {"epoch": 0, "batches": 2}
    assert torch.equal(torch.stack(list(resumed)), torch.stack(whole[2:]))
    assert len(list(resumed)) == 7


def test_state_of_another_epoch_skips_nothing():
    loader = Batches(random_pixels(31, 40), 4, shuffle=True, epoch=lambda: 1)
    loader.load_state_dict({"epoch": 0, "batches": 5})
    assert len(list(loader)) == 7


LIGHTNINGS_OWN_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec",  # its use of torch
    "ignore:The dirpath has changed",  # resumed fits save elsewhere
    "ignore:Using ModelCheckpoint with manual optimization",  # we do want the state after the step
)


class Recorder(pl.LightningModule):
    """Keeps what it saw; manual optimisation, as the package's module."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(40))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.current_epoch, batch_idx, batch.numpy().tobytes()))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(((self.weight - batch) ** 2).mean())
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(saver, options, checkpoint=None):
    model = Recorder()
    trainer = pl.Trainer(
        default_root_dir=saver.dirpath,
        accelerator="cpu",
        logger=False,
        callbacks=[saver],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, Toy(), ckpt_path=checkpoint)
    return model


@LIGHTNINGS_OWN_WARNINGS
@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 3},
        {"max_steps": 20},
        {"max_epochs": 3, "val_check_interval": 3},
        {"max_epochs": 3, "limit_val_batches": 0},
        {"max_steps": 14, "limit_train_batches": 5},
    ],
    ids=str,
)
def test_resumed_fit_sees_the_batches_of_the_unbroken_one(tmp_path, options):
    saver = partial(ModelCheckpoint, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(saver(tmp_path / "whole"), options)
    for step in (
        1,
        5,
        7,
        10,
    ):  # after the first batch, in the middle and at the ends of an epoch, in the next
        resumed = fit(saver(tmp_path / f"{step}"), options, checkpoint=tmp_path / "whole" / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step:]
        assert torch.equal(resumed.weight, whole.weight)


@LIGHTNINGS_OWN_WARNINGS
def test_fit_resumed_from_a_resumed_fit(tmp_path):
    saver = partial(ModelCheckpoint, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(saver(tmp_path / "whole"), {"max_epochs": 3})
    fit(saver(tmp_path / "once"), {"max_epochs": 3}, checkpoint=tmp_path / "whole" / "step=2.ckpt")
    for step in (5, 9):
        twice = fit(saver(tmp_path / f"{step}"), {"max_epochs": 3}, tmp_path / "once" / f"step={step}.ckpt")
        assert twice.seen == whole.seen[step:]


@LIGHTNINGS_OWN_WARNINGS
def test_fit_resumed_at_an_epochs_end_and_for_longer(tmp_path):
    saver = partial(ModelCheckpoint, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    whole = fit(saver(tmp_path / "whole"), {"max_epochs": 4})
    fit(saver(tmp_path / "short"), {"max_epochs": 2})
    for epoch in (0, 1):
        resumed = fit(saver(tmp_path / f"{epoch}"), {"max_epochs": 4}, tmp_path / "short" / f"epoch={epoch}.ckpt")
        assert resumed.seen == whole.seen[7 * (epoch + 1) :]


# --- the data module ----------------------------------------------------------------------------------------


def test_split_is_disjoint_covers_all_and_follows_the_seed():
    one, again, other = (ready(Toy(seed=seed, binarization="none")) for seed in (0, 0, 1))
    train, val = set(indices(one.train)), set(indices(one.val))
    assert (len(train), len(val), len(one.test)) == (28, 3, 5)
    assert not train & val
    assert train | val == set(indices(random_pixels(31, 40)))
    assert torch.equal(one.train, again.train)
    assert set(indices(other.val)) != val


def test_limit_train_keeps_the_first_after_the_split():
    data, limited = ready(Toy()), ready(Toy(limit_train=9))
    assert torch.equal(limited.train, data.train[:9])
    assert torch.equal(limited.val, data.val)
    assert len(limited.train_dataloader()) == 2


@pytest.mark.parametrize("binarization", ["dynamic", "static", "threshold", "none"])
def test_train_mean_is_taken_before_binarisation(binarization):
    expected = ready(Toy(binarization="none")).train.double().mean(0) / 255
    torch.testing.assert_close(ready(Toy(binarization=binarization)).train_mean, expected.float())


def test_dynamic_draws_training_anew_and_evaluation_once():
    data = ready(Toy())
    data.trainer = SimpleNamespace(current_epoch=0, global_rank=0, world_size=1)
    first = torch.cat(list(data.train_dataloader()))
    val, test = torch.cat(list(data.val_dataloader())), torch.cat(list(data.test_dataloader()))
    data.trainer.current_epoch = 1
    assert not torch.equal(torch.cat(list(data.train_dataloader())), first)
    assert torch.equal(torch.cat(list(data.val_dataloader())), val)
    assert torch.equal(torch.cat(list(data.predict_dataloader())), test)
    assert torch.equal(torch.cat(list(ready(Toy(batch_size=2)).val_dataloader())), val)
    assert set(first.unique().tolist()) == set(val.unique().tolist()) == {0.0, 1.0}


def test_evaluation_draw_follows_seed_and_split():
    class Same(Toy):
        def load(self):
            items = torch.full((8, 200), 128, dtype=torch.uint8)
            return items, items, items

    one, other = ready(Same()), ready(Same(seed=1))
    assert not torch.equal(one.val, one.test)
    assert not torch.equal(one.val, other.val)


def test_static_threshold_and_none():
    grey = ready(Toy(binarization="none"))
    assert torch.equal(next(iter(grey.val_dataloader())), grey.val[:4].float() / 255)
    threshold = ready(Toy(binarization="threshold"))
    assert torch.equal(threshold.probe(28), (grey.train >= 128).float())
    assert torch.equal(next(iter(threshold.val_dataloader())), (grey.val >= 128).float())
    static = ready(Toy(binarization="static"))
    rows = set(indices(static.probe(28)))
    assert {row for batch in static.train_dataloader() for row in indices(batch)} == rows
    assert torch.equal(static.val, ready(Toy()).val)


@pytest.mark.parametrize("binarization", ["dynamic", "static", "threshold", "none"])
def test_probe_is_fixed(binarization):
    data = ready(Toy(binarization=binarization))
    probe = data.probe(3)
    assert probe.shape == (3, 40) and probe.dtype == torch.float32
    assert torch.equal(probe, data.probe(3))
    assert torch.equal(probe, ready(Toy(binarization=binarization)).probe(3))
    assert binarization == "none" or set(probe.unique().tolist()) == {0.0, 1.0}


def test_probe_checks_its_arguments():
    data = Toy()
    with pytest.raises(RuntimeError, match="Toy has no data yet"):
        data.probe(1)
    data = ready(data)
    with pytest.raises(ValueError, match=r"a probe of train must have 1 to 28 items. Got 29."):
        data.probe(29)


def test_rank_and_world_size_are_the_trainers():
    data = ready(Toy())
    whole = next(iter(data.train_dataloader()))
    data.trainer = SimpleNamespace(current_epoch=0, global_rank=1, world_size=2)
    assert torch.equal(next(iter(data.train_dataloader())), whole[2:])
    data.trainer.world_size = 3
    with pytest.raises(ValueError, match=r"world size 3. Got 4; 3 or 6 would work."):
        data.train_dataloader()


@pytest.mark.parametrize("data", [MNIST, FashionMNIST, KMNIST, Omniglot, Digits, Gaussian])
def test_constructor_arguments_are_explicit_and_have_defaults(data):
    for parameter in inspect.signature(data).parameters.values():
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        assert parameter.default is not parameter.empty
        assert parameter.annotation is not parameter.empty


@pytest.mark.parametrize(
    "make, message",
    [
        (partial(MNIST, batch_size=0), "data.batch_size must be at least 1. Got 0."),
        (partial(MNIST, validation=0), "data.validation must be at least 1. Got 0."),
        (partial(MNIST, seed=-1), "data.seed must be at least 0. Got -1."),
        (partial(MNIST, limit_train=0), "data.limit_train must be at least 1. Got 0."),
        (partial(MNIST, binarization="sharp"), "one of dynamic, static, threshold, none. Got sharp."),
        (partial(Digits, test=0), "data.test must be at least 1. Got 0."),
        (partial(Gaussian, dim=0), "data.dim must be at least 1. Got 0."),
        (partial(Gaussian, size=0), "data.size must be at least 1. Got 0."),
    ],
)
def test_constructor_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_too_many_held_out():
    with pytest.raises(ValueError, match=r"data.validation must be below the 31 items. Got 31."):
        Toy(validation=31).setup()
    with pytest.raises(ValueError, match=r"data.test must be below the 1797 digits. Got 1797."):
        Digits(test=1797).setup()


@pytest.mark.parametrize("module", [base, batches])
def test_examples_in_docstrings(module):
    extra = {"torch": torch, "LightningDataModule": pl.LightningDataModule, "DataLoader": DataLoader}
    result = doctest.testmod(module, extraglobs=extra)
    assert result.attempted and not result.failed


# --- digits and gaussian ------------------------------------------------------------------------------------


def test_digits():
    from sklearn.datasets import load_digits

    data, other = ready(Digits(binarization="none")), ready(Digits(seed=1, binarization="none"))
    parts = (data.train, data.val, data.test)
    assert [tuple(part.shape) for part in parts] == [(1237, 64), (200, 64), (360, 64)]
    pixels = np.rint(load_digits().data * 255 / 16).astype(int)
    assert sorted(indices(torch.cat(parts))) == sorted(map(tuple, pixels.tolist()))
    assert torch.equal(data.test, other.test)
    assert not torch.equal(data.val, other.val)


def test_gaussian_moments():
    data = ready(Gaussian(dim=3, size=20_000))
    for split in (data.train, data.val, data.test):
        assert split.shape == (20_000, 3) and split.dtype == torch.float32
        assert (((split.mean(0) - data.mu_true) / (2 / 20_000) ** 0.5).abs() < 4).all()
        error = split.T.cov() - 2 * torch.eye(3)
        assert (error.abs() < 4 * (2 * 4 / 20_000) ** 0.5).all()
    assert len({split.sum().item() for split in (data.train, data.val, data.test)}) == 3
    torch.testing.assert_close(data.train_mean, data.train.double().mean(0).float())
    assert torch.equal(data.probe(20_000), data.train)


def test_gaussian_follows_its_seed_only():
    small, large, other = Gaussian(size=10, batch_size=5), Gaussian(size=20), Gaussian(seed=1)
    assert torch.equal(small.mu_true, large.mu_true)
    assert not torch.equal(small.mu_true, other.mu_true)
    assert torch.equal(ready(small).val, ready(Gaussian(size=10)).val)
