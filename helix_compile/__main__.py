"""python -m helix_compile is the console script."""

from helix_compile.cli.commands import main

main()
