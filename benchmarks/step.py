"""One training step of PIWAE(8, 8) against a stock PyTorch IWAE step, interleaved in one process.

    python benchmarks/step.py [--rounds 40] [--batch 128] [--samples 64] [--keep-memory]

Both train the papers' network (784-200-200-50) by Adam from the same start on the same data. "stock" is what one
would write by hand: torch.distributions throughout and `-logsumexp(log_w).mean().backward()`. "stock, our log_prob"
uses the package's faster Bernoulli, so that only the gradients differ. "separate" is the package's plain way of two
passes back through the decoder. --keep-memory is what the command line does (see cli.keep_freed_memory).
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Independent

from lightning_iwae import Side, iw_loss
from lightning_iwae.models import MLP


def stock_loss(model: MLP, x: Tensor, samples: int, own_log_prob: bool = False) -> Tensor:
    """-L_K by autograd alone."""
    q = model.posterior(x)
    z = q.rsample((samples,))
    p_x = model.likelihood(z) if own_log_prob else Independent(Bernoulli(logits=model.generative(z)), 1)
    log_w = model.prior().log_prob(z) + p_x.log_prob(x) - q.log_prob(z)
    return -torch.logsumexp(log_w, 0).mean()


def stepper(model: MLP, loss: Callable[[MLP], Tensor]) -> Callable[[], None]:
    """One step of Adam on `loss`, with a model and an optimiser of its own."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    return step


def main() -> None:
    """Time every way in turn, round after round, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--keep-memory", action="store_true")
    args = parser.parse_args()
    if args.keep_memory:
        from lightning_iwae.cli import keep_freed_memory

        keep_freed_memory()
    torch.manual_seed(0)
    model, x, S = MLP(), torch.bernoulli(torch.rand(args.batch, 784)), args.samples
    piwae = {"samples": S, "theta": Side("iwae", S), "phi": Side("iwae", S // 8)}
    ways = {
        "stock IWAE": lambda m: stock_loss(m, x, S),
        "stock IWAE, our log_prob": lambda m: stock_loss(m, x, S, own_log_prob=True),
        "PIWAE": lambda m: iw_loss(m, x, **piwae),
        "PIWAE, separate": lambda m: iw_loss(m, x, **piwae, method="separate"),
    }
    steps = {name: stepper(model, loss) for name, loss in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(args.rounds + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 3:
                times[name].append(time.perf_counter() - start)
    print(
        f"batch {args.batch}, samples {S}, {torch.get_num_threads()} threads, {args.rounds} rounds, "
        f"torch {torch.__version__}"
    )
    print(f"{'':<28}{'ms, median':>12}{'ratio to stock, median (quartiles)':>40}")
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times["stock IWAE"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:<28}{1e3 * statistics.median(own):>12.1f}{f'{middle:.3f} ({low:.3f} .. {high:.3f})':>40}")


if __name__ == "__main__":
    main()
