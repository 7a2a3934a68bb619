import math
from dataclasses import replace

import pytest
import torch

from safedelta_hf import Checkpointing, ProfileConfig, SafetyProfile, collect_profile
from safedelta_hf.capture import collect as module
from safedelta_hf.data.batches import batches_of_equal_length
from safedelta_hf.data.dataset import read_safety_data
from safedelta_hf.errors import CaptureError, ConfigurationError
from safedelta_hf.evaluation import sorting
from tests.fixtures import tiny
from tests.profile.saved_profiles import same_moments

ROWS = tiny.rows(20, seed=1)


def collected(model, folder, batches=3, **settings):
    config = ProfileConfig(batch_size=2, holdout=0.0, **settings)
    checkpointing = None if folder is None else Checkpointing(folder, every=batches)
    return collect_profile(model, ROWS, config=config, checkpointing=checkpointing, progress=False)


def interrupted(model, folder, monkeypatch, after):
    """Collect, and fail in the pass that follows the first few."""
    calls = []
    whole = module.capture_profile

    def fail_later(*given, **settings):
        calls.append(given)
        if len(calls) > after:
            raise KeyboardInterrupt
        return whole(*given, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(module, "capture_profile", fail_later)
        with pytest.raises(KeyboardInterrupt):
            collected(model, folder)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_parts_sum_to_what_one_pass_finds(make, tmp_path):
    one, other = collected(make(), None), collected(make(), tmp_path / "sums")
    assert (one.header, one.uses, set(one.moments)) == (other.header, other.uses, set(other.moments))
    for key, moment in one.moments.items():
        torch.testing.assert_close(moment.total, other.moments[key].total, rtol=1e-5, atol=1e-6)
        assert (moment.sequences, moment.tokens) == (other.moments[key].sequences, other.moments[key].tokens)
        assert other.moments.shape(key) == tuple(moment.total.shape)


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_that_goes_on_ends_with_the_same_bits_and_reads_only_the_rest(tmp_path, monkeypatch, after):
    model = tiny.llama()
    expected = collected(model, tmp_path / "expected")
    interrupted(model, tmp_path / "sums", monkeypatch, after)
    read = []
    whole = module.capture_profile
    monkeypatch.setattr(
        module, "capture_profile", lambda *given, **settings: read.append(given) or whole(*given, **settings)
    )
    found = collected(model, tmp_path / "sums")
    parts = math.ceil(len(list(batches_of_equal_length(read_safety_data(ROWS), 2))) / 3)
    assert same_moments(found, expected) and len(read) == parts - after > 0
    assert len([path for path in (tmp_path / "sums").iterdir() if not path.name.startswith(".")]) == 1


@pytest.mark.parametrize("change", ["model", "settings", "data"])
def test_sums_of_something_else_are_not_taken_over(tmp_path, monkeypatch, change):
    model = tiny.llama()
    interrupted(model, tmp_path / "sums", monkeypatch, 2)
    if change == "model":
        model = tiny.perturbed(model)
    if change == "data":
        monkeypatch.setitem(globals(), "ROWS", tiny.rows(20, seed=2))
    settings = {"share_moments": False} if change == "settings" else {}
    found, expected = (collected(model, tmp_path / name, **settings) for name in ("sums", "expected"))
    assert same_moments(found, expected)


def test_a_damaged_sum_is_read_again(tmp_path, monkeypatch):
    model = tiny.llama()
    interrupted(model, tmp_path / "sums", monkeypatch, 2)
    path = next((tmp_path / "sums").glob("*-00002/moments-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert same_moments(collected(model, tmp_path / "sums"), collected(model, tmp_path / "expected"))


class Sometimes(torch.nn.Module):
    """Two layers that read the same tensor, but not when the sequence is short."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(tiny.VOCABULARY, 4)
        self.one, self.two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        return self.one(hidden) + self.two(hidden if input_ids.shape[1] > 6 else hidden.clone() * 2)


def test_layers_that_share_their_inputs_in_one_part_alone_are_a_named_error(tmp_path):
    with pytest.raises(CaptureError, match=r"two\.weight.*share_moments=False"):
        collected(Sometimes(), tmp_path / "sums", batches=1)
    apart = collected(Sometimes(), tmp_path / "sums", batches=1, share_moments=False)
    expected = collected(Sometimes(), None, share_moments=False)
    for key, moment in expected.moments.items():
        torch.testing.assert_close(moment.total, apart.moments[key].total)


def test_a_layer_that_only_some_parts_reach_has_the_inputs_of_those(tmp_path):
    class Long(Sometimes):
        def forward(self, input_ids):
            hidden = self.one(self.embed(input_ids))
            return self.two(hidden) if input_ids.shape[1] > 6 else hidden

    one, other = collected(Long(), None), collected(Long(), tmp_path / "sums", batches=1)
    assert one.header == other.header and set(one.uses) == set(other.uses)
    for key, moment in one.moments.items():
        torch.testing.assert_close(moment.total, other.moments[key].total)
        assert (moment.sequences, moment.tokens) == (other.moments[key].sequences, other.moments[key].tokens)


@pytest.mark.parametrize("every", [0, -1, 2.0])
def test_a_part_of_no_passes_is_refused_when_it_is_asked_for(tmp_path, every):
    with pytest.raises(ConfigurationError, match=f"every={every}"):
        Checkpointing(tmp_path, every)


def test_a_profile_names_the_repository_that_its_model_came_from_and_no_folder(tmp_path):
    model, commit = tiny.llama(), "1" * 40
    assert (collected(model, None).header.name, collected(model, None).header.revision) == (None, None)
    model.config._name_or_path, model.config._commit_hash = "org/llama", commit
    for folder in (None, tmp_path / "sums"):
        header = collected(model, folder).header
        assert (header.architecture, header.name, header.revision) == ("LlamaForCausalLM", "org/llama", commit)
    model.config._name_or_path = str(tmp_path)
    assert collected(model, None).header.name is None


PROMPTED = [{"input_ids": row["input_ids"], "labels": [-100, -100, *row["labels"][2:]]} for row in ROWS]
NOTHING_ASIDE = ProfileConfig(holdout=0.0)


@pytest.mark.parametrize("form", ["rows", "profile", "folder"])
def test_a_sorted_task_is_the_profile_of_what_is_left_whatever_tells_how_the_base_refuses(tmp_path, monkeypatch, form):
    known = collect_profile(tiny.llama(), PROMPTED, progress=False)
    known.save(tmp_path / "known")
    sorted_by = {"rows": PROMPTED, "profile": known, "folder": tmp_path / "known"}[form]
    contested = {tuple(row["input_ids"][:2]) for row in PROMPTED[:4]}
    monkeypatch.setattr(
        sorting,
        "refusal_probabilities",
        lambda m, prompts, *_, **__: [float(prompt in contested) for prompt in prompts],
    )
    settings = {"config": NOTHING_ASIDE, "purpose": "task data", "progress": False}
    found = collect_profile(tiny.llama(), PROMPTED, sorted_by=sorted_by, **settings)
    expected = collect_profile(tiny.llama(), PROMPTED[4:], **settings)
    assert found.header.sorting.left_out == 4
    assert same_moments(replace(found, header=replace(found.header, sorting=None)), expected)
    found.save(tmp_path / "task")
    assert SafetyProfile.load(tmp_path / "task").header == found.header


def test_a_profile_that_holds_no_refusals_out_cannot_sort_a_task():
    known = collect_profile(tiny.llama(), PROMPTED, config=NOTHING_ASIDE, progress=False)
    with pytest.raises(ConfigurationError, match="sorted_by: this profile holds no refusals out"):
        collect_profile(tiny.llama(), PROMPTED, sorted_by=known, config=NOTHING_ASIDE, progress=False)
