"""Training defences as further ways to fine-tune a case."""

from dataclasses import replace

import pytest
import torch
from transformers import Trainer

from safedelta_hf.testbed import CASES, comparison
from safedelta_hf.testbed.comparison import CaseScenario
from safedelta_hf.testbed.defences import DEFENCES, SHARE, AlignedModel
from safedelta_hf.testbed.model import tokenize
from safedelta_hf.training import FreezeSafetyLayers, ProjectedTraining
from tests.fixtures import tiny

SHORT = replace(CASES["harmful"], epochs=1, learning_rate=1e-4)


@pytest.fixture(scope="module")
def aligned():
    return AlignedModel()


@pytest.mark.parametrize("name", ["mixture", "derta", "refusal_mix"])
def test_data_defences_mix_their_share_into_all_of_the_cases_examples(name, aligned):
    rows = DEFENCES[name](aligned, SHORT, 3).rows
    own = {tuple(row["input_ids"]) for row in tokenize(SHORT.examples(3), aligned.tokenizer)}
    found = [tuple(row["input_ids"]) for row in rows]
    assert own <= set(found)
    assert sum(row not in own for row in found) == round(SHARE / (1 - SHARE) * len(own))


def test_other_defences_train_on_the_cases_own_examples(aligned):
    probed, frozen, projected = (DEFENCES[name](aligned, SHORT, 0) for name in ("sap", "sppft", "projected"))
    assert probed.rows is frozen.rows is projected.rows is None
    assert probed.make_trainer is not Trainer and frozen.make_trainer is projected.make_trainer is Trainer
    assert [type(one) for one in frozen.callbacks + projected.callbacks] == [FreezeSafetyLayers, ProjectedTraining]


def test_a_defence_is_trained_once_for_both_of_its_candidates(aligned, monkeypatch):
    trained, fine_tune = [], comparison.fine_tune
    monkeypatch.setattr(
        comparison, "fine_tune", lambda *args, **kwargs: trained.append(1) or fine_tune(*args, **kwargs)
    )
    scenario = CaseScenario(aligned, SHORT, 0, 4, ("sppft",))
    alone, repaired = scenario.baselines[-2:]
    assert (alone.method, repaired.method) == ("sppft", "sppft, then task_ridge")
    defended = {name: weight.clone() for name, weight in tiny.weights(alone.make().model).items()}
    layers, base = aligned.safety_layers, tiny.weights(aligned.model)
    frozen = [name for name in base if name.startswith(tuple(f"{layers.names[n]}." for n in layers.numbers))]
    assert frozen and all(torch.equal(defended[name], base[name]) for name in frozen)
    assert any(not torch.equal(defended[name], base[name]) for name in base)
    made = repaired.make()
    assert made.search is not None and trained == [1]
    # From the weights that the defence trained, of which the frozen ones are still the base's.
    assert all(torch.equal(tiny.weights(made.model)[name], base[name]) for name in frozen)


def test_safety_layers_are_left_alone_by_a_lora_too(aligned):
    alone = CaseScenario(aligned, SHORT, 0, 4, ("sppft",), "lora").baselines[-2]
    layers = aligned.safety_layers
    places = [f".{layers.names[n]}." for n in layers.numbers]
    factors = {name: value for name, value in alone.make().model.named_parameters() if "lora_B" in name}
    for name, value in factors.items():
        assert value.any() != any(place in name for place in places), name
    assert len(factors) > len(places) > 0
