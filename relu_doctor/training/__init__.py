"""In training: a monitor that is attached to a run, and the history that it leaves."""
