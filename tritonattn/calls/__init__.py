"""The public functions, from argument checks to the operators."""
