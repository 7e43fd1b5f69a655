"""`dtrain`, or `python -m dtrain.launch`: threads first, then the command inside the guard."""

from dtrain.launch.environment import set_blas_threads
from dtrain.launch.failures import guard


def main() -> None:
    """Run the command line; ends the process with the exit code of `dtrain.launch.failures`."""
    set_blas_threads()  # before anything imports NumPy
    with guard():
        from dtrain.launch.main import run

        run()


if __name__ == "__main__":
    main()
