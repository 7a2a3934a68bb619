"""One reader for every file and every source."""

import csv
import json

import pandas
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from safedelta_hf.data.rows import kept, read_rows
from safedelta_hf.errors import DataError

ROWS = [{"prompt": "how \u2028 do \u2029 i \u0085 ?", "completion": 'no, "never"'}, {"prompt": "a", "completion": "b"}]


def written(folder, kind):
    path = folder / f"rows.{kind.partition(' ')[0]}"
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    texts = {
        "jsonl": lines,
        "jsonl with a mark": "\ufeff" + lines,
        "jsonl joined with a mark": lines.replace("\n", "\r\n\ufeff"),
        "txt": lines,
        "json": json.dumps(ROWS, indent=2),
        "json with a mark": "\ufeff  " + json.dumps(ROWS, ensure_ascii=False),
    }
    if kind in texts:
        path.write_text(texts[kind], encoding="utf-8", newline="")
    elif kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


KINDS = ["jsonl", "jsonl with a mark", "jsonl joined with a mark", "txt", "json", "json with a mark"]
KINDS += ["csv", "tsv", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plain", [False, True])
def test_every_kind_of_file_holds_the_same_rows(tmp_path, kind, plain):
    path = written(tmp_path, kind)
    assert [row for _, row in read_rows(path, plain=plain)] == ROWS
    assert all(place.startswith(path.name) for place, _ in read_rows(str(path)))


def test_every_source_in_memory_gives_the_same_rows():
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    for source in (ROWS, iter(ROWS), Dataset.from_list(ROWS), pandas.DataFrame(ROWS), stream):
        assert [row for _, row in read_rows(source)] == ROWS
    assert [place for place, _ in read_rows(ROWS)] == ["row 0", "row 1"]


def test_plain_lines_are_rows_where_they_are_asked_for(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('\ufeff{"prompt": "a"}\n\n  how do i ?\u2028 \n[INST] hi\n', encoding="utf-8")
    assert [row for _, row in read_rows(path, plain=True)] == [{"prompt": "a"}, "how do i ?", "[INST] hi"]
    with pytest.raises(DataError, match=r"prompts.txt line 3 is not JSON"):
        read_rows(path)
    path.write_text("[INST] one\n[INST] two", encoding="utf-8")
    assert [row for _, row in read_rows(path, plain=True)] == ["[INST] one", "[INST] two"]


def test_splits_are_named_and_never_guessed():
    splits = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS)})
    with pytest.raises(DataError, match="DatasetDict with the splits 'train', 'test'; pass one of them"):
        read_rows(splits)
    with pytest.raises(DataError, match="dict with the keys 'prompt'"):
        read_rows({"prompt": ["a"]})


def test_a_data_set_of_the_hub_is_loaded_by_its_name(monkeypatch):
    import datasets

    asked, splits = [], {"train": ROWS, "test": ROWS[:1]}

    def load(name, split=None):
        asked.append((name, split))
        if name == "org/nothing":
            raise FileNotFoundError("no such data set")
        return splits if split is None else splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [row for _, row in read_rows("org/name:test")] == ROWS[:1]
    with pytest.raises(DataError, match="'org/name' has the splits train, test; give one, as in 'org/name:train'"):
        read_rows("org/name")
    splits.pop("test")
    assert read_rows("org/name")[1] == ("org/name row 1", ROWS[1])
    with pytest.raises(DataError, match=r"no data set of that name .*FileNotFoundError: no such data set"):
        read_rows("org/nothing")
    assert asked == [("org/name", "test"), ("org/name", None), ("org/name", None), ("org/nothing", None)]


@pytest.mark.parametrize("name", ["nowhere", "data/rows.jsonl", "data/rows.parquet", "a/b/c", "tests/nowhere", "a b/c"])
def test_what_can_be_no_name_on_the_hub_is_a_missing_file(monkeypatch, name):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(DataError, match=f"there is no file '{name}'"):
        read_rows(name)


def test_without_a_package_the_way_is_named(tmp_path, monkeypatch):
    path = written(tmp_path, "parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match="needs the package pyarrow.*pip install datasets, or give JSON lines"):
        read_rows(path)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match="a data set of the Hub needs the package datasets.*pip install datasets"):
        read_rows("org/name")


def test_an_iterator_is_kept_and_nothing_else_is_copied(tmp_path):
    assert kept(iter(ROWS)) == ROWS
    assert kept(ROWS) is ROWS and kept(tmp_path) is tmp_path and kept(None) is None
