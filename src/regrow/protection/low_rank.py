"""Kronecker factors in less memory: of each the leading eigenvectors and the diagonal are kept."""

from bisect import bisect_right
from math import isqrt

import torch

from regrow.core.axes.axis import AxisTensor
from regrow.protection.factors import Factors

LEADING, REST = " leading", " rest"  # key of a factor → its scaled eigenvectors, and what they lack of its diagonal


@torch.no_grad()
def compress_factors(factors: Factors, limit: float) -> dict[str, AxisTensor]:
    """Return factors in at most ``limit`` bytes, as far as their diagonals allow; what fits stays as it is.

    A factor F, ``[n, n]``, becomes U Uᵀ + diag(d). U, ``[n, r]`` in bfloat16, has its r leading eigenvectors times the
    roots of their eigenvalues; d makes the diagonal exact. r is the same for all; small factors stay whole. Source:
    ours.

    >>> factor = AxisTensor(torch.diag(torch.tensor([1.0, 5.0, 9.0])), (3, 3))
    >>> kept = compress_factors({"w inputs": factor}, 20)
    >>> {key: tuple(one.values.shape) for key, one in kept.items()}
    {'w inputs leading': (3, 1), 'w inputs rest': (3,)}
    >>> expand_factors(kept)["w inputs"].values.diagonal().tolist()
    [1.0, 5.0, 9.0]
    """
    square = {key: isqrt(factor.values.numel()) for key, factor in factors.items() if _is_square(key, factor)}

    def sizes(rank: int) -> dict[str, int]:
        """Return the bytes of every factor that is smaller in this rank."""
        found = {key: side * (2 * min(rank, side) + factors[key].values.itemsize) for key, side in square.items()}
        return {key: size for key, size in found.items() if size < factors[key].values.nbytes}

    def total(rank: int) -> int:
        smaller = sizes(rank)
        return sum(smaller.get(key, factor.values.nbytes) for key, factor in factors.items())

    if sum(factor.values.nbytes for factor in factors.values()) <= limit:
        return dict(factors)
    rank = max(0, bisect_right(range(max(square.values(), default=0) + 1), limit, key=total) - 1)
    smaller, result = sizes(rank), dict[str, AxisTensor]()
    for key, factor in factors.items():
        result |= _compress(key, factor, min(rank, square[key])) if key in smaller else {key: factor}
    return result


def _is_square(key: str, factor: AxisTensor) -> bool:
    """Whether a tensor among factors is a matrix over inputs or outputs, ``[*n, *n]``."""
    dims, half = factor.dims, len(factor.dims) // 2
    return key.endswith((" inputs", " outputs")) and len(dims) % 2 == 0 and dims[:half] == dims[half:]


def _compress(key: str, factor: AxisTensor, rank: int) -> dict[str, AxisTensor]:
    half = len(factor.dims) // 2
    dims, shape = factor.dims[:half], factor.values.shape[:half]
    matrix = factor.values.reshape(shape.numel(), -1).double()  # float32 fails where many entries are 0
    values, vectors = torch.linalg.eigh(matrix)
    leading = (vectors * values.clamp_min(0).sqrt())[:, len(values) - rank :]
    share = (matrix.diagonal() / leading.square().sum(1)).sqrt().clamp_max(1)  # below 1 by rounding, as of unused units
    leading = (leading * share.nan_to_num(0)[:, None]).bfloat16()
    rest = (matrix.diagonal() - leading.to(matrix).square().sum(1)).clamp_min(0)
    return {
        key + LEADING: AxisTensor(leading.reshape(*shape, rank).contiguous(), (*dims, rank)),  # as after a checkpoint
        key + REST: AxisTensor(rest.reshape(shape).to(factor.values), dims),
    }


@torch.no_grad()
def expand_factors(factors: Factors) -> dict[str, AxisTensor]:
    """Return factors with those that were compressed as matrices again, U Uᵀ + diag(d); others are not copied."""
    result = dict[str, AxisTensor]()
    for key, factor in factors.items():
        if key.endswith(REST):
            name, diagonal = key.removesuffix(REST), factor.values.flatten()
            rows = factors[name + LEADING].values.reshape(len(diagonal), -1).to(diagonal)
            matrix = rows @ rows.T
            matrix.diagonal().add_(diagonal)
            result[name] = AxisTensor(matrix.reshape(factor.values.shape * 2), factor.dims * 2)
        elif not key.endswith(LEADING):
            result[key] = factor
    return result
