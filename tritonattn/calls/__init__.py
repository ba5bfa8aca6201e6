"""The public calls, and what each passes on its way to an operator."""
