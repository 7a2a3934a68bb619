"""The pages for contributors name what is there: files, classes, rooms and their floors."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = (ROOT, ROOT / "safedelta_hf", ROOT / "tests" / "distributed", ROOT / "tests" / "rules")
"""What paths in the pages are relative to."""
PAGES = ("CONTRIBUTING.md", "docs/architecture.md", "docs/vocabulary.md")
LINKING = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def found(path):
    return next((place / path for place in PLACES if (place / path).exists()), None)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_functions_that_a_page_names_are_there(page):
    named = re.findall(r"`([\w/]+\.py)(?:: (\w+))?`", read(page))
    assert named
    for path, function in named:
        if "NAME" not in path:
            assert found(path), f"{page}: {path}"
            assert not function or f"def {function}(" in found(path).read_text(encoding="utf-8"), f"{path}: {function}"


def test_each_word_of_the_vocabulary_is_where_it_says():
    rows = re.findall(r"^\|[^|]+\|[^|]+\|([^|]+)\|$", read("docs/vocabulary.md"), re.MULTILINE)
    names = [(name, row) for row in rows for name in re.findall(r"`((?:\w+\.)?(?!py`)[a-zA-Z_]\w*)`", row)]
    assert len(names) > 20
    for name, row in names:
        paths = re.findall(r"`([\w/]+\.py)`", row)
        assert paths, row
        text = "\n".join(found(path).read_text(encoding="utf-8") for path in paths)
        assert all(re.search(rf"\b{part}\b", text) for part in name.split(".")), f"{name} in {row}"


@pytest.mark.parametrize("page", LINKING)
def test_links_between_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", read(page)):
        if "://" not in link:
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def layers():
    (rooms,) = (
        contract["layers"]
        for contract in tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )
    return [{room.strip().removeprefix("safedelta_hf.") for room in floor.split("|")} for floor in rooms]


def test_the_floors_of_the_page_are_those_that_the_linter_holds():
    floors = []
    for number, rooms in re.findall(r"^\| (\d*) ?\| ([^|]+)\|", read("docs/architecture.md"), re.MULTILINE):
        if number:
            floors.append(set())
        floors[-1] |= set(re.findall(r"`(\w+)`", rooms))
    assert floors == layers()


def test_the_picture_has_the_same_floors_from_top_to_bottom():
    floors = {}
    for y, room in re.findall(r'<text class="n" x="\d+" y="(\d+)">(\w+)</text>', read("docs/architecture.svg")):
        floors.setdefault(int(y), set()).add(room)
    assert [floors[y] for y in sorted(floors)] == layers()
