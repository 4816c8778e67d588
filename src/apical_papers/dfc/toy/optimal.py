"""Figure 2 of deep feedback control (arXiv 2106.07887): many feedback weights are optimal, and all give the same update.

A random 5-2-2 tanh network with a linear output gets one input; J = d r_L / d v (2 x 4) over all its neurons. Condition 2
only requires the columns of Q to lie in the row space of J: `Q = J^T P` for any 2 x 2 matrix P that keeps the loop stable
(`Re eig(J Q) > 0`). Among them are J^T, the pseudoinverse J^+ and the damped ones `J^T (J J^T + gamma I)^-1`. As
`Q (J Q)^-1 = J^+` for every P, all of them give the same DFC-SSA update as the leak alpha goes to 0.

Uses only numpy, independently of the rest of the library, so that it can serve as a check on it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SIZES = (5, 2, 2)
ALPHA = 1e-8
NUDGE = 0.01


@dataclass(frozen=True)
class Network:
    """W_1 (2, 5), W_2 (2, 2), an input x (5,), and the desired change of the output delta (2,)."""

    w1: Array
    w2: Array
    x: Array
    delta: Array

    @property
    def jacobian(self) -> Array:
        """J (2, 4): Jacobian of the output in the potentials of both layers, at the feed-forward state."""
        slope = 1 - np.tanh(self.w1 @ self.x) ** 2
        return np.hstack([self.w2 * slope, np.eye(len(self.w2))])


@dataclass(frozen=True)
class Optimal:
    """Content of the figure, in the plane of the first two principal components.

    Attributes:
        cloud: random optimal Q (draws, 2).
        transpose, pseudoinverse: (2,).
        damped: Q for growing gamma (gammas, 2).
        gammas: (gammas,).
        explained: share of the variance along each of the two components (2,).
        angles: angles of every Q's DFC-SSA update to that of J^+, in degrees, cloud first, then J^T and the damped ones.
        transpose_inside, pseudoinverse_inside: whether the point lies in the convex hull of the cloud, in the plane.
        typical: median angle in degrees between two random optimal Q.
        between: angle in degrees between J^T and J^+.
    """

    cloud: Array
    transpose: Array
    pseudoinverse: Array
    damped: Array
    gammas: Array
    explained: Array
    angles: Array
    transpose_inside: bool
    pseudoinverse_inside: bool
    typical: float
    between: float


def random_network(draw: np.random.Generator) -> Network:
    """Draw Xavier-normal weights, an input uniform on (-1, 1), and a small change in a random direction."""
    n0, n1, n2 = SIZES
    w1 = draw.normal(size=(n1, n0)) * np.sqrt(2 / (n0 + n1))
    w2 = draw.normal(size=(n2, n1)) * np.sqrt(2 / (n1 + n2))
    return Network(w1, w2, draw.uniform(-1, 1, n0), NUDGE * draw.normal(size=n2))


def random_optimal(jacobian: Array, draws: int, draw: np.random.Generator) -> Array:
    """Draw `Q = J^T P` of norm 1 with Gaussian P and keep those with all `Re eig(J Q) > 0`: (draws, N, n_L)."""
    gram = jacobian @ jacobian.T
    vectors: list[Array] = []
    while len(vectors) < draws:
        p = draw.normal(size=gram.shape)
        if np.linalg.eigvals(gram @ p).real.min() > 0:
            vectors.append(normed(jacobian.T @ p))
    return np.stack(vectors)


def normed(q: NDArray[Any]) -> Array:
    """Return Q over its Frobenius norm; only the direction matters."""
    scaled: Array = q / np.linalg.norm(q)
    return scaled


def ssa_update(network: Network, q: Array, alpha: float = ALPHA) -> Array:
    """Return the flat DFC-SSA update of both weights: `[phi(v_i) - phi(v_i^ff)] r_{i-1}^T` at the controlled state.

    Args:
        network: weights, input and desired change.
        q: feedback weights (4, 2), first layer on top.
        alpha: leak, `u = (J Q + alpha I)^-1 delta`.
    """
    u = np.linalg.solve(network.jacobian @ q + alpha * np.eye(2), network.delta)
    push = q @ u
    v1 = network.w1 @ network.x
    r1 = np.tanh(v1 + push[:2])
    update: Array = np.concatenate([np.outer(r1 - np.tanh(v1), network.x).ravel(), np.outer(push[2:], r1).ravel()])
    return update


def angle(a: Array, b: Array) -> float:
    """Return the angle in degrees between two vectors; accurate near 0 too (half-angle form)."""
    a, b = a.ravel() / np.linalg.norm(a), b.ravel() / np.linalg.norm(b)
    return float(np.degrees(2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b))))


def principal_plane(points: Array) -> tuple[Array, Array]:
    """Return coordinates of points (n, d) along their first two principal components (n, 2), and explained variance (2,)."""
    centred = points - points.mean(0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    return centred @ axes[:2].T, sizes[:2] ** 2 / (sizes**2).sum()


def inside(point: Array, cloud: Array) -> bool:
    """Return whether a point of the plane lies in the convex hull of others (n, 2): not all of them are on one side."""
    offset = cloud - point
    around = np.sort(np.arctan2(offset[:, 1], offset[:, 0]))
    gaps = np.diff(np.append(around, around[0] + 2 * np.pi))
    return bool(gaps.max() < np.pi)


def optimal_feedback(draws: int = 2000, seed: int = 0) -> Optimal:
    """Return the figure's points and its check, for one random network."""
    draw = np.random.default_rng(seed)
    network = random_network(draw)
    jacobian = network.jacobian
    gram, gammas = jacobian @ jacobian.T, np.logspace(-5, 2, 100)
    cloud = random_optimal(jacobian, draws, draw)
    transpose, inverse = normed(jacobian.T), normed(np.linalg.pinv(jacobian))
    damped = [normed(jacobian.T @ np.linalg.inv(gram + float(gamma) * np.eye(2))) for gamma in gammas]
    everything: Any = np.concatenate([cloud, [transpose, inverse], damped])
    plane, explained = principal_plane(everything.reshape(len(everything), -1))
    exact = ssa_update(network, inverse)
    others = np.concatenate([cloud, [transpose], damped])
    pairs = draw.integers(draws, size=(1000, 2))
    return Optimal(
        cloud=plane[:draws],
        transpose=plane[draws],
        pseudoinverse=plane[draws + 1],
        damped=plane[draws + 2 :],
        gammas=gammas,
        explained=explained,
        angles=np.array([angle(ssa_update(network, q), exact) for q in others]),
        transpose_inside=inside(plane[draws], plane[:draws]),
        pseudoinverse_inside=inside(plane[draws + 1], plane[:draws]),
        typical=float(np.median([angle(cloud[i], cloud[j]) for i, j in pairs if i != j])),
        between=angle(transpose, inverse),
    )
