"""Zero-shot segmentation with a trained model, and how good it is."""
