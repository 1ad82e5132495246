"""The recipes that come with Ringworld; `ringworld init` copies one. Nothing here is imported."""
