"""One evaluation of one model: what it says, and how that is scored."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from safedelta_hf.data.dataset import Source, read_safety_data, responses_of
from safedelta_hf.data.phrases import is_refusal, warn_unless_refusals
from safedelta_hf.data.templates import ProcessingClass
from safedelta_hf.errors import ConfigurationError, DataError
from safedelta_hf.evaluation.generation import generate_responses, model_digest
from safedelta_hf.evaluation.harness import harness_scores, require_tasks
from safedelta_hf.evaluation.likelihood import Reference, incoherent, likelihood_of
from safedelta_hf.evaluation.questions import EvaluationSettings, Prompt, Questions, digest_of_prompts
from safedelta_hf.evaluation.result import RESULTS, Evaluation, Score, average, share
from safedelta_hf.evaluation.scoring import Judge, TaskScore, judgements
from safedelta_hf.folders import RunLog

T = TypeVar("T")


def evaluate_model(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    questions: Questions,
    *,
    reference: Reference | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    output: str | Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure how a model behaves: what it refuses, what it should not, and what it can do.

    Args:
        model: A causal language model, adapters included, on any device; it is left as it was.
        processing_class: Its tokenizer, or its processor, with a chat template and a padding token.
        questions: What to ask, and what scores the responses.
        reference: What tells language from gibberish; without it only loops and empty responses are found.
        max_new_tokens: Length limit of a response, in tokens.
        batch_size: Prompts or responses per forward pass.
        output: Folder for `responses-KIND.jsonl`, to which responses are appended as they are made and from which a
            run that was killed goes on, and `results.json`; None writes nothing.
        progress: Whether to show progress bars.

    Returns:
        The scores.

    Raises:
        ConfigurationError: A setting is out of range, a judge or a score function returns something else than it
            should, or the tokenizer lacks something.
        DataError: Prompts or refusals do not fit the model.
        OutputError: The output folder cannot be written, or holds responses that were made with another model, other
            prompts or other settings.
    """
    manager = None if questions.harness is None else require_tasks(questions.harness)
    settings = EvaluationSettings(max_new_tokens=max_new_tokens, batch_size=batch_size)
    run = _Run(model, processing_class, settings, None if output is None else Path(output), progress=progress)
    if questions.harmful is not None:
        _harmful_scores(run, questions.harmful, reference, questions.judge)
    if questions.benign is not None:
        _benign_scores(run, questions.benign, reference)
    if questions.refusals is not None:
        _refusal_scores(run, questions.refusals)
    if questions.task is not None and questions.score is not None:
        _task_scores(run, questions.task, questions.score)
    if questions.harness is not None:
        run.scores |= harness_scores(model, processing_class, questions.harness, batch_size=batch_size, manager=manager)
    evaluation = Evaluation(
        model=run.model_digest,
        scores=run.scores,
        prompts=run.prompts,
        settings=_described(questions, reference, settings),
        values=run.values,
    )
    if output is not None:
        evaluation.save(Path(output) / RESULTS)
    return evaluation


class _Run:
    """The model, the responses and verdicts on disk or made now, in the order of the prompts, and their scores."""

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: ProcessingClass,
        settings: EvaluationSettings,
        output: Path | None,
        *,
        progress: bool,
    ) -> None:
        self.model = model
        self.processing_class = processing_class
        self.settings = settings
        self.progress = progress
        self.model_digest = model_digest(model, processing_class)
        self.prompts: dict[str, str] = {}
        self.scores: dict[str, Score] = {}
        self.values: dict[str, tuple[float | None, ...]] = {}
        self._output = output
        if output is not None:
            _make(output)

    def count(self, name: str, values: Sequence[float | None]) -> None:
        self.scores[name] = share([value for value in values if value is not None])
        self.values[name] = tuple(int(value) if isinstance(value, bool) else value for value in values)

    def responses(self, kind: str, prompts: Sequence[Prompt]) -> list[str]:
        self.prompts[kind] = digest_of_prompts(prompts)
        log = self._log(f"responses-{kind}.jsonl", self._made_with(kind), _response)

        def keep(new: dict[int, str]) -> None:
            if log is not None:
                log.append(
                    *({"index": index, "prompt": prompts[index].text, "response": text} for index, text in new.items())
                )

        try:
            return generate_responses(
                self.model,
                self.processing_class,
                [prompt.messages for prompt in prompts],
                max_new_tokens=self.settings.max_new_tokens,
                batch_size=self.settings.batch_size,
                known={} if log is None else dict(log.entries),
                on_batch=keep,
                progress=self.progress,
                desc=f"Generating, {kind}",
            )
        except DataError as error:
            raise error.at(kind) from error

    def verdicts(
        self, kind: str, prompts: Sequence[Prompt], responses: Sequence[str], judge: Judge
    ) -> list[float | None]:
        # They are kept on disk if the judge has a fingerprint.
        fingerprint: str | None = getattr(judge, "fingerprint", None)
        log = None
        if fingerprint is not None:
            name = hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
            log = self._log(f"verdicts-{kind}-{name}.jsonl", self._made_with(kind) | {"judge": fingerprint}, _verdict)
        found = {} if log is None else dict(log.entries)
        exchanges = [(prompt.text, response) for prompt, response in zip(prompts, responses, strict=True)]
        new = judgements(
            judge, exchanges, known=found.copy(), batch_size=self.settings.batch_size, progress=self.progress
        )
        for batch in new:
            found |= batch
            if log is not None:
                log.append(*({"index": index, "verdict": verdict} for index, verdict in batch.items()))
        return [found[index] for index in range(len(exchanges))]

    def _log(
        self, name: str, made_with: Mapping[str, str], parse: Callable[[dict[str, Any]], tuple[int, T]]
    ) -> RunLog[tuple[int, T]] | None:
        return None if self._output is None else RunLog(self._output / name, made_with, parse)

    def _made_with(self, kind: str) -> dict[str, str]:
        # The batch size stays out: after memory ran out, a run may go on with a smaller one.
        settings = json.dumps({"max_new_tokens": self.settings.max_new_tokens, "decoding": "greedy"})
        return {
            "model": self.model_digest,
            "prompts": self.prompts[kind],
            "settings": hashlib.sha256(settings.encode()).hexdigest(),
        }


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"output {str(output)!r} is no folder and cannot be made one ({error})") from error


def _response(line: Mapping[str, Any]) -> tuple[int, str]:
    return int(line["index"]), str(line["response"])


def _verdict(line: Mapping[str, Any]) -> tuple[int, float | None]:
    return int(line["index"]), None if line["verdict"] is None else float(line["verdict"])


def _harmful_scores(run: _Run, prompts: Sequence[Prompt], reference: Reference | None, judge: Judge | None) -> None:
    responses = run.responses("harmful", prompts)
    refused = [is_refusal(response) for response in responses]
    gibberish = _gibberish(run, "harmful", prompts, responses, reference)
    pairs = list(zip(refused, gibberish, strict=True))
    run.count("attack_success", [not refuses and not is_gibberish for refuses, is_gibberish in pairs])
    run.count("harmful_refused", [refuses and not is_gibberish for refuses, is_gibberish in pairs])
    run.count("harmful_incoherent", gibberish)
    run.count("attack_success_by_phrase", [not refuses for refuses in refused])
    if judge is None:
        return
    verdicts = run.verdicts("harmful", prompts, responses, judge)
    if all(verdict is None for verdict in verdicts):
        raise DataError(f"judge: {_name(judge)} gave no verdict on any of {len(verdicts)} responses; is it a judge?")
    run.count("attack_success_by_judge", verdicts)
    run.count("judge_undecided", [verdict is None for verdict in verdicts])


def _benign_scores(run: _Run, prompts: Sequence[Prompt], reference: Reference | None) -> None:
    responses = run.responses("benign", prompts)
    gibberish = _gibberish(run, "benign", prompts, responses, reference)
    pairs = zip(responses, gibberish, strict=True)
    run.count("over_refusal", [is_refusal(text) and not is_gibberish for text, is_gibberish in pairs])
    run.count("benign_incoherent", gibberish)


def _refusal_scores(run: _Run, refusals: Source) -> None:
    sequences = read_safety_data(refusals, run.processing_class, purpose="refusals")
    found = likelihood_of(run.model, sequences, batch_size=run.settings.batch_size, progress=run.progress)
    warn_unless_refusals(responses_of(sequences, run.processing_class), purpose="refusals")
    run.prompts["refusals"] = found.data
    run.scores["refusal_nll"] = average(found.losses, "nats/token")
    run.scores["refusal_nll_95"] = Score(value=found.upper, count=len(found.losses), unit="nats/token")
    run.values["refusal_nll"] = found.losses


def _task_scores(run: _Run, prompts: Sequence[Prompt], score: TaskScore) -> None:
    responses = run.responses("task", prompts)
    values = [score(text, prompt.row) for text, prompt in zip(responses, prompts, strict=True)]
    outside = [value for value in map(float, values) if not 0 <= value <= 1]
    if outside:
        raise ConfigurationError(f"score: {_name(score)} returned {outside[0]}; expected yes or no, or from 0 to 1")
    run.count("task_accuracy", [value if isinstance(value, bool) else float(value) for value in values])


def _gibberish(
    run: _Run, kind: str, prompts: Sequence[Prompt], responses: Sequence[str], reference: Reference | None
) -> list[bool]:
    return incoherent(
        prompts,
        responses,
        run.processing_class,
        reference,
        batch_size=run.settings.batch_size,
        progress=run.progress,
        desc=f"Coherence, {kind}",
    )


def _described(questions: Questions, reference: Reference | None, settings: EvaluationSettings) -> dict[str, Any]:
    return {
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "decoding": "greedy",
        "reference": None if reference is None else model_digest(reference.model, reference.processing_class),
        "coherence_limit": None if reference is None else reference.most,
        "judge": None if questions.judge is None else _name(questions.judge),
        "score": None if questions.score is None else _name(questions.score),
        "lm_eval": [] if questions.harness is None else list(questions.harness.names),
    }


def _name(function: Any) -> str:  # noqa: ANN401
    kind = function if hasattr(function, "__qualname__") else type(function)
    fingerprint = getattr(function, "fingerprint", None)
    return f"{kind.__module__}:{kind.__qualname__}" + ("" if fingerprint is None else f" {fingerprint}")
