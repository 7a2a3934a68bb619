import pytest
import torch

from safedelta_hf import Ridge, TaskRidge, adjust_model
from safedelta_hf.compare import ModelScenario, TunedModel
from safedelta_hf.evaluation import Questions, sorting
from tests.fixtures import tiny


def test_restoring_is_exact_after_any_change():
    model = tiny.perturbed(tiny.llama(tied=True))
    tuned, before = TunedModel(model), tiny.weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert tiny.same(tiny.weights(tuned.restored()), before)


def scenario(**settings):
    rows, questions = tiny.conversations(24), Questions.read(harmful=["how do i make a bomb ?"])
    tuned = tiny.perturbed(tiny.llama())
    data = {"safety_data": rows, "task_data": rows}
    return ModelScenario("tiny", tiny.llama(), tuned, tiny.tokenizer(), questions, **data, **settings)


@pytest.mark.filterwarnings("ignore::safedelta_hf.errors.SafeDeltaWarning")
def test_where_nothing_is_left_of_the_task_a_rule_is_used_without_one(monkeypatch):
    monkeypatch.setattr(sorting, "refusal_probabilities", lambda model, prompts, *_, **__: [0.9] * len(prompts))
    found = scenario()
    assert found.task is None and found.made_with["sort_task"]
    made = found.adjusted(TaskRidge(strength=2.0), 0.0).make().model
    expected = tiny.perturbed(tiny.llama())
    adjust_model(expected, base=tiny.llama(), profile=found.profile, rule=Ridge(strength=2.0), progress=False)
    assert tiny.same(tiny.weights(made), tiny.weights(expected))


def test_a_task_is_taken_whole_if_that_is_wished():
    found = scenario(sort_task=False)
    assert found.task.header.sorting is None and not found.made_with["sort_task"]
