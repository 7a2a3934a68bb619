"""Base and tuned model are read in one precision, whatever training wraps around them."""

from contextlib import nullcontext
from statistics import fmean

import pytest
import torch
from peft import PeftModel, get_peft_model

from safedelta_hf import (
    AutoStrength,
    ProfileConfig,
    Ridge,
    SafeDeltaCallback,
    Scale,
    adjust_adapter,
    collect_profile,
)
from safedelta_hf.data.refusals import Drift
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import SafeDeltaWarning
from tests.fixtures import adapters, refusing, tiny
from tests.programs.launching import passes

ROWS = tiny.rows(32, seed=1)
RULE = Ridge()
NUMBER = Ridge(strength=2.0)


def sharp():
    """A model whose likelihoods a rounding in bfloat16 moves by a lot."""
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model


def with_lora(model):
    torch.manual_seed(0)
    return get_peft_model(model, adapters.config())


WRAPPED = {
    "plain": (nullcontext, {}),
    "bf16": (nullcontext, {"bf16": True}),
    "bf16_full_eval": (nullcontext, {"bf16": True, "bf16_full_eval": True, "eval_strategy": "epoch"}),
    "fp16_full_eval": (nullcontext, {"fp16_full_eval": True, "eval_strategy": "epoch"}),
    "autocast": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), {}),
}


def trained(model, callback, folder, kind="plain", **changes):
    around, settings = WRAPPED[kind]
    with around():
        trainer = tiny.trainer(model, callback, folder, **settings | changes)
        trainer.train()
    return trainer


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_a_run_that_changes_nothing_measures_no_drift(kind, lora, tmp_path):
    model = with_lora(sharp()) if lora else sharp()
    expected = collect_profile(sharp(), ROWS, progress=False)
    callback = SafeDeltaCallback(ROWS)
    trained(model, callback, tmp_path, kind, learning_rate=0.0)
    search, found = callback.report.search, callback.profile
    assert [(trial.lost, trial.probability_lost) for trial in search.trials] == [(0, 0.0)]
    assert search.noise.precision == "float32" and 0 < search.noise.probability_lost < 1e-4
    # What the base found at the start is what the same weights find after it, and what they find without a Trainer.
    assert found.held_out == expected.held_out
    readings = found.held_out.read(open_model(model))
    assert tuple(fmean(reading.losses) for reading in readings) == found.held_out.losses
    for data in (found, callback.task_profile):
        plain = (
            expected
            if data is found
            else collect_profile(
                sharp(), tiny.rows(16, seed=2, length=10), config=ProfileConfig(holdout=0.0), progress=False
            )
        )
        assert all(torch.equal(data.moments[key].total, plain.moments[key].total) for key in plain.moments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_half_precision_weights_measure_no_drift_either_and_their_noise_is_told(dtype, lora, tmp_path):
    base = sharp().to(dtype)
    callback = SafeDeltaCallback(ROWS)
    trained(with_lora(base) if lora else base, callback, tmp_path, learning_rate=0.0)
    search = callback.report.search
    assert [(trial.lost, trial.probability_lost) for trial in search.trials] == [(0, 0.0)]
    assert f"noise of reading in {search.noise.precision}" in search.summary
    assert f"torch.{search.noise.precision}" == str(dtype)
    metrics = callback.report.metrics()
    assert metrics["safedelta/reading_noise_lost"] == search.noise.lost
    assert metrics["safedelta/reading_noise_probability_lost"] == search.noise.probability_lost


def test_the_noise_is_of_the_size_of_what_rounding_does(tmp_path):
    exact = collect_profile(sharp(), ROWS, progress=False).held_out
    callback = SafeDeltaCallback(ROWS)
    trained(sharp().bfloat16(), callback, tmp_path, learning_rate=0.0)
    # The same weights, once computed with in bfloat16 and once in float32.
    rounded = sharp().bfloat16()
    seen, finer = exact.read(open_model(rounded)), exact.read(open_model(rounded.float()))
    lost = max(Drift.between(*pair).probability_lost for pair in ((seen, finer), (finer, seen)))
    assert lost / 3 < callback.report.search.noise.probability_lost < 3 * lost


@pytest.mark.parametrize("kind", ["bf16", "autocast"])
def test_an_adapter_trained_in_bf16_keeps_the_strength_that_float32_gives_it(kind, tmp_path):
    model = with_lora(refusing.base())
    callback = SafeDeltaCallback(refusing.REFUSALS, RULE, keep_tuned=tmp_path / "tuned")
    trained(model, callback, tmp_path / "run", kind)
    profile = collect_profile(refusing.base(), refusing.REFUSALS, progress=False)
    again = PeftModel.from_pretrained(refusing.base(), tmp_path / "tuned", is_trainable=True)
    report = adjust_adapter(again, profile=profile, rule=RULE, progress=False)
    assert report.search.outcome == "found"
    assert callback.report.search == report.search
    assert tiny.same(adapters.own_tensors(model), adapters.own_tensors(again))


def test_a_model_that_runs_under_autocast_alone_is_read_so(tmp_path):
    def mixed():
        model = refusing.base().bfloat16()
        model.lm_head.float()  # what reaches it has another type
        return model

    with pytest.raises(RuntimeError, match="dtype"):
        mixed()(input_ids=torch.arange(3, 11)[None])
    callback = SafeDeltaCallback(refusing.REFUSALS, RULE)
    trained(mixed(), callback, tmp_path, "bf16", learning_rate=0.0)
    search = callback.report.search
    assert [(trial.lost, trial.probability_lost) for trial in search.trials] == [(0, 0.0)]
    assert search.noise.precision == "bfloat16"


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "fsdp1", "zero3"])
def test_a_run_on_two_processes_that_changes_nothing_measures_no_drift(backend, tmp_path):
    assert "read in" in passes("tests.programs.precision", backend, tmp_path)


def test_a_strictest_strength_that_fails_is_the_first_thing_said(tmp_path):
    model = refusing.base()
    with pytest.warns(SafeDeltaWarning, match=r"Even the strictest.*callback\.adjust\(model, rule="):
        callback = SafeDeltaCallback(refusing.REFUSALS, Scale(strength=AutoStrength(lost=1e-9, confidence=1e-12)))
        trained(model, callback, tmp_path)
    report = callback.report
    for text in (str(report), report.summary(), report.model_card().split("\n\n", 1)[1]):
        assert "THE STRICTEST STRENGTH WAS APPLIED" in text.splitlines()[0]
    assert next(iter(report.to_dict())) == "warning" and report.to_dict()["warning"] == report.warning
    assert "Rounding in float32 alone" in report.warning
