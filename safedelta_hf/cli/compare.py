"""`safedelta compare`: rules, strengths and other methods, on the testbed's cases or on one model of the user's."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from safedelta_hf.cli.options import (
    CASE_NAMES,
    CHEAP_METHOD_NAMES,
    METHOD_NAMES,
    ORDINARY_WEIGHT,
    RULE_HELP,
    RULE_NAMES,
    SORT_TASK_HELP,
    TRAINED_NAMES,
    load_function,
    one_line_errors,
    parsed_strength,
    quieten_libraries,
    require_one_of,
)
from safedelta_hf.errors import ConfigurationError, figures_needed, how_to_install
from safedelta_hf.folders import write_whole
from safedelta_hf.report.printing import printed, written

if TYPE_CHECKING:
    from safedelta_hf.compare import Candidates, ComparisonFile, Scenario

TABLE: Final = "comparison.md"

QUESTIONS: Final = 200
MAX_NEW_TOKENS: Final = 128
BATCH_SIZE: Final = 8
SEEDS: Final = (0, 1, 2)
SEED_LIMIT: Final = 2**32 - 1

TESTBED_OPTIONS: Final = ("case", "seed", "weights", "questions", "method")
OWN_OPTIONS: Final = (
    "base",
    "tuned",
    "safety_data",
    "harmful",
    "benign",
    "task_questions",
    "score",
    "task_data",
    "ordinary_data",
    "max_new_tokens",
    "batch_size",
)
REQUIRED: Final = ("tuned", "safety_data", "harmful")

_ON_TESTBED: Final = "On the testbed"
_OF_OWN: Final = "On a model of your own"

RuleNames = Annotated[list[str] | None, typer.Option(help=f"{RULE_HELP} May be repeated; default all.")]
Strengths = Annotated[
    list[str] | None,
    typer.Option(
        help="A number, or 'auto'. May be repeated; default 'auto', and the rule's own where that is a number "
        "(the published one)."
    ),
]
Grid = Annotated[int, typer.Option(help="Strengths besides, spread over each rule's range.", min=0)]
OrdinaryWeight = Annotated[
    float | None,
    typer.Option(
        help=f"Weight of ordinary data, compared with none; default none, with --ordinary-data {ORDINARY_WEIGHT:g}.",
        min=0,
    ),
]
Cases = Annotated[
    list[str] | None,
    typer.Option(help=f"{', '.join(CASE_NAMES)}. May be repeated; default all.", rich_help_panel=_ON_TESTBED),
]
Seeds = Annotated[
    list[int] | None,
    typer.Option(help="May be repeated; default 0, 1, 2.", min=0, max=SEED_LIMIT, rich_help_panel=_ON_TESTBED),
]
Trained = Annotated[
    list[str] | None,
    typer.Option(
        help=f"What is trained: {', '.join(TRAINED_NAMES)}. May be repeated; default both.", rich_help_panel=_ON_TESTBED
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        help=f"What rules are compared with: {', '.join(METHOD_NAMES)}; 'all' or 'none'. May be repeated; "
        f"default {', '.join(CHEAP_METHOD_NAMES)}.",
        rich_help_panel=_ON_TESTBED,
    ),
]


def _count(text: str, panel: str = _OF_OWN) -> Any:  # noqa: ANN401 - what Annotated takes
    return typer.Option(help=text, min=1, rich_help_panel=panel)


def _own(text: str) -> Any:  # noqa: ANN401 - what Annotated takes
    return typer.Option(help=text, rich_help_panel=_OF_OWN)


def comparison(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option(help="Folder for results.jsonl, tables and figures; a killed run goes on there.")
    ],
    rule: RuleNames = None,
    strength: Strengths = None,
    grid: Grid = 0,
    ordinary_weight: OrdinaryWeight = None,
    sort_task: Annotated[bool, typer.Option(help=SORT_TASK_HELP)] = True,
    case: Cases = None,
    seed: Seeds = None,
    weights: Trained = None,
    questions: Annotated[int | None, _count(f"Of each kind; default {QUESTIONS}.", _ON_TESTBED)] = None,
    method: Methods = None,
    base: Annotated[
        str | None, _own("Name or folder of the base model; default the one that an adapter names.")
    ] = None,
    tuned: Annotated[str | None, _own("Folder of the fine-tuned model, or of an adapter.")] = None,
    safety_data: Annotated[Path | None, _own("Harmful prompts with refusals, for the profile.")] = None,
    harmful: Annotated[Path | None, _own("Requests that should be refused, to ask.")] = None,
    benign: Annotated[Path | None, _own("Requests that only look harmful, to ask.")] = None,
    task_questions: Annotated[Path | None, _own("Questions of the task, to ask; needs --score.")] = None,
    score: Annotated[str | None, _own("module:function of (response, row), from 0 to 1.")] = None,
    task_data: Annotated[Path | None, _own("Examples of the fine-tuning data, for the profile.")] = None,
    ordinary_data: Annotated[Path | None, _own("Ordinary prompts with the base's responses.")] = None,
    max_new_tokens: Annotated[int | None, _count(f"Length limit of a response; default {MAX_NEW_TOKENS}.")] = None,
    batch_size: Annotated[int | None, _count(f"Prompts per forward pass; default {BATCH_SIZE}.")] = None,
) -> None:
    """Compare rules, and other methods, by attack success and by what a model can still do: JSON, tables, figures.

    Without --tuned on the testbed: each case is fine-tuned with each seed, all weights and a LoRA.
    """
    with one_line_errors():
        with figures_needed():  # told before the work
            import matplotlib  # noqa: F401
        own = _own_options(context.params)
        for name in rule or ():
            require_one_of(RULE_NAMES, name, "--rule")
        for given, known, option in (
            (case, CASE_NAMES, "--case"),
            (weights, TRAINED_NAMES, "--weights"),
            (method, (*METHOD_NAMES, "all", "none"), "--method"),
        ):
            for name in given or ():
                require_one_of(known, name, option)
        strengths = None if strength is None else [parsed_strength(text) for text in strength]
        from safedelta_hf.compare import choose_candidates  # takes seconds

        quieten_libraries()
        candidates = choose_candidates(
            rule or RULE_NAMES,
            strengths,
            _ordinary_weights(ordinary_weight, own),
            has_task=not own or own["task_data"] is not None,
            steps=grid,
        )
        for name, reason in candidates.left_out.items():
            typer.echo(printed(f"{name} takes no part: {reason}"), nl=False)
        if own:
            scenarios, file = _of_files(own, output, sort_task=sort_task)
        else:
            scenarios, file = _of_testbed(context.params, output)
        _finish(scenarios, candidates, file, output)


def _own_options(given: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: given[name] for name in OWN_OPTIONS}
    if all(value is None for value in own.values()):
        return {}
    _refuse([name for name in TESTBED_OPTIONS if given[name]], "on the testbed alone, without --tuned")
    _refuse([name for name in REQUIRED if own[name] is None], "needed to compare rules on a model of your own")
    return own


def _refuse(options: Sequence[str], reason: str) -> None:
    if options:
        raise ConfigurationError(f"{', '.join('--' + name.replace('_', '-') for name in options)}: {reason}")


def _of_testbed(given: Mapping[str, Any], output: Path) -> "tuple[list[Scenario], ComparisonFile]":
    cases, trained = dict.fromkeys(given["case"] or CASE_NAMES), dict.fromkeys(given["weights"] or TRAINED_NAMES)
    if "lora" in trained and find_spec("peft") is None:  # told now, and not after the half of the work
        raise ConfigurationError(f"--weights lora needs PEFT; {how_to_install('peft')}, or choose --weights full")
    methods, questions = _methods(given["method"] or CHEAP_METHOD_NAMES), given["questions"] or QUESTIONS
    from safedelta_hf.compare import ComparisonFile, Scenario  # takes seconds
    from safedelta_hf.evaluation import model_digest
    from safedelta_hf.rules import default_rule
    from safedelta_hf.testbed import CASES
    from safedelta_hf.testbed.comparison import UTILITIES, CaseScenario
    from safedelta_hf.testbed.defences import AlignedModel

    aligned = AlignedModel()
    digest = model_digest(aligned.model, aligned.tokenizer)
    made_with = {"aligned": digest, "questions": questions, "sort_task": given["sort_task"]}
    file = ComparisonFile(
        output, made_with=made_with, utilities=UTILITIES, command=_command(), default=default_rule(cases)
    )
    scenarios = [
        CaseScenario(aligned, CASES[case], seed, questions, methods, weights, sort_task=given["sort_task"])
        for weights in trained
        for case in cases
        for seed in dict.fromkeys(given["seed"] or SEEDS)
    ]
    return list[Scenario](scenarios), file


def _methods(names: Sequence[str]) -> list[str]:
    if "all" in names:
        return list(METHOD_NAMES)
    return [name for name in dict.fromkeys(names) if name != "none"]


def _of_files(own: Mapping[str, Any], output: Path, *, sort_task: bool) -> "tuple[list[Scenario], ComparisonFile]":
    from safedelta_hf.compare import ComparisonFile, ModelScenario  # takes seconds
    from safedelta_hf.compare.scenarios import UTILITIES
    from safedelta_hf.evaluation import Questions
    from safedelta_hf.evaluation.questions import EvaluationSettings
    from safedelta_hf.modules.loading import load_base, load_model, source_of
    from safedelta_hf.rules import default_rule

    # Everything that is small is read before anything that is large.
    score = None if own["score"] is None else load_function(own["score"], "--score")
    questions = Questions.read(harmful=own["harmful"], benign=own["benign"], task=own["task_questions"], score=score)
    read = source_of(own["tuned"], "--tuned", own["base"])
    if own["base"] is None and read.adapter is None:
        _refuse(["base"], "needed to compare rules on a model of your own, unless --tuned is an adapter that names it")
    tuned, tokenizer = load_model(own["tuned"], "--tuned", base=own["base"])
    if own["base"] is None:
        base = load_base(read, f"--tuned {own['tuned']!r}", device_map="auto")
    else:
        base, _ = load_model(own["base"], "--base", merged=True)
    settings = EvaluationSettings(
        max_new_tokens=own["max_new_tokens"] or MAX_NEW_TOKENS, batch_size=own["batch_size"] or BATCH_SIZE
    )
    data = {name: own[name] for name in ("safety_data", "task_data", "ordinary_data")}
    name = Path(own["tuned"]).resolve().name
    scenario = ModelScenario(name, base, tuned, tokenizer, questions, settings=settings, sort_task=sort_task, **data)
    file = ComparisonFile(
        output,
        made_with=scenario.made_with,
        utilities=UTILITIES,
        command=_command(),
        default=default_rule(own["task_data"]),
    )
    return [scenario], file


def _finish(scenarios: "Sequence[Scenario]", candidates: "Candidates", file: "ComparisonFile", output: Path) -> None:
    from safedelta_hf.compare import compare, draw, markdown  # takes seconds
    from safedelta_hf.compare.points import RESULTS
    from safedelta_hf.testbed import CASES

    compare(scenarios, candidates, file)
    text = markdown(file)
    write_whole(output / TABLE, text)
    figures = draw(file, output, {name: case.description for name, case in CASES.items()})
    typer.echo(text)
    typer.echo(written(output / RESULTS, output / TABLE, *figures))


def _ordinary_weights(given: float | None, own: Mapping[str, Any]) -> list[float]:
    has_ordinary = not own or own["ordinary_data"] is not None
    if given and not has_ordinary:
        raise ConfigurationError("--ordinary-weight has no effect without --ordinary-data")
    weight = given if given is not None else ORDINARY_WEIGHT if own and has_ordinary else 0.0
    return [0.0, weight] if weight else [0.0]


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
