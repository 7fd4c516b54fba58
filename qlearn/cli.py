"""The command line, qlearn COMMAND --flags, where flags come from the dataclasses."""

import argparse
import codecs
import difflib
import errno
import importlib
import io
import sys

from qlearn import recipes
from qlearn.errors import InputError, RunStopped

# command: (module, configuration, one line of help); the module's `run` does the work
COMMANDS = {
    "sft": ("qlearn.train.sft", "SFTConfig", "teach a model to write completions"),
    "reward": ("qlearn.train.reward", "RewardConfig", "fit a reward model to preferences"),
    "ppo": ("qlearn.train.ppo", "PPOConfig", "train a model on a reward (PPO or RLOO)"),
    "dpo": ("qlearn.train.dpo", "DPOConfig", "train a model on preferences"),
    "search": ("qlearn.findings.search", "SearchConfig", "answer prompts by any decoder"),
    "inspect": ("qlearn.show.inspect", "InspectConfig", "print and draw each token's credit"),
    "diagnose": ("qlearn.findings.likelihood", "DiagnoseConfig", "say what a run's curves mean"),
    "data check": ("qlearn.lm.check", "CheckConfig", "look for faults in a file of rows"),
}
POSITIONAL = {"data check": "--data", "diagnose": "--run_dir"}  # whose first word needs no flag

OVERVIEW = """usage: qlearn COMMAND [--flags]

A language model trained with DPO is a token-level Q-function. Train one and look inside:

{commands}

qlearn COMMAND --help lists its flags. Any flag can stand in a recipe instead:
  qlearn dpo --config recipe.yaml --beta 0.1     (a flag overrides the recipe)

A first run, with no file and no network, about a minute on a laptop:
  qlearn sft --config tiny-sft --output-dir runs/sft
  qlearn dpo --config tiny-dpo --model runs/sft --output-dir runs/dpo
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 for unusable input, 1 for a run that stopped itself."""
    sys.stdout, sys.stderr = forgiving(sys.stdout), forgiving(sys.stderr)
    code = dispatch(list(sys.argv[1:] if argv is None else argv))
    problem = lost_output(sys.stdout)
    if problem:
        print(f"qlearn: the output is not complete: {problem}.", file=sys.stderr)
    return code or (2 if problem else 0)


def dispatch(argv: list[str]) -> int:
    """The exit code of one command."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  qlearn {c:{width}}  {text}" for c, (_, _, text) in COMMANDS.items())
    overview = OVERVIEW.format(commands=lines)
    command = next((c for c in COMMANDS if argv[: len(c.split())] == c.split()), None)
    if command is None:
        print(overview)
        if not argv or argv[0] in ("-h", "--help"):
            return 0
        near = difflib.get_close_matches(" ".join(argv[:2]), COMMANDS, n=1, cutoff=0.4)
        hint = f" Did you mean qlearn {near[0]}?" if near else ""
        print(f"qlearn: there is no command {argv[0]!r}.{hint}", file=sys.stderr)
        return 2
    flags = argv[len(command.split()) :]
    if command in POSITIONAL and flags and not flags[0].startswith("-"):
        flags = [POSITIONAL[command], *flags]
    try:
        module, config = load(command)
        module.run(parse(command, config, flags))
    except SystemExit as end:  # argparse's, after --help
        return end.code
    except InputError as error:
        print(f"qlearn {command}: {error}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"qlearn {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"qlearn {command}: interrupted", file=sys.stderr)
        return 130
    return 0


# --- the terminal ------------------------------------------------------------------------------

# what a terminal without these letters shows for them; it shows ? for any other
SPELLED = {
    **{"β": "beta", "π": "pi", "γ": "gamma", "λ": "lambda", "α": "alpha", "σ": "sigma"},
    **{"Σ": "sum", "−": "-", "±": "+-", "×": "x", "→": "->", "·": "|"},
}


def spell(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: β becomes beta where the terminal's encoding has no β."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(SPELLED.get(letter, "?") for letter in text), error.end


codecs.register_error("qlearn.spell", spell)


class Pipe(io.FileIO):
    """The far end of a pipe that may close (`qlearn ... | head`): what comes after is dropped.

    The work goes on: a training run whose first lines are enough for its reader is still saved.
    """

    lost = ""  # why something was dropped, where the reader did not want it so

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EINVAL):  # Windows says EINVAL
                self.lost = error.strerror
            return len(data)


def forgiving(stream):
    """A standard stream that neither its encoding nor a closed pipe turns into a traceback."""
    if not isinstance(stream, io.TextIOWrapper):  # a notebook's, a test's, or none
        return stream
    stream.reconfigure(errors="qlearn.spell")
    if stream not in (sys.__stdout__, sys.__stderr__) or stream.isatty():
        return stream
    stream.flush()
    pipe = io.BufferedWriter(Pipe(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(
        pipe, stream.encoding, stream.errors, line_buffering=stream.line_buffering
    )


def lost_output(stream) -> str:
    """Why not everything could be written to a stream, a full disk say; empty where all was."""
    if stream is not None:
        stream.flush()
    return getattr(getattr(getattr(stream, "buffer", None), "raw", None), "lost", "")


# --- flags -------------------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default only where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def load(command: str):
    """(module, configuration class) of a command, imported only when it is used."""
    module, config, _ = COMMANDS[command]
    module = importlib.import_module(module)
    return module, getattr(module, config)


def parse(command: str, config: type, argv: list[str]):
    """The configuration from a recipe (`--config`) and flags, which override it.

    Raises: InputError for a recipe that cannot be read or has an unknown key, and for an unknown
    or malformed flag. SystemExit 0 after --help.
    """
    from transformers.hf_argparser import HfArgumentParser

    recipe, given = None, []

    class Flags(HfArgumentParser):
        def add_argument(self, *names, range=None, **how):  # it passes on all metadata of a field
            return super().add_argument(*names, **how)

        def error(self, message):
            where = f" (flags and {recipe} together)" if recipe else ""
            raise InputError(f"{message}{where}; qlearn {command} --help lists the flags.")

    parser = Flags(
        config,
        prog=f"qlearn {command}",
        description=COMMANDS[command][2],
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        help=f"a YAML file with any of these flags, or one of {', '.join(recipes.names())}",
    )
    first = Flags((), add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    recipe = first.parse_known_args(argv)[0].config
    if recipe is not None:
        settings = recipes.read(recipe, config)
        given = [f"--{name}={value}" for name, value in settings.items()]
    given += argv  # argparse keeps the last value, so a flag overrides the recipe
    namespace = vars(parser.parse_args(given))
    namespace.pop("config")
    return config(**namespace)


if __name__ == "__main__":
    sys.exit(main())
