"""The exceptions a user is meant to see."""


class InputError(Exception):
    """Something the user gave (a file, a row, a key, a checkpoint) cannot be used.

    The message is one paragraph that names the place and says what was expected; the command line prints it without a
    traceback and exits with code 2.
    """


class Preempted(Exception):
    """SIGTERM has stopped training after a whole step, which is saved.

    The command line says so and exits with code 143, what a shell shows for a process that SIGTERM has ended.
    """
