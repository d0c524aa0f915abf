"""Running on real machines: certificates and keys, a site's own check, and a rehearsal on one
machine.

Flower and PyTorch run only in the processes that :mod:`srfed.deployment.process` starts, or where
a function needs them; importing this room loads neither.
"""
