"""The error for what a caller can get wrong; its one line says what was wrong, what was expected, what to do."""


class InputError(ValueError):
    """Wrong input. The command line prints the message alone and exits with 1."""
