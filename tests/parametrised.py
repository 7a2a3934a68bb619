"""Tiny models some of whose weights are computed from other parameters."""

import warnings

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from safedelta_hf.parametrised import parametrised_weights
from tests import tiny


class Gated(nn.Module):
    """A parametrisation with a parameter of its own: `W = exp(s) V`."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, value):
        return value * self.log_scale.exp()

    def right_inverse(self, weight):
        return weight / self.log_scale.exp()


class Turned(nn.Module):
    """Stored the other way round."""

    def forward(self, value):
        return value.T

    def right_inverse(self, weight):
        return weight.T


class Masked(nn.Module):
    """Half of the entries are always zero, whatever is asked for."""

    def forward(self, value):
        return torch.tril(value)

    def right_inverse(self, weight):
        return weight


class OneWay(nn.Module):
    """Nobody knows the way back."""

    def forward(self, value):
        return torch.sin(value)


class Noisy(nn.Module):
    """Another weight at each call in training, and nothing but the original in evaluation."""

    def forward(self, value):
        return nn.functional.dropout(value, 0.5, self.training)

    def right_inverse(self, weight):
        return weight


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(layer)


KINDS = {
    "weight norm": parametrizations.weight_norm,
    "weight norm by columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "one norm": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "old weight norm": old_weight_norm,
    "gated": lambda layer: parametrize.register_parametrization(layer, "weight", Gated()),
    "turned": lambda layer: parametrize.register_parametrization(layer, "weight", Turned(), unsafe=True),
    "turned and gated": lambda layer: (
        parametrize.register_parametrization(layer, "weight", Turned(), unsafe=True),
        parametrize.register_parametrization(layer, "weight", Gated()),
    ),
}
"""Parametrisations that can be set to any weight."""

STUBBORN = {
    "orthogonal": (parametrizations.orthogonal, "Orthogonal, set to a given weight, computes another"),
    "spectral norm": (parametrizations.spectral_norm, "SpectralNorm changes in training by itself"),
    "masked": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Masked()),
        "Masked, set to a given weight, computes another",
    ),
    "one way": (
        lambda layer: parametrize.register_parametrization(layer, "weight", OneWay()),
        "OneWay cannot be set to a given weight",
    ),
}
"""Parametrisations that cannot, and what is said of them."""


def llama(parametrise, *places, **settings):
    """A llama with some of its layers parametrised, each held in a form of its own."""
    model = tiny.llama(**settings)
    for place in places or ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj", "lm_head"):
        parametrise(model.get_submodule(place))
    return model


def plain(model):
    """The same model with plain layers that hold the same weights."""
    result = tiny.llama()
    held = {name: weight.computed() for name, weight in parametrised_weights(model).items()}
    held |= {name: value for name, value in tiny.weights(model).items() if name in dict(result.named_parameters())}
    result.load_state_dict(held)
    return result
