"""`python -m svdiff.cli`: the same as the command `svdiff`."""

from svdiff.cli import main

main()
