"""The settings in a TRL run's `training_args.bin`, read without running anything in it.

The file is a zip of `torch.save`, and its `data.pkl` is a pickle: a program that, when loaded, may
call any function. `torch.load` refuses it (the class is not on its list) or runs it. Here the
program is only read, opcode after opcode, on a stack that holds plain values and names: an object
is the name of its class and the state it would be given; no name is ever looked up.
"""

import pickletools
import zipfile
from dataclasses import dataclass, field

LARGEST = 2**20  # bytes; TRL's are 5 kB

MARK = object()  # where an opcode like SETITEMS starts to collect


@dataclass(eq=False)  # two may hold each other, so they are never compared
class Object:
    """What the pickle would build: the name of a class or function, its arguments, its state."""

    name: str
    arguments: tuple = ()
    state: dict = field(default_factory=dict)


def read_training_args(path: str) -> tuple[str, dict]:
    """(class name, settings) of the object in a `training_args.bin`, as `("DPOConfig", {...})`.

    A member of an enumeration is its value; any other object stays an `Object`.

    Raises: ValueError for a file that is not such a zip, is torn or too large, or whose pickle
    does anything but describe one object with a state.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (entry,) = (e for e in archive.infolist() if e.filename.endswith("/data.pkl"))
            if entry.file_size > LARGEST:
                raise ValueError("too large")
            described = describe(archive.read(entry))
    except Exception as error:  # a hostile file fails in ways without a common class
        raise ValueError(f"{path} is not a readable training_args.bin.") from error
    name = described.name.rpartition(".")[2] if isinstance(described, Object) else ""
    if not (name.isidentifier() and described.state):
        raise ValueError(f"{path} does not hold the settings of a training run.")
    return name, {key: _value(x) for key, x in described.state.items() if isinstance(key, str)}


def describe(pickled: bytes):
    """What a pickle would build, as plain values or an `Object`; nothing is imported or called.

    Raises: ValueError or an IndexError, KeyError or TypeError for a pickle that is malformed or
    uses opcodes that settings never need.
    """
    stack, memo = [], {}
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name == "STOP":
            return stack.pop()
        if name in ("PROTO", "FRAME"):
            continue
        if name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in LITERALS:
            stack.append(argument)
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            stack.append(MARK)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        else:
            _build(name, argument, stack)
    raise ValueError("The pickle has no end.")


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
}


def _build(name: str, argument, stack: list) -> None:
    """One opcode that makes a value of the values on the stack."""
    if name == "GLOBAL":
        stack.append(Object(argument.replace(" ", ".")))
    elif name == "STACK_GLOBAL":
        module, attribute = _pop(stack, 2)
        stack.append(Object(f"{module}.{attribute}"))
    elif name in ("NEWOBJ", "REDUCE"):
        made_of, arguments = _pop(stack, 2)
        stack.append(Object(made_of.name, tuple(arguments)))
    elif name == "NEWOBJ_EX":
        made_of, arguments, _ = _pop(stack, 3)
        stack.append(Object(made_of.name, tuple(arguments)))
    elif name == "BUILD":
        (state,) = _pop(stack, 1)
        attributes = state[0] if isinstance(state, tuple) and state else state  # beside slots
        if isinstance(attributes, dict):
            stack[-1].state.update(attributes)
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        stack.append(tuple(_pop(stack, int(name[-1]))))
    elif name == "TUPLE":
        stack.append(tuple(_pop_to_mark(stack)))
    elif name == "LIST":
        stack.append(_pop_to_mark(stack))
    elif name == "APPEND":
        (value,) = _pop(stack, 1)
        stack[-1].append(value)
    elif name in ("APPENDS", "ADDITEMS"):
        values = _pop_to_mark(stack)
        stack[-1].extend(values)
    elif name == "SETITEM":
        _set(stack[-3], _pop(stack, 2))
    elif name == "SETITEMS":
        values = _pop_to_mark(stack)
        _set(stack[-1], values)
    else:
        raise ValueError(f"Settings need no opcode {name}.")


def _pop(stack: list, n: int) -> list:
    values = stack[-n:]
    if len(values) < n or any(value is MARK for value in values):
        raise ValueError("The stack is too short.")
    del stack[-n:]
    return values


def _pop_to_mark(stack: list) -> list:
    values = []
    while (value := stack.pop()) is not MARK:
        values.append(value)
    return values[::-1]


def _set(target: dict | Object, values: list) -> None:
    target = target.state if isinstance(target, Object) else target  # an OrderedDict, say
    for key, value in zip(values[::2], values[1::2], strict=True):
        if isinstance(key, str):  # all that settings have; a tuple may take for ever to hash
            target[key] = value


def _value(x):
    """A member of an enumeration, as `FDivergenceType("reverse_kl")`, becomes its value."""
    is_member = isinstance(x, Object) and not x.state and len(x.arguments) == 1
    return x.arguments[0] if is_member else x
