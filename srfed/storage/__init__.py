"""What lasts: the server's checkpoints, each client's store, and the folder of a run."""

CHECKPOINT_FORMAT = 2
"""Of checkpoints' manifests (:mod:`srfed.storage.checkpoint`), here for those who read one without
importing PyTorch. 1 had a tensor for each member of a group, and no layout.
"""
