"""Many replays: grids of settings, a results file that resumes, the search for the highest load."""
