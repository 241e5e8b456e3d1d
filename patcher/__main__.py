"""``python -m patcher`` is the ``patcher`` command."""

from patcher.cli import main

main()
