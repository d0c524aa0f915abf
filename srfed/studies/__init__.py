"""Many runs: each trained in a process of its own and kept, and what they say together."""
