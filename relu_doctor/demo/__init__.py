"""The demo: four stories of training on scikit-learn's handwritten digits, told by their settings alone."""
