"""`--config FILE` and `--print-config` of every command: options in YAML, as `trl sft --config` has them."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from safedelta_hf.cli.options import one_line_errors
from safedelta_hf.errors import ConfigurationError

CONFIG: Final = "config"
PRINT_CONFIG: Final = "print_config"
OWN: Final = (CONFIG, PRINT_CONFIG)
CONTEXT: Final = "config_context"

_PANEL: Final = "Options from a file"
_NULL: Final = "tag:yaml.org,2002:null"
_BOOL: Final = "tag:yaml.org,2002:bool"


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `--config` and `--print-config`.

    A file says what options are where they are left out; each of its values is read as the option's text would be.

    Args:
        command: A function that typer makes a command of.

    Returns:
        The same command with two options more.
    """
    signature = inspect.signature(command)
    taken = {name for name, parameter in signature.parameters.items() if parameter.annotation is typer.Context}
    options = [parameter for name, parameter in signature.parameters.items() if name not in taken]
    own = [
        inspect.Parameter(CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        inspect.Parameter(CONFIG, inspect.Parameter.KEYWORD_ONLY, annotation=_Config, default=None),
        inspect.Parameter(PRINT_CONFIG, inspect.Parameter.KEYWORD_ONLY, annotation=_PrintConfig, default=False),
    ]

    @functools.wraps(command)
    def run(**given: Any) -> None:  # noqa: ANN401 - whatever the command takes
        context, _, print_config = (given.pop(name, None) for name in (CONTEXT, *OWN))  # `_read` has read the file
        if print_config:
            keys = {option.name: _key(option) for option in context.command.params}
            required = {option.name for option in options if option.default is inspect.Parameter.empty}
            typer.echo("".join(_line(keys[name], value, name in required) for name, value in given.items()), nl=False)
        else:
            command(**given, **dict.fromkeys(taken, context))

    run.__signature__ = signature.replace(parameters=[*options, *own])  # type: ignore[attr-defined]
    run.__annotations__ = {
        **{name: kind for name, kind in command.__annotations__.items() if name not in taken},
        **{parameter.name: parameter.annotation for parameter in own},
    }
    return run


def _key(option: Any) -> str:  # noqa: ANN401 - an option of click
    # As on the command line, whatever the function calls it.
    flag: str = next((flag for flag in option.opts if flag.startswith("--")), option.name)
    return flag.removeprefix("--").replace("-", "_")


def _read(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        with one_line_errors():
            context.default_map = _defaults(context, path)
    return path


def _leave_open(context: typer.Context, asked: bool) -> bool:
    if asked:
        for parameter in context.command.params:
            parameter.required = False  # what is missing is shown as missing
    return asked


_Config = Annotated[
    Path | None,
    typer.Option(
        help="YAML file of options, KEY: VALUE; options on the command line win.",
        is_eager=True,  # before the options whose defaults it gives
        callback=_read,
        rich_help_panel=_PANEL,
    ),
]
_PrintConfig = Annotated[
    bool,
    typer.Option(
        "--print-config",
        help="Print the options that would be used, as such a file, and exit.",
        is_eager=True,
        callback=_leave_open,
        rich_help_panel=_PANEL,
    ),
]


def _defaults(context: typer.Context, path: Path) -> dict[str, Any]:
    options = {_key(option): option for option in context.command.params if option.name not in (*OWN, "help")}
    found: dict[str, Any] = {}
    for key, place, node in _entries(path):
        name = key.replace("-", "_")
        if name not in options:
            raise ConfigurationError(f"{place}: {context.command.name} has no option {key!r}; {_known(name, options)}")
        if name in found:
            raise ConfigurationError(f"{place}: {key} is given twice")
        found[name] = _value(options[name], node, f"{place}: {key}")
        if found[name] is not None:
            _check(context, options[name], found[name], f"{place}: {key}")
    return {options[name].name: value for name, value in found.items() if value is not None}


def _entries(path: Path) -> Iterator[tuple[str, str, Any]]:
    import yaml

    try:
        # Nodes keep what was written: `strength: 010` is "010", and `device: no` is "no".
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"--config {str(path)!r} cannot be read ({error})") from error
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ConfigurationError(f"--config {str(path)!r} holds no options; write lines of KEY: VALUE")
    for key, value in root.value:
        yield str(key.value), f"{path}, line {key.start_mark.line + 1}", value


def _value(option: Any, node: Any, what: str) -> Any:  # noqa: ANN401 - an option of click, a node of YAML
    if node.tag == _NULL:
        return None
    takes_many = option.multiple or option.nargs == -1  # of an argument
    if node.id == "sequence" and takes_many:
        if all(item.id == "scalar" and item.tag != _NULL for item in node.value):
            return [item.value for item in node.value]
        raise ConfigurationError(f"{what} is a list, each item of which has to be one value")
    if node.id != "scalar":
        taken = "one value or a list of them" if takes_many else "one value"
        raise ConfigurationError(f"{what} takes {taken}, not a {node.id}")
    if getattr(option, "is_flag", False):
        if node.tag != _BOOL:
            raise ConfigurationError(f"{what} is {node.value!r}, but has to be true or false")
        return node.value.lower() in ("true", "yes", "on")
    return [node.value] if takes_many else node.value


def _check(context: typer.Context, option: Any, value: Any, what: str) -> None:  # noqa: ANN401
    try:
        option.process_value(context, value)
    except typer.BadParameter as error:
        raise ConfigurationError(f"{what}: {error.message}") from error


def _known(name: str, options: Mapping[str, Any]) -> str:
    if close := get_close_matches(name, options, n=1):
        return f"is it {close[0]}?"
    return f"it has {', '.join(options)}"


def _line(key: str, value: Any, is_required: bool) -> str:  # noqa: ANN401 - what an option may hold
    import yaml

    line = yaml.safe_dump({key: _plain(value)}, sort_keys=False, allow_unicode=True)
    return f"{line.rstrip()}  # required\n" if is_required and value is None else line


def _plain(value: Any) -> Any:  # noqa: ANN401 - what an option may hold
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
