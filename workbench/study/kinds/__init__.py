"""Question families beyond the single small picture: each module draws pictures and asks about them."""
