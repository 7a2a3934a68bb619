import math
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from safedelta_hf import ProfileConfig, SafetyProfile, collect_profile
from safedelta_hf.data.dataset import SafetySequence, read_safety_data
from safedelta_hf.data.forms import IGNORED
from safedelta_hf.data.refusals import BEGINNING, Drift, HeldOut, ResponseReading, split
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import ConfigurationError, DataError
from tests.fixtures import refusing, tiny

ROWS = tiny.rows(24, seed=1)


def example(*prompt, answer=(90, 91)):
    return SafetySequence(input_ids=(*prompt, *answer), labels=(IGNORED,) * len(prompt) + answer)


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6), max_size=40), st.floats(0.0, 0.99))
def test_every_example_is_on_one_side_and_topics_are_never_split(prompts, share):
    sequences = [example(*prompt) for prompt in prompts]
    used, aside = split(sequences, share)
    assert sorted(used + aside, key=str) == sorted(sequences, key=str)
    assert not {one.input_ids for one in used} & {one.input_ids for one in aside}
    assert (used, aside) == split(sequences, share)


def test_prompts_about_one_thing_stay_together():
    # Token 1 asks, 2 to 9 word it, 20 to 35 are what it is about.
    sequences = [example(1, 2 + wording, 20 + thing) for thing in range(16) for wording in range(8)]
    used, aside = split(sequences, 0.25)
    assert len(aside) == 32 and not {one.input_ids[2] for one in used} & {one.input_ids[2] for one in aside}


def test_half_of_different_prompts_is_every_second():
    sequences = [example(number, 100) for number in range(10)]
    used, aside = split(sequences, 0.5)
    assert [one.input_ids[0] for one in aside] == [1, 3, 5, 7, 9]
    assert len(split(sequences, 0.0)[1]) == 0


def test_what_is_held_out_is_in_no_moment():
    model = tiny.llama()
    sequences = read_safety_data(ROWS)
    used, aside = split(sequences, 0.25)
    rows = [{"input_ids": list(one.input_ids), "labels": list(one.labels)} for one in used]
    whole = collect_profile(model, ROWS, config=ProfileConfig(holdout=0.25), progress=False)
    alone = collect_profile(model, rows, config=ProfileConfig(holdout=0.0), progress=False)
    assert whole.held_out.sequences == tuple(aside) and alone.held_out is None
    assert whole.header.sequences == len(used) and whole.header.data == alone.header.data
    for key, moment in whole.moments.items():
        assert torch.equal(moment.total, alone.moments[key].total)


def test_a_quarter_is_held_out_where_there_is_enough():
    assert len(collect_profile(tiny.llama(), ROWS, progress=False).held_out.sequences) in (5, 6, 7)
    assert collect_profile(tiny.llama(), ROWS[:8], progress=False).held_out is None


@pytest.mark.parametrize("share", [-0.1, 1.0, "some"])
def test_a_share_out_of_range_is_a_named_error(share):
    with pytest.raises(ConfigurationError, match="holdout="):
        collect_profile(tiny.llama(), ROWS, config=ProfileConfig(holdout=share), progress=False)


def test_too_few_examples_to_hold_out_are_a_named_error():
    with pytest.raises(DataError, match="holdout=0.25 sets none of 2 examples aside.*about 2 different"):
        collect_profile(tiny.llama(), ROWS[:2], config=ProfileConfig(holdout=0.25), progress=False)


def read_token_by_token(model, rows):
    """Oracle: for each row the losses of its response tokens, and what greedy decoding would give, and surely."""
    for row in rows:
        targets = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()[targets != IGNORED]
        targets = targets[targets != IGNORED]
        losses = -logits.log_softmax(-1)[torch.arange(len(targets)), targets]
        others = logits.scatter(1, targets[:, None], -torch.inf).amax(1)
        lead = logits[torch.arange(len(targets)), targets] - others
        yield losses, lead > 0, lead >= math.log(2)


def test_a_reading_is_that_of_one_token_after_another():
    model = refusing.base()
    rows = refusing.REFUSALS + ROWS[:4]
    held_out = HeldOut.measured(open_model(model), read_safety_data(rows), batch_size=4)
    readings = held_out.read(open_model(model), batch_size=3)
    for reading, mean, (losses, hits, sure) in zip(
        readings, held_out.losses, read_token_by_token(model, rows), strict=True
    ):
        assert reading.losses == pytest.approx(losses.tolist(), abs=1e-5)
        assert mean == pytest.approx(float(losses.mean()), abs=1e-5)
        assert reading.greedy == next((place for place, hit in enumerate(hits) if not hit), len(hits))
        assert reading.begins == bool(hits[:BEGINNING].all())
        assert reading.surely_begins == bool(sure[:BEGINNING].all())
    kinds = {(reading.begins, reading.surely_begins) for reading in readings}
    assert kinds >= {(True, True), (False, False)}, "the test reads both"


def test_what_is_lost_is_what_the_base_begins_and_another_model_does_not():
    base, tuned = refusing.base(), refusing.fine_tuned(count=3)
    held_out = HeldOut.measured(open_model(base), read_safety_data(refusing.REFUSALS), batch_size=8)
    readings = held_out.read(open_model(base))
    assert Drift.between(readings, readings) == Drift(lost=0, probability_lost=0.0)
    lost, shares = 0, []
    pairs = [read_token_by_token(model, refusing.REFUSALS) for model in (base, tuned)]
    for (before, _, begun), (after, still, _) in zip(*pairs, strict=True):
        lost += bool(begun[:BEGINNING].all() and not still[:BEGINNING].all())
        chances = [float((-losses[:BEGINNING]).exp().prod()) for losses in (before, after)]
        shares.append(max(1 - chances[1] / chances[0], 0.0))
    drift = Drift.between(readings, held_out.read(open_model(tuned)))
    assert 0 < drift.lost == lost
    assert drift.probability_lost == pytest.approx(fmean(shares), abs=1e-4)
    assert drift.standard_error == pytest.approx(stdev(shares) / len(shares) ** 0.5, abs=1e-4)
    alone = Drift.between(readings[:1], held_out.read(open_model(tuned))[:1])
    assert alone.probability_lost_at_most(0.95) == alone.probability_lost == pytest.approx(shares[0], abs=1e-4)


READINGS = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(
    lambda pair: ResponseReading(losses=(1.0,) * 6, greedy=max(pair), sure=min(pair))
)


@given(st.lists(st.tuples(READINGS, READINGS), min_size=1))
def test_a_base_that_does_not_surely_begin_a_refusal_cannot_lose_it(pairs):
    sure = [after for before, after in pairs if before.surely_begins]
    assert Drift.between(*zip(*pairs, strict=True)).lost == sum(not after.begins for after in sure)


def test_an_adapter_counts_in_the_drift_and_not_in_the_base():
    base = HeldOut.measured(open_model(tiny.llama()), read_safety_data(ROWS), batch_size=8)
    model = get_peft_model(tiny.llama(), LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    assert HeldOut.measured(open_model(model), base.sequences, batch_size=8).losses == pytest.approx(
        base.losses, abs=1e-6
    )
    plain = base.read(open_model(tiny.llama()))
    assert Drift.between(plain, base.read(open_model(model))).probability_lost > 1e-3


def test_held_out_data_survives_the_disk(tmp_path):
    profile = collect_profile(tiny.llama(), ROWS, progress=False)
    profile.save(tmp_path / "profile")
    assert SafetyProfile.load(tmp_path / "profile").held_out == profile.held_out
    assert all(math.isfinite(loss) for loss in profile.held_out.losses)
