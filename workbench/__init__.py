"""Tools that look inside Kimi-VL and change things; the model never imports them."""
