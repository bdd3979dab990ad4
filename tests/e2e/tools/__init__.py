"""Other people's tools, unchanged, against the real server: `make test-tools`."""
