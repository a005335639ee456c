"""Every method of the table obeys every law of its kind; the table lists every method."""

import pytest

from methods.cases import CASES, Case
from regrow.methods import TABLES, find_method
from regrow.testing import LAWS, Subject


@pytest.mark.parametrize(
    ("case", "law"),
    [pytest.param(case, law, id=f"{case.title}: {law}") for case in CASES for law in LAWS[case.kind]],
)
def test_a_method_obeys_a_law(case: Case, law: str) -> None:
    subject = Subject(find_method(case.kind, case.name), case.settings)
    if law in case.exempt:
        with pytest.raises(AssertionError):
            LAWS[case.kind][law](subject)
    else:
        LAWS[case.kind][law](subject)


def test_every_method_has_a_case() -> None:
    listed = {(case.kind, case.name) for case in CASES}
    assert {(kind, name) for kind in LAWS for name in TABLES[kind]} <= listed
    assert not [law for case in CASES for law in case.exempt if law not in LAWS[case.kind]]
