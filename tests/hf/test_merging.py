"""Rules that merge weights, in an ordinary Trainer run."""

import pytest

from safedelta_hf import (
    Dare,
    ModelStock,
    ProfileConfig,
    SafeDeltaCallback,
    SafeMerge,
    Slerp,
    adjust_model,
    collect_profile,
)
from safedelta_hf.errors import AdapterError, MergeError
from tests.fixtures import adapters, tiny

ROWS = tiny.rows(24, seed=1)


class Counted(SafeDeltaCallback):
    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


@pytest.mark.parametrize(
    "rule",
    [
        Slerp(strength=1.0),
        Dare(strength=1.0, seed=3),
        # A random alignment: the cosines are those of chance, so the threshold lies above them.
        SafeMerge(
            strength=1.0,
            threshold=0.9,
            unaligned=tiny.perturbed(tiny.llama(), seed=3),
            safe=tiny.perturbed(tiny.llama()),
        ),
    ],
    ids=lambda rule: rule.name,
)
def test_the_model_ends_as_adjust_model_would_leave_it(rule, tmp_path):
    model, reference = tiny.llama(), tiny.llama()
    callback = SafeDeltaCallback(ROWS, rule)
    tiny.trainer(model, callback, tmp_path / "one").train()
    tiny.trainer(reference, None, tmp_path / "two").train()
    plain = tiny.weights(reference)
    profile = collect_profile(tiny.llama(), ROWS, progress=False)
    adjust_model(reference, base=tiny.llama(), profile=profile, rule=rule, progress=False)
    assert tiny.same(tiny.weights(model), tiny.weights(reference))
    assert not tiny.same(tiny.weights(model), plain)
    assert callback.report.rule.settings == rule.settings


def test_the_strength_of_a_merge_is_measured_when_training_ends(tmp_path):
    callback = SafeDeltaCallback(tiny.rows(32, seed=1), Slerp(), config=ProfileConfig(holdout=0.5))
    tiny.trainer(tiny.llama(), callback, tmp_path).train()
    search = callback.report.search
    assert len(search.trials) >= 1 and search.strength in {trial.strength for trial in search.trials}


def test_a_merge_on_an_adapter_stops_before_the_training(tmp_path):
    model = adapters.adapted(tiny.llama())
    callback = Counted(ROWS, Slerp(strength=1.0))
    with pytest.raises(AdapterError, match="slerp merges whole weights"):
        tiny.trainer(model, callback, tmp_path).train()
    assert callback.steps == 0


def test_a_further_model_that_does_not_fit_stops_before_the_training(tmp_path):
    rule = ModelStock(strength=1.0, others=[tiny.llama(intermediate_size=32)])
    callback = Counted(ROWS, rule)
    with pytest.raises(MergeError, match="started from the same base"):
        tiny.trainer(tiny.llama(), callback, tmp_path).train()
    assert callback.steps == 0
