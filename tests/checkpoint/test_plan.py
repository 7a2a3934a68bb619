"""What will happen is known from headers, before a tensor is read or a byte is written."""

import shutil

import pytest

from safedelta_hf import Ridge, TaskRidge, adjust_checkpoint
from safedelta_hf.checkpoint.plan import plan_checkpoint
from safedelta_hf.errors import BaseWeightsError, CheckpointError, ConfigurationError, ProfileError
from tests.fixtures.checkpoints import RULE, contents


def test_the_plan_reads_no_tensor_and_writes_nothing(case, monkeypatch):
    monkeypatch.setattr("safedelta_hf.weights.safetensors_files.SafetensorsFiles.read", None)
    before = contents(case.folder)
    for folder in (case.base, case.tuned, case.folder / "profile"):
        for path in folder.glob("*.safetensors"):
            wipe_data(path)
    wiped = contents(case.folder)
    plan = plan_checkpoint(**case.paths, rule=RULE)
    assert {entry.parameter for entry in plan.entries} == set(case.profile.header.base)
    table = plan.table()
    assert all(name in table for name in case.profile.header.base) and "begun" not in table
    assert contents(case.folder) == wiped != before


def wipe_data(path):
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:start] + bytes(len(content) - start))


def test_a_measured_strength_is_refused_before_anything_is_read(case):
    with pytest.raises(ConfigurationError, match="strength='auto' measures a model in memory.*give a number"):
        adjust_checkpoint(base="nowhere", tuned="nowhere", output=case.output, profile="nowhere", rule=Ridge())


def test_a_rule_that_weighs_the_task_needs_its_profile(case):
    with pytest.raises(ProfileError, match="pass task_profile="):
        case.adjust(rule=TaskRidge(strength=1.0))
    assert not case.work.exists()


@pytest.mark.parametrize("place", ["base", "tuned", "profile", "tuned/inner/one"])
def test_an_output_in_an_input_is_refused(place, case):
    before = contents(case.folder)
    with pytest.raises(ConfigurationError, match="lies in"):
        case.adjust(output=case.folder / place)
    assert contents(case.folder) == before


def test_an_output_that_exists_is_refused(case):
    case.output.mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        case.adjust()
    assert not case.work.exists() and not list(case.output.iterdir())


def test_an_adapter_is_not_taken_for_a_model(case):
    shutil.rmtree(case.tuned)
    case.tuned.mkdir()
    (case.tuned / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="folder of an adapter: use adjust_adapter_files"):
        case.adjust()
    with pytest.raises(CheckpointError, match="no folder"):
        case.adjust(tuned=case.folder / "nowhere")


def test_what_is_left_is_what_is_not_finished(case):
    plan = plan_checkpoint(**case.paths, rule=RULE)
    names = [entry.parameter for entry in plan.entries]
    assert [entry.parameter for entry in plan.left(names[:3]).entries] == names[3:]
    assert plan.left([]).entries == plan.entries and plan.left(names).entries == ()
    assert plan.names == (*names, *plan.pair.others) and not plan.is_begun
    case.work.mkdir()
    assert plan.is_begun and "begun by an earlier run" in plan.table()


def test_the_files_of_the_base_are_named_as_those_of_the_base(case):
    with pytest.raises(BaseWeightsError, match="^base: .*holds neither"):
        plan_checkpoint(**case.paths | {"base": case.folder / "profile"}, rule=RULE)
    with pytest.raises(CheckpointError, match="^tuned: .*is no folder"):
        plan_checkpoint(**case.paths | {"tuned": case.folder / "nowhere"}, rule=RULE)
