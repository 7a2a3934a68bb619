"""How a model behaves: what it refuses, what it should not refuse, and what it can do."""

import lazy_loader

from safedelta_hf.data.phrases import REFUSAL_PHRASES, is_refusal  # noqa: F401 - public here

# What `__init__.pyi` names, imported when it is first used: a board of results needs neither a model nor torch.
__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = sorted([*_names, "REFUSAL_PHRASES", "is_refusal"])
