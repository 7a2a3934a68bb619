"""Small deterministic tasks: those that the aligned model has, and one that it has to be taught.

The lists of words that a task works on are dealt to training and evaluation by their content, so that an evaluation
never asks about a list that any training text may hold.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from safedelta_hf.testbed.words import NUMBERS, OPPOSITES, WORDS

LIST_LENGTHS: Final = (3, 5)
"""Fewest and most words in a list."""

HELD_OUT_ONE_IN: Final = 5
"""One list in so many is kept for evaluation."""


@dataclass(frozen=True, kw_only=True)
class Skill:
    """A task.

    Attributes:
        name: Its name.
        frame: The request, with ``{}`` in place of what the task works on.
        draw: Draws what to work on, for training or (true) for evaluation, and gives it with the answer.
    """

    name: str
    frame: str
    draw: Callable[[random.Random, bool], tuple[str, str]]

    def ask(self, rng: random.Random, *, held_out: bool) -> tuple[str, str]:
        """Draw a request and its answer.

        Args:
            rng: Source of the draw.
            held_out: Whether the request is for evaluation.

        Returns:
            The request and the answer.
        """
        argument, answer = self.draw(rng, held_out)
        return self.frame.format(argument), answer


def _on_list(task: Callable[[list[str]], list[str]]) -> Callable[[random.Random, bool], tuple[str, str]]:
    def draw(rng: random.Random, held_out: bool) -> tuple[str, str]:
        words = _draw_list(rng, held_out)
        return " ".join(words), " ".join(task(words))

    return draw


def _draw_list(rng: random.Random, held_out: bool) -> list[str]:
    while True:
        chosen = rng.sample(range(len(WORDS)), rng.randint(*LIST_LENGTHS))
        if (sum(chosen) % HELD_OUT_ONE_IN == 0) == held_out:
            return [WORDS[index] for index in chosen]


def _draw_opposite(rng: random.Random, held_out: bool) -> tuple[str, str]:
    del held_out  # a fact to be memorised has no unseen form
    word, opposite = rng.sample(rng.choice(OPPOSITES), 2)
    return word, opposite


def _draw_next(rng: random.Random, held_out: bool) -> tuple[str, str]:
    del held_out  # as above
    index = rng.randrange(len(NUMBERS) - 1)
    return NUMBERS[index], NUMBERS[index + 1]


OLD_SKILLS: Final[Mapping[str, Skill]] = MappingProxyType(
    {
        skill.name: skill
        for skill in (
            Skill(name="repeat", frame="repeat these words : {}", draw=_on_list(list)),
            Skill(name="reverse", frame="say these words backwards : {}", draw=_on_list(lambda words: words[::-1])),
            Skill(name="first", frame="what is the first word of : {}", draw=_on_list(lambda words: words[:1])),
            Skill(name="last", frame="what is the last word of : {}", draw=_on_list(lambda words: words[-1:])),
            Skill(name="opposite", frame="what is the opposite of {} ?", draw=_draw_opposite),
            Skill(name="next", frame="what number comes after {} ?", draw=_draw_next),
        )
    }
)
"""The tasks that the aligned model can do, by name."""

NEW_SKILL: Final = Skill(
    name="rotate", frame="rotate these words : {}", draw=_on_list(lambda words: [*words[1:], words[0]])
)
"""The task that the aligned model cannot do."""
