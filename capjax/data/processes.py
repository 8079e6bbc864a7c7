"""What worker processes of the data share."""

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection


def die_with_parent() -> None:
    """Ends this worker when the process that started it is gone, even by kill -9.

    A thread waits for the pipe that only the parent holds open. (Linux's PR_SET_PDEATHSIG would
    tell of the end of the starting *thread*, which may end before, and of nothing if the parent
    ended earlier.)
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        # The time limit covers a forked sibling that inherited the other end of the pipe.
        while not connection.wait([parent.sentinel], timeout=1) and os.getppid() == parent.pid:
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="capjax-die-with-parent").start()


def ignore_signals() -> None:
    """Leaves it to the parent what a signal to all its processes means: ^C, or a scheduler's.

    A run that stops between two steps still needs its data until then.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
