"""The static model of machine code: what a kernel's loop does, whether it passes, and which config ranks first."""
