"""HTML pages: templates, scripts, and the numbers that they show."""
