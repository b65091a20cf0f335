"""Errors that the user can mend, and how they are worded."""


class UserError(Exception):
    """The run cannot continue: one line that names the flag or file, what is wrong, what to do."""

    status = 2  # of the process


def first_line(error):
    """The message of an exception, on one line."""
    message = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return message.splitlines()[0]


def one_line(text, limit=800):
    """Text, which may quote what was typed or what a file holds, as one line for a terminal."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return line if len(line) <= limit else f"{line[: limit // 2]}...{line[-limit // 2 :]}"
