"""The explorer: models on single images, step by step under attack."""
