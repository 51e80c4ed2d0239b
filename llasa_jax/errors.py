"""The one exception that means: the input is wrong, and here is how to mend it."""


class UserError(Exception):
    """A mistake that its reader can mend.

    The message is one sentence that names the file, the record where there is one, and the fix. The command line
    prints it without a traceback and exits with status 2.
    """
