"""Adapters beside others on shards, and models that are still wrapped; run under torchrun."""

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from safedelta_hf import ProfileConfig, Ridge, SafeDelta, adjust_adapter, adjust_model, collect_profile
from safedelta_hf.distributed.ranks import Ranks
from tests.fixtures import tiny
from tests.programs.leaving import leave_together


def adapted():
    torch.manual_seed(3)
    model = get_peft_model(tiny.llama(), LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def tensors_of(model, adapter):
    found = {}
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name:
            value = parameter.detach()
            found[name] = value.full_tensor() if isinstance(value, DTensor) else value
    return found


def a_second_adapter_beside_a_sharded_one():
    def second(model):
        profile = collect_profile(model, tiny.rows(9, seed=1), progress=False)
        adjust_adapter(model, profile=profile, rule=SafeDelta(strength=3.0), new_adapter_name="new", progress=False)
        return tensors_of(model, "new")

    whole, sharded = adapted(), adapted()
    for layer in sharded.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    tuned = tensors_of(whole, "default")
    ours, theirs = second(sharded), second(whole)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)
    assert any(value.any() for name, value in ours.items() if "lora_B" in name)
    for name, value in tensors_of(sharded, "default").items():
        assert torch.equal(value, tuned[name]), "the first adapter stays"


def a_measured_strength_with_fewer_refusals_held_out_than_processes():
    base, tuned = tiny.llama(), tiny.perturbed(tiny.llama())
    rows = tiny.rows(4, seed=1)
    profile = collect_profile(base, rows, config=ProfileConfig(holdout=0.26), progress=False)
    assert len(profile.held_out.sequences) == 1
    wrapped = DistributedDataParallel(tuned)
    report = adjust_model(wrapped, base=base, profile=profile, rule=Ridge(strength="auto"), progress=False)
    assert len(set(Ranks.of_run().gather(report.search.strength))) == 1


def main():
    dist.init_process_group("gloo")
    a_second_adapter_beside_a_sharded_one()
    a_measured_strength_with_fewer_refusals_held_out_than_processes()
    if dist.get_rank() == 0:
        print("both passed")
    leave_together()


if __name__ == "__main__":
    main()
