"""How a job ends when something goes wrong: one message, the right exit code, no process left behind.

    UserError, wrong command line    2   the message, from one rank; no traceback
    every other exception            1   the traceback of the rank that failed first, its rank and host
    Ctrl-C, SIGTERM             130, 143   nothing; under mpirun all ranks are ended

The difficulty is that a rank does not know whether the others failed too. A mistake in the configuration fails on all
ranks: rank 0 tells it and all leave in good order, so that mpirun adds nothing. A full disk fails on one: it has to end
the others, which wait in a collective. `mpi.everyone` tells the cases apart: a non-blocking barrier that either
completes soon or never. Whatever blocks on the way (MPI that cannot start or stop) is ended by an alarm.
"""

import contextlib
import errno
import os
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from dtrain.errors import UserError
from dtrain.launch import environment

_GRACE = 2.0  # seconds for the other ranks to fail in the same way, or for the launcher to end this one


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Run the body such that whatever goes wrong in it, on any rank and in any thread, ends the whole job as above."""
    _handle_signals()
    threading.excepthook = lambda failure: _end_fault(failure.exc_value or failure.exc_type())
    try:
        yield
    except UserError as error:
        _end_mistake(str(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except SystemExit as leaving:
        if leaving.code not in (None, 0) and _position()[1] > 1:
            _abort(leaving.code if isinstance(leaving.code, int) else 1)
        raise
    except BrokenPipeError:  # the reader of our output has left, as in `dtrain show config CONFIG | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except BaseException as error:
        _end_fault(error)


def on_rank_0(command: Callable[[], None]) -> None:
    """Run a command that needs one process and no MPI on rank 0; the other ranks of a job leave at once.

    What goes wrong in it ends this process alone: the others are gone, and MPI would wait for them to start.
    """
    rank, size = _position()
    if rank > 0:
        return
    try:
        command()
    except SystemExit as leaving:
        if size == 1:
            raise
        sys.stdout.flush()
        os._exit(leaving.code if isinstance(leaving.code, int) else 0)
    except Exception as error:
        if size == 1 or isinstance(error, BrokenPipeError):
            raise
        mistake = isinstance(error, UserError)
        _tell(f"dtrain: error: {error}\n" if mistake else "".join(traceback.format_exception(error)))
        os._exit(2 if mistake else 1)


def _handle_signals() -> None:
    """One process cleans up (the cursor of the progress bar); one of many dies at once, even inside a call of MPI."""
    if threading.current_thread() is not threading.main_thread():
        return
    if environment.job().size > 1:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        threading.Thread(target=end_with, args=(os.getppid(),), name="launcher", daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, _terminate)


def end_with(launcher: int) -> None:
    """End this rank when the process that started it is gone; one that was killed could not end its ranks.

    Not all launchers see to it (Open MPI's does not), and a rank that waits for another one waits for ever.
    """
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _end_mistake(message: str) -> NoReturn:
    rank, size = _position()
    if rank == 0:
        _tell(f"dtrain: error: {message}\n")
    if size > 1:
        _set_alarm()
        from dtrain.collectives import mpi

        if not mpi.everyone(_GRACE if rank == 0 else 2 * _GRACE):  # when all fail but late, rank 0 ends them
            if rank != 0:
                _let_the_first_tell()
                _tell(f"dtrain: error: {message} (rank {rank} of {size} on {socket.gethostname()})\n")
            _abort(2)
    sys.exit(2)


def _end_fault(error: BaseException) -> NoReturn:
    rank, size = _position()
    where = error.__traceback__
    if where is not None and where.tb_frame.f_code.co_filename == __file__:
        where = where.tb_next  # the guard itself explains nothing
    trace = "".join(traceback.format_exception(type(error), error, where))
    if size == 1:
        _tell(trace)
    else:
        _let_the_first_tell()
        _tell(f"{trace}dtrain: rank {rank} of {size} on {socket.gethostname()} failed, the job ends\n")
    _abort(1)


def _abort(code: int) -> NoReturn:
    """End all ranks with `code`; MPI's own words about it go nowhere, ours are said."""
    sys.stdout.flush()
    if _position()[1] > 1:
        _set_alarm()
        with contextlib.suppress(Exception):  # no MPI to end the others with: the launcher sees how this rank ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            from dtrain.collectives import mpi

            mpi.abort(code)
    os._exit(code)


def end_without_the_dead(code: int) -> NoReturn:
    """End the job from ranks that are done, where others have died: MPI's own end would wait for these."""
    _abort(code)


def _position() -> tuple[int, int]:
    """Return rank and size: MPI's where it is up, else the launcher's."""
    mpi = sys.modules.get("dtrain.collectives.mpi")
    if mpi is not None and hasattr(mpi, "position"):
        rank, size = mpi.position()
        return int(rank), int(size)
    job = environment.job()
    return job.rank, job.size


def _let_the_first_tell() -> None:
    """Return at once in a node's first failing rank. The others wait to be ended; if nobody does it, they tell too."""
    if _first_of_the_job():
        return
    with contextlib.suppress(Exception):  # where MPI cannot start, nobody will end us: tell it
        from dtrain.collectives import mpi  # noqa: F401 (the first rank needs MPI to end us, and MPI starts on all)
    time.sleep(3 * _GRACE)


def _first_of_the_job() -> bool:
    """Is this the first rank here that asks? By what one process holds until it ends, and other jobs do not."""
    job = os.environ.get("PMIX_NAMESPACE") or str(os.getppid())  # under Hydra and srun one parent starts a node's ranks
    try:
        if sys.platform == "linux":
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as name:
                name.bind(f"\0dtrain-failed-{os.getuid()}-{job}")
                name.detach()  # so that it stays
        else:  # here a job that fails at the same moment delays ours
            import fcntl

            fcntl.flock(os.open(tempfile.gettempdir(), os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # no such names, a file system without locks: rather told twice than never
        return error.errno not in (errno.EADDRINUSE, errno.EWOULDBLOCK)
    return True


def _set_alarm() -> None:
    """SIGALRM kills this process if ending takes long, and with that the job."""
    mpi_is_up = "dtrain.collectives.mpi" in sys.modules
    signal.alarm(int(8 * _GRACE) if mpi_is_up else 20)  # starting many ranks on few cores takes its time


def _tell(text: str) -> None:
    """Write in one piece, so that the launcher does not mix it with other ranks' output; return when it was taken.

    A launcher that is told to end a job ends it without looking what its pipes still hold (Hydra, on a busy machine).
    """
    sys.stdout.flush()
    os.write(2, text.encode(errors="backslashreplace"))
    limit = time.monotonic() + _GRACE
    while _unread(2) and time.monotonic() < limit:
        time.sleep(0.01)


def _unread(descriptor: int) -> int:
    """Bytes that wait in a pipe; 0 for everything else."""
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return 0
    try:
        import fcntl
        import termios

        return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)
    except OSError:  # a system that asks for the other end of the pipe
        return 0
