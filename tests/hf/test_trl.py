"""TRL's trainers, on conversations, as their users write them."""

import pytest
from datasets import Dataset

from safedelta_hf import SafeDelta, SafeDeltaCallback, collect_profile
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
