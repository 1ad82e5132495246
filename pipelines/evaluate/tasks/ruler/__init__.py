"""RULER (arXiv 2404.06654): retrieval, tracing, aggregation and questions in generated contexts of a wanted length."""
