"""The `safedelta` command."""

import importlib
from types import MappingProxyType
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup
from typing_extensions import override

from safedelta_hf import __version__

COMMANDS: Final = MappingProxyType(
    {
        "demo": (
            "safedelta_hf.cli.demo:demo",
            "Fine-tune the tiny model that comes with the package, with the callback, and show what it does to "
            "refusals.",
        ),
        "refusals": (
            "safedelta_hf.cli.refusals:refusals",
            "Ask a model harmful prompts, and keep what it refuses as safety data.",
        ),
        "audit": (
            "safedelta_hf.cli.audit:audit",
            "Find the rows of a fine-tuning data set that the base would refuse, and how surely.",
        ),
        "profile": (
            "safedelta_hf.cli.profile:profile",
            "Collect the profile of a base model once, for every fine-tune of it.",
        ),
        "apply": (
            "safedelta_hf.cli.apply:apply",
            "Adjust a fine-tuned model or adapter in its folder.",
        ),
        "show": (
            "safedelta_hf.cli.show:show",
            "Read what a folder of weights says of its adjustment, and whether the weights are the ones.",
        ),
        "eval": (
            "safedelta_hf.cli.evaluate:evaluate",
            "Measure what a model refuses, what it should not refuse, and what it can do.",
        ),
        "board": (
            "safedelta_hf.cli.board:board",
            "Put evaluations side by side: tables with paired tests, a page for a review board, conditions to fail by.",
        ),
        "compare": (
            "safedelta_hf.cli.compare:comparison",
            "Compare rules, and other methods, by attack success and by what a model can still do: JSON, tables, "
            "figures.",
        ),
    }
)
"""Where each command is, and what it is for; read before anything that takes seconds to import."""

SETTINGS: Final = {"add_completion": False, "pretty_exceptions_enable": False}


class LazyCommands(TyperGroup):
    """Commands whose modules are imported when they are called."""

    @override
    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(COMMANDS)

    @override
    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        if cmd_name in self.commands or cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1])  # enough to be listed

    @override
    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        if args[0] in COMMANDS:
            self.commands[args[0]] = loaded(args[0])
        return super().resolve_command(ctx, args)


def loaded(name: str) -> Any:  # noqa: ANN401 - a command of click
    """Import a command.

    Args:
        name: One of `COMMANDS`.

    Returns:
        The command, with its options.
    """
    from safedelta_hf.cli.config_file import configured  # takes seconds, as every command does

    module, function = COMMANDS[name][0].split(":")
    alone = typer.Typer(**SETTINGS)  # type: ignore[arg-type]
    alone.command(name)(configured(getattr(importlib.import_module(module), function)))
    return typer.main.get_command(alone)


app = typer.Typer(cls=LazyCommands, no_args_is_help=True, **SETTINGS)  # type: ignore[arg-type]


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def safedelta(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_tell_version)
    ] = False,
) -> None:
    """Fine-tune an aligned language model and keep its refusals."""


if __name__ == "__main__":
    app()
