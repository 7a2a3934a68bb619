"""The `safedelta:` section of a training configuration: the callback's arguments, as YAML writes them."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, Final, Self, TypeVar

from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.errors import ConfigurationError, require_kind
from safedelta_hf.hf.callback import SafeDeltaCallback
from safedelta_hf.polish.config import PolishConfig
from safedelta_hf.records.plan import Treatment
from safedelta_hf.rules import RULES, AutoStrength, Rule, default_rule

SECTION: Final = "safedelta"
"""Name of the section."""

_TEXT_NUMBER: Final = re.compile(r"[-+]?\d+[eE][-+]?\d+")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `SafeDeltaCallback`, by its names and with its defaults; all but `processing_class`.

    Attributes:
        safety_dataset: Harmful prompts with refusals: a file, the name of a data set on the Hub, or rows.
        rule: Which part of each delta to keep.
        config: How data is read, and which linear weights are adjusted.
        profile: Folder of a profile made before, instead of `safety_dataset`.
        ordinary_dataset: Ordinary prompts with the base model's responses.
        ordinary_weight: Weight of that data.
        task_dataset: Examples of the fine-tuning data; drawn from the Trainer's own if None.
        task_examples: Number of examples to draw.
        sort_task: Whether those of them that the base would refuse are left out.
        base: Folder of the aligned model, if it is not what the run starts from.
        treatment: What to do with embeddings, norms, biases, the head, and what cannot be covered.
        keep_tuned: Folder to save the fine-tuned model to before it is adjusted.
        polish: How the adjusted model is polished; None for no polish.

    Raises:
        ConfigurationError: A folder or a data set is given as something else.
    """

    safety_dataset: str | list[Any] | None = None
    rule: Rule | None = None
    config: ProfileConfig | None = None
    profile: str | None = None
    ordinary_dataset: str | list[Any] | None = None
    ordinary_weight: float = 0.1
    task_dataset: str | list[Any] | None = None
    task_examples: int = 256
    sort_task: bool = True
    base: str | None = None
    treatment: Treatment | None = None
    keep_tuned: str | None = None
    polish: PolishConfig | None = None

    def __post_init__(self) -> None:
        for name in ("profile", "base", "keep_tuned"):
            require_kind(SECTION, name, getattr(self, name), (str, type(None)), "the path of a folder")
        for name in ("safety_dataset", "ordinary_dataset", "task_dataset"):
            told = "a file, the name of a data set on the Hub, or a list of rows"
            require_kind(SECTION, name, getattr(self, name), (str, list, type(None)), told)

    @classmethod
    def read(cls, section: object) -> Self:
        """Read the section.

        Args:
            section: What stands under `safedelta:`. `rule` is the name of a rule, or a mapping with its `name` and
                settings; `strength` a number, "auto", or a mapping with the settings of `AutoStrength`; `polish` may be
                true; `config`, `treatment` and `polish` are mappings with the settings of those classes.

        Returns:
            The settings; files and folders that they name are not looked at yet.

        Raises:
            ConfigurationError: It is no mapping, a setting is unknown, or a value is not one that it takes.
        """
        require_kind(SECTION, "section", section, Mapping, "a mapping of settings, such as `safety_dataset: FILE`")
        assert isinstance(section, Mapping)
        given = {key: value for key, value in section.items() if value is not None}
        _require_known(SECTION, given, {*_settings_of(cls), "strength"})
        _require_numbers(SECTION, given)
        rule = _rule(given.pop("rule", None), given.pop("strength", None))
        if isinstance(given.get("polish"), bool):
            given["polish"] = {} if given["polish"] else None
        for name, kind in (("config", ProfileConfig), ("treatment", Treatment), ("polish", PolishConfig)):
            if given.get(name) is not None:
                given[name] = _made(kind, name, given[name])
        return cls(rule=rule, **given)

    def callback(self) -> SafeDeltaCallback:
        """The callback that they describe.

        Returns:
            A new one, which leaves it to the launcher to say what was done; it has found the files and folders.
        """
        callback = SafeDeltaCallback(**{name: getattr(self, name) for name in _settings_of(type(self))})
        callback.says_outcome = False
        return callback


def _rule(given: object, strength: object) -> Rule | None:
    if given is None and strength is None:
        return None
    if given is None:
        kind: type[Rule] = type(default_rule("drawn from the Trainer's data"))
        settings: Mapping[str, Any] = {}
    else:
        settings = given if isinstance(given, Mapping) else {"name": given}
        if not isinstance(settings.get("name"), str) or settings["name"] not in RULES:
            raise ConfigurationError(f"{SECTION}: rule={given!r} does not name one of {', '.join(RULES)}")
        kind = RULES[settings["name"]]
    settings = {key: value for key, value in settings.items() if key != "name"}
    if strength is not None:
        if "strength" in settings:
            raise ConfigurationError(f"{SECTION}: strength is given twice, by itself and under rule; leave one out")
        settings["strength"] = strength
    if isinstance(settings.get("strength"), Mapping):
        settings["strength"] = _made(AutoStrength, "strength", settings["strength"])
    return _made(kind, "rule", settings)


def _made(kind: type[T], name: str, given: object) -> T:
    require_kind(SECTION, name, given, Mapping, f"a mapping with settings of {kind.__name__}")
    assert isinstance(given, Mapping)
    _require_known(f"{SECTION}.{name}", given, _settings_of(kind))
    return kind(**given)


def _settings_of(kind: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _require_known(place: str, given: Mapping[Any, Any], known: Collection[str]) -> None:
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            told = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
            raise ConfigurationError(f"{place}: there is no setting {key!r}; {told}")


def _require_numbers(place: str, given: Mapping[Any, Any]) -> None:
    # YAML 1.1, which PyYAML reads, asks for a point: 1e-3 is a text.
    for key, value in given.items():
        if isinstance(value, Mapping):
            _require_numbers(f"{place}.{key}", value)
        elif isinstance(value, str) and _TEXT_NUMBER.fullmatch(value):
            point = re.sub("[eE]", ".0e", value)
            raise ConfigurationError(f"{place}: {key}={value!r} is a text in YAML, no number; write {point}")
