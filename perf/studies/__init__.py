"""Studies behind pages of docs/."""
