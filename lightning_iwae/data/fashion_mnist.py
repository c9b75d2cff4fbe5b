"""Fashion-MNIST: MNIST's format, other pictures."""

from typing import ClassVar

from lightning_iwae.data.mnist import MNIST


class FashionMNIST(MNIST):
    """Fashion-MNIST (Xiao et al. 2017, https://arxiv.org/abs/1708.07747): 60,000 and 10,000 articles of clothing.

    As `MNIST`, with the same arguments; the folder is `fashionmnist`. The published MD5s, torchvision's, are of the
    gzipped files, so `NAME.gz` it must be; torchvision's layout `FashionMNIST/raw` has them.
    """

    title: ClassVar[str] = "FashionMNIST"
    md5: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }
    mirrors: ClassVar[tuple[str, ...]] = (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    )
    npm_package: ClassVar[str | None] = None
