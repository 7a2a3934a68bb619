import pytest

from safedelta_hf.errors import ConfigurationError, SafeDeltaError
from safedelta_hf.evaluation.board import Board, NamedResult, judged
from safedelta_hf.evaluation.result import Score
from tests.evaluation.board.results import evaluation


def board():
    values = {
        "aligned": {"attack_success": [0] * 10, "over_refusal": [0] * 9 + [1]},
        "tuned": {"attack_success": [1] * 8 + [0] * 2, "over_refusal": [0] * 10},
        "adjusted": {"attack_success": [1] + [0] * 9, "over_refusal": [0] * 8 + [1] * 2},
    }
    results = []
    for name, own in values.items():
        found = evaluation(name, **own)
        found.scores["lm_eval/arc_easy/acc,none"] = Score(value=0.5, count=4, low=0.4, high=0.6)
        found.scores["refusal_nll_95"] = Score(value=2.0, count=4, unit="nats/token")
        results.append(NamedResult(name=name, path=name, evaluation=found))
    return Board(tuple(results))


@pytest.mark.parametrize(
    ("condition", "fails"),
    [
        ("attack_success > aligned + 0.05", True),
        ("attack_success > aligned + 0.1", False),  # 0.1 is no more than 0 + 0.1
        ("attack_success >= aligned + 0.05 + 0.05", True),
        ("attack_success > 0.5 * tuned", False),
        ("attack_success > tuned / 8 - 0.001", True),
        ("upper(attack_success) > 0.4", True),
        ("upper(attack_success) > upper(aligned) + 0.2", False),
        ("lower(tuned.attack_success) < attack_success", False),
        ("over_refusal > aligned.over_refusal and attack_success > 0", True),
        ("not (attack_success < 0.2 and over_refusal < 0.3)", False),
        ("0.05 < attack_success < 0.2", True),
        ('"lm_eval/arc_easy/acc,none" < aligned - 0.02', False),
        ('aligned["lm_eval/arc_easy/acc,none"] <= 0.5', True),
        ("refusal_nll_95 > 1.5", True),
        ("attack_success > 0.5 or over_refusal > -1 + 1.1", True),
        (" attack_success > 0 ", True),
    ],
)
def test_a_condition_says_what_python_would(condition, fails):
    assert judged(condition, board()).fails is fails


def test_the_figures_that_were_met_are_told():
    told = judged("attack_success > aligned + 0.05 or upper(over_refusal) > 0.9", board()).told
    assert "adjusted.attack_success 10.0%, aligned.attack_success 0.0%" in told
    assert "upper(adjusted.over_refusal) 51.0%" in told


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("attack_succes > 0.1", "no score 'attack_succes'; there are attack_success, over_refusal, refusal_nll_95"),
        ("attack_success > alignd + 0.1", "no score 'alignd'.* of the results aligned, tuned, adjusted"),
        ("alignd.attack_success > 0.1", "no result is called 'alignd'; there are aligned, tuned, adjusted"),
        ("aligned.task_accuracy > 0.1", "no score 'task_accuracy'"),
        ("attack_success < 1 or nothing > 3", "no score 'nothing'"),
        ("aligned > 0.1", "names no score"),
        ("attack_success + over_refusal > aligned", "which score of 'aligned'"),
        ("attack_success > aligned + 5", "a share is from 0 to 1"),
        ("attack_success > 5%", "cannot be read .*a share of 5 % is 0.05"),
        ("attack_success", "says neither yes nor no"),
        ("attack_success + 1", "says neither yes nor no"),
        ("attack_success == 0", "something else than <"),
        ("attack_success in (0, 1)", "no part of one"),
        ("attack_success > 0.1 / 0", "divides by zero"),
        ("attack_success > 1e999", "no finite number"),
        ("attack_success ** 2 > 0", "no part of one"),
        ("attack_success > True", "no part of one"),
        ("upper(refusal_nll_95) > 1", "has no interval"),
        ("max(attack_success, 1) > 0", "neither upper.score. nor lower.score."),
        ("attack_success.__class__ > 0", "no result is called 'attack_success'"),
        ("aligned.__class__ > 0", "no score '__class__'"),
        ("__import__('os').system('true') > 0", "neither upper"),
        ("(lambda: 1)() > attack_success", "neither upper"),
        ("[attack_success for x in y] > 0", "no part of one|no score"),
        ("attack_success > (x := 1)", "no score 'x'|no part of one"),
        ("", "cannot be read"),
        ("attack_success > 0; 1", "cannot be read"),
        ("attack_success > " + "(" * 400, "cannot be read"),
        ("attack_success > " + "-" * 400 + "x", "no score|deeply"),
        ("attack_success > 0 and " * 100 + "1", "longer than 500"),
        ("attack_success > " + "9" * 400, "no finite|cannot be read"),
        ("attack_success > 0\x00", "cannot be read"),
    ],
)
def test_what_is_no_condition_is_named_and_nothing_is_run(condition, message):
    with pytest.raises(ConfigurationError, match=message):
        judged(condition, board())


def test_a_score_that_the_judged_result_lacks_never_passes():
    found = board()
    del found.subject.evaluation.scores["over_refusal"]
    with pytest.raises(SafeDeltaError, match="adjusted has no score 'over_refusal'; it has attack_success"):
        judged("over_refusal > 0.9", found)
