"""Projected training: hold a LoRA where the base's refusals do not look, while it is trained.

pip install -e ".[peft]"
python examples/projected_training.py    # writes projected-adapter

The profile of the base exists before the first step, so that every fine-tuning of that base can use it.
"""

from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from safedelta_hf import collect_profile
from safedelta_hf.testbed import CASES, behaviour_scores, load_aligned, safety_data, tokenize
from safedelta_hf.training import ProjectedTraining

model, tokenizer = load_aligned()
profile = collect_profile(model, safety_data(), tokenizer, progress=False)
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="projected-adapter",
        num_train_epochs=3,
        learning_rate=2.5e-3,
        per_device_train_batch_size=16,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=tokenize(CASES["benign"].examples(), tokenizer),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    callbacks=[ProjectedTraining(profile=profile, hard=0.01)],  # or strength=0.001; or a safety_dataset
)
trainer.train()
trainer.save_model()
for name, score in behaviour_scores(model.eval(), tokenizer, has_new_skill=False, questions=50).items():
    print(f"{name}: {score.value:.2f}")
