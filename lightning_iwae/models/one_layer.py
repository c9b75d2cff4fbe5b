"""What networks with one layer of latent variables share: parts put together round an encoder and a decoder."""

from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution

from .layers import attach, set_output


class OneLayer(nn.Module):
    """q(z | x), p(x | z) and p(z) of an encoder, a decoder and three parts, which a subclass puts together."""

    inference: Any
    generative: Any

    def put_together(self, head: nn.Module, output: nn.Module, prior: nn.Module) -> None:
        """The parts that make q, p(x | z) and p(z). Those with parameters become phi's or theta's."""
        attach(self, self.inference, "posterior", head)
        attach(self, self.generative, "likelihood", output)
        attach(self, self.generative, "prior", prior)
        self.parts = head, output, prior  # not registered a second time, in a tuple

    def prior(self) -> Distribution:
        """p(z)."""
        return self.parts[2]((self.inference, self.parts[0]))

    def posterior(self, x: Tensor) -> Distribution:
        """q(z | x)."""
        return self.parts[0](self.inference(x))

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x | z)."""
        return self.parts[1](self.generative(z))

    def output_bias(self) -> Tensor:
        """The decoder's last bias, (X,)."""
        raise NotImplementedError

    def set_data_mean(self, mean: Tensor) -> None:
        """Set the output bias such that p(x | z) starts at the training data's mean (X,)."""
        set_output(self.output_bias(), mean, self.parts[1])
