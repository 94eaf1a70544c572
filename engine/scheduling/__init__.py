"""The pure state machines that engine and simulator share: no clock, no thread, no I/O, no arrays (law 1)."""
