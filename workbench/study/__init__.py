"""The study model: synthetic scenes, questions about them, training and evaluation."""
