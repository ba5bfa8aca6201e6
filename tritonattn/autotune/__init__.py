"""`tritonattn tune`, `configs` and `env`: search for configs, and say which are in use."""
