"""The one-layer network of Burda et al. (arXiv 1509.00519) and Rainforth et al. (arXiv 1802.04537, section 6)."""

from collections.abc import Sequence

from torch import Tensor

from . import likelihoods, posteriors, priors
from .layers import check_widths, tanh_layers
from .one_layer import OneLayer


class MLP(OneLayer):
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
        head = posteriors.make(posterior, latent)
        self.inference = tanh_layers([pixels, *hidden, head.width])
        self.generative = tanh_layers([latent, *reversed(hidden), pixels])
        of_z = priors.make(prior, latent, pixels, components, posterior)
        self.put_together(head, likelihoods.make(likelihood, pixels), of_z)

    def output_bias(self) -> Tensor:
        """The decoder's last bias, (X,)."""
        return self.generative.last.bias
