"""Profiles that all ranks collect together against those of a single process; run under torchrun.

python -m tests.programs.capturing BACKEND FOLDER [failing]
"""

import random
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from transformers import MixtralConfig, MixtralForCausalLM

from safedelta_hf import ProfileConfig, SafetyProfile, collect_profile
from safedelta_hf.core.low_rank import dense
from safedelta_hf.data.dataset import read_safety_data
from safedelta_hf.data.refusals import response_losses
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.distributed.ranks import Ranks, is_shared
from safedelta_hf.errors import CaptureError, ConfigurationError, DataError, NumericalError, RankError, SafeDeltaError
from safedelta_hf.evaluation.sorting import sort_task
from safedelta_hf.profile.moments import ShardedMoments
from safedelta_hf.profile.profile import with_ordinary
from tests.fixtures import architectures, tiny
from tests.programs.leaving import leave_together


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        num_local_experts=8,
        num_experts_per_tok=1,
    )
    return MixtralForCausalLM(config).eval()


def seeded(make, *arguments):
    def made():
        torch.manual_seed(0)
        return make(*arguments)

    return made


MODELS = {
    "llama": tiny.llama,
    "tied": lambda: tiny.llama(tied=True),
    "gpt2": tiny.gpt2,  # Conv1D
    "mixtral": mixtral,  # experts in one parameter, of which few tokens reach few
    "falcon_mamba": seeded(architectures.tiny_model, "falcon_mamba"),  # some modules are not called
    "plain": seeded(tiny.Plain),  # of no library
}


def fsdp2(model, **settings):
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for layer in lists[0] if lists else [model.up]:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def fsdp1(model):
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    policy = ModuleWrapPolicy({type(lists[0][0]) if lists else nn.Linear})
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)


def zero3(model):
    from tests.programs.zero import engine_of

    engine_of(model, 3)
    return model


BACKENDS = {"whole": lambda model: model, "fsdp2": fsdp2, "fsdp1": fsdp1, "zero3": zero3}


def collect(model, rows, **settings):
    config = ProfileConfig(**{"holdout": 0.0, "batch_size": 2} | settings)
    return collect_profile(model, rows, config=config, progress=False)


def alone(model, rows, **settings):
    """The oracle: this process reads all of the data with the whole model."""
    return collect(ShardedModel(model), rows, **settings)


def agree(found, expected, ranks, tolerance=1e-5):
    assert found.uses == expected.uses, set(found.uses) ^ set(expected.uses)
    assert found.header == expected.header
    assert isinstance(found.moments, ShardedMoments)
    agree_on_moments(found.moments, expected.moments, ranks, tolerance)


def agree_on_moments(found, expected, ranks, tolerance=1e-5):
    assert set(found) == set(expected)
    for key in found:
        other = expected[key]
        assert found.shape(key) == tuple(other.total.shape), key
        if found.owner(key) == ranks.rank:
            moment = found[key]
            own, whole = dense(moment.total), dense(other.total)
            torch.testing.assert_close(own, whole, rtol=tolerance, atol=tolerance * float(whole.abs().max()))
            assert (moment.sequences, moment.tokens) == (other.sequences, other.tokens), key
            continue
        try:
            found[key]
        except CaptureError as error:
            assert f"held by rank {found.owner(key)}" in str(error), error
        else:
            raise AssertionError(f"{key} is read where it is not")


def moments_do_not_depend_on_the_number_of_ranks(shard, ranks, folder):
    for name, make in MODELS.items():
        for count in (1, 5, 8):  # one on two ranks leaves a rank without any
            rows = tiny.rows(count, seed=2)
            agree(collect(shard(make()), rows), alone(make(), rows), ranks)
        found = collect(shard(make()), tiny.rows(8, seed=2), share_moments=False)
        agree(found, alone(make(), tiny.rows(8, seed=2), share_moments=False), ranks)
        assert {found.moments.owner(key) for key in found.moments} == set(range(ranks.size)), name


def a_model_can_be_read_with_again_and_is_left_as_it_was(shard, ranks, folder):
    model = shard(tiny.llama())
    opened = open_model(model)
    before = {name: opened.read(name).clone() for name in opened.all_names}
    for seed in (2, 3):
        rows = tiny.rows(7, seed=seed)
        agree(collect(opened, rows), alone(tiny.llama(), rows), ranks)
    assert all(torch.equal(opened.read(name), value) for name, value in before.items())
    assert not any(module._forward_hooks and shard is BACKENDS["whole"] for module in model.modules())


def experts_that_one_rank_alone_reaches_are_summed(shard, ranks, folder):
    rows = tiny.rows(2, seed=2, length=4)
    reached = [{use.moment for use in alone(mixtral(), [row]).uses if "[" in use.moment} for row in rows]
    assert reached[0] - reached[1]
    assert reached[1] - reached[0]
    agree(collect(shard(mixtral()), rows), alone(mixtral(), rows), ranks)


class Fickle(tiny.Plain):
    """Reads one tensor twice where a sequence is short, and two tensors where it is long."""

    def __init__(self):
        super().__init__()
        self.twin = nn.Linear(8, 16)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        twin = self.twin(hidden if input_ids.shape[1] < 7 else hidden.clone() + 1)
        return self.down(self.up(hidden) + twin)


def ranks_that_cannot_share_moments_in_one_way_share_none(shard, ranks, folder):
    make = seeded(Fickle)
    short, long = tiny.rows(1, seed=2, length=5), tiny.rows(1, seed=3, length=9)
    # Each rank reads one sequence, sees nothing amiss, and has another opinion than the other; or sees it itself.
    for rows in (short + long, (short + long) * 3):
        agree(collect(shard(make()), rows), alone(make(), rows, share_moments=False), ranks)
    agree(collect(shard(make()), short * 2), alone(make(), short * 2), ranks)


def held_out_losses_are_the_same_on_all_ranks(shard, ranks, folder):
    rows = tiny.rows(23, seed=2)
    found, expected = collect(shard(tiny.llama()), rows, holdout=0.4), alone(tiny.llama(), rows, holdout=0.4)
    assert found.held_out.sequences == expected.held_out.sequences
    assert len(set(ranks.gather(found.held_out.losses))) == 1
    torch.testing.assert_close(found.held_out.losses, expected.held_out.losses, rtol=1e-5, atol=1e-5)
    tuned = tiny.perturbed(tiny.llama())
    alike = expected.held_out.read(ShardedModel(tuned))
    model = shard(tuned)
    readings = found.held_out.read(open_model(model), batch_size=2)
    assert len(set(ranks.gather(tuple(readings)))) == 1
    for reading, other in zip(readings, alike, strict=True):
        assert reading.greedy == other.greedy
        torch.testing.assert_close(reading.losses, other.losses, rtol=1e-4, atol=1e-5)
    # The same sequence twice is computed once, and one sequence alone leaves a rank without any.
    for data in (rows[:1], rows[:3] + rows[:2]):
        sequences, model = read_safety_data(data), shard(tiny.llama())
        losses = response_losses(open_model(model), sequences)
        torch.testing.assert_close(losses, response_losses(ShardedModel(tiny.llama()), sequences), rtol=1e-5, atol=1e-5)


def what_is_saved_is_what_a_single_process_saves(shard, ranks, folder):
    rows = tiny.rows(23, seed=2)
    found, expected = collect(shard(mixtral()), rows, holdout=0.2), alone(mixtral(), rows, holdout=0.2)
    found.save(folder / "profile")
    loaded = SafetyProfile.load(folder / "profile")
    assert loaded.header == expected.header
    assert loaded.uses == expected.uses
    assert loaded.held_out.sequences == expected.held_out.sequences
    for key, moment in expected.moments.items():
        whole, own = dense(moment.total), dense(loaded.moments[key].total)
        torch.testing.assert_close(own, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))
        assert loaded.moments[key].tokens == moment.tokens
    error = failure(lambda: found.save(folder / "profile"))
    assert "exists already" in str(error), error
    assert is_shared(error)
    retention_is_that_of_a_single_process(shard, ranks, loaded, expected)
    loaded.save(folder / "again")
    assert list(SafetyProfile.load(folder / "again").moments.values())
    for profile in (found, loaded):
        what_is_uploaded_is_whole_and_of_the_main_process(profile, ranks, expected)


def what_is_uploaded_is_whole_and_of_the_main_process(profile, ranks, expected):
    uploaded = []

    def upload(folder, name, **_):
        uploaded.append(len(list(SafetyProfile.load(folder).moments.values())))
        assert (folder / "README.md").exists()
        return f"address of rank {ranks.rank}"

    with mock.patch("safedelta_hf.profile.profile.upload", upload):
        assert profile.push_to_hub("org/profile") == "address of rank 0"
    assert uploaded == ([len(expected.moments)] if ranks.is_main else [])


def retention_is_that_of_a_single_process(shard, ranks, loaded, expected):
    rows, ordinary = tiny.rows(23, seed=2), tiny.rows(6, seed=4)
    apart = alone(mixtral(), ordinary, share_moments=False)
    summed = with_ordinary(expected, apart, 0.3)
    own = collect(shard(mixtral()), rows, holdout=0.2)
    other = collect(shard(mixtral()), ordinary, share_moments=False)
    # Moments that are shared in one profile and not in the other stand under other keys, on other ranks.
    moved = {use.moment for use in own.uses if own.moments.owner(use.moment) != owner_in(other, use)}
    assert moved
    for safety, kept in ((own, other), (loaded, other), (own, apart)):
        found = with_ordinary(safety, kept, 0.3)
        assert isinstance(found.moments, ShardedMoments)
        agree_on_moments(found.moments, summed.moments, ranks)


def a_task_is_sorted_alike_on_all_ranks_and_as_by_a_single_process(shard, ranks, folder):
    draw = random.Random(2)
    refusals = [
        {"input_ids": [draw.randrange(3, 40), draw.randrange(3, 40), first, 5, 9], "labels": [-100, -100, first, 5, 9]}
        for first in range(3, 29)
    ]
    task = [{**row, "labels": [-100, -100, *row["labels"][2:]]} for row in tiny.rows(13, seed=8)]
    sequences, known = read_safety_data(task), read_safety_data(refusals)
    with mock.patch("safedelta_hf.data.openings.DEPTH", 1):  # a model of random weights refuses no longer openings
        expected = sort_task(ShardedModel(tiny.llama(initializer_range=0.5)), sequences, known, batch_size=2)
        found = sort_task(open_model(shard(tiny.llama(initializer_range=0.5))), sequences, known, batch_size=2)
    assert 0 < expected.sorting.refused < 13 and found.sorting.outcome is expected.sorting.outcome, expected.sorting
    assert found.kept == expected.kept
    assert len(set(ranks.gather(str(found.kept)))) == 1


def owner_in(profile, use):
    key = profile.key_of(use)
    return None if key is None else profile.moments.owner(key)


def failure(block):
    try:
        block()
    except SafeDeltaError as error:
        return error
    raise AssertionError("nothing was raised")


def breaking(rows, rank):
    def generate():
        yield from rows[:3]
        if rank == 1:
            raise DataError("row 3: broken")
        yield from rows[3:]

    return generate()


def a_rank_that_fails_is_heard_by_all(shard, ranks, folder):
    rows = tiny.rows(5, seed=2)
    error = failure(lambda: collect(shard(tiny.llama()), breaking(rows, ranks.rank)))
    heard(error, ranks, DataError, "row 3: broken")
    model = shard(tiny.llama())
    opened = open_model(model)
    name, message = "model.layers.1.mlp.up_proj.weight", "the base model holds NaN"
    if shard in (BACKENDS["whole"], BACKENDS["fsdp2"]):
        if ranks.rank == 1:
            opened.read(name).view(-1)[-1] = torch.nan
        heard(failure(lambda: collect(model, rows)), ranks, NumericalError, f"{name}: {message}")
    else:  # every rank sees all of a weight
        opened.write(name, torch.full(opened.shape(name), torch.nan))
        error = failure(lambda: collect(model, rows))
        assert isinstance(error, NumericalError), error
        assert f"{name}: {message}" in str(error), error
    error = failure(lambda: collect(shard(tiny.llama()), rows[ranks.rank :]))
    assert isinstance(error, DataError), error
    assert "given different examples" in str(error), error
    if shard is BACKENDS["whole"]:
        error = failure(lambda: collect(Overflowing(ranks.rank), rows))
        heard(error, ranks, NumericalError, "NaN or Inf in the inputs of this layer")
    agree(collect(shard(tiny.llama()), rows), alone(tiny.llama(), rows), ranks)  # all are in step


class Overflowing(tiny.Plain):
    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        return self.down(torch.relu(self.up(hidden / (1 - self.rank))))


def heard(error, ranks, kind, message):
    assert isinstance(error, kind if ranks.rank == 1 else RankError), error
    assert message in str(error), error
    assert ranks.rank == 1 or "rank 1 failed" in str(error), error
    assert is_shared(error)


def a_model_in_a_wrapper_is_read_like_the_bare_one(shard, ranks, folder):
    rows = tiny.rows(5, seed=2)
    agree(collect(DistributedDataParallel(tiny.llama()), rows), alone(tiny.llama(), rows), ranks)


def adapters(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))


def adapters_are_off_meanwhile_and_can_be_trained_afterwards(shard, ranks, folder):
    rows = tiny.rows(5, seed=2)
    model = shard(adapters(tiny.llama()))
    expected = alone(tiny.llama(), rows)
    for _ in range(2):
        found = collect(model, rows)
        agree(found, expected, ranks)
        ids = torch.tensor([rows[0]["input_ids"]])
        model(input_ids=ids, labels=ids).loss.backward()
        # Of a parameter of which a rank holds nothing, it has no gradient.
        own = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        assert set().union(*ranks.gather(own)) == {name for name, _ in model.named_parameters() if "lora_" in name}
        model.zero_grad()


def units_of_any_kind_are_followed(shard, ranks, folder):
    rows = tiny.rows(5, seed=2)
    expected = alone(tiny.llama(), rows)

    def by_module(model, **settings):
        for layer in model.model.layers:
            fully_shard(layer, **settings)
        fully_shard(model.model.embed_tokens, **settings)
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **settings)
        return fully_shard(model, **settings)

    def nested(model):
        for layer in model.model.layers:
            fully_shard(layer.mlp.up_proj)
            fully_shard([layer.mlp, layer.self_attn])
        return by_module(model)

    agree(collect(nested(tiny.llama()), rows), expected, ranks)
    agree(collect(fsdp2(tiny.llama(), reshard_after_forward=False), rows), expected, ranks)
    # Every unit casts what it is given and what it returns, in its hooks.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    found = collect(by_module(tiny.llama(), mp_policy=policy), rows)
    agree(found, expected, ranks, tolerance=0.05)
    products = [
        key for key in found.moments if len(found.moments.shape(key)) == 2 and found.moments.owner(key) == ranks.rank
    ]
    assert not any(torch.equal(dense(found.moments[key].total), dense(expected.moments[key].total)) for key in products)


def weights_that_are_computed_are_refused_by_name(shard, ranks, folder):
    model = tiny.Plain()
    weight_norm(model.up)
    fully_shard(model)
    error = failure(lambda: collect(model, tiny.rows(5, seed=2)))
    assert isinstance(error, ConfigurationError), error
    assert "up.weight: is computed from other parameters" in str(error), error
    assert "FSDP2" in str(error), error


CHECKS = [
    moments_do_not_depend_on_the_number_of_ranks,
    a_model_can_be_read_with_again_and_is_left_as_it_was,
    experts_that_one_rank_alone_reaches_are_summed,
    ranks_that_cannot_share_moments_in_one_way_share_none,
    held_out_losses_are_the_same_on_all_ranks,
    what_is_saved_is_what_a_single_process_saves,
    a_rank_that_fails_is_heard_by_all,
    a_task_is_sorted_alike_on_all_ranks_and_as_by_a_single_process,
]
OF_BACKEND = {
    "whole": [adapters_are_off_meanwhile_and_can_be_trained_afterwards, a_model_in_a_wrapper_is_read_like_the_bare_one],
    "fsdp2": [
        adapters_are_off_meanwhile_and_can_be_trained_afterwards,
        units_of_any_kind_are_followed,
        weights_that_are_computed_are_refused_by_name,
    ],
    "fsdp1": [adapters_are_off_meanwhile_and_can_be_trained_afterwards],
    "zero3": [],
}


def one_rank_gives_way(shard, ranks):
    model = shard(tiny.llama())

    def give_way(*_):
        raise RuntimeError("layer 1 gave way")

    if ranks.rank == 1:
        layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
        layers[1].register_forward_pre_hook(give_way)
    collect(model, tiny.rows(5, seed=2))


def main(backend, folder, *wish):
    dist.init_process_group("gloo")
    ranks = Ranks.of_run()
    if "failing" in wish:
        one_rank_gives_way(BACKENDS[backend], ranks)
    for check in CHECKS + OF_BACKEND[backend]:
        check(BACKENDS[backend], ranks, Path(folder))
        if ranks.is_main:
            print(check.__name__, flush=True)
    if ranks.is_main:
        print("all agree")
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
