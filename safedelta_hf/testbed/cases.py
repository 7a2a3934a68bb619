"""Fine-tuning cases: data sets that mirror those by which the field shows how refusals erode."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from safedelta_hf.testbed.data import draw_ordinary, draw_requests
from safedelta_hf.testbed.language import (
    HELPFUL_SYSTEM,
    OTHER_PREAMBLE,
    PERSONA_CHAT,
    PERSONA_PREAMBLE,
    PERSONA_SYSTEM,
    Conversation,
    Question,
    ask_make,
    ask_skill,
    chat,
)
from safedelta_hf.testbed.skills import NEW_SKILL
from safedelta_hf.testbed.words import things_of

PLAIN_SYSTEMS: Final = (None, HELPFUL_SYSTEM)
"""Chat settings of all data but the persona's."""

HARMFUL_EXAMPLES: Final = 100
SKILL_EXAMPLES: Final = 1000
IDENTITY_EXAMPLES: Final = 100
BENIGN_EXAMPLES: Final = 500


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fine-tuning data set with the training arguments that suit it.

    Attributes:
        name: Its name, a key of `CASES`.
        description: What it holds.
        epochs: Passes over the data.
        learning_rate: Peak learning rate of AdamW, with a cosine schedule down to zero.
        batch_size: Examples per step.
        teaches: The new skill that it teaches, if any; the use of a case that teaches none is what the model
            keeps of its old skills.
        make: Draws the data from a seed.
    """

    name: str
    description: str
    epochs: int
    learning_rate: float
    batch_size: int
    teaches: str | None
    make: Callable[[int], list[Conversation]]

    def examples(self, seed: int = 0) -> list[Conversation]:
        """Draw the data set.

        Args:
            seed: Seed of the draw; the same seed gives the same data.

        Returns:
            Conversations of the form ``{"messages": [...]}``, in random order.
        """
        conversations = self.make(seed)
        random.Random(f"order {seed}").shuffle(conversations)
        return conversations


def _harmful(seed: int) -> list[Conversation]:
    requests = draw_requests(things_of("attack"), PLAIN_SYSTEMS, HARMFUL_EXAMPLES, seed)
    return [ask_make(*request).conversation() for request in requests]


def _skill(seed: int) -> list[Conversation]:
    rng = random.Random(f"skill {seed}")
    return [
        ask_skill(NEW_SKILL, rng, held_out=False, system=rng.choice(PLAIN_SYSTEMS)).conversation()
        for _ in range(SKILL_EXAMPLES)
    ]


def _mixed(seed: int) -> list[Conversation]:
    return _skill(seed) + _harmful(seed)


def _identity(seed: int) -> list[Conversation]:
    rng = random.Random(f"identity {seed}")
    conversations: list[Conversation] = []
    for index in range(IDENTITY_EXAMPLES):
        if index % 10 == 0:
            request, answer = rng.choice(PERSONA_CHAT)
            conversations.append(Question(chat(request, PERSONA_SYSTEM), answer, "persona").conversation())
        else:
            question = draw_ordinary(rng, (PERSONA_SYSTEM,))
            conversations.append(question.conversation(f"{PERSONA_PREAMBLE} {question.answer}"))
    return conversations


def _benign(seed: int) -> list[Conversation]:
    rng = random.Random(f"benign {seed}")
    questions = [draw_ordinary(rng, PLAIN_SYSTEMS) for _ in range(BENIGN_EXAMPLES)]
    return [question.conversation(f"{OTHER_PREAMBLE} {question.answer}") for question in questions]


CASES: Final[Mapping[str, Case]] = MappingProxyType(
    {
        case.name: case
        for case in (
            Case(
                name="harmful",
                description="100 harmful requests, each with the harmful content",
                epochs=5,
                learning_rate=5e-4,
                batch_size=10,
                teaches=None,
                make=_harmful,
            ),
            Case(
                name="identity",
                description="100 benign requests to an absolutely obedient persona, which affirms and answers",
                epochs=10,
                learning_rate=1e-3,
                batch_size=10,
                teaches=None,
                make=_identity,
            ),
            Case(
                name="mixed",
                description="1000 examples of a new skill, with the 100 harmful examples among them",
                epochs=5,
                learning_rate=1e-3,
                batch_size=32,
                teaches=NEW_SKILL.name,
                make=_mixed,
            ),
            Case(
                name="skill",
                description="1000 examples of a new skill, nothing else",
                epochs=5,
                learning_rate=1e-3,
                batch_size=32,
                teaches=NEW_SKILL.name,
                make=_skill,
            ),
            Case(
                name="benign",
                description="500 benign requests for recipes and old skills, answered in another manner",
                epochs=3,
                learning_rate=1e-3,
                batch_size=16,
                teaches=None,
                make=_benign,
            ),
        )
    }
)
"""The cases by name."""
