"""Safety-aware probing: fine-tune with steps that see where a harmful step would cost usefulness.

python examples/safety_probe.py    # writes probed-model

The pairs hold one prompt, a safe and a harmful reply each. The refusals are measured as training left them; see
docs/training/sap.md for what can be expected of it, and put a SafeDeltaCallback beside it.
"""

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from safedelta_hf.testbed import CASES, behaviour_scores, load_aligned, preference_pairs, tokenize
from safedelta_hf.training import SafetyProbeConfig, with_safety_probe

model, tokenizer = load_aligned()
SafetyProbe = with_safety_probe(Trainer)  # or TRL's SFTTrainer
trainer = SafetyProbe(
    model=model,
    args=TrainingArguments(
        output_dir="probed-model",
        num_train_epochs=1,
        learning_rate=1e-3,
        per_device_train_batch_size=16,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=tokenize(CASES["benign"].examples(), tokenizer),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    probe=SafetyProbeConfig(pairs=preference_pairs(50), every_n_steps=2),
)
trainer.train()
trainer.save_model()
for name, score in behaviour_scores(model.eval(), tokenizer, has_new_skill=False, questions=50).items():
    print(f"{name}: {score.value:.2f}")
