"""What the runtime's tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def synthetic():
    """The module `synthetic_bundle`: a bundle with known boxes and masks."""
    from tests.runtime import synthetic_bundle

    return synthetic_bundle
