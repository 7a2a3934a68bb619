"""Weights come from the files as they are, and go into those of the output."""

import pytest
from safetensors.torch import load_file, save_file

from safedelta_hf.errors import BaseWeightsError, NumericalError
from tests.checkpoint.test_adjust import copied
from tests.fixtures import checkpoints, tiny
from tests.fixtures.checkpoints import MODELS


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return checkpoints.case(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def case(whole, tmp_path):
    return copied(whole, tmp_path)


def test_a_diverged_fine_tune_is_refused(case):
    checkpoints.rename(case.tuned, {})
    path = case.tuned / "model.safetensors"
    stored = load_file(path)
    stored["model.norm.weight"][2] = float("nan")
    save_file(stored, path)
    with pytest.raises(NumericalError, match=r"^model\.norm\.weight: .*diverged"):
        case.adjust()
    assert not case.output.exists() and not case.work.exists()


def test_another_base_is_refused(case):
    checkpoints.save(tiny.perturbed(MODELS["untied"](), seed=11), case.base)
    with pytest.raises(BaseWeightsError, match="is not that of the base model whose safety profile"):
        case.adjust()
    assert not case.output.exists() and not case.work.exists()
