"""One module for each command; `cli` calls its `main(argv)`, which returns the exit code."""
