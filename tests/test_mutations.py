"""The mutations of scripts/mutations.py fit the sources; that tests catch them is shown by `make mutations`."""

from __future__ import annotations

from types import ModuleType

import pytest

from conftest import load_script


@pytest.fixture(scope="module")
def mutations() -> ModuleType:
    return load_script("mutations")


def test_every_mutation_can_be_made(mutations: ModuleType) -> None:
    assert len(mutations.MUTATIONS) > 200
    assert [problem for line in mutations.MUTATIONS if (problem := mutations.cannot_be_made(line))] == []


def test_a_mutation_that_fits_no_more_is_named(mutations: ModuleType) -> None:
    assert "stands there 0 times" in mutations.cannot_be_made(("errors.py", "no such line", "", "test_data.py"))
    assert "no such file" in mutations.cannot_be_made(("gone.py", "", "", "test_data.py"))
    assert "no such test" in mutations.cannot_be_made(("errors.py", "def contained", "", "test_data.py::test_gone"))
