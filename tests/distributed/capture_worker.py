"""Profiles collected by all ranks against those of a single process, for each way of holding a model."""

import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import MixtralConfig, MixtralForCausalLM

from safedelta_hf import collect_profile
from safedelta_hf.capture.owned import OwnedMoments
from safedelta_hf.ranks import Ranks
from safedelta_hf.sharding.whole import WholeParameters
from tests import tiny


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


MODELS = {
    "llama": tiny.llama,
    "tied": lambda: tiny.llama(tied=True),
    "gpt2": tiny.gpt2,
    "mixtral": mixtral,
}


def layers_of(model):
    base = model.base_model
    return base.h if hasattr(base, "h") else base.layers


def whole(model):
    return model


def wrapped(model):
    return DistributedDataParallel(model)


def fsdp2(model):
    for layer in layers_of(model):
        fully_shard(layer)
    fully_shard(model)
    return model


BACKENDS = {"whole": whole, "ddp": wrapped, "fsdp2": fsdp2}


def collect(model, rows, **settings):
    return collect_profile(model, rows, progress=False, **{"holdout": 0.0, "batch_size": 2} | settings)


def alone(model, rows, **settings):
    return collect(model, rows, ranks=Ranks(), holding=WholeParameters(model), **settings)


def agree(found, expected, ranks):
    assert found.uses == expected.uses
    assert found.header == expected.header
    assert isinstance(found.moments, OwnedMoments)
    assert set(found.moments) == set(expected.moments)
    for key in found.moments:
        assert found.moments.shape(key) == expected.moments.shape(key), key
        if found.moments.owner(key) == ranks.rank:
            moment, other = found.moments[key], expected.moments[key]
            torch.testing.assert_close(moment.total, other.total, rtol=1e-5, atol=1e-5)
            assert (moment.sequences, moment.tokens) == (other.sequences, other.tokens), key


def main(backend):
    dist.init_process_group("gloo")
    ranks = Ranks.of_run()
    for name, make in MODELS.items():
        for count in (1, 5, 8):
            rows = tiny.rows(count, seed=2)
            started = time.perf_counter()
            expected = alone(make(), rows)
            model = BACKENDS[backend](make())
            agree(collect(model, rows), expected, ranks)
            if ranks.is_main:
                print(name, count, f"{time.perf_counter() - started:.2f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
