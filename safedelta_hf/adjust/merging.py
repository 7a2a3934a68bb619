"""What a rule that merges weights needs besides the delta: further models, opened and checked before any weight."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from safedelta_hf.core.finite import is_finite
from safedelta_hf.deltas.dense import Delta, DenseDelta
from safedelta_hf.deltas.further_models import FurtherModel, open_further_model, seen_from_base
from safedelta_hf.errors import NumericalError, SafeDeltaError
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records.plan import Action, PlanEntry
from safedelta_hf.records.uses import MatrixView, Use, inputs_first
from safedelta_hf.rules import MergeInput, MergeRule, Rule, source_name


class Merging:
    """The further models of a rule; they stay the same at every strength.

    Args:
        rule: The rule.
        entries: Plan of the parameters.
        profile: Profile of the base.

    Raises:
        SafeDeltaError: A further model cannot be opened.
    """

    def __init__(self, rule: MergeRule, entries: Iterable[PlanEntry], profile: SafetyProfile) -> None:
        aliases = {entry.parameter: entry.aliases for entry in entries}
        transposed = inputs_first(profile.uses)
        self._others: list[tuple[str, FurtherModel]] = [
            (
                source_name(source),
                open_further_model(source, aliases, profile.header, transposed)
                if isinstance(source, nn.Module | str | Path)
                else seen_from_base(source.read, source.source),
            )
            for source in rule.sources
        ]

    def check(self, entry: PlanEntry) -> None:
        """Make sure that every further model has a parameter, if it will be merged.

        Args:
            entry: Plan of the parameter.

        Raises:
            NumericalError: One holds NaN or Inf.
            SafeDeltaError: One has none, or one of another shape; named by parameter.
        """
        if entry.action is not Action.ADJUST:
            return
        zero = torch.zeros(entry.shape)
        for name, other in self._others:
            try:
                weight = other(entry.parameter, zero)
            except SafeDeltaError as error:
                raise error.at(entry.parameter) from error
            if not is_finite(weight):
                raise NumericalError(f"{entry.parameter}: holds NaN or Inf in {name}; give another model")

    def merged(self, rule: Rule, entry: PlanEntry, delta: Delta) -> tuple[DenseDelta, tuple[str, ...]]:
        """Merge one parameter.

        Args:
            rule: The rule, at whatever strength.
            entry: Plan of the parameter.
            delta: Its delta.

        Returns:
            What is kept, and what there is to say about it.
        """
        assert isinstance(rule, MergeRule) and isinstance(delta, DenseDelta), "checked before any weight was touched"
        base = delta.base
        values, notes = rule.merged(
            MergeInput(
                name=entry.parameter,
                base=base,
                delta=delta.values,
                others=self._deltas(entry.parameter, base),
                is_transposed=entry.uses[0].has_inputs_first,
                is_stack=_is_one_of_many(entry.uses[0], entry.shape),
            )
        )
        return delta.adjusted_to(values.contiguous(), entry.uses), notes

    def _deltas(self, parameter: str, base: Tensor) -> tuple[Tensor, ...]:
        return tuple(other(parameter, base) for _, other in self._others)


def _is_one_of_many(use: Use, shape: tuple[int, ...]) -> bool:
    matrix = MatrixView.contiguous(*shape[1:], use.view.start) if len(shape) == 3 else None
    return matrix is not None and use.view in (matrix, matrix.transposed)
