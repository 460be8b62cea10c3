"""The page in which to ask about a picture and to look inside. `python -m demos` or `kimi-vl demo` opens it."""
