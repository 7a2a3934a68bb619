"""Strength "auto" where weights are: models and adapters in memory."""

import dataclasses
from functools import partial

import pytest
import torch

from safedelta_hf import (
    AutoStrength,
    ProfileConfig,
    Ridge,
    SafeDelta,
    Scale,
    TaskRidge,
    adjust_adapter,
    adjust_adapter_files,
    adjust_checkpoint,
    adjust_model,
    collect_profile,
    refactor_adapter,
)
from safedelta_hf.checkpoint.plan import plan_checkpoint
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import AdapterError, ConfigurationError, NumericalError, ProfileError
from tests.fixtures import refusing, tiny

AUTO = AutoStrength(tolerance=0.2, precision=2.0)
RULES = [Ridge(strength=AUTO), TaskRidge(strength=AUTO), Scale(strength=AUTO), SafeDelta(strength=AUTO)]


@pytest.fixture(scope="module")
def profile():
    return collect_profile(refusing.base(), refusing.REFUSALS, config=ProfileConfig(holdout=0.25), progress=False)


@pytest.fixture(scope="module")
def task():
    return collect_profile(refusing.base(), refusing.TASK, config=ProfileConfig(holdout=0.0), progress=False)


def adjust(model, profile, rule, task=None):
    return adjust_model(model, base=refusing.base(), profile=profile, task=task, rule=rule, progress=False)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_found_strength_is_measured_and_is_what_a_number_would_do(profile, task, rule):
    tuned, again = refusing.fine_tuned(), refusing.fine_tuned()
    before = profile.held_out.drift(open_model(tuned), quantile=0.95)
    assert before.mean > AUTO.tolerance
    search = adjust(tuned, profile, rule, task).search
    assert search.outcome == "found" and search.examples == len(profile.held_out.sequences)
    drift = profile.held_out.drift(open_model(tuned), quantile=AUTO.quantile)
    trial = next(trial for trial in search.trials if trial.strength == search.strength)
    assert (trial.mean, trial.upper) == pytest.approx((drift.mean, drift.upper), abs=1e-6)
    assert max(drift.mean, drift.upper) <= AUTO.tolerance
    adjust(again, profile, rule.at(search.strength), task)
    assert tiny.same(tiny.weights(tuned), tiny.weights(again))


def test_the_search_is_deterministic(profile):
    one, other = refusing.fine_tuned(), refusing.fine_tuned()
    assert adjust(one, profile, RULES[0]).search == adjust(other, profile, RULES[0]).search
    assert tiny.same(tiny.weights(one), tiny.weights(other))


def test_a_model_that_still_refuses_keeps_its_weights_bit_for_bit(profile):
    tuned = refusing.fine_tuned(count=1)
    before = tiny.weights(tuned)
    report = adjust(tuned, profile, Ridge(strength=AutoStrength(tolerance=1e3)))
    assert report.search.outcome == "nothing needed" and "at its mildest" in report.summary()
    assert tiny.same(before, tiny.weights(tuned))


def test_a_strictest_strength_that_fails_warns_and_is_applied(profile):
    tuned = refusing.fine_tuned()
    with pytest.warns(UserWarning, match="not enough"):
        report = adjust(tuned, profile, Scale(strength=AutoStrength(tolerance=1e-9)))
    assert report.search.outcome == "strictest fails" and report.search.strength == Scale.search_range[1]
    assert report.metrics()["safedelta/strength"] == Scale.search_range[1]


def test_the_report_holds_every_trial(profile, tmp_path):
    report = adjust(refusing.fine_tuned(), profile, RULES[0])
    metrics = report.metrics()
    assert metrics["safedelta/evaluations"] == len(report.search.trials) >= 3
    assert metrics["safedelta/refusal_rise_upper"] <= AUTO.tolerance
    report.save(tmp_path / "report.json")
    assert '"trials"' in (tmp_path / "report.json").read_text()


@pytest.mark.parametrize("error", [NumericalError("broken"), KeyboardInterrupt()])
def test_a_search_that_fails_half_way_changes_nothing(profile, monkeypatch, error):
    tuned, calls = refusing.fine_tuned(), []
    before = tiny.weights(tuned)
    factorise = Ridge.factorise

    def failing(self, moments):
        calls.append(self.strength)
        if len(set(calls)) == 3:
            raise error
        return factorise(self, moments)

    monkeypatch.setattr(Ridge, "factorise", failing)
    with pytest.raises(type(error)):
        adjust(tuned, profile, RULES[0])
    assert tiny.same(before, tiny.weights(tuned))


def test_what_holds_for_every_strength_is_prepared_once(profile, monkeypatch):
    prepared = []
    factorise = SafeDelta.factorise
    monkeypatch.setattr(SafeDelta, "factorise", lambda self, moments: prepared.append(1) or factorise(self, moments))
    report = adjust(refusing.fine_tuned(), profile, SafeDelta(strength=AUTO))
    assert len(report.search.trials) > 2 and len(prepared) == len(profile.moments)


def test_a_profile_that_holds_nothing_out_is_a_named_error():
    whole = collect_profile(refusing.base(), refusing.REFUSALS, config=ProfileConfig(holdout=0.0), progress=False)
    tuned = refusing.fine_tuned()
    before = tiny.weights(tuned)
    with pytest.raises(ProfileError, match=r"holdout=0\.25"):
        adjust(tuned, whole, Ridge())
    assert tiny.same(before, tiny.weights(tuned))


def test_a_rule_that_weighs_the_task_needs_its_profile(profile, task):
    tuned = refusing.fine_tuned()
    with pytest.raises(ProfileError, match="task_ridge: this rule weighs"):
        adjust(tuned, profile, TaskRidge(strength=1.0))
    header = dataclasses.replace(task.header, base={name: "other" for name in task.header.base})
    with pytest.raises(ProfileError, match="another base"):
        adjust(tuned, profile, TaskRidge(strength=1.0), dataclasses.replace(task, header=header))


def with_lora():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(refusing.base(), LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"))
    return refusing.fine_tuned(model, count=12)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_an_adapter_is_measured_as_it_runs(profile, task, rule):
    model, again = with_lora(), with_lora()
    search = adjust_adapter(model, profile=profile, task=task, rule=rule, progress=False).search
    assert search.outcome == "found"
    drift = profile.held_out.drift(open_model(model), quantile=AUTO.quantile)
    assert max(drift.mean, drift.upper) <= AUTO.tolerance
    adjust_adapter(again, profile=profile, task=task, rule=rule.at(search.strength), progress=False)
    assert tiny.same(tiny.weights(model), tiny.weights(again))


def test_only_the_active_adapter_can_be_measured(profile):
    model = with_lora()
    with pytest.raises(AdapterError, match="active adapter"):
        adjust_adapter(model, profile=profile, rule=RULES[0], new_adapter_name="safe", progress=False)
    assert list(model.peft_config) == ["default"]


FILES = {"base": "nowhere", "tuned": "nowhere"}


@pytest.mark.parametrize("given", [{"rule": Ridge()}, {}, {"task": "nowhere"}], ids=["rule", "default", "task"])
@pytest.mark.parametrize(
    "adjust",
    [
        partial(adjust_adapter_files, "nowhere"),
        partial(refactor_adapter, torch.nn.Module(), rank=1),
        partial(adjust_checkpoint, **FILES),
        partial(plan_checkpoint, **FILES),
    ],
    ids=["adapter", "refactored", "checkpoint", "plan"],
)
def test_without_a_model_in_memory_a_number_is_asked_for_before_anything_is_read(adjust, given, profile, tmp_path):
    name = "TaskRidge" if "task" in given else "Ridge"
    with pytest.raises(ConfigurationError, match=rf"none here; give a number: rule={name}\(strength="):
        adjust(profile=profile, output=tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())
