"""Which parameters a run trains, and what will happen to them."""

from torch import nn

from safedelta_hf.capture.profile import SafetyProfile
from safedelta_hf.hf.run import trained_adapter
from safedelta_hf.names import parameter_names
from safedelta_hf.pipeline import plan_adapter, plan_model
from safedelta_hf.records import PlanEntry, Storage, Treatment
from safedelta_hf.sharding.held import HeldModel


def entries_of_trained(model: nn.Module, profile: SafetyProfile, treatment: Treatment) -> list[PlanEntry]:
    """Plan what a run trains, before it trains it.

    Args:
        model: The model, with or without an adapter.
        profile: Profile of its base.
        treatment: What to do with parameters other than linear weights.

    Returns:
        One entry for each trained parameter.
    """
    adapter = trained_adapter(model)
    if adapter is not None:
        return list(plan_adapter(model, profile, treatment, adapter).entries)
    trained = {name for parameter, name in parameter_names(model).items() if parameter.requires_grad}
    entries = plan_model(model, profile, treatment).entries
    return [entry for entry in entries if not trained.isdisjoint((entry.parameter, *entry.originals))]


def storage_of_trained(model: nn.Module) -> Storage:
    """The kind of storage that the deltas of a run will have, as far as merges need to know.

    Args:
        model: The model, with or without an adapter.

    Returns:
        The kind.
    """
    if trained_adapter(model) is not None:
        return Storage.ADAPTER
    holding = HeldModel.of(model).holding
    return Storage.DENSE if all(holding.piece(name).is_whole for name in holding.names) else Storage.SHARDED
