"""Defences while training and in the training data, around any Trainer."""

from safedelta_hf.training.angles import angle_curves
from safedelta_hf.training.derta import derta_rows
from safedelta_hf.training.freezing import FreezeSafetyLayers, freeze_layers, lora_layers
from safedelta_hf.training.guard import add_guard_tokens, guard_rows
from safedelta_hf.training.mixing import PAPER, balance, mix_safety, refusal_mix
from safedelta_hf.training.projected import ProjectedTraining
from safedelta_hf.training.rows import check_arguments
from safedelta_hf.training.safety_layers import SafetyLayers, locate_safety_layers
from safedelta_hf.training.safety_probe import SafetyProbeConfig, with_safety_probe

__all__ = [
    "PAPER",
    "FreezeSafetyLayers",
    "ProjectedTraining",
    "SafetyLayers",
    "SafetyProbeConfig",
    "add_guard_tokens",
    "angle_curves",
    "balance",
    "check_arguments",
    "derta_rows",
    "freeze_layers",
    "guard_rows",
    "locate_safety_layers",
    "lora_layers",
    "mix_safety",
    "refusal_mix",
    "with_safety_probe",
]
