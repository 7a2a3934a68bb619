"""The public names and how they are called: what a release promises."""

import dataclasses
import enum
import inspect
import re
from pathlib import Path

import safedelta_hf

GOLDEN = Path(__file__).parent / "golden" / "contract.txt"
HOW_TO_UPDATE = (
    f"the public names or signatures are not those of {GOLDEN.name}; if the change is meant, say it in CHANGELOG.md "
    "and write the file anew: python -m tests.test_contract"
)


def contract() -> str:
    """Every public name with its signature, and the public methods, properties and fields of every class."""
    return "\n".join(line for name in safedelta_hf.__all__ for line in described(name, getattr(safedelta_hf, name)))


def described(name: str, thing: object) -> list[str]:
    if isinstance(thing, str):
        return [f"{name}: str", ""]
    if not inspect.isclass(thing):
        return [name + called(thing), ""]
    lines = [f"class {name}{called(thing)}"]
    fields = [f.name for f in dataclasses.fields(thing)] if dataclasses.is_dataclass(thing) else []
    lines += [f"    {field}: field" for field in fields]
    for member, value in sorted(vars_of(thing).items()):
        if member.startswith("_") or member in fields:
            continue
        if isinstance(value, enum.Enum):
            lines.append(f"    {member} = {value.value!r}")
        elif isinstance(value, staticmethod | classmethod):
            lines.append(f"    {type(value).__name__} {member}{called(value.__func__)}")
        elif callable(value):
            lines.append(f"    {member}{called(value)}")
        else:
            lines.append(f"    {member}: {type(value).__name__}")
    return [*lines, ""]


def vars_of(kind: type) -> dict[str, object]:
    """What a class and those of its bases that are ours define; the Trainer's own hooks are not our promise."""
    ours = [base for base in reversed(kind.__mro__) if base.__module__.partition(".")[0] == "safedelta_hf"]
    return {name: value for base in ours for name, value in vars(base).items()}


def called(thing: object) -> str:
    """A signature; where a type is defined is not part of the promise."""
    signature = inspect.signature(thing)
    arguments = [said(parameter) for parameter in signature.parameters.values()]
    return f"({', '.join(with_markers(signature, arguments))})" + returned(signature)


def with_markers(signature: inspect.Signature, arguments: list[str]) -> list[str]:
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        arguments.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    return arguments


def said(parameter: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    annotation = "" if parameter.annotation is parameter.empty else f": {written(parameter.annotation)}"
    default = "" if parameter.default is parameter.empty else f" = {default_of(parameter.default)}"
    return stars + parameter.name + annotation + default


def default_of(value: object) -> str:
    text = repr(value)
    return f"<{type(value).__name__}>" if " at 0x" in text or text == "<factory>" else text


def returned(signature: inspect.Signature) -> str:
    return "" if signature.return_annotation is signature.empty else f" -> {written(signature.return_annotation)}"


def written(annotation: object) -> str:
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", inspect.formatannotation(annotation))


def test_public_names_are_called_as_promised():
    assert contract() == GOLDEN.read_text(encoding="utf-8"), HOW_TO_UPDATE


def test_public_names_are_sorted_and_there():
    assert list(safedelta_hf.__all__) == sorted(safedelta_hf.__all__)
    for name in safedelta_hf.__all__:
        assert hasattr(safedelta_hf, name)


if __name__ == "__main__":
    GOLDEN.write_text(contract(), encoding="utf-8")
