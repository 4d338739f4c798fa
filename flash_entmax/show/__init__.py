"""Pictures and pages of recorded attention."""
