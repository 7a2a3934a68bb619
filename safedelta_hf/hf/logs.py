"""Metrics into the Trainer's log history and to its trackers, from inside a callback."""

import inspect

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

logger = logging.get_logger(__name__)


def log_metrics(
    metrics: dict[str, float], args: TrainingArguments, state: TrainerState, control: TrainerControl
) -> None:
    """Log as `Trainer.log` does: into `state.log_history`, and to every callback's `on_log`.

    Callbacks are not given their Trainer, and at `on_train_end` setting `should_log` has no effect any more. The
    handler that is calling is therefore looked up on the call stack.

    Args:
        metrics: Scalars by name.
        args: As the callback received them.
        state: As the callback received it; its history grows by one entry.
        control: As the callback received it.
    """
    logs = dict(metrics) if state.epoch is None else {**metrics, "epoch": state.epoch}
    state.log_history.append({**logs, "step": state.global_step})
    handler = _calling_handler()
    if handler is None:
        logger.warning("Safe Delta: not called by a Trainer, so its metrics go to state.log_history alone.")
        return
    handler.on_log(args, state, control, logs)


def _calling_handler() -> CallbackHandler | None:
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None
