"""Make the aligned model: ``python -m safedelta_hf.testbed.train --output DIR``.

The shipped model is what this writes with seed 0. Reproduction was checked with two threads on one machine (torch 2.13,
CPU): a second run, its stages in separate processes, gave the same weights byte for byte. Another number of threads or
another processor rounds sums differently, so that the file may differ there; that was not tried.
"""

from pathlib import Path
from typing import Annotated

import typer

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.folders import complete_or_absent
from safedelta_hf.testbed.tokenizer import build_tokenizer
from safedelta_hf.testbed.training import Stage, build_model, draw_alignment, draw_knowledge, train_stage

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
    model = build_model(tokenizer, seed)
    stages = (
        Stage(name="knowledge", draw=draw_knowledge, steps=knowledge_steps, learning_rate=3e-3),
        Stage(name="alignment", draw=draw_alignment, steps=alignment_steps, learning_rate=5e-4),
    )
    knowledge, alignment = (train_stage(model, tokenizer, stage, seed=seed, progress=progress) for stage in stages)
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
