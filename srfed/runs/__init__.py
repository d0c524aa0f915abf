"""A run: what is checked before it begins, how it is opened again, scored and adapted."""
