"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """A mistake in an option or a file, said in one line: what, which value, what to do.

    Raised where the value enters. The entry points print it once, on rank 0, without a traceback, and exit with code 2.
    """
