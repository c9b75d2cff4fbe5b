"""Arrays by path, a data module of one's own, and batches with labels."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from lightning_iwae.cli import main
from lightning_iwae.data import ArrayData, Arrays, Batches, Digits, Gaussian

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(256, size=(40, 3, 5), dtype=np.uint8)
FLOATS = RNG.normal(size=(40, 3, 5)).astype(np.float32)
KINDS = RNG.integers(4, size=40)


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def saved(path, array):
    np.save(path, array)
    return str(path)


def rows(x):
    return sorted(map(tuple, x.tolist()))


# --- arrays by path -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", [PIXELS, FLOATS, FLOATS.astype(np.float64), np.asfortranarray(FLOATS)])
def test_items_are_those_of_the_file(tmp_path, array):
    data = ready(Arrays(train=saved(tmp_path / "x.npy", array), batch_size=9, validation=4))
    expected = array.reshape(40, 15).astype(np.float32) / np.float32(255 if array.dtype == np.uint8 else 1)
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    assert [tuple(x.shape) for x in batches] == [(9, 15)] * 4 + [(4, 15)]
    assert all(x.dtype == torch.float32 for x in batches)
    assert rows(torch.cat(batches)) == rows(torch.from_numpy(expected))
    np.testing.assert_allclose(data.train_mean, torch.cat(batches[:-1]).mean(0), atol=1e-6)


def test_three_files_are_three_sets_in_the_files_order(tmp_path):
    train, val, test = (saved(tmp_path / f"{i}.npy", FLOATS[i : i + 9]) for i in (0, 10, 20))
    data = ready(Arrays(train=train, val=val, test=test, batch_size=4))
    for split, first in ((data.train, 0), (data.val, 10), (data.test, 20)):
        assert np.array_equal(split, FLOATS[first : first + 9].reshape(9, 15))
    assert torch.equal(torch.cat(list(data.predict_dataloader())), data.test)


def test_an_archives_arrays_are_named(tmp_path):
    np.savez(tmp_path / "several.npz", a=PIXELS[:30], b=PIXELS[30:])
    np.savez_compressed(tmp_path / "one.npz", PIXELS[5:9])
    several = tmp_path / "several.npz"
    data = ready(Arrays(train=f"{several}:a", val=f"{several}:b", test=str(tmp_path / "one.npz"), batch_size=4))
    assert np.array_equal(data.train, PIXELS[:30].reshape(30, 15))
    assert np.array_equal(data.val, PIXELS[30:].reshape(10, 15))
    assert np.array_equal(data.test, PIXELS[5:9].reshape(4, 15))


def test_a_tenth_is_held_out_where_nothing_is_said(tmp_path):
    path = saved(tmp_path / "x.npy", FLOATS)
    one, again, other = (ready(Arrays(train=path, batch_size=4, seed=seed)) for seed in (0, 0, 1))
    assert (len(one.train), len(one.val)) == (36, 4)
    assert torch.equal(one.val, again.val) and not torch.equal(one.val, other.val)
    assert len(ready(Arrays(train=saved(tmp_path / "y.npy", FLOATS[:3]), batch_size=1)).val) == 1


def test_a_npy_file_is_mapped_and_never_written_to(tmp_path):
    path = saved(tmp_path / "x.npy", PIXELS)
    data = ready(Arrays(train=path, val=path, batch_size=4, binarization="dynamic"))
    if sys.platform == "linux":
        assert path in Path("/proc/self/maps").read_text()
    data.train.zero_()  # in this process's memory only
    assert np.array_equal(np.load(path), PIXELS)


@pytest.mark.parametrize("binarization", ["dynamic", "static", "threshold"])
def test_pixels_can_be_binarised(tmp_path, binarization):
    path = saved(tmp_path / "x.npy", PIXELS)
    data = ready(Arrays(train=path, test=path, batch_size=4, binarization=binarization))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert set(torch.cat(list(loader)).unique().tolist()) == {0.0, 1.0}


def test_labels_by_path(tmp_path):
    x, y = saved(tmp_path / "x.npy", PIXELS), saved(tmp_path / "y.npy", KINDS.astype(np.uint16))
    data = ready(Arrays(train=x, train_labels=y, test=x, test_labels=y, batch_size=6, validation=4))
    kind_of = dict(zip(map(tuple, PIXELS.reshape(40, 15).tolist()), KINDS.tolist(), strict=True))
    for x, y in (*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader(), data.probe(7)):
        assert y.dtype == torch.int64
        assert [kind_of[tuple(row)] for row in (x * 255).round().int().tolist()] == y.tolist()


# --- batches with labels ------------------------------------------------------------------------------------


def test_digits_labels_are_sklearns():
    bunch = load_digits()
    digit_of = dict(zip(map(tuple, np.rint(bunch.data * 255 / 16).astype(int).tolist()), bunch.target, strict=True))
    data = ready(Digits(labels=True, binarization="none"))
    batches = [*data.train_dataloader(), *data.val_dataloader(), *data.predict_dataloader(), data.probe(5)]
    for x, y in batches:
        assert [digit_of[tuple(row)] for row in (x * 255).round().int().tolist()] == y.tolist()


def test_labels_change_nothing_of_the_images():
    labelled, plain = ready(Digits(labels=True)), ready(Digits())
    for name in ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"):
        pairs, images = list(getattr(labelled, name)()), list(getattr(plain, name)())
        assert torch.equal(torch.cat([x for x, _ in pairs]), torch.cat(images))
    assert torch.equal(labelled.probe(9)[0], plain.probe(9))
    assert torch.equal(labelled.train_mean, plain.train_mean)


def test_limit_train_keeps_the_labels_of_what_it_keeps():
    whole, limited = ready(Digits(labels=True)), ready(Digits(labels=True, limit_train=30, batch_size=30))
    assert torch.equal(limited.probe(30)[1], whole.probe(30)[1])
    ((_, y),) = limited.train_dataloader()
    assert sorted(y.tolist()) == sorted(whole.probe(30)[1].tolist())


@pytest.mark.parametrize("shuffle", [True, False])
def test_joined_labels_do_not_depend_on_the_number_of_processes(shuffle):
    x, y = torch.from_numpy(PIXELS).flatten(1), torch.arange(40)
    options = {"shuffle": shuffle, "dynamic": shuffle, "labels": y}
    ranks = [Batches(x, 6, rank=rank, world_size=3, **options) for rank in range(3)]
    whole = list(Batches(x, 6, **options))
    assert len({label for _, labels in whole for label in labels.tolist()}) == (36 if shuffle else 40)
    for (items, labels), *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(items, torch.cat([part[0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[1] for part in parts]))


def test_resumed_batches_have_the_labels_of_the_unbroken_ones():
    x, y = torch.from_numpy(PIXELS).flatten(1), torch.arange(40)
    broken = Batches(x, 6, shuffle=True, labels=y)
    whole = [labels.tolist() for _, labels in broken]
    taken = iter(broken)
    next(taken), next(taken)
    resumed = Batches(x, 6, shuffle=True, labels=y)
    resumed.load_state_dict(broken.state_dict())
    assert [labels.tolist() for _, labels in resumed] == whole[2:]


# --- a data module of one's own -----------------------------------------------------------------------------


class Own(LightningDataModule):
    """Nothing but what Lightning asks for."""

    def train_dataloader(self):
        return DataLoader(torch.rand(60, 64).round(), batch_size=20, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(torch.rand(20, 64).round(), batch_size=20)


class OwnArrays(ArrayData):
    """Three random sets."""

    def __init__(self, batch_size: int = 20, seed: int = 0):
        super().__init__(batch_size, validation=20, seed=seed, binarization="dynamic")

    def load(self):
        train, val = self.split(torch.randint(256, (80, 64), dtype=torch.uint8))
        return train, val, None


CONFIG = """
model:
  samples: 4
  theta: {{estimator: iwae, particles: 4}}
  phi: {{estimator: iwae, particles: 2}}
  network: {{class_path: lightning_iwae.models.MLP, init_args: {{pixels: 64, latent: 2, hidden: [4]}}}}
data: {{class_path: {class_path}}}
trainer: {{default_root_dir: {directory}, max_steps: 3, log_every_n_steps: 1, enable_progress_bar: false}}
"""


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:No best.ckpt is kept")
@pytest.mark.parametrize("name", ["Own", "OwnArrays"])
def test_a_data_module_of_ones_own_by_class_path(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning_iwae"])
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)
    (tmp_path / "own.yaml").write_text(CONFIG.format(class_path=f"{__name__}.{name}", directory=tmp_path / "run"))
    main(["fit", "-c", str(tmp_path / "own.yaml")])
    (last,) = (tmp_path / "run").rglob("*.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 3


def test_the_gaussian_has_no_labels():
    with pytest.raises(TypeError):
        Gaussian(labels=True)
