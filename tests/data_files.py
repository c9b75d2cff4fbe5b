"""Tiny stand-ins for published data sets, and a web server of this machine: no test reaches further."""

import contextlib
import gzip
import hashlib
import http.server
import io
import threading
from functools import partial

import numpy as np
import scipy.io

from lightning_iwae.data import KMNIST, MNIST, DataError, FashionMNIST, Omniglot


def idx(array):
    """The array as an IDX file of bytes."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def images(n, seed):
    return np.random.default_rng(seed).integers(256, size=(n, 28, 28), dtype=np.uint8)


IMAGES = {"train": images(12, 0), "test": images(4, 1)}
LABELS = {"train": np.arange(12) % 10, "test": np.arange(4)}
FILES = {
    "train-images-idx3-ubyte": idx(IMAGES["train"]),
    "train-labels-idx1-ubyte": idx(LABELS["train"]),
    "t10k-images-idx3-ubyte": idx(IMAGES["test"]),
    "t10k-labels-idx1-ubyte": idx(LABELS["test"]),
}
ZIPPED = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in FILES.items()}


def md5_table(contents):
    return {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}


def write(folder, contents=FILES):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def unreachable(origin, names):
    raise DataError("cable is out")


class TinyMNIST(MNIST):
    """12 and 4 images, which come from nowhere unless a test says so."""

    md5 = md5_table(FILES)
    mirrors = ()
    npm_package = None


class TinyFashionMNIST(FashionMNIST):
    """The same files, known by the MD5 of their gzipped forms."""

    md5 = md5_table(ZIPPED)
    mirrors = ()


class TinyKMNIST(KMNIST):
    """Likewise."""

    md5 = md5_table(ZIPPED)
    mirrors = ()


class TinyOmniglot(Omniglot):
    """12 and 4 images of 3 alphabets."""

    sizes = (12, 4)
    alphabets = 3
    mirrors = ()


OMNIGLOT_LABELS = {"train": np.arange(12) % 3, "test": np.arange(4) % 3}


def chardata(**changes):
    """A chardata.mat as MATLAB's users make it: images column by column, one in each column."""
    arrays = {}
    for split, prefix in (("train", ""), ("test", "test")):
        columns = [image.astype(float).flatten(order="F") / 255 for image in IMAGES[split]]
        arrays[f"{prefix}data"] = np.stack(columns, axis=1)
        arrays[f"{prefix}target"] = np.eye(3)[:, OMNIGLOT_LABELS[split]]
    file = io.BytesIO()
    wanted = {name: array for name, array in (arrays | changes).items() if array is not None}
    scipy.io.savemat(file, wanted, do_compression=True)
    return file.getvalue()


@contextlib.contextmanager
def serving(handler):
    """The address of a web server that answers with `handler`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    with contextlib.closing(server.socket):
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, without a word."""

    def log_message(self, *args):
        pass


def serving_folder(folder):
    return serving(partial(Files, directory=folder))


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers every request with `status`, `body` and as Content-Length `length`, or that of the body."""

    status, body, length = 200, b"", None

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body) if self.length is None else self.length))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args):
        pass


def answering(status=200, body=b"", length=None):
    return serving(type("Answering", (Answer,), {"status": status, "body": body, "length": length}))
