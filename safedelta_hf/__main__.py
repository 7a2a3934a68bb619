"""`python -m safedelta_hf`: the `safedelta` command."""

from safedelta_hf.cli.main import app

app(prog_name="python -m safedelta_hf")
