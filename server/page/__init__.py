"""The page at ``/``: static files, read once; all it knows it asks the API for."""
