"""The exceptions whose message is meant for the reader of a command line."""


class InputError(ValueError):
    """One clear sentence: what is wrong, where, what to do; all that the command line prints."""


class RunStopped(RuntimeError):
    """A run that ended itself to protect the model, and why."""
