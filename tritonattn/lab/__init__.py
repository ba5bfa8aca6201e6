"""Commands that measure scalings on models and on random keys."""
