"""What lasts: the server's checkpoints, each client's store, and the folder of a run."""
