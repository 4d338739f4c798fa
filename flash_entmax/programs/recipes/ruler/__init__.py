"""The recipe ruler: questions on long texts, in the manner of RULER. ``tasks.py`` opens with what is asked."""
