"""`--config` and `--print-config` of every command, found by looking at what the commands have."""

import importlib
import inspect
from functools import cache
from typing import get_args

import pytest
import typer
import yaml
from typer.testing import CliRunner

from safedelta_hf.cli.config_file import OWN
from safedelta_hf.cli.main import COMMANDS, app, loaded

OTHER = {"int": 3, "float": 0.5, "str": "some text", "Path": "some/folder"}
"""A value of each kind that is no option's default and within every option's range."""


@cache
def options_of(name):
    """Options and arguments by what they are called on the command line."""
    options = [option for option in loaded(name).params if option.name not in OWN]
    return {option.opts[0].removeprefix("--").replace("-", "_"): option for option in options}


def described(name):
    """Kind and default of each option, as its function says them."""
    module, function = COMMANDS[name][0].split(":")
    signature = inspect.signature(getattr(importlib.import_module(module), function))
    parameters = {key: signature.parameters[option.name] for key, option in options_of(name).items()}
    assert len(parameters) == sum(one.annotation is not typer.Context for one in signature.parameters.values())
    return {key: (str(get_args(one.annotation)[0]), one.default) for key, one in parameters.items()}


def takes_many(option):
    return option.multiple or option.nargs == -1


def other_value(kind, default):
    if "bool" in kind:
        return not default
    one = next(value for word, value in OTHER.items() if word in kind)
    return [one, one] if "list[" in kind else one


def other_values(name):
    return {key: other_value(*said) for key, said in described(name).items()}


def run(name, *arguments):
    return CliRunner().invoke(app, [name, *map(str, arguments)])


def printed(name, *arguments):
    result = run(name, *arguments, "--print-config")
    assert result.exit_code == 0, result.output
    return yaml.safe_load(result.output)


def given(tmp_path, content):
    path = tmp_path / "options.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_is_read_from_a_file_and_printed_as_one(name, tmp_path):
    defaults, content = {key: default for key, (_, default) in described(name).items()}, other_values(name)
    assert list(printed(name)) == list(options_of(name)) == list(defaults)
    assert all(value != defaults[key] for key, value in content.items())
    assert printed(name, "--config", given(tmp_path, content)) == content
    with_hyphens = {key.replace("_", "-"): value for key, value in content.items()}
    assert printed(name, "--config", given(tmp_path, with_hyphens)) == content


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_printed_is_what_is_used_without_a_file(name, tmp_path):
    assert printed(name, "--config", given(tmp_path, printed(name))) == printed(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_on_the_command_line_win(name, tmp_path):
    content = other_values(name)
    path = given(tmp_path, content)
    for key, option in options_of(name).items():
        if getattr(option, "is_flag", False):
            for flags, value in ((option.opts, True), (option.secondary_opts, False)):
                assert not flags or printed(name, "--config", path, flags[0])[key] is value
            continue
        one = content[key][0] if takes_many(option) else content[key]
        wins = f"{one}1" if isinstance(one, str) else 1
        flag = [flag for flag in option.opts[:1] if flag.startswith("--")]
        found = printed(name, "--config", path, *flag, wins)
        assert found == content | {key: [wins] if takes_many(option) else wins}


@pytest.mark.parametrize("name", COMMANDS)
def test_values_of_another_kind_are_named_with_file_line_and_key(name, tmp_path):
    for key, option in options_of(name).items():
        wrong = ["{a: 1}", *(["[[1]]"] if takes_many(option) else ["[1, 2]"])]
        if any(word in described(name)[key][0] for word in ("int", "float", "bool")):
            wrong.append("much")
        for value in wrong:
            path = given(tmp_path, f"# first\n{key}: {value}\n")
            result = run(name, "--config", path, "--print-config")
            assert result.exit_code == 1 and f"safedelta: {path}, line 2: {key}" in result.output, result.output


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("ouput: a", "line 1: profile has no option 'ouput'; is it output?"),
        ("zzz: a", "profile has no option 'zzz'; it has model, output,"),
        ("config: other.yaml", "has no option 'config'"),
        ("safety_data: a\nsafety-data: b", "line 2: safety-data is given twice"),
        ("output: a\noutput: b", "line 2: output is given twice"),
        ("targets: [[q_proj]]", "targets is a list, each item of which has to be one value"),
        ("targets: [null]", "targets is a list, each item of which has to be one value"),
        ("batch_size: 0", "line 1: batch_size: "),
        ("batch_size: 1.5", "line 1: batch_size: "),
        ("private: 1", "private is '1', but has to be true or false"),
        ("[a, b]", "holds no options; write lines of KEY: VALUE"),
        ("a: [", "cannot be read (while parsing"),
    ],
)
def test_files_that_cannot_be_used_are_one_line_that_says_why(content, told, tmp_path):
    path = given(tmp_path, content)
    result = run("profile", "--config", path)
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert str(path) in result.output and told in result.output


def test_a_file_that_is_not_there_is_named(tmp_path):
    result = run("profile", "--config", tmp_path / "no.yaml")
    assert result.exit_code == 1 and "no.yaml' cannot be read" in result.output


def test_values_are_the_text_that_was_written_and_null_is_as_if_left_out(tmp_path):
    content = "strength: 010\ndevice: no\nordinary_weight: 1e-3\noutput: 2026-01-01\nprofile: yes\n"
    path = given(tmp_path, content.replace("ordinary_weight: 1e-3\n", "report: ~\n"))
    found = printed("apply", "--config", path)
    assert (found["strength"], found["device"], found["output"], found["profile"]) == ("010", "no", "2026-01-01", "yes")
    assert found["report"] is None and found["uncovered"] == "error"
    assert printed("profile", "--config", given(tmp_path, "ordinary_weight: 1e-3"))["ordinary_weight"] == 1e-3
    assert printed("profile", "--config", given(tmp_path, "targets: q_proj"))["targets"] == ["q_proj"]
    assert printed("profile", "--config", given(tmp_path, ""))["batch_size"] == 8


def test_what_is_required_is_marked_where_it_is_missing_and_still_required_without_printing(tmp_path):
    assert "model: null  # required\n" in run("profile", "--print-config").output
    assert "model: m\n" in run("profile", "--config", given(tmp_path, "model: m"), "--print-config").output
    missing = run("profile", "--config", given(tmp_path, "model: m"))
    assert missing.exit_code == 2 and "--output" in missing.output


def test_a_command_runs_with_what_the_file_says(tmp_path):
    from_file = run(
        "audit", "--config", given(tmp_path, {"model": "m", "task_data": "d", "safety_data": "s", "output": "."})
    )
    assert (
        from_file.output
        == run("audit", "--model", "m", "--task-data", "d", "--safety-data", "s", "--output", ".").output
    )
    assert from_file.exit_code == 1 and from_file.output.startswith("safedelta: ")
