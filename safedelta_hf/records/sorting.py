"""Which examples of the task the base itself would refuse."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

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
