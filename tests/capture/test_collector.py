"""Moments are the sums of what was told; the same inputs count once, and only the same ones do."""

import pytest
import torch
from torch import nn

from safedelta_hf.capture.collector import MomentCollector, ObservedUses, in_order, merged
from safedelta_hf.capture.views import ParameterView
from safedelta_hf.core.low_rank import LowRank
from safedelta_hf.errors import CaptureError, NumericalError
from safedelta_hf.profile.moments import MomentStorage
from safedelta_hf.records.uses import MatrixView, Role, Use
from tests.capture.test_reading import collect, moment_of
from tests.fixtures import tiny


def test_layers_that_read_the_same_tensor_share_one_moment(llama, safety_rows):
    profile = collect(llama, safety_rows)
    keys = {use.parameter.removeprefix("model.layers.0."): use.moment for use in profile.uses}
    assert keys["self_attn.q_proj.weight"] == keys["self_attn.k_proj.weight"] == keys["self_attn.v_proj.weight"]
    assert keys["mlp.gate_proj.weight"] == keys["mlp.up_proj.weight"]
    assert len({keys[f"{name}.weight"] for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")}) == 3


def test_sharing_changes_no_moment(llama, safety_rows):
    shared, apart = collect(llama, safety_rows), collect(llama, safety_rows, share_moments=False)
    assert len(shared.moments) < len(apart.moments)
    for use in shared.uses:
        torch.testing.assert_close(
            shared.moments[use.moment].total, moment_of(apart, use.parameter, use.role).total, rtol=1e-5, atol=1e-6
        )


def test_a_layer_that_stops_sharing_is_an_error_not_a_wrong_moment(safety_rows):
    class Fickle(tiny.Plain):
        def __init__(self):
            super().__init__()
            self.twin = nn.Linear(8, 16)
            self.calls = 0

        def forward(self, input_ids):
            self.calls += 1
            hidden = self.embed(input_ids)
            twin = self.twin(hidden if self.calls == 1 else hidden.clone())
            return self.down(self.up(hidden) + twin)

    with pytest.raises(CaptureError, match="share_moments=False"):
        collect(Fickle(), safety_rows)
    assert len(collect(Fickle(), safety_rows, share_moments=False).moments) == 7


def whole(name, *shape, **changes):
    settings = {"start": 0, "shape": shape, "strides": torch.empty(shape).stride()} | changes
    return ParameterView(parameter=name, **settings)


W, V, BIAS = whole("w", 3, 4), whole("v", 2, 4), whole("bias", 3)


def collector(*, share=True, chosen=("w", "v"), head=None, **settings):
    parameters = {"w": torch.empty(3, 4), "v": torch.empty(2, 4), "bias": torch.empty(3), "table": torch.empty(5, 2)}
    made = MomentCollector(parameters, MomentStorage(), head=head, chosen=chosen, share=share, **settings)
    made.start_batch(1, 6)
    return made


def gram(*inputs):
    return sum(one.double().T @ one.double() for one in inputs)


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.5, -3.0])
def test_the_moment_of_a_product_is_the_sum_of_the_outer_products_of_what_it_read(factor):
    made, inputs = collector(), [torch.randn(count, 4) for count in (6, 1, 3)]
    for one in inputs:
        made.start_batch(1, len(one))
        made.product(whole("w", 3, 4, factor=factor), one)
    made.product(W, torch.empty(0, 4))
    found = made.observed({})
    assert found.tokens == {"w:linear": 10} and found.shapes == {"w:linear": (4, 4)}
    torch.testing.assert_close(made.take()["w:linear"].double(), factor**2 * gram(*inputs), rtol=1e-5, atol=1e-5)
    assert made.take() == {}


def test_few_inputs_are_kept_as_they_are_and_more_are_summed_bit_for_bit_as_without():
    inputs = [torch.randn(1, 4).bfloat16() for _ in range(3)]
    for count, kind in ((1, LowRank), (2, LowRank), (3, torch.Tensor)):
        made, plain = collector(keep_few=True), collector()
        for one in inputs[:count]:
            for each in (made, plain):
                each.start_batch(1, 1)
                each.product(W, one.clone())
        assert made.observed({}) == plain.observed({})
        found, expected = made.take()["w:linear"], plain.take()["w:linear"]
        assert isinstance(found, kind) and made.take() == {}
        if count < 3:
            assert torch.equal(found.factor, torch.cat(inputs[:count]).float())
            torch.testing.assert_close(found.dense(), expected)
        else:
            assert torch.equal(found, expected)


def test_few_inputs_that_change_later_or_are_no_numbers_are_kept_as_they_were_and_named():
    made, inputs = collector(keep_few=True), torch.ones(1, 4)
    made.product(W, inputs)
    inputs.zero_()
    made.observed({})
    assert made.take()["w:linear"].dense().eq(1).all()
    made.product(W, torch.full((1, 4), float("nan")))
    with pytest.raises(NumericalError, match="^w:linear: NaN or Inf"):
        made.observed({})


def test_what_is_not_chosen_is_named_and_has_no_moment():
    made = collector(chosen=("v",))
    made.product(W, torch.randn(6, 4))
    made.packed_product("w", "bias", torch.randn(6, 4))
    found = made.observed({})
    assert found.not_targeted == {"w"} and set(made.take()) == {"bias:bias"}
    assert found.uses.keys() == {"bias:bias"} and found.tokens == {"bias:bias": 6}


def test_a_transposed_weight_and_the_head_have_roles_of_their_own():
    made = collector(head="v")
    stored = whole("w", 4, 3, strides=(1, 4))
    made.product(stored, torch.randn(6, 3))
    made.product(V, torch.randn(6, 4))
    assert {use.parameter: use.role for use in made.observed({}).uses.values()} == {"w": Role.CONV1D, "v": Role.HEAD}


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 6), (6, 1), (1, 1), (4, 3)])
@pytest.mark.parametrize("inputs_first", [False, True])
def test_a_layer_of_one_input_or_output_is_all_of_its_weight_however_it_is_stored(inputs, outputs, inputs_first):
    shape = (inputs, outputs) if inputs_first else (outputs, inputs)
    made = MomentCollector({"w": torch.empty(shape)}, MomentStorage(), head=None, chosen=("w",), share=True)
    made.start_batch(1, 6)
    strides = (1, outputs) if inputs_first else (inputs, 1)
    made.product(whole("w", outputs, inputs, strides=strides), torch.randn(6, inputs))
    (use,) = made.observed({}).uses.values()
    assert use.moment == f"w:{use.role}" and use.view == use.role.view(shape) and use.view.covers(inputs * outputs)
    assert use.has_inputs_first is (inputs_first and (inputs, outputs) != (1, 1))


def test_a_bias_counts_how_often_it_was_added_with_the_square_of_its_factor():
    made = collector()
    made.offset(BIAS, 5)
    made.offset(whole("bias", 3, factor=-2.0), 3)
    made.offset(BIAS, 0)
    assert made.observed({}).tokens == {"bias:bias": 8} and made.take()["bias:bias"].tolist() == [5 + 4 * 3]


def test_a_scale_sums_squares_where_its_entries_lie():
    made, squares = collector(), torch.rand(2, 2)
    part = whole("w", 2, 2, start=5, strides=(4, 1), factor=3.0)
    made.scale(part, squares, 6)
    made.scale(part, squares, 6)
    expected = torch.zeros(3, 4)
    expected[1:3, 1:3] = 2 * 9 * squares
    assert made.observed({}).tokens == {"w:norm": 12}
    torch.testing.assert_close(made.take()["w:norm"], expected.flatten())


@pytest.mark.parametrize(("rows", "copies"), [(torch.arange(4), 3), (torch.tensor([[0, 0, 4, 1], [1, 1, 1, 1]]), 1)])
def test_a_table_counts_its_rows_those_of_positions_for_each_sequence(rows, copies):
    made = collector()
    made.start_batch(3, 4)
    made.lookup(whole("table", 5, 2), rows)
    counts = [copies * rows.flatten().tolist().count(row) for row in range(5)]
    assert made.take()["table:embedding"].tolist() == counts
    assert made.observed({}).tokens == {"table:embedding": copies * rows.numel()}


def test_only_a_whole_parameter_of_rows_is_a_table():
    made = collector()
    assert made.is_table(whole("table", 5, 2))
    for other in (whole("table", 4, 2), whole("table", 5, 1, strides=(2, 1)), whole("table", 5, 2, start=1), BIAS):
        assert not made.is_table(other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_name_their_weight(value):
    made = collector()
    made.product(W, torch.full((1, 4), value))
    with pytest.raises(NumericalError, match="^w:linear: NaN or Inf"):
        made.observed({})


@pytest.mark.parametrize("same", ["tensor", "view", "copies"])
def test_the_same_inputs_are_summed_once_and_count_for_both(same):
    made, inputs = collector(), torch.randn(6, 4)
    again = {"tensor": inputs, "view": inputs.view(2, 3, 4).flatten(0, 1), "copies": inputs.clone()}[same]
    first = inputs.clone() if same == "copies" else inputs
    if same == "copies":
        made.shared.copied(inputs, first)
        made.shared.copied(inputs, again)
    made.product(W, first)
    made.product(V, again)
    found = made.observed({})
    assert found.leaders == {"v:linear": "w:linear"} and found.unshared is None
    assert found.tokens == found.read == {"w:linear": 6, "v:linear": 6}
    assert {use.parameter: use.moment for use in found.covered(["v", "w"], frozenset("wv"))} == dict.fromkeys(
        "vw", "w:linear"
    )
    totals = made.take()
    assert set(totals) == {"w:linear"}
    torch.testing.assert_close(totals["w:linear"].double(), gram(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "other", ["equal values", "changed in place", "another part", "a changed copy", "share=False", "a later pass"]
)
def test_inputs_that_may_differ_are_not_shared(other):
    made, inputs = collector(share=other != "share=False"), torch.randn(6, 4)
    first, again = inputs, inputs
    if other == "a changed copy":
        first, again = inputs.clone(), inputs.clone()
        made.shared.copied(inputs, first)
        made.shared.copied(inputs, again)
        again.add_(1)
    made.product(W, first)
    if other == "a later pass":
        made.start_batch(1, 6)
    elif other == "changed in place":
        again.add_(1)
    elif other == "another part":
        again = inputs[:3]
    elif other == "equal values":
        again = inputs.clone()
    made.product(V, again)
    found = made.observed({})
    assert found.leaders == {} and found.shapes.keys() == {"w:linear", "v:linear"}


def test_a_follower_that_reads_something_else_voids_all_and_is_named():
    made, inputs = collector(), torch.randn(6, 4)
    made.product(W, inputs)
    made.product(V, inputs)
    assert not made.shared.is_void
    made.product(V, torch.randn(6, 4))
    before = made.shared.obstacle
    assert made.shared.is_void and before.startswith("v:linear: it read the same tensor as w:linear at first")
    made.product(W, torch.randn(6, 4))
    torch.testing.assert_close(made.take()["w:linear"].double(), gram(inputs), rtol=1e-5, atol=1e-5)
    assert made.observed({}).unshared == before


def test_a_follower_that_its_leader_leaves_behind_is_named_at_the_end():
    made, inputs = collector(), torch.randn(6, 4)
    made.product(W, inputs)
    made.product(V, inputs)
    made.start_batch(1, 6)
    made.product(W, torch.randn(6, 4))
    assert not made.shared.is_void and made.observed({}).unshared.startswith("v:linear: ")


def test_zeros_that_a_follower_reads_alone_add_nothing_and_void_nothing():
    made, inputs = collector(), torch.randn(6, 4)
    made.product(W, inputs)
    made.product(V, inputs)
    made.product(V, torch.zeros(2, 4))
    assert not made.shared.is_void and made.observed({}).unshared is None


def test_a_part_that_read_nothing_but_zeros_is_not_covered_and_a_whole_weight_is():
    made = collector(share=False)
    made.product(whole("w", 1, 4, start=4), torch.zeros(6, 4))
    made.product(V, torch.zeros(6, 4))
    found = made.observed({})
    assert found.all_zero == {"w[4+1x4]:linear"}
    assert [use.parameter for use in found.covered(["w", "v"], frozenset("wv"))] == ["v"]


def test_the_bias_of_a_layer_that_was_not_chosen_is_left_out_with_it():
    parts = {
        f"{name}:{role}": Use(parameter=name, role=role, moment=f"{name}:{role}", view=role.view(shape), shape=shape)
        for name, role, shape in [
            ("a.bias", Role.BIAS, (3,)),
            ("b.bias", Role.BIAS, (3,)),
            ("b.weight", Role.LINEAR, (3, 4)),
        ]
    }
    found = ObservedUses(uses=parts, not_targeted=frozenset({"a.weight"}))
    assert found.untargeted(frozenset({"b.weight"})) == {"a.weight", "a.bias"}
    covered = found.covered(["b.weight", "b.bias", "a.bias"], frozenset({"b.weight"}))
    assert [use.parameter for use in covered] == ["b.weight", "b.bias"]


def test_uses_follow_the_parameters_and_in_one_their_places_the_largest_first():
    def use(name, start, rows):
        view = MatrixView.contiguous(rows, 2, start=start)
        return Use(parameter=name, role=Role.LINEAR, moment=f"{name}{start}{rows}", view=view, shape=(9, 2))

    uses = [use("x", 0, 1), use("b", 4, 1), use("b", 0, 1), use("b", 0, 2), use("a", 2, 1)]
    found = [one.moment for one in in_order(uses, ["b", "a"])]
    assert found == ["b02", "b01", "b41", "a21", "x01"]


def test_what_passes_over_parts_of_the_data_found_is_what_one_pass_over_all_finds():
    batches = [torch.randn(count, 4) for count in (6, 2, 3)]

    def seen(parts):
        made = collector()
        for one in parts:
            made.start_batch(1, len(one))
            made.product(W, one)
            made.product(V, one)
        return made.observed({"table": "why"})

    assert merged([seen(batches[:1]), seen([]), seen(batches[1:])]) == seen(batches)


def test_zeros_on_one_rank_alone_do_not_leave_a_part_out():
    def seen(inputs):
        made = collector(share=False)
        made.product(whole("w", 1, 4, start=4), inputs)
        return made.observed({})

    zeros, some = seen(torch.zeros(6, 4)), seen(torch.ones(6, 4))
    assert merged([zeros, some]).all_zero == frozenset() and merged([zeros, zeros]).all_zero == zeros.all_zero


def test_ranks_that_disagree_on_sharing_give_it_up_by_name():
    shared, apart = collector(), collector()
    inputs = torch.randn(6, 4)
    for made, other in ((shared, inputs), (apart, inputs.clone())):
        made.product(W, inputs)
        made.product(V, other)
    for order, rank in (((shared, apart), 1), ((apart, shared), 0)):
        found = merged([made.observed({}) for made in order]).unshared
        assert found == f"v:linear: it read the same tensor as w:linear on one rank, but not on rank {rank}"
