"""What can be broken in a function of qlearn, and how: faults, by operator.

  plus     a plus for a minus, a product for a quotient, and the reverse
  term     a term or a factor lost: a reference, a scale, a mask, a minus sign
  bound    >= for >, != for ==, `or` for `and`, a condition turned round
  shift    an index, a slice or a range off by one
  mean     a mean for a soft maximum or a sum, the least for the largest, any for all
  sign     the argument of a sigmoid or an exponential with the other sign
  swap     two arguments of a divergence, a ratio, a loss or a test in each other's place
  mask     a mask or a condition that is not looked at: where, masked_fill, clamp
  flag     True for False in a call, another axis
  triple   the whole result three times too large
  hollow   a function that hands back its argument, a constant or nothing

Left alone: text of messages, annotations, defaults, docstrings, and statements outside functions.
"""

import ast
import copy
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("exact", "lm", "findings", "studies", "train")
MOST = 3  # faults of one operator in one function: more of the same say little more

ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
BOUNDS = {
    ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
MEANS = {
    "sum": "mean", "mean": "sum", "max": "min", "min": "max", "amax": "amin", "amin": "amax",
    "maximum": "minimum", "minimum": "maximum", "argmax": "argmin", "logsumexp": "mean",
    "any": "all", "all": "any", "std": "var", "cumsum": "cumprod", "fsum": "max", "fmean": "sum",
    "log_softmax": "softmax", "softmax": "log_softmax", "median": "max", "ptp": "max",
}  # fmt: skip
SIGNED = {"logsigmoid", "sigmoid", "exp", "tanh"}
PAIRED = {
    "sequence_kl", "implicit_reward", "implicit_rewards", "bradley_terry", "bradley_terry_logp",
    "population_loss", "dpo", "dpo_loss", "tilt", "ppo_clip", "value_clip", "soft_value_prior",
    "sign_law", "subtract", "mcnemar", "paired_bootstrap", "pearsonr", "spearmanr", "linregress",
    "log_ratio_and_kl", "token_credit", "mix", "gap", "equivalent", "label", "contrast", "wins",
}  # fmt: skip
MASKS = {"where": 1, "masked_fill": "self", "clamp": "self", "roll": "self", "flip": "self",
         "sorted": 0, "normalize": 0, "detach": "self", "reversed": 0}  # fmt: skip
NUMBERS = {"Tensor": "3 * (x)", "float": "3 * (x)", "Levels": "tuple(3 * level for level in x)"}
EMPTY = {"bool": "True", "str": "''", "int": "0", "float": "0.0", "list": "[]", "dict": "{}",
         "tuple": "()", "Iterator": "iter(())"}  # fmt: skip


class Fault(NamedTuple):
    """One fault that can be planted: where it is, its operator, and what it does."""

    module: str  # qlearn/exact/soft.py
    function: str  # soft_backup.level
    line: int
    operator: str
    what: str
    number: int  # of the site in its file

    @property
    def name(self) -> str:
        return f"{self.module}: {self.function}: {self.what}"


class Site(NamedTuple):
    """A place that can be broken, and what puts the broken node there."""

    function: str
    node: ast.AST
    operator: str
    what: str
    change: Callable[[ast.AST], ast.AST]


class Sites(ast.NodeVisitor):
    """Collects every site of a module, in the order of its text."""

    def __init__(self):
        self.scope, self.sites = [], []

    def add(self, node, operator, what, change):
        if self.scope and isinstance(self.scope[-1], ast.FunctionDef):
            name = ".".join(x.name for x in self.scope)
            self.sites.append(Site(name, node, operator, what, change))

    # --- whole functions -------------------------------------------------------------------

    def visit_FunctionDef(self, node):
        inside = any(isinstance(x, ast.FunctionDef) for x in self.scope)
        self.scope.append(node)
        result = ast.unparse(node.returns) if node.returns else ""
        if not inside and (not node.name.startswith("_") or node.name == "__post_init__"):
            self.add(node, "hollow", "nothing done", lambda n: _hollow(n, result))
        if result in NUMBERS:
            self.add(node, "triple", "the result tripled", lambda n: _tripled(n, NUMBERS[result]))
        for statement in node.body[1:] if ast.get_docstring(node) else node.body:
            self.visit(statement)
        self.scope.pop()

    def visit_ClassDef(self, node):
        self.scope.append(node)
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef):
                self.visit(statement)
        self.scope.pop()

    # --- expressions -----------------------------------------------------------------------

    def visit_BinOp(self, node):
        text, kind = ast.unparse(node), type(node.op)
        words = isinstance(node.op, ast.Add) and any(
            isinstance(x, ast.JoinedStr | ast.List | ast.Tuple)
            or (isinstance(x, ast.Constant) and isinstance(x.value, str))
            for x in (node.left, node.right)
        )
        if kind in ARITHMETIC and not words:
            other = ARITHMETIC[kind]
            self.add(node, "plus", f"{text} with {other.__name__.lower()}",
                     lambda n: ast.BinOp(n.left, other(), n.right))  # fmt: skip
            self.add(node, "term", f"{text} without its right side", lambda n: n.left)
            if kind in (ast.Add, ast.Mult):
                self.add(node, "term", f"{text} without its left side", lambda n: n.right)
        elif kind in (ast.BitAnd, ast.BitOr):
            other = ast.BitOr if kind is ast.BitAnd else ast.BitAnd
            self.add(node, "bound", f"{text} with the other of & and |",
                     lambda n: ast.BinOp(n.left, other(), n.right))  # fmt: skip
        elif kind in (ast.Pow, ast.FloorDiv, ast.MatMult) and not words:
            self.add(node, "term", f"{text} without its right side", lambda n: n.left)
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        text = ast.unparse(node)
        if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self.add(node, "term", f"{text} without its sign", lambda n: n.operand)
        elif isinstance(node.op, ast.Not | ast.Invert):
            self.add(node, "bound", f"{text} without its not", lambda n: n.operand)
        self.generic_visit(node)

    def visit_Compare(self, node):
        other = BOUNDS[type(node.ops[0])]
        self.add(node, "bound", f"{ast.unparse(node)} with {other.__name__}",
                 lambda n: ast.Compare(n.left, [other(), *n.ops[1:]], n.comparators))  # fmt: skip
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        self.add(node, "bound", f"{ast.unparse(node)} with {other.__name__.lower()}",
                 lambda n: ast.BoolOp(other(), n.values))  # fmt: skip
        self.generic_visit(node)

    def visit_IfExp(self, node):
        self.add(node, "bound", f"{ast.unparse(node)} the other way round",
                 lambda n: ast.IfExp(n.test, n.orelse, n.body))  # fmt: skip
        self.generic_visit(node)

    def visit_Slice(self, node):
        for side in ("lower", "upper"):
            bound = getattr(node, side)
            if bound is not None:
                self.add(node, "shift", f"[{ast.unparse(node)}] with {side} + 1",
                         lambda n, side=side: _later(n, side))  # fmt: skip
        self.generic_visit(node)

    def visit_Call(self, node):
        text = ast.unparse(node)
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in ("range", "arange", "roll") and node.args:
            self.add(node, "shift", f"{text} off by one", _off_by_one)
        if name in MEANS:
            self.add(node, "mean", f"{text} with {MEANS[name]}", lambda n: _renamed(n, MEANS[name]))
        if name == "logsumexp":
            self.add(node, "mean", f"{text} with amax", lambda n: _renamed(n, "amax"))
        if name in SIGNED:
            self.add(node, "sign", f"{text} of the other sign", _other_sign)
        if name in PAIRED and len(node.args) >= 2:
            first = 1 if name in ("sequence_kl",) else 0
            if len(node.args) >= first + 2:
                self.add(node, "swap", f"{text} with two arguments swapped",
                         lambda n: _swapped(n, first))  # fmt: skip
        kept = MASKS.get(name)
        if kept == "self" and isinstance(node.func, ast.Attribute):
            self.add(node, "mask", f"{text} left out", lambda n: n.func.value)
        elif isinstance(kept, int) and len(node.args) > kept:
            self.add(node, "mask", f"{text} left out", lambda n: n.args[kept])
        for k, word in enumerate(node.keywords):
            value = word.value
            if word.arg == "strict" or not isinstance(value, ast.Constant | ast.UnaryOp):
                continue
            if getattr(value, "value", None) in (True, False) and isinstance(value.value, bool):
                self.add(node, "flag", f"{text} with {word.arg} the other way",
                         lambda n, k=k: _flag(n, k, not n.keywords[k].value.value))  # fmt: skip
            elif word.arg in ("dim", "axis"):
                axis = 1 if getattr(value, "value", None) == 0 else 0
                self.add(node, "flag", f"{text} with {word.arg} {axis}",
                         lambda n, k=k, axis=axis: _flag(n, k, axis))  # fmt: skip
        self.generic_visit(node)

    def visit_If(self, node):
        self.add(node, "bound", f"if {ast.unparse(node.test)} turned round",
                 lambda n: ast.If(ast.UnaryOp(ast.Not(), n.test), n.body, n.orelse))  # fmt: skip
        self.generic_visit(node)

    def visit_AnnAssign(self, node):
        if node.value:
            self.visit(node.value)

    def visit_Raise(self, node):
        """Messages are prose."""

    visit_JoinedStr = visit_Assert = visit_arguments = visit_Raise


def _renamed(call, name):
    """The call with another function: a method keeps its object, a mean its first argument."""
    func = copy.deepcopy(call.func)
    if isinstance(func, ast.Attribute):
        func.attr = name
    elif name in ("mean", "fsum"):
        return ast.parse(f"(lambda x: sum(x) / len(x))(list({ast.unparse(call.args[0])}))",
                         mode="eval").body  # fmt: skip
    else:
        func.id = name
    return ast.Call(func, call.args, call.keywords)


def _other_sign(call):
    if call.args:
        first = ast.UnaryOp(ast.USub(), call.args[0])
        return ast.Call(call.func, [first, *call.args[1:]], call.keywords)
    func = copy.deepcopy(call.func)
    func.value = ast.UnaryOp(ast.USub(), func.value)
    return ast.Call(func, [], call.keywords)


def _swapped(call, first):
    args = list(call.args)
    args[first], args[first + 1] = args[first + 1], args[first]
    return ast.Call(call.func, args, call.keywords)


def _off_by_one(call):
    """The last argument of range and arange one smaller, the first of roll one larger."""
    args = list(call.args)
    last = 0 if getattr(call.func, "attr", "") == "roll" else min(len(args), 2) - 1
    step = ast.Add() if getattr(call.func, "attr", "") == "roll" else ast.Sub()
    args[last] = ast.BinOp(args[last], step, ast.Constant(1))
    return ast.Call(call.func, args, call.keywords)


def _later(node, side):
    moved = ast.Slice(node.lower, node.upper, node.step)
    bound = getattr(node, side)
    end = isinstance(bound, ast.UnaryOp) and getattr(bound.operand, "value", None) == 1
    # -1 + 1 would be 0, another end of the row
    setattr(moved, side, None if end else ast.BinOp(bound, ast.Add(), ast.Constant(1)))
    return moved


def _flag(call, k, value):
    words = list(call.keywords)
    words[k] = ast.keyword(words[k].arg, ast.Constant(value))
    return ast.Call(call.func, call.args, words)


def _hollow(node, result):
    """The function with its arguments and one return: the first argument, or an empty result."""
    names = [x.arg for x in node.args.args if x.arg not in ("self", "cls")]
    kind = result.split("[")[0].strip("'\"")
    empty = names[0] if kind in ("Tensor", "Levels") and names else EMPTY.get(kind, "None")
    returned = ast.parse(f"return {empty}").body
    fields = {k: getattr(node, k) for k in node._fields} | {"body": returned}
    return ast.FunctionDef(**fields)


def _tripled(node, formula):
    class Returns(ast.NodeTransformer):
        def visit_Return(self, found):
            wrapped = ast.parse(formula, mode="eval").body
            return ast.Return(_Replace(lambda x: isinstance(x, ast.Name) and x.id == "x",
                                       found.value).visit(wrapped))  # fmt: skip

        def visit_FunctionDef(self, found):
            return found  # a function inside returns for itself

        visit_Lambda = visit_FunctionDef

    body = [Returns().visit(statement) for statement in node.body]
    return ast.FunctionDef(**{k: getattr(node, k) for k in node._fields} | {"body": body})


class _Replace(ast.NodeTransformer):
    def __init__(self, wanted, new):
        self.wanted, self.new = wanted, new

    def visit(self, node):
        return self.new if self.wanted(node) else super().visit(node)


def modules() -> list[str]:
    """Every module of the packages, and the losses."""
    paths = [p for x in PACKAGES for p in ROOT.glob(f"qlearn/{x}/*.py") if p.name != "__init__.py"]
    return sorted(str(p.relative_to(ROOT)) for p in [*paths, ROOT / "qlearn" / "losses.py"])


def _sites(source: str) -> tuple[ast.Module, list[Site]]:
    tree, sites = ast.parse(source), Sites()
    sites.visit(tree)
    return tree, sites.sites


def faults_of(module: str) -> list[Fault]:
    """The faults of one module: of each operator at most `MOST` a function, spread evenly."""
    _, sites = _sites((ROOT / module).read_text(encoding="utf-8"))
    groups = defaultdict(list)
    for number, site in enumerate(sites):
        where = f"{site.function}: {site.operator}"
        groups[where].append(Fault(module, site.function, site.node.lineno if hasattr(
            site.node, "lineno") else 0, site.operator, site.what, number))  # fmt: skip
    kept = []
    for group in groups.values():
        n = min(MOST, len(group))
        kept += [group[k * len(group) // n] for k in range(n)]
    return sorted(kept, key=lambda fault: fault.number)


def plant(fault: Fault, source: str) -> str:
    """The source of the fault's module with the fault in it."""
    tree, sites = _sites(source)
    site = sites[fault.number]
    broken = _Replace(lambda node: node is site.node, site.change(site.node)).visit(tree)
    return ast.unparse(ast.fix_missing_locations(broken))


def counts(faults: list[Fault]) -> Counter:
    """How many of them each module has of each operator: {(module, operator): n}."""
    return Counter((fault.module, fault.operator) for fault in faults)
