"""What is done grows no faster than linearly: counted in calls of functions, which no other load disturbs."""

import copy
import cProfile
import itertools
import pstats
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from safedelta_hf import (
    AutoStrength,
    ProfileConfig,
    Ridge,
    SafeDelta,
    SafetyProfile,
    adjust_checkpoint,
    adjust_model,
    collect_profile,
)

SIZES = (4, 8, 16)
COUNTER = itertools.count()


SHAPES = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}


def llama(layers):
    return LlamaForCausalLM(LlamaConfig(**SHAPES, num_hidden_layers=layers)).eval()


def mixtral(experts):
    torch.manual_seed(0)  # its router decides which experts see enough tokens for a moment of full rank
    config = MixtralConfig(**SHAPES, num_hidden_layers=1, num_key_value_heads=2, num_local_experts=experts)
    return MixtralForCausalLM(config).eval()


def rows(count, vocabulary):
    drawn = torch.randint(0, vocabulary, (count, 8), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in drawn]


def read(model, count=8, holdout=0.0):
    data = rows(count, model.config.vocab_size)
    return collect_profile(model, data, config=ProfileConfig(holdout=holdout, batch_size=2), progress=False)


def shifted(model):
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return tuned


def adjusting(model, rule, holdout=0.0, count=8):
    profile, tuned = read(model, count, holdout), shifted(model)
    return lambda: adjust_model(copy.deepcopy(tuned), base=model, profile=profile, rule=rule, progress=False)


def files_to_files(model, folder):
    folder = folder / str(next(COUNTER))
    model.save_pretrained(folder / "base")
    shifted(model).save_pretrained(folder / "tuned")
    read(model).save(folder / "profile")
    given = {name: folder / name for name in ("base", "tuned", "profile")}
    return lambda: adjust_checkpoint(
        **given, output=folder / str(next(COUNTER)), rule=Ridge(strength=1.0), progress=False
    )


def saved_and_loaded(model, folder):
    profile = read(model)

    def work():
        place = folder / str(next(COUNTER))
        profile.save(place)
        return [moment.tokens for moment in SafetyProfile.load(place).moments.values()]

    return work


AUTO = AutoStrength(lost=1e-9, confidence=1e-12, precision=10.0)
WAYS = {
    "reading, in layers": lambda size, folder: partial(read, llama(size)),
    "reading, in experts": lambda size, folder: partial(read, mixtral(size)),
    "reading, in sequences": lambda size, folder: partial(read, llama(1), 4 * size),
    "adjusting, in layers": lambda size, folder: adjusting(llama(size), SafeDelta(strength=1.0)),
    "adjusting, in experts": lambda size, folder: adjusting(
        mixtral(size).bfloat16(), Ridge(strength=1.0), count=4 * size
    ),  # as many tokens for each expert
    "a search, in layers": lambda size, folder: adjusting(llama(size), SafeDelta(strength=AUTO), holdout=0.5, count=32),
    "files to files, in layers": lambda size, folder: files_to_files(llama(size), folder),
    "a profile in files, in layers": lambda size, folder: saved_and_loaded(llama(size), folder),
}


def calls(work):
    work()  # what is done once for all
    profiler = cProfile.Profile()
    profiler.runcall(work)
    return pstats.Stats(profiler).total_calls


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_twice_as_much_takes_no_more_than_twice_as_many_calls(way, tmp_path):
    few, some, many = (calls(WAYS[way](size, tmp_path)) for size in SIZES)
    assert many - some <= 2.1 * (some - few), (few, some, many)
