"""Labels that were made for each position are those that the loss of a real trainer is computed from."""

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import DataCollatorForSeq2Seq, Trainer

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.training import check_arguments, derta_rows, mix_safety
from tests.fixtures import tiny

pytestmark = pytest.mark.filterwarnings("ignore::safedelta_hf.errors.SafeDeltaWarning")

TRIPLES = [
    {
        "prompt": [{"role": "user", "content": f"how do i make a {thing} ?"}],
        "chosen": [{"role": "assistant", "content": "i cannot help with that ."}],
        "rejected": [{"role": "assistant", "content": "sure here is the way"}],
    }
    for thing in ("bomb", "cake", "user")
]
SETTINGS = {"num_train_epochs": 1, "per_device_train_batch_size": 5, "learning_rate": 0.0, "report_to": "none"}
SETTINGS |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}


def rows():
    refusals = derta_rows(TRIPLES, tiny.tokenizer(), refusal="i cannot", keep=0.5)
    return mix_safety(tiny.conversations(4), refusals, tiny.tokenizer(), share=0.6)


def loss_by_hand(model, rows):
    """Mean over all labels of all rows of minus the log-probability after what stands before, row by row."""
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        pairs = zip(log_softmax(logits[:-1], -1), row["labels"][1:], strict=True)
        losses += [-float(chances[label]) for chances, label in pairs if label != -100]
    return sum(losses) / len(losses)


def sft(output, dataset, **changes):
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=tiny.llama(),
        args=SFTConfig(output_dir=str(output), bf16=False, **SETTINGS | {"per_device_train_batch_size": 10} | changes),
        train_dataset=dataset,
        processing_class=tiny.tokenizer(),
    )


def test_the_loss_of_sft_is_that_of_the_labels_as_made(tmp_path):
    dataset = rows()
    pairs = [pair for row in dataset for pair in zip(row["input_ids"], row["labels"], strict=True)]
    assert any(label not in (-100, token) for token, label in pairs)
    trainer = sft(tmp_path, dataset)
    check_arguments(trainer.args, dataset)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss_by_hand(tiny.llama(), dataset), rel=1e-4)


def test_the_loss_of_the_plain_trainer_is_that_of_the_labels_as_made(tmp_path):
    dataset = rows()
    trainer = Trainer(
        model=tiny.llama(),
        args=tiny.arguments(tmp_path, **SETTINGS | {"per_device_train_batch_size": 10}),
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss_by_hand(tiny.llama(), dataset), rel=1e-4)


def test_arguments_that_would_change_the_rows_are_refused(tmp_path):
    from trl import SFTConfig

    dataset = rows()
    longest = max(len(row["input_ids"]) for row in dataset)
    settings = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    check_arguments(SFTConfig(**settings, max_length=longest), dataset)
    check_arguments(tiny.arguments(tmp_path), dataset)
    with pytest.raises(ConfigurationError, match="packing=True lays several rows end to end"):
        check_arguments(SFTConfig(**settings, packing=True), dataset)
    with pytest.raises(ConfigurationError, match=f"max_length={longest - 1} would cut rows of up to {longest} tokens"):
        check_arguments(SFTConfig(**settings, max_length=longest - 1), dataset)
