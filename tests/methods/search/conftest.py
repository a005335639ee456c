"""What tests of searches share: a small task of pictures."""

import pytest

from regrow.core.tasks import Task
from regrow.data import streams


@pytest.fixture(scope="module")
def task() -> Task:
    """A hundred digits to learn, forty to test."""
    base = streams.sample_task(streams.load_digits(), 100, 40)
    return Task("digits", base.train, base.test, base.classes)
