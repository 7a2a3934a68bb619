import pytest

from safedelta_hf.cli.options import is_dotted, load_function, one_line_errors
from safedelta_hf.errors import ConfigurationError


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
