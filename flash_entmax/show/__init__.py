"""Pictures and pages of what was attended to."""
