"""The command line: one small file per command, each building a config and calling one function."""
