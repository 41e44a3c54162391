"""The one exception a user is meant to see."""


class InputError(Exception):
    """Something the user gave (a file, a row, a key, a checkpoint) cannot be used.

    The message is one paragraph that names the place and says what was expected; the command line prints it without a
    traceback and exits with code 2.
    """
