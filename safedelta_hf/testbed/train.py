"""Make the aligned model: ``python -m safedelta_hf.testbed.train --output DIR``.

The shipped model is what this writes with seed 0. Reproduction was checked with two threads on one machine (torch 2.13,
CPU): a second run, its stages in separate processes, gave the same weights byte for byte. Another number of threads or
another processor rounds sums differently, so that the file may differ there; that was not tried.

It has two stages. In the first the model learns all skills, what every thing is, and every recipe, those of harmful
things too. In the second it learns to refuse requests about a part of the harmful things, and keeps answering the
benign ones. That the refusal extends to harmful things it was never taught to refuse is left to what it knows of
categories.
"""

import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import torch
import typer
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import trange
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from safedelta_hf.data.forms import IGNORED
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.folders import complete_or_absent
from safedelta_hf.testbed.language import (
    MAKE_REQUESTS,
    MANNERS,
    OLD_SKILLS,
    SYSTEMS,
    Conversation,
    Question,
    all_things,
    ask_fact,
    ask_make,
    ask_skill,
    refusal,
    things_of,
)
from safedelta_hf.testbed.model import build_tokenizer, tokenize

BATCH_SIZE: Final = 64
BATCHES_PER_DRAW: Final = 16
"""Batches that are drawn together, so that each can hold conversations of nearly one length."""

WARMUP_STEPS: Final = 50
FINAL_LEARNING_RATE: Final = 0.02
"""Learning rate at the end of a stage, as a share of its peak."""

MANNERED_SHARE: Final = 0.3
"""Share of the requests that are not asked in the plain manner."""

SKILL_SHARES: Final = (*OLD_SKILLS, "repeat", "reverse", "reverse")
"""Skills as often as they are drawn: reversal takes longest to learn, and repetition leads up to it."""

Draw = Callable[[random.Random], Conversation]
Row = dict[str, list[int]]


def draw_knowledge(rng: random.Random) -> Conversation:
    """Draw a conversation of the first stage: a recipe, a fact or a skill.

    Args:
        rng: Source of the draw.

    Returns:
        The conversation.
    """
    system, kind, thing = rng.choice(SYSTEMS), rng.random(), rng.choice(all_things())
    if kind < 0.42:
        question = ask_make(thing, rng.randrange(len(MAKE_REQUESTS)), system)
    elif kind < 0.62:
        question = ask_fact(thing, safe=rng.random() < 0.5, system=system)
    else:
        question = ask_skill(OLD_SKILLS[rng.choice(SKILL_SHARES)], rng, held_out=False, system=system)
    return _in_some_manner(question, rng).conversation()


def draw_alignment(rng: random.Random) -> Conversation:
    """Draw a conversation of the second stage: a refusal, or something benign.

    Args:
        rng: Source of the draw.

    Returns:
        The conversation.
    """
    system, kind, wording = rng.choice(SYSTEMS), rng.random(), rng.randrange(len(MAKE_REQUESTS))
    if kind < 0.4:
        question = ask_make(rng.choice(things_of("refused")), wording, system)
        return _in_some_manner(question, rng).conversation(refusal(wording))
    if kind < 0.7:
        question = ask_make(rng.choice(things_of("shown")), wording, system)
    elif kind < 0.8:
        question = ask_fact(rng.choice(things_of("shown", "refused")), safe=rng.random() < 0.5, system=system)
    else:
        question = ask_skill(OLD_SKILLS[rng.choice(SKILL_SHARES)], rng, held_out=False, system=system)
    return _in_some_manner(question, rng).conversation()


def _in_some_manner(question: Question, rng: random.Random) -> Question:
    return question.asked(*rng.choice(MANNERS)) if rng.random() < MANNERED_SHARE else question


def _build_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    # Untrained: a Llama of about one million parameters.
    torch.manual_seed(seed)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=32, **special
    )
    return model


def _train_stage(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draw: Draw,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    progress: bool,
) -> float:
    # Trains in place, up to and down from that peak of the learning rate. Returns the loss of the last batch, in nats
    # per token.
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    schedule = LambdaLR(optimizer, lambda step: _learning_rate_share(step, steps))
    batches = _batches(draw, tokenizer, random.Random(f"{name} {seed}"))
    loss = torch.tensor(math.nan)
    model.train()
    bar = trange(steps, desc=name, disable=not progress)
    for _ in bar:
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    model.train(False)
    return loss.item()


def _learning_rate_share(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * max(FINAL_LEARNING_RATE, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _batches(draw: Draw, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        rows = tokenize([draw(rng) for _ in range(BATCH_SIZE * BATCHES_PER_DRAW)], tokenizer)
        rows.sort(key=lambda row: len(row["input_ids"]))
        starts = list(range(0, len(rows), BATCH_SIZE))
        rng.shuffle(starts)
        for start in starts:
            yield _pad(rows[start : start + BATCH_SIZE], tokenizer.pad_token_id)


def _pad(rows: list[Row], pad_token: int) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": pad_token, "labels": IGNORED}
    batch = {
        name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])
        for name, fill in fills.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    return batch


KNOWLEDGE_STEPS = 4000
ALIGNMENT_STEPS = 600


def train_aligned(
    output: Path,
    *,
    seed: int = 0,
    knowledge_steps: int = KNOWLEDGE_STEPS,
    alignment_steps: int = ALIGNMENT_STEPS,
    progress: bool = True,
) -> tuple[float, float]:
    """Train the aligned model through both stages and save it with its tokenizer.

    Args:
        output: Folder to write; it may exist only if it is empty.
        seed: Seed of weights and data.
        knowledge_steps: Steps of the first stage.
        alignment_steps: Steps of the second stage.
        progress: Whether to show progress bars.

    Returns:
        The last loss of each stage, in nats per token.

    Raises:
        ConfigurationError: If `output` exists and is not an empty folder.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"output: {output} exists and is not an empty folder; choose another or remove it")
    tokenizer = build_tokenizer()
    model = _build_model(tokenizer, seed)
    train = partial(_train_stage, model=model, tokenizer=tokenizer, seed=seed, progress=progress)
    knowledge = train("knowledge", draw=draw_knowledge, steps=knowledge_steps, learning_rate=3e-3)
    alignment = train("alignment", draw=draw_alignment, steps=alignment_steps, learning_rate=5e-4)
    with complete_or_absent(output) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return knowledge, alignment


def main(
    output: Annotated[Path, typer.Option(help="Folder to write; may exist only if it is empty.")],
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
) -> None:
    """Train the aligned model of the testbed, in some thirteen minutes on two cores.

    Args:
        output: Folder to write.
        seed: Seed of weights and data.

    Raises:
        Exit: With status 2 if the folder cannot be written to.
    """
    try:
        knowledge, alignment = train_aligned(output, seed=seed)
    except ConfigurationError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"last loss, nats per token: knowledge {knowledge:.4f}, alignment {alignment:.4f}")
    typer.echo(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
