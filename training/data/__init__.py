"""The data: from files to rows, from rows to batches."""
