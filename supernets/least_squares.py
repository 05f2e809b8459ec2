"""What least squares cannot take over: neurons and heads by the error that their removal leaves (section 2.7).

A linear layer reads hidden units, y = W a, and some of them go. The rest keep the output best with weights W' that
minimise the mean over tokens of |W a - W' a|^2, a less its mean: a refitted bias takes the mean over. With the
covariance C of a that is tr((W - W') C (W - W')^T), and no activations are needed.

C is given a ridge, `ridge` > 0 times its mean variance on the diagonal, as dead and duplicate units make it singular;
so every error here is the squared error plus that much times |W - W'|^2. Where C comes from products in float32 and is
negative in some direction by more than that, the ridge is raised tenfold until it is positive. An error is in squared
units of the output, mean over tokens, summed over outputs. All is in float64 and on the inputs' device.
"""

from itertools import combinations

import torch
from torch import Tensor

BLOCK = 64  # removals between two updates of the large matrices
EXACT_HEADS = 8  # up to so many heads every subset is looked at
WHOLE_GRAM = 256  # columns: half of so small a product costs as much as all of it
TINY = 1e-30  # a variance in the place of none
TIE = 1e-9  # costs that differ by less, relatively, are equal


def gram_matrix(x: Tensor) -> Tensor:
    """x^T x (..., n, n) of x (..., rows, n): its lower left block is the upper right one's, and is not computed."""
    n = x.shape[-1]
    if n <= WHOLE_GRAM:
        return x.mT @ x
    a, b = x[..., : n // 2], x[..., n // 2 :]
    upper = a.mT @ b
    return torch.cat([torch.cat([gram_matrix(a), upper], -1), torch.cat([upper.mT, gram_matrix(b)], -1)], -2)


@torch.no_grad()
def neuron_order(gram: Tensor, weight: Tensor, ridge: float = 1e-6) -> tuple[list[int], Tensor]:
    """Backward elimination of single units by the Optimal Brain Surgeon (section 2.7).

    gram: (M, M), covariance of the units. weight: (E, M), reads them. Removes the unit j whose removal, after a refit
    of the others, costs least, |w_j|^2 / A_jj with A the inverse covariance of the units that are left and w their
    refitted weights; of equal ones the last.

    Returns the order, most important first, and errors (M + 1,): errors[w] is the error with the first w units of the
    order, refitted. errors[M] is 0, errors[0] the whole output's variance.
    """
    size = len(gram)
    if gram.diagonal().sum() <= 0:  # every unit is dead
        return list(range(size)), gram.new_zeros(size + 1, dtype=torch.float64)
    inverse = _inverse(gram, ridge).flip(0, 1)  # falling, so that the first of equal costs is the last unit
    flipped = weight.double().flip(1)
    product = flipped.T @ flipped
    left = torch.arange(size - 1, -1, -1)
    removed: list[int] = []
    costs: list[float] = []
    while len(left):
        places, block_costs, u, z = _eliminate(inverse, product, min(BLOCK, len(left)))
        removed += left[places].tolist()
        costs += block_costs
        keep = torch.ones(len(left), dtype=torch.bool)
        keep[places] = False
        left, keep = left[keep], keep.to(gram.device)
        u, z = u[:, keep], z[:, keep]
        inverse = inverse[keep][:, keep].addmm_(u.T, u, alpha=-1)
        product = product[keep][:, keep].addmm_(torch.cat([u, z]).T, torch.cat([z, u]), alpha=-1)
    return removed[::-1], _by_width(gram.new_tensor(costs, dtype=torch.float64).cumsum(0))


def _eliminate(inverse: Tensor, product: Tensor, steps: int) -> tuple[list[int], list[float], Tensor, Tensor]:
    """Remove `steps` units: their places, what each costs, and the updates u and z, each (steps, units).

    inverse: A, the inverse covariance of the units; product: P = W^T W of their weights. Without unit p they are
    A - u u^T and P - u z^T - z u^T, u = A_p / sqrt(A_pp), z = (P_p - c P_pp / 2) / sqrt(A_pp), c = A_p / A_pp, for
    W - w_p c^T are the refitted weights. Both matrices stay as they are: only their diagonals and the rows of removed
    units are brought up to date here.
    """
    variances, squares = inverse.diagonal().clone(), product.diagonal().clone()
    u, z = inverse.new_empty(steps, len(inverse)), inverse.new_empty(steps, len(inverse))
    places: list[int] = []
    costs: list[float] = []
    for step in range(steps):
        cost = (squares / variances).clamp_(min=0)
        p = _first_least(cost)
        places.append(p)
        costs.append(float(cost[p]))
        u_p, z_p = u[:step, p], z[:step, p]
        inverse_p = inverse[p] - u_p @ u[:step]
        product_p = product[p] - z_p @ u[:step] - u_p @ z[:step]
        root = inverse_p[p].sqrt()
        u[step] = inverse_p / root
        z[step] = (product_p - inverse_p * (product_p[p] / inverse_p[p] / 2)) / root
        variances -= u[step].square()
        squares -= 2 * u[step] * z[step]
        variances[p], squares[p] = 1, torch.inf  # never again
    return places, costs, u, z


@torch.no_grad()
def head_order(gram: Tensor, weight: Tensor, num_heads: int, ridge: float = 1e-6) -> tuple[list[int], Tensor]:
    """Order of whole heads by the exact error of the subset that is kept (section 2.7).

    gram: (H * V, H * V), covariance of the concatenated heads' outputs. weight: (E, H * V), the projection. Up to
    EXACT_HEADS heads: the order with the least sum of errors over all numbers of kept heads. More: backward
    elimination, each time of the head that leaves the least error. Of equal heads the last goes first.

    Returns the order, most important first, and errors (H + 1,): errors[h] is the error with the first h heads of the
    order, refitted. errors[H] is 0, errors[0] the whole output's variance.
    """
    if gram.diagonal().sum() <= 0:  # every unit is dead
        return list(range(num_heads)), gram.new_zeros(num_heads + 1, dtype=torch.float64)
    inverse, weight = _inverse(gram, ridge), weight.double()
    chain = _best_chain if num_heads <= EXACT_HEADS else _greedy_chain
    removed, errors = chain(inverse, weight, num_heads)
    return removed[::-1], _by_width(gram.new_tensor(errors, dtype=torch.float64))


@torch.no_grad()
def prefix_lost(gram: Tensor, weight: Tensor, group: int = 1, ridge: float = 1e-6) -> Tensor:
    """The error with the first units alone, refitted, in the order in which they stand: (..., M // group + 1).

    gram: (..., M, M), covariance of the units. weight: (..., E, M), reads them. group: so many units go together.
    With C = L L^T, L lower triangular, what the first units leave of the others' covariance is L' L'^T, L' the lower
    right corner of L, so that the errors are the sums from there on of the columns of W L, squared.
    """
    columns = (weight.double() @ _root(gram, ridge)).square().sum(-2)
    by_group = columns.unflatten(-1, (-1, group)).sum(-1)
    tails = by_group.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([tails, torch.zeros_like(tails[..., :1])], -1)


def _best_chain(inverse: Tensor, weight: Tensor, num_heads: int) -> tuple[list[int], list[float]]:
    """Heads in the order of their removal and the error after each, the sum of errors being the least of all chains.

    inverse: (H * V, H * V), weight: (E, H * V). Dynamic programming over the subsets R of removed heads, which leave
    the error tr(W_R (A_RR)^-1 W_R^T), A the inverse covariance of all heads.
    """
    units = torch.arange(len(inverse), device=inverse.device).view(num_heads, -1)
    errors: dict[tuple[int, ...], float] = {}
    total: dict[tuple[int, ...], float] = {(): 0.0}
    last: dict[tuple[int, ...], int] = {}
    for size in range(1, num_heads + 1):
        for subset in combinations(range(num_heads), size):
            index = units[list(subset)].flatten()
            root = torch.linalg.cholesky(inverse[index][:, index])
            errors[subset] = float(_costs(root, weight[:, index]))
            before = torch.tensor([total[_without(subset, head)] for head in subset], dtype=torch.float64)
            choice = _first_least(before)
            last[subset] = subset[choice]
            total[subset] = errors[subset] + float(before[choice])
    subset = tuple(range(num_heads))
    removed: list[int] = []
    left: list[float] = []
    while subset:
        removed.append(last[subset])
        left.append(errors[subset])
        subset = _without(subset, last[subset])
    return removed[::-1], left[::-1]


def _greedy_chain(inverse: Tensor, weight: Tensor, num_heads: int) -> tuple[list[int], list[float]]:
    """Heads in the order of their removal and the error after each, every removal being the cheapest.

    inverse: (H * V, H * V), weight: (E, H * V). Optimal Brain Surgeon with blocks of V units: A - A_h (A_hh)^-1 A_h^T
    and W - W_h (A_hh)^-1 A_h^T without head h.
    """
    a = inverse.view(num_heads, -1, num_heads, len(inverse) // num_heads).flip(0, 2)
    w = weight.unflatten(1, (num_heads, -1)).flip(1)  # falling, so that the first of equal costs is the last head
    left = list(range(num_heads))[::-1]
    removed: list[int] = []
    errors: list[float] = []
    while left:
        roots = torch.linalg.cholesky(a.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        costs = _costs(roots, w.transpose(0, 1))
        p = _first_least(costs)
        removed.append(left.pop(p))
        errors.append(float(costs[p]) + (errors[-1] if errors else 0.0))
        keep = [place for place in range(len(costs)) if place != p]
        u = torch.linalg.solve_triangular(roots[p], a[p][:, keep].flatten(1), upper=False)
        w_p = torch.linalg.solve_triangular(roots[p], w[:, p].T, upper=False)
        a, w = a[keep][:, :, keep], w[:, keep]
        a, w = a - (u.T @ u).view(a.shape), w - (w_p.T @ u).view(w.shape)
    return removed, errors


def _costs(roots: Tensor, weight: Tensor) -> Tensor:
    """tr(W (L L^T)^-1 W^T) for roots L (..., U, U) and weights W (..., E, U)."""
    halves: Tensor = torch.linalg.solve_triangular(roots, weight.mT, upper=False)
    return halves.square().sum((-2, -1))


def _without(subset: tuple[int, ...], head: int) -> tuple[int, ...]:
    return tuple(other for other in subset if other != head)


def _first_least(costs: Tensor) -> int:
    """The first place whose cost, not negative, equals the least."""
    return int((costs <= costs.min() * (1 + TIE)).int().argmax())


def _inverse(gram: Tensor, ridge: float) -> Tensor:
    """Inverse of a covariance with a ridge, in float64."""
    return torch.cholesky_inverse(_root(gram, ridge))


def _root(gram: Tensor, ridge: float) -> Tensor:
    """L (..., M, M), lower triangular, of L L^T = a covariance with `ridge` times its mean variance on the diagonal.

    In float64; nothing where no unit varies. LinAlgError where even its mean variance does not make it positive.
    """
    covariance = gram.double().clone()
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    mean = variances.mean(-1, keepdim=True)
    variances += torch.where(mean > 0, ridge * mean, TINY)
    root, failed = torch.linalg.cholesky_ex(covariance, check_errors=ridge >= 1)
    return _root(gram, 10 * ridge) if failed.any() else root


def _by_width(errors: Tensor) -> Tensor:
    """Errors after each removal -> by number of kept units, from none to all."""
    return torch.cat([errors.new_zeros(1), errors]).flip(0)
