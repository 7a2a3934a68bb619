"""Well-known sets of prompts by name: where they are, which column holds the prompt, and under which licence."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from safedelta_hf.errors import DataError


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Where one set of prompts is.

    Attributes:
        title: What it is called in its paper.
        source: Address of a CSV file, or name of a data set on the Hub.
        column: The column with the prompt.
        licence: Its licence, as stated where it is published.
        kind: "harmful" (should be refused) or "benign" (only looks harmful).
        config: Configuration of the data set on the Hub.
        split: Its split.
        only: Columns whose values say which rows belong to it.
        gated: Whether its terms have to be accepted on the Hub first.
    """

    title: str
    source: str
    column: str
    licence: str
    kind: str = "harmful"
    config: str | None = None
    split: str = "train"
    only: Mapping[str, object] = field(default_factory=dict)
    gated: bool = False

    def prompts(self) -> list[str]:
        """Fetch the prompts.

        Returns:
            Each prompt once, in the order of the set.

        Raises:
            DataError: It cannot be fetched, or no longer has that column.
        """
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise DataError(
                f"{self.title} is fetched with the package datasets ({error}); pip install datasets"
            ) from error
        try:
            if self.source.endswith(".csv"):
                rows = load_dataset("csv", data_files=self.source, split="train")
            else:
                rows = load_dataset(self.source, self.config, split=self.split)
        except Exception as error:
            page = f"https://huggingface.co/datasets/{self.source}"
            terms = f"accept its terms at {page} first, or " if self.gated else ""
            raise DataError(
                f"{self.title} cannot be fetched from {self.source} ({type(error).__name__}: {error}); {terms}download "
                "it yourself and pass the file"
            ) from error
        missing = {self.column, *self.only} - set(rows.column_names)
        if missing:
            raise DataError(
                f"{self.title} at {self.source} has the columns {rows.column_names} and not {sorted(missing)}; "
                "download it yourself and pass a file of rows with 'prompt'"
            )
        kept = (row for row in rows if all(row[name] == value for name, value in self.only.items()))
        return list(dict.fromkeys(_text(row[self.column]) for row in kept))


def _text(prompt: Any) -> str:  # noqa: ANN401 - a cell
    # Sets of conversations hold a list of turns, of which the first is the request.
    return str(prompt[0] if isinstance(prompt, list) else prompt).strip()


_GITHUB: Final = "https://raw.githubusercontent.com"

PROMPT_SETS: Final[Mapping[str, PromptSet]] = MappingProxyType(
    {
        "advbench": PromptSet(
            title="AdvBench",
            source=f"{_GITHUB}/llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv",
            column="goal",
            licence="MIT",
        ),
        "harmbench": PromptSet(
            title="HarmBench",
            source=f"{_GITHUB}/centerforaisafety/HarmBench/main/data/behavior_datasets/harmbench_behaviors_text_all.csv",
            column="Behavior",
            licence="MIT",
            only={"FunctionalCategory": "standard"},  # the others need a context, or ask for known texts
        ),
        "beavertails": PromptSet(
            title="BeaverTails",
            source="PKU-Alignment/BeaverTails",
            column="prompt",
            licence="CC BY-NC 4.0",
            split="30k_test",
            only={"is_safe": False},
        ),
        "strongreject": PromptSet(
            title="StrongREJECT",
            source=f"{_GITHUB}/alexandrasouly/strongreject/main/strongreject_dataset/strongreject_dataset.csv",
            column="forbidden_prompt",
            licence="MIT",
        ),
        "sorry-bench": PromptSet(
            title="SORRY-Bench",
            source="sorry-bench/sorry-bench-202503",
            column="turns",
            licence="its own terms",
            only={"prompt_style": "base"},
            gated=True,
        ),
        "or-bench-toxic": PromptSet(
            title="OR-Bench, toxic",
            source="bench-llm/or-bench",
            column="prompt",
            licence="CC BY 4.0",
            config="or-bench-toxic",
        ),
        "or-bench-hard": PromptSet(
            title="OR-Bench, hard 1k",
            source="bench-llm/or-bench",
            column="prompt",
            licence="CC BY 4.0",
            kind="benign",
            config="or-bench-hard-1k",
        ),
        "xstest": PromptSet(
            title="XSTest, safe prompts",
            source=f"{_GITHUB}/paul-rottger/xstest/main/xstest_prompts.csv",
            column="prompt",
            licence="CC BY 4.0",
            kind="benign",
            only={"label": "safe"},
        ),
    }
)
"""The sets by name. HEx-PHI (LLM-Tuning-Safety/HEx-PHI, its own terms) has no one table and has to be downloaded."""
