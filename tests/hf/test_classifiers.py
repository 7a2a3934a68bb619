"""Classifiers and reward models, whose logits are of labels: a number as strength works, and none is measured."""

import copy

import pytest
import torch

from safedelta_hf import ProfileConfig, Ridge, SafeDelta, SafeDeltaCallback, Scale, adjust_model, collect_profile
from safedelta_hf.data.dataset import read_safety_data
from safedelta_hf.data.refusals import response_losses
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import CaptureError, ProfileError
from tests.fixtures import tiny

ROWS = tiny.rows(24, seed=1)
MODELS = {
    "sequences": tiny.classifier,
    "rewards": lambda: tiny.classifier(1),
    "tokens": lambda: tiny.classifier(5, of_tokens=True),
    "tokens, as many labels as words": lambda: tiny.classifier(tiny.VOCABULARY, of_tokens=True),
}


def trainer_of(model, callback, output):
    of_tokens = "Token" in type(model).__name__
    trainer = tiny.trainer(model, callback, output)
    label = 0.5 if model.config.num_labels == 1 else 1
    trainer.train_dataset = [
        {"input_ids": row["input_ids"], "labels": [1] * len(row["input_ids"]) if of_tokens else label}
        for row in trainer.train_dataset
    ]
    return trainer


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("rule", [Ridge(strength=1.0), SafeDelta(), Scale(strength=1.0)], ids=lambda rule: rule.name)
def test_a_strength_that_is_a_number_works_with_however_many_examples(make, rule):
    base = make()
    profile = collect_profile(base, ROWS, progress=False)
    assert profile.held_out is None and profile.header.sequences == len(ROWS)
    tuned = tiny.perturbed(copy.deepcopy(base))
    report = adjust_model(tuned, base=base, profile=profile, rule=rule, progress=False)
    assert report.outcomes["adjusted"] == len(report.parameters)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_nothing_is_measured_by_logits_of_labels(make):
    model = make()
    with pytest.raises(CaptureError, match="classifies and does not say how likely tokens are"):
        response_losses(open_model(model), read_safety_data(ROWS))
    with pytest.raises(CaptureError, match=r"give the strength as a number"):
        collect_profile(model, ROWS, config=ProfileConfig(holdout=0.25), progress=False)
    profile = collect_profile(model, ROWS, progress=False)
    with pytest.raises(ProfileError, match="as has to be of a model that classifies"):
        adjust_model(tiny.perturbed(make()), base=model, profile=profile, rule=Ridge(), progress=False)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_callback_measures_none_and_says_so_before_the_first_step(make, tmp_path):
    model = make()
    before = tiny.weights(model)
    trainer = trainer_of(model, SafeDeltaCallback(ROWS), tmp_path)
    with pytest.raises(CaptureError, match=f"{type(model).__name__} classifies"):
        trainer.train()
    assert trainer.state.global_step == 0 and tiny.same(before, tiny.weights(model))


def test_the_callback_adjusts_one_at_a_number(tmp_path):
    callback = SafeDeltaCallback(ROWS, Ridge(strength=1.0))
    trainer_of(tiny.classifier(), callback, tmp_path).train()
    assert callback.report.outcomes["adjusted"] > 0


@pytest.mark.parametrize("shape", [(1, 5), (2, 5, 3), (2, 4, 64)])
def test_logits_of_another_shape_are_no_likelihoods(shape):
    class Odd(tiny.Plain):
        def forward(self, input_ids):
            return {"logits": torch.zeros(shape)}

    rows = [{"input_ids": [3, 4, 5, 6, 7]}, {"input_ids": [3, 4, 5, 6, 8]}]
    with pytest.raises(CaptureError, match="not those of each next token"):
        response_losses(open_model(Odd()), read_safety_data(rows))
