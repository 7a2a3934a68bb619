"""What belongs to a model goes along with it; what belongs to its training does not."""

import pytest

from safedelta_hf.checkpoint.other_files import other_files
from safedelta_hf.checkpoint.plan import plan_checkpoint
from safedelta_hf.report.provenance import CARD_FILE, RECORD_FILE
from tests.checkpoint.test_adjust import INDEX
from tests.fixtures.checkpoints import RULE, contents


def test_everything_beside_the_weights_is_copied_but_for_other_weights_and_the_trainer(case):
    kept = ["README.md", "modeling_custom.py", "tokenizer.model", "assets/prompts/one.txt", "added/tokens.json"]
    left = [
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "model.fp16.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "training_args.bin",
        "trainer_state.json",
        "latest",
        "tf_model.h5",
        "flax_model.msgpack",
        "model-q4.gguf",
        "original/consolidated.00.pth",
    ]
    folders = ["global_step12/mp_rank_00.txt", "checkpoint-5/config.json", "runs/one/events", ".git/config"]
    for name in kept + left + folders:
        (case.tuned / name).parent.mkdir(parents=True, exist_ok=True)
        (case.tuned / name).write_text(name)
    (case.tuned / "loop").symlink_to(case.tuned, target_is_directory=True)
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    plan = plan_checkpoint(**case.paths, rule=RULE)
    assert set(plan.copied) == wanted | set(kept)
    assert set(plan.left_out) == {*left, *(name.split("/")[0] for name in folders), "loop"}
    case.adjust()
    found, source = contents(case.output, but=()), contents(case.tuned, but=())
    weights = {name for name in found if name.startswith("model-") or name == INDEX}
    assert found.keys() - weights == wanted | set(kept) | {RECORD_FILE}
    card = found[CARD_FILE].decode()
    assert source[CARD_FILE].decode() in card and "## Safety adjustment" in card, "what was there, and a section more"
    own = {name for name in found if name.endswith(".safetensors")} | {RECORD_FILE, CARD_FILE}
    assert all(found[name] == source[name] for name in found.keys() - own)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("config.json", True),
        ("tokenizer.model", True),
        ("code.py", True),
        ("sub/vocab.txt", True),
        ("MODEL.SAFETENSORS", False),
        ("sub/other.Bin", False),
        ("optimizer.pt", False),
        ("model-00001-of-00002.safetensors.part", False),
        ("trainer_state.json", False),
        (".cache/anything.json", False),
        ("sub/checkpoint-12/config.json", False),
        ("runs/events.json", False),
        (".gitattributes", True),
    ],
)
def test_a_file_belongs_to_the_model_unless_it_holds_weights_or_is_of_the_training(name, kept, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    copied, left = other_files(tmp_path, frozenset())
    assert (copied == (name,) and left == ()) if kept else (copied == () and len(left) == 1)
    assert kept or name.startswith(left[0])


def test_weights_themselves_are_in_neither_list_and_every_other_name_in_one(tmp_path):
    for name in ("b.json", "a.json", "model.safetensors", "stale.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "gone.json").symlink_to("nowhere")
    (tmp_path / "linked.json").symlink_to("a.json")
    (tmp_path / "folder").symlink_to(tmp_path, target_is_directory=True)
    found = other_files(tmp_path, frozenset({"model.safetensors"}))
    assert found == (("a.json", "b.json", "linked.json"), ("folder", "gone.json", "stale.safetensors"))
