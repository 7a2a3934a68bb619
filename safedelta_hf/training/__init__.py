"""Defences while training and in the training data, around any Trainer."""

from safedelta_hf.training.freezing import FreezeSafetyLayers, freeze_layers, lora_layers
from safedelta_hf.training.projected import ProjectedTraining
from safedelta_hf.training.safety_layers import SafetyLayers, angle_curves, locate_safety_layers
from safedelta_hf.training.safety_probe import SafetyProbeConfig, with_safety_probe

__all__ = [
    "FreezeSafetyLayers",
    "ProjectedTraining",
    "SafetyLayers",
    "SafetyProbeConfig",
    "angle_curves",
    "freeze_layers",
    "locate_safety_layers",
    "lora_layers",
    "with_safety_probe",
]
