"""The same with a LoRA adapter: what is saved is an adapter of the same rank, and loads in plain PEFT.

pip install -e ".[peft]"
python examples/lora.py    # writes the adjusted adapter to tuned-adapter
"""

from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from safedelta_hf import SafeDeltaCallback
from safedelta_hf.testbed import CASES, load_aligned, safety_data, tokenize

model, tokenizer = load_aligned()
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
callback = SafeDeltaCallback(safety_data())
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="tuned-adapter",
        num_train_epochs=5,
        learning_rate=2.5e-3,
        per_device_train_batch_size=10,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=tokenize(CASES["harmful"].examples(), tokenizer),
    data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    processing_class=tokenizer,
    callbacks=[callback],
)
trainer.train()
trainer.save_model()
# What was done has been printed; print(callback.report) shows it for each kind of weight and each layer.
