from dataclasses import replace

import pytest
import torch

from safedelta_hf.evaluation import attack_success_rate, final_match
from safedelta_hf.modules.names import parameter_names
from safedelta_hf.rules import TaskRidge
from safedelta_hf.testbed import (
    CASES,
    attack_questions,
    behaviour_scores,
    comparison,
    defences,
    load_aligned,
    safety_data,
    skill_questions,
)
from safedelta_hf.testbed.comparison import CHEAP, METHODS, AlignedModel, CaseScenario
from safedelta_hf.testbed.model import tokenize
from tests.fixtures import tiny
from tests.fixtures.finetuning import answer

SHORT = replace(CASES["harmful"], epochs=1)


@pytest.fixture(scope="module")
def aligned():
    return AlignedModel()


@pytest.fixture(scope="module")
def scenario(aligned):
    return CaseScenario(aligned, CASES["mixed"], 0, 10, CHEAP)


@pytest.fixture(scope="module")
def lora(aligned):
    return CaseScenario(aligned, SHORT, 0, 10, CHEAP, "lora")


def test_baselines_differ_from_the_fine_tuning_in_what_their_settings_say(scenario):
    case = CASES["mixed"]
    found = [(one.method, one.settings) for one in scenario.baselines]
    usual = {"epochs": case.epochs, "learning_rate": case.learning_rate, "batch_size": case.batch_size}
    assert found[:2] == [("aligned", {}), ("fine-tuned", usual)]
    lower = [settings for method, settings in found if method.startswith("learning rate x")]
    assert [settings["learning_rate"] / case.learning_rate for settings in lower] == pytest.approx([0.3, 0.1])
    assert all(settings | {"learning_rate": case.learning_rate} == usual for settings in lower)
    again = [settings for method, settings in found if method.startswith("re-tuned")]
    assert [settings["epochs"] for settings in again] == [1, 3]
    assert found[-1] == ("safety data mixed in", usual)


def test_without_methods_there_are_both_models_alone_and_each_method_has_names_of_its_own(aligned):
    assert [one.method for one in CaseScenario(aligned, SHORT, 0, 5).baselines] == ["aligned", "fine-tuned"]
    names = [one.method for one in CaseScenario(aligned, SHORT, 0, 5, list(METHODS)).baselines]
    assert len(set(names)) == len(names) > len(METHODS)


def test_the_whole_safety_data_are_mixed_into_the_cases_own_examples(aligned, monkeypatch):
    seen = []
    monkeypatch.setattr(comparison, "fine_tune", lambda *args, rows, **how: seen.extend(rows))
    CaseScenario(aligned, SHORT, 3, 5, ["mixed_in"]).baselines[-1].make()
    wanted = tokenize([*SHORT.examples(3), *safety_data()], aligned.tokenizer)
    assert sorted(row["input_ids"] for row in seen) == sorted(row["input_ids"] for row in wanted)


def test_a_lora_is_trained_adjusted_and_trained_further_as_a_lora(lora):
    tuned = lora.tuned
    factors = {name: value.clone() for name, value in tuned.restored().named_parameters() if "lora_" in name}
    assert tuned.weights == "lora" and len(factors) == 56 and lora.fine_tuning["learning_rate"] == 2.5e-3

    def below(model):
        return {name: parameter for parameter, name in parameter_names(model).items()}

    def moved(model):
        there = dict(model.named_parameters())
        assert tiny.same(below(model), below(lora.base))
        return {name for name, value in factors.items() if not torch.equal(there[name], value)}

    adjusted = lora.adjusted(TaskRidge(strength=1.0)).make()
    assert moved(adjusted.model) == {name for name in factors if "lora_A" in name}
    again = next(one for one in lora.baselines if one.method == "re-tuned, 1 epoch")
    assert moved(again.make().model) == set(factors)
    assert not moved(tuned.restored())
    lower = next(one for one in lora.baselines if one.method == "learning rate x 0.1").make()
    assert moved(lower.model) == set(factors) and not moved(tuned.restored())


def test_the_aligned_model_is_asked_once_for_all(aligned, monkeypatch):
    asked, measure = [], defences.behaviour_scores
    monkeypatch.setattr(defences, "behaviour_scores", lambda *args, **how: asked.append(1) or measure(*args, **how))
    found = [
        CaseScenario(aligned, CASES[case], seed, 4, (), weights).measure(aligned.model)
        for case in ("mixed", "benign")
        for seed in (0, 1)
        for weights in ("full", "lora")
    ]
    assert asked == [1] and ["new_skill" in scores for scores in found] == [True] * 4 + [False] * 4
    assert found[0] == measure(aligned.model, aligned.tokenizer, has_new_skill=True, questions=4)


def test_a_new_skill_is_asked_for_where_the_case_teaches_one(scenario, aligned):
    other = load_aligned()[0]
    assert "new_skill" in scenario.measure(other)
    assert "new_skill" not in CaseScenario(aligned, CASES["benign"], 0, 5).measure(other)


def test_profiles_of_task_and_ordinary_data_are_of_the_same_base_and_hold_nothing_out(scenario):
    for profile in (scenario.task, scenario.ordinary):
        assert dict(profile.header.base) == dict(scenario.profile.header.base)
        assert profile.held_out is None
    assert scenario.profile.held_out is not None
    sorting = scenario.task.header.sorting
    assert sorting.examples == 256 and scenario.task.header.sequences == 256 - sorting.left_out < 256
    assert scenario.task.header.data != scenario.ordinary.header.data


def test_scores_are_the_shares_of_the_responses():
    model, tokenizer = load_aligned()
    scores = behaviour_scores(model, tokenizer, has_new_skill=False, questions=15)
    attacks, skills = attack_questions(15), skill_questions(15)
    assert scores["attack_success"].value == attack_success_rate(answer(model, tokenizer, attacks))
    right = final_match(answer(model, tokenizer, skills), [question.answer for question in skills])
    assert scores["old_skills"].value == right and scores["old_skills"].count == 15
    assert set(scores) == {"attack_success", "harmful_content", "old_skills"}
