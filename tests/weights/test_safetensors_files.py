"""What headers say is what is read; what they cannot say is a named error."""

import json

import pytest
import torch
from safetensors.torch import save_file

from safedelta_hf.errors import CheckpointError
from safedelta_hf.weights.safetensors_files import INDEX_FILE, SafetensorsFiles, data_start, read_header
from tests.checkpoint.test_malformed import SINGLE, joined


def test_a_tensor_of_a_type_that_is_not_read_is_named(tmp_path):
    for name, bits in {"U16": 16, "U32": 32, "U64": 64, "C64": 64, "F8_E8M0": 8}.items():
        header = {"scale": {"dtype": name, "shape": [3], "data_offsets": [0, 3 * bits // 8]}}
        joined(tmp_path / SINGLE, json.dumps(header).encode(), bytes(3 * bits // 8))
        with pytest.raises(CheckpointError, match=f"^scale: stored as {name} in '.*{SINGLE}'.*; save the model"):
            SafetensorsFiles(tmp_path).read("scale")


STORED = {
    "matrix": torch.arange(20, dtype=torch.float32).reshape(5, 4),
    "vector": torch.arange(7, dtype=torch.int64),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "block": torch.randn(3, 2, 2).to(torch.float8_e4m3fn),
}


@pytest.fixture
def single(tmp_path):
    save_file(STORED, tmp_path / SINGLE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    weight_map = {}
    for number, name in enumerate(STORED):
        save_file({name: STORED[name]}, tmp_path / f"part-{number}.safetensors")
        weight_map[name] = f"part-{number}.safetensors"
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_every_tensor_is_read_as_it_was_saved(kind, request):
    files = SafetensorsFiles(request.getfixturevalue(kind))
    assert files.tensors.keys() == STORED.keys()
    for name, saved in STORED.items():
        found = files.read(name)
        assert (found.dtype, found.shape, files.tensors[name].shape) == (saved.dtype, saved.shape, tuple(saved.shape))
        assert found.reshape(-1).view(torch.uint8).equal(saved.reshape(-1).view(torch.uint8))
        assert files.tensors[name].stop - files.tensors[name].start == saved.nbytes


@pytest.mark.parametrize("name", ["matrix", "vector", "empty", "block"])
def test_rows_read_are_slices_of_the_whole(name, single):
    files, whole = SafetensorsFiles(single), STORED[name]
    for first in range(len(whole) + 3):
        for last in range(first, len(whole) + 3):
            found, wanted = files.read(name, (first, last)), whole[first:last]
            assert found.shape == wanted.shape
            assert found.reshape(-1).view(torch.uint8).equal(wanted.reshape(-1).view(torch.uint8))


def test_tensors_are_known_in_the_order_of_their_bytes(single):
    starts = [(tensor.start, tensor.stop) for tensor in read_header(SINGLE, single / SINGLE).values()]
    assert starts == sorted(starts) and starts[0][0] == data_start(single / SINGLE)
    assert starts[-1][1] == (single / SINGLE).stat().st_size


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"a": null}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"\xff": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_malformed_header_is_named_with_its_file(header, tmp_path):
    joined(tmp_path / SINGLE, header, bytes(4))
    with pytest.raises(CheckpointError, match=rf"^cannot read '.*{SINGLE}' .*is the file complete"):
        SafetensorsFiles(tmp_path)


def rewritten(folder, change):
    content = json.loads((folder / INDEX_FILE).read_text())
    change(content["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda map: map.clear(), "names no weights"),
        (lambda map: map.update(matrix=3), "names the shard 3, which is no file of that folder"),
        (lambda map: map.update(matrix=""), "which is no file of that folder"),
        (lambda map: map.update(matrix="../part-0.safetensors"), "which is no file of that folder"),
        (lambda map: map.update(matrix="gone.safetensors"), "lacks the shard 'gone.safetensors'"),
        (lambda map: map.update(matrix="part-1.safetensors", vector="part-0.safetensors"), "not of one model"),
        (lambda map: map.update(more="part-0.safetensors"), "^more: .*where it is not; is the checkpoint complete"),
    ],
)
def test_an_index_that_contradicts_its_files_is_named(change, match, sharded):
    rewritten(sharded, change)
    with pytest.raises(CheckpointError, match=match):
        SafetensorsFiles(sharded)


def test_a_shard_that_the_index_does_not_know_all_of_is_named(sharded):
    save_file({"matrix": STORED["matrix"], "stranger": STORED["vector"]}, sharded / "part-0.safetensors")
    with pytest.raises(CheckpointError, match=r"^stranger: .* has it in None; the files are not of one model"):
        SafetensorsFiles(sharded)


def test_one_model_has_one_form(sharded):
    save_file(STORED, sharded / SINGLE)
    with pytest.raises(CheckpointError, match=f"holds both {SINGLE} and the shards of {INDEX_FILE}; remove"):
        SafetensorsFiles(sharded)
    (sharded / INDEX_FILE).unlink()
    (sharded / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=f"holds neither {SINGLE} nor {INDEX_FILE}"):
        SafetensorsFiles(sharded)


def test_a_file_that_is_cut_or_gone_after_it_was_opened_is_named(single):
    files = SafetensorsFiles(single)
    path = single / SINGLE
    last = max(files.tensors, key=lambda name: files.tensors[name].stop)
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=f"^{last}: .* ends before it; is the file complete"):
        files.read(last)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"^{last}: cannot read"):
        files.read(last)
