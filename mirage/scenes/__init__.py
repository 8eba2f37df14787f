"""Where frames and cameras come from: camera paths, RGB-D folders, synthetic rooms."""
