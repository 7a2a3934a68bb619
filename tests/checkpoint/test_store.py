"""Weights come from the files as they are, and go into those of the output."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from safedelta_hf.checkpoint.store import CheckpointStore
from safedelta_hf.errors import BaseWeightsError, NumericalError
from safedelta_hf.weights.digest import digest
from tests.fixtures import checkpoints, tiny
from tests.fixtures.checkpoints import MODELS


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


def as_files(**weights):
    return SimpleNamespace(read=weights.__getitem__, source="there")


class Output:
    """Stands in for the folder that is written."""

    def __init__(self, finished=()):
        self.finished, self.kept, self.written = dict.fromkeys(finished), [], []

    def keep(self, record, names):
        self.kept.append((record.parameter, record.outcome, list(names)))

    def write(self, name, value):
        self.written.append((name, value))


def store(base, tuned, output=None, dtype="float32"):
    others = {"buffer": SimpleNamespace(shape=(2,)), "more": SimpleNamespace(shape=(3,))}
    pair = SimpleNamespace(
        base=as_files(w=base),
        read={"w": tuned}.__getitem__,
        stored={"w": SimpleNamespace(names=("w", "twin"))},
        split=lambda name, weight: [("w", weight), ("twin", weight)],
        others=others,
    )
    made_of = base.to(getattr(torch, dtype))
    header = SimpleNamespace(architecture="A", base={"w": digest(made_of)}, dtypes={"w": dtype})
    return CheckpointStore(pair, header, output or Output(), torch.device("cpu"))


BASE = torch.randn(3, 4)


@pytest.mark.parametrize(
    ("base", "tuned", "dtype", "moved"),
    [
        (BASE, BASE.clone(), "float32", False),
        (BASE, BASE.bfloat16(), "float32", False),  # saved in another type than its base
        (BASE, BASE.bfloat16(), "bfloat16", False),
        (BASE.bfloat16(), BASE.bfloat16().float(), "bfloat16", False),
        (BASE, BASE + 1, "float32", True),
        (BASE, (BASE + 1).bfloat16(), "float32", True),
    ],
)
def test_a_weight_is_tuned_if_it_differs_by_more_than_its_type(base, tuned, dtype, moved):
    assert store(base, tuned, dtype=dtype).is_tuned("w") is moved


def test_weights_that_are_no_numbers_or_of_another_base_are_named():
    diverged = BASE.clone()
    diverged[1, 2] = float("inf")
    with pytest.raises(NumericalError, match="^w: .*diverged"):
        store(BASE, diverged).is_tuned("w")
    made = store(BASE, BASE + 1)
    made._header.base["w"] = digest(BASE + 2)
    with pytest.raises(BaseWeightsError, match="^w: the weight in there is not that of the base model"):
        made.is_tuned("w")


def test_a_delta_is_that_of_the_files_and_what_is_written_stands_under_every_name():
    output, tuned = Output(), BASE + torch.randn(3, 4)
    made = store(BASE, tuned, output)
    delta = made.delta("w")
    assert made.is_dense("w") and made.write("w", delta).notes == ()
    assert [name for name, _ in output.written] == ["w", "twin"]
    assert all(torch.equal(value, tuned) and value.is_contiguous() for _, value in output.written)


def test_what_is_no_parameter_is_kept_once_unless_the_run_failed():
    output = Output(finished=["more"])
    with pytest.raises(ZeroDivisionError), store(BASE, BASE, output):
        raise ZeroDivisionError
    assert output.kept == []
    with store(BASE, BASE, output):
        pass
    assert output.kept == [("buffer", "kept", ["buffer"])]
