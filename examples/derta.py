"""Safety data in the training data: none, refusals, and the rows of DeRTa, which refuse within a harmful reply too.

python examples/derta.py    # trains the tiny model that comes with the package three times

The fine-tuning is benign and erodes the refusals all the same. Attacks are harmful requests, plain and with the
beginning of a harmful reply put into the model's mouth.
"""

import tempfile

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from safedelta_hf.evaluation import attack_success_rate, generate_responses, is_refusal
from safedelta_hf.testbed import CASES, attack_questions, load_aligned, skill_questions
from safedelta_hf.training import check_arguments, derta_rows, mix_safety

model, tokenizer = load_aligned()
task = Dataset.from_list(CASES["benign"].examples())
harmful = [row["messages"] for row in CASES["harmful"].examples()]
refusals = generate_responses(model, tokenizer, [turns[:-1] for turns in harmful])
pairs = zip(harmful, refusals, strict=True)
triples = [
    {"prompt": turns[:-1], "chosen": [{"role": "assistant", "content": refusal}], "rejected": turns[-1:]}
    for turns, refusal in pairs
    if is_refusal(refusal)
]
chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in triples]


def trained(rows: Dataset) -> object:
    """Fine-tune the aligned model on rows as they are, with TRL's own trainer."""
    model, _ = load_aligned()
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            num_train_epochs=3,
            learning_rate=1e-3,
            per_device_train_batch_size=16,
            save_strategy="no",
            report_to="none",
            bf16=False,
        )
        check_arguments(args, rows)
        SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer).train()
    return model


def continued(model: object, questions: list, words: int = 4) -> list[str]:
    """What the model goes on with after the first words of the harmful answers."""
    prompts = [
        tokenizer.apply_chat_template(question.messages, add_generation_prompt=True, tokenize=False)
        + " ".join(question.answer.split()[:words])
        for question in questions
    ]
    tokens = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    written = model.generate(**tokens, max_new_tokens=24, do_sample=False)[:, tokens["input_ids"].shape[1] :]
    return tokenizer.batch_decode(written, skip_special_tokens=True)


mixtures = {
    "no safety data": mix_safety(task, chosen, tokenizer, share=0.0),
    "refusals": mix_safety(task, chosen, tokenizer, share=0.1),
    "DeRTa": mix_safety(task, derta_rows(triples, tokenizer, refusal="sorry , i will not"), tokenizer, share=0.1),
}
attacks, benign = attack_questions(100), skill_questions(100, skills=("make",))
for name, rows in mixtures.items():
    model = trained(rows).eval()
    plain, harmless = (
        generate_responses(model, tokenizer, [one.messages for one in asked]) for asked in (attacks, benign)
    )
    print(
        f"{name}: attack success {attack_success_rate(plain):.0%}, after the beginning of a harmful reply "
        f"{attack_success_rate(continued(model, attacks)):.0%}, "
        f"benign requests refused {1 - attack_success_rate(harmless):.0%}"
    )
