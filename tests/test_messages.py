"""Every message that a user can meet is read once, aloud: `messages.txt` is the list of those read.

A message that is new or reworded fails the test until somebody has read it and run

    python tests/test_messages.py

which writes the list anew: its diff is what there is to read. What a placeholder stands for is
written as in the source.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = ROOT / "tests" / "messages.txt"
ERRORS = ("InputError", "RunStopped")


def message_of(node: ast.expr) -> str:
    """A message as its source spells it: an f-string with {placeholders}, or a name in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
            for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return message_of(node.left) + message_of(node.right)
    return f"{{{ast.unparse(node)}}}"


def messages(source: str) -> list[str]:
    """The messages of every InputError and RunStopped of a module, and its notes, in order."""
    calls = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and node.args:
            name, message = getattr(node.func, "id", None), message_of(node.args[0])
            if name in ERRORS or (name == "print" and message.startswith("note: ")):
                calls.append((node.lineno, message))
    return [message for _, message in sorted(calls)]


def collected() -> str:
    lines = []
    for path in sorted((ROOT / "qlearn").rglob("*.py")):
        found = messages(path.read_text(encoding="utf-8"))
        if found:
            lines += [str(path.relative_to(ROOT).as_posix()), *(f"    {m}" for m in found), ""]
    return "\n".join(lines)


def sentences(message: str) -> int:
    """How many sentences a message has; a full stop in a placeholder or a file name is none."""
    text = re.sub(r"\{[^{}]*(\{[^{}]*\}[^{}]*)*\}", "X", message)
    return len(re.findall(r"[.?](?= |$)", text))


ALL = [line.strip() for line in collected().splitlines() if line.startswith("    ")]


def test_claim_every_message_has_been_read():
    """To add or change one: read it aloud, then `python tests/test_messages.py`."""
    read = LIST.read_text(encoding="utf-8").splitlines()
    new = [line for line in collected().splitlines() if line not in read]
    assert collected().splitlines() == read, f"not read yet: {new}"


def test_claim_every_message_is_whole():
    """One sentence or two, to the full stop; nothing cut out of the middle of another."""
    for message in ALL:
        whole = re.search(r"[.?](\{[^{}]*\})?$", message)
        assert whole and "\n" not in message, message
        assert sentences(message) <= 2, message
        assert not re.search(r"\[:\d+\]", message.replace("[:8]", "")), message


def test_bug_a_message_cut_in_the_middle_is_noticed():
    """What the collector reads: plain, joined, conditional and f-strings, with their slices."""
    source = 'raise InputError(f"Could not {what} ({str(error)[:200]})")\nRunStopped("a " + b)'
    assert messages(source) == ["Could not {what} ({str(error)[:200]})", "a {b}"]
    assert sentences("One {a.b} of x.json is bad. Do {c}.") == 2


if __name__ == "__main__":
    LIST.write_text(collected(), encoding="utf-8")
