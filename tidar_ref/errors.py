"""The one error type that means "the caller asked for something impossible"."""


class UserError(Exception):
    """Bad input. The message is one sentence that names the value and the fix; the CLI exits 2."""
