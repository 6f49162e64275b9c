"""From the command line to a run that can start."""
