"""`safedelta audit`: which rows of a fine-tuning data set the base would refuse, from files to files."""

from pathlib import Path
from typing import Annotated

import typer

from safedelta_hf.cli.options import one_line_errors, quieten_libraries
from safedelta_hf.folders import require_absent, require_writable
from safedelta_hf.report.printing import printed, written

TOO_MANY = 3
"""Exit status where more is refused than --fail-above allows."""


def audit(
    model: Annotated[str, typer.Option(help="Name or folder of the base (aligned) model, or of an adapter on it.")],
    task_data: Annotated[Path, typer.Option(help="The fine-tuning data.")],
    safety_data: Annotated[Path, typer.Option(help="Harmful prompts with refusals, best the base's own.")],
    output: Annotated[
        Path, typer.Option(help="File of JSON lines to write; must not exist. A killed run goes on there.")
    ],
    fail_above: Annotated[
        float | None,
        typer.Option(
            help=f"Exit with status {TOO_MANY} if the base would refuse, and the data answers, a larger share of rows.",
            min=0,
            max=1,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts of one length per forward pass, at most.", min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="Data type of the weights: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="Device, or device map of transformers: cpu, cuda:0, auto, ...")] = "auto",
) -> None:
    """Find the rows of a fine-tuning data set that the base would refuse, and how surely."""  # noqa: DOC501 - a status
    with one_line_errors():
        require_absent(output)
        require_writable(output)
        from safedelta_hf.evaluation.audit import audit_data  # takes seconds
        from safedelta_hf.modules.loading import load_base, load_tokenizer, source_of

        quieten_libraries(bars=False)
        read, what = source_of(model, "--model"), f"--model {model!r}"
        tokenizer = load_tokenizer(read, what)
        loaded = load_base(read, f"{what} (on --device {device!r})", dtype=dtype, device_map=device)
        found = audit_data(loaded, task_data, safety_data, tokenizer, output=output, batch_size=batch_size)
        typer.echo(printed(found.summary()), nl=False)
        typer.echo(written(output))
    if fail_above is not None and found.share > fail_above:
        typer.echo(f"More than --fail-above {fail_above:g}", err=True)
        raise typer.Exit(TOO_MANY)
