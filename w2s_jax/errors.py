"""The one exception that a user's mistake raises.

`main.py` prints it as a single line on stderr and exits with code 2. Everything
else that is raised is a defect of the program and keeps its traceback.
"""


class UserError(Exception):
    """Bad input: the message names the key or file, the value and what was expected."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


def nearest(name: str, known) -> str:
    """`"; did you mean X?"` for the closest of `known`, or the empty string."""
    import difflib

    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
