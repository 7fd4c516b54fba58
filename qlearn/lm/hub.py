"""The hub, asked once whether it can be reached, so that nobody waits for a minute of retries.

The hub's own libraries try again five times with growing pauses. Here one short request goes first;
where it fails they are put into their offline mode, in which what lies in the cache is still read.
"""

import functools
import threading

import huggingface_hub
from huggingface_hub import constants

OFFLINE_BY_CHOICE = constants.HF_HUB_OFFLINE  # as the environment says
SECONDS = 4.0  # how long the first request may take, looking up the name of the host included


@functools.cache
def can_be_reached() -> bool:
    """Whether the hub answers; if not, the hub's libraries are offline from here on."""
    answers = []

    def ask():
        try:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=SECONDS / 2)
            answers.append(True)
        except Exception:  # offline mode, no route, no such host: no common class
            answers.append(False)

    # In a thread, because no timeout holds for the lookup of a host's name.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    if answers == [True]:
        return True
    import datasets

    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return False


def reason() -> str:
    """Half a sentence: why the hub was not read, where it cannot be reached."""
    if OFFLINE_BY_CHOICE:
        return "HF_HUB_OFFLINE is set, so the hub is not asked"
    return f"the hub at {constants.ENDPOINT} cannot be reached"
