"""Work that is counted where a clock would measure the neighbours too: calls, tensor operations, files opened.

Seconds are measured by `make bench`."""
import sys
from contextlib import contextmanager

from torch.utils._python_dispatch import TorchDispatchMode


class Calls:
    "`with Calls() as calls: ...`, then `calls.number`: calls of functions, Python's and C's, in this thread."
    def __enter__(self):
        self.number, self.before = 0, sys.getprofile()
        sys.setprofile(self.see)
        return self

    def see(self, frame, event, argument):
        self.number += event in ("call", "c_call")

    def __exit__(self, *error):
        sys.setprofile(self.before)


class Operations(TorchDispatchMode):
    "`with Operations() as done: ...`, then `done.names`, one for each tensor operation, and `done.numbers`, the numbers they gave."
    def __init__(self):
        super().__init__()
        self.names, self.numbers = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        self.numbers += sum(part.numel() for part in (given if isinstance(given, tuple | list) else [given]) if hasattr(part, "numel"))
        return given


HEARING = []                # lists that are told of every file opened; a hook of Python's cannot be taken away


def hear(event: str, arguments: tuple):
    if event == "open" and HEARING:
        for heard in HEARING:
            heard.append(str(arguments[0]))


sys.addaudithook(hear)


@contextmanager
def files_opened(ending: str = ""):
    "`with files_opened('.toml') as names: ...`: afterwards the names that were opened, as often as they were."
    heard = []
    HEARING.append(heard)
    try:
        yield heard
    finally:
        HEARING.remove(heard)
        heard[:] = [name for name in heard if name.endswith(ending)]
