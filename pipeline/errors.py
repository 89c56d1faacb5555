"""The one exception a user is meant to read: what is wrong, where, and how to mend it."""


class UserError(Exception):
    """A fault in the input or the set-up; its text is one line and is printed without a traceback."""
