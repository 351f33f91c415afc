"""One file per run; each has get_config() and, in its docstring, the command."""
