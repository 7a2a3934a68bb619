"""The loop over parameters: what it does with each, all of it or nothing; and strengths that it measures."""

import copy
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
from safedelta_hf.adjust import loop
from safedelta_hf.adjust.loop import adjust_weights
from safedelta_hf.adjust.plan import plan_parameters
from safedelta_hf.adjust.store import WeightStore, Written
from safedelta_hf.data.refusals import Drift, HeldOut
from safedelta_hf.deltas.dense import DenseDelta
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import (
    AdapterError,
    ConfigurationError,
    CoverageError,
    NumericalError,
    ProfileError,
    SafeDeltaWarning,
)
from safedelta_hf.records.plan import Treatment
from safedelta_hf.records.uses import Role
from tests.fixtures import by_hand, oracles, refusing, tiny

AUTO = AutoStrength(lost=0.5, precision=2.0)  # five to seven are held out, and none of them may be lost
RULES = [Ridge(strength=AUTO), TaskRidge(strength=AUTO), Scale(strength=AUTO), SafeDelta(strength=AUTO)]


@pytest.fixture(scope="module")
def profile():
    return collect_profile(refusing.base(), refusing.REFUSALS, config=ProfileConfig(holdout=0.25), progress=False)


@pytest.fixture(scope="module")
def task():
    return collect_profile(refusing.base(), refusing.TASK, config=ProfileConfig(holdout=0.0), progress=False)


def drift(profile, model):
    base = profile.held_out.read(open_model(refusing.base()))
    return Drift.between(base, profile.held_out.read(open_model(model)))


def adjust(model, profile, rule, task=None):
    return adjust_model(model, base=refusing.base(), profile=profile, task_profile=task, rule=rule, progress=False)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_found_strength_is_measured_and_is_what_a_number_would_do(profile, task, rule):
    tuned, again = refusing.fine_tuned(), refusing.fine_tuned()
    assert drift(profile, tuned).lost > 0
    search = adjust(tuned, profile, rule, task).search
    assert search.outcome == "found" and search.examples + search.others == len(profile.held_out.sequences)
    found, trial = drift(profile, tuned), search.applied
    assert (trial.lost, trial.probability_lost) == pytest.approx((found.lost, found.probability_lost), abs=1e-6)
    assert found.lost == 0 and found.probability_lost <= AUTO.share
    adjust(again, profile, rule.at(search.strength), task)
    assert tiny.same(tiny.weights(tuned), tiny.weights(again))


def test_the_search_is_deterministic(profile):
    one, other = refusing.fine_tuned(), refusing.fine_tuned()
    assert adjust(one, profile, RULES[0]).search == adjust(other, profile, RULES[0]).search
    assert tiny.same(tiny.weights(one), tiny.weights(other))


def test_a_model_that_still_refuses_keeps_its_weights_bit_for_bit(profile):
    tuned = tiny.perturbed(refusing.base(), scale=1e-5)
    before = tiny.weights(tuned)
    report = adjust(tuned, profile, Ridge(strength=AUTO))
    assert report.search.outcome == "nothing needed" and "at its mildest" in report.summary()
    assert tiny.same(before, tiny.weights(tuned))


def test_a_strictest_strength_that_fails_warns_and_is_applied(profile):
    tuned = refusing.fine_tuned()
    with pytest.warns(UserWarning, match="not enough"):
        report = adjust(tuned, profile, Scale(strength=AutoStrength(lost=1e-9, confidence=1e-12)))
    assert report.search.outcome == "strictest fails" and report.search.strength == Scale.search_range[1]
    assert report.metrics()["safedelta/strength"] == Scale.search_range[1]


def test_the_report_holds_every_trial(profile, tmp_path):
    report = adjust(refusing.fine_tuned(), profile, RULES[0])
    metrics = report.metrics()
    assert metrics["safedelta/evaluations"] == len(report.search.trials) >= 3
    assert metrics["safedelta/refusals_lost"] == 0 and metrics["safedelta/refusal_probability_lost"] <= AUTO.share
    assert metrics["safedelta/refusals_lost_bound"] == report.search.bound
    assert metrics["safedelta/refusals_to_tighten"] == report.search.more
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [Ridge(strength=AUTO), SafeDelta(strength=AUTO)], ids=lambda rule: rule.name)
def test_a_search_measures_the_figures_of_the_strength_that_it_applies_alone(profile, rule, dtype, monkeypatch):
    def counted(model, rule):
        losses, energies = [], []

        def found(loss):  # without a product
            losses.extend([1] * (loss is not None))
            return loss

        with monkeypatch.context() as patch:
            genuine, energy = loop.quadratic_loss, DenseDelta.lost_energy.fget
            by_price = loop.loss_by_price
            patch.setattr(loop, "quadratic_loss", lambda *given: losses.append(1) or genuine(*given))
            patch.setattr(loop, "loss_by_price", lambda *given: found(by_price(*given)))
            patch.setattr(DenseDelta, "lost_energy", property(lambda self: energies.append(1) or energy(self)))
            return adjust_model(model, base=base, profile=own, rule=rule, progress=False), len(losses), len(energies)

    base = refusing.base().to(dtype)
    own = collect_profile(base, refusing.REFUSALS, config=ProfileConfig(holdout=0.25), progress=False)
    tuned = refusing.fine_tuned().to(dtype)
    once = counted(copy.deepcopy(tuned), rule.at(1.0))[1:]
    report, losses, energies = counted(tuned, rule)
    trials, uses = len(report.search.trials), len(own.uses)
    assert trials > 2 and once == ((2 if dtype == torch.float32 else 3) * uses, energies)
    assert losses == once[0]


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
    search = adjust_adapter(model, profile=profile, task_profile=task, rule=rule, progress=False).search
    assert search.outcome == "found"
    found = drift(profile, model)
    assert found.lost == 0 and found.probability_lost <= AUTO.share
    adjust_adapter(again, profile=profile, task_profile=task, rule=rule.at(search.strength), progress=False)
    assert tiny.same(tiny.weights(model), tiny.weights(again))


def test_only_the_active_adapter_can_be_measured(profile):
    model = with_lora()
    with pytest.raises(AdapterError, match="active adapter"):
        adjust_adapter(model, profile=profile, rule=RULES[0], new_adapter_name="safe", progress=False)
    assert list(model.peft_config) == ["default"]


FILES = {"base": "nowhere", "tuned": "nowhere"}


@pytest.mark.parametrize("given", [{"rule": Ridge()}, {}, {"task_profile": "nowhere"}], ids=["rule", "default", "task"])
@pytest.mark.parametrize(
    "adjust",
    [
        partial(adjust_adapter_files, "nowhere"),
        partial(refactor_adapter, torch.nn.Module(), rank=1),
        partial(adjust_checkpoint, **FILES),
    ],
    ids=["adapter", "refactored", "checkpoint"],
)
def test_without_a_model_in_memory_a_number_is_asked_for_before_anything_is_read(adjust, given, profile, tmp_path):
    name = "TaskRidge" if "task_profile" in given else "Ridge"
    with pytest.raises(ConfigurationError, match=rf"none here; give a number: rule={name}\(strength="):
        adjust(profile=profile, output=tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


class Store(WeightStore):
    """Weights in two dictionaries; it writes down what happens to it."""

    architecture, source = "Plain", "a dictionary"

    def __init__(self, tuned, base, fails_at=None):
        self.tuned, self.base, self.fails_at = dict(tuned), dict(base), fails_at
        self.now, self.events, self.finished = dict(tuned), [], []

    def __enter__(self):
        self.events.append("entered")
        return self

    def __exit__(self, kind, error, trace):
        self.events.append(kind)
        if kind is not None:
            self.restore()

    def is_tuned(self, name):
        return not torch.equal(self.tuned[name], self.base[name])

    def is_dense(self, name):
        return True

    def delta(self, name):
        return DenseDelta(self.tuned[name], self.base[name])

    def write(self, name, delta):
        if name == self.fails_at:
            raise OSError(f"no room for {name}")
        self.now[name] = delta.weight()
        return Written(delta.rounded(), (f"wrote {name}",))

    def finish(self, record):
        self.finished.append(record)

    def restore(self):
        self.now = dict(self.tuned)


SHAPES = {"up": (5, 4), "down": (3, 5), "same": (3, 4), "norm": (4,), "lost": (2, 2)}
ROLES = {"up": Role.LINEAR, "down": Role.LINEAR, "same": Role.LINEAR, "norm": Role.SCALE}


def small_store(**settings):
    base = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    tuned = {name: weight if name == "same" else weight + torch.randn(weight.shape) for name, weight in base.items()}
    return Store(tuned, base, **settings)


def small_profile():
    uses = [by_hand.use_of(name, SHAPES[name], role) for name, role in ROLES.items()]
    return by_hand.profile_of(uses, base=dict.fromkeys(SHAPES, ""), dtypes=dict.fromkeys(SHAPES, "float32"))


def adjusted(store, rule, profile=None, **treatment):
    profile = profile or small_profile()
    plan = plan_parameters(SHAPES, profile, Treatment(**{"uncovered": "keep"} | treatment))
    return adjust_weights(store, plan, profile, rule, progress=False)


def hessian_of(profile, name):
    total = profile.moments[name].total.double() * (2 / 8)
    return total if total.ndim == 2 else total.diag()


def test_each_parameter_ends_as_its_plan_says_and_the_record_measures_it():
    store, profile = small_store(), small_profile()
    report = adjusted(store, Ridge(strength=2.0), profile, norms="reset")
    records = {record.parameter: record for record in report.parameters}
    outcomes = {"up": "adjusted", "down": "adjusted", "same": "unchanged", "norm": "reset", "lost": "kept"}
    assert {name: record.outcome for name, record in records.items()} == outcomes
    assert torch.equal(store.now["same"], store.tuned["same"]) and torch.equal(store.now["lost"], store.tuned["lost"])
    assert torch.equal(store.now["norm"], store.base["norm"])
    for name in ("up", "down"):
        delta, hessian = store.tuned[name] - store.base[name], hessian_of(profile, name)
        kept = oracles.ridge(delta, torch.eye(len(hessian)), hessian, 2.0)
        torch.testing.assert_close(store.now[name].double(), store.base[name].double() + kept, rtol=1e-4, atol=1e-4)
        record = records[name]
        assert record.delta_energy == pytest.approx(float(delta.double().square().sum()), rel=1e-5)
        assert record.lost_energy == pytest.approx(float((delta.double() - kept).square().sum()), rel=1e-3)
        assert record.tuned_loss == pytest.approx(oracles.loss(delta, hessian), rel=1e-4)
        assert record.adjusted_loss == pytest.approx(oracles.loss(kept, hessian), rel=1e-3)
        assert record.notes == (f"wrote {name}",) and record.roles == ("linear",)
    assert records["norm"].lost_energy == records["norm"].delta_energy > 0 == records["lost"].lost_energy
    assert records["same"].reason == "the fine-tuning did not move it" and records["same"].tuned_loss is None
    assert "norm is reset" in records["norm"].reason
    assert store.events == ["entered", None] and tuple(store.finished) == report.parameters
    assert (report.architecture, report.base, report.rule.name) == ("Plain", "a dictionary", "ridge")


def a_tied_weight():
    shape = (4, 3)
    uses = [
        by_hand.use_of("tied", shape, Role.EMBEDDING, moment="in"),
        by_hand.use_of("tied", shape, Role.HEAD, moment="out"),
    ]
    profile = by_hand.profile_of(uses)
    base, tuned = torch.randn(shape), torch.randn(shape)
    store = Store({"tied": tuned}, {"tied": base})
    plan = plan_parameters({"tied": shape}, profile, Treatment())
    return store, plan, profile, base, tuned


def test_of_a_weight_with_two_uses_each_transforms_what_the_last_one_left():
    store, plan, profile, base, tuned = a_tied_weight()
    (record,) = adjust_weights(store, plan, profile, Ridge(strength=0.5), progress=False).parameters
    counts, hessian = hessian_of(profile, "in"), hessian_of(profile, "out")
    kept = oracles.ridge((tuned - base).T, torch.eye(4), counts, 0.5).T
    kept = oracles.ridge(kept, torch.eye(3), hessian, 0.5)
    torch.testing.assert_close(store.now["tied"].double(), base.double() + kept, rtol=1e-4, atol=1e-4)
    expected = oracles.loss((tuned - base).T, counts) + oracles.loss(tuned - base, hessian)
    assert record.tuned_loss == pytest.approx(expected, rel=1e-4)
    assert record.roles == ("embedding", "head")


def test_a_rule_that_reads_no_moments_changes_a_weight_with_two_uses_once():
    store, plan, profile, base, tuned = a_tied_weight()
    adjust_weights(store, plan, profile, Scale(strength=3.0), progress=False)
    torch.testing.assert_close(store.now["tied"], base + (tuned - base) / 4)


class Watched:
    """A bar that notes what it is told."""

    def __init__(self, **settings):
        self.total, self.n, self.told = settings["total"], 0, [settings["desc"]]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, count=1):
        self.n += count
        assert self.n <= self.total

    def set_description_str(self, text):
        self.told.append(text)


def test_one_bar_counts_weights_and_every_refusal_that_is_read(profile, monkeypatch):
    bars = []
    monkeypatch.setattr(loop, "progress_bar", lambda **settings: bars.append(Watched(**settings)) or bars[-1])
    monkeypatch.setattr(
        "safedelta_hf.data.predictions.progress_bar",
        lambda share, *, disable, **_: share if disable else pytest.fail("a bar inside the bar"),
    )
    model = refusing.fine_tuned()
    search = adjust_model(model, base=refusing.base(), profile=profile, rule=Ridge()).search
    (bar,) = bars
    readings, passes = len(search.trials) + 1 + (search.noise.lost is not None), len(search.trials) + 2
    assert len(search.trials) > 2
    assert bar.n == readings * len(profile.held_out.sequences) + passes * len(profile.header.base)
    told = [text for text in bar.told if text.startswith("Trial ")]
    assert len(told) == len(search.trials) and told[0] == f"Trial 1 of about {loop.EXPECTED_TRIALS}"
    for text, before in zip(told[1:], search.trials, strict=False):
        assert text.endswith(f"({before.strength:.3g} {'passes' if before.passed else 'fails'})")


def test_an_error_names_its_parameter_and_every_weight_is_as_it_was():
    store, profile = small_store(), small_profile()
    profile.moments["down"].total[1, 1] = torch.nan
    with pytest.raises(NumericalError, match=r"^down: .*NaN"):
        adjusted(store, Ridge(strength=1.0), profile)
    assert store.events == ["entered", NumericalError]
    assert [record.parameter for record in store.finished] == ["up"]
    assert store.now == store.tuned


@pytest.mark.parametrize("name", ["up", "norm", "lost"])
def test_a_write_that_fails_leaves_the_stores_block_by_its_exception(name):
    store = small_store(fails_at=name)
    with pytest.raises(OSError, match=f"^no room for {name}$"):
        adjusted(store, Ridge(strength=1.0), norms="reset")
    assert store.events == ["entered", OSError] and store.now == store.tuned
    assert name not in {record.parameter for record in store.finished}


@pytest.mark.parametrize(
    ("rule", "treatment", "error", "message"),
    [
        (TaskRidge(strength=1.0), {}, ProfileError, "task_ridge: this rule weighs"),
        (Ridge(), {}, ProfileError, "none of the 8 examples of this profile was held out"),
        (
            Ridge(strength=1.0),
            {"uncovered": "error"},
            CoverageError,
            r"1 trained parameters cannot be covered:\n  lost",
        ),
    ],
)
def test_what_is_missing_is_told_before_the_store_is_entered(rule, treatment, error, message):
    store = small_store()
    with pytest.raises(error, match=message):
        adjusted(store, rule, **treatment)
    assert store.events == [] and store.now == store.tuned


def test_a_strength_cannot_be_measured_where_no_model_runs():
    store, profile = small_store(), dataclasses.replace(small_profile(), held_out=HeldOut(sequences=(), losses=()))
    with pytest.raises(ConfigurationError, match=r"none here; give a number: rule=Ridge\(strength="):
        adjusted(store, Ridge(), profile)
    assert store.events == ["entered", ConfigurationError] and store.now == store.tuned


@pytest.mark.parametrize("rule", [Ridge(strength=2.0), SafeDelta(strength=10.0), Scale(strength=1.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_figure_is_that_of_the_weights_that_were_written(dtype, rule):
    base = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    tuned = {name: (weight + 0.02 * torch.randn(weight.shape)).to(dtype) for name, weight in base.items()}
    store, profile = Store(tuned, base), small_profile()
    report = adjusted(store, rule, profile)
    for record in report.parameters:
        name = record.parameter
        before, after = (weights[name].double() - base[name].double() for weights in (tuned, store.now))
        assert store.now[name].dtype == dtype
        assert record.lost_energy == pytest.approx(float((before - after).square().sum()), rel=1e-5)
        if record.outcome == "adjusted":
            hessian = hessian_of(profile, name)
            rows = (before, after) if before.ndim == 2 else (before[None], after[None])
            assert (record.tuned_loss, record.adjusted_loss) == pytest.approx(
                [oracles.loss(values, hessian) for values in rows], rel=1e-4
            )
            assert record.unrounded_loss is not None and "round" in record.notes[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_are_fed_on_where_inputs_mix_and_nowhere_else(dtype):
    base = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    tuned = {name: (weight + 0.02 * torch.randn(weight.shape)).to(dtype) for name, weight in base.items()}
    store, profile = Store(tuned, base), small_profile()
    told = str(dtype).removeprefix("torch.")
    for record in adjusted(store, Scale(strength=1.0), profile).parameters:
        if record.outcome == "adjusted":
            name = record.parameter
            nearest = ((base[name].float() + tuned[name].float()) / 2).to(dtype)
            mixes = ROLES[name] is Role.LINEAR
            assert record.notes[0] == (
                f"rounded to {told}, errors fed on" if mixes else f"rounded to the nearest {told}"
            )
            assert torch.equal(store.now[name], nearest) == (not mixes)


def test_where_rounding_brings_the_loss_back_it_is_said_first():
    base = {name: (1 + torch.rand(shape)).bfloat16() for name, shape in SHAPES.items()}
    # All entries of a scale moved by one step; what the rule takes off them is less than half of it.
    tuned = {name: weight + 2**-7 * (name == "norm") for name, weight in base.items()}
    with pytest.warns(SafeDeltaWarning, match="MOST OF THE SAFETY LOSS THAT IS LEFT COMES FROM ROUNDING"):
        report = adjusted(Store(tuned, base), Scale(strength=0.8))
    assert report.summary().startswith("WARNING: MOST OF THE SAFETY LOSS") and "before rounding" in report.summary()
    metrics = report.metrics()
    assert metrics["safedelta/quadratic_loss_unrounded"] < metrics["safedelta/quadratic_loss_adjusted"] / 2
    finer = {name: weight.float() for name, weight in tuned.items()}, {n: w.float() for n, w in base.items()}
    report = adjusted(Store(*finer), Scale(strength=0.8))
    assert not report.warning and "safedelta/quadratic_loss_unrounded" not in report.metrics()
