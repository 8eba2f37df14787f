"""Files as people have them: images, depth, how a frame is cut from an image, and files with checksums."""
