"""Pages of HTML: their templates and scripts, and the numbers that they show."""
