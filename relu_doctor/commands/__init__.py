"""The commands, a file for each kind: parse, call, print, exit code. No logic."""
