"""What ends a run."""
import re


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that names the file, flag or key."""


class Preempted(Exception):  # noqa: N818 - no error
    """A signal asked the run to stop, and all that it needs to go on is saved; the message says how it does."""


EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command, once more, goes on


def one_line(error):
    """Message of an error; out of a loader worker it comes wrapped in a traceback, as the last line, after its class."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^(\w+\.)+\w+(Error|Image): ", "", lines[-1])
