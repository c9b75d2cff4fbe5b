"""KMNIST: MNIST's format, cursive Japanese."""

from typing import ClassVar

from lightning_iwae.data.mnist import MNIST


class KMNIST(MNIST):
    """Kuzushiji-MNIST (Clanuwat et al. 2018, https://arxiv.org/abs/1812.01718): 60,000 and 10,000 Hiragana.

    As `MNIST`, with the same arguments; the folder is `kmnist`. The published MD5s, torchvision's, are of the gzipped
    files, so `NAME.gz` it must be; torchvision's layout `KMNIST/raw` has them.
    """

    title: ClassVar[str] = "KMNIST"
    md5: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
        "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
        "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
        "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134",
    }
    mirrors: ClassVar[tuple[str, ...]] = ("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",)
    npm_package: ClassVar[str | None] = None
