"""What machine code says without a GPU: counts of instructions, the replay of loops, schedules of tiles."""
