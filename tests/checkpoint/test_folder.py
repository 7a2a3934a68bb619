"""A run takes up what a stopped one left, if it was made from the same inputs, and nothing else."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from filelock import FileLock, Timeout

from safedelta_hf import Ridge, SafeDelta, SafetyProfile, Treatment
from safedelta_hf.checkpoint import folder as checkpoint_folder
from safedelta_hf.checkpoint.folder import CheckpointFolder
from safedelta_hf.checkpoint.store import CheckpointStore
from safedelta_hf.errors import CheckpointError, OutputError
from safedelta_hf.profile.moments import Moments
from safedelta_hf.weights.safetensors_files import SafetensorsFiles
from tests.fixtures import by_hand, checkpoints
from tests.fixtures.checkpoints import contents


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    case = checkpoints.case(tmp_path_factory.mktemp("resume"), "one layer")
    complete = contents(case.adjust() and case.output)
    shutil.rmtree(case.output)
    return case, complete


def stop_at(case, monkeypatch, left, **settings):
    keep, records = CheckpointStore.finish, []

    def interrupted(self, record):
        if len(records) == left:
            raise KeyboardInterrupt
        records.append(record)
        keep(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            case.adjust(**settings)


@pytest.fixture
def stopped(untouched, tmp_path, monkeypatch):
    """A run that was interrupted after half of its weights."""
    shutil.copytree(untouched[0].folder, tmp_path, dirs_exist_ok=True, copy_function=shutil.copy2)
    case = checkpoints.Case(tmp_path, untouched[0].model, untouched[0].profile)
    stop_at(case, monkeypatch, 6)
    return case


def write_log(case, *lines):
    """Replace the lines below the manifest."""
    path = case.work / "finished.jsonl"
    path.write_bytes(b"".join([path.read_bytes().splitlines(keepends=True)[0], *lines]))


def finished_lines(case):
    return (case.work / "finished.jsonl").read_bytes().splitlines(keepends=True)[1:]


def deltas_of(case, monkeypatch):
    """Names of the weights that a run computes, and the bytes that it ends with."""
    read, names = CheckpointStore.delta, []

    def noted(self, name):
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(CheckpointStore, "delta", noted)
    case.adjust()
    return names, contents(case.output)


def test_finished_weights_are_not_done_again(stopped, untouched, monkeypatch):
    done = {json.loads(line)["record"]["parameter"] for line in finished_lines(stopped)}
    assert len(done) == 6
    names, found = deltas_of(stopped, monkeypatch)
    assert not done & set(names) and len(names) == len(set(names)) == 12 - 6
    assert found == untouched[1]


def test_a_finished_weight_whose_bytes_changed_is_done_again(stopped, untouched, monkeypatch):
    line = json.loads(finished_lines(stopped)[2])
    name = line["record"]["parameter"]
    place = SafetensorsFiles(stopped.tuned).tensors[name]
    part = stopped.work / "model" / f"{place.file}.part"
    content = bytearray(part.read_bytes())
    content[place.start + 1] ^= 4
    part.write_bytes(content)
    names, found = deltas_of(stopped, monkeypatch)
    assert name in names and len(names) == 12 - 5 and found == untouched[1]


@pytest.mark.parametrize("damage", ["lost", "header", "short"])
def test_a_damaged_shard_is_done_again(damage, stopped, untouched):
    part = sorted((stopped.work / "model").glob("*.part"))[0]
    content = part.read_bytes()
    if damage == "lost":
        part.unlink()
    else:
        part.write_bytes(content[:100] if damage == "short" else content[:9] + b"?" + content[10:])
    stopped.adjust()
    assert contents(stopped.output) == untouched[1]


@pytest.mark.parametrize("damage", [b'{"record": {"par', b"\xff\xfe\n", b"[]\n", b'{"record": [], "names": 3}\n'])
def test_the_weight_of_a_damaged_line_is_done_again_alone(damage, stopped, untouched, monkeypatch):
    lines = finished_lines(stopped)
    rest = lines[4:] if damage.endswith(b"\n") else lines[3:]  # without an end it runs into the next
    write_log(stopped, *lines[:3], damage, *rest)
    names, found = deltas_of(stopped, monkeypatch)
    assert len(names) == 12 - 5 and found == untouched[1]


def test_what_an_earlier_run_copied_and_is_gone_since_is_not_in_the_output(stopped, untouched):
    for name in ("stray.txt", "inner/stray.txt", "model.safetensors.index.json"):
        path = stopped.work / "model" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    stopped.adjust()
    assert contents(stopped.output) == untouched[1]


def stored_otherwise(case):
    case.profile.save(case.folder / "compressed", "eigenbasis:2")
    return SafetyProfile.load(case.folder / "compressed")


LAYER = "model.layers.0.self_attn"


def with_uses(profile):
    """Read another moment for one of the parameters."""
    moments = {use.parameter: use.moment for use in profile.uses}
    moments[f"{LAYER}.q_proj.weight"] = moments[f"{LAYER}.o_proj.weight"]
    return replace(profile, uses=tuple(replace(use, moment=moments[use.parameter]) for use in profile.uses))


def held(profile, factor=1.0):
    """The same profile in memory, as if it had just been collected; one moment is another."""
    moments = {key: replace(moment, total=moment.total.clone()) for key, moment in profile.moments.items()}
    next(iter(moments.values())).total.mul_(factor)
    return replace(profile, moments=Moments(moments))


CHANGES = {
    "rule": lambda case: {"rule": Ridge(strength=2.0)},
    "rule again": lambda case: {"rule": SafeDelta(strength=1.0)},
    "treatment": lambda case: {"treatment": Treatment(norms="keep")},
    "tuned": lambda case: os.utime(next(case.tuned.glob("*.safetensors")), (1, 1)),
    "base": lambda case: os.utime(next(case.base.glob("*.safetensors")), (1, 1)),
    "profile in memory": lambda case: {"profile": case.profile},
    "profile otherwise stored": lambda case: {"profile": stored_otherwise(case)},
    "profile with another use": lambda case: {"profile": with_uses(SafetyProfile.load(case.folder / "profile"))},
    "task": lambda case: {"task_profile": case.folder / "profile"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_with_other_inputs_does_not_go_on_from_there(change, stopped):
    before = contents(stopped.work)
    settings = CHANGES[change](stopped) or {}
    with pytest.raises(
        CheckpointError, match=f"made with other {change.split()[0]}; repeat that run .*or remove the file"
    ):
        stopped.adjust(**settings)
    assert contents(stopped.work) == before and not stopped.output.exists()
    shutil.rmtree(stopped.work)
    stopped.adjust(**settings)


def test_a_run_with_the_same_profile_in_another_place_goes_on_from_there(stopped, untouched, tmp_path, monkeypatch):
    shutil.copytree(stopped.folder / "profile", tmp_path / "elsewhere")
    shutil.rmtree(stopped.folder / "profile")
    stop_at(stopped, monkeypatch, 2, profile=SafetyProfile.load(tmp_path / "elsewhere"))
    assert len(finished_lines(stopped)) == 6 + 2
    stopped.adjust(profile=tmp_path / "elsewhere")
    assert contents(stopped.output) == untouched[1]


def test_a_run_with_a_profile_in_memory_goes_on_with_the_same_values_alone(stopped, monkeypatch):
    shutil.rmtree(stopped.work)
    stop_at(stopped, monkeypatch, 6, profile=held(stopped.profile))
    for other in (held(stopped.profile, factor=1.001), stored_otherwise(stopped), stopped.folder / "profile"):
        with pytest.raises(CheckpointError, match="made with other profile; repeat that run"):
            stopped.adjust(profile=other)
    stop_at(stopped, monkeypatch, 2, profile=held(stopped.profile))
    assert len(finished_lines(stopped)) == 6 + 2
    stopped.adjust(profile=held(stopped.profile))
    assert stopped.output.exists()


@pytest.mark.parametrize("manifest", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_work_folder_with_a_malformed_manifest_is_left_alone(manifest, stopped):
    path = stopped.work / "finished.jsonl"
    path.write_bytes(manifest + b"\n" + b"".join(finished_lines(stopped)))
    before = contents(stopped.work)
    with pytest.raises(CheckpointError, match="does not state what it is made from"):
        stopped.adjust()
    assert contents(stopped.work) == before


def test_two_runs_do_not_write_the_same_output(stopped, untouched):
    with FileLock(stopped.folder / ".output.lock"), pytest.raises(CheckpointError, match="another process is writing"):
        stopped.adjust()
    stopped.adjust()
    assert contents(stopped.output) == untouched[1]
    assert not (stopped.folder / ".output.lock").exists()


def test_the_lock_is_held_until_the_work_folder_is_gone(stopped, monkeypatch):
    remove, seen = shutil.rmtree, []

    def watched(path, **settings):
        if path == stopped.work:
            with pytest.raises(Timeout):
                FileLock(stopped.folder / ".output.lock", timeout=0).acquire()
            seen.append(path)
        remove(path, **settings)

    monkeypatch.setattr(shutil, "rmtree", watched)
    stopped.adjust()
    assert seen == [stopped.work]


@pytest.mark.parametrize("left", ["model", "nothing"])
def test_a_work_folder_without_a_log_is_begun_anew(left, stopped, untouched, monkeypatch):
    (stopped.work / "finished.jsonl").unlink()
    if left == "nothing":
        shutil.rmtree(stopped.work / "model")
    names, found = deltas_of(stopped, monkeypatch)
    assert len(names) == 12 and found == untouched[1] and not stopped.work.exists()


def test_a_work_folder_of_another_kind_is_left_alone(stopped):
    shutil.rmtree(stopped.work)
    stopped.work.mkdir()
    (stopped.work / "done.jsonl").write_text("a profile")
    with pytest.raises(CheckpointError, match=r"something else .*'done.jsonl'; finish that, or remove the folder"):
        stopped.adjust()
    assert contents(stopped.work) == {"done.jsonl": b"a profile"}
    shutil.rmtree(stopped.work)
    stopped.adjust()


def test_a_profile_is_not_saved_into_the_work_folder_of_a_model(stopped, untouched):
    before = contents(stopped.work)
    with pytest.raises(OutputError, match=r"holds the folder 'model', which is of no profile"):
        stopped.profile.save(stopped.output)
    assert contents(stopped.work) == before
    stopped.adjust()
    assert contents(stopped.output) == untouched[1]


def ended_before_the_clean_up(case, monkeypatch):
    """Have the output complete, and the work folder beside it as a killed run leaves it."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **settings: None)
        return case.adjust()


def test_a_complete_output_is_reported_by_the_next_run(stopped, monkeypatch):
    report = ended_before_the_clean_up(stopped, monkeypatch)
    assert stopped.work.exists() and stopped.adjust().to_dict() == report.to_dict() and not stopped.work.exists()


def test_a_complete_output_without_its_records_is_an_error(stopped, untouched, monkeypatch):
    ended_before_the_clean_up(stopped, monkeypatch)
    lines = finished_lines(stopped)
    write_log(stopped, *lines[:-1])
    name = json.loads(lines[-1])["record"]["parameter"]
    with pytest.raises(CheckpointError, match=f"^{name}: .* is complete, and the record .* is lost; remove the folder"):
        stopped.adjust()
    assert contents(stopped.output) == untouched[1]


def test_what_a_run_has_finished_is_on_the_disk_before_the_output_is_there(stopped, monkeypatch):
    steps, sync, replace = [], checkpoint_folder.sync, os.replace

    def synced(path):
        steps.append(path)
        sync(path)

    def replaced(source, target):
        steps.append(target)
        replace(source, target)

    monkeypatch.setattr(checkpoint_folder, "sync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    stopped.adjust()
    assert steps.index(stopped.work / "finished.jsonl") < steps.index(stopped.output)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_stale_part_of_a_shard_does_not_take_its_place(kind, stopped, untouched):
    shard = next(iter(SafetensorsFiles(stopped.tuned).paths))
    stale = stopped.tuned / f"{shard}.part"
    if kind == "folder":
        stale.mkdir()
        stale = stale / f"{shard}.part"
    stale.write_bytes((stopped.tuned / shard).read_bytes())
    stopped.adjust()
    assert contents(stopped.output) == untouched[1]


def test_another_file_never_replaces_a_shard(stopped, tmp_path):
    files = SafetensorsFiles(stopped.tuned)
    shard = next(iter(files.paths))
    (stopped.tuned / f"{shard}.part").write_text("stale")
    with CheckpointFolder(tmp_path / "other", files, {}, progress=False) as folder:
        with pytest.raises(CheckpointError, match=rf"{shard}\.part' stands in the way.*rename or remove it"):
            folder.complete([f"{shard}.part"], by_hand.report())
    assert not (tmp_path / "other").exists()


def test_an_output_that_appeared_meanwhile_is_not_replaced(stopped):
    stopped.output.mkdir()
    (stopped.output / "precious").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        stopped.adjust()
    assert contents(stopped.output) == {"precious": b"mine"} and stopped.work.exists()


def test_a_wide_tensor_is_copied_and_digested_in_pieces(untouched, tmp_path, monkeypatch):
    monkeypatch.setattr("safedelta_hf.checkpoint.folder.CHUNK", 7)
    case = untouched[0]
    case.adjust(output=tmp_path / "output")
    assert contents(tmp_path / "output") == untouched[1]
