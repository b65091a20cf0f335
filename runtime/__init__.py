"""What surrounds a method while it runs: flags, errors, files, checkpoints, the run folder."""
