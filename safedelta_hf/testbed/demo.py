"""A demo: one fine-tuning of the shipped aligned model, measured before, after, and after the adjustment."""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from safedelta_hf.errors import ConfigurationError, figures_needed
from safedelta_hf.folders import write_whole
from safedelta_hf.hf.callback import SafeDeltaCallback
from safedelta_hf.report.printing import printed, written
from safedelta_hf.rules import Rule
from safedelta_hf.testbed.data import Case, safety_data
from safedelta_hf.testbed.model import LORA_RANK, behaviour_scores, fine_tune, load_aligned, lora_case, with_lora

QUESTIONS = 200

_LABELS = {
    "attack_success": "attack success",
    "harmful_content": "harmful content",
    "new_skill": "new skill",
    "old_skills": "old skills",
}

Behaviour = dict[str, float | None]
"""Shares of a model's responses, as in `behaviour_scores`; None for a new skill where the fine-tuning teaches none."""


def behaviour_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, has_new_skill: bool, questions: int = QUESTIONS
) -> Behaviour:
    """Ask a model of the synthetic language unseen questions of each kind.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        has_new_skill: Whether to ask for the new skill.
        questions: Number of questions of each kind.

    Returns:
        The shares of its responses.
    """
    scores = behaviour_scores(model, tokenizer, has_new_skill=has_new_skill, questions=questions)
    return {name: scores[name].value if name in scores else None for name in _LABELS}


def run_demo(
    case: Case,
    *,
    rule: Rule,
    seed: int,
    output: Path,
    echo: Callable[[str], None],
    lora: bool = False,
    questions: int = QUESTIONS,
) -> dict[str, Behaviour]:
    """Fine-tune, adjust, measure, and show.

    Args:
        case: What to fine-tune on.
        rule: How to adjust.
        seed: Seed of the data and of the training.
        output: Folder for `demo-<case>-<rule>-<strength>-seed<seed>.png`, `.json` and `.report.json`; with LoRA
            `demo-lora-<case>...`.
        echo: Where text goes.
        lora: Whether to train a LoRA on all linear layers instead of all weights.
        questions: Number of questions of each kind.

    Returns:
        Behaviour of the aligned, the fine-tuned and the adjusted model.

    Raises:
        ConfigurationError: The output folder cannot be made, or matplotlib is missing.
    """
    started = time.perf_counter()
    with figures_needed():  # told before the work
        import matplotlib  # noqa: F401
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--output {str(output)!r} is no folder and cannot be made one ({error})") from error
    way = f", with a LoRA of rank {LORA_RANK} on all linear layers" if lora else ""
    echo(printed(f"Fine-tuning the aligned model on '{case.name}': {case.description}{way}.").rstrip())
    model, tokenizer = load_aligned()

    def measured(measured_model: PreTrainedModel) -> Behaviour:
        return behaviour_of(measured_model, tokenizer, has_new_skill=case.teaches is not None, questions=questions)

    found = {"aligned": measured(model)}
    with tempfile.TemporaryDirectory() as folder:
        tuned = Path(folder) / "tuned"
        callback = SafeDeltaCallback(safety_data(), rule, keep_tuned=tuned)
        model, case = (with_lora(model, seed), lora_case(case)) if lora else (model, case)
        fine_tune(model, tokenizer, case, seed=seed, output=Path(folder) / "run", callbacks=[callback])
        # Transformers loads a folder with an adapter onto the base that it names.
        found["fine-tuned"] = measured(AutoModelForCausalLM.from_pretrained(tuned))
    found["adjusted"] = measured(model)
    assert callback.report is not None, "training has ended, so the callback has reported"
    content = {
        "case": case.name,
        "lora": lora,
        "seed": seed,
        "rule": {"name": rule.name, "settings": rule.settings},
        "questions": questions,
        "search": None if callback.report.search is None else asdict(callback.report.search),
        "seconds": time.perf_counter() - started,
        "behaviour": found,
    }
    kind = "LoRA fine-tuned" if lora else "Fine-tuned"
    search = callback.report.search
    strength = f"{rule.settings['strength']:g}" if search is None else f"auto ({search.strength:.3g})"
    title = f"{kind} on '{case.name}', adjusted with {rule.name}, strength {strength}"
    stem = f"{output}/demo-{'lora-' if lora else ''}{case.name}-{rule.name}-{strength.split()[0]}-seed{seed}"
    write_whole(Path(f"{stem}.json"), json.dumps(content, indent=1))
    callback.report.save(f"{stem}.report.json")
    draw(found, title, Path(f"{stem}.png"))
    echo(table(found, title).rstrip())
    files = (Path(f"{stem}{ending}") for ending in (".png", ".json", ".report.json"))
    echo(written(*files, note=f" ({content['seconds']:.0f} s)"))
    return found


def table(found: dict[str, Behaviour], title: str) -> str:
    """Set the behaviour of each model in a table.

    Args:
        found: Behaviour by model.
        title: Line above the table.

    Returns:
        Text for a terminal.
    """
    rows = Table("model", *_LABELS.values())
    for name, behaviour in found.items():
        rows.add_row(name, *("-" if share is None else f"{share:.1%}" for share in behaviour.values()))
    return printed(title, rows)


def draw(found: dict[str, Behaviour], title: str, path: Path) -> None:
    """Draw the behaviour of each model as bars.

    Args:
        found: Behaviour by model.
        title: Line above the bars.
        path: PNG file to write.
    """
    with figures_needed():
        from matplotlib.figure import Figure  # takes a while, and comes last

    labels = [key for key, share in found["aligned"].items() if share is not None]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(found)
    for number, (name, behaviour) in enumerate(found.items()):
        places = [place + (number - 1) * width for place in range(len(labels))]
        bars = axes.bar(places, [share for share in behaviour.values() if share is not None], width, label=name)
        axes.bar_label(bars, fmt=lambda value: f"{value:.0%}", fontsize=8)
    axes.set_xticks(range(len(labels)), [_LABELS[key] for key in labels])
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("share of responses")
    axes.set_title(title)
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.savefig(path, dpi=150)
