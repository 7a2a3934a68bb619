"""Weights that a layer computes from other parameters at every use, by `torch.nn.utils.parametrize` or weight norm."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.hooks import RemovableHandle

from safedelta_hf.errors import CoverageError
from safedelta_hf.modules.names import base_modules, join, parameter_names
from safedelta_hf.modules.quantised import is_quantised

ROUNDING = 4
"""Steps of its data type, at its largest entry, by which a weight may miss what it was set to."""


class ParametrisedWeight:
    """A weight that is computed from parameters, its originals: `W = f(originals)`.

    The layer's output is linear in `W`, so the moment of the layer's inputs is the curvature of `W`, whatever `f` is.

    Args:
        name: Canonical name of what is computed, such as "proj.weight".
        owner: The layer.
        recipe: Computes the weight when called, and sets its own parameters by `right_inverse(weight)`.
        names: Canonical names of all parameters of the model.
    """

    def __init__(self, name: str, owner: nn.Module, recipe: nn.Module, names: Mapping[nn.Parameter, str]) -> None:
        self.name, self.owner, self.key = name, owner, name.rpartition(".")[2]
        self._recipe = recipe
        self._names = {key: names[parameter] for key, parameter in recipe.named_parameters()}

    @property
    def originals(self) -> tuple[str, ...]:
        """Canonical names of the parameters that it is computed from."""
        return tuple(self._names.values())

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that it is computed from."""
        return tuple(self._recipe.parameters())

    @property
    def kind(self) -> str:
        """What computes it."""
        steps = list(self._recipe.children()) or [self._recipe]
        return " and ".join(type(step).__name__.lstrip("_") for step in steps)

    def shaped(self) -> Tensor:
        """Something of its shape, on its device.

        Returns:
            A tensor that takes no memory.
        """
        weight = self.computed()
        return weight.new_zeros(()).expand(weight.shape)

    def computed(self, originals: Mapping[str, Tensor] | None = None) -> Tensor:
        """The weight, as computed in evaluation.

        Args:
            originals: Other values for some of its originals, by canonical name.

        Returns:
            A new tensor.
        """
        with torch.no_grad():
            weight: Tensor = self._copy(originals or {})()
            return weight.clone()

    def inverted(self, weight: Tensor) -> dict[str, Tensor]:
        """Originals of which a given weight is computed; the model is not changed.

        Args:
            weight: Of the shape and dtype of this one.

        Returns:
            New tensors, one for each original.

        Raises:
            CoverageError: There are none, or the recipe does not find them.
        """
        twin = self._copy({})
        try:
            with torch.no_grad():
                twin.right_inverse(weight.clone())  # type: ignore[operator]
                values = {self._names[key]: value.detach().clone() for key, value in twin.named_parameters()}
                # Not the twin itself: setting it may have changed what is no parameter.
                found = self.computed(values)
        except Exception as error:
            raise CoverageError(f"{self.kind} cannot be set to a given weight ({error})") from error
        missed = float((found - weight).abs().max()) if found.shape == weight.shape else float("inf")
        allowed = ROUNDING * torch.finfo(weight.dtype).eps * float(weight.abs().max())
        if not missed <= allowed:
            raise CoverageError(f"{self.kind}, set to a given weight, computes another (off by {missed:.2g})")
        return values

    def obstacle(self) -> str:
        """Why the weight cannot be adjusted as one.

        Returns:
            A reason; empty if a weight near it can be set and its originals tell all of it.
        """
        try:
            weight = self.computed()
            if not self._is_steady(weight):
                return f"{self.kind} changes in training by itself, so parameters alone do not tell the base weight"
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
            scale = float(weight.float().square().mean().sqrt()) or 1.0
            self.inverted(weight + 0.1 * scale * noise)
        except CoverageError as error:
            return str(error)
        except Exception as error:
            return f"{self.kind} cannot be computed apart from its layer ({type(error).__name__}: {error})"
        return ""

    def watch(self, before: Callable[[], None], after: Callable[[Tensor], None]) -> Iterator[RemovableHandle]:
        """Be told when the weight is computed.

        Args:
            before: Called before.
            after: Called with the weight.

        Yields:
            What has to be removed again.
        """
        if isinstance(self._recipe, _WeightNormHook):
            yield self.owner.register_forward_pre_hook(lambda _, __: before(), prepend=True)
            yield self.owner.register_forward_pre_hook(lambda module, _: after(getattr(module, self.key)))
        else:
            yield self._recipe.register_forward_pre_hook(lambda _, __: before())
            yield self._recipe.register_forward_hook(lambda _, __, weight: after(weight))

    def _copy(self, originals: Mapping[str, Tensor]) -> nn.Module:
        twin = copy.deepcopy(self._recipe).eval()
        with torch.no_grad():
            for key, parameter in twin.named_parameters():
                if self._names[key] in originals:
                    value = originals[self._names[key]]
                    if value.shape != parameter.shape:
                        raise CoverageError(
                            f"{self._names[key]}: is {list(parameter.shape)}, and would become {list(value.shape)}"
                        )
                    parameter.copy_(value)
        return twin

    def _is_steady(self, weight: Tensor) -> bool:
        twin = self._copy({}).train()
        with torch.no_grad():
            seen = twin()
        before, after = dict(self._recipe.named_buffers()), dict(twin.named_buffers())
        unchanged = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        return unchanged and torch.equal(seen, weight)


def parametrised_weights(model: nn.Module) -> dict[str, ParametrisedWeight]:
    """The weights of a model that are computed from parameters of their own.

    Args:
        model: Any module.

    Returns:
        Weights by canonical name; those that share a parameter with anything else, or unpack one, are left out.
    """
    names = parameter_names(model)
    weights = list(_found(model, names))
    owners = Counter(parameter for _, module in base_modules(model) for parameter in module.parameters(recurse=False))
    users = Counter(parameter for weight in weights for parameter in weight.parameters)
    return {
        weight.name: weight
        for weight in weights
        if weight.parameters
        and all(owners[own] == users[own] == 1 and not is_quantised(own) for own in weight.parameters)
    }


def _found(model: nn.Module, names: Mapping[nn.Parameter, str]) -> Iterator[ParametrisedWeight]:
    for name, module in base_modules(model):
        lists = module._modules.get("parametrizations")
        for key, recipe in lists.named_children() if lists is not None else ():
            if isinstance(recipe, ParametrizationList):
                yield ParametrisedWeight(join(name, key), module, recipe, names)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                yield ParametrisedWeight(join(name, hook.name), module, _WeightNormHook(module, hook), names)


class _WeightNormHook(nn.Module):
    """What `torch.nn.utils.weight_norm`, the older of the two, computes in a hook before each call of its layer."""

    def __init__(self, layer: nn.Module, hook: WeightNorm) -> None:
        super().__init__()
        self.g, self.v = layer.get_parameter(f"{hook.name}_g"), layer.get_parameter(f"{hook.name}_v")
        self._dimension = hook.dim

    def forward(self) -> Tensor:
        weight: Tensor = torch._weight_norm(self.v, self.g, self._dimension)
        return weight

    def right_inverse(self, weight: Tensor) -> None:
        self.g.copy_(torch.norm_except_dim(weight, 2, self._dimension))
        self.v.copy_(weight)
