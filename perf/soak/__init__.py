"""Random calls, held to float64, to their repetition and to the rest of a batch."""
