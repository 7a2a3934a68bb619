"""Whatever a model does with a weight, its moment says how much a change of the weight changes the result."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from safedelta_hf import ProfileConfig, collect_profile
from safedelta_hf.core.curvature import quadratic_loss
from safedelta_hf.core.low_rank import dense
from safedelta_hf.deltas.dense import DenseMatrix
from safedelta_hf.records.uses import Role
from tests.fixtures import architectures, tiny

ROWS = tiny.rows(10, seed=1, length=6)
SIZE = 8

CONSTANT = torch.linspace(-2, 2, SIZE)


class Operation(nn.Module):
    """An embedding, one operation with one weight, and a linear layer; remembers what the operation returned."""

    def __init__(self, shape, function, *, positive=False):
        super().__init__()
        self.embed = nn.Embedding(tiny.VOCABULARY, SIZE)
        self.weight = nn.Parameter(torch.randn(shape).abs() if positive else torch.randn(shape))
        self.function = function
        self.out = nn.LazyLinear(3)
        self(torch.tensor([ROWS[0]["input_ids"]]))

    def forward(self, input_ids):
        self.result = self.function(self.embed(input_ids), self.weight)
        return self.out(self.result.flatten(1)[:, :4])


LINEAR = {
    "linear": ((5, SIZE), F.linear),
    "transposed": ((SIZE, 5), lambda x, w: x @ w),
    "weight on the left": ((5, SIZE), lambda x, w: w @ x.mT),
    "vector": ((SIZE,), lambda x, w: x @ w),
    "cast": ((5, SIZE), lambda x, w: F.linear(x.double(), w.double()).float()),
    "cast, then transposed": ((SIZE, 5), lambda x, w: (x.double() @ w.double()).float()),
    "negated and scaled": ((5, SIZE), lambda x, w: F.linear(x, -3 * w)),
    "copied": ((5, SIZE), lambda x, w: x @ w.T.contiguous()),
    "rows of it": ((9, SIZE), lambda x, w: torch.cat([F.linear(x, w[:4]), F.linear(2 * x, w[4:])], -1)),
    "columns of it": ((5, SIZE), lambda x, w: torch.cat([F.linear(x[..., :3], w[:, :3]), x[..., 3:] @ w[:, 3:].T], -1)),
    "split for heads": ((SIZE, 2, 3), lambda x, w: torch.einsum("btd,dhk->bthk", x, w)),
    "a matrix for each head": ((2, 4, 3), lambda x, w: torch.einsum("bthd,hdk->bthk", x.unflatten(-1, (2, 4)), w)),
    "two sums in one": ((5, 2, 4), lambda x, w: torch.einsum("btnd,hnd->bth", x.unflatten(-1, (2, 4)), w)),
    "experts that all read": ((4, SIZE, 3), lambda x, w: torch.bmm(x.flatten(0, 1).expand(4, -1, -1), w)),
    "batched sum": ((5, 3), lambda x, w: torch.baddbmm(x[:, :, :3], x[:, :, :5], w.expand(len(x), -1, -1))),
    "convolution": ((5, SIZE, 3), lambda x, w: F.conv1d(x.mT, w, padding=2)),
    "strided, dilated": ((5, SIZE, 2), lambda x, w: F.conv1d(x.mT, w, stride=2, dilation=3)),
    "groups": ((6, 4, 3), lambda x, w: F.conv1d(x.mT, w, padding=1, groups=2)),
    "images": ((5, 2, 2, 3), lambda x, w: F.conv2d(x.unflatten(-1, (2, 4)).permute(0, 2, 1, 3), w, padding=(1, 0))),
    "scale": ((SIZE,), lambda x, w: x * w),
    "scale in place": ((SIZE,), lambda x, w: (x + 0).mul_(w)),
    "scale plus one": ((SIZE,), lambda x, w: x * (1 + w.float())),
    "scale of a norm": ((SIZE,), lambda x, w: F.layer_norm(x, (SIZE,), w)),
    "scale of channels": ((6,), lambda x, w: F.group_norm(x, 3, w)),
    "scale of heads": ((2,), lambda x, w: x.unflatten(-1, (2, 4)) * w[:, None]),
    "scale plus a constant": ((SIZE,), lambda x, w: x * (CONSTANT - CONSTANT * w)),
    "product with a constant": ((5, SIZE), lambda x, w: F.linear(x, w * CONSTANT[2])),
    "mixture": ((SIZE,), lambda x, w: torch.lerp(x, x.roll(1, 1), w)),
    "bias": ((SIZE,), lambda x, w: x + w),
    "subtracted": ((SIZE,), lambda x, w: w - x),
    "positions": ((9, SIZE), lambda x, w: x + w[: x.shape[1]]),
    "appended": ((3, SIZE), lambda x, w: torch.cat([x, w.expand(len(x), -1, -1)], 1)),
    "divided": ((SIZE,), lambda x, w: w / (x.abs() + 1)),
}


def loss_of(profile, delta):
    return sum(
        quadratic_loss(DenseMatrix(delta, use.view).inner, profile.moments[use.moment].hessian(delta.device))
        for use in profile.uses
        if use.parameter == "weight"
    )


def squared_change(model, delta):
    """Oracle: one sequence after the other, with and without the delta."""
    total = 0.0
    for row in ROWS:
        with torch.no_grad():
            model(torch.tensor([row["input_ids"]]))
            before = model.result.clone()
            model.weight.add_(delta)
            model(torch.tensor([row["input_ids"]]))
            model.weight.sub_(delta)
            total += float((model.result - before).double().square().sum())
    return total


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", LINEAR)
def test_the_quadratic_loss_is_the_change_of_the_result(name, batch_size):
    model = Operation(*LINEAR[name])
    profile = collect_profile(model, ROWS, config=ProfileConfig(batch_size=batch_size), progress=False)
    delta = torch.randn_like(model.weight)
    assert loss_of(profile, delta) == pytest.approx(squared_change(model, delta) / len(ROWS), rel=1e-3)


@pytest.mark.parametrize("kernel", [1, 4])
def test_the_loss_of_a_depthwise_convolution_is_bounded_from_above(kernel):
    model = Operation((2 * SIZE, 1, kernel), lambda x, w: F.conv1d(x.mT, w, padding=kernel - 1, groups=SIZE))
    profile = collect_profile(model, ROWS, progress=False)
    for seed in range(5):
        torch.manual_seed(seed)
        delta = torch.randn_like(model.weight)
        change = squared_change(model, delta) / len(ROWS)
        assert change <= loss_of(profile, delta) * (1 + 1e-4)
    if kernel == 1:
        assert change == pytest.approx(loss_of(profile, delta), rel=1e-3)


@pytest.mark.parametrize("function", [torch.exp, F.softplus, torch.sigmoid, lambda w: -torch.exp(w.float())])
def test_a_function_of_a_weight_counts_to_first_order(function):
    model = Operation((SIZE,), lambda x, w: x * function(w)).double()
    profile = collect_profile(model, ROWS, progress=False)
    delta = 1e-3 * torch.randn(SIZE)
    assert loss_of(profile, delta) == pytest.approx(squared_change(model, delta) / len(ROWS), rel=1e-2)


@pytest.mark.parametrize(
    ("shape", "function", "reason"),
    [
        ((SIZE,), lambda x, w: x * w.softmax(0), "aten._softmax"),
        ((5, SIZE), lambda x, w: F.linear(x, w.sigmoid()), "slope of its own"),
        ((5, SIZE), lambda x, w: F.linear(x, w / w.norm()), "aten.linalg_vector_norm"),
        ((5, SIZE), lambda x, w: F.linear(x, w @ w.T @ w), "aten.mm"),
        ((1, SIZE), lambda x, w: F.linear(x, w.expand(5, SIZE)), "repeated"),
        ((SIZE, 5, 2), lambda x, w: F.conv_transpose1d(x.mT, w), "aten.convolution"),
        ((5, SIZE), lambda x, w: F.linear(x, w.clone().exp_()), "overwritten, by aten.exp_"),
        ((SIZE,), lambda x, w: torch.add(x, w, alpha=2), "aten.add"),
        ((5, SIZE), lambda x, w: x, "never reached"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_reason(shape, function, reason):
    profile = collect_profile(Operation(shape, function), ROWS, progress=False)
    assert reason in profile.header.skipped["weight"]


def test_a_parameter_that_the_model_rescales_in_place_is_read():
    def rescaled(x, weight):
        weight.data.mul_(1.0)
        return F.linear(x, weight)

    assert not collect_profile(Operation((5, SIZE), rescaled), ROWS, progress=False).header.skipped


def test_a_lookup_counts_rows_also_in_bare_tables():
    model = Operation((7, SIZE), lambda x, w: x + w[torch.arange(x.shape[1]).expand(len(x), -1) % 4])
    (use,) = (use for use in collect_profile(model, ROWS, progress=False).uses if use.parameter == "weight")
    assert use.role is Role.EMBEDDING


@pytest.mark.parametrize("key", ["mixtral", "gpt_oss", "llama4_text", "jetmoe", "deepseek_v3"])
def test_each_expert_has_the_moment_of_the_tokens_routed_to_it(key):
    model = architectures.tiny_model(key)
    profile = collect_profile(model, ROWS, progress=False)
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and "expert" in name]
    routed = {
        use.moment for use in profile.uses if "[" in use.moment and use.role is Role.LINEAR and use.parameter in names
    }
    tokens = len(ROWS) * 6
    for name in names:
        counts = [profile.moments[use.moment].tokens for use in profile.uses if use.parameter == name]
        used = next(n for n in ("num_experts_per_tok", "moe_topk", "top_k") if hasattr(model.config, n))
        per_token = getattr(model.config, used)
        assert sum(counts) == tokens * (4 if key == "llama4_text" else per_token)
    assert routed and len(routed) <= 4 * len(names)


def test_expert_moments_equal_the_oracle():
    model = architectures.tiny_model("mixtral")
    model.set_experts_implementation("eager")  # which every torch can do on a CPU
    experts = model.model.layers[0].mlp.experts
    seen = []
    handle = experts.register_forward_hook(lambda _, args, out: seen.append([arg.detach() for arg in args]))
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=torch.tensor([row["input_ids"]]))
    handle.remove()
    profile = collect_profile(model, ROWS, progress=False)
    for index in range(4):
        inputs = torch.cat([hidden[(chosen == index).any(-1)] for hidden, chosen, _ in seen]).double()
        gate, up = (inputs @ experts.gate_up_proj[index].double().T).chunk(2, -1)
        for name, read in (("gate_up_proj", inputs), ("down_proj", experts.act_fn(gate) * up)):
            found = profile.moments[f"model.layers.0.mlp.experts.{name}[{index}]:linear"]
            assert found.tokens == len(inputs)
            torch.testing.assert_close(dense(found.total).double(), (read.T @ read).detach(), rtol=1e-3, atol=1e-5)


def test_layers_of_torch_itself_are_read_whole():
    class Model(tiny.Plain):
        def __init__(self):
            super().__init__()
            self.block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
            self.recurrent = nn.GRU(8, 8, batch_first=True)
            self.normed = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))

        def forward(self, input_ids):
            hidden, _ = self.recurrent(self.block(self.embed(input_ids)))
            return self.down(torch.relu(self.up(self.normed(hidden))))

    profile = collect_profile(Model(), ROWS, progress=False)
    assert set(profile.header.skipped) == {"normed.parametrizations.weight.original"}
    assert "SpectralNorm changes in training" in profile.header.skipped["normed.parametrizations.weight.original"]


def test_gradient_checkpointing_changes_no_moment():
    model = tiny.llama()
    expected = collect_profile(model, ROWS, progress=False)
    checkpointed = copy.deepcopy(model).train()
    checkpointed.gradient_checkpointing_enable()
    found = collect_profile(checkpointed, ROWS, progress=False)
    assert found.uses == expected.uses
    for key, moment in expected.moments.items():
        torch.testing.assert_close(moment.total, found.moments[key].total)
