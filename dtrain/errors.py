"""The one exception for mistakes of the user.

A mistake of the user (a file, a key, a value, an impossible mesh) is told in one message, without a traceback, and ends
the program with exit code 2. Every other exception is a fault of the program: exit code 1 and the traceback of the rank
that failed first. `dtrain.launch.failures` makes the difference; everybody else only raises.
"""


class UserError(ValueError):
    """Says what was wrong, where (file, key such as `parallel.tp`), what is allowed, and the nearest right spelling."""
