"""The same with TRL's SFTTrainer, which reads conversations itself.

pip install -e ".[trl]"
python examples/sft.py    # writes the adjusted model to tuned-model
"""

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from safedelta_hf import SafeDeltaCallback
from safedelta_hf.testbed import CASES, load_aligned, safety_data

model, tokenizer = load_aligned()
callback = SafeDeltaCallback(Dataset.from_list(safety_data()))
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(output_dir="tuned-model", num_train_epochs=5, learning_rate=5e-4, save_strategy="no", bf16=False),
    train_dataset=Dataset.from_list(CASES["harmful"].examples()),
    processing_class=tokenizer,
    callbacks=[callback],
)
trainer.train()
trainer.save_model()
# What was done has been printed; print(callback.report) shows it for each kind of weight and each layer.
