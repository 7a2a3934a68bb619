"""How the parameters of a model stand in files: as they are, or renamed and split as transformers saves them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from safedelta_hf.errors import CheckpointError
from safedelta_hf.modules.names import parameter_names
from safedelta_hf.records import ProfileHeader
from safedelta_hf.weights.safetensors_files import SafetensorsFiles


@dataclass(frozen=True, kw_only=True)
class StoredPiece:
    """A part of a parameter, such as one expert of many, that files hold as a tensor of its own.

    Attributes:
        name: As in the files.
        shape: Its shape there.
        stride: Steps between its entries in the flattened parameter.
        offset: Place of its first entry there.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, parameter: Tensor) -> Tensor:
        """The part itself.

        Args:
            parameter: The parameter, contiguous.

        Returns:
            A view of it.
        """
        return parameter.as_strided(self.shape, self.stride, parameter.storage_offset() + self.offset)


def whole(name: str, shape: tuple[int, ...]) -> StoredPiece:
    """A parameter that files hold as it is.

    Args:
        name: As in the files.
        shape: Its shape.

    Returns:
        The only piece of it.
    """
    return StoredPiece(name=name, shape=shape, stride=torch.empty(shape, device="meta").stride(), offset=0)


def saved_layout(
    files: SafetensorsFiles, header: ProfileHeader
) -> dict[str, tuple[tuple[int, ...], tuple[StoredPiece, ...]]]:
    """How transformers would save the model that some files are of, told by its class and configuration alone.

    Args:
        files: The files, with the configuration beside them.
        header: What the profile of the model was made from.

    Returns:
        Shape and pieces of each parameter, by canonical name.

    Raises:
        CheckpointError: The class is not one of transformers, or the configuration not one of it, or saving computes
            something that is no part of a parameter.
    """
    try:
        model = _skeleton(files, header)
        parameters = {name: parameter.detach() for parameter, name in parameter_names(model).items()}
        with _Uncopied():
            saved: dict[str, Tensor] = revert_weight_conversion(model, dict(parameters))
    except CheckpointError as error:
        raise CheckpointError(f"its layout is not known ({error})") from error
    except Exception as error:
        raise CheckpointError(f"its layout is not known ({type(error).__name__}: {error})") from error
    owners = {_storage(parameter): name for name, parameter in parameters.items()}
    pieces: dict[str, list[StoredPiece]] = {name: [] for name in parameters}
    for name, tensor in saved.items():
        if (owner := owners.get(_storage(tensor))) is None:
            raise CheckpointError(f"its layout is not known ({name} is no part of a parameter)")
        pieces[owner].append(
            StoredPiece(
                name=name, shape=tuple(tensor.shape), stride=tensor.stride(), offset=int(tensor.storage_offset())
            )
        )
    return {name: (tuple(parameters[name].shape), tuple(found)) for name, found in pieces.items()}


def _skeleton(files: SafetensorsFiles, header: ProfileHeader) -> PreTrainedModel:
    model_class = getattr(transformers, header.architecture, None)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        raise CheckpointError(f"{header.architecture} is no class of transformers")
    if files.config is None:
        raise CheckpointError("there is no config.json")
    config = AutoConfig.from_pretrained(files.config.parent, local_files_only=True, trust_remote_code=False)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > len(header.base):
        raise CheckpointError(f"config.json speaks of {layers} layers, the profile of {len(header.base)} parameters")
    with torch.device("meta"):
        return model_class(config)


class _Uncopied(TorchFunctionMode):
    """Lets what is made of a tensor stay a view of it, so that its strides tell where it comes from."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function returns
        if func in (Tensor.contiguous, Tensor.clone):
            return args[0]
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
