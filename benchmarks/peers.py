"""The same step in pythae and in JAX, of the versions in requirements.txt, as their users would have it."""

import logging
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_iwae.models import MLP

from .timing import Step, Unavailable
from .ways import RATE, Work


# ------------------------------------------------------------------------------------------------ pythae
def pythae_model(model: MLP, samples: int, groups: int) -> Any:
    """pythae's PIWAE of copies of our two networks, with the weights that they have now.

    Its users give an encoder of mean and log-variance, where ours has the logarithm of the scale, and a decoder of
    probabilities, of which it takes the binary cross-entropy.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pythae.models import PIWAE, PIWAEConfig
            from pythae.models.base.base_utils import ModelOutput
            from pythae.models.nn import BaseDecoder, BaseEncoder
    except ImportError as error:
        raise Unavailable(f"pythae can't be imported: {error}") from error

    class Encoder(BaseEncoder):
        def __init__(self, layers: nn.Module) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Any:
            mean, log_scale = self.layers(x).chunk(2, -1)
            return ModelOutput(embedding=mean, log_covariance=2 * log_scale)

    class Decoder(BaseDecoder):
        def __init__(self, layers: nn.Module) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=torch.sigmoid(self.layers(z)))

    config = PIWAEConfig(
        input_dim=(784,),
        latent_dim=50,
        reconstruction_loss="bce",
        number_gradient_estimates=groups,
        number_samples=samples // groups,
    )
    own = MLP()
    own.load_state_dict(model.state_dict())
    return PIWAE(config, Encoder(own.inference), Decoder(own.generative))


def pythae(work: Work) -> Step:
    """The body of the loop in its CoupledOptimizerTrainer.train_step: loss, two backward passes, two steps of Adam."""
    model, x = work.start()
    theirs = pythae_model(model, work.samples, work.samples // work.phi)
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import CoupledOptimizerTrainer, CoupledOptimizerTrainerConfig

    logging.getLogger("pythae").setLevel(logging.ERROR)
    for name in ("base_trainer.base_trainer", "coupled_optimizer_trainer.coupled_optimizer_trainer"):
        logging.getLogger(f"pythae.trainers.{name}").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        config = CoupledOptimizerTrainerConfig(
            output_dir=folder, encoder_learning_rate=RATE, decoder_learning_rate=RATE, no_cuda=True
        )
        trainer = CoupledOptimizerTrainer(theirs, BaseDataset(x, torch.zeros(len(x))), training_config=config)
        trainer.prepare_training()
    trainer.model.train()

    def step() -> None:
        output = trainer.model({"data": x}, epoch=1, dataset_size=len(x), uses_ddp=False)
        trainer._optimizers_step(output)
        output.encoder_loss.item()
        output.decoder_loss.item()

    return step


# ------------------------------------------------------------------------------------------------ JAX
def jax_parameters(model: MLP) -> dict[str, list]:
    """Weights (in, out) and biases of the linear layers, of phi and of theta."""
    import jax.numpy as jnp

    def of(network: nn.Module) -> list:
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        return [(jnp.asarray(n.weight.detach().numpy().T), jnp.asarray(n.bias.detach().numpy())) for n in layers]

    return {"phi": of(model.inference), "theta": of(model.generative)}


def jax_gradients(work: Work, piwae: bool = True) -> Callable[..., Any]:
    """A function of parameters, x (B, 784) and noise (S, B, 50): L_S, and the gradients of minus each side's bound.

    One forward pass and its vjp, of which each side has its own weights; XLA drops what neither needs.
    """
    import jax
    import jax.numpy as jnp
    from jax.nn import logsumexp, softmax, softplus

    def network(layers: Any, h: Any) -> Any:
        for weight, bias in layers[:-1]:
            h = jnp.tanh(h @ weight + bias)
        weight, bias = layers[-1]
        return h @ weight + bias

    def log_weights(parameters: Any, x: Any, noise: Any) -> Any:
        mean, log_scale = jnp.split(network(parameters["phi"], x), 2, -1)
        z = mean + jnp.exp(log_scale) * noise
        logits = network(parameters["theta"], z)
        log_likelihood = (x * logits - softplus(logits)).sum(-1)
        return log_likelihood - 0.5 * (z**2).sum(-1) + (0.5 * noise**2 + log_scale).sum(-1)

    def gradients(parameters: Any, x: Any, noise: Any) -> Any:
        log_w, vjp = jax.vjp(lambda parameters: log_weights(parameters, x, noise), parameters)
        theta = -softmax(log_w, 0) / work.batch
        bound = (logsumexp(log_w, 0) - jnp.log(work.samples)).mean()
        if not piwae:
            return bound, vjp(theta)[0]
        groups = log_w.reshape(-1, work.phi, work.batch)
        phi = (-softmax(groups, 1) / (len(groups) * work.batch)).reshape(log_w.shape)
        return bound, {"phi": vjp(phi)[0]["phi"], "theta": vjp(theta)[0]["theta"]}

    return gradients


def jax_step(work: Work, piwae: bool = True) -> Step:
    """A jitted step with optax's Adam."""
    try:
        import jax
        import optax
    except ImportError as error:
        raise Unavailable(f"JAX can't be imported: {error}") from error
    model, x = work.start()
    adam, gradients, data = optax.adam(RATE), jax_gradients(work, piwae), jax.numpy.asarray(x.numpy())

    @jax.jit
    def update(state: Any) -> Any:
        parameters, moments, key = state
        key, own = jax.random.split(key)
        noise = jax.random.normal(own, (work.samples, work.batch, 50))
        bound, grads = gradients(parameters, data, noise)
        updates, moments = adam.update(grads, moments)
        return bound, (optax.apply_updates(parameters, updates), moments, key)

    parameters = jax_parameters(model)
    state = parameters, adam.init(parameters), jax.random.key(0)

    def step() -> None:
        nonlocal state
        _, state = jax.block_until_ready(update(state))

    return step


def jax_iwae(work: Work) -> Step:
    """One bound for both networks."""
    return jax_step(work, piwae=False)
