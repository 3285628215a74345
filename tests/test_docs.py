"""The examples in the docstrings of every module do what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "grading", "benchmarks", "pages", "recipes", "bench")
PATHS = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
MODULES = sorted(".".join(path.with_suffix("").parts) for path in PATHS if path.stem != "__init__")


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_hold(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0
