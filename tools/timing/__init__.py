"""What the benchmark is made of: timings taken in turns, literal versions, and the rows of its table."""
