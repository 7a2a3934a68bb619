"""The data that flows between rooms: plain, frozen, without tensors."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Final, Literal

from safedelta_hf.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class MatrixView:
    """A matrix [rows, columns] inside a flattened parameter: one row for each output, one column for each input.

    A single row or column has the strides of a contiguous matrix, so equal matrices are equal views.

    Attributes:
        start: Index of its first entry.
        rows: Number of outputs.
        columns: Number of inputs.
        row_stride: Steps from one row to the next.
        column_stride: Steps from one column to the next.
    """

    start: int = 0
    rows: int
    columns: int
    row_stride: int
    column_stride: int

    def __post_init__(self) -> None:
        if self.columns == 1:
            object.__setattr__(self, "column_stride", 1)
        if self.rows == 1:
            object.__setattr__(self, "row_stride", self.columns)

    @classmethod
    def contiguous(cls, rows: int, columns: int, start: int = 0) -> "MatrixView":
        """A matrix whose rows follow one another.

        Args:
            rows: Number of outputs.
            columns: Number of inputs.
            start: Index of its first entry.

        Returns:
            The view.
        """
        return cls(start=start, rows=rows, columns=columns, row_stride=columns, column_stride=1)

    @property
    def transposed(self) -> "MatrixView":
        """The same entries with rows and columns exchanged."""
        return MatrixView(
            start=self.start,
            rows=self.columns,
            columns=self.rows,
            row_stride=self.column_stride,
            column_stride=self.row_stride,
        )

    @property
    def entries(self) -> int:
        """Number of its entries."""
        return self.rows * self.columns

    @property
    def has_inputs_first(self) -> bool:
        """Whether it is stored [columns, rows]."""
        return self.row_stride < self.column_stride

    def fits(self, entries: int) -> bool:
        """Whether it lies inside a parameter.

        Args:
            entries: Number of entries of the parameter.

        Returns:
            Whether it does.
        """
        last = self.start + (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride
        return last < entries and self.entries <= entries

    def covers(self, entries: int) -> bool:
        """Whether it is all of a parameter.

        Args:
            entries: Number of entries of the parameter.

        Returns:
            Whether it is.
        """
        whole = MatrixView.contiguous(self.rows, self.columns)
        return self.entries == entries and self in (whole, MatrixView.contiguous(self.columns, self.rows).transposed)


class Role(StrEnum):
    """How a parameter meets its inputs: decides its curvature."""

    LINEAR = "linear"
    """`y = W x`, stored [out, in]; full curvature."""
    CONV1D = "conv1d"
    """`y = W^T x`, stored [in, out] as in GPT-2; full curvature."""
    HEAD = "head"
    """The output projection: linear, but often treated apart."""
    EMBEDDING = "embedding"
    """Stored [tokens, features]; one column of the delta for each token; diagonal curvature."""
    SCALE = "norm"
    """Elementwise scale, of a normalised input as a rule, of any shape; diagonal curvature."""
    BIAS = "bias"
    """Added to every output; the single column of a constant input."""
    OFFSET = "offset"
    """A table added entry by entry, of any shape, such as a bias for each position; diagonal curvature."""
    CONVOLUTION = "convolution"
    """A linear map of patches, stored [out, in, positions...]; full curvature over the patch."""

    @property
    def is_diagonal(self) -> bool:
        """Whether its inputs do not mix."""
        return self in (Role.EMBEDDING, Role.SCALE, Role.OFFSET, Role.BIAS)

    def view(self, shape: Sequence[int]) -> MatrixView:
        """The matrix that a parameter is in this role, where all of it is used.

        Args:
            shape: Shape of the parameter.

        Returns:
            The view.
        """
        entries = math.prod(shape)
        if self in (Role.SCALE, Role.OFFSET):
            return MatrixView.contiguous(1, entries)
        if self is Role.BIAS:
            return MatrixView.contiguous(entries, 1)
        stored = MatrixView.contiguous(math.prod(shape[:1]), math.prod(shape[1:]))
        return stored.transposed if self in (Role.CONV1D, Role.EMBEDDING) else stored


class Action(StrEnum):
    """What happens to a parameter."""

    ADJUST = "adjust"
    KEEP = "keep"
    RESET = "reset"


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What happens to the parameters that are not the weights of linear layers.

    Each is "adjust" (the rule with a diagonal curvature), "keep" (as tuned) or "reset" (to the base).

    Attributes:
        embeddings: Token and position embeddings.
        norms: Scales of norm layers.
        biases: Biases of linear and norm layers.
        head: The output projection. A tied head is one parameter with the embedding: the stronger of both settings
            counts, in the order reset, adjust, keep.
        uncovered: Parameters that the fine-tuning changed and the method cannot cover; "error" stops before
            anything is changed and names them.

    Raises:
        ConfigurationError: A value is not one of those named.
    """

    embeddings: Literal["adjust", "keep", "reset"] = "adjust"
    norms: Literal["adjust", "keep", "reset"] = "adjust"
    biases: Literal["adjust", "keep", "reset"] = "adjust"
    head: Literal["adjust", "keep", "reset"] = "adjust"
    uncovered: Literal["error", "keep", "reset"] = "error"

    def __post_init__(self) -> None:
        for setting in fields(self):
            allowed = ["error" if setting.name == "uncovered" else "adjust", "keep", "reset"]
            value = getattr(self, setting.name)
            if value not in allowed:
                raise ConfigurationError(f"Treatment: {setting.name}={value!r} is not one of {allowed}")

    def of(self, role: "Role") -> "Action":
        """What happens to a parameter in one of its roles.

        Args:
            role: The role.

        Returns:
            The action; linear layers are always adjusted.
        """
        settings = {
            Role.EMBEDDING: self.embeddings,
            Role.SCALE: self.norms,
            Role.BIAS: self.biases,
            Role.OFFSET: self.biases,
            Role.HEAD: self.head,
        }
        return Action(settings.get(role, "adjust"))


@dataclass(frozen=True, kw_only=True)
class Use:
    """One way in which a parameter is used in the forward pass.

    Attributes:
        parameter: Canonical name; for a tied weight that of its first appearance.
        role: How it meets its inputs.
        moment: Key of its moment; parameters that read the same tensor have the same key.
        view: The matrix that is used: all of the parameter, or a part of it, such as one expert of many.
        shape: Shape of the parameter; of a packed one [out, in].
    """

    parameter: str
    role: Role
    moment: str
    view: MatrixView
    shape: tuple[int, ...]

    @property
    def has_inputs_first(self) -> bool:
        """Whether its matrix is stored [columns, rows]; the strides of a single row or column do not tell."""
        return self.view.has_inputs_first or self.role is Role.CONV1D


def inputs_first(uses: Iterable[Use]) -> set[str]:
    """Which linear weights are stored with their inputs first.

    Args:
        uses: How parameters are used.

    Returns:
        Their names.
    """
    return {use.parameter for use in uses if use.has_inputs_first and not use.role.is_diagonal}


def moment_key(parameter: str, role: Role, view: MatrixView, shape: Sequence[int]) -> str:
    """The key that the moment of a use has if no other serves it; no other use of the model has it.

    Args:
        parameter: Canonical name.
        role: How it meets its inputs.
        view: The matrix that is used.
        shape: Shape of the parameter.

    Returns:
        The name, the view in brackets where it is not all of the parameter as the role lays it out, and the role. A
        view is the number of a slice along the first dimension ("[3]", or "[3.T]" where the slice holds the transpose),
        or the place and size of some other matrix, with its steps unless its rows follow one another.
    """
    return f"{parameter}{'' if view == role.view(shape) else f'[{_text_of(view, shape)}]'}:{role}"


def _text_of(view: MatrixView, shape: Sequence[int]) -> str:
    if len(shape) == 3:
        size = shape[1] * shape[2]
        number = view.start // size
        stored = MatrixView.contiguous(shape[1], shape[2], number * size)
        if view in (stored, stored.transposed):
            return str(number) if view == stored else f"{number}.T"
    text = f"{view.start}+{view.rows}x{view.columns}"
    is_contiguous = view == MatrixView.contiguous(view.rows, view.columns, view.start)
    return text if is_contiguous else f"{text}@{view.row_stride},{view.column_stride}"


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Ordinary data whose behaviour a profile protects beside the refusals.

    Attributes:
        data: Digest of the tokenised data.
        sequences: Number of its sequences.
        tokens: Number of their tokens.
        weight: Weight of its Hessians.
    """

    data: str
    sequences: int
    tokens: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class RefusedExample:
    """An example of the task whose prompt the base would refuse.

    Attributes:
        row: Its number among the examples that were read, from 0.
        probability: How likely the base is to begin its answer as refusals begin.
        prompt: The end of its prompt as text; empty without a tokenizer.
    """

    row: int
    probability: float
    prompt: str


_UNSORTED: Final = "sort_task=False (--no-sort-task, or no --sorted-by) takes all examples"


class Outcome(StrEnum):
    """What the examples that a base would refuse tell, and what became of them."""

    SORTED = "sorted"
    """They are few, and were left out."""
    HARMFUL = "harmful"
    """They are many, and most of them are as near to the refused prompts of the safety data as these are to one
    another, so the data looks harmful; all of them were left out."""
    OVER_REFUSAL = "over-refusal"
    """They are many, and most of them are not, so the base looks as if it refuses too much; those alone that are near
    were left out."""
    UNKNOWN = "unknown"
    """They are many, and nothing tells which it is; none was left out."""


@dataclass(frozen=True, kw_only=True)
class TaskSorting:
    """Which examples of the task the base itself would refuse, and what became of them.

    Attributes:
        outcome: What they tell.
        examples: Number of examples that were read.
        refused: Number of those that the base would refuse.
        near: Number of those that are near to the safety data; None where they are few.
        left_out: Number of those that were left out.
        unjudged: Number of examples whose prompt could not be told from the response, and which were kept.
        shown: Some that were left out, or, where none was, that would be refused; the surest first.
    """

    outcome: Outcome
    examples: int
    refused: int
    near: int | None
    left_out: int
    unjudged: int
    shown: tuple[RefusedExample, ...]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left of the task."""
        return self.left_out == self.examples

    @property
    def summary(self) -> str:
        """What was found and done, in a sentence or two."""
        near = f"{self.near} of these are as near to the safety data as its prompts are to one another"
        told = {
            Outcome.SORTED: "",
            Outcome.HARMFUL: f"{near}, so the data looks harmful: ",
            Outcome.OVER_REFUSAL: f"{near}, so the base seems to refuse too much: ",
            Outcome.UNKNOWN: "nothing tells whether the data is harmful or the base refuses too much: ",
        }[self.outcome]
        text = (
            f"Task: the base would refuse {self.refused or 'none'} of {self.examples} examples; {told}"
            f"{self.left_out or 'none'} left out of what the task uses."
        )
        if self.unjudged:
            text += (
                f" Of {self.unjudged} no prompt could be told from the response, and they were kept; 'messages', "
                "'prompt' and 'completion', or labels would tell, of the safety data too."
            )
        return text

    @property
    def warning(self) -> str:
        """What its user has to know and perhaps decide; empty if there is nothing."""
        if self.is_empty:
            return f"{self.summary} Nothing is left, so there is no task to protect. If this is wrong: {_UNSORTED}"
        advice = {
            Outcome.SORTED: "",
            Outcome.HARMFUL: f"look at the data (`safedelta audit`); {_UNSORTED}",
            Outcome.OVER_REFUSAL: "ask the base what it refuses (`safedelta eval --benign`), and look at the data "
            f"(`safedelta audit`); {_UNSORTED}",
            Outcome.UNKNOWN: "look at the data (`safedelta audit`)",
        }[self.outcome]
        return f"{self.summary} What to do: {advice}" if advice else ""

    @property
    def told(self) -> str:
        """The examples that are shown, a line for each."""
        return "\n".join(f"  row {one.row} ({one.probability:.3f}): {one.prompt}" for one in self.shown)


@dataclass(frozen=True, kw_only=True)
class ProfileHeader:
    """What a safety profile was made from.

    Attributes:
        architecture: Class name of the model.
        name: Its repository on the Hub, if it was loaded from there.
        revision: Commit of that repository, if it is known.
        base: Digest of each parameter of the base model, by canonical name.
        dtypes: Data type of each parameter, by canonical name, such as "bfloat16".
        tokenizer: Digest of the tokenizer, or None if the safety data came tokenised.
        data: Digest of the tokenised safety data.
        sequences: Number of safety sequences behind the moments.
        tokens: Number of their tokens.
        skipped: Parameters that no supported layer uses, with the reason.
        retention: Ordinary data that is protected too, if any.
        parametrised: Names of the parameters that a weight is computed from, by its canonical name.
        packed: Names of the quantised parameters, whose digests are those of their packed data.
        sorting: Which examples the base would refuse and which were left out, of task data that was sorted.
        format_version: Version of the layout on disk.
    """

    architecture: str
    name: str | None = None
    revision: str | None = None
    base: Mapping[str, str]
    dtypes: Mapping[str, str]
    tokenizer: str | None
    data: str
    sequences: int
    tokens: int
    skipped: Mapping[str, str]
    retention: Retention | None = None
    parametrised: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    packed: tuple[str, ...] = ()
    sorting: TaskSorting | None = None
    format_version: int = 6

    @property
    def model(self) -> str:
        """What to call the base in messages."""
        return self.architecture if self.name is None else f"{self.name} ({self.architecture})"

    @property
    def address(self) -> str:
        """Repository and commit of the base on the Hub, as far as they are known."""
        return "@".join(filter(None, (self.name, self.revision)))

    @property
    def digest(self) -> str:
        """One digest of all base weights."""
        return digest_of(self.base)


@dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """What will be done with one parameter, known before any weight is touched.

    Attributes:
        parameter: Canonical name.
        shape: Shape of the parameter.
        action: What will be done if the fine-tuning changed it; None where that has to be decided by the user first.
        reason: Why, if it is not adjusted.
        uses: How the forward pass uses it; empty if unknown.
        aliases: Other names of the same (tied) parameter.
        originals: Parameters that it is computed from, if it is no parameter itself.
    """

    parameter: str
    shape: tuple[int, ...]
    action: Action | None
    reason: str = ""
    uses: tuple[Use, ...] = ()
    aliases: tuple[str, ...] = ()
    originals: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One entry for every parameter, or weight computed from some, of the model, in the order of their handling."""

    entries: tuple[PlanEntry, ...]


@dataclass(frozen=True, kw_only=True)
class PolishRecord:
    """What a polish did after the adjustment, in nats per response token of rows that were held out.

    Attributes:
        outcome: "kept"; "undone": refusals came out less likely than is allowed, or the model further from its teachers
            on the mean over the kinds, so the adjusted weights were put back; or "failed", and so were they.
        steps: Optimiser steps.
        learning_rate: Their peak.
        tolerance: How much less likely than under the base refusals were allowed to be.
        quantile: Which quantile had to stay within that besides the mean.
        examples: Number of refusals that were measured.
        rows: Number of rows that it learned from, by kind: "refusals", "task" and "ordinary".
        before: Mean divergence from the teacher, by kind, of the adjusted model.
        after: The same after the polish, also of one that was undone.
        rise_before: How much less likely than under the base the adjusted model finds refusals: mean, upper quantile.
        rise_after: The same after the polish; None of one that failed.
        reason: Why, if it was not kept.
    """

    outcome: Literal["kept", "undone", "failed"]
    steps: int
    learning_rate: float
    tolerance: float
    quantile: float
    examples: int
    rows: Mapping[str, int] = field(default_factory=dict)
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    rise_before: tuple[float, float] | None = None
    rise_after: tuple[float, float] | None = None
    reason: str = ""

    @property
    def summary(self) -> str:
        """What was done, in a sentence or two."""
        if self.outcome == "failed":
            return f"Not polished: {self.reason}. The weights are those of the adjustment."
        apart = ", ".join(f"{kind} {self.before[kind]:.3g} -> {self.after[kind]:.3g}" for kind in self.before)
        assert self.rise_before is not None and self.rise_after is not None, "measured unless it failed"
        (_, before), (mean, upper) = self.rise_before, self.rise_after
        measured = (
            f"divergence from the teachers in nats per token of held-out rows: {apart}; held-out refusals {mean:.3g} "
            f"nats per token less likely than under the base ({upper:.3g} at the {self.quantile:.0%} quantile of "
            f"{self.examples}, {before:.3g} before; allowed {self.tolerance:g})"
        )
        if self.outcome == "undone":
            return (
                f"A polish of {self.steps} steps made refusals less likely than is allowed and was undone: {measured}."
            )
        return f"Then polished in {self.steps} steps at a peak rate of {self.learning_rate:.2g}: {measured}."

    @property
    def warning(self) -> str:
        """What has to be known before anything else; empty if the polish was kept."""
        return "" if self.outcome == "kept" else f"THE MODEL WAS NOT POLISHED. {self.summary}"

    def metrics(self) -> dict[str, float]:
        """Scalars for a log.

        Returns:
            Values by name.
        """
        found = {"polish_steps": float(self.steps), "polish_kept": float(self.outcome == "kept")}
        found |= {f"polish_divergence_{kind}_before": value for kind, value in self.before.items()}
        found |= {f"polish_divergence_{kind}_after": value for kind, value in self.after.items()}
        if self.rise_after is not None:
            mean, upper = self.rise_after
            found |= {"polish_refusal_rise_mean": mean, "polish_refusal_rise_upper": upper}
        return found


@dataclass(frozen=True, kw_only=True)
class ParameterRecord:
    """What was done with one parameter.

    Attributes:
        parameter: Canonical name.
        shape: Shape of the parameter.
        outcome: "adjusted", "kept", "reset" or "unchanged" (the fine-tuning did not move it).
        reason: Why, where it was not adjusted.
        roles: How the forward pass uses it.
        delta_energy: Squared norm of tuned minus base.
        lost_energy: Squared norm of tuned minus adjusted, as in all figures the weights that were written. Compensation
            and rounding count as lost, so it may exceed the delta's.
        tuned_loss: Quadratic safety loss of the fine-tuned delta, over all uses; None without a moment.
        adjusted_loss: The same of the adjusted delta.
        unrounded_loss: What it was before it was rounded to the data type of the weights; None where that is float32
            or finer.
        notes: Numerical trouble met on the way, such as a retry in float64.
        aliases: Other names of the same (tied) parameter.
        originals: Parameters that it is computed from, if any; the notes say what became of them.
    """

    parameter: str
    shape: tuple[int, ...]
    outcome: str
    reason: str = ""
    roles: tuple[str, ...] = ()
    delta_energy: float = 0.0
    lost_energy: float = 0.0
    tuned_loss: float | None = None
    adjusted_loss: float | None = None
    unrounded_loss: float | None = None
    notes: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    originals: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RuleRecord:
    """Name and settings of the rule that was applied."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One strength that was tried on held-out refusals.

    Attributes:
        strength: The strength.
        lost: How many of those that the base surely begins are no longer begun.
        probability_lost: Mean share of its probability that the beginning of a held-out refusal has lost: what is lost
            where responses are sampled.
        passed: Whether as few are lost as have to be.
    """

    strength: float
    lost: int
    probability_lost: float
    passed: bool


@dataclass(frozen=True, kw_only=True)
class ReadingNoise:
    """What is lost by rounding alone where one model is read twice.

    Measured on the base: it read the refusals a second time with every embedding moved by one rounding step, which
    its data type cannot tell from where it was.

    Attributes:
        precision: The coarsest data type that its layers computed in, such as "bfloat16".
        lost: How many of the refusals that it surely begins in one reading it does not begin in the other; None where
            the model has no embeddings to move.
        probability_lost: Mean share of its probability that the beginning of a refusal has lost from one to the other;
            whichever way it is more.
    """

    precision: str
    lost: int | None
    probability_lost: float | None


AS_LIKELY: Final = 0.005
"""Share of their probability below which refusals count as none the less likely in words; figures are exact."""


@dataclass(frozen=True, kw_only=True)
class StrengthSearch:
    """How the strength of a rule was found.

    Attributes:
        outcome: "found", "nothing needed" (the rule at its mildest loses no more than is allowed), or "strictest fails"
            (every strength that the rule has loses more).
        strength: The strength that was applied.
        share: Share of refusals that may be lost.
        confidence: Of the bound.
        examples: Number of held-out refusals that the base surely begins, which can be lost.
        others: Number of those that it does not, which are not counted.
        allowed: How many may be lost.
        bound: Share of all such refusals that are lost at most, with that confidence.
        holds: Whether that is within the share; where no share was asked for, whether it is the least that the held-out
            refusals can show.
        more: How many more held-out refusals, none of them lost, would bring the bound down to the share.
        trials: What was tried, in order.
        noise: What of it may be noise of reading, which is subtracted from nothing.
    """

    outcome: Literal["found", "nothing needed", "strictest fails"]
    strength: float
    share: float
    confidence: float
    examples: int
    others: int
    allowed: int
    bound: float
    holds: bool
    more: int
    trials: tuple[Trial, ...]
    noise: ReadingNoise | None = None

    @property
    def applied(self) -> Trial:
        """The trial of the strength that was applied."""
        return next(trial for trial in self.trials if trial.strength == self.strength)

    @property
    def summary(self) -> str:
        """The outcome, and what is certain of it, in a few sentences."""
        told = {
            "found": f"Strength {self.strength:.3g}, measured in {len(self.trials)} trials.",
            "nothing needed": "The rule at its mildest loses no more refusals than is allowed.",
            "strictest fails": f"Even the strictest strength, {self.strength:.3g}, is not enough.",
        }
        tuned, last = self.trials[0], self.applied
        before = "" if tuned is last else f"; {tuned.lost} before"
        counted = f"{last.lost} of {self.examples} held-out ones lost (limit {self.allowed}{before})"
        return (
            f"Refusals: {self._likelihood} (limit {percent(self.share)} less); "
            f"{counted if self.examples else 'no held-out one could be counted'}{self._noise_told}. "
            f"{told[self.outcome]} {self.promise}"
        )

    @property
    def _likelihood(self) -> str:
        lost = self.applied.probability_lost
        # NaN is not as likely as anything.
        if lost < AS_LIKELY:
            return "as likely as in the base"
        return f"{percent(lost)} less likely than in the base"

    @property
    def promise(self) -> str:
        """What the held-out refusals show, and what would show more."""
        bound = percent(self.bound)
        told = f"With {percent(self.confidence)} confidence at most {bound} of refusals like these are lost."
        if not self.examples:
            told = "Nothing is certain of the refusals."
        if self.more:
            told += f" {self.more} more held out, none of them lost, would bring that down to {percent(self.share)}."
        if self.others:
            told += (
                f" {self.others} held-out refusals the base itself does not begin so, or is not sure of; they are not "
                "counted. Give the safety data responses that are the base's own."
            )
        return told

    @property
    def warning(self) -> str:
        """What has to be known before anything else. Empty if there is nothing."""
        if self.outcome != "strictest fails":
            return "" if self.holds else f"LESS IS CERTAIN OF THE REFUSALS THAN IT SHOULD BE. {self.promise}"
        advice = (
            f" {self.summary} That strength was applied all the same, and may have taken back all that the "
            "fine-tuning taught: measure the new skill before you use this model. What else can be done: "
            "callback.adjust(model, rule=<a rule with a number as its strength>) begins again from the fine-tuned "
            "weights (those of a whole model are kept where keep_tuned=<folder> was given); "
            "AutoStrength(lost=...) allows more; embeddings, norms or uncovered parameters that are kept "
            "as tuned can carry the damage (treatment=)."
        )
        noise = self.noise
        if noise is not None and noise.lost is not None and noise.probability_lost is not None:
            if noise.lost > self.allowed or noise.probability_lost > self.share:
                advice += (
                    f" Rounding in {noise.precision} alone, by which this model was read, loses {noise.lost} of them, "
                    f"and {percent(noise.probability_lost)} of sampled ones: allow more, or fine-tune from weights in "
                    "float32."
                )
        return "THE STRICTEST STRENGTH WAS APPLIED, and more refusals are lost than are allowed." + advice

    @property
    def _noise_told(self) -> str:
        noise = self.noise
        if noise is None:
            return ""
        if noise.lost is None or noise.probability_lost is None:
            return f", read in {noise.precision}"
        sampled = percent(noise.probability_lost)
        return f"; noise of reading in {noise.precision}: {noise.lost}, and {sampled} of sampled ones"


def digest_of(digests: Mapping[str, str]) -> str:
    """One digest of many named ones.

    Args:
        digests: Digests by name.

    Returns:
        SHA-256 over names and digests, in the order of the names.
    """
    return hashlib.sha256("".join(f"{name}{value}" for name, value in sorted(digests.items())).encode()).hexdigest()


def percent(share: float, digits: int = 3) -> str:
    """Set a share as people read it.

    Args:
        share: 1 for all.
        digits: That count.

    Returns:
        Such as "42 %".
    """
    return f"{float(f'{share * 100:.{digits}g}'):g} %"  # "1e+02" is 100
