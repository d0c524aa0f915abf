"""What lasts: the server's checkpoints, each client's store, and the models opened from them
again.
"""
