"""The engine's commands, and flags made of dataclasses, which the simulator's commands share."""
