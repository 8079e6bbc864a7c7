"""One file a command: `add_arguments(parser)` and `run(args)`; the only readers of a config.

Nothing heavy is imported at the top of a command file, so that `--help` answers at once.
"""
