"""What headers say is what is read; what they cannot say is a named error."""

import json

import pytest

from safedelta_hf.errors import CheckpointError
from safedelta_hf.weights.safetensors_files import SafetensorsFiles
from tests.checkpoint.test_malformed import SINGLE, joined


def test_a_tensor_of_a_type_that_is_not_read_is_named(tmp_path):
    for name, bits in {"U16": 16, "U32": 32, "U64": 64, "C64": 64, "F8_E8M0": 8}.items():
        header = {"scale": {"dtype": name, "shape": [3], "data_offsets": [0, 3 * bits // 8]}}
        joined(tmp_path / SINGLE, json.dumps(header).encode(), bytes(3 * bits // 8))
        with pytest.raises(CheckpointError, match=f"^scale: stored as {name} in '.*{SINGLE}'.*; save the model"):
            SafetensorsFiles(tmp_path).read("scale")
