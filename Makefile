# What `make check` runs is .ci/run, in a clean environment of its own; the others use the tools that are active.
.PHONY: check lint format test

check:
	bash .ci/run

lint:
	ruff check .
	ruff format --check .
	mypy
	lint-imports

format:
	ruff check --fix .
	ruff format .

test:
	pytest -n auto --dist loadfile
