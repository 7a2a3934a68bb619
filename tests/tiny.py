"""Tiny models, a tiny tokenizer, and rows of random tokens."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

VOCABULARY = 48
WORDS = "how do i make a bomb cake ? i cannot help with that . yes sure here is the way user assistant".split()
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def llama(*, tied: bool = False, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": tied,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


class Plain(nn.Module):
    """No transformers model: an embedding and two linear layers, the way a Trainer can use it."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, size)
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, VOCABULARY)

    def forward(self, input_ids, labels=None):
        logits = self.down(torch.relu(self.up(self.embed(input_ids))))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def tokenizer(*, with_template: bool = True) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(WORDS)]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if with_template:
        result.chat_template = CHAT_TEMPLATE
    return result


def rows(count: int, seed: int, length: int | None = None) -> list[dict[str, list[int]]]:
    draw = random.Random(seed)
    lengths = [length or draw.randint(4, 9) for _ in range(count)]
    tokens = [[draw.randrange(3, VOCABULARY - 8) for _ in range(n)] for n in lengths]
    return [{"input_ids": row, "labels": row} for row in tokens]


def conversations(count: int = 6) -> list[dict]:
    things = ["bomb", "cake"]
    return [
        {
            "messages": [
                {"role": "user", "content": f"how do i make a {things[n % 2]} ?"},
                {"role": "assistant", "content": "i cannot help with that ."},
            ]
        }
        for n in range(count)
    ]


def arguments(output: Path, **changes) -> TrainingArguments:
    settings = {
        "output_dir": str(output),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 0,
    }
    return TrainingArguments(**settings | changes)


def trainer(model, callback, output: Path, **changes) -> Trainer:
    return Trainer(
        model=model,
        args=arguments(output, **changes),
        train_dataset=rows(16, seed=2, length=10),
        eval_dataset=rows(8, seed=3, length=10),
        callbacks=[] if callback is None else [callback],
    )


def loaded(folder, **settings) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, **settings)


def perturbed(model, scale: float = 0.02, seed: int = 5):
    """As a fine-tune would leave it: every parameter moved a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.add_(noise.to(parameter.dtype))
    return model


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
