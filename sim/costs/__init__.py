"""What a step costs: recorded, measured, or estimated by the rates of known hardware."""
