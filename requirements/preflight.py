"""`python requirements/preflight.py FOLDER GIGABYTES [c]`: say what this machine lacks before anything is installed.

FOLDER is the virtual environment to be made; "c" asks for a compiler and Python's headers too. Exits with 1 where
something is missing. Runs on any Python from 2.7 on, so that an old one gets an answer and no SyntaxError.
"""


import os
import shutil
import subprocess
import sys

OLDEST = (3, 10)


def main():
    folder, gigabytes, needs_c = sys.argv[1], float(sys.argv[2]), "c" in sys.argv[3:]
    lacks = [wrong_python()] if sys.version_info < OLDEST else [no_venv(), no_disk(folder, gigabytes)]
    if needs_c and sys.version_info >= OLDEST:
        lacks += [no_compiler(), no_headers()]
    lacks = [text for text in lacks if text]
    for text in lacks:
        print("make: " + text, file=sys.stderr)
    return int(bool(lacks))


def wrong_python():
    """The refusal of an old Python, with the newer ones on the PATH, and how to name one."""
    running = "tritonattn needs Python 3.10 or newer, this is %s (%s)" % (sys.version.split()[0], sys.executable)
    names = [name for name in ("python3.%d" % minor for minor in range(10, 20)) if runs(name)]
    if names:
        return running + "; found here: " + ", ".join(names) + ". Write make PYTHON=" + names[-1]
    return running + "; none was found. Install one, for example: sudo apt-get install python3.11 python3.11-venv"


def runs(name):
    """True where a command of this name starts: a shim of pyenv exists for versions that it does not run."""
    try:
        with open(os.devnull, "w") as nowhere:
            return subprocess.call([name, "--version"], stdout=nowhere, stderr=nowhere) == 0
    except OSError:
        return False


def no_venv():
    """Debian and Ubuntu ship venv without ensurepip in a package of their own."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        package = "python%d.%d-venv" % sys.version_info[:2]
        return "Python's venv module is incomplete (%s): sudo apt-get install %s" % (error, package)
    return None


def no_disk(folder, gigabytes):
    """Free space is asked of the nearest folder that exists."""
    folder = os.path.abspath(folder)
    if os.path.exists(os.path.join(folder, ".made")):
        return None  # installed before: what is left to install is small
    place = folder
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free / 1e9
    if free >= gigabytes:
        return None
    text = "%s needs %.1f GB, and 5 more with PyPI's CUDA libraries; %.1f GB are free there: make VENV=/another/disk"
    return text % (folder, gigabytes, free)


def no_compiler():
    missing = [name for name in (os.environ.get("CC", "gcc"), "g++") if shutil.which(name) is None]
    return "not found: %s. sudo apt-get install gcc g++" % ", ".join(missing) if missing else None


def no_headers():
    import sysconfig

    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if os.path.exists(header):
        return None
    package = "python%d.%d-dev" % sys.version_info[:2]
    return "Python's headers are missing (%s): sudo apt-get install %s" % (header, package)


if __name__ == "__main__":
    sys.exit(main())
