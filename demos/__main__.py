"""`python -m demos`: the page with the study model; `kimi-vl demo` takes options."""

from .app import main

main()
