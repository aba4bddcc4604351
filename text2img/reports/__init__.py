"""What a run leaves to look at: gallery, comparison, contact sheets, and the files beside the images."""
