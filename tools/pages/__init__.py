"""HTML pages: templates, scripts, and the numbers that the pages show."""
