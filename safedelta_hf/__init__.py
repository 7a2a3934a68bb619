"""Safe Delta for Hugging Face: fine-tune an aligned model and keep its refusals."""

from importlib.metadata import version

import lazy_loader

__version__ = version("safedelta-hf")

# What `__init__.pyi` names, imported when it is first used: torch and transformers take seconds.
__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = sorted([*_names, "__version__"])
