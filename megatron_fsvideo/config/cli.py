"""How every entry script ends: a user's mistake is one clear line and a non-zero exit code, not a traceback."""

import os
import sys
from collections.abc import Callable

TRACEBACK_VARIABLE = "MEGATRON_FSVIDEO_TRACEBACK"


def run_script(main: Callable[[], None]) -> None:
    """Call `main`; print a ValueError, a missing file or a missing library as one line and exit with 1.

    `MEGATRON_FSVIDEO_TRACEBACK=1` shows the traceback instead. Anything else is a defect of ours and keeps its own.
    """
    try:
        main()
    except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        # Other ranks may wait in a collective: end at once, without the interpreter's orderly shut-down.
        sys.stdout.flush()
        os._exit(1)
