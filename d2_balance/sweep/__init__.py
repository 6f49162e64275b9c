"""Which remedy helps on a dataset: a study of remedies and seeds that says what is real."""
