"""What was done to each parameter, for people and for programs."""

import io
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from safedelta_hf.folders import write_whole
from safedelta_hf.records import ParameterRecord, PolishRecord, RuleRecord, StrengthSearch, TaskSorting

ROUNDING_SHARE = 0.01
"""Share of the fine-tuned model's safety loss that rounding may bring back without a warning."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Outcome of one adjustment: scalars only, every parameter named.

    Attributes:
        rule: The rule and its settings.
        architecture: Class name of the model.
        base: Where the base weights came from.
        sequences: Number of safety sequences behind the moments.
        tokens: Number of their tokens.
        parameters: One record for each parameter.
        search: How the strength was found, if it was measured.
        seconds: How long the callback took when training had ended; None of other ways. Equal reports may differ in it.
        unverified: Why nothing could tell that the weights were fine-tuned from the base that the profile was made of;
            empty where something did.
        sorting: Which examples of the task the base would refuse, and what became of them, where the rule weighs a task
            that was sorted, or would have.
        polish: What was done after the adjustment, if the model was polished; all other figures are those of the
            adjustment.
    """

    rule: RuleRecord
    architecture: str
    base: str
    sequences: int
    tokens: int
    parameters: tuple[ParameterRecord, ...]
    search: StrengthSearch | None = None
    seconds: float | None = field(default=None, compare=False)
    unverified: str = ""
    sorting: TaskSorting | None = None
    polish: PolishRecord | None = None

    @property
    def outcomes(self) -> Counter[str]:
        """Number of parameters by outcome."""
        return Counter(record.outcome for record in self.parameters)

    @property
    def changed_anything(self) -> bool:
        """Whether any weight was written."""
        return bool(self.outcomes["adjusted"] + self.outcomes["reset"])

    @property
    def has_delta(self) -> bool:
        """Whether the fine-tuning had moved any weight."""
        return any(record.delta_energy for record in self.parameters)

    @property
    def warning(self) -> str:
        """What has to be known before anything else; empty if there is nothing."""
        doubt = f"base not verified: {self.unverified}." if self.unverified else ""
        # Where a strength was searched, refusals were measured with the weights as they were rounded.
        found = self._rounding_warning if self.search is None else self.search.warning
        sorting = f"{self.sorting.warning}." if self.sorting is not None and self.sorting.warning else ""
        unpolished = "" if self.polish is None else self.polish.warning
        return " ".join(filter(None, (doubt, found, sorting, unpolished)))

    @property
    def _rounding_warning(self) -> str:
        metrics = self.metrics()
        tuned, adjusted = metrics["safedelta/quadratic_loss_tuned"], metrics["safedelta/quadratic_loss_adjusted"]
        by_rounding = adjusted - metrics.get("safedelta/quadratic_loss_unrounded", adjusted)
        if by_rounding <= max(adjusted / 2, ROUNDING_SHARE * tuned):
            return ""
        return (
            f"MOST OF THE SAFETY LOSS THAT IS LEFT COMES FROM ROUNDING: {adjusted / tuned:.2%} of the fine-tuned "
            f"model's, of which {by_rounding / tuned:.2%} because the weights' data type cannot hold what was kept. "
            "Measure refusals before you use this model. Weights in float32 (bf16=True of the TrainingArguments trains "
            "them in mixed precision) leave it out; a stricter strength, or 'auto', makes up for it."
        )

    def metrics(self) -> dict[str, float]:
        """The scalars that tell how much was kept and what it costs in safety.

        Returns:
            Values by name, each prefixed with `safedelta/`. `kept_share` is `1 - |D - D*|^2 / |D|^2`: 1 where the delta
            is kept whole, 0 at the base, negative where compensation or rounding moved the weights further than it
            kept them. All are those of the weights that were written, but for `quadratic_loss_unrounded`, there where
            the weights are coarser than float32.
        """
        delta = sum(record.delta_energy for record in self.parameters)
        lost = sum(record.lost_energy for record in self.parameters)
        tuned = sum(record.tuned_loss or 0.0 for record in self.parameters)
        adjusted = sum(record.adjusted_loss or 0.0 for record in self.parameters)
        values = {
            "delta_energy": delta,
            "lost_energy": lost,
            "kept_share": 1 - lost / delta if delta else 1.0,
            "quadratic_loss_tuned": tuned,
            "quadratic_loss_adjusted": adjusted,
            "quadratic_loss_share": adjusted / tuned if tuned else 0.0,
        }
        if any(record.unrounded_loss is not None for record in self.parameters):
            # What was not rounded counts as it is.
            finer = (r.adjusted_loss if r.unrounded_loss is None else r.unrounded_loss for r in self.parameters)
            values["quadratic_loss_unrounded"] = sum(loss or 0.0 for loss in finer)
        counts = {
            f"parameters_{name}": float(self.outcomes[name]) for name in ("adjusted", "kept", "reset", "unchanged")
        }
        more = self._search_metrics() | self._task_metrics() | ({} if self.polish is None else self.polish.metrics())
        return {f"safedelta/{name}": value for name, value in (values | counts | more).items()}

    def _search_metrics(self) -> dict[str, float]:
        if self.search is None:
            return {}
        search, last, noise = self.search, self.search.applied, self.search.noise
        measured = {} if noise is None else {"lost": noise.lost, "probability_lost": noise.probability_lost}
        return {
            "strength": search.strength,
            "evaluations": float(len(search.trials)),
            "refusals_held_out": float(search.examples),
            "refusals_lost": float(last.lost),
            "refusals_lost_bound": search.bound,
            "refusals_to_tighten": float(search.more),
            "refusal_probability_lost": last.probability_lost,
            **{f"reading_noise_{name}": float(value) for name, value in measured.items() if value is not None},
        }

    def _task_metrics(self) -> dict[str, float]:
        found = self.sorting
        if found is None:
            return {}
        return {"task_examples": float(found.examples), "task_left_out": float(found.left_out)}

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain values, with the metrics.

        Returns:
            A dictionary that JSON can hold.
        """
        return {"warning": self.warning, **asdict(self), "metrics": self.metrics()}

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all.

        Args:
            path: File to write; one that is there is replaced.

        Raises:
            OutputError: It cannot be written.
        """
        write_whole(Path(path), json.dumps(self.to_dict(), indent=1))

    def table(self) -> str:
        """The report as a table for a terminal.

        Returns:
            Text with one row for each parameter and a summary below; a warning, if there is one, comes first.
        """
        names = ("parameter", "shape", "role", "outcome", "kept", "safety loss", "reason")
        table = Table(*(Column(name, overflow="fold") for name in names), title=self._title())
        for record in self.parameters:
            table.add_row(*_cells(record))
        text = io.StringIO()
        console = Console(file=text, width=200, highlight=False)
        if self.warning:
            console.print(f"WARNING: {self.warning}", soft_wrap=True, markup=False)
        console.print(table)
        console.print(self._told())
        if self.sorting is not None and self.sorting.shown:
            console.print(self.sorting.told, soft_wrap=True, markup=False)
        return text.getvalue()

    def model_card(self) -> str:
        """A section for a model card.

        Returns:
            Markdown.
        """
        settings = ", ".join(f"`{key}={value!r}`" for key, value in self.rule.settings.items())
        left = [record for record in self.parameters if record.outcome in ("kept", "reset")]
        listed = "\n".join(f"- `{record.parameter}`: {record.outcome} ({record.reason})" for record in left)
        return (
            "## Safety adjustment\n\n"
            + (f"**Warning:** {self.warning}\n\n" if self.warning else "")
            + f"The fine-tuned weights were adjusted with [Safe Delta](https://arxiv.org/abs/2505.12038), rule "
            f"`{self.rule.name}` ({settings}), against base weights from {self.base} and {self.sequences} safety "
            f"examples ({self.tokens} tokens).\n\n{self._told()}\n\n"
            "The quadratic safety loss is an estimate at the base weights, not a measured refusal rate.\n"
            + (f"\nNot adjusted:\n\n{listed}\n" if listed else "")
        )

    def __str__(self) -> str:
        return self.table()

    def _title(self) -> str:
        return f"Safe Delta on {self.architecture}, rule {self.rule.name}"

    def summary(self) -> str:
        """The outcome in a sentence or two, after the warning if there is one.

        Returns:
            Plain text.
        """
        return f"WARNING: {self.warning}\n{self._told()}" if self.warning else self._told()

    def _told(self) -> str:
        metrics = self.metrics()
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        if not self.has_delta:
            return f"Parameters: {counts}. The fine-tuning changed nothing, so nothing was adjusted."
        found = "" if self.search is None else f" {self.search.summary}"
        sorting = "" if self.sorting is None or self.sorting.warning else f" {self.sorting.summary}"
        polished = "" if self.polish is None else f" {self.polish.summary}"
        tuned, finer = metrics["safedelta/quadratic_loss_tuned"], metrics.get("safedelta/quadratic_loss_unrounded")
        rounding = (
            "" if finer is None or not tuned else f"; {finer / tuned:.2%} before rounding to the weights' data type"
        )
        return (
            f"Parameters: {counts}. Kept {metrics['safedelta/kept_share']:.1%} of the delta's energy; quadratic "
            f"safety loss {metrics['safedelta/quadratic_loss_tuned']:.4g} as tuned, "
            f"{metrics['safedelta/quadratic_loss_adjusted']:.4g} as adjusted "
            f"({metrics['safedelta/quadratic_loss_share']:.2%}{rounding}).{found}{sorting}{polished}"
        )


def _origin(record: ParameterRecord) -> str:
    return f"computed from {', '.join(record.originals)}" if record.originals else ""


def _cells(record: ParameterRecord) -> tuple[str, ...]:
    has_loss = record.tuned_loss is not None and record.adjusted_loss is not None
    return (
        record.parameter,
        "x".join(map(str, record.shape)),
        "+".join(record.roles),
        record.outcome,
        f"{1 - record.lost_energy / record.delta_energy:.1%}" if record.delta_energy else "",
        f"{record.tuned_loss:.3g} -> {record.adjusted_loss:.3g}" if has_loss else "",
        "; ".join(filter(None, (record.reason, _origin(record), *record.notes))),
    )
