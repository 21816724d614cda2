"""Numbers that the data and the model must agree on."""

PATCH_SIZE = 32  # voxels of 1 mm; the encoder's five halvings take it to 1
HU_MIN, HU_MAX = -1024, 240  # Hounsfield units; what patches are clipped to
