"""LLaCA's update, transcribed from the released code's formula and the paper's figure: scalar by scalar.

No tensor operations are shared with `retain.methods.llaca`: plain Python numbers over flat lists.
"""

from __future__ import annotations


def l1(xs: list[float]) -> float:
    return sum(abs(x) for x in xs)


def official_alpha(
    p: list[float], E: list[float], g: list[float], g_prev: list[float], kappa: float = 2.0, size: float = 1.0
) -> float:
    """kappa (1 + |g|) / (|p - E| |g - g_prev|); `size` multiplies every norm."""
    a = size * l1([x - y for x, y in zip(p, E, strict=True)])
    b = size * l1(g)
    c = size * l1([x - y for x, y in zip(g, g_prev, strict=True)])
    try:
        return kappa * (1 + b) / (a * c)
    except ZeroDivisionError:
        return float("inf")


def official_step(
    p: list[float],
    E: list[float],
    g: list[float],
    g_prev: list[float],
    kappa: float = 2.0,
    fallback: float = 0.01,
    size: float = 1.0,
) -> list[float]:
    """alpha = kappa (1 + |g|) / (|p - E| |g - g_prev|); else fallback; E = (1 - alpha) E + alpha p."""
    alpha = official_alpha(p, E, g, g_prev, kappa, size)
    if not 0 < alpha < 1:
        alpha = fallback
    return [(1 - alpha) * y + alpha * x for x, y in zip(p, E, strict=True)]


def paper_step(
    p: list[float], E: list[float], g: list[float], g_prev: list[float], p_prev: list[float]
) -> list[float]:
    """beta = (1 + |g|) |p - p_prev| / (|p - E| |g - g_prev|); else 0.99; E = beta E + (1 - beta) p."""
    a = l1([x - y for x, y in zip(p, E, strict=True)])
    c = l1([x - y for x, y in zip(g, g_prev, strict=True)])
    move = l1([x - y for x, y in zip(p, p_prev, strict=True)])
    try:
        beta = (1 + l1(g)) * move / (a * c)
    except ZeroDivisionError:
        beta = float("inf")
    if not 0 < beta < 1:
        beta = 0.99
    return [beta * y + (1 - beta) * x for x, y in zip(p, E, strict=True)]


def bounded_beta(
    p: list[float], E: list[float], g: list[float], g_prev: list[float], p_prev: list[float]
) -> float:
    """Our own: beta = (g.d + d.d) / (d.Hd + d.d), d.Hd = d.d (dg.dp) / (dp.dp); nan: undefined."""
    d = [x - y for x, y in zip(p, E, strict=True)]
    dg = [x - y for x, y in zip(g, g_prev, strict=True)]
    dp = [x - y for x, y in zip(p, p_prev, strict=True)]

    def dot(xs: list[float], ys: list[float]) -> float:
        return sum(x * y for x, y in zip(xs, ys, strict=True))

    if dot(dp, dp) == 0:
        return float("nan")
    bottom = dot(d, d) * dot(dg, dp) / dot(dp, dp) + dot(d, d)
    return (dot(g, d) + dot(d, d)) / bottom if bottom > 0 else float("nan")


def official_run(weights: list[list[float]], grads: list[list[float]]) -> list[float]:
    """A task: weights after each step, and the gradient each step used. E is made after the first step."""
    E = list(weights[0])
    for t in range(1, len(weights)):
        E = official_step(weights[t], E, grads[t], grads[t - 1])
    return E


def paper_run(weights: list[list[float]], grads: list[list[float]]) -> list[float]:
    """A task: `weights[t]` with ITS gradient `grads[t]`, one more weight than gradients."""
    E = list(weights[0])
    for t in range(1, len(grads)):
        E = paper_step(weights[t], E, grads[t], grads[t - 1], weights[t - 1])
    return [
        0.99 * y + 0.01 * x for x, y in zip(weights[-1], E, strict=True)
    ]  # no gradient there: the fallback


RELEASED = 128 * 4096  # entries of most LoRA tensors of the released runs


def reach(
    tensors: list[tuple[list[list[float]], list[list[float]]]], starts: list[list[float]], kappa: float = 2.0
) -> float:
    """R over tensors of (weights after each step, gradients): the way asked for over the way of the weights.

    The way asked for in a step is kappa (1 + |g|) / |g - g_prev|; updates begin with the second step, and one
    whose gradient did not change asks for no number.
    """
    asked = way = 0.0
    for (weights, grads), start in zip(tensors, starts, strict=True):
        for t in range(1, len(grads)):
            change = l1([x - y for x, y in zip(grads[t], grads[t - 1], strict=True)])
            asked += kappa * (1 + l1(grads[t])) / change if change else 0.0
        way += l1([x - y for x, y in zip(weights[-1], start, strict=True)])
    return asked / way
