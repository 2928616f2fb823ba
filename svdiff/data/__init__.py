"""What training reads: concept folders, prior images and their augmentation."""
