"""Dense prediction: an encoder slid over the lungs of a scan."""
