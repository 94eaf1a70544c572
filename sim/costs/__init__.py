"""What a step costs: recorded, measured, or by the limits of known hardware."""
