"""TRL's trainers, on conversations, as their users write them."""

import pytest
from datasets import Dataset

from safedelta_hf import SafeDelta, SafeDeltaCallback, TaskRidge, collect_profile
from safedelta_hf.data.dataset import read_safety_data
from safedelta_hf.data.forms import IGNORED
from safedelta_hf.errors import DataError
from safedelta_hf.hf.profiles import examples_of
from tests.fixtures import tiny

REFUSALS = tiny.conversations()
SETTINGS = {"num_train_epochs": 2, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}


def sft(model, output, callback, peft_config=None, **changes):
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(output), save_strategy="no", **SETTINGS | changes),
        train_dataset=Dataset.from_list(tiny.conversations(16)),
        processing_class=tiny.tokenizer(),
        callbacks=[callback],
        peft_config=peft_config,
    )


def dpo(model, output, callback, peft_config=None, **changes):
    from trl import DPOConfig, DPOTrainer

    chosen, rejected = ({"role": "assistant", "content": text} for text in ("yes sure", "i cannot"))
    pairs = [
        {"prompt": row["messages"][:1], "chosen": [chosen], "rejected": [rejected]} for row in tiny.conversations(8)
    ]
    return DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(output), save_strategy="no", **SETTINGS | changes),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tiny.tokenizer(),
        callbacks=[callback],
        peft_config=peft_config,
    )


@pytest.mark.parametrize("make", [sft, dpo])
def test_the_callback_adjusts_what_a_trl_trainer_trained(make, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    model = tiny.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    callback = SafeDeltaCallback(REFUSALS, SafeDelta(strength=0.0))
    trainer = make(model, tmp_path / "run", callback)
    trainer.train()
    assert set(callback.report.outcomes) == {"adjusted"}
    assert trainer.state.log_history[-1]["safedelta/kept_share"] == callback.report.metrics()["safedelta/kept_share"]
    base = tiny.weights(tiny.llama())
    found = tiny.weights(trainer.model)
    assert all((found[name] == base[name]).all() for name in base if "embed" not in name)


@pytest.mark.parametrize("changes", [{}, {"completion_only_loss": False}, {"neftune_noise_alpha": 5.0}])
def test_the_head_is_observed_although_sft_fuses_it_away(tmp_path, changes):
    callback = SafeDeltaCallback(REFUSALS, SafeDelta(strength=1.0))
    sft(tiny.llama(), tmp_path, callback, **changes).train()
    expected = collect_profile(tiny.llama(), REFUSALS, tiny.tokenizer(), progress=False)
    assert callback.profile.uses == expected.uses
    for key, moment in expected.moments.items():
        found = callback.profile.moments[key].total
        assert (found - moment.total).norm() <= 0.02 * moment.total.norm(), key  # TRL trains under bfloat16 autocast


ASK = tiny.conversations(1)[0]["messages"][0]
GOOD, BAD, GOLD = ({"role": "assistant", "content": text} for text in ("yes sure", "i cannot", "here is the way"))
PAIR = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
ROWS = {
    "SFT": [{"prompt": [ASK], "completion": [GOOD]}],
    "DPO": [PAIR],
    "DPO without a prompt": [{"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}],
    "KTO": [{"prompt": [ASK], "completion": [one], "label": one is GOOD} for one in (GOOD, BAD)],
    "ORPO": [PAIR],
    "CPO": [PAIR],
    "TPO": [{**PAIR, "reference": [GOLD]}],
    "Reward": [{"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}],
    "GRPO": [{"prompt": [ASK]}],
    "RLOO": [{"prompt": [ASK]}],
    "OnlineDPO": [{"prompt": [ASK]}],
}
WITHOUT_RESPONSES = ("GRPO", "RLOO", "OnlineDPO")


def any_trainer(kind, folder, callbacks=()):
    """One of TRL's trainers on a saved model, with rows as its documentation has them."""
    import trl
    from transformers import AutoModelForSequenceClassification

    name = kind.split()[0]
    tiny.llama(max_position_embeddings=64).save_pretrained(folder / "base")
    model, given = tiny.loaded(folder / "base"), {}
    if name == "Reward":
        model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    if name in WITHOUT_RESPONSES:
        given = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)}
    places = {"CPO": "cpo", "ORPO": "orpo", "TPO": "tpo", "OnlineDPO": "online_dpo"}
    home = pytest.importorskip(f"trl.experimental.{places[name]}") if name in places else trl
    some = {"num_generations": 2} if name in ("GRPO", "RLOO") else {}
    settings = SETTINGS | {"save_strategy": "no", "per_device_train_batch_size": 2, "num_train_epochs": 1}
    return getattr(home, f"{name}Trainer")(
        model=model,
        args=getattr(home, f"{name}Config")(output_dir=str(folder / "run"), **settings | some),
        train_dataset=Dataset.from_list(ROWS[kind] * 4),
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
        **given,
    )


@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind not in WITHOUT_RESPONSES])
def test_what_a_trainer_keeps_of_its_rows_is_read_as_question_and_good_response(kind, tmp_path):
    trainer = any_trainer(kind, tmp_path)
    drawn = examples_of(trainer.get_train_dataloader().dataset, 8)
    found = read_safety_data(drawn, trainer.processing_class)
    words = trainer.processing_class.decode(found[0].input_ids, skip_special_tokens=True)
    assert words == "user how do i make a bomb ? assistant yes sure"
    said = [label for label in found[0].labels if label != IGNORED]
    assert trainer.processing_class.decode(said) == "yes sure </s>"
    assert len(set(found)) == 1 and len(found) == 4


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_the_default_callback_reads_preferences(kind, tmp_path):
    callback = SafeDeltaCallback(REFUSALS, TaskRidge(strength=1.0))
    any_trainer(kind, tmp_path, [callback]).train()
    assert callback.task_profile.header.sequences == 4 and set(callback.report.outcomes) == {"adjusted"}


@pytest.mark.parametrize("kind", WITHOUT_RESPONSES)
def test_prompts_alone_stop_before_training_with_what_to_pass(kind, tmp_path):
    trainer = any_trainer(kind, tmp_path, [SafeDeltaCallback(REFUSALS, TaskRidge(strength=1.0))])
    with pytest.raises(DataError, match=r"task data: row 0 has a prompt and no response.*task_dataset=.*Ridge\(\)"):
        trainer.train()
    assert trainer.state.global_step == 0
