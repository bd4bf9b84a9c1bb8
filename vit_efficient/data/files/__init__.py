"""Files of images to arrays: one file per kind."""
