"""TRL's own scripts with the callback: `python -m safedelta_hf.integrations.trl sft --config train.yaml`."""

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.hf.callback import SafeDeltaCallback
from safedelta_hf.integrations.running import require_installed, tell, wrong_use_told
from safedelta_hf.integrations.settings import SECTION, Settings

TRAINERS: Final[Mapping[str, str]] = {"sft": "SFTTrainer", "dpo": "DPOTrainer"}
"""Of each script of TRL that can be run, the trainer that it makes."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of TRL's scripts.

    Args:
        arguments: Its name, `--config` with a YAML file, and what stands in place of what that says; None for those of
            the command line.
    """
    name, *words = list(sys.argv[1:] if arguments is None else arguments) or [""]
    with wrong_use_told():
        script = script_of(name)
        settings = section_of(words)
        parsed = without_section(script.make_parser(), words)
        callback = settings.callback()
    with added(callback, TRAINERS[name]):
        script.main(*parsed)
    tell(callback, parsed[1].output_dir)


def script_of(name: str) -> Any:  # noqa: ANN401 - a module of TRL
    """Import one of TRL's scripts.

    Args:
        name: What `trl` calls it.

    Returns:
        Its module.

    Raises:
        ConfigurationError: It is none that can be run, or TRL is not installed.
    """
    require_installed("trl", "trl")
    if name not in TRAINERS:
        raise ConfigurationError(f"{name!r} is not one of {', '.join(TRAINERS)}, the scripts of TRL that are run")
    return importlib.import_module(f"trl.scripts.{name}")


def section_of(words: Sequence[str]) -> Settings:
    """Read the section of the configuration that a command line names.

    Args:
        words: Of the command line.

    Returns:
        What the section says.

    Raises:
        ConfigurationError: There is no such file, or no section in it.
    """
    import yaml  # of transformers' own dependencies

    path = next((after for word, after in zip(words, words[1:], strict=False) if word == "--config"), None)
    if path is None:
        raise ConfigurationError(f"give --config with a YAML file that has a section `{SECTION}:`; see docs/trl.md")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"--config {path!r} cannot be read as YAML ({error})") from error
    if not isinstance(config, Mapping) or SECTION not in config:
        raise ConfigurationError(f"--config {path!r} has no section `{SECTION}:`; see docs/trl.md")
    return Settings.read(config[SECTION])


def without_section(parser: Any, words: Sequence[str]) -> list[Any]:  # noqa: ANN401 - TRL's
    """Have TRL read its command line.

    Args:
        parser: TRL's parser.
        words: Of the command line.

    Returns:
        What TRL's script takes.

    Raises:
        ConfigurationError: A word or a setting is not one of the script's; the script itself passes over it.
    """
    parsed: list[Any]
    *parsed, left = parser.parse_args_and_config(list(words), return_remaining_strings=True)
    place = left.index(f"--{SECTION}")
    del left[place : place + 2]
    if left:
        raise ConfigurationError(
            f"TRL's script does not know {' '.join(left)}; what is meant for accelerate is given to it: "
            "accelerate launch --config_file FILE -m safedelta_hf.integrations.trl ..."
        )
    return parsed


@contextmanager
def added(callback: SafeDeltaCallback, trainer: str) -> Iterator[None]:
    """Have TRL's script make its trainer with the callback: it imports the class by its name as it starts.

    Args:
        callback: The callback.
        trainer: Name of the class.

    Yields:
        Nothing.
    """
    import trl

    original = getattr(trl, trainer)
    setattr(trl, trainer, partial(original, callbacks=[callback]))
    try:
        yield
    finally:
        setattr(trl, trainer, original)


if __name__ == "__main__":
    main()
