"""The command `pagellm`, also as `python -m pagellm`: a process made ready to run one command.

Nothing is imported from the working directory, where anybody may have put a `random.py`, unless the user
names a policy that is there. So nothing at all is imported here before that directory is off the path.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Runs one command; returns the exit status: see `pagellm.command`.

    arguments: None are those of this process, whose import path and standard streams are seen to first.
    """
    try:
        if arguments is None:
            _leave_working_directory()
            from pagellm.streams import prepare_streams

            prepare_streams()
        from pagellm.command import run

        return run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        return 130


def _leave_working_directory() -> None:
    """Takes the working directory off the import path, if it is there because Python was started in it."""
    try:
        here = os.getcwd()
    except OSError:  # it was removed
        here = ""
    if sys.path and sys.path[0] in ("", here):
        del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"  # processes that are started from here do not put it there either
    found = any(finder.find_spec("pagellm", None) for finder in sys.meta_path)
    if not found:  # in a checkout that is not installed; those processes look for it, too
        sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


if __name__ == "__main__":
    sys.exit(main())
