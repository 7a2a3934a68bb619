"""LoRA on convolutions and on stacks of experts, against moments given by hand."""

import copy
from dataclasses import replace

import peft
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from safedelta_hf import SafeDelta, SafetyProfile, adjust_adapter
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.deltas.dense import DenseMatrix
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import AdapterError
from safedelta_hf.profile.moments import Moments
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.records.uses import MatrixView, Role, Use
from safedelta_hf.rules import LayerMoments
from safedelta_hf.weights.digest import fingerprint
from tests.fixtures import adapters, tiny

RULE = SafeDelta(strength=3000.0)


def moment(size, seed):
    inputs = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed))
    return InputMoment(total=inputs.T @ inputs, sequences=8, tokens=len(inputs))


def profile_by_hand(model, uses):
    header = ProfileHeader(
        architecture=type(model).__name__,
        base=fingerprint(open_model(model)),
        dtypes=open_model(model).data_types,
        tokenizer=None,
        data="",
        sequences=8,
        tokens=80,
        skipped={},
    )
    sizes = {use.moment: columns for use, columns in uses}
    moments = {key: moment(size, seed) for seed, (key, size) in enumerate(sizes.items())}
    return SafetyProfile(header=header, uses=tuple(use for use, _ in uses), moments=Moments(moments))


def expected(matrix, hessian):
    """Oracle: the rule on the dense delta of one layer [out, in]."""
    transform = RULE.transform(
        RULE.factorise(LayerMoments(safety=hessian)), DenseMatrix(matrix, Role.LINEAR.view(matrix.shape))
    )
    result = transform(matrix)
    assert 0.01 < float(result.norm() / matrix.norm()) and not torch.equal(result, matrix), "it keeps a part"
    return result


class Convolutions(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, **settings)
        self.two = nn.Conv2d(4, 6, (3, 2), **settings)
        self.three = nn.Conv3d(4, 6, 2, **settings)
        self.point = nn.Conv2d(8, 6, 1)


@pytest.mark.parametrize("rslora", [False, True])
def test_convolutions_are_adjusted_over_the_flattened_patch(rslora):
    base = Convolutions()
    names = ["one", "two", "three", "point"]
    shapes = {f"{name}.weight": getattr(base, name).weight.shape for name in names}
    uses = [
        (
            Use(parameter=key, role=Role.LINEAR, moment=key, view=Role.LINEAR.view(shape), shape=tuple(shape)),
            shape[1:].numel(),
        )
        for key, shape in shapes.items()
    ]
    profile = profile_by_hand(base, uses)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=names, use_rslora=rslora)
    model = adapters.trained(get_peft_model(copy.deepcopy(base), config), scale=0.3)
    tuned = tiny.weights(adapters.merged(model))
    adjust_adapter(model, profile=profile, rule=RULE, progress=False)
    found, start = tiny.weights(adapters.merged(model)), tiny.weights(base)
    for key, shape in shapes.items():
        hessian = profile.moments[key].hessian(torch.device("cpu"))
        wanted = expected((tuned[key] - start[key]).flatten(1), hessian).reshape(shape)
        torch.testing.assert_close(found[key] - start[key], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"groups": 2}, {"dilation": 2}])
def test_a_convolution_that_peft_does_not_follow_is_refused(settings):
    base = Convolutions(**settings)
    profile = profile_by_hand(base, [])
    model = get_peft_model(base, peft.LoraConfig(r=2, target_modules=["two"]))
    with pytest.raises(AdapterError, match=r"two.weight: .*reads other inputs"):
        adjust_adapter(model, profile=profile, rule=RULE, progress=False)


def mixtral():
    torch.manual_seed(0)
    settings = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 2, "num_attention_heads": 4}
    sizes = {"vocab_size": tiny.VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    return MixtralForCausalLM(MixtralConfig(**settings, **sizes)).eval()


def gpt_oss():
    torch.manual_seed(0)
    settings = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 2, "num_attention_heads": 4}
    sizes = {"vocab_size": tiny.VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    return GptOssForCausalLM(GptOssConfig(**settings, **sizes, head_dim=4, pad_token_id=0)).eval()


def expert_uses(name, shape, *, transposed):
    experts, first, second = shape
    for number in range(experts):
        start = number * first * second
        rows, columns, strides = (second, first, (1, second)) if transposed else (first, second, (second, 1))
        part = MatrixView(start=start, rows=rows, columns=columns, row_stride=strides[0], column_stride=strides[1])
        yield Use(parameter=name, role=Role.LINEAR, moment=f"{name}:{number}", view=part, shape=shape), columns


@pytest.mark.parametrize(("make", "transposed"), [(mixtral, False), (gpt_oss, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_expert_is_adjusted_with_its_own_moment(make, transposed, dtype):
    base = make()
    names = [f"model.layers.{layer}.mlp.experts.{key}" for layer in (0, 1) for key in ("gate_up_proj", "down_proj")]
    shapes = {name: tuple(base.get_parameter(name).shape) for name in names}
    uses = [use for name in names for use in expert_uses(name, shapes[name], transposed=transposed)]
    profile = profile_by_hand(base, uses)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=targets)
    model = adapters.trained(get_peft_model(copy.deepcopy(base), config), scale=0.3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    exact = copy.deepcopy(model).float()
    tuned = tiny.weights(adapters.merged(exact))
    before = {name: tensor.shape for name, tensor in adapters.own_tensors(model).items()}
    report = adjust_adapter(model, profile=profile, rule=RULE, progress=False)
    assert {name: tensor.shape for name, tensor in adapters.own_tensors(model).items()} == before
    assert [record.outcome for record in report.parameters] == ["adjusted"] * 4
    assert [bool(record.notes) for record in report.parameters] == [dtype is torch.bfloat16] * 4, report.parameters
    found, start = tiny.weights(adapters.merged(copy.deepcopy(model).float())), tiny.weights(base)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for use, _ in uses:
        number = int(use.moment[-1])
        delta, kept = ((w[use.parameter] - start[use.parameter])[number] for w in (tuned, found))
        hessian = profile.moments[use.moment].hessian(torch.device("cpu"))
        wanted = expected(delta.T.contiguous(), hessian).T if transposed else expected(delta, hessian)
        torch.testing.assert_close(kept, wanted, **tolerance)


def test_an_expert_that_is_used_in_pieces_is_refused():
    base = mixtral()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    uses = list(expert_uses(name, tuple(base.get_parameter(name).shape), transposed=False))
    halves = [(replace(use, view=replace(use.view, rows=use.view.rows // 2)), columns) for use, columns in uses]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["layers.0.mlp.experts.gate_up_proj"])
    model = adapters.trained(get_peft_model(base, config))
    before = adapters.own_tensors(model)
    with pytest.raises(AdapterError, match=r"gate_up_proj: its model uses a part \[12, 8\] of the \[24, 8\]"):
        adjust_adapter(model, profile=profile_by_hand(mixtral(), halves), rule=RULE, progress=False)
    assert tiny.same(adapters.own_tensors(model), before)
