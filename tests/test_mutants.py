"""The faults that `make mutants` can plant: their number may not fall, and exclusions are few."""

import ast
from collections import defaultdict

import pytest

from tools.mutants.__main__ import ENDS, excluded, table
from tools.mutants.faults import ROOT, counts, faults_of, modules, plant


@pytest.fixture(scope="module")
def faults():
    return [fault for module in modules() for fault in faults_of(module)]


def test_claim_the_number_of_faults_does_not_fall(faults):
    """By module and operator, against the committed table, which knows every module."""
    now, kept = counts(faults), table()
    fewer = {key: f"{now[key]} of {row['planted']}" for key, row in kept.items()
             if now[key] < int(row["planted"])}  # fmt: skip
    assert not fewer, f"{fewer}: say why, and run `python -m tools.mutants --count`"
    assert {module for module, _ in kept} == set(modules()), "run `python -m tools.mutants --count`"


def test_claim_every_public_function_has_a_fault(faults):
    """Functions and methods without an underscore, but for those that a class only declares."""
    broken = {(fault.module, fault.function.split(".<")[0]) for fault in faults}
    for module in modules():
        tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
        classes = [(f"{c.name}.", c.body) for c in tree.body if isinstance(c, ast.ClassDef)]
        for prefix, body in [("", tree.body), *classes]:
            for node in body:
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    assert (module, prefix + node.name) in broken


def test_claim_exclusions_are_few_and_proved(faults):
    """Each names a fault that is planted today and says why it changes nothing; at most 3 %."""
    proofs = excluded()
    assert len(proofs) <= 0.03 * len(faults)
    assert set(proofs) <= {fault.name for fault in faults}
    assert all(len(proof) > 20 and "\n" not in proof.strip() for proof in proofs.values())


def test_claim_the_table_accounts_for_every_fault():
    """A row says how its faults ended and at which commit, or nothing of it."""
    for row in table().values():
        ran = [row[end] for end in ENDS]
        assert all(ran) == any(ran) == bool(row["commit"])
        assert not any(ran) or sum(map(int, ran)) > 0


def test_claim_a_planted_fault_is_another_program(faults):
    """Three faults of each operator: the source parses and is not what it was."""
    of_operator = defaultdict(list)
    for fault in faults:
        of_operator[fault.operator].append(fault)
    for found in of_operator.values():
        for fault in found[:: max(1, len(found) // 3)]:
            source = (ROOT / fault.module).read_text(encoding="utf-8")
            assert ast.dump(ast.parse(plant(fault, source))) != ast.dump(ast.parse(source))
