"""The codec stage: the visual tokenizer's weights, imported from where the recipe says or trained on its frames."""
