"""Facts of a run are read off what a Trainer passes, and off nothing else."""

from types import SimpleNamespace

import pytest

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.hf.trainer_facts import require_supported


def test_processes_that_torch_does_not_know_are_refused():
    with pytest.raises(ConfigurationError, match="8 processes, of which torch.distributed knows 1"):
        require_supported(SimpleNamespace(world_size=8))
