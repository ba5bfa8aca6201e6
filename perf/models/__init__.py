"""Machine code read without a GPU: counts of instructions, the replay of loops, schedules of tiles."""
