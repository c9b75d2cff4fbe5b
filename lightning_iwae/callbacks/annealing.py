"""Annealed importance sampling and bidirectional Monte Carlo, in `test` by option."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm import tqdm

from ..annealing import DEFAULT, Annealing, Watch, ais, bdmc, check_model
from ..evaluation import Totals
from ..models import Batch, cut, given, split
from ..module import IWModule
from ..randomness import forked, seed_for

NUMBERS_AT_ONCE = 2**22  # of data, of all chains together


class Annealed(Callback):
    """What AIS and BDMC share: the first `size` of the test data are taken, every process its share.

    The cost is said before anything is computed, and a model for which there is no annealing refused. The other figures
    are as without it: the random state is as before.
    """

    name: ClassVar[str]
    what: ClassVar[str]
    ways: ClassVar[int]
    names: ClassVar[tuple[str, ...]]

    def __init__(self, size: int = 100, annealing: Annealing = DEFAULT) -> None:
        if size < 1:
            raise ValueError(f"{type(self).__name__}.size must be at least 1. Got {size}.")
        annealing.check(f"{type(self).__name__}.annealing")
        self.size, self.annealing = size, annealing
        self._left = 0  # data that this process has still to take
        self._totals = Totals()
        self._result: dict[str, Any] = {}

    def figures(self, model: Any, x: Tensor, log_px: Tensor, watch: Watch) -> dict[str, Tensor]:
        """`names` of data x (B, ...), each (B,), or of as many simulated ones."""
        raise NotImplementedError

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Forget an earlier test; say what it will cost."""
        self._totals, self._left = Totals(), -(-self.size // trainer.world_size)
        a, passes = self.annealing, self.annealing.passes(self.ways)
        rank_zero_info(
            f"{self.what} {self.size} data: {a.chains} chains, {a.temperatures} temperatures, {a.leapfrog} leapfrog "
            f"steps. That is {passes:,} decoder passes a datum, forward and back, and {passes * self.size:,} in all."
        )

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Refuse what there is no annealing for, before the other figures take their time."""
        x, y = own(cut(batch, 1))
        if batch_idx == 0 and len(x):
            with forked(0, pl_module.device):
                check_model(given(pl_module.network, y), x, self.annealing.start)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Anneal the batch, or what is wanted of it, in parts that fit the memory."""
        if not self._left:
            return
        x, y = own(cut(batch, self._left))
        log_px = outputs["log_px"][: len(x)].clone()
        first, self._left = self.size - self._left, self._left - len(x)
        at_once = max(1, NUMBERS_AT_ONCE // (self.annealing.chains * max(1, x[:1].numel())))
        module: IWModule = pl_module
        with forked(seed_for(module.seed, self.name, trainer.global_rank, batch_idx), module.device):
            for start in range(0, max(1, len(x)), at_once):
                part = slice(start, start + at_once)
                model = given(module.network, None if y is None else y[part])
                label = f"{self.name.upper()}, from datum {first + start + 1}"
                with self._progress(trainer, label) as watch:
                    self._totals.add(self._figures(model, x[part], log_px[part], watch))

    def _figures(self, model: Any, x: Tensor, log_px: Tensor, watch: Watch) -> dict[str, Tensor]:
        """In float64; none of a process's empty share; without an acceptance where there were no moves."""
        if len(x):
            found = {name: values.double() for name, values in self.figures(model, x, log_px, watch).items()}
        else:
            found = {name: log_px.new_zeros(0) for name in self.names}
        return found if self.annealing.temperatures > 1 else {k: v for k, v in found.items() if "acceptance" not in k}

    @contextmanager
    def _progress(self, trainer: Trainer, label: str) -> Iterator[Watch]:
        bar = trainer.progress_bar_callback
        shown = trainer.is_global_zero and bar is not None and getattr(bar, "is_enabled", True)
        moves = self.annealing.moves(self.ways)
        with tqdm(total=moves, desc=label, unit="move", leave=False, disable=not shown) as progress:
            yield progress.update

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Means and standard errors over all processes' data, logged as test/*."""
        assert self._totals.sums is not None
        sums = trainer.strategy.reduce(self._totals.sums, reduce_op="sum")
        result = self._totals.result(lambda _: sums)
        pl_module.log_dict({f"test/{name}": value["mean"] for name, value in result.items()}, sync_dist=True)
        about = {"data": int(sums[0, 0]), **asdict(self.annealing), "decoder_passes": self.annealing.passes(self.ways)}
        self._result = result | {self.name: about}

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """To the table, and evaluation.json."""
        pl_module.result |= self._result


class AIS(Annealed):
    """log p(x) of the first `size` test data by annealed importance sampling: test/log_px_ais.

    And test/ais_minus_is, how much higher it is than importance sampling's of the same data; test/ais_acceptance, of
    the HMC moves, which steps are adapted to bring near 0.65; test/ais_ess, of the chains' weights. See
    `annealing.ais`.

    Args:
        size: test data, or all if they are fewer.
        annealing: chains, temperatures and so on.
    """

    name, what, ways = "ais", "Annealed importance sampling of the first", 1
    names = ("log_px_ais", "ais_minus_is", "ais_acceptance", "ais_ess")

    def figures(self, model: Any, x: Tensor, log_px: Tensor, watch: Watch) -> dict[str, Tensor]:
        """Of data x."""
        found = ais(model, x, self.annealing, watch)
        values = (found.log_px, found.log_px - log_px, found.acceptance, found.ess)
        return dict(zip(self.names, values, strict=True))


class BDMC(Annealed):
    """Bounds of log p(x) from both sides, test/bdmc_lower and test/bdmc_upper, of `size` data that the model simulates.

    And test/bdmc_gap between them, which bounds the error of either; test/bdmc_acceptance of the HMC moves. Labels, if
    there are any, are the test data's. See `annealing.bdmc`.

    Args:
        size: data to simulate, or as many as there are test data if these are fewer.
        annealing: chains, temperatures and so on.
    """

    name, what, ways = "bdmc", "Bidirectional Monte Carlo on", 2
    names = ("bdmc_lower", "bdmc_upper", "bdmc_gap", "bdmc_acceptance")

    def figures(self, model: Any, x: Tensor, log_px: Tensor, watch: Watch) -> dict[str, Tensor]:
        """Of as many simulated data as x are."""
        found = bdmc(model, len(x), self.annealing, watch)
        values = (found.lower, found.upper, found.upper - found.lower, found.acceptance)
        return dict(zip(self.names, values, strict=True))


def own(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Data and labels that autograd may keep, as those of Lightning's inference mode may not be."""
    with torch.inference_mode(False):
        x, y = split(batch)
        return x.clone(), None if y is None else y.clone()
