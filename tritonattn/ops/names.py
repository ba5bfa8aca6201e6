"""The operators' names, which a process can register once."""

# The package's own name: "tritonattn", and in a kernel loaded from a hub the one that its loader gives to this copy.
NAMESPACE = __name__.split(".")[0]


def qualified(operator: str) -> str:
    """The full name of an operator."""
    return f"{NAMESPACE}::{operator}"
