"""Runs entry scripts so that a user's mistake ends in one clear line and a non-zero exit code, not in a traceback."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

TRACEBACK_VARIABLE = "MEGATRON_FSVIDEO_TRACEBACK"
# This variable names a file for each process. torchrun prints the content of the first failing process's file.
_ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
_FAILED, _INTERRUPTED, _READER_GONE = 1, 130, 141


def run_script(main: Callable[[], None]) -> None:
    """Call `main`. Print a user's mistake (ValueError, OSError) or a missing library as one line and exit with 1.

    `MEGATRON_FSVIDEO_TRACEBACK=1` shows the traceback instead. Any other exception is a defect of ours and keeps its
    traceback.
    """
    try:
        main()
    except BrokenPipeError:
        _exit(_READER_GONE)
    except KeyboardInterrupt:
        report_error("interrupted")
        _exit(_INTERRUPTED)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        report_error(f"error: {error}")
        _exit(_FAILED)
    except Exception:
        _write_error_file(traceback.format_exc())
        raise


def report_error(line: str) -> None:
    """Print a line to standard error. Under torchrun only rank 0 prints; torchrun repeats the line of another rank."""
    if _write_error_file(line) and os.environ.get("RANK", "0") != "0":
        return
    # Python represents bytes that are not UTF-8 in file names as halves of surrogate pairs.
    print(line.encode("utf-8", "backslashreplace").decode("utf-8"), file=sys.stderr, flush=True)


def _write_error_file(text: str) -> bool:
    """Pass a message to torchrun, in the format of torch.distributed.elastic; return False without torchrun."""
    path = os.environ.get(_ERROR_FILE_VARIABLE)
    if not path:
        return False
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump({"message": text, "timestamp": int(time.time())}, file)
    return True


def _exit(code: int) -> NoReturn:
    # Other ranks may wait in a collective, so the process ends at once, without the interpreter's orderly shut-down.
    if code != _READER_GONE:
        sys.stdout.flush()
    os._exit(code)
