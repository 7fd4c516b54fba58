"""The independent side of the exact tests: plain Python over dictionaries of prefixes.

Imports nothing from qlearn. A prefix is a tuple (prompt, token, token, ...); `edges` maps a prefix
and an action to a number; a response is a prefix that ends in EOS or has `horizon` tokens.
"""

import itertools
import math


def responses(n_actions: int, horizon: int, eos: int, prompt: int = 0) -> list[tuple[int, ...]]:
    """Every complete response, by filtering the full product of tokens."""
    complete = []
    for length in range(1, horizon + 1):
        for tokens in itertools.product(range(n_actions), repeat=length):
            ended = tokens[-1] == eos
            if eos not in tokens[:-1] and (ended or length == horizon):
                complete.append((prompt, *tokens))
    return complete


def steps(response: tuple[int, ...], start: int = 1) -> list[tuple[tuple[int, ...], int]]:
    """The (state, action) pairs of a response from token number `start` on."""
    return [(response[:i], response[i]) for i in range(start, len(response))]


def total(edges: dict, response: tuple[int, ...], start: int = 1) -> float:
    return math.fsum(edges[step] for step in steps(response, start))


def log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def soft_value(prefix, complete, reward, log_ref, beta) -> float:
    """β log E_ref exp(R/β) over the responses that begin with `prefix`."""
    n = len(prefix)
    terms = [total(log_ref, y, n) + total(reward, y, n) / beta for y in complete if y[:n] == prefix]
    return beta * log_sum_exp(terms)


def values(complete, reward, log_ref, beta) -> dict:
    """The soft value of every unfinished prefix, by enumeration of what can follow."""
    found = {}
    for y in complete:
        for n in range(1, len(y)):
            ahead = total(log_ref, y, n) + total(reward, y, n) / beta
            found.setdefault(y[:n], []).append(ahead)
    return {prefix: beta * log_sum_exp(terms) for prefix, terms in found.items()}


def advantages(complete, reward, log_ref, beta) -> dict:
    """r + V(s') − V(s) on every edge, V by enumeration and 0 at the ends."""
    v = values(complete, reward, log_ref, beta)
    return {(s, a): r + v.get((*s, a), 0.0) - v[s] for (s, a), r in reward.items()}


def backup(child, reward, log_ref, beta) -> tuple[list, list, list]:
    """(V, Q̃, log π*) level by level from nested lists: child −1 ends a response, −2 is no action.

    V(s) = β log Σ_a π_ref exp(Q̃/β), one state after the other, from the deepest level up.
    """
    values, qs, logps, below = [], [], [], []
    for rows, paid, refs in zip(child[::-1], reward[::-1], log_ref[::-1], strict=True):
        level = ([], [], [])
        for row, r, ref in zip(rows, paid, refs, strict=True):
            q = [x + (below[c] if c >= 0 else 0.0) for x, c in zip(r, row, strict=True)]
            there = [k for k, c in enumerate(row) if c != -2]
            v = beta * log_sum_exp([ref[k] + q[k] / beta for k in there])
            logp = [ref[k] + (x - v) / beta if k in there else -math.inf for k, x in enumerate(q)]
            for part, x in zip(level, (v, q, logp), strict=True):
                part.append(x)
        below = level[0]
        for whole, part in zip((values, qs, logps), level, strict=True):
            whole.insert(0, part)
    return values, qs, logps


def gibbs(returns: list[float], log_ref: list[float], beta: float) -> list[float]:
    """log π_ref + R/β − log Z of every response."""
    tilted = [p + r / beta for p, r in zip(log_ref, returns, strict=True)]
    log_z = log_sum_exp(tilted)
    return [x - log_z for x in tilted]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
