"""Turn raw scans into a patch store in five stages. This package does not use the models of this project."""
