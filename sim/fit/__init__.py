"""Constants of estimated step times, fitted to a recorded run of a server, and how far they are off."""
