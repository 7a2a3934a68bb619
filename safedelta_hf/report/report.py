"""What was done to each parameter, for people and for programs."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.folders import write_whole
from safedelta_hf.records.sorting import TaskSorting
from safedelta_hf.report.printing import PARAMETER, Foldable, printed
from safedelta_hf.report.records import ParameterRecord, PolishRecord, RuleRecord
from safedelta_hf.report.search import StrengthSearch, percent

ROUNDING_SHARE = 0.01
"""Share of the fine-tuned model's safety loss that rounding may bring back without a warning."""

UNMOVED: Final = 1e-10
"""Share of the delta's energy below which a weight counts as left as it was tuned: what float32 rounds away."""

LAYER_BLOCKS: Final = 8
"""Rows that layers take in the overview, at most: neighbours share one."""

_OUTCOMES: Final = {
    "adjusted": "adjusted",
    "left": "left as tuned",
    "kept": "kept as tuned",
    "reset": "reset to the base",
    "unchanged": "not moved by the fine-tuning",
}


_UNREAD: Final = "no safety data were read"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Outcome of one adjustment: scalars only, every parameter named.

    Attributes:
        rule: The rule and its settings.
        architecture: Class name of the model.
        base: Where the base weights came from.
        base_model: Name of the base on the Hub, with its commit, if they are known.
        base_digest: SHA-256 over the digests of all base weights.
        data: Digest of the tokenised safety data.
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
    base_model: str = ""
    base_digest: str = ""
    data: str = ""

    @property
    def outcome(self) -> Literal["adjusted", "nothing to repair", "nothing changed", "nothing tuned"]:
        """What came of it as a whole.

        "nothing tuned" where the fine-tuning moved no weight, "nothing to repair" where the rule at its mildest leaves
        every weight as tuned and loses no more refusals than is allowed, "nothing changed" where it leaves them at a
        strength that was given, or where no refusal could be counted.
        """
        if not self.has_delta:
            return "nothing tuned"
        if self.moved_share**2 > UNMOVED:
            return "adjusted"
        is_enough = self.search is not None and self.search.outcome == "nothing needed" and self.search.examples > 0
        return "nothing to repair" if is_enough else "nothing changed"

    @property
    def strength(self) -> float | None:
        """The strength that was applied, measured or given; None of a rule without one."""
        given = self.rule.settings.get("strength") if self.search is None else self.search.strength
        return float(given) if isinstance(given, int | float) else None

    @property
    def moved_share(self) -> float:
        """How far the weights were moved, as a share of how far the fine-tuning had moved them: `|D - D*| / |D|`.

        1 at the base; above 1 where compensation or rounding moved them further than back.
        """
        return _moved(self.parameters)

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
    def _is_read(self) -> bool:
        """Whether any safety data were read."""
        return self.sequences > 0

    @property
    def _rounding_warning(self) -> str:
        if not self._is_read:
            return ""
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
            the weights are coarser than float32. Losses are left out where no safety data were read.
        """
        delta = sum(record.delta_energy for record in self.parameters)
        lost = sum(record.lost_energy for record in self.parameters)
        tuned = sum(record.tuned_loss or 0.0 for record in self.parameters)
        adjusted = sum(record.adjusted_loss or 0.0 for record in self.parameters)
        values = {
            "delta_energy": delta,
            "lost_energy": lost,
            "kept_share": 1 - lost / delta if delta else 1.0,
            "moved_share": self.moved_share,
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
        if not self._is_read:
            values = {name: value for name, value in values.items() if not name.startswith("quadratic_loss")}
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
            "refusal_probability_lost_bound": last.probability_lost_bound,
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
        told = {"warning": self.warning, "outcome": self.outcome, "strength": self.strength}
        return {**told, **asdict(self), "metrics": self.metrics()}

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all.

        Args:
            path: File to write; one that is there is replaced.

        Raises:
            OutputError: It cannot be written.
        """
        write_whole(Path(path), json.dumps(self.to_dict(), indent=1))

    def table(self) -> str:
        """The whole report as a table, 200 columns wide, for a file or a pager; `str(report)` fits the terminal.

        Returns:
            Text with one row for each parameter and a summary below; a warning, if there is one, comes first.
        """
        names = ("parameter", "shape", "role", "outcome", "moved", "safety loss", "reason")
        table = Table(*(Column(name, overflow="fold") for name in names), title=self._title())
        for record in self.parameters:
            table.add_row(*_cells(record))
        rows = f"{self.sorting.told}\n" if self.sorting is not None and self.sorting.shown else ""
        return self._printed(table, width=200) + rows

    def overview(self, width: int | None = None) -> str:
        """The report within the width of a terminal: weights of one kind, and neighbouring layers, share a row.

        Args:
            width: Columns of the text; None for those of the terminal, or as many as are needed where there is none.

        Returns:
            Text with a row for each kind of weight and each block of layers, and the summary below; a warning, if there
            is one, comes first.
        """
        names = ("weights", "role", "outcome", "moved", "safety loss")
        heads = (Column(name, overflow="fold") for name in names)
        table = Table(*heads, title=self._title(), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for groups in self._groups():
            for name, *cells in groups:
                table.add_row(Foldable(name, PARAMETER), *cells)
            table.add_section()
        return self._printed(table, width=width)

    def to_pandas(self) -> Any:  # noqa: ANN401 - of pandas, which need not be there
        """The records of all parameters as a data frame.

        Returns:
            A `pandas.DataFrame` with a row for each parameter, and `moved_share` beside its fields.

        Raises:
            ConfigurationError: There is no pandas.
        """
        try:
            import pandas  # type: ignore[import-untyped]
        except ImportError as error:
            raise ConfigurationError(
                "Report.to_pandas: needs pandas, which is not there: pip install pandas"
            ) from error
        rows = [asdict(record) | {"moved_share": _moved([record])} for record in self.parameters]
        return pandas.DataFrame(rows)

    def _printed(self, table: Table, *, width: int | None) -> str:
        warning = f"WARNING: {self.warning}" if self.warning else ""
        return printed(warning, table, self.told, width=width)

    def _groups(self) -> Iterator[list["_Group"]]:
        kinds: dict[tuple[str, str], list[ParameterRecord]] = {}
        layers: dict[int, list[ParameterRecord]] = {}
        for record in self.parameters:
            name, layer = _kind(record.parameter)
            kinds.setdefault((name, "+".join(record.roles)), []).append(record)
            if layer is not None:
                layers.setdefault(layer, []).append(record)
        yield [_group(name, role, records) for (name, role), records in kinds.items()]
        if len(layers) > 1:
            yield [_group(name, "", records) for name, records in _blocks(layers)]

    def model_card(self) -> str:
        """A section for a model card.

        Returns:
            Markdown.
        """
        settings = ", ".join(f"`{key}={value!r}`" for key, value in self.rule.settings.items() if key != "strength")
        left = [record for record in self.parameters if record.outcome in ("kept", "reset")]
        listed = "\n".join(f"- `{record.parameter}`: {record.outcome} ({record.reason})" for record in left)
        base = self.base + (f" ({self.base_model})" if self.base_model and self.base_model != self.base else "")
        data = f" and {self.sequences} safety examples ({self.tokens} tokens)" if self._is_read else f"; {_UNREAD}"
        estimate = "The quadratic safety loss is an estimate at the base weights, not a measured refusal rate.\n"
        return (
            "## Safety adjustment\n\n"
            + (f"**Warning:** {self.warning}\n\n" if self.warning else "")
            + f"The fine-tuned weights were adjusted with [Safe Delta](https://arxiv.org/abs/2505.12038), rule "
            f"`{self.rule.name}`{self._at_strength}{f' ({settings})' if settings else ''}, against base weights from "
            f"{base}{data}.\n\n{self.told}\n\n"
            + (estimate if self.search is None and self._is_read else "")
            + (f"\nNot adjusted:\n\n{listed}\n" if listed else "")
        )

    def __str__(self) -> str:
        return self.overview()

    def _repr_html_(self) -> str:
        rows = [row for groups in self._groups() for row in groups]
        left = "style='text-align:left'"  # a notebook's own style puts text to the right
        names = "".join(f"<th {left}>{name}</th>" for name in ("weights", "role", "outcome", "moved", "safety loss"))
        body = "".join(f"<tr>{''.join(f'<td {left}>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        warning = f"<p><b>WARNING:</b> {escape(self.warning)}</p>" if self.warning else ""
        return (
            f"<div><p><b>{escape(self._title())}</b></p>{warning}<p>{escape(self.told)}</p>"
            f"<details><summary>{len(self.parameters)} weights</summary>"
            f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></details></div>"
        )

    @property
    def _at_strength(self) -> str:
        return "" if self.strength is None else f" at strength {self.strength:.3g}"

    def _title(self) -> str:
        return f"Safe Delta on {self.architecture}, rule {self.rule.name}{self._at_strength}"

    def summary(self) -> str:
        """The outcome in a few sentences, after the warning if there is one.

        Returns:
            Plain text.
        """
        return f"WARNING: {self.warning}\n{self.told}" if self.warning else self.told

    @property
    def told(self) -> str:
        """The outcome in a few sentences, without the warning."""
        refusals = self._estimate() if self.search is None else self.search.summary
        sorting = "" if self.sorting is None or self.sorting.warning else self.sorting.summary
        polished = "" if self.polish is None else self.polish.summary
        counts = _counted(self.parameters)
        told = {
            "nothing tuned": ("Nothing was adjusted: the fine-tuning changed nothing.",),
            "nothing changed": (
                f"Nothing was changed: {self.rule.name}{self._at_strength} leaves every weight as it was tuned.",
                refusals,
            ),
            "nothing to repair": ("Nothing to repair: every weight is left as it was tuned.", refusals),
            "adjusted": (refusals, f"Moved {_way(self.parameters)}. {counts[:1].upper()}{counts[1:]}."),
        }[self.outcome]
        return " ".join(filter(None, (*told, sorting, polished)))

    def _estimate(self) -> str:
        if not self._is_read:
            return f"Refusals: not measured; {_UNREAD}."
        metrics = self.metrics()
        tuned, finer = metrics["safedelta/quadratic_loss_tuned"], metrics.get("safedelta/quadratic_loss_unrounded")
        if not tuned:
            return "Refusals: not measured."
        rounding = "" if finer is None else f", {percent(finer / tuned)} before rounding to the weights' data type"
        left = percent(metrics["safedelta/quadratic_loss_share"])
        return f"Refusals: not measured; of the fine-tuned model's estimated safety loss {left} is left{rounding}."


class _Group(NamedTuple):
    """A row of the overview, as text."""

    weights: str
    role: str
    outcome: str
    moved: str
    loss: str


_NUMBER = re.compile(r"\.(\d+)(?=\.)")


def _kind(name: str) -> tuple[str, int | None]:
    # Weights that differ in numbers alone are of one kind; the first number is that of the layer.
    first = _NUMBER.search(name)
    return _NUMBER.sub(".*", name), None if first is None else int(first[1])


def _blocks(layers: dict[int, list[ParameterRecord]]) -> Iterator[tuple[str, list[ParameterRecord]]]:
    numbers = sorted(layers)
    size = math.ceil(len(numbers) / LAYER_BLOCKS)
    for start in range(0, len(numbers), size):
        block = numbers[start : start + size]
        name = f"layer {block[0]}" if len(block) == 1 else f"layers {block[0]} to {block[-1]}"
        yield name, [record for number in block for record in layers[number]]


def _group(name: str, role: str, records: Sequence[ParameterRecord]) -> _Group:
    return _Group(name, role, ", ".join(_counts(records)), _way(records, short=True), _loss(records))


def _counted(records: Iterable[ParameterRecord]) -> str:
    first, *others = _counts(records)
    number, _, told = first.partition(" ")
    return ", ".join([f"{number} {'weight' if number == '1' else 'weights'} {told}", *others])


def _counts(records: Iterable[ParameterRecord]) -> list[str]:
    found = Counter(map(_outcome, records))
    return [f"{found[name]} {told}" for name, told in _OUTCOMES.items() if found[name]] or ["0 adjusted"]


def _outcome(record: ParameterRecord) -> str:
    # Of a weight that the rule keeps whole nobody would say that it was adjusted.
    is_left = record.outcome == "adjusted" and record.lost_energy <= UNMOVED * record.delta_energy
    return "left" if is_left else record.outcome


def _moved(records: Iterable[ParameterRecord]) -> float:
    known = list(records)
    delta = sum(record.delta_energy for record in known)
    return math.sqrt(sum(record.lost_energy for record in known) / delta) if delta else 0.0


def _way(records: Sequence[ParameterRecord], *, short: bool = False) -> str:
    if not any(record.delta_energy for record in records):
        return ""
    moved = _moved(records)
    if short:
        return percent(moved, digits=2) if moved <= 1 else "over 100 %"
    return f"{percent(moved, digits=2)} of the way back" if moved <= 1 else "further than the way back"


def _loss(records: Sequence[ParameterRecord]) -> str:
    known = [record for record in records if record.tuned_loss is not None and record.adjusted_loss is not None]
    tuned, adjusted = (sum(getattr(record, f"{name}_loss") for record in known) for name in ("tuned", "adjusted"))
    return f"{tuned:.3g} -> {adjusted:.3g}" if known else ""


def _origin(record: ParameterRecord) -> str:
    return f"computed from {', '.join(record.originals)}" if record.originals else ""


def _cells(record: ParameterRecord) -> tuple[str, ...]:
    return (
        record.parameter,
        "x".join(map(str, record.shape)),
        "+".join(record.roles),
        _OUTCOMES["left"] if _outcome(record) == "left" else record.outcome,
        _way([record], short=True),
        _loss([record]),
        "; ".join(filter(None, (record.reason, _origin(record), *record.notes))),
    )
