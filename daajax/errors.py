"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake outside the program: config, files, data, mesh.

    Its text is one line that says what was got, what was needed and what to do. Every command prints it without a
    stack trace and exits with code 1.
    """
