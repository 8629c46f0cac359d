"""The one exception for mistakes a user can make and mend: the command line prints its message and exits with 2."""


class UserError(Exception):
    """What is wrong, where, and the way out, in one line."""
