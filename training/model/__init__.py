"""The model: what a training starts from, its adapters and its loss."""
