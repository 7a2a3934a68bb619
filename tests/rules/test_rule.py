import math

import pytest
import torch
from hypothesis import given

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.rules import RULES, AutoStrength, Ridge, Scale, TaskRidge, default_rule
from tests.fixtures.problems import adjusted, layer, layers, strengths


@pytest.mark.parametrize("kind", [Ridge, TaskRidge, Scale])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "strong", True, None])
def test_a_strength_that_is_none_is_a_named_error(kind, value):
    with pytest.raises(ConfigurationError, match=f"{kind.__name__}: strength="):
        kind(strength=value)


@pytest.mark.parametrize(
    ("field", "value"), [("lost", 0.0), ("lost", math.nan), ("lost", 1.0), ("confidence", 1.0), ("precision", 1.0)]
)
def test_a_search_setting_out_of_range_is_a_named_error(field, value):
    with pytest.raises(ConfigurationError, match=f"AutoStrength: {field}="):
        AutoStrength(**{field: value})


def test_auto_is_the_default_and_a_shorthand():
    assert Ridge() == Ridge(strength="auto") == Ridge(strength=AutoStrength())
    assert Ridge().auto == AutoStrength() and Ridge(strength=1.0).auto is None
    assert Ridge().at(2.0) == Ridge(strength=2.0)
    assert TaskRidge(blend=0.3).at(2.0).blend == 0.3


def test_an_unmeasured_strength_cannot_be_applied():
    delta, hessian = layer(0, 2, 3, 9)
    with pytest.raises(ConfigurationError, match="auto"):
        adjusted(Ridge(), delta, hessian)


def test_every_rule_is_registered_by_its_name():
    assert all(rule.name == name for name, rule in RULES.items())
    assert {"safe_delta", "ridge", "task_ridge", "scale"} <= set(RULES)


def test_the_default_weighs_the_task_where_it_can():
    assert default_rule(None) == Ridge() and default_rule(object()) == TaskRidge()


@given(layers, strengths)
def test_rows_held_apart_are_adjusted_as_the_whole(problem, strength):
    delta, hessian = problem
    task = layer(9, 1, delta.shape[1], 30)[1]
    for rule in (Ridge(strength=strength), TaskRidge(strength=strength), Scale(strength=strength)):
        whole = adjusted(rule, delta, hessian, task)
        parts = [adjusted(rule, rows, hessian, task) for rows in delta.split(3)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


@given(layers, strengths)
def test_the_factor_of_a_lora_is_adjusted_as_the_product(problem, strength):
    delta, hessian = problem
    task = layer(9, 1, delta.shape[1], 30)[1]
    outer = torch.randn(5, delta.shape[0], generator=torch.Generator().manual_seed(1))
    for rule in (Ridge(strength=strength), TaskRidge(strength=strength), Scale(strength=strength)):
        product = adjusted(rule, outer @ delta, hessian, task)
        assert (outer @ adjusted(rule, delta, hessian, task) - product).norm() <= 1e-3 * (outer @ delta).norm()
