"""The one-layer network of Burda et al. (arXiv 1509.00519) and Rainforth et al. (arXiv 1802.04537, section 6)."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributions import Distribution

from . import likelihoods, posteriors, priors
from .layers import attach, check_widths, set_output, tanh_layers


class MLP(nn.Module):
    """q(z | x) and p(x | z) out of tanh layers: by default Gaussian and Bernoulli, under a standard normal prior.

    With pixels=784, latent=50, hidden=[200, 200] it is the papers' network, of 425,284 parameters. Weights are
    Glorot-uniform and biases 0, but for the output's: see `set_data_mean`.

    Args:
        pixels: X, the length of a datum.
        latent: Z, the length of z.
        hidden: widths of the encoder's tanh layers; the decoder's are the same in reverse.
        likelihood: p(x | z), see `likelihoods`.
        posterior: q(z | x), see `posteriors`.
        prior: p(z), see `priors`; vamp needs a diagonal or full posterior.
        components: of a mixture or vamp prior.
    """

    def __init__(
        self,
        pixels: int = 784,
        latent: int = 50,
        hidden: Sequence[int] = (200, 200),
        likelihood: likelihoods.Name = "bernoulli",
        posterior: posteriors.Name = "diagonal",
        prior: priors.Name = "standard",
        components: int = 10,
    ) -> None:
        super().__init__()
        check_widths(pixels=pixels, latent=latent, hidden=hidden)
        if prior == "vamp" and posterior == "flow":
            raise ValueError("network.prior must not be vamp with network.posterior flow, of which it can mix none.")
        head = posteriors.make(posterior, latent)
        self.inference = tanh_layers([pixels, *hidden, head.width])
        self.generative = tanh_layers([latent, *reversed(hidden), pixels])
        attach(self, self.inference, "posterior", head)
        attach(self, self.generative, "likelihood", output := likelihoods.make(likelihood, pixels))
        attach(self, self.generative, "prior", prior_of_z := priors.make(prior, latent, pixels, components))
        self.parts = head, output, prior_of_z  # not registered a second time, in a tuple

    def prior(self) -> Distribution:
        """p(z)."""
        return self.parts[2]((self.inference, self.parts[0]))

    def posterior(self, x: Tensor) -> Distribution:
        """q(z | x)."""
        return self.parts[0](self.inference(x))

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x | z)."""
        return self.parts[1](self.generative(z))

    def set_data_mean(self, mean: Tensor) -> None:
        """Set the output bias such that p(x | z) starts at the training data's mean (X,)."""
        set_output(self.generative.last.bias, mean, self.parts[1])
