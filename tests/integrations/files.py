"""Files of a run, and what its saved model has to be."""

import json

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.fixtures import tiny

SECTION = {"safety_dataset": "refusals.jsonl", "rule": "scale", "strength": 1.0, "keep_tuned": "before"}
"""Half of every delta stays, beside the whole of it: easily seen in what is saved."""


def write(folder, config, section=None):
    """A tiny chat model, its safety data, rows to train on, and the configuration."""
    tiny.llama().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    answers = [{"role": "assistant", "content": text} for text in ("yes sure", "i cannot")]
    pairs = [
        {"prompt": row["messages"][:1], "chosen": answers[:1], "rejected": answers[1:]} for row in tiny.conversations(8)
    ]
    rows = {"refusals": tiny.conversations(16), "train": tiny.conversations(8), "preferences": pairs}
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    (folder / "train.yaml").write_text(yaml.safe_dump({**config, "safedelta": section or SECTION}))


def deltas(folder, base):
    """Of a saved model or adapter, what each weight differs by from its base."""
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if (folder / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: value - before[name] for name, value in model.state_dict().items()}


def require_halved(saved, tuned, base):
    """What was saved has half of each delta that training made."""
    found, trained = deltas(saved, base), deltas(tuned, base)
    assert any(value.abs().max() > 1e-4 for value in trained.values())
    for name, value in trained.items():
        torch.testing.assert_close(found[name], value / 2, rtol=1e-3, atol=1e-6, msg=name)
