"""Fixtures all test files share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the public sets (Data1, DRIVE, CHASE_DB1, LES-AV), named by RETINA_SEG_DATA."""
    folder = os.environ.get("RETINA_SEG_DATA")
    if not folder:
        pytest.skip("RETINA_SEG_DATA names no folder with the public sets")
    if not Path(folder).is_dir():
        pytest.fail(f"RETINA_SEG_DATA={folder} is no folder")
    return Path(folder)
