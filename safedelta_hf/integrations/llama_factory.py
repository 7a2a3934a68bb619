"""LLaMA-Factory's `train` with the callback: `python -m safedelta_hf.integrations.llama_factory train.yaml`."""

from typing import Any, Final

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.integrations.running import require_installed, tell, wrong_use_told
from safedelta_hf.integrations.settings import SECTION, Settings

STAGES: Final = ("pt", "sft", "dpo", "kto")
"""Stages that train a causal language model by the Trainer's own loop."""


def main() -> None:
    """Run what the command line says: a YAML file, and `key=value` in place of what it says."""
    with wrong_use_told():
        require_installed("llamafactory", "llamafactory")
        from llamafactory.hparams import read_args

        args, settings = without_section(read_args())
        callback = settings.callback()
    from llamafactory.train.tuner import run_exp

    run_exp(args, callbacks=[callback])
    tell(callback, args["output_dir"])


def without_section(args: object) -> tuple[dict[str, Any], Settings]:
    """Take the section out of a configuration, which LLaMA-Factory would not know.

    Args:
        args: As LLaMA-Factory reads it: a mapping of a file, or the words of a command line.

    Returns:
        The configuration without the section, and what the section says.

    Raises:
        ConfigurationError: There is no file or no section, or the stage is none that can be adjusted.
    """
    if not isinstance(args, dict) or SECTION not in args:
        raise ConfigurationError(f"give a YAML file with a section `{SECTION}:` first; see docs/llama-factory.md")
    settings = Settings.read(args[SECTION])
    stage = args.get("stage", "sft")
    if stage not in STAGES:
        raise ConfigurationError(f"stage={stage!r} is not one of {', '.join(STAGES)}, after which a model is adjusted")
    return {key: value for key, value in args.items() if key != SECTION}, settings


if __name__ == "__main__":
    main()
