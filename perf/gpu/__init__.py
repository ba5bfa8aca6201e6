"""All that needs a GPU machine."""
