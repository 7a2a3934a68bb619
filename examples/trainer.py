"""Fine-tune with the ordinary Trainer and keep the refusals: your model, your data, one callback.

python examples/trainer.py                                         # the tiny model that comes with the package
python examples/trainer.py MODEL DATA.jsonl REFUSALS.jsonl OUTPUT  # yours; both files hold rows of {"messages": [...]}

Needs `pip install datasets`. The adjusted model is written to OUTPUT, or to tuned-model.
"""

import sys

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from safedelta_hf import SafeDeltaCallback
from safedelta_hf.testbed import ALIGNED_MODEL, CASES, safety_data

if len(sys.argv) == 5:
    model_name, data_file, refusals_file, output = sys.argv[1:]
    data = load_dataset("json", data_files=data_file, split="train")
    refusals = load_dataset("json", data_files=refusals_file, split="train")
    epochs, learning_rate = 3, 2e-5
else:
    model_name, output = ALIGNED_MODEL, "tuned-model"
    data = Dataset.from_list(CASES["harmful"].examples())
    refusals = Dataset.from_list(safety_data())
    epochs, learning_rate = 5, 5e-4

model = AutoModelForCausalLM.from_pretrained(model_name)
tokenizer = AutoTokenizer.from_pretrained(model_name)


def tokenize(row: dict) -> dict:
    """Token ids, with labels on the last answer alone."""
    prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=True)
    whole = tokenizer.apply_chat_template(row["messages"], return_dict=True)
    answer_start = len(prompt["input_ids"])
    return {**whole, "labels": [-100] * answer_start + whole["input_ids"][answer_start:]}


callback = SafeDeltaCallback(refusals)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=output, num_train_epochs=epochs, learning_rate=learning_rate, save_strategy="no", report_to="none"
    ),
    train_dataset=data.map(tokenize, remove_columns=data.column_names),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    callbacks=[callback],
)
trainer.train()
trainer.save_model()
# What was done has been printed; print(callback.report) shows it for each kind of weight and each layer.
