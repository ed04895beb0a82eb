"""The end of a process: exit codes, one line for an error, signals."""
import gc
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback

import torch.distributed as dist

from engine.errors import EXIT_PREEMPTED, InputError, Preempted, one_line
from engine.process import environment_rank, is_main_process


def run(main):
    """Call `main()` and end the process: exit code 0, 1 after an error, `EXIT_PREEMPTED`, or 130 after Ctrl-C.

    An `InputError`, a `FloatingPointError` of training, a dead loader process or a lost peer becomes one line on stderr;
    any other error is a bug and keeps its traceback.
    """
    code, held = 0, None  # what is raised is held: it keeps the DataLoader, which would wait for workers that hang
    try:
        try:
            main()
        except BaseException:
            if hasattr(signal, "SIGCHLD"):  # torch's handler would raise at the death of a loader process
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise
    except Preempted as stop:
        code, held = EXIT_PREEMPTED, stop
        if is_main_process():
            print(stop, file=sys.stderr)
    except KeyboardInterrupt as stop:
        code, held = 130, stop
        if environment_rank() == 0:
            print("interrupted; what is saved stays", file=sys.stderr)
    except Exception as error:
        code, held, text = 1, error, str(error)
        rank = environment_rank()
        name = f"error{f' (process {rank})' if rank else ''}"
        if isinstance(error, (InputError, FloatingPointError)):
            if rank:
                # What all met, process 0 says, and the launcher then ends the others; what this one alone met, it must say.
                time.sleep(5)
            print(f"{name}: {one_line(error)}", file=sys.stderr)
        elif "DataLoader worker" in text or isinstance(error, (ConnectionError, EOFError)):
            # The second kind where it died in the middle of handing over a batch.
            cause = one_line(error) if "DataLoader worker" in text else f"DataLoader worker broke off, {one_line(error)}"
            print(f"{name}: a loader process died: {cause.rstrip('. ')}. If memory ran out, lower --num_workers",
                  file=sys.stderr)
        elif dist.is_initialized() and re.search(r"gloo|nccl|connection (closed|reset)|broken pipe", text, re.IGNORECASE):
            time.sleep(1)  # the other one's error comes first
            print(f"{name}: the connection to another process broke; if none has said why above, it was killed "
                  f"({one_line(error)[:160]})", file=sys.stderr)
        else:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if not code:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    # Loader processes may hang in a read; an error must not wait for them, nor for the other processes.
    for child in multiprocessing.active_children():
        child.kill()
    del held
    os._exit(code) if dist.is_initialized() or code == EXIT_PREEMPTED else sys.exit(code)


class StopSignals:
    """Notes SIGTERM and SIGUSR1, by which schedulers announce the end; while data are waited for they end the wait."""

    class WaitEnded(BaseException):  # noqa: N818 - no error, and no `except Exception` on its way may take it for one
        """Raised inside `wait_for`."""

    def __init__(self):
        self.received, self._waiting, self._process = None, False, os.getpid()
        self._before = {number: signal.signal(number, self._note) for number in self._numbers()}

    @staticmethod
    def _numbers():
        return [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # no USR1 on Windows

    def _note(self, number, frame):
        if os.getpid() != self._process:  # a loader process that was just forked
            return
        self.received = signal.Signals(number).name
        if self._waiting:
            self._waiting = False
            raise self.WaitEnded

    def wait_for(self, call):
        """`call()`, or None when a signal came before or meanwhile."""
        try:
            try:
                self._waiting = True
                return None if self.received else call()
            finally:
                self._waiting = False
        except self.WaitEnded:
            return None
        except Exception:
            if self.received:  # torch.compile wraps what is raised while it traces
                return None
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def ignore_signals(worker_id=None):
    """`worker_init_fn` of a DataLoader: schedulers and Ctrl-C signal all processes, but only the main one is to react.

    When it stops amid taking a batch over, the thread that hands batches over is not to print a traceback.
    """
    gc.enable()  # within `collecting_by_hand` it was off when this process was forked
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    hook = sys.excepthook
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, (ConnectionError, EOFError)) else hook(kind, *rest)
