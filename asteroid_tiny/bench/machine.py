"""What a measurement ran on: the processor's name, and memory as the kernel counts it."""

import contextlib
import platform
import re
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")  # of Linux


def cpu_name():
    """What the processor is called (str)."""
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def peak_bytes():
    """The most memory that was resident since `reset_peak`; elsewhere since the process began."""
    if STATUS.exists():
        return _kilobytes(STATUS, "VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def reset_peak():
    """Lets the peak of resident memory begin anew, where the kernel allows it."""
    with contextlib.suppress(OSError):
        (STATUS.parent / "clear_refs").write_text("5")


def resident_bytes():
    """Memory of this process that is resident now."""
    return _kilobytes(STATUS, "VmRSS")


def available_bytes():
    """Memory that is available on this machine."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def _kilobytes(path, key):
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", path.read_text())[1])
