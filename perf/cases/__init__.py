"""Cases of a sweep: ours and its peers on the same inputs, checked against float64 before they are timed."""
