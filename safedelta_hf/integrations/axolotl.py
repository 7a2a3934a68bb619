"""The plug-in for Axolotl, which its configuration names under `plugins:`. Imported by Axolotl alone."""

from collections.abc import Mapping
from typing import Any, Final

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator, model_validator
from transformers import Trainer
from typing_extensions import override

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.hf.callback import SafeDeltaCallback
from safedelta_hf.integrations.running import save_report, tell
from safedelta_hf.integrations.settings import SECTION, Settings

PLUGIN: Final = "safedelta_hf.integrations.axolotl.SafeDeltaPlugin"
"""What stands under `plugins:`."""


class SafeDeltaArgs(BaseModel):
    """What the plug-in adds to Axolotl's configuration; Axolotl validates it before anything is loaded.

    Attributes:
        safedelta: The section; see `Settings`.
    """

    safedelta: dict[str, Any] | None = None

    @field_validator("safedelta", mode="before")
    @classmethod
    def require_readable(cls, section: object) -> object:
        """Make sure that the section can be read.

        Args:
            section: As YAML gives it.

        Returns:
            The same.
        """
        Settings.read(section)
        return section

    @model_validator(mode="before")
    @classmethod
    def require_section(cls, config: Any) -> Any:  # noqa: ANN401 - as Axolotl gives it
        """Make sure that there is a section, and nothing that the adjustment could not undo.

        Args:
            config: The whole configuration.

        Returns:
            The same.

        Raises:
            ConfigurationError: There is none, or the base would not stay as it was.
        """
        if PLUGIN not in (config.get("plugins") or ()):
            return config  # an earlier configuration of the same process named it
        if config.get(SECTION) is None:
            raise ConfigurationError(
                f"plugins names {PLUGIN}, so a section `{SECTION}:` is needed; see docs/axolotl.md"
            )
        if config.get("relora"):
            raise ConfigurationError(
                f"{SECTION}: relora merges the adapter into the base again and again, so the delta is lost; leave "
                "relora out, or adjust the saved model afterwards: safedelta apply --base BASE --tuned MERGED"
            )
        return config


class SafeDeltaPlugin(BasePlugin):  # type: ignore[misc]
    """Adjusts what Axolotl trains, before it saves it."""

    def __init__(self) -> None:
        super().__init__()
        self._callback: SafeDeltaCallback | None = None

    @override
    def get_input_args(self) -> str:
        return f"{SafeDeltaArgs.__module__}.{SafeDeltaArgs.__name__}"

    @override
    def load_datasets(self, cfg: Mapping[str, Any], preprocess: bool = False) -> None:
        # The first hook of a run: what is missing is told before the model is loaded.
        if not preprocess and cfg.get(SECTION) is not None:
            Settings.read(cfg[SECTION]).callback()

    @override
    def add_callbacks_post_trainer(self, cfg: Mapping[str, Any], trainer: Trainer) -> list[SafeDeltaCallback]:
        if cfg.get(SECTION) is None:
            return []
        self._callback = Settings.read(cfg[SECTION]).callback()
        return [self._callback]

    @override
    def post_train(self, cfg: Mapping[str, Any], model: object) -> None:
        if self._callback is not None:  # Axolotl calls this before it saves, and again after
            save_report(self._callback, cfg["output_dir"])

    @override
    def post_train_unload(self, cfg: Mapping[str, Any]) -> None:
        if self._callback is not None:
            callback, self._callback = self._callback, None
            tell(callback, cfg["output_dir"])
