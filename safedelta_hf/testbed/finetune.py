"""Fine-tuning on a case, as a user would: with the ordinary Trainer."""

from collections.abc import Sequence
from pathlib import Path

from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from safedelta_hf.testbed.cases import Case
from safedelta_hf.testbed.tokenizer import tokenize


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    case: Case,
    *,
    seed: int,
    output: Path,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> None:
    """Fine-tune a model on a case with the ordinary Trainer.

    Args:
        model: Trained in place.
        tokenizer: Its tokenizer.
        case: Data and training arguments.
        seed: Seed of the data and of the training.
        output: Folder of the Trainer.
        callbacks: Passed to the Trainer.
        progress: Whether the Trainer shows its progress bar and figures.
    """
    set_seed(seed)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            num_train_epochs=case.epochs,
            learning_rate=case.learning_rate,
            per_device_train_batch_size=case.batch_size,
            lr_scheduler_type="cosine",
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=not progress,
        ),
        train_dataset=tokenize(case.examples(seed), tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    if not progress:
        trainer.remove_callback(PrinterCallback)
    trainer.train()
