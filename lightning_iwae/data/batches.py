"""Batches by index out of tensors in memory, with binarisation noise that can be repeated."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..randomness import seed_for

Items = Tensor | tuple[Tensor, Tensor]  # x (N, X), or x and its labels y (N,): a whole set, or a batch


def parts(items: Items) -> tuple[Tensor, Tensor | None]:
    """x, and y or None."""
    return items if isinstance(items, tuple) else (items, None)


def take(items: Items, index: Tensor | slice) -> Items:
    """Rows of x, and with labels those of y."""
    return (rows(items[0], index), rows(items[1], index)) if isinstance(items, tuple) else rows(items, index)


def rows(tensor: Tensor, index: Tensor | slice) -> Tensor:
    """`tensor[index]`, several times as fast where `index` is a tensor of few."""
    return tensor[index] if isinstance(index, slice) else tensor.index_select(0, index)


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream is a function of `key` alone, such as `(seed, "noise", epoch, batch)`."""
    return torch.Generator().manual_seed(seed_for(*key))


def draw_bytes(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """uint8 noise uniform on 0..254, so that `noise < pixel` has probability pixel / 255.

    Eight bytes come from each 64-bit word; those that are 255, one of 256, are drawn again. This is some four
    times as fast as `torch.randint(255, ...)`, which spends a word on each byte.
    """
    count = shape.numel()
    words = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    noise = words.view(torch.uint8)[:count]
    array = noise.numpy()  # the same memory, and numpy finds the few 255s faster than torch.nonzero
    (again,) = (array == 255).nonzero()
    array[again] = torch.randint(255, again.shape, dtype=torch.uint8, generator=generator).numpy()
    return noise.view(shape)


def binarize(pixels: Tensor, noise: Tensor) -> Tensor:
    """float32 ones where noise < pixel, else zeros: both uint8 of one shape, noise from `draw_bytes`."""
    return torch.lt(noise, pixels, out=torch.empty(pixels.shape))


def to_float(items: Tensor) -> Tensor:
    """uint8 pixels to float32 in [0, 1]; data that are float already stay as they are."""
    return items.float().div_(255) if items.dtype == torch.uint8 else items


class Batches:
    """Batches (B, X) of floats, cut by index from one tensor (N, X) of uint8 pixels or of floats.

    With labels (N,) a batch is a tuple (x, y): x as without them, y (B,) int64.

    Training (`shuffle=True`): a permutation that is a function of (seed, epoch), in full batches only. The
    last short batch is dropped, so that shapes are constant; what it held comes in other epochs.
    Evaluation (`shuffle=False`): in order, every item once, and the last batch may be short.

    `batch_size` counts the items of all processes. Each global batch is cut contiguously into one slice a
    rank, so that the joined batch does not depend on the number of processes. Every rank has the same number
    of batches; in evaluation slices may differ by one item, and may be empty: shape (0, X).

    With `dynamic=True` pixels are drawn as zeros and ones at each presentation, from noise that is a function
    of (seed, epoch, batch index); otherwise they are divided by 255.

    `state_dict` and `load_state_dict` make it resumable for Lightning: an epoch broken off after n batches
    goes on with the next. Batches count as seen when they are handed out: save after a step, not inside one.

    Args:
        items: (N, X), uint8 or float.
        batch_size: items in a global batch.
        shuffle: True for training, False for evaluation.
        dynamic: draw zeros and ones; uint8 only.
        seed: of permutation and noise.
        epoch: called when an epoch's first batch is taken; gives its number.
        rank: of this process.
        world_size: number of processes.
        labels: (N,) int64, or None.

    Example:
        >>> batches = Batches(torch.arange(12.0).view(6, 2), batch_size=4, shuffle=False)
        >>> [tuple(batch.shape) for batch in batches]
        [(4, 2), (2, 2)]
    """

    def __init__(
        self,
        items: Tensor,
        batch_size: int,
        *,
        shuffle: bool,
        dynamic: bool = False,
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
        labels: Tensor | None = None,
    ) -> None:
        if items.ndim != 2:
            raise ValueError(f"items must have shape (N, X). Got {tuple(items.shape)}.")
        if dynamic and items.dtype != torch.uint8:
            raise ValueError(f"dynamic binarisation needs items of torch.uint8. Got {items.dtype}.")
        if labels is not None and (labels.shape != items.shape[:1] or labels.dtype != torch.int64):
            raise ValueError(
                f"labels must have shape ({len(items)},) and torch.int64. Got {tuple(labels.shape)}, {labels.dtype}."
            )
        if shuffle:
            check_batch_size(batch_size, len(items), world_size)
        self.items = items
        self.labels = labels
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.dynamic = dynamic
        self.seed = seed
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size
        self._position = (0, 0)  # epoch, batches seen in it
        self._resume = False

    def __len__(self) -> int:
        """Number of batches, the same on every rank."""
        full, rest = divmod(len(self.items), self.batch_size)
        return full if self.shuffle else full + (rest > 0)

    def __iter__(self) -> Iterator[Items]:
        # Lightning calls iter() early, and sometimes twice; a generator's body waits for the first next().
        epoch = self.epoch()
        order = self._order(epoch)
        for index in range(self._first(epoch), len(self)):
            self._position = (epoch, index + 1)
            yield self._batch(order, epoch, index)

    def state_dict(self) -> dict[str, int]:
        """The epoch's number, and the batches handed out in it."""
        epoch, batches = self._position
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """If the next epoch to begin is the saved one, the batches already seen are skipped."""
        self._position = (state["epoch"], state["batches"])
        self._resume = True

    def _first(self, epoch: int) -> int:
        seen_epoch, seen = self._position
        resume, self._resume = self._resume, False
        return seen if resume and epoch == seen_epoch else 0

    def _order(self, epoch: int) -> Tensor | None:
        if not self.shuffle:
            return None
        return torch.randperm(len(self.items), generator=generator_for(self.seed, "order", epoch))

    def _batch(self, order: Tensor | None, epoch: int, index: int) -> Items:
        start = index * self.batch_size
        size = min(self.batch_size, len(self.items) - start)
        first, last = size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size
        mine: slice | Tensor = slice(start + first, start + last)
        mine = mine if order is None else order[mine]
        x = rows(self.items, mine)
        if self.dynamic:
            generator = generator_for(self.seed, "noise", epoch, index)
            noise = draw_bytes(torch.Size((size, x.shape[1])), generator)  # all ranks draw the same
            x = binarize(x, noise[first:last])
        else:
            x = to_float(x)
        return x if self.labels is None else (x, rows(self.labels, mine))


def check_batch_size(batch_size: int, items: int, world_size: int) -> None:
    """ValueError unless the training items fill a batch, and it can be cut equally between processes."""
    if batch_size > items:
        raise ValueError(f"data.batch_size must be at most the {items} training items. Got {batch_size}.")
    check_shares(batch_size, world_size)


def check_shares(batch_size: int, world_size: int) -> None:
    """ValueError unless every process gets the same share of a batch."""
    if batch_size % world_size:
        below = batch_size - batch_size % world_size
        works = f"{below} or {below + world_size}" if below else f"{world_size}"
        raise ValueError(
            f"data.batch_size counts the items of all processes and must be divisible by the world size "
            f"{world_size}. Got {batch_size}; {works} would work."
        )
