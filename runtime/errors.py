"""Errors that the user can fix, and how they are worded."""


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
