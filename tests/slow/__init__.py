"""The long tail: `make test-slow` runs this folder, `make test` all others."""
