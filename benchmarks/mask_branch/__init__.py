"""Times the mask branch with each fusion of the r-FPN's stages against Mask R-CNN's head, on the same pyramid and instances."""
