import pytest

from safedelta_hf.data.prompt_sets import PROMPT_SETS, PromptSet
from safedelta_hf.errors import DataError


def test_prompts_of_a_csv_set_are_those_of_its_column_and_rows_each_once(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text('kind,request\nstandard,"Do a, then b"\ncontextual,left out\nstandard,c\nstandard,c\n')
    found = PromptSet(title="T", source=str(path), column="request", licence="MIT", only={"kind": "standard"})
    assert found.prompts() == ["Do a, then b", "c"]


def test_conversations_of_a_set_give_their_first_turn(tmp_path, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([{"turns": ["first", "second"]}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: rows)
    assert PromptSet(title="T", source="a/b", column="turns", licence="MIT").prompts() == ["first"]


def test_a_set_that_changed_its_columns_or_cannot_be_fetched_says_so(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text("request\na\n")
    with pytest.raises(DataError, match=r"T at .* has the columns \['request'\] and not \['goal'\]"):
        PromptSet(title="T", source=str(path), column="goal", licence="MIT").prompts()
    with pytest.raises(DataError, match="cannot be fetched from .*download it yourself"):
        PromptSet(title="T", source=str(tmp_path / "none.csv"), column="goal", licence="MIT").prompts()


def test_each_set_states_licence_and_kind():
    assert all(one.licence and one.kind in ("harmful", "benign") for one in PROMPT_SETS.values())
