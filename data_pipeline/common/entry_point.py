"""How a command ends: quietly, or with one line that says which mistake to mend."""

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from data_pipeline.common.errors import UserError


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run an entry point: a `UserError` becomes one line on stderr, printed once, and exit code 2."""
    rank = int(os.environ.get("RANK", 0))
    try:
        main()
    except UserError as error:
        if rank == 0:
            print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        else:
            time.sleep(10)  # a launcher ends all ranks when one has ended: let rank 0 speak first
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
