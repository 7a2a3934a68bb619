"""Watch the refusals go while a model is fine-tuned, and come back when it has been adjusted.

python examples/evaluation.py
"""

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from safedelta_hf import EvaluationCallback, SafeDelta, SafeDeltaCallback
from safedelta_hf.testbed import CASES, attack_questions, load_aligned, safety_data, skill_questions, tokenize

model, tokenizer = load_aligned()
refusals = safety_data()
watch = EvaluationCallback(
    harmful=[{"messages": question.messages} for question in attack_questions(50)],
    benign=[{"messages": question.messages} for question in skill_questions(50, skills=("make",))],
    refusals=refusals,
)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="watched-model", num_train_epochs=5, learning_rate=5e-4, save_strategy="no", report_to="none"
    ),
    train_dataset=tokenize(CASES["harmful"].examples(), tokenizer),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    callbacks=[SafeDeltaCallback(refusals, SafeDelta(strength=0.3)), watch],  # in this order: adjust, then measure
)
trainer.train()
for entry in trainer.state.log_history:
    if "safedelta/eval_attack_success" in entry:
        success, loss = entry["safedelta/eval_attack_success"], entry["safedelta/eval_refusal_nll"]
        print(f"step {entry['step']:3d}: attack success {success:6.1%}, refusals {loss:.3f} nats per token")
print(watch.evaluation)
