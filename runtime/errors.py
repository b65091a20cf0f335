"""Errors that the user can fix, and how they are worded."""

import contextlib


class UserError(Exception):
    """The run cannot continue: one line that says what was given, what is wrong, what to do."""


def first_line(error):
    """The message of an exception, on one line."""
    message = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return message.splitlines()[0]


def one_line(text):
    """Text, which may quote what was typed or what a file holds, as one line for a terminal."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return line if len(line) <= 800 else f"{line[:400]}...{line[-400:]}"


@contextlib.contextmanager
def explain(label, wrong="cannot be read", advice=""):
    """Raise UserError in place of any exception: a damaged file can cause all kinds.

    What the system refuses, such as a file of somebody else, is not damaged: it cannot be read.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) and not wrong.startswith("cannot"):
            wrong, advice = "cannot be read", ""
        reason = first_line(error).partition(" <")[0]  # Pillow's may end with the file object
        raise UserError(f"{label}: {wrong} ({reason}){advice}") from None
