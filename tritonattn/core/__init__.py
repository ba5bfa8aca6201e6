"""Records and semantics that every layer above shares."""
