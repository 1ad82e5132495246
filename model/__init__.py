"""The transformer, ring attention, the loss, the train step, generation, weight import and export. Knows no Ray."""
