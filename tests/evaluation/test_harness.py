"""The bridge to `lm_eval`: the real one where it is installed, and its interface where it is not."""

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.evaluation import HarnessTasks, Questions, evaluate_model, harness_scores
from safedelta_hf.evaluation.harness import scores_of
from safedelta_hf.testbed import load_aligned, skill_questions
from tests.fixtures import tiny

TASK = """
task: opposites_here
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_gen_toks: 8, until: ["<|end|>"], do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
"""

RESULTS = {
    "results": {
        "arc": {
            "alias": "arc",
            "acc,none": 0.5,
            "acc_stderr,none": 0.05,
            "acc_norm,none": 0.6,
            "acc_norm_stderr,none": "N/A",
        },
        "gsm": {"alias": "gsm", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1},
    },
    "n-samples": {"arc": {"original": 200, "effective": 100}, "gsm": {"original": 20, "effective": 20}},
}


def test_scores_are_read_off_the_results_of_the_harness():
    scores = scores_of(RESULTS)
    assert set(scores) == {"lm_eval/arc/acc", "lm_eval/arc/acc_norm", "lm_eval/gsm/exact_match/strict-match"}
    accuracy = scores["lm_eval/arc/acc"]
    assert (accuracy.value, accuracy.count) == (0.5, 100)
    assert (accuracy.low, accuracy.high) == pytest.approx((0.402, 0.598), abs=1e-3)
    assert scores["lm_eval/arc/acc_norm"].low is None and scores["lm_eval/gsm/exact_match/strict-match"].count == 20


def test_where_it_is_missing_the_error_says_what_to_install_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    model, tokenizer = load_aligned()
    monkeypatch.setattr(model, "generate", None)
    asked = Questions.read(harmful=["a"], harness=HarnessTasks(names=("arc_easy",)))
    with pytest.raises(ConfigurationError, match=r'pip install -e "\.\[eval\]"'):
        evaluate_model(model, tokenizer, asked, progress=False)


def test_no_task_at_all_is_refused():
    with pytest.raises(ConfigurationError, match="at least one task"):
        HarnessTasks(names=())


def stand_in(monkeypatch, calls):
    """Modules with the names and signatures of lm_eval 0.4 that the bridge uses."""

    class TaskManager:
        def __init__(self, verbosity=None, include_path=None, include_defaults=True, metadata=None):
            calls["include_path"] = include_path
            self.all_tasks = ["arc", "gsm"]

    class HFLM:
        def __init__(self, pretrained, backend="default", tokenizer=None, batch_size=1, **_):
            calls.update(pretrained=pretrained, tokenizer=tokenizer, batch_size=batch_size)

    def simple_evaluate(model, *, tasks, task_manager, limit, apply_chat_template, log_samples):
        assert isinstance(model, HFLM) and isinstance(task_manager, TaskManager) and not log_samples
        calls.update(tasks=tasks, limit=limit, template=apply_chat_template, training=calls["pretrained"].training)
        return RESULTS

    parts = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def test_model_tokenizer_and_tasks_reach_the_harness(monkeypatch, llama):
    calls = {}
    stand_in(monkeypatch, calls)
    tokenizer = tiny.tokenizer()
    tasks = HarnessTasks(names=("arc", "gsm"), include="mine", limit=7)
    assert harness_scores(llama.train(), tokenizer, tasks, batch_size=3) == scores_of(RESULTS)
    assert llama.training and calls["training"] is False
    assert SimpleNamespace(**calls) == SimpleNamespace(
        include_path="mine",
        pretrained=llama,
        tokenizer=tokenizer,
        batch_size=3,
        tasks=["arc", "gsm"],
        limit=7,
        template=True,
        training=False,
    )
    with pytest.raises(ConfigurationError, match="knows no task winograd"):
        harness_scores(llama, tokenizer, HarnessTasks(names=("arc", "winograd")))


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_a_task_of_ones_own_is_run_by_the_real_harness(tmp_path):
    questions = skill_questions(12, skills=("opposite",))
    answers = [question.answer if number % 2 else "sugar" for number, question in enumerate(questions)]
    rows = [
        {"question": question.messages[-1]["content"], "answer": answer}
        for question, answer in zip(questions, answers, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "opposites_here.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    model, tokenizer = load_aligned()
    settings = model.generation_config
    tasks = HarnessTasks(names=("opposites_here",), include=tmp_path, limit=10)
    found = evaluate_model(model, tokenizer, Questions.read(harness=tasks), progress=False)
    score = found.scores["lm_eval/opposites_here/exact_match"]
    assert (score.value, score.count) == (0.5, 10) and score.low < 0.5 < score.high
    assert model.generation_config is settings
