"""The pages for contributors name what is there: files, classes, rooms and their floors."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import safedelta_hf
from safedelta_hf import errors

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
    tables = [part for part in read("docs/vocabulary.md").split("\n\n") if part.startswith("| word | meaning | code |")]
    rows = re.findall(r"^\|[^|]+\|[^|]+\|([^|]+)\|$", "\n".join(tables), re.MULTILINE)
    names = [(name, row) for row in rows for name in re.findall(r"`((?:\w+\.)?(?!py`)[a-zA-Z_]\w*)`", row)]
    assert len(names) > 20
    for name, row in names:
        paths = re.findall(r"`([\w/]+\.py)`", row)
        assert paths, row
        text = "\n".join(found(path).read_text(encoding="utf-8") for path in paths)
        assert all(re.search(rf"\b{part}\b", text) for part in name.split(".")), f"{name} in {row}"


@pytest.mark.parametrize("page", LINKING)
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", read(page))
    for link in links + re.findall(r'\bsrc(?:set)?="([^"]+)"', read(page)):
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


def test_every_error_has_a_place_that_says_what_to_do():
    named = re.findall(r"^## `(\w+)`$", read("docs/troubleshooting.md"), re.MULTILINE)
    classes = [
        name for name, thing in vars(errors).items() if isinstance(thing, type) and thing.__module__ == errors.__name__
    ]
    assert sorted(named) == sorted(classes)


def test_every_public_name_is_in_the_reference():
    shown = [
        re.findall(r"^::: ([\w.]+)$", read(f"docs/api/{page.name}"), re.MULTILINE) for page in ROOT.glob("docs/api/*")
    ]
    modules = [f"safedelta_hf.{name}" for name in ("evaluation", "evaluation.board", "training", "testbed", "errors")]
    names = [f"safedelta_hf.{name}" for name in safedelta_hf.__all__ if name != "__version__"]
    assert sorted(sum(shown, [])) == sorted([*names, *modules])


def places(entry):
    """The pages that an entry of the navigation leads to."""
    return [entry] if isinstance(entry, str) else [page for part in entry for page in places(part_of(part))]


def part_of(part):
    return next(iter(part.values())) if isinstance(part, dict) else part


def test_every_page_is_in_the_navigation_once():
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    assert sorted(places(yaml.safe_load(read("mkdocs.yml"))["nav"])) == sorted(pages)
