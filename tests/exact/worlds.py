"""Random problems, held both as level tables (for qlearn) and as dictionaries (for the oracle)."""

import os

import torch

from qlearn.exact.tree import Tree

from . import oracle

BETAS = (0.05, 0.1, 0.5, 1.0, 5.0)
SEEDS = range(int(os.environ.get("QLEARN_SEEDS", 50)))  # fewer only for `make mutants`
N_ACTIONS, HORIZON, EOS = 4, 4, 0


def random_field(tree, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randn(s, generator=generator, dtype=torch.float64) for s in tree.shapes)
    return tuple(scale * x for x in draws)


def random_policy(tree, seed):
    return tuple(x.log_softmax(-1) for x in random_field(tree, 7_000 + seed))


def problem(seed, n_prompts=1):
    """(tree, reward, log_ref) with three tokens and EOS, four tokens deep."""
    tree = Tree.full(N_ACTIONS, HORIZON, eos=EOS, n_prompts=n_prompts)
    return tree, random_field(tree, seed), random_policy(tree, seed)


def small_problem(seed, n_prompts=1, horizon=3):
    """(tree, reward, log_ref) with two tokens and EOS, three tokens deep: 21 edges."""
    tree = Tree.full(3, horizon, eos=EOS, n_prompts=n_prompts)
    return tree, random_field(tree, seed), random_policy(tree, seed)


def random_states(tree, seed):
    """A state field of normal numbers."""
    generator = torch.Generator().manual_seed(50_000 + seed)
    return tuple(torch.randn(n, generator=generator, dtype=torch.float64) for n, _ in tree.shapes)


def flat(field):
    """All numbers of an edge field in one row, in the order of `Tree.split`."""
    return torch.cat([x.flatten() for x in field])


def by_oracle(tree, reward, log_ref, beta):
    """(V, Q̃, log π*) of `oracle.backup` as level tables: a solution that owes qlearn nothing."""
    tables = ([x.tolist() for x in field] for field in (tree.child, reward, log_ref))
    solved = oracle.backup(*tables, beta)
    return tuple(tuple(torch.tensor(x, dtype=torch.float64) for x in field) for field in solved)


def furthest(one, other):
    """The largest difference between two fields; NaN where either is, which `max` can overlook."""
    return torch.cat([(x - y).flatten() for x, y in zip(one, other, strict=True)]).abs().max()


def as_dict(tree, field):
    """The same edge field as {(prefix, action): number}."""
    table = {}
    for prefixes, x in zip(tree.prefixes(), field, strict=True):
        for prefix, row in zip(prefixes, x.tolist(), strict=True):
            table.update({(prefix, a): number for a, number in enumerate(row)})
    return table
