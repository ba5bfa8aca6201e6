"""Time, memory and bytes on a CPU, and the host's part of calls on a GPU."""
