"""Reports on a run: gallery, comparison, contact sheets, and the files next to the images."""
