"""How much memory tensors take at once, counted as they come and go."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is active, forward or backward, on any device.

    `bytes` is the most that were alive at once. It is a function of what is computed alone, unlike what a process or an
    allocator holds; arrays within an operation are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.now = 0
        self.alive: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage not in self.alive:
            self.alive.add(storage)
            self.now += storage.nbytes()
            self.bytes = max(self.bytes, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size
