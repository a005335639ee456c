"""The conformance suite: laws that every method must obey, for methods of this package and of others.

``check_method("ewc")`` runs every law of the method's kind and raises an ``AssertionError`` that names the law that was
broken. In a test suite of your own, parametrize over :data:`LAWS` and call
each law with a :class:`Subject`: the method and its settings.
"""

from collections.abc import Mapping

from regrow.methods import MethodEntry, MethodKind, find_method
from regrow.testing import continual, pruning, search
from regrow.testing.continual import Law, Subject

__all__ = ["LAWS", "Subject", "check_method"]

LAWS: Mapping[MethodKind, Mapping[str, Law]] = {
    MethodKind.PRUNING: pruning.LAWS,
    MethodKind.CONTINUAL: continual.LAWS,
    MethodKind.SEARCH: search.LAWS,
    MethodKind.RECOVERY: pruning.RECOVERY_LAWS,
}


def check_method(method: MethodEntry | str, settings: Mapping[str, object] | None = None) -> tuple[str, ...]:
    """Run every law of a method's kind on the method, and return the laws' names.

    Args:
        method: The method, or its name: of this package, of an entry point, or ``pkg.mod:NAME``.
        settings: Its settings, where they differ from the defaults.

    Returns:
        The names of the laws that were run.

    Raises:
        AssertionError: If the method breaks one; names the law.
        ValueError: If there is no such method.
    """
    entry = method if isinstance(method, MethodEntry) else find_method(None, method)
    for name, law in LAWS[entry.kind].items():
        try:
            law(Subject(entry, settings or {}))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return tuple(LAWS[entry.kind])
