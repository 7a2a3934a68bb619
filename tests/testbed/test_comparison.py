import pytest

from safedelta_hf.evaluation import attack_success_rate, final_match
from safedelta_hf.testbed import CASES, attack_questions, behaviour_scores, load_aligned, skill_questions
from safedelta_hf.testbed.comparison import AlignedModel, CaseScenario
from tests.fixtures.finetuning import answer


@pytest.fixture(scope="module")
def scenario():
    return CaseScenario(AlignedModel(), CASES["mixed"], 0, 10)


def test_baselines_differ_from_the_fine_tuning_in_what_their_settings_say(scenario):
    case = CASES["mixed"]
    found = [(one.method, one.settings) for one in scenario.baselines]
    usual = {"epochs": case.epochs, "learning_rate": case.learning_rate, "batch_size": case.batch_size}
    assert found[:2] == [("aligned", {}), ("fine-tuned", usual)]
    lower = [settings for method, settings in found if method == "lower learning rate"]
    assert [settings["learning_rate"] / case.learning_rate for settings in lower] == pytest.approx([0.3, 0.1])
    assert all(settings | {"learning_rate": case.learning_rate} == usual for settings in lower)
    again = [settings for method, settings in found if method == "re-tuned"]
    assert [settings["epochs"] for settings in again] == [1, 3]


def test_a_new_skill_is_asked_for_where_the_case_teaches_one(scenario):
    assert "new_skill" in scenario.measure(scenario.base)
    assert "new_skill" not in CaseScenario(AlignedModel(), CASES["benign"], 0, 5).measure(scenario.base)


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
