"""The algebra of dimensions: what equality refines, and what it freezes."""

from hypothesis import given
from hypothesis import strategies as st

from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr, Leaf


def entries(expr: Expr) -> list[tuple[tuple[int, int], ...]]:
    """Which leaves' indices each entry of a dimension stands for, in row-major order."""
    expr = d.resolve(expr)
    if isinstance(expr, Leaf):
        return [((expr.number, i),) for i in range(expr.size)]
    if isinstance(expr, d.Plus):
        return [entry for part in expr.parts for entry in entries(part)]
    found: list[tuple[tuple[int, int], ...]] = [()]
    for part in expr.parts:
        found = [a + b for a in found for b in entries(part)]
    return found


def free(expr: Expr) -> bool:
    """Whether nothing of a dimension is frozen."""
    return not any(leaf.frozen for leaf in d.leaves(expr))


def test_a_leaf_becomes_the_product_it_is_reshaped_to() -> None:
    whole = Leaf(12)
    heads, width = d.split_product(whole, [3, 4], "reshape")
    d.unify(heads, Leaf(3), "tie")
    assert entries(whole) == entries(d.times(heads, width)) and free(whole)


def test_products_align_at_common_divisors() -> None:
    a, b = d.times(Leaf(2), Leaf(6)), d.times(Leaf(4), Leaf(3))
    d.unify(a, b, "align")
    assert entries(a) == entries(b) and free(a)
    assert [d.size(leaf) for leaf in d.leaves(a)] == [2, 2, 3]


def test_products_without_a_common_refinement_freeze() -> None:
    a, b = d.times(Leaf(4), Leaf(6)), d.times(Leaf(6), Leaf(4))
    d.unify(a, b, "a reshape mixes")
    assert not free(a) and not free(b)
    assert {leaf.frozen for leaf in d.leaves(a)} == {"a reshape mixes"}


def test_sums_align_at_their_boundaries() -> None:
    a, b = d.plus(Leaf(3), Leaf(5)), d.plus(Leaf(5), Leaf(3))
    d.unify(a, b, "align")
    assert entries(a) == entries(b) and free(a)
    assert [d.size(leaf) for leaf in d.leaves(a)] == [3, 2, 3]


def test_a_flattened_concatenation_distributes() -> None:
    x, y, space = Leaf(3), Leaf(2), Leaf(4, frozen="space")
    flat = d.plus(Leaf(12), Leaf(8))
    d.unify(d.times(d.plus(x, y), space), flat, "flatten")
    assert entries(flat) == entries(d.times(d.plus(x, y), space))
    assert not x.frozen and not y.frozen


def test_a_shuffle_of_two_halves_ties_them() -> None:
    x, y = Leaf(5), Leaf(5)
    two, channel = d.split_product(d.plus(x, y), [2, 5], "shuffle")
    assert d.identical(x, y) and d.identical(x, channel) and not d.is_free(two)


def test_a_dimension_cannot_contain_itself() -> None:
    leaf = Leaf(6)
    d.unify(leaf, d.plus(d.split_at(leaf, 2, "cut")[1], Leaf(2)), "shift")
    assert not free(leaf)


def test_a_cut_inside_a_unit_freezes() -> None:
    product = d.times(Leaf(3), Leaf(4))
    first, rest = d.split_at(product, 6, "inside a unit")
    assert not free(product) and (d.size(first), d.size(rest)) == (6, 6)


def test_freezing_one_name_freezes_the_other() -> None:
    a, b = Leaf(4), Leaf(4)
    d.unify(a, b, "tie")
    d.freeze(a, "an output")
    assert {leaf.frozen for leaf in d.leaves(b)} == {"an output"}


def factors() -> st.SearchStrategy[list[int]]:
    """The sizes of a product, outermost first."""
    return st.lists(st.integers(2, 4), min_size=1, max_size=4)


@given(factors(), factors(), st.randoms(use_true_random=False))
def test_what_stays_free_of_equal_products_stands_for_the_same_entries(a: list[int], b: list[int], random) -> None:
    """Once two dimensions are equal, entry i of one is entry i of the other in everything that can still change."""
    sizes = a + b
    left, right = d.times(*map(Leaf, sizes)), d.times(*map(Leaf, random.sample(sizes, len(sizes))))
    d.unify(left, right, "tie")
    rigid = {leaf.number for side in (left, right) for leaf in d.leaves(side) if leaf.frozen}
    kept = [[tuple(i for i in entry if i[0] not in rigid) for entry in entries(side)] for side in (left, right)]
    assert d.size(left) == d.size(right) and kept[0] == kept[1]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_equal_concatenations_stand_for_the_same_entries(sizes: list[int], random) -> None:
    left, right = d.plus(*map(Leaf, sizes)), d.plus(*map(Leaf, random.sample(sizes, len(sizes))))
    d.unify(left, right, "tie")
    assert entries(left) == entries(right) and free(left)
