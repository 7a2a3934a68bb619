"""Evaluations made up for tests."""

import json

from safedelta_hf.evaluation import Evaluation
from safedelta_hf.evaluation.result import average, share

SETTINGS = {
    "max_new_tokens": 8,
    "batch_size": 4,
    "decoding": "greedy",
    "reference": None,
    "coherence_limit": None,
    "judge": None,
    "score": None,
    "lm_eval": [],
}
PART = {"attack_success": "harmful", "over_refusal": "benign", "task_accuracy": "task", "refusal_nll": "refusals"}


def evaluation(model="m", settings=None, prompts=None, **values):
    """Scores from values prompt by prompt."""
    scores = {
        name: average(own, "nats/token") if name == "refusal_nll" else share([x for x in own if x is not None])
        for name, own in values.items()
    }
    asked = {PART.get(name, "harmful"): f"prompts of {PART.get(name, 'harmful')}" for name in values}
    return Evaluation(
        model=model,
        scores=scores,
        prompts=asked | (prompts or {}),
        settings=SETTINGS | (settings or {}),
        values={name: tuple(own) for name, own in values.items()},
    )


def saved(folder, found, **responses):
    """The folder of an evaluation, with its responses."""
    folder.mkdir()
    found.save(folder / "results.json")
    for part, texts in responses.items():
        lines = [{"manifest": {"model": found.model, "prompts": found.prompts[part], "settings": "s"}}]
        lines += [{"index": i, "prompt": f"ask {i}", "response": text} for i, text in enumerate(texts)]
        (folder / f"responses-{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
