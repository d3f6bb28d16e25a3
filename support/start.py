"""Can the program begin? job.py imports this before all else."""

import signal
import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("job.py: error: Python 3.10 or later is needed")
if sys.platform == "win32":
    sys.exit("job.py: error: Windows itself can't run this: use WSL, the Windows Subsystem for Linux")

if sys.argv[0].endswith("job.py") and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports, which take seconds: no traceback

try:
    import nvflare  # noqa: F401

    import data  # noqa: F401
    import model  # noqa: F401
except ModuleNotFoundError as error:
    sys.exit(f"job.py: error: {error}: is the virtual environment active, and everything installed?")
except SystemExit:  # which would end job.py without a word, and with its own status
    sys.exit("job.py: error: data.py or model.py called sys.exit while it was imported")
