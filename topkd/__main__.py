"""``python -m topkd``: the same commands as the ``topkd`` script."""

from topkd.cli import main

main()
