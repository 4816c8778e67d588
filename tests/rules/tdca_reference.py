"""Top-down credit assignment, slower and less complicated: its equations, one example at a time, in NumPy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def softmax(v: Array) -> Array:
    shifted = np.exp(v - v.max())
    return shifted / shifted.sum()


def kernel(units: int, sites: int) -> Array:
    """M[i, k] = exp(-(u_i - s_k)^2 / (2 tau^2)), rows normalised, tau = 1/(2K)."""
    m = np.zeros((units, sites))
    for i in range(units):
        for k in range(sites):
            m[i, k] = np.exp(-(((i + 0.5) / units - (k + 0.5) / sites) ** 2) / (2 * (1 / (2 * sites)) ** 2))
        m[i] /= m[i].sum()
    return m


def emitted(teacher: list[tuple[Array, Any]], p: Array, y: Array) -> Array:
    """z = V3 tanh(V2 tanh(V1 [p ; y] + b1) + b2) + b3."""
    (w1, b1), (w2, b2), (w3, b3) = teacher
    return w3 @ np.tanh(w2 @ np.tanh(w1 @ np.concatenate([p, y]) + b1) + b2) + b3


def credits(
    teacher: list[tuple[Array, Any]], p: Array, y: Array, widths: list[int], sites: int | None, relative: bool = False
) -> list[Array]:
    """One credit vector per hidden layer, and one for the output; the last layers of a teacher made for more of them."""
    z = emitted(teacher, p, y)
    if relative:
        z = z - emitted(teacher, y, y)
    out = [z[len(z) - len(y) :]]
    end = len(z) - len(y)
    for width in reversed(widths):  # counted from the output
        size = width if sites is None else sites
        part = z[end - size : end]
        credit = part if sites is None else kernel(width, sites) @ part
        out.insert(0, credit / np.sqrt(width) if relative else credit)
        end -= size
    return out


def pseudo_gradients(
    layers: list[tuple[Array, Array]],
    teacher: list[tuple[Array, Any]],
    x: Array,
    labels: Array,
    sites: int | None = None,
    relative: bool = False,
    place: str = "logits",
) -> list[tuple[Array, Array]]:
    """(g_W, g_v) of each layer of a tanh perceptron with a softmax output, averaged over the batch."""
    total = [(np.zeros_like(w), np.zeros_like(v)) for w, v in layers]
    for sample, label in zip(x, labels, strict=True):
        activities = [sample]
        for w, v in layers[:-1]:
            activities.append(np.tanh(w @ activities[-1] + v))
        w, v = layers[-1]
        p = softmax(w @ activities[-1] + v)
        y = np.eye(len(p))[label]
        *hidden, last = credits(teacher, p, y, [len(v) for _, v in layers[:-1]], sites, relative)
        errors = [c * (1 - a**2) for c, a in zip(hidden, activities[1:], strict=True)]
        jacobian = np.diag(p) - np.outer(p, p)  # of the softmax, symmetric
        errors.append(jacobian @ last if place == "probabilities" else last)
        for (g_w, g_v), e, a in zip(total, errors, activities, strict=True):
            g_w += np.outer(e, a) / len(x)
            g_v += e / len(x)
    return total


def lifetime(
    layers: list[tuple[Array, Array]],
    teacher: list[tuple[Array, Array]],
    x: Array,
    labels: Array,
    *,
    steps: int,
    lr: float,
    clip: float,
    sites: int | None = None,
) -> list[tuple[Array, Array]]:
    """Full-batch Adam on clipped pseudo-gradients."""
    weights = [array.copy() for layer in layers for array in layer]
    first, second = [np.zeros_like(w) for w in weights], [np.zeros_like(w) for w in weights]
    for t in range(1, steps + 1):
        pairs = list(zip(weights[::2], weights[1::2], strict=True))
        gradient = [g for pair in pseudo_gradients(pairs, teacher, x, labels, sites) for g in pair]
        norm = np.sqrt(sum((g**2).sum() for g in gradient))
        gradient = [g * min(1.0, clip / (norm + 1e-6)) for g in gradient]
        for i, g in enumerate(gradient):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            weights[i] = weights[i] - lr * (first[i] / (1 - 0.9**t)) / (np.sqrt(second[i] / (1 - 0.999**t)) + 1e-8)
    return list(zip(weights[::2], weights[1::2], strict=True))


def of_a_class(layers: list[tuple[Array, Any]], own: float, target: float, right: float) -> Array:
    """T([p_k ; y_k ; p.y]) of a perceptron with a tanh layer, or of a linear one."""
    s = np.array([own, target, right])
    for w, b in layers[:-1]:
        s = np.tanh(w @ s + b)
    return layers[-1][0] @ s


def by_class(
    teacher: list[tuple[Array, Any]], feedback: list[Array], p: Array, y: Array, layers: int, error: bool = False
) -> list[Array]:
    """c_l = D_l z[:, l] of each hidden layer, D_l (units, classes), and c_L,k = z_k[0], or p_k - y_k."""
    right = float(p @ y)
    z = [of_a_class(teacher, p[k], y[k], right) - of_a_class(teacher, y[k], y[k], right) for k in range(len(p))]
    out = [p - y if error else np.array([z_k[0] for z_k in z])]
    for depth, d in enumerate(reversed(feedback), start=1):  # counted from the output
        emission = min(depth, layers) - error
        out.insert(0, sum(d[:, k] * z[k][emission] for k in range(len(p))))
    return out


def gradients_by_class(
    network: list[tuple[Array, Array]], x: Array, labels: Array, **given: Any
) -> list[tuple[Array, Array]]:
    """(g_W, g_v) of each layer of a tanh perceptron with a softmax output, averaged over the batch."""
    total = [(np.zeros_like(w), np.zeros_like(v)) for w, v in network]
    for sample, label in zip(x, labels, strict=True):
        activities = [sample]
        for w, v in network[:-1]:
            activities.append(np.tanh(w @ activities[-1] + v))
        w, v = network[-1]
        p = softmax(w @ activities[-1] + v)
        *hidden, last = by_class(p=p, y=np.eye(len(p))[label], **given)
        errors = [*(c * (1 - a**2) for c, a in zip(hidden, activities[1:], strict=True)), last]
        for (g_w, g_v), e, a in zip(total, errors, activities, strict=True):
            g_w += np.outer(e, a) / len(x)
            g_v += e / len(x)
    return total
