"""The ground floor: what every program here needs, whatever it computes."""
