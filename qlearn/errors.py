"""The exceptions whose message is meant for the reader of a command line."""

LONGEST = 300  # characters of another library's sentence that we repeat


class InputError(ValueError):
    """One clear sentence: what is wrong, where, what to do; all that the command line prints."""


class RunStopped(RuntimeError):
    """A run that ended itself to protect the model, and why."""


def reason_of(error: Exception) -> str:
    """What an error of another library says, as half a sentence to stand in one of ours.

    Its first line up to a full stop, never cut inside a sentence; the error's class where it says
    nothing, or nothing short.

    >>> reason_of(OSError("There is no such repository. See https://a.b/c."))
    'There is no such repository'
    """
    lines = str(error).strip().splitlines()
    first = lines[0].partition(". ")[0].rstrip(" .:") if lines else ""
    return first if 0 < len(first) <= LONGEST else type(error).__name__
