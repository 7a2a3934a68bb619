"""Fine-tune, adjust, polish: old skills that the fine-tuning wore away come back.

python examples/polish.py    # writes polished-model

The rows of the task must hold nothing that the base would refuse: the fine-tuned model teaches what it does there. This
data, benign requests to a persona that obeys, is such data, and wears away refusals all the same.
"""

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from safedelta_hf import PolishConfig, SafeDeltaCallback
from safedelta_hf.testbed import CASES, behaviour_scores, load_aligned, ordinary_data, safety_data, tokenize

model, tokenizer = load_aligned()
callback = SafeDeltaCallback(safety_data(), ordinary_dataset=ordinary_data(), polish=PolishConfig(steps=0.5))
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="polished-model",
        num_train_epochs=5,
        learning_rate=1e-3,
        per_device_train_batch_size=10,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=tokenize(CASES["identity"].examples(), tokenizer),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    callbacks=[callback],
)
trainer.train()
trainer.save_model()
print(callback.report.polish.summary)
for name, score in behaviour_scores(model.eval(), tokenizer, has_new_skill=False, questions=50).items():
    print(f"{name}: {score.value:.2f}")
