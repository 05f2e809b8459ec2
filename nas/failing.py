"""What the user can cause, as one line and exit code 2; every command goes through it."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from nas.machine.launch import launched
from search_spaces.errors import UserError

OF_THE_MACHINE = (  # what a path or a disk can refuse, and no fault of the program
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG, errno.ENOTDIR,
    errno.ELOOP,
)  # fmt: skip


@contextmanager
def errors(program: str) -> Iterator[None]:
    """What the user can cause, or a data loading process that dies, as one line and exit code 2."""
    try:
        yield
    except UserError as error:
        fail(program, str(error))
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        fail(program, f"{error.filename or 'the disk'}: {error.strerror}; give another place, or make room there")
    except RuntimeError as error:
        from nas.data.loader import lost_worker

        words = lost_worker(error)
        if words is None:
            raise
        fail(program, words)


def fail(program: str, message: str) -> None:
    """One line on stderr, exit code 2."""
    message = " ".join(message.splitlines())  # a value that was given may have several
    if launched():
        from nas.machine.distributed import report

        report(program, message)
    else:
        print(f"{program}: error: {message}", file=sys.stderr)
    sys.exit(2)
