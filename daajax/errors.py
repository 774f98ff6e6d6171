"""The exception that means "the user can mend this", and the one that means "it may be well again later"."""


class UserError(Exception):
    """A mistake outside the program: config, files, data, mesh.

    Its text is one line that says what was got, what was needed and what to do. Every command prints it without a
    stack trace and exits with code 1.
    """


class OutageError(UserError):
    """Something outside that did not answer for minutes: a command exits with code 43, and may be started again."""


def one_line(error: Exception, most: int = 200) -> str:
    """What a library's error says, behind its kind, as part of one line of at most so many characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= most else f"{text[:most]}…"
