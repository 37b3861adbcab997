"""Which combinations every run of the tests has, and which CI alone."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def thorough_but(cases: Mapping[str, Any], always: Iterable[str]) -> list:
    """Cases by their ids, as parameters of a test: all are `thorough` but those named."""
    always = set(always)
    assert always <= set(cases), always - set(cases)
    return [
        pytest.param(case, id=name, marks=() if name in always else pytest.mark.thorough)
        for name, case in cases.items()
    ]
