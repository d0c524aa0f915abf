"""What is typed: each command is its options, its words and one call.

Nothing heavy is imported before it is needed.
"""
