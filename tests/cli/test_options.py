import warnings

import pytest

from safedelta_hf.cli import options, profile, refusals
from safedelta_hf.cli.options import is_dotted, load_function, one_line_errors
from safedelta_hf.compare import WEIGHTS
from safedelta_hf.errors import ConfigurationError, warn
from safedelta_hf.evaluation import FORMATS
from safedelta_hf.evaluation.refusals import MAX_NEW_TOKENS
from safedelta_hf.profile.encodings import ENCODINGS
from safedelta_hf.profile.profile import DEFAULT_STORAGE
from safedelta_hf.rules import RULES, default_rule
from safedelta_hf.testbed import CASES
from safedelta_hf.testbed.comparison import CHEAP, METHODS


def test_names_and_defaults_that_help_tells_are_those_that_there_are():
    assert options.RULE_NAMES == tuple(RULES)
    assert options.UNREADING_RULES == tuple(name for name, rule in RULES.items() if not rule.reads_moments)
    assert options.CASE_NAMES == tuple(CASES) and options.TRAINED_NAMES == tuple(WEIGHTS)
    assert options.METHOD_NAMES == tuple(METHODS) and options.CHEAP_METHOD_NAMES == CHEAP
    assert options.GUARD_NAMES == tuple(FORMATS)
    stored = {name.partition(":")[0] for name in options.STORAGE_NAMES}
    assert stored == set(ENCODINGS) - {"factor"}  # which cannot be asked for
    assert options.DEFAULT_RULE_HELP.startswith(f"Default {default_rule('a task').name} where")
    assert options.DEFAULT_RULE_HELP.endswith(f"else {default_rule(None).name}.")
    assert profile.DEFAULT_STORAGE == DEFAULT_STORAGE and refusals.MAX_NEW_TOKENS == MAX_NEW_TOKENS


def test_functions_of_the_working_directory_are_found(tmp_path, monkeypatch):
    (tmp_path / "my_scores_here.py").write_text("def long_enough(response, row):\n    return len(response) > 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["elsewhere"])
    assert load_function("my_scores_here:long_enough", "--score")("four", {}) is True


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("math.sqrt", "is not of the form module:function"),
        ("nowhere_at_all:f", "cannot be imported"),
        ("math:nothing", "cannot be imported"),
        ("math:pi", "is no function"),
    ],
)
def test_functions_that_cannot_be_had_are_named(path, message):
    with pytest.raises(ConfigurationError, match=f"--score '{path}' {message}"):
        load_function(path, "--score")


def test_names_of_models_and_folders_are_not_taken_for_functions():
    assert is_dotted("my.module:judge")
    assert not any(
        map(is_dotted, ("meta-llama/Llama-Guard-3-8B", "/models/guard", "C:\\models\\guard", "guard", "a:b:c"))
    )


def test_a_warning_of_ours_is_a_line_without_a_place_in_the_code_and_others_stay(capsys):
    usual = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *given: print(warnings.formatwarning(*given[:4]), end="")
        with one_line_errors():
            warn("the base refuses:\n  row 5: how do i")
            warnings.warn("of another library", UserWarning, stacklevel=1)
    first, row, other, *_ = capsys.readouterr().out.splitlines()
    assert first == "Warning: the base refuses:" and row == "  row 5: how do i"
    assert "test_options.py" in other and "UserWarning" in other
    assert warnings.formatwarning is usual


def test_what_is_interrupted_says_how_it_goes_on(capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert ended.value.code == 130 and "what was given is as it was" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConfigurationError("one\n  two\n"), "safedelta: one two"),
        (OSError(28, "No space left on device"), "safedelta: [Errno 28] No space left on device"),
        (MemoryError(), "safedelta: MemoryError"),
    ],
)
def test_what_fails_is_one_line_and_status_1(error, told, capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise error
    assert ended.value.code == 1 and capsys.readouterr().err == told + "\n"
