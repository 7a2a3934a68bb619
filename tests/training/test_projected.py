"""Projected training: the delta after a step is the one of the formula, and nothing else is moved."""

import pytest
import torch
from transformers import Trainer, TrainerCallback

from safedelta_hf import Ridge, SafeDeltaCallback, Treatment, adjust_adapter, adjust_model, collect_profile
from safedelta_hf.core.curvature import quadratic_loss
from safedelta_hf.deltas.dense import DenseDelta
from safedelta_hf.errors import AdapterError, BaseWeightsError, ConfigurationError, CoverageError, ProfileError
from safedelta_hf.profile.profile import with_ordinary
from safedelta_hf.training import ProjectedTraining
from tests.fixtures import adapters, oracles, tiny

ROWS = tiny.rows(24, seed=1)


@pytest.fixture(scope="module")
def profile():
    return adapters.profile_of(tiny.llama())


def adapted(**changes):
    torch.manual_seed(0)
    return adapters.adapted(tiny.llama(), **changes)


def run(model, callback, folder, *others, **changes):
    made = tiny.trainer(model, callback, folder, **changes)
    for other in others:
        made.add_callback(other)
    made.train()
    return made


class Watching(TrainerCallback):
    """Weights as each step leaves them, before or after what stands behind it in the list of callbacks."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.seen.append(tiny.weights(model))


def watched(model, callback, folder, **changes):
    before, after = Watching(), Watching()
    made = Trainer(
        model=model,
        args=tiny.arguments(folder, **changes),
        train_dataset=tiny.rows(16, seed=2, length=10),
        callbacks=[before, callback, after],
    )
    made.train()
    return before.seen, after.seen


def losses(profile, base, weights):
    """The quadratic safety loss of each use of each parameter."""
    found = {}
    for use in profile.uses:
        delta = DenseDelta(weights[use.parameter], base[use.parameter])
        hessian = profile.moments[use.moment].hessian(torch.device("cpu"))
        found[use] = quadratic_loss(delta.matrix(use).inner, hessian)
    return found


@pytest.mark.parametrize("settings", [{"strength": 0.0}, {"hard": 1.0}], ids=["soft", "hard"])
@pytest.mark.parametrize("make", [tiny.llama, adapted], ids=["full", "lora"])
def test_at_strength_zero_a_run_is_the_plain_one_bit_for_bit(make, settings, profile, tmp_path):
    plain, projected = make(), make()
    run(plain, None, tmp_path, gradient_accumulation_steps=2)
    run(projected, ProjectedTraining(profile=profile, **settings), tmp_path, gradient_accumulation_steps=2)
    assert tiny.same(tiny.weights(plain), tiny.weights(projected))


def test_after_a_step_each_weight_is_that_of_the_closed_form_in_float64(profile, tmp_path):
    base, strength = tiny.weights(tiny.llama()), 0.05
    before, after = watched(tiny.llama(), ProjectedTraining(profile=profile, strength=strength), tmp_path)
    moments = {use.parameter: profile.moments[use.moment].hessian(torch.device("cpu")) for use in profile.uses}
    for weights, found in zip(before, after, strict=True):
        for use in profile.uses:
            hessian = moments[use.parameter]
            delta = (weights[use.parameter] - base[use.parameter]).double()
            if hessian.ndim == 1:
                by_row = use.view.has_inputs_first and delta.ndim == 2
                scale = 1 / (1 + strength * hessian.double())
                expected = delta * (scale[:, None] if by_row else scale)
            else:
                expected = oracles.ridge(delta, torch.eye(len(hessian)), hessian, strength)
            moved = (found[use.parameter] - base[use.parameter]).double()
            torch.testing.assert_close(moved, expected.double(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("settings", [{"strength": 0.3}, {"hard": 0.05}], ids=["soft", "hard"])
def test_no_step_raises_the_safety_loss_by_its_projection(settings, profile, tmp_path):
    base = tiny.weights(tiny.llama())
    before, after = watched(tiny.llama(), ProjectedTraining(profile=profile, **settings), tmp_path)
    assert len(before) == 4
    for ones, others in zip(before, after, strict=True):
        one, other = losses(profile, base, ones), losses(profile, base, others)
        assert all(other[use] <= one[use] * (1 + 1e-5) for use in one)
        assert sum(other.values()) < 0.9 * sum(one.values())


def test_the_hard_form_holds_a_lora_in_the_null_space_at_every_step(profile, tmp_path):
    model, share = adapted(), 0.01
    _, after = watched(model, ProjectedTraining(profile=profile, hard=share), tmp_path)
    base = tiny.weights(tiny.llama())
    for weights in after:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        merged = tiny.weights(adapters.merged(model))
        for use in profile.uses:
            hessian = profile.moments[use.moment].hessian(torch.device("cpu"))
            if "layers" not in use.parameter or hessian.ndim == 1:
                continue
            values = torch.linalg.eigvalsh(hessian.double()).clamp_min(0)
            allowed = values[values.cumsum(0) <= share * values.sum()]
            largest = float(allowed[-1]) if len(allowed) else 0.0
            delta = (merged[use.parameter] - base[use.parameter]).double()
            loss = 0.5 * float(torch.trace(delta @ hessian.double() @ delta.T))
            assert loss <= (0.5 * largest + 1e-6 * float(values[-1])) * float(delta.square().sum()) + 1e-9
    assert not tiny.same(after[0], after[-1])


def test_one_projection_of_a_lora_is_what_adjust_adapter_makes_of_it(profile, tmp_path):
    before, after = watched(adapted(), ProjectedTraining(profile=profile, strength=0.5), tmp_path, max_steps=1)
    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[0][name])
    adjust_adapter(model, profile=profile, rule=Ridge(strength=0.5), progress=False)
    assert tiny.same(after[0], tiny.weights(model))


def test_one_projection_is_what_adjust_model_makes_of_it(profile, tmp_path):
    before, after = watched(tiny.llama(), ProjectedTraining(profile=profile, strength=0.5), tmp_path, max_steps=1)
    model = tiny.llama()
    model.load_state_dict(before[0])
    adjust_model(model, base=tiny.llama(), profile=profile, rule=Ridge(strength=0.5), progress=False)
    assert tiny.same(after[0], tiny.weights(model))


def test_only_each_nth_step_is_projected_and_the_hard_form_once_more_at_the_end(profile, tmp_path):
    for settings, turns in (({"strength": 0.5}, [0, 0, 1, 0]), ({"hard": 0.1}, [0, 0, 1, 0])):
        model = tiny.llama()
        callback = ProjectedTraining(profile=profile, every_n_steps=3, **settings)
        before, after = watched(model, callback, tmp_path)
        assert [not tiny.same(*pair) for pair in zip(before, after, strict=True)] == turns
        assert tiny.same(after[-1], tiny.weights(model)) == ("strength" in settings)


def test_a_profile_is_collected_of_the_base_before_the_first_step(profile, tmp_path):
    given, collected = tiny.llama(), tiny.llama()
    run(given, ProjectedTraining(profile=profile, strength=0.3), tmp_path)
    callback = ProjectedTraining(ROWS, strength=0.3)
    run(collected, callback, tmp_path)
    assert callback.profile.header == profile.header
    assert tiny.same(tiny.weights(given), tiny.weights(collected))


def test_ordinary_data_is_protected_beside_the_refusals(profile, tmp_path):
    ordinary = tiny.rows(8, seed=9)
    both = with_ordinary(profile, collect_profile(tiny.llama(), ordinary, progress=False), 0.3)
    given, collected = tiny.llama(), tiny.llama()
    run(given, ProjectedTraining(profile=both, strength=0.3), tmp_path)
    run(
        collected,
        ProjectedTraining(ROWS, strength=0.3, ordinary_dataset=ordinary, ordinary_weight=0.3),
        tmp_path,
    )
    assert tiny.same(tiny.weights(given), tiny.weights(collected))


@pytest.mark.parametrize("given", [True, False], ids=["profile", "dataset"])
def test_a_resumed_run_ends_as_the_whole_one(given, profile, tmp_path):
    def callback(**more):
        what = {"profile": profile} if given else {"safety_dataset": ROWS}
        return ProjectedTraining(strength=0.3, **what, **more)

    saving = {"save_strategy": "steps", "save_steps": 2}
    whole, rest = tiny.llama(), tiny.llama()
    run(whole, callback(), tmp_path / "whole", **saving)
    resumed = tiny.trainer(rest, callback(base=tiny.llama()), tmp_path / "rest", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert tiny.same(tiny.weights(whole), tiny.weights(rest))
    forgetful = tiny.trainer(tiny.llama(), callback(), tmp_path / "rest", **saving)
    with pytest.raises(BaseWeightsError, match="resumed at step 2"):
        forgetful.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_a_resumed_lora_needs_no_base(profile, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole, rest = adapted(), adapted()
    run(whole, ProjectedTraining(profile=profile, hard=0.1), tmp_path / "whole", **saving)
    resumed = tiny.trainer(rest, ProjectedTraining(profile=profile, hard=0.1), tmp_path / "rest", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert tiny.same(tiny.weights(whole), tiny.weights(rest))


def test_a_second_training_is_held_to_the_first_base(profile, tmp_path):
    model = tiny.llama()
    trainer = tiny.trainer(model, ProjectedTraining(profile=profile, hard=0.0), tmp_path, num_train_epochs=1)
    trainer.train()
    trainer.train()
    found = losses(profile, tiny.weights(tiny.llama()), tiny.weights(model))
    assert max(found.values()) < 1e-6


class Failing(Exception):
    pass


@pytest.mark.parametrize("make", [tiny.llama, adapted], ids=["full", "lora"])
def test_an_exception_leaves_the_weights_as_the_step_left_them(make, profile, tmp_path, monkeypatch):
    model, callback = make(), ProjectedTraining(profile=profile, strength=0.5)
    run(model, callback, tmp_path, max_steps=1)
    adapters.trained(model)
    before, writes = tiny.weights(model), []
    opened = callback._projection._model
    write = opened.write

    def failing(name, value):
        writes.append(name)
        if len(writes) == 4:
            raise Failing
        write(name, value)

    monkeypatch.setattr(opened, "write", failing)
    with pytest.raises(Failing):
        callback._projection.apply()
    assert len(writes) > 4 and tiny.same(before, tiny.weights(model))


def test_it_works_beside_the_callback(profile, tmp_path):
    adjusting = SafeDeltaCallback(profile=profile, rule=Ridge(strength=1.0))
    run(tiny.llama(), ProjectedTraining(profile=profile, strength=0.1), tmp_path, adjusting)
    assert adjusting.report.changed_anything


def test_kept_parameters_are_trained_as_ever(profile, tmp_path):
    kept = Treatment(embeddings="keep", norms="keep", head="keep")
    before, after = watched(
        tiny.llama(), ProjectedTraining(profile=profile, strength=0.5, treatment=kept), tmp_path, max_steps=1
    )
    moved = {name for name in before[0] if not torch.equal(before[0][name], after[0][name])}
    assert moved == {name for name in before[0] if "proj" in name}


@pytest.mark.parametrize(
    ("make", "settings", "error", "said"),
    [
        (lambda: tiny.llama().bfloat16(), {}, ConfigurationError, "trained in torch.bfloat16"),
        (lambda: tiny.perturbed(tiny.llama()), {}, ProfileError, "made for another base"),
        (lambda: adapted(bias="all"), {}, AdapterError, "bias='all'"),
        (tiny.llama, {"treatment": Treatment(norms="reset")}, ConfigurationError, "freeze it instead"),
        (tiny.gpt2, {}, ProfileError, "another base"),
    ],
)
def test_what_cannot_be_projected_is_refused_by_name(make, settings, error, said, profile, tmp_path):
    callback = ProjectedTraining(profile=profile, strength=0.1, **settings)
    with pytest.raises(error, match=said):
        run(make(), callback, tmp_path)


def test_a_weight_that_the_data_never_reaches_is_named(tmp_path):
    model = tiny.llama()
    model.extra = torch.nn.Linear(4, 4)
    with pytest.raises(CoverageError, match="extra"):
        run(model, ProjectedTraining(ROWS, strength=0.1), tmp_path)
    run(model, ProjectedTraining(ROWS, strength=0.1, treatment=Treatment(uncovered="keep")), tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "either strength"),
        ({"strength": 0.1, "hard": 0.1}, "either strength"),
        ({"strength": -1}, "strength=-1"),
        ({"strength": "auto"}, "strength='auto'"),
        ({"hard": 1.5}, "hard=1.5"),
        ({"strength": 1, "every_n_steps": 0}, "every_n_steps=0"),
        ({"strength": 1, "safety_dataset": ROWS}, "either safety_dataset"),
        ({"strength": 1, "ordinary_dataset": ROWS}, "no effect"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, said, profile):
    with pytest.raises(ConfigurationError, match=said):
        ProjectedTraining(profile=profile, **settings)


def test_it_cannot_project_what_it_has_not_seen_start(profile):
    with pytest.raises(BaseWeightsError, match="before train"):
        ProjectedTraining(profile=profile, hard=0.1).on_train_end(None, None, None)
